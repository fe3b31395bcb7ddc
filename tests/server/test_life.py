"""Life and death of the processes: drains, crashes, hangs and orphans. Every test has a server of its own."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from server_harness import Served, serve, wait_until

LONG = {"prompt": "Hello", "max_tokens": 500, "ignore_eos": True, "stream": True, "temperature": 0}


class Stream(threading.Thread):
    """A client that reads a stream to its end."""

    def __init__(self, served: Served, **fields: Any) -> None:
        super().__init__(daemon=True)
        self.url, self.fields = f"{served.url}/v1/completions", {**LONG, **fields}
        self.events: list[dict[str, Any]] = []
        self.done = False
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", self.url, json=self.fields, timeout=60) as answer:
                for line in answer.iter_lines():
                    self.done = self.done or line == "data: [DONE]"
                    if line.startswith("data: {"):
                        self.events.append(json.loads(line[6:]))
        except httpx.HTTPError as error:
            self.events.append({"broken": repr(error)})


def started(served: Served, count: int = 3, **fields: Any) -> list[Stream]:
    streams = [Stream(served, **fields) for _ in range(count)]
    wait_until(lambda: all(stream.events for stream in streams))
    return streams


def slow_flags(model: str) -> tuple[str, ...]:
    """A server on which 500 tokens of one sequence take seconds."""
    return ("--device", "cpu", "--max-num-seqs", "4", "--log-level", "info")


def gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


@pytest.fixture(scope="module")
def big_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Slow enough that streams are open for seconds."""
    from tiny_models import make_tiny

    folder = tmp_path_factory.mktemp("big") / "big"
    return str(make_tiny(folder, num_hidden_layers=24, hidden_size=256, intermediate_size=512))


def test_engine_killed(big_model: str, tmp_path: Path) -> None:
    with serve(big_model, tmp_path / "log", *slow_flags(big_model)) as served:
        children = served.children
        streams = started(served)
        children["engine"][0].send_signal(signal.SIGKILL)
        assert served.process.wait(20) == 1
        for stream in streams:
            stream.join(10)
            assert stream.events[-1]["error"]["code"] == "engine_dead", stream.events[-1]
            assert not stream.done
        wait_until(lambda: gone([*children["engine"], *children["http"]]), 5)


