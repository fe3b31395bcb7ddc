"""`LLM`: prompts in, outputs out, in one call. The offline face of the engine."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, cast

from tqdm import tqdm

from kvik.config import EngineConfig
from kvik.errors import RequestError
from kvik.fields import show
from kvik.llm_engine import LLMEngine
from kvik.mailbox import Mailbox
from kvik.metrics import EngineStats
from kvik.outputs import RequestOutput
from kvik.sampling_params import SamplingParams
from kvik.text.frontend import ChatPrompt, Message, Prompt
from kvik.text.tokenizer import Tokenizer
from kvik.tracing import NO_TRACE, NoTrace

__all__ = ["LLM"]

Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model that answers batches of prompts.

        with LLM("demo") as llm:
            for output in llm.generate(["Once upon a time", "The king"], SamplingParams(max_tokens=30)):
                print(output.prompt, output.text)

    `options` are the fields of EngineConfig. Raises ConfigError, ModelLoadError or CapacityError where it cannot start.
    Calls from several threads take turns; AsyncLLM computes those of many callers together.
    """

    def __init__(self, model: str | EngineConfig, *, tracer: NoTrace = NO_TRACE, **options: Any) -> None:
        self.llm_engine = LLMEngine(model, tracer=tracer, **options)
        self._mailboxes: dict[str, Mailbox] = {}
        self._news: dict[str, deque[str]] = {}  # of the call of each request: those that something came for
        self._calls = itertools.count()
        self._lock = threading.RLock()  # of all that is here, and of the engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self.llm_engine.tokenizer

    @property
    def default_sampling_params(self) -> SamplingParams:
        """Settings used where none are given: the model's generation_config.json."""
        return self.llm_engine.default_sampling_params

    @property
    def stats(self) -> EngineStats:
        return self.llm_engine.stats

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = False,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; one output per prompt, in their order.

        prompts: a string, a list of token ids, or a list of either (mixed). sampling_params: one for all, or one per
        prompt. use_tqdm shows a progress bar with prefill and decode tokens per second. Raises RequestError, before
        anything runs, if one of them could never run.
        """
        finished: dict[str, RequestOutput] = {}
        with self._lock:
            ids = self._add(_as_batch(prompts), sampling_params, priority, stream=False)
            with _Progress(self.stats, len(ids), use_tqdm) as progress:
                for output in self._outputs(ids):
                    if output is not None and output.finished:
                        finished[output.request_id] = output
                    progress.update(len(finished))
        return [finished[request_id] for request_id in ids]

    def stream(self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None) -> Iterator[RequestOutput]:
        """Like `generate`, but yields each request's output whenever it has grown; `output.delta` is what is new.

        Outputs of several prompts interleave: `output.index` is the prompt's place in the list. Closing the iterator
        aborts what is unfinished.
        """
        with self._lock:
            outputs = self._outputs(self._add(_as_batch(prompts), sampling_params, None, stream=True))
        next(outputs)
        return cast(Iterator[RequestOutput], outputs)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = False,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them; one output per conversation.

        template_options: add_generation_prompt, continue_final_message, tools, documents, chat_template_kwargs (such as
        {"enable_thinking": False}).
        """
        return self.generate(self._render(messages, template_options), sampling_params, use_tqdm=use_tqdm)

    def stream_chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        **template_options: Any,
    ) -> Iterator[RequestOutput]:
        """Like `chat`, but streaming, as `stream` does."""
        return self.stream(self._render(messages, template_options), sampling_params)

    def close(self) -> None:
        """Free the model and the KV cache. May be called twice."""
        with self._lock:
            self.llm_engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _render(self, messages: Any, options: dict[str, Any]) -> list[Prompt]:
        many = isinstance(messages, (list, tuple)) and isinstance((*messages, None)[0], (list, tuple))
        conversations = messages if many or not messages else [messages]
        return [self.llm_engine.render_chat(conversation, **options) for conversation in conversations]

    def _add(
        self, prompts: list[Prompt], sampling_params: Params, priority: Sequence[int] | None, *, stream: bool
    ) -> list[str]:
        """Queue all prompts, or none if one is refused."""
        params = _per_prompt(sampling_params, len(prompts))
        priorities = [0] * len(prompts) if priority is None else priority
        if not isinstance(priorities, Sequence) or isinstance(priorities, (str, bytes)):
            raise RequestError(
                f"priority must be a list of integers, one for each prompt, got {show(priority)}", "priority"
            )
        if len(priorities) != len(prompts):
            raise RequestError(
                f"{len(priorities)} priorities for {len(prompts)} prompts; give one for each", "priority"
            )
        ids: list[str] = []
        call = next(self._calls)
        try:
            for index, prompt in enumerate(prompts):
                ids.append(f"{call}-{index}")
                self.llm_engine.add_request(
                    prompt, params[index], request_id=ids[index], priority=priorities[index], stream=stream
                )
        except BaseException as error:
            for request_id in ids:
                self.llm_engine.abort(request_id)
            if not isinstance(error, RequestError) or len(prompts) == 1:
                raise
            raise RequestError(f"prompt {len(ids) - 1}: {error}", error.param) from None
        self._mailboxes.update((request_id, Mailbox()) for request_id in ids)
        news = deque[str]()
        self._news.update((request_id, news) for request_id in ids)
        return ids

    def _outputs(self, ids: list[str]) -> Iterator[RequestOutput | None]:
        """Step the engine and yield what concerns `ids`; outputs of other calls wait in their mailboxes.

        The first item is None: whoever has it may close the iterator, and what is unfinished is aborted.
        """
        pending = {request_id: index for index, request_id in enumerate(ids)}
        news = self._news[ids[0]] if ids else deque[str]()
        try:
            yield None
            while pending:
                with self._lock:
                    if not news:
                        self._step()
                        continue
                    request_id = news.popleft()
                    output = self._mailboxes[request_id].take()
                if output is not None:
                    index = pending.pop(request_id) if output.finished else pending[request_id]
                    yield dataclasses.replace(output, index=index)
        finally:
            with self._lock:
                for request_id in pending:
                    self.llm_engine.abort(request_id)
                for request_id in ids:
                    self._mailboxes.pop(request_id, None)
                    self._news.pop(request_id, None)

    def _step(self) -> None:
        try:
            outputs = self.llm_engine.step()
        except BaseException:
            self._deliver(self.llm_engine.reset())
            raise
        self._deliver(outputs)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if output.request_id in self._mailboxes:
                self._mailboxes[output.request_id].put(output)
                self._news[output.request_id].append(output.request_id)


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts from one or several: a list of integers is one prompt of token ids."""
    try:
        items = None if isinstance(prompts, (str, ChatPrompt, Mapping, bytes)) else list(prompts)
    except TypeError:
        items = None
    if items is None:
        return [cast(Prompt, prompts)]  # which is refused if it is none
    if items and isinstance(items[0], int):
        return [cast(Sequence[int], items)]
    return cast(list[Prompt], items)


def _per_prompt(params: Params, count: int) -> list[SamplingParams | None]:
    if params is None or isinstance(params, (SamplingParams, Mapping)):
        return [params] * count  # a mapping is refused with the request
    if not isinstance(params, Sequence):
        raise RequestError(
            f"sampling_params must be SamplingParams, or a list of them, got {show(params)}", "sampling_params"
        )
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling_params for {count} prompts; give one, or one for each")
    return list(params)


class _Progress:
    """A bar over finished requests with the engine's prefill and decode speed; nothing when switched off."""

    def __init__(self, stats: EngineStats, total: int, enabled: bool) -> None:
        self._stats = stats
        self._before = (stats.num_prefill_tokens, stats.num_decode_tokens, stats.prefill_time, stats.decode_time)
        # One that is disabled would start a thread as well.
        self._bar = tqdm(total=total, desc="Generating", unit="req", dynamic_ncols=True) if enabled else None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, num_finished: int) -> None:
        if self._bar is None:
            return
        prefill, decode, prefill_time, decode_time = (
            now - before
            for now, before in zip(
                (
                    self._stats.num_prefill_tokens,
                    self._stats.num_decode_tokens,
                    self._stats.prefill_time,
                    self._stats.decode_time,
                ),
                self._before,
                strict=True,
            )
        )
        speeds = {
            "prefill": prefill / max(prefill_time, 1e-9),
            "decode": decode / max(prefill_time + decode_time, 1e-9),
        }
        self._bar.set_postfix_str(
            ", ".join(f"{name} {speed:.0f} tok/s" for name, speed in speeds.items()), refresh=False
        )
        self._bar.update(num_finished - self._bar.n)
