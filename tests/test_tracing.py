"""Tracer: what it writes is a valid Chrome trace; switched off it keeps nothing."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvik import SamplingParams
from kvik.llm_engine import LLMEngine
from kvik.tracing import NO_TRACE, NoTrace, Tracer


def _events(tracer: Tracer, folder: Path) -> list[dict[str, Any]]:
    path = folder / "trace.json"
    tracer.write(path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(path.read_text(), parse_constant=refuse)
    assert isinstance(data["traceEvents"], list)
    return data["traceEvents"]


def test_every_event_has_the_fields_of_the_chrome_trace_format(tmp_path: Path) -> None:
    tracer = Tracer()
    with tracer.span("outer", size=3, name_of="x"), tracer.span("inner"):
        tracer.counter("queue", waiting=2)
    events = _events(tracer, tmp_path)
    assert [event["name"] for event in events] == ["queue", "inner", "outer"]
    for event in events:
        assert event["ph"] in ("X", "C")
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert event["ts"] >= 0
        assert event["ph"] == "C" or event["dur"] >= 0
    assert events[0]["args"] == {"waiting": 2}
    assert events[2]["args"] == {"size": 3, "name_of": "x"}


def test_a_range_inside_another_lies_inside_it(tmp_path: Path) -> None:
    tracer = Tracer()
    with tracer.span("outer"), tracer.span("inner"):
        pass
    inner, outer = _events(tracer, tmp_path)
    tolerance = 1e-3  # a nanosecond, in microseconds
    assert outer["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + tolerance


def test_a_range_that_raises_is_recorded_and_the_exception_passes(tmp_path: Path) -> None:
    tracer = Tracer()
    with pytest.raises(KeyError), tracer.span("broken"):
        raise KeyError
    assert [event["name"] for event in _events(tracer, tmp_path)] == ["broken"]


def test_times_do_not_run_backwards(tmp_path: Path) -> None:
    tracer = Tracer()
    for _ in range(20):
        tracer.counter("tick", value=1)
    times = [event["ts"] for event in _events(tracer, tmp_path)]
    assert times == sorted(times)


def test_threads_that_live_together_have_tracks_of_their_own(tmp_path: Path) -> None:
    """Ranges of one track must nest; those of two threads that share one would overlap."""
    tracer, count = Tracer(), 40
    barrier = threading.Barrier(count)

    def work(number: int) -> None:
        with tracer.span("work", number=number):
            barrier.wait()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tracks = defaultdict(set)
    for event in _events(tracer, tmp_path):
        tracks[event["tid"]].add(event["args"]["number"])
    assert len(tracks) == count


def test_an_empty_trace_is_valid(tmp_path: Path) -> None:
    assert _events(Tracer(), tmp_path) == []


def test_names_of_any_language_survive(tmp_path: Path) -> None:
    tracer = Tracer()
    tracer.counter("очередь", 数=1)
    (event,) = _events(tracer, tmp_path)
    assert (event["name"], event["args"]) == ("очередь", {"数": 1})


def test_a_trace_that_cannot_be_written_raises_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        Tracer().write(tmp_path / "missing" / "trace.json")


def test_no_trace_has_the_same_interface_and_keeps_nothing() -> None:
    with NO_TRACE.span("x", size=1) as value:
        assert value is None
    NO_TRACE.counter("y", value=1)
    assert not vars(NO_TRACE)
    assert isinstance(Tracer(), NoTrace)
    with pytest.raises(ZeroDivisionError), NO_TRACE.span("x"):
        raise ZeroDivisionError


def test_ranges_are_shown_to_another_profiler_too() -> None:
    shown: list[str] = []

    @contextmanager
    def mark(name: str) -> Iterator[None]:
        shown.append(name)
        yield

    with Tracer(mark).span("outer", size=1):
        assert shown == ["outer"]


def test_a_step_of_an_engine_shows_its_parts(tmp_path: Path) -> None:
    tracer = Tracer()
    with LLMEngine("demo", device="cpu", kernels="torch", tracer=tracer) as engine:
        engine.add_request([5, 6, 7], SamplingParams(max_tokens=2, temperature=0.0))
        engine.run_until_complete()
    names = {event["name"] for event in _events(tracer, tmp_path)}
    assert names >= {"schedule", "collect", "update", "embedding", "norm_linear", "attention", "linear_add", "linear"}
