"""Step plans that launch every kernel an engine on a GPU will need, so that no request waits for one to be compiled.

They are run twice, with few layers: on torch's meta device, where a launch only compiles
(`kvik.runtime.kernel_compiler`), and on the GPU itself before the engine is ready, which loads what was compiled.
"""

from __future__ import annotations

from collections.abc import Iterator

from kvik.config import SchedulerConfig
from kvik.core.plan import Chunk, RowInit, StepPlan
from kvik.kernels.triton.attention_tile import HOPPER_TOKENS, TIERS
from kvik.kernels.triton.candidates import MAX_TOKENS
from kvik.kernels.triton.dispatch import BUCKETS, CUTS
from kvik.runtime.decode_step import buckets
from kvik.runtime.gpu_runner import GpuRunner
from kvik.runtime.mixed_step import graph_sizes
from kvik.sampling_params import SamplingParams

__all__ = ["warm_up", "warm_up_plans"]

_PLAIN = SamplingParams(temperature=1.0)
_EVERYTHING = SamplingParams(temperature=1.0, top_k=2, top_p=0.5, min_p=0.1, presence_penalty=1.0)


def warm_up(runner: GpuRunner, settings: SchedulerConfig) -> None:
    """Run all plans, and capture the largest graphs. What is left in the runner's table and the KV cache means nothing.

    The other graphs are captured while the engine has nothing to do, or when a step of their size first comes.
    """
    shallow = runner.shallow()
    for plan in warm_up_plans(settings):
        shallow.start(plan)
    runner.capture_largest()
    runner.reset()


def warm_up_plans(settings: SchedulerConfig) -> Iterator[StepPlan]:
    """Prompts of every bucket of tokens, and of the parts of a bucket that programs of `linear_hopper` are cut for;
    decode steps of every size, and one with every pass of the sampler.

    The largest come first: what computes long prompts takes longest to compile. All rows use KV block 0 alone, over and
    over. Steps with prompts of the sizes between launch the same kernels.
    """
    num_seqs, size = settings.max_num_seqs, settings.block_size
    budget = min(settings.max_num_batched_tokens, num_seqs * settings.max_model_len)
    coarse = {size for size in graph_sizes(budget) if size % 1024 == 0}
    cut = {cut * size // 8 for size in BUCKETS if 64 <= size <= MAX_TOKENS for cut in CUTS}
    prompts = []
    for num_tokens in sorted({budget, *coarse, *(count for count in {*BUCKETS, *cut} if 1 < count < budget)}):
        full, rest = divmod(num_tokens, settings.max_model_len)
        prompts.append([settings.max_model_len] * full + [rest] * (rest > 0))
    for lengths in (*reversed(prompts), *_large_steps_of_many(settings, budget)):
        rows = tuple(_row(row, length, _PLAIN) for row, length in enumerate(lengths))
        blocks = tuple((row, (0,) * -(-length // size)) for row, length in enumerate(lengths))
        chunks = tuple(Chunk(row, 0, length, sample=True) for row, length in enumerate(lengths))
        yield StepPlan(0, rows, blocks, (), chunks)
    rows = tuple(_row(row, 1, _PLAIN) for row in range(num_seqs))
    sizes = sorted(buckets(num_seqs), reverse=True)
    yield StepPlan(0, rows, tuple((row, (0,)) for row in range(num_seqs)), tuple(range(num_seqs)), ())
    for count in sizes[1:]:
        yield StepPlan(0, (), (), tuple(range(count)), ())
    yield StepPlan(0, (_row(0, 1, _EVERYTHING),), ((0, (0,)),), (0,), ())


def _large_steps_of_many(settings: SchedulerConfig, budget: int) -> Iterator[list[int]]:
    """Prompts of so many sequences, and so many tokens in all, that attention has other tiles for both. Steps of few
    are large by themselves; graphs of large steps are captured for as many as there can be."""
    num_tokens = HOPPER_TOKENS + 64
    for most in TIERS[:2]:
        count = max(most + 1, -(-num_tokens // settings.max_model_len))
        if count <= settings.max_num_seqs and num_tokens <= budget:
            yield [num_tokens // count + (i < num_tokens % count) for i in range(count)]


def _row(row: int, num_tokens: int, params: SamplingParams) -> RowInit:
    return RowInit(row, (0,) * num_tokens, num_tokens, params, seed=0, stop_token_ids=(), bad_words_ids=())
