"""The whole GPU runtime under the engine, against the CPU's on torch: the same tokens, whatever the schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from test_triton_decoder import TABLE, model

from kvik.attention.reference import ReferenceAttention
from kvik.config import SchedulerConfig
from kvik.core.engine import Engine
from kvik.core.request import Request
from kvik.core.scheduler import Scheduler
from kvik.distributed.uniproc import Runner, UniprocExecutor
from kvik.kernels.reference import ReferenceOps
from kvik.kernels.triton.ops import TritonOps
from kvik.layers.rope import RopeTable
from kvik.models.decoder import Decoder
from kvik.outputs import SequenceOutput
from kvik.runtime.gpu import build_gpu_runner, gpu_attention
from kvik.runtime.gpu_runner import GpuRunner
from kvik.runtime.kv_pool import KVPool
from kvik.runtime.mixed_step import MixedStep, _Captured
from kvik.runtime.model_runner import ModelRunner
from kvik.runtime.request_table import RequestTable
from kvik.sampling_params import SamplingParams
from kvik.structured.grammars import Grammars, TokenBytes

ROWS, LENGTH, BLOCK = 4, 64, 16
ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 8},
    {"temperature": 1.0, "max_tokens": 6},
    {"temperature": 0.8, "top_p": 0.8, "top_k": 20, "max_tokens": 5},
    {"temperature": 0.0, "max_tokens": 7, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"temperature": 0.0, "max_tokens": 4, "logprobs": 3, "prompt_logprobs": 2},
    {"temperature": 1.0, "max_tokens": 5, "logit_bias": {5: 4.0, 9: -3.0}, "min_tokens": 3, "n": 2},
    {"temperature": 0.7, "max_tokens": 4, "logits_processors": [lambda ids, logits: logits - logits.mean()]},
    {"temperature": 0.0, "max_tokens": 5, "allowed_token_ids": [3, 4, 50, 70]},
]


def gpu_runner(
    device: torch.device, settings: SchedulerConfig, grammars: Grammars | None = None, backend: str = "auto"
) -> Runner:
    spec, weights = model(device, torch.float32, qk_norm=True, bias=False)
    attention = gpu_attention(
        spec,
        settings.max_num_seqs,
        settings.max_num_batched_tokens,
        LENGTH,
        device,
        dtype=torch.float32,
        deterministic=False,
        backend=backend,
    )
    decoder = Decoder(
        spec, weights, RopeTable(spec.rope, LENGTH, device), TritonOps(device, table=TABLE), attention
    )  # fmt: skip
    pool = KVPool(spec, settings.num_blocks, BLOCK, torch.float32, device)
    use_graphs = device.type == "cuda"
    return build_gpu_runner(decoder, pool, settings.max_num_seqs, LENGTH, use_graphs=use_graphs, grammars=grammars)


def cpu_runner(settings: SchedulerConfig, grammars: Grammars | None = None) -> Runner:
    device = torch.device("cpu")
    spec, weights = model(device, torch.float32, qk_norm=True, bias=False)
    decoder = Decoder(spec, weights, RopeTable(spec.rope, LENGTH, device), ReferenceOps(), ReferenceAttention())
    pool = KVPool(spec, settings.num_blocks, BLOCK, torch.float32, device)
    return ModelRunner(decoder, pool, RequestTable(ROWS, LENGTH, BLOCK), grammars=grammars)


def settings(**changes: Any) -> SchedulerConfig:
    fields = {
        "block_size": BLOCK, "num_blocks": 16, "max_num_seqs": ROWS, "max_num_batched_tokens": 32,
        "max_model_len": LENGTH,
    }  # fmt: skip
    return SchedulerConfig(**fields | changes)


def run(runner: Runner, config: SchedulerConfig) -> dict[tuple[str, int], list[SequenceOutput]]:
    engine = Engine(Scheduler(config), UniprocExecutor(runner))
    for i, asked in enumerate(ASKED):
        prompt = tuple((11 * i + 7 * p) % 90 + 3 for p in range(3 + 9 * i % 40))
        params = SamplingParams(ignore_eos=True, **asked)
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt, params=params, seed=100 + i))
    found: dict[tuple[str, int], list[SequenceOutput]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            found.setdefault((output.request_id, output.index), []).append(output)
    assert engine.scheduler.kv.num_used == 0
    return found


def tokens(found: dict[tuple[str, int], list[SequenceOutput]]) -> dict[tuple[str, int], list[int]]:
    return {key: [token for output in outputs for token in output.new_token_ids] for key, outputs in found.items()}


def test_a_step_in_which_nothing_is_sampled(device: torch.device) -> None:
    config, found = settings(max_num_batched_tokens=7), []
    for runner in (gpu_runner(device, config), cpu_runner(config)):
        engine = Engine(Scheduler(config), UniprocExecutor(runner))
        params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
        engine.add(Request(request_id="a", prompt_token_ids=tuple(range(5, 25)), params=params, seed=1, stream=False))
        steps = [engine.step() for _ in range(5)]
        assert [len(outputs) for outputs in steps] == [0, 0, 0, 0, 1]
        found.append(steps[-1][0].new_token_ids)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "changes", [{}, {"run_ahead": 2, "max_num_batched_tokens": 7}, {"num_blocks": 6, "run_ahead": 1}], ids=str
)
def test_the_engine_gives_the_same_tokens(changes: dict[str, Any], device: torch.device) -> None:
    config = settings(**changes)
    got, want = run(gpu_runner(device, config), config), run(cpu_runner(settings()), settings())
    assert tokens(got) == tokens(want)
    assert all(len(token_ids) == ASKED[int(key[0])]["max_tokens"] for key, token_ids in tokens(got).items())
    for mine, reference in zip(got["4", 0], want["4", 0], strict=False):
        for ours, theirs in zip(mine.logprobs, reference.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]


LETTERS = [b"", *(bytes([value]) for value in range(32, 122)), b"ab", b"abc", b"bc", b"", b""]  # of the 96 ids
EOS = 94
STRUCTURED: list[dict[str, Any]] = [
    {"temperature": 0.0, "structured_outputs": {"regex": "(ab|c){3,5}!"}},
    {"temperature": 1.0, "structured_outputs": {"choice": ["abcabc", "abca", "bc"]}, "n": 2},
    {"temperature": 0.0},
    {"temperature": 1.0, "structured_outputs": {"regex": "[0-9]{4}"}, "allowed_token_ids": [17, 18, 20, EOS]},
    {"temperature": 1.0, "structured_outputs": {"regex": "[x-z]{3}"}, "top_k": 2, "logprobs": 1},
    {
        "temperature": 0.7,
        "structured_outputs": {"regex": "[xy]{3}"},
        "logits_processors": [lambda ids, x: x - x.mean()],
    },
    {"temperature": 0.0, "structured_outputs": {"regex": "[0-9]{4}"}, "allowed_token_ids": [17, 40]},
    {"temperature": 0.9, "top_p": 0.8},
]


@pytest.mark.parametrize("changes", [{"run_ahead": 1}, {"num_blocks": 5, "run_ahead": 2}], ids=str)
def test_rows_that_follow_grammars(changes: dict[str, Any], device: torch.device) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    grammars, found = Grammars(lambda: TokenBytes(LETTERS, (EOS,), (EOS,))), []
    ahead = settings(**changes)
    for config, runner in (
        (ahead, gpu_runner(device, ahead, grammars)),
        (settings(), cpu_runner(settings(), grammars)),
    ):
        engine = Engine(Scheduler(config), UniprocExecutor(runner))
        for i, asked in enumerate(STRUCTURED):
            params = SamplingParams(max_tokens=12, **asked)
            prompt = tuple((11 * i + 7 * p) % 90 + 3 for p in range(3 + 5 * i % 20))
            ids = {"request_id": str(i), "prompt_token_ids": prompt, "eos_token_ids": (EOS,)}
            engine.add(Request(params=params, seed=100 + i, **ids))
        outputs: dict[tuple[str, int], list[SequenceOutput]] = {}
        while engine.has_unfinished():
            for output in engine.step():
                outputs.setdefault((output.request_id, output.index), []).append(output)
        found.append(outputs)
    assert tokens(found[0]) == tokens(found[1])
    ends = {key: (str(outputs[-1].finish_reason), outputs[-1].error) for key, outputs in found[0].items()}
    assert ends == {key: (str(outputs[-1].finish_reason), outputs[-1].error) for key, outputs in found[1].items()}
    texts = {key: b"".join(LETTERS[token_id] for token_id in ids) for key, ids in tokens(found[0]).items()}
    assert ends["6", 0][0] == "error" and texts["6", 0] == b"0000"
    patterns = {"0": b"(ab|c){3,5}!", "1": b"abcabc|abca|bc", "3": b"[013]{4}", "4": b"[x-z]{3}", "5": b"[xy]{3}"}
    for (name, _), text in texts.items():
        assert name not in patterns or (re.fullmatch(patterns[name], text) and ends[name, 0] == ("stop", None)), text


class _Recomputed:
    """In place of a graph: computes the step again."""

    def __init__(self, compute: Callable[[], object]) -> None:
        self.replay = compute


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the steps with prompts that were captured, without graphs."""
    sizes: list[int] = []

    def capture(self: MixedStep, pool: Any, packed: torch.Tensor, size: int) -> _Captured:
        sizes.append(size)
        hidden = self._compute(packed, size)
        return _Captured(_Recomputed(lambda: hidden.copy_(self._compute(packed, size))), packed, hidden)

    monkeypatch.setattr(MixedStep, "_capture", capture)
    return sizes


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("asked", "early"), [({}, False), ({}, True), ({"logprobs": 0}, False)], ids=str)
def test_padded_steps_give_the_same_tokens(
    rows: int, asked: dict[str, Any], early: bool, captured: list[int], monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:  # fmt: skip
    """What graphs of steps with prompts compute, without graphs, and with memory that holds no zeros by luck."""
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, math.nan))
    config = settings(max_num_seqs=rows)
    runner = gpu_runner(device, config)
    assert isinstance(runner, GpuRunner)
    assert device.type == "cuda" or not runner.get_ready()
    monkeypatch.setattr(runner._mixed_step, "_pool", SimpleNamespace(full=False))
    while early and runner.get_ready():
        pass
    assert captured == ([32, 16] if early else []), "the largest first"
    for length in (1, 3, 17):
        found = []
        for one in (runner, cpu_runner(settings())):
            engine = Engine(Scheduler(config), UniprocExecutor(one))
            params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, **asked)
            engine.add(Request(request_id="0", prompt_token_ids=tuple(range(5, 5 + length)), params=params, seed=1))
            tokens: list[int] = []
            while engine.has_unfinished():
                for output in engine.step():
                    assert output.error is None
                    tokens += output.new_token_ids
            found.append(tokens)
        assert found[0] == found[1]
    assert not early or captured == [32, 16], "none of them again"


def test_idle_captures_keep_to_the_steps_that_can_be(
    captured: list[int], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Two sequences of 64 tokens have no step of 256; and what finds no memory is no reason to end."""
    runner = gpu_runner(device, settings(max_num_seqs=2, max_num_batched_tokens=256))
    assert isinstance(runner, GpuRunner)
    sizes = runner._mixed_step._sizes
    assert max(sizes) == 2 * LENGTH
    monkeypatch.setattr(runner._mixed_step, "_pool", SimpleNamespace(full=False))
    compute = MixedStep._compute

    def no_memory(self: MixedStep, packed: torch.Tensor, size: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("3 GiB of 2 GiB")

    while runner.get_ready() and not captured:  # steps of decoding come first, on a GPU
        pass
    assert captured == [2 * LENGTH]
    monkeypatch.setattr(MixedStep, "_compute", no_memory)
    assert not runner.get_ready()
    monkeypatch.setattr(MixedStep, "_compute", compute)
    assert not runner.get_ready() and captured == [2 * LENGTH]
