"""EngineConfig, SchedulerConfig and parse_bytes: validation of everything a user can write."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest

from kvik.config import EngineConfig, SchedulerConfig, parse_bytes
from kvik.errors import ConfigError

NAN, INF, HUGE = float("nan"), float("inf"), 10**400
COUNTS: dict[str, int] = {
    "max_model_len": 2,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "kv_cache_memory": 1,
    "num_kvcache_blocks": 1,
    "run_ahead": 0,
    "threads": 1,
    "kvcache_block_size": 16,
}
CHOICES: dict[str, str] = {
    "dtype": "bfloat16",
    "load_format": "safetensors",
    "attention_backend": "reference",
    "scheduling_policy": "sjf",
}


def _refuse(**options: Any) -> str:
    """The message for these options, which must be a ConfigError that names the first field."""
    with pytest.raises(ConfigError) as caught:
        EngineConfig("demo", **options)
    assert next(iter(options)) in str(caught.value)
    return str(caught.value)


# Sizes


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("1k", 1000),
        ("1K", 1000),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("512MiB", 512 * 2**20),
        ("512 MiB", 512 * 2**20),
        ("2G", 2 * 10**9),
        ("2GB", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        (" 3 gib ", 3 * 2**30),
        ("0.5MiB", 2**19),
        ("7 B", 7),
    ],
)
def test_a_size_is_bytes_or_a_number_with_a_unit(text: int | str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "x",
        "-5",
        "1e9",
        "GiB",
        "1.5.5G",
        "1,5GiB",
        "5 X",
        "5 TiBs",
        "1 5",
        "0x10",
        "²",
        "٣",
        True,
        False,
        None,
        [],
        NAN,
        INF,
        b"5",
    ],
    ids=repr,
)
def test_anything_else_is_no_size_and_the_message_shows_how_to_write_one(text: Any) -> None:
    with pytest.raises(ConfigError, match="GiB"):
        parse_bytes(text)


def test_a_size_too_large_for_a_float_is_refused_or_exact() -> None:
    with contextlib.suppress(ConfigError):
        assert parse_bytes("9" * 400) == int("9" * 400)


@pytest.mark.parametrize("digits", ["9007199254740993", "123456789012345678"])
def test_whole_bytes_are_exact(digits: str) -> None:
    assert parse_bytes(digits) == int(digits)


def test_a_fraction_of_a_byte_is_no_memory_size() -> None:
    for value in (1.5, 0.5, "0.5"):
        _refuse(kv_cache_memory=value)


# Options


def test_the_defaults_are_those_of_the_documentation() -> None:
    config = EngineConfig("demo")
    assert (config.device, config.dtype, config.load_format, config.scheduling_policy) == (
        "auto",
        "auto",
        "auto",
        "fcfs",
    )
    assert (config.gpu_memory_utilization, config.enable_prefix_caching, config.enforce_eager) == (0.9, True, False)
    assert (config.tensor_parallel_size, config.seed) == (1, None)
    assert all(getattr(config, name) is None for name in COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_takes_none_its_lowest_value_and_more(name: str) -> None:
    for value in (None, COUNTS[name], COUNTS[name] * 2):
        assert getattr(EngineConfig("demo", **{name: value}), name) == value


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [1.5, 64.0, True, False, NAN, INF, [64], -2, -HUGE], ids=lambda v: repr(v)[:8])
def test_a_count_refuses_anything_but_an_integer_in_range(name: str, value: Any) -> None:
    if name == "kv_cache_memory" and value == 64.0:
        pytest.skip("a whole number of bytes")
    with pytest.raises(ConfigError):
        EngineConfig("demo", **{name: value})


@pytest.mark.parametrize("name", sorted(set(COUNTS) - {"kv_cache_memory"}))
def test_a_count_just_below_its_range_is_refused_with_the_limit(name: str) -> None:
    message = _refuse(**{name: COUNTS[name] - 1})
    assert str(COUNTS[name]) in message and str(COUNTS[name] - 1) in message


def test_minus_one_block_means_automatic() -> None:
    assert EngineConfig("demo", num_kvcache_blocks=-1).num_kvcache_blocks is None
    _refuse(num_kvcache_blocks=-1.0)


@pytest.mark.parametrize("value", [1, 8, 17, 100])
def test_a_block_size_is_a_multiple_of_sixteen(value: int) -> None:
    assert str(value) in _refuse(kvcache_block_size=value)


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_takes_what_it_lists_and_an_error_lists_all_of_it(name: str) -> None:
    assert getattr(EngineConfig("demo", **{name: CHOICES[name]}), name) == CHOICES[name]
    message = _refuse(**{name: "nope"})
    choices = next(f.metadata["choices"] for f in dataclasses.fields(EngineConfig) if f.name == name)
    assert "nope" in message and all(choice in message for choice in choices)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", [None, 5, True, ["auto"], "AUTO", "", NAN], ids=repr)
def test_a_choice_refuses_anything_else(name: str, value: Any) -> None:
    _refuse(**{name: value})


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:15"])
def test_a_device_is_a_name_with_an_optional_index(device: str) -> None:
    assert EngineConfig("demo", device=device).device == device


@pytest.mark.parametrize(
    "device", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "CPU", "cpu\n", "cuda:\u0661", 0, None, True, NAN]
)
def test_any_other_device_is_refused(device: Any) -> None:
    _refuse(device=device)


@pytest.mark.parametrize("value", [1e-6, 0.5, 1.0, 1])
def test_a_memory_share_is_a_number_above_zero_up_to_one(value: float) -> None:
    assert EngineConfig("demo", gpu_memory_utilization=value).gpu_memory_utilization == value


@pytest.mark.parametrize(
    "value", [0, 0.0, -0.1, 1.01, 90, NAN, INF, True, False, "0.9", None, [0.9], HUGE], ids=lambda v: repr(v)[:8]
)
def test_any_other_memory_share_is_refused(value: Any) -> None:
    _refuse(gpu_memory_utilization=value)


@pytest.mark.parametrize("name", ["enable_prefix_caching", "enforce_eager"])
@pytest.mark.parametrize("value", ["false", "no", 0, 1, None, NAN], ids=repr)
def test_a_switch_refuses_anything_but_true_and_false(name: str, value: Any) -> None:
    """ "false" is a string that is true: taking it would do the opposite of what was asked for."""
    _refuse(**{name: value})


@pytest.mark.parametrize("name", ["tokenizer", "revision"])
@pytest.mark.parametrize("value", [5, True, "", ["x"]], ids=repr)
def test_a_name_refuses_anything_but_text(name: str, value: Any) -> None:
    _refuse(**{name: value})


@pytest.mark.parametrize("value", [None, "", 5, True, ["demo"]], ids=repr)
def test_a_model_is_a_folder_or_an_id(value: Any) -> None:
    with pytest.raises(ConfigError, match="model"):
        EngineConfig(value)


@pytest.mark.parametrize("value", [-1, 1.0, True, NAN, "0", HUGE], ids=lambda v: repr(v)[:8])
def test_a_seed_is_an_integer_that_a_generator_takes(value: Any) -> None:
    _refuse(seed=value)


@pytest.mark.parametrize("value", [0, 2, True, 1.0, None, "1"], ids=repr)
def test_tensor_parallel_size_is_one(value: Any) -> None:
    _refuse(tensor_parallel_size=value)


def test_a_memory_size_may_be_text() -> None:
    assert EngineConfig("demo", kv_cache_memory="1.5GiB").kv_cache_memory == 3 * 2**29
    for value in ("0", 0, -1, "lots", True):
        with pytest.raises(ConfigError):
            EngineConfig("demo", kv_cache_memory=value)


# Names


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        ("model_path", "model", "x"),
        ("max_seq_len", "max_model_len", 64),
        ("max_batch_size", "max_num_seqs", 4),
        ("block_size", "kvcache_block_size", 32),
    ],
)
def test_aliases_are_translated_and_refused_beside_their_field(alias: str, name: str, value: Any) -> None:
    base = {} if name == "model" else {"model": "demo"}
    assert getattr(EngineConfig(**{**base, alias: value}), name) == value
    for options in ({alias: value, name: value}, {name: value, alias: value}):
        with pytest.raises(ConfigError, match="only one"):
            EngineConfig(**{**base, **options})


def test_an_alias_beside_a_field_given_by_position_is_refused() -> None:
    with pytest.raises((ConfigError, TypeError), match="model"):
        EngineConfig("demo", model_path="other")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("max_modellen", "max_model_len"),
        ("max_num_seq", "max_num_seqs"),
        ("divice", "device"),
        ("max_seq_length", "max_seq_len"),
        ("enforce_eagar", "enforce_eager"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_name(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{right}'"):
        EngineConfig("demo", **{wrong: 1})


@pytest.mark.parametrize(
    ("name", "hint"), [("trust_remote_code", "never runs code"), ("gpu_ids", "cuda:1"), ("cuda_id", "cuda:1")]
)
def test_options_of_other_engines_are_refused_with_what_to_use_instead(name: str, hint: str) -> None:
    for value in (True, False, None):
        assert hint in _refuse(**{name: value})


# The record


def test_a_config_is_frozen_comparable_and_replaceable() -> None:
    config = EngineConfig("demo", max_num_seqs=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_num_seqs = 5  # type: ignore[misc]
    assert config == EngineConfig(model="demo", max_batch_size=4)
    assert dataclasses.replace(config, seed=3).max_num_seqs == 4
    with pytest.raises(ConfigError):
        dataclasses.replace(config, device="gpu")


def test_every_option_has_a_help_text_and_a_default_among_its_choices() -> None:
    for f in dataclasses.fields(EngineConfig):
        assert f.metadata["help"]
        assert not f.metadata["choices"] or f.default is None or f.default in f.metadata["choices"]


# SchedulerConfig

SCHEDULER: dict[str, Any] = {
    "block_size": 16,
    "num_blocks": 8,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 4,
    "max_model_len": 64,
}


def test_the_budget_must_hold_one_token_of_every_sequence() -> None:
    assert SchedulerConfig(**SCHEDULER).max_num_batched_tokens == 4
    with pytest.raises(ConfigError) as caught:
        SchedulerConfig(**{**SCHEDULER, "max_num_batched_tokens": 3})
    assert "3" in str(caught.value) and "4" in str(caught.value)
