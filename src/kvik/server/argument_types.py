"""Values that a model writes as plain text between marks, as JSON of a type that the function's schema allows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

__all__ = ["argument_json", "argument_types", "is_string", "resolved", "types_of"]

_ANY = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})
_MAX_REFERENCES = 32
_MAX_SCHEMAS = 128
"""Most parts of a schema that are looked at for one argument: with more, and in circles, any type is taken."""
_KINDS: Mapping[type, frozenset[str]] = {
    bool: frozenset({"boolean"}),
    dict: frozenset({"object"}),
    float: frozenset({"number"}),
    int: frozenset({"integer", "number"}),
    list: frozenset({"array"}),
    type(None): frozenset({"null"}),
    str: frozenset({"string"}),
}
_WORDS: Mapping[str, tuple[str, str]] = {
    "false": ("boolean", "false"), "none": ("null", "null"), "null": ("null", "null"), "true": ("boolean", "true"),
}  # fmt: skip
"""Python's words are what templates write where they print such a value."""

_decoder = msgspec.json.Decoder(float_hook=float)  # 1e999 is JSON, too


def argument_types(name: str, parameters: Mapping[str, Any]) -> frozenset[str]:
    """The types that the function's schema allows for an argument."""
    properties = parameters.get("properties")
    return types_of(properties.get(name, {}) if isinstance(properties, Mapping) else {}, parameters)


def is_string(types: frozenset[str]) -> bool:
    """Whether an argument of these types is a string, whatever its text is."""
    return types <= {"string"}


def argument_json(text: str, types: frozenset[str]) -> str:
    """The JSON of an argument: of one of the types if the text is, else a string.

    A text is a string wherever it cannot be anything else that is allowed: strings are written without quotes.
    """
    given = text.strip()
    kind, word = _WORDS.get(given.lower(), ("", ""))
    if types != _ANY and kind in types:
        return word
    is_given = not is_string(types) and types & _kinds(given) - {"string"}
    return given if is_given else json.dumps(text, ensure_ascii=False)


def types_of(schema: Any, root: Any) -> frozenset[str]:
    """The types of JSON that a schema allows, as far as it says so."""
    return _types(schema, root, iter(range(_MAX_SCHEMAS)))


def _types(schema: Any, root: Any, budget: Iterator[int]) -> frozenset[str]:
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping) or next(budget, None) is None:
        return _ANY
    types = _ANY
    if "type" in schema:
        given = schema["type"]
        types &= frozenset(kind for kind in (given if isinstance(given, list) else [given]) if isinstance(kind, str))
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        types &= frozenset().union(*(_KINDS.get(type(value), _ANY) for value in values))
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            types &= frozenset().union(*(_types(branch, root, budget) for branch in schema[word]))
    for branch in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
        types &= _types(branch, root, budget)
    return types


def resolved(schema: Any, root: Any) -> Any:
    """The schema behind a `$ref` into the schema of the function; {} where there is none."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            return schema
        found = root
        for part in schema["$ref"].removeprefix("#").split("/")[1:]:
            found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        schema = {} if found is None else found
    return {}


def _kinds(text: str) -> frozenset[str]:
    """The types of a JSON text; none if it is not JSON."""
    try:
        value = _decoder.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        return frozenset()
    whole = isinstance(value, float) and value.is_integer()
    return _KINDS[type(value)] | (frozenset({"integer"}) if whole else frozenset())
