"""Reads calls out of an answer that arrives in pieces, in JSON or in markup, and tells of them while they are written.

A reader is fed from behind the mark that begins a call. Where it stops, and what it tells in all, do not depend on how
the text was cut. Arguments lack their last bracket until the call is whole, so those of a call that breaks off are not
JSON.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from kvik.server.argument_types import argument_json, argument_types, is_string
from kvik.server.tool_formats import ToolFormat

__all__ = ["Arguments", "Begun", "CallReader", "Ended", "News", "first_mark", "is_object", "reader_of"]


class Begun(NamedTuple):
    """A call of a function has begun."""

    name: str


class Arguments(NamedTuple):
    """More of the last call's arguments: together a JSON object, as the model wrote it where it wrote JSON."""

    text: str


class Ended(NamedTuple):
    """The last call is whole, and right."""


News = Begun | Arguments | Ended

_MAX_SLOT = 256
"""Most characters between two marks, but for values."""

_SLOTS: Mapping[str, re.Pattern[str]] = {
    "name": re.compile(r'\s*[^\s<>\[\]{}"]*\s*'),
    "key": re.compile(r"(?s:.*)"),
    "id": re.compile(r"(?s:.*)"),
}
_BLANK = re.compile(r"\s*")


class CallReader(ABC):
    """Reads one call, or several where a format has lists. `is_broken` once it cannot be what it has to be.

    `schemas` are the parameters of the functions that the request offers; with `offered_only` calls of others are none.
    """

    def __init__(self, schemas: Mapping[str, Any], *, offered_only: bool) -> None:
        self.is_broken = False
        self._schemas = schemas
        self._offered_only = offered_only
        self._read: list[str] = []
        self._news: list[News] = []
        self._arguments: list[str] = []  # of a call that has begun

    @property
    def text(self) -> str:
        """What was read since the last news, and is in none."""
        return "".join(self._read)

    @abstractmethod
    def read(self, text: str) -> str | None:
        """What is left of the next piece of text behind the end; None where there is no end yet."""

    def news(self) -> list[News]:
        """What there is to tell since the last time."""
        news, self._news = self._news, []
        return news

    def _begin(self, name: str) -> None:
        self.is_broken = not name or (self._offered_only and name not in self._schemas)
        if not self.is_broken:
            self._news.append(Begun(name))
            self._arguments.clear()
            self._read.clear()

    def _tell(self, text: str, rest: str = "") -> None:
        """More of the arguments; `rest` is what was read behind it."""
        if text:
            self._news.append(Arguments(text))
            self._arguments.append(text)
            self._read[:] = [rest]

    def _end(self, rest: str) -> None:
        """The call is over, if its arguments are right with this rest of them."""
        self.is_broken = not is_object("".join(self._arguments) + rest)
        if not self.is_broken:
            self._tell(rest)
            self._news.append(Ended())
            self._read.clear()


