"""Runs step plans on a GPU without waiting for them: upload what changed, launch, hand back a promise of the result.

    plan ──► table diff ──► decode step (a graph, if all rows decode) ─┬─► tokens ──► pinned memory, event
                       └──► mixed step (prompts, or rows that need     ┘
                            the host)

Token ids never leave the device between steps: the next step reads what this one appended, so the host may be steps
ahead. What a row is given depends on the row alone; which of the paths its batch takes does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvik.attention.base import ForwardBatch
from kvik.core.plan import Chunk, RowResult, StepPlan, StepResult
from kvik.kernels.triton.sampler import BROKEN, MASKED
from kvik.kernels.triton.sampling_table import SamplingWorkspace
from kvik.kernels.triton.state import DecodeInputs
from kvik.models.decoder import Decoder
from kvik.outputs import TokenLogprobs
from kvik.runtime.decode_step import DecodeStep, SamplerPath
from kvik.runtime.device_table import DeviceTable, upload
from kvik.runtime.forward_batch import PromptRows, StepBatch, logit_rows
from kvik.runtime.kv_pool import KVPool
from kvik.runtime.prompt_outputs import PromptOutputs
from kvik.sampling.logprobs import prompt_logprobs
from kvik.sampling.sampler import ALL_MASKED, NOT_FINITE, Sampler
from kvik.tracing import NO_TRACE, NoTrace

__all__ = ["GpuRunner"]


@dataclass(slots=True)
class _Step:
    """What a launched step will give."""

    tokens: Tensor  # [num_rows] int32 on the host, valid once `ready` has happened
    ready: torch.cuda.Event | None
    rows: list[int]
    errors: dict[int, str]
    logprobs: dict[int, TokenLogprobs]
    prompts: dict[int, tuple[TokenLogprobs, ...]]
    embeddings: dict[int, tuple[float, ...]]


class GpuRunner:
    """Executes plans one after the other. Not thread-safe.

    `model` computes with `TritonOps` and `TritonAttention`. On CPU tensors everything runs through Triton's
    interpreter, which is how it is tested without a GPU.
    """

    def __init__(
        self, model: Decoder, kv_pool: KVPool, table: DeviceTable, decode: DecodeStep, work: SamplingWorkspace,
        tracer: NoTrace = NO_TRACE,
    ) -> None:  # fmt: skip
        self._model, self._kv_pool, self._table, self._decode, self._work = model, kv_pool, table, decode, work
        self._device = table.device
        self._sampler = Sampler(model.spec.vocab_size)
        self._prompts = PromptOutputs()
        self._tracer = tracer
        num_rows, max_blocks = table.block_table.shape
        self._appended = DecodeInputs.empty(num_rows, max_blocks, self._device)

    @torch.inference_mode()
    def start(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Launch a step. The result waits for the device."""
        with self._tracer.span("prepare"):
            self._table.apply(plan)
            for init in plan.joined:
                self._prompts.join(init)
        rows = [chunk.row for chunk in plan.chunks if chunk.sample]
        path = SamplerPath.of([self._table.sampling(row) for row in rows])
        plain = all(chunk.is_decode for chunk in plan.chunks) and not any(map(self._needs_mixed, rows))
        with self._tracer.span("launch", tokens=plan.num_tokens, sequences=len(plan.chunks)):
            step = self._finish(self._decode.run(rows, path), rows) if plain else self._mixed(plan.chunks, rows, path)
        return lambda: self._collect(plan, step)

    def reset(self) -> None:
        """Wait for whatever still runs."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _needs_mixed(self, row: int) -> bool:
        """Whether a row asks for more than its token, or for a token that the kernels cannot draw."""
        asks_more = self._prompts.is_pooled(row) or self._table.sampling(row).params.logprobs is not None
        return asks_more or self._table.on_host(row) or self._model.spec.rope.depends_on_length

    def _mixed(self, chunks: Sequence[Chunk], rows: list[int], path: SamplerPath) -> _Step:
        batch = self._batch(chunks, rows)
        hidden = self._model.forward(batch.forward, self._kv_pool.layers)
        prompts = {part.row: self._prompt_logprobs(part, hidden) for part in batch.prompt_rows}
        embeddings = {row: self._prompts.embedding(row, hidden[i]) for i, row in enumerate(rows)}
        if not rows:
            return _Step(torch.empty(0, dtype=torch.int32), None, rows, {}, {}, prompts, embeddings)
        logits = self._model.ops.linear(hidden[: len(rows)], self._model.weights.lm_head)  # [rows, vocab_size]
        on_device = upload(np.array(rows, dtype=np.int32), self._device)
        tokens = path.sample(logits, on_device, self._table.fields, self._work)
        errors = self._sample_on_host(chunks, rows, logits, tokens)
        self._table.advance(on_device, tokens, self._appended.first(len(rows)))
        logprobs = self._logprobs(rows, logits, tokens)
        step = self._finish(tokens, rows)
        step.errors, step.logprobs, step.prompts, step.embeddings = errors, logprobs, prompts, embeddings
        return step

    def _batch(self, chunks: Sequence[Chunk], rows: list[int]) -> StepBatch:
        """The tensors of a step, of one upload."""
        counts = np.array([chunk.num_tokens for chunk in chunks])
        begins = np.array([chunk.start for chunk in chunks])
        starts = np.concatenate(([0], counts.cumsum()))
        table_rows = np.array([chunk.row for chunk in chunks])
        positions = np.arange(starts[-1]) + np.repeat(begins - starts[:-1], counts)
        indices, prompt_rows = logit_rows(tuple(chunks), starts.tolist(), self._table.num_prompt)
        row_of = np.repeat(table_rows, counts)
        rope_lens = np.maximum(np.array(self._table.num_prompt)[row_of], positions + 1)
        parts = (row_of, positions, rope_lens, table_rows, starts, begins + counts, np.array(indices, dtype=np.int64))
        packed = upload(np.concatenate(parts).astype(np.int64), self._device)
        row_ids, position_ids, lens, seq_rows, query_starts, seq_lens, logit_indices = torch.split_with_sizes(
            packed, [*map(len, parts)]
        )
        size, fields = self._kv_pool.block_size, self._table.fields
        num_blocks = -(-int((begins + counts).max()) // size)
        blocks = self._table.block_table[row_ids, position_ids // size].long()
        forward = ForwardBatch(
            input_ids=fields.token_ids[row_ids, position_ids].long(),
            positions=position_ids,
            slots=blocks * size + position_ids % size,
            query_starts=query_starts.int(),
            seq_lens=seq_lens.int(),
            block_tables=self._table.block_table[seq_rows, :num_blocks],
            logit_indices=logit_indices,
            query_starts_host=tuple(starts.tolist()),
            seq_lens_host=tuple((begins + counts).tolist()),
            rope_lens=lens if self._model.spec.rope.depends_on_length else None,
        )
        return StepBatch(forward, tuple(rows), prompt_rows)

    def _sample_on_host(
        self, chunks: Sequence[Chunk], rows: list[int], logits: Tensor, tokens: Tensor
    ) -> dict[int, str]:
        """Replace the tokens of the rows that only the host can sample; the errors of those that failed."""
        ends = {chunk.row: chunk.end for chunk in chunks}
        wanted = [i for i, row in enumerate(rows) if self._table.on_host(row)]
        if not wanted:
            return {}
        states = [self._table.sampling(rows[i]) for i in wanted]
        history = [self._table.tokens(rows[i], ends[rows[i]]).cpu() for i in wanted]
        samples = self._sampler.sample(logits[wanted].cpu(), states, history)
        tokens[wanted] = upload(np.array([sample.token_id for sample in samples], dtype=np.int32), self._device)
        return {rows[i]: sample.error for i, sample in zip(wanted, samples, strict=True) if sample.error is not None}

    def _logprobs(self, rows: list[int], logits: Tensor, tokens: Tensor) -> dict[int, TokenLogprobs]:
        counts = {i: k for i, row in enumerate(rows) if (k := self._table.sampling(row).params.logprobs) is not None}
        if not counts:
            return {}
        chosen = tokens[list(counts)].long().clamp(min=0)
        found = prompt_logprobs(logits[list(counts)], chosen, max(counts.values()))
        return {rows[i]: one._replace(top=one.top[:k]) for (i, k), one in zip(counts.items(), found, strict=True)}

    def _prompt_logprobs(self, part: PromptRows, hidden: Tensor) -> tuple[TokenLogprobs, ...]:
        last = part.first_position + part.stop - part.start
        next_ids = self._table.tokens(part.row, last + 1)[part.first_position + 1 :]
        num_top = self._table.sampling(part.row).params.prompt_logprobs or 0
        return self._prompts.take(part, hidden, next_ids, num_top, self._model.logits)

    def _finish(self, tokens: Tensor, rows: list[int]) -> _Step:
        """Have the tokens copied to the host."""
        if self._device.type == "cpu":
            return _Step(tokens.clone(), None, rows, {}, {}, {}, {})
        host = torch.empty(len(tokens), dtype=torch.int32, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return _Step(host, event, rows, {}, {}, {}, {})

    def _collect(self, plan: StepPlan, step: _Step) -> StepResult:
        if step.ready is not None:
            step.ready.synchronize()
        tokens = dict(zip(step.rows, step.tokens.tolist(), strict=False))
        return StepResult(plan.step_id, tuple(self._row_result(chunk, step, tokens) for chunk in plan.chunks))

    def _row_result(self, chunk: Chunk, step: _Step, tokens: dict[int, int]) -> RowResult:
        row, prompts = chunk.row, step.prompts.get(chunk.row, ())
        if row not in tokens:
            return RowResult(row, prompt_logprobs=prompts)
        if (token := tokens[row]) < 0:
            error = step.errors.get(row) or {MASKED: ALL_MASKED, BROKEN: NOT_FINITE}[token]
            return RowResult(row, prompt_logprobs=prompts, error=error)
        logprobs = (step.logprobs[row],) if row in step.logprobs else ()
        return RowResult(row, (token,), logprobs, prompts, embedding=step.embeddings.get(row, ()))
