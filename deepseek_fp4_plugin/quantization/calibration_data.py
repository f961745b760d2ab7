"""Calibration text: from a data set, a file or the package, to token ids; seed, count and length in one place.

Every sample is at most `tokens` long and never padded: padding would enter the largest magnitudes. Of a large input
only what the samples need is tokenized and kept: tokenizing takes some 200 bytes of memory a character.
"""

import gzip
import hashlib
import json
import logging
import random
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_fp4_plugin.tokenizer import Tokenizer

CNN_DAILYMAIL, BUILTIN = "cnn_dailymail", "builtin"
HUB_ID, HUB_CONFIG = "abisee/cnn_dailymail", "3.0.0"  # the card's calibration set; its field is `article`
_TEXT_FIELDS = ("text", "article", "content", "document", "prompt")
_SHUFFLE_BUFFER = 10_000  # articles of the stream among which the seed chooses
_MAX_TEXT = 64 * 2**20  # characters of a plain text that are used
_WHOLE_TEXT = 2**20  # characters that are tokenized in one piece
_TOKEN_CHARS = 16  # characters that hold a token, nearly always
_FEW_TOKENS = 8  # different ones: no text has fewer
_log = logging.getLogger(__name__)


class CalibrationData(NamedTuple):
    """samples: token ids, each list 1..tokens long.  description: where they come from, for report and model card."""

    samples: list[list[int]]
    description: str

    @property
    def digest(self) -> str:
        """Identifies the token ids, for the job of a resumed run."""
        return hashlib.sha256(json.dumps(self.samples).encode()).hexdigest()

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.samples))


def load_calibration(
    name: str | Path, tokenizer: Tokenizer, samples: int, tokens: int, vocab_size: int, seed: int = 0
) -> CalibrationData:
    """At most `samples` token sequences of at most `tokens` each, chosen by `seed`.

    name: `cnn_dailymail` (through the `datasets` library), `builtin` (the package's own text), or a file: .txt, .jsonl
    (objects with one of text, article, content, document, prompt or messages), .parquet (the same columns), .gz of the
    first two. A plain text is cut into consecutive stretches; of records each is one sample, cut at its end.
    Raises ValueError naming the file or data set that cannot be used, and why.
    """
    if samples < 1 or tokens < 1:
        raise ValueError(f"calibration needs at least one sample of one token, got {samples} of {tokens}")
    if str(name) == CNN_DAILYMAIL:
        where, description = CNN_DAILYMAIL, f"cnn_dailymail {HUB_CONFIG} (train, `article`)"
        sequences: Iterable[list[int]] = (
            _first_tokens(text, tokens, tokenizer) for text in _cnn_dailymail(samples, seed)
        )
    else:
        path = _builtin() if str(name) == BUILTIN else Path(name).expanduser()
        where = str(path)
        description = "the package's own text" if str(name) == BUILTIN else f"the file {path.name}"
        sequences = _from_file(path, tokenizer, samples, tokens, seed)
    result = [sequence for sequence in sequences if sequence]
    if not result:
        raise ValueError(f"{where} holds no text to calibrate on")
    largest = max(map(max, result))
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer gives token id {largest}, but the model has {vocab_size} tokens; do they belong together?"
        )
    data = CalibrationData(result, description)
    _warn_of_little(data, where, samples, tokens)
    return data


def _warn_of_little(data: CalibrationData, where: str, samples: int, tokens: int) -> None:
    """Say when the samples are a small part of what was asked for, or hardly a text."""
    different = len(set(chain.from_iterable(data.samples)))
    counts = f"{data.num_tokens:,} tokens in {len(data.samples):,} samples"
    if data.num_tokens * 4 < samples * tokens:
        _log.warning(
            "%s gives %s, of %s asked for; input scales may be too small", where, counts, f"{samples * tokens:,}"
        )
    if different < _FEW_TOKENS:
        _log.warning("%s gives %s, but only %d different; is this the right text?", where, counts, different)


