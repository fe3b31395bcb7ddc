"""Servers for tests: the real command in a process of its own, or client and engine loop in this process.

Only the loopback address is ever used, and every wait has an end.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from kvik.config import SchedulerConfig
from kvik.core.engine import Engine
from kvik.core.scheduler import Scheduler
from kvik.distributed.executor import Executor
from kvik.distributed.mock import MockExecutor
from kvik.server.engine_server import EngineServer
from kvik.server.messages import Ready
from kvik.structured.grammars import Grammars

__all__ = ["KEY", "EngineThread", "Served", "engine_thread", "serve", "wait_until"]

KEY = "secret-key-of-the-tests"
START_TIMEOUT = 90.0


@dataclass
class Served:
    """A running `kvik serve`."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    headers: dict[str, str]

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, headers=self.headers, **options)

    @property
    def children(self) -> dict[str, list[psutil.Process]]:
        """The engine process and the HTTP processes."""
        found: dict[str, list[psutil.Process]] = {"engine": [], "http": []}
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                found["engine" if "engine_process" in " ".join(child.cmdline()) else "http"].append(child)
        return found

    def metric(self, name: str) -> float:
        with self.client() as client:
            text = client.get("/metrics").text
        return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    def wait_idle(self, timeout: float = 20) -> None:
        """Wait until the engine has nothing queued, running or allocated; its status is at most half a second old."""
        time.sleep(0.7)
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        wait_until(lambda: all(self.metric(name) == 0 for name in names), timeout)


@contextlib.contextmanager
def serve(model: str, log: Path, *flags: str, key: str | None = None, wait: bool = True) -> Iterator[Served]:
    """Run `kvik serve MODEL` on a free port until the block ends."""
    given = ["--threads", "1", *([] if "--api-processes" in flags else ["--api-processes", "1"]), *flags]
    command = [sys.executable, "-m", "kvik.cli.main", "serve", model, "--port", "0", *given]
    environ = {**{k: v for k, v in os.environ.items() if not k.startswith("KVIK_")}, "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, env=environ)
    try:
        if wait:
            wait_until(lambda: "serving on" in log.read_text() or process.poll() is not None, START_TIMEOUT)
        found = re.search(r"serving on (\S+)", log.read_text()) if wait else None
        assert found or not wait, log.read_text()
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        yield Served(process, found[1] if found else "", log, headers)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        process.kill()
        process.wait()


def wait_until(done: Any, timeout: float = 20, interval: float = 0.05) -> None:
    """Poll until `done()` is true. Fails after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not done():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(interval)


@dataclass
class EngineThread:
    """The engine's loop with a pretend model, in a thread."""

    server: EngineServer
    engine: Engine
    endpoint: str


@contextlib.contextmanager
def engine_thread(
    folder: Path,
    *,
    vocab_size: int = 384,
    executor: Executor | None = None,
    grammars: Grammars | None = None,
    **scheduler: Any,
) -> Iterator[EngineThread]:
    """An engine without a model behind a real ipc socket."""
    defaults: dict[str, Any] = {
        "block_size": 16, "num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 512,
    }  # fmt: skip
    config = SchedulerConfig(**{**defaults, **scheduler})
    engine = Engine(Scheduler(config), executor or MockExecutor(config.block_size, vocab_size))
    endpoint = f"ipc://{folder / 'engine'}"
    ready = Ready(scheduler=config, vocab_size=vocab_size, hidden_size=8, fingerprint="kvik-test")
    server = EngineServer(engine, endpoint, ready, grammars)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield EngineThread(server, engine, endpoint)
    finally:
        server.stop()
        thread.join(10)
        alive = thread.is_alive()
        server.close()
        assert not alive
