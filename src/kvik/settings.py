"""Where options come from: defaults < config file < environment < command line, each value with its origin.

Everything is made from the fields of the option dataclasses, so there is no second list. An engine option is
`max_num_seqs` at the top level of the file, KVIK_MAX_NUM_SEQS in the environment and --max-num-seqs as a flag; a
sampling option is `temperature` in the file's section `sampling`, KVIK_SAMPLING_TEMPERATURE, and --temperature; a
server option is `port` in the section `server`, KVIK_SERVER_PORT, and --port. The file (YAML, or JSON where its name
ends in .json) is named by --config or KVIK_CONFIG.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from kvik.config import EngineConfig
from kvik.errors import ConfigError, RequestError, did_you_mean
from kvik.sampling_params import SamplingParams
from kvik.server_config import ServerConfig

__all__ = [
    "CONFIG_VARIABLE", "ENGINE", "SAMPLING", "SERVER", "Option", "Setting", "Settings", "Table", "load_server_settings",
    "load_settings",
]  # fmt: skip

T = TypeVar("T")

CONFIG_VARIABLE = "KVIK_CONFIG"
_PREFIX = "KVIK_"
_NOT_OPTIONS = (CONFIG_VARIABLE, "KVIK_CPU_ISA", "KVIK_CPU_SPIN_NS")
_AUTOMATIC = ("auto", "none", "null")
_BOOLEANS = MappingProxyType(
    {word: value for words, value in (("1 true yes on", True), ("0 false no off", False)) for word in words.split()}
)


class Pair:
    """The kind of an option whose items are ID=BIAS."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One field of an option dataclass that can be given as text.

    `kind` is bool, int, float, str or Pair; `many` says that the value is a tuple of that; `optional` allows None.
    """

    name: str
    help: str
    default: Any
    choices: tuple[str, ...]
    parse: Callable[[Any], Any] | None
    kind: type
    many: bool
    optional: bool
    flag: str
    variable: str

    def read(self, raw: Any, origin: str) -> Any:
        """The value of text, or of what a config file holds. Raises ConfigError that names `origin`."""
        try:
            return self._convert(raw)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{origin}: {error}") from None

    def _convert(self, raw: Any) -> Any:
        if raw is None or (self.optional and str(raw).lower() in _AUTOMATIC):
            if self.optional:
                return None
            raise ValueError(f"{self.name} must have a value")
        if self.many:
            return tuple(_CONVERTERS[self.kind](item) for item in self._items(raw))
        try:
            return _CONVERTERS[self.kind](raw)
        except ValueError:  # perhaps a loose form that the dataclass takes, such as 4GiB for a number
            value = None if self.parse is None else self.parse(raw)
            if not isinstance(value, self.kind):
                raise
            return value

    def _items(self, raw: Any) -> list[Any]:
        """The items of a list: a list or mapping from a file, a JSON list, or ids separated by commas.

        A text that is no JSON is one item of a list of texts, such as the stop string [INST].
        """
        if isinstance(raw, Mapping):
            return list(raw.items())
        if isinstance(raw, str):
            if raw.startswith("["):
                try:
                    return list(json.loads(raw))
                except ValueError:
                    if self.kind is not str:
                        raise
            return [raw] if self.kind is str else [item for item in raw.split(",") if item.strip()]
        return list(raw) if isinstance(raw, (list, tuple)) else [raw]


def _to_bool(raw: Any) -> bool:
    value = raw if isinstance(raw, bool) else _BOOLEANS.get(str(raw).lower())
    if value is None:
        raise ValueError(f"{raw!r} is neither true nor false")
    return value


def _to_int(raw: Any) -> int:
    if isinstance(raw, str) and re.fullmatch(r"\s*[+-]?\d+\s*", raw):
        return int(raw)
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    raise ValueError(f"{raw!r} is not an integer")


def _to_float(raw: Any) -> float:
    if isinstance(raw, (int, float, str)) and not isinstance(raw, bool):
        try:
            return float(raw)
        except ValueError:
            pass
    raise ValueError(f"{raw!r} is not a number")


def _to_str(raw: Any) -> str:
    if not isinstance(raw, str):
        raise ValueError(f"{raw!r} is not text; put it in quotes")
    return raw


def _to_pair(raw: Any) -> tuple[int, float]:
    parts = raw.split("=", 1) if isinstance(raw, str) else raw
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        raise ValueError(f"{raw!r} is not ID=BIAS")
    return _to_int(parts[0]), _to_float(parts[1])


_CONVERTERS: Mapping[type, Callable[[Any], Any]] = MappingProxyType(
    {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str, Pair: _to_pair}
)


@dataclasses.dataclass(frozen=True, slots=True)
class Table(Generic[T]):
    """An option dataclass with the options that can be given as text; `section` is its place in a config file."""

    name: str
    cls: type[T]
    section: str | None
    none_word: str
    aliases: Mapping[str, str]
    options: Mapping[str, Option]

    def find(self, name: str, origin: str) -> Option:
        """The option of a name or alias. Raises ConfigError, with the nearest name, for an unknown one."""
        option = self.options.get(self.aliases.get(name, name))
        if option is None:
            near = did_you_mean(name, [*self.options, *self.aliases])
            raise ConfigError(f"{origin}: there is no {self.name} option {name!r}{near}")
        return option


def _kind(hint: Any) -> tuple[type, bool, bool] | None:
    """(kind, many, optional) of a field's type, or None for one that text cannot give."""
    inner = typing.get_args(hint)
    if type(None) in inner:
        found = _kind(next(arg for arg in inner if arg is not type(None)))
        return None if found is None else (found[0], found[1], True)
    if typing.get_origin(hint) is tuple:
        kind = Pair if typing.get_origin(inner[0]) is tuple else inner[0]
        return (kind, True, False) if kind in _CONVERTERS else None
    return (hint, False, False) if hint in _CONVERTERS else None


