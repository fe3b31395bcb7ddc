"""A sequence seen from outside: its `SequenceOutput`s and timings. Reads sequences; writes nothing of its own."""

from __future__ import annotations

from kvik.core.request import Sequence
from kvik.outputs import FinishReason, RequestMetrics, SequenceOutput, TokenLogprobs

__all__ = ["sequence_output"]


def sequence_output(
    seq: Sequence,
    now: float,
    new: tuple[int, ...] = (),
    logprobs: tuple[TokenLogprobs, ...] = (),
    reason: FinishReason | None = None,
    error: str | None = None,
) -> SequenceOutput:
    """What `seq` gained: `new` tokens, and with a `reason` its end. Takes the prompt's log-probabilities with it."""
    stopped = reason is FinishReason.STOP and bool(new)
    return SequenceOutput(
        request_id=seq.request.request_id,
        index=seq.index,
        new_token_ids=new,
        logprobs=logprobs,
        prompt_logprobs=seq.take_prompt_logprobs(),
        finish_reason=reason,
        stop_token_id=new[-1] if stopped else None,
        error=error,
        embedding=seq.embedding,
        num_cached_tokens=seq.num_cached,
        metrics=_metrics(seq, now),
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
