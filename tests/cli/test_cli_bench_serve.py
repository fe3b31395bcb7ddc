"""`kvik bench serve`: what it reports is what the server did, failures are counted by kind, and mistakes are named."""

from __future__ import annotations

import json
import math
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_harness import PATIENCE, Result, start

pytest.importorskip("httptools", reason="kvik bench serve needs kvik[server]")

from fake_openai import Behaviour, fake_openai

from kvik.cli.bench_client import Answer
from kvik.cli.bench_load import Load, Planned, Run, Workload, planned, read_trace
from kvik.cli.bench_report import summarize
from kvik.errors import ConfigError

Kvik = Callable[..., Result]
SMALL = ("--requests", 6, "--clients", 3, "--output-tokens", 4, "--warm-up", 0)


def _workload(**options: Any) -> Workload:
    defaults = {"prompt_tokens": (5, 9), "output_tokens": (2, 4), "seed": "0", "num_requests": 500, "duration": None}
    return Workload(**{**defaults, **options})


def _measure(kvik: Kvik, file: Path, *argv: object) -> dict[str, Any]:
    result = kvik("bench", "serve", *argv, "--json", file)
    assert result.code == 0, result.err
    record: dict[str, Any] = json.loads(file.read_text().splitlines()[-1])
    return record


def test_numbers_follow_from_the_times_of_events() -> None:
    good = Answer(start=1.0, end=3.0, times=[1.5, 2.0, 2.5], usage=(10, 5))
    slow = Answer(start=1.0, end=9.0, times=[5.0], usage=None)
    failed = Answer(start=1.0, end=2.0, times=[1.5], error="HTTP 429", message="later")
    run = Run(answers=[good, slow, failed, failed], seconds=8.0, cpu_seconds=2.0)
    result = summarize(run, {"ttft": 600.0, "tpot": 251.0})
    assert result["completed"] == 2 and result["failed"] == 2
    assert result["prompt_tokens"] == 10 and result["output_tokens"] == 5 + 1 and result["without_usage"] == 1
    assert result["output_tok_s"] == 6 / 8 and result["request_s"] == 2 / 8
    assert result["ttft_s"] == {"p50": 0.5, "p90": 4.0, "p99": 4.0}
    assert result["tpot_s"]["p50"] == (2.5 - 1.5) / 4 and result["itl_s"]["p50"] == 0.5
    assert result["e2e_s"]["p99"] == 8.0
    assert result["errors"] == {"HTTP 429": {"count": 2, "message": "later"}}
    assert result["goodput"]["request_s"] == 1 / 8 and result["goodput"]["share"] == 1 / 4
    assert result["client"]["cpu_share"] == 0.25 and result["client"]["us_per_event"] == 2e6 / 6


def test_the_first_requests_of_callers_who_begin_at_once_are_shown_apart() -> None:
    starts = (0.0, 3.0, 0.1, 5.0)
    run = Run(answers=[Answer(start=start, end=9.0, times=[start + 1 + start], usage=(1, 1)) for start in starts])
    run.seconds = 9.0
    result = summarize(run, {}, callers=2)
    assert result["ttft_s"] == {"p50": 1.1, "p90": 6.0, "p99": 6.0}
    assert result["later_ttft_s"] == {"p50": 4.0, "p90": 6.0, "p99": 6.0}
    assert summarize(run, {}, callers=4)["later_ttft_s"] is None and "later_ttft_s" not in summarize(run, {})
    run.answers[0].fail("HTTP 429", "later")  # a first request, whether it fails or not
    assert summarize(run, {}, callers=2)["later_ttft_s"] == {"p50": 4.0, "p90": 6.0, "p99": 6.0}


def test_arrivals_are_poisson_and_the_same_for_a_seed() -> None:
    load = Load("rate", 4.0)
    first = list(planned(_workload(), load))
    assert first == list(planned(_workload(), load)) != list(planned(_workload(seed="1"), load))
    gaps = [b.at - a.at for a, b in zip([Planned(0, 1, 1), *first], first, strict=False)]
    mean = sum(gaps) / len(gaps)
    assert abs(mean - 0.25) < 4 * 0.25 / math.sqrt(len(gaps))  # four standard errors of an exponential's mean
    assert abs(sum(gap > 0.25 for gap in gaps) / len(gaps) - math.exp(-1)) < 4 * 0.5 / math.sqrt(len(gaps))
    assert all(5 <= request.prompt <= 9 and 2 <= request.output_tokens <= 4 for request in first)  # type: ignore[operator]


