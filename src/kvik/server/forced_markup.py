"""The grammar of arguments that stand between marks, each after its schema: strings as they are, all else as JSON.

What a reader makes of such a text has to be what the schema allows. Schemas for which that cannot be said are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kvik.errors import RequestError
from kvik.fields import show
from kvik.server.argument_types import argument_json, argument_types, resolved, types_of
from kvik.server.tool_formats import ToolFormat
from kvik.structured.grammars import json_rule

__all__ = ["MarkupArguments", "literal", "plain_name"]

_NOTES = frozenset(
    {"$comment", "default", "deprecated", "description", "examples", "readOnly", "title", "type", "writeOnly"}
)  # fmt: skip
_LENGTHS = frozenset({"minLength", "maxLength"})
_ROOT = frozenset({"$defs", "$id", "$schema", "additionalProperties", "definitions", "properties", "required"})


def literal(text: str) -> str:
    """A text in Lark's syntax."""
    return json.dumps(text)


def plain_name(name: str, form: ToolFormat) -> str:
    """A name of a function, or of a parameter, as it stands between marks. Raises RequestError where it cannot."""
    if not re.fullmatch(r'[^\s<>\[\]{}"]{1,200}', name):
        raise RequestError(
            f"tools: the name {show(name)} cannot be forced in this model's format of calls, {form.name}: use at most"
            " 200 characters, without white space, brackets and quotes",
            "tools",
        )
    return name


class MarkupArguments:
    """The rules for the arguments of one function. `spell` gives a text of the format in Lark's syntax."""

    def __init__(self, form: ToolFormat, name: str, parameters: Mapping[str, Any], spell: Callable[[str], str]) -> None:
        assert form.argument is not None
        self._form = form
        self._name = name
        self._parameters = parameters
        self._spell = spell
        self._before, self._after = form.argument
        (self._mark,) = form.states["value"]

    def rules(self, name: str) -> Iterator[str]:
        """The rule `name` and those that it needs: the parameters in their order. Raises RequestError."""
        self._refuse(self._parameters, _ROOT | _NOTES, "the parameters")
        properties, required = self._parameters.get("properties", {}), self._list(self._parameters, "required", [])
        if not isinstance(properties, dict):
            raise self._error("the parameters", f"the properties {show(properties)} cannot be forced")
        if not all(key in list(properties) for key in required):
            raise self._error(
                "the parameters", "required names what is not among the properties, which cannot be forced"
            )
        parts = [f"{name}_{i}{'' if key in required else '?'}" for i, key in enumerate(properties)]
        yield f"{name}: {' '.join(parts) or literal('')}"
        for i, (key, schema) in enumerate(properties.items()):
            values = f"{name}_{i}_value"
            yield f"{name}_{i}: {self._spell(self._before % plain_name(key, self._form))} {values}"
            yield from self._value(values, key, schema)

    def _value(self, name: str, key: str, schema: Any) -> Iterator[str]:
        """The rule `name`: a value and what stands after it."""
        schema = self._resolved(key, schema)
        choice = next((word for word in ("anyOf", "oneOf") if word in schema), None)
        branches = [schema]
        if choice is not None and "string" in types_of(schema, self._parameters):
            self._refuse(schema, frozenset({choice}) | _NOTES, key)
            branches = [self._resolved(key, branch) for branch in self._list(schema, choice)]
        is_free = any(_is_text(branch, self._parameters) for branch in branches)
        yield f"{name}: " + " | ".join(f"{name}_{i}" for i in range(len(branches)))
        for i, branch in enumerate(branches):
            types = types_of(branch, self._parameters)
            if "const" in branch or "enum" in branch:
                if is_free and types != {"string"}:
                    raise self._error(key, "a choice of any text and of a few values cannot be forced")
                yield f"{name}_{i}: ({self._one_of(key, branch)}) {self._spell(self._after)}"
            elif "string" in types:
                # Whatever else it may be read as is allowed without a condition, or else it is refused.
                self._refuse(branch, (_LENGTHS | _NOTES) if types == {"string"} else _NOTES, key)
                yield from self._text(f"{name}_{i}", branch)
            else:
                if is_free:
                    self._refuse(branch, _NOTES, key)
                shared = {word: self._parameters[word] for word in ("$defs", "definitions") if word in self._parameters}
                yield f"{name}_{i}: value_{name}_{i} {self._spell(self._after)}"
                yield f"value_{name}_{i}: {json_rule({**branch, **shared})}"

    def _text(self, name: str, schema: Mapping[str, Any]) -> Iterator[str]:
        """A text in which the mark behind it does not occur."""
        before, behind = self._after.split(self._mark)
        lengths = schema.get("minLength", 0), schema.get("maxLength", "")
        if not all(length == "" or type(length) is int for length in lengths):
            raise self._error("a string", f"the length {show(lengths)} cannot be forced")
        mark, limits = self._spell(self._mark), "{{{},{}}}".format(*lengths)
        special = mark.startswith("<[")
        if not _LENGTHS & set(schema):  # as most are: all of them share a rule
            yield f"{name}: any_text"
            name = "any_text"
        yield f"{name}: TEXT_{name.upper()} {mark if special else ''} {literal(behind)}"
        escaped = re.escape(self._mark).replace("/", r"\/")
        text = rf"(/(?s:.){limits}/ & ~/(?s:.*){escaped}(?s:.*)/)"
        yield f"TEXT_{name.upper()}: {text} {literal(before if special else before + self._mark)}"

    def _one_of(self, key: str, schema: Mapping[str, Any]) -> str:
        """Values of an enumeration, strings without quotes."""
        self._refuse(schema, frozenset({"const", "enum"}) | _NOTES, key)
        values = [schema["const"]] if "const" in schema else self._list(schema, "enum")
        texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
        types = argument_types(key, self._parameters)
        for value, text in zip(values, texts, strict=True):
            if self._mark in text or json.loads(argument_json(text, types)) != value:
                raise self._error(key, f"its value {show(value)} would be read as another one")
        return " | ".join(map(literal, texts))

    def _list(self, schema: Mapping[str, Any], word: str, default: Any = None) -> list[Any]:
        value = schema.get(word, default)
        if not isinstance(value, list):
            raise self._error(word, f"{show(value)} cannot be forced")
        return value

    def _resolved(self, key: str, schema: Any) -> Mapping[str, Any]:
        schema = resolved(schema, self._parameters)
        if schema is True:
            return {}
        if not isinstance(schema, Mapping):
            raise self._error(key, f"the schema {show(schema)} cannot be forced")
        return schema

    def _refuse(self, schema: Mapping[str, Any], known: frozenset[str], where: str) -> None:
        unknown = sorted(set(schema) - known)
        if unknown:
            raise self._error(where, f"{unknown[0]} cannot be forced")

    def _error(self, where: str, what: str) -> RequestError:
        return RequestError(
            f"tools: {where} of {show(self._name)}: {what} in {self._form.name}, this model's format of calls; leave it"
            " out, or let the model choose (tool_choice auto)",
            "tools",
        )


def _is_text(schema: Mapping[str, Any], root: Mapping[str, Any]) -> bool:
    """Whether any text may stand there."""
    return "string" in types_of(schema, root) and not {"const", "enum"} & set(schema)
