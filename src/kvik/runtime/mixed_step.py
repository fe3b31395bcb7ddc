"""The forward pass of a step that has prompts in it: one CUDA graph per number of tokens, eager where padding costs.

    packed  | row of each token | position | row of each sequence | starts | ends | tokens that give hidden states |

All that a step needs comes to the device in one copy. For a graph each part is padded to the largest that it can be:
tokens of row -1 write no key and belong to no sequence, sequences without tokens are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.attention.base import ForwardBatch
from kvik.attention.flashinfer import FlashInferAttention
from kvik.attention.triton import TritonAttention
from kvik.models.decoder import Decoder
from kvik.runtime.device_table import NO_SLOT, DeviceTable, upload, upload_parts
from kvik.runtime.graphs import Graph, GraphPool
from kvik.runtime.kv_pool import KVPool

__all__ = ["GpuAttention", "MixedParts", "MixedStep", "graph_size", "graph_sizes"]

_FINE = 2048
_LEAST = 7 / 8  # of the tokens of a graph, above _FINE


def graph_sizes(budget: int) -> tuple[int, ...]:
    """Numbers of tokens that graphs are captured for, up to the `budget` of a step: powers of two up to 256, then every
    128 up to 1024, every 256 up to 2048, every 1024. A matrix product of a few hundred tokens takes as long as it has
    tokens, and beside many sequences that decode, most steps with a prompt are of that size."""
    fine = (*range(384, 1024, 128), *range(1024, _FINE, 256))
    sizes = (16, 32, 64, 128, 256, *fine, *range(_FINE, budget, 1024))
    return (*(size for size in sizes if size < budget), budget)


def graph_size(num_tokens: int, sizes: Sequence[int]) -> int | None:
    """Which of `sizes` a step is padded to. None where padding would cost more time than launching kernel by kernel."""
    size = next((size for size in sizes if size >= num_tokens), None)
    return size if size is not None and (size <= _FINE or num_tokens >= _LEAST * size) else None


GpuAttention: TypeAlias = TritonAttention | FlashInferAttention
Ints: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MixedParts:
    """A step in table rows and positions, on the host."""

    rows: Ints  # [num_tokens]
    positions: Ints  # [num_tokens]
    seq_rows: Ints  # [num_seqs]
    starts: Ints  # [num_seqs + 1], the first token of each sequence
    ends: Ints  # [num_seqs], context length including the tokens of this step
    logit_indices: Ints  # tokens whose hidden state is wanted
    rope_lens: Ints | None = None  # [num_tokens], see `ForwardBatch`


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph, what it reads, and what it leaves."""

    graph: Graph
    packed: Tensor
    hidden: Tensor  # [max_num_seqs, hidden_size]


