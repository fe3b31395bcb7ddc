"""Whole engines: what they write follows what was asked for, whatever the schedule, and nobody else notices."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny

from engine_runs import BASE, CPU, GPU, options_for, params, prompts, same
from kvik import LLM, RequestError, RequestOutput, SamplingParams
from kvik.config import EngineConfig
from kvik.kernels.cpu.native import available
from kvik.startup import StartupLedger, build_engine, inspect_model
from kvik.structured.grammars import Grammars, TokenBytes

pytest.importorskip("llguidance", reason="llguidance is not installed")
jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="jsonschema_rs is not installed")

OPTIONS: dict[str, Any] = {**BASE, "max_model_len": 320, "num_kvcache_blocks": 120}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **OPTIONS) as made:
        yield made


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema whose texts end soon, also those of a model that draws anything."""
    kinds: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "integer", "minimum": -rng.randint(0, 50), "maximum": rng.randint(0, 999)},
        lambda: {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 6)},
        lambda: {"type": "string", "pattern": "^[a-f]{2,4}(-[0-9]{2})?$"},
        lambda: {"enum": rng.sample(["red", 'quote "', "ünï", 7, None, True, ["a", 1]], 3)},
        lambda: {"type": ["boolean", "null"]},
    ]
    nested: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "array", "items": random_schema(rng, depth + 1), "maxItems": 3},
        lambda: {"anyOf": [random_schema(rng, depth + 1), random_schema(rng, depth + 1)]},
        lambda: _random_object(rng, depth),
    ]
    return rng.choice(kinds if depth > 1 else [*kinds, *nested, *nested])()


def _random_object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["a", "name", "größe", "x y", 'q"'], rng.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth + 1) for name in names},
        "required": names[: rng.randint(0, len(names))],
        "additionalProperties": False,
    }


def check(output: RequestOutput, valid: Callable[[str], bool]) -> int:
    """The completions that are whole; all of those are as asked for."""
    whole = [one for one in output.outputs if one.finish_reason == "stop"]
    assert all(one.finish_reason in ("stop", "length") for one in output.outputs), output.outputs
    for one in whole:
        assert valid(one.text), one.text
    return len(whole)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_valid_under_random_schemas(llm: LLM, temperature: float) -> None:
    rng = random.Random(7)
    schemas = [random_schema(rng) for _ in range(60)]
    asked = [
        SamplingParams(temperature=temperature, max_tokens=200, seed=i, structured_outputs={"json": schema})
        for i, schema in enumerate(schemas)
    ]
    outputs = llm.generate(prompts(len(schemas)), asked)
    whole = 0
    for schema, output in zip(schemas, outputs, strict=True):
        validator = jsonschema_rs.validator_for(schema)
        whole += check(output, lambda text, validator=validator: validator.is_valid(json.loads(text)))
    assert whole > 50, whole


def test_every_kind(llm: LLM) -> None:
    def one_of(*texts: str) -> Callable[[str], bool]:
        return lambda text: text in texts

    kinds: list[tuple[dict[str, Any], Callable[[str], bool]]] = [
        ({"regex": r"[A-Z][a-z]{2}, \d{4}"}, lambda text: re.fullmatch(r"[A-Z][a-z]{2}, [0-9]{4}", text) is not None),
        ({"choice": ["yes", "no", "quick brown"]}, one_of("yes", "no", "quick brown")),
        ({"grammar": 'start: "a" ("b" | "c")'}, one_of("ab", "ac")),
        ({"grammar": 'root ::= "x" y\ny ::= "1" | "2"'}, one_of("x1", "x2")),
        ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
    ]
    asked = [SamplingParams(max_tokens=250, seed=3, n=3, structured_outputs=fields) for fields, _ in kinds]
    outputs = llm.generate(["Once upon"] * len(kinds), asked)
    whole = [check(output, valid) for output, (_, valid) in zip(outputs, kinds, strict=True)]
    assert whole[:4] == [3] * 4
    assert len({one.text for one in outputs[0].outputs}) == 3


def test_logprobs_are_those_of_the_raw_logits(llm: LLM) -> None:
    asked = SamplingParams(temperature=0, max_tokens=9, logprobs=2, structured_outputs={"regex": "[0-9]{8}"})
    output = llm.generate("Once", asked)[0]
    assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
    assert any(item.rank > 1 and item.token_id not in dict(item.top) for item in output.logprobs)


def test_cut_texts_and_stop_strings(llm: LLM) -> None:
    number = {"regex": "1{40}"}
    cut = llm.generate("Once", SamplingParams(max_tokens=5, structured_outputs=number))[0]
    assert cut.finish_reason == "length" and set(cut.text) == {"1"}
    stopped = llm.generate("Once", SamplingParams(stop="111", structured_outputs=number))[0]
    assert (stopped.finish_reason, stopped.stop_reason, stopped.text) == ("stop", "111", "")


def test_nothing_else_leads_out_of_a_grammar(llm: LLM) -> None:
    more: list[dict[str, Any]] = [
        {"logit_bias": {40: 100.0}},
        {"repetition_penalty": 2.0, "presence_penalty": 2.0},
        {"top_k": 1},
        {"top_p": 0.01, "min_p": 0.9},
        {"logits_processors": [lambda ids, logits: logits.index_fill(0, logits.new_tensor([40]).long(), 1e4)]},
    ]
    asked = [SamplingParams(max_tokens=40, seed=1, structured_outputs={"regex": "[xyz]{5}"}, **one) for one in more]
    for output in llm.generate(["Once"] * len(asked), asked):
        assert re.fullmatch("[xyz]{5}", output.text) and output.finish_reason == "stop"


