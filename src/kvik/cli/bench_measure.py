"""Running a workload on a warm engine, and what follows from its steps: speeds, latencies, share of the limit.

The limit of decoding is memory: every step reads the weights once and the keys and values of each sequence. It is
compared with how fast this machine reads a buffer of the same size, measured beside the workload.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvik.cli.bench_workloads import BenchRequest
from kvik.cli.engine import Speeds
from kvik.sampling_params import SamplingParams

if TYPE_CHECKING:
    import torch

    from kvik.llm_engine import LLMEngine
    from kvik.outputs import RequestOutput

__all__ = ["Measurement", "measure", "percentiles", "read_bandwidth", "step_bytes"]

_LARGEST_BUFFER = 2**30
_READ_SECONDS = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Measurement:
    """One run: seconds from the first `add_request` to the last output, the steps, and the finished outputs."""

    seconds: float
    speeds: Speeds
    outputs: tuple[RequestOutput, ...]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(output.usage.prompt_tokens for output in self.outputs)

    @property
    def num_output_tokens(self) -> int:
        return sum(output.usage.completion_tokens for output in self.outputs)

    @property
    def decode_seconds(self) -> float:
        return sum(step.total_time for step in self.speeds.decode_steps)

    def summary(self) -> dict[str, Any]:
        """The numbers that follow from the run alone."""
        steps, metrics = self.speeds.steps, [output.metrics for output in self.outputs]
        host = sum(step.schedule_time + step.update_time for step in steps)
        waited = self.seconds - sum(step.execute_time for step in steps)
        return {
            "seconds": self.seconds,
            "prompt_tokens": self.num_prompt_tokens,
            "output_tokens": self.num_output_tokens,
            "output_tok_s": self.num_output_tokens / self.seconds,
            "prompt_tok_s": self.num_prompt_tokens / self.seconds,
            "prefill_tok_s": self.speeds.prefill_speed,
            "decode_tok_s": self.speeds.decode_speed,
            "ttft_s": percentiles([m.time_to_first_token for m in metrics]),
            "tpot_s": percentiles([m.time_per_output_token for m in metrics]),
            "steps": len(steps),
            "scheduler_ms_per_step": 1e3 * host / len(steps),
            "host_ms_per_step": 1e3 * waited / len(steps),
            "preemptions": sum(m.num_preemptions for m in metrics),
        }


def measure(engine: LLMEngine, requests: Sequence[BenchRequest], temperature: float, users: int | None) -> Measurement:
    """Run `requests` to their ends, all at once, or with `users` of them in the engine at a time."""
    waiting, speeds = deque(requests), Speeds()
    outputs: list[RequestOutput] = []
    num_open, at_once = 0, users or len(requests)
    begin = time.perf_counter()
    while waiting or num_open:
        while waiting and num_open < at_once:
            request = waiting.popleft()
            params = SamplingParams(temperature=temperature, max_tokens=request.max_tokens, ignore_eos=True)
            engine.add_request(request.prompt, params, stream=False)
            num_open += 1
        finished = engine.step()
        speeds.add(engine.stats.last)
        num_open -= len(finished)
        outputs += finished
    return Measurement(time.perf_counter() - begin, speeds, tuple(outputs))


def step_bytes(engine: LLMEngine, run: Measurement) -> tuple[int, int]:
    """Bytes of weights and of keys and values that an average decode step of `run` must read; (0, 0) without one."""
    spec, resolved, steps = engine.spec, engine.resolved, run.speeds.decode_steps
    if not steps:
        return 0, 0
    looked_up = 0 if spec.tie_word_embeddings else spec.vocab_size * spec.hidden_size * resolved.dtype.itemsize
    reads = sum(
        layers * _kv_tokens_read(output.usage.prompt_tokens, output.usage.completion_tokens, window) / spec.num_layers
        for output in run.outputs
        for window, layers in Counter(spec.windows).items()
    )
    decoded = sum(output.usage.completion_tokens - 1 for output in run.outputs)
    alone = sum(step.num_decode_tokens for step in steps)  # the other decodes ran beside a prompt
    kv_bytes = reads * spec.kv_bytes_per_token(resolved.kv_dtype) * alone / decoded
    return resolved.memory.weights - looked_up, round(kv_bytes / len(steps))


def _kv_tokens_read(num_prompt: int, num_output: int, window: int | None) -> int:
    """Positions read while decoding: the first token comes from the prompt's step, the k-th reads prompt + k - 1, at
    most `window`."""
    later = num_output - 1
    growing = later if window is None else max(0, min(later, window - num_prompt))
    return growing * num_prompt + growing * (growing + 1) // 2 + (later - growing) * (window or 0)


def read_bandwidth(num_bytes: int, device: torch.device) -> tuple[float, int]:
    """Bytes per second of summing a buffer of about `num_bytes` on all threads (the best try), and its size."""
    import torch

    size = min(max(num_bytes, 2**20), _LARGEST_BUFFER)
    buffer = torch.ones(size // 8, dtype=torch.int64, device=device)
    buffer.sum().item()
    best, end = math.inf, time.perf_counter() + _READ_SECONDS
    while time.perf_counter() < end:
        begin = time.perf_counter()
        buffer.sum().item()
        best = min(best, time.perf_counter() - begin)
    return buffer.nbytes / best, buffer.nbytes


def percentiles(values: Sequence[float | None]) -> dict[str, float] | None:
    """The 50th, 90th and 99th percentile (nearest rank), or None for no values."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    return {f"p{p}": known[math.ceil(p / 100 * len(known)) - 1] for p in (50, 90, 99)}
