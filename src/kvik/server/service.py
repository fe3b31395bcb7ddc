"""What the routes of one HTTP process share: the model's front half, the engine, names, limits, state of life."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from starlette.requests import Request

from kvik.config import EngineConfig
from kvik.core.request import Request as EngineRequest
from kvik.openai_format import blaming
from kvik.outputs import RequestOutput
from kvik.sampling_params import SamplingParams
from kvik.server.engine_client import EngineClient, Generation
from kvik.server.errors import ApiError, failure_of, not_found, unavailable
from kvik.server.messages import Ready, Status
from kvik.server.metrics import Metrics
from kvik.server.process import ChildSettings
from kvik.server.reply_syntax import ModelSyntax
from kvik.server.streaming import while_connected
from kvik.text.frontend import Frontend, ModelFacts, Prompt
from kvik.text.output_processor import OpenRequest, OutputProcessor

__all__ = ["Service", "gather"]

T = TypeVar("T")

INLINE_SIZE = 4096
"""Texts shorter than this (characters) are tokenised at once, longer ones in a thread."""


class Service:
    """State of one HTTP process. `frontend` and `client` refuse to be used before the model is there."""

    def __init__(self, settings: ChildSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.config = settings.server
        self.metrics = metrics
        self.created = int(time.time())
        self.draining = False
        self.syntax = ModelSyntax()
        self._client: EngineClient | None = None
        self._frontend: Frontend | None = None
        self._defaults = SamplingParams()

    async def start(self) -> None:
        """Wait for the engine and load the front half. Raises ApiError or ModelLoadError where that fails."""
        share = self.config.num_http
        self._client = EngineClient(
            self.settings.endpoint,
            max_queued_requests=-(-self.config.max_queued_requests // share),
            max_queued_tokens=-(-self.config.max_queued_tokens // share),
        )
        self._client.on_finished = self.metrics.finished
        ready = await self._client.wait_ready()
        frontend = await asyncio.to_thread(_load_frontend, self.settings.engine, ready)
        self._defaults = frontend.default_sampling_params
        self.syntax = ModelSyntax.detect(frontend.chat_template.sources, self.config)
        self._client.attach(OutputProcessor(frontend.tokenizer))
        self._frontend = frontend
        gc.collect()
        gc.freeze()  # tokeniser and routes stay: a collection that walks them holds up every stream

    # State

    @property
    def client(self) -> EngineClient:
        if self._client is None:
            raise unavailable("the server is starting", "loading")
        return self._client

    @property
    def frontend(self) -> Frontend:
        if self._frontend is None:
            raise unavailable("the model is loading; try again soon", "loading")
        return self._frontend

    @property
    def ready(self) -> Ready:
        """What the engine said of itself."""
        ready = self.client.ready
        if ready is None:
            raise unavailable("the model is loading; try again soon", "loading")
        return ready

    @property
    def status(self) -> Status | None:
        """The engine's last sign of life, if there was one."""
        return None if self._client is None else self._client.status

    @property
    def defaults(self) -> SamplingParams:
        """What the model's authors recommend."""
        return self._defaults

    @property
    def overrides(self) -> Mapping[str, Any]:
        """Sampling defaults of the operator: they win over the model's, a request's own values win over them."""
        return self.settings.overrides

    @property
    def model_name(self) -> str:
        return self.settings.model_names[0]

    def not_ready(self) -> ApiError | None:
        """Why requests cannot be answered now, or None."""
        if self._client is not None and self._client.failure is not None:
            return self._client.failure
        if self.draining:
            return unavailable("the server is shutting down", "shutting_down")
        if self._client is None or self._frontend is None:
            return unavailable("the model is loading; try again soon", "loading")
        if self._client.silence > self.config.stall_timeout:
            return unavailable(f"the engine has given no sign for {self._client.silence:.0f} s", "engine_stalled")
        return None

    def check_model(self, name: str | None) -> str:
        """The name that a response carries. Raises ApiError (404) for another model's."""
        if name is None:
            return self.model_name
        if name not in self.settings.model_names:
            served = ", ".join(self.settings.model_names)
            raise not_found(f"there is no model {name!r} here; this server has {served}", "model_not_found")
        return name

    @property
    def not_started(self) -> bool:
        """Whether the model has not been there yet."""
        return self._frontend is None

    @property
    def num_open(self) -> int:
        """Requests that are not finished."""
        return 0 if self._client is None else self._client.num_open

    def shut_down(self) -> None:
        """End what is open because the server ends."""
        self.draining = True
        if self._client is not None:
            self._client.shut_down()

    def fail(self, error: ApiError) -> None:
        """End what is open with `error`, and refuse everything from now on."""
        self.draining = True
        if self._client is not None:
            self._client.fail(error)

    # Work

    async def run(self, work: Callable[[], T], size: int) -> T:
        """The result of `work`, which takes time in proportion to `size`, without stopping the event loop."""
        return work() if size < INLINE_SIZE else await asyncio.to_thread(work)

    async def generate(
        self,
        http: Request,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        call_id: str,
        stream: bool,
        priority: int = 0,
        cache_salt: str = "",
        pooling: str | None = None,
        names: Mapping[str, str] = MappingProxyType({}),
    ) -> Generation:
        """Start generating for `prompts`; with `pooling` embed them as well. Raises ApiError or RequestError.

        `names` are those of `blaming`.
        """
        self.frontend  # noqa: B018  refuses while the model is loading
        if self.draining:
            raise unavailable("the server is shutting down", "shutting_down")
        salt = "/".join(part for part in (http.state.salt, cache_salt) if part)
        ids = (call_id if len(prompts) == 1 else f"{call_id}-{place}" for place in itertools.count())

        def make() -> list[EngineRequest]:
            options: dict[str, Any] = {"priority": priority, "cache_salt": salt}
            made = [self.frontend.make_request(prompt, params, request_id=next(ids), **options) for prompt in prompts]
            return made if pooling is None else [dataclasses.replace(request, pooling=pooling) for request in made]

        size = sum(len(prompt) for prompt in prompts if isinstance(prompt, str)) + sum(map(len, params.bad_words))
        with blaming(names):
            requests = await self.run(make, size if params.structured_outputs is None else max(size, INLINE_SIZE))
            return self.client.open(
                requests,
                prompts,
                stream=stream,
                deadline=self.config.request_timeout,
            )


async def gather(generation: Generation, http: Request) -> list[RequestOutput]:
    """The finished outputs of a generation in the order of its prompts. A client that leaves ends it.

    Raises ApiError where the engine ended a request early, ClientDisconnect where the client did.
    """
    try:
        return await while_connected(_collect(generation), http.receive)
    finally:
        generation.close()


async def _collect(generation: Generation) -> list[RequestOutput]:
    found: dict[int, OpenRequest] = {}
    while True:
        found.update(await generation.changes())
        if generation.done:
            break
    for request in found.values():
        error = failure_of(request)
        if error is not None:
            raise error
    return [found[place].output() for place in sorted(found)]


def _load_frontend(config: EngineConfig, ready: Ready) -> Frontend:
    return Frontend.from_folder(
        Path(config.model),
        ModelFacts(ready.vocab_size, ready.rope_depends_on_length),
        tokenizer=config.tokenizer,
        chat_template=config.chat_template,
        dummy=config.load_format == "dummy",
        seed=uuid.uuid4().int,
        only_checks=True,
    )
