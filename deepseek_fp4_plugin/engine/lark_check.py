"""Which rules of a Lark grammar have a text that ends, found before an answer is held to them.

Only as much of the notation is read as says which rules need which: the mask library has parsed the grammar already,
and what is not understood here counts as ending.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""(?P<blank>[ \t\r]+|//[^\n]*|\#[^\n]*)
    |(?P<newline>\n)
    |(?P<string>"(?:[^"\\\n]|\\.)*"i?)
    |(?P<regex>/(?:[^/\\\n]|\\.)+/[a-z]*)
    |(?P<special><[^>\n]*>)
    |(?P<directive>%[a-z]+)
    |(?P<name>@?[?!]*[A-Za-z_][A-Za-z0-9_\-]*(?:\.\d+)?)
    |(?P<count>\{\s*\d*\s*,?\s*\d*\s*\}|~\s*\d+(?:\s*\.\.\s*\d+)?)
    |(?P<sign>\.\.|->|[:|()\[\]?*+~,=&{}.]|\d+)""",
    re.VERBOSE,
)


class _NotUnderstood(Exception):
    pass


@dataclass
class _Rule:
    """A rule's alternatives: each a list of what it needs, names of rules or terminals."""

    alternatives: list[list[str]] = field(default_factory=list)


def endless_rule(grammar: str) -> str | None:
    """A rule that `start` may lead into and that no text ever ends; None without one."""
    try:
        rules = dict(_rules(grammar))
    except (_NotUnderstood, RecursionError):
        return None
    ends: set[str] = set()
    while True:
        more = {
            name
            for name, rule in rules.items()
            if name not in ends
            and any(all(need in ends or need not in rules for need in alternative) for alternative in rule.alternatives)
        }
        if not more:
            break
        ends |= more
    waiting, seen = ["start"], {"start"}
    while waiting:
        name = waiting.pop()
        if name in rules and name not in ends:
            return _deepest(name, rules, ends)
        for need in (need for alternative in rules.get(name, _Rule()).alternatives for need in alternative):
            if need not in seen:
                seen.add(need)
                waiting.append(need)
    return None


def _deepest(name: str, rules: dict[str, _Rule], ends: set[str]) -> str:
    """The last of the rules that stand in the way, beginning with `name`: the mistake is there."""
    seen = {name}
    while True:
        needs = (need for alternative in rules[name].alternatives for need in alternative)
        deeper = next((need for need in needs if need in rules and need not in ends and need not in seen), None)
        if deeper is None:
            return name
        seen.add(deeper)
        name = deeper


def empty_pattern(grammar: str, matches_nothing: Callable[[str], bool]) -> str | None:
    """A regular expression of the grammar that matches no text, told by `matches_nothing`; None without one."""
    try:
        found = dict.fromkeys(text for kind, text in _tokens(grammar) if kind == "regex")
    except _NotUnderstood:
        return None
    return next((pattern for pattern in list(found)[:256] if matches_nothing(pattern)), None)


def _tokens(grammar: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(grammar):
        match = _TOKEN.match(grammar, at)
        if match is None:
            raise _NotUnderstood
        at = match.end()
        kind = match.lastgroup or ""
        if kind == "directive" and match.group() in ("%json", "%regex", "%lark", "%llguidance"):
            at = _behind_braces(grammar, at)
            yield "object", match.group()
        elif kind != "blank":
            yield kind, match.group()


def _behind_braces(text: str, at: int) -> int:
    """The place behind the JSON object that follows `at`."""
    depth, quoted, begun = 0, False, False
    while at < len(text):
        character = text[at]
        if quoted:
            at += character == "\\"
            quoted = character != '"'
        elif character == '"':
            quoted = True
        elif character == "{":
            depth, begun = depth + 1, True
        elif character == "}":
            depth -= 1
        elif not begun and not character.isspace():
            return at
        at += 1
        if begun and not depth:
            return at
    raise _NotUnderstood


def _rules(grammar: str) -> Iterator[tuple[str, _Rule]]:
    """Each definition. One begins with a name and a colon at the beginning of a line, attributes between them."""
    lines: list[list[tuple[str, str]]] = [[]]
    depth = 0
    for kind, text in _tokens(grammar):
        if kind == "newline":
            if not depth:
                lines.append([])
            continue
        depth += (text in ("(", "[")) - (text in (")", "]"))
        lines[-1].append((kind, text))
    statements: list[list[tuple[str, str]]] = []
    for line in filter(None, lines):
        if line[0] == ("sign", "|") and statements:
            statements[-1] += line
        else:
            statements.append(line)
    for statement in statements:
        if statement[0][0] == "directive" or statement[0] == ("object", "%llguidance"):
            continue
        colon = next((i for i, token in enumerate(statement) if token == ("sign", ":")), None)
        if statement[0][0] != "name" or colon is None:
            raise _NotUnderstood
        yield _bare(statement[0][1]), _Rule(_alternatives(statement[colon + 1 :]))


def _bare(name: str) -> str:
    return name.lstrip("?!").split(".")[0]


def _alternatives(tokens: list[tuple[str, str]]) -> list[list[str]]:
    reader = _Reader(tokens)
    found = reader.choice()
    if reader.at < len(tokens):
        raise _NotUnderstood
    return found


class _Reader:
    """Recursive descent over an expression; the needs of each alternative, groups multiplied out as far as needed."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens, self.at = tokens, 0

    def choice(self) -> list[list[str]]:
        alternatives = self.sequence()
        while self._take("|"):
            alternatives += self.sequence()
        return alternatives

    def sequence(self) -> list[list[str]]:
        whole: list[list[str]] = [[]]
        while self.at < len(self.tokens) and self.tokens[self.at][1] not in ("|", ")", "]"):
            part = self.item()
            whole = [[*before, *after] for before in whole for after in part]
            if len(whole) > 1000:
                raise _NotUnderstood
        return whole

    def item(self) -> list[list[str]]:
        kind, text = self.tokens[self.at]
        self.at += 1
        if text in ("(", "["):
            found = self.choice()
            if not self._take(")" if text == "(" else "]"):
                raise _NotUnderstood
            if text == "[":
                found = [[], *found]
        elif kind == "name" and not text.startswith("@"):
            found = [[_bare(text)]]
        elif kind in ("string", "regex", "special", "object", "name"):
            found = [[]]
            if self._take("..") and self.at < len(self.tokens):
                self.at += 1
        elif text == "->":
            self.at += 1
            return [[]]
        elif text in ("&", "~"):  # of terminals: looked at by the library
            return [[]]
        else:
            raise _NotUnderstood
        while self.at < len(self.tokens):
            kind, text = self.tokens[self.at]
            if text not in ("?", "*", "+") and kind != "count":
                break
            self.at += 1
            least = re.search(r"\d+", text)
            if text in ("?", "*") or (kind == "count" and (least is None or int(least.group()) == 0 or "{," in text)):
                found = [[], *found]
        return found

    def _take(self, text: str) -> bool:
        if self.at < len(self.tokens) and self.tokens[self.at][1] == text:
            self.at += 1
            return True
        return False
