"""Rewrite the generated parts of docs/configuration.md: the tables of engine, sampling and server options.

    python tools/make_docs.py            write them
    python tools/make_docs.py --check    exit with 1 if they are not what the code says

The tables are made from the fields of EngineConfig, SamplingParams and ServerConfig, as the command line is; a
generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvik.config import parse_bytes
from kvik.settings import ENGINE, SAMPLING, SERVER, Option, Pair, Table

__all__ = ["main", "render"]

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_KINDS: Mapping[type, str] = {bool: "true or false", int: "integer", float: "number", str: "text", Pair: "`ID=BIAS`"}
_HUGE = 2**31 - 1
_PLURALS: Mapping[type, str] = {int: "integers", str: "texts", Pair: "`ID=BIAS`"}
_PYTHON_ONLY = {
    "logits_processors": "callables",
    "structured_outputs": "a dict, or `StructuredOutputsParams`",
}
_COLUMNS = ("option", "value", "default", "meaning", "flag", "variable")


def render(page: str) -> str:
    """`page` with every generated part as the code has it now."""
    tables: Mapping[str, Table[Any]] = {table.name: table for table in (ENGINE, SAMPLING, SERVER)}
    return _PART.sub(lambda part: f"{part[1]}\n{_table(tables[part[2]])}\n\n{part[3]}", page)


def _table(table: Table[Any]) -> str:
    rows = [_COLUMNS, tuple("---" for _ in _COLUMNS)]
    for field in dataclasses.fields(table.cls):
        option = table.options.get(field.name)
        default = _default(field.default, table.none_word)
        place = ("Python only", "Python only") if option is None else (f"`{option.flag}`", f"`{option.variable}`")
        if option is not None and field.default is dataclasses.MISSING:  # an argument; only kvik info has it as a flag
            place = (f"`{field.name.upper()}`", "")
        value = _PYTHON_ONLY[field.name] if option is None else _value(option) + _bounds(field.metadata)
        rows.append((f"`{field.name}`", value, default, str(field.metadata["help"]), *place))
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def _value(option: Option) -> str:
    if option.choices:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    kind = "size in bytes" if option.parse is parse_bytes else _KINDS[option.kind]
    return f"list of {_PLURALS.get(option.kind, kind)}" if option.many else kind


def _bounds(metadata: Mapping[str, Any]) -> str:
    """The range of a number, as far as it says anything: a bound that only keeps a value in its type does not."""
    low, above, high = (metadata.get(name) for name in ("low", "above", "high"))
    limited = high is not None and high < _HUGE
    if above is not None:
        return f", above {above:g}" + (f", at most {_number(high)}" if limited else "")
    return "" if low is None else f", {_number(low)} to {_number(high)}" if limited else f", {_number(low)} or more"


def _number(value: Any) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _default(value: Any, none_word: str) -> str:
    if value is dataclasses.MISSING:
        return "(required)"
    if value is None:
        return none_word
    if isinstance(value, bool):
        return str(value).lower()
    return "(empty)" if value == () else f"`{value}`"


def main() -> int:
    """Write or check the page and return the exit code."""
    parser = argparse.ArgumentParser(description="Rewrite the generated parts of docs/configuration.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the page is out of date")
    check = parser.parse_args().check
    old = PAGE.read_text(encoding="utf-8")
    new = render(old)
    if check:
        print("up to date" if new == old else f"{PAGE.name} is out of date: run python tools/make_docs.py")
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
