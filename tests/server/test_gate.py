"""Who may come in and how much they may bring: keys on every route, bodies, headers, cross-origin pages."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from chat_templates import TEMPLATES
from scripted_server import scripted_server
from server_harness import KEY, Served, serve, wait_until
from starlette.datastructures import Headers

from kvik.cli.serve import _api_keys
from kvik.config import EngineConfig
from kvik.errors import ConfigError
from kvik.server.app import make_routes
from kvik.server.errors import ApiError
from kvik.server.gate import PUBLIC, Gate, key_salt
from kvik.server.metrics import Metrics
from kvik.server.process import ChildSettings
from kvik.server.service import Service
from kvik.server.supervisor import _listen, check_tls
from kvik.server_config import ServerConfig


def routes() -> list[tuple[str, str]]:
    """Every method and path of the route table."""
    settings = ChildSettings("", EngineConfig("x"), ServerConfig(), ("tiny",), {}, "error")
    app = make_routes(Service(settings, Metrics("tiny")))
    found: list[tuple[str, str]] = []

    def walk(items: list[object]) -> None:
        for route in items:
            inner = getattr(route, "original_router", None) or getattr(route, "app", None)
            if getattr(route, "path", None) is not None and getattr(route, "methods", None):
                found.extend((method, route.path) for method in sorted(route.methods))  # type: ignore[attr-defined]
            elif inner is not None:
                walk(getattr(inner, "routes", []))

    walk(list(app.routes))
    for path, methods in app.openapi()["paths"].items():
        found += [(method.upper(), path) for method in methods if (method.upper(), path) not in found]
    return found


def test_the_route_table_is_what_it_should_be() -> None:
    paths = {path for _, path in routes()}
    assert {"/v1/chat/completions", "/v1/models", "/health", "/metrics", "/debug/events", "/generate"} <= paths
    assert len(paths) >= 18


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}])
def test_every_route_needs_a_key(guarded: Served, headers: dict[str, str]) -> None:
    with httpx.Client(base_url=guarded.url, headers=headers, timeout=30) as client:
        for method, path in [*routes(), ("GET", "/no/such/route"), ("POST", "/v1"), ("GET", "/health/")]:
            status = client.request(method, re.sub(r"{.*}", "tiny", path)).status_code
            if path in PUBLIC:
                assert status in (200, 404, 405), (method, path)
            elif method != "OPTIONS":
                assert status == 401, (method, path, status)
        body = client.get("/v1/models").json()["error"]
    assert (body["type"], body["code"]) == ("authentication_error", "invalid_api_key")


def test_monitors_may_ask_without_a_body(guarded: Served) -> None:
    with httpx.Client(base_url=guarded.url) as client:  # one connection, which a body would leave out of step
        for path in ("/health", "/", "/inspector"):
            head, whole = client.head(path), client.get(path)
            assert (head.status_code, head.content) == (200, b"") and whole.content, path
            assert head.headers["content-length"] == whole.headers["content-length"], path
        assert client.head("/ready").status_code == 401
        assert client.head("/ready", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        assert client.head("/metrics", headers={"authorization": f"Bearer {KEY}"}).status_code == 405


def test_an_address_that_cannot_be_had() -> None:
    with _listen("127.0.0.1", 0, shared=False) as taken, pytest.raises(ConfigError, match="choose another --port"):
        _listen("127.0.0.1", taken.getsockname()[1], shared=False)
    for host in ("203.0.113.1", "name.invalid"):
        with pytest.raises(ConfigError, match="--host takes an address of this machine"):
            _listen(host, 0, shared=False)


@pytest.mark.parametrize("key", [KEY, "another"])
def test_each_key_opens(guarded: Served, key: str) -> None:
    headers = {"authorization": f"Bearer {key}"}
    assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 200


def test_keys_do_not_share_prefixes(guarded: Served) -> None:
    def cached(key: str) -> int:
        body = {"prompt": list(range(10, 90)), "max_tokens": 1}
        answer = httpx.post(
            f"{guarded.url}/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=30
        )
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [cached(KEY), cached(KEY), cached("another"), cached("another")] == [0, 64, 0, 64]
    assert key_salt(b"a") != key_salt(b"b")


def test_bodies_are_bounded(strict: httpx.Client) -> None:
    fine = b'{"prompt": "' + b"x" * (65536 - 14) + b'"}'
    assert len(fine) == 65536
    json_type = {"content-type": "application/json"}
    assert strict.post("/v1/completions", content=fine, headers=json_type).status_code == 400  # above the context
    answer = strict.post("/v1/completions", content=fine + b" ", headers=json_type)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    chunked = strict.post("/v1/completions", content=iter([fine, b" "]), headers=json_type)
    assert chunked.status_code == 413


def test_heads_are_bounded(served: Served) -> None:
    parts = urlsplit(served.url)
    for line in (b"x-%d: " + b"a" * 1000 + b"\r\n", b"a" * 1000):
        with socket.create_connection((parts.hostname, parts.port or 0), timeout=20) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: ")
            with contextlib.suppress(OSError):
                for _ in range(2000):
                    connection.sendall(line)
            with contextlib.suppress(ConnectionError):
                assert b" 400 " in connection.recv(200)
    large = b"x" * 60_000  # a body in the same packet as the head does not count
    head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += b"content-length: %d\r\n\r\n" % (len(large) + 14)
    with socket.create_connection((parts.hostname, parts.port or 0), timeout=20) as connection:
        connection.sendall(head + b'{"prompt": "' + large + b'"}')
        assert b" 200 " in connection.recv(200)


def connect(app: Any, talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
    """Serve `app` behind the protocol while `talk` has a connection to it."""
    protocol = pytest.importorskip("kvik.server.http_protocol", reason="httptools is not installed").BoundedProtocol

    async def main() -> None:
        config = uvicorn.Config(app, port=0, http=protocol, lifespan="off", timeout_keep_alive=60, log_level="error")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection(*server.servers[0].sockets[0].getsockname())
        await talk(reader, writer)
        writer.close()
        server.should_exit = True
        await serving

    asyncio.run(main())


@pytest.mark.parametrize("case", ["an empty line", "a body that nobody reads"])
def test_connections_without_a_request_end(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    http_protocol = pytest.importorskip("kvik.server.http_protocol", reason="httptools is not installed")
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT", 0.3)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = 1000 if case == "a body that nobody reads" else 0
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % body)
        assert b"200" in await reader.readline()
        begin = asyncio.get_running_loop().time()
        if not body:
            await asyncio.sleep(0.4)
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")  # it was idle, which is allowed
            await asyncio.sleep(0.1)
            writer.write(b"\r\n")
        dripping = asyncio.create_task(drip(writer)) if body else None
        rest = await asyncio.wait_for(reader.read(), 10)
        assert rest.count(b"200 OK") == (0 if body else 1)
        assert 0.2 < asyncio.get_running_loop().time() - begin < 5
        if dripping is not None:
            dripping.cancel()

    async def drip(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"x")
            await asyncio.sleep(0.05)

    connect(app, talk)


def test_an_empty_line_behind_a_request_does_not_end_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some clients send one after a body."""
    http_protocol = pytest.importorskip("kvik.server.http_protocol", reason="httptools is not installed")
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT", 0.2)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(1)
        await send({"type": "http.response.body", "body": b"the end"})

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}")
        await asyncio.sleep(0.1)
        writer.write(b"\r\n")
        assert b"the end" in await asyncio.wait_for(reader.read(), 10)

    connect(app, talk)


