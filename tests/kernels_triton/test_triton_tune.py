"""Tuning: which plans are timed, that the fastest is kept, who compiles them, and what `kvik tune` says."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
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
from kvik.kernels.triton import dispatch
from kvik.kernels.triton.candidates import BLAS, MAX_TOKENS, Limits, candidates, decoder_cases, refinements
from kvik.kernels.triton.dispatch import Case, Plan, Table, cache_path, load_table, save_measured
from kvik.kernels.triton.features import knows_gluon
from kvik.models.decoder import allocate_layer
from kvik.runtime import tune
from kvik.runtime.platform import CpuPlatform
from kvik.startup import inspect_model, load_decoder

BATCHES = (1, 2, 4, 8, 16, 32, 40, 64, 128, 256)
SIZES = {
    "demo": (256, 256, 128, 768, 4096),
    "0.6B": (1024, 2048, 1024, 3072, 151936),
    "8B": (4096, 4096, 1024, 12288, 151936),
}
THIS = CpuPlatform().name
SMALL_GPU = Limits(multiprocessors=46, shared_bytes=99 << 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), vocab_size=2048, hidden_size=128, num_hidden_layers=3)


def shape_of(folder: Path, **more: Any) -> tune.Shape:
    info = inspect_model(EngineConfig(str(folder), device="cpu", **more))
    return tune.Shape(info.spec, info.resolved.dtype)


def parse(key: str) -> Case:
    found = re.fullmatch(r"(\w+) m(\d+) n(\d+) k(\d+) (\w+)", key)
    assert found is not None
    op, m, n, k, dtype = found.groups()
    return Case(op, int(m), int(n), int(k), dtype)


def held_bytes(case: Case, plan: Plan) -> int:
    if plan.path == "hopper":
        return plan.num_stages * 64 * (plan.block_n + plan.block_t) * 2 + 1024  # and barriers
    rows = 2 if case.op == "norm_linear_swiglu" else 1
    return plan.num_stages * plan.block_k * (rows * plan.block_n + plan.block_t) * 2


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("limits", [Limits(), SMALL_GPU], ids=["H200", "small"])
def test_candidates_are_varied_and_possible(model: str, limits: Limits) -> None:
    for case in decoder_cases(*SIZES[model], "bfloat16", (*BATCHES, 512)):
        plans = candidates(case, limits)
        assert plans[0] == BLAS
        assert len(plans) == len(set(plans))
        assert sum(plan.path != "hopper" for plan in plans) < 170 and len(plans) < 190
        assert {plan.path for plan in plans} >= ({"gemv"} if case.num_tokens <= 4 else set())
        others = ["gemv"] if case.num_tokens <= 4 else ["hopper"] if limits.hopper else []
        assert {plan.path for plan in plans} <= {"blas", "skinny", *others}
        assert case.num_tokens <= MAX_TOKENS or plans == [BLAS]
        rows = 2 if case.op == "norm_linear_swiglu" else 1
        for plan in plans:
            if plan.path in ("skinny", "hopper"):
                assert held_bytes(case, plan) <= limits.shared_bytes
            if plan.path == "skinny":
                assert plan.split_k * plan.block_k <= case.k
                assert rows * plan.block_n * plan.block_t <= 128 * 32 * plan.num_warps  # sums in half of the registers
        if model != "demo" and case.num_tokens <= MAX_TOKENS:
            sizes = {plan.block_n for plan in plans if plan.path == "skinny"}
            both = {32, 64} if rows == 2 else {64, 128}
            assert ("hopper" in {plan.path for plan in plans}) == (case.num_tokens > 4)
            assert sizes == both or (limits is SMALL_GPU and sizes and sizes < both)  # large tiles do not fit there


def test_refinements_change_how_tiles_arrive_and_nothing_else() -> None:
    case = Case("linear_add", 8, 1024, 3072, "bfloat16")
    plan = Plan(path="skinny", split_k=4, num_stages=4)
    others = refinements(case, plan)
    assert {(other.prefetch, other.tma) for other in others} == {
        (prefetch, tma) for prefetch in (0, 1, 2, 6) for tma in (False, True)
    } - {(0, False)}  # 6 steps of 128 columns are a program's whole part of K
    assert {dataclasses.replace(other, prefetch=0, tma=False) for other in others} == {plan}
    assert refinements(case, BLAS) == []
    exact = dataclasses.replace(case, dtype="float32")
    assert not any(other.tma for other in refinements(exact, plan))


def test_what_is_shipped_as_fastest_can_run() -> None:
    for key, plan in load_table("NVIDIA H200", Path("/absent")).measured.items():
        case = parse(key)
        if plan.path in ("skinny", "hopper"):
            assert held_bytes(case, plan) <= Limits().shared_bytes
            assert plan.split_k * plan.block_k <= case.k and plan.block_t <= max(16, 2 * case.num_tokens)


def test_cases_are_the_projections_of_a_step(folder: Path) -> None:
    assert [case.key for case in shape_of(folder).cases(3)] == [
        "norm_linear m4 n128 k128 float32", "linear_add m4 n128 k64 float32",
        "norm_linear_swiglu m4 n96 k128 float32", "linear_add m4 n128 k96 float32",
        "linear m4 n2048 k128 float32",
    ]  # fmt: skip


def test_enough_layers_are_timed_to_sweep_the_cache() -> None:
    folder = Path(__file__).parents[2] / "src/kvik/assets/demo"
    small = shape_of(folder, dtype="bfloat16")
    assert small.part == small.spec  # it has few
    deep = tune.Shape(dataclasses.replace(small.spec, num_layers=1000, windows=(None,) * 1000), torch.bfloat16)
    weights = allocate_layer(small.spec, torch.bfloat16, torch.device("meta"))
    layer = sum(w.weight.nbytes for w in (weights.qkv, weights.o, weights.gate_up, weights.down))
    assert 0 <= deep.part.num_layers * layer - (512 << 20) < layer


def test_tuning_keeps_the_fastest_that_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """With a clock that knows what it wants: every candidate is run, and one of them cannot."""
    gpu = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    wanted, impossible = Plan(path="skinny", block_k=64), Plan(path="skinny", block_k=32)
    nearby = dataclasses.replace(wanted, prefetch=1)
    monkeypatch.setattr(tune, "candidates", lambda case, limits: [BLAS, impossible, wanted])
    monkeypatch.setattr(tune, "refinements", lambda case, plan: [nearby] if plan == wanted else [])
    monkeypatch.setattr(tune, "_FINALS", 1)
    monkeypatch.setattr(tune, "_CONTEXT", (16, 48))
    shape = shape_of(folder)
    shape = dataclasses.replace(shape, spec=dataclasses.replace(shape.spec, num_layers=1, windows=(None,)))
    earlier = Plan(path="skinny", block_k=128)
    cases = shape.cases(2)
    save_measured(gpu, {case.key: earlier for case in cases}, tmp_path)
    microseconds = {BLAS: 30.0, wanted: 20.0, nearby: 10.0, earlier: 25.0}
    outputs: list[torch.Tensor] = []

    def timer(run: Callable[[int], object], copies: int) -> float:
        result = run(0)
        assert isinstance(result, torch.Tensor) and result.shape == (2, 2048)
        outputs.append(result)
        plan = launched[-1]
        if plan == impossible:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return microseconds[plan]

    launched: list[Plan] = []
    with_plan = tune._with

    def record(table: Table, case: Case, plan: Plan) -> Table:
        launched.append(plan)
        return with_plan(table, case, plan)

    monkeypatch.setattr(tune, "_with", record)
    for count, timing in enumerate(tune.tune(shape, (2,), device, gpu=gpu, timer=timer, directory=tmp_path), 1):
        assert timing == tune.Timing(cases[count - 1], microseconds, earlier) and timing.best == nearby
        plans = load_table(gpu, tmp_path).measured  # whoever stops here has as much
        assert [plans[case.key] for case in cases] == [nearby] * count + [earlier] * (5 - count)
    assert count == 5
    for output in outputs:  # whichever plan computes
        torch.testing.assert_close(output, outputs[0], rtol=1e-3, atol=1e-3)
    assert not torch.equal(outputs[0], torch.zeros_like(outputs[0]))


def test_a_plan_stays_unless_another_is_faster_by_more_than_noise() -> None:
    case, now, other = Case("linear", 1, 64, 32, "bfloat16"), Plan(path="skinny"), Plan(path="gemv")
    assert tune.Timing(case, {now: 1000.0, other: 999.0}, now).best == now
    assert tune.Timing(case, {now: 1000.0, other: 997.0}, now).best == other
    assert tune.Timing(case, {other: 999.0}, now).best == other  # it does not run here


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_processes_compile_what_tuning_launches(folder: Path, tmp_path: Path) -> None:
    """In a process of its own, since what Triton has hashed before decides under which name it looks."""
    code = (
        "import dataclasses, json, sys; from pathlib import Path; import torch; from triton import knobs;"
        "from kvik.runtime import tune; from kvik.config import EngineConfig; from kvik.startup import inspect_model;"
        "from kvik.kernels.triton.compile_only import StandInDriver, compile_only;"
        "from kvik.kernels.triton.dispatch import Plan, load_table;"
        "tune.compute_capability = lambda device: (9, 0);"
        "features = tune.Features.of_capability((9, 0));"
        "tune.has_nvidia_driver = lambda: False; tune.driver.reset_active = lambda: None;"
        "info = inspect_model(EngineConfig(sys.argv[1], device='cpu')); shape = tune.Shape(info.spec, torch.bfloat16);"
        "case = shape.cases(8)[2]; plans = [Plan(path='skinny', block_n=32), Plan(path='skinny', block_n=64)];"
        "plans += [Plan(path='hopper', block_t=8, num_stages=2)] * features.hopper;"
        "compilers = tune.Compilers(shape, torch.device('cpu'), 2);"
        "compilers.finish(case, plans); compilers.__exit__(); hits = [];"
        "knobs.compilation.listener = lambda *, src, cache_hit, **_: hits.append((src.fn.__name__, cache_hit));"
        "compile_only(StandInDriver((9, 0))); meta = torch.device('meta');"
        "step = tune._Step(tune._model(shape, meta, features), 8);"
        "[step.run(tune._with(load_table('any'), case, plan), features) for plan in plans]; print(json.dumps(hits))"
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    argv = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    hits = json.loads(done.stdout)
    names = {"_skinny_kernel"} | ({"_linear_hopper"} if knows_gluon() else set())
    assert all(hit for _, hit in hits) and {name for name, _ in hits} >= names


def test_processes_that_fail_are_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def submit(self, function: Any, *arguments: Any) -> Future[None]:
            future: Future[None] = Future()
            future.set_exception(BrokenProcessPool("ended at once"))
            return future

    compilers = object.__new__(tune.Compilers)
    compilers._pool, compilers._jobs = Broken(), {}  # type: ignore[assignment]
    monkeypatch.setattr(logging.getLogger("kvik"), "propagate", True)
    compilers.finish(shape_of(folder).cases(1)[0], [BLAS])
    assert "a process that compiles kernels failed with BrokenProcessPool: ended at once" in caplog.text


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
        save_measured(info.platform.name, {shape_of(folder).cases(8)[0].key: BLAS})
        assert said() == []


class _Found:
    """`tune` that runs nothing: 10 us with the library, 9 with another plan, 8 with the one before if it is a third."""

    interrupted = 1000
    other = Plan(path="skinny", block_n=128)

    @classmethod
    def tune(cls, shape: tune.Shape, tokens: Any, device: Any, *, gpu: str, compilers: Any) -> Iterator[tune.Timing]:
        table = load_table(THIS)
        measured = dict(table.measured)
        for size in tokens:
            for case in shape.cases(size):
                if len(measured) == cls.interrupted:
                    raise KeyboardInterrupt
                times = {BLAS: 10.0, cls.other: 9.0}
                times.setdefault(table.plan(case), 8.0)
                timing = tune.Timing(case, times, table.plan(case))
                measured[case.key] = timing.best
                save_measured(THIS, measured)
                yield timing


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[_Found]]:
    """`kvik tune` on this processor, without a launch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(command, "_inspect", inspect_model)
    monkeypatch.setattr(tune, "Compilers", lambda shape, device, num_processes: contextlib.nullcontext())
    monkeypatch.setattr(tune, "tune", _Found.tune)
    monkeypatch.setattr(_Found, "interrupted", 1000)
    yield _Found