def token_batches(samples: list[list[int]], max_tokens: int) -> Iterator[tuple[int, int]]:
    """[start, stop) ranges of samples with at most `max_tokens` tokens together, but at least one sample."""
    start, size = 0, 0
    for index, sample in enumerate(samples):
        if index > start and size + len(sample) > max_tokens:
            yield start, index
            start, size = index, 0
        size += len(sample)
    yield start, len(samples)


def _builtin() -> Path:
    return Path(__file__).parents[1] / "assets" / "calibration.txt"


def _cnn_dailymail(samples: int, seed: int) -> Iterator[str]:
    advice = "pass a .txt, .jsonl or .parquet file with --calibration, or --calibration builtin"
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"calibration on cnn_dailymail needs the `datasets` package (pip install datasets); or {advice}"
        ) from None
    try:
        stream = datasets.load_dataset(HUB_ID, HUB_CONFIG, split="train", streaming=True)
        texts = [row["article"] for row in stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER).take(samples)]
    except Exception as error:  # the library's errors are those of every layer below it
        raise ValueError(f"cnn_dailymail cannot be fetched ({_one_line(error)}); {advice}") from None
    return iter(texts)


def _from_file(path: Path, tokenizer: Tokenizer, samples: int, tokens: int, seed: int) -> Iterable[list[int]]:
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    readers = {".txt": None, ".jsonl": _jsonl, ".parquet": _parquet}
    if kind not in readers:
        raise ValueError(
            f"calibration {str(path)!r} is neither cnn_dailymail, builtin nor a .txt, .jsonl or .parquet file"
        )
    if path.exists() and not path.is_file():  # a pipe could be read only once
        raise ValueError(f"calibration file {path} cannot be read: it is not a regular file")
    try:
        if kind == ".txt":
            return _stretches(_text(path), tokenizer, samples, tokens, seed)
        records = _chosen(_jsonl if kind == ".jsonl" else _parquet, path, samples, seed)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"calibration file {path} cannot be read: {_one_line(error)}") from None
    return (_encode(record, f"record {number} of {path}", tokens, tokenizer) for number, record in records)


def _chosen(
    read: Callable[[Path], Iterator[Mapping[str, Any]]], path: Path, samples: int, seed: int
) -> list[tuple[int, Mapping[str, Any]]]:
    """`samples` records that have a text, and their numbers from 1; two passes, so that only those are kept."""
    usable, total = array("q"), 0
    for total, record in enumerate(read(path), 1):
        if not _is_blank(record):
            usable.append(total)
    if len(usable) < total:
        _log.warning("%d of the %d records of %s have no text and are left out", total - len(usable), total, path)
    chosen = [usable[index] for index in random.Random(seed).sample(range(len(usable)), min(samples, len(usable)))]
    wanted = set(chosen)
    kept = {number: record for number, record in enumerate(read(path), 1) if number in wanted}
    if len(kept) < len(wanted):
        raise ValueError(f"calibration file {path} changed while it was being read; run again")
    return [(number, kept[number]) for number in chosen]


def _is_blank(record: Mapping[str, Any]) -> bool:
    """Whether a record has text fields but nothing in them; one without any is a mistake to be told of."""
    values = [record[field] for field in (*_TEXT_FIELDS, "messages") if field in record]
    return bool(values) and all(value is None or (isinstance(value, str) and not value.strip()) for value in values)


