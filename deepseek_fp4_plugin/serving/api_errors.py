"""What a request is refused with: OpenAI's error body, and one sentence for the first thing that validation finds."""

from typing import Any

from pydantic import ValidationError


class ApiError(Exception):
    """Answered as an error body. `kind` is OpenAI's `type`; `param` the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "BadRequestError",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param = status, message, kind, param
        self.code, self.headers = code, headers

    def renamed(self, names: dict[str, str]) -> "ApiError":
        """The same error about a request in which chat fields have other names."""
        old = self.param or ""
        first, dot, rest = old.partition(".")
        param = names.get(first, first) + dot + rest
        if "function.parameters" in names:
            param = param.replace("function.parameters", names["function.parameters"]).replace(".function.", ".")
        if param == old:
            return self
        message = self.message.replace(old, param, 1)
        return ApiError(self.status, message, self.kind, param, self.code, self.headers)

    def __reduce__(self) -> tuple[Any, ...]:
        return ApiError, (self.status, self.message, self.kind, self.param, self.code, self.headers)

    def body(self) -> dict[str, Any]:
        """OpenAI's error body; `object`, and the status as `code` where no name is usual, as trtllm-serve has them."""
        return {
            "object": "error",
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code if self.code is not None else self.status,
            },
        }


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def _is_alternative(part: str) -> bool:
    """Whether a part of an error's path names a union's alternative and no field."""
    return part in ("str", "int", "float", "bool", "constrained-int", "constrained-str") or any(c in part for c in "[(")


# By which a list's entries are told apart.
_KINDS = {"system", "developer", "user", "assistant", "tool", "message", "function_call", "function_call_output",
          "reasoning", "text", "thinking", "redacted_thinking", "tool_use", "tool_result"}  # fmt: skip


def _field_path(error: Any, form: str) -> list[str]:
    """The fields and positions that lead to what is wrong, without what pydantic adds for a union's alternatives.

    form: the name of the request's class.
    """
    parts = [str(part) for part in error["loc"] if part != "body" and not _is_alternative(str(part))]
    path: list[str] = []
    for number, part in enumerate(parts):
        listed = number > 1 and parts[number - 1].isdigit()
        inside, last = path[-2] if listed else "", number == len(parts) - 1
        if part in _KINDS and (inside in ("messages", "input") or (inside == "content" and not last)):
            continue
        if path == ["tool_choice"] and part[:1].isupper():
            continue
        if number == 1 and path == ["response_format"] and not last:
            continue
        if inside == "tools" and form == "ResponsesRequest" and not last:
            continue
        path.append(part)
    return path


def _of_union(error: Any, param: str) -> tuple[str, str]:
    """About an entry of a list, or a form of the answer, whose kind is unknown or missing."""
    field = f"{param}.{'role' if 'role' in error['ctx']['discriminator'] else 'type'}"
    if not param.rpartition(".")[2].isdigit():
        field = param
    if error["type"] == "union_tag_invalid":
        known, given = error["ctx"]["expected_tags"], _shown(error["ctx"]["tag"])
        return f"{field}: input should be one of {known}, got {given}", field
    if not isinstance(error["input"], dict):
        return f"{param}: input should be a JSON object, got {_shown(error['input'])}", param
    return f"{field}: field required", field


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _is_other_medium(error: Any, path: list[str]) -> bool:
    """Whether a part of a message is no text: an image, a sound, a file."""
    if error["type"] == "union_tag_invalid":
        return path[-2:-1] == ["content"] and not str(error["ctx"]["tag"]).startswith("server_")
    return (
        error["type"] == "literal_error" and path[-1] == "type" and path[-3:-2] in (["content"], ["output"], ["system"])
    )


def describe_validation(error: ValidationError | Any) -> tuple[str, str | None]:
    """One sentence about the first thing wrong in a body, and the field it is in."""
    errors, form = error.errors(), getattr(error, "title", "")
    # Of a union's complaints the deepest is about the alternative that was meant.
    first = max(errors, key=lambda e: len(e["loc"])) if errors[0]["type"] != "extra_forbidden" else errors[0]
    path = _field_path(first, form)
    param = ".".join((part or "''") if len(part) <= 100 else part[:97] + "..." for part in path) or None
    if param is not None and path[0] == "prompt" and form == "CompletionRequest":
        return (
            "prompt: give a text, a list of texts, a list of token ids, or a list of such lists; none empty",
            "prompt",
        )
    if param is not None and _is_other_medium(first, path):
        param = param.removesuffix(".type") + ".type"
        kind = first["ctx"]["tag"] if first["type"] == "union_tag_invalid" else first["input"]
        return f"{param}: this model reads text alone, so {_shown(kind)} cannot be taken; send text", param
    if param is not None and first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _of_union(first, param)
    if first["type"] == "extra_forbidden":
        return f"{param}: this server knows no such field; remove it", param
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}", None
    shown = _shown(first.get("input"))
    message = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "input should be a JSON object (Content-Type: application/json)"
    if first["type"] == "missing" and param is None:
        return "the body is empty; send a JSON object (Content-Type: application/json)", None
    if first["type"] == "missing":
        return f"{param}: {message}", param
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, "), param
    return f"{param or 'the body'}: {message}, got {shown}", param