def run(folder: Path, *more: str) -> int:
    return main(["tune", str(folder), "--device", "cpu", "--dtype", "bfloat16", *more])


def test_the_command_measures_prints_and_keeps(
    found: type[_Found], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--batch", "3", "1", "4", "--json", str(tmp_path / "out.json")) == 0
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "out.json").read_text())
    rows = {result["case"]: result for result in record["results"]}
    assert record["layers"] == 3 and "10 projections, 3 of 3 layers" in out
    assert sorted({parse(key).num_tokens for key in rows}) == [1, 4]
    assert len(rows) == 10
    rule = load_table("x", tmp_path / "absent")
    for key, row in rows.items():
        before = rule.plan(parse(key))
        fresh = before not in (BLAS, found.other)
        assert (row["us"], row["before_us"], row["library_us"]) == ((8.0, 8.0, 10.0) if fresh else (9.0, 10.0, 10.0))
        assert row["before"] == dataclasses.asdict(before)
        assert row["candidates"] == 2 + fresh
        line = next(line for line in out.splitlines() if line.startswith(key))
        assert f"{row['plan']['path']} block_n {row['plan']['block_n']}" in line
    for step in record["steps"]:
        results = [result for key, result in rows.items() if parse(key).num_tokens == step["tokens"]]
        assert (step["before_us"], step["us"]) == (results[0]["before_us"], results[-1]["us"])
    assert len(re.findall(r"^step of +\d+: ", out, re.MULTILINE)) == 2
    assert str(cache_path(THIS)) in out
    assert {key: dataclasses.asdict(plan) for key, plan in load_table(THIS).measured.items()} == {
        key: row["plan"] for key, row in rows.items()
    }


