"""A whole decoder on Triton's operations against the same decoder on torch's: prefill, mixed step, decode."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from linear_cases import noise

from kvik.attention.base import ForwardBatch
from kvik.attention.reference import ReferenceAttention
from kvik.kernels.api import KVLayer, LinearWeight, Ops
from kvik.kernels.reference import ReferenceOps
from kvik.kernels.triton.dispatch import Plan, RowPlan, Rule, Table
from kvik.kernels.triton.ops import TritonOps
from kvik.layers.rope import RopeSpec, RopeTable
from kvik.models.decoder import Decoder, DecoderWeights, allocate_layer
from kvik.models.spec import DecoderSpec

BLOCK = 16
TABLE = Table(
    rules=(Rule(plan=Plan(path="gemv", block_n=64), max_m=4), Rule(plan=Plan(path="skinny", block_n=64, block_k=32))),
    deterministic=(),
    rows=(Rule(plan=RowPlan(block=16)),),
)


def model(device: torch.device, dtype: torch.dtype, qk_norm: bool, bias: bool) -> tuple[DecoderSpec, DecoderWeights]:
    spec = DecoderSpec(
        architecture="tiny", vocab_size=96, hidden_size=48, intermediate_size=80, num_layers=2, num_heads=6,
        num_kv_heads=2, head_dim=20, rms_norm_eps=1e-6, max_position_embeddings=64, windows=(None, None),
        rope=RopeSpec("default", 20, 10000.0), qk_norm=qk_norm, qkv_bias=bias, o_bias=bias, mlp_bias=bias,
    )  # fmt: skip
    layers = tuple(allocate_layer(spec, dtype, device) for _ in range(spec.num_layers))
    embedding, final = torch.empty(96, 48, dtype=dtype, device=device), torch.empty(48, dtype=dtype, device=device)
    weights = DecoderWeights(embedding, layers, final, LinearWeight(embedding))
    for i, tensor in enumerate(weights.tensors()):
        values = noise(*tensor.shape, dtype=torch.float32, device=device, seed=i)
        tensor.copy_(values / tensor.shape[1] ** 0.5 if tensor.ndim == 2 else 1.0 + 0.2 * values)
    return spec, weights


def run(decoder: Decoder, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Logits of three steps; each lists (sequence, tokens before, tokens now)."""
    shape = (8, decoder.spec.num_kv_heads, BLOCK, decoder.spec.head_dim)
    kv = [KVLayer(*(torch.zeros(shape, dtype=dtype, device=device) for _ in "kv")) for _ in decoder.spec.windows]
    steps = []
    for work in ([(0, 0, 20)], [(0, 20, 1), (1, 0, 9)], [(0, 21, 1), (1, 9, 1), (2, 0, 1)]):
        positions = [p for _, before, now in work for p in range(before, before + now)]
        slots = [2 * i * BLOCK + p for i, before, now in work for p in range(before, before + now)]
        starts, lens = [0, *accumulate(now for *_, now in work)], [before + now for _, before, now in work]
        batch = ForwardBatch(
            input_ids=torch.tensor([(7 * p + s) % 96 for p, s in zip(positions, slots, strict=True)], device=device),
            positions=torch.tensor(positions, device=device),
            slots=torch.tensor(slots, device=device),
            query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
            seq_lens=torch.tensor(lens, dtype=torch.int32, device=device),
            block_tables=torch.tensor([[2 * i, 2 * i + 1] for i, *_ in work], dtype=torch.int32, device=device),
            logit_indices=torch.tensor([s - 1 for s in starts[1:]], device=device),
            query_starts_host=tuple(starts),
            seq_lens_host=tuple(lens),
        )
        steps.append(decoder.logits(decoder.forward(batch, kv)))
    return steps


@pytest.mark.parametrize(
    ("dtype", "qk_norm", "tolerance"), [(torch.float32, False, 1e-5), (torch.bfloat16, True, 3e-2)]
)
def test_decoder(dtype: torch.dtype, qk_norm: bool, tolerance: float, device: torch.device) -> None:
    spec, weights = model(device, dtype, qk_norm, bias=not qk_norm)
    rope, attention = RopeTable(spec.rope, 64, device), ReferenceAttention()
    implementations: tuple[Ops[Any], Ops[Any]] = (TritonOps(device, table=TABLE), ReferenceOps())
    got, want = (run(Decoder(spec, weights, rope, ops, attention), dtype, device) for ops in implementations)
    for mine, reference in zip(got, want, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=tolerance * float(reference.abs().max()))
