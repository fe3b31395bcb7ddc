"""docs/serving.md names every option, field and metric that there is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import httpx

from kvik.server.protocol import IGNORED, REFUSED
from kvik.server_config import ServerConfig

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_every_option_is_documented() -> None:
    for field in dataclasses.fields(ServerConfig):
        assert f"| `{field.name}` |" in PAGE and field.metadata["help"] in PAGE


def test_every_special_field_is_documented() -> None:
    assert [name for name in (*IGNORED, *REFUSED) if f"`{name}`" not in PAGE] == []


def test_every_metric_is_documented(http: httpx.Client) -> None:
    assert http.post("/generate", json={"prompt": "x", "max_tokens": 2}).status_code == 200
    lines = [line.split() for line in http.get("/metrics").text.splitlines() if line.startswith("# TYPE")]
    names = [f"{name}" for _, _, name, _ in lines if not name.endswith("_created")]
    assert len(names) > 12 and [name for name in names if f"`{name}`" not in PAGE] == []


def test_every_path_is_documented(http: httpx.Client) -> None:
    paths = [path.replace("{name}", "{id}") for path in http.get("/openapi.json").json()["paths"]]
    assert [path for path in paths if f"{path}" not in PAGE] == []


def test_the_page_of_the_api_needs_nothing_from_elsewhere(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text and "https://" not in page.text
