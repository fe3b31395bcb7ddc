"""`kvik bench breakdown MODEL`: where the time of one decode step goes on a GPU, phase by phase.

The engine decodes a batch twice, with other prompts of the same lengths. The first time, CUDA events around the steps
say how long a step takes, and a clock what the host does meanwhile; the second time, torch's profiler says when each
kernel of the same steps ended. `bench_phases` makes a table of that.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.cli.bench import append, footer
from kvik.cli.bench_measure import read_bandwidth
from kvik.cli.bench_phases import Kernel, break_down, phase_bytes
from kvik.cli.bench_workloads import Workload, draw
from kvik.cli.engine import open_engine, render_config
from kvik.cli.environment import commit, machine, versions
from kvik.cli.options import EngineOptions, Parser, add_engine_flags, read_engine_options, results_file
from kvik.config import SchedulerConfig
from kvik.errors import ConfigError, KvikError
from kvik.sampling_params import SamplingParams
from kvik.settings import Setting
from kvik.tracing import NoTrace

if TYPE_CHECKING:
    from kvik.llm_engine import LLMEngine

__all__ = ["run"]

_STEPS = 32
_WARM_STEPS = 4
_DESCRIPTION = """Measure where the time of one decode step goes on a GPU, phase by phase and kernel by kernel.

All sequences have the same length, --context tokens in the middle of the measured steps."""


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    args = _parser().parse(argv)
    options = read_engine_options(args)
    _check(args, options)
    if args.print_config:
        print(render_config(options, sampling=False))
        return 0
    clock = _HostClock()
    with open_engine(options, args.log_level, clock) as engine:
        record = _record(engine, options, args, clock)
    print(_render(record))
    if args.json:
        append(Path(args.json), record)
    return 0


def _parser() -> Parser:
    parser = Parser("kvik bench breakdown", _DESCRIPTION)
    add_engine_flags(parser, sampling=False)
    parser.add_argument("--batch", type=int, required=True, metavar="N", help="sequences that decode together")
    parser.add_argument("--context", type=int, required=True, metavar="C", help="tokens of each sequence")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    parser.add_argument("--json", type=results_file, metavar="FILE", help="append the result to a file, as one line")
    return parser


def _check(args: argparse.Namespace, options: EngineOptions) -> None:
    """Raise ConfigError for what cannot be measured. Sets max_num_seqs, where it is not given, to the batch."""
    from kvik.runtime.platform import select_platform

    if args.batch < 1:
        raise ConfigError(f"--batch must be at least 1, got {args.batch}")
    SamplingParams(temperature=args.temperature)
    options.engine.given.setdefault("max_num_seqs", Setting(args.batch, "--batch"))
    config = options.engine.make()
    if config.max_num_seqs is not None and config.max_num_seqs < args.batch:
        raise ConfigError(f"--batch {args.batch} is more than --max-num-seqs {config.max_num_seqs}; leave that out")
    if select_platform(config.device).device.type == "cpu":
        raise ConfigError(
            "kvik bench breakdown measures the kernels of a GPU, and this engine would run on the CPU; use"
            " kvik generate MODEL PROMPT --profile FILE, which writes a trace of its steps"
        )


# Running the steps


class _HostClock(NoTrace):
    """Adds up the host's seconds by the engine's ranges."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def span(self, name: str, **args: int | float | str) -> AbstractContextManager[None]:
        return self._timed(name)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


