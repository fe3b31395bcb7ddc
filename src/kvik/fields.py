"""Strict keyword arguments for the public dataclasses.

`strict` makes a dataclass refuse an unknown keyword with the nearest known name, and translate documented aliases;
`option` declares a field together with the help text and choices that the command line and the docs are made from.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from kvik.errors import did_you_mean

__all__ = ["option", "strict"]

T = TypeVar("T")


def option(default: Any, help: str, *, choices: tuple[str, ...] = (), parse: Callable[[Any], Any] | None = None) -> Any:
    """A dataclass field with `help`, optional `choices`, and `parse` to turn text or a loose value into its value."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "parse": parse})


def strict(
    error: type[Exception], *, aliases: Mapping[str, str] | None = None, hints: Mapping[str, str] | None = None
) -> Callable[[type[T]], type[T]]:
    """Class decorator: an unknown keyword raises `error` with a suggestion; `aliases` map other names to fields.

    `hints` holds, for names that users of other engines will try, the sentence that tells them what to use instead.
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
        return cls

    return decorate
