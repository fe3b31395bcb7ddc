"""Layers and origins of options, for every type of field."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from kvik.config import EngineConfig
from kvik.errors import ConfigError
from kvik.sampling_params import SamplingParams
from kvik.settings import ENGINE, SAMPLING, Option, Setting, Table, load_settings

TABLES = {"engine": ENGINE, "sampling": SAMPLING}


def engine(environ: dict[str, str] | None = None, file: Path | None = None, **flags: Any) -> EngineConfig:
    layer = {("engine", name): Setting(value, f"--{name}") for name, value in {"model": "m", **flags}.items()}
    return load_settings(layer, environ or {}, None if file is None else str(file))[0].make()


def sampling(environ: dict[str, str]) -> SamplingParams:
    return load_settings({}, environ)[1].make()


def test_every_field_of_text_form_has_an_option() -> None:
    assert list(ENGINE.options) == [f.name for f in dataclasses.fields(EngineConfig)]
    left_out = {f.name for f in dataclasses.fields(SamplingParams)} - set(SAMPLING.options)
    assert left_out == {"logits_processors", "structured_outputs"}
    flags = [option.flag for table in TABLES.values() for option in table.options.values()]
    assert len(set(flags)) == len(flags)
    assert SAMPLING.options["seed"].flag == "--seed" and ENGINE.options["seed"].flag == "--engine-seed"


def test_layers_win_in_order(tmp_path: Path) -> None:
    file = tmp_path / "kvik.yaml"
    file.write_text("max_num_seqs: 2\nmax_model_len: 20\nthreads: 3\nsampling:\n  temperature: 0.5\n  top_k: 3\n")
    environ = {"KVIK_MAX_NUM_SEQS": "4", "KVIK_THREADS": "5", "KVIK_SAMPLING_TOP_K": "7", "PATH": "x"}
    flags = {("engine", "threads"): Setting(6, "--threads"), ("engine", "model"): Setting("m", "MODEL")}
    settings, sampled = load_settings(flags, environ, str(file))
    config = settings.make()
    assert (config.max_num_seqs, config.max_model_len, config.threads, config.dtype) == (4, 20, 6, "auto")
    rows = {name: (value, origin) for name, value, origin in settings.rows()}
    assert rows["max_num_seqs"] == ("4", "KVIK_MAX_NUM_SEQS")
    assert rows["max_model_len"] == ("20", str(file))
    assert rows["threads"] == ("6", "--threads")
    assert rows["run_ahead"] == ("auto", "default")
    assert rows["enable_prefix_caching"] == ("true", "default")
    model_says = SamplingParams(top_p=0.8, top_k=50)
    params = sampled.make(model_says)
    assert (params.temperature, params.top_k, params.top_p) == (0.5, 7, 0.8)
    rows = {name: (value, origin) for name, value, origin in sampled.rows(model_says, "the model")}
    assert rows["top_p"] == ("0.8", "the model")
    assert rows["top_k"] == ("7", "KVIK_SAMPLING_TOP_K")
    assert rows["max_tokens"] == ("64", "default")


def test_config_variable_and_json_file(tmp_path: Path) -> None:
    file = tmp_path / "kvik.json"
    file.write_text('{"model": "abc", "kv_cache_memory": "1.5GiB", "sampling": {"stop": ["a", "b"]}}')
    settings, sampled = load_settings({}, {"KVIK_CONFIG": str(file)})
    assert settings.make().model == "abc" and settings.make().kv_cache_memory == 3 * 2**29
    assert sampled.make().stop == ("a", "b")
    other = tmp_path / "other.yaml"
    other.write_text("model: xyz")
    assert load_settings({}, {"KVIK_CONFIG": str(file)}, str(other))[0].make().model == "xyz"


@pytest.mark.parametrize(
    ("table", "name", "raw", "value"),
    [
        ("engine", "dtype", "float32", "float32"),
        ("engine", "tokenizer", "none", None),
        ("engine", "quantization", "auto", None),
        ("engine", "max_num_seqs", "8", 8),
        ("engine", "max_num_seqs", 8, 8),
        ("engine", "max_num_seqs", "auto", None),
        ("engine", "max_num_seqs", None, None),
        ("engine", "num_kvcache_blocks", "-1", -1),
        ("engine", "kv_cache_memory", "512MiB", 2**29),
        ("engine", "kv_cache_memory", 4096, 4096),
        ("engine", "kv_cache_memory", "auto", None),
        ("engine", "gpu_memory_utilization", "0.5", 0.5),
        ("engine", "gpu_memory_utilization", 1, 1.0),
        ("engine", "enable_prefix_caching", "off", False),
        ("engine", "enable_prefix_caching", True, True),
        ("engine", "enforce_eager", "1", True),
        ("sampling", "stop", "a,b", ("a,b",)),
        ("sampling", "stop", '["a", "b"]', ("a", "b")),
        ("sampling", "stop", ["a", "["], ("a", "[")),
        ("sampling", "stop", "[INST]", ("[INST]",)),
        ("sampling", "stop_token_ids", "1, 2", (1, 2)),
        ("sampling", "stop_token_ids", 7, (7,)),
        ("sampling", "allowed_token_ids", "none", None),
        ("sampling", "allowed_token_ids", [1, 2], (1, 2)),
        ("sampling", "logit_bias", "5=-1.5,6=2", ((5, -1.5), (6, 2.0))),
        ("sampling", "logit_bias", {"5": -1.5, 6: 2}, ((5, -1.5), (6, 2.0))),
        ("sampling", "max_tokens", "none", None),
        ("sampling", "temperature", "1e-1", 0.1),
    ],
)
def test_values_of_every_kind(table: str, name: str, raw: object, value: object) -> None:
    assert TABLES[table].options[name].read(raw, "here") == value


@pytest.mark.parametrize(
    ("table", "name", "raw"),
    [
        ("engine", "max_num_seqs", "eight"),
        ("engine", "max_num_seqs", True),
        ("engine", "max_num_seqs", 1.5),
        ("engine", "max_num_seqs", [1]),
        ("engine", "gpu_memory_utilization", None),
        ("engine", "kv_cache_memory", "lots"),
        ("engine", "gpu_memory_utilization", "half"),
        ("engine", "enable_prefix_caching", "maybe"),
        ("engine", "model", 3),
        ("sampling", "stop", [1]),
        ("sampling", "stop_token_ids", "x"),
        ("sampling", "stop_token_ids", "[1"),
        ("sampling", "logit_bias", "5"),
        ("sampling", "logit_bias", "a=b"),
    ],
)
def test_malformed_values_name_their_origin(table: str, name: str, raw: object) -> None:
    with pytest.raises(ConfigError, match=r"^the file: "):
        TABLES[table].options[name].read(raw, "the file")


@pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))
def test_defaults_read_back_as_themselves(table: Table[Any]) -> None:
    def text(option: Option) -> object:
        return table.none_word if option.default is None and option.kind is not str else option.default

    for option in table.options.values():
        if option.default is not dataclasses.MISSING:
            assert option.read(text(option), "x") == option.default


def test_unknown_names_say_where_and_what_was_meant(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"KVIK_MAX_NUM_SEQ is not .*'KVIK_MAX_NUM_SEQS'"):
        engine({"KVIK_MAX_NUM_SEQ": "1"})
    file = tmp_path / "kvik.yaml"
    file.write_text("max_num_seq: 3")
    with pytest.raises(ConfigError, match=r"kvik\.yaml: there is no engine option 'max_num_seq' .*'max_num_seqs'"):
        engine(file=file)
    file.write_text("sampling: {temprature: 3}")
    with pytest.raises(ConfigError, match=r"no sampling option 'temprature' .*'temperature'"):
        engine(file=file)


def test_values_out_of_range_name_their_origin() -> None:
    with pytest.raises(ConfigError, match=r"max_num_seqs must be .* \(from KVIK_MAX_NUM_SEQS\)"):
        engine({"KVIK_MAX_NUM_SEQS": "0"})
    with pytest.raises(ConfigError, match=r"dtype must be .* \(from --dtype\)"):
        engine(dtype="int3")
    with pytest.raises(ConfigError, match=r"temperature must be .* \(from KVIK_SAMPLING_TEMPERATURE\)"):
        sampling({"KVIK_SAMPLING_TEMPERATURE": "3"})
    with pytest.raises(ConfigError, match="no model was given"):
        load_settings({}, {})[0].make()


@pytest.mark.parametrize("text", ["max_num_seqs: 5\nmax_batch_size: 6", "- a list", "a: [", "{", "sampling: 3", "\x00"])
def test_malformed_files_are_config_errors(tmp_path: Path, text: str) -> None:
    file = tmp_path / "kvik.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"kvik\.yaml"):
        engine(file=file)
    with pytest.raises(ConfigError, match="cannot read"):
        engine(file=tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.yaml", "sampling: {temperature: 0.1}\nthreads: 1\nsampling: {seed: 1}"),
        ("c.yaml", "threads: 1\nthreads: 2"),
        ("c.json", '{"threads": 1, "threads": 2}'), ("c.json", '{"sampling": {"seed": 1, "seed": 1}}'),
    ],
)  # fmt: skip
def test_a_key_comes_once(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="is there twice"):
        engine(file=tmp_path / name)


def test_a_file_may_merge_mappings(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("sampling: {<<: {temperature: 0.25}, seed: 1}\nthreads: 3\n")
    assert engine(file=tmp_path / "c.yaml").threads == 3


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "kvik.yaml"
    file.write_text("# nothing\n")
    assert engine(file=file) == EngineConfig("m")
