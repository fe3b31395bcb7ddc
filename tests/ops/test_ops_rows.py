"""Operators on rows against torch, over types and ugly shapes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, assert_close, noise, norm64

from kvik import ConfigError, ops

EPS = 1e-6
UGLY = [(1, 4), (2, 3), (5, 123), (3, 1), (17, 33), (0, 16), (2, 5, 80), (7,)]

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("shape", UGLY, ids=str)
def test_add(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    a, b = (noise(*shape, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    assert torch.equal(ops.add(a, b), a + b)


@pytest.mark.parametrize("shape", [(4,), (4096,), (3, 1), (5, 123), (2, 3, 1000), (0, 7)], ids=str)
def test_argmax(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = noise(*shape, dtype=dtype, device=device)
    assert torch.equal(ops.argmax(x), x.float().argmax(-1))
    assert ops.argmax(torch.zeros_like(x)).eq(0).all(), "the lowest index among equals"


def test_more_rows_than_items_of_a_stage(dtype: torch.dtype, device: torch.device) -> None:
    x = noise(2**20 + 3, 2, dtype=dtype, device=device)
    assert torch.equal(ops.argmax(x), x.float().argmax(-1))
    assert_close(ops.rms_norm(x, torch.ones_like(x[0]), EPS), norm64(x, torch.ones_like(x[0]), EPS))


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("size", [1, 3, 33, 128])
def test_embedding(size: int, ids_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    weight = noise(11, size, dtype=dtype, device=device)
    ids = torch.tensor([[3, 0, 10], [3, 9, 1]], dtype=ids_dtype, device=device)
    assert torch.equal(ops.embedding(ids, weight), F.embedding(ids, weight))
    assert torch.equal(ops.embedding(ids[0], weight.t().contiguous().t()), F.embedding(ids[0], weight))
    assert ops.embedding(ids[:0], weight).shape == (0, 3, size)


@pytest.mark.parametrize("shape", UGLY, ids=str)
def test_norms(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, residual = (noise(*shape, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    weight = noise(shape[-1], dtype=dtype, device=device)
    assert_close(ops.rms_norm(x, weight, EPS), norm64(x, weight, EPS))
    normed, total = ops.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert_close(normed, norm64(total, weight, EPS))


@pytest.mark.parametrize("shape", UGLY, ids=str)
def test_swiglu_of_one_tensor_and_of_two(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    gate, up = (noise(*shape, dtype=dtype, device=device, seed=seed) * 4 for seed in (0, 1))
    want = gate.double() * torch.sigmoid(gate.double()) * up.double()
    assert_close(ops.swiglu(gate, up), want)
    assert_close(ops.silu_mul(torch.cat((gate, up), -1)), want)


def test_strides_change_nothing(dtype: torch.dtype, device: torch.device) -> None:
    wide, weight = noise(6, 40, dtype=dtype, device=device), noise(40, dtype=dtype, device=device)[::2]
    x = wide[::2, :20]
    assert torch.equal(ops.rms_norm(x, weight), ops.rms_norm(x.contiguous(), weight.contiguous()))
    assert torch.equal(ops.silu_mul(x), ops.silu_mul(x.contiguous()))
    assert torch.equal(ops.argmax(x.t()), x.float().argmax(0))


def test_parameters_are_taken_without_a_graph(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = noise(3, 16, dtype=dtype, device=device), noise(16, dtype=dtype, device=device).requires_grad_()
    assert not ops.rms_norm(x, weight).requires_grad
    assert not ops.linear(x, noise(4, 16, dtype=dtype, device=device).requires_grad_()).requires_grad


def test_callers_in_several_threads(dtype: torch.dtype, device: torch.device) -> None:
    inputs = [noise(9, 64 + i, dtype=dtype, device=device) for i in range(16)]

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([ops.rms_norm(x, x[0]) for _ in range(20)])

    with ThreadPoolExecutor(4) as threads:
        for x, found in zip(inputs, threads.map(run, inputs), strict=True):
            assert torch.equal(found, ops.rms_norm(x, x[0]).expand_as(found))


def test_wrong_arguments_are_named(dtype: torch.dtype, device: torch.device) -> None:
    x, other = noise(4, 16, dtype=dtype, device=device), torch.ones(4, 16, dtype=torch.float64, device=device)
    weight = noise(8, dtype=dtype, device=device)
    wrong = DTYPES[1] if dtype == DTYPES[0] else DTYPES[0]
    for call, text in (
        (lambda: ops.add(x, weight), r"add: b must be \[4, 16\] like a, got \[8\]"),
        (lambda: ops.rms_norm(x, weight), r"rms_norm: weight must be \[16\] for x \[4, 16\], got \[8\]"),
        (lambda: ops.rms_norm(x, x[0].to(wrong)), "rms_norm: weight is .* and x is .*; convert"),
        (lambda: ops.rms_norm(other, other[0]), "rms_norm: x must be float32, bfloat16 or float16, got float64"),
        (lambda: ops.add_rms_norm(x, x[:2], x[0]), r"residual must be \[4, 16\] like x, got \[2, 16\]"),
        (lambda: ops.silu_mul(x[:, :3]), r"silu_mul: gate_up \[4, 3\] ends in 3 features"),
        (lambda: ops.swiglu(x, weight), r"swiglu: up must be \[4, 16\] like gate"),
        (lambda: ops.argmax(x[:, :0]), r"x has no features, its shape is \[4, 0\]"),
        (lambda: ops.embedding(x, x), "embedding: ids must be int64 or int32"),
        (lambda: ops.embedding(torch.zeros(1, dtype=torch.int64, device=device), weight), r"\[vocab_size, size\]"),
    ):
        with pytest.raises(ConfigError, match=text):
            call()


def test_an_id_outside_of_the_vocabulary_is_an_error_on_a_cpu(dtype: torch.dtype) -> None:
    weight = noise(11, 4, dtype=dtype, device=torch.device("cpu"))
    for ids, worst in (([3, 11], 11), ([-1, 11], -1)):
        with pytest.raises(ConfigError, match=f"ids holds {worst}; weight has 11 rows, so it must lie in \\[0, 11\\)"):
            ops.embedding(torch.tensor(ids), weight)
