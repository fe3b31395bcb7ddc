"""Chat templates: the tokens of transformers, clear refusals, and a sandbox that holds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import TEMPLATES
from tokenizer_builders import byte_fallback, byte_level, write_folder

from kvik.errors import ModelLoadError, RequestError
from kvik.text.chat import ChatTemplate
from kvik.text.tokenizer import Tokenizer

USER: dict[str, Any] = {"role": "user", "content": 'What\'s the <weather> & "time" in Paris? 你好'}
TURNS = [
    {"role": "system", "content": " You are helpful.\n"},
    {"role": "user", "content": "Hello\n"},
    {"role": "assistant", "content": "  Hi, how can I help? 👋 "},
    USER,
]
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Zürich", "n": 1}},
        }
    ],
}
TOOL_TURNS = [
    USER,
    CALL,
    {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": '{"sunny": true}'},
]
THINKING = [
    USER,
    {"role": "assistant", "content": "Sunny.", "reasoning": "Let me see."},
    USER,
    {**CALL, "thinking": "Look."},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather's <state> in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Zürich", "Paris"]}}},
        },
    }
]
DOCUMENTS = [{"title": "One", "text": "first"}, {"title": "Two", "text": "second"}]

OPTIONS: list[dict[str, Any]] = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False},
    {"add_generation_prompt": True, "tools": TOOLS},
    {"add_generation_prompt": True, "documents": DOCUMENTS},
    {"add_generation_prompt": True, "chat_template_kwargs": {"enable_thinking": False, "date_string": "26 July"}},
]


def folder_with(path: Path, template: object, style: str = "byte_level") -> Path:
    if style == "byte_level":
        settings: dict[str, Any] = {
            "bos_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        return write_folder(path, byte_level(), settings={**settings, "chat_template": template})
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer", "chat_template": template}
    return write_folder(path, byte_fallback(), settings=settings, config={"model_type": "llama"})


def chat_of(path: Path, template: object) -> ChatTemplate:
    return ChatTemplate(Tokenizer.from_folder(folder_with(path, template)))


def expected_ids(folder: Path, messages: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    options = dict(options)
    options.update(options.pop("chat_template_kwargs", {}))
    ids: list[int] = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    return ids


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("style", ["byte_level", "byte_fallback"])
def test_same_tokens_as_transformers(tmp_path: Path, name: str, style: str) -> None:
    folder = folder_with(tmp_path, TEMPLATES[name], style)
    tokenizer = Tokenizer.from_folder(folder)
    chat = ChatTemplate(tokenizer)
    has_tools = name in ("llama3", "qwen", "mistral")
    conversations = [[USER], TURNS, *([TOOL_TURNS, THINKING] if has_tools else [])]
    for messages in conversations:
        for options in OPTIONS:
            before = copy.deepcopy(messages)
            text, ids = chat.encode(messages, **options)
            assert ids == expected_ids(folder, messages, options)
            assert messages == before
            if tokenizer.special_tokens["bos_token"] in text:
                assert ids[0] == tokenizer.bos_token_id
                assert tokenizer.encode(text)[:2].count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen", "mistral"])
@pytest.mark.parametrize("content", ["The answer is", "ends with space ", "  both  ", "line\n"])
def test_continue_final_message(tmp_path: Path, name: str, content: str) -> None:
    folder = folder_with(tmp_path, TEMPLATES[name])
    messages = [USER, {"role": "assistant", "content": content}]
    text, ids = ChatTemplate(Tokenizer.from_folder(folder)).encode(messages, continue_final_message=True)
    assert ids == expected_ids(folder, messages, {"continue_final_message": True})
    assert text.endswith((content.strip(), content))


WEATHER = {"function": {"name": "f", "arguments": '{"city": "Paris"}'}, "type": "function"}
NULL = (
    "{% for m in messages %}{% if m['content'] is none %}{% for c in m['tool_calls'] %}"
    "{{ '<call>' + c['function']['name'] + c['function']['arguments'] }}{% endfor %}"
    "{% else %}{{ m['content'] + '|' }}{% endif %}{% endfor %}"
)
EMPTY = (
    "{% for m in messages %}{% if m.content.startswith('x') %}x{% endif %}{% for c in m.tool_calls %}"
    "{{ '<call>' + c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{{ m.content + '|' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "text"), [(NULL, 'hi|<call>f{"city": "Paris"}'), (EMPTY, 'hi|<call>f{"city": "Paris"}|')]
)
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_an_answer_of_calls_alone_can_be_sent_back(
    tmp_path: Path, template: str, text: str, content: dict[str, Any]
) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", **content, "tool_calls": [WEATHER]}]
    assert chat_of(tmp_path, template).render(messages) == text


def test_no_calls_are_no_calls(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ 'calls' if m.tool_calls is defined else m.content }}{% endfor %}"
    assert chat_of(tmp_path, template).render([{"role": "user", "content": "hi", "tool_calls": []}]) == "hi"


def test_no_part_of_a_message_is_lost(tmp_path: Path) -> None:
    """Some templates take parts of users' messages and the first part of others."""
    template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% elif m.role == 'user' %}{% for part in"
        " m.content %}{{ part.text }}{% endfor %}{% else %}{{ m.content[0].text }}{% endif %}|{% endfor %}"
    )
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": role, "content": parts} for role in ("system", "user", "assistant")]
    assert chat_of(tmp_path, template).render(messages) == "one\ntwo|" * 3


def test_generation_prompt_is_the_default(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, TEMPLATES["chatml"])
    assert chat.render([USER]) == chat.render([USER], add_generation_prompt=True)
    assert chat.render([USER]) != chat.render([USER], add_generation_prompt=False)


