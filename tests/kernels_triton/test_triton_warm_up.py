"""Warming up launches what an engine launches, leaves nothing behind, and can be done by processes without a GPU."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from compile_job import JOB
from test_triton_runner import cpu_runner, gpu_runner, run, settings, tokens

from kvik.config import SchedulerConfig
from kvik.kernels.triton.compile_only import has_nvidia_driver
from kvik.runtime.gpu_runner import GpuRunner
from kvik.runtime.graphs import GraphPool
from kvik.runtime.kernel_compiler import CompileJob, KernelCompiler
from kvik.runtime.mixed_step import graph_size, graph_sizes
from kvik.runtime.warm_up import warm_up, warm_up_plans


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Triton, where processes compile for a GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def kernels(cache: Path) -> list[str]:
    return sorted(str(file.relative_to(cache)) for file in cache.rglob("*.cubin"))


def test_an_engine_that_was_warmed_up_gives_the_same_tokens(device: torch.device) -> None:
    config = settings(max_num_batched_tokens=8)
    runner = gpu_runner(device, config)
    assert isinstance(runner, GpuRunner)
    warm_up(runner, config)
    assert tokens(run(runner, config)) == tokens(run(cpu_runner(config), config))


def test_plans_stay_within_the_limits() -> None:
    for budget, length in ((4, 64), (7, 3), (8192, 40960), (300, 128)):
        config = replace(JOB.settings, max_num_seqs=4, max_num_batched_tokens=budget, max_model_len=length)
        plans = list(warm_up_plans(config))
        assert max(plan.num_tokens for plan in plans) == min(budget, 4 * length)
        assert {len(plan.decodes) for plan in plans} == {0, 1, 2, 4}
        blocks: dict[int, int] = {}
        for plan in plans:
            assert len({chunk.row for chunk in plan.chunks}) == len(plan.chunks) <= 4
            assert all(chunk.end <= length for chunk in plan.chunks)
            blocks |= dict.fromkeys((init.row for init in plan.joined), 0)
            for row, block_ids in plan.new_blocks:
                blocks[row] += len(block_ids)
            for chunk in plan.chunks:
                assert chunk.end <= 16 * blocks[chunk.row] < length + 16
            assert all(blocks[row] for row in plan.decodes)


@pytest.mark.parametrize(("model", "backend"), [("qwen3", "triton"), ("qwen2", "triton"), ("qwen3", "flashinfer")])
def test_no_step_launches_a_kernel_that_warming_up_did_not(model: str, backend: str, cache: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("launched_kernels.py")), model, backend]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert len(found["warm"]) > 30
    assert any("_prefill" in name for name in found["warm"]) == (backend == "triton")
    assert found["more"] == []
    assert not kernels(cache)


def test_the_mark_of_a_job_depends_on_it(cache: Path) -> None:
    assert JOB.mark.parent == cache
    assert JOB.mark == replace(JOB).mark
    others = [replace(JOB, dtype=torch.float16), replace(JOB, capability=(8, 0)), replace(JOB, gpu="x")]
    others.append(replace(JOB, attention_backend="flashinfer"))
    assert len({JOB.mark, *(other.mark for other in others)}) == 5


def test_processes_share_the_kernels_and_leave_none_out(cache: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("compile_job.py")), str(cache)]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    first = found[0]
    assert len(first["written"]) > 20
    for job in found:
        assert job["log"] == ""
        assert job["claims"] == len(first["written"]) + has_nvidia_driver()
        assert job["written"] == first["written"]  # from the second time on all were found
    assert not first["left"]


def test_a_marked_job_starts_no_processes(cache: Path) -> None:
    with KernelCompiler(JOB, 1) as alone:
        assert alone._process is None
        alone.leave_mark()
        assert not JOB.mark.exists(), "nobody has compiled what warming up does not launch"
    JOB.mark.touch()
    with KernelCompiler(JOB, 2) as compiler:
        assert compiler._process is None
        compiler.wait()
    assert [file.name for file in cache.iterdir()] == [JOB.mark.name]


def test_processes_that_die_are_only_a_warning(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: CompileJob) -> None:
        raise RuntimeError("no such shape")

    monkeypatch.setattr(CompileJob, "meta_runner", fail)
    with caplog.at_level(logging.WARNING, "kvik"), KernelCompiler(JOB, 2) as compiler:
        compiler.wait()
        compiler.leave_mark()
    assert "they said: RuntimeError: no such shape" in caplog.text and not JOB.mark.exists()
    assert not kernels(cache)


def test_a_process_that_cannot_start_is_only_a_warning(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> int:
        raise BlockingIOError("too many processes")

    monkeypatch.setattr("os.fork", fail)
    with caplog.at_level(logging.WARNING, "kvik"), KernelCompiler(JOB, 2) as compiler:
        compiler.wait()
    assert "no process for it: too many processes" in caplog.text


def test_processes_that_hang_are_ended(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def hang(runner: GpuRunner, config: SchedulerConfig) -> None:
        (tmp_path / str(os.getpid())).touch()
        if len(list(tmp_path.iterdir())) > 2:  # the cache, and two processes
            time.sleep(600)

    monkeypatch.setattr("kvik.runtime.kernel_compiler.warm_up", hang)
    with caplog.at_level(logging.WARNING, "kvik"), KernelCompiler(JOB, 2) as compiler:
        while len(processes := [int(file.name) for file in tmp_path.iterdir() if file.name != "cache"]) < 2:
            time.sleep(0.01)
        compiler.wait(0.1)
    assert "takes longer than 0.1 s" in caplog.text
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            end = time.monotonic() + 10  # who is not the child of this process may take a moment to die
            while psutil.Process(process).status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
                time.sleep(0.01)
            assert psutil.Process(process).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_an_engine_finds_all_its_kernels_compiled(device: torch.device, tmp_path: Path) -> None:
    file = tmp_path / "start.jsonl"
    options = ["--device", device.type, "--cold", "--runs", "1", "--json", str(file)]
    subprocess.run([sys.executable, "-m", "kvik.cli.main", "bench", "startup", "demo", *options], check=True)
    found = json.loads(file.read_text())["kernels"]
    assert found["start"]["compiled"] == [] and found["start"]["loaded"] > 30
    assert found["first_request"] == {"compiled": [], "loaded": 0}


def test_a_pool_without_memory_is_full_and_other_errors_are_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> GraphPool:
        def capture(pool: GraphPool, compute: object) -> None:
            raise error

        monkeypatch.setattr(GraphPool, "capture", capture)
        return GraphPool()

    for error in (torch.OutOfMemoryError("CUDA out of memory."), torch.AcceleratorError("CUDA error: out of memory")):
        pool = fail(error)
        assert pool.try_capture(lambda: None) is None and pool.full
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        fail(torch.AcceleratorError("CUDA error: an illegal memory access")).try_capture(lambda: None)


def test_graphs_of_steps_with_prompts_pad_little_where_it_costs() -> None:
    for budget in (5, 300, 2048, 8192, 10000):
        sizes = graph_sizes(budget)
        assert list(sizes) == sorted(set(sizes)) and sizes[-1] == budget
        assert graph_size(budget, sizes) == budget
        assert graph_size(budget + 1, sizes) is None
        for num_tokens in range(1, budget + 1):
            size = graph_size(num_tokens, sizes)
            if size is None:
                assert num_tokens > 2048
            else:
                assert num_tokens <= size <= max(16, 2 * num_tokens)
                assert num_tokens <= 512 or 4 * size <= 5 * num_tokens
                assert size <= 2048 or 7 * size <= 8 * num_tokens
