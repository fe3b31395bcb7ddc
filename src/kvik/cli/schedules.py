"""The same requests under many schedules of one engine: what `kvik verify-determinism` runs and compares.

A schedule is settings of the scheduler (batch size, token budget, blocks, prefix cache, run-ahead), the order and times
at which requests come, and who is preempted. Only the scheduler is made anew for each; weights, KV memory and graphs
stay.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvik.config import SchedulerConfig
from kvik.core.engine import Engine
from kvik.core.scheduler import Scheduler
from kvik.sampling_params import SamplingParams

if TYPE_CHECKING:
    from kvik.llm_engine import LLMEngine
    from kvik.outputs import RequestOutput, TokenLogprobs

__all__ = ["Schedule", "ProbeRequest", "difference", "draw_requests", "make_schedules", "run_schedule"]

_LOWEST_ID = 3
_KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0, "logprobs": 0},
    {"temperature": 0.0, "logprobs": 5},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
    {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.1, "presence_penalty": 0.3, "logprobs": 2},
    {"temperature": 1.0},
    {"temperature": 0.0, "frequency_penalty": 0.4},
    {"temperature": 1.0, "logprobs": 1, "prompt_logprobs": 1},
)
"""What requests ask for, in turn. Log-probabilities show a difference that is too small to change a token."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProbeRequest:
    """A prompt in token ids, and what is asked of it; the seed is given."""

    prompt: list[int]
    params: SamplingParams


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One way to run the requests.

    at_once: requests that may be in the engine at a time. arrivals: requests that come before a step, if they are
    `shuffled` at most that many. preemption: the chance that a step is followed by one, of which there are at most as
    many as requests. passes: how often all requests run; the last time counts, and finds what the others cached.
    """

    name: str
    settings: SchedulerConfig
    at_once: int
    arrivals: int
    shuffled: bool = False
    preemption: float = 0.0
    passes: int = 1


def draw_requests(
    count: int, longest_prompt: int, longest_output: int, block_size: int, vocab_size: int, seed: int
) -> list[ProbeRequest]:
    """Random requests, greedy and sampled: half of them begin as others do, a quarter end one token after a block."""
    rng = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [rng.randrange(min(_LOWEST_ID, vocab_size - 1), vocab_size) for _ in range(length)]

    beginnings = [ids(longest_prompt) for _ in range(3)]
    drawn = []
    for i in range(count):
        length = rng.randint(1, longest_prompt)
        length = (length - 1) // block_size * block_size + 1 if rng.random() < 0.25 else length
        shared = rng.choice((length, rng.randint(0, length))) if rng.random() < 0.5 else 0
        prompt = rng.choice(beginnings)[:shared] + ids(length - shared)
        asked = {**_KINDS[i % len(_KINDS)], "max_tokens": rng.randint(1, longest_output)}
        drawn.append(ProbeRequest(prompt, SamplingParams(seed=i, ignore_eos=True, **asked)))
    return drawn


def make_schedules(
    settings: SchedulerConfig, requests: Sequence[ProbeRequest], count: int, seed: int
) -> list[Schedule]:
    """The first `count` of the named schedules, then random ones, all within what an engine with `settings` can run.

    The first one is the plainest there is: one request after the other, and nothing cached.
    """
    longest = max(len(request.prompt) + (request.params.max_tokens or 0) for request in requests)
    everything, most = len(requests), settings.max_num_seqs
    scarce = min(settings.num_blocks, -(-longest // settings.block_size) + 1)  # blocks that barely hold the longest

    def change(seqs: int = most, tokens: int = settings.max_num_batched_tokens, **changes: Any) -> SchedulerConfig:
        seqs = min(seqs, most)
        tokens = max(min(tokens, settings.max_num_batched_tokens), seqs)
        return dataclasses.replace(settings, max_num_seqs=seqs, max_num_batched_tokens=tokens, **changes)

    plain = {"enable_prefix_caching": False}
    together: dict[str, Any] = {"at_once": everything, "arrivals": everything}
    named = [
        Schedule(name="one by one, uncached", settings=change(**plain), at_once=1, arrivals=1),
        Schedule(name="all at once, uncached", settings=change(**plain), **together),
        Schedule(name="budget of 16 tokens", settings=change(4, 16, **plain), **together),
        Schedule(name="budget of 61 tokens", settings=change(8, 61), **together),
        Schedule(name="random arrival order", settings=change(), at_once=everything, arrivals=3, shuffled=True),
        Schedule(name="prefix cache, warm", settings=change(), **together, passes=2),
        Schedule(name="few blocks", settings=change(8, 256, num_blocks=scarce), **together, shuffled=True),
        Schedule(name="preemption, uncached", settings=change(**plain), **together, preemption=0.5),
        Schedule(name="preemption, cached", settings=change(16, 64), **together, preemption=0.5),
        Schedule(name="no run-ahead", settings=change(run_ahead=0), **together),
    ]
    rng = random.Random(seed)
    while len(named) < count:
        seqs = rng.randint(1, most)
        drawn = change(
            seqs, rng.randint(seqs, max(2 * seqs, 512)), num_blocks=rng.randint(scarce, settings.num_blocks),
            enable_prefix_caching=rng.random() < 0.5, run_ahead=rng.randint(0, 2),
        )  # fmt: skip
        named.append(
            Schedule(
                name=f"random {len(named)}", settings=drawn, at_once=everything, arrivals=rng.randint(1, everything),
                shuffled=True, preemption=rng.choice((0.0, 0.1)),
            )
        )  # fmt: skip
    return named[:count]


def run_schedule(
    engine: LLMEngine, schedule: Schedule, requests: Sequence[ProbeRequest], seed: int
) -> list[RequestOutput]:
    """The finished output of every request, in the order of `requests`."""
    own, rng = engine.engine, random.Random(seed)
    engine.engine = Engine(Scheduler(schedule.settings), own.executor)
    found: list[RequestOutput] = []
    try:
        for _ in range(schedule.passes):
            waiting = list(range(len(requests)))
            if schedule.shuffled:
                rng.shuffle(waiting)
            found = _run_all(engine, schedule, requests, waiting, rng)
    finally:
        engine.engine = own
    return found


def _run_all(
    engine: LLMEngine, schedule: Schedule, requests: Sequence[ProbeRequest], waiting: list[int], rng: random.Random
) -> list[RequestOutput]:
    places: dict[str, int] = {}
    finished: dict[int, RequestOutput] = {}
    num_preemptions = 0
    while len(finished) < len(requests):
        room = schedule.at_once - (len(places) - len(finished))
        coming = rng.randint(0, schedule.arrivals) if schedule.shuffled else schedule.arrivals
        for index in waiting[: min(room, coming)]:
            request = requests[index]
            places[engine.add_request(request.prompt, request.params, stream=False)] = index
            waiting.remove(index)
        for output in engine.step():
            finished[places[output.request_id]] = output
        running = engine.engine.scheduler.running
        if running and num_preemptions < len(requests) and rng.random() < schedule.preemption:
            engine.engine.scheduler.preempt(rng.choice(running))
            num_preemptions += 1
    return [finished[index] for index in range(len(requests))]


def difference(got: RequestOutput, want: RequestOutput) -> str | None:
    """Where the first difference of two outputs of a request is, in words; None if they are the same bit for bit."""
    for mine, theirs, where in (
        (got.prompt_logprobs or (), want.prompt_logprobs or (), "prompt token"),
        (got.logprobs or (), want.logprobs or (), "token"),
    ):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=False)):
            if a != b:
                return f"{where} {i}: {_show(a)} instead of {_show(b)}"
    for i, (ours, other) in enumerate(zip(got.token_ids, want.token_ids, strict=False)):
        if ours != other:
            return f"token {i}: id {ours} instead of {other}"
    ends = [
        (len(o.token_ids), len(o.logprobs or ()), len(o.prompt_logprobs or ()), o.finish_reason) for o in (got, want)
    ]
    return None if ends[0] == ends[1] else f"(tokens, logprobs, prompt logprobs, end): {ends[0]} instead of {ends[1]}"


def _show(token: TokenLogprobs | None) -> str:
    return "nothing" if token is None else f"id {token.token_id} at {token.logprob!r}, rank {token.rank}"
