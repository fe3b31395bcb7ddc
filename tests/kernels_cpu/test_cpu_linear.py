"""Native projections against torch: formats, ugly shapes, instruction sets, thread counts, batches."""

from __future__ import annotations

import math

import pytest
import torch
from native_cases import ISAS, noise, pool, quantized_linear
from torch import Tensor

from kvik.errors import ConfigError
from kvik.kernels.api import LinearWeight
from kvik.kernels.cpu.native import available
from kvik.kernels.cpu.ops import NativeOps
from kvik.kernels.cpu.packing import FORMATS, PackedLinear, pack_linear, pack_quantized
from kvik.kernels.reference import ReferenceOps

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels were not compiled")

ROWS = (1, 2, 3, 5, 8, 9, 12, 13, 31, 64, 123)
SHAPES = ((32, 32), (36, 24), (1, 7), (33, 129), (100, 200), (130, 320))
EPS = 1e-6


def close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return float((got.double() - want.double()).abs().max()) <= tolerance * max(1e-6, float(want.abs().max()))


def rounded(x: Tensor, fmt: str) -> Tensor:
    return x.bfloat16().float() if fmt == "bf16" else x


def expected(x: Tensor, w: PackedLinear, bias: Tensor | None, isa: str) -> Tensor:
    if w.fmt.startswith("int"):
        y = quantized_linear(x, w, *w.quantized(pool(isa)))
    else:
        y = (rounded(x, w.fmt).double() @ w.dequantize(pool(isa)).double().T).float()
    return y if bias is None else y + bias


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_shape_and_batch(fmt: str, isa: str) -> None:
    ops = NativeOps(pool(isa))
    for n, k in SHAPES:
        bias = noise(n, seed=3) if n % 2 else None
        w = pack_linear(noise(n, k), bias, fmt, pool=pool(isa))
        for rows in ROWS:
            x = noise(rows, k, seed=1)
            assert close(ops.linear(x, w), expected(x, w, bias, isa), 3e-6), (n, k, rows)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", ["fp32", "bf16"])
def test_fused_norm_residual_and_swiglu(fmt: str, isa: str) -> None:
    ops, reference = NativeOps(pool(isa)), ReferenceOps()
    tolerance = 3e-6 if fmt == "fp32" else 1.5e-2
    for n, k in ((32, 64), (36, 24), (66, 130), (200, 96)):
        weight, bias, norm = noise(n, k), noise(n, seed=2), noise(k, seed=5)
        plain, halved = (pack_linear(weight, bias, fmt, pool=pool(isa), swiglu=s) for s in (False, True))
        original = LinearWeight(weight, bias)
        for rows in (1, 5, 12, 31):
            x, residual = noise(rows, k, seed=1), noise(rows, n, seed=4)
            got, want = ops.norm_linear(x, norm, EPS, plain), reference.norm_linear(x, norm, EPS, original)
            assert close(got, want, tolerance)
            assert close(ops.linear_add(x, plain, residual), reference.linear_add(x, original, residual), tolerance)
            got = ops.norm_linear_swiglu(x, norm, EPS, halved)
            assert close(got, reference.norm_linear_swiglu(x, norm, EPS, original), tolerance)


