"""Forced calls: whatever a model would say, it calls a function of the request with arguments that are right."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from openai import OpenAI
from server_harness import Served, serve
from test_tools import OPENING, calls_of, joined
from tiny_models import make_tiny

from kvik.errors import RequestError
from kvik.server.forced_calls import call_grammar
from kvik.server.reply_parser import ReplyParser
from kvik.server.reply_syntax import message_of
from kvik.server.tool_formats import TOOL_FORMATS, ToolFormat
from kvik.structured.grammars import Grammars
from kvik.text.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="llguidance is not installed")
jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="jsonschema_rs is not installed")

USER: Any = [{"role": "user", "content": "What's the weather in Zürich?"}]
KINDS = {"$defs": {"unit": {"enum": ["°C", "K"]}}, "additionalProperties": False}
SCHEMAS: dict[str, Any] = {
    "wetter_größe": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 4}, "unit": {"$ref": "#/$defs/unit"}},
        "required": ["unit"],
        **KINDS,
    },
    "add": {
        "properties": {"terms": {"type": "array", "items": {"type": "integer", "maximum": 9}, "maxItems": 3}},
        "required": ["terms"],
        "additionalProperties": False,
    },
    "now": None,
}
FUNCTIONS = [{"name": name, **({} if schema is None else {"parameters": schema})} for name, schema in SCHEMAS.items()]
TOOLS: Any = [{"type": "function", "function": {**function, "strict": True}} for function in FUNCTIONS]
TEXTS = {
    "hermes": "<tool_call>\n{}\n</tool_call>\n<tool_call>\n{}\n</tool_call>",
    "qwen3_coder": "<tool_call>\n{}\n</tool_call>\n<tool_call>\n{}\n</tool_call>",
    "glm45": "<tool_call>{}</tool_call>\n<tool_call>{}</tool_call>",
    "mistral": "[TOOL_CALLS] [{}, {}]",
    "mistral_args": "[TOOL_CALLS]{}[TOOL_CALLS]{}",
    "llama": "{}; {}",
}
CALLS = [("add", '{"terms": [1, 2]}'), ("wetter_größe", '{"unit": "°C"}')]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("forced") / "tiny")


@pytest.fixture(scope="module", params=["hermes", "qwen3_coder", "glm45", "mistral_args", "llama"])
def forced(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A random model that is taken to write calls in some format."""
    log = tmp_path_factory.mktemp("logs") / "forced.log"
    with serve(str(folder), log, "--tool-format", request.param) as found:
        yield found


