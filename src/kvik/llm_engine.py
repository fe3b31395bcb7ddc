"""The step API: text in, text out, one step at a time. `LLM` and `AsyncLLM` are two ways of driving it.

Joins the text half (tokenizer, chat template, output processor) and the token half (`core.Engine`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from types import TracebackType
from typing import Any

from kvik.config import EngineConfig
from kvik.core.request import Request
from kvik.log import logger
from kvik.metrics import EngineStats
from kvik.outputs import FinishReason, RequestOutput
from kvik.sampling_params import SamplingParams
from kvik.startup import StartupLedger, build_engine, fingerprint, inspect_model
from kvik.text.frontend import Frontend, ModelFacts, Prompt
from kvik.text.output_processor import OutputProcessor
from kvik.tracing import NO_TRACE, NoTrace

__all__ = ["LLMEngine"]


class LLMEngine:
    """An engine that is driven step by step.

        engine = LLMEngine("demo")
        engine.add_request("Once upon a time", SamplingParams(max_tokens=20))
        while engine.has_unfinished():
            for output in engine.step():
                print(output.delta, end="")

    `default_sampling_params` come from the model's generation_config.json. Not thread-safe. Raises ConfigError,
    ModelLoadError or CapacityError where it cannot start.
    """

    def __init__(self, model: str | EngineConfig, *, tracer: NoTrace = NO_TRACE, **options: Any) -> None:
        self.config = _config(model, options)
        self.ledger = StartupLedger()
        with self.ledger.phase("config"):
            info = inspect_model(self.config)
        self._info = info
        self.spec = info.spec
        self.resolved = info.resolved
        with self.ledger.phase("tokenizer"):
            self.frontend = Frontend.from_folder(
                info.path,
                ModelFacts(info.spec.vocab_size, info.spec.rope.depends_on_length),
                tokenizer=self.config.tokenizer,
                chat_template=self.config.chat_template,
                seed=self.config.seed,
                dummy=self.config.load_format == "dummy",
            )
        self.tokenizer = self.frontend.tokenizer
        self.chat_template = self.frontend.chat_template
        self.default_sampling_params = self.frontend.default_sampling_params
        self.make_request = self.frontend.make_request
        self.render_chat = self.frontend.render_chat
        self.engine = build_engine(self.config, info, self.ledger, self.frontend.grammars, tracer)
        self._processor = OutputProcessor(self.tokenizer)
        self._tracer = tracer
        self._responses: dict[str, RequestOutput] = {}
        logger.info("%s", self.ledger.render())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what decides outputs beside the requests; the `system_fingerprint` of OpenAI's format."""
        return fingerprint(self.config, self._info)

    # Requests

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        stream: bool = True,
    ) -> str:
        """Queue a prompt and return its request id. Raises RequestError for a request that could never run.

        A lower `priority` runs earlier under scheduling_policy="priority". Requests with different `cache_salt` never
        share cached prefixes. Without `stream` the request gives a single output, when it has finished.
        """
        options: dict[str, Any] = {"request_id": request_id, "priority": priority, "cache_salt": cache_salt}
        request = self.make_request(prompt, sampling_params, **options)
        self.submit(request, prompt, stream=stream)
        return request.request_id

    def submit(self, request: Request, prompt: Prompt, *, stream: bool = True) -> None:
        """Queue a request that `make_request` made of `prompt`. Raises RequestError for one that could never run."""
        self.engine.add(request if stream else dataclasses.replace(request, stream=False))
        self._processor.add(request, prompt, stream=stream)

    def abort(self, request_id: str) -> None:
        """End a request; its terminal output comes with the next step. Unknown and finished ids are ignored."""
        self.engine.finish(request_id, FinishReason.ABORT)

    # Steps

    def step(self) -> list[RequestOutput]:
        """Advance every running sequence by one step; the requests that changed, each with its text so far."""
        outputs = self.engine.step()
        with self._tracer.span("detokenize"):
            processed = self._processor.process(outputs)
        for request_id, index in processed.to_finish:
            self.engine.finish(request_id, FinishReason.STOP, index)
        if processed.to_finish:
            self.engine.drain()  # the ends of completions that have ended here
        return processed.outputs

    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to do."""
        return self.engine.has_unfinished()

    def run_until_complete(self) -> dict[str, RequestOutput]:
        """Step until nothing is left; the outputs of the requests that finished, by request id."""
        finished: dict[str, RequestOutput] = {}
        while self.has_unfinished():
            finished.update((output.request_id, output) for output in self.step() if output.finished)
        self._responses.update(finished)
        return finished

    def get_all_responses(self) -> dict[str, RequestOutput]:
        """Outputs of every `run_until_complete` since the last call of this method."""
        responses, self._responses = self._responses, {}
        return responses

    def reset(self) -> list[RequestOutput]:
        """Abort everything, also after an exception left a step unfinished; the terminal output of every request."""
        self.engine.reset()
        self.engine.drain()
        return self._processor.end_all(FinishReason.ABORT)

    @property
    def stats(self) -> EngineStats:
        """Totals since start, and the last step's counters."""
        return self.engine.stats

    # Life

    def close(self) -> None:
        """Free the model and the KV cache. May be called twice."""
        self.engine.close()

    def __enter__(self) -> LLMEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _config(model: str | EngineConfig, options: dict[str, Any]) -> EngineConfig:
    if not isinstance(model, EngineConfig):
        return EngineConfig(model, **options)
    aliases: Mapping[str, str] = EngineConfig.__aliases__  # type: ignore[attr-defined]
    taken = {aliases[name] for name in options if name in aliases}
    given = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in taken}
    return EngineConfig(**{**given, **options})
