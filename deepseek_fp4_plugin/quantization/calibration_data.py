"""Calibration text: from data sets, files or the package, to token ids; seed, count and length in one place.

Every sample is at most `tokens` long and never padded: padding would enter the largest magnitudes. Of a large input
only what the samples need is tokenized and kept: tokenizing takes some 200 bytes of memory a character.
"""

import hashlib
import json
import logging
import random
import re
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from deepseek_fp4_plugin.quantization.calibration_records import (
    READERS,
    Record,
    content_of,
    ids_of,
    is_blank,
    one_line,
    open_text,
)
from deepseek_fp4_plugin.tokenizer import Tokenizer

CNN_DAILYMAIL, BUILTIN = "cnn_dailymail", "builtin"
HUB_ID, HUB_CONFIG = "abisee/cnn_dailymail", "3.0.0"  # the card's calibration set; its field is `article`
_KINDS = (".txt", *READERS)  # of files
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]*))?(?::([\w.-]+))?")  # OWNER/NAME:CONFIG:SPLIT
_SHUFFLE_BUFFER = 10_000  # records of the stream among which the seed chooses
_MOST_BLANKS = 10_000  # records without text of a stream before it is taken to have none
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

    name: `cnn_dailymail`, or any data set of the Hugging Face hub as OWNER/NAME, OWNER/NAME:CONFIG or
    OWNER/NAME:CONFIG:SPLIT (train, if left out), through the `datasets` library; `builtin` (the package's own text); a
    file: .txt, .jsonl, .json, .csv, .tsv, .parquet, .gz of all but the last; or several of these with commas between,
    which share the samples evenly. A plain text is cut into consecutive stretches; of records
    (calibration_records.py) each is one sample, cut at its end.
    Raises ValueError naming the file or data set that cannot be used, and why.
    """
    if samples < 1 or tokens < 1:
        raise ValueError(f"calibration needs at least one sample of one token, got {samples} of {tokens}")
    sources = _sources(name)
    if samples < len(sources):
        raise ValueError(f"calibration on {len(sources)} sources needs a sample of each, got {samples}")
    shares = [samples // len(sources) + (index < samples % len(sources)) for index in range(len(sources))]
    parts = [
        _load_one(source, tokenizer, share, tokens, vocab_size, seed)
        for source, share in zip(sources, shares, strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    described = (f"{part.description} ({len(part.samples)} samples)" for part in parts)
    return CalibrationData([sample for part in parts for sample in part.samples], ", ".join(described))


def _sources(name: str | Path) -> list[str]:
    """One source, or those between commas; a file whose name has a comma is one."""
    whole = str(name)
    if isinstance(name, Path) or Path(whole).expanduser().is_file():
        return [whole]
    sources = [part.strip() for part in whole.split(",")]
    if not all(sources):
        raise ValueError(f"calibration {whole!r} names nothing between two commas, or at an end")
    return sources


def _load_one(
    name: str, tokenizer: Tokenizer, samples: int, tokens: int, vocab_size: int, seed: int
) -> CalibrationData:
    path = _builtin() if name == BUILTIN else Path(name).expanduser()
    is_file = path.is_file() or _kind(path) in _KINDS or name.startswith((".", "/", "~"))
    hub = None if is_file else _HUB_NAME.fullmatch(name)
    sequences: Iterable[list[int]]
    if name == CNN_DAILYMAIL:
        where, description = name, f"cnn_dailymail {HUB_CONFIG} (train, `article`)"
        sequences = _from_hub(name, HUB_ID, HUB_CONFIG, "train", tokenizer, samples, tokens, seed)
    elif hub is not None:
        split = hub[3] or "train"
        where, description = name, f"{hub[1]}{f' {hub[2]}' if hub[2] else ''} ({split})"
        sequences = _from_hub(name, hub[1], hub[2] or None, split, tokenizer, samples, tokens, seed)
    else:
        where = str(path)
        description = "the package's own text" if name == BUILTIN else f"the file {path.name}"
        sequences = _from_file(path, tokenizer, samples, tokens, seed)
    result = [sequence for sequence in sequences if sequence]
    if not result:
        raise ValueError(f"{where} holds no text to calibrate on")
    largest = max(map(max, result))
    if largest >= vocab_size:
        raise ValueError(
            f"the samples of {where} hold token id {largest}, but the model has {vocab_size} tokens; do tokenizer and "
            "model belong together?"
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


def grouped(sizes: Sequence[int], at_most: int) -> list[tuple[int, int]]:
    """[start, stop) ranges of neighbours whose sizes are at most `at_most` together, but at least one in each."""
    found, start, total = [], 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > at_most:
            found.append((start, index))
            start, total = index, 0
        total += size
    return [*found, (start, len(sizes))]


def token_batches(samples: Sequence[Sequence[int]], max_tokens: int) -> list[tuple[int, int]]:
    """[start, stop) ranges of samples with at most `max_tokens` tokens together, but at least one sample."""
    return grouped([len(sample) for sample in samples], max_tokens)


def _builtin() -> Path:
    return Path(__file__).parents[1] / "assets" / "calibration.txt"


def _from_hub(
    name: str, hub_id: str, config: str | None, split: str, tokenizer: Tokenizer, samples: int, tokens: int, seed: int
) -> Iterator[list[int]]:
    advice = "pass a .txt, .jsonl or .parquet file with --calibration, or --calibration builtin"
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"calibration on {name} needs the `datasets` package (pip install datasets); or {advice}"
        ) from None
    try:
        given = (hub_id,) if config is None else (hub_id, config)
        stream = datasets.load_dataset(*given, split=split, streaming=True)
        records = _with_text(stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER), samples)
    except Exception as error:  # the library's errors are those of every layer below it
        raise ValueError(f"{name} cannot be fetched ({one_line(error)}); {advice}") from None
    return (_encode(record, f"a record of {name}", tokens, tokenizer) for record in records)


def _with_text(stream: Iterable[Record], samples: int) -> list[Record]:
    found: list[Record] = []
    for count, record in enumerate(stream):
        if not is_blank(record):
            found.append(record)
        if len(found) == samples or count - len(found) > _MOST_BLANKS:
            break
    return found


def _kind(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _from_file(path: Path, tokenizer: Tokenizer, samples: int, tokens: int, seed: int) -> Iterable[list[int]]:
    kind = _kind(path)
    if kind not in _KINDS:
        kinds = f"{', '.join(_KINDS[:-1])} or {_KINDS[-1]}"
        raise ValueError(
            f"calibration {str(path)!r} is neither cnn_dailymail, builtin nor a {kinds} file, nor a data set's id "
            "(OWNER/NAME)"
        )
    if path.exists() and not path.is_file():  # a pipe could be read only once
        raise ValueError(f"calibration file {path} cannot be read: it is not a regular file")
    try:
        if kind == ".txt":
            return _stretches(_text(path), tokenizer, samples, tokens, seed)
        records = _chosen(READERS[kind], path, samples, seed)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"calibration file {path} cannot be read: {one_line(error)}") from None
    return (_encode(record, f"record {number} of {path}", tokens, tokenizer) for number, record in records)


def _chosen(read: Callable[[Path], Iterator[Record]], path: Path, samples: int, seed: int) -> list[tuple[int, Record]]:
    """`samples` records that have a text, and their numbers from 1; two passes, so that only those are kept."""
    usable, total = array("q"), 0
    for total, record in enumerate(read(path), 1):
        if not is_blank(record):
            usable.append(total)
    if len(usable) < total:
        _log.warning("%d of the %d records of %s have no text and are left out", total - len(usable), total, path)
    chosen = [usable[index] for index in random.Random(seed).sample(range(len(usable)), min(samples, len(usable)))]
    wanted = set(chosen)
    kept = {number: record for number, record in enumerate(read(path), 1) if number in wanted}
    if len(kept) < len(wanted):
        raise ValueError(f"calibration file {path} changed while it was being read; run again")
    return [(number, kept[number]) for number in chosen]


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


def _encode(record: Record, where: str, tokens: int, tokenizer: Tokenizer) -> list[int]:
    """The first ids of one record: its own, or of its text, or of its chat through the checkpoint's template."""
    try:
        if (ids := ids_of(record)) is not None:
            return ids[:tokens]
        content = content_of(record)
        if isinstance(content, str):
            return _first_tokens(content, tokens, tokenizer)
        chat = tokenizer.apply_chat_template(content, add_generation_prompt=False)
        return _first_tokens(chat, tokens, tokenizer, add_special_tokens=False)
    except ValueError as error:
        joint = " " if str(error).startswith("has none") else ": "
        raise ValueError(f"{where}{joint}{error}") from None


def _text(path: Path) -> str:
    with open_text(path) as file:
        return file.read(_MAX_TEXT)
