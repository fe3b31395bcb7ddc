"""`kvik bench`: the workloads are those that were promised, and a result says what was measured and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_harness import Result

from kvik.cli.bench_measure import _kv_tokens_read, percentiles
from kvik.cli.bench_workloads import NANO_TOTALS, WORKLOADS, draw, find_workload
from kvik.errors import ConfigError

Kvik = Callable[..., Result]


def test_the_nano_draw_has_its_totals() -> None:
    workload = find_workload("ragged256")
    first, second = (draw(workload, "nano", run, 151_936) for run in (0, 1))
    assert (sum(len(r.prompt) for r in first), sum(r.max_tokens for r in first)) == NANO_TOTALS == (142_827, 133_966)
    assert [len(r.prompt) for r in first] == [len(r.prompt) for r in second]
    assert all(a.prompt != b.prompt for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", WORKLOADS)
def test_draws_keep_to_their_bounds(name: str) -> None:
    workload = find_workload(name)
    requests = draw(workload, "0", 0, 151_936)
    assert len(requests) == workload.num_requests
    assert all(workload.prompt_lens[0] <= len(r.prompt) <= workload.prompt_lens[1] for r in requests)
    assert all(workload.output_lens[0] <= r.max_tokens <= workload.output_lens[1] for r in requests)
    assert all(3 <= token_id <= 10_000 for r in requests for token_id in r.prompt)
    assert draw(workload, "0", 0, 151_936) == requests
    assert all(token_id < 300 for r in draw(workload, "0", 0, 300) for token_id in r.prompt)


def test_names_of_workloads() -> None:
    assert find_workload("decode_bs17").num_requests == 17
    assert (
        find_workload("decode_bs256").output_lens == (256, 256) and find_workload("decode_bs255").output_lens[0] == 512
    )
    small = find_workload("ragged256", 4, 0.5)
    assert small.name == "ragged256[requests=4,scale=0.5]" and small.longest == 1024
    assert find_workload("users35", 35).name == "users35"
    for name, requests, scale in (("decode_bs0", None, 1), ("x", None, 1), ("users35", 36, 1), ("users35", 1, 1.5)):
        with pytest.raises(ConfigError):
            find_workload(name, requests, scale)


def test_arithmetic() -> None:
    assert _kv_tokens_read(10, 1, None) == _kv_tokens_read(10, 1, 5) == 0
    assert _kv_tokens_read(10, 4, None) == _kv_tokens_read(10, 4, 13) == 11 + 12 + 13
    assert _kv_tokens_read(10, 4, 12) == 11 + 12 + 12
    assert _kv_tokens_read(10, 4, 5) == 3 * 5
    assert percentiles([None]) is None
    assert percentiles([3.0, 1.0, 2.0, None]) == {"p50": 2.0, "p90": 3.0, "p99": 3.0}


def test_throughput_prints_and_appends(kvik: Kvik, model: str, tmp_path: Path) -> None:
    file = tmp_path / "results" / "tiny.jsonl"
    argv = ("bench", "throughput", model, "--seed", "nano", "--requests", 4, "--scale", 0.03, "--json", file)
    for count in (1, 2):
        result = kvik(*argv)
        assert result.code == 0
        for text in (
            "ragged256[requests=4,scale=0.03]",
            "output",
            "TTFT",
            "TPOT",
            "memory limit",
            "GB/s",
            "host per step",
        ):
            assert text in result.out
        assert len(file.read_text().splitlines()) == count
    record = json.loads(file.read_text().splitlines()[0])
    assert record["workload"] == "ragged256[requests=4,scale=0.03]" and record["model"] == "tiny"
    assert record["options"] == {"model": "tiny"} and str(tmp_path) not in file.read_text()
    assert record["result"]["output_tok_s"] > 0 and record["limit"]["share"] > 0
    assert record["versions"]["torch"] and record["machine"]["cpu"]


def test_latency_takes_users_in_turn(kvik: Kvik, model: str, tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    argv = ("--workload", "users35", "--requests", 5, "--scale", 0.02, "--runs", 1, "--json", file)
    assert kvik("bench", "latency", model, *argv, "--users", 2).code == 0
    record = json.loads(file.read_text())
    assert record["users"] == 2 and record["mode"] == "latency"
    assert record["result"]["output_tokens"] == 50 and record["result"]["steps"] > 25


def test_prefill_has_no_decode_limit(kvik: Kvik, model: str) -> None:
    argv = ("--workload", "prefill_16x4000", "--requests", 2, "--scale", 0.02, "--runs", 1)
    assert "none: no step only decoded" in kvik("bench", "throughput", model, *argv).out


def test_random_weights_need_only_the_config(kvik: Kvik, model: str, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(model) / name).read_bytes())
    argv = ("--workload", "decode_bs2", "--scale", 0.02, "--runs", 1, "--load-format", "dummy")
    assert kvik("bench", "throughput", tmp_path, *argv).code == 0


def test_what_cannot_be_measured_is_refused(kvik: Kvik, model: str) -> None:
    for argv, text in (
        (("--workload", "ragged256"), "use --scale 0.24"),
        (("--workload", "decode_bs1", "--seed", "nano"), "a draw of ragged256"),
        (("--users", "3"), "--users"),
        (("--runs", "0"), "--runs"),
    ):
        result = kvik("bench", "throughput", model, *argv)
        assert result.code == 2 and text in result.err


def test_startup_measures_from_the_birth_of_a_process(kvik: Kvik, model: str, tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    result = kvik("bench", "startup", model, "--runs", 2, "--max-model-len", 64, "--json", file)
    assert result.code == 0
    assert all(text in result.out for text in ("ready", "imports", "weights", "first token", "machine", "versions"))
    record = json.loads(file.read_text())
    times = record["result"]
    assert record["mode"] == "startup" and len(record["all_ready_s"]) == 2
    assert min(record["all_ready_s"]) == times["ready_s"] >= sum(times["phases"].values())
    assert {"imports", "config", "weights", "KV cache"} <= times["phases"].keys()
    assert times["first_token_s"] > 0 and record["files"]["bytes"] > 0
    assert (record["kernels"] is None) is not torch.cuda.is_available()
    assert record["options"] == {"model": "tiny", "max_model_len": 64} and str(tmp_path) not in file.read_text()


def test_startup_hands_on_errors(kvik: Kvik, model: str) -> None:
    refused = kvik("bench", "startup", model, "--max-model-len", 10**9)
    assert refused.code == 2 and "max_model_len 1000000000 is more than" in refused.err
    assert "--runs must be at least 1" in kvik("bench", "startup", model, "--runs", 0).err
    assert "--cold empties the cache of GPU kernels" in kvik("bench", "startup", model, "--device", "cpu", "--cold").err
