"""Benchmarks that follow the engine's insides still run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_host_of_a_step_can_be_measured(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the runner of GPUs needs triton")
    out = tmp_path / "host.jsonl"
    options = ["--batch", "2", "--tokens", "24", "--runs", "1", "--json", str(out)]
    subprocess.run(
        [sys.executable, str(BENCHMARKS / "host_step.py"), *options], check=True, capture_output=True, timeout=200
    )
    records = json.loads(out.read_text())["records"]
    assert [(record["batch"], record["stream"]) for record in records] == [(2, False), (2, True)]
    assert all(record["us"]["step"] > 0 for record in records)


def test_the_cost_of_the_inspector_can_be_measured(tmp_path: Path) -> None:
    out = tmp_path / "inspector.jsonl"
    options = ["--batch", "2", "--tokens", "24", "--pairs", "1", "--json", str(out)]
    command = [sys.executable, str(BENCHMARKS / "inspector_cost.py"), *options]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    assert [record["batch"] for record in json.loads(out.read_text())["records"]] == [2]


def test_the_ways_to_call_from_python_can_be_measured(tmp_path: Path) -> None:
    out = tmp_path / "api.jsonl"
    options = ["demo", "--requests", "3", "--tokens", "8", "--runs", "2", "--json", str(out)]
    command = [sys.executable, str(BENCHMARKS / "python_api.py"), *options]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    speeds = json.loads(out.read_text())["output_tok_s"]
    assert list(speeds) == ["LLM.generate", "LLM.stream", "AsyncLLM"]
    assert all(len(found) == 2 and min(found) > 0 for found in speeds.values())


def test_pairs_of_watched_rows_are_not_fewer_than_none() -> None:
    command = [sys.executable, str(BENCHMARKS / "served.py"), "--watch", "-1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.returncode == 2 and "--watch must be at least 0, got -1" in run.stderr
