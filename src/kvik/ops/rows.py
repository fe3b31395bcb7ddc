"""Operators on rows: sums, norms, lookups, activations. What is said of rounding holds for 16-bit types."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvik.errors import ConfigError
from kvik.ops.checks import check_alike, check_below, check_floating, check_integers, check_matrix, check_shape
from kvik.ops.devices import operators

__all__ = ["add", "add_rms_norm", "argmax", "embedding", "rms_norm", "silu_mul", "swiglu"]


@torch.no_grad()
def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b, elementwise, of two tensors of one shape; rounded once. It is `torch.add` on every device."""
    check_floating("add", "a", a, min_dims=0)
    check_alike("add", "b", b, "a", a)
    check_shape("add", "b", b, a.shape, "like a")
    return a + b


@torch.no_grad()
def argmax(x: Tensor) -> Tensor:
    """The index of the largest element of each row, the lowest among equals: [..., features] -> [...] int64.

    A row that holds a NaN gives any index. On a GPU it is `torch.argmax`.
    """
    check_floating("argmax", "x", x)
    if x.shape[-1] == 0:
        raise ConfigError(f"argmax: x has no features, its shape is {list(x.shape)}; an empty row has no maximum")
    return operators(x.device).argmax(x.reshape(-1, x.shape[-1]).contiguous()).view(x.shape[:-1])


@torch.no_grad()
def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight` [vocab_size, size] at `ids` [...], int64 or int32 -> [..., size]. Copies, so nothing is rounded.

    An id outside of [0, vocab_size) is a ConfigError on the CPU. On a GPU it is not noticed, and reads anything.
    """
    check_floating("embedding", "weight", weight)
    check_matrix("embedding", "weight", weight, "[vocab_size, size]")
    check_integers("embedding", "ids", ids, weight)
    try:
        found = operators(weight.device).embedding(ids.reshape(-1).contiguous(), weight.contiguous())
    except IndexError:  # torch has noticed, which costs less than to look before each call
        check_below("embedding", "ids", ids, len(weight), f"weight has {len(weight)} rows")
        raise
    return found.view(*ids.shape, weight.shape[1])


@torch.no_grad()
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (https://arxiv.org/abs/1910.07467).

    x [..., size], weight [size] -> the shape of x. Inside fp32; on a GPU rounded before and after the product with
    `weight`, as transformers does, on a CPU once.
    """
    _check_norm("rms_norm", x, weight)
    return operators(x.device).rms_norm(x.contiguous(), weight.contiguous(), eps)


@torch.no_grad()
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual, weight, eps), x + residual): x and residual [..., size], weight [size].

    The sum is rounded before it is normalised; then as `rms_norm`. On a GPU one pass over memory.
    """
    _check_norm("add_rms_norm", x, weight)
    check_alike("add_rms_norm", "residual", residual, "x", x)
    check_shape("add_rms_norm", "residual", residual, x.shape, "like x")
    return operators(x.device).add_rms_norm(x.contiguous(), residual.contiguous(), weight.contiguous(), eps)


@torch.no_grad()
def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [..., 2 * size], gate first -> [..., size], silu(x) = x / (1 + exp(-x)).

    This is SwiGLU (https://arxiv.org/abs/2002.05202) on what one projection of both gave. Rounded after silu and after
    the product.
    """
    check_floating("silu_mul", "gate_up", gate_up)
    width = gate_up.shape[-1]
    if width % 2:
        raise ConfigError(f"silu_mul: gate_up {list(gate_up.shape)} ends in {width} features; gate and up need as many")
    flat = gate_up.reshape(-1, width).contiguous()
    return operators(gate_up.device).silu_mul(flat).view(*gate_up.shape[:-1], width // 2)


@torch.no_grad()
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two tensors of one shape; rounded as `silu_mul`, which on a GPU is one kernel where the two
    lie side by side in one tensor. Here torch needs two."""
    check_floating("swiglu", "gate", gate, min_dims=0)
    check_alike("swiglu", "up", up, "gate", gate)
    check_shape("swiglu", "up", up, gate.shape, "like gate")
    return F.silu(gate) * up


def _check_norm(op: str, x: Tensor, weight: Tensor) -> None:
    check_floating(op, "x", x)
    check_alike(op, "weight", weight, "x", x)
    check_shape(op, "weight", weight, x.shape[-1:], f"for x {list(x.shape)}")
