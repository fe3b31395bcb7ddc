"""What the benchmarks of the server share: a model folder of random weights, and `kvik serve` as a subprocess."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

__all__ = ["LocalServer", "cpu_seconds", "flags", "make_folder"]


def make_folder(config: Mapping[str, Any], folder: Path) -> None:
    """Write config.json and a tokenizer with one word for each id, so that every token is an event of its own."""
    from tokenizers import Tokenizer, decoders, models

    (folder / "config.json").write_text(json.dumps(config))
    words = {f"Ġword{i}": i for i in range(config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, "Ġword0"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def flags(options: Mapping[str, Any]) -> list[str]:
    """Engine options as flags of `kvik serve`."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


class LocalServer:
    """`kvik serve` on a free port. `processes` are its engine and HTTP processes by name."""

    def __init__(self, model: str, arguments: Sequence[str], log: Path) -> None:
        self._log = log
        begin = time.perf_counter()
        command = [sys.executable, "-m", "kvik.cli.main", "serve", model, "--port=0", *arguments]
        with log.open("w") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while not (found := re.search(r"serving on http://([\d.]+):(\d+)", log.read_text())):
            self._check_alive()
            time.sleep(0.1)
        self.address = found[1], int(found[2])
        self.url = f"http://{found[1]}:{found[2]}"
        while not self._is_ready():
            self._check_alive()
            time.sleep(0.1)
        self.start_seconds = time.perf_counter() - begin
        self.processes = self._children()

    def _children(self) -> dict[str, psutil.Process]:
        children = psutil.Process(self._process.pid).children()
        engine = next(child for child in children if "kvik.server.engine_process" in child.cmdline())
        https = [child for child in children if child is not engine]
        names = ["http"] if len(https) == 1 else [f"http {i}" for i in range(len(https))]
        return {"engine": engine, **dict(zip(names, https, strict=True))}

    def _check_alive(self) -> None:
        if self._process.poll() is not None:
            raise RuntimeError(f"kvik serve ended with code {self._process.returncode}:\n{self._log.read_text()}")

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=10) as answer:
                return int(answer.status) == 200
        except OSError:
            return False

    def close(self) -> None:
        """Ask it to end, and wait."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def cpu_seconds(processes: Mapping[str, psutil.Process]) -> dict[str, float]:
    """Processor seconds of each process so far."""
    return {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