def test_a_closed_load_sends_what_was_asked(kvik: Kvik, tmp_path: Path) -> None:
    behaviour = Behaviour()
    with fake_openai(behaviour) as url:
        argv = (f"{url}/v1", "--clients", 3, "--requests", 7, "--prompt-tokens", "5..9", "--output-tokens", "2..4")
        record = _measure(kvik, tmp_path / "r.jsonl", *argv, "--token-ids", "100..120", "--warm-up", 2)
    measured = behaviour.bodies[1 + 2 :]
    assert len(measured) == record["result"]["completed"] == 7
    assert all(5 <= len(body["prompt"]) <= 9 and 2 <= body["max_tokens"] <= 4 for body in measured)
    assert all(100 <= token_id <= 120 for body in behaviour.bodies for token_id in body["prompt"])
    assert all(body["model"] == "fake" and body["ignore_eos"] and body["stream"] for body in behaviour.bodies)
    assert record["result"]["prompt_tokens"] == sum(len(body["prompt"]) for body in measured)
    assert record["result"]["output_tokens"] == sum(body["max_tokens"] for body in measured)
    assert record["load"] == "3 clients" and record["model"] == "fake" and record["machine"]["cpu"]


def test_callers_wait_for_their_answers(kvik: Kvik, tmp_path: Path) -> None:
    with fake_openai(Behaviour(interval=0.02)) as url:
        argv = (url, "--warm-up", 0, "--clients", 2, "--requests", 6, "--output-tokens", 5)
        result = _measure(kvik, tmp_path / "r.jsonl", *argv)["result"]
    assert result["seconds"] >= 3 * 5 * 0.02  # three rounds of two
    assert result["tpot_s"]["p50"] >= 0.02 and result["e2e_s"]["p50"] >= 5 * 0.02


def test_a_chat_sends_words_and_its_role_is_no_first_token(kvik: Kvik, tmp_path: Path) -> None:
    behaviour = Behaviour(interval=0.1)
    with fake_openai(behaviour) as url:
        argv = (url, "--endpoint", "chat", "--clients", 1, "--requests", 2, "--prompt-tokens", 6, "--output-tokens", 2)
        result = _measure(kvik, tmp_path / "r.jsonl", *argv, "--warm-up", 0)["result"]
    assert all(len(body["messages"][0]["content"].split()) == 6 for body in behaviour.bodies[1:])
    assert result["ttft_s"]["p99"] > 0.02 and result["client"]["events"] == 4


def test_a_trace_says_when_and_what(kvik: Kvik, tmp_path: Path) -> None:
    trace, behaviour = tmp_path / "trace.jsonl", Behaviour()
    lines = [
        {"time": 0.3, "prompt_tokens": 7, "output_tokens": 2},
        {"time": 0.0, "prompt": "Once upon", "output_tokens": 3},
    ]
    trace.write_text("\n".join(json.dumps(line) for line in lines))
    with fake_openai(behaviour) as url:
        record = _measure(kvik, tmp_path / "r.jsonl", url, "--trace", trace, "--warm-up", 0)
    assert record["load"] == "trace" and record["result"]["seconds"] >= 0.3
    first, second = behaviour.bodies[1:]
    assert first["prompt"] == "Once upon" and first["max_tokens"] == 3
    assert len(second["prompt"]) == 7 and second["max_tokens"] == 2


def test_the_prompts_of_a_trace_are_new_when_they_are_measured(kvik: Kvik, tmp_path: Path) -> None:
    trace, behaviour = tmp_path / "trace.jsonl", Behaviour()
    lines = [{"time": 0, "prompt": text, "output_tokens": 3} for text in ("Once upon a time", [5, 6, 7])]
    trace.write_text("\n".join(json.dumps(line) for line in lines))
    with fake_openai(behaviour) as url:
        _measure(kvik, tmp_path / "r.jsonl", url, "--trace", trace, "--warm-up", 2)
    prompts = [body["prompt"] for body in behaviour.bodies[1:]]
    assert [len(prompt) for prompt in prompts[:2]] == [4, 3] and [5, 6, 7] not in prompts[:2]
    assert prompts[2:] == ["Once upon a time", [5, 6, 7]]


