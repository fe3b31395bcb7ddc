"""FlashInfer as an attention backend: when it may be chosen, and what it computes.

Without a GPU a stand-in takes FlashInfer's place, which computes what its documentation says from what it is given.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from compile_job import JOB
from test_triton_attention import Heads, make_batch, make_cache
from test_triton_runner import cpu_runner, gpu_runner, run, settings, tokens

from kvik.attention.flashinfer import FlashInferAttention
from kvik.attention.reference import ReferenceAttention
from kvik.attention.triton import AttentionLimits, TritonAttention
from kvik.config import EngineConfig
from kvik.errors import ConfigError
from kvik.kernels.triton.features import NO_FEATURES
from kvik.resolve import ResolvedConfig, resolve
from kvik.runtime.gpu import gpu_attention
from kvik.runtime.gpu_runner import GpuRunner
from kvik.runtime.platform import CpuPlatform, Platform
from kvik.runtime.warm_up import warm_up
from triton_mode import INTERPRETED


class StandIn:
    """`flashinfer.BatchPrefillWithPagedKVCacheWrapper`, one sequence after the other."""

    def __init__(self, workspace: Tensor, kv_layout: str, *, backend: str) -> None:
        assert kv_layout == "HND" and backend in ("fa2", "auto")

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, **options: Any,
    ) -> None:  # fmt: skip
        assert options["causal"] and qo_indptr[0] == paged_kv_indptr[0] == 0
        assert paged_kv_indptr[-1] == len(paged_kv_indices)
        self._scale, self._window_left = options["sm_scale"], options["window_left"]
        self._queries, last = qo_indptr.tolist(), paged_kv_last_page_len.tolist()
        self._pages = [paged_kv_indices[a:b].long() for a, b in pairwise(paged_kv_indptr.tolist())]
        self._lens = [(len(p) - 1) * page_size + n for p, n in zip(self._pages, last, strict=True)]
        self._group = num_qo_heads // num_kv_heads

    def run(self, q: Tensor, kv: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        for (a, b), pages, n in zip(pairwise(self._queries), self._pages, self._lens, strict=True):
            k, v = (x[pages].transpose(0, 1).flatten(1, 2)[:, :n].repeat_interleave(self._group, 0).float() for x in kv)
            age = torch.arange(n - (b - a), n)[:, None] - torch.arange(n)
            seen = (age >= 0) & ((self._window_left < 0) | (age <= self._window_left))
            mine = F.scaled_dot_product_attention(q[a:b].transpose(0, 1).float(), k, v, seen, scale=self._scale)
            out[a:b] = mine.transpose(0, 1)
        return out


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=StandIn)
    monkeypatch.setitem(sys.modules, "flashinfer", module)  # type: ignore[arg-type]
    event = SimpleNamespace(synchronize=lambda: None, record=lambda: None)
    monkeypatch.setattr(torch, "Event", lambda device: event)


@pytest.fixture
def place(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where FlashInfer runs, or its stand-in."""
    if device.type == "cpu":
        stand_in(monkeypatch)
    else:
        pytest.importorskip("flashinfer", reason="flashinfer-python is not installed")
    return device


def backend(heads: Heads, device: torch.device) -> FlashInferAttention:
    return FlashInferAttention(AttentionLimits(*heads, 512, 4096, 65536), device)


def check(
    lens: list[int], counts: list[int], heads: Heads, device: torch.device, *, window: int | None = None,
    block_size: int = 16, attention: FlashInferAttention | None = None,
) -> None:  # fmt: skip
    kv, tables = make_cache(lens, heads, torch.bfloat16, block_size, device, 1e4)
    batch = make_batch(lens, counts, tables)
    q = torch.randn(sum(counts), heads[0], heads[2]).bfloat16().to(device)
    scale = heads[2] ** -0.5
    got = (attention or backend(heads, device)).forward(q, kv, batch, scale=scale, window=window)
    want = ReferenceAttention().forward(q, kv, batch, scale=scale, window=window)
    torch.testing.assert_close(got, want, rtol=0, atol=2.5e-2)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("heads", [(2, 2, 128), (4, 2, 128), (7, 1, 128), (32, 8, 128)], ids=str)
def test_decodes_prompts_and_both(heads: Heads, window: int | None, place: torch.device) -> None:
    attention = backend(heads, place)
    for lens, counts in (
        ([1, 15, 16, 17, 123], [1] * 5),
        ([16, 123, 1], [16, 123, 1]),
        ([33, 1, 70, 40, 200], [1, 1, 20, 1, 150]),
        ([600, 300], [1, 5]),
    ):
        check(lens, counts, heads, place, window=window, attention=attention)


@pytest.mark.parametrize("window", [None, 1, 16, 70])
@pytest.mark.parametrize("block_size", [16, 48, 64, 256])
def test_block_sizes_and_windows(block_size: int, window: int | None, place: torch.device) -> None:
    lens = [block_size - 1, block_size, block_size + 1, 130]
    check(lens, [1, 1, 1, 30], (4, 2, 128), place, window=window, block_size=block_size)


