"""What a JSON schema leaves open is closed: an object that declares properties has no others.

JSON Schema allows any further property, and a model held to such a schema may go on adding them for ever. So
undeclared properties are forbidden, as in TensorRT-LLM (xgrammar's strict mode), where the schema does not speak of
them itself. Parts that hold together (allOf, a $ref beside properties) would forbid each other's properties, so
they are left as they are, and so is an object that declares nothing.
"""

import urllib.parse
from collections.abc import Iterator
from typing import Any

_UNIONS = ("anyOf", "oneOf")
_SAID = ("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames", "if", "not",
         "dependentSchemas")  # fmt: skip


def closed_objects(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy with `additionalProperties: false` wherever that is meant. Raises ValueError when nested too deeply."""
    try:
        combined: set[int] = set()
        _find_combined(schema, schema, combined, set())
        return _close(schema, combined)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _close(node: Any, combined: set[int]) -> Any:
    if isinstance(node, list):
        return [_close(member, combined) for member in node]
    if not isinstance(node, dict):
        return node
    copy = dict(node)
    for keyword, child in node.items():
        if keyword in ("properties", "patternProperties", "$defs", "definitions") and isinstance(child, dict):
            copy[keyword] = {name: _close(part, combined) for name, part in child.items()}
        elif keyword in ("items", "prefixItems", "additionalProperties", "allOf", *_UNIONS):
            copy[keyword] = _close(child, combined)
    if id(node) not in combined and _declares_all(node):
        copy["additionalProperties"] = False
    return copy


def _declares_all(node: dict[str, Any]) -> bool:
    """Whether the object's own declarations can be all of it."""
    properties = node.get("properties")
    if not isinstance(properties, dict) or any(keyword in node for keyword in _SAID):
        return False
    required, least = node.get("required"), node.get("minProperties")
    if isinstance(required, list) and not all(isinstance(name, str) and name in properties for name in required):
        return False
    return not isinstance(least, int) or least <= len(properties)


def _find_combined(node: Any, root: dict[str, Any], combined: set[int], seen: set[int]) -> None:
    """Add to `combined` the parts that hold together with another one that may have properties."""
    if isinstance(node, list):
        for member in node:
            _find_combined(member, root, combined, seen)
    if not isinstance(node, dict) or id(node) in seen:
        return
    seen.add(id(node))
    own, members = "properties" in node, node.get("allOf")
    others = (len(members) if isinstance(members, list) else 0) + sum(name in node for name in ("$ref", *_UNIONS))
    if own + others > 1:
        _mark(node, root, combined)
    for child in node.values():
        if isinstance(child, dict | list):
            _find_combined(child, root, combined, seen)


def _mark(node: Any, root: dict[str, Any], combined: set[int]) -> None:
    if not isinstance(node, dict) or id(node) in combined:
        return
    combined.add(id(node))
    for part in _parts(node, root):
        _mark(part, root, combined)


def _parts(node: dict[str, Any], root: dict[str, Any]) -> Iterator[Any]:
    for keyword in ("allOf", *_UNIONS):
        members = node.get(keyword)
        yield from members if isinstance(members, list) else ()
    if isinstance(node.get("$ref"), str) and node["$ref"].startswith("#"):
        found: Any = root
        for part in urllib.parse.unquote(node["$ref"][1:]).split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            found = found.get(key) if isinstance(found, dict) else None
        yield found
