"""Masks against brute force, and what is refused before anything runs."""

from __future__ import annotations

import json
import random
import sys
import threading
from typing import Any

import numpy as np
import pytest

from kvik.errors import RequestError
from kvik.sampling_params import SamplingParams, StructuredOutputsParams
from kvik.structured import grammars as module
from kvik.structured.grammars import Grammars, Matcher, TokenBytes

pytest.importorskip("llguidance", reason="llguidance is not installed")

VOCAB, EOS = 333, (300, 301)


def vocabulary() -> TokenBytes:
    """Every byte, some pieces of words, two ids that end a text, and ids without a text."""
    pieces = [b"ye", b"yes", b"no", b"nope", b'{"', b'":', b" [", b"]}", "ä".encode(), "€".encode()[:2], b"12", b"true"]
    tokens = [bytes([value]) for value in range(256)] + pieces
    tokens += [b""] * (300 - len(tokens)) + [b"<|end|>", b"<|stop|>"]
    return TokenBytes(tokens + [b""] * (VOCAB - len(tokens)), EOS, EOS)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(vocabulary)


def wanted(**fields: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**fields)


def allowed(matcher: Matcher) -> set[int]:
    words = matcher.mask()
    assert words.shape == (-(-VOCAB // 32),) and words.dtype == np.int32
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


CHOICES = ("yes", "yellow", "nope", "no", "ä€", 'say "\\n"\n', " 12", "$^.*", "12")


@pytest.mark.parametrize("seed", range(20))
def test_masks_are_what_brute_force_says(grammars: Grammars, seed: int) -> None:
    rng = random.Random(seed)
    tokens, choices = vocabulary().tokens, tuple(rng.sample(CHOICES, rng.randint(1, 5)))
    whole = [choice.encode() for choice in choices]
    matcher, text = grammars.matcher(wanted(choice=choices), ()), b""
    while True:
        found = allowed(matcher)
        expected = {i for i, token in enumerate(tokens) if token and any(w.startswith(text + token) for w in whole)}
        assert found == expected | (set(EOS) if text in whole else set())
        token_id = rng.choice(sorted(found))
        matcher.advance((token_id,))
        if token_id in EOS:
            break
        text += tokens[token_id]
    assert text in whole
    matcher.advance((65, 66))  # what a step that was ahead has sampled after the end
    assert allowed(matcher) <= set(EOS) and not matcher.error and matcher.num_tokens > 2


def test_a_sequence_resumes_where_it_was(grammars: Grammars) -> None:
    choice = wanted(choice=["yes", "yellow"])
    moved = grammars.matcher(choice, ())
    moved.advance(list(b"yel"))
    assert allowed(grammars.matcher(choice, tuple(b"yel"))) == allowed(moved) == {ord("l")}
    assert allowed(grammars.matcher(choice, ())) == {ord("y"), 256, 257}  # nobody else moved


def test_masks_together_are_masks_alone(grammars: Grammars) -> None:
    kinds = [{"choice": ["yes"]}, {"regex": "[0-9]{3}"}, {"json_object": True}, {"grammar": 'start: "no" | "nope"'}]
    matchers = [grammars.matcher(wanted(**kind), ()) for kind in kinds]
    assert (grammars.masks(matchers) == np.stack([matcher.mask() for matcher in matchers])).all()


def test_gbnf_is_translated(grammars: Grammars) -> None:
    gbnf = 'root ::= answer ("," answer)*\n\n   \nanswer ::= "yes" | "no"\n'
    matcher = grammars.matcher(wanted(grammar=gbnf), tuple(b"yes,no"))
    assert allowed(matcher) == {ord(","), *EOS}


@pytest.mark.parametrize("grammar", ['?start: "yes"', '!start: "yes"', 'start[lazy]: "yes"'])
def test_a_start_rule_may_have_marks(grammars: Grammars, grammar: str) -> None:
    assert allowed(grammars.matcher(wanted(grammar=grammar), ())) == {ord("y"), 256, 257}  # ye, yes


def test_a_schema_may_have_options_of_the_library(grammars: Grammars) -> None:
    numbers = {"oneOf": [{"const": 1}, {"type": "integer", "minimum": 1, "maximum": 2}]}
    matcher = grammars.matcher(wanted(json={**numbers, "x-guidance": {"coerce_one_of": True}}), ())
    assert allowed(matcher) == {ord("1"), ord("2")}
    items = {"type": "array", "items": {"type": "null"}}
    matcher = grammars.matcher(wanted(json={**items, "x-guidance": {"whitespace_flexible": False}}), tuple(b"["))
    assert allowed(matcher) == {ord("n"), ord("]")}


def test_white_space_in_json_ends(grammars: Grammars) -> None:
    for space in (b" ", b"\n" + b" " * 32):
        matcher = grammars.matcher(wanted(json={"type": "array"}), tuple(b"[" + space))
        assert not matcher.error and not allowed(matcher) & {ord(" "), ord("\n")}
        assert ord("]") in allowed(matcher)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"json": {"type": "strin"}}, "strin"),
    ({"json": {"$ref": "https://example.com/schema"}}, "does not fetch"),
    ({"json": {"$ref": "#/$defs/missing"}}, "missing"),
    ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    ({"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, '"x-guidance": {"coerce_one_of": true}'),
    ({"json": {"x-guidance": {"spaces": 1}}}, "unknown field `spaces`"),
    ({"json": {"x-guidance": 1}}, "integer `1`"),
    ({"regex": "(a"}, "unclosed"),
    ({"regex": r"(a)\1"}, "backreference"),
    ({"regex": "(?=a)b"}, "look"),
    ({"json": {"$ref": "#"}}, "no text"),
    ({"json": {"type": "object", "properties": {f"p{i}": {} for i in range(1000)}}}, "2000"),
    ({"grammar": "start: missing"}, "missing"),
    ({"grammar": 'begin: "a"'}, "no start rule"),
    ({"grammar": "start: (((" + "\n" * 60000}, ""),
    ({"grammar": "root ::= missing"}, "missing"),
    ({"grammar": "root ::= " + "(" * 5000}, ""),
    ({"grammar": "".join(f'r{i} ::= "a"\n' for i in range(300))}, "256"),
    ({"grammar": "start: <|nobody|>"}, "nobody"),
]


@pytest.mark.parametrize(("fields", "names"), WRONG, ids=str)
def test_what_is_wrong_is_named(grammars: Grammars, fields: dict[str, Any], names: str) -> None:
    with pytest.raises(RequestError) as caught:
        grammars.compile(wanted(**fields))
    message = str(caught.value)
    assert caught.value.param == "structured_outputs" and next(iter(fields)) in message and names in message
    assert len(message) < 600 and "\n" not in message


LIMITS: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one"),
    ({"regex": "a", "choice": ["a"]}, "regex and choice"),
    ({"json_object": False}, "exactly one"),
    ({"json": {"enum": ["x" * 65536]}}, "65536"),
    ({"json": json.loads('{"items":' * 64 + "{}" + "}" * 64)}, "64"),
    ({"json": "not json"}, "json"),
    ({"json": "[1]"}, "object"),
    ({"json": {"enum": [float("nan")]}}, "json"),
    ({"regex": "a" * 4097}, "4096"),
    ({"regex": ""}, "non-empty"),
    ({"regex": "\ud800"}, "surrogate"),
    ({"choice": []}, "non-empty"),
    ({"choice": ["a", "b\ud800"]}, "surrogate"),
    ({"choice": ["a", ""]}, "non-empty"),
    ({"choice": "yes"}, "list"),
    ({"choice": ["a"] * 1025}, "1024"),
    ({"grammar": "a" * 65537}, "65536"),
    ({"structural_tag": "{}"}, "structural_tag"),
    ({"jsn": {}}, "json"),
]


