"""`kvik chat`: scripted conversations through a pipe, and Ctrl-C and Ctrl-D on a terminal."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_harness import Result, Terminal

from kvik.cli.conversation import Conversation, Leave, obey
from kvik.errors import KvikError
from kvik.sampling_params import SamplingParams

Chat = Callable[..., Result]


@pytest.fixture
def chat(kvik: Callable[..., Result], model: str, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """Run a chat whose input is the lines given."""

    def run(*lines: str, flags: tuple[object, ...] = (), folder: object = model) -> Result:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return kvik("chat", folder, "--temperature", 0, "--max-tokens", 4, "--ignore-eos", *flags)

    return run


def saved(path: Path) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = json.loads(path.read_text())["messages"]
    return messages


def test_messages_are_answered_and_remembered(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    result = chat("hello", "", "again\\", "and again", f"/save {file}", flags=("--system", "Be brief."))
    assert result.code == 0
    messages = saved(file)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3]["content"] == "again\nand again"
    assert result.out == f"{messages[2]['content']}\n{messages[4]['content']}\n"
    assert result.err.count("4 tokens") == 2 and "max_tokens 4 reached" in result.err


def test_a_conversation_is_saved_in_utf_8(model: str, tmp_path: Path) -> None:
    """Whatever the locale says."""
    file = tmp_path / "chat.json"
    command = [sys.executable, "-m", "kvik.cli.main", "chat", model, "--max-tokens", "1", "--threads", "1"]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    text = f"sch\u00f6n\n/save {file}\n".encode()
    done = subprocess.run(command, input=text, env={**os.environ, **plain}, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_bytes().decode())["messages"][0]["content"] == "sch\u00f6n"


def test_quoted_lines_are_one_message(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    chat('"""', "one", "/two", '"""', '"""three"""', f"/save {file}", "/exit", "unread")
    assert [message["content"] for message in saved(file)][::2] == ["one\n/two", "three"]


def test_the_end_of_the_input_ends_a_message(chat: Chat, tmp_path: Path) -> None:
    for lines in (("one\\",), ('"""one', "two")):
        result = chat(*lines)
        assert result.code == 0 and "4 tokens" in result.err


def test_commands_change_the_conversation(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    lines = ["/system Be kind.", "a", "b", "/undo", "/set max_tokens 2", "/retry", f"/save {file}"]
    result = chat(*lines)
    assert "forgot 'b'" in result.err and "max_tokens = 2" in result.err and "2 tokens" in result.err
    assert [message["content"] for message in saved(file)][:2] == ["Be kind.", "a"]
    assert len(saved(file)) == 3


def test_wrong_commands_are_explained_and_harm_nothing(chat: Chat) -> None:
    result = chat(
        "/rest",
        "/set",
        "/set temprature 1",
        "/set temperature 9",
        "/set n 2",
        "/save /absent/x",
        "/save ~nobody-here/x",
        "/retry",
        "/undo 2",
        "/exit now",
        "hello",
    )
    for text in (
        "/undo takes nothing after it, got '2'", "/exit takes nothing after it, got 'now'",
        "no command /rest (did you mean 'reset'?)", "/set needs a name", "did you mean 'temperature'?", "got 9.0",
        "n must be 1", "cannot write /absent/x", "no message to answer", "4 tokens",
    ):  # fmt: skip
        assert text in result.err
    assert result.code == 0


def test_a_full_context_says_what_to_do(chat: Chat) -> None:
    result = chat("x " * 600, "hello", "/set max_tokens none", "hello")
    assert "/undo or /reset" in result.err.splitlines()[1] and "512" in result.err
    assert "4 tokens" in result.err
    assert "the context of 512 tokens is full" in result.err


def test_a_model_without_template_needs_raw_mode(chat: Chat, model: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "base"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    result = chat("hello", folder=folder)
    assert result.code == 2 and "no chat template" in result.err and "--raw" in result.err
    file = tmp_path / "raw.json"
    result = chat("Once upon", " a time", f"/save {file}", "/system x", folder=folder, flags=("--raw",))
    first, second, _ = result.out.split("\n")
    assert json.loads(file.read_text()) == {"text": f"Once upon{first} a time{second}"}
    assert "no system prompt in raw mode" in result.err


def test_a_conversation_keeps_to_its_rules() -> None:
    conversation = Conversation(SamplingParams())
    assert conversation.undo() is None
    conversation.ask("a")
    conversation.answer("")
    assert conversation.messages == []
    for line in ("/help", "/params", "/reset"):
        assert obey(conversation, line)[0]
    with pytest.raises(Leave):
        obey(conversation, "/exit")
    for line in ("/", "/set logprobs 5", "/set prompt_logprobs 1"):
        with pytest.raises(KvikError):
            obey(conversation, line)
    for line in ("/set stop a=b", "/set stop = a=b", "/set logit_bias 5=100", "/set --min-p=0.5"):
        obey(conversation, line)
        assert conversation.params.stop == ("a=b",)
    assert conversation.params.logit_bias == ((5, 100.0),) and conversation.params.min_p == 0.5


def test_keys_on_a_terminal(long_model: str, tmp_path: Path) -> None:
    argv = ["chat", long_model, "--ignore-eos", "--max-num-seqs", "1", "--threads", "1"]
    terminal = Terminal(*argv)
    terminal.expect("/help for commands")
    terminal.expect("> ")
    terminal.type("hello there\n")
    terminal.expect("hello there\r\n")
    terminal.expect_more(20)
    terminal.type("\x03")
    assert "Traceback" not in terminal.expect("stopped]")
    terminal.expect("> ")
    terminal.type("half a li\x03")
    terminal.expect("> ", again="\x03")
    terminal.type("/set max_tokens 3\n")
    terminal.expect("max_tokens = 3")
    terminal.type("again\n")
    terminal.expect("3 tokens")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.wait() == 0
    history = (tmp_path / "state" / "kvik" / "chat_history").read_text()
    assert "hello there" in history and "again" in history
