"""Every documented field does what it says or is refused: held against the OpenAPI document itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import jinja2
import pytest

from kvik.server import body as bodies
from kvik.server.openapi import BODIES, NO_EFFECT
from kvik.server.protocol import IGNORED, REFUSED

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello there"}], "seed": 7, "max_tokens": 24}
MESSAGES = {"messages": CHAT["messages"]}
TEXT: dict[str, Any] = {"prompt": "Hello there", "seed": 7, "max_tokens": 24}
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


def text_of(body: dict[str, Any]) -> str:
    choice = body["choices"][0]
    return str(choice.get("text", (choice.get("message") or {}).get("content")))


def tokens(body: dict[str, Any]) -> int:
    return int(body["usage"]["completion_tokens"])


Check = Callable[[dict[str, Any], dict[str, Any]], bool]


def differs(with_field: dict[str, Any], without: dict[str, Any]) -> bool:
    return text_of(with_field) != text_of(without)


# field -> (value, more fields in both requests, what must hold of the two bodies)
EFFECTS: dict[str, tuple[Any, dict[str, Any], Check]] = {
    "allowed_token_ids": ([40], {}, lambda a, b: len(set(text_of(a))) == 1),
    "bad_words": (["e", " the"], {"max_tokens": 200, "ignore_eos": True}, differs),
    "cache_salt": ("s", {}, lambda a, b: a["usage"]["prompt_tokens_details"]["cached_tokens"] == 0),
    "echo": (True, {}, lambda a, b: text_of(a) == "Hello there" + text_of(b)),
    "frequency_penalty": (2, {"logit_bias": {"40": 9}}, differs),
    "ignore_eos": (True, {"logit_bias": {"0": 100}}, lambda a, b: tokens(a) == 24 and tokens(b) == 1),
    "grammar": ('root ::= "yes" | "no"', {}, lambda a, b: text_of(a) in ("yes", "no")),
    "guided_choice": (["yes", "no"], {}, lambda a, b: text_of(a) in ("yes", "no")),
    "guided_grammar": ('start: "yes" | "no"', {}, lambda a, b: text_of(a) in ("yes", "no")),
    "guided_json": ({"enum": ["yes"]}, {}, lambda a, b: text_of(a) == '"yes"'),
    "guided_regex": ("[0-9]{3}", {}, lambda a, b: text_of(a).isdigit() and len(text_of(a)) == 3),
    "include_stop_str_in_output": (True, {"stop": ["A"], "logit_bias": {"35": 100}}, lambda a, b: text_of(a) == "A"),
    "json_schema": ({"enum": ["yes"]}, {}, lambda a, b: text_of(a) == '"yes"'),
    "logit_bias": ({"40": 100}, {}, lambda a, b: len(set(text_of(a))) == 1),
    "max_tokens": (3, {}, lambda a, b: tokens(a) == 3),
    "max_completion_tokens": (3, {"max_tokens": None}, lambda a, b: tokens(a) == 3),
    "min_p": (1.0, {}, differs),
    "min_tokens": (5, {"logit_bias": {"0": 100}}, lambda a, b: tokens(a) >= 6 and tokens(b) == 1),
    "n": (3, {}, lambda a, b: len(a["choices"]) == 3),
    "presence_penalty": (2, {"logit_bias": {"40": 8}}, differs),
    "repetition_penalty": (50.0, {"logit_bias": {"40": 8}}, differs),
    "response_format": ({"type": "json_object"}, {}, lambda a, b: text_of(a).startswith("{")),
    "return_token_ids": (True, {}, lambda a, b: len(a["choices"][0]["token_ids"]) == tokens(a)),
    "seed": (8, {}, differs),
    "skip_special_tokens": (False, {"logit_bias": {"1": 100}}, lambda a, b: "<|im_start|>" in text_of(a)),
    "stop": (["A"], {"logit_bias": {"35": 100}}, lambda a, b: text_of(a) == "" and tokens(a) == 1),
    "stop_token_ids": ([35], {"logit_bias": {"35": 100}}, lambda a, b: a["choices"][0]["stop_reason"] == 35),
    "structured_outputs": ({"choice": ["yes"]}, {}, lambda a, b: text_of(a) == "yes"),
    "temperature": (0, {}, differs),
    "top_k": (1, {}, differs),
    "top_p": (0.01, {}, differs),
}
CHAT_EFFECTS: dict[str, tuple[Any, dict[str, Any], Check]] = {
    "add_generation_prompt": (False, {}, lambda a, b: a["usage"]["prompt_tokens"] < b["usage"]["prompt_tokens"]),
    "continue_final_message": (True, {}, lambda a, b: a["usage"]["prompt_tokens"] < b["usage"]["prompt_tokens"]),
    "logprobs": (True, {}, lambda a, b: len(a["choices"][0]["logprobs"]["content"]) == tokens(a)),
    "top_logprobs": (
        3, {"logprobs": True}, lambda a, b: len(a["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 3
    ),
}  # fmt: skip
TEXT_EFFECTS: dict[str, tuple[Any, dict[str, Any], Check]] = {
    "logprobs": (2, {}, lambda a, b: len(a["choices"][0]["logprobs"]["top_logprobs"][0]) >= 2),
}
# Fields with tests of their own, in this folder: (field, where).
ELSEWHERE = {
    "messages", "prompt", "model", "stream", "stream_options", "priority", "tools", "tool_choice",
    "parallel_tool_calls", "reasoning_effort", "chat_template_kwargs",
}  # fmt: skip


def cases(name: str) -> list[str]:
    return sorted(BODIES[name]["properties"])


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name in PATHS for field in cases(name) if field not in ELSEWHERE]
)
def test_every_documented_field(http: httpx.Client, name: str, field: str) -> None:
    base = CHAT if name == "chat" else TEXT
    if field in IGNORED:
        kind = BODIES[name]["properties"][field]
        assert kind["description"] == NO_EFFECT
        value = {"object": {}, "boolean": True}.get(kind["type"], "x")
        body = http.post(PATHS[name], json={**base, field: value}).json()
        assert any(field in warning for warning in body["warnings"])
        return
    value, more, check = {**EFFECTS, **(CHAT_EFFECTS if name == "chat" else TEXT_EFFECTS)}[field]
    without = http.post(PATHS[name], json={**base, **more})
    with_field = http.post(PATHS[name], json={**base, **more, field: value})
    assert without.status_code == with_field.status_code == 200, with_field.text
    assert check(with_field.json(), without.json()), (with_field.json(), without.json())


@pytest.mark.parametrize(
    ("name", "fields", "valid"),
    [
        ("embeddings", {"input": ""}, False), ("embeddings", {"input": []}, False),
        ("embeddings", {"input": [""]}, False), ("embeddings", {"input": {}}, False),
        ("embeddings", {"input": ["a", [5, 6]]}, True), ("embeddings", {"input": [5, 6]}, True),
        ("completions", {**TEXT, "allowed_token_ids": []}, False), ("completions", {**TEXT, "prompt": []}, False),
        ("chat", {**CHAT, "tool_choice": {}}, False), ("responses", {"input": [5]}, False),
        ("responses", {"input": "x", "max_output_tokens": 1}, True),
        ("tokenize", {}, False), ("tokenize", {"prompt": "x", **CHAT}, False), ("tokenize", {"prompt": "x"}, True),
    ],
)  # fmt: skip
def test_the_document_and_the_server_agree(http: httpx.Client, name: str, fields: dict[str, Any], valid: bool) -> None:
    jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="jsonschema_rs is not installed")
    assert jsonschema_rs.validator_for(BODIES[name]).is_valid(fields) == valid
    path = PATHS.get(name) or ("/tokenize" if name == "tokenize" else f"/v1/{name}")
    assert http.post(path, json=fields).status_code == (200 if valid else 400)


REFUSING = {**PATHS, "responses": "/v1/responses", "generate": "/generate", "batch_generate": "/batch_generate"}
LEAST: dict[str, dict[str, Any]] = {"chat": CHAT, "responses": {"input": "x"}, "batch_generate": {"prompts": ["x"]}}


@pytest.mark.parametrize("name", REFUSING)
@pytest.mark.parametrize("field", sorted(REFUSED))
def test_refused_fields_are_named(http: httpx.Client, name: str, field: str) -> None:
    answer = http.post(REFUSING[name], json={**LEAST.get(name, TEXT), field: {"type": "json_object"}})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == field and field in error["message"]
    assert field not in BODIES[name]["properties"]


@pytest.mark.parametrize(
    ("name", "fields", "refused"),
    [
        ("completions", {"n": 2, "best_of": 2}, None), ("completions", {"best_of": 1}, None),
        ("completions", {"n": 2, "best_of": 1}, "best_of"), ("completions", {"best_of": 2}, "best_of"),
        ("completions", {"best_of": True}, "best_of"), ("generate", {"n": 2, "best_of": 2}, None),
        ("chat", {"functions": [], "function_call": "none", "modalities": ["text"]}, None),
        ("chat", {"function_call": "auto"}, "function_call"),
        ("responses", {"top_logprobs": 0, "truncation": "disabled", "include": []}, None),
        ("responses", {"top_logprobs": 1}, "top_logprobs"),
    ],
)  # fmt: skip
def test_refused_fields_may_ask_for_what_happens_anyway(
    http: httpx.Client, name: str, fields: dict[str, Any], refused: str | None
) -> None:
    answer = http.post(REFUSING[name], json={**LEAST.get(name, TEXT), **fields})
    body = answer.json()
    assert (body.get("error") or {}).get("param") == refused and answer.status_code == (400 if refused else 200), body
    assert "warnings" not in body


def test_tools_reach_the_template_or_are_refused(http: httpx.Client) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    shown = http.post(PATHS["chat"], json={**CHAT, "tools": tools, "tool_choice": "auto"}).json()
    assert any("tools" in warning for warning in shown["warnings"])
    assert http.post(PATHS["chat"], json={**CHAT, "tools": tools, "tool_choice": "none"}).status_code == 200
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):  # in a format that is not known
        refused = http.post(PATHS["chat"], json={**CHAT, "tools": tools, "tool_choice": choice})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "tool_choice"


@pytest.mark.parametrize("kind", ["custom", "web_search", 5, None])
def test_tools_of_other_types_are_refused(http: httpx.Client, kind: Any) -> None:
    error = http.post(PATHS["chat"], json={**CHAT, "tools": [{**NESTED, "type": kind}]}).json()["error"]
    assert error["param"] == "tools" and '{"type": "function"' in error["message"]


def test_template_variables(http: httpx.Client) -> None:
    body = http.post(PATHS["chat"], json={**CHAT, "reasoning_effort": "low"}).json()
    assert any("reasoning_effort" in warning for warning in body["warnings"])
    for value in ("huge", 3, {"a": 1}):
        error = http.post(PATHS["chat"], json={**CHAT, "reasoning_effort": value}).json()["error"]
        assert error["param"] == "reasoning_effort" and "low" in error["message"]
    assert http.post(PATHS["chat"], json={**CHAT, "chat_template_kwargs": {"messages": []}}).status_code == 400
    assert http.post(PATHS["chat"], json={**CHAT, "priority": 5}).status_code == 200
    assert http.post(PATHS["chat"], json={**CHAT, "priority": 1001}).status_code == 400


def test_template_variables_that_are_no_object(http: httpx.Client) -> None:
    for more in ({}, {"reasoning_effort": "low"}):
        answer = http.post(PATHS["chat"], json={**CHAT, "chat_template_kwargs": 5, **more})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "chat_template_kwargs", answer.text


def test_unknown_fields(http: httpx.Client, strict: httpx.Client) -> None:
    warned = http.post(PATHS["chat"], json={**CHAT, "temprature": 1}).json()
    assert "temprature" in warned["warnings"][0] and "temperature" in warned["warnings"][0]
    for path, body in ((PATHS["chat"], CHAT), (PATHS["completions"], TEXT), ("/generate", TEXT)):
        refused = strict.post(path, json={**body, "temprature": 1})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "temprature"
        assert "'temperature'" in refused.json()["error"]["message"]
    assert strict.post(PATHS["chat"], json={**CHAT, "user": "me"}).status_code == 200


@pytest.mark.parametrize("fields", [{}, {"prompt": "x", "messages": []}])
def test_a_text_or_a_conversation_is_tokenised(http: httpx.Client, fields: dict[str, Any]) -> None:
    answer = http.post("/tokenize", json=fields)
    assert answer.status_code == 400 and "one of the two" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({**MESSAGES, "add_special_tokens": False}, "add_special_tokens has no effect beside messages"),
        ({"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt has no effect beside a prompt"),
    ],
)
def test_fields_of_a_text_mean_nothing_to_a_conversation(
    http: httpx.Client, strict: httpx.Client, fields: dict[str, Any], warning: str
) -> None:
    """They are known, so that nobody is told to write the same name."""
    assert http.post("/tokenize", json=fields).json()["warnings"] == [warning]
    assert strict.post("/tokenize", json=fields).json()["warnings"] == [warning]


def test_many_unknown_fields_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look for the nearest name of each would take seconds, in which the process does nothing else."""
    looked_for: list[str] = []
    monkeypatch.setattr(bodies, "did_you_mean", lambda name, known: looked_for.append(name) or "")
    fields = {f"name_{i}": i for i in range(20_000)}
    warnings = bodies.Body(fields).finish(("temperature", "max_tokens"), strict=False)
    assert len(looked_for) == 32
    assert len(warnings) == 33 and "name_31" in warnings[31] and "19968 more" in warnings[32]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("chat", {**CHAT, "max_completion_tokens": 100_000}, "max_completion_tokens"),
        ("chat", {**CHAT, "max_completion_tokens": -1}, "max_completion_tokens"),
        ("chat", {**CHAT, "max_tokens": 100_000}, "max_tokens"),
        ("chat", {"messages": [{"role": "user", "content": "x " * 2000}]}, "messages"),
        ("responses", {"input": "x", "max_output_tokens": 100_000}, "max_output_tokens"),
        ("responses", {"input": "x " * 2000}, "input"),
    ],
)
def test_errors_name_the_field_given(http: httpx.Client, path: str, fields: dict[str, Any], param: str) -> None:
    answer = http.post(f"/v1/{'chat/completions' if path == 'chat' else path}", json=fields)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param, answer.text
    assert "_" not in param or f"{param} " in error["message"]


