"""What the host does per step while a batch decodes: everything in `LLMEngine.step` but the device.

    python benchmarks/host_step.py [--batch 1 32 128 256] [--tokens 256] [--runs 3] [--device cpu] [--json FILE]

The engine is whole (scheduler, GPU runner and its request table, output processor); in place of the model stands one
that gives the same tokens at once, so a CPU is enough. `--device cuda:0` also does what a step uploads. Each
batch runs to its end, all requests of the same length and joined at once; microseconds are medians over the steps that
only decode, of the best run. `whole` is the mean over all steps of that run: joins and ends included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from pairs import write_line

from kvik import LLMEngine, SamplingParams
from kvik.config import SchedulerConfig
from kvik.core.engine import Engine
from kvik.core.scheduler import Scheduler
from kvik.distributed.uniproc import UniprocExecutor
from kvik.runtime.device_table import DeviceTable
from kvik.runtime.gpu_runner import GpuRunner
from kvik.runtime.gpu_runner import _Step as Step

PROMPT = 128
PARTS = ("schedule", "submit", "collect", "update", "engine", "text")


class InstantRunner(GpuRunner):
    """A GPU runner whose model has already answered."""

    def __init__(self, config: SchedulerConfig, vocab_size: int, device: torch.device) -> None:
        spec = SimpleNamespace(vocab_size=vocab_size, rope=SimpleNamespace(depends_on_length=False))
        model: Any = SimpleNamespace(spec=spec)
        rows = config.max_num_seqs
        table = DeviceTable(rows, config.max_model_len, config.block_size, vocab_size, device)
        self._answers = itertools.cycle(torch.randint(3, vocab_size, (64, rows)).tolist())
        decode: Any = SimpleNamespace(run=lambda rows, path: self._answer(rows))
        super().__init__(model, table, decode, mixed=cast(Any, None), work=cast(Any, None))

    def _mixed(self, chunks: Any, decodes: Any) -> Any:
        rows = [*decodes.rows, *(chunk.row for chunk in chunks if chunk.sample)]
        return Step(rows, self._answer(rows))

    def _answer(self, rows: Sequence[int]) -> Callable[[], list[int]]:
        tokens = next(self._answers)[: len(rows)]
        return lambda: tokens


class Clock:
    """Seconds spent in methods, without those of the methods that they call, while `on`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = 0.0

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Time `owner.name` as `part`."""
        call: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any) -> Any:
            outer, self._inner = self._inner, 0.0
            begin = time.perf_counter()
            result = call(*args)
            spent = time.perf_counter() - begin
            self.seconds[part] += spent - self._inner
            self._inner = outer + spent
            return result

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        seconds, self.seconds = self.seconds, defaultdict(float)
        return seconds


def make_engine(args: argparse.Namespace, batch: int) -> tuple[LLMEngine, Clock]:
    """The demo model's text half before an engine of `batch` rows, with every part of a step timed."""
    llm = LLMEngine("demo", device="cpu", kernels="torch", max_num_seqs=1)
    length = PROMPT + args.tokens
    blocks = batch * -(-length // 64)
    config = SchedulerConfig(
        block_size=64, num_blocks=blocks, max_num_seqs=batch, max_num_batched_tokens=batch * PROMPT,
        max_model_len=length, run_ahead=args.run_ahead,
    )  # fmt: skip
    scheduler = Scheduler(config)
    executor = UniprocExecutor(InstantRunner(config, llm.spec.vocab_size, torch.device(args.device)))
    llm.engine = Engine(scheduler, executor)
    clock = Clock()
    for owner, name, part in (
        (scheduler, "schedule", "schedule"), (executor, "submit", "submit"), (executor, "collect", "collect"),
        (scheduler, "update", "update"), (llm.engine, "step", "engine"), (llm, "step", "text"),
    ):  # fmt: skip
        clock.wrap(owner, name, part)
    return llm, clock


def run(llm: LLMEngine, clock: Clock, batch: int, tokens: int, stream: bool) -> dict[str, float]:
    """Microseconds per step of each part while all decode, their sum, and the mean of all steps."""
    rng = random.Random(0)
    for _ in range(batch):
        prompt = [rng.randrange(3, llm.spec.vocab_size) for _ in range(PROMPT)]
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        llm.add_request(prompt, params, stream=stream)
    steps: list[dict[str, float]] = []
    clock.take()
    while llm.has_unfinished():
        llm.step()
        steps.append(clock.take())
    inner = steps[4:-4]
    parts = {part: statistics.median(step[part] for step in inner) for part in PARTS}
    sums = [sum(step.values()) for step in steps]
    seconds = {**parts, "step": statistics.median(sums[4:-4]), "whole": statistics.mean(sums)}
    return {name: 1e6 * value for name, value in seconds.items()}


def main() -> None:
    """Parse the command line, print a table, and append the records where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--tokens", type=int, default=256, help="output tokens of each request")
    parser.add_argument("--runs", type=int, default=3, help="the best one counts")
    parser.add_argument("--run-ahead", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="where the request table lives")
    parser.add_argument("--json", type=Path, help="append one line with machine, versions and all records")
    args = parser.parse_args()
    from kvik.cli.environment import commit, machine, versions

    print(f"{json.dumps(machine())}\n{json.dumps(versions())}\ncommit {commit()}; microseconds per step")
    print(f"{'batch':>5} {'stream':>6} " + " ".join(f"{part:>8}" for part in (*PARTS, "step", "whole")))
    records = []
    for batch in args.batch:
        llm, clock = make_engine(args, batch)
        for stream in (False, True):
            runs = [run(llm, clock, batch, args.tokens, stream) for _ in range(args.runs)]
            best = min(runs, key=lambda record: record["step"])
            print(f"{batch:>5} {stream!s:>6} " + " ".join(f"{best[part]:8.1f}" for part in best), flush=True)
            records.append({"batch": batch, "stream": stream, "device": args.device, "us": best})
    write_line(args.json, "host_step", run_ahead=args.run_ahead, tokens=args.tokens, records=records)


if __name__ == "__main__":
    main()