def test_a_client_that_leaves_ends_all_its_requests() -> None:
    left: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        left.append(scope["path"])

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for path in (b"/first", b"/second"):
            writer.write(b"GET " + path + b" HTTP/1.1\r\nhost: x\r\n\r\n")
            await asyncio.sleep(0.1)
        writer.close()
        for _ in range(100):
            await asyncio.sleep(0.02)
        assert left == ["/first"]  # the second one had not begun

    connect(app, talk)


@pytest.mark.parametrize("name", ["upgrade", "Upgrade"])
def test_an_offer_of_http2_is_declined(served: Served, name: str) -> None:
    """The client of Java's library makes one with its first request."""
    parts, body = urlsplit(served.url), b'{"prompt": "x"}'
    head = f"POST /tokenize HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: {len(body)}\r\n"
    head += f"HTTP2-Settings: AAEAAEAAAAIAAAAB\r\n{name}: h2c\r\nHost: x\r\nContent-Type: application/json\r\n\r\n"
    with socket.create_connection((parts.hostname, parts.port or 0), timeout=20) as connection:
        for _ in range(2):
            connection.sendall(head.encode() + body)
            answer = connection.recv(4000)
            while b"}" not in answer:
                answer += connection.recv(4000)
            assert answer.startswith(b"HTTP/1.1 200")


def test_a_body_says_what_it_is(served: Served) -> None:
    """Without a type a page of another site could send one, unasked (a "simple" request)."""
    for headers in ({}, {"content-type": "text/plain"}):
        answer = httpx.post(f"{served.url}/v1/completions", content=b'{"prompt": "x"}', headers=headers)
        assert answer.status_code == 415 and "application/json" in answer.json()["error"]["message"]
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    packed = httpx.post(f"{served.url}/v1/completions", content=gzip.compress(b'{"prompt": "x"}'), headers=headers)
    assert packed.status_code == 415 and "'gzip'" in packed.json()["error"]["message"]


def test_a_key_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """As some editors write it."""
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbffirst\n# a comment\nsecond\n")
    assert _api_keys(ServerConfig(api_key_file=str(tmp_path / "keys"))) == ("first", "second")


