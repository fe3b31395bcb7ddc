"""Runs step plans on a GPU without waiting for them: upload what changed, launch, hand back a promise of the result.

    plan ──► table diff ──► decode step (a graph, if all rows decode) ─┬─► tokens ──► `TokenRing`
                       └──► mixed step (prompts, or rows that need     ┘
                            the host)

Token ids never leave the device between steps: the next step reads what this one appended, so the host may be steps
ahead. Rows that follow a grammar are the exception: the host waits for their tokens of the step before, and makes their
masks, while the device computes the layers of this one. What a row is given depends on the row alone; which of the
paths its batch takes does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kvik.core.plan import Chunk, RowResult, StepPlan, StepResult
from kvik.kernels.triton.sampler import BROKEN, MASKED
from kvik.kernels.triton.sampling_table import SamplingWorkspace
from kvik.log import logger
from kvik.models.decoder import Decoder
from kvik.outputs import TokenLogprobs
from kvik.runtime.decode_step import DecodeStep, SamplerPath
from kvik.runtime.device_table import DeviceTable, upload
from kvik.runtime.forward_batch import PromptRows, logit_rows
from kvik.runtime.mixed_step import MixedParts, MixedStep
from kvik.runtime.prompt_outputs import PromptOutputs
from kvik.sampling.logprobs import prompt_logprobs
from kvik.sampling.sampler import ALL_MASKED, NOT_FINITE, Sampler
from kvik.structured.grammars import Matcher
from kvik.tracing import NO_TRACE, NoTrace

__all__ = ["GpuRunner"]


EDITS, TOP_K, TOP_P, MIN_P, HOST, LOGPROBS, MIXED, MATCHED = (1 << bit for bit in range(8))
"""What a row needs, as bits: the sampler's passes; the host for its token; more than a token; a mixed step; a mask for
each token."""


@dataclass(slots=True)
class _Step:
    """What a launched step will give: tokens of its decodes, then of the chunks that sample."""

    rows: Sequence[int]
    tokens: Callable[[], list[int]] = list  # of each of them, once they are there
    matched: list[tuple[int, Matcher]] = field(default_factory=list)  # places in `tokens` that matchers wait for
    errors: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompts: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    embeddings: dict[int, tuple[float, ...]] = field(default_factory=dict)


class _DecodeRows:
    """The rows that decode, in the forms that a step wants. Made anew when the plan's tuple is another."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        self.key = rows
        self.rows = list(rows)
        self.index = np.array(rows, dtype=np.int64)


