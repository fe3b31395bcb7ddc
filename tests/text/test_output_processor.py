"""The fold of engine outputs: streamed pieces, stop strings, stop tokens, n completions, usage, endings."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_builders import CHATML, TEXTS, byte_fallback, byte_level

from kvik.core.request import Request
from kvik.errors import RequestError
from kvik.openai_format import parse_body, response_body
from kvik.outputs import FinishReason, RequestMetrics, RequestOutput, SequenceOutput, TokenLogprobs, Usage
from kvik.sampling_params import SamplingParams, StructuredOutputsParams
from kvik.text.frontend import ChatPrompt, Prompt
from kvik.text.output_processor import OutputProcessor
from kvik.text.tokenizer import Tokenizer

TOKENIZERS = {
    "byte_level": Tokenizer(byte_level(), special_tokens={"eos_token": CHATML[2]}),
    "byte_fallback": Tokenizer(byte_fallback(), special_tokens={"bos_token": "<s>", "eos_token": "</s>"}),
}
TOKENIZER = TOKENIZERS["byte_level"]
EOS = TOKENIZER.eos_token_ids[0]


def ids_of(text: str, tokenizer: Tokenizer = TOKENIZER) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def request_for(**params: Any) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=ids_of("Say hello:"),
        params=SamplingParams(**params),
        seed=0,
        eos_token_ids=(EOS,),
    )


def sequence(ids: tuple[int, ...], *, index: int = 0, **fields: Any) -> SequenceOutput:
    return SequenceOutput(request_id="r", index=index, new_token_ids=ids, **fields)


def steps(ids: tuple[int, ...], sizes: list[int], reason: FinishReason = FinishReason.LENGTH) -> list[SequenceOutput]:
    """`ids` cut into engine outputs of the given sizes, over and over; the last one ends the sequence."""
    found, at = [], 0
    for size in itertools.cycle(sizes or [1]):
        found.append(sequence(ids[at : at + size], finish_reason=reason if at + size >= len(ids) else None))
        at += size
        if at >= len(ids):
            return found
    raise AssertionError


def run(
    request: Request, outputs: list[SequenceOutput], tokenizer: Tokenizer = TOKENIZER, *, stream: bool = True
) -> tuple[list[RequestOutput], list[tuple[str, int]]]:
    """Every output of the request, fed one engine output at a time, also after the end."""
    processor, made, to_finish = OutputProcessor(tokenizer), [], []
    processor.add(request, ChatPrompt("Say hello:", request.prompt_token_ids), stream=stream)
    for output in outputs:
        done = processor.process([output])
        made += done.outputs
        to_finish += done.to_finish
    assert len(processor) == 0, "a finished request is forgotten"
    assert made[-1].finished and not any(output.finished for output in made[:-1])
    for index in range(request.params.n):
        streamed = "".join(output.deltas[index] for output in made)
        assert streamed == made[-1].outputs[index].text, "the stream adds up to the text"
    return made, to_finish


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.sampled_from(TEXTS) | st.text(max_size=30),
    st.lists(st.integers(0, 400), max_size=5),
    st.lists(st.integers(1, 4), max_size=3),
    st.booleans(),
)
def test_stream_equals_single_output(name: str, text: str, noise: list[int], sizes: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS[name]
    ids = (*ids_of(text, tokenizer), *noise) or (5,)
    request = request_for(skip_special_tokens=skip)
    made, to_finish = run(request, steps(ids, sizes), tokenizer)
    (single,), _ = run(request, steps(ids, [len(ids)]), tokenizer, stream=False)
    assert made[-1].text == single.text == tokenizer.decode(ids, skip)
    assert made[-1].token_ids == single.token_ids == ids
    assert made[-1].usage == single.usage
    assert made[-1].finish_reason == FinishReason.LENGTH
    assert to_finish == []
    for a, b in itertools.pairwise(made):
        assert b.text.startswith(a.text)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.text("ab \nX👋", min_size=1, max_size=20),
    st.lists(st.text("ab \n👋", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), max_size=3),
    st.booleans(),
)
def test_stop_strings_against_oracle(name: str, text: str, stops: list[str], sizes: list[int], include: bool) -> None:
    tokenizer = TOKENIZERS[name]
    ids = ids_of(text, tokenizer)
    made, to_finish = run(
        request_for(stop=stops, include_stop_str_in_output=include), steps(ids, sizes, FinishReason.ABORT), tokenizer
    )
    final = made[-1]
    # The oracle decodes each prefix anew; the first one that holds a stop string ends the sequence.
    for count in range(1, len(ids) + 1):
        seen = b"".join(map(tokenizer.token_bytes, ids[:count])).decode("utf-8", "ignore")
        seen = seen.removeprefix(" ") if name == "byte_fallback" else seen
        ends = sorted((seen.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in seen)
        if ends:
            end, _, stop = ends[0]
            assert (final.finish_reason, final.stop_reason) == (FinishReason.STOP, stop)
            assert final.text == seen[: end if include else end - len(stop)]
            assert final.token_ids == ids[:count]
            assert final.usage.completion_tokens == count
            assert to_finish in ([], [("r", 0)])
            return
    assert (final.finish_reason, final.text, to_finish) == (FinishReason.ABORT, text, [])


def test_stop_string_tells_the_engine_and_trims() -> None:
    text = "Hello world. Hello there"
    ids = ids_of(text)
    logprobs = tuple(TokenLogprobs(token_id, -0.5, 1) for token_id in ids)
    processor = OutputProcessor(TOKENIZER)
    processor.add(request_for(stop="world", logprobs=0), "Say hello:")
    done = processor.process([sequence(ids, logprobs=logprobs)])
    assert done.to_finish == [("r", 0)]
    (output,) = done.outputs
    assert (output.text, output.delta, output.finish_reason, output.stop_reason) == (
        "Hello ",
        "Hello ",
        "stop",
        "world",
    )
    assert TOKENIZER.decode(output.token_ids).startswith("Hello world")
    assert not TOKENIZER.decode(output.token_ids[:-1]).startswith("Hello world")
    assert output.logprobs == logprobs[: len(output.token_ids)]
    assert not len(processor)
    assert processor.process([sequence(ids), sequence((), finish_reason=FinishReason.STOP)]) == ([], [])


def test_no_prefix_of_a_stop_string_is_ever_streamed() -> None:
    made, _ = run(request_for(stop="<|stop|>"), steps(ids_of("one <|two <|stop|> three"), [1]))
    for output in made:
        assert "one <|two ".startswith(output.text)
    assert made[-1].text == "one <|two "


def test_held_back_text_is_flushed_at_the_end() -> None:
    for reason in FinishReason:
        made, _ = run(request_for(stop="there!"), steps(ids_of("Hello the"), [1], reason))
        assert (made[-1].text, made[-1].finish_reason, made[-1].stop_reason) == ("Hello the", reason, None)


@pytest.mark.parametrize("reason", list(FinishReason))
def test_partial_character_is_decided_at_the_end(reason: FinishReason) -> None:
    ids = ids_of("hi 👋")[:-1]
    made, _ = run(request_for(), steps(ids, [1], reason))
    assert made[-1].text == "hi \ufffd"
    assert not any("\ufffd" in output.text for output in made[:-1])


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_stop_tokens(include: bool, skip: bool) -> None:
    (world,) = ids_of("!")
    for token_id, token_text, stop_reason in ((EOS, CHATML[2], None), (world, "!", world)):
        request = request_for(include_stop_str_in_output=include, skip_special_tokens=skip, stop_token_ids=[world])
        ids = (*ids_of("Hello"), token_id)
        made, to_finish = run(
            request, [sequence(ids[:-1]), sequence(ids[-1:], finish_reason=FinishReason.STOP, stop_token_id=token_id)]
        )
        shown = include and not (skip and token_id == EOS)
        assert made[-1].text == "Hello" + (token_text if shown else "")
        assert made[-1].token_ids == ids
        assert made[-1].usage.completion_tokens == len(ids)
        assert (made[-1].finish_reason, made[-1].stop_reason, to_finish) == (FinishReason.STOP, stop_reason, [])


@pytest.mark.parametrize(
    ("prompt", "structured", "text"),
    [
        ("Say hello:", False, " hello world"), ((5, 6), False, " hello world"),
        (ChatPrompt("Say hello:", (5, 6)), False, "hello world"),
        (ChatPrompt("Say hello:", (5, 6), goes_on=True), False, " hello world"),
        (ChatPrompt("Say hello:", (5, 6)), True, " hello world"),
    ],
)  # fmt: skip
def test_a_text_goes_on_after_its_prompt(prompt: Prompt, structured: bool, text: str) -> None:
    """Sentencepiece writes a space before a word; a message of its own begins without."""
    tokenizer = TOKENIZERS["byte_fallback"]
    wanted = StructuredOutputsParams(regex=".*") if structured else None
    processor, request = OutputProcessor(tokenizer), request_for(structured_outputs=wanted)
    processor.add(dataclasses.replace(request, prompt_token_ids=ids_of("Say hello:", tokenizer)), prompt)
    ids = ids_of("hello world", tokenizer)
    assert tokenizer.decode(ids) == "hello world"
    (output,) = processor.process([sequence(ids, finish_reason=FinishReason.LENGTH)]).outputs
    assert output.text == text


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("name", ["byte_fallback", "byte_level"])
def test_offsets_point_into_the_text(name: str, echo: bool) -> None:
    """Also with what is not in it: special tokens, and the space that sentencepiece begins a text with."""
    tokenizer = TOKENIZERS[name]
    text = "world is" if name == "byte_fallback" else " world is"
    prompt, ids = tokenizer.encode("hello"), tokenizer.encode(text, add_special_tokens=False)
    ids = [*ids[:1], next(iter(tokenizer.special_token_ids)), *ids[1:]]
    scores = [TokenLogprobs(token_id, -0.5, 1) for token_id in [*prompt, *ids]]
    body = {"prompt": "hello", "logprobs": 0, "echo": echo}
    asked, processor = parse_body(body, chat=False, base=SamplingParams(), overrides={}), OutputProcessor(tokenizer)
    processor.add(Request(request_id="r", prompt_token_ids=tuple(prompt), params=asked.params, seed=0), "hello")
    end = sequence(
        tuple(ids), logprobs=tuple(scores[len(prompt) :]), finish_reason=FinishReason.LENGTH,
        prompt_logprobs=tuple(scores[1 : len(prompt)]) if echo else (),
    )  # fmt: skip
    (output,) = processor.process([end]).outputs
    (choice,) = response_body(asked, [output], tokenizer, "tiny", "print")["choices"]
    text, found = choice["text"], choice["logprobs"]
    ends = [*found["text_offset"][1:], len(text)]
    pieces = [text[start:end] for start, end in zip(found["text_offset"], ends, strict=True)]
    assert "".join(pieces) == text == ("hello" if echo else "") + " world is"
    for token_id, piece, token in zip([*prompt, *ids] if echo else ids, pieces, found["tokens"], strict=True):
        assert piece == ("" if token_id in tokenizer.special_token_ids else token) or piece == token.lstrip(" ")


def test_a_stop_string_may_begin_before_min_tokens() -> None:
    for min_tokens in range(5):
        ids = tuple(i for char in "ab###c" for i in ids_of(char))
        made, _ = run(request_for(stop="###", min_tokens=min_tokens), steps(ids, [1]))
        assert (made[-1].text, len(made[-1].outputs[0].token_ids)) == ("ab", 5)


def test_min_tokens_puts_off_stop_strings() -> None:
    ids = ids_of("a.b.c.d.")
    assert len(ids) == 8
    for min_tokens, text, count in ((0, "a", 2), (1, "a", 2), (2, "a.b", 4), (3, "a.b", 4), (4, "a.b.c", 6)):
        made, _ = run(request_for(stop=".", min_tokens=min_tokens), steps(ids, [1]))
        assert (made[-1].text, len(made[-1].token_ids)) == (text, count)


def test_echo_puts_the_prompt_first() -> None:
    made, _ = run(request_for(echo=True, stop="hello"), steps(ids_of(" hi"), [1]))
    assert made[-1].text == "Say hello: hi"
    assert made[0].delta.startswith("Say hello:")
    tokenizer = TOKENIZERS["byte_fallback"]
    prompt = ids_of("hello", tokenizer)
    processor = OutputProcessor(tokenizer)
    processor.add(dataclasses.replace(request_for(echo=True), prompt_token_ids=prompt))
    (output,) = processor.process(steps(ids_of("world", tokenizer), [99])).outputs
    assert (output.prompt, output.text) == (None, "hello world")


def test_several_completions() -> None:
    request = request_for(n=3, stop="!")
    processor = OutputProcessor(TOKENIZER)
    processor.add(request, "Say hello:")
    first = processor.process([sequence(ids_of("one"), index=0), sequence(ids_of("two!x"), index=1)])
    assert first.to_finish == [("r", 1)]
    assert first.outputs[0].deltas == ("one", "two", "")
    second = processor.process(
        [sequence(ids_of(" more"), index=1), sequence(ids_of("three"), index=2), sequence((), index=0)]
    )
    assert second.outputs[0].deltas == ("", "", "three")
    assert [output.finished for output in second.outputs[0].outputs] == [False, True, False]
    last = processor.process(
        [
            sequence((), index=0, finish_reason=FinishReason.ABORT),
            sequence((), index=2, finish_reason=FinishReason.TIMEOUT),
        ]
    )
    (final,) = last.outputs
    assert [output.text for output in final.outputs] == ["one", "two", "three"]
    assert [output.finish_reason for output in final.outputs] == ["abort", "stop", "timeout"]
    assert final.usage.completion_tokens == sum(len(output.token_ids) for output in final.outputs)
    assert final.usage.prompt_tokens == len(request.prompt_token_ids)
    assert len(processor) == 0


def test_logprobs_usage_metrics_and_errors() -> None:
    request = request_for(logprobs=1, prompt_logprobs=0)
    prompt = tuple(TokenLogprobs(token_id, -1.0, 2) for token_id in request.prompt_token_ids[1:])
    token = TokenLogprobs(ids_of("x")[0], -0.1, 1, ((5, -0.1),))
    metrics = RequestMetrics(queue_time=0.5, total_time=2.0)
    made, _ = run(
        request,
        [
            sequence((), prompt_logprobs=prompt[:2]),
            sequence(ids_of("x"), prompt_logprobs=prompt[2:], logprobs=(token,), num_cached_tokens=4),
            sequence((), finish_reason=FinishReason.ERROR, error="it broke", metrics=metrics),
        ],
    )
    final = made[-1]
    assert final.prompt_logprobs == (None, *prompt)
    assert final.logprobs == (token,)
    assert (final.usage.cached_tokens, final.usage.total_tokens) == (4, len(request.prompt_token_ids) + 1)
    assert final.metrics == metrics
    assert (final.finish_reason, final.error, final.prompt) == (FinishReason.ERROR, "it broke", "Say hello:")
    plain, _ = run(request_for(), steps(ids_of("hi"), [1]))
    assert (plain[-1].logprobs, plain[-1].prompt_logprobs) == (None, None)


def test_an_output_of_a_stream_stays_as_it_was_when_more_comes() -> None:
    request = request_for(n=2, logprobs=0, prompt_logprobs=0)
    prompt = tuple(TokenLogprobs(token_id, -1.0, 2) for token_id in request.prompt_token_ids[1:])
    ids, metrics = ids_of("hello there"), RequestMetrics(time_to_first_token=0.5)
    processor = OutputProcessor(TOKENIZER)
    processor.add(request, "the prompt")
    lines = [[TokenLogprobs(i, -0.5, 1) for i in ids[:k]] for k in range(len(ids) + 1)]
    (early,) = processor.process(
        [sequence(ids[:1], logprobs=tuple(lines[1]), prompt_logprobs=prompt, num_cached_tokens=4, metrics=metrics)]
    ).outputs
    processor.process([sequence(ids[1:3], logprobs=tuple(lines[3][1:])), sequence(ids[:2], index=1)])
    processor.process([sequence((), finish_reason=FinishReason.ABORT, metrics=RequestMetrics(total_time=9.0))])
    num_prompt = len(request.prompt_token_ids)
    assert {f.name: getattr(early, f.name) for f in dataclasses.fields(early) if f.name != "outputs"} == {
        "request_id": "r", "prompt": "the prompt", "prompt_token_ids": request.prompt_token_ids, "index": 0,
        "usage": Usage(prompt_tokens=num_prompt, completion_tokens=1, cached_tokens=4), "embedding": (),
        "deltas": (TOKENIZER.decode(ids[:1]), ""), "prompt_logprobs": (None, *prompt), "metrics": metrics,
    }  # fmt: skip
    assert [dataclasses.asdict(output) for output in early.outputs] == [
        {
            "index": index, "text": text, "token_ids": token_ids, "finish_reason": None, "stop_reason": None,
            "logprobs": logprobs, "error": None,
        }
        for index, text, token_ids, logprobs in ((0, early.delta, ids[:1], tuple(lines[1])), (1, "", (), ()))
    ]  # fmt: skip
    assert (early.finished, dataclasses.replace(early, index=3).usage) == (False, early.usage)
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = early.colour  # type: ignore[attr-defined]


def test_own_metrics_where_a_stop_string_ends_it() -> None:
    times = iter([11.0, 14.0])
    processor = OutputProcessor(TOKENIZER, clock=lambda: next(times))
    processor.add(dataclasses.replace(request_for(stop="!"), arrival_time=10.0))
    processor.process([sequence(ids_of("a"))])
    (output,) = processor.process([sequence(ids_of("bc!"))]).outputs
    assert output.metrics == RequestMetrics(time_to_first_token=1.0, time_per_output_token=1.0, total_time=4.0)


def test_a_stop_string_completes_what_the_engine_told_with_the_first_token() -> None:
    times = iter([11.5, 14.5])
    told = RequestMetrics(queue_time=0.5, time_to_first_token=1.0, total_time=1.0, num_preemptions=1)
    processor = OutputProcessor(TOKENIZER, clock=lambda: next(times))
    processor.add(dataclasses.replace(request_for(stop="!"), arrival_time=10.0))
    processor.process([sequence(ids_of("a"), metrics=told)])
    (output,) = processor.process([sequence(ids_of("bc!"))]).outputs
    assert output.metrics == dataclasses.replace(told, time_per_output_token=1.0, total_time=4.5)


def test_end_all() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add(request_for(n=2), stream=False)
    processor.process([sequence(ids_of("partial")), sequence(ids_of("x"), index=1, finish_reason=FinishReason.STOP)])
    (output,) = processor.end_all(FinishReason.ERROR, "the engine died")
    assert [(o.text, o.finish_reason, o.error) for o in output.outputs] == [
        ("partial", "error", "the engine died"),
        ("x", "stop", None),
    ]
    assert len(processor) == 0


def test_request_ids_are_unique_and_unknown_ones_ignored() -> None:
    processor = OutputProcessor(TOKENIZER)
    processor.add(request_for())
    with pytest.raises(RequestError, match="in use"):
        processor.add(request_for())
    assert processor.process([SequenceOutput(request_id="other", index=0, new_token_ids=(5,))]) == ([], [])


def test_old_snapshots_do_not_change() -> None:
    made, _ = run(request_for(logprobs=0), steps(ids_of("one two three four"), [1]))
    texts = [output.text for output in reversed(made)][::-1]
    assert texts == ["".join(output.delta for output in made[: i + 1]) for i in range(len(made))]
    assert [len(output.token_ids) for output in made] == list(range(1, len(made) + 1))
    live = made[0].outputs[0]
    assert dataclasses.asdict(live)["text"] == live.text
    assert dataclasses.replace(live, text="x").text == "x"
    assert (live == made[0].outputs[0], live == made[1].outputs[0]) == (True, False)
    assert f"text={live.text!r}" in repr(live)
    with pytest.raises(AttributeError):
        getattr(live, "non" + "sense")


def test_metrics_of_several_completions() -> None:
    """The first to begin counts, preemptions of all are added up, and the request ends with the last."""
    processor = OutputProcessor(TOKENIZER)
    processor.add(request_for(n=2), "Say hello:")
    early = RequestMetrics(queue_time=0.1, time_to_first_token=0.2, total_time=1.0, num_preemptions=1)
    late = RequestMetrics(queue_time=1.1, time_to_first_token=1.2, total_time=2.0, num_preemptions=2)
    for index, metrics in enumerate((early, late)):
        processor.process([sequence(ids_of("a"), index=index, metrics=metrics)])
        outputs = processor.process([sequence((), index=index, metrics=metrics, finish_reason=FinishReason.LENGTH)])
    assert outputs.outputs[0].metrics == RequestMetrics(
        queue_time=0.1, time_to_first_token=0.2, total_time=2.0, num_preemptions=3
    )
