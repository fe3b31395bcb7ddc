"""`kvik verify-determinism MODEL`: random requests under many schedules, compared bit for bit, and what that costs.

Tokens and log-probabilities of every schedule are compared with those of the first. The engine is deterministic unless
--no-deterministic says otherwise, which shows how many would differ. The cost is measured beside an engine without the
option, the two taking turns on the same workload.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.cli.bench import append
from kvik.cli.bench_measure import measure
from kvik.cli.bench_workloads import NANO, Workload, draw, find_workload
from kvik.cli.engine import open_engine, render_config
from kvik.cli.environment import commit, machine, versions
from kvik.cli.options import EngineOptions, Parser, add_engine_flags, read_engine_options, results_file
from kvik.cli.schedules import ProbeRequest, Schedule, difference, draw_requests, make_schedules, run_schedule
from kvik.errors import ConfigError
from kvik.settings import Setting

if TYPE_CHECKING:
    from kvik.llm_engine import LLMEngine
    from kvik.outputs import RequestOutput

__all__ = ["run"]

_HEADER = ("schedule", "pairs", "mismatches", "cached", "preempted")
_COST_ON_CPU = 8
"""Requests of the workload on a processor, unless said otherwise."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
    """What one schedule gave: pairs compared, how many differ, and signs that it did what its name says."""

    schedule: str
    pairs: int
    mismatches: int
    cached_tokens: int
    preemptions: int
    first_difference: str | None


def run(argv: Sequence[str]) -> int:
    """Run the command: 0 if every output is the same under all schedules, 1 if not."""
    args = _parser().parse(argv)
    options = read_engine_options(args)
    options.engine.given.setdefault("deterministic", Setting(True, "verify-determinism"))
    _check(args)
    if args.print_config:
        print(render_config(options, sampling=False))
        return 0
    with_cost = bool(args.cost_runs) and bool(options.engine.given["deterministic"].value)
    if with_cost:  # two engines share the device
        share = options.engine.make().gpu_memory_utilization
        options.engine.given["gpu_memory_utilization"] = Setting(share / 2, "verify-determinism")
    with open_engine(options, args.log_level) as engine:
        record = _verify(engine, args)
        if with_cost:
            record["cost"] = _cost(engine, args)
        record |= _circumstances(engine, options)
    _print_end(record)
    if args.json:
        append(Path(args.json), record)
    return 1 if record["mismatches"] else 0


def _parser() -> Parser:
    about = "Run random requests under many schedules, compare their tokens and logprobs bit for bit, measure the cost."
    parser = Parser("kvik verify-determinism", about)
    add_engine_flags(parser, sampling=False)
    parser.add_argument("--requests", type=int, default=32, metavar="N", help="requests (default: 32)")
    parser.add_argument(
        "--schedules", type=int, default=10, metavar="N", help="schedules (default: 10); more are random"
    )
    parser.add_argument("--longest-prompt", type=int, metavar="N", help="tokens (default: 600, or half the context)")
    parser.add_argument("--longest-output", type=int, default=48, metavar="N", help="tokens (default: 48)")
    parser.add_argument("--draw", type=int, default=0, metavar="N", help="another number draws other requests")
    parser.add_argument("--cost-runs", type=int, default=2, metavar="N", help="runs of each engine; 0: no measurement")
    parser.add_argument("--workload", default="ragged256", metavar="NAME", help="of kvik bench, to measure the cost on")
    parser.add_argument("--cost-requests", type=int, metavar="N", help="its first N (default: all; on a CPU 8)")
    parser.add_argument(
        "--scale", type=float, metavar="X", help="multiply its lengths (default: what the context holds)"
    )
    parser.add_argument("--json", type=results_file, metavar="FILE", help="append the result to a file, as one line")
    return parser


