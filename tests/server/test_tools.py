"""Tool calls and reasoning over HTTP, with the official client: streams say what whole answers say."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_templates import TEMPLATES
from openai import OpenAI
from scripted_server import Scripted, scripted_server

from kvik.server.reply_parser import ReplyParser
from kvik.server.reply_syntax import ModelSyntax
from kvik.server.responses_items import OutputItems, messages_of
from kvik.server.tool_formats import TOOL_FORMATS
from kvik.server_config import ServerConfig
from kvik.structured.grammars import available

HERMES = TOOL_FORMATS[0]
needs_grammars = pytest.mark.skipif(not available(), reason="llguidance is not installed")

USER: Any = [{"role": "user", "content": "What's the weather in Zürich?"}]
PROPERTIES = {"weather": {"city": {"type": "string"}, "days": {"type": "array"}}, "now": {}}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    for name, properties in PROPERTIES.items()
]
ARGUMENTS = '{"city": "Zürich", "days": [1, 2]}'
CALL = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
NOW = '{"name": "now", "arguments": {}}'
ONE = f"<tool_call>\n{CALL}\n</tool_call>"
MARKUP = """<tool_call>
<function=weather>
<parameter=city>
Zürich
</parameter>
<parameter=days>
[1, 2]
</parameter>
</function>
</tool_call>"""
GLM = """<tool_call>weather
<arg_key>city</arg_key>
<arg_value>Zürich</arg_value>
<arg_key>days</arg_key>
<arg_value>[1, 2]</arg_value>
</tool_call>"""
TWO = f"{ONE}\n<tool_call>\n{NOW}\n</tool_call>"
OPENING = TEMPLATES["chatml"].replace("assistant\\n' }}", "assistant\\n<think>\\n' }}") + "{# </think> #}"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    """A model that writes calls as Hermes does and may reason first."""
    with scripted_server(tmp_path_factory.mktemp("qwen"), TEMPLATES["qwen"]) as server:
        yield server


def client_of(server: Scripted) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def whole_and_streamed(server: Scripted, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first choice's message, with the finish reason and usage, once whole and once put together from a stream."""
    options = {"model": "tiny", "messages": USER, **options}
    with client_of(server) as client:
        answer = client.chat.completions.create(**options)
        stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
        whole = {**answer.choices[0].message.model_dump(), "reason": answer.choices[0].finish_reason}
        whole["usage"] = usage_of(answer)
        return whole, joined(list(stream))


def usage_of(answer: Any) -> dict[str, Any]:
    """The usage, but for how much of the prompt was cached: the second request finds what the first one left."""
    usage: dict[str, Any] = answer.usage.model_dump(exclude={"prompt_tokens_details"})
    return usage


