"""Records of calibration text: read from a file, and what one of them says: ids, a chat, or a text.

The forms are those that data sets of language models have; a field's name decides, the first that is known.
"""

import csv
import gzip
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
IDS, MESSAGES, CONVERSATIONS = "input_ids", "messages", "conversations"
TEXTS = ("text", "article", "content", "document", "prompt")
PAIRS = {"question": "answer", "instruction": "output", "problem": "solution", "query": "response"}
FIELDS = (*TEXTS, MESSAGES, CONVERSATIONS, *PAIRS, IDS)
_MORE = "input"  # of an instruction: what it is about
# Who speaks in ShareGPT's `from` -> the role that chat templates know.
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def is_blank(record: Record) -> bool:
    """Whether a record has fields that are known but nothing in them; one without any is a mistake to be told of."""
    values = [record[field] for field in FIELDS if field in record]
    return bool(values) and all(value is None or (isinstance(value, str) and not value.strip()) for value in values)


def ids_of(record: Record) -> list[int] | None:
    """The token ids of a record that has them, None for another. Raises ValueError for what is no list of ids."""
    value = record.get(IDS)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
        raise ValueError(f"{IDS} is not a list of token ids")
    return value


def content_of(record: Record) -> str | list[dict[str, Any]]:
    """A text, or a chat's messages. Raises ValueError with the field that cannot be used."""
    if record.get(MESSAGES) is not None:
        return _objects(record, MESSAGES, "role and content")
    if record.get(CONVERSATIONS) is not None:
        return [_turn(turn) for turn in _objects(record, CONVERSATIONS, "from and value")]
    texts = [record[field] for field in TEXTS if isinstance(record.get(field), str)]
    if texts:
        return next((text for text in texts if text.strip()), texts[0])
    question = next((field for field in PAIRS if isinstance(record.get(field), str)), None)
    if question is not None:
        return _pair(record, question)
    odd = next((field for field in (*TEXTS, *PAIRS) if field in record), None)
    if odd is not None:
        raise ValueError(f"{odd} is {type(record[odd]).__name__}, expected a text")
    found = ", ".join(map(str, record)) or "none"
    raise ValueError(f"has none of the fields {', '.join(FIELDS)}; it has {found}")


def _objects(record: Record, field: str, parts: str) -> list[dict[str, Any]]:
    value = record[field]
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f"{field} is not a list of objects with {parts}")
    return value


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """One turn of `conversations`, in ShareGPT's words or in those of messages."""
    if "role" in turn:
        return dict(turn)
    speaker, text = turn.get("from"), turn.get("value")
    if speaker not in _SPEAKERS or not isinstance(text, str):
        known = ", ".join(_SPEAKERS)
        raise ValueError(f"{CONVERSATIONS} has a turn from {str(speaker)[:40]!r}; known are {known}, with a text")
    return {"role": _SPEAKERS[speaker], "content": text}


def _pair(record: Record, question: str) -> list[dict[str, Any]]:
    """A question and its answer, where there is one, as a chat."""
    asked, answer = record[question], record.get(PAIRS[question])
    if question == "instruction" and isinstance(record.get(_MORE), str) and record[_MORE].strip():
        asked = f"{asked}\n\n{record[_MORE]}"
    if not isinstance(answer, str | None):
        raise ValueError(f"{PAIRS[question]} is {type(answer).__name__}, expected a text")
    turns = [{"role": "user", "content": asked}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


# ---------------------------------------------------------------- files


def open_text(path: Path):
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


def _jsonl(path: Path) -> Iterator[Record]:
    with open_text(path) as file:
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


def _json(path: Path) -> Iterator[Record]:
    """A list of objects, an object with one such list in it, or, as data sets often have it, an object a line."""
    try:
        with open_text(path) as file:
            content = json.load(file)
    except (json.JSONDecodeError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":
            yield from _jsonl(path)
            return
        raise ValueError(f"{path} is not JSON: {getattr(error, 'msg', error)}") from None
    if isinstance(content, dict) and not content.keys() & set(FIELDS):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    for number, record in enumerate([content] if isinstance(content, dict) else content, 1):
        if not isinstance(record, dict):
            raise ValueError(f"entry {number} of {path} is a JSON {type(record).__name__}, expected an object")
        yield record


def _separated(path: Path) -> Iterator[Record]:
    """CSV, or with .tsv by tabs; its first line names the fields."""
    limit = csv.field_size_limit(sys.maxsize)  # of the module: 128 KiB a field, which articles exceed
    try:
        with open_text(path) as file:
            for record in csv.DictReader(file, delimiter="\t" if ".tsv" in path.suffixes else ",", restval=None):
                if None in record:
                    raise ValueError(f"a line of {path} has more fields than its first line names")
                yield record
    except csv.Error as error:
        raise ValueError(f"{path} is not a readable CSV file: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path} is Parquet, which needs the `pyarrow` package (pip install pyarrow)") from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in (*FIELDS, *PAIRS.values(), _MORE) if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=columns or None):
                yield from batch.to_pylist()
    except (OSError, ValueError, NotImplementedError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(f"{path} is not a readable Parquet file: {one_line(error)}") from None


# What a file's name ends in, .gz left out -> how its records are read.
READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _separated,
    ".tsv": _separated,
    ".parquet": _parquet,
}


def one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