class _JsonReader(CallReader):
    """Reads a call that is a JSON object, or a list of such calls: member by member, in any order."""

    def __init__(self, schemas: Mapping[str, Any], *, offered_only: bool) -> None:
        super().__init__(schemas, offered_only=offered_only)
        self._in_list = False
        self._state = "begin"
        self._value: _JsonValue | None = None  # the key or value that is being read
        self._texts: list[str] = []  # of it
        self._key = ""
        self._name: str | None = None
        self._early: list[str] = []  # arguments that came before the name
        self._rest: str | None = None  # what of the arguments is told when the call is whole

    def read(self, text: str) -> str | None:
        at = 0
        while at < len(text) and self._state != "end" and not self.is_broken:
            if self._value is None:
                begin, at = at, self._mark_end(text, at)
                self._read.append(text[begin:at])
            else:
                at = self._read_value(self._value, text, at)
            if self._state == "whole" and not self.is_broken:
                self._end("{}" if self._rest is None else self._rest)
                self._state = "between" if self._in_list else "end"
                self._name = self._rest = None
        return text[at:] if self._state == "end" or self.is_broken else None

    def _mark_end(self, text: str, at: int) -> int:
        """Read white space and what stands behind it: a bracket, a comma or a colon, or nothing of a value."""
        found = _INK.search(text, at)
        if found is None:
            return len(text)
        mark, at = found[0], found.start()
        if self._state == "value" or (mark == '"' and self._state in ("first", "key")):
            self._value = _JsonValue()
            return at
        self._in_list |= mark == "["
        self._state = _JSON_STATES.get((self._state, mark), "")
        # A call without a name is none.
        self.is_broken = not self._state or (self._state == "whole" and self._name is None)
        return at if not self._state else at + 1

    def _read_value(self, value: _JsonValue, text: str, begin: int) -> int:
        """Read more of a key or a value; where it ends, or the text does."""
        end = value.end(text, begin)
        at = len(text) if end is None else end
        self._read.append(text[begin:at])
        self._texts.append(text[begin:at])
        self.is_broken = value.is_broken
        is_over = end is not None and not self.is_broken
        if self._is_arguments and self._texts[0][:1] == "{":
            last = at - is_over
            self._add(text[begin:last], text[last:at])
        if is_over:
            self._close("".join(self._texts))
            self._value = None
            self._texts.clear()
        return at

    @property
    def _is_arguments(self) -> bool:
        """Whether the value that is being read is what the call's arguments are taken from."""
        return self._state == "value" and self._key in ("arguments", "parameters") and self._rest is None

    def _add(self, text: str, rest: str) -> None:
        """More of the arguments, and what was read behind it."""
        if self._name is None:
            self._early.append(text)
        else:
            self._tell(text, rest)

    def _close(self, text: str) -> None:
        """A key or a value was read."""
        try:
            if self._state != "value":
                self._key, self._state = _strings.decode(text), "colon"
                return
            if self._is_arguments and text[:1] == "{":
                self._rest = "}"
            elif self._is_arguments and text != "null":
                # Some models put the object into a string.
                rest = _strings.decode(text)
                self._rest = "{}" if rest in ("null", "") else rest
            elif self._key == "name" and self._name is None:
                self._name = _strings.decode(text)
                self._begin(self._name)
                self._tell("".join(self._early), "}")
                self._early.clear()
            else:
                _values.decode(text)
            self._state = "next"
        except (msgspec.DecodeError, RecursionError):
            self.is_broken = True


_INK = re.compile(r"\S")
_JSON_STATES: Mapping[tuple[str, str], str] = {
    ("begin", "{"): "first", ("begin", "["): "item", ("item", "{"): "first",
    ("first", "}"): "whole", ("colon", ":"): "value", ("next", ","): "key", ("next", "}"): "whole",
    ("between", ","): "item", ("between", "]"): "end",
}  # fmt: skip
"""What follows a mark. Keys are read in `first` and `key`, values in `value`."""


class _MarkupReader(CallReader):
    """Reads one call of a format with states, from mark to mark.

    A value that can be nothing but a string is told while it is written. Whether another one is JSON or a string, its
    last character may decide: it is told when it is over.
    """

    def __init__(self, form: ToolFormat, schemas: Mapping[str, Any], *, offered_only: bool) -> None:
        super().__init__(schemas, offered_only=offered_only)
        self._form = form
        self._state = next(iter(form.states))
        self._unread = ""  # between two pieces only what may become a mark, and names that are not over
        self._slot: list[str] = []  # what was read in this state
        self._slots: dict[str, str] = {}  # the last text of each state
        self._types: frozenset[str] = frozenset()  # that the value may have which is read
        self._member = ""  # what is told in front of it
        self._lead = ""  # the padding in front of a string of which nothing was read yet
        self._json: _JsonValue | None = None

    @property
    def text(self) -> str:
        return super().text + self._unread

    def read(self, text: str) -> str | None:
        self._unread += text
        while self._state != "end" and not self.is_broken:
            if not (self._read_json() if self._state == "json" else self._read_slot()):
                return None
        rest, self._unread = self._unread, ""
        return rest

    def _read_slot(self) -> bool:
        """Read up to a mark, or to what is wrong before it; whether there was either."""
        marks = self._form.states[self._state]
        at, mark = first_mark(self._unread, marks)
        if self._state != "value":
            fitting = _SLOTS.get(self._state, _BLANK).match(self._unread[: min(at, _MAX_SLOT)])
            assert fitting is not None
            if fitting.end() < at:
                self._take(fitting.end())
                self.is_broken = True
                return True
        if mark or self._state == "value":
            self._take(at)
        if self._state == "value" and is_string(self._types):
            self._tell_string(is_over=bool(mark))
        if mark:
            slot = "".join(self._slot)
            self._take(len(mark))
            self._slot.clear()
            self._close(slot, marks[mark])
        return bool(mark)

    def _close(self, slot: str, state: str) -> None:
        """Go on to another state, behind this text of the last one."""
        last, self._state = self._state, state
        self._slots[last] = slot
        if last == "name":
            self._begin(slot.strip())
        elif last == "value" and is_string(self._types):
            self._tell('"')
        elif last == "value":
            value = slot.removeprefix(self._form.padding).removesuffix(self._form.padding)
            self._tell(self._member + argument_json(value, self._types))
        if state == "value":
            self._begin_value(self._slots["key"].strip())
        if state == "end" and not self.is_broken:
            self._end("}" if self._arguments else "{}")

    def _begin_value(self, key: str) -> None:
        self._types = argument_types(key, self._schemas.get(self._slots["name"].strip(), {}))
        self._member = f"{', ' if self._arguments else '{'}{_text.encode(key).decode()}: "
        self._lead = self._form.padding
        if is_string(self._types):
            self._tell(self._member + '"')

    def _tell_string(self, *, is_over: bool) -> None:
        """Tell more of a string, without the padding: whether a character is that behind it shows when it is over."""
        text = "".join(self._slot)
        if text:
            text, self._lead = text.removeprefix(self._lead), ""
        more = text.removesuffix(self._form.padding)
        rest = "" if is_over else text[len(more) :]
        self._tell(json.dumps(more, ensure_ascii=False)[1:-1], rest)
        self._slot[:] = [rest]

    def _read_json(self) -> bool:
        """Read an object to its end, or to what is wrong; whether there was either."""
        if self._json is None:
            self._take(len(self._unread) - len(self._unread.lstrip()))
            if not self._unread:
                return False
            self._json = _JsonValue()
            self.is_broken = self._unread[0] != "{"
        if self.is_broken:
            return True
        end = self._json.end(self._unread, 0)
        text = self._unread[:end]
        self._take(len(text))
        self.is_broken = self._json.is_broken
        if end is None or self.is_broken:
            self._tell(text)
        else:
            self._tell(text[:-1], text[-1])
            self._state = "end"
            self._end("}")
        return end is not None

    def _take(self, length: int) -> None:
        text, self._unread = self._unread[:length], self._unread[length:]
        self._read.append(text)
        self._slot.append(text)


