"""For how long the device has enough to do, so that the next step can wait for requests that are about to come.

Running ahead, a step is planned while the one before it is computed. Planned as soon as it can be, it leaves out what
comes in the meantime, and a request waits for the rest of one step and all of another before its own begins:

    device      | step 1           | step 2           | step 3           |
    early       ^plan 2   ^arrives  ^plan 3: it is in step 3
    late               ^arrives  ^plan 2: it is in step 2

How long steps take is known from earlier ones of about the same size. A wrong guess costs time, never a result.
"""

from __future__ import annotations

from kvik.core.plan import StepPlan

__all__ = ["Pace"]

_TRUST = 0.75  # of what steps took before
_MARGIN = 0.002  # seconds to plan and to start a step


class Pace:
    """Remembers the last two times that a step of a size took, in seconds; 0 for one that is not known."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, int], tuple[float, float]] = {}

    def add(self, plan: StepPlan, seconds: float, waited: float) -> None:
        """A step's result was there so long after that of the step before, of which the host waited for it. If it came
        late to that, when the step may have been over for long, nothing is known of the size any more."""
        last, _ = self._seconds.get(_size(plan), (0.0, 0.0))
        self._seconds[_size(plan)] = (seconds if waited > _MARGIN / 2 else 0.0), last

    def slack(self, plan: StepPlan, elapsed: float) -> float:
        """Seconds that the device, at this step for `elapsed` seconds, is safely busy with it."""
        expected = min(self._seconds.get(_size(plan), (0.0, 0.0)))
        return max(0.0, _TRUST * expected - elapsed - _MARGIN)


def _size(plan: StepPlan) -> tuple[int, int]:
    """What steps of about one duration share: the number of tokens within an eighth, whether all of them decode, and
    else how far the prompts are, within a factor of two."""
    num_tokens = plan.num_tokens
    shift = max(0, num_tokens.bit_length() - 4)
    furthest = max([chunk.start for chunk in plan.chunks], default=-1)
    return -(-num_tokens >> shift) << shift, (furthest + 1).bit_length()
