"""`kvik batch` gives what the server gives for the same request."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_templates import TEMPLATES
from server_harness import Served, serve
from test_tools import TOOLS, USER

pytest.importorskip("llguidance", reason="llguidance is not installed")

NOW = {"type": "function", "function": {"name": "now"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer", "maximum": 99}}}
ALL: dict[str, Any] = {
    "messages": USER, "max_tokens": 6, "temperature": 0, "chat_template_kwargs": {"enable_thinking": False}
}  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "plain": {"user": "me", "seed": 3, "temperature": 1, "n": 2},
    "free": {"tools": TOOLS, "logprobs": True},
    "strict": {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
    "hidden": {"tools": TOOLS, "tool_choice": "none"},
    "required": {"tools": [NOW], "tool_choice": "required", "max_tokens": 90, "parallel_tool_calls": False},
    "named": {"tools": [TOOLS[0], NOW], "tool_choice": NOW, "max_tokens": 90},
    "cut": {"tools": [NOW], "tool_choice": NOW, "max_tokens": 18},
    "schema": {"response_format": SCHEMA, "max_tokens": 30, "return_token_ids": True},
    "thoughts": {"tools": [NOW], "tool_choice": NOW, "chat_template_kwargs": {}, "logit_bias": {"27": 9}},
    "effort": {"reasoning_effort": "low"},
    "no tools": {"tool_choice": "required"},
    "no such": {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
    "both": {"tools": [NOW], "tool_choice": "required", "response_format": SCHEMA},
    "bad schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "x"}}}},
    "bad tool": {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "x"}}}}}],
        "tool_choice": "required",
    },
    "twins": {"tools": [*TOOLS, NOW]},
    "audio": {"modalities": ["audio"]},
    "long": {"messages": [{"role": "user", "content": "x " * 600}]},
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("template") / "qwen.jinja"
    path.write_text(TEMPLATES["qwen"])
    return str(path)


@pytest.fixture(scope="module")
def server(model: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(
        model, tmp_path_factory.mktemp("logs") / "batch.log", "--chat-template", template, "--deterministic"
    ) as found:
        yield found


def lasting(body: dict[str, Any]) -> dict[str, Any]:
    """An answer without what is never the same twice."""
    kept = {name: value for name, value in body.items() if name not in ("id", "created", "model")}
    for choice in kept.get("choices", ()):
        for call in choice["message"].get("tool_calls", ()):
            assert call.pop("id").startswith("call_")
    kept.get("usage", {}).pop("prompt_tokens_details", None)
    for name in ("line", "digest"):
        kept.get("error", {}).pop(name, None)
    return kept


def test_a_batch_answers_as_the_server_does(server: Served, model: str, template: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = {name: {**ALL, **body} for name, body in BODIES.items()}
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
        for name, body in bodies.items()
    ]
    source.write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, "-m", "kvik.cli.main", "batch", model, str(source), str(target)]
    options = ["--chat-template", template, "--threads", "1", "--max-num-seqs", "1", "--deterministic"]
    subprocess.run([*command, *options], check=True, timeout=120)
    found = {entry["custom_id"]: entry["response"] for entry in map(json.loads, target.read_text().splitlines())}
    reasons = {}
    for name, body in bodies.items():
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert found[name]["status_code"] == answer.status_code, (name, found[name], answer.text)
        assert lasting(found[name]["body"]) == lasting(answer.json()), name
        reasons[name] = [choice["finish_reason"] for choice in answer.json().get("choices", ())]
    assert reasons["required"] == reasons["named"] == ["tool_calls"] and reasons["schema"] == ["stop"]
    wrong = ("no tools", "no such", "both", "bad schema", "bad tool", "twins", "audio", "long")
    assert not any(reasons[name] for name in wrong)


def test_a_batch_has_the_options_of_answers(model: str, template: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"messages": USER, "max_tokens": 6, "tools": TOOLS}
    source.write_text(json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}))
    command = [sys.executable, "-m", "kvik.cli.main", "batch", model, str(source), str(target), "--threads", "1"]
    options = ["--chat-template", template, "--tool-format", "none", "--reasoning-field", "reasoning"]
    subprocess.run([*command, *options], check=True, timeout=120)
    answer = json.loads(target.read_text())["response"]["body"]
    assert "reasoning" in answer["choices"][0]["message"]
    assert any("--tool-format" in warning for warning in answer["warnings"])