@pytest.mark.parametrize(("fields", "names"), LIMITS, ids=lambda value: str(value)[:40])
def test_limits(fields: dict[str, Any], names: str) -> None:
    with pytest.raises(RequestError, match=names):
        wanted(**fields)
    with pytest.raises(RequestError, match=names) as caught:
        SamplingParams(structured_outputs=fields)
    assert caught.value.param == "structured_outputs"


def test_sampling_params_take_every_form() -> None:
    schema = {"type": "object"}
    forms = [wanted(json=schema), {"json": schema}, {"json": '{"type":"object"}'}]
    assert len({SamplingParams(structured_outputs=form) for form in forms}) == 1
    assert SamplingParams(guided_decoding={"regex": "a"}).structured_outputs == wanted(regex="a")
    for contradiction in ({"ignore_eos": True}, {"min_tokens": 3}):
        with pytest.raises(RequestError, match="structured_outputs"):
            SamplingParams(structured_outputs={"regex": "a"}, **contradiction)


@pytest.mark.parametrize(
    "fields",
    [
        {"choice": ["yes"]},
        {"regex": "yes"},
        {"json": {"const": 1}},
        {"grammar": 'start: A\nA: "yes"'},
        {"grammar": 'root ::= "yes"'},
    ],
    ids=str,
)
@pytest.mark.parametrize("special", [False, True])
def test_reasoning_comes_before_what_is_wanted(fields: dict[str, Any], special: bool) -> None:
    table = vocabulary()
    tokens = [*table.tokens[:310], b"<think>", b"</think>", *table.tokens[312:]]
    grammars = Grammars(lambda: TokenBytes(tokens, (*EOS, 310, 311) if special else EOS, EOS))
    answer = b"1" if "json" in fields else b"yes"
    mark = [[310], [311]] if special else [list(b"<think>"), list(b"</think>")]
    thought = list(b"Hm \n</thin yes 1 <b> \xc3\xa4")

    def accepted(reasoning: str | None, *parts: list[int] | bytes) -> bool:
        state = grammars.matcher(wanted(reasoning=reasoning, **fields), ()).state
        ids = [token_id for part in parts for token_id in part]
        return state.try_consume_tokens(ids) == len(ids) and state.is_accepting()

    for inner in (thought, []):
        for gap in (b"", b"\n", b"\n\n"):
            assert accepted("opened", inner, mark[1], gap, answer)
            assert accepted("possible", mark[0], inner, mark[1], gap, answer)
            assert not accepted("none", mark[0], inner, mark[1], gap, answer)
    assert accepted("possible", answer) and accepted("none", answer) and accepted(None, answer)
    assert not accepted("opened", answer) and not accepted("opened", thought, mark[1])
    assert not accepted("opened", thought, mark[1], b" ", answer) and not accepted("opened", mark[1], mark[1], answer)


