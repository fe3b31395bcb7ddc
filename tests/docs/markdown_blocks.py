"""Fenced code blocks of the documentation, and how the tests run them.

A section is everything under one `##` heading: its blocks share a namespace and a folder. Python blocks run, and so do
shell blocks with a `kvik` or `curl` command in them, unless the fence says `no-run reason="..."`. A `text output` block
right after a block is what that block prints. `kvik serve` starts a server on a free port, which the later blocks of
the section reach where they say 127.0.0.1:8000, and which ends with the section.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from kvik.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_SHELL = ("sh", "bash", "console")
_DEFAULT_ADDRESS = "127.0.0.1:8000"
_SERVER_TIMEOUT = 120.0
_CAPTURED: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60}
_ASSIGNMENT = re.compile(r"([A-Z_][A-Z0-9_]*)=(\S*)\s+")


@dataclass(slots=True)
class Block:
    """One fenced block: where it begins, the words after the fence, its lines, and the output that is claimed."""

    page: Path
    line: int
    language: str
    info: str
    code: str
    output: str | None = None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def skipped(self) -> bool:
        return "no-run" in self.info

    @property
    def reason(self) -> str:
        """Why a `no-run` block is not run; "" where it does not say."""
        found = re.search(r'reason="([^"]+)"', self.info)
        return found[1] if found else ""

    @property
    def runs(self) -> bool:
        if self.skipped:
            return False
        pattern = r"(^|\| )([A-Z_]+=\S* )*kvik |^curl "
        commands = [command for command in _commands(self.code) if re.search(pattern, command)]
        return self.language == "python" or (self.language in _SHELL and bool(commands))


@dataclass(slots=True)
class Section:
    """The blocks under one heading of a page."""

    page: Path
    title: str
    blocks: list[Block] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.title}".replace(" ", "-")


def sections(page: Path) -> Iterator[Section]:
    """The sections of a page that have a block which runs."""
    section = Section(page, "")
    for number, lines in _fences(page.read_text(encoding="utf-8").splitlines()):
        if number == 0:
            yield section
            section = Section(page, lines[0].removeprefix("## "))
            continue
        language, _, info = lines[0].strip().removeprefix("```").partition(" ")
        code = "\n".join(lines[1:]) + "\n"
        if (language, info) == ("text", "output"):
            section.blocks[-1].output = code
        else:
            section.blocks.append(Block(page, number, language, info, code))
    yield section


def _fences(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """(line number, lines of a fence without its end), and (0, [heading]) for every `##` heading between them."""
    open_at, found = 0, list[str]()
    for number, line in enumerate(lines, 1):
        if open_at and line.strip() == "```":
            yield open_at, found
            open_at, found = 0, []
        elif open_at:
            found.append(line)
        elif line.startswith("```"):
            open_at, found = number, [line]
        elif line.startswith("## "):
            yield 0, [line]
    assert not open_at, f"the block that begins in line {open_at} is never closed"


def run_section(section: Section) -> None:
    """Run the blocks of a section in the current folder. Raises AssertionError that names the block."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    servers: list[Server] = []
    try:
        for block in section.blocks:
            if block.runs:
                printed = _run(block, namespace, servers)
                assert block.output is None or printed == block.output, f"{block.place} printed\n{printed}"
    finally:
        _close_engines(namespace)
        for server in servers:
            server.close()


class Server:
    """A `kvik serve` in a process of its own, on a free port."""

    def __init__(self, words: list[str]) -> None:
        self._log = Path("server.log")
        with self._log.open("w") as log:
            command = [sys.executable, "-m", "kvik", *words, "--port", "0"]
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        end = time.monotonic() + _SERVER_TIMEOUT
        while not (found := re.search(r"serving on http://(\S+)", self._log.read_text())):
            alive = self._process.poll() is None and time.monotonic() < end
            if not alive:
                self.close()
            assert alive, f"the server did not start:\n{self._log.read_text()}"
            time.sleep(0.1)
        self.address = found[1]

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _close_engines(namespace: dict[str, Any]) -> None:
    for value in list(namespace.values()):
        if type(value).__module__.startswith("kvik.") and hasattr(value, "close"):
            value.close()


def _run(block: Block, namespace: dict[str, Any], servers: list[Server]) -> str:
    """Run one block and return what it printed on standard output."""
    out = io.StringIO()
    code = block.code.replace(_DEFAULT_ADDRESS, servers[-1].address) if servers else block.code
    with contextlib.redirect_stdout(out):
        if block.language == "python":
            source = "\n" * block.line + code  # so that tracebacks show the line of the page
            exec(compile(source, str(block.page), "exec"), namespace)
        else:
            for command in _commands(code):
                if command.startswith("kvik serve "):
                    servers.append(Server(shlex.split(command, comments=True)[1:]))
                else:
                    _run_command(command, block.place)
    return out.getvalue()


def _commands(code: str) -> list[str]:
    """The commands of a shell block, without comments; a line that ends in a backslash goes on, a here-document too."""
    joined = code.replace("\\\n", " ")
    commands: list[str] = []
    lines = iter(joined.splitlines())
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        document = re.search(r"<<'(\w+)'", line)
        while document and not line.endswith(f"\n{document[1]}"):
            line += f"\n{next(lines)}"
        commands.append(re.sub(r"\s+", " ", line).strip() if document is None else line)
    return commands


def _run_command(command: str, place: str) -> None:
    """Run a shell command; a `kvik` in it runs in this process, which has imported everything already.

    Understands `VARIABLE=value kvik ...`, `producer | kvik ...`, `kvik ... > file` and comments at the end of a line.
    """
    producer, pipe, consumer = command.rpartition(" | ")
    if consumer.startswith("curl "):
        done = subprocess.run(["bash", "-ec", command.replace("curl ", "curl -sS --fail-with-body ", 1)], **_CAPTURED)
        print(done.stdout)
        assert done.returncode == 0, f"{place}: {done.stdout}{done.stderr}"
        return
    if not re.match(r"([A-Z_]+=\S* )*kvik ", consumer):
        subprocess.run(["bash", "-ec", command], check=True)
        return
    text = subprocess.run(["bash", "-ec", producer], check=True, capture_output=True, text=True).stdout if pipe else ""
    variables: dict[str, str] = {}
    while found := _ASSIGNMENT.match(consumer):
        variables[found[1]] = found[2]
        consumer = consumer[found.end() :]
    words = shlex.split(consumer, comments=True)[1:]
    target = Path(words[words.index(">") + 1]) if ">" in words else None
    words = words[: words.index(">")] if target else words
    out = io.StringIO()
    stdin = mock.patch("sys.stdin", io.StringIO(text))
    with mock.patch.dict(os.environ, variables), stdin, contextlib.redirect_stdout(out):
        code = main(words)
    if target:
        target.write_text(out.getvalue(), encoding="utf-8")
    else:
        print(out.getvalue(), end="")
    assert code == 0, f"{place}: `{command}` ended with exit code {code}"
