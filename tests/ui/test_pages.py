"""What can be said of the pages without a browser: complete, self-contained, served without a key, safe with text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server's dependencies are not installed")

from fastapi.testclient import TestClient

from kvik.config import EngineConfig
from kvik.server.app import PAGES, make_app
from kvik.server.metrics import Metrics
from kvik.server.process import ChildSettings
from kvik.server.service import Service
from kvik.server_config import ServerConfig

FILES = sorted(path for path in PAGES.iterdir() if path.is_file())
HTML = [path for path in FILES if path.suffix == ".html"]
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


@pytest.fixture(scope="module")
def client() -> TestClient:
    """The served application of a server with a key; the client has none."""
    settings = ChildSettings("", EngineConfig("x"), ServerConfig(), ("tiny",), {}, "error", ("secret",))
    return TestClient(make_app(Service(settings, Metrics("tiny"))), raise_server_exceptions=False)


@pytest.mark.parametrize(("path", "title"), [("/", "Kvik chat"), ("/inspector", "Kvik inspector")])
def test_pages_need_no_key(client: TestClient, path: str, title: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200 and f"<title>{title}</title>" in answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix in TYPES], ids=lambda path: path.name)
def test_assets_need_no_key(client: TestClient, path: Path) -> None:
    answer = client.get(f"/ui/{path.name}")
    assert answer.status_code == 200 and answer.content == path.read_bytes()
    assert answer.headers["content-type"].split(";")[0].replace("application/java", "text/java") == TYPES[path.suffix]
    assert client.post(f"/ui/{path.name}").status_code == 405


@pytest.mark.parametrize(
    "path", ["/ui/", "/ui", "/ui/index.html", "/ui/../app.py", "/ui/%2e%2e/config.py", "/ui/none.js", "/v1/models"]
)
def test_nothing_else_is_open(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 401


@pytest.mark.parametrize("page", HTML, ids=lambda path: path.name)
def test_pages_are_complete(page: Path) -> None:
    text = page.read_text()
    named = re.findall(r'(?:src|href)="ui/([^"]+)"', text)
    assert named and all((PAGES / name).is_file() for name in named)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    script = (PAGES / re.findall(r'src="ui/([^"]+)"', text)[0]).read_text()
    assert set(re.findall(r'byId\("([^"]+)"\)', script)) <= set(ids)
    for name in re.findall(r'(?:for|aria-controls|aria-labelledby)="([^"]+)"', text):
        assert name in ids
    assert 'lang="en"' in text and 'name="viewport"' in text


@pytest.mark.parametrize("page", HTML, ids=lambda path: path.name)
def test_pages_run_under_a_strict_policy(page: Path) -> None:
    text = page.read_text()
    policy = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert policy and "default-src 'none'" in policy[0] and "unsafe" not in policy[0]
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", text)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_put_text_in_as_text(script: Path) -> None:
    text = script.read_text()
    for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "srcdoc"):
        assert name not in text, name
    for name in re.findall(r'from "\./([^"]+)"', text):
        assert (PAGES / name).is_file()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere(path: Path) -> None:
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://[\w.]|[\"'(]//\w|@import|url\(", text)


def test_every_file_is_of_a_kind_that_is_served_and_packaged() -> None:
    assert {path.suffix for path in FILES} <= {".html", *TYPES}
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"ui/**"' in project
