"""What the machine has, and what follows from it: one `Platform` per kind of device.

The only module that asks torch or the operating system about hardware.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform as host
from typing import Protocol

import psutil
import torch

from kvik.errors import ConfigError

__all__ = ["CpuPlatform", "Platform", "select_platform"]


class Platform(Protocol):
    """A kind of device: its name and memory, and the defaults that suit it."""

    device: torch.device
    default_block_size: int
    default_num_seqs: int
    default_batched_tokens: int
    default_run_ahead: int

    @property
    def name(self) -> str:
        """The device as a person would call it."""

    def available_memory(self) -> int:
        """Bytes that can be allocated now."""

    def total_memory(self) -> int:
        """Bytes of memory of the device."""

    def dtype_for(self, checkpoint: torch.dtype) -> torch.dtype:
        """The type to compute in, for weights of a checkpoint's type, when the user leaves it to us."""

    def start(self, threads: int | None) -> None:
        """Prepare the process for this device."""


class CpuPlatform:
    """Any processor that torch runs on."""

    device = torch.device("cpu")
    default_block_size = 64
    default_num_seqs = 16
    default_batched_tokens = 2048
    default_run_ahead = 0

    @property
    def name(self) -> str:
        return f"{host.processor() or host.machine()}, {self.num_cores} cores"

    @property
    def num_cores(self) -> int:
        return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1

    def available_memory(self) -> int:
        return int(psutil.virtual_memory().available)

    def total_memory(self) -> int:
        return int(psutil.virtual_memory().total)

    def dtype_for(self, checkpoint: torch.dtype) -> torch.dtype:
        """fp16 becomes bfloat16: processors compute fp16 many times slower."""
        return torch.bfloat16 if checkpoint is torch.float16 else checkpoint

    def start(self, threads: int | None) -> None:
        torch.set_num_threads(threads or min(self.num_cores, _usable_cores()))
        _return_large_blocks()


def select_platform(device: str) -> Platform:
    """The platform of "auto", "cpu" or "cuda[:N]". Raises ConfigError for a device that cannot be had."""
    if device in ("auto", "cpu"):
        return CpuPlatform()
    raise ConfigError(f"device={device!r}: this version runs on the CPU only; use device='cpu' or leave it out")


def _return_large_blocks() -> None:
    """Have glibc give freed blocks of 4 MiB and more back to the system at once.

    Left alone it keeps blocks of up to 32 MiB for later, and loading one layer after the other leaves holes between
    what stays: up to half of the weights again at int8. Elsewhere (musl, macOS, Windows) there is nothing to set.
    """
    m_mmap_threshold = -3
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 4 << 20)


def _usable_cores() -> int:
    """Cores that this process may run on, which is fewer in a container or under taskset."""
    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1
