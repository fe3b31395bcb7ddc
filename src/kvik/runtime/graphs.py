"""CUDA graphs that run one at a time and share the memory of what they compute in between."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from kvik.log import logger

__all__ = ["Graph", "GraphPool", "GraphTimer", "Timer"]

Graph = torch.cuda.CUDAGraph

Timer = Callable[[Callable[[int], object], int], float]
"""Microseconds of one call of the function, which gets the number of the input's copy to use, below the second."""


class GraphPool:
    """Captures graphs on a stream of its own, into one memory pool."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._stream: torch.cuda.Stream | None = None
        self.full = False

    def try_capture(self, compute: Callable[[], object]) -> Graph | None:
        """`capture`, or None without memory for it; then the pool is `full`, and nothing is captured any more.

        Memory of tensors is torch's; that of the graph itself is the driver's, whose errors are AcceleratorErrors.
        """
        if self.full:
            return None
        try:
            return self.capture(compute)
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            if "out of memory" not in str(error):
                raise
            logger.warning("no more CUDA graphs are captured, and steps that have none are slower: %s", error)
            self.full = True
            return None

    def capture(self, compute: Callable[[], object]) -> Graph:
        """Record what `compute` launches; nothing is run. Everything that it launches is compiled already.

        `torch.cuda.graph` would also wait for the device and empty torch's caches, for 0.1 s and more each time.
        """
        if self._stream is None:
            self._handle, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        graph, stream = Graph(), self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]  # each thread has its own, and none can be made during a capture
            graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
            try:
                compute()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # of a capture that has failed
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph


class GraphTimer:
    """A `Timer` for GPUs: the fastest of `repeats` replays of a graph of at least `launches` calls."""

    def __init__(self, launches: int = 40, repeats: int = 5) -> None:
        self._launches = launches
        self._repeats = repeats
        self._graphs = GraphPool()
        self._last: Graph | None = None  # a pool ends with the last of its graphs, so one lives until the next is there

    def __call__(self, run: Callable[[int], object], copies: int) -> float:
        launches = max(self._launches, copies)
        run(0)  # compiles
        torch.cuda.synchronize()

        def compute() -> None:
            for i in range(launches):
                run(i % copies)  # results are freed as in an engine, so that their memory is used again

        self._last = graph = self._graphs.capture(compute)
        graph.replay()
        times: list[float] = []
        for _ in range(self._repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / launches)
        return min(times)
