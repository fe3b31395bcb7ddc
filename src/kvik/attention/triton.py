"""Attention for NVIDIA GPUs: the decode kernel for sequences with few queries, the prefill kernel for the others.

step                 work lists, once a step             every layer
seq_lens, starts ──► plan_attention ──► decode items  ──► decode_attention
                                    └─► prefill items ──► prefill_attention
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from kvik.attention.base import ForwardBatch
from kvik.errors import CapacityError, ConfigError
from kvik.kernels.api import KVLayer
from kvik.kernels.triton.attention_decode import decode_attention
from kvik.kernels.triton.attention_plan import ITEM_SIZE, plan_attention
from kvik.kernels.triton.attention_prefill import prefill_attention, tile_queries
from kvik.kernels.triton.attention_tile import HOPPER_TOKENS, TIERS, AttentionTiles, attention_tiles, fits_hopper
from kvik.kernels.triton.features import NO_FEATURES

__all__ = ["AttentionLimits", "TritonAttention"]


@dataclass(frozen=True, slots=True)
class AttentionLimits:
    """The largest step that a `TritonAttention` will see, and the heads of one rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_num_seqs: int
    max_num_tokens: int  # queries of one step
    max_context_tokens: int  # sum of the context lengths of one step
    itemsize: int = 2  # bytes of an element of a head
    block_size: int = 1  # keys of a block of the cache, or a divisor
    max_queries: int = 1  # up to which a sequence is decoded: 1, and one more for each token that is speculated


