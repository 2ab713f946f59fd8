"""Grammars: validation before compilation."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moesaic.errors import InvalidParameter
from moesaic.text import grammar
from moesaic.text.grammar import Grammar


def nested(depth: int) -> dict[str, Any]:
    return {"items": nested(depth - 1)} if depth > 1 else {"type": "null"}


@pytest.mark.parametrize(
    ("kind", "value", "match"),
    [
        ("jsonschema", {}, "available kinds: json_schema, json_object, regex, choice, lark"),
        (["regex"], "a", "kind"),
        ("json_schema", None, "must be a JSON object"),
        ("json_schema", True, "must be a JSON object"),
        ("json_schema", "[1]", "must be a JSON object"),
        ("json_schema", '{"type": }', "not valid JSON: .*char 9"),
        ("json_schema", {"minimum": float("nan")}, "not valid JSON"),
        ("json_schema", {"enum": [object()]}, "not valid JSON"),
        ("json_schema", {"enum": ["x" * grammar.MAX_BYTES]}, "64 KiB"),
        ("json_schema", '{"enum": ["' + "x" * grammar.MAX_BYTES + '"]}', "64 KiB"),
        ("json_schema", nested(17), "more than 16 nested levels at #/items/items"),
        ("json_schema", '{"items": ' * 5000 + "1" + "}" * 5000, "more than 16 nested levels"),
        ("json_object", {"a": 1}, "takes no value"),
        ("regex", "", "non-empty"),
        ("regex", None, "must be a non-empty string"),
        ("regex", "a" * 4097, "4 KiB"),
        ("regex", "\ud800", "character 0"),
        ("choice", "yes", "list of 1 to 512"),
        ("choice", [], "list of 1 to 512"),
        ("choice", ["a"] * 513, "list of 1 to 512"),
        ("choice", ["a", ""], r"\[1\]"),
        ("choice", ["a", 3], r"\[1\]"),
        ("choice", ["é" * 100] * 400, "64 KiB"),
        ("lark", "x" * (grammar.MAX_BYTES + 1), "64 KiB"),
    ],
)
def test_invalid_grammars_are_rejected(kind: Any, value: Any, match: str) -> None:
    with pytest.raises(InvalidParameter, match=match) as caught:
        Grammar(kind, value)
    assert caught.value.param == "grammar"
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_grammars_at_the_limits_are_accepted() -> None:
    Grammar("json_schema", nested(16))
    Grammar("regex", "a" * 4096)
    Grammar("choice", [str(n) for n in range(512)])
    assert Grammar("json_object", {}) == Grammar("json_object")


def test_errors_name_the_parameter() -> None:
    with pytest.raises(InvalidParameter, match=r"^response_format: ") as caught:
        Grammar("regex", "", "response_format")
    assert caught.value.param == "response_format"


def test_grammars_are_equal_if_their_sources_are() -> None:
    schema = {"properties": {"b": {}, "a": {}}}
    assert Grammar("json_schema", schema).source == Grammar("json_schema", json.dumps(schema), "x").source
    assert Grammar("json_schema", schema) == Grammar("json_schema", json.dumps(schema), "x")
    assert Grammar("json_schema", schema) != Grammar("json_schema", {"properties": {"a": {}, "b": {}}})
    assert Grammar("regex", "a").source != Grammar("lark", "a").source
    assert Grammar("choice", ["a", "b"]).source != Grammar("choice", ['a", "b']).source