def _options(cls: type[Any], prefix: str, shared: frozenset[str], shared_flag: str) -> Mapping[str, Option]:
    """Options of a dataclass. Names in `shared` belong to another table too: their flags begin with `shared_flag`."""
    hints, options = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        kind = _kind(hints[field.name])
        if kind is None:
            continue
        flag = f"{shared_flag if field.name in shared else ''}{field.name}".replace("_", "-")
        options[field.name] = Option(
            name=field.name,
            help=field.metadata["help"],
            default=field.default,
            choices=field.metadata["choices"],
            parse=field.metadata["parse"],
            kind=kind[0],
            many=kind[1],
            optional=kind[2],
            flag=f"--{flag}",
            variable=f"{prefix}{field.name.upper()}",
        )
    return MappingProxyType(options)


def _table(
    cls: type[T], name: str, section: str | None, prefix: str, none_word: str, shared: frozenset[str]
) -> Table[T]:
    aliases: Mapping[str, str] = MappingProxyType(getattr(cls, "__aliases__", {}))
    return Table(name, cls, section, none_word, aliases, _options(cls, prefix, shared, f"{name}-"))


_SHARED = frozenset(f.name for f in dataclasses.fields(EngineConfig)) & frozenset(
    f.name for f in dataclasses.fields(SamplingParams)
)
ENGINE: Table[EngineConfig] = _table(EngineConfig, "engine", None, _PREFIX, "auto", _SHARED)
SAMPLING: Table[SamplingParams] = _table(
    SamplingParams, "sampling", "sampling", f"{_PREFIX}SAMPLING_", "none", frozenset()
)
SERVER: Table[ServerConfig] = _table(ServerConfig, "server", "server", f"{_PREFIX}SERVER_", "none", frozenset())
_TABLES: tuple[Table[Any], ...] = (ENGINE, SAMPLING, SERVER)


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """A value and where it came from: a flag, a variable, a file, or "default"."""

    value: Any
    origin: str