def test_layers_of_both_kinds_share_a_step(place: torch.device) -> None:
    heads: Heads = (4, 2, 128)
    kv, tables = make_cache([40, 90], heads, torch.bfloat16, 16, place, 1e4)
    batch, attention = make_batch([40, 90], [1, 30], tables), backend(heads, place)
    attention.prepare(batch)
    for window in (None, 20, None, 20):
        q = torch.randn(31, 4, 128).bfloat16().to(place)
        got, want = (x.forward(q, kv, batch, scale=0.1, window=window) for x in (attention, ReferenceAttention()))
        torch.testing.assert_close(got, want, rtol=0, atol=2.5e-2)


def test_a_step_may_be_planned_before_the_one_before_has_begun(place: torch.device) -> None:
    heads: Heads = (4, 2, 128)
    cases = [([500, 30], [1, 1]), ([40, 600], [1, 1]), ([20, 300], [3, 200]), ([100, 200], [100, 150])]
    attention, pairs = backend(heads, place), []
    made = [(*make_cache(lens, heads, torch.bfloat16, 16, place, 1e4), lens, counts) for lens, counts in cases * 2]
    if place.type == "cuda":
        torch.cuda._sleep(200_000_000)  # cycles: 0.1 s
    for kv, tables, lens, counts in made:
        batch, q = make_batch(lens, counts, tables), torch.ones(sum(counts), 4, 128, device=place).bfloat16()
        pairs.append((attention.forward(q, kv, batch, scale=0.1, window=None), q, kv, batch))
    for got, q, kv, batch in pairs:
        want = ReferenceAttention().forward(q, kv, batch, scale=0.1, window=None)
        torch.testing.assert_close(got, want, rtol=0, atol=2.5e-2)


@pytest.mark.skipif(not INTERPRETED, reason="Triton compiles for the GPU in this process")
@pytest.mark.parametrize("changes", [{"run_ahead": 2, "max_num_batched_tokens": 7}, {"num_blocks": 6}], ids=str)
def test_the_runner_gives_the_same_tokens(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    config = settings(**changes)
    runner = gpu_runner(torch.device("cpu"), config, backend="flashinfer")
    assert isinstance(runner, GpuRunner)
    warm_up(runner, config)
    assert tokens(run(runner, config)) == tokens(run(cpu_runner(settings()), settings()))


# The choice


class Gpu(CpuPlatform):
    device = torch.device("cuda")

    def available_memory(self) -> int:
        return 1 << 32


def resolved(
    name: str, platform: Platform | None = None, head_dim: int = 128, rope: str = "default", **options: Any
) -> ResolvedConfig:
    config = EngineConfig("demo", attention_backend=name, max_num_seqs=2, kv_cache_memory=2**22, **options)
    spec = replace(JOB.spec, head_dim=head_dim, rope=replace(JOB.spec.rope, kind=rope))
    return resolve(config, spec, torch.bfloat16, platform or Gpu())


def test_auto_is_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    assert resolved("auto") == resolved("triton")
    assert resolved("auto").graphs and not resolved("auto", enforce_eager=True).graphs
    sizes = JOB.spec, 2, 8, 64, torch.device("meta")
    for name, kind in (("auto", TritonAttention), ("triton", TritonAttention), ("flashinfer", FlashInferAttention)):
        attention = gpu_attention(*sizes, dtype=torch.bfloat16, deterministic=False, features=NO_FEATURES, backend=name)
        assert type(attention) is kind


def test_without_flashinfer_only_who_asks_for_it_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)  # type: ignore[arg-type]
    assert resolved("auto").kernels == "triton"
    with pytest.raises(ConfigError, match=r"'flashinfer': it cannot be imported .*pip install 'kvik\[flashinfer\]'"):
        resolved("flashinfer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 80}, "head_dim of 64, 128, 256; this model has 80"),
        ({"dtype": "float32"}, "bfloat16 or float16, not torch.float32"),
        ({"deterministic": True}, "deterministic=True cannot be kept"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype='int8'"),
        ({"platform": CpuPlatform()}, "'flashinfer' runs on NVIDIA GPUs only"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_flashinfer_cannot_do_is_refused(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolved("flashinfer", **options)


def test_other_backends_are_refused_where_they_cannot_run() -> None:
    with pytest.raises(ConfigError, match="'reference': it does not run on a GPU"):
        resolved("reference")
    with pytest.raises(ConfigError, match="'triton' runs on NVIDIA GPUs only"):
        resolved("triton", CpuPlatform())


def test_a_note_says_that_there_are_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    found = resolved("flashinfer")
    assert not found.graphs and any("no CUDA graphs" in note for note in found.notes)
    eager = resolved("flashinfer", enforce_eager=True)
    assert not eager.graphs and not eager.notes
    dynamic = resolved("auto", rope="dynamic")
    assert not dynamic.graphs and any("no CUDA graphs" in note for note in dynamic.notes)
    parts = 2 * 192 * (JOB.spec.num_heads // JOB.spec.num_kv_heads) * 128 * (128 + 1) * 4
    assert eager.memory.activations > parts


def test_kernels_that_cannot_be_compiled_are_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("Could not find nvcc")

    monkeypatch.setattr(StandIn, "plan", fail)
    with pytest.raises(ConfigError, match=r"takes nvcc and ninja.*Could not find nvcc"):
        check([5], [5], (2, 2, 128), torch.device("cpu"))
