"""Decides what each step computes, and turns step results into outputs. Owns the queues and every Sequence.

Unit of work: {sequence: number of tokens} under a token budget. Decodes come first, then chunks of prompts, so that a
long prompt never stops the others. Nothing here knows of tensors.

A sequence's tokens, and how far each count reaches (b: confirmed, s: sampled in a step that is still in flight):

    token_ids   b b b b b b b b b b b b               len(token_ids)
    in flight                           s             num_tokens = len(token_ids) + num_in_flight
    KV planned  |---------------------|               num_computed; the next step computes [num_computed, num_tokens)

Because lengths advance without knowing tokens, step n+1 can be planned before the result of step n is known. A stop
token is then found one step late: the surplus token is dropped, and row and blocks are freed once the last step that
uses them has completed. Until then nobody gets the row, so it tells whether a result still concerns its sequence.

A running sequence is in `_prefilling` until it is sampled, then in `_decoding`, and in neither once the tokens in
flight reach its limit.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kvik.config import SchedulerConfig
from kvik.core.admission import check_request
from kvik.core.decode_batch import DecodeBatch
from kvik.core.emit import row_init, sequence_output, token_output
from kvik.core.kv_manager import KVManager
from kvik.core.plan import Chunk, RowInit, RowResult, StepPlan, StepResult
from kvik.core.policy import SequenceQueue
from kvik.core.request import Request, Sequence, SequenceStatus
from kvik.errors import RequestError
from kvik.outputs import FinishReason, SequenceOutput

__all__ = ["Scheduler"]


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A submitted plan and the sequences of its rows."""

    plan: StepPlan
    decoding: tuple[Sequence, ...]
    prefilling: tuple[Sequence, ...]


@dataclass(frozen=True, slots=True)
class _Held:
    """A row and blocks that a step in flight may still write."""

    step_id: int
    row: int
    block_ids: tuple[int, ...]


