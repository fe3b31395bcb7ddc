"""Programmatic dependent launch (Hopper and newer): a kernel starts while its predecessor still runs.

Three rules keep it right. Every kernel launched this way calls `wait_for_inputs` once, before it reads anything that
another kernel of the step wrote and before it writes anything; otherwise its successor, which waits for it, could
overtake *its* predecessor. The call stands outside every software-pipelined loop (triton-lang/triton#11905). Before
it, only weights are read. With PDL false both functions are nothing, which is what older GPUs and the interpreter need.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["prefetch_l2", "start_dependents", "wait_for_inputs"]


@triton.jit
def start_dependents(PDL: tl.constexpr) -> None:
    """Let the next kernel start as soon as every program of this one has come here: only its weights are read early."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr) -> None:
    """Return once all earlier kernels are complete and what they wrote is visible."""
    if PDL:
        gdc_wait()


@triton.jit
def prefetch_l2(pointers: tl.tensor) -> None:
    """Ask for the cache lines of `pointers`, all of them valid addresses, without waiting for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )
