"""The engine process's loop: messages in, steps, messages out. Token ids only; one thread owns everything.

Requests of a peer (an HTTP process) that cannot be reached any more are ended, so that nothing runs for nobody.
Grammars of requests are compiled beside the loop, by a thread of their own.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import zmq

from kvik.core.engine import Engine
from kvik.core.request import Request
from kvik.errors import RequestError
from kvik.log import logger
from kvik.outputs import FinishReason, SequenceOutput
from kvik.server import messages as wire
from kvik.server.events import EventFeed
from kvik.structured.grammars import Grammars

__all__ = ["EngineServer"]

STATUS_INTERVAL = 0.5
"""Seconds between two Status messages at most, as long as steps do not take longer."""

COMPILING_INTERVAL = 0.001
"""Seconds between two looks at grammars that are being compiled, while nothing else is to be done."""

EVENTS_INTERVAL = 0.05
SEND_LIMIT = 10_000
"""Messages that may wait for a peer that does not read; then it is given up."""


@dataclass(slots=True)
class _Open:
    """A request in the engine and whose it is."""

    peer: bytes
    num_prompt_tokens: int
    arrival_time: float
    num_left: int


@dataclass(slots=True)
class _Compiling:
    """A request whose grammar is being compiled, and what is to end it, if that has come already."""

    peer: bytes
    request: Request
    compiled: Future[None]
    finish: wire.Finish | None = None


class EngineServer:
    """Serves HTTP processes from one engine until `stop` is called. `grammars` are the engine's, where it has any."""

    def __init__(self, engine: Engine, endpoint: str, ready: wire.Ready, grammars: Grammars | None = None) -> None:
        self._engine = engine
        self._grammars = grammars
        self._compiler = ThreadPoolExecutor(1, "kvik-grammars")
        self._compiling: dict[str, _Compiling] = {}
        self._ready = ready
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDHWM, SEND_LIMIT)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(endpoint)
        self._peers: set[bytes] = set()
        self._lost: set[bytes] = set()  # given up, and not known to be gone
        self._watchers: set[bytes] = set()
        self._open: dict[str, _Open] = {}
        self._feed = EventFeed(engine, self._open_requests)
        self._stopping = False
        self._status_at = self._events_at = 0.0

    def stop(self) -> None:
        """Make `run` return soon. Any thread may call this."""
        self._stopping = True

    def run(self) -> None:
        """Serve. An exception of the engine ends the loop: a failure that no single request caused."""
        while not self._stopping:
            self._receive()
            self._take_compiled()
            if self._engine.has_unfinished():
                self._deliver(self._engine.step())
            self._report()

    def close(self) -> None:
        """Close the socket and the engine."""
        self._socket.close()
        self._context.term()
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self._engine.close()

    # In

    def _receive(self) -> None:
        """Obey every message that is there, and those that come before there is something else to do."""
        if self._engine.has_unfinished():
            while self._socket.poll(int(1000 * self._engine.slack())):
                self._obey_all()
            return
        patience = COMPILING_INTERVAL if self._compiling else STATUS_INTERVAL
        if self._engine.get_ready() or self._socket.poll(int(1000 * patience)):
            self._obey_all()

    def _obey_all(self) -> None:
        while True:
            try:
                peer, data = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._obey(peer, wire.decode_to_engine(data))
            except msgspec.MsgspecError as error:
                logger.error("a message of an HTTP process was dropped: %s", error)

    def _obey(self, peer: bytes, message: wire.ToEngine) -> None:
        if isinstance(message, wire.Add):
            self._add(peer, message)
        elif isinstance(message, wire.Finish):
            waiting = self._compiling.get(message.request_id)
            if waiting is None:
                self._engine.finish(message.request_id, message.reason, message.index)
            elif message.reason is FinishReason.ABORT and message.index is None and waiting.compiled.cancel():
                del self._compiling[message.request_id]  # nobody waits for it, and its turn has not come yet
            else:
                waiting.finish = message
        elif isinstance(message, wire.Watch):
            self._watch(peer, message.on)
        else:
            self._greet(peer)

    def _greet(self, peer: bytes) -> None:
        """Begin anew with a peer. One that had been given up is told by this that its requests have ended."""
        self._lost.discard(peer)
        self._peers.add(peer)
        self._send(peer, self._ready)

    def _add(self, peer: bytes, message: wire.Add) -> None:
        try:
            request = wire.unpack_request(message)
        except RequestError as error:
            self._reject(peer, message.request_id, error)
            return
        wanted = request.params.structured_outputs
        if wanted is None or self._grammars is None:
            self._admit(peer, request)
        else:
            compiled = self._compiler.submit(self._grammars.compile, wanted)
            self._compiling[request.request_id] = _Compiling(peer, request, compiled)

    def _take_compiled(self) -> None:
        """Admit the requests whose grammars are there."""
        for waiting in [waiting for waiting in self._compiling.values() if waiting.compiled.done()]:
            del self._compiling[waiting.request.request_id]
            try:
                waiting.compiled.result()
            except RequestError as error:
                self._reject(waiting.peer, waiting.request.request_id, error)
                continue
            self._admit(waiting.peer, waiting.request)
            if waiting.finish is not None:
                self._obey(waiting.peer, waiting.finish)

    def _admit(self, peer: bytes, request: Request) -> None:
        try:
            self._engine.add(request)
        except RequestError as error:
            self._reject(peer, request.request_id, error)
            return
        num_prompt = len(request.prompt_token_ids)
        self._open[request.request_id] = _Open(peer, num_prompt, request.arrival_time, request.params.n)

    def _reject(self, peer: bytes, request_id: str, error: RequestError) -> None:
        self._send(peer, wire.Rejected(request_id, str(error), error.param, error.code))

    def _watch(self, peer: bytes, on: bool) -> None:
        if on:
            self._tell_watchers()  # for the earlier ones; the snapshot holds what these records say
            self._watchers.add(peer)
            self._feed.switch(True)
            self._send(peer, wire.Events([self._feed.snapshot()], first=True))
        else:
            self._watchers.discard(peer)
            self._feed.switch(bool(self._watchers))

    # Out

    def _deliver(self, outputs: list[SequenceOutput]) -> None:
        """Send each peer what its requests gained."""
        by_peer: dict[bytes, list[SequenceOutput]] = defaultdict(list)
        for output in outputs:
            entry = self._open.get(output.request_id)
            if entry is None:
                continue
            by_peer[entry.peer].append(output)
            if output.finish_reason is not None:
                entry.num_left -= 1
                if not entry.num_left:
                    del self._open[output.request_id]
        for peer, own in by_peer.items():
            self._send(peer, wire.pack_outputs(own))

    def _report(self) -> None:
        """The regular messages: Status, and Events where somebody watches."""
        now = time.monotonic()
        if now - self._status_at >= STATUS_INTERVAL:
            self._status_at = now
            for peer in tuple(self._lost):
                self._greet(peer)
            self._broadcast(self._peers, self._status())
        if self._feed.on and (now - self._events_at >= EVENTS_INTERVAL or not self._engine.has_unfinished()):
            self._events_at = now
            self._tell_watchers()
        elif self._feed.on:
            self._feed.complete()

    def _tell_watchers(self) -> None:
        if self._feed.on and (records := self._feed.take()):
            self._broadcast(self._watchers, wire.Events(records))

    def _status(self) -> wire.Status:
        scheduler, stats = self._engine.scheduler, self._engine.stats
        return wire.Status(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks_used=scheduler.kv.num_used,
            num_blocks=scheduler.kv.num_blocks,
            num_steps=stats.num_steps,
            num_prefill_tokens=stats.num_prefill_tokens,
            num_decode_tokens=stats.num_decode_tokens,
            prefill_time=stats.prefill_time,
            decode_time=stats.decode_time,
            host_time=stats.host_time,
        )

    def _broadcast(self, peers: set[bytes], message: wire.FromEngine) -> None:
        for peer in tuple(peers):
            self._send(peer, message)

    def _send(self, peer: bytes, message: wire.FromEngine) -> None:
        try:
            self._socket.send_multipart([peer, wire.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:  # gone, or so far behind that it must be stuck
            logger.info("an HTTP process cannot be reached (%s)", error)
            self._forget(peer)
            if error.errno == zmq.EAGAIN:
                self._lost.add(peer)

    def _forget(self, peer: bytes) -> None:
        """End the requests of a peer."""
        self._peers.discard(peer)
        self._watchers.discard(peer)
        self._feed.switch(bool(self._watchers))
        for key in [key for key, waiting in self._compiling.items() if waiting.peer == peer]:
            self._compiling.pop(key).compiled.cancel()
        for request_id in [request_id for request_id, entry in self._open.items() if entry.peer == peer]:
            del self._open[request_id]
            self._engine.finish(request_id, FinishReason.ABORT)

    def _open_requests(self) -> Iterator[tuple[str, int, float]]:
        return ((key, entry.num_prompt_tokens, entry.arrival_time) for key, entry in self._open.items())
