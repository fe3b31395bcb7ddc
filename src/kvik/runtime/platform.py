"""What the machine has, and what follows from it: one `Platform` per kind of device.

The only module that asks torch or the operating system about hardware.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import platform as host
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import psutil
import torch

from kvik.errors import ConfigError

__all__ = ["CpuPlatform", "CudaPlatform", "Platform", "memory_limits", "select_platform", "usable_cores"]

_OLDEST_GPU = (8, 0)
"""The compute capability from which on GPUs compute in bfloat16, as all kernels do."""


_GROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Of a control group, in version 2 and 1: its limit, what it uses, and what of that are files that can be dropped."""


class Platform(Protocol):
    """A kind of device: its name and memory, and the defaults that suit it."""

    device: torch.device
    default_block_size: int
    default_num_seqs: int
    default_batched_tokens: int
    default_run_ahead: int
    kv_share: float
    """How much of the memory that is left becomes KV cache when the user does not say."""
    reserved_memory: int
    """Bytes that libraries take for themselves beside what is planned."""

    @property
    def name(self) -> str:
        """The device as a person would call it."""

    def available_memory(self) -> int:
        """Bytes that can be allocated now."""

    def release(self) -> None:
        """Leave memory that this process has freed to others."""

    def total_memory(self) -> int:
        """Bytes of memory of the device."""

    def dtype_for(self, checkpoint: torch.dtype) -> torch.dtype:
        """The type to compute in, for weights of a checkpoint's type, when the user leaves it to us."""

    def start(self, threads: int | None) -> None:
        """Prepare the process for this device."""


_started_in: int | None = None  # the process in which a CPU was prepared


def memory_limits(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[tuple[int, int]]:
    """(limit, bytes left of it) of this process's address space (ulimit -v), where there is one, and of each of Linux's
    control groups, such as containers are, that it is in."""
    with contextlib.suppress(ImportError):  # Windows has no such limits
        import resource

        if (space := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
            yield space, max(0, space - psutil.Process().memory_info().vms)
    lines = own.read_text().splitlines() if own.exists() else []
    for _, controller, path in (line.split(":", 2) for line in lines):
        if controller not in _GROUP_FILES:
            continue
        root, (limit, used, spare) = groups / controller, _GROUP_FILES[controller]
        folder = root / path.lstrip("/")  # which is not there in a container that has its own at the root
        for group in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError, KeyError):  # no such file, or a limit that is "max"
                most = int((group / limit).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield most, max(0, most - int((group / used).read_text()) + int(stat[spare]))
            if group == root:
                break


class CpuPlatform:
    """Any processor that torch runs on."""

    device = torch.device("cpu")
    default_block_size = 64
    default_num_seqs = 16
    default_batched_tokens = 2048
    default_run_ahead = 0
    kv_share = 0.5
    reserved_memory = 0

    @property
    def name(self) -> str:
        return f"{host.processor() or host.machine()}, {self.num_cores} cores"

    @property
    def num_cores(self) -> int:
        return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1

    def available_memory(self) -> int:
        return min([psutil.virtual_memory().available, *(left for _, left in memory_limits())])

    def release(self) -> None:
        pass

    def total_memory(self) -> int:
        return min([psutil.virtual_memory().total, *(limit for limit, _ in memory_limits())])

    def dtype_for(self, checkpoint: torch.dtype) -> torch.dtype:
        """fp16 becomes bfloat16: processors compute fp16 many times slower."""
        return torch.bfloat16 if checkpoint is torch.float16 else checkpoint

    def start(self, threads: int | None) -> None:
        global _started_in
        _started_in = _started_in or os.getpid()
        if os.getpid() != _started_in and threads != 1:
            raise ConfigError(
                "this process was forked by one that has loaded a model, and has none of the threads that torch thinks"
                " it has; start it by spawn (multiprocessing.get_context), or use threads=1"
            )
        torch.set_num_threads(threads or min(self.num_cores, usable_cores()))
        _return_large_blocks()


class CudaPlatform:
    """One NVIDIA GPU, Ampere or newer."""

    default_block_size = 64
    default_num_seqs = 256
    default_batched_tokens = 8192
    default_run_ahead = 1
    kv_share = 1.0
    reserved_memory = 768 << 20  # workspaces of the vendor's library, compiled kernels, descriptors of CUDA graphs

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def available_memory(self) -> int:
        self.release()
        return torch.cuda.mem_get_info(self.device)[0]

    def release(self) -> None:
        torch.cuda.empty_cache()

    def total_memory(self) -> int:
        return torch.cuda.mem_get_info(self.device)[1]

    def dtype_for(self, checkpoint: torch.dtype) -> torch.dtype:
        """fp32 becomes bfloat16, at twice the speed with half of the memory; that models are published in either."""
        return torch.bfloat16 if checkpoint is torch.float32 else checkpoint

    def start(self, threads: int | None) -> None:
        torch.set_num_threads(threads or 1)
        torch.cuda.set_device(self.device)


def select_platform(device: str) -> Platform:
    """The platform of "auto", "cpu" or "cuda[:N]"; auto is the first GPU that can run Kvik, else the CPU.

    Raises ConfigError for a device that cannot be had.
    """
    if device == "cpu":
        return CpuPlatform()
    index = int(device.partition(":")[2] or 0)
    obstacle = _cuda_obstacle(index)
    if obstacle is None:
        return CudaPlatform(index)
    if device == "auto":
        return CpuPlatform()
    raise ConfigError(f"device={device!r}: {obstacle}; use device='cpu' or leave it out")


def _cuda_obstacle(index: int) -> str | None:
    """Why the GPU of this number cannot be used."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return "torch finds no NVIDIA GPU" if built else f"torch {torch.__version__} was built without CUDA"
    if index >= (count := torch.cuda.device_count()):
        return f"there are {count} GPUs, cuda:0 to cuda:{count - 1}"
    if (capability := torch.cuda.get_device_capability(index)) < _OLDEST_GPU:
        name = torch.cuda.get_device_name(index)
        return f"{name} has compute capability {capability[0]}.{capability[1]}; Kvik needs 8.0 (Ampere) or newer"
    if importlib.util.find_spec("triton") is None:
        return "the GPU kernels need triton; pip install triton"
    return None


def _return_large_blocks() -> None:
    """Have glibc give freed blocks of 4 MiB and more back to the system at once.

    Left alone it keeps blocks of up to 32 MiB for later, and loading one layer after the other leaves holes between
    what stays: up to half of the weights again at int8. Elsewhere (musl, macOS, Windows) there is nothing to set.
    """
    m_mmap_threshold = -3
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 4 << 20)


def usable_cores() -> int:
    """Cores that this process may run on, which is fewer in a container or under taskset."""
    process = psutil.Process()
    return len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1
