"""A decode step from the request table back to the request table: one CUDA graph per number of rows and sampler path.

    rows ──► ids, positions, slots, lengths ──► layers ──► logits ──► tokens ──► appended to the rows
    static   `decode_inputs`                     model      sample    `append`

While the batch stays the same, a step is one graph launch and copies nothing to the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvik.attention.base import ForwardBatch
from kvik.attention.triton import TritonAttention
from kvik.kernels.triton.sampler import sample
from kvik.kernels.triton.sampling_table import SamplingTable, SamplingWorkspace
from kvik.kernels.triton.state import DecodeInputs
from kvik.models.decoder import Decoder
from kvik.runtime.device_table import DeviceTable, upload
from kvik.runtime.graphs import Graph, GraphPool
from kvik.runtime.kv_pool import KVPool
from kvik.sampling.row import RowSampling

__all__ = ["DecodeStep", "SamplerPath", "buckets"]


@dataclass(frozen=True, slots=True)
class SamplerPath:
    """Which of the sampler's passes any row of a batch needs."""

    edits: bool
    top_k: bool
    top_p: bool
    min_p: bool

    @classmethod
    def of(cls, rows: Sequence[RowSampling]) -> SamplerPath:
        """The passes that these rows need together. Filters do nothing for a greedy row."""
        drawn = [row.params for row in rows if not row.params.greedy]
        return cls(
            edits=any(row.edits for row in rows),
            top_k=any(p.top_k > 0 for p in drawn),
            top_p=any(p.top_p < 1.0 for p in drawn),
            min_p=any(p.min_p > 0.0 for p in drawn),
        )

    def sample(self, logits: Tensor, rows: Tensor, table: SamplingTable, work: SamplingWorkspace) -> Tensor:
        """The next token of each row: [num_rows] int32, see `kvik.kernels.triton.sampler.sample`."""
        return sample(logits, rows, table, work, edits=self.edits, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)


PLAIN = SamplerPath(edits=False, top_k=False, top_p=False, min_p=False)
"""Greedy rows, and those that draw from all tokens."""


def buckets(max_rows: int) -> tuple[int, ...]:
    """Numbers of rows that steps are padded to: 1, 2, 4, every 8 up to 64, every 16 up to 128, then every 32."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max_rows, 32)]
    return (*(size for size in sizes if size < max_rows), max_rows)


class _Bucket:
    """The static tensors of one number of rows: the first rows of those that all numbers share."""

    def __init__(self, rows: Tensor, inputs: DecodeInputs) -> None:
        num_rows, device = len(rows), rows.device
        self.rows, self.inputs = rows, inputs
        self.batch = ForwardBatch(
            input_ids=inputs.input_ids,
            positions=inputs.positions,
            slots=inputs.slots,
            query_starts=torch.arange(num_rows + 1, dtype=torch.int32, device=device),
            seq_lens=inputs.seq_lens,
            block_tables=inputs.block_tables,
            logit_indices=None,
            query_starts_host=tuple(range(num_rows + 1)),
            seq_lens_host=(1,) * num_rows,  # the real ones are on the device only
        )


class DecodeStep:
    """Runs decode steps of the rows of `table`. With a `pool`, a kind of step becomes a graph when it first comes."""

    def __init__(
        self, model: Decoder, attention: TritonAttention, kv_pool: KVPool, table: DeviceTable, work: SamplingWorkspace,
        pool: GraphPool | None,
    ) -> None:  # fmt: skip
        self._model, self._attention, self._kv_pool = model, attention, kv_pool
        self._table, self._work, self._pool = table, work, pool
        max_rows, max_blocks = table.block_table.shape
        self._rows = torch.full((max_rows,), -1, dtype=torch.int32, device=table.device)
        self._inputs = DecodeInputs.empty(max_rows, max_blocks, table.device)
        self._filled: list[int] = []
        self._sizes = buckets(max_rows)
        self._buckets: dict[int, _Bucket] = {}
        self._graphs: dict[tuple[int, SamplerPath], Graph] = {}

    def shallow(self, model: Decoder) -> DecodeStep:
        """Steps of the shallow model, without graphs, of the same rows."""
        kv_pool = self._kv_pool.shallow(model.spec.num_layers)
        return DecodeStep(model, self._attention, kv_pool, self._table, self._work, None)

    def run(self, rows: list[int], path: SamplerPath) -> Callable[[], list[int]]:
        """Decode one token of each table row: a function that waits for them."""
        size = next(size for size in self._sizes if size >= len(rows))
        bucket = self._bucket(size)
        self._fill(rows)
        graph = self._graphs.get((size, path))
        if graph is None:
            self._compute(bucket, path)  # also compiles what a capture will launch
        else:
            graph.replay()
        tokens = self._table.results.take(len(rows))
        if graph is None and self._pool is not None:
            self._capture(self._pool, size, path)
        return tokens

    def get_ready(self) -> bool:
        """Capture a graph that is missing of the plain path or one that was taken, the largest first; False if none is.

        What it launches is compiled: the layers since the start, and the sampler for every number of rows.
        """
        paths = {PLAIN, *(path for _, path in self._graphs)}
        keys = itertools.product(reversed(self._sizes), paths)
        missing = next((key for key in keys if key not in self._graphs), None)
        if self._pool is None or missing is None:
            return False
        return self._capture(self._pool, *missing)

    def _capture(self, pool: GraphPool, size: int, path: SamplerPath) -> bool:
        """Keep a graph; False where there is no memory for it."""
        bucket = self._bucket(size)
        graph = pool.try_capture(lambda: self._compute(bucket, path))
        if graph is not None:
            self._graphs[size, path] = graph
        return graph is not None

    def _bucket(self, size: int) -> _Bucket:
        if size not in self._buckets:
            self._buckets[size] = _Bucket(self._rows[:size], self._inputs.first(size))
        return self._buckets[size]

    def _fill(self, rows: list[int]) -> None:
        """Set the table rows of the step, where they are not those of the last one."""
        if rows != self._filled:
            self._filled = []  # until the copy is on its way, whatever interrupts it
            padded = np.array(rows + [-1] * (len(self._rows) - len(rows)), dtype=np.int32)
            self._rows.copy_(upload(padded, self._rows.device))
            self._filled = list(rows)

    def _compute(self, bucket: _Bucket, path: SamplerPath) -> None:
        self._table.decode_inputs(bucket.rows, bucket.inputs)
        self._attention.prepare(bucket.batch)
        hidden = self._model.forward(bucket.batch, self._kv_pool.layers)
        logits = self._model.ops.linear(hidden, self._model.weights.lm_head)  # [num_rows, vocab_size]
        self._table.append(bucket.rows, path.sample(logits, bucket.rows, self._table.fields, self._work))
