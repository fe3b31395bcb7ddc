"""The generated parts of the documentation are what the code says now."""

from __future__ import annotations

import dataclasses
import importlib.util
from types import ModuleType

from markdown_blocks import ROOT

from kvik.config import EngineConfig
from kvik.sampling_params import SamplingParams
from kvik.server_config import ServerConfig

PAGE = ROOT / "docs" / "configuration.md"


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "tools" / "make_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_configuration_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert _generator().render(page) == page, "run python tools/make_docs.py"


def test_configuration_has_every_option() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for cls in (EngineConfig, SamplingParams, ServerConfig):
        missing = [field.name for field in dataclasses.fields(cls) if f"| `{field.name}` |" not in page]
        assert not missing
