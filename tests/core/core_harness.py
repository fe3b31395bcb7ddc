"""What the tests of the core share: a guarded executor, an oracle, and a `World` that checks an engine as it runs.

The oracle of a sequence is `mock_token` iterated; a `World` compares every output with it, whatever happened before.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from kvik.config import SchedulerConfig
from kvik.core.engine import Engine
from kvik.core.plan import Chunk, RowResult, StepPlan, StepResult
from kvik.core.request import Request, Sequence
from kvik.core.scheduler import Scheduler
from kvik.distributed.mock import MockExecutor, mock_token
from kvik.errors import RequestError
from kvik.outputs import FinishReason, SequenceOutput
from kvik.sampling_params import SamplingParams

POLICY_NAMES = ("fcfs", "priority", "sjf")


class FakeClock:
    """A clock that moves when told to."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Interrupted(Exception):
    """A step that failed as a whole."""


@dataclass
class _Table:
    num_tokens: int
    blocks: list[int] = field(default_factory=list)


class GuardedExecutor(MockExecutor):
    """A mock that also checks, when a plan is submitted, that it touches nothing a step in flight may still write.

    It remembers every plan, and raises `Interrupted` in the next `submit` or `collect` when told to by `fail_in`.
    """

    def __init__(self, block_size: int, vocab_size: int = 50, lag: bool = False) -> None:
        super().__init__(block_size, vocab_size, lag)
        self.plans: list[StepPlan] = []
        self.fail_in: str | None = None
        self._tables: dict[int, _Table] = {}
        self._writes: deque[list[tuple[_Table, set[int]]]] = deque()

    def submit(self, plan: StepPlan) -> None:
        self._fail("submit")
        self.plans.append(plan)
        self._guard(plan)
        super().submit(plan)

    def collect(self) -> StepResult:
        self._fail("collect")
        result = super().collect()
        self._writes.popleft()
        return result

    def reset(self) -> None:
        super().reset()
        self._writes.clear()
        self.fail_in = None

    def _fail(self, where: str) -> None:
        if self.fail_in == where:
            self.fail_in = None
            raise Interrupted(where)

    def _guard(self, plan: StepPlan) -> None:
        in_flight = [write for step in self._writes for write in step]
        for init in plan.joined:
            old = self._tables.get(init.row)
            assert all(table is not old for table, _ in in_flight), f"row {init.row} is reused while a step uses it"
            self._tables[init.row] = _Table(len(init.token_ids))
        for row, block_ids in plan.new_blocks:
            assert block_ids and row in {*plan.decodes, *(chunk.row for chunk in plan.chunks)}
            self._tables[row].blocks.extend(block_ids)
        writes = []
        decodes = [Chunk(row, self._tables[row].num_tokens - 1, 1, sample=True) for row in plan.decodes]
        for chunk in (*decodes, *plan.chunks):
            table = self._tables[chunk.row]
            table.num_tokens += chunk.sample
            for other, written in in_flight:
                assert other is table or not written & set(table.blocks), "a block is used that a step in flight writes"
            writes.append((table, self._written(table, chunk)))
        for i, (table, written) in enumerate(writes):
            for j, (other, _) in enumerate(writes):
                assert i == j or not written & set(other.blocks), "a block is written and used by another row in a step"
            assert len(set(table.blocks)) == len(table.blocks)
        self._writes.append(writes)

    def _written(self, table: _Table, chunk: Chunk) -> set[int]:
        size = self._block_size
        return set(table.blocks[chunk.start // size : (chunk.end - 1) // size + 1])


class ScriptedExecutor(GuardedExecutor):
    """A mock whose row results are passed through `edit(plan, chunk, result)`: errors, log-probabilities.

    A decode counts as a chunk of one token.
    """

    def __init__(
        self, block_size: int, edit: Callable[[StepPlan, Chunk, RowResult], RowResult], **options: int
    ) -> None:
        super().__init__(block_size, **options)
        self._edit = edit

    def _run(self, plan: StepPlan) -> StepResult:
        self._plan = plan
        return super()._run(plan)

    def _run_chunk(self, chunk: Chunk) -> RowResult:
        return self._edit(self._plan, chunk, super()._run_chunk(chunk))


def make_config(**changes: object) -> SchedulerConfig:
    """A small roomy configuration with `changes`."""
    options = {
        "block_size": 4,
        "num_blocks": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "max_model_len": 64,
    }
    return SchedulerConfig(**{**options, **changes})


def make_request(
    request_id: str,
    prompt: Iterable[int],
    max_tokens: int | None = 8,
    *,
    seed: int = 0,
    priority: int = 0,
    cache_salt: str = "",
    arrival_time: float = 0.0,
    eos: tuple[int, ...] = (),
    stream: bool = True,
    **params: object,
) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(max_tokens=max_tokens, **params),
        seed=seed,
        eos_token_ids=eos,
        priority=priority,
        cache_salt=cache_salt,
        arrival_time=arrival_time,
        stream=stream,
    )


def oracle(request: Request, index: int, max_model_len: int, vocab_size: int) -> tuple[tuple[int, ...], FinishReason]:
    """Tokens and finish reason of completion `index` when nothing interferes, from the documentation alone."""
    params, tokens, out = request.params, list(request.prompt_token_ids), []
    limit = max_model_len - len(tokens) if params.max_tokens is None else params.max_tokens
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(request.eos_token_ids))
    while True:
        token = mock_token(tokens, request.seed + index, vocab_size)
        tokens.append(token)
        out.append(token)
        if token in stops and len(out) >= params.min_tokens + 1:
            return tuple(out), FinishReason.STOP
        if len(out) == limit:
            return tuple(out), FinishReason.LENGTH


