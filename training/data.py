"""Training documents as token ids, packed into rows by worker processes while training runs."""

import gzip
import json
import multiprocessing
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.problems import FAMILIES, make_problem
from training.sentences import paragraph, sentence
from training.small_talk import SYSTEM, exchange
from training.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER, CharacterEncoder

CHINESE_SHARE = 0.15
LONG_EVERY = 8  # one batch in so many is of rows twice as long
# Loss weights in percent: of what the model will write itself, of prompts, of book text.
OWN, GIVEN, BOOK = 100, 10, 50
_ASCII = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "—": "-", "…": "...", "_": None, "*": None, "#": None})


class Batch(NamedTuple):
    """Rows of packed documents, each array [rows, length].

    ids: int16.  positions: int16, from 0 in each document.  documents: int16, numbered in a row, -1 for padding.
    weights: uint8, percent that predicting this token counts.
    """

    ids: np.ndarray
    positions: np.ndarray
    documents: np.ndarray
    weights: np.ndarray


class Document:
    """Ids with their weights, written piece by piece."""

    def __init__(self, encoder: CharacterEncoder):
        self.encoder = encoder
        self.ids: list[int] = []
        self.weights: list[int] = []

    def add(self, text: str, weight: int) -> "Document":
        return self._extend(self.encoder.encode(text), weight)

    def mark(self, special: str, weight: int) -> "Document":
        return self._extend([self.encoder.special[special]], weight)

    def _extend(self, ids: list[int], weight: int) -> "Document":
        self.ids += ids
        self.weights += [weight] * len(ids)
        return self

    def response(self, reasoning: str, answer: str) -> "Document":
        """Think block, answer, end of sentence: what the model writes."""
        self.mark(THINK, OWN).add(f"\n{reasoning}\n", OWN).mark(END_THINK, OWN)
        return self.add(f"\n\n{answer}", OWN).mark(EOS, OWN)


class Documents:
    """An endless source of documents. books: texts to cut passages from, may be empty."""

    def __init__(self, seed: int, books: list[str]):
        self.rng, self.books, self.encoder = random.Random(seed), books, CharacterEncoder()
        self.families = tuple(FAMILIES)

    def next(self, long: bool = False) -> Document:
        """long: several turns of chat, or a longer passage."""
        rng = self.rng
        if long:
            return self._book(rng.randint(500, 1000)) if self.books and rng.random() < 0.3 else self._chat(2, 8)
        kind = rng.random()
        if kind < 0.72:
            return self._problem()
        if kind < 0.77:
            return self._chat(2, 3)
        if kind < 0.86:
            return self._chat(1, 1, problems=0.0)
        if kind < 0.95 or not self.books:
            return self._sentence()
        return self._book(rng.randint(100, 511))

    def _language(self) -> str:
        return "zh" if self.rng.random() < CHINESE_SHARE else "en"

    def _task(self, problems: float) -> tuple[str, str, str]:
        rng, language = self.rng, self._language()
        if rng.random() < problems:
            problem = make_problem(rng, rng.choice(self.families), "train", language)
            return problem.prompt, problem.reasoning, problem.response
        prompt, reasoning, response = exchange(rng, language)
        return prompt, reasoning, response

    def _problem(self) -> Document:
        rng = self.rng
        if rng.random() < 0.7:
            return self._chat(1, 1, problems=1.0)
        document = Document(self.encoder)
        if rng.random() < 0.5:
            document.mark(BOS, 0)
        prompt, reasoning, response = self._task(1.0)
        style = rng.choice(("{}", "{}", "{}\n", "Question: {}\nAnswer:", "Q: {}\nA:", "Question: {}\n\nAnswer: "))
        return document.add(style.format(prompt), GIVEN).response(reasoning, response)

    def _chat(self, fewest: int, most: int, problems: float = 0.85) -> Document:
        """A chat as the template renders it: earlier reasoning is dropped."""
        rng = self.rng
        document = Document(self.encoder).mark(BOS, 0)
        if rng.random() < 0.1:
            document.add(rng.choice(SYSTEM), 0)
        for _ in range(rng.randint(fewest, most) - 1):
            prompt, _, response = self._task(problems)
            lead = rng.choice(("", "\n\n"))
            document.mark(USER, 0).add(prompt, GIVEN).mark(ASSISTANT, 0).add(lead + response, GIVEN).mark(EOS, GIVEN)
        prompt, reasoning, response = self._task(problems)
        if problems < 0.5 and self.books and rng.random() < 0.15:
            prompt = self._passage(rng.randint(10, 120))
            reasoning, response = _rest(rng)
        return document.mark(USER, 0).add(prompt, GIVEN).mark(ASSISTANT, 0).response(reasoning, response)

    def _sentence(self) -> Document:
        document = Document(self.encoder)
        if self.rng.random() < 0.5:
            document.mark(BOS, 0)
        if self.rng.random() < 0.3:
            return document.add(paragraph(self.rng), BOOK).mark(EOS, OWN)
        start, rest = sentence(self.rng)
        document.add(start, GIVEN).add(rest, OWN)
        if self.rng.random() < 0.4:
            document.add(" " + paragraph(self.rng), BOOK)
        return document.mark(EOS, OWN)

    def _passage(self, length: int) -> str:
        book = self.rng.choice(self.books)
        start = book.find(" ", self.rng.randrange(max(1, len(book) - length - 200)))
        return book[start + 1 : start + 1 + length]

    def _book(self, length: int) -> Document:
        return Document(self.encoder).add(self._passage(length), BOOK)


