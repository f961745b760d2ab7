"""Settings from YAML files, and from several places at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deepseek_fp4_plugin.settings.choices import Choices, differ, refuse


def read_settings(path: Path) -> dict[str, Any]:
    """What a YAML file says. Raises ValueError naming it when it cannot be read or holds no settings."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _NoDuplicates)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"the configuration file {path} cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        if isinstance(error, _Duplicate):
            raise ValueError(f"the configuration file {path} has {error.problem} twice, again{line}") from None
        raise ValueError(f"the configuration file {path} is not YAML{line}") from None
    except (RecursionError, ValueError) as error:  # too deep; a date or a number that is none
        raise ValueError(f"the configuration file {path} is not YAML: {error}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"the configuration file {path} must hold settings, one `name: value` a line")
    return values


class _Duplicate(yaml.constructor.ConstructorError):
    """A key that a mapping has twice; YAML's own reader lets the last one win."""


class _NoDuplicates(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag != "tag:yaml.org,2002:merge":
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, str) and key in seen:
                    raise _Duplicate(None, None, key, key_node.start_mark)
                seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, nested objects field by field."""
    merged = dict(below)
    for name, value in above.items():
        if isinstance(value, Choices):
            value = value.model_dump(exclude_unset=True)
        held = merged.get(name)
        merged[name] = merge(held, value) if isinstance(held, dict) and isinstance(value, dict) else value
    return merged


def nest(values: dict[str, Any], name: str, outer: str, inner: str) -> None:
    """Move the flat setting `name` into its object, `outer`. Raises ValueError where the object says otherwise."""
    value = values.pop(name)
    held = values.get(outer)
    if isinstance(held, Choices):
        held = held.model_dump(exclude_unset=True)
    if held is not None and not isinstance(held, Mapping):
        refuse(f"EngineConfig: {outer}={held!r} must be a mapping of settings")
    held = dict(held or {})
    if differ(held.setdefault(inner, value), value):
        refuse(f"EngineConfig: {name}={value!r} and {outer}.{inner}={held[inner]!r} are the same setting; give one")
    values[outer] = held
