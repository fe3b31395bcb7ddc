"""What the machine has, the memory limits of containers, and what is planned for it."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import psutil
import pytest
import torch

from kvik.config import EngineConfig
from kvik.errors import CapacityError, ConfigError
from kvik.models.registry import build_spec
from kvik.resolve import resolve
from kvik.runtime import platform
from kvik.runtime.platform import CpuPlatform, CudaPlatform, memory_limits


def write(folder: Path, limit: str, used: int, spare: int, *, names: tuple[str, str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {spare}\nunevictable 0\n")


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_containers(tmp_path: Path, version: int) -> None:
    """Of the group itself and of those around it; where a container shows its own group as the root, of that."""
    own, controller = tmp_path / "own", "memory" if version == 1 else ""
    names = platform._GROUP_FILES[controller]
    groups = tmp_path / "groups" / controller
    own.write_text(f"3:cpu,cpuacct:/elsewhere\n0:{controller}:/pod/app\n")
    assert list(memory_limits(tmp_path / "groups", own)) == []
    write(groups / "pod" / "app", "max", 10, 1, names=names)
    assert list(memory_limits(tmp_path / "groups", own)) == []
    write(groups / "pod", "1000", 600, 100, names=names)
    write(groups, "5000", 6000, 100, names=names)
    assert list(memory_limits(tmp_path / "groups", own)) == [(1000, 500), (5000, 0)]
    own.write_text(f"0:{controller}:/docker/not-shown\n")
    assert list(memory_limits(tmp_path / "groups", own)) == [(5000, 0)]
    assert list(memory_limits(tmp_path / "groups", tmp_path / "nothing")) == []


def test_a_limit_of_address_space_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    used = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1 << 50, 1 << 51))
    ((limit, left),) = memory_limits(tmp_path, tmp_path / "nothing")
    assert limit == 1 << 50 and 0 < left <= limit - used // 2
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1 << 20, 1 << 20))
    assert list(memory_limits(tmp_path, tmp_path / "nothing")) == [(1 << 20, 0)]


def test_a_plan_is_for_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "memory_limits", lambda: iter([(1 << 30, 1 << 20), (1 << 62, 1 << 61)]))
    cpu = CpuPlatform()
    assert (cpu.total_memory(), cpu.available_memory()) == (1 << 30, 1 << 20)
    monkeypatch.setattr(platform, "memory_limits", lambda: iter(()))
    assert cpu.total_memory() == psutil.virtual_memory().total


def test_a_forked_process_does_not_wait_for_threads_that_it_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = CpuPlatform()
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr(platform, "_started_in", None)
        cpu.start(2)
        cpu.start(2)
        monkeypatch.setattr(platform, "_started_in", os.getpid() + 1)
        for _ in range(2):
            with pytest.raises(ConfigError, match="forked by one that has loaded a model"):
                cpu.start(2)
            cpu.start(1)
    finally:
        torch.set_num_threads(before)


class Gpu(CudaPlatform):
    """A GPU as a plan sees it, of 24 GB."""

    name = "a GPU"

    def available_memory(self) -> int:
        return 23_500_000_000

    def total_memory(self) -> int:
        return 24_000_000_000


LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize("positions", [131_072, 1 << 22])
def test_an_automatic_context_is_as_long_as_the_plan_for_it_allows(positions: int) -> None:
    """What attention and tables take grows with the context, and took all that was left for the KV cache."""
    pytest.importorskip("triton", reason="triton is not installed")
    spec = build_spec({**LLAMA_8B, "max_position_embeddings": positions})
    plan = resolve(EngineConfig("a"), spec, torch.bfloat16, Gpu())
    length = plan.scheduler.max_model_len
    assert length > 4096 and plan.memory.kv_tokens >= length and plan.memory.fits
    assert f"max_model_len lowered from {positions} to {length}" in plan.notes[-1]
    longest = resolve(EngineConfig("a", max_model_len=length), spec, torch.bfloat16, Gpu())
    assert longest.memory == plan.memory
    with pytest.raises(CapacityError, match=f"or max_model_len={length}, or"):
        resolve(EngineConfig("a", max_model_len=length + 2), spec, torch.bfloat16, Gpu())


def test_a_pool_that_was_asked_for_decides_how_long_an_automatic_context_is() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    spec = build_spec({**LLAMA_8B, "max_position_embeddings": 1 << 22})
    for asked in ({"num_kvcache_blocks": 20}, {"kv_cache_memory": 20 * 64 * 131_072}):
        plan = resolve(EngineConfig("a", **asked), spec, torch.bfloat16, Gpu())
        assert (plan.scheduler.num_blocks, plan.scheduler.max_model_len) == (20, 20 * 64)
    with pytest.raises(CapacityError, match="num_kvcache_blocks 20000 needs"):
        resolve(EngineConfig("a", num_kvcache_blocks=20_000), spec, torch.bfloat16, Gpu())


def test_a_model_that_is_too_large_says_what_even_a_short_context_takes() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    spec = build_spec({**LLAMA_8B, "num_hidden_layers": 64, "max_position_embeddings": 131_072})
    with pytest.raises(CapacityError, match=r"(?s)a context of 256 tokens .* a smaller max_num_batched_tokens or"):
        resolve(EngineConfig("a"), spec, torch.bfloat16, Gpu())
