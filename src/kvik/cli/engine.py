"""What the commands do with an engine: make it from settings, show its configuration, and drive it until Ctrl-C."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.cli.options import EngineOptions
from kvik.cli.terminal import Interrupt
from kvik.errors import ConfigError
from kvik.log import configure
from kvik.metrics import StepStats
from kvik.sampling_params import SamplingParams
from kvik.tracing import NO_TRACE, NoTrace, Tracer

if TYPE_CHECKING:
    from kvik.llm_engine import LLMEngine
    from kvik.outputs import RequestOutput

__all__ = ["Speeds", "check_sampling", "drive", "load_torch", "new_tracer", "open_engine", "read_text", "render_config"]


def open_engine(options: EngineOptions, log_level: str, tracer: NoTrace = NO_TRACE) -> LLMEngine:
    """Start an engine. What can be known to be wrong without torch is found before torch is imported."""
    configure(log_level)
    config = options.engine.make()
    check_sampling(options)
    load_torch()
    from kvik.llm_engine import LLMEngine

    return LLMEngine(config, tracer=tracer)


def load_torch() -> None:
    """Import torch, with Ctrl-C put off until it is there: what it imports from C++ would swallow it, or die of it."""
    with Interrupt() as interrupt:
        import torch  # noqa: F401
    if interrupt.requested:
        raise KeyboardInterrupt


def new_tracer() -> Tracer:
    """A tracer whose ranges are NVTX ranges as well where there is an NVIDIA GPU."""
    load_torch()
    import torch

    return Tracer(torch.cuda.nvtx.range if torch.cuda.is_available() else None)


@dataclass(slots=True)
class Speeds:
    """Steps of one measurement. Decoding is measured in the steps that compute nothing else."""

    steps: list[StepStats] = field(default_factory=list)

    def add(self, step: StepStats | None) -> None:
        """Count the newest step, once."""
        if step is not None and (not self.steps or step is not self.steps[-1]):
            self.steps.append(step)

    @property
    def prefill_steps(self) -> list[StepStats]:
        return [step for step in self.steps if step.num_prefill_tokens]

    @property
    def decode_steps(self) -> list[StepStats]:
        return [step for step in self.steps if not step.num_prefill_tokens]

    @property
    def prefill_speed(self) -> float | None:
        """Prompt tokens per second of the steps with prompt tokens; None if there was none."""
        seconds = sum(step.total_time for step in self.prefill_steps)
        return sum(step.num_prefill_tokens for step in self.prefill_steps) / seconds if seconds else None

    @property
    def decode_speed(self) -> float | None:
        """Output tokens per second of the steps without prompt tokens; None if there was none."""
        seconds = sum(step.total_time for step in self.decode_steps)
        return sum(step.num_decode_tokens for step in self.decode_steps) / seconds if seconds else None


def check_sampling(options: EngineOptions) -> None:
    """Raise ConfigError for sampling values that are wrong by themselves."""
    options.sampling.make(SamplingParams())


def drive(
    engine: LLMEngine, request_ids: Iterable[str], interrupt: Interrupt, speeds: Speeds | None = None
) -> Iterator[RequestOutput]:
    """Step the engine and yield the outputs of `request_ids` until all are finished; `speeds` sees every step.

    After Ctrl-C, or when the iterator is closed, the rest is aborted between two steps and the engine stays usable.
    """
    pending = set(request_ids)
    try:
        while pending and not interrupt.requested:
            outputs = engine.step()
            if speeds is not None:
                speeds.add(engine.stats.last)
            for output in outputs:
                if output.request_id in pending:
                    if output.finished:
                        pending.discard(output.request_id)
                    yield output
    except KeyboardInterrupt:  # the second Ctrl-C, which may have come in the middle of a step
        engine.reset()
        raise
    finally:
        for request_id in pending:
            engine.abort(request_id)


def render_config(options: EngineOptions, *, sampling: bool) -> str:
    """The effective options as a table of name, value and origin; None is what the engine decides at its start."""
    tables = [("engine", options.engine.rows())]
    if sampling:
        base = _model_defaults(options)
        tables.append(("sampling", options.sampling.rows(base, "generation_config.json of the model")))
    width = max(len(name) for _, rows in tables for name, _, _ in rows)
    values = max(len(value) for _, rows in tables for _, value, _ in rows)
    lines = []
    for title, rows in tables:
        lines += ["", f"{title:<{width + 2}}  {'value':<{values}}  origin"]
        lines += [f"  {name:<{width}}  {value:<{values}}  {origin}" for name, value, origin in rows]
    return "\n".join(lines[1:])


def _model_defaults(options: EngineOptions) -> SamplingParams:
    """What the model's generation_config.json recommends, if the model is on this machine."""
    from kvik.models.hub import BUNDLED_MODELS, load_generation_config, resolve_model
    from kvik.text.frontend import default_sampling_params

    model = options.engine.make().model
    if model in BUNDLED_MODELS or os.path.isdir(os.path.expanduser(model)):
        return default_sampling_params(load_generation_config(resolve_model(model)))
    return SamplingParams()


def read_text(path: str) -> str:
    """The text of a file. Raises ConfigError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