@dataclass
class Track:
    """What came out of one completion, and how it was ended from outside, if it was."""

    request: Request
    index: int
    tokens: list[int] = field(default_factory=list)
    ended: FinishReason | None = None
    terminal: SequenceOutput | None = None
    times_preempted: int = 0


class World:
    """An engine with everything that was put into it and came out; `check` holds after every operation."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        lag: bool = False,
        vocab_size: int = 50,
        executor: GuardedExecutor | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.scheduler = Scheduler(config) if clock is None else Scheduler(config, clock)
        self.executor = executor or GuardedExecutor(config.block_size, vocab_size, lag)
        self.engine = Engine(self.scheduler, self.executor)
        self.tracks: dict[tuple[str, int], Track] = {}
        self.seen: Counter[str] = Counter()

    # Operations

    def add(self, request: Request) -> bool:
        """Add a request; False if it was rejected, which must be because it could never run."""
        try:
            self.engine.add(request)
        except RequestError as error:
            assert self._impossible(request), f"rejected without need: {error}"
            self.seen["rejected"] += 1
            return False
        assert not self._impossible(request), "an impossible request was accepted"
        self.tracks |= {(request.request_id, i): Track(request, i) for i in range(request.params.n)}
        return True

    def step(self) -> list[SequenceOutput]:
        """One engine step: it must compute or deliver something as long as anything is unfinished."""
        unfinished, before = self.engine.has_unfinished(), self.engine.stats.num_steps
        outputs = self.engine.step()
        assert not unfinished or outputs or self.engine.stats.num_steps > before, "an idle step with work left"
        self._take(outputs)
        self.check()
        return outputs

    def finish(self, request_id: str, reason: FinishReason, index: int | None = None) -> None:
        self.engine.finish(request_id, reason, index)
        for track in self.live:
            if track.request.request_id == request_id and index in (None, track.index):
                track.ended = track.ended or reason
                self.seen[f"ended by {reason}"] += 1
        self.check()

    def preempt(self, seq: Sequence) -> None:
        self.seen["preempted from outside"] += 1
        self.scheduler.preempt(seq)
        self.check()

    def interrupt(self, where: str) -> None:
        """A step that raises in `where` (if it gets there), then a reset: everything is aborted."""
        self.executor.fail_in = where
        try:
            self._take(self.engine.step())
        except Interrupted:
            self.seen[f"interrupted in {where}"] += 1
        self.reset()

    def reset(self) -> None:
        self.engine.reset()
        for track in self.live:
            track.ended = track.ended or FinishReason.ABORT
        self.check()
        assert self.scheduler.kv.num_used == 0 and len(self.scheduler._in_flight) == 0

    def run(self) -> None:
        """Step until nothing is left, in a bounded number of steps, and check that nothing was kept."""
        sizes = [self.total(track.request) for track in self.live]
        bound = 100 + 20 * sum(sizes) * (1 + max(sizes, default=0) // self.config.max_num_batched_tokens)
        for _ in range(bound):
            if not self.engine.has_unfinished():
                break
            self.step()
        assert not self.engine.has_unfinished(), f"not finished after {bound} steps"
        self.check_end()

    # What must hold

    @property
    def live(self) -> list[Track]:
        return [track for track in self.tracks.values() if track.terminal is None]

    def total(self, request: Request) -> int:
        wanted, num_prompt = request.params.max_tokens, len(request.prompt_token_ids)
        return self.config.max_model_len if wanted is None else num_prompt + wanted

    def tokens(self, request_id: str, index: int = 0) -> tuple[int, ...]:
        return tuple(self.tracks[request_id, index].tokens)

    def terminal(self, request_id: str, index: int = 0) -> SequenceOutput:
        output = self.tracks[request_id, index].terminal
        assert output is not None, "not finished"
        return output

    def check(self) -> None:
        self.scheduler.check_invariants()
        self._check_cached_content()
        assert self.scheduler.num_running + self.scheduler.num_waiting <= len(self.live)
        assert self.executor.num_in_flight == len(self.scheduler._in_flight) <= self.config.run_ahead

    def check_end(self) -> None:
        """Every completion ended once and nothing of any request is left behind."""
        assert not self.live, "a completion without a terminal output"
        scheduler = self.scheduler
        assert scheduler.kv.num_used == 0
        assert sorted(scheduler._free_rows) == list(range(self.config.max_num_seqs))
        kept = (scheduler._live, scheduler._followers, scheduler._in_flight, scheduler._held, scheduler._outputs)
        assert not any(kept) and not self.engine._submitted
        assert not len(scheduler._running) + len(scheduler._resuming) + len(scheduler._waiting)

    def _impossible(self, request: Request) -> bool:
        num_prompt, total = len(request.prompt_token_ids), self.total(request)
        duplicate = any(track.request.request_id == request.request_id and not track.ended for track in self.live)
        too_long = num_prompt == 0 or num_prompt >= self.config.max_model_len or total > self.config.max_model_len
        slots = self.config.num_blocks * self.config.block_size
        return duplicate or too_long or total - 1 > slots

    def _take(self, outputs: Seq[SequenceOutput]) -> None:
        for output in outputs:
            track = self.tracks[output.request_id, output.index]
            assert track.terminal is None, "an output after the terminal one"
            assert output.new_token_ids or output.finish_reason is not None, "an output without news"
            ends = output.finish_reason is not None
            assert ends or track.request.stream or track.request.params.stop, "an output that nobody waits for"
            track.tokens.extend(output.new_token_ids)
            if output.finish_reason is not None:
                track.terminal = output
                self._check_terminal(track, output)

    def _check_terminal(self, track: Track, output: SequenceOutput) -> None:
        want, reason = oracle(track.request, track.index, self.config.max_model_len, self.vocab_size)
        got = tuple(track.tokens)
        self.seen[f"finished by {output.finish_reason}"] += 1
        self.seen["cached tokens"] += output.num_cached_tokens
        self.seen["preemptions"] += output.metrics.num_preemptions
        assert output.num_cached_tokens < len(track.request.prompt_token_ids)
        quiet = not (track.request.stream or track.request.params.stop)
        if track.ended is None or (output.new_token_ids and not quiet) or len(got) == len(want):
            assert (got, output.finish_reason) == (want, reason), "tokens differ from the oracle's"
            assert output.stop_token_id == (want[-1] if reason is FinishReason.STOP else None)
        else:
            assert output.finish_reason is track.ended
            assert got == want[: len(got)] and len(got) < len(want), "tokens differ from the oracle's"
            assert output.stop_token_id is None

    def _check_cached_content(self) -> None:
        """Whatever others may find in the cache is in memory, complete and under the right tokens."""
        memory, size = self.executor._memory, self.config.block_size
        for block_id, (_, tokens) in self.scheduler.kv.cache._keys.items():
            found = tuple(memory[block_id, slot][0] for slot in range(size))
            assert found == tokens, f"block {block_id} is findable under tokens that it does not hold"


def random_config(rng: random.Random) -> SchedulerConfig:
    """Any configuration, tight ones preferred: pools down to one block, budgets down to one token per sequence."""
    block_size = rng.choice((1, 2, 3, 4, 8, 16))
    max_model_len = rng.choice((8, 16, 24, 33))
    most = -(-(max_model_len - 1) // block_size)
    num_seqs = rng.randint(1, 6)
    return SchedulerConfig(
        block_size=block_size,
        num_blocks=max(1, rng.choice((most, most + 1, most + rng.randint(0, most), 3 * most, rng.randint(1, most)))),
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(num_seqs, rng.choice((1, 7, 64))),
        max_model_len=max_model_len,
        enable_prefix_caching=rng.random() < 0.75,
        policy=rng.choice(POLICY_NAMES),
        run_ahead=rng.randint(0, 2),
    )


def random_request(rng: random.Random, request_id: str, config: SchedulerConfig, vocab_size: int) -> Request:
    """A request whose prompt shares its beginning with others and often ends on or beside a block boundary."""
    size, context = config.block_size, config.max_model_len
    length = rng.choice((1, size - 1, size, size + 1, 2 * size, 3 * size + rng.randint(-1, 1), rng.randint(1, context)))
    length = max(1, min(length, context - 1)) if rng.random() < 0.97 else context + rng.randint(0, 1)
    family, own = rng.randint(0, 1), rng.randint(0, length) if rng.random() < 0.4 else 0
    prompt = [(i * i + family) % vocab_size for i in range(length - own)] + rng.choices(range(vocab_size), k=own)
    room = max(1, context - length)
    max_tokens = rng.choice((1, 2, rng.randint(1, room), rng.randint(1, room), None, room + rng.randint(0, 1)))
    return make_request(
        request_id,
        prompt,
        max_tokens,
        seed=rng.randint(0, 2),
        priority=rng.choice((0, 0, -1, 1, 5)),
        cache_salt=rng.choice(("", "", "", "salt")),
        n=rng.choice((1, 1, 1, 2, 3, 4)),
        eos=(0,) if rng.random() < 0.6 else (),
        ignore_eos=rng.random() < 0.2,
        stop_token_ids=(1,) if rng.random() < 0.2 else (),
        min_tokens=0 if max_tokens is None else rng.choice((0, 0, rng.randint(0, max_tokens))),
        prompt_logprobs=1 if rng.random() < 0.1 else None,
        stream=rng.random() < 0.7,
        stop=["x"] if rng.random() < 0.1 else [],
    )


def as_json(record: object) -> str:
    """A plan or result as JSON text."""
    return json.dumps(dataclasses.asdict(record), sort_keys=True)
