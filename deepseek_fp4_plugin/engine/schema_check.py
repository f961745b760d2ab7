"""Which parts of a JSON schema have a value that ends, found before an answer is held to them.

The mask library goes into a property whose schema needs itself for ever, and finds out too late. A part "ends" when
some finite value satisfies it, as far as references, required properties and items decide; this is the least fixed
point of that rule. Parts that never end become `false`, which the library knows how to keep away from.
"""

import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

_TYPES = frozenset(("object", "array", "string", "number", "integer", "boolean", "null"))
_ONE_OF = ("anyOf", "oneOf")


def without_endless_parts(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema itself where every part ends; else a copy with `false` in the place of those that do not.

    Raises ValueError when no value of the whole schema ends, or it is nested too deeply to say.
    """
    try:
        return _Schema(schema).mended()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class _Schema:
    def __init__(self, root: dict[str, Any]):
        self.root = root
        self._nodes: dict[int, dict[str, Any]] = {}  # every part that a value may meet, children before parents
        self._ends: set[int] = set()  # ids of the parts known to end
        self._collect(root, set())

    def mended(self) -> dict[str, Any]:
        waiting = list(self._nodes.values())
        while True:
            still = [node for node in waiting if not self._decide(node)]
            if len(still) == len(waiting):
                break
            waiting = still
        if id(self.root) not in self._ends:
            raise ValueError(f"no value ends: {self._culprit()}")
        return self._copy(self.root) if waiting else self.root

    def _culprit(self) -> str:
        for node in self._nodes.values():
            if id(node) not in self._ends and isinstance(node.get("$ref"), str):
                return f"{node['$ref']} always needs another value of its own kind"
        for node in self._nodes.values():
            for name in _list(node.get("required")):
                if isinstance(name, str) and not all(map(self._ended, _of_property(node, name))):
                    return f"the required property {name!r} can have no value"
        return "a required part of it can have no value"

    def _decide(self, node: dict[str, Any]) -> bool:
        if self._satisfiable(list(self._conjuncts(node, set()))):
            self._ends.add(id(node))
            return True
        return False

    # ------------------------------------------------------------------ one part

    def _ended(self, schema: Any) -> bool:
        return id(schema) in self._ends if isinstance(schema, dict) else schema is not False

    def _satisfiable(self, parts: list[Any], chosen: frozenset[int] = frozenset()) -> bool:
        """Whether schemas that hold together have a common value that ends. chosen: the unions already decided."""
        if any(part is False for part in parts):
            return False
        parts = [part for part in parts if isinstance(part, dict)]
        if any(isinstance(part.get("$ref"), str) and not self._ended(self._target(part["$ref"])) for part in parts):
            return False
        if any(not self._ended(member) for part in parts for member in _list(part.get("allOf"))):
            return False
        kinds = set(_TYPES)
        for part in parts:
            given = part.get("type")
            named = {given} if isinstance(given, str) else set(_list(given)) or _TYPES
            kinds &= named | ({"integer"} if "number" in named else set())
        if kinds == {"object"} and not self._object(parts):
            return False
        if kinds == {"array"} and not self._array(parts):
            return False
        if kinds == {"object", "array"} and not self._object(parts) and not self._array(parts):
            return False
        unions = [
            branches
            for part in parts
            for name in _ONE_OF
            if (branches := part.get(name)) and isinstance(branches, list) and id(branches) not in chosen
        ]
        return all(
            any(self._branch(parts, branch, chosen | {id(branches)}) for branch in branches) for branches in unions
        )

    def _branch(self, parts: list[Any], branch: Any, chosen: frozenset[int]) -> bool:
        """Whether a union's branch ends beside what stands around the union."""
        if not self._ended(branch):
            return False
        if len(chosen) > 4 or not isinstance(branch, dict):
            return True  # enough of unions within unions
        return self._satisfiable([*parts, *self._conjuncts(branch, set())], chosen)

    def _object(self, parts: list[dict[str, Any]]) -> bool:
        required = {name for part in parts for name in _list(part.get("required")) if isinstance(name, str)}
        return all(self._ended(schema) for name in required for part in parts for schema in _of_property(part, name))

    def _array(self, parts: list[dict[str, Any]]) -> bool:
        least = max((part["minItems"] for part in parts if isinstance(part.get("minItems"), int)), default=0)
        for part in parts:
            first = _list(part.get("prefixItems"))
            if not all(map(self._ended, first[:least])):
                return False
            if least > len(first) and not self._ended(part.get("items", True)):
                return False
        return True

    def _conjuncts(self, node: Any, seen: set[int]) -> Iterator[Any]:
        """The part and all that hold with it: what it refers to, and allOf."""
        yield node
        if not isinstance(node, dict) or id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node.get("$ref"), str):
            yield from self._conjuncts(self._target(node["$ref"]), seen)
        for member in _list(node.get("allOf")):
            yield from self._conjuncts(member, seen)

    # ------------------------------------------------------------------ the tree

    def _target(self, reference: str) -> Any:
        """What a local reference names; True, which says nothing, for one that the library will refuse."""
        if not reference.startswith("#"):
            return True
        found: Any = self.root
        for part in urllib.parse.unquote(reference[1:]).split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and key in found:
                found = found[key]
            elif isinstance(found, list) and key.isascii() and key.isdigit() and int(key) < len(found):
                found = found[int(key)]
            else:
                return True
        return found

    def _collect(self, node: Any, seen: set[int]) -> None:
        if not isinstance(node, dict) or id(node) in seen:
            return
        seen.add(id(node))
        for _, _, child in _children(node):
            self._collect(child, seen)
        if isinstance(node.get("$ref"), str):
            self._collect(self._target(node["$ref"]), seen)
        self._nodes[id(node)] = node

    def _copy(self, node: Any) -> Any:
        """The schema with parts that never end replaced; definitions are copied too, for references to them."""
        if not isinstance(node, dict):
            return node
        if id(node) in self._nodes and id(node) not in self._ends:
            return False
        copy = dict(node)
        around = list(self._conjuncts(node, set()))
        for keyword, key, child in _children(node, definitions=True):
            mended = self._copy(child)
            if keyword in _ONE_OF and mended is not False:
                branches = node[keyword]
                mended = mended if self._branch(around, child, frozenset({id(branches)})) else False
            if key is None:
                copy[keyword] = mended
            else:
                if copy[keyword] is node[keyword]:
                    copy[keyword] = node[keyword].copy()
                copy[keyword][key] = mended
        return copy


def _children(node: dict[str, Any], definitions: bool = False) -> Iterator[tuple[str, Any, Any]]:
    """(keyword, key or index within it or None, subschema) of each."""
    for keyword in ("properties", "patternProperties", *(("$defs", "definitions") if definitions else ())):
        if isinstance(node.get(keyword), dict):
            for key, child in node[keyword].items():
                yield keyword, key, child
    for keyword in ("prefixItems", "allOf", *_ONE_OF):
        for index, child in enumerate(_list(node.get(keyword))):
            yield keyword, index, child
    for keyword in ("items", "additionalProperties"):
        if keyword in node:
            yield keyword, None, node[keyword]


def _of_property(part: dict[str, Any], name: str) -> Iterator[Any]:
    """The subschemas of `part` that a property of that name must satisfy."""
    found = False
    properties, patterns = part.get("properties"), part.get("patternProperties")
    if isinstance(properties, dict) and name in properties:
        found = True
        yield properties[name]
    if isinstance(patterns, dict):
        for pattern, schema in patterns.items():
            if _matches(pattern, name):
                found = True
                yield schema
    if not found:
        yield part.get("additionalProperties", True)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
