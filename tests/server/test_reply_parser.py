"""The parser of answers: however a text is cut, the message is the same, whole calls are told, the rest is content."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from kvik.server.call_readers import Arguments, is_object
from kvik.server.reply_parser import Content, Piece, Reasoning, ReplyParser, ToolCall
from kvik.server.tool_formats import TOOL_FORMATS, ToolFormat

HERMES, QWEN3_CODER, GLM45, MISTRAL, MISTRAL_ARGS, LLAMA = TOOL_FORMATS
SCHEMAS: dict[str, Any] = {
    "weather": {
        "type": "object",
        "$defs": {"n": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}},
        "properties": {
            "city": {"type": "string"},
            "days": {"$ref": "#/$defs/n"},
            "unit": {"enum": ["C", "5"]},
            "wind": {"anyOf": [{"type": "boolean"}, {"type": "string"}]},
            "at": {"type": ["number", "null"]},
            "where": {"type": "object"},
            "tags": {"type": "array"},
            "loop": {"$ref": "#/$defs/loop"},
        },
    },
    "now": {"properties": {"s": {"type": "string"}}},
}
WEATHER = '{"name": "weather", "arguments": {"city": "Zürich {\\"x\\"} </tool_call> [1]", "n": [1, {"a": null}]}}'
ARGUMENTS = '{"city": "Zürich {\\"x\\"} </tool_call> [1]", "n": [1, {"a": null}]}'
NOW = '{"name":"now","parameters":{}}'

LINES = {"city": "a <b>\n\nc", "days": "3"}

Message = tuple[str, str, list[tuple[str, str]]]


def message_of(pieces: list[Piece]) -> Message:
    """Reasoning, content, and names and arguments of the calls."""
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        if isinstance(piece, ToolCall):
            calls.append((piece.name, ""))
        elif isinstance(piece, Arguments):
            calls[-1] = calls[-1][0], calls[-1][1] + piece.text
    return (
        "".join(piece.text for piece in pieces if isinstance(piece, Reasoning)),
        "".join(piece.text for piece in pieces if isinstance(piece, Content)),
        calls,
    )


def parse(parts: list[str], *options: Any, **more: Any) -> Message:
    """What is told of an answer that arrives in these parts, at once where it is one."""
    parser = ReplyParser(*options, **more)
    pieces = [piece for part in parts[:-1] for piece in parser.feed(part)] + parser.feed(
        *parts[-1:] or [""], ended=True
    )
    whole = [is_object(arguments) for _, arguments in message_of(pieces)[2]]
    assert parser.has_called == (any(whole) and (all(whole) or not more.get("forced")))
    return message_of(pieces)


def xml_call(name: str = "weather", **values: str) -> str:
    """A call as Qwen3-Coder writes it."""
    lines = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items()]
    return f"<tool_call>\n<function={name}>\n{''.join(lines)}</function>\n</tool_call>"


# text, options of the parser, reasoning, content, calls
CASES: dict[str, tuple[str, dict[str, Any], Message]] = {
    "plain": (" Hello <b>\n", {}, ("", " Hello <b>\n", [])),
    "no call": ("\n a < b <tool_cal \n", {"tools": HERMES}, ("", "\n a < b <tool_cal \n", [])),
    "hermes": (f"<tool_call>\n{WEATHER}\n</tool_call>", {"tools": HERMES}, ("", "", [("weather", ARGUMENTS)])),
    "text before": (
        f"I look. \n\n<tool_call>{NOW}</tool_call>\n", {"tools": HERMES}, ("", "I look.", [("now", "{}")])
    ),
    "two calls": (
        f"<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>\n{NOW}\n</tool_call>",
        {"tools": HERMES},
        ("", "", [("weather", ARGUMENTS), ("now", "{}")]),
    ),
    "one call only": (
        f"<tool_call>{NOW}</tool_call><tool_call>{WEATHER}</tool_call>",
        {"tools": HERMES, "max_calls": 1},
        ("", "", [("now", "{}")]),
    ),
    "no end mark": (f"<tool_call>{NOW}", {"tools": HERMES}, ("", "", [("now", "{}")])),
    "half an end mark": (f"<tool_call>{NOW}\n</tool_", {"tools": HERMES}, ("", "", [("now", "{}")])),
    "text after": (f"<tool_call>{NOW}</tool_call>\nDone. ", {"tools": HERMES}, ("", "Done. ", [("now", "{}")])),
    "no arguments": ('<tool_call>{"name": "now"}</tool_call>', {"tools": HERMES}, ("", "", [("now", "{}")])),
    "members in any order": (
        '<tool_call>{"id": {"name": "x"}, "arguments": null, "parameters": {"a": {}}, "n": -1e999, "name": "now"}',
        {"tools": HERMES},
        ("", "", [("now", '{"a": {}}')]),
    ),
    "members twice": (
        '<tool_call>{"name": "now", "arguments": {"a": 1}, "name": "weather", "parameters": {}}',
        {"tools": HERMES},
        ("", "", [("now", '{"a": 1}')]),
    ),
    "escapes": (
        r'<tool_call>{"name": "n\u006fw", "arguments" : { "\ud83d\ude00\\": "\"}</tool_call>\\" } }</tool_call>',
        {"tools": HERMES},
        ("", "", [("now", r'{ "\ud83d\ude00\\": "\"}</tool_call>\\" }')]),
    ),
    "a bracket too many": (f"<tool_call>{NOW}}}</tool_", {"tools": HERMES}, ("", "}</tool_", [("now", "{}")])),
    "arguments in a string": (
        '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>',
        {"tools": HERMES},
        ("", "", [("now", '{"a": 1}')]),
    ),
    "mistral": (
        f"[TOOL_CALLS] [{WEATHER}, {NOW}]", {"tools": MISTRAL}, ("", "", [("weather", ARGUMENTS), ("now", "{}")])
    ),
    "mistral, the second call is none": (
        f'[TOOL_CALLS] [{NOW}, {{"name": 1}}] ', {"tools": MISTRAL}, ("", ', {"name": 1}] ', [("now", "{}")])
    ),
    "mistral, no end": (f"[TOOL_CALLS] [{NOW} ", {"tools": MISTRAL}, ("", "", [("now", "{}")])),
    "mistral, text before": (f"Well [TOOL_CALLS][{NOW}]", {"tools": MISTRAL}, ("", "Well", [("now", "{}")])),
    "mistral, name and arguments": (
        f"Well [TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS] {{}}",
        {"tools": MISTRAL_ARGS},
        ("", "Well", [("weather", ARGUMENTS), ("now", "{}")]),
    ),
    "qwen3_coder": (
        f"I look.\n{xml_call(**LINES)}\n{xml_call('now')}\nDone.",
        {"tools": QWEN3_CODER},
        ("", "I look.Done.", [("weather", '{"city": "a <b>\\n\\nc", "days": 3}'), ("now", "{}")]),
    ),
    "qwen3_coder, loosely": (
        "<tool_call><function=weather><parameter=city></parameter> <parameter=days>4</parameter></function>",
        {"tools": QWEN3_CODER},
        ("", "", [("weather", '{"city": "", "days": 4}')]),
    ),
    "qwen3_coder, no opening marks": (
        f"I look.\n{xml_call(**LINES)[12:]}\n{xml_call('now')[12:]}\n<function=other>\n</function>",
        {"tools": QWEN3_CODER},
        (
            "",
            "I look.<function=other>\n</function>",
            [("weather", '{"city": "a <b>\\n\\nc", "days": 3}'), ("now", "{}")],
        ),
    ),
    "qwen3_coder, a parameter twice": (
        "<tool_call><function=now><parameter=a>1</parameter><parameter=a>2</parameter></function>",
        {"tools": QWEN3_CODER},
        ("", "", [("now", '{"a": 1, "a": 2}')]),
    ),
    "qwen3_coder, one call only": (
        f"{xml_call('now')}\n{xml_call()}", {"tools": QWEN3_CODER, "max_calls": 1}, ("", "", [("now", "{}")])
    ),
    "glm45": (
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>\nline\n</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        {"tools": GLM45},
        ("", "", [("weather", '{"city": "\\nline\\n", "days": 3}'), ("now", "{}")]),
    ),
    "glm45, in one line": (
        "<think>a</think><tool_call>weather<arg_key>city</arg_key><arg_value><arg_key></arg_value></tool_call>",
        {"tools": GLM45, "reasoning": True},
        ("a", "", [("weather", '{"city": "<arg_key>"}')]),
    ),
    "llama": (WEATHER, {"tools": LLAMA}, ("", "", [("weather", ARGUMENTS)])),
    "llama, tagged": (f"\n<|python_tag|> {NOW}", {"tools": LLAMA}, ("", "", [("now", "{}")])),
    "llama, two": (f"{NOW}; {NOW}\n", {"tools": LLAMA}, ("", "", [("now", "{}"), ("now", "{}")])),
    "llama, text": (f"See {NOW}", {"tools": LLAMA}, ("", f"See {NOW}", [])),
    "llama, an answer in JSON": ('{"name": "Jo", "n": 1} ', {"tools": LLAMA}, ("", '{"name": "Jo", "n": 1} ', [])),
    "llama, a number": ("\n7 { 8", {"tools": LLAMA}, ("", "\n7 { 8", [])),
    "thoughts": ("<think>\nI see < x.\n</think>\n\nYes.\n", {"reasoning": True}, ("I see < x.", "Yes.\n", [])),
    "no thoughts": ("\n <thin Yes.", {"reasoning": True}, ("", "\n <thin Yes.", [])),
    "thoughts later": ("So <think>a</think>", {"reasoning": True}, ("", "So <think>a</think>", [])),
    "opened": ("I see.\n</think>\n\nYes.", {"reasoning": True, "opened": True}, ("I see.", "Yes.", [])),
    "opened twice": ("<think>I see.</think>Yes.", {"reasoning": True, "opened": True}, ("I see.", "Yes.", [])),
    "cut thoughts": ("I see \n", {"reasoning": True, "opened": True}, ("I see", "", [])),
    "empty thoughts": ("<think>\n\n</think>\n\nYes.", {"reasoning": True}, ("", "Yes.", [])),
    "thoughts and a call": (
        f"<think>\nHm <tool_call>.\n</think>\n\n<tool_call>\n{NOW}\n</tool_call>",
        {"tools": HERMES, "reasoning": True},
        ("Hm <tool_call>.", "", [("now", "{}")]),
    ),
    "thoughts and a bare call": (
        f"<think>a</think>\n\n{NOW}", {"tools": LLAMA, "reasoning": True}, ("a", "", [("now", "{}")])
    ),
}  # fmt: skip

MALFORMED = [
    "<tool_call>not JSON</tool_call>",
    '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "", "arguments": {}}</tool_call>',
    '<tool_call>{"arguments": {}}</tool_call>',
    "<tool_call>[]</tool_call>",
    '<tool_call>{"arguments": {"a": 1}, "nam',
    'Look: <tool_call> \n{"a\\',
    "<tool_call>",
    "[TOOL_CALLS]weather {",
    "[TOOL_CALLS] [,",
    "[TOOL_CALLS][ARGS]{}",
    "[TOOL_CALLS]now then[ARGS]{}",
    f"[TOOL_CALLS]{'n' * 300}[ARGS]{{}}",
    "<tool_call>\n<function=>\n</function>\n</tool_call>",
    "<function=other>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
    "<tool_call>Not a call</tool_call>",
    "<tool_call></tool_call>",
    '{"name": "other", "parameters": {}}',
    "<|python_tag|>print(1)",
    "{" * 3000,
]
# format, text to where a call is told, its arguments until there, text behind that
BROKEN: list[tuple[ToolFormat, str, str, str]] = [
    (HERMES, '<tool_call>{"name": "now"', "", ', "argum'),
    (HERMES, '<tool_call>{"name": "now"', "", ' \n'),
    (HERMES, '<tool_call>{"name": "now"', "", ', "arguments": [1]}</tool_call>'),
    (HERMES, '<tool_call>{"name": "now"', "", ', "arguments": "a"}</tool_call>'),
    (HERMES, '<tool_call>{"name": "now", "arguments": {"a": ', '{"a": ', "}}</tool_call>"),
    (HERMES, '<tool_call>{"name": "now", "arguments": {"a": ', '{"a": ', "<x>"),
    (HERMES, '<tool_call>{"name": "now", "arguments": {"a": "1}}</tool_call>', '{"a": "1}}</tool_call>', ""),
    (HERMES, '<tool_call>{"name": "now", "arguments": {', "{", "}\n</tool_call>"),
    (HERMES, '<tool_call>{"name": "now", "arguments": {"a": [1}', '{"a": [1}', "}}</tool_call>"),
    (HERMES, '<tool_call>{"name": "now", "arguments": {"a": "\\ud83d"', '{"a": "\\ud83d"', "}}</tool_call>"),
    (HERMES, '<tool_call>{"name": "now", "arguments": {"a": 1', '{"a": 1', "}, so}</tool_call>"),
    (HERMES, '<tool_call>{"name": "now", "arguments": {"a": 1', '{"a": 1', "},}</tool_call>"),
    (HERMES, '<tool_call>{"name": "now", "arguments": {"a": 1', '{"a": 1', '}, "b": tru}</tool_call>'),
    (QWEN3_CODER, "<tool_call>\n<function=now>", "", "\n<parameter=a>\n1\n</param"),
    (QWEN3_CODER, "<tool_call>\n<function=now>", "", "\n<parameter=a\n</function>\n</tool_call>"),
    (QWEN3_CODER, "<tool_call>\n<function=now>", "", "\nSo <functi\n</function>"),
    (QWEN3_CODER, "<function=now>", "", "\n<parameter=a>\n"),
    (QWEN3_CODER, "<function=now><parameter=a>1</parameter>", '{"a": 1', " So</function>"),
    (QWEN3_CODER, "<function=now><parameter=s>\nA", '{"s": "A', "\n</param"),
    (QWEN3_CODER, "<function=now><parameter=s>", '{"s": "', "\n"),
    (GLM45, "<tool_call>now<arg_key>", "", "a</arg_key>1</tool_call>"),
    (GLM45, "<tool_call>now<arg_key>", "", "a</arg_key><arg_value>1"),
    (GLM45, "<tool_call>now<arg_key>s</arg_key><arg_value>\nA\n", '{"s": "\\nA\\n', "</"),
    (MISTRAL, '[TOOL_CALLS] [{"name": "now"', "", "]"),
    (MISTRAL_ARGS, "[TOOL_CALLS]now[ARGS]", "", "[1]"),
    (MISTRAL_ARGS, '[TOOL_CALLS]now[ARGS]{"a": 1 ', '{"a": 1 ', "<"),
    (MISTRAL_ARGS, '[TOOL_CALLS]now[ARGS]{"a": [1}', '{"a": [1}', "}"),
    (MISTRAL_ARGS, '[TOOL_CALLS]now[ARGS]{"a": 1', '{"a": 1', ""),
    (LLAMA, '{"name": "now"', "", ', "parameters": 3}'),
    (LLAMA, '{"name": "now"', "", ""),
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_messages(name: str) -> None:
    text, options, expected = CASES[name]
    options = {"schemas": SCHEMAS, **options}
    assert parse([text], **options) == expected
    for _, arguments in expected[2]:
        assert isinstance(json.loads(arguments), dict)
    for at in range(len(text) + 1):
        assert parse([text[:at], text[at:]], **options) == expected, (text[:at], text[at:])
    assert parse(list(text), **options) == expected


def in_two(text: str) -> list[list[str]]:
    """All ways to cut a text in two, a few of a long one."""
    return [[text[:at], text[at:]] for at in range(0, len(text) + 1, 1 + len(text) // 400)]


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: text[:40])
@pytest.mark.parametrize("tools", TOOL_FORMATS, ids=lambda tools: tools.name)
def test_what_is_no_call_is_content_to_the_last_character(tools: Any, text: str) -> None:
    for parts in ([text], list(text), *in_two(text)):
        assert parse(parts, tools, SCHEMAS, reasoning=True) == ("", text, [])


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: (case[1] + case[3])[:60])
@pytest.mark.parametrize("tools", TOOL_FORMATS, ids=lambda tools: tools.name)
def test_of_a_call_that_breaks_off_what_was_not_told_is_content(tools: ToolFormat, case: Any) -> None:
    form, told, arguments, content = case
    text = told + content
    expected = ("", content, [("now", arguments)]) if tools is form else ("", text, [])
    for parts in ([text], list(text), *in_two(text)):
        assert parse(parts, tools, SCHEMAS, reasoning=True) == expected, parts


def test_deeper_than_python_reads_is_content() -> None:
    deep = "[" * 200_000 + "]" * 200_000
    broken = '<tool_call>{"name": "now", "arguments": {"a": ' + deep
    assert parse([broken, "}}</tool_call>"], HERMES, SCHEMAS) == ("", "}}</tool_call>", [("now", '{"a": ' + deep)])


@pytest.mark.parametrize("form", TOOL_FORMATS, ids=lambda form: form.name)
def test_wherever_a_call_breaks_off_each_character_is_told_once(form: ToolFormat) -> None:
    arguments = json.dumps({"city": "Ä\n\nÖ ", "days": "Ü", "ñ": "É", "where": {"Ø": [1]}}, ensure_ascii=False)
    text = ("" if form.bare else "å ") + form.layout[0] + written(form, "weather", arguments) + form.layout[2]
    for end, more in itertools.product(range(len(text) + 1), ("", " <x> ß", "}\nß")):
        broken = text[:end] + more
        whole = parse([broken], form, SCHEMAS)
        told = whole[1] + "".join(given for _, given in whole[2])
        assert all(told.count(char) == 1 for char in broken if not char.isascii()), broken
        for parts in (list(broken), *in_two(broken)[::5]):
            assert parse(parts, form, SCHEMAS) == whole, parts


@pytest.mark.parametrize("tools", TOOL_FORMATS, ids=lambda tools: tools.name)
def test_any_cut_of_any_text_gives_the_same_message(tools: Any) -> None:
    shards = [
        "<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", NOW, WEATHER, "[", "]",
        "{", "}", '"', "\\", ";", ",", " ", "\n\n", "text", "<", "</", "é", *(tools.marks * 2 if tools.states else ()),
        "now", xml_call(), "[TOOL_CALLS]now[ARGS]{}", "now<arg_key>", "<function=now>", "n" * 250, WEATHER[:-9],
        '{"name": "now", "arguments": {', '"a": 1', "}}", f"[{NOW}, ",
    ]  # fmt: skip
    draw = random.Random(tools.name)
    for _ in range(1500):
        text = "".join(draw.choices(shards, k=draw.randint(1, 12)))
        options = {"reasoning": draw.random() < 0.5, "opened": draw.random() < 0.3}
        whole = parse([text], tools, SCHEMAS, **options)
        for _ in range(3):
            cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randint(1, 9)))
            parts = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
            assert parse(parts, tools, SCHEMAS, **options) == whole, parts
        assert parse(list(text), tools, SCHEMAS, **options) == whole, text


def test_reasoning_and_calls_come_as_they_are_written() -> None:
    parser = ReplyParser(HERMES, SCHEMAS, reasoning=True)
    assert parser.feed("<think>a") == [Reasoning("a")] and parser.is_reasoning
    assert parser.feed("b ") == [Reasoning("b")]
    assert parser.feed("c</thi") == [Reasoning(" c")]
    assert parser.feed("nk>\n\nSo") == [Content("So")] and not parser.is_reasoning
    assert parser.feed('\n<tool_call>{"name": "now') == []
    (call,) = parser.feed('", "argu')
    assert isinstance(call, ToolCall) and call.name == "now" and call.id.startswith("call_")
    assert parser.feed('ments": {"a": "\\') == [Arguments('{"a": "\\')]
    assert parser.feed('"</to') == [Arguments('"</to')]
    assert parser.feed('ol_call>"}') == [Arguments('ol_call>"')] and not parser.has_called
    assert parser.feed("}</tool") == [Arguments("}")] and parser.has_called
    assert parser.feed("_call>", ended=True) == []


def test_a_call_that_breaks_off_keeps_what_was_told_of_it() -> None:
    parser, text = ReplyParser(HERMES, SCHEMAS), 'So <tool_call>{"name": "now", "arguments": {"a": 1}'
    content, call, *arguments = parser.feed(text)
    assert isinstance(call, ToolCall) and content == Content("So") and arguments == [Arguments('{"a": 1')]
    assert parser.feed(", oh", ended=True) == [Content("},"), Content(" oh")] and not parser.has_called


def test_a_call_that_breaks_off_counts_as_one() -> None:
    broken, whole = '<tool_call>{"name": "now", "arguments": {"a": 1} so', f"<tool_call>{NOW}</tool_call>"
    for text, arguments in ((broken + whole, '{"a": 1'), (whole + broken, "{}")):
        for parts in ([text], list(text)):
            assert parse(parts, HERMES, SCHEMAS, max_calls=1) == ("", "} so", [("now", arguments)])


FORCED = [("weather", '{"city": "a } \\"b\\\\", "days": 3}'), ("now", "{}"), ("weather", '{"where": {"a": [1, "x"]}}')]


def written(form: ToolFormat, name: str, arguments: str) -> str:
    """A call as a grammar has it."""
    text = arguments
    if form.argument is not None:
        before, after = form.argument
        values = ((key, v if isinstance(v, str) else json.dumps(v)) for key, v in json.loads(arguments).items())
        text = "".join(before % key + value + after for key, value in values)
    return form.head % (name if form.states else json.dumps(name)) + text + form.tail


@pytest.mark.parametrize("thoughts", ["", "<think>\nHm.</think>\n\n"], ids=["at once", "after thoughts"])
@pytest.mark.parametrize("form", TOOL_FORMATS, ids=lambda form: form.name)
def test_calls_are_told_while_they_are_written(form: ToolFormat, thoughts: str) -> None:
    before, between, after = form.layout
    text = thoughts + before + between.join(written(form, *call) for call in FORCED) + after
    reasoning = "Hm." if thoughts else ""
    options: dict[str, Any] = {"forced": True, "reasoning": True}
    for end in range(len(text) + 1):
        free = parse([text[:end]], form, SCHEMAS, reasoning=True)
        assert parse(list(text[:end]), form, SCHEMAS, reasoning=True) == free
        whole = parse([text[:end]], form, SCHEMAS, **options)
        assert parse(list(text[:end]), form, SCHEMAS, **options) == whole
        told = "".join(name + arguments for name, arguments in whole[2])
        assert "".join(name + arguments for name, arguments in FORCED).startswith(told)
    assert free == whole == (reasoning, "", FORCED)
    for at in range(len(text)):
        assert parse([text[:at], text[at:]], form, SCHEMAS, **options) == whole
    one = parse([text], form, SCHEMAS, max_calls=1, **options)
    assert one == (reasoning, "", FORCED[:1])


@pytest.mark.parametrize("form", [form for form in TOOL_FORMATS if not form.argument], ids=lambda form: form.name)
def test_arguments_in_json_are_told_to_the_last_character(form: ToolFormat) -> None:
    name, arguments = FORCED[0]
    before, after = (form.layout[0] + written(form, name, arguments) + form.layout[2]).split(arguments)
    parser = ReplyParser(form, SCHEMAS)
    (call,) = parser.feed(before)
    assert isinstance(call, ToolCall) and call.name == name
    for char in arguments[:-1]:
        assert parser.feed(char) == [Arguments(char)]
    assert parser.feed(arguments[-1] + after, ended=True) == [Arguments("}")]


@pytest.mark.parametrize("form", [QWEN3_CODER, GLM45], ids=lambda form: form.name)
def test_strings_between_marks_are_told_while_they_are_written_and_other_values_whole(form: ToolFormat) -> None:
    assert form.argument is not None
    parser, (before, after) = ReplyParser(form, SCHEMAS), form.argument
    call, begin = parser.feed(form.layout[0] + form.head % "weather" + before % "city")
    assert isinstance(call, ToolCall) and call.name == "weather" and begin == Arguments('{"city": "')
    assert [parser.feed(char) for char in 'a"é'] == [[Arguments(text)] for text in ("a", r"\"", "é")]
    assert parser.feed("</") == []
    assert parser.feed("b> ") == [Arguments("</b> ")]
    assert parser.feed(after) == [Arguments('"')]
    assert parser.feed(before % "days" + "3") == []
    assert parser.feed(after) == [Arguments(', "days": 3')]
    assert parser.feed(form.tail + form.layout[2], ended=True) == [Arguments("}")]


@pytest.mark.parametrize(
    "text", ["", "\n", "\n\n", "\n\n\n", " \n<\n</", 'say "ü"\\\n\t\x00\x7f\u2028😀', "5", "null", "</par"]
)
@pytest.mark.parametrize("form", [QWEN3_CODER, GLM45], ids=lambda form: form.name)
def test_the_fragments_of_a_string_add_up_to_its_json(form: ToolFormat, text: str) -> None:
    expected = json.dumps({"city": text, "unknown": 1}, ensure_ascii=False)
    call = form.layout[0] + written(form, "weather", expected) + form.layout[2]
    for first, second in itertools.combinations(range(len(call) + 1), 2):
        parts = [call[:first], call[first:second], call[second:]]
        assert parse(parts, form, SCHEMAS) == ("", "", [("weather", expected)]), parts
    assert parse(list(call), form, SCHEMAS) == ("", "", [("weather", expected)])


def test_a_forced_call_that_is_cut_is_no_reason_to_end() -> None:
    parser = ReplyParser(HERMES, SCHEMAS, forced=True)
    call, arguments = parser.feed('<tool_call>\n{"name": "now", "arguments": {"a": "b')
    assert isinstance(call, ToolCall) and arguments == Arguments('{"a": "b')
    assert parser.feed("", ended=True) == [] and not parser.has_called


def test_ids_of_mistral_are_nine_letters_and_digits() -> None:
    found = ReplyParser(MISTRAL).feed(f"[TOOL_CALLS][{NOW}, {NOW}]")
    ids = {piece.id for piece in found if isinstance(piece, ToolCall)}
    assert len(ids) == 2 and all(len(call_id) == 9 and call_id.isalnum() for call_id in ids)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("city", "5", '"5"'),
        ("city", 'say "ü"\n', '"say \\"ü\\"\\n"'),
        ("days", " 5 ", "5"),
        ("days", "5.0", "5.0"),
        ("days", "5.5", '"5.5"'),
        ("days", "five", '"five"'),
        ("days", '"5"', '"\\"5\\""'),
        ("unit", "5", '"5"'),
        ("wind", "True", "true"),
        ("wind", "none", '"none"'),
        ("at", "None", "null"),
        ("at", "1e999", "1e999"),
        ("where", '{"a": [1]}', '{"a": [1]}'),
        ("where", "{'a': 1}", "\"{'a': 1}\""),
        ("where", "[1]", '"[1]"'),
        ("tags", "[1]", "[1]"),
        ("unknown", "[1]", "[1]"),
        ("unknown", '"a"', '"\\"a\\""'),
        ("unknown", "None", '"None"'),
        ("loop", "7", "7"),
    ],
)
@pytest.mark.parametrize("form", [QWEN3_CODER, GLM45], ids=lambda form: form.name)
def test_values_have_the_types_of_the_schema(form: ToolFormat, key: str, text: str, value: str) -> None:
    markup = f"<tool_call>weather\n<arg_key>{key}</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>"
    if form is QWEN3_CODER:
        markup = xml_call(**{key: text})
    assert parse([markup], form, SCHEMAS) == ("", "", [("weather", f'{{"{key}": {value}}}')])


def test_a_schema_that_goes_in_circles_says_nothing() -> None:
    loop = {"anyOf": [{"$ref": "#/$defs/loop"}] * 3}
    schemas = {"f": {"$defs": {"loop": loop}, "properties": {"x": loop, "y": {"anyOf": [{}] * 3000}}}}
    assert parse([xml_call("f", x="1", y="a")], QWEN3_CODER, schemas) == ("", "", [("f", '{"x": 1, "y": "a"}')])


def test_the_time_to_read_a_long_value_grows_as_the_value_does() -> None:
    parser, text = ReplyParser(QWEN3_CODER, SCHEMAS), xml_call(city="<" * 200_000)
    pieces = [piece for char in text for piece in parser.feed(char)]
    assert message_of(pieces)[2] == [("weather", json.dumps({"city": "<" * 200_000}))]
