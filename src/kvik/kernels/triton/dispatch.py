"""Which kernel computes a projection, and with which tile sizes: one table, read from JSON.

`h200.json` is shipped: rules, of which the first that matches decides, and plans measured on an H200; those under
`hopper` need a Triton whose Gluon is known. `tune.tune` measures shapes on the GPU at hand and writes what was fastest
to the user's cache (`cache_path`), under the GPU's name and a hash of the kernels, so that a changed kernel is never
run with the measurements of another. Nothing here changes a result beyond its rounding.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from kvik.errors import ConfigError
from kvik.kernels.triton.features import knows_gluon
from kvik.log import logger

__all__ = [
    "BUCKETS", "CUTS", "Case", "Norm", "Plan", "RowPlan", "Rule", "Table", "cache_path", "load_table", "save_measured",
]  # fmt: skip

BUCKETS = (1, 2, 4, 8, 16, 32, 40, 64, 128, 256, 512, 1024, 2048, 4096)
"""Numbers of tokens that have a plan of their own; others take the next larger one, and more than these the last."""

CUTS = (5, 6)
"""Eighths of a plan's tokens, of 64 and more, that programs of `linear_hopper` have where a step needs no more."""

_HERE = Path(__file__).parent
_PATHS = ("gemv", "skinny", "hopper", "blas")
_TUNED_SOURCES = ("gemv.py", "skinny.py", "linear_hopper.py", "barriers.py", "tiles.py", "pdl.py")


