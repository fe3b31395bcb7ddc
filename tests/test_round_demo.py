"""Training the demo model with rounding in the loop: the grid of its weights, and its idea of what the kernels do."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kvik.quantization import reference

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "src" / "kvik" / "assets" / "demo"


@pytest.fixture(scope="module")
def tool() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        before = set(sys.modules)
        yield importlib.import_module("round_demo")
        for name in {"round_demo", "train_demo"} - before:
            del sys.modules[name]


@pytest.mark.parametrize("fmt", ["int8", "int4g32"])
def test_weights_on_the_grid_survive_both_formats(fmt: str, tool: ModuleType) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 64)[:, None]
    weight[3, 32:64] = 0
    units, scale = tool.on_grid(weight, True)
    assert torch.equal(units, units.round()) and int(units.abs().max()) == 127
    assert float((units * scale - weight).norm() / weight.norm()) < 0.12
    again, again_scale = tool.on_grid(units * scale, True)
    assert torch.equal(again, units) and torch.allclose(again_scale, scale)

    def error(plain: Tensor) -> float:
        found = reference.dequantize(*reference.quantize(plain, fmt), fmt)
        return float((found - plain).norm() / plain.norm())

    made = (units * scale).bfloat16()
    assert torch.equal(made.float(), units * scale)
    assert error(made.float()) <= (0 if fmt == "int8" else 0.006) < 0.5 * error(weight)


def test_a_projection_with_int8_activations_is_that_of_the_reference(tool: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, generator=generator).requires_grad_()
    weight = tool.stored("int8", torch.device("cpu"))(torch.randn(32, 64, generator=generator), False)
    out, spread = tool.linear(x, weight.tensors(), "int8", torch.float32)
    q, scales = reference.quantize_rows(x.detach())
    torch.testing.assert_close(out, (q.float() * scales) @ weight.plain.T)
    torch.testing.assert_close(spread, (x.abs().amax(1) / x.square().mean(1).sqrt()).square().mean())
    fine, _ = tool.linear(x, weight.tensors(), "fine", torch.float32)
    torch.testing.assert_close(fine, x @ weight.plain.T, rtol=0, atol=5e-3)
    torch.autograd.backward(out.sum())
    assert x.grad is not None and torch.allclose(x.grad, weight.plain.sum(0).expand_as(x), atol=0.5)


def test_measuring_the_demo_model_sees_what_receipts_see(tool: ModuleType) -> None:
    import train_demo

    model = train_demo.load_model(DEMO, torch.device("cpu"), torch.float32)
    ids = torch.randint(0, 6144, (2, 64), generator=torch.Generator().manual_seed(0))
    plain = tool.measure(model, ids)
    snapped = tool.measure(tool.snapped(model), ids)
    assert 0.9 < plain["int8_top1"] <= 1 and 0 < plain["int8_kl"] < 0.05
    assert snapped["int4_kl"] < 0.05
