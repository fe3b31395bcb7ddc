"""Chat messages as they come from users, checked and made into plain data that a template may see.

Everything is rebuilt from JSON types, so a template cannot reach an object of the program or change the caller's
messages. Used by `ChatTemplate` alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvik.errors import RequestError

__all__ = ["add_text", "check_messages", "check_plain", "forms_of_calls", "join_parts"]

_MAX_DEPTH = 64
# A message's reasoning goes by these names; templates read the first, some the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


def check_plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of `value` in JSON types. Raises RequestError, naming the place, for anything else or deep nesting."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if depth >= _MAX_DEPTH:
        raise RequestError(f"{where} is nested deeper than {_MAX_DEPTH} levels", where.partition("[")[0])
    if isinstance(value, Mapping):
        return {check_plain(key, where, depth + 1): check_plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [check_plain(item, where, depth + 1) for item in value]
    raise RequestError(f"{where} holds a {type(value).__name__}; only JSON values are allowed", where.partition("[")[0])


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Plain copies of the messages, without keys that are None. Raises RequestError with the index of a wrong one."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(f"messages must be a list of objects, got {type(messages).__name__}", "messages")
    if not messages:
        raise RequestError("messages is empty; give at least one message", "messages")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _check_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with role and content, got {type(message).__name__}", "messages")
    plain = {key: value for key, value in check_plain(message, where).items() if value is not None}
    if plain.get("tool_calls") == []:
        del plain["tool_calls"]
    if plain.get("content") == "" and "tool_calls" in plain:
        del plain["content"]  # see `forms_of_calls`
    role = plain.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{where} needs a role ('system', 'user', 'assistant' or 'tool'), got {role!r}", "messages")
    if "content" in plain:
        _check_content(plain["content"], f"{where}.content")
    elif "tool_calls" not in plain:
        raise RequestError(f"{where} (role {role!r}) has no content; give a string", "messages")
    if "tool_calls" in plain:
        _parse_arguments(plain["tool_calls"], f"{where}.tool_calls")
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _check_content(content: Any, where: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise RequestError(
            f"{where} must be a string or a list of text parts, got {type(content).__name__}", "messages"
        )
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f'{where}[{i}] has type {kind!r}; only {{"type": "text", "text": ...}} parts are supported', "messages"
            )


def _parse_arguments(calls: Any, where: str) -> None:
    """Arguments come over HTTP as JSON text, templates expect the object. What a model got wrong stays text."""
    if not isinstance(calls, list):
        raise RequestError(f"{where} must be a list, got {type(calls).__name__}", "messages")
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where}[{i}] needs a function with a name", "messages")
        if isinstance(function.get("arguments"), str):
            function["arguments"] = _json_object(function["arguments"])


def _json_object(text: str) -> Any:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def forms_of_calls(chat: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Other forms of messages with calls, for templates that cannot render these.

    Where an answer has calls alone, some templates want its content to be null (DeepSeek-R1), others an empty text
    (Qwen3's first); and some want arguments as JSON text.
    """
    for content in ({}, {"content": None}, {"content": ""}):
        for as_text in (False, True):
            yield [
                {**content, **_calls(message, as_text=as_text)} if "tool_calls" in message else message
                for message in chat
            ]


def _calls(message: dict[str, Any], *, as_text: bool) -> dict[str, Any]:
    return {**message, "tool_calls": [_call(call, as_text=as_text) for call in message["tool_calls"]]}


def _call(call: dict[str, Any], *, as_text: bool) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _call(call["function"], as_text=as_text)}
    arguments = call.get("arguments")
    if not as_text or not isinstance(arguments, dict):
        return call
    return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}


def join_parts(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its text parts as one string, a line each, for templates that only know strings."""
    content = message.get("content")
    return {**message, "content": "\n".join(part["text"] for part in content)} if isinstance(content, list) else message


def add_text(message: dict[str, Any], suffix: str) -> str | None:
    """Append `suffix` to the text of a message in place. Returns the text before, None if there is none."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + suffix
        return content
    if not content:
        return None
    last: dict[str, str] = content[-1]
    text = last["text"]
    last["text"] = text + suffix
    return text
