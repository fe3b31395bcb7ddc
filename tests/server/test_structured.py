"""Structured output over HTTP: the official client, every spelling, errors; an engine that waits for no grammar."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field
from server_harness import EngineThread, Served, wait_until
from test_aborts import finish, request, run

from kvik.errors import RequestError
from kvik.outputs import FinishReason
from kvik.sampling_params import SamplingParams, StructuredOutputsParams
from kvik.server.engine_client import EngineClient
from kvik.server.errors import ApiError
from kvik.server.reply_syntax import ReplySyntax
from kvik.text.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="llguidance is not installed")

MESSAGES = [{"role": "user", "content": "Hello there"}]
CHAT: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 200}
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "responses": "/v1/responses"}
BODIES: dict[str, dict[str, Any]] = {
    "chat": {"messages": MESSAGES, "max_tokens": 200, "seed": 1},
    "completions": {"prompt": "Hello", "max_tokens": 200, "seed": 1},
    "responses": {"input": "Hello", "max_output_tokens": 200},
}


class Pet(BaseModel):
    """What the tests ask for: its texts are short, whatever the model draws."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["cat", "dog", "größer Ärger"]
    age: Annotated[int, Field(ge=0, le=99)]
    names: Annotated[list[Annotated[str, Field(max_length=5)]], Field(max_length=2)]
    tame: bool | None


SCHEMA = {"name": "pet", "schema": Pet.model_json_schema(), "strict": True}


@pytest.fixture
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.mark.parametrize("temperature", [0, 1])
def test_parse_with_pydantic(client: OpenAI, temperature: int) -> None:
    answer = client.chat.completions.parse(**CHAT, response_format=Pet, temperature=temperature, seed=3, n=2)
    assert all(isinstance(choice.message.parsed, Pet) for choice in answer.choices)
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    first = client.responses.parse(model="tiny", input="Hello", text_format=Pet, temperature=temperature)
    assert isinstance(first.output_parsed, Pet)
    assert first.text is not None and first.text.format is not None and first.text.format.type == "json_schema"


