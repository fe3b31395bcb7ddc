"""The engine as an HTTP process sees it: requests go out as messages, outputs come back as text.

`EngineClient` owns the socket, the `OutputProcessor` and the bounds of the queue. A `Generation` is what one HTTP
request waits for: one or several engine requests. Everything runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

import zmq
import zmq.asyncio

from kvik.core.request import Request
from kvik.core.scheduler import Scheduler
from kvik.errors import RequestError
from kvik.mailbox import Mailbox
from kvik.outputs import FinishReason, RequestOutput, SequenceOutput
from kvik.server import messages as wire
from kvik.server.errors import ApiError, overloaded, unavailable
from kvik.text.output_processor import OutputProcessor

__all__ = ["EngineClient", "Generation"]

BURST = 8
"""Messages handled in a row before other coroutines get their turn."""

MAX_PAUSE = 0.02
"""Longest sleep while outputs gather: how late the end of a stream may be noticed."""

MAX_EVENTS = 1000
"""Records kept for a watcher that does not read; the oldest are dropped."""


class Generation:
    """The engine requests of one HTTP request. Close it whatever happens: what is unfinished then is aborted."""

    def __init__(self, client: EngineClient, requests: Sequence[Request]) -> None:
        self._client = client
        self._places = {request.request_id: place for place, request in enumerate(requests)}
        self._mailboxes = [Mailbox() for _ in requests]
        self._changed = asyncio.Event()
        self._error: ApiError | None = None
        self._num_left = len(requests)
        self.unfinished = {request.request_id: request.params.n for request in requests}
        self.timer: asyncio.TimerHandle | None = None

    def put(self, output: RequestOutput) -> None:
        """Add an output; unread ones of the same request are merged with it."""
        self._mailboxes[self._places[output.request_id]].put(output)
        if output.finished and self.unfinished.pop(output.request_id, 0):
            self._num_left -= 1
        self._changed.set()

    @property
    def done(self) -> bool:
        """Whether the last output of every request is there."""
        return not self._num_left

    def fail(self, error: ApiError) -> None:
        """End with an error, after what is already there."""
        self._error = self._error or error
        self._changed.set()

    async def changes(self, timeout: float | None = None) -> list[tuple[int, RequestOutput]]:
        """(place, output) of every request that changed since the last call; [] after `timeout` seconds of nothing.

        Raises ApiError where the engine failed or refused the request.
        """
        loop = asyncio.get_running_loop()
        end = None if timeout is None else loop.time() + timeout
        while True:
            taken = [(place, mailbox.take()) for place, mailbox in enumerate(self._mailboxes)]
            found = [(place, output) for place, output in taken if output is not None]
            if found:
                return found
            if self._error is not None:
                raise self._error
            if end is not None and loop.time() >= end:
                return []
            self._changed.clear()
            timer = None if end is None else loop.call_at(end, self._changed.set)
            await self._changed.wait()
            if timer is not None:
                timer.cancel()

    async def pause(self, seconds: float) -> None:
        """Let outputs gather for `seconds`, or until there is nothing more to wait for."""
        end = asyncio.get_running_loop().time() + seconds
        while not self.done and self._error is None and (left := end - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(min(left, MAX_PAUSE))

    def close(self) -> None:
        """Abort what is unfinished: its blocks are free after the engine's current step."""
        self._client.release(self, FinishReason.ABORT)


