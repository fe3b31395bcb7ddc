"""What the supervisor and its children tell each other: settings and words down stdin, one line up stdout.

The first line on stdin is a `ChildSettings` as JSON. Later lines are words: "drain" asks for a graceful end, "engine"
says that the engine process ended, "http" that another HTTP process did. The end of the pipe means that the supervisor
is gone, however it went: a child then ends as well. On Linux the kernel also kills the engine process when its parent
dies, should it hang in native code.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from io import FileIO
from typing import Any

import msgspec

from kvik.config import EngineConfig
from kvik.server_config import ServerConfig

__all__ = [
    "DRAIN", "ENGINE_ENDED", "HTTP_ENDED", "PARENT_GONE", "ChildSettings", "announce", "read_settings", "watch_parent",
]  # fmt: skip

DRAIN = "drain"
ENGINE_ENDED = "engine"
HTTP_ENDED = "http"
PARENT_GONE = "parent"
_PR_SET_PDEATHSIG = 1
_STDIN = 0


class ChildSettings(msgspec.Struct, frozen=True):
    """What a child process has to know. `engine.model` is a local folder, `endpoint` that of ipc."""

    endpoint: str
    engine: EngineConfig
    server: ServerConfig
    model_names: tuple[str, ...]
    overrides: dict[str, Any]
    log_level: str
    api_keys: tuple[str, ...] = ()
    socket_fd: int = -1
    index: int = 0
    made_at: float = msgspec.field(default_factory=time.time)  # which is when its children are started


def read_settings() -> ChildSettings:
    """The settings of this child process, from its standard input."""
    return msgspec.json.decode(_stdin().readline(), type=ChildSettings)


def _stdin() -> FileIO:
    """Standard input without a buffer, whose lock a thread that waits for a word would hold at the end."""
    return FileIO(_STDIN, closefd=False)


def watch_parent(on_word: Callable[[str], None], *, die_with_parent: bool) -> None:
    """Call `on_word`, in a thread, for every word of the supervisor, PARENT_GONE being the last."""
    if die_with_parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        for line in _stdin():
            on_word(line.decode().strip())
        on_word(PARENT_GONE)

    threading.Thread(target=watch, name="kvik-parent", daemon=True).start()


def announce(line: str) -> None:
    """Say to the supervisor that this child is ready."""
    os.write(1, line.replace("\n", " ").encode() + b"\n")
