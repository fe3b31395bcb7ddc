"""From a config to a running engine, and how long each part of the start took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from kvik import __version__
from kvik.attention.base import AttentionBackend
from kvik.attention.registry import select_backend
from kvik.config import EngineConfig, SchedulerConfig
from kvik.core.engine import Engine
from kvik.core.scheduler import Scheduler
from kvik.distributed.uniproc import Runner, UniprocExecutor
from kvik.errors import RequestError
from kvik.kernels.api import Ops
from kvik.kernels.cpu.native import NativePool
from kvik.kernels.reference import ReferenceOps
from kvik.layers.rope import RopeTable
from kvik.log import logger
from kvik.models.decoder import Decoder, DecoderWeights
from kvik.models.hub import folder_digest, load_config, resolve_model
from kvik.models.loader import Pack, checkpoint_dtype, keep_plain, load_weights
from kvik.models.registry import build_spec
from kvik.models.spec import DecoderSpec
from kvik.quantization.formats import GROUPS, StoredQuantization, read_quantization
from kvik.quantization.loading import PackQuantized, rounded
from kvik.quantization.receipt import describe_receipt
from kvik.resolve import ResolvedConfig, resolve
from kvik.runtime.kv_pool import KVPool
from kvik.runtime.model_runner import ModelRunner
from kvik.runtime.native_decoder import NativeDecoder, native_pack, native_pack_quantized
from kvik.runtime.platform import Platform, select_platform, usable_cores
from kvik.runtime.request_table import RequestTable
from kvik.structured.grammars import Grammars, available
from kvik.tracing import NO_TRACE, NoTrace, TracedCalls

if TYPE_CHECKING:
    from kvik.kernels.triton.dispatch import Table
    from kvik.runtime.kernel_compiler import KernelCompiler

__all__ = ["ModelInfo", "StartupLedger", "build_engine", "fingerprint", "inspect_model", "load_decoder"]


@dataclass(slots=True)
class StartupLedger:
    """Seconds spent in each named phase of the start."""

    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - begin

    def render(self) -> str:
        total = sum(self.phases.values())
        return f"ready in {total:.2f} s: " + ", ".join(f"{name} {s:.2f}" for name, s in self.phases.items())


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model before any weight is read."""

    path: Path
    hf_config: Mapping[str, Any]
    spec: DecoderSpec
    platform: Platform
    resolved: ResolvedConfig
    stored: StoredQuantization | None = None  # how the folder is quantised, if it is


def inspect_model(config: EngineConfig) -> ModelInfo:
    """Find the model and decide every setting, without allocating anything. Raises the errors that a start would."""
    path = resolve_model(config.model, config.revision, load_format=config.load_format)
    hf_config = load_config(path)
    spec = build_spec(hf_config)
    platform = select_platform(config.device)
    stored = read_quantization(hf_config)
    resolved = resolve(config, spec, checkpoint_dtype(hf_config) or torch.float32, platform, stored)
    return ModelInfo(path, hf_config, spec, platform, resolved, stored)


def fingerprint(config: EngineConfig, info: ModelInfo) -> str:
    """A hash of what decides outputs beside the requests: code, model, numbers, kernels, device. Reads few bytes."""
    resolved, template = info.resolved, None
    if config.chat_template is not None:
        from kvik.text.chat import template_text  # with jinja2, which an engine's process does without

        template = template_text(config.chat_template)
    facts = (
        __version__, folder_digest(info.path), config.load_format, template, config.deterministic,
        resolved.dtype, resolved.kv_dtype, resolved.weight_format, resolved.head_format, resolved.kernels,
        config.attention_backend, info.platform.name,
        None if config.tokenizer is None else folder_digest(resolve_model(config.tokenizer)),
        config.seed if config.load_format == "dummy" else None,
    )  # fmt: skip
    return f"kvik-{__version__}-{blake2b(repr(facts).encode(), digest_size=6).hexdigest()}"


def build_engine(
    config: EngineConfig, info: ModelInfo, ledger: StartupLedger, grammars: Grammars, tracer: NoTrace = NO_TRACE,
    *, prepare: bool = False,
) -> Engine:  # fmt: skip
    """Load the weights, allocate the KV cache, and join scheduler and runner; with `prepare` also the grammars' tables,
    by a thread of their own, which starts once other processes have been forked."""
    settings, device = info.resolved.scheduler, info.platform.device
    for note in info.resolved.notes:
        logger.warning("%s", note)
    info.platform.start(config.threads)
    with _kernel_compiler(config, info) as compiler, ThreadPoolExecutor(1) as beside:
        prepared = beside.submit(grammars.prepare) if prepare and available() else None
        with ledger.phase("weights"):
            model = load_decoder(config, info)
        with ledger.phase("KV cache"):
            pool = KVPool(info.spec, settings.num_blocks, settings.block_size, info.resolved.kv_dtype, device)
            runner = _runner(config, info, model, pool, grammars, tracer)
        if compiler is not None:
            with ledger.phase("kernels"):
                compiler.wait()
            with ledger.phase("warm-up"):
                _warm_up(runner, settings)
                compiler.leave_mark()
        if prepared is not None:
            with ledger.phase("grammars"), suppress(RequestError):  # a model that cannot end texts
                prepared.result()
    if tracer is not NO_TRACE and isinstance(model, Decoder):
        model.ops = cast(Ops[Any], TracedCalls(model.ops, tracer))
        model.attention = cast(AttentionBackend, TracedCalls(model.attention, tracer, {"forward": "attention"}))
    executor = UniprocExecutor(runner, tracer, info.platform.release)
    return Engine(Scheduler(settings), executor, tracer)