def test_a_dead_end_ends_its_own_request(llm: LLM) -> None:
    asked = [
        SamplingParams(max_tokens=8, structured_outputs={"choice": ["yes"]}, allowed_token_ids=[40]),
        SamplingParams(max_tokens=8, temperature=0),
    ]
    dead, other = llm.generate(["Once", "Once"], asked)
    assert dead.finish_reason == "error" and "structured_outputs" in str(dead.error)
    assert other.token_ids == llm.generate("Once", asked[1])[0].token_ids


def test_what_is_wrong_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(RequestError, match="unclosed"):
        llm.generate("Once", SamplingParams(structured_outputs={"regex": "(a"}))
    assert not llm.llm_engine.has_unfinished()


# Schedules

STRUCTURES: list[dict[str, Any]] = [
    {"json": {"type": "object", "properties": {"a": {"type": "string", "maxLength": 9}, "b": {"enum": [1, "two"]}},
              "required": ["a", "b"], "additionalProperties": False}},
    {"regex": "(yes|no){2,7}"},
    {"choice": ["Once upon a time", "the quick brown fox", "never"]},
]  # fmt: skip


def mixed(count: int) -> list[SamplingParams]:
    """Every second request follows a grammar; the others are of every kind of sampling."""
    made = params(count)
    for i in range(0, count, 2):
        kind: dict[str, Any] = [{"temperature": 0.0, "logprobs": 1}, {"n": 2}, {"temperature": 0.7, "top_k": 30}][i % 3]
        structure = STRUCTURES[i // 2 % len(STRUCTURES)]
        made[i] = SamplingParams(max_tokens=30, seed=i, structured_outputs=structure, **kind)
    return made


def run(folder: Path, count: int = 12, *, before: Callable[[LLM], None] | None = None, **options: Any) -> Any:
    with LLM(str(folder), **{**BASE, **options}) as llm:
        if before is not None:
            before(llm)
        outputs = llm.generate(prompts(count), mixed(count))
        assert llm.llm_engine.engine.scheduler.kv.num_used == 0
        return outputs


@pytest.fixture(scope="module", params=[CPU, GPU])
def place(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    with options_for(request.param) as options:
        yield options


@pytest.fixture(scope="module")
def expected(folder: Path, place: dict[str, Any]) -> list[RequestOutput]:
    return run(folder, max_num_seqs=1, enable_prefix_caching=False, **place)


def preempt_all(every: int) -> Callable[[LLM], None]:
    def prepare(llm: LLM) -> None:
        engine = llm.llm_engine.engine
        step, steps = engine.step, iter(range(10**9))

        def step_and_preempt() -> Any:
            outputs = step()
            if next(steps) % every == 0:
                for seq in engine.scheduler.running:
                    engine.scheduler.preempt(seq)
                engine.scheduler.check_invariants()
            return outputs

        engine.step = step_and_preempt  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 8},
        {"max_num_seqs": 3, "max_num_batched_tokens": 7},
        {"num_kvcache_blocks": 12, "max_num_seqs": 8},
        {"run_ahead": 2},
        {"run_ahead": 0},
        {"before": preempt_all(3), "run_ahead": 1},
    ],
    ids=lambda options: "preempted" if "before" in options else str(options),
)
def test_schedules_do_not_show(
    folder: Path, place: dict[str, Any], expected: list[RequestOutput], options: dict[str, Any]
) -> None:
    same(run(folder, **place, **options), expected)


def test_tables_are_built_once_other_processes_are_forked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def fork(*_: object) -> AbstractContextManager[None]:
        order.append("forked")
        return nullcontext()

    monkeypatch.setattr("kvik.startup._kernel_compiler", fork)
    monkeypatch.setattr(Grammars, "prepare", lambda grammars: order.append("built"))
    config = EngineConfig(str(folder), **BASE)
    ledger, grammars = StartupLedger(), Grammars(lambda: TokenBytes([], [], []))
    build_engine(config, inspect_model(config), ledger, grammars, prepare=True).close()
    assert order == ["forked", "built"] and "grammars" in ledger.phases


@pytest.mark.skipif(not available(), reason="Kvik was built without its native kernels")
def test_deterministic_rows_have_the_same_bits(folder: Path, place: dict[str, Any]) -> None:
    options: dict[str, Any] = {**place, "deterministic": True, "dtype": "bfloat16"}
    want = run(folder, max_num_seqs=1, enable_prefix_caching=False, **options)
    for schedule in ({"max_num_seqs": 8}, {"max_num_seqs": 3, "max_num_batched_tokens": 7}, {"run_ahead": 0}):
        same(run(folder, **options, **schedule), want, tolerance=0)


def test_others_do_not_notice(folder: Path, place: dict[str, Any]) -> None:
    with LLM(str(folder), **{**BASE, **place}) as llm:
        together = llm.generate(prompts(12), mixed(12))
        plain = llm.generate(prompts(12)[1::2], params(12)[1::2])
    same(together[1::2], plain)
