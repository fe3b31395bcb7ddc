"""The front half of every API: prompts and conversations to checked requests in token ids.

`Frontend` is what `LLMEngine` and the HTTP server put before the engine, in the same process or in another one: the
tokenizer, the chat template, the model's sampling defaults, and every check that depends on the model.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvik.core.request import Request
from kvik.errors import RequestError
from kvik.fields import show
from kvik.log import logger
from kvik.models.hub import load_generation_config
from kvik.sampling_params import SamplingParams
from kvik.structured.grammars import Grammars
from kvik.text.chat import ChatTemplate
from kvik.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["ChatPrompt", "Frontend", "Message", "ModelFacts", "Prompt", "default_sampling_params"]


@dataclasses.dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation under the model's chat template: what `Frontend.render_chat` makes.

    `goes_on` is whether the answer is the rest of the last message, and not a message of its own.
    """

    text: str
    token_ids: tuple[int, ...]
    goes_on: bool = False


Prompt = str | Sequence[int] | ChatPrompt
"""A prompt: text, token ids, or a rendered conversation."""

Message = Mapping[str, Any]
"""A chat message: {"role": "user", "content": "..."}."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the checks have to know of the model: rows of its embedding, and whether the KV depends on the length."""

    vocab_size: int
    rope_depends_on_length: bool


class Frontend:
    """Makes requests. Any thread may call it: a long prompt is tokenised without stopping the steps."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        default_sampling_params: SamplingParams,
        facts: ModelFacts,
        *,
        seed: int | None = None,
        only_checks: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.default_sampling_params = default_sampling_params
        self._facts = facts
        table = tokenizer.spelling_table if only_checks else tokenizer.byte_table
        self.grammars = Grammars(lambda: table(facts.vocab_size))
        self._ids = itertools.count()
        self._seeds = random.Random(seed)

    @classmethod
    def from_folder(
        cls,
        path: Path,
        facts: ModelFacts,
        *,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        seed: int | None = None,
        dummy: bool = False,
        only_checks: bool = False,
    ) -> Frontend:
        """The front half of the model in a local folder. Raises ModelLoadError for missing or broken files.

        `tokenizer` is the name of another one than the model's own. A `dummy` model, whose weights are random, may do
        without: prompts are token ids then. A front half with `only_checks` shares no process with the engine: its
        `grammars` tell right from wrong, and make no masks.
        """
        loaded = load_tokenizer(path, tokenizer, dummy=dummy)
        defaults = default_sampling_params(load_generation_config(path))
        template = ChatTemplate(loaded, chat_template)
        return cls(loaded, template, defaults, facts, seed=seed, only_checks=only_checks)

    def make_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Request:
        """The request in token ids, with everything checked that depends on the model. Raises RequestError."""
        params = self.default_sampling_params if sampling_params is None else sampling_params
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params must be SamplingParams, got {show(params)}", "sampling_params")
        given_id = f"auto-{next(self._ids)}" if request_id is None else request_id
        for name, value, kind in (
            ("request_id", given_id, str), ("cache_salt", cache_salt, str), ("priority", priority, int),
        ):  # fmt: skip
            if not isinstance(value, kind):
                raise RequestError(f"{name} must be of type {kind.__name__}, got {show(value)}", name)
        prompt_ids = self.prompt_ids(prompt)
        self.check_ids(params.stop_token_ids, "stop_token_ids")
        self.check_ids(params.allowed_token_ids or (), "allowed_token_ids")
        self.check_ids([token_id for token_id, _ in params.logit_bias], "logit_bias")
        if params.structured_outputs is not None:
            self.grammars.compile(params.structured_outputs)
        if self._facts.rope_depends_on_length:
            cache_salt = f"{cache_salt}/{len(prompt_ids)}"  # keys are rotated by an angle that depends on the length
        return Request(
            request_id=given_id,
            prompt_token_ids=prompt_ids,
            params=params,
            seed=self._seeds.getrandbits(48) if params.seed is None else params.seed,
            eos_token_ids=self.tokenizer.eos_token_ids,
            bad_words_ids=self.tokenizer.bad_word_ids(params.bad_words),
            priority=priority,
            cache_salt=cache_salt,
            arrival_time=time.monotonic(),
        )

    def render_chat(self, messages: Sequence[Message], **template_options: Any) -> ChatPrompt:
        """A conversation as a prompt; options as in `kvik.text.chat.ChatTemplate.render`."""
        text, token_ids = self.chat_template.encode(messages, **template_options)
        return ChatPrompt(text, tuple(token_ids), bool(template_options.get("continue_final_message")))

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The token ids of a prompt. Raises RequestError for an empty text and for ids outside the vocabulary."""
        if isinstance(prompt, str):
            ids = tuple(self.tokenizer.encode(prompt))
            if not ids:
                raise RequestError("the prompt is empty and this model has no beginning-of-sequence token", "prompt")
            return ids
        given = prompt.token_ids if isinstance(prompt, ChatPrompt) else prompt
        try:
            walked = None if isinstance(given, (Mapping, bytes, bytearray)) else tuple(given)
        except TypeError:  # a number, or a tensor without dimensions
            walked = None
        if walked is None or not {int}.issuperset(map(type, walked)):
            raise RequestError(f"a prompt is a string or a list of token ids (integers), not {show(given)}", "prompt")
        self.check_ids(walked, "prompt")
        return walked

    def check_ids(self, token_ids: Sequence[int], param: str) -> None:
        """Raise RequestError, naming `param`, unless every id is in the vocabulary."""
        vocab_size = self._facts.vocab_size
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            bad = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
            raise RequestError(f"{param}: token id {bad} is outside the vocabulary 0..{vocab_size - 1}", param)


_NOT_FOLLOWED = (
    "bad_words_ids", "begin_suppress_tokens", "epsilon_cutoff", "eta_cutoff", "forced_eos_token_id", "max_new_tokens",
    "no_repeat_ngram_size", "num_beams", "sequence_bias", "stop_strings", "suppress_tokens", "typical_p",
)  # fmt: skip
"""What in a generation_config.json changes texts, and is left to requests here."""


def default_sampling_params(generation_config: Mapping[str, Any]) -> SamplingParams:
    """What a model's authors recommend in generation_config.json; Kvik's own defaults where they say nothing.

    A value that no request could ask for is left out with a warning: it must not keep the model from starting.
    """
    given: dict[str, Any] = {}
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        value = generation_config.get(name)
        if name == "top_k" and isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None or (generation_config.get("do_sample") is False and name != "repetition_penalty"):
            continue
        try:
            SamplingParams(**{name: value})
        except RequestError as error:
            logger.warning("generation_config.json is not followed where %s", error)
        else:
            given[name] = value
    if generation_config.get("do_sample") is False:
        given["temperature"] = 0.0
    if left := [name for name in _NOT_FOLLOWED if generation_config.get(name) not in (None, 0, 1, [], {})]:
        logger.warning("generation_config.json is not followed where it sets %s", ", ".join(left))
    return SamplingParams(**given)
