"""Chat messages to prompt text, with the chat template of the model.

`ChatTemplate` renders a template in jinja2's sandbox with the environment that transformers gives it, so that the
token ids are those of `apply_chat_template(tokenize=True)`. Every route (offline chat, HTTP) goes through
`ChatTemplate.encode`. Templates come from the model folder or the operator, never from a request.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError

from kvik.errors import ModelLoadError, RequestError
from kvik.fields import show
from kvik.text.messages import add_text, check_messages, check_plain, forms_of_calls, join_parts
from kvik.text.template_env import make_environment
from kvik.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "template_text"]

_RESERVED = frozenset({
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "messages",
    "return_dict", "tokenize", "tools",
})  # fmt: skip
_CONTINUE = "KVIK_FINAL_MESSAGE_GOES_ON_HERE "
_RUNTIME_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class ChatTemplate:
    """The chat template(s) of one model. `template` overrides them: a jinja text, or the path of a file with one."""

    def __init__(self, tokenizer: Tokenizer, template: str | Path | None = None) -> None:
        self._tokenizer = tokenizer
        self._sources = tokenizer.chat_templates if template is None else {"default": template_text(template)}
        self._environment = make_environment()
        self._compile = functools.cache(self._environment.from_string)
        self._parts_taken: dict[str, bool] = {}

    @property
    def source(self) -> str | None:
        """The text of the default template, if there is one."""
        return self._sources.get("default")

    @property
    def sources(self) -> tuple[str, ...]:
        """The texts of all templates."""
        return tuple(self._sources.values())

    def encode(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> tuple[str, list[int]]:
        """The prompt text and its token ids; the options are those of `render`. No BOS but the template's own."""
        text = self.render(messages, **options)
        return text, self._tokenizer.encode(text, add_special_tokens=False)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> str:
        """The prompt text. Raises RequestError for wrong messages or arguments, and where the template refuses.

        `add_generation_prompt` opens an assistant turn (by default unless `continue_final_message`, which leaves the
        last message open instead). `chat_template_kwargs` are variables of the template such as `enable_thinking`.
        The role developer becomes system where the template does not know it.
        """
        _check_options(
            unknown, add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message
        )
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other; give one",
                "continue_final_message",
            )
        source, template = self._choose(with_tools=bool(tools))
        chat = check_messages(messages)
        if "developer" not in source:
            chat = [_as_system(message) for message in chat]
        if not self._takes_parts(source):
            chat = [join_parts(message) for message in chat]
        final = _mark_end(chat, source) if continue_final_message else ""
        variables = {
            **self._tokenizer.special_tokens,
            **_check_kwargs(chat_template_kwargs),
            "tools": _check_dicts(tools, "tools"),
            "documents": _check_dicts(documents, "documents"),
            "add_generation_prompt": not continue_final_message
            if add_generation_prompt is None
            else add_generation_prompt,
        }
        text = _run_chat(template, variables, chat)
        return _cut_end(text, final) if continue_final_message else text

    def _choose(self, *, with_tools: bool) -> tuple[str, Template]:
        """The template for a request, by the rule of transformers: 'tool_use' for tools if there is one."""
        if not self._sources:
            raise RequestError(
                "this model has no chat template, so messages cannot be turned into a prompt; start it with "
                "chat_template=FILE (--chat-template FILE), or send a plain prompt for completion",
                "messages",
            )
        name = "tool_use" if with_tools and "tool_use" in self._sources else "default"
        if name not in self._sources:
            names = ", ".join(sorted(self._sources))
            raise RequestError(
                f"this model has chat templates {names} but no default; start it with chat_template=FILE"
            )
        source = self._sources[name]
        try:
            return source, self._compile(source)
        except TemplateError as error:
            raise RequestError(
                f"the chat template of this model is broken: {error}; pass another chat_template"
            ) from error

    def _takes_parts(self, source: str) -> bool:
        """Whether a template renders a list of text parts as it renders the same text; found out by trying once."""
        if source not in self._parts_taken:
            self._parts_taken[source] = all(self._keeps_parts(source, role) for role in ("user", "system", "assistant"))
        return self._parts_taken[source]

    def _keeps_parts(self, source: str, role: str) -> bool:
        """Whether one part is rendered as its text, and none of two parts is lost. True for a role that is refused."""
        one, other = ({"type": "text", "text": text} for text in ("kvik probe", "kvik's second"))
        text, part, both = (self._probe(source, role, content) for content in (one["text"], [one], [one, other]))
        if text is None:
            return role != "user"
        return (
            one["text"] in text and text == part and both is not None and one["text"] in both and other["text"] in both
        )

    def _probe(self, source: str, role: str, content: Any) -> str | None:
        message, user = {"role": role, "content": content}, {"role": "user", "content": "x"}
        messages = {"user": [message], "system": [message, user], "assistant": [user, message]}[role]
        variables = {"tools": None, "documents": None, "add_generation_prompt": False, **self._tokenizer.special_tokens}
        try:
            return _run(self._compile(source), {**variables, "messages": messages})
        except RequestError:
            return None


