"""Bodies in the OpenAI format: what each field becomes, what is refused, and the shape of responses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvik import LLMEngine
from kvik.errors import RequestError, WorkerError
from kvik.openai_format import OpenAIRequest, error_body, parse_body, response_body
from kvik.sampling_params import SamplingParams

MESSAGES = [{"role": "user", "content": "Hi"}]
BASE = SamplingParams(top_k=5, temperature=0.7)
COLUMNS = ("tokens", "token_logprobs", "top_logprobs")


def completion(**body: Any) -> OpenAIRequest:
    return parse_body({"prompt": "x", **body}, chat=False, base=BASE, overrides={})


def chat(**body: Any) -> OpenAIRequest:
    return parse_body({"messages": MESSAGES, **body}, chat=True, base=BASE, overrides={})


def test_defaults() -> None:
    assert completion().params == SamplingParams(top_k=5, temperature=0.7, max_tokens=16)
    assert chat().params == SamplingParams(top_k=5, temperature=0.7, max_tokens=None)
    given = parse_body({"prompt": "x"}, chat=False, base=BASE, overrides={"max_tokens": 9, "top_p": 0.5})
    assert (given.params.max_tokens, given.params.top_p) == (9, 0.5)
    assert completion(temperature=None, stop=None, n=None).params == completion().params


def test_every_sampling_field() -> None:
    fields: dict[str, Any] = {
        "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "n": 2, "stop": ["a"], "seed": 3, "presence_penalty": 1,
        "frequency_penalty": -1, "logit_bias": {"7": -100}, "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1,
        "min_tokens": 1, "stop_token_ids": [9], "ignore_eos": True, "bad_words": ["b"], "allowed_token_ids": [7, 8],
        "skip_special_tokens": False, "include_stop_str_in_output": True,
    }  # fmt: skip
    for request in (completion(**fields), chat(**fields)):
        assert request.params == SamplingParams(**fields)
    assert completion(stop="a").params.stop == ("a",)
    assert chat(max_completion_tokens=5).params.max_tokens == 5


def test_logprobs() -> None:
    assert completion(logprobs=2).params.logprobs == 2
    assert completion(logprobs=2, echo=True).params.prompt_logprobs == 2
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).params.logprobs == 3
    assert chat(logprobs=False).params.logprobs is None


def test_prompts_of_every_form() -> None:
    for prompt, inputs in (("x", ("x",)), ([1, 2], ([1, 2],)), (["a", "b"], ("a", "b")), ([[1], [2]], ([1], [2]))):
        assert completion(prompt=prompt).inputs == inputs
    assert chat().inputs == (MESSAGES,)
    assert chat(chat_template_kwargs={"a": 1}).template_options == {"chat_template_kwargs": {"a": 1}}


def test_fields_that_ask_for_nothing_are_taken() -> None:
    completion(stream=False, model="m", seed=None)
    chat(response_format={"type": "text"})
    assert completion(stream=True).stream and not completion().stream


@pytest.mark.parametrize(
    ("is_chat", "field", "value"),
    [
        (False, "prompt", []), (False, "prompt", {"a": 1}), (False, "prompt", [["a"], "b", 3]), (False, "echo", "yes"),
        (False, "stop", 5), (False, "stop", {"a": 1}), (False, "stop_token_ids", 5), (False, "logit_bias", [1]),
        (False, "logit_bias", {"x": 1}), (False, "ignore_eos", "false"), (False, "temperature", "hot"),
        (False, "max_tokens", 0), (False, "n", 0), (False, "model", 5), (False, "logprobs", True),
        (False, "seed", -1), (False, "stream", 1), (True, "response_format", {"type": "yaml"}), (True, "logprobs", 3),
        (True, "top_logprobs", 2), (True, "add_generation_prompt", "yes"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_refused_by_name(is_chat: bool, field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field.rstrip("s")) as raised:
        (chat if is_chat else completion)(**{field: value})
    assert raised.value.param == field


def test_contradictions_are_refused() -> None:
    with pytest.raises(RequestError, match="differ"):
        chat(max_tokens=3, max_completion_tokens=4)
    with pytest.raises(RequestError, match="integer in"):
        chat(logprobs=True, top_logprobs=21)
    with pytest.raises(RequestError, match="prompt is required"):
        parse_body({}, chat=False, base=BASE, overrides={})


def test_errors() -> None:
    assert error_body(RequestError("no", "n"))["error"] == {
        "message": "no", "type": "invalid_request_error", "param": "n", "code": None,
    }  # fmt: skip
    assert error_body(WorkerError("gone"))["error"]["type"] == "server_error"


@pytest.fixture(scope="module")
def engine(model: str) -> Iterator[LLMEngine]:
    with LLMEngine(model, threads=1) as engine:
        yield engine


def answer(engine: LLMEngine, request: OpenAIRequest) -> dict[str, Any]:
    ids = [engine.add_request(prompt, request.params) for prompt in request.prompts(engine)]
    outputs = engine.run_until_complete()
    return response_body(request, [outputs[request_id] for request_id in ids], engine.tokenizer, "tiny", "print")


def test_completion_response(engine: LLMEngine) -> None:
    body = answer(
        engine, completion(prompt=["Once upon", [5, 6]], logprobs=2, echo=True, temperature=0, ignore_eos=True)
    )
    assert body["id"].startswith("cmpl-") and body["object"] == "text_completion"
    assert body["model"] == "tiny" and body["system_fingerprint"] == "print"
    assert body["usage"] == {
        "prompt_tokens": 4, "completion_tokens": 32, "total_tokens": 36, "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    choice = body["choices"][0]
    assert choice["text"].startswith("Once upon") and choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert {len(column) for column in logprobs.values()} == {18}
    assert logprobs["tokens"][:2] == ["Once", " upon"] and logprobs["text_offset"][:3] == [0, 4, 9]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    for token, logprob, top in zip(*(logprobs[name][1:] for name in COLUMNS), strict=True):
        assert top[token] == logprob and len(top) == (2 if logprob >= sorted(top.values())[-2] else 3)


def test_the_token_itself_is_among_the_likeliest_of_a_completion(engine: LLMEngine) -> None:
    """As OpenAI has it, so that there may be one more than was asked for; a chat has it beside them."""
    options = {"seed": 1, "ignore_eos": True, "max_tokens": 8}
    (choice,) = answer(engine, completion(prompt="Once upon", logprobs=0, **options))["choices"]
    tokens, values, tops = (choice["logprobs"][name] for name in COLUMNS)
    assert tops == [{token: value} for token, value in zip(tokens, values, strict=True)]
    (choice,) = answer(engine, chat(logprobs=True, **options))["choices"]
    assert [item["top_logprobs"] for item in choice["logprobs"]["content"]] == [[]] * 8


def test_chat_response(engine: LLMEngine) -> None:
    request = chat(logprobs=True, top_logprobs=2, max_tokens=5, n=2, seed=1, ignore_eos=True)
    body = answer(engine, request)
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion"
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    for choice in body["choices"]:
        assert choice["message"]["role"] == "assistant" and choice["message"]["refusal"] is None
        items = choice["logprobs"]["content"]
        assert len(items) == 5 and all(len(item["top_logprobs"]) == 2 for item in items)
        said = b"".join(bytes(item["bytes"]) for item in items).decode(errors="replace")
        assert said == choice["message"]["content"]
