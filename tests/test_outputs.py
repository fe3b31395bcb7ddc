"""Outputs: attributes and mapping keys of RequestOutput say the same, and reasons compare with their strings."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from kvik.outputs import (
    CompletionOutput,
    FinishReason,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
    Usage,
)


def _completion(index: int = 0, **changes: Any) -> CompletionOutput:
    return CompletionOutput(**{"index": index, "text": f"text {index}", "token_ids": (index, 1), **changes})


def _output(**changes: Any) -> RequestOutput:
    options: dict[str, Any] = {
        "request_id": "r",
        "prompt": "hello",
        "prompt_token_ids": (1, 2),
        "outputs": (_completion(),),
        "usage": Usage(prompt_tokens=2, completion_tokens=2),
    }
    return RequestOutput(**{**options, **changes})


ALL_KEYS = {
    "request_id",
    "prompt",
    "prompt_token_ids",
    "outputs",
    "usage",
    "deltas",
    "prompt_logprobs",
    "metrics",
    "text",
    "delta",
    "tokens",
    "token_ids",
    "finished",
    "finish_reason",
    "stop_reason",
    "logprobs",
    "error",
}


def test_dict_of_an_output_holds_every_public_name_once() -> None:
    output = _output()
    assert set(dict(output)) >= ALL_KEYS
    assert len(output.keys()) == len(set(output.keys()))
    public = {name for name in dir(output) if not name.startswith("_") and not callable(getattr(output, name))}
    assert public == set(output.keys())


@pytest.mark.parametrize("key", sorted(ALL_KEYS))
def test_a_key_and_the_attribute_of_that_name_are_equal(key: str) -> None:
    output = _output(deltas=("new",))
    assert output[key] == getattr(output, key) == dict(output)[key]


@pytest.mark.parametrize("key", ["nope", "keys", "__class__", "_x", "", 0, -1, None])
def test_an_unknown_key_is_a_key_error_that_lists_the_known_ones(key: Any) -> None:
    with pytest.raises(KeyError) as caught:
        _output()[key]
    assert "finish_reason" in str(caught.value)


def test_an_output_unpacks_like_a_mapping() -> None:
    assert {**_output()}["text"] == "text 0"


def test_membership_asks_for_keys() -> None:
    output = _output()
    assert "text" in output
    assert "nope" not in output


def test_iterating_an_output_yields_its_keys_like_any_mapping() -> None:
    assert list(_output()) == list(_output().keys())  # type: ignore[call-overload]


def test_the_shortcuts_are_those_of_the_first_completion() -> None:
    logprobs = (TokenLogprobs(5, -0.5, 1),)
    first = _completion(0, finish_reason=FinishReason.STOP, stop_reason="END", logprobs=logprobs, error="e")
    output = _output(outputs=(first, _completion(1)), deltas=("a", "b"))
    assert (output.text, output.token_ids, output.tokens) == (first.text, first.token_ids, first.token_ids)
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, "END")
    assert (output.logprobs, output.error, output.delta) == (logprobs, "e", "a")


def test_a_request_is_finished_when_all_its_completions_are() -> None:
    done, open_ = _completion(0, finish_reason=FinishReason.LENGTH), _completion(1)
    assert not _output(outputs=(done, open_)).finished
    assert not _output(outputs=(open_,)).finished
    assert _output(outputs=(done, _completion(1, finish_reason=FinishReason.ABORT))).finished


def test_an_output_without_news_has_an_empty_delta() -> None:
    assert _output().delta == ""


@pytest.mark.parametrize("reason", list(FinishReason))
def test_a_finish_reason_is_its_string_everywhere(reason: FinishReason) -> None:
    assert reason == reason.value == str(reason) == f"{reason}"
    assert json.dumps({"finish_reason": reason}) == f'{{"finish_reason": "{reason.value}"}}'
    assert FinishReason(reason.value) is reason


def test_the_finish_reasons_are_the_documented_ones() -> None:
    assert {str(reason) for reason in FinishReason} == {"stop", "length", "abort", "error", "timeout", "shutdown"}


def test_total_tokens_are_prompt_and_completion() -> None:
    assert Usage(prompt_tokens=3, completion_tokens=4, cached_tokens=2).total_tokens == 7


@pytest.mark.parametrize(
    "record",
    [
        _output(),
        _completion(),
        Usage(prompt_tokens=1, completion_tokens=1),
        RequestMetrics(),
    ],
    ids=lambda record: type(record).__name__,
)
def test_records_are_frozen_given_by_name_and_json_serialisable(record: Any) -> None:
    field = dataclasses.fields(record)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, field, None)
    with pytest.raises(TypeError):
        type(record)("positional")
    assert json.loads(json.dumps(dataclasses.asdict(record)))[field] == getattr(record, field)
