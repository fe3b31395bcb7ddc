"""What a model's authors recommend."""

from __future__ import annotations

import pytest

from kvik import SamplingParams
from kvik.text.frontend import default_sampling_params


def test_what_is_recommended_is_followed_or_named(caplog: pytest.LogCaptureFixture) -> None:
    given = {"do_sample": True, "temperature": 0.6, "top_k": 20.0, "num_beams": 1, "no_repeat_ngram_size": 0}
    assert default_sampling_params(given) == SamplingParams(temperature=0.6, top_k=20)
    assert not caplog.records
    more = {**given, "top_p": 7, "suppress_tokens": [1], "num_beams": 4}
    assert default_sampling_params(more) == SamplingParams(temperature=0.6, top_k=20)
    assert [record.getMessage().partition("followed where ")[2] for record in caplog.records] == [
        "top_p must be a number in (0, 1], got 7",
        "it sets num_beams, suppress_tokens",
    ]


def test_without_sampling_the_likeliest_token_is_taken() -> None:
    given = {"do_sample": False, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    assert default_sampling_params(given) == SamplingParams(temperature=0, repetition_penalty=1.1)
