"""Every example of the documentation is run, on the demo model."""

from __future__ import annotations

from pathlib import Path

import pytest
from markdown_blocks import PAGES, ROOT, Section, run_section, sections

from kvik.kernels.cpu import native
from kvik.log import logger
from kvik.runtime.platform import CpuPlatform

ALL = [section for page in PAGES if page.exists() for section in sections(page)]
TRANSLATION = ROOT / "README.zh-CN.md"  # has the blocks of README.md, as tests/style checks
RUNNING = [section for section in ALL if section.page != TRANSLATION and any(block.runs for block in section.blocks)]


@pytest.mark.parametrize("section", RUNNING, ids=lambda section: section.name)
def test_examples_run(section: Section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CpuPlatform, "num_cores", 1)  # threads that wait for each other are slow on a busy machine
    monkeypatch.setattr(native, "usable_cores", lambda: [0])
    monkeypatch.setenv("KVIK_THREADS", "1")
    monkeypatch.setattr(logger, "handlers", list(logger.handlers))
    monkeypatch.setattr(logger, "level", logger.level)
    run_section(section)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_that_do_not_run_say_why(page: Path) -> None:
    silent = [block.place for s in sections(page) for block in s.blocks if block.skipped and not block.reason]
    assert not silent


def test_the_guides_have_examples() -> None:
    counts = {page.name: sum(b.runs for s in ALL if s.page == page for b in s.blocks) for page in PAGES}
    assert counts["coming-from.md"] >= 20 and counts["tour.md"] >= 10 and counts["README.md"] >= 8
