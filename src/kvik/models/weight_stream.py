"""Weights on their way to a GPU: read by several threads at once, and copied while the next are read.

    file ──► staging buffer, page-locked ──► device
         a thread of the pool       a stream of its own; the buffer is free again when the copy is done

One thread reads from the page cache at about a fifth of what the bus to the GPU takes, and a copy from memory that is
not page-locked makes the host wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import torch
from torch import Tensor

from kvik.models.checkpoint import Checkpoint

__all__ = ["WeightStream"]

NUM_THREADS = 8
CHUNK_BYTES = 8 << 20


@dataclass(slots=True)
class _Buffer:
    memory: Tensor  # [chunk_bytes] uint8
    copied: torch.Event | None = None  # when the copy out of it is done


class WeightStream:
    """Copies tensors of safetensors files to `device`, in the background. One thread calls it; to be closed.

    Works on the CPU as well, where buffers are plain memory and copies are done when they return.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, *, num_threads: int = NUM_THREADS,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:  # fmt: skip
        self._checkpoint, self._device, self._chunk_bytes = checkpoint, device, chunk_bytes
        self._stream = None if device.type == "cpu" else torch.Stream(device)
        self._buffers: SimpleQueue[_Buffer] = SimpleQueue()
        for _ in range(2 * num_threads):  # a thread reads into one while another is copied
            memory = torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=self._stream is not None)
            self._buffers.put(_Buffer(memory))
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="kvik-weights")
        self._chunks: list[Future[bool]] = []

    def put(self, name: str, into: Tensor) -> None:
        """Begin to copy a tensor of the checkpoint to `into`, contiguous and on the device, converting its dtype."""
        dtype: torch.dtype = getattr(torch, self._checkpoint.tensors[name].dtype)
        if self._stream is not None:  # the memory may be that of a tensor which the device is not done with
            self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        flat, step = into.view(-1), self._chunk_bytes // dtype.itemsize
        count = math.ceil(len(flat) / step)
        for index in range(count):
            part = flat[index * step : (index + 1) * step]
            start = index * step * dtype.itemsize
            self._chunks.append(self._pool.submit(self._move, name, start, dtype, part, index == count - 1))

    def wait(self, progress: Callable[[], object] = lambda: None) -> None:
        """Return when everything is on the device; `progress` is called for each tensor.

        Raises ModelLoadError, after the first chunk that cannot be read.
        """
        for chunk in self._chunks:
            if chunk.result():
                progress()
        self._chunks.clear()
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """Drop what has not begun, wait for the rest."""
        self._pool.shutdown(cancel_futures=True)
        if self._stream is not None:
            self._stream.synchronize()

    def _move(self, name: str, start: int, dtype: torch.dtype, into: Tensor, last: bool) -> bool:
        buffer = self._buffers.get()
        try:
            if buffer.copied is not None:
                buffer.copied.synchronize()
            values = buffer.memory[: len(into) * dtype.itemsize]
            self._checkpoint.read_part(name, start, values)
            if self._stream is None:
                into.copy_(values.view(dtype))
            else:
                with self._stream:
                    into.copy_(values.view(dtype), non_blocking=True)
                buffer.copied = self._stream.record_event()
        finally:
            self._buffers.put(buffer)
        return last

    def __enter__(self) -> WeightStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
