"""From a trace of kernels to the phases of a step: names, places and times, without a GPU.

Kernels of one stream end one after the other, but start early: a dependent launch (`kernels/triton/pdl.py`) overlaps
its predecessor, so that durations say little. The time from the end before to its own is what a kernel takes of the
step, and these times add up to the step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from kvik.errors import KvikError

if TYPE_CHECKING:
    from kvik.models.spec import DecoderSpec
    from kvik.resolve import ResolvedConfig

__all__ = ["IDLE", "PHASES", "PHASE_OF", "Cost", "Kernel", "break_down", "phase_bytes"]

IDLE = "idle"
PHASES = ("prepare", "embedding", "projections", "row operations", "attention", "head", "sampling", "update", IDLE)
PHASE_OF = {
    "_inputs": "prepare", "_plan": "prepare", "_embedding_kernel": "embedding",
    "_gemv_kernel": "projections", "_skinny_kernel": "projections", "_linear_hopper": "projections",
    "_rms_norm_kernel": "row operations", "_rope_kernel": "row operations", "_silu_mul_kernel": "row operations",
    "_decode": "attention", "_prefill": "attention", "_hopper_prefill": "attention",
    "_count": "sampling", "_edit": "sampling", "_edit_lists": "sampling", "_peaks": "sampling", "_measure": "sampling",
    "_settle": "sampling", "_draw": "sampling", "_pick": "sampling", "_append": "update",
}  # fmt: skip
_LAST = "_append"
"""What ends a step: its tokens go to the table and to the host."""


class Kernel(NamedTuple):
    """A kernel or a copy in a trace, in microseconds. Sorted, they stand in the order in which they ended."""

    end: float
    start: float
    name: str


@dataclass(slots=True)
class Cost:
    """Of one phase, or of one kernel in it; sums over all steps, times in microseconds."""

    launches: int = 0
    time: float = 0.0
    gaps: float = 0.0  # the part of `time` in which nothing ran
    kernels: dict[str, Cost] = field(default_factory=dict)

    def add(self, time: float, gap: float) -> None:
        self.launches += 1
        self.time += time
        self.gaps += gap

    def per_step(self, num_steps: int) -> dict[str, Any]:
        """Averages, as they are written to a results file; the kernels that took most first."""
        found: dict[str, Any] = {
            "launches": self.launches / num_steps, "us": self.time / num_steps, "gaps_us": self.gaps / num_steps
        }  # fmt: skip
        if self.kernels:
            order = sorted(self.kernels.items(), key=lambda item: -item[1].time)
            found["kernels"] = {name: cost.per_step(num_steps) for name, cost in order}
        return found


def break_down(kernels: Iterable[Kernel], num_steps: int) -> dict[str, Cost]:
    """What each of `PHASES` cost in the last `num_steps` steps of a trace: they add up to the time that these took.

    A step begins when the tokens of the one before have been written. Until its first kernel starts, the GPU is idle.
    Raises KvikError for a trace of fewer steps; the first one counts for nothing, since it began before the trace.
    """
    order = sorted(kernels)
    ends = [i for i, kernel in enumerate(order) if kernel.name == _LAST][-num_steps - 1 :]
    if len(ends) <= num_steps:
        raise KvikError(f"the profiler saw {len(ends)} of at least {num_steps + 1} steps; is another profiler running?")
    costs = {phase: Cost() for phase in PHASES}
    for before, last in itertools.pairwise(ends):
        step, previous = order[before + 1 : last + 1], order[before].end
        waited = max(0.0, step[0].start - previous)
        costs[IDLE].time, costs[IDLE].gaps = costs[IDLE].time + waited, costs[IDLE].gaps + waited
        previous += waited
        for kernel, phase in zip(step, _phases([kernel.name for kernel in step]), strict=True):
            spent, gap = kernel.end - previous, max(0.0, kernel.start - previous)
            costs[phase].add(spent, gap)
            costs[phase].kernels.setdefault(_short(kernel.name), Cost()).add(spent, gap)
            previous = kernel.end
    return costs


def _phases(names: Sequence[str]) -> list[str]:
    """The phase of each kernel of a step, by its name and its place.

    Up to the embedding everything prepares the step. From the last RMSNorm on, which is the final one, what projects
    and works on rows is the head. Kernels that are neither ours nor torch's are projections: the vendor's library
    names its own as it likes, and clears or adds up partial sums beside them.
    """
    first = names.index("_embedding_kernel")
    norm = max(i for i, name in enumerate(names) if name == "_rms_norm_kernel")
    found = []
    for i, name in enumerate(names):
        phase = PHASE_OF.get(name) or ("row operations" if "at::native" in name else "projections")
        if i < first:
            phase = "prepare"
        elif i >= norm and phase in ("projections", "row operations"):
            phase = "head"
        found.append(phase)
    return found


def _short(name: str) -> str:
    """A kernel's name without namespaces, template arguments and parameters."""
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return plain.split("<")[0].split("(")[0].split("::")[-1].strip()


def phase_bytes(spec: DecoderSpec, resolved: ResolvedConfig, batch: int, context: float) -> dict[str, int]:
    """Bytes that a step must read in the phases that memory bounds: weights, keys and values.

    `context` is the mean over the sequences. Norms and biases count as projections; they are less than 0.1 %.
    """
    head = spec.vocab_size * spec.hidden_size * resolved.dtype.itemsize
    positions = sum(min(context, window or context) for window in spec.windows) / spec.num_layers
    return {
        "projections": spec.weight_bytes(resolved.dtype) - head * (1 if spec.tie_word_embeddings else 2),
        "attention": round(batch * positions * spec.kv_bytes_per_token(resolved.kv_dtype)),
        "head": head,
    }