def test_what_is_wrong_is_named_behind_reasoning_too(grammars: Grammars) -> None:
    kinds: list[dict[str, Any]] = [
        {"json": {"type": "strin"}}, {"regex": "(a"}, {"grammar": "start: b"}, {"grammar": "start: A\nA: b c"}
    ]  # fmt: skip
    for fields in kinds:
        errors = []
        for reasoning in (None, "possible"):
            with pytest.raises(RequestError) as caught:
                grammars.compile(wanted(reasoning=reasoning, **fields))
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


def test_a_grammar_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, compiled = Grammars(vocabulary), list[StructuredOutputsParams]()
    monkeypatch.setattr(module, "MAX_CACHED", 2)
    compile_one = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda wanted: compiled.append(wanted) or compile_one(wanted))
    for name in ("a", "b", "a", "c", "a", "b"):
        grammars.compile(wanted(regex=name))
    assert [one.regex for one in compiled] == ["a", "b", "c", "b"]


def test_threads_share_grammars(grammars: Grammars) -> None:
    found: list[set[int]] = []

    def follow(i: int) -> None:
        for text in (f"{i % 3}yes", "yes"):
            found.append(allowed(grammars.matcher(wanted(choice=[text]), text.encode())))

    threads = [threading.Thread(target=follow, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [set(EOS)] * 16


def test_a_grammar_that_becomes_too_complex_ends_its_sequence() -> None:
    grammars = Grammars(vocabulary)
    grammars.prepare()
    import llguidance

    grammars._limits = llguidance.LLParserLimits(step_max_items=20, verbose_errors=False)
    matcher = grammars.matcher(wanted(grammar='start: start start | "a" | start start start'), ())
    words = grammars.masks([matcher])
    for _ in range(50):
        if matcher.error:
            break
        matcher.advance((ord("a"),))
        words = grammars.masks([matcher])
    assert matcher.error and not words.any()
    with pytest.raises(RequestError):
        matcher.mask()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="end-of-sequence"):
        Grammars(lambda: TokenBytes([b"a"], (), ())).compile(wanted(regex="a"))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'kvik\[structured\]'"):
        Grammars(vocabulary).compile(wanted(regex="a"))