def test_arguments_as_json_text_are_the_object(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, TEMPLATES["llama3"])
    as_text = copy.deepcopy(CALL)
    function = as_text["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    assert chat.render([USER, as_text]) == chat.render([USER, CALL])
    function["arguments"] = '{"broken": '
    assert '{\\"broken\\": ' in chat.render([USER, as_text])


def test_text_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    plain = chat_of(tmp_path / "plain", TEMPLATES["chatml"])
    assert "one\ntwo" in plain.render(messages)
    folder = folder_with(tmp_path / "parts", TEMPLATES["qwen"])
    assert ChatTemplate(Tokenizer.from_folder(folder)).encode(messages)[1] == expected_ids(
        folder, messages, {"add_generation_prompt": True}
    )
    final = [USER, {"role": "assistant", "content": parts}]
    for chat in (plain, ChatTemplate(Tokenizer.from_folder(folder))):
        assert chat.render(final, continue_final_message=True).endswith("two")


def test_where_templates_come_from(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    folder = folder_with(tmp_path, named)

    def render(**options: Any) -> str:
        return ChatTemplate(Tokenizer.from_folder(folder)).render([USER], **options)

    assert (render(), render(tools=TOOLS), render(tools=[])) == ("plain", "tools", "plain")
    (folder / "chat_template.jinja").write_text("from file")
    assert (render(), render(tools=TOOLS)) == ("from file", "from file")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("from folder")
    assert (render(), render(tools=TOOLS)) == ("from file", "from folder")
    assert expected_ids(folder, [USER], {"tools": TOOLS}) == Tokenizer.from_folder(folder).encode("from folder")
    tokenizer = Tokenizer.from_folder(folder)
    (tmp_path / "own.jinja").write_text("own {{ bos_token }}")
    assert ChatTemplate(tokenizer, tmp_path / "own.jinja").render([USER]) == "own <|endoftext|>"
    assert ChatTemplate(tokenizer, "{{ messages[0].role }}").render([USER], tools=TOOLS) == "user"
    with pytest.raises(ModelLoadError, match="nowhere"):
        ChatTemplate(tokenizer, "nowhere.jinja")


def test_no_template_says_how_to_give_one(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no chat template.*chat_template=FILE"):
        chat_of(tmp_path, None).render([USER])
    with pytest.raises(RequestError, match="rag, tool_use but no default"):
        chat_of(tmp_path, [{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}]).render([USER])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "empty"),
        ("hello", "must be a list"),
        ({"role": "user"}, "must be a list"),
        (["hello"], r"messages\[0\] must be an object"),
        ([USER, {"content": "x"}], r"messages\[1\] needs a role"),
        ([{"role": 3, "content": "x"}], r"messages\[0\] needs a role"),
        ([USER, {"role": "user"}], r"messages\[1\] .*has no content"),
        ([{"role": "user", "content": None}], r"messages\[0\] .*has no content"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content must be a string"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\]\.content\[0\]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], r"content\[0\] has type 'image_url'"),
        ([{"role": "user", "content": "x", "extra": object()}], r"messages\[0\] holds a object"),
        ([{"role": "assistant", "tool_calls": {}}], r"messages\[0\]\.tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [{"id": 1}]}], r"tool_calls\[0\] needs a function"),
    ],
)
def test_wrong_messages(tmp_path: Path, messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        chat_of(tmp_path, TEMPLATES["qwen"]).render(messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": [3]}, "tools must be a list"),
        ({"tools": "weather"}, "tools must be a list"),
        ({"tools": 5}, "tools must be a list"),
        ({"enable_thinking": False}, "no option 'enable_thinking'; .* in chat_template_kwargs"),
        ({"add_generation_prompt": "no"}, "add_generation_prompt must be true or false, got 'no'"),
        ({"continue_final_message": 1}, "continue_final_message must be true or false, got 1"),
        ({"documents": {"title": "x"}}, "documents must be a list"),
        ({"chat_template_kwargs": {"messages": []}}, "may not set 'messages'"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "may not set 'chat_template'"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "may not set 'bos_token'"),
        ({"chat_template_kwargs": {"f": print}}, "only JSON values"),
        ({"chat_template_kwargs": [1]}, "must be an object"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        chat_of(tmp_path, TEMPLATES["qwen"]).render([USER], **options)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    deep: Any = "x"
    for _ in range(500):
        deep = [deep]
    with pytest.raises(RequestError, match="nested deeper than 64"):
        chat_of(tmp_path, "x").render([{"role": "user", "content": "x", "extra": deep}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only users may speak') }}",
        "{{ messages[0].content + 3 }}",
        "{{ messages[99].content }}",
        "{{ 1 / 0 }}",
        "{% if %}",
        "{{ 'x' | nofilter }}",
        "{{ missing.attribute }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ dict.__call__.__globals__['json'] }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ (namespace | attr('__init__')).__globals__ }}",
        "{{ '%s'.__format__.__self__ }}",
        "{% include '/etc/passwd' %}",
        "{{ self.__init__.__globals__ }}",
    ],
)
def test_template_errors_and_escapes_are_request_errors(tmp_path: Path, template: str) -> None:
    with pytest.raises(RequestError):
        chat_of(tmp_path, template).render([USER])


def test_message_that_the_template_drops_cannot_be_continued(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="left out or changed"):
        chat_of(tmp_path / "a", "{% for m in messages[:-1] %}{{ m.content }}{% endfor %}").render(
            [USER, USER], continue_final_message=True
        )
    with pytest.raises(RequestError, match="no text to go on with"):
        chat_of(tmp_path / "b", TEMPLATES["qwen"]).render([USER, CALL], continue_final_message=True)


def test_lone_surrogate_in_a_message(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        chat_of(tmp_path, TEMPLATES["chatml"]).encode([{"role": "user", "content": "x\ud83d"}])
