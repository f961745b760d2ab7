"""Objects that declare properties are closed where the schema leaves that open, and nothing else changes."""

import copy

import jsonschema_rs
import pytest

from deepseek_fp4_plugin.engine.closed_objects import closed_objects

A, B = {"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "allowed", "forbidden"),
    [
        ({"type": "object", **A}, [{}, {"a": 1}], [{"a": 1, "z": 1}]),
        ({"type": "object", "properties": {}}, [{}], [{"z": 1}]),
        ({"type": "object"}, [{}, {"z": 1}], []),
        ({**A, "additionalProperties": True}, [{"z": 1}], []),
        ({**A, "additionalProperties": {"type": "string"}}, [{"z": ""}], [{"z": 1}]),
        ({**A, "patternProperties": {"^x": {}}}, [{"xy": 1, "z": 1}], []),
        ({"properties": {"in": A}}, [{"in": {"a": 1}}], [{"in": {"z": 1}}]),
        ({"items": A}, [[{"a": 1}]], [[{"z": 1}]]),
        ({"anyOf": [A, {"type": "null"}]}, [{"a": 1}, None], [{"z": 1}]),
        ({"$defs": {"n": A}, "$ref": "#/$defs/n"}, [{"a": 1}], [{"z": 1}]),
        ({"$defs": {"n": A}, "allOf": [{"$ref": "#/$defs/n"}], "default": {}}, [{"a": 1}], [{"z": 1}]),
        # Parts that hold together would forbid each other's properties.
        ({"allOf": [A, B]}, [{"a": 1, "b": 1}], [{"a": "x"}]),
        ({"$defs": {"n": A}, "$ref": "#/$defs/n", **B}, [{"a": 1, "b": 1}], [{"b": "x"}]),
        ({**A, "anyOf": [B, {"required": ["a"]}]}, [{"a": 1, "b": 1}], [{"a": "x"}]),
        # What must be there may be there.
        ({**A, "required": ["a", "b"]}, [{"a": 1, "b": 1}], [{"a": 1}]),
        ({**A, "minProperties": 2}, [{"a": 1, "b": 1}], [{"a": 1}]),
        # Names of properties are no keywords.
        ({"properties": {"properties": {"type": "integer"}}}, [{"properties": 1}], [{"z": 1}]),
        ({"enum": [{"properties": {"a": 1}}]}, [{"properties": {"a": 1}}], []),
        ({"properties": {"next": {"$ref": "#"}}}, [{"next": {"next": {}}}], [{"next": {"z": 1}}]),
    ],
)
def test_what_is_closed(schema, allowed, forbidden):
    before = copy.deepcopy(schema)
    held = jsonschema_rs.validator_for(closed_objects(schema))
    assert schema == before
    assert all(held.is_valid(value) for value in allowed)
    assert not any(held.is_valid(value) for value in forbidden)


@pytest.mark.parametrize(
    "keyword", ["allOf", "anyOf", "$ref", "properties", "required", "items", "$defs", "minProperties"]
)
@pytest.mark.parametrize("value", [5, None, "x", [], {}, [5], True])
def test_what_is_no_schema_is_left_to_the_compiler(keyword, value):
    schema = {"type": "object", **A, keyword: value}
    assert closed_objects(schema)[keyword] == value
    assert closed_objects({"items": schema})["items"][keyword] == value


def test_depth_is_refused_in_a_sentence():
    deep: dict = {}
    for _ in range(100_000):
        deep = {"items": deep}
    with pytest.raises(ValueError, match="too deeply"):
        closed_objects(deep)
