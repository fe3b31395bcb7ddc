"""Runs a StepPlan on the device: update the request table, forward, sample, append. Owns model, KV pool and table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvik.core.plan import Chunk, RowResult, StepPlan, StepResult
from kvik.models.decoder import Decoder
from kvik.outputs import TokenLogprobs
from kvik.runtime.forward_batch import PromptRows, StepBatch, build_batch
from kvik.runtime.kv_pool import KVPool
from kvik.runtime.native_decoder import NativeDecoder
from kvik.runtime.prompt_outputs import PromptOutputs
from kvik.runtime.request_table import RequestTable
from kvik.sampling.row import RowSampling
from kvik.sampling.sampler import RowSample, Sampler
from kvik.structured.grammars import Grammars
from kvik.tracing import NO_TRACE, NoTrace

__all__ = ["ModelRunner"]


class ModelRunner:
    """Executes plans one after the other. Not thread-safe."""

    def __init__(
        self, model: Decoder | NativeDecoder, kv_pool: KVPool, table: RequestTable, tracer: NoTrace = NO_TRACE,
        grammars: Grammars | None = None,
    ) -> None:  # fmt: skip
        self._model = model
        self._kv_pool = kv_pool
        self._table = table
        self._sampler = Sampler(model.spec.vocab_size)
        self._prompts = PromptOutputs()
        self._tracer = tracer
        self._grammars = grammars

    def start(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Compute a step; the result is there already."""
        result = self.execute(plan)
        return lambda: result

    def get_ready(self) -> bool:
        """Every step can be computed as it is."""
        return False

    def reset(self) -> None:
        """Nothing runs between calls."""

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """One forward pass over the plan's chunks and one sampled token for each chunk that ends its sequence."""
        with self._tracer.span("prepare"):
            for init in plan.joined:
                state = RowSampling.from_init(init, self._model.spec.vocab_size, grammars=self._grammars)
                self._table.join(init, state)
                self._prompts.join(init)
            for row, block_ids in plan.new_blocks:
                self._table.add_blocks(row, block_ids)
            decodes = [Chunk(row, self._table.num_tokens[row] - 1, 1, sample=True) for row in plan.decodes]
            chunks = (*decodes, *plan.chunks)
            rope_lens = self._model.spec.rope.depends_on_length
            batch = build_batch(chunks, self._table, self._kv_pool.block_size, rope_lens)
        with self._tracer.span("forward", tokens=plan.num_tokens, sequences=len(chunks)):
            hidden = self._model.forward(batch.forward, self._kv_pool.layers)
        with self._tracer.span("sample"):
            samples = self._sample(batch, hidden)
            prompts = {rows.row: self._prompt_logprobs(rows, hidden) for rows in batch.prompt_rows}
            embeddings = {row: self._prompts.embedding(row, hidden[i]) for i, row in enumerate(batch.sampling_rows)}
        rows = [
            _row_result(chunk.row, samples.get(chunk.row), prompts.get(chunk.row, ()), embeddings.get(chunk.row, ()))
            for chunk in chunks
        ]
        return StepResult.of(plan, rows)

    def _sample(self, batch: StepBatch, hidden: Tensor) -> dict[int, RowSample]:
        """Sample the rows whose sequences end in this step, and append the tokens to the table."""
        rows = batch.sampling_rows
        if not rows:
            return {}
        logits = self._model.logits(hidden[: len(rows)])  # [num sampling rows, vocab_size]
        states = [self._sampling(row) for row in rows]
        samples = self._sampler.sample(logits, states, [self._table.tokens(row) for row in rows])
        for row, sample in zip(rows, samples, strict=True):
            if sample.error is None:
                self._table.append(row, sample.token_id)
        return dict(zip(rows, samples, strict=True))

    def _prompt_logprobs(self, part: PromptRows, hidden: Tensor) -> tuple[TokenLogprobs, ...]:
        next_ids = self._table.tokens(part.row)[part.first_position + 1 :]
        num_top = self._sampling(part.row).params.prompt_logprobs or 0
        return self._prompts.take(part, hidden, next_ids, num_top, self._model.logits)

    def _sampling(self, row: int) -> RowSampling:
        state = self._table.sampling[row]
        assert state is not None, f"row {row} was never joined"
        return state


def _row_result(
    row: int, sample: RowSample | None, prompt: tuple[TokenLogprobs, ...], embedding: tuple[float, ...]
) -> RowResult:
    if sample is None:
        return RowResult(row, prompt_logprobs=prompt)
    if sample.error is not None:
        return RowResult(row, prompt_logprobs=prompt, error=sample.error)
    logprobs = () if sample.logprobs is None else (sample.logprobs,)
    return RowResult(row, (sample.token_id,), logprobs, prompt, embedding=embedding)
