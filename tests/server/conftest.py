"""A tiny model, and servers that several tests share."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from server_harness import KEY, Served, serve
from tiny_models import make_tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny qwen3 with a chat template and a context of 512 tokens."""
    return str(make_tiny(tmp_path_factory.mktemp("server") / "tiny"))


@pytest.fixture(scope="session")
def served(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with default options."""
    with serve(model, tmp_path_factory.mktemp("logs") / "served.log") as found:
        yield found


@pytest.fixture(scope="session")
def guarded(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with two keys, --strict and tight limits, and two HTTP processes."""
    flags = (
        "--api-key", KEY, "--api-key", "another", "--strict", "--max-body-bytes", "64KiB", "--max-n", "4",
        "--max-logit-bias", "3", "--max-queued-requests", "6", "--api-processes", "2", "--served-model-name", "tiny",
        "--max-num-seqs", "2", "--stream-interval", "0.03", "--cors-origins", "https://page.example",
    )  # fmt: skip
    with serve(model, tmp_path_factory.mktemp("logs") / "guarded.log", *flags, key=KEY) as found:
        yield found


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with served.client() as client:
        yield client


@pytest.fixture
def strict(guarded: Served) -> Iterator[httpx.Client]:
    with guarded.client() as client:
        yield client
