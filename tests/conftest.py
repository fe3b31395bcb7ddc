"""What every test shares: one compute thread, because tiny models gain nothing from more and tests run side by side;
and the same seeds in every run, where a request and its engine name none.

Tests of the server are left out where it is not installed, as on machines that only run `make test-gpu`."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

import importlib.util
import random
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from kvik import startup
from kvik.runtime import platform
from kvik.text import frontend

pytest.register_assert_rewrite("engine_runs")

_MISSING = [name for name in ("fastapi", "httpx", "msgspec", "openai", "zmq") if importlib.util.find_spec(name) is None]
collect_ignore = ["server"] if _MISSING else []


def pytest_report_header() -> list[str]:
    return [f"tests/server: left out, {', '.join(_MISSING)} not installed"] if _MISSING else []


@pytest.fixture(scope="session", autouse=True)
def _same_in_every_run() -> Iterator[None]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for module in (platform, startup):
            patch.setattr(module, "usable_cores", lambda: 1)
        patch.setattr(frontend, "random", SimpleNamespace(Random=lambda seed: random.Random(seed or 0)))
        yield
