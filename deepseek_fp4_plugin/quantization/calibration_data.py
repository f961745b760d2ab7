"""Calibration text: from a data set, a file or the package, to token ids; seed, count and length in one place.

Every sample is at most `tokens` long and never padded: padding would enter the largest magnitudes.
"""

import gzip
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_fp4_plugin.tokenizer import Tokenizer

CNN_DAILYMAIL, BUILTIN = "cnn_dailymail", "builtin"
HUB_ID, HUB_CONFIG = "abisee/cnn_dailymail", "3.0.0"  # the card's calibration set; its field is `article`
_TEXT_FIELDS = ("text", "article", "content", "document", "prompt")
_SHUFFLE_BUFFER = 10_000  # articles of the stream among which the seed chooses
_MAX_TEXT = 64 * 2**20  # characters of a plain text that are tokenized


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
        sequences: Iterable[list[int]] = (tokenizer.encode(text)[:tokens] for text in _cnn_dailymail(samples, seed))
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
    return CalibrationData(result, description)


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
    try:
        if kind == ".txt":
            return _stretches(_text(path), tokenizer, samples, tokens, seed)
        records = list((_jsonl if kind == ".jsonl" else _parquet)(path))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"calibration file {path} cannot be read: {_one_line(error)}") from None
    chosen = random.Random(seed).sample(range(len(records)), min(samples, len(records)))
    return (_encode(records[index], f"record {index + 1} of {path}", tokenizer)[:tokens] for index in chosen)


def _stretches(text: str, tokenizer: Tokenizer, samples: int, tokens: int, seed: int) -> list[list[int]]:
    """Stretches of `tokens` ids of a plain text, the rest left out unless the text is shorter than one."""
    ids = tokenizer.encode(text)
    cut = [ids[start : start + tokens] for start in range(0, max(len(ids) - tokens, 0) + 1, tokens)]
    chosen = random.Random(seed).sample(range(len(cut)), min(samples, len(cut)))
    return [cut[index] for index in chosen]


def _encode(record: Mapping[str, Any], where: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of one record's text, or of its chat through the checkpoint's template."""
    messages = record.get("messages")
    if messages is not None:
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError(f"{where}: messages is not a list of objects with role and content")
        try:
            return tokenizer.encode_chat(messages, add_generation_prompt=False)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    text = next((record[field] for field in _TEXT_FIELDS if isinstance(record.get(field), str)), None)
    if text is None:
        found = ", ".join(map(str, record)) or "none"
        raise ValueError(f"{where} has none of the fields {', '.join(_TEXT_FIELDS)}, messages; it has {found}")
    return tokenizer.encode(text)


def _text(path: Path) -> str:
    with _open(path) as file:
        return file.read(_MAX_TEXT)


def _jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {path} is not JSON: {error.msg}") from None
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
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(f"{path} is not a readable Parquet file: {_one_line(error)}") from None


def _open(path: Path):
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return open(path, encoding="utf-8")


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
