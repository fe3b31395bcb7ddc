"""A demo server for the browser, and the browser, where this machine has one."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from ui_server import serve

CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Opens a fresh browser: `chromium(width=390, theme="dark")` is its page."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on this machine")
    with api.sync_playwright() as playwright, contextlib.ExitStack() as stack:

        def open_page(width: int = 1280, theme: str = "dark") -> Any:
            context = playwright.chromium.launch_persistent_context(
                tmp_path_factory.mktemp("browser"),
                executable_path=path,
                headless=True,
                args=list(CHROMIUM_FLAGS),
                viewport={"width": width, "height": 850},
                color_scheme=theme,
            )
            stack.callback(context.close)
            page = context.pages[0]
            page.set_default_timeout(30_000)
            page.complaints = []
            page.on("pageerror", lambda error: page.complaints.append(str(error)))
            return page

        yield open_page


@pytest.fixture(scope="session")
def url(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(tmp_path_factory.mktemp("logs") / "open.log") as address:
        yield address