@pytest.mark.parametrize("items", [[{"type": []}], [{"type": {}}], [{"type": None}], [[]]])
def test_items_that_are_none(http: httpx.Client, items: list[Any]) -> None:
    answer = http.post("/v1/responses", json={"input": items})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "input"


NESTED = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": []}, "input", "input is empty"),
        ({"input": [{"content": "x"}], "instructions": "Be brief"}, "input", "input[0].role"),
        ({"input": [{"role": "user"}], "instructions": "Be brief"}, "input", "input[0].content"),
        ({"input": [{"role": "user", "content": 5}]}, "input", "input[0].content"),
        ({"input": "x", "tools": [NESTED]}, "tools", 'tools[0] must be {"type": "function", "name": ...}'),
        ({"input": "x", "tools": [{"type": "function"}]}, "tools", '"name": ...'),
    ],
)
def test_errors_of_responses_speak_of_their_own_fields(
    http: httpx.Client, fields: dict[str, Any], param: str, words: str
) -> None:
    answer = http.post("/v1/responses", json=fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param and words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value", "more"),
    [
        ("n", 5, {}),
        ("stop", ["x"] * 65, {}),
        ("stop", "y" * 1025, {}),
        ("bad_words", ["x"] * 1025, {}),
        ("logit_bias", {"1": 1, "2": 1, "3": 1, "4": 1}, {}),
        ("logit_bias", {"384": 1}, {}),
        ("top_logprobs", 21, {"logprobs": True}),
        ("max_tokens", 512, {}),
        ("stop_token_ids", [384], {}),
        ("temperature", 2.1, {}),
        ("seed", 2**63, {}),
        ("stream_options", {"include_usage": True}, {}),
    ],
)
def test_one_above_each_limit(strict: httpx.Client, field: str, value: Any, more: dict[str, Any]) -> None:
    answer = strict.post(PATHS["chat"], json={**CHAT, **more, field: value})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field, answer.text


