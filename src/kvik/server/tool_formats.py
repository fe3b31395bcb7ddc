"""How families of models write calls of tools, as data. `reply_parser` reads calls, `forced_calls` forces them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["TOOL_FORMATS", "ToolFormat"]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls: `begin`, what says name and arguments, `end`, which may be missing.

    Without `states` that is a JSON object, or a list of them. With them it is markup: each state has the marks that may
    end it and the state behind each. The text of the states name, key and value is what these say, that of id is of no
    use, json is JSON to its end, and others are white space. A call begins with the first state and is over in `end`.
    Values stand between `padding`, a character or none, and are typed after the function's schema.

    A `bare` format begins with the first character of the message, `begin` may be missing too, and only calls of
    functions that the request offers count: an answer may be JSON for other reasons.

    `inner_begin` is the mark of the first state with which a call begins too, for models that forget `begin`; it then
    counts as in a bare format.

    `layout` is what models write before, between and after calls; a call is `head`, with the name, arguments, `tail`.
    Arguments are a JSON object, or what stands before (with the key) and after each of them is in `argument`.
    A template is of this format if it holds all `signs` and none of `foreign`.
    """

    name: str
    begin: str
    end: str
    signs: tuple[str, ...]
    layout: tuple[str, str, str]
    head: str = '{"name": %s, "arguments": '
    tail: str = "}"
    argument: tuple[str, str] | None = None
    foreign: tuple[str, ...] = ()
    bare: bool = False
    inner_begin: str = ""
    id_prefix: str = "call_"
    id_length: int = 24
    states: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    padding: str = ""

    @property
    def marks(self) -> tuple[str, ...]:
        """Every text that must be seen for calls to be found."""
        inner = (mark for marks in self.states.values() for mark in marks)
        return tuple(dict.fromkeys(mark for mark in (self.begin, self.end, *inner) if mark))


TOOL_FORMATS = (
    ToolFormat(
        "hermes",
        "<tool_call>",
        "</tool_call>",
        signs=("<tool_call>",),
        layout=("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
        foreign=("<function=", "<arg_key>"),
    ),
    ToolFormat(
        "qwen3_coder",
        "<tool_call>",
        "</tool_call>",
        signs=("<tool_call>", "<function=", "<parameter="),
        layout=("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
        head="<function=%s>\n",
        tail="</function>",
        argument=("<parameter=%s>\n", "\n</parameter>\n"),
        inner_begin="<function=",
        states={
            "begin": {"<function=": "name"},
            "name": {">": "item"},
            "item": {"<parameter=": "key", "</function>": "end"},
            "key": {">": "value"},
            "value": {"</parameter>": "item"},
        },
        padding="\n",
    ),
    ToolFormat(
        "glm45",
        "<tool_call>",
        "",
        signs=("<tool_call>", "<arg_key>", "<arg_value>"),
        layout=("<tool_call>", "</tool_call>\n<tool_call>", "</tool_call>"),
        head="%s\n",
        tail="",
        argument=("<arg_key>%s</arg_key>\n<arg_value>", "</arg_value>\n"),
        states={
            "name": {"<arg_key>": "key", "</tool_call>": "end"},
            "key": {"</arg_key>": "between"},
            "between": {"<arg_value>": "value"},
            "value": {"</arg_value>": "item"},
            "item": {"<arg_key>": "key", "</tool_call>": "end"},
        },
    ),
    ToolFormat(
        "mistral",
        "[TOOL_CALLS]",
        "",
        signs=("[TOOL_CALLS]",),
        layout=("[TOOL_CALLS] [", ", ", "]"),
        foreign=("[ARGS]",),
        id_prefix="",  # templates of this family refuse other ids than nine letters and digits
        id_length=9,
    ),
    ToolFormat(
        "mistral_args",
        "[TOOL_CALLS]",
        "",
        signs=("[TOOL_CALLS]", "[ARGS]"),
        layout=("[TOOL_CALLS]", "[TOOL_CALLS]", ""),
        head="%s[ARGS]",
        tail="",
        id_prefix="",
        id_length=9,
        states={
            "name": {"[ARGS]": "json", "[CALL_ID]": "id"},
            "id": {"[ARGS]": "json"},
        },
    ),
    ToolFormat(
        "llama",
        "<|python_tag|>",
        ";",
        signs=('"parameters": ', "ipython"),
        layout=("", "; ", ""),
        head='{"name": %s, "parameters": ',
        bare=True,
    ),
)
