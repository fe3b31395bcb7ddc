"""Tuning: which plans are timed, that the fastest is kept, who compiles them, and what `kvik tune` says."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny

pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime.errors import OutOfResources

from engine_runs import BASE, GPU, INTERPRETER, gpu_obstacle, options_for
from kvik.cli import tune as command
from kvik.cli.main import main
from kvik.config import EngineConfig
from kvik.errors import ConfigError
from kvik.kernels.triton import tune
from kvik.kernels.triton.dispatch import Case, Plan, cache_path, load_table, save_measured
from kvik.runtime.platform import CpuPlatform
from kvik.startup import inspect_model, load_decoder, projections

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
SIZES = {
    "demo": (256, 256, 128, 768, 4096),
    "0.6B": (1024, 2048, 1024, 3072, 151936),
    "8B": (4096, 4096, 1024, 12288, 151936),
}
THIS = CpuPlatform().name
SMALL_GPU = tune.Limits(multiprocessors=46, shared_bytes=99 << 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), vocab_size=2048, hidden_size=128, num_hidden_layers=3)


def parse(key: str) -> Case:
    found = re.fullmatch(r"(\w+) m(\d+) n(\d+) k(\d+) (\w+)", key)
    assert found is not None
    op, m, n, k, dtype = found.groups()
    return Case(op, int(m), int(n), int(k), dtype)


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("limits", [tune.Limits(), SMALL_GPU], ids=["H200", "small"])
def test_candidates_are_varied_and_possible(model: str, limits: tune.Limits) -> None:
    for case in tune.decoder_cases(*SIZES[model], "bfloat16", (*BATCHES, 256, 512)):
        plans = tune.candidates(case, limits)
        assert plans[0] == tune.BLAS
        assert len(plans) == len(set(plans)) < 120
        assert {plan.path for plan in plans} >= ({"gemv"} if case.num_tokens <= 4 else set())
        assert {plan.path for plan in plans} <= {"blas", "skinny", *(["gemv"] if case.num_tokens <= 4 else [])}
        assert case.num_tokens <= tune.MAX_TOKENS or plans == [tune.BLAS]
        rows = 2 if case.op == "norm_linear_swiglu" else 1
        for plan in plans:
            if plan.path == "skinny":
                held = plan.num_stages * plan.block_k * (rows * plan.block_n + plan.block_t) * 2
                assert held <= limits.shared_bytes
                assert plan.split_k * plan.block_k <= case.k
        if model != "demo" and case.num_tokens <= tune.MAX_TOKENS:
            sizes = {plan.block_n for plan in plans if plan.path == "skinny"}
            assert sizes == ({32, 64} if rows == 2 else {64, 128})


def test_what_is_shipped_as_fastest_is_timed_too(tmp_path: Path) -> None:
    """It was found within a forward pass, which prefers deeper pipelines than those that `candidates` has."""
    table, limits = load_table("NVIDIA H200", tmp_path), tune.Limits()
    for key, plan in table.measured.items():
        case = parse(key)
        assert plan in tune._plans(case, table, limits)
        if plan.path == "skinny":
            rows = 2 if case.op == "norm_linear_swiglu" else 1
            assert plan.num_stages * plan.block_k * (rows * plan.block_n + plan.block_t) * 2 <= limits.shared_bytes
            assert plan.split_k * plan.block_k <= case.k and plan.block_t <= max(16, 2 * case.num_tokens)


def test_tuning_keeps_the_fastest_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """With a clock that knows what it wants: every candidate is run, and one of them cannot."""
    gpu = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    wanted, impossible = Plan(path="skinny", block_k=16), Plan(path="skinny", block_k=32)
    offered = [tune.BLAS, impossible, wanted]  # and what the table says, which is tried last
    monkeypatch.setattr(tune, "candidates", lambda case, limits: offered)
    monkeypatch.setattr(tune, "_SWEPT_BYTES", 1 << 14)
    todo = [Case(op, 5, 24, 32, "float32") for op in ("linear", "linear_add", "norm_linear", "norm_linear_swiglu")]
    earlier = Plan(path="skinny", block_k=64)
    save_measured(gpu, {case.key: earlier for case in todo}, tmp_path)
    seconds = iter([3.0, None, 1.0, 2.0] * 4)

    def timer(run: Callable[[int], object], copies: int) -> float:
        assert copies > 1
        result = run(copies - 1)
        assert isinstance(result, torch.Tensor) and result.isfinite().all()
        if (now := next(seconds)) is None:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return now

    for count, timing in enumerate(tune.tune(todo, device, timer=timer, directory=tmp_path), 1):
        assert timing == tune.Timing(todo[count - 1], {tune.BLAS: 3.0, wanted: 1.0, earlier: 2.0}, earlier)
        plans = load_table(gpu, tmp_path).measured  # whoever stops here has as much
        assert [plans[case.key] for case in todo] == [wanted] * count + [earlier] * (4 - count)
    assert count == 4
    seconds = iter([1.0, None, 2.0])
    assert [timing.best for timing in tune.tune(todo[:1], device, timer=timer, directory=tmp_path)] == [tune.BLAS]
    shipped = load_table(gpu, tmp_path / "empty").measured
    assert load_table(gpu, tmp_path).measured == shipped | {case.key: wanted for case in todo} | {
        todo[0].key: tune.BLAS
    }


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_processes_compile_what_tuning_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tune, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(tune, "supports_pdl", lambda device: True)
    case = Case("norm_linear_swiglu", 2, 256, 256, "bfloat16")
    tune.compile_candidates([case], torch.device("cpu"), 2, directory=tmp_path)
    found = list((tmp_path / "cache").rglob("*.cubin"))
    plans = tune._plans(case, load_table("cpu", tmp_path), tune.Limits())
    assert len([path for path in found if "gemv" in path.name]) == len(plans) - 1  # all but the library
    (tmp_path / "claims").mkdir()
    code = (
        "import json, sys; from pathlib import Path; from triton import knobs; hits = [];"
        "knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit);"
        "from kvik.kernels.triton import tune; from kvik.kernels.triton.dispatch import Case, load_table;"
        "case = Case('norm_linear_swiglu', 2, 256, 256, 'bfloat16'); table = load_table('cpu', Path('/absent'));"
        "jobs = [(case, tune._plans(case, table, tune.Limits()))];"
        "tune._compile(jobs, table, (9, 0), True, Path(sys.argv[1])); print(json.dumps(hits))"
    )
    again = subprocess.run([sys.executable, "-c", code, str(tmp_path / "claims")], capture_output=True, check=True)
    assert json.loads(again.stdout) == [True] * len(found)


def test_processes_that_fail_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tune, "compute_capability", lambda device: "none")
    monkeypatch.setattr(logging.getLogger("kvik"), "propagate", True)
    tune.compile_candidates([Case("linear", 1, 256, 256, "bfloat16")], torch.device("cpu"), 1, directory=tmp_path)
    assert "1 of 1 processes that compile kernels failed" in caplog.text


def test_projections_are_those_that_a_step_launches(folder: Path) -> None:
    keys = [case.key for case in projections(inspect_model(EngineConfig(str(folder), device="cpu")), 3)]
    assert keys == [
        *[
            "norm_linear m4 n128 k128 float32", "linear_add m4 n128 k64 float32",
            "norm_linear_swiglu m4 n96 k128 float32", "linear_add m4 n128 k96 float32",
        ] * 3,
        "linear m4 n2048 k128 float32",
    ]  # fmt: skip


@pytest.mark.parametrize("place", [INTERPRETER, GPU])
def test_an_engine_says_that_nothing_is_measured(
    place: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(logging.getLogger("kvik"), "propagate", True)
    with options_for(place) as options:

        def said(**more: Any) -> list[str]:
            config = EngineConfig(str(folder), **{**BASE, **options, **more})
            caplog.clear()
            with caplog.at_level(logging.INFO, "kvik"):
                load_decoder(config, inspect_model(config))
            return [record.message for record in caplog.records if "not tuned" in record.message]

        info = inspect_model(EngineConfig(str(folder), **{**BASE, **options}))
        assert said() == [f"projections of this model are not tuned for {info.platform.name}: kvik tune {folder}"]
        assert said(deterministic=True) == []  # its plans are never measured ones
        save_measured(info.platform.name, {projections(info, 8)[0].key: tune.BLAS})
        assert said() == []


class _Clock:
    """A `GraphTimer` that runs nothing: 10 us for the first plan of each case, 1 us less for each that follows."""

    calls = 0
    raises: BaseException | None = None

    def __init__(self) -> None:
        self._last: object = None
        self._us = 0.0

    def __call__(self, run: Any, copies: int) -> float:
        _Clock.calls += 1
        if _Clock.raises is not None and _Clock.calls > 20:
            raise _Clock.raises
        problem = run.func.__self__
        self._us = self._us - 1 if problem is self._last else 10.0
        self._last = problem
        return self._us


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[_Clock]]:
    """`kvik tune` on this processor, without a launch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(command, "_inspect", inspect_model)
    monkeypatch.setattr(tune, "_gpu_name", lambda device: THIS)
    monkeypatch.setattr(tune, "compile_candidates", lambda cases, device, num_processes: None)
    monkeypatch.setattr(tune, "GraphTimer", _Clock)
    monkeypatch.setattr(tune, "candidates", lambda case, limits: [tune.BLAS, Plan(path="skinny", block_n=128)])
    monkeypatch.setattr(_Clock, "calls", 0)
    monkeypatch.setattr(_Clock, "raises", None)
    yield _Clock


