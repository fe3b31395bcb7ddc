"""The engine process: `python -m kvik.server.engine_process`, started by the supervisor.

It loads the model and serves its engine until the supervisor closes its standard input. Exit codes: 0 asked to end,
2 could not start, 1 the engine failed, 3 did not end in time when asked to.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time

from kvik.errors import KvikError
from kvik.log import configure
from kvik.server.engine_server import EngineServer
from kvik.server.messages import Ready
from kvik.server.process import ChildSettings, read_settings, watch_parent
from kvik.startup import StartupLedger, build_engine, fingerprint, inspect_model
from kvik.structured.grammars import Grammars
from kvik.text.tokenizer import load_tokenizer

__all__ = ["main", "start"]

GRACE = 5.0
"""Seconds that the step in progress gets to finish when the supervisor is gone."""


def start(settings: ChildSettings) -> EngineServer:
    """Load the model and bind the endpoint. Raises the errors of a start."""
    ledger = StartupLedger({"imports": time.time() - settings.made_at})
    with ledger.phase("config"):
        info = inspect_model(settings.engine)
        identity = fingerprint(settings.engine, info)
    name, dummy = settings.engine.tokenizer, settings.engine.load_format == "dummy"
    grammars = Grammars(lambda: load_tokenizer(info.path, name, dummy=dummy).byte_table(info.spec.vocab_size))
    engine = build_engine(settings.engine, info, ledger, grammars, prepare=True)
    if info.resolved.graphs:
        with ledger.phase("graphs"):
            while engine.get_ready():  # a server may meet its full load at once
                pass
    ready = Ready(
        scheduler=info.resolved.scheduler,
        vocab_size=info.spec.vocab_size,
        hidden_size=info.spec.hidden_size,
        rope_depends_on_length=info.spec.rope.depends_on_length,
        dtype=str(info.resolved.dtype).removeprefix("torch."),
        device=info.resolved.memory.device_name,
        ledger=ledger.render(),
        memory=info.resolved.memory.render(),
        fingerprint=identity,
    )
    gc.collect()
    gc.freeze()  # what a start leaves stays: a collection that walks it takes 0.1 s, and holds up every request
    return EngineServer(engine, settings.endpoint, ready, grammars)


def main() -> int:
    """Run the process and return its exit code."""
    settings = read_settings()
    configure(settings.log_level)
    server: EngineServer | None = None

    def end(word: str) -> None:
        if server is None:
            os._exit(0)
        server.stop()
        threading.Event().wait(GRACE)
        os._exit(3)

    watch_parent(end, die_with_parent=True)
    try:
        server = start(settings)
    except KvikError as error:
        sys.stderr.write(f"kvik: error: {error}\n")
        return 2
    server.run()
    server.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
