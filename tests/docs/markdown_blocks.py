"""Fenced code blocks of the documentation, and how the tests run them.

A section is everything under one `##` heading: its blocks share a namespace and a folder. Python blocks run, and so do
shell blocks with a `kvik` command in them, unless the fence says `no-run reason="..."`. A `text output` block right
after a block is what that block prints.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from kvik.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_SHELL = ("sh", "bash", "console")
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
        commands = [command for command in _commands(self.code) if re.search(r"(^|\| )([A-Z_]+=\S* )*kvik ", command)]
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
    try:
        for block in section.blocks:
            if block.runs:
                printed = _run(block, namespace)
                assert block.output is None or printed == block.output, f"{block.place} printed\n{printed}"
    finally:
        _close_engines(namespace)


def _close_engines(namespace: dict[str, Any]) -> None:
    for value in list(namespace.values()):
        if type(value).__module__.startswith("kvik.") and hasattr(value, "close"):
            value.close()


def _run(block: Block, namespace: dict[str, Any]) -> str:
    """Run one block and return what it printed on standard output."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if block.language == "python":
            source = "\n" * block.line + block.code  # so that tracebacks show the line of the page
            exec(compile(source, str(block.page), "exec"), namespace)
        else:
            for command in _commands(block.code):
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
