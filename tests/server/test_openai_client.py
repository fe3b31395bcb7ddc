"""The official OpenAI client against a running server: what users do first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from server_harness import Served

from kvik.config import EngineConfig
from kvik.startup import fingerprint, inspect_model

CHAT = [{"role": "user", "content": "Hello there"}]


@pytest.fixture
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=6, seed=1)  # type: ignore[arg-type]
    choice = answer.choices[0]
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == "tiny"
    assert choice.finish_reason == "length" and choice.message.role == "assistant" and choice.message.content
    assert answer.usage is not None and answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6


@pytest.mark.parametrize("n", [1, 3])
def test_chat_stream_equals_chat(client: OpenAI, n: int) -> None:
    options = {"model": "tiny", "messages": CHAT, "max_tokens": 40, "seed": 5, "n": n, "logprobs": True, "stop": ["e"]}
    whole = client.chat.completions.create(**options)  # type: ignore[call-overload]
    texts, reasons, logprobs, roles = [""] * n, [""] * n, [list[Any]() for _ in range(n)], [0] * n
    usage = None
    stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    for chunk in stream:
        assert chunk.id.startswith("chatcmpl-") and chunk.object == "chat.completion.chunk"
        usage = usage or chunk.usage
        for choice in chunk.choices:
            roles[choice.index] += choice.delta.role is not None
            texts[choice.index] += choice.delta.content or ""
            logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
            if choice.finish_reason:
                assert not reasons[choice.index]
                reasons[choice.index] = choice.finish_reason
    assert roles == [1] * n
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        assert reasons[choice.index] == choice.finish_reason
        content = choice.logprobs.content
        assert [item.token for item in logprobs[choice.index]] == [item.token for item in content]
        assert [item.logprob for item in logprobs[choice.index]] == pytest.approx(
            [i.logprob for i in content], abs=1e-4
        )
    assert usage is not None and usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize("echo", [False, True])
def test_completions_stream_equals_whole(client: OpenAI, echo: bool) -> None:
    options = {"model": "tiny", "prompt": ["Once upon", "the quick"], "max_tokens": 12, "seed": 3, "n": 2}
    options.update(logprobs=2, echo=echo)
    whole = client.completions.create(**options)  # type: ignore[call-overload]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts, pieces = [""] * 4, [dict[str, list[object]]() for _ in range(4)]
    for chunk in client.completions.create(**options, stream=True):  # type: ignore[call-overload]
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            for name, values in choice.logprobs.model_dump().items():
                pieces[choice.index].setdefault(name, []).extend(values)
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        expected = choice.logprobs.model_dump()
        logprobs = pieces[choice.index].pop("token_logprobs")
        assert logprobs == [
            item if item is None else pytest.approx(item, abs=1e-4) for item in expected.pop("token_logprobs")
        ]
        assert len(pieces[choice.index].pop("top_logprobs")) == len(expected.pop("top_logprobs"))
        assert pieces[choice.index] == expected
        assert choice.text.startswith(options["prompt"][choice.index // 2]) == echo  # type: ignore[index]


@pytest.mark.parametrize("chat", [True, False])
def test_every_chunk_counts_the_whole_prompt(client: OpenAI, chat: bool) -> None:
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "seed": 3, "n": 2}
    options["messages" if chat else "prompt"] = CHAT if chat else ["Once upon", "the quick brown fox"]
    create: Any = client.chat.completions.create if chat else client.completions.create
    whole = create(**options).usage
    usage = {"continuous_usage_stats": True, "include_usage": True}
    stream = list(create(**options, stream=True, stream_options=usage))
    assert {chunk.usage.prompt_tokens for chunk in stream} == {whole.prompt_tokens}
    counts = [chunk.usage.completion_tokens for chunk in stream]
    assert counts == sorted(counts) and counts[-1] == whole.completion_tokens and (counts[0] == 0) == chat


def test_completions_defaults_and_ids(client: OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=[5, 6, 7], temperature=0, extra_body={"ignore_eos": True})
    assert answer.usage is not None and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 16)
    again = client.completions.create(model="tiny", prompt=[[5, 6, 7]], temperature=0, extra_body={"ignore_eos": True})
    assert again.choices[0].text == answer.choices[0].text


def test_the_fingerprint_is_that_of_any_other_process_with_the_same_model(
    client: OpenAI, model: str, tmp_path: Path
) -> None:
    config = EngineConfig(model)
    expected = fingerprint(config, inspect_model(config))
    answer = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=1)  # type: ignore[arg-type]
    chunks = client.completions.create(model="tiny", prompt="x", max_tokens=1, stream=True)
    assert {answer.system_fingerprint, *(chunk.system_fingerprint for chunk in chunks)} == {expected}
    template = tmp_path / "template.jinja"
    found = {expected}
    for text in ("{{ 1 }}", "{{ 2 }}"):
        template.write_text(text)
        for other in (EngineConfig(model, dtype="float16"), EngineConfig(model, chat_template=str(template))):
            found.add(fingerprint(other, inspect_model(other)))
    assert len(found) == 4


def test_models(client: OpenAI) -> None:
    assert "tiny" in [model.id for model in client.models.list()]
    assert client.models.retrieve("tiny").owned_by == "kvik"


def test_responses(client: OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "temperature": 0}
    answer = client.responses.create(input="Hello", max_output_tokens=5, instructions="Be brief", **options)
    assert answer.status == "incomplete" and answer.incomplete_details and answer.usage
    assert answer.usage.output_tokens == 5 and answer.output_text
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}]
    assert client.responses.create(input=items, max_output_tokens=2, **options).output


def test_responses_stream(client: OpenAI) -> None:
    events = list(client.responses.create(model="tiny", input="Hello", max_output_tokens=5, temperature=0, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-1] == "response.incomplete"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    final = events[-1]
    assert final.type == "response.incomplete" and final.response.output_text == text


@pytest.mark.parametrize("what", ["retrieve", "delete", "cancel", "input_items.list"])
def test_stored_responses_are_told_not_to_be_there(client: OpenAI, what: str) -> None:
    responses = client.responses
    call = responses.input_items.list if "." in what else getattr(responses, what)
    with pytest.raises(openai.NotFoundError, match="keeps no responses") as missing:
        call("resp_1")
    assert missing.value.code == "response_not_found"


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions/", "/v1/chat/completion"])
def test_a_path_that_is_not_there_is_told_the_nearest(client: OpenAI, served: Served, path: str) -> None:
    answer = httpx.post(served.url + path, json={})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"
    assert "'/v1/chat/completions'" in answer.json()["error"]["message"]
    with pytest.raises(openai.NotFoundError, match="did you mean '/v1/chat/completions'"):
        OpenAI(base_url=served.url, api_key="x").chat.completions.create(model="tiny", messages=CHAT)  # type: ignore[arg-type]


def test_error_classes(client: OpenAI, served: Served, guarded: Served) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="x", max_tokens=100_000)
    assert bad.value.code == "context_length_exceeded" and bad.value.param == "max_tokens"
    assert "100001" in str(bad.value) and "512" in str(bad.value)
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError) as temperature:
        client.chat.completions.create(model="tiny", messages=CHAT, temperature=3)  # type: ignore[arg-type]
    assert temperature.value.param == "temperature"
