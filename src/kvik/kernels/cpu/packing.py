"""Weights in the layout of the native kernels: packed once at load, the same for every number of tokens.

    bf16      2 bytes a weight           int8      1 byte, one fp32 scale per output; activations int8 per token,
                                                   in two rows where the weight is `fine`
    fp32      4 bytes                    int4g32   4.5 bits, one fp16 scale per 32 inputs; int4g128: 4.125 bits;
                                                   activations int8 per token and group

A `PackedLinear` is a `LinearWeight` whose `weight` is the packed bytes, so it stands wherever a projection stands.
Rounding: int8 is round(w / scale) with scale = max |w| / 127 of the row; int4 takes, per group, the scale with the
least squared error of five, so that the extreme value becomes -8, -7.5, ... or 7. Both are symmetric.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from kvik.errors import ConfigError, did_you_mean
from kvik.kernels.api import LinearWeight
from kvik.kernels.cpu.native import OP_CODES, LinearStruct, NativePool, OpStruct, data_pointer
from kvik.kernels.memory import allocate_bytes

__all__ = ["FORMATS", "TYPE_CODES", "PackedLinear", "pack_linear", "pack_quantized"]

FORMATS = {"fp32": (0, 0), "bf16": (1, 0), "int8": (2, 0), "int4g32": (3, 32), "int4g128": (3, 128)}
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 4}


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear(LinearWeight):
    """A projection in packed form; `weight` [bytes] uint8. `bias` and `scales` are in packed order, padded."""

    fmt: str = ""
    out_features: int = 0
    in_features: int = 0
    swiglu: bool = False
    fine: bool = False
    scales: Tensor | None = None
    struct: LinearStruct | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held: weights, scales and bias."""
        return sum(t.nbytes for t in (self.weight, self.scales, self.bias) if t is not None)

    @property
    def num_groups(self) -> int:
        """Scales per output: 1 for int8, one per group of inputs for int4."""
        assert self.struct is not None
        return int(self.struct.blocks) if self.struct.group else 1

    def dequantize(self, pool: NativePool) -> Tensor:
        """The weight [out_features, in_features] fp32 that the kernels multiply with."""
        out = torch.empty((self.out_features, self.in_features))
        pool.run_one(self._op("unpack", y=data_pointer(out)))
        return out

    def quantized(self, pool: NativePool) -> tuple[Tensor, Tensor]:
        """(q int8 [out_features, in_features], scales fp32 [out_features, num_groups]) of an int8 or int4 weight."""
        if not self.fmt.startswith("int"):
            raise ConfigError(f"a {self.fmt} weight has no quantised values")
        q = torch.empty((self.out_features, self.in_features), dtype=torch.int8)
        scales = torch.empty((self.out_features, self.num_groups))
        pool.run_one(self._op("unpack_quantized", y=data_pointer(q), scales=data_pointer(scales)))
        return q, scales

    def _op(self, name: str, **fields: int | None) -> OpStruct:
        assert self.struct is not None
        return OpStruct(code=OP_CODES[name], linear=ctypes.pointer(self.struct), **fields)


def pack_linear(
    weight: Tensor,
    bias: Tensor | None = None,
    fmt: str = "bf16",
    *,
    pool: NativePool,
    swiglu: bool = False,
    fine: bool = False,
) -> PackedLinear:
    """`weight` [out_features, in_features] of fp32, bf16 or fp16, quantised where `fmt` says so.

    `swiglu`: the rows are [gate | up] and the projection's result is silu(gate) * up, out_features / 2 wide.
    `fine`, for int8 alone: a token's activations are two int8 rows, the second of which is what rounding the first
    left, about 15 bits in all. Raises ConfigError for an unknown format and a shape that cannot be packed.
    """
    if weight.dtype not in TYPE_CODES:
        raise ConfigError(f"cannot pack {weight.dtype}; the kernels take float32, bfloat16 and float16 weights")
    packed = _allocate(weight.shape[0], weight.shape[1], fmt, bias, swiglu, fine, pool)
    source = weight.contiguous()
    pool.run_one(packed._op("pack", x=data_pointer(source), type=TYPE_CODES[source.dtype]))
    return packed


def pack_quantized(
    q: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    fmt: str = "int8",
    *,
    pool: NativePool,
    swiglu: bool = False,
    fine: bool = False,
) -> PackedLinear:
    """Pack values that are quantised already: the inverse of `PackedLinear.quantized`.

    `q` int8 [out_features, in_features], in [-127, 127] or for int4 in [-8, 7]; `scales` [out_features, num_groups],
    which int4 keeps as fp16.
    """
    if not fmt.startswith("int"):
        raise ConfigError(f"{fmt} has no quantised values; use int8, int4g32 or int4g128")
    packed = _allocate(q.shape[0], q.shape[1], fmt, bias, swiglu, fine, pool)
    if scales.numel() != q.shape[0] * packed.num_groups:
        raise ConfigError(f"{fmt} of {list(q.shape)} needs {packed.num_groups} scales a row, got {list(scales.shape)}")
    q, wide = q.to(torch.int8).contiguous(), scales.float().contiguous()
    pool.run_one(packed._op("pack_quantized", x=data_pointer(q), scales=data_pointer(wide)))
    return packed


def _allocate(
    n: int, k: int, fmt: str, bias: Tensor | None, swiglu: bool, fine: bool, pool: NativePool
) -> PackedLinear:
    if fmt not in FORMATS:
        raise ConfigError(f"unknown weight format {fmt!r}{did_you_mean(fmt, FORMATS)}; Kvik has {', '.join(FORMATS)}")
    if fine and fmt != "int8":
        raise ConfigError(f"{fmt} weights have no fine activations; only int8 ones take them in two rows")
    code, group = FORMATS[fmt]
    struct = LinearStruct(format=code, group=group, n=n, k=k, swiglu=swiglu, fine=fine)
    pool.library.layout(struct)
    data = allocate_bytes(struct.panels * struct.panel_bytes)
    scales = torch.empty(struct.panels * 32) if fmt == "int8" else None
    packed_bias = None if bias is None else _pack_bias(bias, struct.panels, swiglu)
    struct.data, struct.scales, struct.bias = data.data_ptr(), data_pointer(scales), data_pointer(packed_bias)
    return PackedLinear(data, packed_bias, fmt, n, k, swiglu, fine, scales, struct)


def _pack_bias(bias: Tensor, panels: int, swiglu: bool) -> Tensor:
    """[panels * 32] fp32 in the order of the packed outputs."""
    if not swiglu:
        padded = torch.zeros(panels * 32)
        padded[: len(bias)] = bias
        return padded
    halves = torch.zeros(2, panels * 16)
    halves[:, : len(bias) // 2] = bias.view(2, -1)
    return halves.view(2, panels, 16).transpose(0, 1).contiguous().view(-1)
