"""Barriers of kernels in Gluon, which no two versions of Triton call alike."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

__all__ = ["barriers", "meet"]

meet = getattr(gl, "barrier", None) or gl.thread_barrier
"""Wait for all threads that run the same part of a program: `barrier` since Triton 3.7."""


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr) -> gl.tensor:
    """COUNT barriers in shared memory, each of which opens after ARRIVALS arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(COUNT):
        mbarrier.init(made.index(index), count=ARRIVALS)
    return made
