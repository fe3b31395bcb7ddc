"""The terminal: colours where they are wanted, Ctrl-C as a flag, and text that cannot harm the screen."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import TextIO

__all__ = ["Interrupt", "Terminal"]

_CONTROLS: Mapping[int, str] = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **dict.fromkeys(range(128, 160), "�"),
}


class Terminal:
    """Writes a model's text to standard output, and what Kvik itself says beside it.

    Remarks are dim on the same terminal; they go to standard error where standard output is not a terminal.
    """

    def __init__(self) -> None:
        self.is_tty = sys.stdout.isatty()
        self._colours = self.is_tty and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

    def write(self, text: str) -> None:
        """A model's text, at once; on a terminal with control characters made visible."""
        if text:
            sys.stdout.write(text.translate(_CONTROLS) if self.is_tty else text)
            sys.stdout.flush()

    def remark(self, text: str) -> None:
        """A line of Kvik's own."""
        stream: TextIO = sys.stdout if self.is_tty else sys.stderr
        print(self.dim(text), file=stream, flush=True)

    def dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if self._colours else text

    def bold(self, text: str) -> str:
        return f"\x1b[1m{text}\x1b[0m" if self._colours else text

    def prompt(self, text: str) -> str:
        """A prompt for `input`: the marks tell readline that colours take no room."""
        return f"\x01\x1b[1;36m\x02{text}\x01\x1b[0m\x02" if self._colours else text


class Interrupt:
    """Ctrl-C as a flag while the body runs, so that nothing stops in the middle of a step; the second one raises.

    Outside the main thread, and in a process that ignores SIGINT (started with nohup, say), it changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: object = None

    def __enter__(self) -> Interrupt:
        self.requested = False
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if callable(self._previous) or isinstance(self._previous, signal.Handlers):
            signal.signal(signal.SIGINT, self._previous)
        self._previous = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
