"""Every message between an HTTP process and the engine process, as msgpack over a ZeroMQ ipc socket.

    HTTP -> engine    Hello, Add, Finish, Watch
    engine -> HTTP    Ready, Outputs, Rejected, Status, Events

Messages are plain typed records, validated when they are decoded; nothing here can carry code. Text never crosses:
requests and outputs are token ids.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from kvik.config import SchedulerConfig
from kvik.core.request import Request
from kvik.errors import RequestError
from kvik.outputs import FinishReason, SequenceOutput
from kvik.sampling_params import SamplingParams

__all__ = [
    "Add", "Events", "Finish", "FromEngine", "Hello", "Outputs", "Ready", "Rejected", "Status", "ToEngine", "Watch",
    "decode_from_engine", "decode_to_engine", "encode", "pack_outputs", "pack_request", "unpack_outputs",
    "unpack_request",
]  # fmt: skip

Tokens = tuple[str, int, tuple[int, ...], int]
"""What most sequences gain in most steps: request id, completion index, new token ids, cached prompt tokens."""


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """An HTTP process is there. The engine answers with Ready."""


class Add(msgspec.Struct, tag="add", frozen=True):
    """A request. `params` are the SamplingParams fields that differ from their defaults."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: dict[str, Any]
    seed: int
    eos_token_ids: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    cache_salt: str = ""
    arrival_time: float = 0.0
    pooling: str | None = None


class Finish(msgspec.Struct, tag="finish", frozen=True):
    """End a request, or one completion of it."""

    request_id: str
    reason: FinishReason
    index: int | None = None


class Watch(msgspec.Struct, tag="watch", frozen=True):
    """Whether anybody at this HTTP process listens to the engine's events."""

    on: bool


class Ready(msgspec.Struct, tag="ready", frozen=True, kw_only=True):
    """The engine can be used: what HTTP processes must know of it, and what they only tell.

    A second one says that the engine had given the process up, and has ended its requests.
    """

    scheduler: SchedulerConfig
    vocab_size: int
    hidden_size: int
    rope_depends_on_length: bool = False
    dtype: str = ""
    device: str = ""
    ledger: str = ""
    memory: str = ""
    fingerprint: str = ""


class Outputs(msgspec.Struct, tag="outputs", frozen=True, omit_defaults=True):
    """What one step gave: `tokens` where that is all, `full` where there is more. `tokens` come first."""

    tokens: list[Tokens] = []
    full: list[SequenceOutput] = []


class Rejected(msgspec.Struct, tag="rejected", frozen=True):
    """The engine did not take a request."""

    request_id: str
    message: str
    param: str | None = None
    code: str | None = None


class Status(msgspec.Struct, tag="status", frozen=True):
    """A sign of life, sent every half second or after a step that took longer, and totals since start."""

    num_running: int
    num_waiting: int
    num_blocks_used: int
    num_blocks: int
    num_steps: int
    num_prefill_tokens: int
    num_decode_tokens: int
    prefill_time: float
    decode_time: float
    host_time: float


class Events(msgspec.Struct, tag="events", frozen=True):
    """Records for whoever watches, each one a JSON text; see `kvik.server.events`. A snapshot comes alone, `first`."""

    records: list[str]
    first: bool = False


ToEngine = Hello | Add | Finish | Watch
FromEngine = Ready | Outputs | Rejected | Status | Events

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)
encode = _encoder.encode
decode_to_engine = _to_engine.decode
decode_from_engine = _from_engine.decode

_PARAMS = {f.name: f.default for f in dataclasses.fields(SamplingParams)}


def pack_request(request: Request) -> Add:
    """A request as a message. Raises RequestError for logits processors: they are code, which never crosses."""
    if request.params.logits_processors:
        raise RequestError("logits_processors are Python code and work offline only", "logits_processors")
    params = {name: getattr(request.params, name) for name, default in _PARAMS.items()}
    return Add(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        params={name: value for name, value in params.items() if value != _PARAMS[name]},
        seed=request.seed,
        eos_token_ids=request.eos_token_ids,
        bad_words_ids=request.bad_words_ids,
        priority=request.priority,
        cache_salt=request.cache_salt,
        arrival_time=request.arrival_time,
        pooling=request.pooling,
    )


def unpack_request(message: Add) -> Request:
    """The request of a message; its parameters are checked once more. Raises RequestError."""
    return Request(
        request_id=message.request_id,
        prompt_token_ids=message.prompt_token_ids,
        params=SamplingParams(**message.params),
        seed=message.seed,
        eos_token_ids=message.eos_token_ids,
        bad_words_ids=message.bad_words_ids,
        priority=message.priority,
        cache_salt=message.cache_salt,
        arrival_time=message.arrival_time,
        pooling=message.pooling,
    )


def pack_outputs(outputs: list[SequenceOutput]) -> Outputs:
    """The outputs of a step for one HTTP process."""
    message = Outputs([], [])
    for output in outputs:
        if output.finish_reason is None and not output.logprobs and not output.prompt_logprobs:
            message.tokens.append((output.request_id, output.index, output.new_token_ids, output.num_cached_tokens))
        else:
            message.full.append(output)
    return message


def unpack_outputs(message: Outputs) -> list[SequenceOutput]:
    """The outputs of a message. A sequence's last output is always full, so its order is kept."""
    plain = [
        SequenceOutput(request_id=request_id, index=index, new_token_ids=new, num_cached_tokens=cached)
        for request_id, index, new, cached in message.tokens
    ]
    return plain + message.full
