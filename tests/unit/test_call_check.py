"""What a finished call's arguments break of their schema, in a sentence; nothing is fetched for it."""

import pytest

from deepseek_fp4_plugin.serving.call_check import CallCheck
from deepseek_fp4_plugin.serving.request_parts import Tool


def check(parameters: dict | None, arguments: str) -> str | None:
    function = {"name": "f", "parameters": parameters}
    return CallCheck([Tool.model_validate({"type": "function", "function": function})]).error("f", arguments)


UNIQUE = {"properties": {"x": {"type": "array", "uniqueItems": True}}}


@pytest.mark.parametrize(
    ("parameters", "arguments", "said"),
    [
        (UNIQUE, '{"x": [1, 2]}', None),
        (UNIQUE, '{"x": [1, 1]}', "/x: "),
        ({"not": {"required": ["a"]}}, '{"a": 1}', "the arguments: "),
        ({"properties": {"p": {"type": "string", "format": "path"}}}, '{"p": "/tmp"}', None),
        (None, '{"x": 1}', None),
        (UNIQUE, '{"x": [1,', "not checked: "),
        ({"$ref": "http://127.0.0.1:9/schema"}, "{}", "not checked: "),
        (UNIQUE, '{"x": ' + "[" * 100_000, "not checked: "),
    ],
)
def test_what_is_said(parameters, arguments, said):
    error = check(parameters, arguments)
    assert error is None if said is None else error is not None and error.startswith(said)
