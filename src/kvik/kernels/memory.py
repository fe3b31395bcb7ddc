"""Large memory that is read from end to end in every step: on huge pages, which spares the processor page walks."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

__all__ = ["allocate_bytes", "zeros"]

_HUGE_PAGE = 2 << 20


def allocate_bytes(size: int) -> Tensor:
    """uint8 zeros on the CPU. Where they are large, they take memory only once they are written, and on huge pages
    where the system has them."""
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros`, on the CPU from `allocate_bytes`."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return allocate_bytes(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
