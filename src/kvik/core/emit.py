"""A sequence seen from outside: its `SequenceOutput`s and timings, and what an executor is told of it."""

from __future__ import annotations

from kvik.core.plan import RowInit
from kvik.core.request import Sequence
from kvik.outputs import FinishReason, RequestMetrics, SequenceOutput

__all__ = ["row_init", "sequence_output", "token_output"]


def sequence_output(
    seq: Sequence,
    now: float,
    reason: FinishReason | None = None,
    stop_token_id: int | None = None,
    error: str | None = None,
) -> SequenceOutput:
    """What `seq` gained since its last output, which it hands out with this, and with a `reason` its end."""
    new, logprobs, prompt_logprobs = seq.take_new()
    return SequenceOutput(
        request_id=seq.request.request_id,
        index=seq.index,
        new_token_ids=new,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        finish_reason=reason,
        stop_token_id=stop_token_id,
        error=error,
        embedding=seq.embedding,
        num_cached_tokens=seq.num_cached,
        metrics=_metrics(seq, now),
    )


def token_output(seq: Sequence, token_id: int) -> SequenceOutput:
    """What `seq` gained in most steps: the token that was appended last, and nothing else that is new."""
    seq.num_delivered += 1
    return SequenceOutput(
        request_id=seq.request.request_id,
        index=seq.index,
        new_token_ids=(token_id,),
        num_cached_tokens=seq.num_cached,
    )


def row_init(seq: Sequence) -> RowInit:
    """What an executor must know of a sequence that takes a row."""
    return RowInit(
        row=seq.row,
        token_ids=tuple(seq.token_ids),
        num_prompt_tokens=seq.num_prompt_tokens,
        params=seq.request.params,
        seed=seq.seed,
        stop_token_ids=tuple(sorted(seq.stop_token_ids)),
        bad_words_ids=seq.request.bad_words_ids,
        pooling=seq.request.pooling,
    )


def _metrics(seq: Sequence, now: float) -> RequestMetrics:
    arrived, first, scheduled = seq.request.arrival_time, seq.first_token_time, seq.scheduled_time
    later = seq.num_output_tokens - 1
    return RequestMetrics(
        queue_time=None if scheduled is None else scheduled - arrived,
        time_to_first_token=None if first is None else first - arrived,
        time_per_output_token=None if first is None or later < 1 else (now - first) / later,
        total_time=now - arrived,
        num_preemptions=seq.num_preemptions,
    )
