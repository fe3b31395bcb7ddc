"""`kvik batch`: results, wrong lines, resuming after a kill at any point, and what the summary says."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_harness import KVIK, PATIENCE, Result, start

from kvik.config import EngineConfig
from kvik.startup import fingerprint, inspect_model

Kvik = Callable[..., Result]


def line(custom_id: object, url: str = "/v1/completions", **body: Any) -> str:
    body = {"prompt": "Once upon", "max_tokens": 4, "temperature": 0, "ignore_eos": True, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def lasting(path: Path) -> list[str]:
    """The results without ids and times, in a comparable order."""
    found = []
    for result in results(path):
        body = {name: value for name, value in result["response"]["body"].items() if name not in ("id", "created")}
        found.append(json.dumps([result["custom_id"], result["response"]["status_code"], body], sort_keys=True))
    return sorted(found)


def test_results_are_as_openai_has_them(kvik: Kvik, model: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chat = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions"}
    chat["body"] = {"model": "gpt-9", "messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 3}  # type: ignore[assignment]
    source.write_text("\n".join([line("a"), "", line("b", prompt=["The", [5, 6]], n=2), json.dumps(chat)]))
    result = kvik("batch", model, source, target)
    assert result.code == 0 and result.out == ""
    assert "3 done, 0 failed" in result.err and "gpt-9 (1)" in result.err
    found = {entry["custom_id"]: entry for entry in results(target)}
    assert set(found) == {"a", "b", "c"}
    for entry in found.values():
        assert entry["id"].startswith("batch_req_") and entry["error"] is None
        assert entry["response"]["status_code"] == 200 and entry["response"]["request_id"]
    body = found["b"]["response"]["body"]
    assert body["object"] == "text_completion" and [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["choices"][0]["text"] == body["choices"][1]["text"] != body["choices"][2]["text"]
    assert body["usage"]["completion_tokens"] == 16
    config = EngineConfig(model)
    assert body["system_fingerprint"] == fingerprint(config, inspect_model(config))
    body = found["c"]["response"]["body"]
    assert body["object"] == "chat.completion" and body["choices"][0]["message"]["role"] == "assistant"
    assert body["usage"]["completion_tokens"] <= 3


def test_wrong_lines_harm_no_other(kvik: Kvik, model: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    wrong = {
        "not json": "not valid JSON",
        "[1]": "holds a list",
        "\ufffd{": "not valid JSON",
        '{"custom_id": "u", "methd": "POST"}': "did you mean 'method'?",
        '{"custom_id": 5}': "custom_id must be",
        line("url", url="/v1/embeddings"): "url must be",
        line("urls", url=["/v1/completions"]): "url must be",
        line(
            "kwargs",
            "/v1/chat/completions",
            prompt=None,
            messages=[{"role": "user", "content": "x"}],
            reasoning_effort="low",
            chat_template_kwargs=5,
        ): "chat_template_kwargs must be",
        line("unknown", max_token=5): "did you mean 'max_tokens'?",
        line("tools", tools=[{"type": "function"}]): "tools is not supported",
        line("chat tools", "/v1/chat/completions", prompt=None, messages=[], tools=[{}]): "tools[0] must be",
        line("stream", stream=True): "stream must be false",
        line("long", prompt="x " * 600): "512",
        line("range", temperature=3): "temperature must be",
        line("list", prompt=["fine", [99999]]): "99999",
        line("good"): "is that of an earlier line",
    }
    source.write_text("\n".join([line("good"), *wrong, line("last")]) + "\n")
    result = kvik("batch", model, source, target)
    assert result.code == 0 and f"2 done, {len(wrong)} failed" in result.err
    errors = {}
    for entry in results(target):
        if entry["response"]["status_code"] == 400:
            error = entry["response"]["body"]["error"]
            errors[error["line"]] = error["message"]
    assert len(errors) == len(wrong)
    for number, (text, message) in enumerate(wrong.items(), 2):
        assert message in errors[number], text
    before = lasting(target)
    again = kvik("batch", model, source, target, "--fail-on-error")
    assert again.code == 1 and "0 done, 0 failed, 18 skipped" in again.err
    assert lasting(target) == before


def test_no_part_of_the_server_is_needed(model: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a"))
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('fastapi', 'starlette', 'zmq', 'uvicorn', 'llguidance')))\n"
        f"from kvik.cli.main import main; sys.exit(main({['batch', model, str(source), str(target)]!r}))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE).returncode == 0
    assert [entry["response"]["status_code"] for entry in results(target)] == [200]


def test_resuming_after_a_kill_gives_the_same_results(kvik: Kvik, model: str, tmp_path: Path) -> None:
    lines = [line(f"r{i}", prompt=f"Number {i}", max_tokens=4 + i % 5) for i in range(24)]
    lines[5], lines[20] = "broken", lines[2]
    source, whole, cut = tmp_path / "in.jsonl", tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    source.write_text("\n".join(lines) + "\n")
    assert kvik("batch", model, source, whole, "--max-num-seqs", 2).code == 0
    # The process reads from a pipe that stays open, so that it is certainly killed before it is done.
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    process = start(
        "batch", model, str(pipe), str(cut), "--max-num-seqs", "2", "--threads", "1", stderr=subprocess.DEVNULL
    )
    with pipe.open("w") as writer:
        writer.write("\n".join(lines[:12]) + "\n")
        writer.flush()
        end = time.monotonic() + PATIENCE
        while not cut.exists() or cut.read_bytes().count(b"\n") < 8:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
    with cut.open("ab") as file:
        file.write(cut.read_bytes().splitlines()[0][:100])
    result = kvik("batch", "--model", model, source, cut, "--max-num-seqs", 2)
    assert result.code == 0 and "skipped (already in" in result.err
    assert lasting(cut) == lasting(whole)


def test_a_refused_line_runs_once_it_is_right(kvik: Kvik, model: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(f"{line('a')}\n{line('b', max_tokns=2)}\n{line('c', max_tokns=2)}\n")
    assert "1 done, 2 failed" in kvik("batch", model, source, target).err
    source.write_text(f"{line('a')}\n{line('b')}\n{line('c', max_tokns=2)}\n")
    assert "1 done, 0 failed, 2 skipped" in kvik("batch", model, source, target).err
    assert [(entry["custom_id"], entry["response"]["status_code"]) for entry in results(target)] == [
        ("b", 400), ("c", 400), ("a", 200), ("b", 200),
    ]  # fmt: skip


def test_two_runs_do_not_write_one_file(kvik: Kvik, model: str, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="this system has no such locks")
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a") + "\n")
    with target.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused = kvik("batch", model, source, target)
    assert refused.code == 2 and "another run is writing" in refused.err and target.read_bytes() == b""
    assert kvik("batch", model, source, target).code == 0


def test_other_files_are_not_touched(kvik: Kvik, model: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "notes.txt"
    source.write_text(line("a"))
    for text in ("my notes, no newline", "my notes\n", '{"id": "batch_req_1"}\n'):
        target.write_text(text)
        result = kvik("batch", model, source, target)
        assert result.code == 2 and "is not a batch result" in result.err
        assert target.read_text() == text
    result = kvik("batch", model, source, source)
    assert result.code == 2 and "both" in result.err


def test_a_torn_first_line_is_cut(kvik: Kvik, model: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a"))
    for torn in ('{"id": "ba', '{"id": "batch_req_12", "custom_id": "a", "resp'):
        target.write_text(torn)
        assert kvik("batch", model, source, target).code == 0
        assert [entry["custom_id"] for entry in results(target)] == ["a"]


def test_defaults_of_the_command_line_yield_to_the_body(kvik: Kvik, model: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    plain = {"custom_id": "p", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "ignore_eos": True}}
    source.write_text(line("a", max_tokens=2) + "\n" + json.dumps(plain))
    kvik("batch", model, source, target, "--max-tokens", 7)
    counts = {entry["custom_id"]: entry["response"]["body"]["usage"]["completion_tokens"] for entry in results(target)}
    assert counts == {"a": 2, "p": 7}
    target.unlink()
    kvik("batch", model, source, target, "--max-tokens", 2, "--logprobs", 1)
    choices = {entry["custom_id"]: entry["response"]["body"]["choices"][0] for entry in results(target)}
    assert [len(choices[name]["logprobs"]["tokens"]) for name in "ap"] == [2, 2]
    for flags in (["--echo"], ["--prompt-logprobs", 1]):
        refused = kvik("batch", model, source, tmp_path / "new.jsonl", *flags)
        assert refused.code == 2 and "is no default for requests" in refused.err


def test_a_full_disk_ends_the_run(model: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(line(f"r{i}") for i in range(8)))

    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    argv = [*KVIK, "batch", model, str(source), str(target)]
    process = subprocess.run(argv, stderr=subprocess.PIPE, text=True, timeout=PATIENCE, preexec_fn=no_room)
    assert process.returncode == 1 and process.stderr.endswith("kvik: error: [Errno 27] File too large\n")
    result = subprocess.run(argv, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert result.returncode == 0 and len(results(target)) == 8


def test_results_must_be_a_regular_file(kvik: Kvik, model: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(line("a"))
    result = kvik("batch", model, tmp_path / "in.jsonl", "/dev/null")
    assert result.code == 2 and "not a regular file" in result.err
