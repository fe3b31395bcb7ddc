"""A demo server for the browser."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["serve"]


@contextlib.contextmanager
def serve(log: Path, *flags: str) -> Iterator[str]:
    """The address of `kvik serve demo` on a free port."""
    command = [sys.executable, "-m", "kvik.cli.main", "serve", "demo", "--port", "0", "--threads", "1", *flags]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KVIK_")}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environ)
    try:
        end = time.monotonic() + 90
        while not (found := re.search(r"serving on (\S+)", log.read_text())):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield found[1]
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