def _stretches(text: str, tokenizer: Tokenizer, samples: int, tokens: int, seed: int) -> list[list[int]]:
    """Stretches of `tokens` ids of a plain text, the rest left out unless the text is shorter than one.

    A large text is cut into pieces, and pieces chosen by `seed` give a stretch each until there are enough of them.
    """
    if len(text) <= _WHOLE_TEXT:
        return _cut(tokenizer.encode(text), samples, tokens, seed)
    starts = _piece_starts(text, max(tokens * _TOKEN_CHARS, 2**12))
    encoded: dict[int, array] = {}
    found = []
    for index in random.Random(seed).sample(range(len(starts)), len(starts)):
        stop = starts[index + 1] if index + 1 < len(starts) else len(text)
        ids = tokenizer.encode(text[starts[index] : stop], add_special_tokens=index == 0)
        encoded[index] = array("i", ids)
        if len(ids) >= tokens:
            found.append(ids[:tokens])
            if len(found) == samples:
                return found
    # A stretch a piece is not enough: all there is, as of a small text.
    return _cut(array("i", chain.from_iterable(encoded[index] for index in range(len(starts)))), samples, tokens, seed)


def _cut(ids: Sequence[int], samples: int, tokens: int, seed: int) -> list[list[int]]:
    starts = range(0, max(len(ids) - tokens, 0) + 1, tokens)
    chosen = random.Random(seed).sample(range(len(starts)), min(samples, len(starts)))
    return [list(ids[starts[index] : starts[index] + tokens]) for index in chosen]


def _piece_starts(text: str, size: int) -> list[int]:
    """Where pieces of about `size` characters begin: behind a line's end or a space where there is one near."""
    return [0, *(_boundary(text, start, start + size // 4) for start in range(size, len(text) - size // 2, size))]


def _boundary(text: str, start: int, stop: int) -> int:
    """The first place from `start` on where a line or a word begins; `start` where there is none before `stop`."""
    return next((at for mark in "\n " if (at := text.find(mark, start, stop)) >= 0), start)


def _first_tokens(text: str, tokens: int, tokenizer: Tokenizer, add_special_tokens: bool = True) -> list[int]:
    """The first `tokens` ids of a text, of a long one without tokenizing all of it."""
    size = max(tokens * _TOKEN_CHARS, 2**16)
    while size < len(text):
        head = tokenizer.encode(text[: _boundary(text, size, size + size // 4)], add_special_tokens)
        if len(head) >= tokens + 64:  # what is cut off may change the last ones
            return head[:tokens]
        size *= 4
    return tokenizer.encode(text, add_special_tokens)[:tokens]


def _encode(record: Mapping[str, Any], where: str, tokens: int, tokenizer: Tokenizer) -> list[int]:
    """The first ids of one record's text, or of its chat through the checkpoint's template."""
    messages = record.get("messages")
    if messages is not None:
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError(f"{where}: messages is not a list of objects with role and content")
        try:
            chat = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
            return _first_tokens(chat, tokens, tokenizer, add_special_tokens=False)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    texts = [record[field] for field in _TEXT_FIELDS if isinstance(record.get(field), str)]
    if not texts:
        odd = next((field for field in _TEXT_FIELDS if field in record), None)
        if odd is not None:
            raise ValueError(f"{where}: {odd} is {type(record[odd]).__name__}, expected a text")
        found = ", ".join(map(str, record)) or "none"
        raise ValueError(f"{where} has none of the fields {', '.join(_TEXT_FIELDS)}, messages; it has {found}")
    try:
        return _first_tokens(next((text for text in texts if text.strip()), texts[0]), tokens, tokenizer)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _text(path: Path) -> str:
    with _open(path) as file:
        return file.read(_MAX_TEXT)


def _jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            line = line.lstrip("\ufeff")  # a mark inside, where files were put together
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets in thousands
                raise ValueError(f"line {number} of {path} is not JSON: {getattr(error, 'msg', error)}") from None
            if not isinstance(record, dict):
                raise ValueError(f"line {number} of {path} is a JSON {type(record).__name__}, expected an object")
            yield record


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path} is Parquet, which needs the `pyarrow` package (pip install pyarrow)") from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in (*_TEXT_FIELDS, "messages") if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=columns or None):
                yield from batch.to_pylist()
    except (OSError, ValueError, NotImplementedError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(f"{path} is not a readable Parquet file: {_one_line(error)}") from None


def _open(path: Path):
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
