"""For how long the device has enough to do, so that the next step can wait for requests that are about to come.

Running ahead, a step is planned while the one before it is computed. Planned as soon as it can be, it leaves out what
comes in the meantime, and a request waits for the rest of one step and all of another before its own begins:

    device      | step 1           | step 2           | step 3           |
    early       ^plan 2   ^arrives  ^plan 3: it is in step 3
    late               ^arrives  ^plan 2: it is in step 2

How long a step takes at least is known from earlier ones that had less to compute: fewer tokens, of which fewer decode,
and prompts that were less far. A wrong guess costs time, never a result.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from kvik.core.plan import StepPlan

__all__ = ["Pace"]

_TRUST = 0.75  # of what steps took before
_MARGIN = 0.002  # seconds to plan and to start a step
_REMEMBERED = 64  # steps


class _Size(NamedTuple):
    """How much a step computes. `depth` is how far its prompts are, within a factor of two."""

    num_tokens: int
    num_decodes: int
    depth: int

    @classmethod
    def of(cls, plan: StepPlan) -> _Size:
        furthest = max([chunk.start for chunk in plan.chunks], default=-1)
        return cls(plan.num_tokens, plan.num_decodes, (furthest + 1).bit_length())

    def covers(self, other: _Size) -> bool:
        """Whether a step of this size takes as long as one of the other, or longer: it is no smaller by an eighth."""
        return (
            8 * other.num_tokens <= 9 * self.num_tokens
            and 8 * other.num_decodes <= 9 * self.num_decodes
            and other.depth <= self.depth
        )


class Pace:
    """Remembers the sizes of recent steps, and the seconds they took."""

    def __init__(self) -> None:
        self._steps: deque[tuple[_Size, float]] = deque(maxlen=_REMEMBERED)

    def add(self, plan: StepPlan, seconds: float, waited: float) -> None:
        """A step's result was there so long after that of the step before, of which the host waited for it. If it came
        late to that, when the step may have been over for long, what let it wait so long is forgotten."""
        if waited <= _MARGIN / 2:
            size = _Size.of(plan)
            self._steps = deque((step for step in self._steps if not size.covers(step[0])), _REMEMBERED)
        elif _TRUST * seconds > _MARGIN:  # others are never waited for
            self._steps.append((_Size.of(plan), seconds))

    def slack(self, plan: StepPlan, elapsed: float) -> float:
        """Seconds that the device, at this step for `elapsed` seconds, is safely busy with it.

        Of the steps that had less to do the two largest count, or the last two that were as large, and of these the
        shorter one: one time may have been anything.
        """
        if len(self._steps) < 2:
            return 0.0
        size = _Size.of(plan)
        less = [(min(one.num_tokens, size.num_tokens), i) for i, (one, _) in enumerate(self._steps) if size.covers(one)]
        if len(less) < 2:
            return 0.0
        expected = min(self._steps[i][1] for _, i in sorted(less)[-2:])
        return max(0.0, _TRUST * expected - elapsed - _MARGIN)
