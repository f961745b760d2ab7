"""JSON objects from a checkpoint's folder, read strictly."""

import json
from pathlib import Path
from typing import Any

from deepseek_fp4_plugin.checkpoint.errors import CheckpointError


class DuplicateKeyError(ValueError):
    """An object names a key twice; a parser that keeps the last hides the other."""


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else, and for a key that is there twice at any depth."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise TypeError(f"holds a JSON {type(value).__name__}, expected an object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when it is absent, unreadable, malformed or ambiguous."""
    try:
        return parse_object(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a checkpoint folder needs it") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except DuplicateKeyError as error:
        raise CheckpointError(f"{path} {error}; keep one of them") from None
    except TypeError as error:
        raise CheckpointError(f"{path} {error}") from None
    except ValueError as error:  # malformed, or not UTF-8
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateKeyError(f"gives {next(name for name in names if names.count(name) > 1)!r} twice")
    return result
