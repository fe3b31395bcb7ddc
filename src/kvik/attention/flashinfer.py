"""Attention by FlashInfer (Ye et al., arXiv 2501.01005), an optional package. The one module that imports it.

    sequences of a step   | one query each, as the decodes that come first | the others                        |
    FlashInfer's kernel   | FA2: a context is cut up to fill the GPU       | FA3 on Hopper, elsewhere FA2      |

FlashInfer plans a step on the host, from exact lengths. A CUDA graph of a step serves other lengths, which only the
device knows, so steps that use this backend are no graphs. nvcc compiles the kernels when they are first planned.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvik.attention.base import ForwardBatch
from kvik.errors import ConfigError
from kvik.kernels.api import KVLayer

if TYPE_CHECKING:
    from kvik.attention.triton import AttentionLimits

__all__ = ["FlashInferAttention", "flashinfer_obstacle"]

_HEAD_DIMS = (64, 128, 256)
_MOST_PROCESSORS = 192  # of a GPU; a context is cut for two programs on each
_TILE_ROWS = 128  # of the largest tile of a part of a context


def flashinfer_obstacle(head_dim: int, dtype: torch.dtype, *, deterministic: bool) -> str | None:
    """Why FlashInfer cannot compute attention for heads of `head_dim` elements of `dtype`, and what to do about it.

    None where it can. Imports it.
    """
    try:
        importlib.import_module("flashinfer")
    except ImportError as error:
        return f"it cannot be imported ({error}): pip install 'kvik[flashinfer]'"
    if head_dim not in _HEAD_DIMS:
        return f"it has kernels for a head_dim of {', '.join(map(str, _HEAD_DIMS))}; this model has {head_dim}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not {dtype}; leave dtype out"
    if deterministic:
        return "where it cuts a context depends on the other sequences, so deterministic=True cannot be kept"
    return None


class FlashInferAttention:
    """`AttentionBackend` over FlashInfer, for 16-bit heads. The layers of a window share a plan."""

    def __init__(self, limits: AttentionLimits, device: torch.device) -> None:
        self.limits = limits
        parts = 2 * _MOST_PROCESSORS * (limits.num_heads // limits.num_kv_heads)
        rows = parts * _TILE_ROWS  # at most, of all parts of contexts; each a result and its weight, in fp32
        self._workspace = torch.empty(rows * (limits.head_dim + 1) * 4, dtype=torch.uint8, device=device)
        self._planners: dict[tuple[str, float, int | None], _Planner] = {}
        self._plans: dict[tuple[float, int | None], list[tuple[_Planner, slice]]] = {}  # of the prepared batch
        self._prepared: ForwardBatch | None = None

    def prepare(self, batch: ForwardBatch, *, any_mix: bool = False) -> None:
        """Begin a step. Its lengths on the host are exact, and every sequence has queries."""
        assert not any_mix, "a step whose lengths only the device knows cannot be planned"
        self._prepared = batch
        self._plans.clear()

    def forward(self, q: Tensor, kv: KVLayer, batch: ForwardBatch, *, scale: float, window: int | None) -> Tensor:
        q = q.contiguous()
        out = torch.empty_like(q)
        if q.is_meta:  # where Triton's kernels are compiled; these are not
            return out
        if batch is not self._prepared:
            self.prepare(batch)
        plan = self._plans.get((scale, window))
        if plan is None:
            plan = self._plans[scale, window] = self._plan(q, kv, batch, scale, window)
        for planner, tokens in plan:
            planner.wrapper.run(q[tokens], (kv.k, kv.v), out=out[tokens])
        return out

    def _plan(
        self, q: Tensor, kv: KVLayer, batch: ForwardBatch, scale: float, window: int | None
    ) -> list[tuple[_Planner, slice]]:
        """What computes which tokens of the step."""
        starts, num_seqs = batch.query_starts_host, batch.num_seqs
        decodes = next((i for i in range(num_seqs) if starts[i + 1] - starts[i] != 1), num_seqs)
        plan = []
        for kernel, seqs in (("fa2", slice(0, decodes)), ("auto", slice(decodes, num_seqs))):
            if seqs.start < seqs.stop:
                key = kernel, scale, window
                planner = self._planners.get(key)
                if planner is None:
                    planner = self._planners[key] = _Planner(self._workspace, kernel, scale, window)
                planner.plan(q, kv, batch, seqs)
                plan.append((planner, slice(starts[seqs.start], starts[seqs.stop])))
        return plan


class _Planner:
    """A wrapper of FlashInfer for one kernel, scale and window."""

    def __init__(self, workspace: Tensor, kernel: str, scale: float, window: int | None) -> None:
        flashinfer: Any = importlib.import_module("flashinfer")
        self.wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend=kernel)
        self._scale, self._window_left = scale, -1 if window is None else window - 1
        self._copied = torch.Event(workspace.device)
        self._compiled = False

    def plan(self, q: Tensor, kv: KVLayer, batch: ForwardBatch, seqs: slice) -> None:
        """Plan these sequences of the step. Raises ConfigError if the kernels cannot be compiled."""
        block_size = kv.k.shape[2]
        starts = torch.tensor(batch.query_starts_host[seqs.start : seqs.stop + 1], dtype=torch.int32)
        lens = torch.tensor(batch.seq_lens_host[seqs], dtype=torch.int32)
        block_starts = torch.zeros(len(starts), dtype=torch.int32)
        torch.cumsum((lens + block_size - 1) // block_size, 0, out=block_starts[1:])
        blocks = _blocks(batch.block_tables[seqs], batch.seq_lens[seqs], block_size, int(block_starts[-1]))
        # A plan is copied to the device from memory that the next one overwrites, and the host may be a step ahead.
        self._copied.synchronize()
        try:
            self.wrapper.plan(
                starts - starts[0], block_starts, blocks, (lens - 1) % block_size + 1, q.shape[1], kv.k.shape[1],
                q.shape[2], block_size, causal=True, sm_scale=self._scale, window_left=self._window_left,
                q_data_type=q.dtype, kv_data_type=kv.k.dtype,
            )  # fmt: skip
        except (RuntimeError, OSError) as error:
            if self._compiled:
                raise
            raise ConfigError(
                "attention_backend='flashinfer': its kernels could not be compiled, which takes nvcc and ninja, or the"
                f" package flashinfer-jit-cache, which has them: {error}"
            ) from error
        self._compiled = True
        self._copied.record()


def _blocks(tables: Tensor, seq_lens: Tensor, block_size: int, total: int) -> Tensor:
    """The blocks of all sequences one after the other: [total] int32, from `tables` [num_seqs, max_blocks]."""
    counts = (seq_lens + block_size - 1) // block_size
    seqs = torch.repeat_interleave(counts, output_size=total)
    first = counts.cumsum(0) - counts
    return tables[seqs, torch.arange(total, device=tables.device) - first[seqs]]
