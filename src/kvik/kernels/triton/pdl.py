"""Programmatic dependent launch (Hopper and newer): a kernel starts while its predecessor still runs.

Three rules keep it right. Every kernel launched this way calls `wait_for_inputs` once, before it reads anything that
another kernel of the step wrote and before it writes anything; otherwise its successor, which waits for it, could
overtake *its* predecessor. The call stands outside every software-pipelined loop (triton-lang/triton#11905). Before
it, a kernel reads weights, and what is complete before a kernel of the step that is launched without overlap: the work
list of attention, which the gather of RoPE's angles separates from the layers. With PDL false both functions are
nothing, which is what older GPUs and the interpreter need.
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
def prefetch_l2(pointers: tl.tensor, num_bytes: tl.tensor) -> None:
    """Ask for `num_bytes` (int32, 0 for nothing) from each of `pointers` on to come to L2, without waiting for them.

    Pointers are aligned to 16 bytes and sizes a multiple of it. The copy engine of Hopper fetches them.
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred wanted;
        setp.ne.b32 wanted, $2, 0;
        @wanted cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.b32 $0, 0;
        }""",
        "=r,l,r",
        [pointers, num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