class TritonAttention:
    """`AttentionBackend` in Triton. Allocates its workspace once; a call allocates its result only.

    A sequence's kernel, its chunks and their order depend on its own lengths, and on how few sequences and tokens the
    step has (`TIERS`, `HOPPER_TOKENS`). A query's result also depends on how its prompt was cut into steps, since that
    decides between the kernels. With `deterministic` neither matters: it is the same in every step, bit for bit.
    Raises ConfigError where more query heads share a key head than a tile has rows.
    """

    def __init__(
        self,
        limits: AttentionLimits,
        device: torch.device,
        *,
        deterministic: bool = False,
        tiles: AttentionTiles | None = None,
        pdl: bool = False,
        tma: bool = False,
        hopper: bool = False,
        shared_bytes: int = NO_FEATURES.shared_bytes,
    ) -> None:
        self.limits, self._pdl, self._tma, self._shared_bytes = limits, pdl, tma, shared_bytes
        self._fixed = tiles or (self._tuned(1, True) if deterministic else None)
        self._group = limits.num_heads // limits.num_kv_heads
        self._hopper = hopper and fits_hopper(self._group, limits.head_dim, limits.itemsize, limits.block_size)
        tiers = [(self._tiles_of(n), n) for n in {*(min(n, limits.max_num_seqs) for n in TIERS), limits.max_num_seqs}]
        self._capacity = max(
            limits.max_context_tokens // tiles.chunk + num_seqs * (1 + tiles.short_len // tiles.short_chunk)
            for tiles, num_seqs in tiers
        )
        fewest = min(tile_queries(self._group, tiles) for tiles, _ in tiers)
        if fewest == 0:
            raise ConfigError(
                f"{limits.num_heads} query heads over {limits.num_kv_heads} key heads are groups of {self._group}; "
                f"attention on GPUs takes groups of up to {min(tiles.prefill_rows for tiles, _ in tiers)}"
            )
        most_tiles = limits.max_num_tokens // fewest + limits.max_num_seqs
        rows = self._group * limits.max_queries
        parts = (self._capacity, limits.num_kv_heads, rows)
        self._parts = torch.empty((*parts, limits.head_dim), dtype=torch.float32, device=device)
        self._stats = torch.empty((*parts, 2), dtype=torch.float32, device=device)
        self._arrivals = torch.zeros((limits.max_num_seqs, limits.num_kv_heads), dtype=torch.int32, device=device)
        self._decode_items = torch.empty((self._capacity, ITEM_SIZE), dtype=torch.int32, device=device)
        self._prefill_items = torch.empty((most_tiles, ITEM_SIZE), dtype=torch.int32, device=device)
        self._counts = torch.zeros(2, dtype=torch.int32, device=device)
        self._next_work = torch.zeros(2, dtype=torch.int32, device=device)
        self._tiles = self._tiles_of(limits.max_num_seqs, limits.max_num_tokens)  # of the step that was prepared last
        self._prepared: ForwardBatch | None = None
        self._decodes = self._prefills = False  # whether that batch has work for the kernel

    def _tiles_of(self, num_seqs: int, num_tokens: int = 0) -> AttentionTiles:
        return self._fixed or self._tuned(num_seqs, False, self._hopper and num_tokens >= HOPPER_TOKENS)

    def _tuned(self, num_seqs: int, deterministic: bool, hopper: bool = False) -> AttentionTiles:
        limits = self.limits
        return attention_tiles(
            limits.head_dim, num_seqs, itemsize=limits.itemsize, deterministic=deterministic, hopper=hopper,
            shared_bytes=self._shared_bytes,
        )  # fmt: skip

    def prepare(self, batch: ForwardBatch, *, any_mix: bool = False) -> None:
        """Build the work lists of a step, before the model computes it. `forward` does it for a batch that it has not
        seen just before, and then overlaps no kernels.

        Whoever captures a graph calls it inside the capture, so that a replay builds the lists from its own lengths.
        A replay runs the kernels that the captured batch needed; those of both kinds of sequences with `any_mix`, for
        which the host's lengths need only be within the limits.
        Raises CapacityError for a step beyond the limits.
        """
        limits = self.limits
        asked = (batch.num_seqs, batch.query_starts_host[-1], sum(batch.seq_lens_host))
        given = (limits.max_num_seqs, limits.max_num_tokens, limits.max_context_tokens)
        if any(map(int.__gt__, asked, given)):
            raise CapacityError(
                f"attention was set up for (sequences, tokens, context tokens) of {given} and got a step of {asked}"
            )
        self._tiles = self._tiles_of(batch.num_seqs, batch.query_starts_host[-1])
        plan_attention(
            batch.query_starts, batch.seq_lens, self._decode_items, self._prefill_items, self._counts,
            max_seqs=limits.max_num_seqs, max_queries=limits.max_queries, tiles=self._tiles,
            tile_queries=tile_queries(self._group, self._tiles),
        )  # fmt: skip
        counts = [end - start for start, end in itertools.pairwise(batch.query_starts_host)]
        self._decodes = any_mix or any(0 < count <= limits.max_queries for count in counts)
        self._prefills = any_mix or any(count > limits.max_queries for count in counts)
        self._prepared = batch

    def forward(self, q: Tensor, kv: KVLayer, batch: ForwardBatch, *, scale: float, window: int | None) -> Tensor:
        # Decoding reads the work list before it waits for what comes before.
        pdl = self._pdl and batch is self._prepared
        if batch is not self._prepared:
            self.prepare(batch)
        q = q.contiguous()
        out = torch.empty_like(q)
        if self._decodes:
            decode_attention(
                q, kv.k, kv.v, out, parts=self._parts, stats=self._stats, arrivals=self._arrivals,
                items=self._decode_items, counts=self._counts, query_starts=batch.query_starts,
                block_tables=batch.block_tables, scale=scale, window=window,
                max_queries=self.limits.max_queries, tiles=self._tiles, pdl=pdl, tma=self._tma,
            )  # fmt: skip
        if self._prefills:
            prefill_attention(
                q, kv.k, kv.v, out, items=self._prefill_items, counts=self._counts, query_starts=batch.query_starts,
                next_work=self._next_work,
                block_tables=batch.block_tables, scale=scale, window=window,
                tiles=self._tiles, pdl=self._pdl, tma=self._tma,
            )  # fmt: skip
        return out