class Scheduler:
    """Admission, continuous batching with chunked prefill, preemption by recompute, and the one `finish` path."""

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self._clock = clock
        self._outputs: list[SequenceOutput] = []
        self._orders = itertools.count()
        self._next_step_id = 0
        self._clear()

    def _clear(self) -> None:
        """Start with nothing queued, running, in flight or cached."""
        config = self.config
        self.kv = KVManager(config.num_blocks, config.block_size, config.enable_prefix_caching)
        self._live: dict[str, dict[int, Sequence]] = {}
        self._running = SequenceQueue(config.policy)
        self._prefilling = SequenceQueue(config.policy)
        self._decoding = DecodeBatch(config.policy, config.block_size)
        self._resuming = SequenceQueue(config.policy)  # preempted: before everything that waits
        self._waiting = SequenceQueue(config.policy)
        self._followers: dict[str, list[Sequence]] = {}  # completions that will share the KV of the first one's prompt
        self._num_following = 0  # of all requests together
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._in_flight: deque[_InFlight] = deque()
        self._held: list[_Held] = []
        self._completed_step_id = self._next_step_id - 1

    # Requests

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError, with both numbers, for one that could never run."""
        if request.request_id in self._live or any(o.request_id == request.request_id for o in self._outputs):
            raise RequestError(f"request id {request.request_id!r} is in use by an unfinished request", "request_id")
        limit = check_request(request, self.config)
        sequences = [
            Sequence(
                request=request,
                index=index,
                order=next(self._orders),
                seed=request.seed + index,
                max_total_tokens=limit,
                stop_token_ids=request.stop_token_ids,
                token_ids=list(request.prompt_token_ids),
            )
            for index in range(request.params.n)
        ]
        alone = sequences if not self.kv.enable_prefix_caching else sequences[:1]
        for seq in alone:
            self._waiting.add(seq)
        if len(alone) < len(sequences):
            self._followers[request.request_id] = sequences[1:]
            self._num_following += len(sequences) - 1
        self._live[request.request_id] = {seq.index: seq for seq in sequences}

    def finish(self, request_id: str, reason: FinishReason, index: int | None = None) -> None:
        """End a request, or one completion of it, from outside (abort, stop string). Unknown ids are ignored."""
        for seq in list(self._live.get(request_id, {}).values()):
            if index is None or seq.index == index:
                self._finish(seq, reason)

    def preempt(self, seq: Sequence) -> None:
        """Take a running sequence's row and blocks; it resumes, before new ones, by computing its tokens again."""
        self._release(seq)
        seq.preempt()
        self._resuming.add(seq)

    def drain(self) -> list[SequenceOutput]:
        """Outputs that have not been delivered yet."""
        outputs, self._outputs = self._outputs, []
        return outputs

    # State

    @property
    def running(self) -> tuple[Sequence, ...]:
        return self._running.sequences

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._resuming) + self._num_following

    @property
    def last_step_id(self) -> int:
        """Of the step that was planned last."""
        return self._next_step_id - 1

    def has_unfinished(self) -> bool:
        """Whether a sequence is live, a step is in flight, or an output was not delivered."""
        return bool(self._live or self._in_flight or self._outputs)

    def check_invariants(self) -> None:
        """Blocks, rows and queues are consistent. Cheap enough to be called after every operation in tests."""
        self.kv.check_invariants(self._running, [block_id for held in self._held for block_id in held.block_ids])
        rows = [seq.row for seq in self._running] + [held.row for held in self._held] + self._free_rows
        assert sorted(rows) == list(range(self.config.max_num_seqs)), "a row is lost or has two owners"
        live = {id(seq) for completions in self._live.values() for seq in completions.values()}
        waiting = [*self._waiting, *self._resuming, *(seq for rest in self._followers.values() for seq in rest)]
        queued = [id(seq) for seq in [*self._running, *waiting]]
        assert len(queued) == len(live) and set(queued) == live, "a sequence is lost or queued twice"
        assert self.num_waiting == len(waiting)
        decoding, prefilling = set(self._decoding), set(self._prefilling)
        assert decoding | prefilling <= set(self._running) and not decoding & prefilling
        for seq in self._running:
            assert seq.status is SequenceStatus.RUNNING
            assert len(seq.token_ids) <= seq.num_tokens <= seq.max_total_tokens
            assert seq.num_computed <= len(seq.block_ids) * self.kv.block_size
            assert seq.num_remaining == 1 if seq not in prefilling else seq.num_remaining >= 1
            assert seq in decoding or seq in prefilling or seq.num_tokens == seq.max_total_tokens
        assert all(seq.status is SequenceStatus.WAITING and seq.row == -1 and not seq.block_ids for seq in waiting)

    # One step

    def schedule(self) -> StepPlan | None:
        """Plan a step, or None when nothing can be computed before a step in flight has completed."""
        num_resuming = len(self._resuming)
        new_blocks: list[tuple[int, tuple[int, ...]]] = []
        waiting = self._check_decodes(new_blocks)
        decoding, decodes = self._decoding.advance(self._next_step_id, waiting)
        budget = self.config.max_num_batched_tokens - len(decodes)
        chunks: list[Chunk] = []
        joined, prefilling = list[RowInit](), list[Sequence]()
        under_way, may_admit = deque(self._prefilling.sequences), True
        while budget:
            seq = None
            if may_admit and (not under_way or (self._resuming or self._waiting).begins_before(under_way[0])):
                seq = self._admit() if len(self._resuming) <= num_resuming else None
                num_resuming = len(self._resuming)
                may_admit = seq is not None
                if seq is not None:
                    joined.append(row_init(seq))
                    new_blocks.append((seq.row, tuple(seq.block_ids)))
            if seq is None and not under_way:
                break
            prefilling.append(seq or under_way.popleft())
            chunks.append(self._advance(prefilling[-1], budget))
            budget -= chunks[-1].num_tokens
        if not decodes and not chunks:
            return None
        plan = StepPlan(self._next_step_id, tuple(joined), tuple(new_blocks), decodes, tuple(chunks))
        self._in_flight.append(_InFlight(plan, decoding, tuple(prefilling)))
        self._next_step_id += 1
        return plan

    def update(self, result: StepResult) -> None:
        """Take in the result of the oldest step in flight: confirm tokens, commit blocks, end sequences that stop."""
        step = self._in_flight.popleft()
        assert step.plan.step_id == result.step_id, "results come in the order of their plans"
        self._completed_step_id = result.step_id
        self._confirm_decodes(step, result)
        for seq, chunk, row in zip(step.prefilling, step.plan.chunks, result.rows, strict=True):
            if seq.row == chunk.row:
                self._confirm(seq, row, chunk.end, chunk.sample)
        self._return_held()

    def abandon(self) -> None:
        """Abort everything after a step was interrupted, wherever that was: state is made anew rather than unwound.

        The caller made sure that the executor runs nothing any more. The prefix cache is lost.
        """
        for completions in self._live.values():
            for seq in completions.values():
                seq.status = SequenceStatus.FINISHED
                self._outputs.append(sequence_output(seq, self._clock(), reason=FinishReason.ABORT))
        self._next_step_id += 1
        self._clear()

    # Planning

    def _check_decodes(self, new_blocks: list[tuple[int, tuple[int, ...]]]) -> list[Sequence]:
        """Give blocks to those that need one for their next token, noted in `new_blocks`; returns who must wait."""
        waiting: list[Sequence] = []
        for seq in self._decoding.due():
            if seq.status is not SequenceStatus.RUNNING:
                continue  # preempted for an earlier one
            if seq.num_tokens == seq.max_total_tokens:
                self._decoding.remove(seq)
            elif (block_ids := self._grow(seq)) is not None:
                new_blocks.append((seq.row, block_ids))
                self._decoding.set_check(seq)
            elif seq.status is SequenceStatus.RUNNING:
                waiting.append(seq)
        return waiting

    def _grow(self, seq: Sequence) -> tuple[int, ...] | None:
        """Blocks for the sequence's tokens, preempting the last in line if need be; None if it must wait or had to go.

        Decodes are visited in queue order and prompts got all their blocks on admission, so the last in line is never
        one that this step already computes.
        """
        while (new_block_ids := self.kv.grow(seq, seq.num_tokens)) is None:
            if self._held:
                return None
            victim = self._running.last
            self.preempt(victim)
            if victim is seq:
                return None
        return new_block_ids

    def _admit(self) -> Sequence | None:
        """Give the next waiting sequence a row and blocks. Stops at the first that does not fit: none is overtaken."""
        queue = self._resuming or self._waiting
        if not queue or not self._free_rows:
            return None
        seq = queue.first
        cached = [] if seq.wants_prompt_logprobs else self.kv.match(seq)
        if not self.kv.admit(seq, cached, headroom=len(self._running)):
            return None
        queue.remove(seq)
        seq.start(row=self._free_rows.pop(), num_cached=len(cached) * self.kv.block_size, now=self._clock())
        self._running.add(seq)
        self._prefilling.add(seq)
        return seq

    def _advance(self, seq: Sequence, budget: int) -> Chunk:
        """Account for computing as many of a prompt's remaining tokens as the budget allows."""
        num_tokens = min(seq.num_remaining, budget)
        chunk = Chunk(
            row=seq.row,
            start=seq.num_computed,
            num_tokens=num_tokens,
            sample=num_tokens == seq.num_remaining,
            prompt_logprobs=seq.wants_prompt_logprobs and seq.num_computed < seq.num_prompt_tokens - 1,
        )
        seq.num_computed = chunk.end
        seq.last_step_id = self._next_step_id
        if chunk.sample:
            seq.num_tokens += 1
            self._prefilling.remove(seq)
            self._decoding.add(seq)
        return chunk

    # Results

    def _confirm_decodes(self, step: _InFlight, result: StepResult) -> None:
        """Append the tokens of a step's decodes. This runs once per token: what it does for all has to be little."""
        block_size, outputs = self.kv.block_size, self._outputs
        extras = {row.row: row for row in result.extras}
        for seq, row, token_id in zip(step.decoding, step.plan.decodes, result.decoded, strict=True):
            if seq.row != row:
                continue
            token_ids = seq.token_ids
            if token_id < 0:
                self._confirm(seq, extras[row], len(token_ids), sampled=True)
                continue
            if not len(token_ids) % block_size:
                self.kv.commit(seq, len(token_ids))
            token_ids.append(token_id)
            if token_id in seq.stop_token_ids or len(token_ids) == seq.max_total_tokens:
                self._deliver(seq)
            elif seq.streams:
                outputs.append(token_output(seq, token_id))

    def _confirm(self, seq: Sequence, row: RowResult, num_computed: int, sampled: bool) -> None:
        """Apply the result of a row whose first `num_computed` tokens are computed by now."""
        seq.prompt_logprobs.extend(row.prompt_logprobs)
        if row.error is not None:
            self._finish(seq, FinishReason.ERROR, error=row.error)
            return
        assert bool(row.token_ids) == sampled, "a row gives a token if and only if it samples"
        self.kv.commit(seq, num_computed)
        if num_computed >= seq.num_prompt_tokens:
            self._release_followers(seq.request.request_id)
        if not sampled:
            return
        seq.embedding = row.embedding or seq.embedding
        if seq.first_token_time is None:
            seq.first_token_time = self._clock()
        num_before = len(seq.token_ids)
        for token_id in row.token_ids:
            seq.token_ids.append(token_id)
            if seq.stop_reason is not None:
                break
        seq.logprobs.extend(row.logprobs[: len(seq.token_ids) - num_before])
        self._deliver(seq)

    def _deliver(self, seq: Sequence) -> None:
        """Hand out what a sequence has gained, and end it where its last token does."""
        reason = seq.stop_reason
        if reason is not None:
            self._finish(seq, reason, stop_token_id=seq.token_ids[-1] if reason is FinishReason.STOP else None)
        elif seq.streams:
            self._outputs.append(sequence_output(seq, self._clock()))

    def _finish(
        self, seq: Sequence, reason: FinishReason, stop_token_id: int | None = None, error: str | None = None
    ) -> None:
        """The one way in which a sequence ends: frees its row and blocks and delivers a terminal output."""
        request_id = seq.request.request_id
        if seq.status is SequenceStatus.RUNNING:
            self._release(seq)
        else:
            self._unqueue(seq)
        seq.status = SequenceStatus.FINISHED
        completions = self._live[request_id]
        del completions[seq.index]
        if not completions:
            del self._live[request_id]
        if seq.index == 0:
            self._release_followers(request_id)
        self._outputs.append(sequence_output(seq, self._clock(), reason, stop_token_id, error))

    # Rows, blocks and queues

    def _release(self, seq: Sequence) -> None:
        """Take a running sequence's row and blocks; they are reusable once no step in flight can write them."""
        self._running.remove(seq)
        if not self._decoding.discard(seq):
            self._prefilling.discard(seq)
        self._held.append(_Held(seq.last_step_id, seq.row, tuple(seq.block_ids)))
        seq.row, seq.block_ids = -1, []
        if seq.last_step_id <= self._completed_step_id:
            self._return_held()

    def _return_held(self) -> None:
        """Free the rows and blocks whose last step has completed."""
        waiting = [held for held in self._held if held.step_id > self._completed_step_id]
        for held in self._held:
            if held.step_id <= self._completed_step_id:
                self._free_rows.append(held.row)
                self.kv.free(held.block_ids)
        self._held = waiting

    def _release_followers(self, request_id: str) -> None:
        """Queue the other completions of a request: the first one's prompt is in the cache, or never will be."""
        for seq in self._followers.pop(request_id, []):
            self._waiting.add(seq)
            self._num_following -= 1

    def _unqueue(self, seq: Sequence) -> None:
        followers = self._followers.get(seq.request.request_id, [])
        if seq in followers:
            followers.remove(seq)
            self._num_following -= 1
        else:
            (self._resuming if seq.num_preemptions else self._waiting).remove(seq)
            self.kv.unmatch()
