"""The plain quantisers against the native packers, and the layout on disk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvik.errors import ModelLoadError
from kvik.kernels.cpu.native import NativePool, available
from kvik.kernels.cpu.packing import pack_linear
from kvik.quantization.formats import (
    GROUPS,
    StoredQuantization,
    pack_nibbles,
    read_quantization,
    scale_shape,
    stored_shape,
    unpack_nibbles,
)
from kvik.quantization.reference import dequantize, quantize

needs_native = pytest.mark.skipif(not available(), reason="the native kernels were not compiled")


def awkward(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Noise with zero rows, zero groups, ties of opposite sign, tiny and huge values."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)) * 0.05
    weight[0] = 0
    weight[1 % rows, : columns // 2] = 0
    weight[2 % rows, ::2] = 0.25
    weight[2 % rows, 1::2] = -0.25
    weight[3 % rows] *= 1e-7
    weight[4 % rows] *= 1e6 if dtype is torch.float32 else 1e3
    weight[5 % rows, 0] = -3.0
    return weight.to(dtype)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fmt", GROUPS)
def test_native_packing_rounds_as_the_plain_quantiser_does(fmt: str, dtype: torch.dtype) -> None:
    pool = NativePool(1)
    for rows, columns in ((1, 1), (7, 33), (33, 32), (64, 256), (40, 127), (40, 129), (100, 448)):
        weight = awkward(rows, columns, dtype)
        packed = pack_linear(weight, None, fmt, pool=pool)
        q, scales = packed.quantized(pool)
        want_q, want_scales = quantize(weight, fmt)
        assert torch.equal(scales, want_scales)
        assert torch.equal(q, want_q)
        assert torch.equal(packed.dequantize(pool), dequantize(want_q, want_scales, fmt))
    pool.close()


@pytest.mark.parametrize("columns", [1, 2, 31, 32, 33])
def test_nibbles_make_a_round_trip(columns: int) -> None:
    q = torch.randint(-8, 8, (5, columns), dtype=torch.int8)
    packed, back = pack_nibbles(q), torch.empty_like(q)
    assert packed.dtype == torch.uint8
    assert packed.shape == stored_shape(q.shape, "int4g32") == (5, (columns + 1) // 2)
    unpack_nibbles(packed, back)
    assert torch.equal(back, q)
    assert int(packed[0, 0]) & 15 == int(q[0, 0]) + 8


def test_error_of_rounding_is_at_most_half_a_step() -> None:
    weight = torch.randn(20, 200)
    q, scales = quantize(weight, "int8")
    assert ((dequantize(q, scales, "int8") - weight).abs() <= scales * 0.5001).all()
    assert scales.squeeze(1).shape == scale_shape(weight.shape, "int8")
    errors = [float((dequantize(*quantize(weight, fmt), fmt) - weight).norm() / weight.norm()) for fmt in GROUPS]
    assert errors[0] < 0.01 < errors[1] < errors[2] < 0.15


def test_config_makes_a_round_trip() -> None:
    stored = StoredQuantization("int4g32", "int8", {"0.down": "int8"}, "some text", {"top1_agreement": 1.0})
    assert read_quantization({"quantization_config": stored.to_json("1.0")}) == stored
    assert read_quantization({}) is None
    assert stored.of_role(0, "down") == "int8"
    assert stored.of_role(1, "down") == "int4g32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, r"quantised weights \(gptq\) are not supported"),
        ({"version": 2}, "version 2 of Kvik's layout"),
        ({"format": "int3"}, r"'int3' is not one of int8, int4g32"),
        ({"head_format": None}, "is not one of"),
        ({"overrides": {"0.o": "bf16"}}, "bf16"),
        ({"overrides": ["int8"]}, "quantization_config"),
    ],
)
def test_foreign_and_damaged_configs_are_refused(change: dict[str, Any], message: str) -> None:
    entry = StoredQuantization("int8").to_json("1.0") | change
    with pytest.raises(ModelLoadError, match=message):
        read_quantization({"quantization_config": entry})
