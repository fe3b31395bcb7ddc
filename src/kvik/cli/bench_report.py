"""What a load test found: numbers of a run, as a table in the terminal and as a picture of a sweep."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvik.cli.bench_client import Answer
from kvik.cli.bench_load import Run
from kvik.cli.bench_measure import percentiles
from kvik.errors import ConfigError

__all__ = ["GOALS", "check_plot", "plot", "render", "row", "summarize"]

GOALS = ("ttft", "tpot", "itl", "e2e")
_BUSY = 0.8
_COLUMNS = ("load", "req/s", "output tok/s", "TTFT p50", "p99", "TPOT p50", "p99", "ITL p99", "failed", "goodput/s")


@dataclasses.dataclass(frozen=True, slots=True)
class _Timing:
    """Seconds of one answer: to the first text, per later token, between events at most, and to the end."""

    ttft: float
    tpot: float | None
    itl: float
    e2e: float

    def meets(self, goals: Mapping[str, float]) -> bool:
        """Whether every goal (ms) is met; with one token there is no time per later token to miss."""
        return all(1e3 * (getattr(self, name) or 0.0) <= goal for name, goal in goals.items())


def _gaps(answer: Answer) -> list[float]:
    return [after - before for before, after in itertools.pairwise(answer.times)]


def _num_output(answer: Answer) -> int:
    """Output tokens as the server counted them, or the events with text where it did not."""
    return len(answer.times) if answer.usage is None else answer.usage[1]


def _timing(answer: Answer) -> _Timing:
    times, later = answer.times, _num_output(answer) - 1
    return _Timing(
        ttft=(times[0] if times else answer.end) - answer.start,
        tpot=(times[-1] - times[0]) / later if times and later > 0 else None,
        itl=max(_gaps(answer), default=0.0),
        e2e=answer.end - answer.start,
    )


def summarize(run: Run, goals: Mapping[str, float], callers: int = 0) -> dict[str, Any]:
    """The numbers of a run. Speeds are of completed requests over the whole time, first request to last answer.

    The first requests of the `callers` of a closed load come all at once; `later_ttft_s` leaves them out.
    `itl_s` are the times between events with text; a server that puts several tokens into one event has longer ones.
    """
    done = [answer for answer in run.answers if not answer.error]
    timings = [_timing(answer) for answer in done]
    events = sum(len(answer.times) for answer in run.answers)
    output_tokens = sum(_num_output(answer) for answer in done)
    summary: dict[str, Any] = {
        "seconds": run.seconds,
        "completed": len(done),
        "failed": len(run.answers) - len(done),
        "unfinished": run.num_unfinished,
        "prompt_tokens": sum(answer.usage[0] for answer in done if answer.usage),
        "output_tokens": output_tokens,
        "without_usage": sum(answer.usage is None for answer in done),
        "request_s": len(done) / run.seconds,
        "output_tok_s": output_tokens / run.seconds,
        "ttft_s": percentiles([timing.ttft for timing in timings]),
        "tpot_s": percentiles([timing.tpot for timing in timings]),
        "itl_s": percentiles([gap for answer in done for gap in _gaps(answer)]),
        "e2e_s": percentiles([timing.e2e for timing in timings]),
        "errors": _errors(run.answers),
        "client": {
            "cpu_share": run.cpu_seconds / run.seconds,
            "events": events,
            "us_per_event": 1e6 * run.cpu_seconds / events if events else None,
        },
    }
    if callers:
        later = sorted(run.answers, key=lambda answer: answer.start)[callers:]
        summary["later_ttft_s"] = percentiles([_timing(answer).ttft for answer in later if not answer.error])
    if goals:
        good = sum(timing.meets(goals) for timing in timings)
        ended = len(run.answers)
        summary["goodput"] = {
            "goals_ms": dict(goals), "request_s": good / run.seconds, "share": good / ended if ended else None,
        }  # fmt: skip
    return summary


def _errors(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """Failures by kind, the most frequent first, with the first message of each."""
    counts = Counter(answer.error for answer in answers if answer.error)
    first = {answer.error: answer.message for answer in reversed(answers)}
    return {kind: {"count": count, "message": first[kind]} for kind, count in counts.most_common()}


def render(record: Mapping[str, Any]) -> str:
    """A record of one load as text."""
    result, client = record["result"], record["result"]["client"]
    counts = f"{result['completed']:,} completed, {result['failed']:,} failed"
    counts += f", {result['unfinished']:,} cut off" if result["unfinished"] else ""
    lines = [
        f"{record['load']} on {record['model']} at {record['url']}{record['path']}",
        f"  {'requests':<16} {counts} in {result['seconds']:.2f} s; {result['request_s']:,.2f} a second",
        f"  {'tokens':<16} {result['prompt_tokens']:,} prompt, {result['output_tokens']:,} output",
        f"  {'output':<16} {result['output_tok_s']:,.1f} tok/s",
        *(f"  {name.upper():<16} {_milliseconds(result[f'{name}_s'])}" for name in GOALS),
    ]
    if result.get("later_ttft_s"):
        lines.insert(5, f"  {'TTFT, later ones':<16} {_milliseconds(result['later_ttft_s'])}")
    if "goodput" in result:
        goals = ", ".join(f"{name} {goal:g} ms" for name, goal in result["goodput"]["goals_ms"].items())
        share = result["goodput"]["share"]
        met = "no request ended" if share is None else f"{100 * share:.1f} % of the requests"
        lines.append(
            f"  {'goodput':<16} {result['goodput']['request_s']:,.2f} requests a second within {goals} ({met})"
        )
    each = f", {client['us_per_event']:.1f} us an event" if client["us_per_event"] else ""
    lines.append(f"  {'load tool':<16} {100 * client['cpu_share']:.0f} % of one core{each}")
    return "\n".join([*lines, *_remarks(result)])


def _remarks(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers must know."""
    lines = [f"  {kind}: {found['count']:,}, first: {found['message']}" for kind, found in result["errors"].items()]
    if result["without_usage"]:
        lines.append(f"  {result['without_usage']:,} answers had no usage: their tokens are counted as events")
    if result["client"]["cpu_share"] > _BUSY:
        lines.append("  the load tool itself was busy: share the load between several, from other cores")
    return lines


