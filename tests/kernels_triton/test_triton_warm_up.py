"""Warming up launches what an engine launches, leaves nothing behind, and can be done by processes without a GPU."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from test_triton_runner import cpu_runner, gpu_runner, run, settings, tokens

from kvik.config import SchedulerConfig
from kvik.kernels.triton.compile_only import has_nvidia_driver
from kvik.models.registry import build_spec
from kvik.runtime.gpu_runner import GpuRunner
from kvik.runtime.kernel_compiler import CompileJob, KernelCompiler
from kvik.runtime.mixed_step import graph_size, graph_sizes
from kvik.runtime.warm_up import warm_up, warm_up_plans

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 128, "rope_theta": 1e4, "tie_word_embeddings": True,
}  # fmt: skip
JOB = CompileJob(
    spec=build_spec(CONFIG), dtype=torch.bfloat16, gpu="NVIDIA H200", capability=(9, 0), deterministic=False,
    settings=SchedulerConfig(block_size=16, num_blocks=1, max_num_seqs=2, max_num_batched_tokens=4, max_model_len=64),
)  # fmt: skip


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


@pytest.mark.parametrize("model", ["qwen3", "qwen2"])
def test_no_step_launches_a_kernel_that_warming_up_did_not(model: str, cache: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("launched_kernels.py")), model]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert len(found["warm"]) > 30
    assert found["more"] == []
    assert not kernels(cache)


def test_a_job_survives_json_and_its_mark_depends_on_it(cache: Path) -> None:
    assert CompileJob.from_json(JOB.to_json()) == JOB
    assert JOB.mark.parent == cache
    assert JOB.mark == CompileJob.from_json(JOB.to_json()).mark
    others = [replace(JOB, dtype=torch.float16), replace(JOB, capability=(8, 0)), replace(JOB, gpu="x")]
    assert len({JOB.mark, *(other.mark for other in others)}) == 4


def test_processes_share_the_kernels_and_leave_none_out(cache: Path) -> None:
    with KernelCompiler(JOB, 2) as compiler:
        assert compiler._folder is not None
        folder = Path(compiler._folder.name)
        compiler.wait()
        claims = list((folder / "claims").iterdir())
        assert not any(log.read_text() for log in folder.glob("log-*"))
    assert not folder.exists()
    found = kernels(cache)
    assert len(claims) == len(found) + has_nvidia_driver()
    (cache / "job").mkdir()
    (cache / "job" / "claims").mkdir()
    (cache / "job" / "job.json").write_text(JOB.to_json())
    code = (
        "import sys, json; from pathlib import Path; from triton import knobs; hits = [];"
        "knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit);"
        "from kvik.runtime.kernel_compiler import main; main(Path(sys.argv[1])); print(json.dumps(hits))"
    )
    again = subprocess.run([sys.executable, "-c", code, str(cache / "job")], capture_output=True, text=True, check=True)
    assert json.loads(again.stdout) == [True] * len(found)


def test_a_marked_job_starts_no_processes(cache: Path) -> None:
    with KernelCompiler(JOB, 1) as alone:
        assert not alone._processes
        alone.leave_mark()
    with KernelCompiler(JOB, 2) as compiler:
        assert not compiler._processes
        compiler.wait()
    assert [file.name for file in cache.iterdir()] == [JOB.mark.name]


@pytest.mark.parametrize(
    ("executable", "reason"), [("/bin/false", "2 of 2 processes"), ("/no/such/python", "by 0 processes")]
)
def test_processes_that_die_are_only_a_warning(
    executable: str, reason: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with caplog.at_level(logging.WARNING, "kvik"), KernelCompiler(JOB, 2) as compiler:
        compiler.wait()
    assert reason in caplog.text
    assert not kernels(cache)


def test_processes_that_hang_are_ended(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 600\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    with caplog.at_level(logging.WARNING, "kvik"), KernelCompiler(JOB, 2) as compiler:
        processes = list(compiler._processes)
        compiler.wait(0.1)
    assert "takes longer than 0.1 s" in caplog.text
    assert all(process.poll() is not None for process in processes)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_an_engine_finds_all_its_kernels_compiled(device: torch.device, tmp_path: Path) -> None:
    file = tmp_path / "start.jsonl"
    options = ["--device", device.type, "--cold", "--runs", "1", "--json", str(file)]
    subprocess.run([sys.executable, "-m", "kvik.cli.main", "bench", "startup", "demo", *options], check=True)
    found = json.loads(file.read_text())["kernels"]
    assert found["start"]["compiled"] == [] and found["start"]["loaded"] > 30
    assert found["first_request"] == {"compiled": [], "loaded": 0}


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
                assert size <= 2048 or 7 * size <= 8 * num_tokens
