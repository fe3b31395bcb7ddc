"""uvicorn's HTTP protocol with an end to its patience, and with a short way for streams.

Heads of requests are bounded in size and in time: else a client could send headers for ever, or hold a connection by
sending nothing. A stream may write its events straight to the connection, past the layers of ASGI: those take longer
than everything else that happens to a token here.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from kvik.server.streaming import WRITER

__all__ = ["HEAD_TIMEOUT", "MAX_HEAD_BYTES", "BodyWriter", "BoundedProtocol"]

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT = 30.0
MAX_PIPELINED = 16
"""Requests that are read before the answers to earlier ones are out; reading on is how an end is noticed."""

_UPGRADE = re.compile(rb"\r\nupgrade(?=:[ \t]*h2c[ \t]*\r\n)", re.IGNORECASE)
"""An offer to go on in HTTP/2, which Java's client makes; the parser would take the body for something else's."""


class BodyWriter:
    """Writes parts of a response body that has begun."""

    __slots__ = ("_cycle", "_flow", "_write")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._write = cycle.transport.write

    @property
    def ready(self) -> bool:
        """Whether `write` may be called: the head is out, and the client reads."""
        cycle = self._cycle
        return bool(cycle.chunked_encoding) and not (
            self._flow.write_paused or cycle.disconnected or cycle.response_complete
        )

    def write(self, data: bytes) -> None:
        """Send a part that is not empty."""
        self._write(b"%x\r\n%b\r\n" % (len(data), data))


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._in_head = True
        self._head_timer: asyncio.TimerHandle | None = None
        self._cycles: deque[RequestResponseCycle] = deque()  # not answered yet; the first one is under way

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)
        for cycle in self._cycles:  # uvicorn tells the newest one alone
            cycle.disconnected = True
            cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            self._start_timer()  # for an empty line, too, with which no message begins
            if b"h2c" in data:
                head, end, rest = data.partition(b"\r\n\r\n")
                data = _UPGRADE.sub(b"\r\nx-upgrade", head + end) + rest
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The head of the request is larger than {MAX_HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._start_timer()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._stop_timer()
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:
            self.scope["extensions"] = {WRITER: BodyWriter(self.cycle)}  # type: ignore[dict-item]
            self._cycles.append(self.cycle)
            if 0 < len(self.pipeline) < MAX_PIPELINED:
                self.flow.resume_reading()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True
        self._stop_timer()

    def on_response_complete(self) -> None:
        """The response is out; a client that still sends the body that nobody reads has as long as for a head."""
        self._cycles.popleft()
        if not self.pipeline and self.cycle is not None and self.cycle.more_body:
            self._start_timer()
        super().on_response_complete()

    def _start_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT, self._give_up)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if self._cycles:  # what is under way goes on, whatever has begun behind it
            self._start_timer()
        elif not self.transport.is_closing():
            self.transport.close()