def joined(chunks: list[Any]) -> dict[str, Any]:
    """A stream of one choice as a message. What a client may rely on in the order of deltas is checked here."""
    found: dict[str, Any] = {"content": "", "tool_calls": []}
    for chunk in chunks:
        if chunk.usage:
            found["usage"] = usage_of(chunk)
        for choice in chunk.choices:
            assert "reason" not in found, "the finish reason is in the last chunk"
            delta = choice.delta.model_dump(exclude_none=True)
            for name in ("reasoning", "reasoning_content"):
                if name in delta:
                    assert not found["content"] and not found["tool_calls"], "reasoning comes first"
                    found[name] = found.get(name, "") + delta[name]
            found["content"] += delta.get("content", "")
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(found["tool_calls"]) and call["type"] == "function"
                    assert call["function"]["name"] and call["function"]["arguments"] == ""
                    found["tool_calls"].append(call)
                else:
                    found["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            if choice.finish_reason:
                assert not delta
                found["reason"] = choice.finish_reason
    return found


def calls_of(message: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and arguments."""
    calls = message["tool_calls"] or []
    assert len({call["id"] for call in calls}) == len(calls) and all(call["type"] == "function" for call in calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


@pytest.mark.parametrize(
    ("text", "options", "content", "calls", "reason"),
    [
        (ONE, {}, None, [("weather", ARGUMENTS)], "tool_calls"),
        (TWO, {}, None, [("weather", ARGUMENTS), ("now", "{}")], "tool_calls"),
        (TWO, {"parallel_tool_calls": False}, None, [("weather", ARGUMENTS)], "tool_calls"),
        (f"Let me see.\n{ONE}", {}, "Let me see.", [("weather", ARGUMENTS)], "tool_calls"),
        (" No call, < no <tool. ", {}, " No call, < no <tool. ", [], "stop"),
        (f"<tool_call>{CALL[:-1]}</tool_call>", {}, "}</tool_call>", [("weather", ARGUMENTS[:-1])], "stop"),
        (ONE, {"tool_choice": "none"}, ONE, [], "stop"),
        (ONE, {"tools": []}, ONE, [], "stop"),
        (f"{ONE}\nMore text", {"stop": ["More"]}, None, [("weather", ARGUMENTS)], "tool_calls"),
    ],
)  # fmt: skip
def test_calls(
    qwen: Scripted, text: str, options: dict[str, Any], content: str | None, calls: list[Any], reason: str
) -> None:
    num_tokens = qwen.say(text)
    whole, streamed = whole_and_streamed(qwen, **{"tools": TOOLS, **options})
    assert (whole["content"], calls_of(whole), whole["reason"]) == (content, calls, reason)
    assert (streamed["content"], calls_of(streamed), streamed["reason"]) == (content or "", calls, reason)
    assert whole["usage"] == streamed["usage"]
    if "stop" not in options:
        assert whole["usage"]["completion_tokens"] == num_tokens + 1  # and the end of the sequence


@pytest.mark.parametrize("max_tokens", [12, 45])
def test_a_call_that_is_cut_is_told_until_there(qwen: Scripted, max_tokens: int) -> None:
    qwen.say(ONE)
    text = qwen.tokenizer.decode(qwen.executor.script[:max_tokens])
    for message in whole_and_streamed(qwen, tools=TOOLS, max_tokens=max_tokens):
        assert message["reason"] == "length" and message["usage"]["completion_tokens"] == max_tokens
        if max_tokens == 12:
            assert (message["content"], calls_of(message)) == (text, [])
        else:
            ((name, arguments),) = calls_of(message)
            assert name == "weather" and text.endswith(arguments) and not message["content"]
            assert arguments != ARGUMENTS and ARGUMENTS.startswith(arguments)


def test_responses_tell_of_a_call_that_breaks_off_as_incomplete() -> None:
    text = ONE.replace("}}", "}, oh}")
    parser, items = ReplyParser(HERMES), OutputItems()
    pieces = [piece for char in text for piece in parser.feed(char)] + parser.feed("", ended=True)
    events = [*itertools.chain.from_iterable(map(items.add, pieces)), *items.finish("completed")]
    call, message = items.items
    assert (call["type"], call["arguments"], call["status"]) == ("function_call", ARGUMENTS[:-1], "incomplete")
    assert (message["content"][0]["text"], message["status"]) == ("}, oh}\n</tool_call>", "completed")
    assert [fields["item"] for kind, fields in events if kind == "response.output_item.done"] == items.items


def test_the_official_client_puts_calls_together_while_they_are_written(qwen: Scripted) -> None:
    arguments = r'{"city": "\ud83d\ude00\\ \"Zürich\" </tool_call> \u00e9 😀", "days": [1, {"a": null}]}'
    qwen.say(f'I look.\n<tool_call>\n{{"name": "weather", "arguments": {arguments}}}\n</tool_call>\n{TWO}')
    tools = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    with client_of(qwen) as client, client.chat.completions.stream(model="tiny", messages=USER, tools=tools) as stream:
        told = [event for event in stream if event.type == "tool_calls.function.arguments.delta" and event.index == 0]
        (choice,) = stream.get_final_completion().choices
    calls = calls_of(choice.message.model_dump())
    assert calls == [("weather", arguments), ("weather", ARGUMENTS), ("now", "{}")]
    assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
    assert told[0].name == "weather" and "".join(event.arguments_delta for event in told) == arguments
    assert len(told) > 2


@pytest.mark.parametrize("choice", ["auto", pytest.param("required", marks=needs_grammars)])
def test_arguments_come_while_they_are_written(qwen: Scripted, choice: str) -> None:
    qwen.say(f"<think>Hm.</think>\n\n{ONE}")
    options: dict[str, Any] = {"model": "tiny", "tools": TOOLS[:1], "tool_choice": choice}
    whole, streamed = whole_and_streamed(qwen, **options)
    for message in (whole, streamed):
        assert (calls_of(message), message["reason"]) == ([("weather", ARGUMENTS)], "tool_calls")
        assert message["reasoning_content"] == "Hm." and not message["content"]
    with client_of(qwen) as client:
        chunks = list(client.chat.completions.create(messages=USER, **options, stream=True))
        flat = {"type": "function", **TOOLS[0]["function"]}
        events = list(client.responses.create(input="Hi", **{**options, "tools": [flat]}, stream=True))
    texts = [call.function.arguments for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert len(texts) > 2 and "".join(texts) == ARGUMENTS
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 1 and "".join(deltas) == ARGUMENTS
    assert [item.type for item in events[-1].response.output] == ["reasoning", "function_call"]
    assert events[-1].response.output[1].arguments == ARGUMENTS


@needs_grammars
@pytest.mark.parametrize("cut", [{"max_tokens": 45}, {"stop": "[1"}], ids=str)
def test_a_forced_call_that_is_cut_has_the_arguments_until_there(qwen: Scripted, cut: dict[str, Any]) -> None:
    qwen.say(ONE)
    options: dict[str, Any] = {"tools": TOOLS[:1], "tool_choice": "required"}
    for message in whole_and_streamed(qwen, **options, **cut):
        ((name, arguments),) = calls_of(message)
        assert name == "weather" and ARGUMENTS.startswith(arguments) and 0 < len(arguments) < len(ARGUMENTS)
        assert message["reason"] == ("length" if "max_tokens" in cut else "stop") and not message["content"]
    for message in whole_and_streamed(qwen, **options, max_tokens=8):
        assert not calls_of(message) and message["reason"] == "length"
        assert message["content"] == qwen.tokenizer.decode(qwen.executor.script[:8])
    if "max_tokens" in cut:
        flat = {"type": "function", **TOOLS[0]["function"]}
        body = {"input": "Hi", "tools": [flat], "tool_choice": "required", "max_output_tokens": 45}
        response = httpx.post(f"{qwen.url}/v1/responses", json=body).json()
        (item,) = response["output"]
        assert response["status"] == item["status"] == "incomplete" and ARGUMENTS.startswith(item["arguments"])


def test_every_choice_has_its_calls(qwen: Scripted) -> None:
    qwen.say(ONE)
    with client_of(qwen) as client:
        answer = client.chat.completions.create(model="tiny", messages=USER, tools=TOOLS, n=2)
    assert [calls_of(choice.message.model_dump()) for choice in answer.choices] == [[("weather", ARGUMENTS)]] * 2


@pytest.mark.parametrize(
    ("template", "special", "text"),
    [
        ("mistral", ("[TOOL_CALLS]",), f"[TOOL_CALLS] [{CALL}, {NOW}]"),
        ("mistral", (), f"[TOOL_CALLS] [{CALL}, {NOW}]"),
        ("mistral_args", ("[TOOL_CALLS]", "[ARGS]"), f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]now[ARGS]{{}}"),
        ("mistral_args", ("[ARGS]",), f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]now[ARGS]{{}}"),
        ("qwen3_coder", (), f"{MARKUP}\n<tool_call>\n<function=now>\n</function>\n</tool_call>"),
        ("glm45", ("<tool_call>", "</tool_call>", "<arg_key>"), f"{GLM}\n<tool_call>now\n</tool_call>"),
        ("llama3", ("<|python_tag|>",), f"<|python_tag|>{CALL.replace('arguments', 'parameters')}; {NOW}"),
        ("llama3", (), f"{CALL}; {NOW}"),
    ],
)
def test_other_families(tmp_path: Path, template: str, special: tuple[str, ...], text: str) -> None:
    with scripted_server(tmp_path, TEMPLATES[template], special=special) as server:
        server.say(text)
        whole, streamed = whole_and_streamed(server, tools=TOOLS)
        for message in (whole, streamed):
            assert calls_of(message) == [("weather", ARGUMENTS), ("now", "{}")] and not message["content"]
        server.say('{"name": "Jo", "age": 3}')
        whole, streamed = whole_and_streamed(server, tools=TOOLS)
        assert whole["content"] == streamed["content"] == '{"name": "Jo", "age": 3}'


@pytest.mark.parametrize("tail", ["Sunny.", ONE, ""])
def test_reasoning(qwen: Scripted, tail: str) -> None:
    head = "<think>\nHm, <b> \n</think>"
    num_reasoning = qwen.say(head)
    qwen.say(f"{head}\n\n{tail}")
    whole, streamed = whole_and_streamed(qwen, tools=TOOLS)
    for message in (whole, streamed):
        assert message["reasoning_content"] == "Hm, <b>"
        assert (message["content"] or "", calls_of(message)) == (
            ("", [("weather", ARGUMENTS)]) if tail == ONE else (tail, [])
        )
        assert message["usage"]["completion_tokens_details"]["reasoning_tokens"] == num_reasoning


def test_reasoning_that_the_prompt_opened_and_that_is_cut(tmp_path: Path) -> None:
    with scripted_server(tmp_path, OPENING, reasoning_field="reasoning") as server:
        num_tokens = server.say("Hm.\n</think>\n\nSunny.")
        whole, streamed = whole_and_streamed(server)
        assert (whole["reasoning"], whole["content"]) == ("Hm.", "Sunny.")
        assert (streamed["reasoning"], streamed["content"]) == ("Hm.", "Sunny.")
        assert whole["usage"] == streamed["usage"]
        assert 0 < whole["usage"]["completion_tokens_details"]["reasoning_tokens"] < num_tokens
        whole, streamed = whole_and_streamed(server, max_tokens=2)
        assert (whole["reasoning"], whole["content"], whole["reason"]) == (streamed["reasoning"], "", "length")
        assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2
        assert whole["usage"] == streamed["usage"]


def test_both_can_be_turned_off(tmp_path: Path) -> None:
    text = f"<think>Hm.</think>{ONE}"
    with scripted_server(tmp_path, TEMPLATES["qwen"], reasoning_field="none", tool_format="none") as server:
        server.say(text)
        whole, streamed = whole_and_streamed(server, tools=TOOLS)
        assert whole["content"] == streamed["content"] == text and "reasoning_content" not in whole
        assert whole["usage"]["completion_tokens_details"] is None
        body = {"messages": USER, "tools": TOOLS}
        warnings = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["warnings"]
        assert any("--tool-format" in warning for warning in warnings)


def test_what_the_server_said_can_be_sent_back(qwen: Scripted) -> None:
    qwen.say(f"<think>Hm.</think>\n\nI look.\n{ONE}")
    with client_of(qwen) as client:
        message = client.chat.completions.create(model="tiny", messages=USER, tools=TOOLS).choices[0].message
    answer = message.model_dump()
    tool = {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "name": "weather", "content": "sunny"}
    body = {"messages": [*USER, answer, tool], "tools": TOOLS}
    prompt = httpx.post(f"{qwen.url}/apply-template", json=body).json()["prompt"]
    for said in ("<think>\nHm.\n</think>\n\nI look.", f"{ONE}<|im_end|>", "<tool_response>\nsunny\n</tool_response>"):
        assert said in prompt
    items = [
        *USER,
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": ARGUMENTS},
        {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
    ]
    flat = [{"type": "function", **tool["function"]} for tool in TOOLS]
    with client_of(qwen) as client:
        response = client.responses.create(model="tiny", input=items, tools=flat)  # type: ignore[call-overload]
    count = len(qwen.tokenizer.encode(prompt, add_special_tokens=False))
    assert response.usage.input_tokens == count


def test_no_item_of_reasoning_is_lost() -> None:
    thoughts = [{"type": "reasoning", "summary": [{"type": "summary_text", "text": text}]} for text in ("Hm.", "Ah.")]
    call = {"type": "function_call", "call_id": "call_1", "name": "now", "arguments": "{}"}
    (message,) = messages_of([*thoughts, call], None)
    assert message["reasoning_content"] == "Hm.\nAh." and len(message["tool_calls"]) == 1
    (message,) = messages_of([*thoughts, {"role": "assistant", "content": "Yes"}], None)
    assert (message["reasoning_content"], message["content"]) == ("Hm.\nAh.", "Yes")


def test_responses_have_items_of_reasoning_text_and_calls(qwen: Scripted) -> None:
    flat: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    head = "<think>\nHm.\n</think>"
    num_reasoning = qwen.say(head)
    qwen.say(f"{head}\n\nI look.\n{TWO}")
    options: dict[str, Any] = {"model": "tiny", "input": "Hi", "tools": flat}
    with client_of(qwen) as client:
        whole = client.responses.create(**options)
        events = list(client.responses.create(**options, stream=True))
    streamed = events[-1].response
    for response in (whole, streamed):
        assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
        reasoning, message, first, second = response.output
        assert reasoning.content[0].text == "Hm." and message.content[0].text == response.output_text == "I look."
        assert [(call.name, call.arguments) for call in (first, second)] == [("weather", ARGUMENTS), ("now", "{}")]
        assert {item.status for item in response.output} == {"completed"} and first.call_id.startswith("call_")
        assert response.usage.output_tokens_details.reasoning_tokens == num_reasoning
    assert [event.sequence_number for event in events] == list(range(len(events)))
    opened = [event.item.id for event in events if event.type == "response.output_item.added"]
    closed = [event.item for event in events if event.type == "response.output_item.done"]
    assert opened == [item.id for item in closed] and closed == streamed.output
    for kind, item in (("reasoning_text", 0), ("output_text", 1), ("function_call_arguments", 2)):
        deltas = [event for event in events if event.type == f"response.{kind}.delta" and event.output_index == item]
        (done,) = [event for event in events if event.type == f"response.{kind}.done" and event.output_index == item]
        text = done.arguments if kind == "function_call_arguments" else done.text
        assert deltas and "".join(event.delta for event in deltas) == text
        assert {event.item_id for event in (*deltas, done)} == {opened[item]}


def test_the_effort_of_reasoning_reaches_the_template(tmp_path: Path) -> None:
    template = TEMPLATES["qwen"] + "{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}"
    with scripted_server(tmp_path, template) as server:

        def count(path: str, **fields: Any) -> tuple[int, dict[str, Any]]:
            answer = httpx.post(f"{server.url}{path}", json={"input" if "resp" in path else "messages": USER, **fields})
            body: dict[str, Any] = answer.json()
            return body["usage"].get("prompt_tokens") or body["usage"]["input_tokens"], body

        def tokens(text: str) -> int:
            return len(server.tokenizer.encode(text, add_special_tokens=False))

        chat, responses = "/v1/chat/completions", "/v1/responses"
        plain, _ = count(chat)
        assert count(responses)[0] == plain
        for effort, text in (("low", "low"), ("none", "<think>\n\n</think>\n\nnone")):
            expected = plain + tokens(text)
            assert count(chat, reasoning_effort=effort)[0] == expected
            found, body = count(responses, reasoning={"effort": effort, "summary": "auto"})
            assert found == expected and body["reasoning"]["effort"] == effort
            assert [any(word in text for text in body["warnings"]) for word in ("effort", "summary")] == [True, True]
        thinking = {"enable_thinking": True}
        for path, more in ((chat, {"reasoning_effort": "none"}), (responses, {"reasoning": {"effort": "none"}})):
            assert count(path, chat_template_kwargs=thinking, **more)[0] == plain + tokens("none")
        for wrong in ({"effort": "huge"}, {"effort": 3}, {"efort": "low"}, 3):
            answer = httpx.post(f"{server.url}{responses}", json={"input": "Hi", "reasoning": wrong})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "reasoning"


def test_strict_is_reported_and_not_shown_to_the_model(qwen: Scripted) -> None:
    found = []
    for strict in ({}, {"strict": False}, {"strict": True}):
        flat = {"type": "function", **TOOLS[0]["function"], **strict}
        nested = {"type": "function", "function": {**TOOLS[0]["function"], **strict}}
        chat = httpx.post(f"{qwen.url}/v1/chat/completions", json={"messages": USER, "tools": [nested]}).json()
        response = httpx.post(f"{qwen.url}/v1/responses", json={"input": USER, "tools": [flat]}).json()
        assert [*map(bool, (chat.get("warnings"), response.get("warnings")))] == [strict == {"strict": True}] * 2
        found += [chat["usage"]["prompt_tokens"], response["usage"]["input_tokens"]]
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    "tools", [[{"type": "function"}], [3], [{"type": "function", "function": {"name": 3}}], TOOLS * 65]
)
def test_wrong_tools_are_refused(qwen: Scripted, tools: Any) -> None:
    answer = httpx.post(f"{qwen.url}/v1/chat/completions", json={"messages": USER, "tools": tools})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools"


@pytest.mark.parametrize("choice", ["auto", "none", "required"])
@pytest.mark.parametrize("path", ["v1/chat/completions", "v1/responses", "apply-template", "tokenize"])
def test_two_functions_of_one_name_are_refused(qwen: Scripted, path: str, choice: str) -> None:
    tools = [*TOOLS, TOOLS[0]]
    if path == "v1/responses":
        body: dict[str, Any] = {"input": USER, "tools": [{"type": "function", **tool["function"]} for tool in tools]}
    else:
        body = {"messages": USER, "tools": tools}
    answer = httpx.post(f"{qwen.url}/{path}", json={**body, "tool_choice": choice})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "tools"
    assert error["message"].startswith("tools[0] and tools[2] are both named 'weather'")


def test_formats_are_told_from_templates_and_can_be_chosen() -> None:
    def detected(template: str, **options: Any) -> tuple[str | None, str | None]:
        found = ModelSyntax.detect([template], ServerConfig(**options))
        return (None if found.tools is None else found.tools.name), found.field

    assert detected(TEMPLATES["qwen"]) == ("hermes", "reasoning_content")
    assert detected(TEMPLATES["mistral"]) == ("mistral", None)
    assert detected(TEMPLATES["llama3"]) == ("llama", None)
    assert detected(TEMPLATES["chatml"]) == detected("") == (None, None)
    assert detected(TEMPLATES["mistral_args"]) == ("mistral_args", None)
    assert detected(TEMPLATES["qwen3_coder"]) == ("qwen3_coder", None)
    assert detected(TEMPLATES["glm45"]) == ("glm45", "reasoning_content")
    assert detected("<tool_call>\n<function=f>") == (None, None)
    assert detected(TEMPLATES["chatml"], tool_format="llama") == ("llama", None)
    assert detected(TEMPLATES["qwen"], tool_format="none", reasoning_field="none") == (None, None)
    for form in TOOL_FORMATS:
        assert detected("", tool_format=form.name)[0] == form.name
