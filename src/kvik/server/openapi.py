"""The OpenAPI document's schemas, made from the tables that the server obeys.

Sampling fields come from `SamplingParams` with their limits; a field that has no effect says so. `operation` gives a
route its request and response schemas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from typing import Any

from kvik.sampling_params import SamplingParams
from kvik.server.protocol import IGNORED, known_fields
from kvik.settings import SAMPLING, Pair

__all__ = ["BODIES", "NO_EFFECT", "PLAIN_FIELDS", "operation"]

NO_EFFECT = "Accepted for compatibility; has no effect, which the response's `warnings` says."
_HELP = {f.name: f for f in dataclasses.fields(SamplingParams)}
_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string"}
_TEXT = {"type": "string"}
_SOME_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_OBJECT = {"type": "object"}
_FLAG = {"type": "boolean"}
_MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {"role": _TEXT, "content": {"anyOf": [_TEXT, {"type": "array", "items": _OBJECT}]}},
    },
}
_SCHEMA = {"anyOf": [_OBJECT, _TEXT]}
_CHOICES = {"type": "array", "items": _SOME_TEXT, "minItems": 1, "maxItems": 1024}
_STRUCTURES: Mapping[str, dict[str, Any]] = {
    "choice": _CHOICES, "grammar": _TEXT, "json": _SCHEMA, "json_object": _FLAG, "regex": _TEXT,
    "reasoning": {"enum": ["none", "possible", "opened"]},
}  # fmt: skip


def _text_or_ids(text: dict[str, Any]) -> dict[str, Any]:
    many = {"type": "array", "items": {"anyOf": [text, _IDS]}, "minItems": 1}
    return {"description": "a text, token ids, or a list of either", "anyOf": [text, _IDS, many]}


_OTHER: Mapping[str, dict[str, Any]] = {
    "add_generation_prompt": {**_FLAG, "description": "open an assistant turn at the end of the prompt"},
    "add_special_tokens": {**_FLAG, "description": "add the tokens that the tokenizer puts around a text"},
    "allowed_token_ids": {**_IDS, "description": SAMPLING.options["allowed_token_ids"].help},
    "cache_salt": {**_TEXT, "description": "prompts with different salts never share cached prefixes"},
    "chat_template_kwargs": {**_OBJECT, "description": "variables of the chat template, such as enable_thinking"},
    "continue_final_message": {**_FLAG, "description": "go on with the last message instead of beginning a new one"},
    "echo": {**_FLAG, "description": "put the prompt before the completion"},
    "dimensions": {"type": "integer", "minimum": 1, "description": "leave it out, or give the model's own number"},
    "encoding_format": {"enum": ["float", "base64"], "description": "base64 is little-endian float32"},
    "pooling": {"enum": ["mean", "last"], "description": "mean over the tokens (default), or the last token"},
    "grammar": {**_TEXT, "description": "the text follows this grammar, in Lark's syntax or GBNF"},
    "guided_choice": {**_CHOICES, "description": "structured_outputs.choice"},
    "guided_grammar": {**_TEXT, "description": "structured_outputs.grammar"},
    "guided_json": {**_SCHEMA, "description": "structured_outputs.json"},
    "guided_regex": {**_TEXT, "description": "structured_outputs.regex"},
    "json_schema": {**_SCHEMA, "description": "structured_outputs.json"},
    "input": {"description": "a text, or a list of items", "anyOf": [_TEXT, {"type": "array", "items": _OBJECT}]},
    "instructions": {**_TEXT, "description": "a system message before the input"},
    "max_completion_tokens": {"type": "integer", "minimum": 1, "description": "tokens to generate at most"},
    "max_output_tokens": {"type": "integer", "minimum": 1, "description": "tokens to generate at most"},
    "messages": {**_MESSAGES, "description": "the conversation; content is a text or a list of text parts"},
    "metadata": {**_OBJECT, "description": NO_EFFECT},
    "model": {**_TEXT, "description": "name of the served model; may be left out"},
    "parallel_tool_calls": {**_FLAG, "description": "false: at most one call is given in an answer"},
    "priority": {"type": "integer", "minimum": -1000, "maximum": 1000, "description": "lower runs earlier"},
    "prompt": _text_or_ids(_TEXT),
    "prompts": {"type": "array", "items": _TEXT, "minItems": 1, "description": "texts to continue"},
    "reasoning": {**_OBJECT, "description": "effort, which is handed to the chat template"},
    "reasoning_effort": {**_TEXT, "description": "handed to the chat template"},
    "response_format": {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": _OBJECT},
        "description": "what the answer has to be",
    },
    "return_token_ids": {**_FLAG, "description": "add the generated token ids to each choice"},
    "store": {**_FLAG, "description": NO_EFFECT},
    "stream": {**_FLAG, "description": "send the answer as server-sent events"},
    "stream_options": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "include_usage": _FLAG,
            "continuous_usage_stats": _FLAG,
            "include_obfuscation": _FLAG,
        },
        "description": "include_usage adds a last chunk with the token counts",
    },
    "structured_outputs": {
        "type": "object",
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 2,
        "properties": _STRUCTURES,
        "description": "what the text has to be",
    },
    "text": {**_OBJECT, "description": "format: text, json_object or json_schema"},
    "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}, "description": "token ids"},
    "tool_choice": {
        "anyOf": [
            {"enum": ["none", "auto", "required"]},
            {"type": "object", "required": ["type"], "properties": {"type": {"enum": ["function"]}}},
        ],
        "description": "none hides the tools from the model; required, or a function's name in an object, forces calls",
    },
    "tools": {"type": "array", "items": _OBJECT, "description": "functions, shown to the model by its chat template"},
    "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20, "description": "needs logprobs: true"},
}


def _sampling(name: str) -> dict[str, Any]:
    """The schema of a SamplingParams field."""
    option, meta = SAMPLING.options[name], _HELP[name].metadata
    schema: dict[str, Any] = {"description": option.help}
    if option.kind is Pair:
        schema.update(type="object", additionalProperties={"type": "number", "minimum": -100, "maximum": 100})
    elif option.many:
        items = {"type": _KINDS[option.kind], **({"minimum": 0} if option.kind is int else {"minLength": 1})}
        array = {"type": "array", "items": items}
        schema.update({"anyOf": [items, array]} if option.kind is str else array)
    else:
        schema["type"] = _KINDS[option.kind]
        bounds = {"minimum": meta["low"], "maximum": meta["high"], "exclusiveMinimum": meta["above"]}
        schema.update({name: bound for name, bound in bounds.items() if bound is not None})
    return schema


def _field(name: str, chat: bool) -> dict[str, Any]:
    if name == "logprobs":
        return {**_FLAG, "description": "return log-probabilities"} if chat else _sampling("logprobs")
    if name in IGNORED:
        return _OTHER.get(name, {**_TEXT, "description": NO_EFFECT})
    return _sampling(name) if name in SAMPLING.options and name not in _OTHER else _OTHER[name]


def _body(
    names: Set[str] | tuple[str, ...], *required: str, chat: bool = False, **own: dict[str, Any]
) -> dict[str, Any]:
    """The schema of a body with these fields; `own` are those that mean something else there than elsewhere."""
    properties = {name: own.get(name) or _field(name, chat) for name in sorted(names)}
    return {"type": "object", "required": list(required), "properties": properties}


PLAIN_FIELDS = (frozenset(SAMPLING.options) | {"structured_outputs"}) - {"echo", "logprobs", "prompt_logprobs"}
_TEMPLATE = ("messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")
_RESPONSES = (
    "input",
    "instructions",
    "max_output_tokens",
    "model",
    "stream",
    "temperature",
    "top_p",
    "metadata",
    "store",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "text",
    "reasoning",
    "chat_template_kwargs",
)
BODIES: Mapping[str, dict[str, Any]] = {
    "chat": _body(known_fields(True) | set(IGNORED), "messages", chat=True),
    "completions": _body(known_fields(False) | set(IGNORED), "prompt"),
    "responses": _body(_RESPONSES, "input"),
    "generate": _body(PLAIN_FIELDS | {"prompt", "stream"}, "prompt"),
    "batch_generate": _body(PLAIN_FIELDS | {"prompts"}, "prompts"),
    "tokenize": {
        **_body((*_TEMPLATE, "prompt", "add_special_tokens", "model"), prompt=_TEXT),
        "oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}],
    },
    "detokenize": _body(("tokens", "skip_special_tokens", "model"), "tokens"),
    "apply_template": _body((*_TEMPLATE, "model"), "messages"),
    "embeddings": _body(
        ("input", "model", "encoding_format", "pooling", "dimensions", "user"),
        "input",
        input=_text_or_ids(_SOME_TEXT),
    ),
}
"""Schemas of request bodies by operation."""

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": _TEXT, "type": _TEXT},
        }
    },
}
_STATUSES = {
    400: "The request is wrong; `param` names the field",
    401: "A valid API key is missing",
    404: "There is no such model",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "The queue is full; see Retry-After",
    500: "The engine failed",
    503: "Loading, overloaded or shutting down",
    504: "The request took longer than its limit",
}


def operation(name: str) -> dict[str, Any]:
    """Keyword arguments for a route's decorator: its body, and the responses that it gives."""
    errors = {
        str(status): {"description": text, "content": {"application/json": {"schema": _ERROR}}}
        for status, text in _STATUSES.items()
    }
    content: dict[str, Any] = {"application/json": {"schema": _OBJECT}}
    if "stream" in BODIES[name]["properties"]:
        content["text/event-stream"] = {}
    return {
        "response_model": None,
        "openapi_extra": {
            "requestBody": {"required": True, "content": {"application/json": {"schema": BODIES[name]}}},
            "responses": {"200": {"description": "The answer", "content": content}, **errors},
        },
    }
