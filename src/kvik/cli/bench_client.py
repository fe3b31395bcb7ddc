"""A client of OpenAI's API that is cheap enough to load a fast server from one core.

httptools reads HTTP and msgspec reads the few fields that are counted, both in C, in an asyncio protocol on uvloop: no
coroutine wakes between the first and the last event of an answer. All three come with `kvik[server]`. General clients
pass each event through layers of awaits, which costs two times (aiohttp) to five times (httpx) as much;
docs/serving.md has the numbers.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

from kvik.errors import ConfigError

__all__ = ["Answer", "Client"]

_MAX_MESSAGE = 300


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    @property
    def has_text(self) -> bool:
        delta = self.delta
        return bool(self.text or (delta and (delta.content or delta.reasoning_content or delta.reasoning)))


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode


@dataclass(slots=True)
class Answer:
    """What came back for one request. Times are seconds of `time.perf_counter`."""

    start: float = 0.0
    end: float = 0.0
    times: list[float] = field(default_factory=list)
    """When each event with text arrived."""
    status: int = 0
    streamed: bool = False
    body: bytearray = field(default_factory=bytearray)
    """The body, if it is not a stream of events."""
    usage: tuple[int, int] | None = None
    """Prompt and output tokens as the server counted them."""
    error: str = ""
    """The kind of failure; empty for success."""
    message: str = ""

    def fail(self, error: str, message: str) -> None:
        """Note a failure; the first one stays."""
        if not self.error:
            self.error, self.message = error, message[:_MAX_MESSAGE]


class _Connection(asyncio.Protocol):
    """One HTTP/1.1 connection with one exchange at a time."""

    def __init__(self) -> None:
        self.reusable = True
        self._transport: Any = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer = Answer()
        self._over: asyncio.Future[None] | None = None
        self._now = 0.0
        self._rest = b""
        self._streams = self._done = self._complete = False

    async def exchange(self, request: bytes, answer: Answer) -> None:
        """Send a request and fill `answer`; a failure is noted there."""
        self._answer, self._rest = answer, b""
        self._streams = self._done = self._complete = False
        self._over = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._over
        finally:
            if not (self._complete and self.reusable):
                self.close()

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: Any) -> None:  # uvloop's is no subclass of asyncio.Transport
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, msgspec.DecodeError, UnicodeDecodeError) as error:
            cause = error.__context__ or error
            self._end("malformed answer", f"{type(cause).__name__}: {cause}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self._over is not None and not self._over.done():
            self._now = time.perf_counter()
            if self._done or (self._answer.status and not self._streams):
                self._finish()  # a body without a length ends with its connection
            else:
                events = len(self._answer.times)
                self._end("broken stream", f"the connection was closed after {events} events with text ({exc})")

    # What httptools calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._streams = value.lower().startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        self._answer.status, self._answer.streamed = self._parser.get_status_code(), self._streams

    def on_body(self, body: bytes) -> None:
        if not self._streams:
            self._answer.body += body
            return
        lines = (self._rest + body).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._read_event(line[5:].strip())

    def on_message_complete(self) -> None:
        self._complete = True
        self.reusable = self.reusable and self._parser.should_keep_alive()
        self._finish()

    def _read_event(self, data: bytes) -> None:
        answer = self._answer
        if data == b"[DONE]":
            self._done = True
            return
        event = _decode_event(data)
        for choice in event.choices or ():
            if choice.has_text:
                answer.times.append(self._now)
                break
        if event.usage is not None:
            answer.usage = (event.usage.prompt_tokens, event.usage.completion_tokens)
        if event.error is not None:
            answer.fail("error in the stream", _error_text(event.error))

    def _finish(self) -> None:
        if self._streams and not self._done:
            events = len(self._answer.times)
            self._end("broken stream", f"the stream ended without [DONE] after {events} events with text")
        else:
            self._end()

    def _end(self, error: str = "", message: str = "") -> None:
        if error:
            self._answer.fail(error, message)
        self._answer.end = self._now
        if self._over is not None and not self._over.done():
            self._over.set_result(None)


class Client:
    """Connections to one server, kept open and used again."""

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        """Raises ConfigError for a URL that is not one of a server, or a key that no header can carry."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is not the URL of a server; give one such as http://127.0.0.1:8000")
        try:
            self._port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise ConfigError(f"the port in {url!r} is wrong: {error}") from error
        self._host = parts.hostname
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._timeout = timeout
        key = (api_key or "").strip()
        if not key.isprintable():
            raise ConfigError("the API key has a line break or another control character in it")
        authorization = f"authorization: Bearer {key}\r\n" if key else ""
        self._head = f"host: {parts.netloc.rpartition('@')[2]}\r\nuser-agent: kvik-bench\r\n{authorization}"
        self._idle: list[_Connection] = []

    async def get(self, path: str) -> Answer:
        """The answer of GET."""
        return await self._send(f"GET {self._root}{path} HTTP/1.1\r\n{self._head}\r\n".encode())

    async def stream(self, path: str, body: bytes) -> Answer:
        """The answer of POST with a JSON body; one that is no stream of events has failed."""
        head = f"POST {self._root}{path} HTTP/1.1\r\n{self._head}content-type: application/json\r\n"
        answer = await self._send(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        if answer.error:
            return answer
        if answer.status != 200:
            answer.fail(f"HTTP {answer.status}", _body_text(answer.body))
        elif not answer.streamed:
            answer.fail("no stream", f"the answer is no stream of events: {_body_text(answer.body)}")
        return answer

    def close(self) -> None:
        """Close the connections."""
        for connection in self._idle:
            connection.close()

    async def _send(self, request: bytes) -> Answer:
        answer = Answer(start=time.perf_counter())
        try:
            await asyncio.wait_for(self._exchange(request, answer), self._timeout)
        except asyncio.TimeoutError:
            answer.fail("timeout", f"no complete answer within {self._timeout:g} s")
            answer.end = time.perf_counter()
        except OSError as error:
            answer.fail("no connection", f"{self._host}:{self._port}: {error}")
            answer.end = time.perf_counter()
        return answer

    async def _exchange(self, request: bytes, answer: Answer) -> None:
        connection = await self._connection()
        await connection.exchange(request, answer)
        if connection.reusable:
            self._idle.append(connection)

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._ssl)
        return connection


def _body_text(body: bytearray) -> str:
    """The message of an error body, or as much as there is of any other."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body[:_MAX_MESSAGE].decode(errors="replace").strip()
    return _error_text(found.get("error", found) if isinstance(found, dict) else found)


def _error_text(error: Any) -> str:
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])
    return str(error)
