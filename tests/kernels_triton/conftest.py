"""Triton kernels without a GPU: the interpreter, which has to be chosen before triton is imported, and its repairs.

On a machine with a GPU the same tests run on it (`-m gpu`); TRITON_INTERPRET=1 asks for the interpreter there too.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import numpy as np
import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_report_header() -> str:
    mode = "interpreted" if INTERPRETED else "on the GPU" if HAS_GPU else "compiled only"
    return f"triton kernels: {mode}" if HAS_TRITON else "triton kernels: skipped, triton is not installed"


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a kernel test runs: through the interpreter on CPU tensors, and compiled on a GPU."""
    if request.param == "cuda" and (not HAS_GPU or INTERPRETED):
        pytest.skip("needs an NVIDIA GPU, and TRITON_INTERPRET not set")
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("Triton compiles for the GPU in this process; TRITON_INTERPRET=1 interprets instead")
    return torch.device(request.param)


def _to_bfloat16(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)


def _from_bfloat16(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _repair_interpreter() -> None:
    """Casts to bfloat16 that round to nearest even, products of bfloat16 numbers, and scalars as bounds of a range.

    The interpreter of Triton 3.6 keeps bfloat16 as uint16, truncates, and multiplies the bit patterns in `tl.dot`. Its
    scalars are arrays of one element, which numpy 2.4 no longer takes for an integer.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return _to_bfloat16(data)
        if (source, target) == (tl.bfloat16, tl.float32):
            return _from_bfloat16(data)
        return convert(data, source, target, rounding)

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_from_bfloat16(handle.data), tl.float32)
        return interpreter.TensorHandle(handle.data.astype(np.float32), tl.float32)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)


if HAS_TRITON and INTERPRETED:
    _repair_interpreter()
