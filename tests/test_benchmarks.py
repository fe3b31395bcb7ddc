"""Benchmarks that follow the engine's insides still run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HOST_STEP = Path(__file__).parents[1] / "benchmarks" / "host_step.py"


def test_the_host_of_a_step_can_be_measured(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the runner of GPUs needs triton")
    out = tmp_path / "host.jsonl"
    options = ["--batch", "2", "--tokens", "24", "--runs", "1", "--json", str(out)]
    subprocess.run([sys.executable, str(HOST_STEP), *options], check=True, capture_output=True, timeout=200)
    records = json.loads(out.read_text())["records"]
    assert [(record["batch"], record["stream"]) for record in records] == [(2, False), (2, True)]
    assert all(record["us"]["step"] > 0 for record in records)
