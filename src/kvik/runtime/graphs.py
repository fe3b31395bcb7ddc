"""CUDA graphs that run one at a time and share the memory of what they compute in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Graph", "GraphPool"]

Graph = torch.cuda.CUDAGraph


class GraphPool:
    """Captures graphs on a stream of its own, into one memory pool."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._stream: torch.cuda.Stream | None = None

    def capture(self, compute: Callable[[], object]) -> Graph:
        """Record what `compute` launches; nothing is run. Everything that it launches is compiled already.

        `torch.cuda.graph` would also wait for the device and empty torch's caches, for 0.1 s and more each time.
        """
        if self._stream is None:
            self._handle, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        graph, stream = Graph(), self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
            try:
                compute()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph
