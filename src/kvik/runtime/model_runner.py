"""Runs a StepPlan on the device: update the request table, forward, sample, append. Owns model, KV pool and table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvik.core.plan import RowResult, StepPlan, StepResult
from kvik.models.decoder import Decoder
from kvik.outputs import TokenLogprobs
from kvik.runtime.forward_batch import PromptRows, StepBatch, build_batch
from kvik.runtime.kv_pool import KVPool
from kvik.runtime.native_decoder import NativeDecoder
from kvik.runtime.request_table import RequestTable
from kvik.sampling.logprobs import prompt_logprobs
from kvik.sampling.row import RowSampling
from kvik.sampling.sampler import RowSample, Sampler
from kvik.tracing import NO_TRACE, NoTrace

__all__ = ["ModelRunner"]

PROMPT_LOGPROB_ROWS = 64
"""Prompt positions whose logits exist at the same time: bounds their memory to this many rows of the vocabulary."""


class ModelRunner:
    """Executes plans one after the other. Not thread-safe."""

    def __init__(
        self, model: Decoder | NativeDecoder, kv_pool: KVPool, table: RequestTable, tracer: NoTrace = NO_TRACE
    ) -> None:
        self._model = model
        self._kv_pool = kv_pool
        self._table = table
        self._sampler = Sampler(model.spec.vocab_size)
        self._pooled: dict[int, Tensor | None] = {}  # rows that want an embedding: the sum of what came so far
        self._tracer = tracer

    def start(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Compute a step; the result is there already."""
        result = self.execute(plan)
        return lambda: result

    def reset(self) -> None:
        """Nothing runs between calls."""

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """One forward pass over the plan's chunks and one sampled token for each chunk that ends its sequence."""
        with self._tracer.span("prepare"):
            for init in plan.joined:
                self._table.join(init, RowSampling.from_init(init, self._model.spec.vocab_size))
                self._pooled.pop(init.row, None)
                if init.pooling is not None:
                    self._pooled[init.row] = None
            for chunk in plan.chunks:
                self._table.add_blocks(chunk)
            rope_lens = self._model.spec.rope.depends_on_length
            batch = build_batch(plan.chunks, self._table, self._kv_pool.block_size, rope_lens)
        with self._tracer.span("forward", tokens=plan.num_tokens, sequences=len(plan.chunks)):
            hidden = self._model.forward(batch.forward, self._kv_pool.layers)
        with self._tracer.span("sample"):
            samples = self._sample(batch, hidden)
            prompts = {rows.row: self._prompt_logprobs(rows, hidden) for rows in batch.prompt_rows}
            embeddings = {row: self._embedding(row, hidden[i]) for i, row in enumerate(batch.sampling_rows)}
        rows = tuple(
            _row_result(chunk.row, samples.get(chunk.row), prompts.get(chunk.row, ()), embeddings.get(chunk.row, ()))
            for chunk in plan.chunks
        )
        return StepResult(plan.step_id, rows)

    def _embedding(self, row: int, last: Tensor) -> tuple[float, ...]:
        """The embedding of a row's prompt, of length 1, where one is wanted; `last` is the last token's hidden state.

        It is the mean over what `_prompt_logprobs` has seen and `last`, which alone is the mean under "last" pooling.
        """
        if row not in self._pooled:
            return ()
        before = self._pooled.pop(row)
        total = last.float() if before is None else before + last.float()  # [hidden_size]
        return tuple((total / total.norm().clamp(min=1e-12)).tolist())

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

    def _prompt_logprobs(self, rows: PromptRows, hidden: Tensor) -> tuple[TokenLogprobs, ...]:
        """Log-probabilities of the prompt tokens that follow the positions of `rows`; none where those are pooled."""
        if rows.row in self._pooled:
            total, before = hidden[rows.start : rows.stop].float().sum(0), self._pooled[rows.row]
            self._pooled[rows.row] = total if before is None else before + total
            return ()
        num_top = self._sampling(rows.row).params.prompt_logprobs or 0
        next_ids = self._table.tokens(rows.row)[rows.first_position + 1 :]
        found: list[TokenLogprobs] = []
        for start in range(rows.start, rows.stop, PROMPT_LOGPROB_ROWS):
            stop = min(start + PROMPT_LOGPROB_ROWS, rows.stop)
            targets = next_ids[start - rows.start : stop - rows.start]
            found.extend(prompt_logprobs(self._model.logits(hidden[start:stop]), targets, num_top))
        return tuple(found)

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