def _check(args: argparse.Namespace) -> None:
    for name, least in (("requests", 1), ("schedules", 2), ("longest_output", 1), ("cost_runs", 0)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if args.longest_prompt is not None and args.longest_prompt < 1:
        raise ConfigError(f"--longest-prompt must be at least 1, got {args.longest_prompt}")
    find_workload(args.workload, args.cost_requests, args.scale or 1.0)


def _verify(engine: LLMEngine, args: argparse.Namespace) -> dict[str, Any]:
    """Run the matrix, and print a line when a schedule is done."""
    settings = engine.resolved.scheduler
    longest_prompt = args.longest_prompt or min(600, settings.max_model_len // 2)
    if longest_prompt + args.longest_output > settings.max_model_len:
        raise ConfigError(
            f"--longest-prompt {longest_prompt} and --longest-output {args.longest_output} are more than the context of"
            f" {settings.max_model_len} tokens"
        )
    requests = draw_requests(
        args.requests, longest_prompt, args.longest_output, settings.block_size, engine.spec.vocab_size, args.draw
    )
    schedules = make_schedules(settings, requests, args.schedules, args.draw)
    mode = "deterministic" if engine.config.deterministic else "not deterministic"
    print(f"{len(requests)} requests under {len(schedules)} schedules, {mode}; the first one is what others must equal")
    print(_line(_HEADER, "first difference"), flush=True)
    want: list[RequestOutput] = []
    rows: list[_Row] = []
    for schedule in schedules:
        got = run_schedule(engine, schedule, requests, args.draw)
        want = want or got
        rows.append(_compare(schedule, requests, got, want))
        _print_row(rows[-1], first=len(rows) == 1)
    compared = rows[1:]
    return {
        "requests": len(requests),
        "schedules": [dataclasses.asdict(row) for row in compared],
        "pairs": sum(row.pairs for row in compared),
        "mismatches": sum(row.mismatches for row in compared),
        "digest": _digest(want),
    }


def _compare(
    schedule: Schedule, requests: Sequence[ProbeRequest], got: list[RequestOutput], want: list[RequestOutput]
) -> _Row:
    found = [difference(ours, other) for ours, other in zip(got, want, strict=True)]
    wrong = [(i, text) for i, text in enumerate(found) if text is not None]
    first = f"request {wrong[0][0]} of {len(requests[wrong[0][0]].prompt)} tokens, {wrong[0][1]}" if wrong else None
    cached = sum(output.usage.cached_tokens for output in got)
    preempted = sum(output.metrics.num_preemptions for output in got)
    return _Row(schedule.name, len(found), len(wrong), cached, preempted, first)


def _digest(outputs: list[RequestOutput]) -> str:
    """A name for these tokens and logprobs, by which two engines (eager and graphs, say) can be compared too."""
    values = [(output.token_ids, output.logprobs, output.prompt_logprobs) for output in outputs]
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _print_row(row: _Row, *, first: bool) -> None:
    counts = ("", "") if first else (f"{row.pairs:,}", f"{row.mismatches:,}")
    cells = (row.schedule, *counts, f"{row.cached_tokens:,}", f"{row.preemptions:,}")
    print(_line(cells, row.first_difference or ""), flush=True)


def _line(cells: Sequence[str], last: str) -> str:
    name, *numbers = cells
    return f"{name:<24} {' '.join(f'{number:>10}' for number in numbers)}  {last}".rstrip()


def _cost(engine: LLMEngine, args: argparse.Namespace) -> dict[str, Any]:
    """Output tokens per second of both engines, best of their runs, and the percentage that determinism costs."""
    from kvik.llm_engine import LLMEngine

    workload = _workload(engine, args)
    seed = NANO if args.workload == "ragged256" else "0"
    speeds: dict[bool, list[float]] = {True: [], False: []}
    with LLMEngine(engine.config, deterministic=False) as other:
        engines = {True: engine, False: other}
        for index in range(-1, args.cost_runs):  # the first turn compiles, captures and fills what others find
            for deterministic, each in engines.items():
                requests = draw(workload, seed, index, engine.spec.vocab_size)
                result = measure(each, requests, workload.temperature, None)
                speeds[deterministic] += [result.num_output_tokens / result.seconds] if index >= 0 else []
    on, off = max(speeds[True]), max(speeds[False])
    return {
        "workload": workload.name, "seed": seed, "runs": args.cost_runs, "deterministic_tok_s": on,
        "plain_tok_s": off, "cost_percent": 100 * (1 - on / off), "all_tok_s": [speeds[True], speeds[False]],
    }  # fmt: skip


def _workload(engine: LLMEngine, args: argparse.Namespace) -> Workload:
    count = args.cost_requests
    if count is None and engine.resolved.kernels != "triton":
        count = min(_COST_ON_CPU, find_workload(args.workload).num_requests)
    limit = engine.resolved.scheduler.max_model_len
    longest = find_workload(args.workload).longest
    scale = args.scale or min(1.0, int(100 * limit / (longest + 2)) / 100)
    workload = find_workload(args.workload, count, scale)
    if workload.longest > limit:
        raise ConfigError(
            f"{workload.name} has requests of {workload.longest} tokens and the context of this engine is {limit};"
            " leave --scale out"
        )
    return workload


def _circumstances(engine: LLMEngine, options: EngineOptions) -> dict[str, Any]:
    model = engine.config.model
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": Path(model).resolve().name if Path(model).is_dir() else model,
        "dtype": str(engine.resolved.dtype).removeprefix("torch."),
        "deterministic": engine.config.deterministic,
        "options": {name: given.value for name, given in options.engine.given.items() if name != "model"},
        "machine": {**machine(), "device": engine.resolved.memory.device_name},
        "versions": versions(),
        "commit": commit(),
    }


def _print_end(record: dict[str, Any]) -> None:
    print(f"\n{record['mismatches']:,} mismatches in {record['pairs']:,} pairs; digest {record['digest']}")
    if cost := record.get("cost"):
        print(
            f"cost {cost['cost_percent']:.1f} % of the throughput of {cost['workload']} (seed {cost['seed']}):"
            f" {cost['deterministic_tok_s']:,.1f} tok/s, and {cost['plain_tok_s']:,.1f} without; best of"
            f" {cost['runs']}, taking turns"
        )
