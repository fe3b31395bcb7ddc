"""Commands in processes of their own: with pipes, or on a terminal that a test types on."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from typing import Any

__all__ = ["KVIK", "Result", "Terminal", "start"]

KVIK = (sys.executable, "-m", "kvik.cli.main")
PATIENCE = 60.0


@dataclass(frozen=True)
class Result:
    """What a command gave back."""

    code: int
    out: str
    err: str


def _accept_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*argv: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start a command that Ctrl-C can reach, even if this process ignores it."""
    return subprocess.Popen([*KVIK, *argv], preexec_fn=_accept_interrupts, **options)


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *argv: str) -> None:
        self._master, slave = pty.openpty()

        def own_terminal() -> None:
            _accept_interrupts()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        environ = {**os.environ, "TERM": "dumb"}
        self.process = subprocess.Popen(
            [*KVIK, *argv], stdin=slave, stdout=slave, stderr=slave, env=environ, start_new_session=True,
            preexec_fn=own_terminal,
        )  # fmt: skip
        os.close(slave)
        self.screen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, text: str, again: str = "") -> str:
        """Wait until `text` appears, and take the screen up to there. `again` is typed anew while nothing comes.

        Readline looks for Ctrl-C only while it waits for a key, and does not see one that came just before.
        """
        end = time.monotonic() + PATIENCE
        while text not in self.screen:
            ready, _, _ = select.select([self._master], [], [], 2.0)
            assert time.monotonic() < end, f"{text!r} did not come; there is {self.screen[-2000:]!r}"
            if ready:
                self._read()
            else:
                self.type(again)
        taken, _, self.screen = self.screen.partition(text)
        return taken + text

    def expect_more(self, count: int) -> None:
        """Wait until `count` characters have come."""
        while len(self.screen) < count:
            self._read()

    def _read(self) -> None:
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the command has ended
            data = b""
        assert data, f"the command has ended; there is {self.screen[-2000:]!r}"
        self.screen += data.decode(errors="replace")

    def wait(self) -> int:
        """The exit code. What is still printed is read, so that the command is not held up."""
        while select.select([self._master], [], [], PATIENCE)[0]:
            try:
                if not os.read(self._master, 65536):
                    break
            except OSError:
                break
        code = self.process.wait(PATIENCE)
        os.close(self._master)
        return code