@dataclass(frozen=True, slots=True)
class _Batch:
    """How to have `size` sequences of about the same length decode together."""

    size: int
    prompt_len: int
    filling: int  # steps until all of them decode, at most
    temperature: float

    @classmethod
    def of(cls, settings: SchedulerConfig, size: int, context: int, temperature: float) -> _Batch:
        """Prompts that have grown to `context` tokens, on average, in the middle of the measured steps.

        Raises ConfigError where the engine cannot hold them.
        """
        filling = -(-size * context // max(1, settings.max_num_batched_tokens - size)) + 2
        grown = filling // 2 + _WARM_STEPS + _STEPS // 2
        if context <= grown:
            raise ConfigError(
                f"--context must be at least {grown + 1}, got {context}: sequences grow by {grown} tokens until they"
                " are measured"
            )
        longest = context - grown + filling + _WARM_STEPS + _STEPS + settings.run_ahead + 1
        if longest > settings.max_model_len:
            raise ConfigError(
                f"sequences grow to {longest} tokens and the context of this engine is {settings.max_model_len}: use a"
                " smaller --context, or a larger --max-model-len"
            )
        needed = size * -(-longest // settings.block_size)
        if needed > settings.num_blocks:
            raise ConfigError(
                f"{size} sequences of {longest} tokens need {needed} KV blocks and there are {settings.num_blocks}: use"
                " a smaller --batch or --context, or a larger --kv-cache-memory"
            )
        return cls(size, context - grown, filling, temperature)

    @contextmanager
    def decoding(self, engine: LLMEngine, draw_number: int) -> Iterator[None]:
        """Within the context all sequences decode, and nothing else runs."""
        lens = (self.prompt_len, self.prompt_len)
        workload = Workload(
            name="breakdown", num_requests=self.size, prompt_lens=lens, output_lens=(1, 1), temperature=self.temperature
        )
        params = SamplingParams(temperature=self.temperature, max_tokens=None, ignore_eos=True)
        requests = draw(workload, "0", draw_number, engine.spec.vocab_size)
        ids = [engine.add_request(request.prompt, params, stream=False) for request in requests]
        for _ in range(self.filling):
            engine.step()
            if engine.stats.last is not None and engine.stats.last.num_decode_tokens == self.size:
                break
        else:
            raise KvikError(
                f"after {self.filling} steps not all of {self.size} sequences decode; use a larger"
                " --max-num-batched-tokens"
            )
        yield
        for request_id in ids:
            engine.abort(request_id)
        while engine.has_unfinished():
            engine.step()


def _time_steps(engine: LLMEngine, batch: _Batch, clock: _HostClock) -> tuple[float, dict[str, float], float]:
    """(microseconds of a step on the GPU, microseconds of the host by range and in all, mean context length)."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    decoded = engine.stats.num_decode_tokens
    with batch.decoding(engine, 0):
        for _ in range(_WARM_STEPS):
            engine.step()
        clock.seconds.clear()
        before, started = engine.stats.num_decode_tokens, time.perf_counter()
        begin.record()
        for _ in range(_STEPS):
            engine.step()
        end.record()
        seconds = {**clock.seconds, "whole": time.perf_counter() - started}
        grown = (before + engine.stats.num_decode_tokens) / 2 - decoded
        torch.cuda.synchronize()
    host = {name: 1e6 * value / _STEPS for name, value in seconds.items()}
    return 1e3 * begin.elapsed_time(end) / _STEPS, host, batch.prompt_len + grown / batch.size


def _trace_steps(engine: LLMEngine, batch: _Batch) -> list[Kernel]:
    """What ran on the GPU in the same steps, and in those before them."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with batch.decoding(engine, 1), profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(_WARM_STEPS + _STEPS):
            engine.step()
        torch.cuda.synchronize()
    events = [event for event in trace.events() if event.device_type.name == "CUDA"]
    return [Kernel(event.time_range.end, event.time_range.start, event.name) for event in events]


def _record(engine: LLMEngine, options: EngineOptions, args: argparse.Namespace, clock: _HostClock) -> dict[str, Any]:
    """Everything about the measurement, as it is written to a results file."""
    from kvik.runtime.platform import select_platform

    plan, model = engine.resolved, engine.config.model
    if Path(model).is_dir():
        model = Path(model).resolve().name  # a result says what was measured, not where it lay
    batch = _Batch.of(plan.scheduler, args.batch, args.context, args.temperature)
    whole, host, context = _time_steps(engine, batch, clock)
    costs = break_down(_trace_steps(engine, batch), _STEPS)
    phases = {name: cost.per_step(_STEPS) for name, cost in costs.items()}
    num_bytes = phase_bytes(engine.spec, plan, args.batch, context)
    for name, count in num_bytes.items():
        phases[name] |= {"bytes": count, "bytes_per_s": 1e6 * count / phases[name]["us"]}
    measured, buffer = read_bandwidth(sum(num_bytes.values()), select_platform(engine.config.device).device)
    total = sum(phase["us"] for phase in phases.values())
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "mode": "breakdown",
        "model": model,
        "architecture": engine.spec.architecture,
        "parameters": engine.spec.num_parameters,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "options": {**{name: setting.value for name, setting in options.engine.given.items()}, "model": model},
        "batch": args.batch,
        "context": context,
        "temperature": args.temperature,
        "graphs": plan.graphs,
        "steps": _STEPS,
        "result": {"step_us": whole, "phases": phases, "sum_us": total, "share": total / whole, "host": _host(host)},
        "limit": {"read_bytes_per_s": measured, "read_buffer_bytes": buffer},
        "machine": {**machine(), "device": plan.memory.device_name},
        "versions": versions(),
        "commit": commit(),
    }


def _host(times: dict[str, float]) -> dict[str, float]:
    """The host's microseconds of a step: at work, by part, and waiting for the GPU."""
    parts = {name: times.get(name, 0.0) for name in ("schedule", "prepare", "launch", "update", "detokenize")}
    waits = times.get("collect", 0.0)
    work = times["whole"] - waits
    return {"us": work, **parts, "other": work - sum(parts.values()), "waits_us": waits}


# The table

_HEAD = ("phase", "launches", "us", "share", "gaps us", "MB read", "TB/s", "of limit")


def _render(record: dict[str, Any]) -> str:
    result, limit = record["result"], record["limit"]
    phases, total = result["phases"], result["sum_us"]
    lines = [
        f"{record['model']}, {record['parameters']:,} parameters, {record['dtype']}; a decode step of {record['batch']}"
        f" sequences of {record['context']:.0f} tokens, temperature {record['temperature']:g}",
        _line(_HEAD),
    ]
    for name, phase in phases.items():
        lines.append(_row(name, phase, total, limit["read_bytes_per_s"]))
        lines += [_row(f"  {kernel}", cost, total, 1.0) for kernel, cost in phase.get("kernels", {}).items()]
    lines.append(_row("sum", _sum(phases), total, limit["read_bytes_per_s"]))
    how = "as CUDA graphs" if record["graphs"] else "launched one by one"
    host = result["host"]
    parts = ", ".join(f"{name} {value:.0f}" for name, value in host.items() if name not in ("us", "waits_us"))
    lines += [
        f"  {'whole step':<16} {result['step_us']:,.1f} us {how}, by events around {record['steps']} such steps; the"
        f" sum is {100 * result['share']:.1f} % of it",
        f"  {'host':<16} {host['us']:,.0f} us a step: {parts}; it waits {host['waits_us']:,.0f} us for the GPU",
        f"  {'read limit':<16} {limit['read_bytes_per_s'] / 1e12:.2f} TB/s: summing a buffer of"
        f" {limit['read_buffer_bytes'] / 1e6:,.1f} MB",
    ]
    return "\n".join([*lines, *footer(record)])


def _sum(phases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All phases as one."""
    keys = ("launches", "us", "gaps_us", "bytes")
    found = {key: sum(phase.get(key, 0) for phase in phases.values()) for key in keys}
    return {**found, "bytes_per_s": 1e6 * found["bytes"] / found["us"]}


def _row(name: str, cost: dict[str, Any], total: float, limit: float) -> str:
    cells = [name, f"{cost['launches']:.1f}", f"{cost['us']:,.1f}", f"{100 * cost['us'] / total:.1f} %"]
    cells.append(f"{cost['gaps_us']:,.1f}")
    if "bytes" in cost:
        speed = cost["bytes_per_s"]
        cells += [f"{cost['bytes'] / 1e6:,.1f}", f"{speed / 1e12:.2f}", f"{100 * speed / limit:.1f} %"]
    return _line(cells)


def _line(cells: Sequence[str]) -> str:
    name, *numbers = cells
    return f"{name:<32.32} {' '.join(f'{number:>9}' for number in numbers)}".rstrip()