def test_at_each_limit(strict: httpx.Client) -> None:
    limits = {"n": 4, "stop": ["x" * 1024] * 8 + ["y"] * 56, "logit_bias": {"1": 1, "2": 1, "383": 1}, "logprobs": True}
    answer = strict.post(PATHS["chat"], json={**CHAT, **limits, "top_logprobs": 20, "temperature": 2})
    assert answer.status_code == 200, answer.text


def test_tokens_share_events(strict: httpx.Client) -> None:
    body = {**TEXT, "max_tokens": 200, "ignore_eos": True, "temperature": 0}
    whole = strict.post(PATHS["completions"], json=body).json()
    lines = strict.post(PATHS["completions"], json={**body, "stream": True}).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text_of(whole)
    assert len(chunks) < 100 and chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_plain_endpoints(http: httpx.Client) -> None:
    whole = http.post("/generate", json={**TEXT, "temperature": 0}).json()
    assert whole["usage"]["completion_tokens"] <= 24
    events = http.post("/generate_stream", json={**TEXT, "temperature": 0}).text.split("\n\n")
    records = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    assert "".join(record["text"] for record in records) == whole["text"]
    assert records[-1]["finish_reason"] == whole["finish_reason"] and "data: [DONE]" in events
    batch = {key: value for key, value in TEXT.items() if key != "prompt"}
    results = http.post("/batch_generate", json={**batch, "temperature": 0, "prompts": [TEXT["prompt"], "x"]}).json()
    assert results["results"][0]["text"] == whole["text"] and len(results["results"]) == 2