class Settings(Generic[T]):
    """What was given for one table; everything else has its default."""

    def __init__(self, table: Table[T], given: Mapping[str, Setting]) -> None:
        self.table = table
        self.given = dict(given)

    def make(self, base: T | None = None) -> T:
        """The dataclass with the given values, over `base` or the defaults. Raises ConfigError naming the origin."""
        values = {name: setting.value for name, setting in self.given.items()}
        required = [o for o in self.table.options.values() if o.default is dataclasses.MISSING and o.name not in values]
        if base is None and required:
            name, variable = required[0].name, required[0].variable
            raise ConfigError(f"no {name} was given: name it on the command line, in {variable} or in a config file")
        try:
            return self.table.cls(**values) if base is None else dataclasses.replace(base, **values)  # type: ignore[type-var]
        except (ConfigError, RequestError) as error:
            raise self._with_origin(error) from None

    def _with_origin(self, error: ConfigError | RequestError) -> ConfigError:
        """The same message, which begins with the name of an option, with the origin of that option's value."""
        match = re.match(r"\w+", str(error))
        name = error.param if isinstance(error, RequestError) else match and match[0]
        setting = self.given.get(name or "")
        return ConfigError(f"{error} (from {setting.origin})" if setting else str(error))

    def rows(self, base: T | None = None, base_origin: str = "default") -> list[tuple[str, str, str]]:
        """(name, value, origin) of every option, for people. `base` has the values that were not given."""
        default = {o.name: o.default for o in self.table.options.values()}
        values = self.make(base)
        rows = []
        for name in self.table.options:
            value = getattr(values, name)
            changed = value not in (default[name], None)
            origin = self.given[name].origin if name in self.given else base_origin if changed else "default"
            rows.append((name, self.table.none_word if value is None else _show(value), origin))
        return rows


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, tuple) else str(value)


Flags = Mapping[tuple[str, str], Setting]


def load_settings(
    flags: Flags, environ: Mapping[str, str], config_file: str | None = None
) -> tuple[Settings[EngineConfig], Settings[SamplingParams]]:
    """Settings of the engine and of sampling from every source.

    `flags` are values from the command line by (table name, option name); `config_file` wins over KVIK_CONFIG. Raises
    ConfigError for unknown or malformed options, naming the file or variable.
    """
    merged = _merge(flags, environ, config_file)
    return _pick(ENGINE, merged), _pick(SAMPLING, merged)


def load_server_settings(
    flags: Flags, environ: Mapping[str, str], config_file: str | None = None
) -> Settings[ServerConfig]:
    """Settings of the HTTP server, by the same rules."""
    return _pick(SERVER, _merge(flags, environ, config_file))


def _merge(flags: Flags, environ: Mapping[str, str], config_file: str | None) -> Flags:
    file = config_file or environ.get(CONFIG_VARIABLE)
    return {**(_read_file(Path(file)) if file else {}), **_read_environment(environ), **flags}


def _pick(table: Table[T], merged: Flags) -> Settings[T]:
    return Settings(table, {name: setting for (owner, name), setting in merged.items() if owner == table.name})


def _read_environment(environ: Mapping[str, str]) -> dict[tuple[str, str], Setting]:
    known = {o.variable: (table, o) for table in _TABLES for o in table.options.values()}
    found = {}
    for variable in sorted(environ):
        if not variable.startswith(_PREFIX) or variable in _NOT_OPTIONS:
            continue
        if variable not in known:
            near = did_you_mean(variable, [*known, *_NOT_OPTIONS])
            raise ConfigError(f"environment variable {variable} is not an option of Kvik{near}; unset it")
        table, option = known[variable]
        found[table.name, option.name] = Setting(option.read(environ[variable], variable), variable)
    return found


def _read_file(path: Path) -> dict[tuple[str, str], Setting]:
    content = dict(_parse_file(path))
    found = {}
    for table in reversed(_TABLES):  # the engine's options are what is left outside of the sections
        prefix = f"{table.section}." if table.section else ""
        values = (content.pop(table.section, None) or {}) if table.section else content
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {table.section} must hold options, got {values!r}")
        for name, raw in values.items():
            option = table.find(str(name), str(path))
            if (table.name, option.name) in found:
                raise ConfigError(f"{path}: {prefix}{name} is another name of an option that the file has already")
            found[table.name, option.name] = Setting(option.read(raw, f"{path}: {prefix}{name}"), str(path))
    return found


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping. Raises ValueError where a key comes twice, of which a parser would forget the first."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} is there twice")
        found[key] = value
    return found


def _yaml_loader() -> Any:
    """YAML's safe loader, with `_once`."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            _once((key.value, None) for key, _ in node.value if isinstance(key.value, str))
            return super().construct_mapping(node, deep)

    return Loader


def _parse_file(path: Path) -> dict[Any, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        is_json = path.suffix == ".json"
        content = json.loads(text, object_pairs_hook=_once) if is_json else yaml.load(text, _yaml_loader())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"the config file {path} is malformed: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"the config file {path} holds a {type(content).__name__}, not options with values")
    return content
