"""`kvik.ops` over the Triton kernels: each operator gives what it gives on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from linear_cases import DTYPES, noise

from kvik import ops
from kvik.ops import devices
from kvik.ops.gpu import GpuOperators

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the largest element, at least 1
CPU = torch.device("cpu")


class Inputs:
    """The same random tensors on any device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device

    def __call__(self, *shape: int, seed: int = 0) -> Tensor:
        return noise(*shape, dtype=self.dtype, device=self.device, seed=seed)

    def arange(self, n: int) -> Tensor:
        return torch.arange(n, device=self.device)

    def cache(self, block_size: int = 16) -> ops.KVLayer:
        return ops.KVLayer(self(6, 2, block_size, 8, seed=1), self(6, 2, block_size, 8, seed=2))


def rotated_and_stored(x: Inputs) -> Any:
    kv = x.cache()
    q = ops.qk_norm_rope_store(
        x(5, 64), *ops.rope_angles(x.arange(5), 8), x.arange(5) + 14, kv, x(8), x(8, seed=1), eps=1e-6
    )
    return q, kv.k, kv.v


def paged(x: Inputs) -> Tensor:
    batch = ops.PagedBatch([1, 20, 0], [40, 25, 3], torch.tensor([[0, 3, 1], [2, 5, 4], [1, 1, 1]], device=x.device))
    return ops.paged_attention(x(21, 4, 8), x.cache(), batch)


CALLS: dict[str, Callable[[Inputs], Any]] = {
    "add": lambda x: ops.add(x(3, 5), x(3, 5, seed=1)),
    "argmax": lambda x: ops.argmax(x(3, 2, 70)),
    "embedding": lambda x: ops.embedding(x.arange(6).view(2, 3), x(9, 33)),
    "rms_norm": lambda x: ops.rms_norm(x(3, 2, 33), x(33)),
    "add_rms_norm": lambda x: ops.add_rms_norm(x(3, 2, 33), x(3, 2, 33, seed=1), x(33)),
    "silu_mul": lambda x: ops.silu_mul(x(3, 2, 34)),
    "swiglu": lambda x: ops.swiglu(x(3, 17), x(3, 17, seed=1)),
    "linear": lambda x: ops.linear(x(2, 3, 24), x(36, 24) / 5, x(36)),
    "linear_add": lambda x: ops.linear_add(x(2, 3, 24), x(36, 24) / 5, x(2, 3, 36)),
    "norm_linear": lambda x: ops.norm_linear(x(2, 24), x(24), x(36, 24) / 5),
    "norm_linear_swiglu": lambda x: ops.norm_linear_swiglu(x(2, 24), x(24), x(36, 24) / 5),
    "rope": lambda x: ops.rope(x(5, 3, 20), *ops.rope_angles(x.arange(5), 20)),
    "qk_norm_rope_store": rotated_and_stored,
    "paged_attention": paged,
    "self_attention of one query": lambda x: ops.self_attention(x(2, 1, 6, 20), x(2, 70, 2, 20), x(2, 70, 2, 20) / 2),
    "self_attention of many": lambda x: ops.self_attention(x(33, 6, 20), x(70, 2, 20), x(70, 2, 20) / 2, window=40),
    "sample": lambda x: ops.sample(x(4, 300) * 3, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=3, position=5),
    "sample the best": lambda x: ops.sample(x(4, 300), temperature=0, top_k=3),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_operator_gives_what_it_gives_on_a_cpu(
    name: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = CALLS[name](Inputs(dtype, CPU))
    monkeypatch.setattr(devices, "_operators", lambda device, threads: GpuOperators(device))
    found = CALLS[name](Inputs(dtype, device))
    pairs = zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]
    for got, want in pairs:
        assert got.shape == want.shape and got.dtype == want.dtype and got.device.type == device.type
        scale = max(1.0, float(want.double().abs().max()))
        atol = TOLERANCE[dtype] * scale if want.is_floating_point() else 0
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=atol)


def test_a_negative_slot_writes_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_operators", lambda device, threads: GpuOperators(device))
    monkeypatch.setattr("kvik.ops.attention.check_below", lambda *args: None)  # the interpreter's tensors are on a CPU
    x = Inputs(torch.float32, device)
    kv = x.cache()
    ops.qk_norm_rope_store(x(2, 64), *ops.rope_angles(x.arange(2), 8), x.arange(2) - 2, kv)
    assert torch.equal(kv.k, x.cache().k) and torch.equal(kv.v, x.cache().v)