def row(record: Mapping[str, Any] | None) -> str:
    """A record as a line of the table of a sweep; for None its heading. Times are in milliseconds."""
    if record is None:
        return "".join(f"{column:>13}" for column in _COLUMNS)
    result = record["result"]
    cells = [
        record["load"],
        f"{result['request_s']:,.2f}",
        f"{result['output_tok_s']:,.1f}",
        *(_cell(result[f"{name}_s"], p) for name in ("ttft", "tpot") for p in ("p50", "p99")),
        _cell(result["itl_s"], "p99"),
        f"{result['failed']:,}",
        f"{result['goodput']['request_s']:,.2f}" if "goodput" in result else "-",
    ]
    return "\n".join(["".join(f"{cell:>13}" for cell in cells), *_remarks(result)])


def _cell(found: Mapping[str, float] | None, percentile: str) -> str:
    return "-" if found is None else f"{1e3 * found[percentile]:,.2f}"


def _milliseconds(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "none"
    return ", ".join(f"{name} {1e3 * value:,.2f}" for name, value in found.items()) + " ms"


def check_plot(path: str) -> None:
    """Raise ConfigError if pictures of that kind cannot be drawn here."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"--plot needs matplotlib ({error}): pip install 'kvik[plot]'") from error
    kinds, kind = Figure().canvas.get_supported_filetypes(), Path(path).suffix[1:].lower()
    if kind and kind not in kinds:
        raise ConfigError(f"--plot cannot draw a file of the kind {kind!r}; it knows {', '.join(sorted(kinds))}")


def plot(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw latency against throughput, one point for each load that completed anything. Raises OSError."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, name, title in zip(
        figure.subplots(1, 2), ("ttft_s", "tpot_s"), ("time to first token", "time per output token"), strict=True
    ):
        points = [record for record in records if record["result"][name] is not None]
        speeds = [record["result"]["output_tok_s"] for record in points]
        for percentile in ("p50", "p90", "p99"):
            axes.plot(speeds, [1e3 * r["result"][name][percentile] for r in points], marker="o", label=percentile)
        for speed, record in zip(speeds, points, strict=True):
            place = (speed, 1e3 * record["result"][name]["p99"])
            axes.annotate(record["load"], place, textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
        axes.set(xlabel="output tokens per second", ylabel=f"{title} (ms)", xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{records[0]['model']} at {records[0]['url']}{records[0]['path']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
