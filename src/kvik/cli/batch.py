"""`kvik batch`: a file of OpenAI batch requests to a file of results, as many at once as the engine runs.

The input is never read ahead of the engine. A result is written when it is finished, so a run that was stopped goes on
where it was when the same command is given again. A wrong line gives an error result and harms no other.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from kvik.cli.batch_files import BatchLine, ResultFile, custom_id, digest, parse_line, read_lines
from kvik.cli.engine import open_engine, render_config
from kvik.cli.options import EngineOptions, Parser, add_engine_flags, add_flags, read_engine_options, read_flags
from kvik.cli.terminal import Interrupt
from kvik.errors import ConfigError, RequestError, WorkerError
from kvik.openai_format import blaming, check_defaults, error_body
from kvik.server.answers import answer_body
from kvik.server.protocol import ServedRequest, parse
from kvik.server.reply_syntax import ModelSyntax
from kvik.server_config import ServerConfig
from kvik.settings import SERVER, Setting, load_server_settings

if TYPE_CHECKING:
    from kvik.llm_engine import LLMEngine
    from kvik.outputs import RequestOutput

__all__ = ["run"]

_ANSWERS = ("tool_format", "reasoning_field")


def run(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    args = _parser().parse(argv)
    options = read_engine_options(args)
    source, target = _files(args, options)
    answers = _answer_options(args)
    if args.print_config:
        print(render_config(options, sampling=True))
        return 0
    if not source.exists() or source.is_dir():
        raise ConfigError(f"there is no file {source} with requests")
    if target.exists() and source.samefile(target):
        raise ConfigError(f"{source} cannot be both the requests and the results")
    with ResultFile(target) as results, open_engine(options, args.log_level) as engine:
        overrides = {name: setting.value for name, setting in options.sampling.given.items()}
        check_defaults(overrides)
        with Interrupt() as interrupt:
            batch = _Batch(engine, results, overrides, answers)
            batch.run(source, interrupt)
        print(batch.summary(target), file=sys.stderr)
    if not batch.complete:
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        return 130
    return 1 if args.fail_on_error and batch.num_failed + results.done.num_failed else 0


def _parser() -> Parser:
    parser = Parser("kvik batch", "Run a file of OpenAI batch requests. Sampling flags are defaults for the bodies.")
    parser.usage = "kvik batch [MODEL] IN OUT [options]"
    parser.add_argument(
        "names", metavar="[MODEL] IN OUT", nargs="+", help="the model, unless --model gives it, and the files"
    )
    add_engine_flags(parser, model=False)
    add_flags(parser, SERVER, skip=tuple(name for name in SERVER.options if name not in _ANSWERS))
    parser.add_argument("--fail-on-error", action="store_true", help="exit with 1 if any request failed")
    return parser


def _answer_options(args: argparse.Namespace) -> ServerConfig:
    """How answers are read, by the options that the server has for it. Raises ConfigError."""
    given = load_server_settings(read_flags(args, SERVER), os.environ, args.config).given
    return ServerConfig(**{name: given[name].value for name in _ANSWERS if name in given})


def _files(args: argparse.Namespace, options: EngineOptions) -> tuple[Path, Path]:
    """The files of requests and results; a third name is the model."""
    if len(args.names) not in (2, 3):
        raise ConfigError(f"give [MODEL] IN OUT, got {len(args.names)} names; kvik batch --help shows the options")
    if len(args.names) == 3:
        given = options.engine.given.get("model")
        if given is not None and given.origin == "--model":
            raise ConfigError(f"two models were given: {args.names[0]} and --model {given.value}")
        options.engine.given["model"] = Setting(args.names[0], "MODEL")
    return Path(args.names[-2]), Path(args.names[-1])


@dataclasses.dataclass(slots=True)
class _Job:
    """A line that runs: its request ids, one for each prompt, and what has finished."""

    custom_id: str
    served: ServedRequest
    request_ids: list[str]
    finished: dict[str, RequestOutput] = dataclasses.field(default_factory=dict)

    @property
    def num_sequences(self) -> int:
        return len(self.request_ids) * self.served.request.params.n


class _Batch:
    """One run over the input. Owns the jobs that are in the engine and the counts of the summary."""

    def __init__(
        self, engine: LLMEngine, results: ResultFile, overrides: dict[str, Any], answers: ServerConfig
    ) -> None:
        self.complete = False
        self.num_failed = 0
        self._num_done = 0
        self._num_skipped = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._engine = engine
        self._results = results
        self._overrides = overrides
        self._syntax = ModelSyntax.detect(engine.chat_template.sources, answers)
        self._jobs: dict[str, _Job] = {}
        self._num_sequences = 0
        self._seen: set[str] = set()
        self._other_models: Counter[str] = Counter()
        self._begin = time.monotonic()

    def run(self, source: Path, interrupt: Interrupt) -> None:
        """Feed the engine from `source` until everything is written, or until Ctrl-C."""
        bar = tqdm(
            total=source.stat().st_size, unit="B", unit_scale=True, desc="Batch", disable=not sys.stderr.isatty()
        )
        limit = self._engine.resolved.scheduler.max_num_seqs
        lines = self._new_lines(source, bar)
        more = True
        with bar:
            while (more or self._jobs) and not interrupt.requested:
                while more and self._num_sequences < limit:
                    more = self._start_next(lines)
                for output in self._engine.step():
                    self._take(output)
                bar.set_postfix_str(self._progress(), refresh=False)
        self.complete = not (more or self._jobs)

    def summary(self, target: Path) -> str:
        """What was done, for people."""
        seconds = time.monotonic() - self._begin
        parts = [f"{self._num_done} done", f"{self.num_failed} failed"]
        if self._num_skipped:
            parts.append(f"{self._num_skipped} skipped (already in {target})")
        speed = self._num_output_tokens / max(seconds, 1e-9)
        tokens = f"{self._num_prompt_tokens:,} prompt + {self._num_output_tokens:,} output tokens"
        text = f"batch: {', '.join(parts)}; {tokens} in {seconds:.1f} s ({speed:.1f} output tok/s)"
        if self._other_models:
            models = ", ".join(f"{name} ({count})" for name, count in self._other_models.most_common(5))
            text += f"\nrequests that name another model were run with {self._engine.config.model} too: {models}"
        return text

    def _new_lines(self, source: Path, bar: tqdm[Any]) -> Iterator[tuple[int, bytes]]:
        """Lines whose results are not in the file yet. Duplicates are refused here."""
        done = self._results.done
        for number, line in read_lines(source):
            bar.update(len(line))
            name = custom_id(line)
            if done.has_refused(number, line):
                self._num_skipped += 1
            elif name is not None and name in self._seen:
                error = RequestError(f"custom_id {name!r} is that of an earlier line", "custom_id")
                self._refuse(name, number, line, error)
            elif name in done.custom_ids:
                self._num_skipped += 1
            else:
                yield number, line
            if name is not None:
                self._seen.add(name)

    def _start_next(self, lines: Iterator[tuple[int, bytes]]) -> bool:
        """Give the engine one more line; False if there is none."""
        item = next(lines, None)
        if item is None:
            return False
        number, raw = item
        try:
            self._start(parse_line(raw))
        except RequestError as error:
            self._refuse(custom_id(raw), number, raw, error)
        return True

    def _start(self, line: BatchLine) -> None:
        served = parse(
            line.body,
            chat=line.chat,
            base=self._engine.default_sampling_params,
            overrides=self._overrides,
            model=self._syntax,
            strict=True,
        )
        if served.request.stream:
            raise RequestError("stream must be false in a batch: results are written when they are finished", "stream")
        frontend = self._engine.frontend
        prompts = served.request.prompts(frontend)
        served = served.behind(prompts, frontend.tokenizer)
        job = _Job(line.custom_id, served, [])
        options: dict[str, Any] = {"priority": served.priority, "cache_salt": served.cache_salt, "stream": False}
        try:
            with blaming(served.request.names):
                for prompt in prompts:
                    job.request_ids.append(self._engine.add_request(prompt, served.request.params, **options))
        except RequestError:
            for request_id in job.request_ids:
                self._engine.abort(request_id)
            raise
        self._jobs.update((request_id, job) for request_id in job.request_ids)
        self._num_sequences += job.num_sequences
        model = served.request.model
        if model is not None and model != self._engine.config.model:
            self._other_models[model] += 1

    def _take(self, output: RequestOutput) -> None:
        """Keep a finished output; with its job's last one, write the result."""
        job = self._jobs.pop(output.request_id, None)
        if job is None:
            return
        job.finished[output.request_id] = output
        if len(job.finished) < len(job.request_ids):
            return
        self._num_sequences -= job.num_sequences
        outputs = [job.finished[request_id] for request_id in job.request_ids]
        self._num_prompt_tokens += sum(output.usage.prompt_tokens for output in outputs)
        self._num_output_tokens += sum(output.usage.completion_tokens for output in outputs)
        errors = [completion.error for output in outputs for completion in output.outputs if completion.error]
        if errors:
            self.num_failed += 1
            self._results.write(job.custom_id, 500, error_body(WorkerError(errors[0])))
        else:
            self._num_done += 1
            engine = self._engine
            body = answer_body(job.served, outputs, engine.tokenizer, engine.config.model, engine.fingerprint)
            self._results.write(job.custom_id, 200, body)

    def _refuse(self, name: str | None, number: int, line: bytes, error: RequestError) -> None:
        """Write an error result for a line that never ran. A later run skips it unless it was changed."""
        self.num_failed += 1
        body = error_body(error)
        body["error"].update(line=number, digest=digest(line))
        self._results.write(name, 400, body)

    def _progress(self) -> str:
        speed = self._num_output_tokens / max(time.monotonic() - self._begin, 1e-9)
        return f"{self._num_done} done, {self.num_failed} failed, {speed:.0f} tok/s"
