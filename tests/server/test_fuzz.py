"""Bad requests never hurt: a few thousand malformed ones, abusive connections, slow readers, and schemathesis."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import psutil
import pytest
from server_harness import Served, serve

CLIENTS = Path(__file__).parents[1] / "clients"


def load_fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kvik_fuzz", CLIENTS / "fuzz.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_malformed_requests(served: Served) -> None:
    fuzz = load_fuzz()
    statuses = asyncio.run(asyncio.wait_for(fuzz.run(served.url, 2000, seed=time.time_ns() % 10**6), 200))
    assert statuses[400] > 400 and statuses[200] > 100
    served.wait_idle()
    assert served.process.poll() is None


def test_abusive_connections(served: Served) -> None:
    asyncio.run(asyncio.wait_for(load_fuzz().abuse(served.url, 500), 100))
    served.wait_idle()


def test_slow_client_is_ended(model: str, tmp_path: Path) -> None:
    """A reader that stops reading costs a bounded buffer, and its requests end after the patience is over."""
    with serve(model, tmp_path / "log", "--slow-client-timeout", "1", "--max-model-len", "512") as served:
        parts = urlsplit(served.url)
        stalled = socket.create_connection((parts.hostname, parts.port or 0))
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = (
            b'{"prompt": "x", "n": 40, "max_tokens": 500, "ignore_eos": true, "stream": true, "return_token_ids": true,'
            b'"logprobs": 5, "stream_options": {"continuous_usage_stats": true}}'
        )
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        )
        http = served.children["http"][0]
        before = http.memory_info().rss
        stalled.sendall(head % len(body) + body)
        served.wait_idle(60)
        assert "read nothing for" in served.log.read_text()
        assert http.memory_info().rss - before < 200e6
        assert psutil.pid_exists(http.pid)
        stalled.close()
        with socket.create_connection((parts.hostname, parts.port or 0), timeout=20) as halting:
            halting.sendall(head % 100 + b"{")
            assert b" 408 " in halting.recv(100)


@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_schemathesis(served: Served, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", f"{served.url}/openapi.json", "--max-examples", "5",
        "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        "--exclude-path", "/debug/events", "--phases", "examples,coverage,fuzzing", "--request-timeout", "20",
        "--suppress-health-check", "all", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    served.wait_idle()
