"""The operators of a decoder on their own: on torch tensors, on the CPU and on NVIDIA GPUs.

    rows          add  argmax  embedding  rms_norm  add_rms_norm  silu_mul  swiglu
    projections   linear  norm_linear  linear_add  norm_linear_swiglu  pack
    attention     rope  rope_angles  qk_norm_rope_store  paged_attention  PagedBatch  self_attention
    sampling      sample

They are what the engine computes with: the Triton kernels on a GPU, the compiled kernels on a CPU, torch where neither
has the operator. Tensors are float32, bfloat16 or float16, all of one call of the same type and on the same device (a
GPU: the current one). An activation that is not contiguous is copied first. Sums are fp32 inside, no operator records
gradients, and a wrong argument is a ConfigError that names it. docs/operators.md has examples.
"""

from __future__ import annotations

from kvik.kernels.api import KVLayer, LinearWeight
from kvik.ops.attention import PagedBatch, paged_attention, qk_norm_rope_store, rope, rope_angles, self_attention
from kvik.ops.projections import linear, linear_add, norm_linear, norm_linear_swiglu, pack
from kvik.ops.rows import add, add_rms_norm, argmax, embedding, rms_norm, silu_mul, swiglu
from kvik.ops.sampling import sample

__all__ = [
    "KVLayer",
    "LinearWeight",
    "PagedBatch",
    "add",
    "add_rms_norm",
    "argmax",
    "embedding",
    "linear",
    "linear_add",
    "norm_linear",
    "norm_linear_swiglu",
    "pack",
    "paged_attention",
    "qk_norm_rope_store",
    "rms_norm",
    "rope",
    "rope_angles",
    "sample",
    "self_attention",
    "silu_mul",
    "swiglu",
]
