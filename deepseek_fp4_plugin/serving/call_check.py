"""Whether a finished call's arguments satisfy its tool's whole schema.

A call that must come (`tool_choice` required or a function's name) is held to its schema while it is written, but for
the keywords that no mask can hold it to, like uniqueItems, not, or a format nobody knows. Those are checked here.
"""

import json
from collections.abc import Iterable
from typing import Any

import jsonschema_rs

from deepseek_fp4_plugin.serving.request_parts import Tool


class CallCheck:
    """Of one request's tools."""

    def __init__(self, tools: Iterable[Tool]) -> None:
        self._schemas = {tool.function.name: tool.function.parameters or {} for tool in tools}

    def error(self, name: str, arguments: str) -> str | None:
        """One sentence about what the arguments break, or None."""
        try:
            validator = jsonschema_rs.validator_for(self._schemas.get(name, {}), retriever=_no_retrieval)
            first = next(iter(validator.iter_errors(json.loads(arguments))), None)
        except (ValueError, RecursionError, jsonschema_rs.ReferencingError) as error:
            return f"not checked: {' '.join(str(error).split())[:200]}"
        if first is None:
            return None
        where = "".join(f"/{part}" for part in first.instance_path)
        return f"{where or 'the arguments'}: {' '.join(first.message.split())[:200]}"


def _no_retrieval(uri: str) -> Any:
    raise ValueError(f"{uri} is not fetched")
