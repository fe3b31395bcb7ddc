"""`kvik generate`: streaming, several prompts, JSON, speeds, traces, Ctrl-C, and outputs that cannot be written."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_harness import KVIK, Result, start

from kvik import LLM, SamplingParams

Kvik = Callable[..., Result]
GREEDY = ("--temperature", 0, "--ignore-eos")


@pytest.fixture(scope="module")
def texts(model: str) -> dict[str, str]:
    """What the model says greedily, in 6 tokens."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = ["Once upon", "The quick"]
    with LLM(model) as llm:
        return dict(zip(prompts, (output.text for output in llm.generate(prompts, params)), strict=True))


def test_one_prompt_is_printed_as_text(kvik: Kvik, model: str, texts: dict[str, str]) -> None:
    result = kvik("generate", model, "Once upon", *GREEDY, "--max-tokens", 6)
    assert result == Result(0, texts["Once upon"] + "\n", "")


def test_several_prompts_come_in_order_with_headers(kvik: Kvik, model: str, texts: dict[str, str]) -> None:
    result = kvik("generate", model, "Once upon", "The quick", *GREEDY, "--max-tokens", 6)
    blocks = [f"==> {prompt} <==\n{text}\n" for prompt, text in texts.items()]
    assert result == Result(0, "\n".join(blocks), "")


def test_several_completions_are_numbered(kvik: Kvik, model: str, texts: dict[str, str]) -> None:
    result = kvik("generate", model, "Once upon", *GREEDY, "--max-tokens", 6, "--n", 2)
    blocks = [f"==> Once upon #{number} <==\n{texts['Once upon']}\n" for number in (1, 2)]
    assert result.out == "\n".join(blocks)


def test_prompts_from_files_and_standard_input(
    kvik: Kvik, model: str, texts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text("The quick\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon\n"))
    argv = ("generate", "--json", model, "-", "--file", tmp_path / "prompt.txt", *GREEDY, "--max-tokens", 6)
    records = [json.loads(line) for line in kvik(*argv).out.splitlines()]
    assert [record["prompt"] for record in records] == list(texts)
    assert [record["text"] for record in records] == list(texts.values())


def test_json_has_everything(kvik: Kvik, model: str) -> None:
    result = kvik("generate", model, "Once upon", *GREEDY, "--max-tokens", 3, "--json", "--logprobs", 2, "--n", 2)
    record = json.loads(result.out)
    assert len(record["token_ids"]) == 3 and record["finish_reason"] == "length" and record["index"] == 0
    assert record["usage"] == {"prompt_tokens": 2, "completion_tokens": 6, "cached_tokens": 0, "total_tokens": 8}
    assert record["metrics"]["time_to_first_token"] > 0
    assert [len(item["top"]) for item in record["logprobs"]] == [2, 2, 2]
    assert [output["text"] for output in record["outputs"]] == [record["text"]] * 2


def test_sampling_flags_arrive(kvik: Kvik, model: str) -> None:
    forced = kvik(
        "generate", model, "x", "--max-tokens", 3, "--logit-bias", "70=100", "--allowed-token-ids", "70,71", "--json"
    )
    assert json.loads(forced.out)["token_ids"] == [70, 70, 70]
    drawn = [kvik("generate", model, "x", "--seed", seed, "--max-tokens", 8).out for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_stats_and_profile(kvik: Kvik, model: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    result = kvik("generate", model, "Once upon", *GREEDY, "--max-tokens", 4, "--stats", "--profile", trace)
    assert "prefill 2 tokens at " in result.err and "decode 4 tokens at " in result.err
    assert "first token after " in result.err and result.err.count("\n") == 1
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"schedule", "detokenize", *(["launch"] if torch.cuda.is_available() else ["forward", "sample"])} <= names


def test_interruption_ends_the_line_and_keeps_the_trace(long_model: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    argv = ["generate", long_model, "Once upon", "--max-tokens", "20000", "--ignore-eos", "--profile", str(trace)]
    process = start(*argv, "--max-num-seqs", "1", "--threads", "1", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + rest).endswith(b"\n") and errors == b""
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_closed_pipe_is_no_traceback(long_model: str) -> None:
    argv = ["generate", long_model, "Once upon", "--max-tokens", "20000", "--ignore-eos", "--max-num-seqs", "1"]
    process = start(*argv, "--threads", "1", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_line(model: str) -> None:
    with open("/dev/full", "wb") as full:
        argv = [*KVIK, "generate", model, "x", "--max-tokens", "3", "--json"]
        process = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert process.returncode == 1
    assert process.stderr == "kvik: error: [Errno 28] No space left on device\n"


def test_a_trace_that_cannot_be_written_is_an_error(kvik: Kvik, model: str) -> None:
    result = kvik("generate", model, "x", "--max-tokens", 2, "--profile", "/absent/trace.json")
    assert result.code == 1 and "/absent/trace.json" in result.err and "Traceback" not in result.err
    assert result.out == "", "it is told before the work"


def test_what_is_not_printed_is_said(kvik: Kvik, model: str) -> None:
    for flags, said in (((), True), (("--json",), False)):
        result = kvik("generate", model, "x", "--max-tokens", 2, "--logprobs", 1, *flags)
        assert result.code == 0 and ("with --json only" in result.err) == said


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_closed_standard_streams_are_no_traceback(model: str) -> None:
    for prompt, closed, code in (("x", ">&-", 0), ("-", "<&-", 2)):
        command = f'"$@" {prompt} --max-tokens 2 --threads 1 {closed}'
        argv = ["sh", "-c", command, "sh", *KVIK, "generate", model]
        done = subprocess.run(argv, stderr=subprocess.PIPE, text=True, timeout=60)
        assert "Traceback" not in done.stderr and done.returncode == code, done.stderr


def test_the_module_runs_as_a_script() -> None:
    assert subprocess.run([sys.executable, "-m", "kvik.cli.main", "--version"], capture_output=True).returncode == 0
