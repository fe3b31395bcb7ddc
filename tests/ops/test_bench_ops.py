"""`kvik bench ops`: what stands side by side computes the same, and the result says what was measured and where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvik.cli import bench_op_cases, bench_ops
from kvik.cli.bench_op_cases import OPERATORS, Bench, Sizes, cases
from kvik.cli.main import main

TINY = Sizes(hidden=32, num_heads=4, num_kv_heads=2, head_dim=16, intermediate=48, vocab=300)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_op_cases, "_SWEPT_BYTES", 1 << 16)
    monkeypatch.setattr(bench_ops, "_CPU_SECONDS", 0.001)
    monkeypatch.setattr(bench_ops, "_MOVED_BYTES", {"cpu": 1 << 20, "gpu": 1 << 20})
    monkeypatch.setattr(bench_ops, "_MATRIX_SIZE", {"cpu": 64, "gpu": 512})


@pytest.mark.parametrize("op", [op for op in OPERATORS if op != "sample"])
def test_kvik_and_torch_compute_the_same(op: str, device: torch.device) -> None:
    found = list(cases(Bench(device, torch.float32, TINY), [op], (1, 5, 70)))
    assert [case.tokens for case in found if case.tokens < 70]
    for case in found:
        for copy in {0, case.copies - 1}:
            got, want = case.kvik(copy), case.torch(copy)
            if op == "paged_attention":
                want = want.squeeze(2)
            elif op == "self_attention":
                want = want[0].transpose(0, 1)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", OPERATORS)
def test_every_case_can_be_timed(op: str, device: torch.device) -> None:
    timer = bench_ops._cpu_median if device.type == "cpu" else bench_ops._gpu_timer()
    for case in cases(Bench(device, torch.bfloat16, TINY), [op], (1, 5)):
        assert case.copies > 1 or "attention" in op
        result = bench_ops._result(case, timer, bench_ops._Limits(1e9, 1e15))
        assert result["bound"] == "bytes" and result["torch_ratio"] > 0
        assert result["share"] == pytest.approx(result["bytes_per_s"] / 1e9)


def test_what_bounds_an_operator() -> None:
    case = bench_op_cases.OpCase("linear", 1, "", 1000, 4000, print, print, 1)
    assert bench_ops._Limits(1e3, 1e4).share(case, 2.0) == ("bytes", 0.5)
    assert bench_ops._Limits(1e4, 1e3).share(case, 8.0) == ("flops", 0.5)


def test_it_prints_and_appends(device: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ops.jsonl"
    argv = ["bench", "ops", "rms_norm", "linear", "--model", "demo", "--tokens", "1", "3", "--json", str(file)]
    assert main([*argv, "--device", device.type, "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("demo, bfloat16, on ") and "x torch" in out and out.count("linear ") == 4
    record = json.loads(file.read_text())
    assert [result["operator"] for result in record["results"]] == ["rms_norm"] * 2 + ["linear"] * 4
    assert record["limits"]["bytes_per_s"] > 0 and record["limits"]["flops_per_s"] > 0
    assert record["versions"]["torch"] and record["machine"]["cpu"] and "commit" in record


def test_wrong_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, text in (
        (["rms_nrom"], "did you mean 'rms_norm'"),
        (["--tokens", "0"], "at least 1; got 0"),
        (["--dtype", "int8"], "--dtype"),
    ):
        assert main(["bench", "ops", *argv]) == 2
        assert text in capsys.readouterr().err