def run(folder: Path, *more: str) -> int:
    return main(["tune", str(folder), "--device", "cpu", "--dtype", "bfloat16", *more])


def test_the_command_measures_prints_and_keeps(
    clock: type[_Clock], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--batch", "3", "1", "4", "--json", str(tmp_path / "out.json")) == 0
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "out.json").read_text())
    rows = {result["case"]: result for result in record["results"]}
    assert sorted({parse(key).num_tokens for key in rows}) == [1, 4]
    assert len(rows) == 10
    rule = load_table("x", tmp_path / "absent")
    for key, row in rows.items():
        case = parse(key)
        before = rule.plan(case)
        fresh = before not in (tune.BLAS, Plan(path="skinny", block_n=128))
        assert (row["us"], row["before_us"], row["library_us"]) == ((8.0, 8.0, 10.0) if fresh else (9.0, 10.0, 10.0))
        weight = case.n * case.k * 2 * (2 if case.op == "norm_linear_swiglu" else 1)
        assert row["bytes_per_s"] == pytest.approx(weight / (row["us"] * 1e-6))
        assert row["before"] == dataclasses.asdict(before)
        assert row["candidates"] == 2 + fresh
        line = next(line for line in out.splitlines() if line.startswith(key))
        assert f"{row['plan']['path']} block_n {row['plan']['block_n']}" in line
    for step in record["steps"]:
        size = [result for key, result in rows.items() if parse(key).num_tokens == step["tokens"]]
        for name in ("us", "before_us", "library_us"):
            assert step[name] == sum(result[name] * (1 if "linear m" in result["case"][:8] else 3) for result in size)
    assert out.count("projections of a step of") == 2
    assert str(cache_path(THIS)) in out
    assert {key: dataclasses.asdict(plan) for key, plan in load_table(THIS).measured.items()} == {
        key: row["plan"] for key, row in rows.items()
    }


