"""Loads for a server: which requests, and when. Closed (N callers), open (Poisson arrivals at a rate), or a trace.

Everything is drawn from the seed: lengths, arrivals and ids of a load are the same in every run. The loads of a sweep
have other ids, so that no prefix cache takes part.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from kvik.cli.bench_client import Answer, Client
from kvik.errors import ConfigError

__all__ = ["Load", "Planned", "Recipe", "Run", "Workload", "planned", "read_trace", "run_load", "warm_up"]

_TEXT = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man "
    "me even most made after also did many off before must well back through years where much your way down should"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True)
class Load:
    """How requests arrive: `value` callers (clients) who each wait for their answer, or `value` a second (rate)."""

    kind: str
    value: float

    def __str__(self) -> str:
        if self.kind == "clients":
            return f"{self.value:g} client{'s' if self.value > 1 else ''}"
        return f"{self.value:g}/s" if self.kind == "rate" else self.kind


@dataclass(frozen=True, slots=True)
class Planned:
    """A request: seconds after the begin, a prompt or the number of its tokens, and how many tokens to generate."""

    at: float
    prompt: str | list[int] | int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the requests of a load are like. Ranges are inclusive."""

    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    seed: str
    num_requests: int | None
    duration: float | None
    trace: tuple[Planned, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a planned request becomes a body."""

    model: str
    chat: bool
    words: bool
    token_ids: tuple[int, int]
    temperature: float
    ignore_eos: bool

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, request: Planned, rng: random.Random) -> bytes:
        """The JSON body of a streamed request."""
        prompt = request.prompt
        if isinstance(prompt, int):
            ids = range(self.token_ids[0], self.token_ids[1] + 1)
            prompt = " ".join(rng.choices(_WORDS, k=prompt)) if self.words else rng.choices(ids, k=prompt)
        fields: dict[str, Any] = {
            "model": self.model,
            **({"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}),
            "max_tokens": request.output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.ignore_eos else {}),
        }
        return msgspec.json.encode(fields)


@dataclass(slots=True)
class Run:
    """What one load gave: the answers in the order of their ends, wall and own CPU seconds since the first request, and
    what was cut off."""

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    num_unfinished: int = 0


def planned(workload: Workload, load: Load) -> Iterator[Planned]:
    """The requests of a load in the order of their arrival; without an end if only a duration is given.

    Their lengths depend on the seed alone.
    """
    if workload.trace:
        yield from workload.trace[: workload.num_requests]
        return
    rng, arrivals, at = random.Random(f"{workload.seed}/plan"), random.Random(f"{workload.seed}/arrivals"), 0.0
    for _ in itertools.count() if workload.num_requests is None else range(workload.num_requests):
        if load.kind == "rate":
            at += arrivals.expovariate(load.value)
        yield Planned(at, rng.randint(*workload.prompt_tokens), rng.randint(*workload.output_tokens))


def warm_up(workload: Workload, count: int) -> Workload:
    """The first `count` requests; the prompts of a trace become random ones, so that no cache knows them later."""
    return replace(workload, num_requests=count, duration=None, trace=tuple(map(_other_prompt, workload.trace)))


def _other_prompt(request: Planned) -> Planned:
    prompt = request.prompt.split() if isinstance(request.prompt, str) else request.prompt
    return request if isinstance(prompt, int) else replace(request, prompt=max(1, len(prompt)))


def read_trace(path: Path) -> tuple[Planned, ...]:
    """The requests of a JSONL file with `time` (s), `prompt` or `prompt_tokens`, and `output_tokens`, by time.

    The first one's time is the begin, so that times of a clock do as well. Raises ConfigError with the line at fault.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from error
    found = [_trace_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ConfigError(f"the trace {path} holds no request")
    begin = min(request.at for request in found)
    return tuple(replace(request, at=request.at - begin) for request in sorted(found, key=lambda one: one.at))


def _trace_line(path: Path, number: int, line: str) -> Planned:
    try:
        fields = json.loads(line)
        at, prompt = float(fields["time"]), fields["prompt"] if "prompt" in fields else fields["prompt_tokens"]
        output_tokens = fields["output_tokens"]
    except (ValueError, TypeError, KeyError) as error:
        example = '{"time": 0.5, "prompt_tokens": 100, "output_tokens": 20}'
        raise ConfigError(f"{path}:{number} is not a request like {example}: {error!r}") from error
    fine = isinstance(prompt, (str, list)) if "prompt" in fields else type(prompt) is int and prompt > 0
    if not fine or type(output_tokens) is not int or output_tokens < 1 or not 0 <= at < math.inf:
        raise ConfigError(
            f"{path}:{number}: time must be a number of at least 0, prompt a text or token ids, prompt_tokens and"
            " output_tokens integers of at least 1"
        )
    return Planned(at, prompt, output_tokens)


async def run_load(
    client: Client, recipe: Recipe, workload: Workload, load: Load, salt: str, stop: asyncio.Event
) -> Run:
    """Send the requests of a load and wait for the answers; when `stop` is set, cut off those that are open.

    No request starts later than `workload.duration`; those that are open then are waited for. `salt` changes the ids of
    the prompts.
    """
    run = Run()
    requests, rng = planned(workload, load), random.Random(f"{workload.seed}/{salt}")
    num_open, begin, cpu = 0, 0.0, 0.0

    async def send(request: Planned) -> None:
        nonlocal num_open, begin, cpu
        if not begin:
            begin, cpu = time.perf_counter(), time.process_time()
        num_open += 1
        run.answers.append(await client.stream(recipe.path, recipe.body(request, rng)))
        num_open -= 1

    start, start_cpu = time.perf_counter(), time.process_time()
    if load.kind == "clients":
        work = asyncio.ensure_future(_closed(requests, send, int(load.value), start, workload.duration))
    else:
        work = asyncio.ensure_future(_open(requests, send, start, workload.duration))
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    run.num_unfinished = num_open
    work.cancel()
    await asyncio.wait((work,))
    if not work.cancelled():
        work.result()
    run.seconds, run.cpu_seconds = time.perf_counter() - (begin or start), time.process_time() - (cpu or start_cpu)
    return run


async def _closed(requests: Iterator[Planned], send: Any, num_clients: int, begin: float, limit: float | None) -> None:
    async def caller() -> None:
        for request in requests:
            if limit is not None and time.perf_counter() - begin >= limit:
                return
            await send(request)

    await asyncio.gather(*(caller() for _ in range(num_clients)))


async def _open(requests: Iterator[Planned], send: Any, begin: float, limit: float | None) -> None:
    tasks = []
    try:
        for request in requests:
            if limit is not None and request.at >= limit:
                break
            await asyncio.sleep(max(0.0, begin + request.at - time.perf_counter()))
            tasks.append(asyncio.ensure_future(send(request)))
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
