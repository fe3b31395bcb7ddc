"""An HTTP process: `python -m kvik.server.http_process`, started by the supervisor, which gives it a bound socket.

Exit codes: 0 asked to end, 1 the engine or the supervisor is gone, 2 could not start.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn

from kvik.errors import KvikError
from kvik.log import configure, logger
from kvik.server.app import make_app
from kvik.server.errors import unavailable
from kvik.server.metrics import Metrics
from kvik.server.process import (
    DRAIN,
    ENGINE_ENDED,
    HTTP_ENDED,
    PARENT_GONE,
    ChildSettings,
    announce,
    read_settings,
    watch_parent,
)
from kvik.server.service import Service

__all__ = ["HttpProcess", "main"]

CHECK_INTERVAL = 0.25
LAST_WORDS = 2.0
"""Seconds that streams get to send their last event before connections are closed."""
_ENDS = {
    PARENT_GONE: "the supervisor is gone",
    ENGINE_ENDED: "the engine process ended",
    HTTP_ENDED: "another HTTP process ended",
}


class HttpProcess:
    """Life of one HTTP process: serve, drain, end."""

    def __init__(self, settings: ChildSettings) -> None:
        self.service = Service(settings, Metrics(settings.model_names[0]))
        self._settings = settings
        self._code = 0
        self._orphaned = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None
        self._patience = 0.0  # seconds that open requests have left to end
        config = settings.server
        self._server = uvicorn.Server(
            uvicorn.Config(
                make_app(self.service),
                http=_http_protocol(),
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=65,
                timeout_graceful_shutdown=int(LAST_WORDS),
                h11_max_incomplete_event_size=64 * 1024,
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
                ssl_keyfile_password=config.ssl_keyfile_password,
            )
        )

    async def run(self, listener: socket.socket) -> int:
        """Serve until told to end; the exit code."""
        self._loop = asyncio.get_running_loop()
        watch_parent(self.hear, die_with_parent=False)  # not earlier: a word that comes before the loop would be lost
        watch = asyncio.create_task(self._watch())
        await self._server.serve(sockets=[listener])
        watch.cancel()
        if self._orphaned:  # nobody else is left to do it
            shutil.rmtree(Path(self._settings.endpoint.removeprefix("ipc://")).parent, ignore_errors=True)
        return self._code

    def hear(self, word: str) -> None:
        """A word of the supervisor, in its thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._obey, word)

    def _obey(self, word: str) -> None:
        if word == DRAIN:
            self.drain()
        else:
            self._orphaned = word == PARENT_GONE
            self._give_up(_ENDS[word])

    def drain(self) -> None:
        """Take no more requests, let the open ones finish, then end. Asked again, end them."""
        self._patience = 0.0 if self._ending else self._settings.server.drain_timeout
        self.service.draining = True
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._drain())

    @property
    def _is_busy(self) -> bool:
        """Whether a request is open, or a client has not read all of its answer."""
        connections = self._server.server_state.connections
        return bool(self.service.num_open) or any(open.transport.get_write_buffer_size() for open in connections)

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while self._is_busy and loop.time() < begin + self._patience:
            await asyncio.sleep(0.05)
        self.service.shut_down()
        self._server.should_exit = True

    def _give_up(self, why: str) -> None:
        """Every stream ends with an error event; then this process ends with a failure."""
        level = logging.INFO if self.service.not_started else logging.ERROR  # a failed start has said why already
        logger.log(level, "%s; this server ends", why)
        self._code = self._code or 1
        self.service.fail(unavailable(f"{why}; the server has to be restarted", "engine_dead"))
        self._server.should_exit = True

    async def _watch(self) -> None:
        """Load the model's front half, say that it is there, and keep an eye on the engine."""
        try:
            await self.service.start()
        except KvikError as error:
            self._give_up(str(error))
            return
        except Exception as error:  # noqa: BLE001  whatever it is, nobody must wait for ever
            logger.exception("the model's tokenizer and template cannot be loaded")
            self._give_up(repr(error))
            return
        ready = self.service.client.ready
        assert ready is not None
        while not self._server.started:
            await asyncio.sleep(0.01)
        facts = {"context": ready.scheduler.max_model_len, "device": ready.device, "ledger": ready.ledger}
        announce(json.dumps({**facts, "dtype": ready.dtype, "num_seqs": ready.scheduler.max_num_seqs}))
        while self.service.client.silence < self._settings.server.engine_timeout:
            await asyncio.sleep(CHECK_INTERVAL)
        self._give_up(f"the engine gave no sign for {self.service.client.silence:.0f} s")


def _http_protocol() -> Any:
    """httptools' parser where it is installed; uvicorn's other one bounds heads by itself."""
    if importlib.util.find_spec("httptools") is None:
        return "h11"
    from kvik.server.http_protocol import BoundedProtocol

    return BoundedProtocol


def main() -> int:
    """Run the process and return its exit code."""
    settings = read_settings()
    configure(settings.log_level)
    logging.getLogger("uvicorn").handlers[:] = logger.handlers
    listener = socket.socket(fileno=settings.socket_fd)
    try:
        process = HttpProcess(settings)
    except OSError as error:  # a certificate that cannot be read
        sys.stderr.write(f"kvik: error: {error}\n")
        return 2
    if importlib.util.find_spec("uvloop") is not None:
        import uvloop

        return uvloop.run(process.run(listener))
    return asyncio.run(process.run(listener))


if __name__ == "__main__":
    sys.exit(main())
