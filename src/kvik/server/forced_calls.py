"""Calls in grammars: which functions a request insists on by its `tool_choice`, and what calls of functions look like.

The grammar is that of the model's own format, so that what the model writes is what it has learnt to write and what the
parser of answers reads. Names and brackets are fixed to the byte; arguments follow the schema of their function.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvik.errors import RequestError
from kvik.fields import show
from kvik.sampling_params import MAX_STRUCTURE, StructuredOutputsParams
from kvik.server.forced_markup import MarkupArguments, literal, plain_name
from kvik.server.tool_formats import ToolFormat
from kvik.structured.grammars import answer_rule, json_rule
from kvik.text.tokenizer import Tokenizer

__all__ = ["call_grammar", "chosen_functions"]

_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def chosen_functions(choice: Any, functions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The functions of which one must be called; none if the model may choose. Raises RequestError.

    A named function is an object {"type": "function", ...}, with the name inside `function` in chats.
    """
    if choice in (None, "none", "auto"):
        return []
    if choice == "required":
        if not functions:
            raise RequestError("tool_choice is required, but there are no tools", "tool_choice")
        return list(functions)
    if not isinstance(choice, dict) or choice.get("type") != "function":
        raise RequestError(
            f"tool_choice must be none, auto, required or a function's name in an object, got {show(choice)}",
            "tool_choice",
        )
    inner = choice.get("function", choice)
    name = inner.get("name") if isinstance(inner, dict) else None
    found = [function for function in functions if function["name"] == name]
    if not found:
        raise RequestError(f"tool_choice names {show(name)}, which is not among the tools", "tool_choice")
    return found[:1]


def call_grammar(
    form: ToolFormat,
    functions: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    many: bool,
    answer: StructuredOutputsParams | None = None,
) -> StructuredOutputsParams:
    """One call of one of the functions, or with `many` one after the other; or the JSON of `answer`, if it is given.

    Raises RequestError for wrong schemas.
    """
    rules, size = dict[str, None](), 0
    for rule in _rules(form, functions, tokenizer, many=many, answer=answer):
        if rule not in rules:
            rules[rule], size = None, size + len(rule) + 1
        if size > MAX_STRUCTURE + 1:  # told at once: a few tools can make a hundred million
            raise RequestError(f"tools: their schemas make a grammar of more than {MAX_STRUCTURE} characters", "tools")
    return StructuredOutputsParams(grammar="\n".join(rules))


def _rules(
    form: ToolFormat,
    functions: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    many: bool,
    answer: StructuredOutputsParams | None,
) -> Iterator[str]:
    opening, between, closing = (_literal(text, form, tokenizer) for text in form.layout)
    calls = f"call ({between} call)*" if many else "call"
    if answer is None:
        yield f"start: {opening} {calls} {closing}"
    else:
        yield f"start: json_answer | {opening} {calls} {closing}"
        yield f"json_answer: {answer_rule(answer)}"
    yield "call: " + " | ".join(f"call_{i}" for i in range(len(functions)))
    for i, function in enumerate(functions):
        name, schema = function["name"], _schema(function)
        spelt = plain_name(name, form) if form.states else json.dumps(name, ensure_ascii=False)
        head, tail = (_literal(text, form, tokenizer) for text in (form.head % spelt, form.tail))
        yield f"call_{i}: {head} arguments_{i} {tail}"
        if form.argument is None:
            yield f"arguments_{i}: {json_rule(schema)}"
        else:
            markup = MarkupArguments(form, name, schema, lambda text: _literal(text, form, tokenizer))
            yield from markup.rules(f"arguments_{i}")


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """What arguments have to be: an object in any case."""
    given: Any = function.get("parameters")
    if given is None:
        return dict(_NO_PARAMETERS)
    name = show(function["name"])
    if not isinstance(given, dict):
        raise RequestError(f"tools: parameters of {name} must be a JSON schema, got {show(given)}", "tools")
    kind = given.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise RequestError(f"tools: parameters of {name} must be of type object, got {show(kind)}", "tools")
    try:
        StructuredOutputsParams(json=given)  # type: ignore[arg-type]  # which takes a schema as it comes
    except RequestError as error:
        raise RequestError(f"tools: parameters of {name}: {error}", "tools") from None
    return {**given, "type": "object"}


def _literal(text: str, form: ToolFormat, tokenizer: Tokenizer) -> str:
    """A text of the format in Lark's syntax. Marks that are special tokens are not spelt by others."""
    parts = [text]
    for mark in form.marks:
        token_id = tokenizer.backend.token_to_id(mark)
        if token_id in tokenizer.special_token_ids:
            parts = [piece for part in parts for piece in _split(part, mark, f"<[{token_id}]>")]
    return " ".join(part if part.startswith("<[") else literal(part) for part in parts if part)


def _split(text: str, mark: str, name: str) -> list[str]:
    pieces = text.split(mark)
    return [pieces[0]] + [piece for rest in pieces[1:] for piece in (name, rest)]