def check(calls: list[tuple[str, str]], names: set[str]) -> None:
    assert calls
    for name, text in calls:
        assert name in names
        schema = SCHEMAS[name] or {"type": "object", "maxProperties": 0}
        jsonschema_rs.validator_for(schema).validate(json.loads(text))


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("choice", ["required", "one", "wetter_größe", "now"])
def test_a_random_model_calls(forced: Served, choice: str, seed: int) -> None:
    required = choice in ("required", "one")
    options: dict[str, Any] = {
        "model": "tiny", "messages": USER, "tools": TOOLS, "tool_choice": "required" if required else named(choice),
        "seed": seed, "temperature": seed % 2, "max_tokens": 300, "n": 1, "parallel_tool_calls": choice != "one",
        # A model that knows nothing would begin further calls until the tokens are spent.
        "logit_bias": {"0": 3},
    }  # fmt: skip
    with OpenAI(base_url=f"{forced.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        answer = client.chat.completions.create(**options).choices[0]
        streamed = joined(list(client.chat.completions.create(**options, stream=True)))
    calls = calls_of(answer.message.model_dump())
    check(calls, set(SCHEMAS) if required else {choice})
    assert calls_of(streamed) == calls and answer.finish_reason == streamed["reason"] == "tool_calls"
    assert not answer.message.content and not streamed["content"]
    assert choice == "required" or len(calls) == 1


def test_responses_are_forced_too(forced: Served) -> None:
    flat: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    options: dict[str, Any] = {"model": "tiny", "input": "Hi", "tools": flat, "max_output_tokens": 300}
    options.update(tool_choice={"type": "function", "name": "add"}, temperature=0)
    with OpenAI(base_url=f"{forced.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        whole = client.responses.create(**options)
        (*_, last) = client.responses.create(**options, stream=True)
    for response in (whole, last.response):
        (item,) = response.output
        check([(item.name, item.arguments)], {"add"})


def test_a_model_that_may_call_calls_or_answers_in_json(forced: Served) -> None:
    """What agents with a type of output ask for: calls, and JSON in the end."""
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"], **KINDS}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    options: dict[str, Any] = {"model": "tiny", "messages": USER, "tools": TOOLS[:2], "response_format": form, "n": 16}
    options.update(parallel_tool_calls=False, seed=1, max_tokens=300, temperature=2, logit_bias={"0": 3})
    with OpenAI(base_url=f"{forced.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        choices = client.chat.completions.create(**options).choices
    for choice in choices:
        if choice.finish_reason == "tool_calls":
            check(calls_of(choice.message.model_dump()), {"add", "wetter_größe"})
        else:
            assert choice.finish_reason == "stop"
            jsonschema_rs.validator_for(schema).validate(json.loads(choice.message.content or ""))
    assert {choice.finish_reason for choice in choices} == {"stop", "tool_calls"}


def test_other_texts_than_json_leave_no_room_for_calls(forced: Served) -> None:
    body = {"messages": USER, "tools": TOOLS, "structured_outputs": {"choice": ["yes", "no"]}}
    answer = httpx.post(f"{forced.url}/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] in ("yes", "no")
    assert "tools cannot be called: choice says what the text has to be" in answer["warnings"]


@pytest.mark.parametrize("special", [False, True], ids=["plain mark", "special mark"])
def test_a_model_thinks_before_it_does_what_it_must(tmp_path: Path, special: bool) -> None:
    folder = make_tiny(tmp_path / "tiny")
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    (backend.add_special_tokens if special else backend.add_tokens)(["</think>"])
    backend.save(str(folder / "tokenizer.json"))
    (tmp_path / "opening.jinja").write_text(OPENING)
    bias = {str(backend.token_to_id("</think>")): 5, "0": 3}
    schema = {"type": "json_schema", "json_schema": {"name": "add", "schema": {"type": "object", **SCHEMAS["add"]}}}
    flags = ("--tool-format", "hermes", "--chat-template", str(tmp_path / "opening.jinja"))
    thoughts = []
    with (
        serve(str(folder), tmp_path / "log", *flags) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        for seed in range(4):
            options: Any = {"model": "tiny", "messages": USER, "logit_bias": bias, "seed": seed, "max_tokens": 400}
            for more in ({"tools": TOOLS, "tool_choice": named("add")}, {"response_format": schema}):
                answer = client.chat.completions.create(**options, **more).choices[0]
                streamed = joined(list(client.chat.completions.create(**options, **more, stream=True)))
                message = answer.message.model_dump()
                assert streamed.get("reasoning_content") == message["reasoning_content"]
                assert answer.finish_reason == streamed["reason"] == ("tool_calls" if "tools" in more else "stop")
                assert calls_of(streamed) == calls_of(message)
                calls = calls_of(message) if "tools" in more else [("add", message["content"])]
                check(calls, {"add"})
                thoughts.append(message["reasoning_content"])
        structure = {"choice": ["yes"], "reasoning": "none"}
        body = {"messages": USER, "structured_outputs": structure}
        message = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["choices"][0]["message"]
        assert (message["content"], message["reasoning_content"]) == ("yes", None)
    assert any(thoughts)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tool_choice": named("other")}, "tool_choice"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": []}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"uniqueItems": 1}}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f" * 65536}}]}, "tools"),
    ],
)  # fmt: skip
def test_what_cannot_be_forced_is_a_400(forced: Served, changes: dict[str, Any], param: str) -> None:
    body = {"messages": USER, "tools": TOOLS, "tool_choice": "required", "max_tokens": 300, **changes}
    answer = httpx.post(f"{forced.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_strict_is_free_under_auto_and_says_so(forced: Served) -> None:
    body = {"messages": USER, "tools": TOOLS, "max_tokens": 300, "parallel_tool_calls": False}
    answers = [
        httpx.post(f"{forced.url}/v1/chat/completions", json={**body, "tool_choice": choice}).json()
        for choice in ("auto", "required")
    ]
    assert [any("strict" in text for text in answer.get("warnings", ())) for answer in answers] == [True, False]


def written(form: ToolFormat, name: str, arguments: str) -> str:
    """A call as models of this format write it."""
    if form.argument is not None:
        before, after = form.argument
        for key, value in json.loads(arguments).items():
            text = value if isinstance(value, str) else json.dumps(value)
            arguments = (arguments if arguments[0] != "{" else "") + before % key + text + after
    return form.head % (name if form.states else json.dumps(name, ensure_ascii=False)) + arguments + form.tail


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("form", TOOL_FORMATS, ids=lambda form: form.name)
def test_grammars_allow_what_models_write_and_parsers_read(folder: Path, form: ToolFormat, special: bool) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if special:
        backend.add_special_tokens([mark for mark in form.marks if mark != ">"])
    eos = Tokenizer.from_folder(folder).eos_token_ids
    tokenizer = Tokenizer(backend, eos_token_ids=eos)
    text = TEXTS[form.name].format(*(written(form, name, text) for name, text in CALLS))
    pieces = ReplyParser(form, {name: schema or {} for name, schema in SCHEMAS.items()}).feed(text)
    assert calls_of(message_of(pieces, None)) == CALLS
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    for many in (True, False):
        wanted = call_grammar(form, FUNCTIONS, tokenizer, many=many)
        Grammars(lambda: tokenizer.spelling_table(tokenizer.vocab_size)).compile(wanted)
        matcher = Grammars(lambda: tokenizer.byte_table(tokenizer.vocab_size)).matcher(wanted, ())
        assert (matcher.state.try_consume_tokens(token_ids) == len(token_ids)) == many
        assert matcher.state.is_accepting() or not many


KINDS_OF_VALUES: list[tuple[Any, list[tuple[str, Any]], list[str]]] = [
    ({"type": "string"}, [("5", "5"), ("\n", "\n"), ("", ""), ("<a> </b>\nc", "<a> </b>\nc")], ["a{mark}b"]),
    ({"type": "string", "minLength": 1, "maxLength": 3}, [("é\né", "é\né")], ["", "abcd"]),
    ({"type": "integer"}, [("5", 5)], ["five", "5.5", '"5"']),
    ({"enum": ["C", "No", 5, None, [1]]}, [("C", "C"), ("5", 5), ("null", None), ("[1]", [1])], ["K", '"C"', "6"]),
    ({"const": "x"}, [("x", "x")], ["y"]),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, [("null", None), ("a", "a"), ("5", "5")], []),
    ({"type": ["string", "integer"]}, [("5", 5), ("5.5", "5.5")], []),
    ({"anyOf": [{"enum": ["a"]}, {"type": "integer", "maximum": 3}]}, [("a", "a"), ("3", 3)], ["4", "b"]),
    ({"anyOf": [{"$ref": "#/$defs/unit"}, {"type": "null"}], "default": None}, [("K", "K"), ("null", None)], ["C"]),
    ({"type": "object", "properties": {"u": {"$ref": "#/$defs/unit"}}}, [('{"u": "K"}', {"u": "K"})], ['{"u": "C"}']),
    ({"type": "array", "items": {"type": "string"}}, [('["a", "5"]', ["a", "5"])], ["a", "[5]"]),
    ({}, [("a b", "a b"), ("5", 5)], []),
    (True, [("a b", "a b")], []),
]


