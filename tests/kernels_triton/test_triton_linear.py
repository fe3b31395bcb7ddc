"""Projections in Triton against the reference, on every path, at sizes that no tile divides."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from linear_cases import DTYPES, check, noise, one_plan, projection

from kvik.kernels.api import LinearWeight
from kvik.kernels.reference import ReferenceOps
from kvik.kernels.triton.dispatch import Plan, Rule, load_table
from kvik.kernels.triton.features import Features, knows_gluon
from kvik.kernels.triton.ops import Parts, TritonOps
from kvik.kernels.triton.skinny import skinny

REFERENCE = ReferenceOps()
EPS = 1e-6
GEMV = {
    "one tile": Plan(path="gemv", block_n=32, block_k=256),
    "chunks": Plan(path="gemv", block_n=32, block_k=32, num_warps=2),
}
SKINNY = {
    "plain": Plan(path="skinny", block_n=32, block_k=32, block_t=32),
    "wgmma": Plan(path="skinny", block_n=64, block_k=64, prefetch=2),
    "split": Plan(path="skinny", block_n=32, block_k=16, block_t=32, split_k=3),
    "tma": Plan(path="skinny", block_n=64, block_k=64, split_k=2, tma=True),  # on a GPU that has it
    "more parts than K has": Plan(
        path="skinny",
        block_n=32,
        block_k=64,
        split_k=8,
    ),
}
BLAS = Plan(path="blas")
SIZES = [(40, 80), (33, 48), (1, 16)]  # outputs, inputs


def compare(plan: Plan, m: int, n: int, k: int, dtype: torch.dtype, bias: bool, device: torch.device) -> None:
    """The four projections of a decoder."""
    ops = TritonOps(device, table=one_plan(plan))
    x, gain = noise(m, k, dtype=dtype, device=device), noise(k, dtype=dtype, device=device)
    residual = noise(m, n, dtype=dtype, device=device, seed=2)
    w, gate_up = (projection(rows, k, bias, dtype, device) for rows in (n, 2 * n))
    check(ops.linear(x, w), REFERENCE.linear(x, w))
    check(ops.norm_linear(x, gain, EPS, w), REFERENCE.norm_linear(x, gain, EPS, w))
    added = ops.linear_add(x, w, residual.clone())
    check(added, REFERENCE.linear_add(x, w, residual), rounds_alike=plan.path != "blas")
    gated = ops.norm_linear_swiglu(x, gain, EPS, gate_up)
    check(gated, REFERENCE.norm_linear_swiglu(x, gain, EPS, gate_up))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEMV)
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_gemv(name: str, m: int, dtype: torch.dtype, device: torch.device) -> None:
    for (n, k), bias in zip(SIZES, (True, False, True), strict=True):
        compare(GEMV[name], m, n, k, dtype, bias, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SKINNY)
@pytest.mark.parametrize("m", [1, 5, 17, 64])
def test_skinny(name: str, m: int, dtype: torch.dtype, device: torch.device) -> None:
    for (n, k), bias in zip(SIZES, (False, True, False), strict=True):
        compare(SKINNY[name], m, n, k, dtype, bias, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block_n", [64, 128, 192])
@pytest.mark.parametrize(
    ("m", "block_t", "split_k"),
    [(1, 8, 1), (17, 32, 3), (40, 64, 2), (45, 64, 1), (75, 128, 1), (150, 128, 1), (155, 256, 1), (192, 256, 2),
     (300, 256, 1), (256, 256, 2)],
)  # fmt: skip
def test_hopper(m: int, block_t: int, split_k: int, block_n: int, dtype: torch.dtype, device: torch.device) -> None:
    if not Features.of(device).hopper:
        pytest.skip("needs a Hopper GPU and a Triton whose Gluon is known; Gluon has no interpreter")
    plan = Plan(path="hopper", block_n=block_n, block_t=block_t, split_k=split_k, num_stages=3)
    for (n, k), bias in zip([(40, 80), (200, 1096), (1000, 512), (64, 64)], (False, True, False, True), strict=True):
        compare(plan, m, n, k, dtype, bias, device)


@pytest.mark.skipif(not knows_gluon(), reason="this Triton has a Gluon that the kernels were not tried with")
def test_programs_for_hopper_have_no_more_tokens_than_they_need() -> None:
    from kvik.kernels.triton.linear_hopper import token_widths

    for block_n, block_t in itertools.product((64, 128, 192), (8, 32, 64, 128, 256)):
        plan = Plan(path="hopper", block_n=block_n, block_t=block_t, num_stages=3)
        for m in range(1, 600):
            total = sum(widths := token_widths(plan, m))
            assert total <= block_t and math.ceil(m / total) == math.ceil(m / block_t)
            assert all(width.bit_count() < 2 and width % 8 == 0 for width in widths) and widths[0] >= widths[1]
            assert max(widths) <= (128 if block_n == 192 else 256)
    plan = Plan(path="hopper", block_n=128, block_t=256)
    assert [token_widths(plan, m) for m in (8, 160, 161, 193, 256, 300, 640)] == [
        (128, 32), (128, 32), (128, 64), (256, 0), (256, 0), (128, 32), (256, 0)
    ]  # fmt: skip


def test_what_the_kernel_for_hopper_cannot_address_goes_elsewhere(device: torch.device) -> None:
    table = one_plan(Plan(path="hopper", block_t=16))
    table = dataclasses.replace(table, rules=(*table.rules, Rule(plan=SKINNY["plain"])))
    ops = TritonOps(device, table=table, features=Features(pdl=False, hopper=True))
    x, dtype = torch.empty(17 * 80 + 1, dtype=torch.bfloat16, device=device)[1:].view(17, 80), torch.bfloat16
    x.copy_(noise(17, 80, dtype=dtype, device=device))
    w = projection(40, 80, True, dtype, device)
    check(ops.linear(x, w), REFERENCE.linear(x, w))  # begins between two multiples of 16 bytes
    for n, k, kind in ((33, 80, dtype), (40, 36, dtype), (40, 80, torch.float32)):
        x, w = noise(17, k, dtype=kind, device=device), projection(n, k, True, kind, device)
        check(ops.linear(x, w), REFERENCE.linear(x, w))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_library(dtype: torch.dtype, bias: bool, device: torch.device) -> None:
    compare(BLAS, 65, 40, 80, dtype, bias, device)


@pytest.mark.parametrize("m", [1, 2, 3, 5, 17, 64, 65])
def test_the_shipped_table(m: int, device: torch.device) -> None:
    ops = TritonOps(device, table=load_table("a GPU that nobody has measured"))
    dtype = torch.bfloat16
    x, gain = noise(m, 80, dtype=dtype, device=device), noise(80, dtype=dtype, device=device)
    for n in (24, 136):
        w = projection(2 * n, 80, True, dtype, device)
        check(ops.norm_linear(x, gain, EPS, w), REFERENCE.norm_linear(x, gain, EPS, w))
        check(ops.norm_linear_swiglu(x, gain, EPS, w), REFERENCE.norm_linear_swiglu(x, gain, EPS, w))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_deterministic_row_does_not_know_its_neighbours(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tokens = 70
    if device.type == "cpu":  # numpy adds up in an order that depends on the tile: its rows, and its columns above 64
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("ik,kj->ij", a, b, dtype=dtype))
        num_tokens = 60
    ops = TritonOps(device, deterministic=True)
    x, gain = noise(num_tokens, 80, dtype=dtype, device=device), noise(80, dtype=dtype, device=device)
    w, gate_up = projection(40, 80, True, dtype, device), projection(80, 80, False, dtype, device)
    residual = noise(num_tokens, 40, dtype=dtype, device=device)
    whole = (
        ops.linear(x, w),
        ops.norm_linear(x, gain, EPS, w),
        ops.linear_add(x, w, residual.clone()),
        ops.norm_linear_swiglu(x, gain, EPS, gate_up),
    )
    for rows in (slice(0, 1), slice(num_tokens - 3, num_tokens), slice(3, 20)):
        part = (
            ops.linear(x[rows], w),
            ops.norm_linear(x[rows], gain, EPS, w),
            ops.linear_add(x[rows], w, residual[rows].clone()),
            ops.norm_linear_swiglu(x[rows], gain, EPS, gate_up),
        )
        for alone, together in zip(part, whole, strict=True):
            assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("m", [1, 17])
def test_tiles_copied_by_tma_give_the_same_bits(m: int, swiglu: bool, device: torch.device) -> None:
    if device.type == "cuda" and not Features.of(device).pdl:
        pytest.skip("the tensor memory accelerator came with Hopper")
    for (n, k), split_k in zip([(40, 80), (33, 48), (96, 256)], (1, 2, 4), strict=True):
        x = noise(m, k, dtype=torch.bfloat16, device=device)
        w = projection(n * (1 + swiglu), k, False, torch.bfloat16, device)
        plans = [Plan(path="skinny", block_n=64, block_k=32, split_k=split_k, tma=tma) for tma in (False, True)]
        loaded, copied = (skinny(x, w, plan, swiglu=swiglu, tma=True) for plan in plans)
        exact = {"rtol": 0.0, "atol": 0.0} if device.type == "cuda" else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(loaded, copied, **exact)  # numpy adds up in an order that depends on strides


@pytest.mark.parametrize("bias", [False, True])
def test_parts_are_added_up_by_whoever_reads_them(bias: bool, device: torch.device) -> None:
    """What a norm and a residual make of parts is what they make of their sum."""
    table, dtype = one_plan(Plan(path="skinny", block_n=32, block_k=16, split_k=3)), torch.bfloat16
    at_once, later = (TritonOps(device, table=table, defer=defer) for defer in (False, True))
    x, residual = (noise(5, 48, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    w, gate_up, gain = (
        projection(48, 48, bias, dtype, device), projection(96, 48, bias, dtype, device),
        noise(48, dtype=dtype, device=device),
    )  # fmt: skip
    total = at_once.linear_add(x, w, residual.clone())
    assert isinstance(total, torch.Tensor)
    for read in (
        lambda ops, hidden: ops.rms_norm(hidden, gain, EPS),
        lambda ops, hidden: ops.norm_linear_swiglu(hidden, gain, EPS, gate_up),
    ):
        parts = later.linear_add(x, w, residual.clone())
        assert isinstance(parts, Parts)
        assert torch.equal(read(later, parts), read(at_once, total))
        assert parts.total is not None
        assert torch.equal(parts.total, total)
    again = later.rms_norm(later.linear_add(x, w, parts), gain, EPS)
    assert torch.equal(again, at_once.rms_norm(at_once.linear_add(x, w, total), gain, EPS))
    projected = later.norm_linear(later.linear_add(x, w, residual.clone()), gain, EPS, w)
    assert isinstance(projected, Parts)


def test_no_tokens(device: torch.device) -> None:
    ops = TritonOps(device)
    x, gain = torch.empty(0, 16, device=device), torch.ones(16, device=device)
    w = LinearWeight(torch.ones(24, 16, device=device))
    assert ops.linear(x, w).shape == (0, 24)
    assert ops.linear_add(x, w, torch.empty(0, 24, device=device)).shape == (0, 24)
    assert ops.norm_linear_swiglu(x, gain, EPS, w).shape == (0, 12)
