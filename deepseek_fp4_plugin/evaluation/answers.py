"""The final answer in a text. Everything here takes time linear in the text, whatever it holds."""

import re

from deepseek_fp4_plugin.assets.held_out import END_THINK, boxed

__all__ = ["boxed", "choice_letter", "code_block", "json_answer", "last_number", "without_thinking"]

_START_THINK = "<think>"
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]{0,40}(?:\.\d{1,40})?|\.\d{1,40})")
_JSON_ANSWER = re.compile(r'"answer"\s{0,4}:\s{0,4}(?:"([^"\n]{0,2000})"|([-+.\d,$%]{1,60}))')
_FENCE = "```"


def without_thinking(text: str) -> str:
    """What follows the reasoning; nothing of a text that is still inside it."""
    _, closed, rest = text.rpartition(END_THINK)
    if closed:
        return rest
    return "" if text.lstrip().startswith(_START_THINK) else text


def last_number(text: str) -> str | None:
    """The last number, without thousands separators; None without one."""
    found = None
    for match in _NUMBER.finditer(text):
        found = match.group()
    return None if found is None else found.replace(",", "").rstrip(".")


def json_answer(text: str) -> str | None:
    """The value of the last `"answer"` field of a JSON text, which may be broken elsewhere."""
    found = None
    for match in _JSON_ANSWER.finditer(text):
        found = match.group(1) if match.group(1) is not None else match.group(2)
    return found


# The rules of MMLU-Pro's own scripts, in their order, with Markdown's asterisks let through in the second. The third
# takes the last lone letter.
_ANSWER_IS = re.compile(r"answer is \(?([A-J])\)?")
_ANSWER_COLON = re.compile(r"[aA]nswer:\s*([A-J])")
_LONE = re.compile(r"\b([A-J])\b")
_MARKED = re.compile(r"[*_]{0,2}[aA]nswer[*_]{0,2}\s{0,4}:[\s*_]{0,4}\(?([A-J])\)?(?![a-zA-Z0-9])")


def choice_letter(text: str) -> str | None:
    """The letter A to J that a multiple-choice answer settles on; None without one."""
    found = _ANSWER_IS.search(text)
    if found:
        return found.group(1)
    for rule in (_ANSWER_COLON, _MARKED):
        letters = rule.findall(text)
        if letters:
            return letters[-1]
    letters = _LONE.findall(text)
    return letters[-1] if letters else None


def code_block(text: str) -> str:
    """The last fenced block's content, "" without one: LiveCodeBench's rule (any line with a fence counts)."""
    lines = text.split("\n")
    fences = [i for i, line in enumerate(lines) if _FENCE in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) >= 2 else ""
