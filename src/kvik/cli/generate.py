"""`kvik generate`: prompts on the command line, text on the terminal as it comes, or JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.cli.engine import Speeds, drive, new_tracer, open_engine, read_text, render_config
from kvik.cli.options import EngineOptions, Parser, add_engine_flags, read_engine_options
from kvik.cli.terminal import Interrupt, Terminal
from kvik.errors import ConfigError, RequestError
from kvik.tracing import NO_TRACE, Tracer

if TYPE_CHECKING:
    from kvik.llm_engine import LLMEngine
    from kvik.outputs import CompletionOutput, RequestOutput
    from kvik.sampling_params import SamplingParams

__all__ = ["run"]

_HEADER_CHARS = 60


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    args = _parser().parse(argv)
    options = read_engine_options(args)
    if args.print_config:
        print(render_config(options, sampling=True))
        return 0
    prompts = _prompts(args)
    if args.profile:
        Path(args.profile).touch()  # better now than after the work
    if not args.json and {"logprobs", "prompt_logprobs"} & set(options.sampling.given):
        Terminal().remark("log-probabilities are printed with --json only")
    tracer = new_tracer() if args.profile else NO_TRACE
    try:
        with open_engine(options, args.log_level, tracer) as engine:
            return _generate(engine, prompts, options, args)
    finally:
        if isinstance(tracer, Tracer):
            tracer.write(Path(args.profile))


def _parser() -> Parser:
    parser = Parser(
        "kvik generate", "Complete prompts. One is streamed; several run together and are printed in order."
    )
    add_engine_flags(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="text to continue; - reads it from standard input")
    parser.add_argument("--file", action="append", default=[], metavar="FILE", help="a prompt from a file (repeatable)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt and line")
    parser.add_argument("--stats", action="store_true", help="print speeds on standard error at the end")
    parser.add_argument("--profile", metavar="FILE", help="write a trace that ui.perfetto.dev opens")
    return parser


def _prompts(args: argparse.Namespace) -> list[str]:
    """The prompts. One final newline of a file or of standard input is not part of them."""
    prompts = [_stdin() if prompt == "-" else prompt for prompt in args.prompts]
    prompts += [read_text(path).removesuffix("\n") for path in args.file]
    if not prompts:
        raise ConfigError("no prompt was given: write one after the model, - for standard input, or --file FILE")
    return prompts


def _stdin() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8 text: {error}") from error


def _generate(engine: LLMEngine, prompts: list[str], options: EngineOptions, args: argparse.Namespace) -> int:
    params = options.sampling.make(engine.default_sampling_params)
    ids = [_add(engine, prompts, index, params) for index in range(len(prompts))]
    finished: dict[str, RequestOutput] = {}
    printer = _JsonPrinter(ids) if args.json else _TextPrinter(ids, prompts, params.n)
    speeds = Speeds()
    with Interrupt() as interrupt:
        for output in drive(engine, ids, interrupt, speeds):
            if output.finished:
                finished[output.request_id] = output
            printer.take(output)
    interrupted = interrupt.requested and len(finished) < len(ids)
    printer.close()
    if args.stats:
        print(_stats(speeds, list(finished.values())), file=sys.stderr)
    errors = [output.error for output in finished.values() if output.error]
    if errors:
        raise RequestError(errors[0])
    return 130 if interrupted else 0


def _add(engine: LLMEngine, prompts: list[str], index: int, params: SamplingParams) -> str:
    try:
        return engine.add_request(prompts[index], params, request_id=str(index))
    except RequestError as error:
        raise RequestError(f"prompt {index + 1}: {error}" if len(prompts) > 1 else str(error), error.param) from None


class _TextPrinter:
    """Prints completions in the order of their prompts: the first unfinished one as it comes, later ones in turn."""

    def __init__(self, ids: list[str], prompts: list[str], num_completions: int) -> None:
        self._terminal = Terminal()
        self._slots = [(request_id, index) for request_id in ids for index in range(num_completions)]
        self._prompts = dict(zip(ids, prompts, strict=True))
        self._waiting: dict[tuple[str, int], str] = dict.fromkeys(self._slots, "")
        self._done: set[tuple[str, int]] = set()
        self._current = -1
        self._ends_line = True
        self._next()

    def take(self, output: RequestOutput) -> None:
        """Print what is new, or keep it until its turn."""
        for index, delta in enumerate(output.deltas):
            slot = (output.request_id, index)
            self._waiting[slot] += delta
            if output.outputs[index].finished:
                self._done.add(slot)
        while self._current < len(self._slots):
            slot = self._slots[self._current]
            self._write(self._waiting[slot])
            self._waiting[slot] = ""
            if slot not in self._done:
                return
            self._next()

    def close(self) -> None:
        """End the line."""
        if not self._ends_line:
            self._write("\n")

    def _next(self) -> None:
        self.close()
        self._current += 1
        if len(self._slots) > 1 and self._current < len(self._slots):
            request_id, index = self._slots[self._current]
            prompt = " ".join(self._prompts[request_id].split())
            short = prompt if len(prompt) <= _HEADER_CHARS else prompt[: _HEADER_CHARS - 1] + "…"
            number = f" #{index + 1}" if len(self._slots) > len(self._prompts) else ""
            self._write("\n" if self._current else "")
            print(self._terminal.bold(f"==> {short}{number} <=="), flush=True)

    def _write(self, text: str) -> None:
        if text:
            self._ends_line = text.endswith("\n")
            self._terminal.write(text)


class _JsonPrinter:
    """Prints one JSON object per request, in the order of the prompts."""

    def __init__(self, ids: list[str]) -> None:
        self._turns = list(ids)
        self._finished: dict[str, RequestOutput] = {}

    def take(self, output: RequestOutput) -> None:
        if output.finished:
            self._finished[output.request_id] = output
        while self._turns and self._turns[0] in self._finished:
            record = _record(self._finished.pop(self._turns.pop(0)))
            print(json.dumps(record, ensure_ascii=not _writes_unicode()), flush=True)

    def close(self) -> None:
        """Nothing is left open."""


def _writes_unicode() -> bool:
    """Whether standard output takes every character; others would be question marks, where JSON has names for them."""
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


def _record(output: RequestOutput) -> dict[str, Any]:
    """A request's output in plain values. The first completion is at the top; all are under `outputs` where n > 1."""
    usage = {**asdict(output.usage), "total_tokens": output.usage.total_tokens}
    record = {"index": int(output.request_id), "prompt": output.prompt, **_completion(output.outputs[0])}
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [None if item is None else item._asdict() for item in output.prompt_logprobs]
    if len(output.outputs) > 1:
        record["outputs"] = [_completion(completion) for completion in output.outputs]
    return {**record, "usage": usage, "metrics": asdict(output.metrics)}


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    record: dict[str, Any] = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": None if completion.finish_reason is None else str(completion.finish_reason),
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        record["logprobs"] = [item._asdict() for item in completion.logprobs]
    if completion.error is not None:
        record["error"] = completion.error
    return record


def _stats(speeds: Speeds, outputs: list[RequestOutput]) -> str:
    """One line: tokens and speeds of the two phases, and when the first tokens came."""
    firsts = [output.metrics.time_to_first_token for output in outputs]
    waits = sorted(first for first in firsts if first is not None)
    prompt, generated = (sum(getattr(o.usage, f"{kind}_tokens") for o in outputs) for kind in ("prompt", "completion"))
    phases = (("prefill", prompt, speeds.prefill_speed), ("decode", generated, speeds.decode_speed))
    parts = [f"{name} {count} tokens" + (f" at {speed:.1f} tok/s" if speed else "") for name, count, speed in phases]
    if waits:
        wait = f"{waits[0]:.3f} s" if len(waits) == 1 else f"{waits[0]:.3f} to {waits[-1]:.3f} s"
        parts.append(f"first token after {wait}")
    return ", ".join(parts)