def test_the_time_of_a_load_begins_with_its_first_request(kvik: Kvik, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"time": 1.7e9 + wait, "prompt_tokens": 5, "output_tokens": 2} for wait in (0, 0.2)]  # of a clock
    trace.write_text("\n".join(json.dumps(line) for line in lines))
    with fake_openai(Behaviour()) as url:
        result = _measure(kvik, tmp_path / "r.jsonl", url, "--trace", trace)["result"]
        assert 0.2 <= result["seconds"] < 2.0
        options = ("--rate", 0.5, "--requests", 1, "--output-tokens", 2, "--warm-up", 0)
        assert next(planned(_workload(seed="0"), Load("rate", 0.5))).at > 0.5  # is waited for, but does not count
        assert _measure(kvik, tmp_path / "r.jsonl", url, *options)["result"]["seconds"] < 0.4


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"time": 0}', '{"time": -1, "prompt": "x", "output_tokens": 1}',
             '{"time": 0, "prompt_tokens": "x", "output_tokens": 1}'],
)  # fmt: skip
def test_a_wrong_trace_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(f'{{"time": 0, "prompt_tokens": 1, "output_tokens": 1}}\n{line}\n')
    with pytest.raises(ConfigError, match=r"trace\.jsonl:2"):
        read_trace(file)