class EngineClient:
    """Connects to the engine at `endpoint`. `share` of the queue's bounds belongs to this process."""

    def __init__(self, endpoint: str, *, max_queued_requests: int, max_queued_tokens: int) -> None:
        self.ready: wire.Ready | None = None
        self.status: wire.Status | None = None
        self.failure: ApiError | None = None
        self.on_output: Callable[[RequestOutput], None] = lambda output: None
        self._limits = (max_queued_requests, max_queued_tokens)
        self._queued: dict[str, tuple[int, int]] = {}
        self._num_queued = [0, 0]
        self._generations: dict[str, Generation] = {}
        self._processor: OutputProcessor | None = None
        self._checker: Scheduler | None = None
        self._watchers: set[asyncio.Queue[str]] = set()
        self._is_ready = asyncio.Event()
        self._last_sign = time.monotonic()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint)
        self._reader = asyncio.create_task(self._read())
        self._send(wire.Hello())

    async def wait_ready(self) -> wire.Ready:
        """What the engine is, once it can be used. Raises ApiError where it failed."""
        await self._is_ready.wait()
        if self.failure is not None:
            raise self.failure
        assert self.ready is not None
        return self.ready

    def attach(self, processor: OutputProcessor) -> None:
        """Give the text half of this process; `open` works from now on."""
        assert self.ready is not None
        self._checker = Scheduler(self.ready.scheduler)
        self._processor = processor

    @property
    def num_open(self) -> int:
        """Requests that are not finished."""
        return len(self._generations)

    @property
    def num_queued(self) -> tuple[int, int]:
        """Sequences and prompt tokens that wait for a first token."""
        return self._num_queued[0], self._num_queued[1]

    @property
    def silence(self) -> float:
        """Seconds since the engine's last message."""
        return time.monotonic() - self._last_sign

    # Requests

    def open(
        self,
        requests: Sequence[Request],
        texts: Sequence[str | None],
        *,
        stream: bool,
        deadline: float | None = None,
    ) -> Generation:
        """Start requests, all or none. Raises ApiError (429, 503) or RequestError (both numbers)."""
        if self.failure is not None:
            raise self.failure
        if self._processor is None or self._checker is None:
            raise unavailable("the model is loading; try again soon", "loading")
        for request in requests:
            self._check(request)
        self._admit(requests)
        generation = Generation(self, requests)
        for request, text in zip(requests, texts, strict=True):
            packed = wire.pack_request(request)
            self._processor.add(request, text, stream=stream)
            self._generations[request.request_id] = generation
            self._queued[request.request_id] = size = (request.params.n, len(request.prompt_token_ids))
            self._count(size, 1)
            self._send(packed)
        if deadline is not None:
            generation.timer = asyncio.get_running_loop().call_later(deadline, self._expire, generation)
        return generation

    def release(self, generation: Generation, reason: FinishReason) -> None:
        """Forget a generation and end what is unfinished of it."""
        assert self._processor is not None
        for request_id, n in generation.unfinished.items():
            del self._generations[request_id]
            self._dequeue(request_id)
            self._processor.process(
                SequenceOutput(request_id=request_id, index=index, finish_reason=reason) for index in range(n)
            )
            self._send(wire.Finish(request_id, reason))
        generation.unfinished.clear()
        if generation.timer is not None:
            generation.timer.cancel()

    def fail(self, error: ApiError) -> None:
        """End every generation with `error` and refuse new ones."""
        self.failure = self.failure or error
        self._is_ready.set()
        self._end_all(error, FinishReason.ERROR)

    def shut_down(self) -> None:
        """End every generation because the server ends."""
        self._end_all(unavailable("the server is shutting down", "shutting_down"), FinishReason.SHUTDOWN)

    async def close(self) -> None:
        """Close the socket."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._context.destroy(linger=0)

    # Events

    def watch(self) -> asyncio.Queue[str]:
        """Begin to listen to the engine's events; the queue gets one JSON record after the other."""
        records: asyncio.Queue[str] = asyncio.Queue(MAX_EVENTS)
        self._watchers.add(records)
        self._send(wire.Watch(True))
        return records

    def unwatch(self, records: asyncio.Queue[str]) -> None:
        """Stop listening."""
        self._watchers.discard(records)
        if not self._watchers:
            self._send(wire.Watch(False))

    # Checks

    def _check(self, request: Request) -> None:
        """Refuse here, before anything was sent, what the engine would refuse."""
        assert self._checker is not None
        self._checker.check(request)
        if request.request_id in self._generations:
            raise RequestError(f"request id {request.request_id!r} is in use", "request_id")

    def _admit(self, requests: Sequence[Request]) -> None:
        """Raise a 429 unless the queue has room. A request that finds the queue empty is always let in."""
        sizes = [(request.params.n, len(request.prompt_token_ids)) for request in requests]
        for kind, name in enumerate(("sequences", "prompt tokens")):
            new, waiting, limit = sum(size[kind] for size in sizes), self._num_queued[kind], self._limits[kind]
            if waiting and waiting + new > limit:
                raise overloaded(
                    f"the queue is full: {waiting} {name} wait, {new} more would be above the limit of {limit}"
                )

    def _count(self, size: tuple[int, int], sign: int) -> None:
        for kind, count in enumerate(size):
            self._num_queued[kind] += sign * count

    def _dequeue(self, request_id: str) -> None:
        size = self._queued.pop(request_id, None)
        if size is not None:
            self._count(size, -1)

    # From the engine

    async def _read(self) -> None:
        count = 0
        while True:
            data = await self._socket.recv()
            self._last_sign = time.monotonic()
            self._obey(wire.decode_from_engine(data))
            count += 1
            if count % BURST == 0:
                await asyncio.sleep(0)

    def _obey(self, message: wire.FromEngine) -> None:
        if isinstance(message, wire.Outputs):
            self._take(wire.unpack_outputs(message))
        elif isinstance(message, wire.Status):
            self.status = message
        elif isinstance(message, wire.Events):
            for record in message.records:
                self._tell(record)
        elif isinstance(message, wire.Rejected):
            self._reject(message)
        else:
            self.ready = message
            self._is_ready.set()

    def _take(self, outputs: list[SequenceOutput]) -> None:
        """Text out of token ids, to whom it belongs; stop strings end sequences in the engine."""
        assert self._processor is not None
        for output in outputs:
            if output.request_id in self._queued:
                self._dequeue(output.request_id)
        processed = self._processor.process(outputs)
        for request_id, index in processed.to_finish:
            self._send(wire.Finish(request_id, FinishReason.STOP, index))
        for made in processed.outputs:
            generation = self._generations.get(made.request_id)
            if generation is None:
                continue
            if made.finished:
                del self._generations[made.request_id]
                self.on_output(made)
            generation.put(made)

    def _reject(self, message: wire.Rejected) -> None:
        generation = self._generations.get(message.request_id)
        if generation is not None:
            self.release(generation, FinishReason.ERROR)
            generation.fail(ApiError(400, message.message, code=message.code, param=message.param))

    def _expire(self, generation: Generation) -> None:
        """End what a generation has not finished by its deadline; the engine's terminal outputs say so."""
        for request_id in generation.unfinished:
            self._send(wire.Finish(request_id, FinishReason.TIMEOUT))

    def _end_all(self, error: ApiError, reason: FinishReason) -> None:
        for generation in set(self._generations.values()):
            self.release(generation, reason)
            generation.fail(error)
        for records in self._watchers:
            with contextlib.suppress(asyncio.QueueFull):
                records.put_nowait("")

    def _tell(self, record: str) -> None:
        for records in self._watchers:
            if records.full():
                records.get_nowait()
            records.put_nowait(record)

    def _send(self, message: wire.ToEngine) -> None:
        self._socket.send(wire.encode(message))
