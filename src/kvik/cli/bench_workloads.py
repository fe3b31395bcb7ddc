"""The benchmark workloads: how many requests, how long, how they are drawn. The numbers to beat are of these.

Prompts are random token ids, so that no tokenizer and no prefix cache takes part. A workload that was made smaller says
so in its name.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Mapping
from types import MappingProxyType

from kvik.errors import ConfigError, did_you_mean

__all__ = ["NANO", "WORKLOADS", "BenchRequest", "Workload", "draw", "find_workload"]

NANO = "nano"
NANO_TOTALS = (142_827, 133_966)
_LOWEST_ID, _HIGHEST_ID = 3, 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class BenchRequest:
    """A prompt in token ids, and how many tokens to generate."""

    prompt: list[int]
    max_tokens: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`num_requests` requests with lengths drawn uniformly between bounds; `together` if all must run at once."""

    name: str
    num_requests: int
    prompt_lens: tuple[int, int]
    output_lens: tuple[int, int]
    temperature: float
    together: bool = False
    scale: float = 1.0

    @property
    def longest(self) -> int:
        """Prompt and output tokens of the longest request that can be drawn."""
        return self.scaled(self.prompt_lens[1]) + self.scaled(self.output_lens[1])

    def scaled(self, length: int) -> int:
        return max(1, round(length * self.scale))


def _decode(num_requests: int) -> Workload:
    outputs = 256 if num_requests >= 256 else 512
    return Workload(
        name=f"decode_bs{num_requests}",
        num_requests=num_requests,
        prompt_lens=(128, 128),
        output_lens=(outputs, outputs),
        temperature=0.0,
        together=True,
    )


WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        workload.name: workload
        for workload in (
            Workload(
                name="ragged256", num_requests=256, prompt_lens=(100, 1024), output_lens=(100, 1024), temperature=0.6
            ),
            *(_decode(num_requests) for num_requests in (1, 8, 32, 128, 256)),
            Workload(
                name="users35", num_requests=35, prompt_lens=(128, 512), output_lens=(500, 500), temperature=0.7,
                together=True,
            ),
            Workload(
                name="prefill_16x4000", num_requests=16, prompt_lens=(3900, 3900), output_lens=(1, 1), temperature=0.0
            ),
        )
    }
)  # fmt: skip


def find_workload(name: str, num_requests: int | None = None, scale: float = 1.0) -> Workload:
    """The workload of a name (decode_bsN for any N), made smaller if asked. Raises ConfigError."""
    match = re.fullmatch(r"decode_bs([1-9]\d{0,4})", name)
    workload = WORKLOADS.get(name) or (_decode(int(match[1])) if match else None)
    if workload is None:
        known = ", ".join([*WORKLOADS, "decode_bsN"])
        raise ConfigError(f"there is no workload {name!r}{did_you_mean(name, WORKLOADS)}; there are {known}")
    if not 0.0 < scale <= 1.0:
        raise ConfigError(f"scale must be in (0, 1], got {scale:g}")
    if num_requests is not None and not 1 <= num_requests <= workload.num_requests:
        raise ConfigError(f"{name} has {workload.num_requests} requests; ask for 1 to that many, got {num_requests}")
    changes = [f"requests={num_requests}"] if num_requests not in (None, workload.num_requests) else []
    changes += [f"scale={scale:g}"] if scale != 1.0 else []
    return dataclasses.replace(
        workload,
        name=f"{name}[{','.join(changes)}]" if changes else name,
        num_requests=num_requests or workload.num_requests,
        scale=scale,
    )


def draw(workload: Workload, seed: str, run: int, vocab_size: int) -> list[BenchRequest]:
    """The requests of one run: lengths follow `seed` alone, ids change with `run`."""
    lengths = _nano_lengths() if seed == NANO else _lengths(workload, seed)
    ids = random.Random(f"{seed}/{run}")
    lowest, highest = min(_LOWEST_ID, vocab_size - 1), min(_HIGHEST_ID, vocab_size - 1)
    return [
        BenchRequest(
            [ids.randint(lowest, highest) for _ in range(workload.scaled(num_prompt))], workload.scaled(num_output)
        )
        for num_prompt, num_output in lengths[: workload.num_requests]
    ]


def _lengths(workload: Workload, seed: str) -> list[tuple[int, int]]:
    lengths = random.Random(seed)
    return [
        (lengths.randint(*workload.prompt_lens), lengths.randint(*workload.output_lens))
        for _ in range(workload.num_requests)
    ]


def _nano_lengths() -> list[tuple[int, int]]:
    """The lengths of nano-vllm's bench.py: each prompt's length is drawn before its ids, all outputs come last."""
    generator = random.Random(0)
    prompts = [len([generator.randint(0, 10_000) for _ in range(generator.randint(100, 1024))]) for _ in range(256)]
    outputs = [generator.randint(100, 1024) for _ in range(256)]
    assert (sum(prompts), sum(outputs)) == NANO_TOTALS, "Python's generator draws other numbers than nano-vllm's"
    return list(zip(prompts, outputs, strict=True))
