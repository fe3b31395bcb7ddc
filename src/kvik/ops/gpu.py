"""The operators on NVIDIA GPUs: the Triton kernels of an engine, called on their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvik.attention.base import ForwardBatch
from kvik.attention.triton import AttentionLimits, TritonAttention
from kvik.errors import ConfigError
from kvik.kernels.api import KVLayer
from kvik.kernels.triton.attention_tile import attention_tiles
from kvik.kernels.triton.features import Features
from kvik.kernels.triton.ops import TritonOps
from kvik.kernels.triton.sampler import MASKED, sample
from kvik.kernels.triton.sampling_table import SamplingTable, SamplingWorkspace
from kvik.ops.devices import Batch
from kvik.sampling_params import SamplingParams

__all__ = ["GpuOperators"]


class GpuOperators(TritonOps):
    """`kvik.ops.devices.Operators` in Triton; argmax is torch's.

    No kernel overlaps its predecessor here: an engine's kernels read weights before that one has ended, and on its own
    an operator cannot know that the predecessor does not write them.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, features=Features.of(device)._replace(pdl=False))

    def argmax(self, x: Tensor) -> Tensor:
        return x.argmax(-1)

    def attention(self, q: Tensor, kv: KVLayer, batch: Batch, scale: float, window: int | None) -> Tensor:
        heads = (q.shape[1], kv.k.shape[1], kv.k.shape[3])
        key = (*heads, q.dtype)
        backend = batch.backends.get(key)
        if backend is None:
            backend = batch.backends[key] = _attention(heads, q.dtype, batch.step)
        return backend.forward(q, kv, batch.step, scale=scale, window=window)

    def sample(self, logits: Tensor, params: SamplingParams, seed: int, position: int) -> Tensor:
        num_rows, vocab = logits.shape
        table = SamplingTable.zeros(
            num_rows, 1, vocab, logits.device, max_biases=1, max_stops=1, max_words=1, max_word_len=1
        )
        rows = torch.arange(num_rows, dtype=torch.int32, device=logits.device)
        table.seed.copy_(rows).add_(seed)
        table.num_tokens.fill_(position)
        table.temperature.fill_(params.temperature)
        table.top_k.fill_(params.top_k)
        table.top_p.fill_(params.top_p)
        table.log_min_p.fill_(math.log(params.min_p) if params.min_p else -math.inf)
        drawn = not params.greedy
        tokens = sample(
            logits, rows, table, SamplingWorkspace(num_rows, vocab, logits.device), edits=False,
            top_k=drawn and params.top_k > 0, top_p=drawn and params.top_p < 1, min_p=drawn and params.min_p > 0,
        )  # fmt: skip
        return tokens.long().clamp(min=MASKED)


def _attention(heads: tuple[int, int, int], dtype: torch.dtype, step: ForwardBatch) -> TritonAttention:
    """Attention with a workspace for this step and nothing larger."""
    group, most = heads[0] // heads[1], attention_tiles(heads[2], itemsize=dtype.itemsize).prefill_rows
    if group > most:
        raise ConfigError(f"attention: {group} query heads share a key head, and the kernels have room for {most}")
    limits = AttentionLimits(
        *heads, max_num_seqs=step.num_seqs, max_num_tokens=step.query_starts_host[-1],
        max_context_tokens=sum(step.seq_lens_host), itemsize=dtype.itemsize,
    )  # fmt: skip
    device = step.query_starts.device
    return TritonAttention(limits, device, shared_bytes=Features.of(device).shared_bytes)
