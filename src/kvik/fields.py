"""Strict, self-checking options for the public dataclasses.

`option` declares a field with its help text, limits and choices, which the command line, the docs and the HTTP schema
are made from. `check_fields` holds values against them. `strict` makes the dataclass refuse an unknown keyword with
the nearest known name, and translate documented aliases.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from kvik.errors import ConfigError, did_you_mean

__all__ = ["check_fields", "option", "show", "strict"]

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    parse: Callable[[Any], Any] | None = None,
) -> Any:
    """A dataclass field with `help` and what its values may be.

    Numbers lie in [`low`, `high`], or above `above` where that bound itself is excluded. `parse` turns the loose forms
    that a value may be given in into its declared type, and raises for anything else.
    """
    limits = {"low": low, "high": high, "above": above}
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "parse": parse, **limits})


def show(value: object) -> str:
    """`repr` for error messages: short, and safe for integers of thousands of digits."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_fields(options: Any, fail: Callable[[str, str], Exception]) -> None:
    """Parse and check every field of a frozen dataclass that does not hold its default, which is as it should be.
    Raises `fail(message, field name)`."""
    for name, default, kinds, meta in _declared(options.__class__):
        value = getattr(options, name)
        if value is default or (value is None and "None" in kinds):
            continue
        if meta["parse"] is not None:
            try:
                value = meta["parse"](value)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from None
            object.__setattr__(options, name, value)
            if value is None and "None" in kinds:
                continue
        problem = _problem(value, kinds[0], meta)
        if problem:
            raise fail(f"{name} must be {problem}, got {show(value)}", name)


@functools.cache
def _declared(cls: type) -> tuple[tuple[str, object, tuple[str, ...], Mapping[str, Any]], ...]:
    """Name, default, kinds of types and metadata of every field of a dataclass."""
    return tuple(
        (f.name, f.default, tuple(kind.strip() for kind in str(f.type).split("|")), f.metadata)
        for f in dataclasses.fields(cls)
    )


def _problem(value: object, kind: str, meta: Mapping[str, Any]) -> str | None:
    """What a value of declared type `kind` must be, if it is not."""
    if kind == "bool":
        return None if isinstance(value, bool) else "true or false"
    if kind == "str":
        if meta["choices"]:
            return None if value in meta["choices"] else f"one of {', '.join(meta['choices'])}"
        return None if isinstance(value, str) and value else "a non-empty string"
    if kind in ("int", "float"):
        types = int if kind == "int" else (int, float)
        right = isinstance(value, types) and not isinstance(value, bool) and _within(value, meta)
        return None if right else f"{'an integer' if kind == 'int' else 'a number'} {_range(meta)}"
    return None  # other types are checked by their `parse`


def _within(value: Any, meta: Mapping[str, Any]) -> bool:
    """Comparisons are written so that NaN is outside."""
    low, high, above = meta["low"], meta["high"], meta["above"]
    inside = (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
    return bool(inside and value == value)


def _range(meta: Mapping[str, Any]) -> str:
    low, high, above = meta["low"], meta["high"], meta["above"]
    if high is None:
        return f">= {low}" if above is None else f"> {above}"
    return f"in [{low}, {high}]" if above is None else f"in ({above}, {high}]"


def strict(
    error: type[Exception], *, aliases: Mapping[str, str] | None = None, hints: Mapping[str, str] | None = None
) -> Callable[[type[T]], type[T]]:
    """Class decorator: an unknown keyword raises `error` with a suggestion; `aliases` map other names to fields.

    The class gets its aliases as `__aliases__`. `hints` holds, for names that users of other engines will try, the
    sentence that tells them what to use instead.
    """
    renames, advice = dict(aliases or {}), dict(hints or {})

    def decorate(cls: type[T]) -> type[T]:
        names = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
        plain_init = cls.__init__

        @functools.wraps(plain_init)
        def __init__(self: T, *args: Any, **kwargs: Any) -> None:
            for name in list(kwargs):
                target = renames.get(name, name)
                if target not in names:
                    tip = f": {advice[name]}" if name in advice else did_you_mean(name, [*names, *renames])
                    raise error(f"{cls.__name__} has no option {name!r}{tip}")
                if target != name and target in kwargs:
                    raise error(f"{cls.__name__}: {name!r} is another name of {target!r}; give only one of them")
                kwargs[target] = kwargs.pop(name)
            plain_init(self, *args, **kwargs)

        cls.__init__ = __init__  # type: ignore[method-assign, assignment]
        cls.__aliases__ = renames  # type: ignore[attr-defined]
        return cls

    return decorate
