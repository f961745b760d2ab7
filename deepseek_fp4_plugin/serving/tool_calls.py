"""DeepSeek's tool-call text to OpenAI tool calls, streamed, the same however the stream is cut.

The format (bars are U+FF5C, gaps U+2581):

    <|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>NAME
    ```json
    {"city": "Paris"}
    ```<|tool_call_end|>
    <|tool_call_begin|>...<|tool_call_end|><|tool_calls_end|>

A call exists from the moment its head (up to the fence) is complete; its arguments are passed on as they come, never
rewritten, so a stream and a whole answer hold the same characters. A head that is not of this form is no call: its text
stays in the content, markers and all, and nothing is lost.
"""

import re
import uuid
from dataclasses import dataclass, field

from deepseek_fp4_plugin.serving.reasoning import held_suffix

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"

_HEAD = re.compile(re.escape(f"{CALL_BEGIN}function{SEPARATOR}") + r"([A-Za-z0-9_.\-]{1,256})\n```json\n")
_HEAD_START = f"{CALL_BEGIN}function{SEPARATOR}"
_HEAD_END = "\n```json\n"
_NAME = re.compile(r"[A-Za-z0-9_.\-]{0,256}")
_FENCE = "```"


@dataclass
class ToolCallDelta:
    """A piece of call number `index`: its first piece has `id` and `name`, the later ones arguments only."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass
class ToolSplit:
    """What one piece of text added."""

    content: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)


def _without_fence(arguments: str) -> str:
    """The arguments of a whole call, its closing fence and the white space around that removed."""
    stripped = arguments.rstrip()
    return stripped[: -len(_FENCE)].rstrip() if stripped.endswith(_FENCE) else arguments


def _held_marker(text: str) -> int:
    """Length of the end of `text` that may become a marker which ends a call."""
    return max(held_suffix(text, marker) for marker in (CALL_END, CALLS_END))


def _may_become_head(text: str) -> bool:
    """True when more text could complete `text` to a call's head."""
    if len(text) <= len(_HEAD_START):
        return _HEAD_START.startswith(text)
    if not text.startswith(_HEAD_START):
        return False
    rest = text[len(_HEAD_START) :]
    name = _NAME.match(rest)
    assert name is not None
    return _HEAD_END.startswith(rest[name.end() :]) and (name.end() > 0 or name.end() == len(rest))


class ToolCallParser:
    """One answer's parser; `feed` pieces of any size, then `finish` once."""

    def __init__(self) -> None:
        self._state = "content"  # content, between (calls), arguments
        self._text = ""  # not yet decided
        self._raw = ""  # what to give back as content if no head follows
        self.count = 0  # calls found

    def feed(self, text: str) -> ToolSplit:
        """Take the next piece of the answer."""
        self._text += text
        out = ToolSplit()
        while getattr(self, f"_{self._state}")(out):
            pass
        return out

    def finish(self) -> ToolSplit:
        """The answer has ended: give out what was held back."""
        out = ToolSplit()
        rest, self._text = self._text, ""
        if self._state == "arguments":
            # Cut off inside a call. A closing fence with nothing or half a marker behind it is still a fence.
            body = rest[: len(rest) - _held_marker(rest)]
            unfenced = _without_fence(body)
            if arguments := (unfenced if unfenced != body else rest):
                out.calls.append(ToolCallDelta(self.count - 1, arguments))
        elif self._state == "between":
            out.content = self._raw + rest if (self._raw or rest.strip()) else ""
        elif rest.strip() or not self.count:
            out.content = rest  # white space after the last call is nobody's
        return out

    def _content(self, out: ToolSplit) -> bool:
        before, marker, after = self._text.partition(CALLS_BEGIN)
        if marker:
            out.content += before.rstrip()
            self._state, self._text, self._raw = "between", after, before[len(before.rstrip()) :] + marker
            return True
        # White space is held too, because that before a call goes.
        keep = len(self._text[: len(self._text) - held_suffix(self._text, CALLS_BEGIN)].rstrip())
        out.content += self._text[:keep]
        self._text = self._text[keep:]
        return False

    def _between(self, out: ToolSplit) -> bool:
        """After the opening marker or a call: another call, the closing marker, or something else."""
        stripped = self._text.lstrip()
        if head := _HEAD.match(stripped):
            out.calls.append(ToolCallDelta(self.count, id=f"chatcmpl-tool-{uuid.uuid4().hex}", name=head.group(1)))
            self.count += 1
            self._state, self._text, self._raw = "arguments", stripped[head.end() :], ""
            return True
        if stripped.startswith(CALLS_END) and not self._raw:
            self._state, self._text = "content", stripped[len(CALLS_END) :]
            return True
        if _may_become_head(stripped) or (not self._raw and CALLS_END.startswith(stripped)):
            return False
        # Not a call. Its text is content, and after a call it is content without an opening marker.
        out.content += self._raw
        self._state, self._raw = "content", ""
        return True

    def _arguments(self, out: ToolSplit) -> bool:
        ends = [at for at in (self._text.find(CALL_END), self._text.find(CALLS_END)) if at >= 0]
        if ends:
            end = min(ends)
            if arguments := _without_fence(self._text[:end]):
                out.calls.append(ToolCallDelta(self.count - 1, arguments))
            self._text = self._text[end:].removeprefix(CALL_END)
            self._state = "between"
            return True
        # Hold what may belong to the end: half a marker, the fence before it, white space before that.
        keep = len(self._text[: len(self._text) - _held_marker(self._text)].rstrip())
        ticks = keep - len(self._text[:keep].rstrip("`"))
        keep = len(self._text[: keep - min(ticks, len(_FENCE))].rstrip())
        if keep > 0:
            out.calls.append(ToolCallDelta(self.count - 1, self._text[:keep]))
            self._text = self._text[keep:]
        return False


TOOL_PARSERS = {"deepseek_v3": ToolCallParser}
"""`--tool_parser`'s choices."""