@pytest.mark.parametrize("isa", ISAS)
def test_two_rows_a_token_are_activations_of_fifteen_bits(isa: str) -> None:
    ops = NativeOps(pool(isa))
    for n, k in (*SHAPES, (100, 640)):  # the last one fills tile registers
        bias = noise(n, seed=3)
        w = pack_linear(noise(n, k), bias, "int8", pool=pool(isa), fine=True)
        plain = w.dequantize(pool(isa)).double()
        for rows in ROWS:
            x, residual = noise(rows, k, seed=1), noise(rows, n, seed=4)
            x[:, k // 2] *= 30  # an outlier, which leaves little to the others
            want = x.double() @ plain.T + bias + residual
            step = x.double().abs().amax(1, keepdim=True) / 127 / 254
            error = (ops.linear_add(x, w, residual).double() - want).abs()
            assert (error <= step / 2 * plain.abs().sum(1) + 3e-6 * want.abs().max()).all(), (n, k, rows)


@pytest.mark.parametrize("isa", ISAS)
def test_two_rows_a_token_behind_norm_and_swiglu(isa: str) -> None:
    ops, reference = NativeOps(pool(isa)), ReferenceOps()
    for n, k in ((66, 130), (200, 192)):
        weight, bias, norm, x = noise(n, k), noise(n, seed=2), noise(k, seed=5), noise(31, k, seed=1)
        w = pack_linear(weight, bias, "int8", pool=pool(isa), swiglu=True, fine=True)
        exact = LinearWeight(w.dequantize(pool(isa)), bias)
        want = reference.norm_linear_swiglu(x, norm, EPS, exact)
        assert close(ops.norm_linear_swiglu(x, norm, EPS, w), want, 1e-3)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("swiglu", [False, True])
def test_packing_and_unpacking_are_inverse(fmt: str, swiglu: bool) -> None:
    weight = noise(70, 150)
    packed = pack_linear(weight, None, fmt, pool=pool(), swiglu=swiglu)
    plain = packed.dequantize(pool())
    if not fmt.startswith("int"):
        assert torch.equal(plain, rounded(weight, fmt))
        with pytest.raises(ConfigError, match="no quantised values"):
            packed.quantized(pool())
        return
    q, scales = packed.quantized(pool())
    group = 150 if fmt == "int8" else int(fmt[5:])
    assert torch.equal(plain, q.float() * scales.repeat_interleave(group, dim=1)[:, :150])
    assert float((plain - weight).square().mean().sqrt()) < {"int8": 0.01, "int4g32": 0.09, "int4g128": 0.12}[fmt]
    again = pack_quantized(q, scales, None, fmt, pool=pool(), swiglu=swiglu)
    assert torch.equal(again.dequantize(pool()), plain)
    x = noise(3, 150, seed=1)
    run = NativeOps(pool())._linear
    assert torch.equal(run(x, again, swiglu=swiglu), run(x, packed, swiglu=swiglu))


def test_int8_rounds_as_documented() -> None:
    weight = noise(50, 100)
    q, scales = pack_linear(weight, None, "int8", pool=pool()).quantized(pool())
    want = weight.abs().amax(1, keepdim=True) / 127.0
    assert torch.equal(scales, want)
    assert torch.equal(q, torch.round(weight / want).to(torch.int8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_every_type_are_taken(dtype: torch.dtype) -> None:
    weight = (noise(40, 50) * 100).to(dtype)
    weight[0, :3] = torch.tensor([0.0, 6e-8, -3e-5]).to(dtype)  # denormal in fp16
    assert torch.equal(pack_linear(weight, None, "fp32", pool=pool()).dequantize(pool()), weight.float())


def test_rows_of_zeros_and_outliers() -> None:
    for fmt in FORMATS:
        weight = noise(40, 64)
        weight[3] = 0
        w = pack_linear(weight, None, fmt, pool=pool())
        x = noise(2, 64, seed=1)
        x[0] = 0
        x[1, 5] = 1e4
        got = NativeOps(pool()).linear(x, w)
        assert torch.equal(got[0], torch.zeros(40))
        assert got[1, 3] == 0
        assert close(got, expected(x, w, None, ISAS[-1]), 3e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("fmt", "fine"), [*((fmt, False) for fmt in FORMATS), ("int8", True)])
def test_what_is_broken_stays_broken_and_breaks_nobody_else(fmt: str, fine: bool, broken: float, isa: str) -> None:
    """Rounding to integers would make a number of it."""
    ops, x = NativeOps(pool(isa)), noise(20, 320, seed=1)
    w = pack_linear(noise(40, 320), None, fmt, pool=pool(isa), fine=fine)
    want = ops.linear(x, w)
    x[3, 319] = broken
    got = ops.linear(x, w)
    assert not got[3].isfinite().any()
    others = torch.arange(20) != 3
    assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("fmt", FORMATS)
def test_bits_depend_on_neither_threads_nor_batch(fmt: str) -> None:
    for k in (200, 576):  # the second fills the steps of tile registers, and several slices of them
        check_bits(fmt, k)
        if fmt == "int8":
            check_bits(fmt, k, fine=True)


def check_bits(fmt: str, k: int, fine: bool = False) -> None:
    w = pack_linear(noise(300, k), noise(300, seed=2), fmt, pool=pool(), fine=fine)
    norm, x = noise(k, seed=5), noise(123, k, seed=1)
    whole = NativeOps(pool(threads=1)).norm_linear(x, norm, EPS, w)
    for threads in (2, 4):
        assert torch.equal(NativeOps(pool(threads=threads)).norm_linear(x, norm, EPS, w), whole)
    for rows in (1, 2, 8, 13, 16, 17, 33, 64):
        assert torch.equal(NativeOps(pool()).norm_linear(x[:rows], norm, EPS, w), whole[:rows])


@pytest.mark.parametrize("isa", ISAS)
def test_shapes_that_fill_tile_registers(isa: str) -> None:
    ops, low = NativeOps(pool(isa)), NativeOps(pool(ISAS[0]))
    for fmt in ("bf16", "int8"):
        for n, k in ((32, 64), (100, 640), (300, 1088)):
            weight, bias, x = noise(n, k), noise(n, seed=3), noise(150, k, seed=1)
            w = pack_linear(weight, bias, fmt, pool=pool(isa))
            halved = pack_linear(weight, bias, fmt, pool=pool(isa), swiglu=True)
            for rows in (1, 15, 16, 17, 32, 33, 150):
                got, gated = ops.linear(x[:rows], w), ops.norm_linear_swiglu(x[:rows], noise(k), EPS, halved)
                assert close(got, expected(x[:rows], w, bias, isa), 3e-6), (fmt, n, k, rows)
                assert close(gated, low.norm_linear_swiglu(x[:rows], noise(k), EPS, halved), 1e-2)
                if fmt == "int8" and isa == "amx":  # whole numbers have the same sum in any order
                    lower = NativeOps(pool("avx512_bf16"))
                    assert torch.equal(got, lower.linear(x[:rows], w))
                    fine = pack_linear(weight, bias, fmt, pool=pool(isa), fine=True)
                    assert torch.equal(ops.linear(x[:rows], fine), lower.linear(x[:rows], fine))


@pytest.mark.parametrize("isa", ISAS)
def test_long_inputs_do_not_overflow_int8(isa: str) -> None:
    weight, x = torch.ones(2, 65536), torch.full((1, 65536), 126.49 / 127)
    x[0, 0] = 1  # so that both rows are as large as they can be
    for fine in (False, True):
        got = NativeOps(pool(isa)).linear(x, pack_linear(weight, None, "int8", pool=pool(isa), fine=fine))
        assert close(got, x.sum().expand(1, 2), 1e-5 if fine else 0.01)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", ["int4g32", "int4g128"])
def test_the_largest_sums_of_int4_fit_where_they_are_kept(fmt: str, isa: str) -> None:
    q = torch.tensor([7, -8, 7, -8], dtype=torch.int8)[:, None].repeat(1, 256)
    q[2, 1::2], q[3, 1::2] = -8, 7
    w = pack_quantized(q, torch.ones(4, 256 // int(fmt[5:])), None, fmt, pool=pool(isa))
    signs = torch.ones(5, 256)
    signs[1], signs[2, ::2], signs[3, 1::2], signs[4, :128] = -1, -1, -1, -1
    for rows in (1, 2, 5):
        x = signs[:rows]
        assert close(NativeOps(pool(isa)).linear(x, w), expected(x, w, None, isa), 1e-6)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"unknown weight format 'int8g32'.*Kvik has"):
        pack_linear(noise(4, 4), None, "int8g32", pool=pool())
    with pytest.raises(ConfigError, match="cannot be packed"):
        pack_linear(noise(4, 70000), None, "bf16", pool=pool())
    with pytest.raises(ConfigError, match="cannot be packed"):
        pack_linear(noise(5, 4), None, "bf16", pool=pool(), swiglu=True)
    with pytest.raises(ConfigError, match=r"cannot pack torch\.int64"):
        pack_linear(torch.ones(4, 4, dtype=torch.int64), None, "bf16", pool=pool())
    with pytest.raises(ConfigError, match="bf16 weights have no fine activations"):
        pack_linear(noise(4, 4), None, "bf16", pool=pool(), fine=True)
    with pytest.raises(ConfigError, match="needs 2 scales a row"):
        pack_quantized(torch.ones(4, 40, dtype=torch.int8), torch.ones(4), None, "int4g32", pool=pool())
    with pytest.raises(ConfigError, match="bf16 has no quantised values"):
        pack_quantized(torch.ones(4, 40, dtype=torch.int8), torch.ones(4), None, "bf16", pool=pool())
