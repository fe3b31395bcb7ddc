"""`kvik chat`: a conversation in the terminal, streamed, with history and slash commands.

Ctrl-C stops the answer and not the program: it sets a flag that is looked at between two steps of the engine.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvik import __version__
from kvik.cli.conversation import Conversation, Leave, check_chat_params, obey
from kvik.cli.engine import drive, open_engine, render_config
from kvik.cli.options import EngineOptions, Parser, add_engine_flags, read_engine_options
from kvik.cli.terminal import Interrupt, Terminal
from kvik.errors import ConfigError, KvikError, RequestError
from kvik.settings import Setting

if TYPE_CHECKING:
    from kvik.llm_engine import LLMEngine
    from kvik.outputs import RequestOutput

__all__ = ["run"]

_QUOTES = '"""'
_HISTORY_LINES = 1000


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    args = _parser().parse(argv)
    options = read_engine_options(args)
    if args.print_config:
        print(render_config(options, sampling=True))
        return 0
    check_chat_params(options.sampling.make())
    with open_engine(options, args.log_level) as engine:
        if not args.raw:
            _check_template(engine)
        _Chat(engine, _conversation(engine, options, args)).loop()
    return 0


def _parser() -> Parser:
    parser = Parser("kvik chat", "Talk with a model. Type /help in the chat for its commands.")
    add_engine_flags(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--raw", action="store_true", help="no chat template: the model continues the text so far")
    return parser


def _check_template(engine: LLMEngine) -> None:
    try:
        engine.render_chat([{"role": "user", "content": "Hello"}])
    except RequestError as error:
        raise ConfigError(f"{error}; or use --raw, which continues your text without a template") from error


def _conversation(engine: LLMEngine, options: EngineOptions, args: argparse.Namespace) -> Conversation:
    quarter = max(64, engine.resolved.scheduler.max_model_len // 4)
    options.sampling.given.setdefault("max_tokens", Setting(quarter, "chat: a quarter of the context"))
    params = options.sampling.make(engine.default_sampling_params)
    return Conversation(params, system=args.system, raw=args.raw)


class _Chat:
    """Reads lines, answers them, and says how fast."""

    def __init__(self, engine: LLMEngine, conversation: Conversation) -> None:
        self._engine = engine
        self._conversation = conversation
        self._terminal = Terminal()
        self._reader = _Reader(self._terminal)

    def loop(self) -> None:
        """Until /exit or the end of the input."""
        if self._reader.interactive:
            self._terminal.remark(
                f"kvik {__version__}, {self._engine.config.model}: /help for commands, Ctrl-D to leave"
            )
        with self._reader:
            while True:
                try:
                    self._turn(self._reader.message())
                except (EOFError, Leave):
                    return
                except KeyboardInterrupt:
                    print(file=sys.stdout)
                except KvikError as error:
                    self._terminal.remark(str(error))

    def _turn(self, text: str) -> None:
        if not text.strip():
            return
        message: str | None = text
        if text.startswith("/"):
            reply, message = obey(self._conversation, text)
            if reply:
                self._terminal.remark(reply)
        if message is not None:
            self._answer(message)

    def _answer(self, message: str) -> None:
        """Stream the answer to `message` and keep both. What was said before Ctrl-C is kept as the answer."""
        conversation, answer = self._conversation, ""
        conversation.ask(message)
        begin, output, interrupt = time.monotonic(), None, Interrupt()
        try:
            request_id = self._submit()
            with interrupt:
                for output in drive(self._engine, [request_id], interrupt):
                    answer += output.delta
                    self._terminal.write(output.delta)
        except KeyboardInterrupt:
            interrupt.requested = True
        finally:
            conversation.answer(answer)
        print(flush=True)
        self._terminal.remark(self._summary(output, time.monotonic() - begin, interrupt.requested))

    def _submit(self) -> str:
        conversation, engine = self._conversation, self._engine
        prompt = conversation.prompt()
        rendered = prompt if isinstance(prompt, str) else engine.render_chat(prompt)
        try:
            try:
                return engine.add_request(rendered, conversation.params)
            except RequestError as error:
                if error.code != "context_length_exceeded" or error.param != "max_tokens":
                    raise
            return engine.add_request(rendered, replace(conversation.params, max_tokens=None))  # what room is left
        except RequestError as error:
            overflow = error.code == "context_length_exceeded"
            raise RequestError(f"{error}\n{_ADVICE}" if overflow else str(error)) from None

    def _summary(self, output: RequestOutput | None, seconds: float, stopped: bool) -> str:
        if output is None:
            return "[stopped before the first token; the message is forgotten]"
        num_tokens, first = output.usage.completion_tokens, output.metrics.time_to_first_token or 0.0
        parts = [f"{num_tokens} tokens"]
        if num_tokens > 1:
            parts.append(f"{(num_tokens - 1) / max(seconds - first, 1e-9):.1f} tok/s")
        parts.append(f"first after {first:.2f} s")
        if output.error:
            parts.append(f"failed: {output.error}")
        elif stopped and not output.finished:
            parts.append("stopped")
        elif output.finish_reason == "length":
            parts.append(self._length_note(output))
        return f"[{', '.join(parts)}]"

    def _length_note(self, output: RequestOutput) -> str:
        context = self._engine.resolved.scheduler.max_model_len
        if output.usage.total_tokens >= context:
            return f"the context of {context} tokens is full: {_ADVICE}"
        return f"max_tokens {self._conversation.params.max_tokens} reached: /set max_tokens N for longer answers"


_ADVICE = "/undo or /reset makes room, as does starting with a larger --max-model-len if the model allows it"


class _Reader:
    """Messages from the terminal, with readline editing and history, or from lines of a pipe."""

    def __init__(self, terminal: Terminal) -> None:
        self.interactive = sys.stdin.isatty()
        self._prompt = terminal.prompt("> ") if self.interactive else ""
        self._more = terminal.prompt(". ") if self.interactive else ""

    def __enter__(self) -> _Reader:
        if self.interactive:
            _load_history()
        return self

    def __exit__(self, *error: object) -> None:
        if self.interactive:
            _save_history()

    def message(self) -> str:
        """A line, lines that end in a backslash, or lines between triple quotes. Raises EOFError at the end."""
        line = self._line(self._prompt)
        if line.startswith(_QUOTES):
            return self._quoted(line.removeprefix(_QUOTES))
        while line.endswith("\\"):
            more = self._next_line()
            line = line[:-1] if more is None else f"{line[:-1]}\n{more}"
        return line

    def _quoted(self, text: str) -> str:
        while not text.rstrip().endswith(_QUOTES) and (more := self._next_line()) is not None:
            text += "\n" + more
        return text.rstrip().removesuffix(_QUOTES).strip("\n")

    def _next_line(self) -> str | None:
        """The next line of a message, None where the input ends within it: it is complete then."""
        try:
            return self._line(self._more)
        except EOFError:
            return None

    def _line(self, prompt: str) -> str:
        try:
            return input(prompt)
        except UnicodeDecodeError as error:
            raise RequestError(f"the input is not UTF-8 text: {error}") from error
        except EOFError:
            if self.interactive:
                print()
            raise


def _history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "kvik" / "chat_history"


def _load_history() -> None:
    try:
        import readline
    except ImportError:  # Python without readline, as on Windows
        return
    try:
        readline.read_history_file(_history_file())
    except OSError:  # no history yet, or none that can be read
        readline.clear_history()
    readline.set_history_length(_HISTORY_LINES)


def _save_history() -> None:
    try:
        import readline
    except ImportError:
        return
    try:
        _history_file().parent.mkdir(parents=True, exist_ok=True)
        readline.write_history_file(_history_file())
        _history_file().chmod(0o600)
    except OSError as error:
        print(f"the history could not be saved: {error}", file=sys.stderr)
