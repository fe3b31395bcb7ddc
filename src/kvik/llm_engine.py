"""The step API: text in, text out, one step at a time. `LLM` and `AsyncLLM` are two ways of driving it.

Joins the text half (tokenizer, chat template, output processor) and the token half (`core.Engine`).
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from kvik.config import EngineConfig
from kvik.core.request import Request
from kvik.errors import RequestError
from kvik.log import logger
from kvik.metrics import EngineStats
from kvik.models.hub import load_generation_config, resolve_model
from kvik.outputs import FinishReason, RequestOutput
from kvik.sampling_params import SamplingParams
from kvik.startup import StartupLedger, build_engine, inspect_model
from kvik.text.chat import ChatTemplate
from kvik.text.output_processor import OutputProcessor
from kvik.text.tokenizer import Tokenizer
from kvik.tracing import NO_TRACE, NoTrace

__all__ = ["ChatPrompt", "LLMEngine", "Message", "Prompt", "default_sampling_params"]


@dataclasses.dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation under the model's chat template: what `LLMEngine.render_chat` makes."""

    text: str
    token_ids: tuple[int, ...]


Prompt = str | Sequence[int] | ChatPrompt
"""A prompt: text, token ids, or a rendered conversation."""

Message = Mapping[str, Any]
"""A chat message: {"role": "user", "content": "..."}."""


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
        self.spec = info.spec
        self.resolved = info.resolved
        with self.ledger.phase("tokenizer"):
            folder = info.path if self.config.tokenizer is None else resolve_model(self.config.tokenizer)
            self.tokenizer = Tokenizer.from_folder(folder, config=dict(info.hf_config))
            self.chat_template = ChatTemplate(self.tokenizer, self.config.chat_template)
        self.default_sampling_params = default_sampling_params(load_generation_config(info.path))
        self.engine = build_engine(self.config, info, self.ledger, tracer)
        self._processor = OutputProcessor(self.tokenizer)
        self._tracer = tracer
        self._ids = itertools.count()
        self._seeds = random.Random(self.config.seed)
        self._responses: dict[str, RequestOutput] = {}
        logger.info("%s", self.ledger.render())

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

    def make_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Request:
        """The request in token ids, with everything checked that depends on the model. Raises RequestError.

        Any thread may call this: a long prompt is tokenised without stopping the steps.
        """
        params = sampling_params or self.default_sampling_params
        prompt_ids = self._prompt_ids(prompt)
        self._check_ids(params.stop_token_ids, "stop_token_ids")
        self._check_ids(params.allowed_token_ids or (), "allowed_token_ids")
        self._check_ids([token_id for token_id, _ in params.logit_bias], "logit_bias")
        if self.spec.rope.depends_on_length:
            cache_salt = f"{cache_salt}/{len(prompt_ids)}"  # keys are rotated by an angle that depends on the length
        return Request(
            request_id=str(next(self._ids)) if request_id is None else request_id,
            prompt_token_ids=prompt_ids,
            params=params,
            seed=self._seeds.getrandbits(48) if params.seed is None else params.seed,
            eos_token_ids=self.tokenizer.eos_token_ids,
            bad_words_ids=self.tokenizer.bad_word_ids(params.bad_words),
            priority=priority,
            cache_salt=cache_salt,
            arrival_time=time.monotonic(),
        )

    def submit(self, request: Request, prompt: Prompt, *, stream: bool = True) -> None:
        """Queue a request that `make_request` made of `prompt`. Raises RequestError for one that could never run."""
        self.engine.add(request)
        text = prompt.text if isinstance(prompt, ChatPrompt) else prompt
        self._processor.add(request, text if isinstance(text, str) else None, stream=stream)

    def render_chat(self, messages: Sequence[Message], **template_options: Any) -> ChatPrompt:
        """A conversation as a prompt; options as in `kvik.text.chat.ChatTemplate.render`. Any thread may call this."""
        text, token_ids = self.chat_template.encode(messages, **template_options)
        return ChatPrompt(text, tuple(token_ids))

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

    def reset(self) -> None:
        """Abort everything without delivering outputs, also after an exception left a step unfinished."""
        self.engine.reset()
        self._processor.process(self.engine.step())

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

    # Checks

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            ids = tuple(self.tokenizer.encode(prompt))
            if not ids:
                raise RequestError("the prompt is empty and this model has no beginning-of-sequence token", "prompt")
            return ids
        ids = prompt.token_ids if isinstance(prompt, ChatPrompt) else tuple(prompt)
        if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
            raise RequestError("a prompt is a string or a list of token ids (integers)", "prompt")
        self._check_ids(ids, "prompt")
        return ids

    def _check_ids(self, token_ids: Sequence[int], param: str) -> None:
        bad = [token_id for token_id in token_ids if not 0 <= token_id < self.spec.vocab_size]
        if bad:
            raise RequestError(
                f"{param}: token id {bad[0]} is outside the vocabulary 0..{self.spec.vocab_size - 1}", param
            )


def _config(model: str | EngineConfig, options: dict[str, Any]) -> EngineConfig:
    if not isinstance(model, EngineConfig):
        return EngineConfig(model, **options)
    given = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    return EngineConfig(**{**given, **options})


def default_sampling_params(generation_config: Mapping[str, Any]) -> SamplingParams:
    """What a model's authors recommend in generation_config.json; Kvik's own defaults where they say nothing."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    if generation_config.get("do_sample") is False:
        given = {"temperature": 0.0, **({"repetition_penalty": p} if (p := given.get("repetition_penalty")) else {})}
    return SamplingParams(**given)
