"""Command lines: a parser that suggests, flags made from the option tables, and what every engine command shares."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NoReturn

from kvik.config import EngineConfig, parse_bytes
from kvik.errors import ConfigError, did_you_mean
from kvik.sampling_params import SamplingParams
from kvik.settings import ENGINE, SAMPLING, Option, Pair, Setting, Settings, Table, load_settings

__all__ = [
    "EngineOptions",
    "Parser",
    "add_engine_flags",
    "add_flags",
    "read_engine_options",
    "read_flags",
    "results_file",
]

_METAVARS = {bool: "", int: "N", float: "X", str: "TEXT", Pair: "ID=BIAS"}
_LOG_LEVELS = ("debug", "info", "warning", "error")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are ConfigErrors, with the nearest flag for one that does not exist."""

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.prog} --help lists the options")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The parsed arguments; positional arguments may stand between flags."""
        args, rest = self.parse_known_intermixed_args(list(argv))
        if rest:
            wrong = rest[0].split("=", 1)[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"unknown argument {wrong!r}{did_you_mean(wrong, flags)}")
        return args


def results_file(text: str) -> str:
    """The `type` of an argument that names a file to write in the end: whether that can be is known before the work."""
    path = os.path.abspath(text)
    there = path
    while not os.path.exists(there):
        there = os.path.dirname(there)
    if os.path.isdir(path) or (there != path and not os.path.isdir(there)) or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written, because of {there}; give another file")
    return text


@dataclasses.dataclass(frozen=True, slots=True)
class EngineOptions:
    """Settings of a command that makes an engine."""

    engine: Settings[EngineConfig]
    sampling: Settings[SamplingParams]


def add_flags(parser: argparse.ArgumentParser, table: Table[Any], skip: Sequence[str] = ()) -> None:
    """One flag for each option of `table`, in a group of its own; values stay text until `read_engine_options`."""
    group = parser.add_argument_group(f"{table.name} options")
    for option in table.options.values():
        if option.name in skip:
            continue
        dest = f"{table.name}.{option.name}"
        text = _help(option, table.none_word)
        if option.kind is bool:
            group.add_argument(option.flag, dest=dest, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            action = "append" if option.many else "store"
            group.add_argument(option.flag, dest=dest, action=action, metavar=_metavar(option), help=text)


def add_engine_flags(parser: argparse.ArgumentParser, *, model: bool = True, sampling: bool = True) -> None:
    """MODEL, the engine's flags, the sampling flags if wanted, --config, --print-config and --log-level."""
    if model:
        parser.add_argument("engine.model", metavar="MODEL", help=ENGINE.options["model"].help)
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with options (or set KVIK_CONFIG)")
    parser.add_argument("--print-config", action="store_true", help="show every option with its origin, and leave")
    parser.add_argument("--log-level", choices=_LOG_LEVELS, default="warning", help="log lines to show on stderr")
    if sampling:
        add_flags(parser, SAMPLING)
    add_flags(parser, ENGINE, skip=("model",) if model else ())


def read_engine_options(args: argparse.Namespace) -> EngineOptions:
    """Settings from the flags in `args`, the environment and the config file. Raises ConfigError."""
    return EngineOptions(*load_settings(read_flags(args, ENGINE, SAMPLING), os.environ, args.config))


def read_flags(args: argparse.Namespace, *tables: Table[Any]) -> dict[tuple[str, str], Setting]:
    """The flags in `args` of the options of some tables. Raises ConfigError."""
    flags: dict[tuple[str, str], Setting] = {}
    for table in tables:
        for option in table.options.values():
            raw = getattr(args, f"{table.name}.{option.name}", None)
            if raw is not None:
                flags[table.name, option.name] = _setting(option, raw)
    return flags


def _setting(option: Option, raw: Any) -> Setting:
    """A flag's value. Flags of text lists are taken literally, one item each; ids may also be separated by commas."""
    if option.many and option.kind is not str:
        raw = [item for text in raw for item in text.split(",") if item.strip()]
    return Setting(option.read(raw, option.flag), option.flag)


def _metavar(option: Option) -> str:
    if option.choices:
        return "{" + ",".join(option.choices) + "}"
    return "SIZE" if option.parse is parse_bytes else _METAVARS[option.kind]


def _help(option: Option, none_word: str) -> str:
    if option.default is dataclasses.MISSING:
        return option.help
    if option.many:
        return f"{option.help}; may be repeated"
    default = none_word if option.default is None else str(option.default).lower()
    return f"{option.help} (default: {default})".replace("%", "%%")
