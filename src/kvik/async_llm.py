"""`AsyncLLM`: the asyncio face of the engine. One thread steps the engine; coroutines await their own outputs."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from types import TracebackType
from typing import Any

from kvik.config import EngineConfig
from kvik.core.request import Request
from kvik.errors import WorkerError
from kvik.llm_engine import LLMEngine
from kvik.log import logger
from kvik.mailbox import Mailbox
from kvik.outputs import RequestOutput
from kvik.sampling_params import SamplingParams
from kvik.text.frontend import Message, Prompt

__all__ = ["AsyncLLM"]


class _Stream:
    """What one caller waits for. The engine thread puts, the caller's event loop takes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._lock = threading.Lock()
        self._mailbox = Mailbox()
        self._error: BaseException | None = None
        self._ready = asyncio.Event()

    def put(self, output: RequestOutput) -> bool:
        """Whether the caller has to be woken: it has been, where it has not taken the output before."""
        with self._lock:
            return self._mailbox.put(output)

    def fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = error
        _wake(self.loop, [self])

    def wake(self) -> None:
        self._ready.set()

    async def take(self) -> RequestOutput:
        while True:
            with self._lock:
                output, error = self._mailbox.take(), self._error
            if output is not None:
                return output
            if error is not None:
                raise error
            await self._ready.wait()
            self._ready.clear()


def _wake(loop: asyncio.AbstractEventLoop, streams: Sequence[_Stream]) -> None:
    def wake() -> None:
        for stream in streams:
            stream.wake()

    try:
        loop.call_soon_threadsafe(wake)
    except RuntimeError:  # the callers' loop is closed: nobody waits any more
        logger.debug("an output came after its event loop was closed")


class AsyncLLM:
    """Many concurrent requests on one engine.

        async with AsyncLLM("demo") as llm:
            async for output in llm.generate("Once upon a time", SamplingParams(max_tokens=30)):
                print(output.delta, end="")

    Cancelling the task that iterates, or closing the iterator, aborts the request: its KV blocks are free after the
    next step. `options` are the fields of EngineConfig.
    """

    def __init__(self, model: str | EngineConfig, **options: Any) -> None:
        self.llm_engine = LLMEngine(model, **options)
        self._loop = _EngineLoop(self.llm_engine)
        self._thread = threading.Thread(target=self._loop.run, name="kvik-engine", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._loop.commands.put, None)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the request's output whenever it has grown; the last one is `finished`.

        Raises RequestError for a request that could never run, WorkerError if the engine fails or is closed.
        """
        engine, loop = self.llm_engine, self._loop
        options: dict[str, Any] = {"request_id": request_id, "priority": priority, "cache_salt": cache_salt}
        request = await asyncio.to_thread(engine.make_request, prompt, sampling_params, **options)
        stream = _Stream(asyncio.get_running_loop())
        loop.send(lambda: loop.start(request, prompt, stream))
        try:
            while True:
                output = await stream.take()
                yield output
                if output.finished:
                    return
        finally:
            with contextlib.suppress(WorkerError):
                loop.send(lambda: loop.end(request.request_id, stream))

    async def chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None, **template_options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Like `generate`, for a conversation. template_options as in `LLM.chat`."""
        prompt = await asyncio.to_thread(self.llm_engine.render_chat, messages, **template_options)
        async with contextlib.aclosing(self.generate(prompt, sampling_params)) as outputs:
            async for output in outputs:
                yield output

    def abort(self, request_id: str) -> None:
        """End a request. Unknown and finished ids are ignored. May be called from any thread."""
        engine = self.llm_engine
        self._loop.send(lambda: engine.abort(request_id))

    def close(self) -> None:
        """End every request with an error, stop the thread and free the engine. May be called twice."""
        self._loop.commands.put(None)
        self._thread.join()
        self.llm_engine.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)


class _EngineLoop:
    """What the engine's thread does. It knows no AsyncLLM, so that one that is forgotten ends its thread."""

    def __init__(self, llm_engine: LLMEngine) -> None:
        self.llm_engine = llm_engine
        self.streams: dict[str, _Stream] = {}
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ended: BaseException | None = None
        self._lock = threading.Lock()  # guards _ended against a command that comes while the thread ends

    def run(self) -> None:
        error: BaseException = WorkerError("the engine was closed")
        try:
            while self._obey():
                if self.llm_engine.has_unfinished():
                    self._deliver(self.llm_engine.step())
        except BaseException as failure:  # noqa: BLE001  whatever it was, callers must not wait for ever
            logger.exception("the engine failed")
            error = WorkerError(f"the engine failed: {failure!r}; start a new one")
        with self._lock:
            self._ended = error
        while not self.commands.empty():
            command = self.commands.get()
            if command is not None:
                with contextlib.suppress(Exception):
                    command()
        for stream in self.streams.values():
            stream.fail(error)

    def _obey(self) -> bool:
        """Run the commands that came, and those that come before there is something else to do; False to stop."""
        engine = self.llm_engine.engine
        while True:
            if self.commands.empty() and not engine.has_unfinished() and engine.get_ready():
                continue
            try:
                command = self.commands.get(timeout=engine.slack() if engine.has_unfinished() else None)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        sleeping: dict[asyncio.AbstractEventLoop, list[_Stream]] = {}
        for output in outputs:
            stream = self.streams.get(output.request_id)
            if stream is not None:
                if stream.put(output):
                    sleeping.setdefault(stream.loop, []).append(stream)
                if output.finished:
                    del self.streams[output.request_id]
        for loop, streams in sleeping.items():  # at once, as each call from another thread wakes the loop
            _wake(loop, streams)

    def start(self, request: Request, prompt: Prompt, stream: _Stream) -> None:
        try:
            self.llm_engine.submit(request, prompt)
        except Exception as error:  # noqa: BLE001  whatever it is, its caller must not wait for ever
            stream.fail(error)
        else:
            self.streams[request.request_id] = stream

    def end(self, request_id: str, stream: _Stream) -> None:
        """Abort a request whose caller has gone, unless it is finished or the id is by now another caller's."""
        if self.streams.get(request_id) is stream:
            del self.streams[request_id]
            self.llm_engine.abort(request_id)

    def send(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self._ended is not None:
                raise self._ended
            self.commands.put(command)