def test_an_interrupted_command_keeps_what_it_measured(
    found: type[_Found], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(found, "interrupted", 7)
    assert run(folder) == 130
    assert len(load_table(THIS).measured) == 7
    assert f"7 of 50 projections are measured, and kept in {cache_path(THIS)}" in capsys.readouterr().out


def test_a_plan_that_does_not_run_has_no_time() -> None:
    case, earlier = Case("linear", 1, 64, 32, "bfloat16"), Plan(path="skinny")
    timing = tune.Timing(case, {Plan(path="gemv"): 2.0}, earlier)
    steps = command._steps([timing])
    assert steps == [{"tokens": 1, "us": 2.0, "before_us": None}]
    assert command._step_line(steps[0]).endswith("; -")
    assert re.search(r" 2\.0 +- +- +-  gemv block_n 64 block_k 128 num_warps 4$", command._row(command._result(timing)))


@pytest.mark.parametrize("path", dispatch._PATHS)
def test_plans_of_every_path_are_shown(path: str) -> None:
    plan = Plan(path=path, num_stages=4)
    row = command._row(command._result(tune.Timing(Case("linear", 8, 64, 32, "bfloat16"), {plan: 2.0}, plan)))
    assert path in row.split() and ("num_stages 4" in row) == (path in ("skinny", "hopper"))


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
    for row in record["results"]:
        assert 0 < row["us"] <= 1.01 * min(row["before_us"], row["library_us"])
    measured = json.loads(next((tmp_path / "kvik" / "triton").iterdir()).read_text())["measured"]
    assert {row["case"]: row["plan"] for row in record["results"]}.items() <= measured.items()