def test_an_interrupt_while_the_model_loads_ends_the_server_at_once(model: str, tmp_path: Path) -> None:
    with serve(model, tmp_path / "log", "--drain-timeout", "60", wait=False) as served:
        wait_until(lambda: served.children["http"], 20)
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(40) == 0
        assert "is gone" not in served.log.read_text()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_a_hangup_that_is_ignored_ends_nothing(model: str, tmp_path: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with serve(model, tmp_path / "log") as served:
            served.process.send_signal(signal.SIGHUP)
            time.sleep(0.5)
            assert served.process.poll() is None and answers(f"{served.url}/ready")
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_a_full_disk_under_the_log_does_not_end_the_server(model: str, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with serve(model, Path("/dev/full"), "--port", port, "--log-level", "info", wait=False) as served:
        wait_until(lambda: answers(f"{url}/ready"), 60)
        time.sleep(0.5)
        body = {"prompt": "Hi", "max_tokens": 2, "ignore_eos": True}
        reply = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
        assert reply.json()["usage"]["completion_tokens"] == 2
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 0


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def test_a_long_path_of_temporary_files(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of an ipc socket is short."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    with serve(model, tmp_path / "log") as served:
        assert answers(f"{served.url}/ready")


def test_engine_hangs(big_model: str, tmp_path: Path) -> None:
    flags = (*slow_flags(big_model), "--stall-timeout", "1", "--engine-timeout", "3")
    with serve(big_model, tmp_path / "log", *flags) as served:
        children = served.children
        streams = started(served)
        children["engine"][0].suspend()
        wait_until(lambda: httpx.get(f"{served.url}/ready").status_code == 503, 4)
        assert httpx.get(f"{served.url}/health").status_code == 200
        assert served.process.wait(30) == 1
        for stream in streams:
            stream.join(10)
            assert stream.events[-1]["error"]["code"] == "engine_dead"
        wait_until(lambda: gone([*children["engine"], *children["http"]]), 5)


def test_supervisor_killed(model: str, tmp_path: Path) -> None:
    with serve(model, tmp_path / "log", "--api-processes", "2") as served:
        children = served.children
        assert len(children["http"]) == 2 and len(children["engine"]) == 1
        folder = Path(children["http"][0].environ()["PROMETHEUS_MULTIPROC_DIR"])
        assert folder.is_dir()
        served.process.kill()
        wait_until(lambda: gone([*children["engine"], *children["http"]]), 10)
        assert not folder.exists()


def test_http_process_killed(model: str, tmp_path: Path) -> None:
    with serve(model, tmp_path / "log") as served:
        children = served.children
        children["http"][0].kill()
        assert served.process.wait(20) != 0
        wait_until(lambda: gone(children["engine"]), 5)


def test_a_dead_http_process_ends_the_streams_of_others_with_an_error(big_model: str, tmp_path: Path) -> None:
    with serve(big_model, tmp_path / "log", *slow_flags(big_model), "--api-processes", "2") as served:
        streams = started(served, 4)
        served.children["http"][0].kill()
        assert served.process.wait(20) != 0
        for stream in streams:
            stream.join(10)
            broken = "broken" in stream.events[-1]  # which one the kernel gives a connection to, nobody knows
            assert broken or "another HTTP process ended" in stream.events[-1]["error"]["message"]
        assert "supervisor is gone" not in served.log.read_text()


def test_a_signal_to_every_process_drains(big_model: str, tmp_path: Path) -> None:
    """As systemd sends it."""
    with serve(big_model, tmp_path / "log", *slow_flags(big_model)) as served:
        streams = started(served, max_tokens=300)
        for processes in served.children.values():
            for process in processes:
                process.send_signal(signal.SIGTERM)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(40) == 0
        for stream in streams:
            stream.join(5)
            assert stream.done and stream.events[-1]["choices"][0]["finish_reason"] == "length"


def test_drain_lets_requests_finish(big_model: str, tmp_path: Path) -> None:
    with serve(big_model, tmp_path / "log", *slow_flags(big_model)) as served:
        children = served.children
        streams = started(served, max_tokens=300)
        connection = served.client()
        connection.get("/health")
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: connection.get("/ready").status_code == 503, 5)
        time.sleep(0.7)
        assert served.metric("vllm:num_requests_running") == 3  # and not what it was before
        refused = connection.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert served.process.wait(40) == 0
        for stream in streams:
            stream.join(5)
            assert stream.done and stream.events[-1]["choices"][0]["finish_reason"] == "length"
        wait_until(lambda: gone([*children["engine"], *children["http"]]), 5)


def test_drain_lets_clients_read_their_answers(tmp_path: Path) -> None:
    """Of a stream that the engine has finished long ago, megabytes may wait for a slow reader."""
    body = {**LONG, "prompt": "Once", "n": 16, "logprobs": 20, "max_tokens": 800}
    with serve("demo", tmp_path / "log") as served, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", int(served.url.rpartition(":")[2])))
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        answer = connection.recv(1000)
        wait_until(lambda: served.metric("vllm:request_success_total") == 1, 60)
        served.process.send_signal(signal.SIGTERM)
        time.sleep(4)
        while data := connection.recv(1 << 16):
            answer += data
        assert b"data: [DONE]" in answer[-100:]
        assert served.process.wait(20) == 0


@pytest.mark.parametrize("timeout, signals", [("0", 1), ("600", 2)], ids=["time is up", "a second signal"])
def test_drain_has_an_end(timeout: str, signals: int, big_model: str, tmp_path: Path) -> None:
    with serve(big_model, tmp_path / "log", *slow_flags(big_model), "--drain-timeout", timeout) as served:
        streams = started(served)
        begin = time.monotonic()
        for _ in range(signals):
            served.process.send_signal(signal.SIGTERM)
            if signals > 1:
                wait_until(lambda: "a second signal ends them" in (tmp_path / "log").read_text(), 5)
        assert served.process.wait(20) == 0
        assert time.monotonic() - begin < 15
        for stream in streams:
            stream.join(5)
            assert stream.events[-1]["error"]["code"] == "shutting_down"
        assert "supervisor is gone" not in (tmp_path / "log").read_text()


def test_vanished_clients_free_their_blocks(served: Served) -> None:
    body = {"prompt": "Hello", "max_tokens": 500, "ignore_eos": True}
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{served.url}/v1/completions", json={**body, "n": 8}, timeout=0.05)
    with httpx.stream("POST", f"{served.url}/v1/completions", json={**body, "n": 8, "stream": True}) as answer:
        assert next(answer.iter_lines())
    served.wait_idle()


def test_deadlines(big_model: str, tmp_path: Path) -> None:
    with serve(big_model, tmp_path / "log", *slow_flags(big_model), "--request-timeout", "0.3") as served:
        stream = Stream(served)
        whole = httpx.post(f"{served.url}/v1/completions", json={**LONG, "stream": False}, timeout=30)
        assert whole.status_code == 504 and whole.json()["error"]["code"] == "deadline_exceeded"
        stream.join(20)
        assert stream.events[-1]["error"]["code"] == "deadline_exceeded"
        served.wait_idle()
