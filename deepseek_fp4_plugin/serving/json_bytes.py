"""JSON as every answer and event is written: by orjson, in a third of the time that Python's own takes."""

import json
from typing import Any

import orjson


def to_json(value: Any, errors: str = "replace") -> bytes:
    """Compact UTF-8; half surrogate pairs, which no text from a client may smuggle in, become `?`.

    errors: "strict" raises UnicodeEncodeError for them instead.
    """
    try:
        return orjson.dumps(value)
    except TypeError:  # such a half, or an integer beyond 64 bits
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors=errors)