class Norm(NamedTuple):
    """An RMSNorm in front of a projection: its weight [hidden_size] and epsilon."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one projection runs: the path, and numbers that only some paths read. Tile sizes are powers of two."""

    path: str  # gemv: 1 to 4 tokens; skinny, hopper: tensor cores, weights as M; blas: the vendor's library
    block_n: int = 64  # weight rows of one program; hopper: 64, 128 or 192, gates and ups counted
    block_k: int = 128  # columns of one step; gemv: of one tile in registers
    block_t: int = 16  # skinny, hopper: tokens of one program
    split_k: int = 1  # skinny, hopper: programs that share K, except for gate and up, which are multiplied
    num_warps: int = 4
    num_stages: int = 3  # skinny, hopper: depth of the software pipeline
    prefetch: int = 0  # skinny: steps of the weight asked for before the predecessor has ended
    tma: bool = False  # skinny: the tensor memory accelerator copies the tiles, where there is one

    def fitting(self, shared_bytes: int, step_bytes: int, *, tma: bool) -> Plan:
        """This plan with no deeper a pipeline than a GPU's shared memory holds, of steps of so many bytes: each in a
        buffer, but for the one that registers hold where no TMA copies it. No result depends on the depth."""
        depth = max(1, shared_bytes // step_bytes + (not (tma and self.tma)))
        return self if self.path != "skinny" or depth >= self.num_stages else replace(self, num_stages=depth)

    def __post_init__(self) -> None:
        if self.path not in _PATHS:
            raise ConfigError(f"path must be one of {', '.join(_PATHS)}, got {self.path!r}")
        for name in ("block_n", "block_k", "block_t", "num_warps"):
            if (self.path, name) != ("hopper", "block_n"):
                _power_of_two(name, getattr(self, name))
        if self.path == "hopper":
            self._check_hopper()
        if self.path == "skinny" and min(self.block_k, self.block_t) < 16:
            raise ConfigError(
                f"tensor cores need block_k and block_t of at least 16, got {self.block_k}, {self.block_t}"
            )
        if self.split_k < 1 or self.num_stages < 1 or self.prefetch < 0:
            raise ConfigError("split_k and num_stages must be at least 1, prefetch at least 0")

    def _check_hopper(self) -> None:
        if self.block_n not in (64, 128, 192) or not 8 <= self.block_t <= 256:
            raise ConfigError(
                "hopper takes block_n of 64, 128 or 192 and block_t from 8 to 256, "
                f"got {self.block_n} and {self.block_t}"
            )
        least = max(2, self.block_n // 64)  # a step waits for the buffer that the step before has left
        if self.num_stages < least:
            raise ConfigError(f"block_n {self.block_n} needs num_stages {least}, got {self.num_stages}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """How an operation on rows runs: elements (rope: heads) of one program, where it may choose, and warps."""

    block: int = 1024
    num_warps: int = 4

    def __post_init__(self) -> None:
        _power_of_two("block", self.block)
        _power_of_two("num_warps", self.num_warps)


def _power_of_two(name: str, value: int) -> None:
    if value < 1 or value & (value - 1):
        raise ConfigError(f"{name} must be a power of two, got {value}")


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape: `num_tokens` rows, `n` outputs per token, `k` inputs (rows: their size)."""

    op: str
    num_tokens: int
    n: int
    k: int
    dtype: str  # as torch writes it, without "torch."

    @property
    def bucket(self) -> int:
        return next((size for size in BUCKETS if size >= self.num_tokens), BUCKETS[-1])

    @property
    def key(self) -> str:
        return f"{self.op} m{self.bucket} n{self.n} k{self.k} {self.dtype}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A plan for all cases within bounds; what is None does not matter."""

    plan: Plan | RowPlan
    ops: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    max_m: int | None = None
    max_n: int | None = None
    max_k: int | None = None

    def matches(self, case: Case) -> bool:
        return (
            (self.ops is None or case.op in self.ops)
            and (self.dtypes is None or case.dtype in self.dtypes)
            and (self.max_m is None or case.bucket <= self.max_m)
            and (self.max_n is None or case.n <= self.max_n)
            and (self.max_k is None or case.k <= self.max_k)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Every plan there is: measured cases first, then the first rule that matches."""

    rules: tuple[Rule, ...]
    deterministic: tuple[Rule, ...]  # one path and split of K for every number of tokens
    rows: tuple[Rule, ...]  # operations on rows
    measured: dict[str, Plan] = field(default_factory=dict)  # by Case.key

    def plan(self, case: Case, *, deterministic: bool = False, hopper: bool = True) -> Plan:
        """The plan of a projection. What decides the bits of a deterministic one does not depend on `num_tokens`.

        Without `hopper`, plans of that path do not count.
        """
        measured = None if deterministic else self.measured.get(case.key)
        if measured is not None and (hopper or measured.path != "hopper"):
            return measured
        rules = self.deterministic if deterministic else self.rules
        plan = _first(rules if hopper else tuple(rule for rule in rules if not _is_hopper(rule.plan)), case)
        assert isinstance(plan, Plan)
        return plan

    def row_plan(self, case: Case) -> RowPlan:
        """The plan of an operation on rows of `case.k` elements."""
        plan = _first(self.rows, case)
        assert isinstance(plan, RowPlan)
        return plan


def _is_hopper(plan: Plan | RowPlan) -> bool:
    return isinstance(plan, Plan) and plan.path == "hopper"


def _first(rules: tuple[Rule, ...], case: Case) -> Plan | RowPlan:
    for rule in rules:
        if rule.matches(case):
            return rule.plan
    raise ConfigError(f"no rule of the kernel table matches {case.key}; end its lists with a rule without bounds")


def load_table(gpu: str, directory: Path | None = None) -> Table:
    """The shipped table, and over it what was measured on this kind of GPU with these kernels, if anything was.

    The shipped rules serve every GPU, the shipped measurements only the kind that they were taken on.
    """
    shipped = json.loads((_HERE / "h200.json").read_text())
    measured: dict[str, Plan] = {}
    if gpu == shipped["gpu"]:
        measured = _plans(shipped["measured"]) | (_plans(shipped["hopper"]) if knows_gluon() else {})
    path = cache_path(gpu, directory)
    if path.exists():
        try:
            measured |= _plans(json.loads(path.read_text())["measured"])
        except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            logger.warning("ignoring the measured kernel table %s, which cannot be read: %s", path, error)
    return Table(
        rules=tuple(_rule(entry, Plan) for entry in shipped["rules"]),
        deterministic=tuple(_rule(entry, Plan) for entry in shipped["deterministic"]),
        rows=tuple(_rule(entry, RowPlan) for entry in shipped["rows"]),
        measured=measured,
    )


def _plans(entries: dict[str, Any]) -> dict[str, Plan]:
    return {key: Plan(**plan) for key, plan in entries.items()}


def _rule(entry: dict[str, Any], kind: type[Plan] | type[RowPlan]) -> Rule:
    bounds: dict[str, Any] = entry.get("when", {})
    when: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in bounds.items()}
    return Rule(plan=kind(**entry["plan"]), **when)


def save_measured(gpu: str, measured: dict[str, Plan], directory: Path | None = None) -> Path:
    """Write plans by `Case.key` to the cache, whole or not at all; returns the file."""
    path = cache_path(gpu, directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"gpu": gpu, "measured": {key: asdict(plan) for key, plan in measured.items()}}, indent=1)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(text + "\n")
    partial.replace(path)
    return path


def cache_path(gpu: str, directory: Path | None = None) -> Path:
    """Where measurements of this kind of GPU with these kernels and this Triton lie, whether there are any or not."""
    import triton

    digest = hashlib.sha256(f"{triton.__version__} {CUTS}".encode())
    for name in _TUNED_SOURCES:
        digest.update((_HERE / name).read_bytes())
    if directory is None:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "kvik" / "triton"
    return directory / f"{re.sub('[^a-z0-9]+', '-', gpu.lower())}-{digest.hexdigest()[:16]}.json"