def test_a_stream_is_the_whole_answer(client: OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": SCHEMA}
    whole = client.chat.completions.create(**CHAT, seed=4, response_format=form)  # type: ignore[call-overload]
    stream = client.chat.completions.create(**CHAT, seed=4, response_format=form, stream=True)  # type: ignore[call-overload]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    Pet.model_validate_json(text)


def test_json_object(client: OpenAI) -> None:
    form: Any = {"type": "json_object"}
    answer = client.chat.completions.create(
        **CHAT, seed=2, temperature=0.3, response_format=form, logit_bias={"96": 20}
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


def test_a_cut_answer_says_so(client: OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**{**CHAT, "max_tokens": 3}, response_format=Pet)


@pytest.mark.parametrize("path", ["chat", "completions"])
def test_text_asks_for_nothing(http: httpx.Client, path: str) -> None:
    plain = http.post(PATHS[path], json=BODIES[path]).json()
    asked = http.post(PATHS[path], json={**BODIES[path], "response_format": {"type": "text"}}).json()
    assert asked["choices"] == plain["choices"] and "warnings" not in asked


def schema(inner: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": inner, **more}}


WRONG: list[tuple[str, Any, str]] = [
    ("response_format", {"type": "yaml"}, "json_schema"),
    ("response_format", {"type": "json_object", "schema": {}}, "schema"),
    ("response_format", {"type": "json_schema"}, "name"),
    ("response_format", {"type": "json_schema", "json_schema": []}, "json_schema"),
    ("response_format", schema({"type": "strin"}), "strin"),
    ("response_format", schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    ("response_format", schema({"enum": ["x" * 65536]}), "65536"),
    ("response_format", schema({}, strict=1), "strict"),
    ("response_format", schema({}, scheme={}), "scheme"),
    ("response_format", schema(None), "schema"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}, "name"),
    ("structured_outputs", {"regex": "(a"}, "unclosed"),
    ("structured_outputs", {"regx": "a"}, "regex"),
    ("structured_outputs", {"regex": "a", "choice": ["a"]}, "exactly one"),
    ("structured_outputs", [], "object"),
    ("guided_regex", "(a", "unclosed"),
    ("guided_choice", "yes", "list"),
    ("grammar", "start: missing", "missing"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("field", "value", "names"), WRONG, ids=lambda value: str(value)[:50])
def test_what_is_wrong_is_a_400(http: httpx.Client, field: str, value: Any, names: str, stream: bool) -> None:
    for path in ("chat", "completions"):
        answer = http.post(PATHS[path], json={**BODIES[path], field: value, "stream": stream})
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["type"] == "invalid_request_error", answer.text
        assert error["param"] == field and names in error["message"]


def test_two_fields_and_contradictions(http: httpx.Client) -> None:
    more = {"guided_regex": "a"}
    for name, value in (("response_format", {"type": "json_object"}), ("ignore_eos", True), ("min_tokens", 3)):
        error = http.post(PATHS["chat"], json={**BODIES["chat"], name: value, **more}).json()["error"]
        assert name in error["message"] and error["param"] in (name, "guided_regex")


def test_responses_formats(http: httpx.Client) -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"enum": ["yes"]}, "strict": None}
    body = http.post(
        PATHS["responses"], json={**BODIES["responses"], "text": {"format": form, "verbosity": "low"}}
    ).json()
    assert body["output"][0]["content"][0]["text"] == '"yes"' and body["text"]["format"] == form
    assert any("verbosity" in warning for warning in body["warnings"])
    for text in (
        {"format": {"type": "json_schema", "name": "x"}},
        {"frmat": {}},
        {"format": schema({"type": "strin"})},
    ):
        answer = http.post(PATHS["responses"], json={**BODIES["responses"], "text": text})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "text"


def test_plain_generation(http: httpx.Client) -> None:
    body = {"prompt": "Hello", "structured_outputs": {"choice": ["yes"]}}
    assert http.post("/generate", json=body).json()["text"] == "yes"
    assert http.post("/generate", json={**body, "structured_outputs": {"regex": "(a"}}).status_code == 400


def test_whether_reasoning_comes_before_a_structure_is_told_from_the_prompt(model: str) -> None:
    tokenizer = Tokenizer.from_folder(Path(model))
    syntax = ReplySyntax(field="reasoning_content")
    for prompt, reasoning in (("<think>\n", "opened"), ("<think>\n\n</think>\n\n", "none"), ("Hi", "possible")):
        params = SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]  # which takes dicts
        structure = syntax.after(prompt, params).params_of(params, tokenizer).structured_outputs
        assert structure is not None and structure.reasoning == reasoning
        given = dataclasses.replace(params, structured_outputs=dataclasses.replace(structure, reasoning="none"))
        after = syntax.after(prompt, given)
        assert after.thoughts == "none" and after.params_of(given, tokenizer) == given


class SlowGrammars:
    """Compiles when it is told to."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def compile(self, wanted: StructuredOutputsParams) -> None:
        assert self.go.wait(20)
        if wanted.regex == "bad":
            raise RequestError("regex: bad", "structured_outputs")


def test_the_engine_goes_on_while_grammars_are_compiled(model: str, tmp_path: Path) -> None:
    grammars = SlowGrammars()

    async def body(client: EngineClient, engine: EngineThread) -> None:
        options: dict[str, Any] = {"ignore_eos": False, "n": 2}
        slow = client.open([request("slow", structured_outputs={"regex": "a"}, **options)], [None], stream=False)
        bad = client.open([request("bad", structured_outputs={"regex": "bad"}, **options)], [None], stream=False)
        late = client.open(
            [request("late", structured_outputs={"regex": "a"}, **options)], [None], stream=False, deadline=0.05
        )
        left = client.open([request("left", structured_outputs={"regex": "a"}, **options)], [None], stream=False)
        left.close()
        other = await finish(client.open([request("other")], [None], stream=False))
        assert other[0].finish_reason == FinishReason.LENGTH
        await asyncio.sleep(0.2)
        assert set(engine.server._compiling) == {"slow", "bad", "late"}
        grammars.go.set()
        ends = await asyncio.gather(finish(slow), finish(late))
        assert [found[0].finish_reason for found in ends] == [FinishReason.LENGTH, FinishReason.TIMEOUT]
        with pytest.raises(ApiError, match="bad") as caught:
            await finish(bad)
        assert caught.value.status == 400 and caught.value.param == "structured_outputs"
        await asyncio.to_thread(wait_until, lambda: not engine.server._compiling)

    run(model, tmp_path, body, grammars=grammars)
