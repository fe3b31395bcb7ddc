"""A server that pretends to be OpenAI's: streams without a model, as fast as asked, and failures on request.

    python tests/cli/fake_openai.py --port 8001 --interval 0.01

Every `interval` seconds each open stream gets one event with one token, so N clients get N / interval tokens a second:
what is left is the cost of whoever reads them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httptools
import uvloop

__all__ = ["Behaviour", "fake_openai"]


@dataclass
class Behaviour:
    """What the server does. `faults` are used up by the first completions after the first `spare`, one each."""

    interval: float = 0.001
    api_key: str = ""
    models: tuple[str, ...] = ("fake",)
    knows_ignore_eos: bool = True
    sends_usage: bool = True
    faults: list[str] = field(default_factory=list)
    spare: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of completions, in the order in which they came."""


@dataclass(eq=False)
class _Stream:
    transport: Any
    chat: bool
    left: int
    total: int
    prompt_tokens: int
    fault: str


class _Connection(asyncio.Protocol):
    def __init__(self, behaviour: Behaviour, streams: set[_Stream]) -> None:
        self._behaviour, self._streams = behaviour, streams
        self._parser = httptools.HttpRequestParser(self)
        self._body, self._path, self._key = b"", "", ""

    def connection_made(self, transport: Any) -> None:  # uvloop's is no subclass of asyncio.Transport
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        for stream in [stream for stream in self._streams if stream.transport is self._transport]:
            self._streams.discard(stream)

    def on_url(self, url: bytes) -> None:
        self._path, self._body, self._key = url.decode(), b"", ""

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"authorization":
            self._key = value.decode().removeprefix("Bearer ")

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        behaviour = self._behaviour
        if behaviour.api_key and self._key != behaviour.api_key:
            self._reply(401, {"error": {"message": "wrong key"}})
        elif self._path == "/v1/models":
            listing = {"data": [{"id": name} for name in behaviour.models]}
            self._reply(200 if behaviour.models else 404, listing)
        elif self._path in ("/v1/completions", "/v1/chat/completions"):
            self._complete(json.loads(self._body), self._path != "/v1/completions")
        else:
            self._reply(404, {"detail": "not found"})

    def _complete(self, body: dict[str, Any], chat: bool) -> None:
        behaviour = self._behaviour
        behaviour.bodies.append(body)
        fault = behaviour.faults.pop(0) if behaviour.faults and len(behaviour.bodies) > behaviour.spare else ""
        if "ignore_eos" in body and not behaviour.knows_ignore_eos:
            self._reply(400, {"error": {"message": "ignore_eos is unknown"}})
        elif fault.isdecimal():
            self._reply(int(fault), {"error": {"message": f"fault {fault}"}})
        elif fault == "plain":
            self._reply(200, {"choices": [{"text": "all at once"}]})
        elif fault == "garbage":
            self._transport.write(b"this is not HTTP\r\n\r\n")
        else:
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            )
            prompt = body["messages"][0]["content"].split() if chat else body["prompt"]
            tokens = body["max_tokens"]
            self._streams.add(_Stream(self._transport, chat, tokens, tokens, len(prompt), fault))
            if chat:
                self._transport.write(_event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        self._transport.write(head.encode() + data)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(body: dict[str, Any]) -> bytes:
    return _chunk(b"data: " + json.dumps({"id": "cmpl-0123456789abcdef", "model": "fake", **body}).encode() + b"\n\n")


_TOKEN = {
    True: _event({"choices": [{"index": 0, "delta": {"content": " word"}, "finish_reason": None}], "usage": None}),
    False: _event({"choices": [{"index": 0, "text": " word", "finish_reason": None}], "usage": None}),
}


def _advance(stream: _Stream, behaviour: Behaviour) -> bool:
    """Send the next event; whether the stream is over."""
    write = stream.transport.write
    half = stream.left <= stream.total // 2
    if stream.fault == "no text":
        stream.left = 0
    if half and stream.fault == "close":
        stream.transport.close()
    elif half and stream.fault == "silence":
        pass
    elif half and stream.fault == "error":
        write(_event({"error": {"message": "the engine is gone"}}) + b"0\r\n\r\n")
    elif half and stream.fault == "bad json":
        write(_chunk(b"data: {oops\n\n"))
    elif half and stream.fault == "no end":
        write(b"0\r\n\r\n")
    elif stream.left:
        stream.left -= 1
        write(_TOKEN[stream.chat])
        return False
    else:
        usage = {"prompt_tokens": stream.prompt_tokens, "completion_tokens": stream.total}
        write(_event({"choices": [], "usage": usage}) if behaviour.sends_usage else b"")
        write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    return True


async def _serve(behaviour: Behaviour, port: int, ready: Any) -> None:
    streams: set[_Stream] = set()
    server = await asyncio.get_running_loop().create_server(
        lambda: _Connection(behaviour, streams), "127.0.0.1", port, backlog=1024
    )
    ready(server.sockets[0].getsockname()[1])
    try:
        while True:
            await asyncio.sleep(behaviour.interval)
            for stream in [stream for stream in streams if _advance(stream, behaviour)]:
                streams.discard(stream)
    finally:
        server.close()


@contextlib.contextmanager
def fake_openai(behaviour: Behaviour) -> Iterator[str]:
    """The URL of a server in a thread of its own."""
    loop, ports, started = uvloop.new_event_loop(), list[int](), threading.Event()
    task = loop.create_task(_serve(behaviour, 0, lambda port: (ports.append(port), started.set())))

    def work() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
        loop.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--interval", type=float, default=0.01)
    args = parser.parse_args()
    uvloop.run(_serve(Behaviour(interval=args.interval), args.port, lambda port: print(f"port {port}", flush=True)))


if __name__ == "__main__":
    main()