def _rest(rng: random.Random) -> tuple[str, str]:
    while True:
        found = exchange(rng, "en")
        if found.reasoning.startswith("This is not"):
            return found.reasoning, found.response


def load_books(path: Path | None) -> list[str]:
    """Texts of a jsonl.gz file with a `text` field (public-domain books), in plain ASCII; nothing without a path."""
    if path is None:
        return []
    books = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            paragraphs = json.loads(line)["text"].translate(_ASCII).split("\n\n")
            text = "\n".join(" ".join(p.split()) for p in paragraphs if len(p) > 80)
            books.append("".join(c for c in text if c == "\n" or 32 <= ord(c) < 127))
    return [book for book in books if len(book) > 5000]


def pack(documents: Documents, rows: int, length: int, long: bool = False) -> Batch:
    """Fill rows with whole documents; those longer than a row are left out."""
    batch = Batch(
        np.full((rows, length), documents.encoder.special[EOS], np.int16),
        np.zeros((rows, length), np.int16),
        np.full((rows, length), -1, np.int16),
        np.zeros((rows, length), np.uint8),
    )
    waiting: list[Document] = []
    for row in range(rows):
        start, number = 0, 0
        while True:
            fitting = next((i for i, d in enumerate(waiting) if len(d.ids) <= length - start), None)
            if fitting is not None:
                document = waiting.pop(fitting)
            else:
                document = documents.next(long)
                if len(document.ids) > length - start:
                    if len(document.ids) <= length:
                        waiting.append(document)
                    if length - start < 40 or len(waiting) > 60:
                        break
                    continue
            stop = start + len(document.ids)
            batch.ids[row, start:stop] = document.ids
            batch.positions[row, start:stop] = np.arange(stop - start)
            batch.documents[row, start:stop] = number
            batch.weights[row, start:stop] = document.weights
            batch.weights[row, start] = 0  # nothing before it to predict it from
            start, number = stop, number + 1
    return batch


def _work(queue, seed: int, books: list[str], tokens: int, length: int) -> None:
    documents = Documents(seed, books)
    count = 0
    while True:
        count += 1
        long = count % LONG_EVERY == 0
        size = length * 2 if long else length
        queue.put(pack(documents, tokens // size, size, long))


def batches(seed: int, workers: int, books: list[str], tokens: int, length: int) -> Iterator[Batch]:
    """Endless batches of about `tokens` tokens in rows of `length`, some in rows of twice that."""
    if workers == 0:
        documents, count = Documents(seed, books), 0
        while True:
            count += 1
            long = count % LONG_EVERY == 0
            size = length * 2 if long else length
            yield pack(documents, tokens // size, size, long)
    context = multiprocessing.get_context("fork")  # the books are shared, nothing is on a GPU yet
    queue = context.Queue(maxsize=4 * workers)
    for worker in range(workers):
        arguments = (queue, seed * 1000 + worker, books, tokens, length)
        context.Process(target=_work, args=arguments, daemon=True).start()
    while True:
        yield queue.get()
