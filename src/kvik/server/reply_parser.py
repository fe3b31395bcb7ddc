"""What a chat model wrote, told apart while it arrives: reasoning, content, tool calls.

One incremental parser serves streams and whole answers, which is why they are the same: the pieces do not depend on how
the text was cut, but for where one text ends and the next one of the same kind begins. Formats are data. A call is told
while it is written, and what was told is not taken back: where a call breaks off, it keeps the arguments until there,
which are not JSON, and what stands behind them is content. What breaks off before the end of its name is content,
unchanged. Time is linear in the text.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kvik.server.call_readers import Arguments, Begun, CallReader, Ended, first_mark, reader_of
from kvik.server.tool_formats import ToolFormat
from kvik.structured.grammars import THINK

__all__ = ["Content", "Piece", "Reasoning", "ReplyParser", "ToolCall"]

_SLICE = 4096
"""Characters that are looked at together: what is cut off in front of them is copied once for every marker."""


class Reasoning(NamedTuple):
    """Text that the model wrote to think."""

    text: str


class Content(NamedTuple):
    """Text for the user."""

    text: str


class ToolCall(NamedTuple):
    """The beginning of a call."""

    id: str
    name: str


Piece = Reasoning | Content | ToolCall | Arguments


class ReplyParser:
    """Parses one answer. `schemas` are the parameters of the functions that the request offers, by name.

    With `reasoning`, text in think tags is told apart; `opened` says that the prompt has opened them. After
    `max_calls` further calls are left out. `forced` says that nothing of a call that is cut is content.
    """

    def __init__(
        self,
        tools: ToolFormat | None = None,
        schemas: Mapping[str, Any] | None = None,
        *,
        reasoning: bool = False,
        opened: bool = False,
        max_calls: int | None = None,
        forced: bool = False,
    ) -> None:
        self._tools = tools
        self._schemas = schemas or {}
        self._max_calls = max_calls
        self._forced = forced
        self._opened = opened
        self._pieces: list[Piece] = []
        self._text = ""  # unread; between two feeds only what may become a marker
        self._space: list[str] = []  # whitespace before what comes next: dropped if that is markup
        self._at_edge = opened  # behind markup, where whitespace is dropped too
        self._kind: type[Reasoning] | type[Content] = Reasoning if opened else Content
        self._mark = ""  # with which the call began that is being read
        self._reader: CallReader | None = None
        self._is_open = False  # whether a call has begun that is not whole yet
        self._state = ReplyParser._begin if reasoning or opened else self._answer
        self._num_calls = 0  # that have begun
        self._has_whole = False  # whether a call that was told of is whole
        self._is_cut = False
        self.has_reasoned = opened

    @property
    def is_reasoning(self) -> bool:
        """Whether reasoning has begun and not ended."""
        return self._kind is Reasoning

    @property
    def has_called(self) -> bool:
        """Whether there is a whole call, and no forced one was cut."""
        return self._has_whole and not self._is_cut

    def feed(self, text: str, *, ended: bool = False) -> list[Piece]:
        """The pieces that are certain now; with `ended`, all that are left."""
        for start in range(0, len(text), _SLICE):
            self._text += text[start : start + _SLICE]
            while self._state(self):
                pass
        if ended:
            self._finish()
        pieces, self._pieces = self._pieces, []
        return pieces

    def _finish(self) -> None:
        if self._state is ReplyParser._call:
            self._is_cut = self._forced and self._is_open
            if not self._is_cut:
                self._give_up()
        elif self._state is not ReplyParser._after_call:  # which leaves nothing but a part of the end mark
            self._write(self._text)
        if self._kind is Content and not self._at_edge and not self._is_cut:
            self._emit("".join(self._space))

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
        return bool(ended)

    def _say(self) -> bool:
        """Content in which a call may begin."""
        assert self._tools is not None
        found = self._until(*filter(None, (self._tools.begin, self._tools.inner_begin)))
        if found == self._tools.begin:
            self._begin_call(found)
        elif found:
            self._text = found + self._text
            self._begin_call("")
        return bool(found)

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
        assert self._reader is not None
        rest = self._reader.read(self._text)
        self._text = rest or ""
        self._tell(self._reader)
        if rest is None:
            return False
        if self._reader.is_broken:
            self._give_up()
        else:
            self._enter(ReplyParser._after_call, Content)
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

    def _until(self, *markers: str) -> str:
        """Write the text up to one of the markers, and read and give that; "" where there is none."""
        at, marker = first_mark(self._text, markers)
        self._write(self._text[:at])
        self._text = self._text[at + len(marker) :]
        return marker

    def _begin_call(self, marker: str) -> None:
        assert self._tools is not None
        self._mark = marker
        self._reader = reader_of(self._tools, self._schemas, offered_only=self._tools.bare or not marker)
        self._state = ReplyParser._call

    def _tell(self, reader: CallReader) -> None:
        """Tell of calls, or of more of them."""
        assert self._tools is not None
        for news in reader.news():
            self._is_open = not isinstance(news, Ended)
            if isinstance(news, Begun):
                self._num_calls += 1
                self._mark = ""
                self._enter(ReplyParser._call, Content)
            if self._max_calls is not None and self._num_calls > self._max_calls:
                continue
            if isinstance(news, Begun):
                call_id = self._tools.id_prefix + secrets.token_hex(12)[: self._tools.id_length]
                self._pieces.append(ToolCall(call_id, news.name))
            elif isinstance(news, Ended):
                self._has_whole = True
            else:
                self._pieces.append(news)

    def _give_up(self) -> None:
        """What was read and is not told is content, white space included where a call breaks off."""
        assert self._tools is not None and self._reader is not None
        self._at_edge &= not self._is_open
        self._is_open = False
        self._write(self._mark + self._reader.text)
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
