"""Reads calls out of an answer that arrives in pieces, in JSON or in markup: where they end, and what they say.

A reader is fed from behind the mark that begins a call. Where it stops does not depend on how the text was cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from kvik.server.argument_types import argument_json, argument_types
from kvik.server.tool_formats import ToolFormat

__all__ = ["Call", "CallReader", "JsonReader", "MarkupReader", "News", "is_object", "reader_of"]

Call = tuple[str, str]
"""The name of a function, and its arguments: a JSON object, as the model wrote it where it wrote JSON."""

News = tuple[str | None, str]
"""The name of a function with which a call begins, or None for the last one, and more of the arguments."""

_MAX_SLOT = 256
"""Most characters between two marks, but for values."""

_SLOTS: Mapping[str, re.Pattern[str]] = {
    "name": re.compile(r'\s*[^\s<>\[\]{}"]*\s*'),
    "key": re.compile(r"(?s:.*)"),
    "id": re.compile(r"(?s:.*)"),
}
_STRING = r'("(?:[^"\\]|\\.)*")'
_BLANK = re.compile(r"\s*")


class JsonReader:
    """Reads a call that is a JSON object, or a list of such calls. `is_broken` once it cannot be one any more."""

    def __init__(self, form: ToolFormat) -> None:
        self._head = re.compile(re.escape(form.head).replace("%s", _STRING))
        self._read: list[str] = []
        self._value = _JsonValue()
        self._num_told = 0  # of what was read
        self._untold = ""
        self._arguments: _JsonValue | None = None  # while they are told

    @property
    def is_broken(self) -> bool:
        return self._value.is_broken

    @property
    def text(self) -> str:
        """What was read."""
        return "".join(self._read)

    def read(self, text: str) -> str | None:
        """What is left of the next piece of text behind the end; None where there is no end yet."""
        end = self._value.end(text)
        self._read.append(text[:end])
        return None if end is None else text[end:]

    def calls(self, schemas: Mapping[str, Any]) -> list[Call]:
        """The calls, once all was read; none if anything of them is wrong."""
        text = self.text
        try:
            calls = _many_calls.decode(text) if text.lstrip()[0] == "[" else [_one_call.decode(text)]
            return [(call.name, _arguments_of(call)) for call in calls]
        except (msgspec.DecodeError, RecursionError):
            return []

    def news(self, schemas: Mapping[str, Any]) -> list[News]:
        """What is new in calls that are certain to be right, and written as the format has them."""
        self._untold += "".join(self._read[self._num_told :])
        self._num_told = len(self._read)
        found: list[News] = []
        while self._untold:
            if self._arguments is None:
                head = self._head.search(self._untold)
                if head is None:
                    break
                found.append((_strings.decode(head[1]), ""))
                self._untold, self._arguments = self._untold[head.end() :], _JsonValue()
            else:
                end = self._arguments.end(self._untold)
                found.append((None, self._untold[:end]))
                self._untold = "" if end is None else self._untold[end:]
                self._arguments = self._arguments if end is None else None
        return found


class MarkupReader:
    """Reads one call of a format with states, from mark to mark. `is_broken` once it cannot be one any more."""

    def __init__(self, form: ToolFormat) -> None:
        self.is_broken = False
        self._form = form
        self._state = next(iter(form.states))
        self._read: list[str] = []
        self._unread = ""  # between two pieces only what may become a mark, and names that are not over
        self._slot: list[str] = []  # what was read in this state
        self._slots: dict[str, str] = {}  # the last text of each state
        self._arguments: list[tuple[str, str]] = []
        self._json = _JsonValue()
        self._is_named = False  # whether the name was told
        self._num_told = 0  # of the arguments, or of the pieces of JSON

    @property
    def text(self) -> str:
        """What was read."""
        return "".join(self._read) + self._unread

    def read(self, text: str) -> str | None:
        """What is left of the text behind the end; None where there is no end yet."""
        self._unread += text
        while self._state != "end" and not self.is_broken:
            if not (self._read_json() if self._state == "json" else self._read_slot()):
                return None
        rest, self._unread = self._unread, ""
        return rest

    def calls(self, schemas: Mapping[str, Any]) -> list[Call]:
        """The call, once all was read; none if anything of it is wrong."""
        name = self._slots.get("name", "").strip()
        if not name:
            return []
        if "json" in self._slots:
            arguments = self._slots["json"].strip()
            return [(name, arguments)] if is_object(arguments) else []
        given = dict(self._arguments)
        return [(name, "{" + ", ".join(_member(key, given[key], schemas.get(name, {})) for key in given) + "}")]

    def news(self, schemas: Mapping[str, Any]) -> list[News]:
        """What is new in a call that is certain to be right: JSON as it comes, other arguments one by one."""
        if "name" not in self._slots:
            return []
        name = self._slots["name"].strip()
        found: list[News] = [] if self._is_named else [(name, "")]
        self._is_named = True
        if self._state == "json" or "json" in self._slots:
            new, self._num_told = self._slot[self._num_told :], len(self._slot)
            return [*found, *((None, text) for text in new)]
        for key, value in self._arguments[self._num_told :]:
            found.append((None, (", " if self._num_told else "{") + _member(key, value, schemas.get(name, {}))))
            self._num_told += 1
        if self._state == "end":
            found.append((None, "}" if self._num_told else "{}"))
        return found

    def _read_slot(self) -> bool:
        """Read up to a mark, or to what is wrong before it; whether there was either."""
        marks = self._form.states[self._state]
        places = [(at, mark) for mark in marks if (at := self._unread.find(mark)) >= 0]
        at, mark = min(places) if places else (len(self._unread) - _beginning(self._unread, marks), "")
        if self._state != "value":
            fitting = _SLOTS.get(self._state, _BLANK).match(self._unread[: min(at, _MAX_SLOT)])
            assert fitting is not None
            if fitting.end() < at:
                self._take(fitting.end())
                self.is_broken = True
                return True
        if mark or self._state == "value":
            self._take(at)
        if mark:
            self._close(marks[mark])
            self._take(len(mark))
            self._slot.clear()
        return bool(mark)

    def _read_json(self) -> bool:
        end = self._json.end(self._unread)
        self._take(len(self._unread) if end is None else end)
        self.is_broken = self._json.is_broken
        if end is not None:
            self._close("end")
        return end is not None

    def _take(self, length: int) -> None:
        text, self._unread = self._unread[:length], self._unread[length:]
        self._read.append(text)
        self._slot.append(text)

    def _close(self, state: str) -> None:
        """Go on to another state."""
        self._slots[self._state] = "".join(self._slot)
        if self._state == "value":
            value = self._slots["value"].removeprefix(self._form.padding).removesuffix(self._form.padding)
            self._arguments.append((self._slots["key"].strip(), value))
        self._state = state


CallReader = JsonReader | MarkupReader


def reader_of(form: ToolFormat) -> CallReader:
    """A reader for what follows the mark that begins a call."""
    return MarkupReader(form) if form.states else JsonReader(form)


def _member(key: str, value: str, parameters: Mapping[str, Any]) -> str:
    return f"{_text.encode(key).decode()}: {argument_json(value, argument_types(key, parameters))}"


def _beginning(text: str, marks: Iterable[str]) -> int:
    """How many characters at the end of a text may be the beginning of a mark."""
    return max(
        (n for mark in marks for n in range(1, min(len(mark), len(text) + 1)) if text.endswith(mark[:n])), default=0
    )


class _JsonValue:
    """Finds the end of a JSON object or list that arrives in pieces, by its brackets and quotes alone."""

    def __init__(self) -> None:
        self.is_broken = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def end(self, text: str) -> int | None:
        """Where the value ends in the next piece of text, or stops to be one (`is_broken`); None if it goes on."""
        at = 1 if self._escaped and text else 0
        self._escaped = self._escaped and not text
        while (match := self._next_mark.search(text, at)) is not None:
            at, mark = match.end(), match[0]
            if self._in_string:
                self._in_string = mark != '"'
                self._escaped = mark == "\\" and at == len(text)
                at += mark == "\\"
            elif mark in "{[":
                self._depth += 1
            elif mark in "}]" and self._depth:
                self._depth -= 1
                if not self._depth:
                    return at
            elif mark == '"' and self._depth:
                self._in_string = True
            else:
                self.is_broken = True
                return match.start()
        return None

    @property
    def _next_mark(self) -> re.Pattern[str]:
        if self._in_string:
            return _IN_STRING
        return _IN_VALUE if self._depth else _BEFORE_VALUE


_BEFORE_VALUE = re.compile(r"\S")
_IN_VALUE = re.compile(r"[^\s\w.,:+-]")
_IN_STRING = re.compile(r'["\\]')


class _Call(msgspec.Struct):
    """A call's JSON. Families differ in what they name the arguments."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"null")
    parameters: msgspec.Raw = msgspec.Raw(b"null")


_one_call = msgspec.json.Decoder(_Call)
_many_calls = msgspec.json.Decoder(list[_Call])
_text = msgspec.json.Encoder()
_strings = msgspec.json.Decoder(str)
_object = msgspec.json.Decoder(dict[str, Any], float_hook=float)  # 1e999 is JSON, too


def is_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        _object.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def _arguments_of(call: _Call) -> str:
    """The arguments as a JSON object, which some models put into a string. Raises msgspec.DecodeError."""
    raw = bytes(call.arguments if bytes(call.arguments) != b"null" else call.parameters).decode()
    text = _strings.decode(raw) if raw.startswith('"') else raw
    if text in ("null", ""):
        return "{}"
    _object.decode(text)
    return text
