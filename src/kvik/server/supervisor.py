"""The process that the user started: it owns the listening sockets and the children, and nothing else.

    supervisor --stdin--> engine process <--ipc--> HTTP process 0 .. N-1 <--stdin-- supervisor

Whatever ends, everything ends, in this order: open streams get their last event, HTTP processes end, the engine ends.
The exit code is 0 only if that was asked for. A child that outlives its grace is killed; if the supervisor itself is
killed, the children see their standard input close.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO

import msgspec

from kvik.errors import ConfigError
from kvik.log import logger
from kvik.server.process import DRAIN, ENGINE_ENDED, HTTP_ENDED, ChildSettings
from kvik.server_config import ServerConfig

__all__ = ["Supervisor", "bind", "check_tls"]

POLL = 0.05
GRACE = 10.0
"""Seconds that a child gets to end after it was told to, beyond the time that draining may take."""

MAX_PARENT = 80
"""Bytes of the path of the folder for temporary files; one that is longer is not used."""


def bind(config: ServerConfig) -> list[socket.socket]:
    """One listening socket for each HTTP process, all on the same address. Raises ConfigError where it is taken.

    With several, the kernel spreads connections over them (SO_REUSEPORT).
    """
    many = config.num_http > 1
    if many and not hasattr(socket, "SO_REUSEPORT"):
        raise ConfigError("api_processes: this system cannot share a port between processes; use 1")
    port, sockets = config.port, list[socket.socket]()
    if many:
        with contextlib.closing(_listen(config.host, port, shared=False)) as probe:
            port = probe.getsockname()[1]
    for _ in range(config.num_http):
        sockets.append(_listen(config.host, port, shared=many))
        port = sockets[0].getsockname()[1]
    return sockets


def check_tls(config: ServerConfig) -> None:
    """Raise ConfigError unless certificate and key can be used: HTTP processes could ask nobody for a password."""
    if config.ssl_certfile is None:
        return
    password = config.ssl_keyfile_password or ""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password)
    except (OSError, ValueError) as error:
        files = f"ssl_certfile {config.ssl_certfile} with ssl_keyfile {config.ssl_keyfile}"
        hint = "" if password else "; an encrypted key needs --ssl-keyfile-password"
        raise ConfigError(f"{files} cannot be used: {error}{hint}") from error


def _listen(host: str, port: int, *, shared: bool) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        elsewhere = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        hint = "--host takes an address of this machine" if elsewhere else "choose another --port"
        raise ConfigError(f"cannot listen on {host} port {port}: {error}; {hint}") from error
    listener.set_inheritable(True)
    return listener


class _Child:
    """A child process: words down its stdin, one line up its stdout."""

    def __init__(self, module: str, settings: ChildSettings, environ: dict[str, str]) -> None:
        self.name = module.rpartition(".")[2].replace("_", " ")
        fds = () if settings.socket_fd < 0 else (settings.socket_fd,)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
            pass_fds=fds if sys.platform != "win32" else (),
            start_new_session=True,
        )
        self.line: bytes | None = None
        self.tell_raw(msgspec.json.encode(settings))
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()

    def _listen(self, stdout: IO[bytes]) -> None:
        for line in stdout:
            self.line = self.line or line

    @property
    def code(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.poll()

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, word: str) -> None:
        """Say a word, if it still listens."""
        self.tell_raw(word.encode())

    def tell_raw(self, line: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()

    def end(self, grace: float) -> None:
        """Close its stdin, which asks it to end, and kill it after `grace` seconds."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self.wait(grace)

    def wait(self, grace: float) -> None:
        """Wait for its end, and kill it after `grace` seconds."""
        try:
            self._process.wait(max(0.0, grace))
        except subprocess.TimeoutExpired:
            logger.error("the %s did not end within %.0f s and is killed", self.name, grace)
            self._process.kill()
            self._process.wait()


class Supervisor:
    """Starts the children and waits for an end. `on_ready` gets the announcement of an HTTP process."""

    def __init__(self, settings: ChildSettings, sockets: list[socket.socket], on_ready: Callable[[str], None]) -> None:
        self._settings = settings
        self._sockets = sockets
        self._on_ready = on_ready
        self._asked = 0

    def run(self) -> int:
        """Serve; the exit code of the command."""
        with _folder() as folder, _signals(self._handle):
            settings = msgspec.structs.replace(self._settings, endpoint=f"ipc://{folder / 'engine'}")
            environ = dict(os.environ)
            if len(self._sockets) > 1:
                environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)  # so that their metrics are added up
            with _signals_held():
                engine = _Child("kvik.server.engine_process", settings, dict(os.environ))
                https = [
                    _Child(
                        "kvik.server.http_process",
                        msgspec.structs.replace(settings, socket_fd=listener.fileno(), index=index),
                        environ,
                    )
                    for index, listener in enumerate(self._sockets)
                ]
            for listener in self._sockets:
                listener.close()
            try:
                return self._watch(engine, https)
            finally:
                for child in (*https, engine):
                    child.end(GRACE / 2 if child.code is None else 0.0)

    def _watch(self, engine: _Child, https: list[_Child]) -> int:
        """Wait until something ends or an end is asked for, then end the rest."""
        announced = False
        while not self._asked:
            if not announced and all(child.line for child in https):
                announced = True
                self._on_ready((https[0].line or b"").decode())
            if engine.code is not None:
                return self._engine_ended(engine, https)
            failed = [child for child in https if child.code is not None]
            if failed:
                logger.error("the %s (pid %d) ended with code %s", failed[0].name, failed[0].pid, failed[0].code)
                self._end_streams(https, HTTP_ENDED)
                return failed[0].code or 1
            time.sleep(POLL)
        for times, patience in ((1, self._settings.server.drain_timeout), (2, 0.0)):
            for child in https:
                child.tell(DRAIN)
            start, told = time.monotonic(), not patience
            end = start + patience + GRACE
            while any(child.code is None for child in https) and time.monotonic() < end and self._asked <= times:
                if engine.code is not None:
                    return self._engine_ended(engine, https)
                if not told and time.monotonic() > start + 1:
                    told = True
                    logger.warning("open requests have %g s (drain_timeout); a second signal ends them", patience)
                time.sleep(POLL)
            if self._asked <= times:
                break
        return max((abs(child.code or 0) for child in https), default=0)

    def _engine_ended(self, engine: _Child, https: list[_Child]) -> int:
        """Let open streams end with an error. A start that failed has the engine's own code, a death is a 1."""
        code = engine.code or 0
        if code != 2:
            logger.error("the engine process (pid %d) ended with code %d", engine.pid, code)
        self._end_streams(https, ENGINE_ENDED)
        return 2 if code == 2 else 1

    def _end_streams(self, https: list[_Child], word: str) -> None:
        """Let open streams end with an error, which says what `word` does."""
        for child in https:
            child.tell(word)
        end = time.monotonic() + GRACE
        for child in https:
            child.wait(end - time.monotonic())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """The first signal asks for an end when open requests have ended, the second one for an end at once."""
        self._asked += 1


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder of this user alone, for the ipc socket, whose path the system allows about 100 characters."""
    parent = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="kvik-", dir=parent if len(os.fsencode(parent)) < MAX_PARENT else "/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Signals wait. Processes that are started meanwhile never get one: it is this process that ends them, in order,
    although who stops a service may send the signal to every process of it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which nohup ignores
        numbers.append(signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, previous, strict=True):
            signal.signal(number, old)
