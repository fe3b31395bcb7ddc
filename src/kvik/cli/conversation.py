"""The state of a terminal chat and its slash commands, without any reading or printing of answers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from kvik.errors import ConfigError, RequestError, did_you_mean
from kvik.sampling_params import SamplingParams
from kvik.settings import SAMPLING, Setting, Settings

__all__ = ["COMMANDS", "Conversation", "Leave", "check_chat_params", "obey"]

COMMANDS: Mapping[str, str] = {
    "help": "/help                 show this list",
    "reset": "/reset                forget the conversation (the system prompt stays)",
    "system": "/system TEXT          set the system prompt; without TEXT, remove it",
    "undo": "/undo                 forget the last message and its answer",
    "retry": "/retry                answer the last message again",
    "save": "/save FILE            write the messages to a JSON file",
    "set": "/set NAME VALUE       change a sampling option, such as /set temperature 0.7",
    "params": "/params               show the sampling options",
    "exit": "/exit                 leave (Ctrl-D does too)",
}
_WITH_ARGUMENT = ("system", "save", "set")
_NOTES = (
    'Ctrl-C stops an answer. Text between lines of """ may have several lines, as may a line that ends in \\.\n'
    "A line that begins with a space is never a command."
)


class Leave(Exception):
    """The user wants to leave."""


class Conversation:
    """Messages so far and how answers are sampled. In raw mode there are no roles: text is simply continued."""

    def __init__(self, params: SamplingParams, *, system: str | None = None, raw: bool = False) -> None:
        self.params = params
        self.raw = raw
        self.system = system
        self.messages: list[dict[str, str]] = []

    def ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """Add the answer to the last message; one without text takes the message back."""
        if text:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.messages.pop()

    def undo(self) -> str | None:
        """Take back the last message with its answer, and return it."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        return None

    def prompt(self) -> list[dict[str, str]] | str:
        """What the model is given: messages for its chat template, or in raw mode the text so far."""
        if self.raw:
            return "".join(message["content"] for message in self.messages)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.messages]


def check_chat_params(params: SamplingParams) -> None:
    """Raise ConfigError for sampling options that make no sense where there is one answer to one message."""
    if params.n != 1:
        raise ConfigError(f"n must be 1 in a chat, got {params.n}: there is one answer")
    if params.echo:
        raise ConfigError("echo must be false in a chat: the message is on the screen already")
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None:
            raise ConfigError(f"{name} cannot be shown in a chat; kvik generate --json has them")


def obey(conversation: Conversation, line: str) -> tuple[str, str | None]:
    """Run a slash command. Returns what to tell the user, and a message to answer anew, if any.

    Raises Leave for /exit, and KvikError for a command that is unknown or wrong.
    """
    name, _, argument = line[1:].partition(" ")
    if argument.strip() and name in COMMANDS and name not in _WITH_ARGUMENT:
        raise RequestError(f"/{name} takes nothing after it, got {argument.strip()!r}")
    if name == "exit":
        raise Leave
    if name == "retry":
        message = conversation.undo()
        return ("" if message is not None else "there is no message to answer again", message)
    if name not in _ACTIONS:
        raise RequestError(f"there is no command /{name}{did_you_mean(name, COMMANDS)}; /help lists them")
    return _ACTIONS[name](conversation, argument.strip()), None


def _help(conversation: Conversation, argument: str) -> str:
    return "\n".join([*COMMANDS.values(), _NOTES])


def _reset(conversation: Conversation, argument: str) -> str:
    conversation.messages.clear()
    return "the conversation is empty"


def _system(conversation: Conversation, argument: str) -> str:
    if conversation.raw:
        raise RequestError("there is no system prompt in raw mode")
    conversation.system = argument or None
    return "system prompt set" if argument else "system prompt removed"


def _undo(conversation: Conversation, argument: str) -> str:
    message = conversation.undo()
    return "there is nothing to forget" if message is None else f"forgot {message[:60]!r} and its answer"


def _save(conversation: Conversation, argument: str) -> str:
    if not argument:
        raise RequestError("/save needs the name of a file")
    content = {"messages": conversation.prompt()} if not conversation.raw else {"text": conversation.prompt()}
    path, text = Path(os.path.expanduser(argument)), json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot write {argument}: {error}") from error
    return f"saved {len(conversation.messages)} messages to {argument}"


def _set(conversation: Conversation, argument: str) -> str:
    name, *rest = re.split(r"\s*=\s*|\s+", argument, maxsplit=1)
    value = "".join(rest)
    if not value:
        raise RequestError("/set needs a name and a value, such as /set temperature 0.7; /params lists the names")
    option = SAMPLING.find(name.lstrip("-").replace("-", "_"), "/set")
    setting = Setting(option.read(value, f"/set {name}"), "/set")
    params = Settings(SAMPLING, {option.name: setting}).make(conversation.params)
    check_chat_params(params)
    conversation.params = params
    return f"{option.name} = {getattr(conversation.params, option.name)}"


def _params(conversation: Conversation, argument: str) -> str:
    rows = Settings(SAMPLING, {}).rows(conversation.params, "")
    return "\n".join(f"{name:<28}{value}" for name, value, _ in rows)


_ACTIONS: Mapping[str, Callable[[Conversation, str], str]] = {
    "help": _help,
    "reset": _reset,
    "system": _system,
    "undo": _undo,
    "save": _save,
    "set": _set,
    "params": _params,
}
