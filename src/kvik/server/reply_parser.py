"""What a chat model wrote, told apart while it arrives: reasoning, content, tool calls.

One incremental parser serves streams and whole answers, which is why they are the same: the pieces do not depend on how
the text was cut, but for where one text ends and the next one of the same kind begins. Formats are data. A call is told
when its JSON is complete and right, so `arguments` is always valid JSON; whatever only looks like a call is content,
unchanged. Time is linear in the text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

__all__ = ["THINK", "TOOL_FORMATS", "Content", "Piece", "Reasoning", "ReplyParser", "ToolCall", "ToolFormat"]

THINK = ("<think>", "</think>")
"""What stands around reasoning."""

_SLICE = 4096
"""Characters that are looked at together: what is cut off in front of them is copied once for every marker."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes a call: `begin`, a JSON object with name and arguments (or a list), `end`.

    `end` may be missing. A `bare` format begins with the first character of the message, `begin` may be missing too,
    and only calls of functions that the request offers count: an answer may be JSON for other reasons.
    `layout` is what models write before, between and after calls, `key` what they call the arguments.
    A template is of this format if it holds all `signs` and none of `foreign`.
    """

    name: str
    begin: str
    end: str
    signs: tuple[str, ...]
    layout: tuple[str, str, str]
    foreign: tuple[str, ...] = ()
    key: str = "arguments"
    bare: bool = False
    id_prefix: str = "call_"
    id_length: int = 24


TOOL_FORMATS = (
    ToolFormat(
        "hermes",
        "<tool_call>",
        "</tool_call>",
        signs=("<tool_call>",),
        layout=("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
        foreign=("<function=", "<arg_key>"),
    ),
    ToolFormat(
        "mistral",
        "[TOOL_CALLS]",
        "",
        signs=("[TOOL_CALLS]",),
        layout=("[TOOL_CALLS] [", ", ", "]"),
        foreign=("[ARGS]",),
        id_prefix="",  # templates of this family refuse other ids than nine letters and digits
        id_length=9,
    ),
    ToolFormat(
        "llama",
        "<|python_tag|>",
        ";",
        signs=('"parameters": ', "ipython"),
        layout=("", "; ", ""),
        key="parameters",
        bare=True,
    ),
)


class Reasoning(NamedTuple):
    """Text that the model wrote to think."""

    text: str


class Content(NamedTuple):
    """Text for the user."""

    text: str


class ToolCall(NamedTuple):
    """A whole call; `arguments` is a JSON object as the model wrote it."""

    id: str
    name: str
    arguments: str


Piece = Reasoning | Content | ToolCall


class _Call(msgspec.Struct):
    """A call's JSON. Families differ in what they name the arguments."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"null")
    parameters: msgspec.Raw = msgspec.Raw(b"null")


