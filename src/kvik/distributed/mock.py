"""An executor without a model: the next token is a hash of the row's tokens and seed. For tests of the scheduler.

It keeps a pretend KV memory in which each slot holds (token, position, hash of the prefix). Before it samples, it reads
the whole context back through the block table and compares: a block that was shared wrongly, overwritten, or freed too
early shows as an AssertionError in the step where it would have corrupted a model's output.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from hashlib import blake2b

from kvik.core.plan import Chunk, RowInit, RowResult, StepPlan, StepResult

__all__ = ["MockExecutor", "mock_token"]


def mock_token(token_ids: list[int], seed: int, vocab_size: int) -> int:
    """The token that MockExecutor samples after `token_ids`."""
    digest = blake2b(repr((token_ids, seed)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % vocab_size


@dataclass(slots=True)
class _Row:
    init: RowInit
    token_ids: list[int]
    block_ids: list[int] = field(default_factory=list)


class MockExecutor:
    """Executor over pretend memory. `lag` steps are executed only when later ones are collected, as a device would."""

    def __init__(self, block_size: int, vocab_size: int = 50, lag: bool = False) -> None:
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._lag = lag
        self._rows: dict[int, _Row] = {}
        self._memory: dict[tuple[int, int], tuple[int, int, int]] = {}
        self._queue: deque[StepPlan | StepResult] = deque()

    @property
    def num_in_flight(self) -> int:
        """Steps that were submitted and not collected."""
        return len(self._queue)

    def submit(self, plan: StepPlan) -> None:
        self._queue.append(plan if self._lag else self._run(plan))

    def collect(self) -> StepResult:
        item = self._queue.popleft()
        return self._run(item) if isinstance(item, StepPlan) else item

    def get_ready(self) -> bool:
        return False

    def reset(self) -> None:
        self._queue.clear()

    def close(self) -> None:
        self._queue.clear()

    def _run(self, plan: StepPlan) -> StepResult:
        for init in plan.joined:
            self._rows[init.row] = _Row(init, list(init.token_ids))
        for index, block_ids in plan.new_blocks:
            self._rows[index].block_ids.extend(block_ids)
        decodes = [Chunk(row, len(self._rows[row].token_ids) - 1, 1, sample=True) for row in plan.decodes]
        chunks = [*decodes, *plan.chunks]
        assert len({chunk.row for chunk in chunks}) == len(chunks), "a row is in a step once"
        return StepResult.of(plan, [self._run_chunk(chunk) for chunk in chunks])

    def _run_chunk(self, chunk: Chunk) -> RowResult:
        row = self._rows[chunk.row]
        assert len(row.block_ids) * self._block_size >= chunk.end, "blocks for every position"
        assert chunk.sample == (chunk.end == len(row.token_ids)), "sampling happens at the end of the known tokens"
        for position in range(chunk.start, chunk.end):
            self._memory[self._slot(row, position)] = self._content(row, position)
        if not chunk.sample:
            return RowResult(chunk.row)
        for position in range(chunk.end):
            found = self._memory.get(self._slot(row, position))
            assert found == self._content(row, position), f"KV of position {position} is not what was written"
        row.token_ids.append(mock_token(row.token_ids, row.init.seed, self._vocab_size))
        return RowResult(chunk.row, (row.token_ids[-1],))

    def _slot(self, row: _Row, position: int) -> tuple[int, int]:
        return row.block_ids[position // self._block_size], position % self._block_size

    def _content(self, row: _Row, position: int) -> tuple[int, int, int]:
        return row.token_ids[position], position, hash(tuple(row.token_ids[:position]))
