"""The items of /v1/responses: input items to chat messages, pieces of an answer to output items and their events."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from kvik.errors import RequestError
from kvik.server.call_readers import Arguments, is_object
from kvik.server.reply_parser import Content, Piece, Reasoning, ToolCall

__all__ = ["Event", "OutputItems", "chat_tools", "messages_of"]

Event = tuple[str, dict[str, Any]]
"""The type of an event and its fields."""

_REASONING_ONLY = {"role", "content", "reasoning_content"}


def messages_of(given: Any, instructions: str | None) -> list[dict[str, Any]]:
    """Input items as chat messages. Raises RequestError for items that hold something else than text and calls."""
    if given is None:
        raise RequestError("input is required", "input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list):
        raise RequestError("input must be a text or a list of items", "input")
    messages = [] if instructions is None else [{"role": "system", "content": instructions}]
    for place, item in enumerate(items):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if not isinstance(kind, str) or kind not in _READERS:
            raise RequestError(f"input[{place}] is no item of {', '.join(_READERS)}; others are not supported", "input")
        _join(messages, _READERS[kind](item, f"input[{place}]"))
    if not messages:
        raise RequestError("input is empty; give at least one item", "input")
    return messages


def _join(messages: list[dict[str, Any]], new: dict[str, Any]) -> None:
    """Append a message. What one answer said in several items is one message: reasoning, text, calls."""
    last = messages[-1] if messages else {}
    if new["role"] == last.get("role") == "assistant":
        if "tool_calls" in new:
            last.setdefault("tool_calls", []).extend(new["tool_calls"])
            return
        if last["content"] == "" and last.keys() == _REASONING_ONLY:
            thoughts = (last["reasoning_content"], new.get("reasoning_content"))
            last.update(new, reasoning_content="\n".join(filter(None, thoughts)))
            return
    messages.append(new)


def _message(item: dict[str, Any], where: str) -> dict[str, Any]:
    content = item.get("content")
    if isinstance(content, list):
        content = [{"type": "text", "text": _text(part, f"{where}.content")} for part in content]
    elif not isinstance(content, str):
        raise RequestError(f"{where}.content must be a text or a list of parts of text", "input")
    return {"role": _string(item, "role", where), "content": content}


def _text(part: Any, where: str) -> str:
    kinds = ("input_text", "output_text", "reasoning_text", "summary_text", "text")
    if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
        raise RequestError(f"{where} may hold parts of text only", "input")
    text: str = part["text"]
    return text


def _call(item: dict[str, Any], where: str) -> dict[str, Any]:
    function = {"name": _string(item, "name", where), "arguments": _string(item, "arguments", where)}
    call = {"id": _string(item, "call_id", where), "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _call_output(item: dict[str, Any], where: str) -> dict[str, Any]:
    output = item.get("output")
    if isinstance(output, list):
        output = "\n".join(_text(part, f"{where}.output") for part in output)
    if not isinstance(output, str):
        raise RequestError(f"{where}.output must be a text", "input")
    return {"role": "tool", "tool_call_id": _string(item, "call_id", where), "content": output}


def _reasoning(item: dict[str, Any], where: str) -> dict[str, Any]:
    parts = item.get("content") or item.get("summary") or []
    if not isinstance(parts, list):
        raise RequestError(f"{where}.content must be a list", "input")
    text = "\n".join(_text(part, f"{where}.content") for part in parts)
    return {"role": "assistant", "content": "", "reasoning_content": text}


def _string(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name} must be a text", "input")
    return value


_READERS = {
    "message": _message, "function_call": _call, "function_call_output": _call_output, "reasoning": _reasoning,
}  # fmt: skip


def chat_tools(tools: list[Any]) -> list[dict[str, Any]]:
    """Function tools in the form of chats. Raises RequestError for tools that the server would have to run."""
    found = []
    for place, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise RequestError(f"tools[{place}] is not a function; this server runs no tools of its own", "tools")
        if not isinstance(tool.get("name"), str):
            raise RequestError(f'tools[{place}] must be {{"type": "function", "name": ...}}', "tools")
        function = {name: value for name, value in tool.items() if name != "type"}
        found.append({"type": "function", "function": function})
    return found


class OutputItems:
    """Makes the output items of one answer, in the order in which its pieces come, and the events that tell of them."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: type[Piece] | None = None  # what the last item holds while it grows
        self._texts: list[str] = []

    def add(self, piece: Piece) -> Iterator[Event]:
        """The events of a piece."""
        if isinstance(piece, ToolCall):
            yield from self._close("completed")
            yield from self._begin_call(piece)
            return
        if isinstance(piece, Arguments):
            self._texts.append(piece.text)
            yield self._event("response.function_call_arguments.delta", delta=piece.text)
            return
        if self._open is not type(piece):
            yield from self._close("completed")
            yield from self._begin(type(piece))
        self._texts.append(piece.text)
        yield self._event(_names(type(piece))[1] + ".delta", content_index=0, delta=piece.text, **_more(self._open))

    def finish(self, status: str) -> Iterator[Event]:
        """The events of the end. An answer without anything is an empty message."""
        if not self.items:
            yield from self._begin(Content)
        yield from self._close(status)

    def _close(self, status: str) -> Iterator[Event]:
        """End the text that is being written, if there is one."""
        if self._open is None:
            return
        kind, self._open = self._open, None
        item = self.items[-1]
        if kind is ToolCall:
            yield from self._end_call(item)
            return
        part = item["content"][0]
        part["text"], item["status"] = "".join(self._texts), status
        self._texts.clear()
        yield self._event(_names(kind)[1] + ".done", content_index=0, text=part["text"], **_more(kind))
        yield self._event("response.content_part.done", content_index=0, part=part)
        yield self._item_event("response.output_item.done")

    def _begin(self, kind: type[Reasoning] | type[Content]) -> Iterator[Event]:
        prefix, _ = _names(kind)
        item: dict[str, Any] = {"id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress", "content": []}
        if kind is Content:
            item.update(type="message", role="assistant")
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item.update(type="reasoning", summary=[])
            part = {"type": "reasoning_text", "text": ""}
        self.items.append(item)
        self._open = kind
        yield self._item_event("response.output_item.added")
        item["content"] = [part]
        yield self._event("response.content_part.added", content_index=0, part=dict(part))

    def _begin_call(self, call: ToolCall) -> Iterator[Event]:
        item = {
            "type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": call.id, "name": call.name,
            "arguments": "", "status": "in_progress",
        }  # fmt: skip
        self.items.append(item)
        self._open = ToolCall
        yield self._item_event("response.output_item.added")

    def _end_call(self, item: dict[str, Any]) -> Iterator[Event]:
        """A call whose arguments are an object is complete, and no other, whatever becomes of the answer."""
        arguments = "".join(self._texts)
        item.update(arguments=arguments, status="completed" if is_object(arguments) else "incomplete")
        self._texts.clear()
        yield self._event("response.function_call_arguments.done", name=item["name"], arguments=arguments)
        yield self._item_event("response.output_item.done")

    def _event(self, kind: str, **fields: Any) -> Event:
        return kind, {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}

    def _item_event(self, kind: str) -> Event:
        return kind, {"output_index": len(self.items) - 1, "item": dict(self.items[-1])}


def _names(kind: type[Piece]) -> tuple[str, str]:
    """The prefix of an item's id, and of the events of its text."""
    return ("msg", "response.output_text") if kind is Content else ("rs", "response.reasoning_text")


def _more(kind: type[Piece] | None) -> dict[str, Any]:
    """What events of an answer's text have beside it."""
    return {"logprobs": []} if kind is Content else {}