class GpuRunner:
    """Executes plans one after the other. Not thread-safe.

    `model` computes with `TritonOps`. Without `decode` every step is a mixed one. On CPU tensors everything runs
    through Triton's interpreter, which is how it is tested without a GPU.
    """

    def __init__(
        self, model: Decoder, table: DeviceTable, decode: DecodeStep | None, mixed: MixedStep, work: SamplingWorkspace,
        tracer: NoTrace = NO_TRACE,
    ) -> None:  # fmt: skip
        self._model, self._table, self._decode, self._mixed_step, self._work = model, table, decode, mixed, work
        self._device = table.device
        self._sampler = Sampler(model.spec.vocab_size)
        self._prompts = PromptOutputs()
        self._tracer = tracer
        self._needs = np.zeros(len(table.num_tokens), dtype=np.uint8)  # bits, by table row
        self._decode_rows = _DecodeRows(())
        self._has_memory = True  # for graphs that may never be used
        self._unread: list[_Step] = []  # launched, and matchers wait for their tokens

    @torch.inference_mode()
    def start(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Launch a step. The result waits for the device."""
        self._choose_device()
        with self._tracer.span("prepare"):
            self._table.apply(plan)
            for init in plan.joined:
                self._prompts.join(init)
                self._needs[init.row] = self._row_needs(init.row)
            if plan.decodes is not self._decode_rows.key:
                self._decode_rows = _DecodeRows(plan.decodes)
            decodes = self._decode_rows
            needs = int(np.bitwise_or.reduce(self._needs[decodes.index]))
        num_rows = len(plan.decodes) + len(plan.chunks)
        with self._tracer.span("launch", tokens=plan.num_tokens, sequences=num_rows):
            if self._decode is None or plan.chunks or needs & MIXED:
                step = self._mixed(plan.chunks, decodes)
            else:
                step = _Step(decodes.rows, self._decode.run(decodes.rows, _path(needs)))
                self._table.num_tokens[decodes.index] += 1
        return lambda: self._collect(plan, step)

    def shallow(self) -> GpuRunner:
        """A runner of `Decoder.shallow` and the same rows, without graphs. It launches every kernel that this does."""
        model = self._model.shallow()
        decode = None if self._decode is None else self._decode.shallow(model)
        return GpuRunner(model, self._table, decode, self._mixed_step.shallow(model), self._work)

    @torch.inference_mode()
    def capture_largest(self) -> None:
        """Capture the largest graph of each kind. All others share their memory, which thus is there from the start."""
        self._choose_device()
        self._mixed_step.get_ready()
        if self._decode is not None:
            self._decode.get_ready()

    @torch.inference_mode()
    def get_ready(self) -> bool:
        """Capture a graph that a later step would have to capture first; False without one, or without memory."""
        if not self._has_memory:
            return False
        self._choose_device()
        try:
            return (self._decode is not None and self._decode.get_ready()) or self._mixed_step.get_ready()
        except torch.OutOfMemoryError as error:
            logger.warning("graphs that are missing are not captured in advance: %s", error)
            self._has_memory = False
            return False

    def reset(self) -> None:
        """Wait for whatever still runs, and forget what an interrupted step has left."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._work.counts.zero_()
        self._table.results.reset()
        self._unread.clear()

    def _choose_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # what kernels are launched on is a matter of the calling thread

    def _row_needs(self, row: int) -> int:
        """The bits of a row that joins."""
        state = self._table.sampling(row)
        path, on_host, logprobs = SamplerPath.of([state]), self._table.on_host(row), state.params.logprobs is not None
        matched = state.matcher is not None and not on_host  # the host's sampler masks for itself
        mixed = on_host or logprobs or matched or self._model.spec.rope.depends_on_length
        passes = EDITS * path.edits | TOP_K * path.top_k | TOP_P * path.top_p | MIN_P * path.min_p
        return passes | HOST * on_host | LOGPROBS * logprobs | MIXED * mixed | MATCHED * matched

    def _mixed(self, chunks: Sequence[Chunk], decodes: _DecodeRows) -> _Step:
        rows = [*decodes.rows, *(chunk.row for chunk in chunks if chunk.sample)]
        parts, prompt_rows = self._parts(chunks, decodes)
        hidden = self._mixed_step.run(parts)
        prompts = {part.row: self._prompt_logprobs(part, hidden) for part in prompt_rows}
        pooled = [i for i, row in enumerate(rows) if self._prompts.is_pooled(row)]
        embeddings = {rows[i]: self._prompts.embedding(rows[i], hidden[i]) for i in pooled}
        if not rows:
            return _Step(rows, prompts=prompts)
        index = np.array(rows, dtype=np.int64)
        needs = self._needs[index]
        matched = self._constrain(rows, np.flatnonzero(needs & MATCHED).tolist())
        logits = self._model.ops.linear(hidden[: len(rows)], self._model.weights.lm_head)  # [rows, vocab_size]
        on_device = upload(index.astype(np.int32), self._device)
        tokens = _path(int(np.bitwise_or.reduce(needs))).sample(logits, on_device, self._table.fields, self._work)
        errors = self._sample_on_host(rows, np.flatnonzero(needs & HOST).tolist(), logits, tokens)
        errors.update((rows[i], matcher.error) for i, matcher in matched if matcher.error)
        self._table.append(on_device, tokens)
        self._table.num_tokens[index] += 1
        step = _Step(rows, self._table.results.take(len(rows)))
        step.logprobs = self._logprobs(rows, np.flatnonzero(needs & LOGPROBS).tolist(), logits, tokens)
        step.errors, step.prompts, step.embeddings = errors, prompts, embeddings
        if matched:
            step.matched = matched
            self._unread.append(step)
        return step

    def _parts(self, chunks: Sequence[Chunk], decodes: _DecodeRows) -> tuple[MixedParts, tuple[PromptRows, ...]]:
        """A step in rows and positions, the decodes first; and which of its logit rows are positions of prompts."""
        table, num_decodes = self._table, len(decodes.rows)
        spans = np.array([(c.row, c.start, c.num_tokens) for c in chunks], dtype=np.int64).reshape(-1, 3)
        seq_rows = np.concatenate((decodes.index, spans[:, 0]))
        begins = np.concatenate((table.num_tokens[decodes.index] - 1, spans[:, 1]))
        counts = np.concatenate((np.ones(num_decodes, dtype=np.int64), spans[:, 2]))
        starts = np.concatenate(([0], counts.cumsum()))
        positions = np.arange(starts[-1]) + np.repeat(begins - starts[:-1], counts)
        indices, prompt_rows = logit_rows(chunks, starts[num_decodes:].tolist(), table.num_prompt, num_decodes)
        rows = np.repeat(seq_rows, counts)
        lens = np.maximum(table.num_prompt[rows], positions + 1) if self._model.spec.rope.depends_on_length else None
        parts = MixedParts(
            rows=rows,
            positions=positions,
            seq_rows=seq_rows,
            starts=starts,
            ends=begins + counts,
            logit_indices=np.array(indices, dtype=np.int64),
            rope_lens=lens,
        )
        return parts, prompt_rows

    def _constrain(self, rows: Sequence[int], wanted: Sequence[int]) -> list[tuple[int, Matcher]]:
        """Have the rows at the places `wanted` draw what their grammars allow next; the places with their matchers.

        What the steps before have sampled must be known for that. The layers of this step are running meanwhile.
        """
        if not wanted:
            return []
        for step in self._unread:
            if step.matched:  # not collected yet, so that its tokens are still in the ring
                _read(step)
        self._unread.clear()
        with self._tracer.span("masks", rows=len(wanted)):
            self._table.constrain([rows[i] for i in wanted])
        found = ((i, self._table.sampling(rows[i]).matcher) for i in wanted)
        return [(i, matcher) for i, matcher in found if matcher is not None]

    def _sample_on_host(self, rows: list[int], wanted: list[int], logits: Tensor, tokens: Tensor) -> dict[int, str]:
        """Replace the tokens of the rows that only the host can sample; the errors of those that failed."""
        if not wanted:
            return {}
        states = [self._table.sampling(rows[i]) for i in wanted]
        history = [self._table.tokens(rows[i], int(self._table.num_tokens[rows[i]])).cpu() for i in wanted]
        samples = self._sampler.sample(logits[wanted].cpu(), states, history, logprobs=False)
        tokens[wanted] = upload(np.array([sample.token_id for sample in samples], dtype=np.int32), self._device)
        return {rows[i]: sample.error for i, sample in zip(wanted, samples, strict=True) if sample.error is not None}

    def _logprobs(self, rows: list[int], wanted: list[int], logits: Tensor, tokens: Tensor) -> dict[int, TokenLogprobs]:
        if not wanted:
            return {}
        counts = [self._table.sampling(rows[i]).params.logprobs or 0 for i in wanted]
        found = prompt_logprobs(logits[wanted], tokens[wanted].long().clamp(min=0), max(counts))
        return {rows[i]: one._replace(top=one.top[:k]) for i, k, one in zip(wanted, counts, found, strict=True)}

    def _prompt_logprobs(self, part: PromptRows, hidden: Tensor) -> tuple[TokenLogprobs, ...]:
        last = part.first_position + part.stop - part.start
        next_ids = self._table.tokens(part.row, last + 1)[part.first_position + 1 :]
        num_top = self._table.sampling(part.row).params.prompt_logprobs or 0
        return self._prompts.take(part, hidden, next_ids, num_top, self._model.logits)

    def _collect(self, plan: StepPlan, step: _Step) -> StepResult:
        """Wait for a step's tokens, and put what there is beside them."""
        tokens = _read(step)
        sampled = dict(zip(step.rows, tokens, strict=True)) if plan.chunks else {}
        rows = [_row_result(chunk.row, step, sampled.get(chunk.row)) for chunk in plan.chunks]
        decoded = tokens[: len(plan.decodes)]
        extras = []
        if decoded and (step.logprobs or min(decoded) < 0):
            for i, row in enumerate(plan.decodes):
                if decoded[i] < 0 or row in step.logprobs:
                    extras.append(_row_result(row, step, decoded[i]))
                    decoded[i] = -1
        return StepResult(plan.step_id, tuple(rows), tuple(decoded), tuple(extras))


def _read(step: _Step) -> list[int]:
    """Wait for a step's tokens, and show them to the matchers that wait for them."""
    tokens = step.tokens()
    for i, matcher in step.matched:
        if tokens[i] >= 0:
            matcher.advance((tokens[i],))
    step.matched = []
    return tokens


def _path(needs: int) -> SamplerPath:
    """The passes that rows with these bits need together."""
    return SamplerPath(bool(needs & EDITS), bool(needs & TOP_K), bool(needs & TOP_P), bool(needs & MIN_P))


def _row_result(row: int, step: _Step, token_id: int | None) -> RowResult:
    prompts = step.prompts.get(row, ())
    if token_id is None:
        return RowResult(row, prompt_logprobs=prompts)
    if token_id < 0:
        error = step.errors.get(row) or {MASKED: ALL_MASKED, BROKEN: NOT_FINITE}[token_id]
        return RowResult(row, prompt_logprobs=prompts, error=error)
    logprobs = (step.logprobs[row],) if row in step.logprobs else ()
    return RowResult(row, (token_id,), logprobs, prompts, embedding=step.embeddings.get(row, ()))