def reader_of(form: ToolFormat, schemas: Mapping[str, Any], *, offered_only: bool) -> CallReader:
    """A reader for what follows the mark that begins a call."""
    if form.states:
        return _MarkupReader(form, schemas, offered_only=offered_only)
    return _JsonReader(schemas, offered_only=offered_only)


def first_mark(text: str, marks: Iterable[str]) -> tuple[int, str]:
    """Where the first of the marks in a text begins, and which it is.

    Where there is none it is "", and begins where the text may end with the beginning of one.
    """
    places = [(at, mark) for mark in marks if (at := text.find(mark)) >= 0]
    if places:
        return min(places)
    lengths = (n for mark in marks for n in range(1, min(len(mark), len(text) + 1)) if text.endswith(mark[:n]))
    return len(text) - max(lengths, default=0), ""


class _JsonValue:
    """Finds the end of a JSON value that arrives in pieces, by its brackets and quotes alone."""

    def __init__(self) -> None:
        self.is_broken = False
        self._is_scalar: bool | None = None  # neither a string nor in brackets; None before the first character
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def end(self, text: str, at: int) -> int | None:
        """Where the value ends in the next piece of text, or stops to be one (`is_broken`); None if it goes on.

        The value goes on at `at`, where there is a character.
        """
        if self._is_scalar is None:
            self._is_scalar = text[at] not in '"{['
        if self._is_scalar:
            found = _BEHIND_SCALAR.search(text, at)
            return None if found is None else found.start()
        at += self._escaped
        self._escaped = False
        while (found := (_IN_STRING if self._in_string else _IN_VALUE).search(text, at)) is not None:
            at, mark = found.end(), found[0]
            if mark == "\\" and self._in_string:
                self._escaped = at == len(text)
                at += 1
                continue
            if mark == '"':
                self._in_string = not self._in_string
            elif mark in "{[":
                self._depth += 1
            elif mark in "}]":
                self._depth -= 1
            else:
                self.is_broken = True
                return found.start()
            if not self._depth and not self._in_string:
                return at
        return None


_BEHIND_SCALAR = re.compile(r"[^\w.+-]")
_IN_VALUE = re.compile(r"[^\s\w.,:+-]")
_IN_STRING = re.compile(r'["\\]')

_text = msgspec.json.Encoder()
_strings = msgspec.json.Decoder(str)
_values = msgspec.json.Decoder(float_hook=float)  # 1e999 is JSON, too
_object = msgspec.json.Decoder(dict[str, Any], float_hook=float)


def is_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        _object.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True