@pytest.mark.parametrize("form", [form for form in TOOL_FORMATS if form.argument], ids=lambda form: form.name)
@pytest.mark.parametrize("kind", KINDS_OF_VALUES, ids=lambda kind: str(kind[0])[:50])
def test_values_between_marks_follow_their_schema(folder: Path, form: ToolFormat, kind: Any) -> None:
    schema, good, bad = kind
    tokenizer = Tokenizer.from_folder(folder)
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"], **KINDS}
    wanted = call_grammar(form, [{"name": "f", "parameters": parameters}], tokenizer, many=False)
    grammars = Grammars(lambda: tokenizer.byte_table(tokenizer.vocab_size))
    assert form.argument is not None
    before, after = form.argument
    opening, _, closing = form.layout
    (mark,) = form.states["value"]

    def accepted(value: str) -> tuple[bool, str]:
        text = opening + form.head % "f" + before % "x" + value + after + form.tail + closing
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        state = grammars.matcher(wanted, ()).state
        return state.try_consume_tokens(token_ids) == len(token_ids) and state.is_accepting(), text

    for value, read in good:
        fine, text = accepted(value)
        ((_, arguments),) = calls_of(message_of(ReplyParser(form, {"f": parameters}).feed(text), None))
        assert fine and json.loads(arguments) == {"x": read}
        jsonschema_rs.validator_for(parameters).validate(json.loads(arguments))
    assert not any(accepted(value.replace("{mark}", mark))[0] for value in bad)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"properties": {"x": {"type": "string", "pattern": "a"}}}, "x of 'f': pattern cannot be forced"),
        ({"properties": {"x": {"type": ["string", "null"], "maxLength": 3}}}, "maxLength"),
        ({"properties": {"x": {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 3}]}}}, "minimum"),
        ({"properties": {"x": {"anyOf": [{"type": "string"}, {"enum": [3]}]}}}, "a few values"),
        ({"properties": {"x": {"enum": ["5", 5]}}}, "'5' would be read"),
        ({"properties": {"x": {"enum": 5}}}, "enum"),
        ({"properties": {"x": {"anyOf": 5, "type": "string"}}}, "anyOf"),
        ({"properties": {"x": False}}, "False"),
        ({"properties": {"x y": {}}}, "'x y'"),
        ({"properties": [1]}, "properties"),
        ({"properties": {"x": {"type": "string", "maxLength": "3}/"}}}, "length"),
        ({"required": [["x"]]}, "required"),
        ({"required": 3}, "required"),
        ({"minProperties": 1}, "minProperties"),
    ],
)
def test_what_cannot_be_forced_between_marks_is_refused(folder: Path, parameters: Any, words: str) -> None:
    for form in TOOL_FORMATS:
        if form.argument is not None:
            with pytest.raises(RequestError, match=re.escape(words)) as caught:
                call_grammar(form, [{"name": "f", "parameters": parameters}], Tokenizer.from_folder(folder), many=False)
            assert caught.value.param == "tools" and form.name in str(caught.value)


def test_a_grammar_that_grows_too_large_is_refused_at_once(folder: Path) -> None:
    """Each of 400 parameters would have a copy of the definitions that they share, 10 million characters in all."""
    shared = {"$defs": {"many": {"enum": ["x" * 60] * 400}}}
    parameters = {"properties": {f"p{i}": {"type": "integer", "minimum": i} for i in range(400)}, **shared}
    tokenizer = Tokenizer.from_folder(folder)
    for form in TOOL_FORMATS:
        if form.argument is not None:
            tracemalloc.start()
            with pytest.raises(RequestError, match="more than 65536 characters") as caught:
                call_grammar(form, [{"name": "f", "parameters": parameters}], tokenizer, many=False)
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert caught.value.param == "tools" and most < 5e6


def test_numbers_that_no_float_holds_are_arguments() -> None:
    pieces = ReplyParser(TOOL_FORMATS[0]).feed('<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>')
    assert calls_of(message_of(pieces, None)) == [("f", '{"x": 1e999}')]