class MixedStep:
    """Computes mixed steps of the rows of `table`, through graphs if there is a pool for them."""

    def __init__(
        self, model: Decoder, attention: GpuAttention, kv_pool: KVPool, table: DeviceTable, pool: GraphPool | None
    ) -> None:
        self._model, self._attention, self._kv_pool, self._table = model, attention, kv_pool, table
        self._pool = pool
        self._sizes = graph_sizes(min(attention.limits.max_num_tokens, attention.limits.max_context_tokens))
        self._max_seqs = len(table.num_tokens)
        self._captured: dict[int, _Captured] = {}

    def shallow(self, model: Decoder) -> MixedStep:
        """Steps of the shallow model, without graphs, of the same rows."""
        return MixedStep(model, self._attention, self._kv_pool.shallow(model.spec.num_layers), self._table, None)

    def run(self, parts: MixedParts) -> Tensor:
        """Hidden states after the final norm of the tokens at `logit_indices`: [num_rows, hidden_size].

        Valid until the next step.
        """
        num_rows = len(parts.logit_indices)
        size = graph_size(len(parts.rows), self._sizes)
        if self._pool is None or size is None or num_rows > self._max_seqs:
            return self._eager(parts)
        packed = upload(_padded(parts, size, self._max_seqs), self._table.device)
        captured = self._captured.get(size)
        if captured is None:
            hidden = self._compute(packed, size).clone()  # also compiles what the capture will launch
            self._keep(self._pool, packed, size)
            return hidden[:num_rows]
        captured.packed.copy_(packed)
        captured.graph.replay()
        return captured.hidden[:num_rows]

    def get_ready(self) -> bool:
        """Capture the largest graph that is missing; False if none is."""
        missing = [size for size in self._sizes if size not in self._captured]
        if self._pool is None or self._pool.full or not missing:
            return False
        size, nothing = missing[-1], np.zeros(0, dtype=np.int64)
        parts = MixedParts(nothing, nothing, nothing, np.zeros(1, dtype=np.int64), nothing, nothing)
        packed = upload(_padded(parts, size, self._max_seqs), self._table.device)
        self._compute(packed, size)  # also compiles what the capture will launch
        return self._keep(self._pool, packed, size)

    def _keep(self, pool: GraphPool, packed: Tensor, size: int) -> bool:
        """Keep a graph; False where there is no memory for it."""
        made = self._capture(pool, packed, size)
        if made is not None:
            self._captured[size] = made
        return made is not None

    def _capture(self, pool: GraphPool, packed: Tensor, size: int) -> _Captured | None:
        left: list[Tensor] = []
        graph = pool.try_capture(lambda: left.append(self._compute(packed, size)))
        return None if graph is None else _Captured(graph, packed, left[0])

    def _eager(self, parts: MixedParts) -> Tensor:
        table = self._table
        uploaded = [parts.rows, parts.positions, parts.seq_rows, parts.starts, parts.ends, parts.logit_indices]
        if parts.rope_lens is not None:
            uploaded.append(parts.rope_lens)
        rows, positions, seq_rows, starts, ends, indices, *lens = upload_parts(uploaded, table.device)
        batch = ForwardBatch(
            input_ids=table.fields.token_ids[rows, positions].long(),
            positions=positions,
            slots=self._slots(rows, positions),
            query_starts=starts.int(),
            seq_lens=ends.int(),
            block_tables=table.block_table[seq_rows, : -(-int(parts.ends.max()) // self._kv_pool.block_size)],
            logit_indices=indices,
            query_starts_host=tuple(parts.starts.tolist()),
            seq_lens_host=tuple(parts.ends.tolist()),
            rope_lens=lens[0] if lens else None,
        )
        self._attention.prepare(batch)
        return self._model.forward(batch, self._kv_pool.layers)

    def _compute(self, packed: Tensor, size: int) -> Tensor:
        """A padded step; a graph of it serves every step that fits."""
        table, seqs = self._table, self._max_seqs
        rows, positions, seq_rows, starts, ends, indices = packed.split_with_sizes(
            [size, size, seqs, seqs + 1, seqs, seqs]
        )
        held = rows.clamp(min=0)
        batch = ForwardBatch(
            input_ids=table.fields.token_ids[held, positions].long(),
            positions=positions,
            slots=torch.where(rows >= 0, self._slots(held, positions), NO_SLOT),
            query_starts=starts.int(),
            seq_lens=ends.int(),
            block_tables=table.block_table[seq_rows],
            logit_indices=indices,
            query_starts_host=(*(0,) * seqs, size),  # the real ones are on the device only
            seq_lens_host=(1,) * seqs,
        )
        self._attention.prepare(batch, any_mix=True)
        return self._model.forward(batch, self._kv_pool.layers)

    def _slots(self, rows: Tensor, positions: Tensor) -> Tensor:
        size = self._kv_pool.block_size
        return self._table.block_table[rows, positions // size].long() * size + positions % size


def _padded(parts: MixedParts, size: int, seqs: int) -> Ints:
    """One array of a length that depends on (size, seqs) only."""
    num_tokens = len(parts.rows)

    def fill(values: Ints, length: int, value: int) -> Ints:
        return np.pad(values, (0, length - len(values)), constant_values=value)

    return np.concatenate(
        (
            fill(parts.rows, size, -1),
            fill(parts.positions, size, 0),
            fill(parts.seq_rows, seqs, 0),
            fill(parts.starts, seqs + 1, num_tokens),
            fill(parts.ends, seqs, 0),
            fill(parts.logit_indices, seqs, 0),
        )
    )
