"""What the machine has: the memory limits of containers."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch

from kvik.errors import ConfigError
from kvik.runtime import platform
from kvik.runtime.platform import CpuPlatform, memory_limits


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
