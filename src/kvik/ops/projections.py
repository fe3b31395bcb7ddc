"""Projections, alone and with what stands before or after them in a decoder block.

A weight is a tensor [out_features, in_features], or on a CPU what `pack` made of one. With `norm` and `eps`, the input
is normalised first, as `rms_norm` does. In torch and Triton a 16-bit result is rounded after each step: norm,
projection with bias, silu, product, residual (where a GPU's library multiplies, the residual is added before). Beside a
packed weight all between input and result is fp32, but the input, rounded to the form of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvik.errors import ConfigError, did_you_mean
from kvik.kernels.api import LinearWeight, Ops
from kvik.kernels.cpu.packing import FORMATS, PackedLinear, pack_linear
from kvik.ops.checks import check_alike, check_floating, check_matrix, check_shape
from kvik.ops.devices import CpuOperators, operators

__all__ = ["linear", "linear_add", "norm_linear", "norm_linear_swiglu", "pack"]

_Run = Callable[[Ops[Any], Tensor, LinearWeight], Tensor]


@torch.no_grad()
def linear(x: Tensor, weight: Tensor | LinearWeight, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: x [..., in_features] -> [..., out_features]; bias [out_features]."""
    return _project("linear", x, weight, bias, lambda ops, x, w: ops.linear(x, w))


@torch.no_grad()
def norm_linear(
    x: Tensor, norm: Tensor, weight: Tensor | LinearWeight, bias: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """linear(rms_norm(x, norm, eps), weight, bias); norm [in_features]."""
    _check_norm("norm_linear", x, norm)
    return _project("norm_linear", x, weight, bias, lambda ops, x, w: ops.norm_linear(x, norm.contiguous(), eps, w))


@torch.no_grad()
def linear_add(x: Tensor, weight: Tensor | LinearWeight, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """residual + linear(x, weight, bias); residual [..., out_features]."""
    op = "linear_add"
    out_features = _features(op, weight)[0]
    check_alike(op, "residual", residual, "x", x)
    check_shape(op, "residual", residual, (*x.shape[:-1], out_features), "as the projection gives it")
    added = residual.reshape(-1, out_features).clone(memory_format=torch.contiguous_format)  # it may be overwritten
    return _project(op, x, weight, bias, lambda ops, x, w: ops.linear_add(x, w, added))


@torch.no_grad()
def norm_linear_swiglu(
    x: Tensor, norm: Tensor, weight: Tensor | LinearWeight, bias: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """silu_mul(norm_linear(x, norm, weight, bias)): the first half of a feed-forward layer.

    The rows of `weight` are those of gate, then as many of up; a packed one was packed with `swiglu=True`.
    """
    op = "norm_linear_swiglu"
    _check_norm(op, x, norm)
    if (rows := _features(op, weight)[0]) % 2:
        raise ConfigError(f"{op}: weight has {rows} rows; gate and up need as many each")
    return _project(op, x, weight, bias, lambda ops, x, w: ops.norm_linear_swiglu(x, norm.contiguous(), eps, w))


@torch.no_grad()
def pack(
    weight: Tensor, bias: Tensor | None = None, format: str | None = None, *, swiglu: bool = False
) -> LinearWeight:
    """`weight` [out_features, in_features] in the layout of the compiled CPU kernels: once, for many calls.

    format: "fp32", "bf16", or quantised "int8", "int4g32", "int4g128" (`kvik.kernels.cpu.packing` has the rounding); by
    default bf16 for a bf16 weight and fp32 for others. swiglu: for `norm_linear_swiglu`. Raises ConfigError on a GPU,
    where weights stay tensors, and where Kvik was built without its compiled kernels.
    """
    check_floating("pack", "weight", weight)
    check_matrix("pack", "weight", weight, "[out_features, in_features]")
    chosen = format or ("bf16" if weight.dtype == torch.bfloat16 else "fp32")
    if chosen not in FORMATS:
        raise ConfigError(f"pack: unknown format {chosen!r}{did_you_mean(chosen, FORMATS)}; use one of {list(FORMATS)}")
    ops = operators(weight.device)
    if not isinstance(ops, CpuOperators):
        raise ConfigError(f"pack: weight is on {weight.device}; only CPU kernels take packed weights, use it as it is")
    if ops.native is None:
        raise ConfigError("pack: Kvik was built without its compiled kernels; use the weight as it is")
    if bias is not None:
        check_shape("pack", "bias", bias, weight.shape[:1], f"for weight {list(weight.shape)}")
    return pack_linear(weight, bias, chosen, pool=ops.native.pool, swiglu=swiglu)


def _project(op: str, x: Tensor, weight: Tensor | LinearWeight, bias: Tensor | None, run: _Run) -> Tensor:
    """Check, flatten the leading dimensions of x, run, and give the result theirs."""
    check_floating(op, "x", x)
    w = _checked(op, x, weight, bias, swiglu=op == "norm_linear_swiglu")
    y = run(operators(x.device), x.reshape(-1, x.shape[-1]).contiguous(), w)
    return y.view(*x.shape[:-1], y.shape[-1])


def _checked(op: str, x: Tensor, weight: Tensor | LinearWeight, bias: Tensor | None, *, swiglu: bool) -> LinearWeight:
    out_features, in_features = _features(op, weight)
    if x.shape[-1] != in_features:
        raise ConfigError(
            f"{op}: x {list(x.shape)} ends in {x.shape[-1]} features and weight takes {in_features};"
            f" it is [{out_features}, {in_features}], outputs first"
        )
    if isinstance(weight, PackedLinear):
        _check_packed(op, x, weight, bias, swiglu)
        return weight
    w = weight if isinstance(weight, LinearWeight) else LinearWeight(weight, bias)
    if w is weight and bias is not None:
        raise ConfigError(f"{op}: bias is given beside a LinearWeight, which has its own; leave one out")
    check_alike(op, "weight", w.weight, "x", x)
    if not w.weight.is_contiguous():
        raise ConfigError(
            f"{op}: weight has strides {w.weight.stride()}; call weight.contiguous() once, not every time"
        )
    if w.bias is not None:
        check_alike(op, "bias", w.bias, "x", x)
        check_shape(op, "bias", w.bias, (out_features,), f"for weight {list(w.weight.shape)}")
    return w


def _check_packed(op: str, x: Tensor, weight: PackedLinear, bias: Tensor | None, swiglu: bool) -> None:
    if bias is not None:
        raise ConfigError(f"{op}: bias is given beside a packed weight; give it to pack")
    if x.device.type != "cpu":
        raise ConfigError(f"{op}: x is on {x.device} and the weight is packed for the CPU; use the plain tensor there")
    if weight.swiglu != swiglu:
        wanted = "for" if swiglu else "without"
        raise ConfigError(f"{op}: pack the weight {wanted} SwiGLU: pack(weight, swiglu={swiglu})")


def _features(op: str, weight: Tensor | LinearWeight) -> tuple[int, int]:
    """(out_features, in_features)"""
    if isinstance(weight, PackedLinear):
        return weight.out_features, weight.in_features
    matrix = weight.weight if isinstance(weight, LinearWeight) else weight
    check_matrix(op, "weight", matrix, "[out_features, in_features]")
    return matrix.shape[0], matrix.shape[1]


def _check_norm(op: str, x: Tensor, norm: Tensor) -> None:
    check_floating(op, "x", x)
    check_alike(op, "norm", norm, "x", x)
    check_shape(op, "norm", norm, x.shape[-1:], f"for x {list(x.shape)}")
