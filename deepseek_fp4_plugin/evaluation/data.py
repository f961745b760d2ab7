"""A task's rows: from the hub under their original name, or from a local file of the same rows."""

import binascii
import csv
import gzip
import hashlib
import io
import json
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_fp4_plugin.evaluation.task import Example, Source, Task
from deepseek_fp4_plugin.evaluation.tasks.r1_nano import BUILT_IN

_GPQA_PASSWORD = b"deserted-untie-orchid"  # public: its authors keep crawlers out with it


def load_examples(task: Task, path: Path | None = None) -> tuple[list[Example], str]:
    """A task's questions, and the SHA-256 of the rows they were made of.

    path: a .jsonl, .json, .csv or .parquet file, possibly .gz, or GPQA's .zip. ValueError for what cannot be used.
    """
    if path is not None:
        rows = [{"_folder": str(path.parent), **row} for row in _read(path)]
        where = str(path)
    elif task.name in BUILT_IN:
        rows, where = BUILT_IN[task.name](), "the package"
    else:
        assert task.source is not None
        rows, where = list(_from_hub(task.source)), task.source.hub_id
    try:
        examples = task.examples(rows)
    except (LookupError, TypeError, AttributeError, pickle.UnpicklingError, zlib.error, binascii.Error) as error:
        raise ValueError(f"{where}: its rows are not {task.title}'s: {type(error).__name__} {error}") from None
    if not examples:
        raise ValueError(f"{where} has no row that {task.title} uses")
    identities = [example.id for example in examples]
    if len(set(identities)) < len(identities):
        raise ValueError(f"{where}: two rows have the same id; {task.title} needs one each")
    return examples, _digest(rows)


def _digest(rows: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        own = {name: value for name, value in row.items() if name != "_folder"}
        digest.update(json.dumps(own, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return digest.hexdigest()


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(
            f"{path} is not a file; --data names a task's rows (.jsonl, .json, .csv, .parquet, or GPQA's .zip)"
        )
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        if name.endswith(".zip"):
            return _from_zip(path)
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
        if name.endswith(".csv"):
            return list(csv.DictReader(io.StringIO(text)))
        rows = (
            json.loads(text)
            if name.endswith(".json")
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold JSON objects, one a line")
    return rows


def _from_zip(path: Path) -> list[dict[str, Any]]:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("gpqa_diamond.csv"):
                return list(csv.DictReader(io.StringIO(archive.read(name, pwd=_GPQA_PASSWORD).decode("utf-8"))))
    raise ValueError("it holds no gpqa_diamond.csv")


def _from_hub(source: Source) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            "data from the hub needs the package `datasets`: pip install .[eval]; or give --data FILE"
        ) from None
    try:
        if source.files:
            urls = [f"hf://datasets/{source.hub_id}/{name}" for name in source.files]
            yield from datasets.load_dataset("json", data_files=urls, split="train")
        else:
            yield from datasets.load_dataset(source.hub_id, source.config, split=source.split)
    except Exception as error:  # whatever the hub's client raises, the user's way out is the same
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{source.hub_id} cannot be had from the hub ({type(error).__name__}: {reason}); give its rows as a "
            "local file with --data"
        ) from None
