"""How Triton's kernels run in this process: compiled on a GPU, else by the interpreter, with its repairs.

Triton reads TRITON_INTERPRET when it is imported, so this module has to come first. TRITON_INTERPRET=1 asks for the
interpreter where there is a GPU, too.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import numpy as np
import torch

__all__ = ["HAS_GPU", "HAS_TRITON", "INTERPRETED"]

HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _to_bfloat16(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)


def _from_bfloat16(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _repair_interpreter() -> None:
    """Casts to bfloat16 that round to nearest even, products of bfloat16 numbers, scalars as bounds, half the time.

    The interpreter of Triton 3.6 keeps bfloat16 as uint16, truncates, and multiplies the bit patterns in `tl.dot`. Its
    scalars are arrays of one element, which numpy 2.4 no longer takes for an integer. Whenever a kernel calls another
    function it exchanges the whole language for its own again, in a third of the time; once in a launch is enough.
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

    patch_language, patched = interpreter._patch_lang, set[Any]()

    def patch_language_once(fn: Any) -> Any:
        found = {value for value in fn.__globals__.values() if value is tl or value is tl.core}
        if found <= patched:
            return interpreter._LangPatchScope()
        scope = patch_language(fn)
        patched.update(found)
        undo = scope.restore
        scope.restore = lambda: (patched.clear(), undo())
        return scope

    interpreter._patch_lang = patch_language_once
    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)


if HAS_TRITON and INTERPRETED:
    _repair_interpreter()
