"""Projections, alone and fused, plain and packed, against float64."""

from __future__ import annotations

import pytest
import torch
from op_cases import DTYPES, assert_close, noise, norm64
from torch import Tensor

from kvik import ConfigError, ops
from kvik.kernels.cpu.native import available
from kvik.kernels.cpu.packing import FORMATS

EPS = 1e-6
SHAPES = [(1, 16, 8), (2, 3, 4), (5, 36, 24), (17, 66, 123), (64, 128, 80), (70, 48, 64), (0, 6, 4)]  # tokens, out, in
CPU = torch.device("cpu")

needs_kernels = pytest.mark.skipif(not available(), reason="Kvik was built without its compiled kernels")


def scaled(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return noise(*shape, dtype=torch.float32, device=device, seed=seed).mul(shape[-1] ** -0.5).to(dtype)


def silu_mul64(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projections(shape: tuple[int, int, int], dtype: torch.dtype, biased: bool, device: torch.device) -> None:
    m, n, k = shape
    x, norm = noise(m, k, dtype=dtype, device=device), noise(k, dtype=dtype, device=device)
    weight = scaled(n, k, dtype=dtype, device=device)
    bias = noise(n, dtype=dtype, device=device, seed=1) if biased else None
    residual = noise(m, n, dtype=dtype, device=device, seed=2)

    def linear64(x: Tensor) -> Tensor:
        return x.double() @ weight.double().T + (0 if bias is None else bias.double())

    assert_close(ops.linear(x, weight, bias), linear64(x))
    assert_close(ops.norm_linear(x, norm, weight, bias, eps=EPS), linear64(norm64(x, norm, EPS)))
    assert_close(ops.linear_add(x, weight, residual, bias), residual.double() + linear64(x))
    if n % 2 == 0:
        want = silu_mul64(linear64(norm64(x, norm, EPS)))
        assert_close(ops.norm_linear_swiglu(x, norm, weight, bias, eps=EPS), want)


def test_leading_dimensions_and_a_linear_weight(device: torch.device) -> None:
    x, weight = noise(2, 3, 16, dtype=torch.float32, device=device), noise(8, 16, dtype=torch.float32, device=device)
    residual, bias = (noise(*shape, dtype=torch.float32, device=device) for shape in ((2, 3, 8), (8,)))
    want = x.double() @ weight.double().T + bias.double()
    assert_close(ops.linear(x, ops.LinearWeight(weight, bias)), want)
    assert_close(ops.linear_add(x, weight, residual, bias), want + residual.double())
    assert_close(ops.linear(x[0, 0], weight, bias), want[0, 0])


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = shape
    x, norm = noise(m, k, dtype=dtype, device=CPU), noise(k, dtype=dtype, device=CPU)
    weight, bias = scaled(n, k, dtype=dtype, device=CPU), noise(n, dtype=dtype, device=CPU)
    residual, packed = noise(m, n, dtype=dtype, device=CPU, seed=2), ops.pack(weight, bias)
    want = x.double() @ weight.double().T + bias.double()
    assert_close(ops.linear(x, packed), want)
    assert_close(ops.linear_add(x, packed, residual), residual.double() + want)
    normed = norm64(x, norm, EPS) @ weight.double().T + bias.double()
    assert_close(ops.norm_linear(x, norm, packed, eps=EPS), normed)
    if n % 2 == 0:
        both = ops.pack(weight, bias, swiglu=True)
        assert_close(ops.norm_linear_swiglu(x, norm, both, eps=EPS), silu_mul64(normed))


@needs_kernels
@pytest.mark.parametrize("fmt", FORMATS)
def test_formats_cost_what_they_round(fmt: str) -> None:
    x, weight = noise(9, 256, dtype=torch.float32, device=CPU), scaled(64, 256, dtype=torch.float32, device=CPU)
    want = x.double() @ weight.double().T
    error = (ops.linear(x, ops.pack(weight, format=fmt)).double() - want).norm() / want.norm()
    most = {"fp32": 1e-6, "bf16": 5e-3, "int8": 2e-2, "int4g32": 0.12, "int4g128": 0.15}[fmt]
    assert most / 1000 < error < most


def test_wrong_arguments_are_named(device: torch.device) -> None:
    x, weight = noise(4, 16, dtype=torch.float32, device=device), noise(8, 16, dtype=torch.float32, device=device)
    for call, text in (
        (lambda: ops.linear(x, weight.t().contiguous()), r"x \[4, 16\] ends in 16 features and weight takes 8"),
        (lambda: ops.linear(x, weight.half()), "linear: weight is float16 and x is float32"),
        (lambda: ops.linear(x, noise(16, 8, dtype=x.dtype, device=device).t()), r"weight has strides \(1, 8\)"),
        (lambda: ops.linear(x, weight, x[0]), r"linear: bias must be \[8\] for weight \[8, 16\], got \[16\]"),
        (lambda: ops.linear(x, weight[0]), r"weight must be \[out_features, in_features\], got \[16\]"),
        (lambda: ops.linear(x, ops.LinearWeight(weight), x[0]), "beside a LinearWeight"),
        (lambda: ops.linear_add(x, weight, x), r"linear_add: residual must be \[4, 8\]"),
        (lambda: ops.norm_linear(x, weight, weight), r"norm_linear: norm must be \[16\] for x \[4, 16\]"),
        (lambda: ops.norm_linear_swiglu(x, x[0], weight[:7]), "weight has 7 rows"),
        (lambda: ops.pack(weight, format="int9"), r"unknown format 'int9' \(did you mean 'int8'\?\)"),
    ):
        with pytest.raises(ConfigError, match=text):
            call()


@needs_kernels
def test_what_is_packed_has_one_use() -> None:
    x, weight = noise(4, 16, dtype=torch.float32, device=CPU), noise(8, 16, dtype=torch.float32, device=CPU)
    plain, both = ops.pack(weight), ops.pack(weight, swiglu=True)
    for call, text in (
        (lambda: ops.linear(x, both), "pack the weight without SwiGLU"),
        (lambda: ops.norm_linear_swiglu(x, x[0], plain), "pack the weight for SwiGLU"),
        (lambda: ops.linear(x, plain, x[0, :8]), "beside a packed weight"),
    ):
        with pytest.raises(ConfigError, match=text):
            call()


@pytest.mark.gpu
def test_weights_are_packed_for_a_cpu_only() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    weight = noise(8, 16, dtype=torch.float32, device=torch.device("cuda", 0))
    with pytest.raises(ConfigError, match="only CPU kernels take packed weights"):
        ops.pack(weight)
