"""What the tests of the native kernels share: pools by instruction set and threads, and plain integer references."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from kvik.kernels.api import LinearWeight
from kvik.kernels.cpu.native import NativePool, available, load_library
from kvik.kernels.cpu.packing import PackedLinear
from kvik.kernels.reference import ReferenceOps
from kvik.models.decoder import DecoderWeights
from kvik.runtime.native_decoder import native_pack

__all__ = ["ISAS", "QuantizedReferenceOps", "noise", "pack_weights", "pool", "quantized_linear"]

if available():
    _LIBRARY = load_library()
    ISAS = _LIBRARY.isa_names[: _LIBRARY.isa_names.index(_LIBRARY.best_isa) + 1]
else:
    ISAS = ()


@lru_cache(maxsize=16)
def pool(isa: str = "", threads: int = 2) -> NativePool:
    return NativePool(threads, isa=isa or ISAS[-1], pin=False)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def pack_weights(weights: DecoderWeights, fmt: str, workers: NativePool) -> DecoderWeights:
    """All projections packed; a tied embedding becomes the packed lm_head."""
    pack = native_pack(fmt, fmt, workers)
    layers = tuple(
        replace(
            layer,
            qkv=pack("qkv", layer.qkv),
            o=pack("o", layer.o),
            gate_up=pack("gate_up", layer.gate_up),
            down=pack("down", layer.down),
        )
        for layer in weights.layers
    )
    lm_head = pack("lm_head", weights.lm_head)
    embedding = lm_head.weight if weights.lm_head.weight is weights.embedding else weights.embedding
    return replace(weights, embedding=embedding, layers=layers, lm_head=lm_head)


def quantized_linear(x: Tensor, w: PackedLinear, q: Tensor, scales: Tensor) -> Tensor:
    """x [rows, in] times an int8 or int4 weight in plain torch: the same rounding of activations, exact sums.

    Where the weight is fine, what the rounding left is rounded once more.
    """
    group = w.in_features if w.fmt == "int8" else int(w.fmt.removeprefix("int4g"))
    total = torch.zeros((len(x), w.out_features), dtype=torch.float64)
    for g, start in enumerate(range(0, w.in_features, group)):
        part = x[:, start : start + group].float()
        for _ in range(2 if w.fine else 1):
            most = part.abs().amax(1, keepdim=True)  # 127.0 / most would multiply with a rounded reciprocal
            rounded = torch.where(most > 0, torch.round(part * (torch.full_like(most, 127.0) / most)), 0.0)
            sums = rounded.double() @ q[:, start : start + group].double().T
            total += sums * (most / 127.0).double() * scales[:, g].double()
            part = (part.double() - rounded.double() * (most / 127.0).double()).float()
    return total.float()


class QuantizedReferenceOps(ReferenceOps):
    """`ReferenceOps` for packed int8 and int4 weights, in fp32."""

    def __init__(self, pool: NativePool) -> None:
        self._pool = pool
        self._values: dict[int, tuple[Tensor, Tensor]] = {}

    def linear(self, x: Tensor, w: LinearWeight) -> Tensor:
        assert isinstance(w, PackedLinear)
        if id(w) not in self._values:
            self._values[id(w)] = w.quantized(self._pool)
        y = quantized_linear(x, w, *self._values[id(w)])
        return y if w.bias is None else y + unpacked_bias(w)


def unpacked_bias(w: PackedLinear) -> Tensor:
    assert w.bias is not None
    if not w.swiglu:
        return w.bias[: w.out_features]
    halves = w.bias.view(-1, 2, 16).transpose(0, 1).reshape(2, -1)
    return halves[:, : w.out_features // 2].reshape(-1)
