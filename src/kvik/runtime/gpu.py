"""The parts of an engine on a GPU put together, and what they take beside weights and KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from kvik.attention.flashinfer import FlashInferAttention
from kvik.attention.triton import AttentionLimits, TritonAttention
from kvik.kernels.triton.dispatch import Case, load_table
from kvik.kernels.triton.features import Features
from kvik.kernels.triton.sampling_table import SamplingTable, SamplingWorkspace
from kvik.kernels.triton.state import DecodeInputs
from kvik.models.decoder import Decoder
from kvik.models.spec import DecoderSpec
from kvik.runtime.decode_step import DecodeStep
from kvik.runtime.device_table import DeviceTable
from kvik.runtime.gpu_runner import GpuRunner
from kvik.runtime.graphs import GraphPool
from kvik.runtime.kv_pool import KVPool
from kvik.runtime.mixed_step import GpuAttention, MixedStep
from kvik.structured.grammars import Grammars
from kvik.tracing import NO_TRACE, NoTrace

__all__ = ["build_gpu_runner", "gpu_attention", "partial_bytes", "workspace_bytes"]


def gpu_attention(
    spec: DecoderSpec, num_seqs: int, num_tokens: int, max_model_len: int, device: torch.device, *,
    dtype: torch.dtype, deterministic: bool, block_size: int = 1, features: Features | None = None,
    backend: str = "auto",
) -> GpuAttention:  # fmt: skip
    """Attention for steps of `num_tokens` tokens of `num_seqs` sequences, each of up to `max_model_len`, over blocks of
    a multiple of `block_size` keys. `features` says what the GPU has where `device` is not it; `backend` is flashinfer,
    or triton, which is auto."""
    limits = AttentionLimits(
        num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, max_num_seqs=num_seqs,
        max_num_tokens=num_tokens, max_context_tokens=num_seqs * max_model_len,
        itemsize=dtype.itemsize, block_size=block_size,
    )  # fmt: skip
    if backend == "flashinfer":
        return FlashInferAttention(limits, device)
    pdl, hopper, shared_bytes = Features.of(device) if features is None else features
    return TritonAttention(
        limits, device, deterministic=deterministic, pdl=pdl, tma=pdl, hopper=hopper, shared_bytes=shared_bytes
    )


def build_gpu_runner(
    model: Decoder, pool: KVPool, num_seqs: int, max_model_len: int, *, use_graphs: bool, tracer: NoTrace = NO_TRACE,
    grammars: Grammars | None = None,
) -> GpuRunner:  # fmt: skip
    """A runner of `model`, which computes with `TritonOps` and `gpu_attention`, over the cache in `pool`."""
    vocab_size, device = model.spec.vocab_size, pool.layers[0].k.device
    attention = model.attention
    assert isinstance(attention, GpuAttention)
    table = DeviceTable(num_seqs, max_model_len, pool.block_size, vocab_size, device, grammars)
    work = SamplingWorkspace(num_seqs, vocab_size, device)
    graphs = GraphPool() if use_graphs else None
    decode = None  # only mixed steps know on the host how long each sequence is
    if isinstance(attention, TritonAttention):
        decode = DecodeStep(model, attention, pool, table, work, graphs)
    mixed = MixedStep(model, attention, pool, table, graphs)
    return GpuRunner(model, table, decode, mixed, work, tracer)


def workspace_bytes(
    spec: DecoderSpec, dtype: torch.dtype, num_seqs: int, num_tokens: int, max_model_len: int, block_size: int,
    *, deterministic: bool, backend: str = "auto",
) -> int:  # fmt: skip
    """Bytes of the tensors that live as long as an engine, weights and KV cache excepted.

    They are built on torch's meta device, where tensors have sizes and no memory: there is no second formula to keep.
    """
    meta = torch.device("meta")
    attention = gpu_attention(
        spec, num_seqs, num_tokens, max_model_len, meta, dtype=dtype, deterministic=deterministic, backend=backend
    )
    table = DeviceTable(num_seqs, max_model_len, block_size, spec.vocab_size, meta)
    work = SamplingWorkspace(num_seqs, spec.vocab_size, meta)
    inputs = DecodeInputs.empty(num_seqs, table.block_table.shape[1], meta)
    fields = [getattr(table.fields, name) for name in SamplingTable.__slots__]
    fields += [getattr(inputs, name) for name in DecodeInputs.__slots__]
    tensors = [*vars(attention).values(), *vars(table).values(), *vars(work).values(), *fields]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def partial_bytes(spec: DecoderSpec, dtype: torch.dtype, num_tokens: int, num_seqs: int) -> int:
    """Bytes of the largest partial sums that a deterministic step of `num_tokens` tokens of `num_seqs` sequences has.

    Its projections split K, if at all, for every number of tokens; otherwise only those of few tokens do.
    """
    hidden, inner, table = spec.hidden_size, spec.intermediate_size, load_table("any")
    projections = (
        ("norm_linear", num_tokens, spec.q_size + 2 * spec.kv_size, hidden),
        ("linear_add", num_tokens, hidden, spec.q_size),
        ("norm_linear_swiglu", num_tokens, inner, hidden),
        ("linear_add", num_tokens, hidden, inner),
        ("linear", num_seqs, spec.vocab_size, hidden),
    )
    largest = 0
    for op, m, n, k in projections:
        split_k = table.plan(Case(op, m, n, k, str(dtype).removeprefix("torch.")), deterministic=True).split_k
        rows = 2 * n if op == "norm_linear_swiglu" else n
        largest = max(largest, split_k * m * rows * 4 if split_k > 1 else 0)
    return largest
