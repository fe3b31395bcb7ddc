"""Server-sent events, and waiting for a result while the client is there.

A client that reads slowly holds back `send`; meanwhile its unread text becomes one event (`Generation.put`), so memory
is bounded by the text itself. A client that takes nothing for too long, or goes away, ends its requests at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from kvik.errors import KvikError
from kvik.log import logger
from kvik.server.errors import ApiError, to_api_error

__all__ = ["DONE", "PING", "WRITER", "EventStream", "Writer", "event", "json_text", "while_connected"]

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
PING_INTERVAL = 15.0
"""Seconds of silence after which a comment keeps proxies from closing the connection."""

WRITER = "kvik.writer"
"""The ASGI extension that a `Writer` is, where the HTTP protocol has one."""

_json = msgspec.json.Encoder()


class Writer(Protocol):
    """Writes parts of a response's body while `ready`, without a coroutine."""

    @property
    def ready(self) -> bool: ...

    def write(self, data: bytes) -> None: ...


def json_text(text: str) -> bytes:
    """A text as JSON."""
    return _json.encode(text)


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """One event with a JSON object."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + _json.encode(data) + b"\n\n"


class EventStream(Response):
    """Sends what `events` yields. An error of Kvik's own tree becomes a last event; then the stream ends.

    `close` is called when the stream is over, whatever the reason.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[], None],
        *,
        patience: float,
        on_error: Callable[[ApiError], bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._patience = patience
        self._sending_since: float | None = None
        self._on_error = on_error or (lambda error: event(error.body))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(self._run(send), receive, self._lose_patience())
        except ClientDisconnect:
            logger.info("a client left its stream")
        finally:
            self._close()

    async def _run(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for data in self._events:
                await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})
        except KvikError as error:
            data = self._on_error(to_api_error(error))
            await self._send(send, {"type": "http.response.body", "body": data, "more_body": True})
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: Message) -> None:
        self._sending_since = time.monotonic()
        await send(message)
        self._sending_since = None

    async def _lose_patience(self) -> None:
        """Return when the client has read nothing for too long."""
        while self._sending_since is None or time.monotonic() - self._sending_since < self._patience:
            await asyncio.sleep(self._patience / 4)
        logger.warning("a client read nothing for %s s; its stream is ended", self._patience)


async def while_connected(work: Awaitable[T], receive: Receive, *ends: Coroutine[Any, Any, None]) -> T:
    """The result of `work`. Raises ClientDisconnect, with `work` cancelled, when the client goes away first.

    The same happens when one of `ends` returns first.
    """
    task = asyncio.ensure_future(work)
    watchers = [asyncio.ensure_future(end) for end in (_disconnect(receive), *ends)]
    try:
        await asyncio.wait((task, *watchers), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for pending in (task, *watchers):
            pending.cancel()
        with contextlib.suppress(asyncio.CancelledError, KvikError, ClientDisconnect):
            await task


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
