"""An HTTP process whose model says what a test tells it: everything but the model and the process boundary is real."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import uvicorn
from server_harness import engine_thread
from tiny_models import EOS_ID, make_tiny_tokenizer

from kvik.config import EngineConfig
from kvik.core.plan import Chunk, RowResult
from kvik.distributed.mock import MockExecutor
from kvik.server.app import make_app
from kvik.server.metrics import Metrics
from kvik.server.process import ChildSettings
from kvik.server.service import Service
from kvik.server_config import ServerConfig
from kvik.text.tokenizer import Tokenizer

__all__ = ["Scripted", "scripted_server"]

VOCAB_SIZE = 400


class ScriptedExecutor(MockExecutor):
    """Samples the tokens of `script`, then the end of the sequence."""

    script: tuple[int, ...] = ()

    def _run_chunk(self, chunk: Chunk) -> RowResult:
        if not chunk.sample:
            return RowResult(chunk.row)
        row = self._rows[chunk.row]
        place = len(row.token_ids) - row.init.num_prompt_tokens
        row.token_ids.append(self.script[place] if place < len(self.script) else EOS_ID)
        return RowResult(chunk.row, (row.token_ids[-1],))


@dataclass
class Scripted:
    """A running server. `say` sets what the model answers from now on, and returns how many tokens that is."""

    url: str
    service: Service
    tokenizer: Tokenizer
    executor: ScriptedExecutor

    def say(self, text: str) -> int:
        self.executor.script = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        return len(self.executor.script)


@contextlib.contextmanager
def scripted_server(
    folder: Path, template: str, *, special: tuple[str, ...] = (), **options: Any
) -> Iterator[Scripted]:
    """Serve a model with this chat template and these special tokens until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tiny_tokenizer(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(list(special))
    backend.save(str(folder / "tokenizer.json"))
    executor = ScriptedExecutor(16, VOCAB_SIZE)
    with engine_thread(folder, vocab_size=VOCAB_SIZE, executor=executor, num_blocks=512, max_model_len=2048) as engine:
        config = EngineConfig(str(folder), chat_template=template)
        server_config = ServerConfig(api_processes=1, **options)
        settings = ChildSettings(
            engine.endpoint, config, server_config, ("tiny",), {}, "error", options.get("api_key", ())
        )
        with socket.create_server(("127.0.0.1", 0)) as listener, _http_thread(settings, listener) as service:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            yield Scripted(url, service, service.frontend.tokenizer, executor)


@contextlib.contextmanager
def _http_thread(settings: ChildSettings, listener: socket.socket) -> Iterator[Service]:
    service = Service(settings, Metrics("tiny"))
    server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="error", timeout_graceful_shutdown=2))
    started = threading.Event()

    async def run() -> None:
        await service.start()
        started.set()
        await server.serve(sockets=[listener])
        await service.client.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    try:
        assert started.wait(30)
        yield service
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