def test_text_endpoints(http: httpx.Client) -> None:
    ids = http.post("/tokenize", json={"prompt": "Hello <|im_end|>"}).json()
    assert ids["count"] == len(ids["tokens"]) and ids["max_model_len"] == 512
    assert http.post("/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": "Hello <|im_end|>"}
    prompt = http.post("/apply-template", json={"messages": CHAT["messages"]}).json()["prompt"]
    assert prompt.endswith("<|im_start|>assistant\n")
    chat = http.post("/tokenize", json={"messages": CHAT["messages"]}).json()
    usage = http.post(PATHS["chat"], json=CHAT).json()["usage"]
    assert chat["count"] == usage["prompt_tokens"]
    assert http.post("/detokenize", json={"tokens": [99999]}).status_code == 400


def test_a_client_can_make_the_prompts_of_chats_itself_from_what_the_server_tells(http: httpx.Client) -> None:
    info = http.get("/tokenizer_info").json()
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(info["chat_template"])
    text = template.render(messages=CHAT["messages"], add_generation_prompt=True, **info)
    assert text == http.post("/apply-template", json={"messages": CHAT["messages"]}).json()["prompt"]
    tokens = http.post("/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False}).json()["tokens"]
    assert tokens[0] in info["eos_token_ids"] and len(tokens) == 1
    assert info["model_max_length"] == 512 and info["vocab_size"] > 256


@pytest.mark.parametrize("path", ["chat", "responses"])
def test_a_developer_is_the_system_for_templates_that_do_not_know_the_role(http: httpx.Client, path: str) -> None:
    def answer(role: str) -> Any:
        messages = [{"role": role, "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        if path == "responses":
            body = {"input": messages, "max_output_tokens": 4, "temperature": 0}
            return http.post("/v1/responses", json=body).json()["output"][0]["content"][0]["text"]
        body = {"messages": messages, "max_tokens": 4, "temperature": 0}
        return http.post(PATHS["chat"], json=body).json()["choices"][0]["message"]

    assert answer("developer") == answer("system")
