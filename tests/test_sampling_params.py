"""SamplingParams: every field is checked, nothing is accepted and ignored, every error names its field."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest

from kvik.config import EngineConfig
from kvik.errors import KvikError, RequestError
from kvik.sampling_params import MAX_LOGPROBS, MAX_SEED, MAX_STOP_STRINGS, SamplingParams
from kvik.server_config import ServerConfig

NAN, INF, HUGE = float("nan"), float("inf"), 10**400

# field: (lowest, highest), None where it may be None
INTEGERS: dict[str, tuple[int, int]] = {
    "max_tokens": (1, 2**31 - 1),
    "top_k": (0, 2**31 - 1),
    "n": (1, 1024),
    "min_tokens": (0, 64),
    "seed": (0, MAX_SEED),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (1e-9, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-9, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
BOOLEANS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "echo")
OPTIONAL = ("max_tokens", "seed", "logprobs", "prompt_logprobs")


@pytest.mark.parametrize("options", [SamplingParams, EngineConfig, ServerConfig])
def test_defaults_need_no_check(options: type[Any]) -> None:
    """Because they get none."""
    for field in dataclasses.fields(options):
        if field.default not in (dataclasses.MISSING, None) and field.metadata["parse"] is not None:
            parsed = field.metadata["parse"](field.default)
            assert (parsed, type(parsed)) == (field.default, type(field.default)), field.name


def _refuse(**options: Any) -> RequestError:
    """The error for these options, which must be a RequestError that names the first field."""
    with pytest.raises(RequestError) as caught:
        SamplingParams(**options)
    name = next(iter(options))
    assert caught.value.param == name, f"param is {caught.value.param!r}"
    assert name in str(caught.value)
    return caught.value


def test_the_defaults_are_those_of_the_documentation() -> None:
    params = SamplingParams()
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p, params.min_p) == (64, 1.0, 0, 1.0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (params.seed, params.n, params.stop, params.stop_token_ids, params.min_tokens) == (None, 1, (), (), 0)
    assert (params.logit_bias, params.allowed_token_ids, params.bad_words) == ((), None, ())
    assert (params.logprobs, params.prompt_logprobs, params.logits_processors) == (None, None, ())
    assert [getattr(params, name) for name in BOOLEANS] == [False, False, True, False]


# Numbers


@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_field_takes_both_ends_of_its_range(name: str) -> None:
    for value in INTEGERS[name]:
        assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [1.0, 1.5, True, False, "1", NAN, INF, [1], HUGE, -HUGE], ids=lambda v: repr(v)[:8])
def test_an_integer_field_refuses_anything_but_an_integer_in_range(name: str, value: Any) -> None:
    _refuse(**{name: value})


@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_field_refuses_what_is_just_outside_and_says_the_limits(name: str) -> None:
    low, high = INTEGERS[name]
    below = -2 if name == "top_k" else low - 1
    assert str(below) in str(_refuse(**{name: below}))
    message = str(_refuse(**{name: high + 1}))
    assert str(high) in message and str(high + 1) in message


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_field_takes_both_ends_of_its_range_and_integers(name: str) -> None:
    low, high = NUMBERS[name]
    for value in (low, high, int(high)):
        assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", [NAN, INF, -INF, True, False, "0.5", None, [0.5], 0.5j, HUGE, -HUGE], ids=lambda v: repr(v)[:8]
)
def test_a_number_field_refuses_anything_but_a_finite_number_in_range(name: str, value: Any) -> None:
    _refuse(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_field_refuses_what_is_just_outside_and_says_the_limits(name: str) -> None:
    low, high = NUMBERS[name]
    assert f"{high:g}" in str(_refuse(**{name: high + 0.001}))
    _refuse(**{name: low - 0.001})


@pytest.mark.parametrize("name", ["top_p", "repetition_penalty"])
def test_zero_is_outside_where_it_makes_no_sense(name: str) -> None:
    assert "(0, " in str(_refuse(**{name: 0}))
    _refuse(**{name: 0.0})


@pytest.mark.parametrize("name", sorted({*INTEGERS, *NUMBERS} - set(OPTIONAL)))
def test_only_optional_fields_take_none(name: str) -> None:
    _refuse(**{name: None})


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_fields_take_none(name: str) -> None:
    assert getattr(SamplingParams(**{name: None}), name) is None


@pytest.mark.parametrize("name", BOOLEANS)
def test_a_switch_takes_true_and_false(name: str) -> None:
    for value in (True, False):
        assert getattr(SamplingParams(**{name: value}), name) is value


@pytest.mark.parametrize("name", BOOLEANS)
@pytest.mark.parametrize("value", ["false", "no", 0, 1, 2, None, NAN, []], ids=repr)
def test_a_switch_refuses_anything_but_true_and_false(name: str, value: Any) -> None:
    """ "false" is a string that is true: taking it would do the opposite of what was asked for."""
    _refuse(**{name: value})


def test_top_k_minus_one_means_off_like_zero() -> None:
    assert SamplingParams(top_k=-1).top_k == 0
    _refuse(top_k=-1.0)


def test_an_integer_with_thousands_of_digits_is_refused_like_any_other() -> None:
    _refuse(max_tokens=10**5000)
    _refuse(temperature=10**5000)


def test_min_tokens_beyond_max_tokens_is_refused_with_both_numbers() -> None:
    message = str(_refuse(min_tokens=11, max_tokens=10))
    assert "11" in message and "10" in message
    assert SamplingParams(min_tokens=10, max_tokens=10).min_tokens == 10
    assert SamplingParams(min_tokens=10**6, max_tokens=None).min_tokens == 10**6


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (0.0, True), (-0.0, True), (1e-6, False), (1, False)])
def test_temperature_zero_and_nothing_else_is_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


# Lists


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_texts_may_be_one_string_or_several(name: str) -> None:
    assert getattr(SamplingParams(**{name: "END"}), name) == ("END",)
    assert getattr(SamplingParams(**{name: ["a", "b"]}), name) == ("a", "b")
    assert getattr(SamplingParams(**{name: []}), name) == ()


@pytest.mark.parametrize("name", ["stop", "bad_words"])
@pytest.mark.parametrize("value", ["", ["a", ""], [1], [None], b"x", [b"x"], 5, 0, False, True, 1.5], ids=repr)
def test_texts_refuse_empty_strings_and_anything_that_is_no_string(name: str, value: Any) -> None:
    _refuse(**{name: value})


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_texts_refuse_half_a_surrogate_pair_which_no_text_can_hold(name: str) -> None:
    assert "half a surrogate pair" in str(_refuse(**{name: ["a", "b\ud83d"]}))


def test_more_stop_strings_than_allowed_are_refused_with_both_numbers() -> None:
    texts = [str(i) for i in range(MAX_STOP_STRINGS + 1)]
    assert len(SamplingParams(stop=texts[:-1]).stop) == MAX_STOP_STRINGS
    message = str(_refuse(stop=texts))
    assert str(MAX_STOP_STRINGS) in message and str(MAX_STOP_STRINGS + 1) in message


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids"])
@pytest.mark.parametrize("value", [[-1], [True], [1.0], ["1"], [None], "12", 5, 0, False, True, 1.5], ids=repr)
def test_token_ids_refuse_anything_but_lists_of_integers_from_zero(name: str, value: Any) -> None:
    _refuse(**{name: value})


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids"])
def test_token_ids_take_any_iterable_of_integers(name: str) -> None:
    for value in ([0, 5], (0, 5), range(0, 6, 5), iter([0, 5])):
        assert getattr(SamplingParams(**{name: value}), name) == (0, 5)


def test_no_allowed_token_at_all_is_refused() -> None:
    assert "empty" in str(_refuse(allowed_token_ids=[]))


def test_logit_bias_takes_a_mapping_pairs_and_the_string_keys_of_json() -> None:
    expected = ((3, -1.0), (7, 100.0))
    assert SamplingParams(logit_bias={7: 100, 3: -1}).logit_bias == expected
    assert SamplingParams(logit_bias={"7": 100, "3": -1}).logit_bias == expected
    assert SamplingParams(logit_bias=[(7, 100.0), (3, -1.0)]).logit_bias == expected
    assert SamplingParams(logit_bias=expected).logit_bias == expected
    assert SamplingParams(logit_bias={}).logit_bias == ()


@pytest.mark.parametrize(
    "value",
    [
        {1: NAN},
        {1: INF},
        {1: 100.5},
        {1: -100.5},
        {-1: 1.0},
        {"x": 1.0},
        {1: "x"},
        {1: None},
        {1.7: 1.0},
        {INF: 1.0},
        {NAN: 1.0},
        {True: 1.0},
        {1: True},
        {1: HUGE},
        [1, 2],
        [(1, 2, 3)],
        "ab",
        5,
        0,
        1.5,
        False,
        True,
    ],
    ids=lambda v: repr(v)[:12],
)
def test_logit_bias_refuses_anything_but_finite_biases_of_token_ids(value: Any) -> None:
    _refuse(logit_bias=value)


@pytest.mark.parametrize("value", [[(1, 2.0), (1, 3.0)], {"1": 2.0, 1: 3.0}], ids=repr)
def test_two_biases_for_one_token_are_refused(value: Any) -> None:
    _refuse(logit_bias=value)


def test_logits_processors_must_be_callables() -> None:
    def processor(token_ids: list[int], logits: Any) -> Any:
        return logits

    assert SamplingParams(logits_processors=[processor]).logits_processors == (processor,)
    for value in ([1], [processor, None], "ab", 5, 0, False):
        _refuse(logits_processors=value)


def test_a_single_logits_processor_is_taken_or_refused_but_not_a_crash() -> None:
    try:
        assert SamplingParams(logits_processors=len).logits_processors == (len,)
    except RequestError as error:
        assert error.param == "logits_processors"


# Names


def test_aliases_are_translated() -> None:
    assert SamplingParams(max_new_tokens=5).max_tokens == 5
    assert SamplingParams(stop_strings=["x"]).stop == ("x",)


@pytest.mark.parametrize(
    ("alias", "name", "value"), [("max_new_tokens", "max_tokens", 5), ("stop_strings", "stop", "x")]
)
def test_an_alias_beside_its_field_is_refused_in_either_order(alias: str, name: str, value: Any) -> None:
    for options in ({alias: value, name: value}, {name: value, alias: value}):
        with pytest.raises(RequestError, match="only one") as caught:
            SamplingParams(**options)
        assert alias in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("temprature", "temperature"),
        ("topp", "top_p"),
        ("max_token", "max_tokens"),
        ("stop_token_id", "stop_token_ids"),
        ("max_newtokens", "max_new_tokens"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_name(wrong: str, right: str) -> None:
    with pytest.raises(RequestError, match=f"did you mean '{right}'"):
        SamplingParams(**{wrong: 1})


def test_an_unknown_option_like_nothing_else_is_refused_without_a_guess() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(zzzzzz=1)
    assert "zzzzzz" in str(caught.value) and "did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", ["do_sample", "max_length", "num_beams", "best_of", "typical_p", "guided_json"])
def test_options_of_other_engines_are_refused_with_what_to_use_instead(name: str) -> None:
    with pytest.raises(RequestError, match="use ") as caught:
        SamplingParams(**{name: 1})
    assert name in str(caught.value)


def test_options_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        SamplingParams(5)  # type: ignore[misc]


# The record


def test_params_are_frozen_comparable_hashable_and_copied_by_replace() -> None:
    params = SamplingParams(temperature=0.5, stop=["x"], logit_bias={1: 2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 1.0  # type: ignore[misc]
    assert params == SamplingParams(temperature=0.5, stop="x", logit_bias={1: 2.0})
    assert hash(params) == hash(copy.copy(params))
    changed = dataclasses.replace(params, top_k=3)
    assert (changed.temperature, changed.stop, changed.top_k) == (0.5, ("x",), 3)
    with pytest.raises(RequestError):
        dataclasses.replace(params, temperature=3.0)


def test_params_survive_json() -> None:
    params = SamplingParams(
        max_tokens=None, stop=["a"], logit_bias={1: 2}, allowed_token_ids=[1], logprobs=3, seed=MAX_SEED
    )
    assert SamplingParams(**json.loads(json.dumps(dataclasses.asdict(params)))) == params


def test_every_option_has_a_help_text() -> None:
    assert all(f.metadata["help"] for f in dataclasses.fields(SamplingParams))


def test_request_errors_are_kvik_errors_and_value_errors() -> None:
    assert issubclass(RequestError, KvikError) and issubclass(RequestError, ValueError)
    assert RequestError("x").param is None