class ReplyParser:
    """Parses one answer. `names` are the functions that the request offers.

    With `reasoning`, text in think tags is told apart; `opened` says that the prompt has opened them. After
    `max_calls` further calls are left out.
    """

    def __init__(
        self,
        tools: ToolFormat | None = None,
        names: Iterable[str] = (),
        *,
        reasoning: bool = False,
        opened: bool = False,
        max_calls: int | None = None,
    ) -> None:
        self._tools = tools
        self._names = frozenset(names)
        self._max_calls = max_calls
        self._opened = opened
        self._pieces: list[Piece] = []
        self._text = ""  # unread; between two feeds only what may become a marker
        self._space: list[str] = []  # whitespace before what comes next: dropped if that is markup
        self._at_edge = opened  # behind markup, where whitespace is dropped too
        self._kind: type[Reasoning] | type[Content] = Reasoning if opened else Content
        self._raw: list[str] = []  # what was read of a call that is not complete
        self._json = _JsonValue()
        self._state = ReplyParser._begin if reasoning or opened else self._answer
        self.num_calls = 0
        self.has_reasoned = opened

    @property
    def is_reasoning(self) -> bool:
        """Whether reasoning has begun and not ended."""
        return self._kind is Reasoning

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain now."""
        for start in range(0, len(text), _SLICE):
            self._text += text[start : start + _SLICE]
            while self._state(self):
                pass
        pieces, self._pieces = self._pieces, []
        return pieces

    def finish(self) -> list[Piece]:
        """The rest, once the text is over."""
        if self._state is ReplyParser._call:
            self._give_up()
        elif self._state is not ReplyParser._after_call:  # which leaves nothing but a part of the end mark
            self._write(self._text)
        if self._kind is Content and not self._at_edge:
            self._emit("".join(self._space))
        pieces, self._pieces = self._pieces, []
        return pieces

    # States: each reads of the text what it can, and says whether the next state has something to do.

    def _begin(self) -> bool:
        found = self._starts_with(THINK[0])
        if found or (found is False and self._opened):
            self.has_reasoned = True
            self._enter(ReplyParser._reason, Reasoning)
        elif found is False:
            self._state = self._answer
        return found is not None

    def _reason(self) -> bool:
        ended = self._until(THINK[1])
        if ended:
            self._enter(self._answer, Content)
        return ended

    def _say(self) -> bool:
        """Content in which a call may begin."""
        assert self._tools is not None
        found = self._until(self._tools.begin)
        if found:
            self._begin_call(self._tools.begin)
        return found

    def _say_all(self) -> bool:
        """Content to the end."""
        if self._at_edge or self._space:
            self._write(self._text)
        else:
            self._emit(self._text)
        self._text = ""
        return False

    def _say_or_call(self) -> bool:
        """The beginning of a message, or what follows a call, in a bare format."""
        assert self._tools is not None
        found = self._starts_with(self._tools.begin)
        if found or (found is False and self._text[0] == "{"):
            self._begin_call(self._tools.begin if found else "")
        elif found is False:
            self._state = ReplyParser._say_all
        return found is not None

    def _call(self) -> bool:
        end = self._json.end(self._text)
        self._raw.append(self._text[:end])
        self._text = self._text[len(self._raw[-1]) :]
        if end is None:
            return False
        if self._json.is_broken or not self._tell():
            self._give_up()
        return True

    def _after_call(self) -> bool:
        assert self._tools is not None
        found = self._starts_with(self._tools.end)
        if found is not None:
            self._enter(self._answer, Content)
        return found is not None

    # Steps

    @property
    def _answer(self) -> Callable[[ReplyParser], bool]:
        """The state of a message in which nothing has been said yet."""
        if self._tools is None:
            return ReplyParser._say_all
        return ReplyParser._say_or_call if self._tools.bare else ReplyParser._say

    def _enter(self, state: Callable[[ReplyParser], bool], kind: type[Reasoning] | type[Content]) -> None:
        """Go on behind some markup."""
        self._state, self._kind, self._at_edge = state, kind, True
        self._space.clear()

    def _starts_with(self, marker: str) -> bool | None:
        """Read `marker`, if the text behind its leading whitespace begins with it. None: that is not known yet."""
        rest = self._text.lstrip()
        if len(rest) < len(self._text):
            self._space.append(self._text[: len(self._text) - len(rest)])
        found = rest.startswith(marker)
        self._text = rest.removeprefix(marker)
        return None if not found and marker.startswith(rest) else found

    def _until(self, marker: str) -> bool:
        """Write the text up to `marker`, and read that; whether it was there."""
        at = self._text.find(marker)
        if at >= 0:
            self._write(self._text[:at])
            self._text = self._text[at + len(marker) :]
            return True
        kept = min(len(marker) - 1, len(self._text))
        while not self._text.endswith(marker[:kept]):
            kept -= 1
        cut = len(self._text) - kept
        self._write(self._text[:cut])
        self._text = self._text[cut:]
        return False

    def _begin_call(self, marker: str) -> None:
        self._raw.append(marker)
        self._json = _JsonValue()
        self._state = ReplyParser._call

    def _tell(self) -> bool:
        """Tell of the calls that were read; False if they are none."""
        assert self._tools is not None
        value = "".join(self._raw).removeprefix(self._tools.begin)
        calls = _decode_calls(value)
        if not calls or (self._tools.bare and not self._names.issuperset(name for name, _ in calls)):
            return False
        for name, arguments in calls:
            if self.num_calls != self._max_calls:
                self.num_calls += 1
                call_id = self._tools.id_prefix + secrets.token_hex(12)[: self._tools.id_length]
                self._pieces.append(ToolCall(call_id, name, arguments))
        self._raw.clear()
        self._enter(ReplyParser._after_call, Content)
        return True

    def _give_up(self) -> None:
        """What looked like a call is content."""
        assert self._tools is not None
        self._write("".join(self._raw))
        self._raw.clear()
        self._state = ReplyParser._say_all if self._tools.bare else ReplyParser._say

    def _write(self, text: str) -> None:
        """Text of the current kind. Whitespace waits for what follows it."""
        core = text.strip()
        begin = text.index(core)
        end = begin + len(core)
        if core:
            before = "" if self._at_edge else "".join(self._space) + text[:begin]
            self._emit(before + core)
            self._at_edge = False
            self._space.clear()
        if end < len(text):
            self._space.append(text[end:])

    def _emit(self, text: str) -> None:
        if text:
            self._pieces.append(self._kind(text))


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

_one_call = msgspec.json.Decoder(_Call)
_many_calls = msgspec.json.Decoder(list[_Call])
_strings = msgspec.json.Decoder(str)
_object = msgspec.json.Decoder(dict[str, Any], float_hook=float)  # 1e999 is JSON, too


def _decode_calls(text: str) -> list[tuple[str, str]]:
    """Names and arguments of the calls in a JSON text; none if anything of it is wrong."""
    try:
        calls = _many_calls.decode(text) if text.lstrip()[0] == "[" else [_one_call.decode(text)]
        return [(call.name, _arguments_of(call)) for call in calls]
    except (msgspec.DecodeError, RecursionError):
        return []


def _arguments_of(call: _Call) -> str:
    """The arguments as a JSON object, which some models put into a string. Raises msgspec.DecodeError."""
    raw = bytes(call.arguments if bytes(call.arguments) != b"null" else call.parameters).decode()
    text = _strings.decode(raw) if raw.startswith('"') else raw
    if text in ("null", ""):
        return "{}"
    _object.decode(text)
    return text
