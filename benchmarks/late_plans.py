"""What planning late gives, by Kvik's own engine and scheduler on a device that is arithmetic: no GPU is needed.

    python benchmarks/late_plans.py [--rate 16 40 64] [--seconds 10] [--noise 0.03] [--json FILE]

Requests of 100 to 1024 tokens, which ask for 100 to 512, come as a Poisson process. A step takes what it takes Qwen3-8B
on an H200 (`h200-breakdown-2026-11-30.jsonl`): 1.2 ms, its products at 620 TFLOP/s or its weights at 4.4 TB/s, and its
keys and values at 4.2 TB/s, times 1 +- noise; to plan one takes the host 0.8 ms. Prints TTFT and TPOT, and how long the
device had nothing to do between steps.
"""

from __future__ import annotations

import argparse
import random
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pairs import write_line

from kvik.cli.bench_measure import percentiles
from kvik.config import SchedulerConfig
from kvik.core import engine as engine_module
from kvik.core.engine import Engine
from kvik.core.plan import RowResult, StepPlan, StepResult
from kvik.core.request import Request
from kvik.core.scheduler import Scheduler
from kvik.sampling_params import SamplingParams

CONFIG = SchedulerConfig(
    block_size=64, num_blocks=11000, max_num_seqs=1024, max_num_batched_tokens=8192, max_model_len=4096, run_ahead=1
)
REST, READ, PLAN = 0.0012, 0.0034, 0.0008  # seconds
SECONDS_PER_TOKEN, SECONDS_PER_KEY = 15.2e9 / 620e12, 147_456 / 4.2e12
PROMPT, OUTPUT = (100, 1024), (100, 512)
TOKEN = 5


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Device:
    """Runs steps one after the other, by a clock."""

    def __init__(self, clock: Clock, noise: float) -> None:
        self._clock, self._noise, self._rng = clock, noise, random.Random(1)
        self._steps: deque[tuple[float, StepPlan]] = deque()
        self._context: dict[int, int] = {}
        self._end, self.idle = 0.0, 0.0

    def submit(self, plan: StepPlan) -> None:
        self._clock.now += PLAN
        begin = max(self._clock.now, self._end)
        self.idle += begin - self._end if self._steps else 0.0
        self._end = begin + self._seconds(plan)
        self._steps.append((self._end, plan))

    def collect(self) -> StepResult:
        end, plan = self._steps.popleft()
        self._clock.now = max(self._clock.now, end)
        rows = tuple(RowResult(chunk.row, (TOKEN,) if chunk.sample else ()) for chunk in plan.chunks)
        return StepResult(plan.step_id, rows, (TOKEN,) * len(plan.decodes))

    def get_ready(self) -> bool:
        return False

    def reset(self) -> None: ...

    def close(self) -> None: ...

    def _seconds(self, plan: StepPlan) -> float:
        for init in plan.joined:
            self._context[init.row] = len(init.token_ids)
        keys = sum(self._context[row] for row in plan.decodes) + sum(chunk.end for chunk in plan.chunks)
        for row in (*plan.decodes, *(chunk.row for chunk in plan.chunks if chunk.sample)):
            self._context[row] += 1
        exact = REST + max(READ, plan.num_tokens * SECONDS_PER_TOKEN) + keys * SECONDS_PER_KEY
        return exact * (1 + self._noise * self._rng.uniform(-1, 1))


def arrivals(rate: float, seconds: float) -> deque[tuple[float, Request]]:
    """Requests and when they come."""
    rng, now, found = random.Random(0), 0.0, deque[tuple[float, Request]]()
    while (now := now + rng.expovariate(rate)) < seconds:
        prompt = tuple(rng.choices(range(3, 10_000), k=rng.randint(*PROMPT)))
        params = SamplingParams(temperature=0.0, max_tokens=rng.randint(*OUTPUT), ignore_eos=True)
        found.append((now, Request(request_id=str(len(found)), prompt_token_ids=prompt, params=params, seed=1)))
    return found


def serve(rate: float, seconds: float, noise: float, *, late: bool) -> dict[str, Any]:
    """What a server's loop makes of the arrivals."""
    clock = Clock()
    engine_module.time = SimpleNamespace(perf_counter=clock)  # type: ignore[assignment]
    device = Device(clock, noise)
    engine = Engine(Scheduler(CONFIG), device)  # type: ignore[arg-type]
    waiting, came = arrivals(rate, seconds), dict[str, float]()
    tokens: dict[str, list[float]] = {}

    def receive() -> None:
        while waiting and waiting[0][0] <= clock.now:
            at, request = waiting.popleft()
            came[request.request_id] = at
            engine.add(request)

    while waiting or engine.has_unfinished():
        receive()
        while late and (slack := int(1000 * engine.slack()) / 1000) > 0:
            clock.now = min(clock.now + slack, waiting[0][0] if waiting else clock.now + slack)
            receive()
        if not engine.has_unfinished():
            clock.now = waiting[0][0]
            continue
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend([clock.now] * len(output.new_token_ids))
    ttft = [times[0] - came[key] for key, times in tokens.items()]
    tpot = [(times[-1] - times[0]) / (len(times) - 1) for times in tokens.values()]
    found = {"ttft_s": percentiles(ttft), "tpot_s": percentiles(tpot), "idle_s": device.idle, "seconds": clock.now}
    return {"rate": rate, "arrivals_s": seconds, "noise": noise, "late": late, "requests": len(tokens), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, nargs="+", default=[16.0, 40.0, 64.0], help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0, help="for which requests come")
    parser.add_argument("--noise", type=float, default=0.03)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    records = []
    for rate in args.rate:
        for late in (False, True):
            record = serve(rate, args.seconds, args.noise, late=late)
            ttft, tpot = (" / ".join(f"{1e3 * x:.1f}" for x in record[name].values()) for name in ("ttft_s", "tpot_s"))
            print(f"{rate:g}/s {'late' if late else 'early':<6} TTFT ms {ttft}   TPOT ms {tpot}"
                  f"   idle {1e3 * record['idle_s']:.1f} ms of {record['seconds']:.1f} s", flush=True)  # fmt: skip
            records.append(record)
    write_line(args.json, "late_plans", records=records)


if __name__ == "__main__":
    main()
