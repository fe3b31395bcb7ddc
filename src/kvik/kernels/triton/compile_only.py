"""Launching as compiling: kernels of a GPU compiled into Triton's cache by a process that never touches it.

Launchers run as they are, on tensors of torch's meta device, which have shapes and no memory. A driver that stands in
for Triton's own says which GPU to compile for, and forgets each kernel instead of loading it.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "StandInDriver",
    "compile_only",
    "compile_shared",
    "compute_capability",
    "has_nvidia_driver",
    "keep_out_dynamo",
]

_SHARED_MEMORY = 227 * 1024  # bytes that one program may have on Hopper, the most of all GPUs


class StandInDriver:
    """As much of a driver as Triton asks for between a launch and a loaded kernel.

    `on_binary` gets each kernel's machine code. With `build_launchers` the C functions that call the kernels are built
    too, by Triton and the C compiler, which needs `has_nvidia_driver`.
    """

    def __init__(
        self,
        capability: tuple[int, int],
        *,
        build_launchers: bool = False,
        on_binary: Callable[[bytes], None] = lambda binary: None,
    ) -> None:
        self.utils = self
        self._capability, self.build_launchers, self._on_binary = capability, build_launchers, on_binary

    def get_current_device(self) -> int:
        return -1  # none for which this process, if it was forked, has kernels that it could launch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * self._capability[0] + self._capability[1], 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED_MEMORY}

    def build_utilities(self) -> None:
        """Have what the real driver is made of built, too."""
        from triton.backends.nvidia.driver import CudaUtils

        CudaUtils()

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        from triton.backends.nvidia import driver

        if self.build_launchers and hasattr(driver, "make_launcher"):  # since Triton 3.7 one function calls all kernels
            driver.CudaLauncher(source, metadata)
        return lambda *args: None

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self._on_binary(binary)
        return 1, 1, 0, 0, 1024


def keep_out_dynamo() -> None:
    """Keep torch's compiler out of this process, for good.

    The first operators on the meta device import it, which takes two seconds, to have themselves left alone by it.
    """
    stand_in = types.ModuleType("torch._dynamo")
    stand_in.disable = lambda function, *_, **__: function  # type: ignore[attr-defined]
    torch._dynamo = sys.modules["torch._dynamo"] = stand_in


def compile_only(driver: StandInDriver, wanted: Callable[[str], bool] = lambda kernel: True) -> None:
    """From now on a launch in this process compiles its kernel, unless it is in Triton's cache or `wanted` refuses it.

    `wanted` is asked once for each kernel, by a text that says all that it is specialised for.
    """
    from triton import knobs
    from triton.runtime.driver import driver as active

    refused: set[str] = set()

    def skip(*, key: str, fn: Any, **_: object) -> bool:
        # Triton's hash of a function depends on which others were hashed before it (it asks a callee for its globals
        # before it hashes it), so this process hashes what it refuses, too: in the order of all others.
        _ = fn.jit_function.cache_key
        kernel = f"{fn.module}.{fn.name} {key}"
        if kernel not in refused and wanted(kernel):
            return False
        refused.add(kernel)
        return True

    active.set_active(driver)
    knobs.runtime.jit_cache_hook = skip


def compile_shared(capability: tuple[int, int], claims: Path) -> None:
    """From now on a launch compiles its kernel unless another process has claimed it, by a file in the folder `claims`.

    All processes must launch the same kernels in the same order.
    """

    def claim(kernel: str) -> bool:
        name = hashlib.sha256(kernel.encode()).hexdigest()
        try:
            os.close(os.open(claims / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    driver = StandInDriver(capability, build_launchers=has_nvidia_driver())
    if driver.build_launchers and claim("utilities"):
        driver.build_utilities()
    compile_only(driver, claim)


def has_nvidia_driver() -> bool:
    """Whether the library is there that launchers are linked with."""
    from triton.backends.nvidia.driver import libcuda_dirs

    try:
        libcuda_dirs()
    except (AssertionError, OSError, subprocess.SubprocessError):
        return False
    return True


def compute_capability(device: torch.device) -> tuple[int, int]:
    """(9, 0) for Hopper, and so on: what kernels are compiled for."""
    return torch.cuda.get_device_capability(device)
