"""The table of kernels: which plan a case gets, what is measured and kept, and what stays unimported."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kvik.errors import ConfigError
from kvik.kernels.triton import dispatch
from kvik.kernels.triton.candidates import decoder_cases
from kvik.kernels.triton.dispatch import BUCKETS, Case, Plan, Rule, Table, cache_path, load_table, save_measured
from kvik.kernels.triton.features import Features
from kvik.kernels.triton.ops import TritonOps

GPU = "NVIDIA H200"
TOKENS = (1, 2, 3, 4, 5, 8, 16, 17, 64, 65, 256, 10_000)
QWEN3 = {"0.6B": (1024, 2048, 1024, 3072, 151936), "8B": (4096, 4096, 1024, 12288, 151936)}


def cases(dtype: str = "bfloat16") -> list[Case]:
    return [case for sizes in QWEN3.values() for case in decoder_cases(*sizes, dtype, TOKENS)]


def test_nothing_imports_triton_before_a_kernel_is_wanted() -> None:
    code = "import sys, kvik.kernels.triton.dispatch; print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("gpu", [GPU, "another GPU"])
def test_the_shipped_table_takes_paths_that_can_run(gpu: str, tmp_path: Path) -> None:
    table = load_table(gpu, tmp_path)
    for case in cases():
        path = table.plan(case).path
        assert path != "gemv" or case.num_tokens <= 4
        assert path == "gemv" or case.num_tokens > 1
        assert path == "blas" or case.num_tokens <= 256 or (gpu == GPU and path == "hopper")
    assert {table.plan(case).path for case in cases("float32")} == {"gemv", "blas"}


def test_measurements_are_shipped_for_the_gpu_that_they_are_from(tmp_path: Path) -> None:
    shipped = load_table(GPU, tmp_path).measured
    assert {case.key for case in cases() if case.num_tokens in (1, 2, 4, 8, 16, 32, 64)} <= set(shipped)
    assert load_table("another GPU", tmp_path).measured == {}


def test_shipped_tensor_core_plans_fill_the_gpu_and_its_shared_memory_holds_them(tmp_path: Path) -> None:
    table = load_table(GPU, tmp_path)
    for case in cases():
        plan = table.plan(case)
        if plan.path == "skinny":
            rows = 2 if case.op == "norm_linear_swiglu" else 1
            programs = -(-case.n // plan.block_n) * -(-case.num_tokens // plan.block_t) * plan.split_k
            assert programs >= 48
            assert case.num_tokens <= 2 * plan.block_t  # a tile of the weight is read twice at most
            assert plan.num_stages * plan.block_k * (rows * plan.block_n + plan.block_t) * 2 <= 227 * 1024


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_decides_the_bits_of_a_deterministic_plan_does_not_depend_on_the_number_of_tokens(
    dtype: str, tmp_path: Path
) -> None:
    table = load_table(GPU, tmp_path)
    table.measured.update({case.key: Plan(path="blas") for case in cases(dtype)})
    for case in cases(dtype):
        plans = {table.plan(dataclasses.replace(case, num_tokens=m), deterministic=True) for m in TOKENS}
        assert {plan.path for plan in plans} == {"skinny"}
        assert len({plan.split_k for plan in plans}) == 1
        # Where one part of K ends is a multiple of the step.
        assert len({plan.block_k for plan in plans}) == 1 or {plan.split_k for plan in plans} == {1}
        # wgmma, whose sums do not depend on the tile, needs 64 weight rows; else the tile is the same for all
        assert len(plans) == 1 or min(plan.block_n for plan in plans) >= 64


def test_a_pipeline_is_as_deep_as_shared_memory_allows() -> None:
    plan = Plan(path="skinny", block_n=64, block_k=256, block_t=16, num_stages=6, tma=True)
    step = (64 + 16) * 256 * 2
    for tma, depth in ((False, 3), (True, 2)):  # TMA copies to shared memory alone
        assert plan.fitting(99 << 10, step, tma=tma) == dataclasses.replace(plan, num_stages=depth)
    assert plan.fitting(1, step, tma=False).num_stages == 1
    assert plan.fitting(227 << 10, step, tma=False) == plan
    assert [
        Features.of_capability(c).shared_bytes >> 10 for c in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
    ] == [163, 99, 99, 227, 227, 99]


@pytest.mark.parametrize("deterministic", [False, True])
def test_no_plan_of_an_h200_is_made_smaller(deterministic: bool, tmp_path: Path) -> None:
    features = Features.of_capability((9, 0))
    table = load_table(GPU, tmp_path)
    ops = TritonOps(torch.device("cpu"), table=table, deterministic=deterministic, features=features)
    for case in cases():
        plan = ops._plan(case.op, case.num_tokens, case.n, case.k, torch.bfloat16)
        assert plan == table.plan(case, deterministic=deterministic, hopper=features.hopper)


def test_buckets() -> None:
    found = [Case("linear", m, 1, 1, "float32").bucket for m in (1, 3, 4, 5, 33, 41, 10**6)]
    assert found == [1, 4, 4, 8, 40, 64, BUCKETS[-1]]


def test_the_first_rule_that_matches_decides() -> None:
    plans = [Plan(path="blas", block_n=2**i) for i in range(6)]
    table = Table(
        rules=(
            Rule(plan=plans[0], max_m=4, max_n=100, max_k=200, ops=("linear",), dtypes=("float16",)),
            Rule(plan=plans[1], max_m=4, max_n=100, max_k=200),
            Rule(plan=plans[2], max_m=4, max_n=100),
            Rule(plan=plans[3], max_m=4),
        ),
        deterministic=(),
        rows=(),
        measured={"linear m1 n7 k7 float16": plans[4]},
    )
    assert table.plan(Case("linear", 3, 100, 200, "float16")) is plans[0]
    assert table.plan(Case("linear_add", 3, 100, 200, "float16")) is plans[1]
    assert table.plan(Case("linear", 3, 100, 200, "float32")) is plans[1]
    assert table.plan(Case("linear", 3, 100, 201, "float16")) is plans[2]
    assert table.plan(Case("linear", 3, 101, 200, "float16")) is plans[3]
    assert table.plan(Case("linear", 1, 7, 7, "float16")) is plans[4]
    with pytest.raises(ConfigError, match="no rule of the kernel table matches linear m8"):
        table.plan(Case("linear", 5, 1, 1, "float16"))


def test_without_the_gluon_that_is_known_other_plans_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "knows_gluon", lambda: True)
    known = load_table(GPU, tmp_path).measured
    monkeypatch.setattr(dispatch, "knows_gluon", lambda: False)
    others = load_table(GPU, tmp_path).measured
    hopper = {key for key, plan in known.items() if plan.path == "hopper"}
    assert hopper and not any(plan.path == "hopper" for plan in others.values())
    assert all(others[key] == plan for key, plan in known.items() if key not in hopper)
    by_rule = hopper - others.keys()
    assert by_rule == {"norm_linear_swiglu m4096 n3072 k1024 bfloat16"}  # the library


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "gemm"}, "path must be one of"),
        ({"path": "gemv", "block_n": 3}, "block_n must be a power of two, got 3"),
        ({"path": "skinny", "block_t": 8}, "at least 16"),
        ({"path": "skinny", "split_k": 0}, "split_k"),
        ({"path": "hopper", "block_n": 96}, "block_n of 64, 128 or 192 .* got 96 and 16"),
        ({"path": "hopper", "block_t": 512}, "block_t from 8 to 256, got 64 and 512"),
        ({"path": "hopper", "block_t": 24}, "block_t must be a power of two, got 24"),
        ({"path": "hopper", "block_n": 192, "num_stages": 2}, "needs num_stages 3, got 2"),
    ],
)
def test_impossible_plans_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(**fields)  # type: ignore[arg-type]


def test_measurements_come_back_and_broken_ones_are_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, plan = Case("linear", 1, 64, 32, "bfloat16"), Plan(path="gemv", block_n=2)
    path = save_measured(GPU, {case.key: plan}, tmp_path)
    assert load_table(GPU, tmp_path).plan(case) == plan
    assert load_table("another GPU", tmp_path).measured == {}
    monkeypatch.setattr(logging.getLogger("kvik"), "propagate", True)
    shipped = load_table(GPU, tmp_path / "empty").measured
    for broken in ("", "[]", json.dumps({"measured": {case.key: {"path": "warp"}}})):
        path.write_text(broken)
        caplog.clear()
        assert load_table(GPU, tmp_path).measured == shipped
        assert "cannot be read" in caplog.text


def test_another_kernel_source_is_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = cache_path(GPU, tmp_path)
    for name in ("h200.json", *dispatch._TUNED_SOURCES):
        (tmp_path / name).write_bytes((dispatch._HERE / name).read_bytes())
    monkeypatch.setattr(dispatch, "_HERE", tmp_path)
    assert cache_path(GPU, tmp_path) == here
    with (tmp_path / "gemv.py").open("a") as file:
        file.write("\n")
    assert cache_path(GPU, tmp_path) != here