def test_keys_are_compared_as_bytes_without_white_space() -> None:
    gate = Gate(
        None, public=PUBLIC, api_keys=[" spaced ", "sch\u00f6n"], max_body_bytes=1, max_requests_per_key=None,  # type: ignore[arg-type]
        on_response=lambda *_: None,
    )  # fmt: skip
    for sent in (b"Bearer spaced", b"Bearer  spaced ", "Bearer sch\u00f6n".encode()):
        assert gate._salt(Headers(raw=[(b"authorization", sent)]), "/v1/models")
    with pytest.raises(ApiError, match="API key"):
        gate._salt(Headers(raw=[(b"authorization", b"Bearer schon")]), "/v1/models")


def test_headers(http: httpx.Client) -> None:
    answer = http.get("/v1/models", headers={"x-request-id": "my-id-1"})
    assert answer.headers["x-request-id"] == "my-id-1" and answer.headers["openai-processing-ms"].isdigit()
    assert len(http.get("/version", headers={"x-request-id": "bad id"}).headers["x-request-id"]) == 32
    assert "access-control-allow-origin" not in http.get("/health", headers={"origin": "https://a.example"}).headers


def test_cors_where_configured(strict: httpx.Client) -> None:
    origin = {"origin": "https://page.example", "access-control-request-method": "POST"}
    allowed = strict.options("/v1/chat/completions", headers=origin)
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    other = strict.options("/v1/chat/completions", headers={**origin, "origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], "--allow-unauthenticated"),
        (["--api-key-file", "/no/such/file"], "cannot read api_key_file"),
        (["--max-requests-per-key", "2"], "--api-key"),
        (["--ssl-certfile", "a.pem"], "belong together"),
        (["--prot", "1"], "--port"),
        (["--temperature", "9"], "temperature"),
    ],
)
def test_starts_that_are_refused(model: str, flags: list[str], words: str) -> None:
    command = [sys.executable, "-m", "kvik.cli.main", "serve", model, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) <= 3


def test_metrics_of_all_processes_are_added_up(guarded: Served) -> None:
    before = guarded.metric("vllm:request_success_total")
    for _ in range(12):  # each on a connection of its own, so that both processes get some
        answer = httpx.post(
            f"{guarded.url}/generate", json={"prompt": "x", "max_tokens": 1}, headers=guarded.headers, timeout=30
        )
        assert answer.status_code == 200
    assert guarded.metric("vllm:request_success_total") - before == 12


def test_a_key_may_have_so_many_requests_open(tmp_path: Path) -> None:
    with scripted_server(tmp_path, TEMPLATES["chatml"], api_key=("a", "b"), max_requests_per_key=2) as server:
        server.say("x" * 100)
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}

        def post(key: str) -> httpx.Response:
            headers = {"authorization": f"Bearer {key}"}
            return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60)

        hold = threading.Event()
        run = server.executor._run_chunk
        server.executor._run_chunk = lambda chunk: hold.wait(30) and run(chunk)  # type: ignore[assignment, method-assign]
        threads = [threading.Thread(target=post, args=("a",)) for _ in range(2)]
        try:
            for thread in threads:
                thread.start()
            wait_until(lambda: server.service.num_open == 2)
            refused = post("a")
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "too_many_requests"
            headers = {"authorization": "Bearer a"}
            assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
        finally:
            hold.set()
        assert post("b").status_code == 200
        for thread in threads:
            thread.join(30)
        wait_until(lambda: post("a").status_code == 200)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_https(model: str, tmp_path: Path) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate]
    names = ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, *names], check=True, capture_output=True, timeout=60)
    with serve(model, tmp_path / "log", "--ssl-certfile", certificate, "--ssl-keyfile", key) as served:
        assert served.url.startswith("https://")
        context = ssl.create_default_context(cafile=certificate)
        assert httpx.get(f"{served.url}/ready", verify=context).status_code == 200
    locked = str(tmp_path / "locked.pem")
    lock = ["openssl", "rsa", "-aes256", "-passout", "pass:word", "-in", key, "-out", locked]
    subprocess.run(lock, check=True, capture_output=True, timeout=60)
    check_tls(ServerConfig(ssl_certfile=certificate, ssl_keyfile=locked, ssl_keyfile_password="word"))
    for keyfile, password in ((locked, None), (locked, "wrong"), (certificate, None), ("/absent", None)):
        with pytest.raises(ConfigError, match="cannot be used"):
            check_tls(ServerConfig(ssl_certfile=certificate, ssl_keyfile=keyfile, ssl_keyfile_password=password))


def test_secrets_are_not_printed(model: str) -> None:
    command = [sys.executable, "-m", "kvik.cli.main", "serve", model, "--api-key", KEY, "--print-config"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert KEY not in done.stdout and "api_key" in done.stdout


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-m", "kvik.cli.main", "serve", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "kvik: error:" in done.stderr and "Traceback" not in done.stderr
