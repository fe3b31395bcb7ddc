"""A tiny model, an environment without Kvik's variables, and commands run in this process or in their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_harness import Result
from tiny_models import make_tiny

from kvik.cli.main import main

DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # what is kept as it is, without a warning


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny qwen3 with a chat template and a context of 512 tokens."""
    return str(make_tiny(tmp_path_factory.mktemp("cli") / "tiny", dtype=DTYPE))


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with a context of 32768 tokens, which takes long enough to fill for an interruption."""
    return str(make_tiny(tmp_path_factory.mktemp("cli") / "long", dtype=DTYPE, max_position_embeddings=32768))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in [name for name in os.environ if name.startswith("KVIK_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def kvik(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command in this process."""

    def run(*argv: object) -> Result:
        code = main([str(arg) for arg in argv])
        return Result(code, *capsys.readouterr())

    return run