def _as_system(message: dict[str, Any]) -> dict[str, Any]:
    """A developer's message under the older name of that role, for templates that do not know the newer one."""
    return {**message, "role": "system"} if message["role"] == "developer" else message


def template_text(template: str | Path) -> str:
    """A template given as text (it has a tag or an expression) or as a path."""
    if isinstance(template, str) and ("{%" in template or "{{" in template):
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(
            f"chat_template {str(template)!r} is no jinja text and no readable file: {error}"
        ) from error


def _run(template: Template, variables: Mapping[str, Any]) -> str:
    try:
        return template.render(variables)
    except _RUNTIME_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise RequestError(f"the chat template cannot render these messages: {reason}", "messages") from error


def _run_chat(template: Template, variables: Mapping[str, Any], chat: list[dict[str, Any]]) -> str:
    """The rendered messages, in the first of their forms that the template takes."""
    failure: RequestError | None = None
    for form in forms_of_calls(chat) if any("tool_calls" in message for message in chat) else (chat,):
        try:
            return _run(template, {**variables, "messages": form})
        except RequestError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _check_options(unknown: Mapping[str, Any], **switches: object) -> None:
    for name in unknown:
        raise RequestError(f"chat has no option {name!r}; variables of the template go in chat_template_kwargs", name)
    for name, value in switches.items():
        if not isinstance(value, bool | None):
            raise RequestError(f"{name} must be true or false, got {show(value)}", name)


def _check_kwargs(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    if kwargs is None:
        return {}
    plain = check_plain(kwargs, "chat_template_kwargs")
    if not isinstance(plain, dict):
        raise RequestError(
            f"chat_template_kwargs must be an object, got {type(plain).__name__}", "chat_template_kwargs"
        )
    for name in plain:
        if not isinstance(name, str) or name in _RESERVED or name.startswith("_") or name.endswith("_token"):
            raise RequestError(
                f"chat_template_kwargs may not set {name!r}, which Kvik sets itself", "chat_template_kwargs"
            )
    return plain


def _check_dicts(items: Sequence[Mapping[str, Any]] | None, name: str) -> list[dict[str, Any]] | None:
    """A plain copy of a list of objects; None for an empty one."""
    if not items:
        return None
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, Mapping) for item in items):
        raise RequestError(f"{name} must be a list of JSON objects (a tool is given by its JSON schema)", name)
    return [check_plain(item, f"{name}[{i}]") for i, item in enumerate(items)]


def _mark_end(chat: list[dict[str, Any]], source: str) -> str:
    """Append a marker to the text of the last message, which says where the rendered prompt ends."""
    final = add_text(chat[-1], _CONTINUE)
    if final is None or "content" not in source:
        raise RequestError(
            f"continue_final_message: messages[{len(chat) - 1}] has no text to go on with", "continue_final_message"
        )
    return final


def _cut_end(text: str, final: str) -> str:
    """The prompt up to the marker; if the template trimmed the message, without its trailing space as well."""
    marker = _CONTINUE.rstrip()
    at = text.rfind(marker)
    if at < 0 or final.strip() not in text:
        raise RequestError(
            "continue_final_message: the chat template left out or changed the final message",
            "continue_final_message",
        )
    return text[:at] if text.startswith(_CONTINUE, at) else text[:at].rstrip()
