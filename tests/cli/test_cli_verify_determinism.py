"""`kvik verify-determinism`: the matrix is what it says, a mismatch is found and named, and the cost is measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_harness import Result

from kvik.cli.schedules import difference, draw_requests, make_schedules
from kvik.config import SchedulerConfig
from kvik.kernels.cpu.native import available
from kvik.outputs import CompletionOutput, RequestOutput, TokenLogprobs, Usage

Kvik = Callable[..., Result]
SMALL = (
    "--device", "cpu", "--requests", 16, "--longest-prompt", 60, "--longest-output", 20, "--kvcache-block-size", 16,
)  # fmt: skip
native = pytest.mark.skipif(not available(), reason="Kvik was built without its native kernels")


@native
def test_no_mismatch_and_a_cost(kvik: Kvik, model: str, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    argv = ("--cost-runs", 1, "--cost-requests", 2, "--scale", 0.03, "--json", file)
    result = kvik("verify-determinism", model, *SMALL, *argv)
    assert result.code == 0, result.err
    record = json.loads(file.read_text())
    assert record["pairs"] == 144 and record["mismatches"] == 0 and record["deterministic"] is True
    assert record["cost"]["workload"] == "ragged256[requests=2,scale=0.03]" and record["cost"]["cost_percent"] < 100
    assert f"0 mismatches in 144 pairs; digest {record['digest']}" in result.out and "% of the throughput" in result.out
    rows = {row["schedule"]: row for row in record["schedules"]}
    assert len(rows) == 9 and all(row["schedule"] in result.out for row in rows.values())
    assert rows["prefix cache, warm"]["cached_tokens"] > 0 and rows["preemption, uncached"]["preemptions"] > 0
    assert rows["all at once, uncached"]["cached_tokens"] == 0
    again = kvik("verify-determinism", model, *SMALL, "--cost-runs", 0, "--schedules", 2, "--max-num-seqs", 3)
    assert record["digest"] in again.out, "another engine gives the same bits"


@native
def test_without_the_option_mismatches_are_named(kvik: Kvik, model: str) -> None:
    result = kvik("verify-determinism", model, *SMALL, "--no-deterministic", "--schedules", 14)
    assert result.code == 1 and "not deterministic" in result.out and "% of" not in result.out
    assert "instead of" in result.out and " 0 mismatches" not in result.out


def test_what_cannot_be_run_is_refused(kvik: Kvik, model: str) -> None:
    for argv, text in (
        (("--requests", 0), "--requests must be at least 1"),
        (("--schedules", 1), "--schedules must be at least 2"),
        (("--longest-prompt", 500, "--cost-runs", 0, "--no-deterministic"), "more than the context of 512"),
        (("--workload", "ragged"), "did you mean"),
        (("--device", "cpu", "--kernels", "torch"), "needs the native kernels"),
    ):
        result = kvik("verify-determinism", model, *argv)
        assert result.code == 2 and text in result.err


def test_schedules_fit_the_engine_and_differ() -> None:
    requests = draw_requests(20, 100, 10, 16, 500, seed=3)
    assert requests == draw_requests(20, 100, 10, 16, 500, seed=3) != draw_requests(20, 100, 10, 16, 500, seed=4)
    engine = SchedulerConfig(block_size=16, num_blocks=9, max_num_seqs=2, max_num_batched_tokens=32, max_model_len=128)
    schedules = make_schedules(engine, requests, 30, seed=3)
    assert len(schedules) == 30 and len({dataclasses.astuple(schedule)[1:] for schedule in schedules[10:]}) > 10
    for schedule in schedules:
        assert schedule.settings.max_num_seqs <= 2 and schedule.settings.max_num_batched_tokens <= 32
        assert 110 <= schedule.settings.num_blocks * 16 <= 144


def test_the_smallest_difference_counts() -> None:
    def output(logprob: float, prompt_logprob: float = -2.0, last: int = 4) -> RequestOutput:
        tokens = TokenLogprobs(3, logprob, 1), TokenLogprobs(last, -1.0, 1)
        completion = CompletionOutput(index=0, text="", token_ids=(3, last), logprobs=tokens)
        return RequestOutput(
            request_id="a", prompt=None, prompt_token_ids=(1, 2), outputs=(completion,),
            usage=Usage(prompt_tokens=2, completion_tokens=2),
            prompt_logprobs=(None, TokenLogprobs(2, prompt_logprob, 1)),
        )  # fmt: skip

    base = output(-0.1)
    assert difference(output(-0.1), base) is None
    assert difference(output(-0.10000000000000002), base) == (
        "token 0: id 3 at -0.10000000000000002, rank 1 instead of id 3 at -0.1, rank 1"
    )
    assert (difference(output(-0.1, -2.5), base) or "").startswith("prompt token 1: id 2 at -2.5")
    assert (difference(output(-0.1, last=5), base) or "").startswith("token 1: id 5")
    shorter = dataclasses.replace(base, outputs=(dataclasses.replace(base.outputs[0], token_ids=(3,)),))
    assert "instead of" in (difference(shorter, base) or "")