def test_an_interrupted_command_keeps_what_it_measured(
    clock: type[_Clock], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(clock, "raises", KeyboardInterrupt())
    assert run(folder) == 130
    kept = load_table(THIS).measured
    assert 5 <= len(kept) < 40
    assert f"{len(kept)} of 40 projections are measured, and kept in {cache_path(THIS)}" in capsys.readouterr().out


def test_a_plan_that_does_not_run_has_no_time_before() -> None:
    case, earlier = Case("linear", 1, 64, 32, "bfloat16"), Plan(path="skinny")
    steps = command._steps([tune.Timing(case, {tune.BLAS: 2.0}, earlier)], {case: 1})
    assert steps == [{"tokens": 1, "us": 2.0, "before_us": None, "library_us": 2.0}]
    assert "-" in command._step_line(steps[0])
    assert re.search(
        r" 2\.00 +0\.00 +- +- +2\.00 +blas$",
        command._row(command._result(tune.Timing(case, {tune.BLAS: 2.0}, earlier))),
    )


@pytest.mark.parametrize("size", [0, 257])
def test_impossible_batches_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"from 1 to 256, .* got {size}"):
        command._sizes([1, size])


def test_without_a_gpu_the_command_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(folder), "--device", "cpu"]) == 2
    assert "kvik tune measures kernels of an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_the_command_on_a_gpu(folder: Path, tmp_path: Path) -> None:
    """In a process of its own with an empty cache of Triton: nothing is left to compile once the processes have."""
    if obstacle := gpu_obstacle():
        pytest.skip(f"needs an NVIDIA GPU: {obstacle}")
    code = (
        "import json, sys; from triton import knobs; compiled = [];"
        "knobs.compilation.listener = lambda *, src, cache_hit, **_: cache_hit or compiled.append(src.fn.__name__);"
        "from kvik.cli.main import main; code = main(sys.argv[1:]); print(json.dumps([code, compiled]))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    argv = ["tune", str(folder), "--batch", "1", "8", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]
    record = json.loads((tmp_path / "out.json").read_text())
    assert all(0 < row["us"] <= min(row["before_us"], row["library_us"]) for row in record["results"])
    measured = json.loads(next((tmp_path / "kvik" / "triton").iterdir()).read_text())["measured"]
    assert {row["case"]: row["plan"] for row in record["results"]}.items() <= measured.items()
