"""`kvik bench throughput|latency MODEL`: a named workload on a warm engine, best of several runs with other token ids.

`throughput` gives the engine all requests at once; `latency` one after the other, or from --users callers. The machine,
the versions and the commit stand beside every result. `kvik bench serve URL` is in `bench_serve`, `kvik bench ops` in
`bench_ops`, `kvik bench startup MODEL` in `bench_startup`, `kvik bench breakdown MODEL` in `bench_breakdown`.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.cli.bench_measure import Measurement, measure, read_bandwidth, step_bytes
from kvik.cli.bench_workloads import NANO, WORKLOADS, BenchRequest, Workload, draw, find_workload
from kvik.cli.engine import open_engine, render_config
from kvik.cli.environment import commit, machine, versions
from kvik.cli.options import EngineOptions, Parser, add_engine_flags, read_engine_options, results_file
from kvik.errors import ConfigError
from kvik.settings import Setting

if TYPE_CHECKING:
    from kvik.llm_engine import LLMEngine

__all__ = ["append", "footer", "run"]

_DEFAULT_WORKLOADS = {"throughput": "ragged256", "latency": "decode_bs1"}
_WARM_UP = BenchRequest(list(range(3, 35)), 8)


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    if argv and argv[0] == "serve":
        from kvik.cli import bench_serve

        return bench_serve.run(argv[1:])
    if argv and argv[0] == "ops":
        from kvik.cli import bench_ops

        return bench_ops.run(argv[1:])
    if argv and argv[0] == "startup":
        from kvik.cli import bench_startup

        return bench_startup.run(argv[1:])
    if argv and argv[0] == "breakdown":
        from kvik.cli import bench_breakdown

        return bench_breakdown.run(argv[1:])
    args = _parser().parse(argv)
    options = read_engine_options(args)
    workload = find_workload(args.workload or _DEFAULT_WORKLOADS[args.mode], args.requests, args.scale)
    _check(args, workload)
    if workload.together and "max_num_seqs" not in options.engine.given:
        options.engine.given["max_num_seqs"] = Setting(workload.num_requests, f"workload {workload.name}")
    if args.print_config:
        print(render_config(options, sampling=False))
        return 0
    users = (args.users or 1) if args.mode == "latency" else None
    with open_engine(options, args.log_level) as engine:
        record = _record(engine, options, workload, args, users)
    print(_render(record))
    if args.json:
        append(Path(args.json), record)
    return 0


def _parser() -> Parser:
    about = (
        "Measure an engine; kvik bench serve URL measures a server that runs, kvik bench ops single operators,\n"
        "kvik bench startup MODEL the start of an engine, kvik bench breakdown MODEL a step on a GPU.\n"
        "Each has a --help of its own."
    )
    parser = Parser("kvik bench", f"{about}\nWorkloads: {', '.join(WORKLOADS)}, decode_bsN.")
    parser.add_argument("mode", choices=tuple(_DEFAULT_WORKLOADS), help="all requests at once, or one after the other")
    add_engine_flags(parser, sampling=False)
    parser.add_argument("--workload", metavar="NAME", help="default: ragged256, for latency decode_bs1")
    parser.add_argument("--seed", default="0", metavar="SEED", help=f"of the lengths; {NANO}: the draw of nano-vllm")
    parser.add_argument("--requests", type=int, metavar="N", help="use only the first N requests")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="multiply all lengths by X, at most 1")
    parser.add_argument("--users", type=int, metavar="N", help="latency: callers who each wait for their answer")
    parser.add_argument("--runs", type=int, default=2, metavar="N", help="runs to take the best of")
    parser.add_argument("--json", type=results_file, metavar="FILE", help="append the result to a file, as one line")
    return parser


def _check(args: argparse.Namespace, workload: Workload) -> None:
    if args.seed == NANO and not workload.name.startswith("ragged256"):
        raise ConfigError(f"--seed {NANO} is a draw of ragged256, not of {workload.name}")
    if args.users is not None and (args.mode != "latency" or args.users < 1):
        raise ConfigError("--users needs at least 1 caller, and is for kvik bench latency")
    if args.runs < 1:
        raise ConfigError(f"--runs must be at least 1, got {args.runs}")


def _record(
    engine: LLMEngine, options: EngineOptions, workload: Workload, args: argparse.Namespace, users: int | None
) -> dict[str, Any]:
    """Everything about the best run, as it is written to a results file."""
    best = _best(engine, workload, args, users)
    plan, model = engine.resolved, engine.config.model
    if Path(model).is_dir():
        model = Path(model).resolve().name  # a result says what was measured, not where it lay
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "workload": workload.name,
        "seed": args.seed,
        "mode": args.mode,
        "users": users,
        "runs": args.runs,
        "model": model,
        "architecture": engine.spec.architecture,
        "parameters": engine.spec.num_parameters,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "options": {**{name: setting.value for name, setting in options.engine.given.items()}, "model": model},
        "max_num_seqs": plan.scheduler.max_num_seqs,
        "max_num_batched_tokens": plan.scheduler.max_num_batched_tokens,
        "result": best.summary(),
        "limit": _limit(engine, best),
        "machine": {**machine(), "device": plan.memory.device_name},
        "versions": versions(),
        "commit": commit(),
    }


def _best(engine: LLMEngine, workload: Workload, args: argparse.Namespace, users: int | None) -> Measurement:
    limit = engine.resolved.scheduler.max_model_len
    if workload.longest > limit:
        scale = int(100 * args.scale * limit / (workload.longest + 2)) / 100
        raise ConfigError(
            f"{workload.name} has requests of {workload.longest} tokens and the context of this engine is {limit}:"
            f" use --scale {scale:g}, or a larger --max-model-len"
        )
    vocab_size = engine.spec.vocab_size
    measure(engine, [_WARM_UP] * min(2, workload.num_requests), workload.temperature, None)
    runs = [
        measure(engine, draw(workload, args.seed, index, vocab_size), workload.temperature, users)
        for index in range(args.runs)
    ]
    return min(runs, key=lambda run: run.seconds)


def _limit(engine: LLMEngine, run: Measurement) -> dict[str, Any] | None:
    """How near decoding came to reading memory as fast as it can be read; None if nothing was only decoded."""
    from kvik.runtime.platform import select_platform

    weights, kv = step_bytes(engine, run)
    if not weights:
        return None
    steps = len(run.speeds.decode_steps)
    measured, buffer = read_bandwidth(weights + kv, select_platform(engine.config.device).device)
    reached = (weights + kv) * steps / run.decode_seconds
    return {
        "weight_bytes_per_step": weights,
        "kv_bytes_per_step": kv,
        "read_bytes_per_s": measured,
        "read_buffer_bytes": buffer,
        "reached_bytes_per_s": reached,
        "share": reached / measured,
    }


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a result to a results file, as one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _render(record: dict[str, Any]) -> str:
    result = record["result"]
    users = f", {record['users']} at a time" if record["users"] else ""
    lines = [
        f"{record['workload']} (seed {record['seed']}) on {record['model']}, {record['parameters']:,} parameters,"
        f" {record['dtype']}; {record['mode']}{users}, best of {record['runs']}",
        f"  {'tokens':<16} {result['prompt_tokens']:,} prompt, {result['output_tokens']:,} output in"
        f" {result['seconds']:.2f} s; {record['max_num_seqs']} sequences at most",
        f"  {'output':<16} {result['output_tok_s']:,.1f} tok/s",
        f"  {'prompt':<16} {result['prompt_tok_s']:,.1f} tok/s",
        f"  {'phases':<16} prefill {_speed(result['prefill_tok_s'])}, decode {_speed(result['decode_tok_s'])}",
        f"  {'TTFT':<16} {_milliseconds(result['ttft_s'])}",
        f"  {'TPOT':<16} {_milliseconds(result['tpot_s'])}",
        f"  {'host per step':<16} {result['host_ms_per_step']:.3f} ms outside of the executor, of which scheduler"
        f" {result['scheduler_ms_per_step']:.3f} ms; {result['steps']:,} steps",
        f"  {'memory limit':<16} {_limit_text(record['limit'])}",
    ]
    return "\n".join([*lines, *footer(record)])


def footer(record: dict[str, Any]) -> list[str]:
    """The lines that say where a result was measured, and with what."""
    box, about = record["machine"], record["versions"]
    source = f"kvik {about['kvik']}" + (f" ({record['commit']})" if record["commit"] else "")
    gpus = f"; {'; '.join(box['gpus'])}" if box["gpus"] else ""
    return [
        f"  {'machine':<16} {box['cpu']}, {box['cores']} cores, {box['memory'] / 2**30:.0f} GiB{gpus}",
        f"  {'versions':<16} {source}, torch {about['torch']}, python {about['python']}",
    ]


def _speed(speed: float | None) -> str:
    return "none" if speed is None else f"{speed:,.1f} tok/s"


def _milliseconds(percentiles: dict[str, float] | None) -> str:
    if percentiles is None:
        return "none"
    return ", ".join(f"{name} {1e3 * value:,.2f}" for name, value in percentiles.items()) + " ms"


def _limit_text(limit: dict[str, Any] | None) -> str:
    if limit is None:
        return "none: no step only decoded"
    read, reached = limit["weight_bytes_per_step"] + limit["kv_bytes_per_step"], limit["reached_bytes_per_s"]
    buffer, measured = limit["read_buffer_bytes"], limit["read_bytes_per_s"]
    return (
        f"{100 * limit['share']:.1f} %: decode steps read {read / 1e6:,.1f} MB at {reached / 1e9:.1f} GB/s; summing a"
        f" buffer of {buffer / 1e6:,.1f} MB reads {measured / 1e9:.1f} GB/s"
    )