FAULTS = {
    "429": ("HTTP 429", "fault 429"),
    "500": ("HTTP 500", "fault 500"),
    "close": ("broken stream", "closed after 2 events"),
    "no end": ("broken stream", r"without \[DONE\] after 2 events"),
    "error": ("error in the stream", "the engine is gone"),
    "bad json": ("malformed answer", "malformed"),
    "garbage": ("malformed answer", "HttpParser"),
    "plain": ("no stream", "all at once"),
    "silence": ("timeout", "0.7 s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_failures_are_counted_by_kind(kvik: Kvik, tmp_path: Path, fault: str) -> None:
    kind, message = FAULTS[fault]
    with fake_openai(Behaviour(faults=[fault, fault], spare=2)) as url:
        record = _measure(kvik, tmp_path / "r.jsonl", url, *SMALL, "--timeout", 0.7, "--goodput", "ttft:10000")
    result = record["result"]
    assert result["completed"] == 4 and result["failed"] == 2 and result["output_tokens"] == 4 * 4
    assert list(result["errors"]) == [kind] and result["errors"][kind]["count"] == 2
    assert re.search(message, result["errors"][kind]["message"])
    assert result["goodput"]["share"] == 4 / 6


def test_an_answer_without_text_is_no_failure(kvik: Kvik, tmp_path: Path) -> None:
    with fake_openai(Behaviour(faults=["no text"] * 6, spare=1)) as url:
        result = _measure(kvik, tmp_path / "r.jsonl", url, *SMALL)["result"]
    assert result["completed"] == 6 and result["output_tokens"] == 24 and result["client"]["events"] == 0
    assert result["ttft_s"] is not None and result["tpot_s"] is None


def test_a_sweep_goes_on_where_a_load_fails(kvik: Kvik, tmp_path: Path) -> None:
    argv = ("--requests", 2, "--output-tokens", 2, "--warm-up", 1, "--json", tmp_path / "r.jsonl")
    with fake_openai(Behaviour(faults=["500"] * 3, spare=4)) as url:
        result = kvik("bench", "serve", url, "--sweep", "1,2,1", *argv)
    assert result.code == 1
    lines = (tmp_path / "r.jsonl").read_text().splitlines()
    assert [json.loads(line)["result"]["completed"] for line in lines] == [2, 0, 2]


def test_failures_are_shown(kvik: Kvik) -> None:
    with fake_openai(Behaviour(faults=["429"] * 6, spare=1)) as url:
        result = kvik("bench", "serve", url, *SMALL)
    assert result.code == 1 and "HTTP 429: 6, first: fault 429" in result.out


def test_what_cannot_work_is_found_before_the_load(kvik: Kvik, tmp_path: Path) -> None:
    with fake_openai(Behaviour(api_key="k", models=("first", "second"))) as url:
        for argv, text in (
            ((), "refuses the key (HTTP 401): give --api-key"),
            (("--api-key", "k", "--model", "secand"), "has no model 'secand' (did you mean 'second'?)"),
            (("--api-key", "k", "--sweep", "1,x"), "--sweep has 'x'"),
            (("--api-key", "k", "--goodput", "tftt:3"), "--goodput has 'tftt:3'"),
            (("--api-key", "k", "--prompt-tokens", "9..5"), "--prompt-tokens must be N or A..B"),
            (("--api-key", "k", "--rate", "0"), "--rate must be above 0"),
            (("--endpoint", "chat", "--prompts", "ids"), "a chat has no token ids"),
            (("--endpoint", "chat", "--token-ids", "3..9"), "--token-ids has no effect on prompts of words"),
            (("--trace", "x.jsonl", "--output-tokens", "9"), "a --trace says how long its requests are"),
            (("--api-key", "k\nx"), "a line break"),
        ):
            result = kvik("bench", "serve", url, *argv)
            assert result.code == 2 and text in result.err, result
        assert kvik("bench", "serve", url, *SMALL, "--api-key", "k").code == 0
        assert kvik("bench", "serve", url, *SMALL, "--api-key", "k\n").code == 0  # as files end
    with fake_openai(Behaviour(faults=["bad json"])) as url:
        assert "answers, but not as a server of OpenAI's API does" in kvik("bench", "serve", url).err
    with fake_openai(Behaviour(models=())) as url:
        assert "does not list its models" in kvik("bench", "serve", url).err
    with fake_openai(Behaviour(faults=["429"] * 2, spare=1)) as url:
        assert "every request of the warm-up failed" in kvik("bench", "serve", url, "--warm-up", 2).err
    assert "cannot reach" in kvik("bench", "serve", url).err
    assert "is not the URL of a server" in kvik("bench", "serve", "127.0.0.1:8000").err


def test_a_server_without_extensions_is_measured_too(kvik: Kvik, tmp_path: Path) -> None:
    behaviour = Behaviour(knows_ignore_eos=False, sends_usage=False)
    with fake_openai(behaviour) as url:
        result = kvik("bench", "serve", url, *SMALL, "--json", tmp_path / "r.jsonl")
    assert "does not take ignore_eos" in result.out and "6 answers had no usage" in result.out
    assert json.loads((tmp_path / "r.jsonl").read_text())["result"]["output_tokens"] == 6 * 4
    assert not any("ignore_eos" in body for body in behaviour.bodies[1:])


def test_a_sweep_is_a_line_for_each_load_and_a_picture(kvik: Kvik, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "r.jsonl", tmp_path / "sweep.png"
    with fake_openai(Behaviour()) as url:
        argv = ("--sweep", "1,4,50/s", "--requests", 4, "--output-tokens", 3, "--json", file, "--plot", picture)
        result = kvik("bench", "serve", url, *argv)
    assert result.code == 0 and len(result.out.splitlines()) == 1 + 3
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["load"] for record in records] == ["1 client", "4 clients", "50/s"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_is_refused_before_the_load(
    kvik: Kvik, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = kvik("bench", "serve", "http://127.0.0.1:1", "--plot", tmp_path / "x.png")
    assert result.code == 2 and "pip install 'kvik[plot]'" in result.err


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_refused_before_the_load(kvik: Kvik, tmp_path: Path, option: str) -> None:
    if option == "--plot":
        pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    wrong = [(tmp_path, "cannot be written"), (tmp_path / "file" / "r.png", "cannot be written")]
    if option == "--plot":
        wrong.append((tmp_path / "r.foo", "kind 'foo'"))
    behaviour = Behaviour()
    with fake_openai(behaviour) as url:
        for path, text in wrong:
            result = kvik("bench", "serve", url, *SMALL, option, path)
            assert result.code == 2 and text in result.err, result
        assert not behaviour.bodies
        assert kvik("bench", "serve", url, *SMALL, option, tmp_path / "new" / "r.png").code == 0
    assert (tmp_path / "new" / "r.png").stat().st_size


def test_a_result_is_in_the_file_as_soon_as_its_load_is_over(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    with fake_openai(Behaviour(interval=0.05)) as url:
        argv = ("--sweep", "1,2", "--requests", "2", "--output-tokens", "100", "--warm-up", "0", "--json", file)
        process = start("bench", "serve", url, *map(str, argv), stdout=-1)
        try:
            end = time.monotonic() + PATIENCE
            while not (file.exists() and file.read_text()) and process.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
            assert process.poll() is None  # the second load goes on for five seconds
        finally:
            process.kill()
            process.communicate()
    assert [json.loads(line)["load"] for line in file.read_text().splitlines()] == ["1 client"]


def test_ctrl_c_prints_what_was_measured(tmp_path: Path) -> None:
    behaviour = Behaviour(interval=0.01)
    with fake_openai(behaviour) as url:
        argv = ("--clients", "2", "--requests", "100000", "--output-tokens", "3", "--warm-up", "0")
        process = start("bench", "serve", url, *argv, stdout=-1)
        try:
            end = time.monotonic() + PATIENCE
            while len(behaviour.bodies) <= 12 and time.monotonic() < end:
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            out = process.communicate(timeout=PATIENCE)[0].decode()
        finally:
            process.kill()
    assert process.returncode == 130 and "interrupted: these are the numbers so far" in out
    assert re.search(r"requests +\d+ completed, 0 failed, 2 cut off", out), out
