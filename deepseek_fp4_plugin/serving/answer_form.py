"""The form that a request wants its answer to have: which field says so, and what it asks of the engine."""

import json
from typing import Any

from deepseek_fp4_plugin.config import GuidedDecodingParams
from deepseek_fp4_plugin.engine.grammar import WHITESPACE
from deepseek_fp4_plugin.serving.api_errors import bad_request
from deepseek_fp4_plugin.serving.protocol import ChatCompletionRequest, CompletionRequest
from deepseek_fp4_plugin.serving.request_parts import (
    ChoiceFormat,
    EbnfFormat,
    JsonFormat,
    JsonObjectFormat,
    JsonSchemaFormat,
    RegexFormat,
)

Request = ChatCompletionRequest | CompletionRequest


def asked_form(request: Request) -> tuple[str, GuidedDecodingParams] | None:
    """The field that decides the form of the answer, and that form. Raises ApiError where two fields do."""
    asked: list[tuple[str, dict[str, Any]]] = []
    form = request.response_format
    if isinstance(form, JsonObjectFormat):
        asked.append(("response_format", {"json_object": True} if form.schema_ is None else {"json": form.schema_}))
    elif isinstance(form, JsonSchemaFormat):
        asked.append(("response_format", {"json": form.json_schema.schema_}))
    elif isinstance(form, JsonFormat):
        asked.append(("response_format", {"json": form.schema_}))
    elif isinstance(form, RegexFormat):
        asked.append(("response_format", {"regex": form.regex}))
    elif isinstance(form, EbnfFormat):
        asked.append(("response_format", {"grammar": form.ebnf}))
    elif isinstance(form, ChoiceFormat):
        asked.append(("response_format", {"choice": form.choice}))
    for name in ("json", "regex", "choice", "grammar"):
        value = getattr(request, f"guided_{name}")
        if value is not None:
            asked.append((f"guided_{name}", {name: value}))
    outputs = request.structured_outputs
    if outputs is not None:
        asked.append(("structured_outputs", outputs.form()))
    if len(asked) > 1:
        names = " and ".join(name for name, _ in asked)
        raise bad_request(f"{names}: only one of these can decide the form of an answer", asked[0][0])
    if request.guided_whitespace_pattern is not None:
        if not asked or not ({"json", "json_object"} & asked[0][1].keys()):
            raise bad_request("guided_whitespace_pattern: only with an answer in JSON", "guided_whitespace_pattern")
        asked[0][1]["whitespace_pattern"] = request.guided_whitespace_pattern
    if not asked:
        return None
    try:
        return asked[0][0], GuidedDecodingParams(**asked[0][1])
    except ValueError as error:
        raise bad_request(f"{asked[0][0]}: {error}", asked[0][0]) from None


def lark_rule(field: str, form: GuidedDecodingParams, schema: dict[str, Any] | None) -> str:
    """The right-hand side of a Lark rule for the form, to stand beside the grammar of tool calls.

    schema: the JSON schema in the engine's form, where there is one. Raises ApiError for a grammar of its own.
    """
    if schema is not None:
        spaces = WHITESPACE if form.whitespace_pattern is None else form.whitespace_pattern
        return f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': spaces}})}"
    if form.choice is not None:
        return " | ".join(json.dumps(text, ensure_ascii=False) for text in form.choice)
    if form.regex is not None:
        return f"/{_between_slashes(form.regex)}/"
    raise bad_request(f"{field}: a grammar cannot be combined with tools; send tool_choice none", field)


def _between_slashes(regex: str) -> str:
    """A regular expression as a Lark literal holds it: slashes escaped, line breaks spelled."""
    out, escaped = [], False
    for character in regex:
        if character == "/" and not escaped:
            out.append("\\")
        out.append("\\n" if character == "\n" and not escaped else character)
        escaped = character == "\\" and not escaped
    return "".join(out)