def _kernel_compiler(config: EngineConfig, info: ModelInfo) -> AbstractContextManager[KernelCompiler | None]:
    """What compiles the kernels of a GPU from now on; None where nothing is compiled at the start."""
    if info.resolved.kernels != "triton":
        return nullcontext()
    from kvik.kernels.triton.compile_only import compute_capability
    from kvik.runtime.kernel_compiler import CompileJob, KernelCompiler

    settings = replace(info.resolved.scheduler, num_blocks=1)  # free memory differs, the kernels do not
    job = CompileJob(
        spec=info.spec, settings=settings, dtype=info.resolved.dtype, gpu=info.platform.name,
        capability=compute_capability(info.platform.device), deterministic=config.deterministic,
        attention_backend=config.attention_backend,
    )  # fmt: skip
    return KernelCompiler(job, usable_cores())


def _warm_up(runner: Runner, settings: SchedulerConfig) -> None:
    """Launch every kernel once, and capture the largest graphs: no request waits for a compiler."""
    from kvik.runtime.gpu_runner import GpuRunner
    from kvik.runtime.warm_up import warm_up

    assert isinstance(runner, GpuRunner)
    warm_up(runner, settings)


def _runner(
    config: EngineConfig, info: ModelInfo, model: Decoder | NativeDecoder, pool: KVPool, grammars: Grammars,
    tracer: NoTrace,
) -> Runner:  # fmt: skip
    settings = info.resolved.scheduler
    if info.resolved.kernels == "triton":
        from kvik.runtime.gpu import build_gpu_runner

        assert isinstance(model, Decoder)
        return build_gpu_runner(
            model, pool, settings.max_num_seqs, settings.max_model_len, use_graphs=info.resolved.graphs,
            tracer=tracer, grammars=grammars,
        )  # fmt: skip
    table = RequestTable(settings.max_num_seqs, settings.max_model_len, settings.block_size)
    return ModelRunner(model, pool, table, tracer, grammars)


def load_decoder(config: EngineConfig, info: ModelInfo) -> Decoder | NativeDecoder:
    """The model with its weights, on the kernels that were resolved."""
    settings, resolved, device = info.resolved.scheduler, info.resolved, info.platform.device
    rope = RopeTable(info.spec.rope, settings.max_model_len, device)
    quantised_on_load = resolved.weight_format in GROUPS and info.stored is None

    def load(pack: Pack = keep_plain, pack_quantized: PackQuantized | None = None) -> DecoderWeights:
        return load_weights(
            info.path, info.spec, dtype=resolved.dtype, device=device, load_format=config.load_format,
            seed=config.seed or 0, pack=pack, stored=info.stored, pack_quantized=pack_quantized,
            finite=quantised_on_load,
        )  # fmt: skip

    if info.stored is not None:
        logger.info("%s", describe_receipt(info.stored))
    if resolved.kernels == "native":
        pool = NativePool(config.threads)
        weights = load(native_pack(resolved.weight_format, resolved.head_format, pool), native_pack_quantized(pool))
        return NativeDecoder(
            info.spec, weights, rope, pool, settings.max_num_batched_tokens, deterministic=config.deterministic
        )
    weights = load(rounded(resolved.weight_format, resolved.head_format) if quantised_on_load else keep_plain)
    if resolved.kernels == "torch":
        return Decoder(info.spec, weights, rope, ReferenceOps(), select_backend(config.attention_backend, device))
    from kvik.kernels.triton.dispatch import load_table
    from kvik.kernels.triton.ops import TritonOps
    from kvik.runtime.gpu import gpu_attention

    table = load_table(info.platform.name)
    if not config.deterministic and not _is_tuned(info, table):
        logger.info("projections of this model are not tuned for %s: kvik tune %s", info.platform.name, config.model)
    attention = gpu_attention(
        info.spec, settings.max_num_seqs, settings.max_num_batched_tokens, settings.max_model_len, device,
        dtype=resolved.dtype, deterministic=config.deterministic, block_size=settings.block_size,
        backend=config.attention_backend,
    )  # fmt: skip
    ops = TritonOps(device, table=table, deterministic=config.deterministic, defer=True)
    return Decoder(info.spec, weights, rope, ops, attention)


def _is_tuned(info: ModelInfo, table: Table) -> bool:
    """Whether any projection of the model was measured on this kind of GPU, by whoever ships Kvik or by its user."""
    from kvik.kernels.triton.dispatch import BUCKETS
    from kvik.runtime.tune import Shape

    shape = Shape(info.spec, info.resolved.dtype)
    return any(case.key in table.measured for size in BUCKETS for case in shape.cases(size))
