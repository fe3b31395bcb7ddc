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

from kvik.config import SchedulerConfig
from kvik.core.admission import check_request
from kvik.core.request import Request
from kvik.errors import RequestError
from kvik.outputs import FinishReason, SequenceOutput
from kvik.server import messages as wire
from kvik.server.errors import ApiError, overloaded, unavailable
from kvik.text.frontend import Prompt
from kvik.text.output_processor import OpenRequest, OutputProcessor

__all__ = ["EngineClient", "Generation"]

BURST = 8
"""Messages read in a row: as many steps become one event of a stream when this process is behind the engine."""

MAX_PAUSE = 0.02
"""Longest sleep while outputs gather: how late the end of a stream may be noticed."""

MAX_EVENTS = 1000
"""Records kept for a watcher that does not read; the oldest are dropped."""


class Generation:
    """The engine requests of one HTTP request. Close it whatever happens: what is unfinished then is aborted."""

    def __init__(self, client: EngineClient, requests: Sequence[Request]) -> None:
        self._client = client
        self._places = {request.request_id: place for place, request in enumerate(requests)}
        self._unread: dict[int, OpenRequest] = {}
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._deadline: float | None = None
        self._timeout = 0.0
        self._push: Callable[[OpenRequest], bool] | None = None
        self._pushed_at = 0.0
        self._error: ApiError | None = None
        self._num_left = len(requests)
        self.prompt_lengths = tuple(len(request.prompt_token_ids) for request in requests)
        self.unfinished = set(self._places)
        self.timer: asyncio.TimerHandle | None = None

    def push_to(self, push: Callable[[OpenRequest], bool]) -> None:
        """Offer changes of the only request to `push` while `changes` waits for them; it is woken if push says no.

        Most tokens of a stream then need no task switch. The last output of a request always wakes.
        """
        assert len(self._places) == 1
        self._push = push

    def put(self, request: OpenRequest) -> None:
        """Tell that a request changed. What is new stays in it until it is read: unread outputs are one output."""
        waiter, push = self._waiter, self._push
        idle = waiter is not None and not waiter.done()
        if push is not None and idle and not request.finished and push(request):
            self._pushed_at = self._loop.time()
            return
        request_id = request.request.request_id
        self._unread[self._places[request_id]] = request
        if request.finished and request_id in self.unfinished:
            self.unfinished.remove(request_id)
            self._num_left -= 1
        self._wake()

    @property
    def done(self) -> bool:
        """Whether the last output of every request is there."""
        return not self._num_left

    def fail(self, error: ApiError) -> None:
        """End with an error, after what is already there."""
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def changes(self, timeout: float | None = None) -> list[tuple[int, OpenRequest]]:
        """(place, request) of every request that changed since the last call; [] after `timeout` seconds of nothing.

        What was pushed is no longer a change, but was not nothing.
        Raises ApiError where the engine failed or refused the request.
        """
        if not self._unread and self._error is None:
            self._waiter = self._loop.create_future()
            self._timeout = timeout or 0.0
            self._deadline = None if timeout is None else self._loop.time() + timeout
            if self._deadline is not None:
                self._ring_at(self._deadline)
            await self._waiter
        found = sorted(self._unread.items())
        self._unread.clear()
        if not found and self._error is not None:
            raise self._error
        return found

    def _ring_at(self, deadline: float) -> None:
        """End the wait at `deadline`. The alarm of an earlier wait stays set, since most waits are over long before."""
        if self._alarm is None or self._alarm.when() > deadline:
            if self._alarm is not None:
                self._alarm.cancel()
            self._alarm = self._loop.call_at(deadline, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        if self._deadline is None or self._waiter is None or self._waiter.done():
            return
        self._deadline = max(self._deadline, self._pushed_at + self._timeout)
        if self._loop.time() >= self._deadline:
            self._wake()
        else:
            self._ring_at(self._deadline)

    def stop_timers(self) -> None:
        """Nobody waits any more."""
        for timer in (self.timer, self._alarm):
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
        self.on_finished: Callable[[OpenRequest], None] = lambda request: None
        self._limits = (max_queued_requests, max_queued_tokens)
        self._queued: dict[str, tuple[int, int]] = {}
        self._num_queued = [0, 0]
        self._generations: dict[str, Generation] = {}
        self._processor: OutputProcessor | None = None
        self._watchers: dict[asyncio.Queue[str], bool] = {}  # whether its snapshot has come
        self._is_ready = asyncio.Event()
        self._last_sign = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint)
        self._reading: asyncio.Handle | None = None
        self._loop.add_reader(self._socket.fileno(), self._read)
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
        self._processor = processor

    @property
    def num_open(self) -> int:
        """Requests that are not finished."""
        return len(self._generations)

    @property
    def silence(self) -> float:
        """Seconds since the engine's last message."""
        return time.monotonic() - self._last_sign

    # Requests

    def open(
        self,
        requests: Sequence[Request],
        prompts: Sequence[Prompt],
        *,
        stream: bool,
        deadline: float | None = None,
    ) -> Generation:
        """Start requests made of `prompts`, all or none. Raises ApiError (429, 503) or RequestError (both numbers)."""
        if self.failure is not None:
            raise self.failure
        if self._processor is None or self.ready is None:
            raise unavailable("the model is loading; try again soon", "loading")
        for request in requests:
            self._check(request, self.ready.scheduler)
        self._admit(requests)
        generation = Generation(self, requests)
        for request, prompt in zip(requests, prompts, strict=True):
            packed = wire.pack_request(request)
            self._processor.add(request, prompt, stream=stream)
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
        for request_id in generation.unfinished:
            del self._generations[request_id]
            self._dequeue(request_id)
            self._processor.forget(request_id)
            self._send(wire.Finish(request_id, reason))
        generation.unfinished.clear()
        generation.stop_timers()

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
        self._loop.remove_reader(self._socket.fileno())
        if self._reading is not None:
            self._reading.cancel()
        self._context.destroy(linger=0)

    # Events

    def watch(self) -> asyncio.Queue[str]:
        """Begin to listen to the engine's events; the queue gets one JSON record after the other."""
        records: asyncio.Queue[str] = asyncio.Queue(MAX_EVENTS)
        self._watchers[records] = False
        self._send(wire.Watch(True))
        return records

    def unwatch(self, records: asyncio.Queue[str]) -> None:
        """Stop listening."""
        self._watchers.pop(records, None)
        if not self._watchers:
            self._send(wire.Watch(False))

    # Checks

    def _check(self, request: Request, config: SchedulerConfig) -> None:
        """Refuse here, before anything was sent, what the engine would refuse."""
        check_request(request, config)
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

    def _read(self) -> None:
        """Obey what is there. The socket's descriptor tells of a change once: everything must be read."""
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        changed: dict[str, OpenRequest] = {}
        for _ in range(BURST):
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._last_sign = time.monotonic()
            self._obey(wire.decode_from_engine(data), changed)
        else:
            self._read_soon()
        self._pass_on(changed)

    def _read_soon(self) -> None:
        if self._reading is None:
            self._reading = self._loop.call_soon(self._read)

    def _obey(self, message: wire.FromEngine, changed: dict[str, OpenRequest]) -> None:
        if isinstance(message, wire.Outputs):
            self._take(wire.unpack_outputs(message), changed)
        elif isinstance(message, wire.Status):
            self.status = message
        elif isinstance(message, wire.Events):
            for record in message.records:
                self._tell(record, first=message.first)
        elif isinstance(message, wire.Rejected):
            self._reject(message)
        else:
            if self.ready is not None:
                text = "the server fell so far behind the engine that the request was ended; try again"
                self._end_all(unavailable(text, "fell_behind"), FinishReason.ERROR)
            self.ready = message
            self._is_ready.set()

    def _take(self, outputs: list[SequenceOutput], changed: dict[str, OpenRequest]) -> None:
        """Text out of token ids, noting in `changed` whose; stop strings end sequences in the engine."""
        assert self._processor is not None
        queued = self._queued
        if queued:
            for output in outputs:
                if output.request_id in queued:
                    self._dequeue(output.request_id)
        folded = self._processor.fold(outputs)
        for request_id, index in folded.to_finish:
            self._send(wire.Finish(request_id, FinishReason.STOP, index))
        for request in folded.changed:
            changed[request.request.request_id] = request

    def _pass_on(self, changed: dict[str, OpenRequest]) -> None:
        """Tell who waits for the requests that changed: once for several steps if this process is behind."""
        for request_id, request in changed.items():
            generation = self._generations.get(request_id)
            if generation is None:
                continue
            if request.finished:
                del self._generations[request_id]
                self.on_finished(request)
            generation.put(request)

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

    def _tell(self, record: str, *, first: bool) -> None:
        """Hand a record on; whoever has no snapshot yet gets nothing before it, and nobody gets another one's."""
        for records, has_begun in self._watchers.items():
            if has_begun == first:
                continue
            self._watchers[records] = True
            if records.full():
                records.get_nowait()
            records.put_nowait(record)

    def _send(self, message: wire.ToEngine) -> None:
        self._socket.send(wire.encode(message), zmq.NOBLOCK)
        self._read_soon()  # sending may have taken the descriptor's sign that there is something to read
