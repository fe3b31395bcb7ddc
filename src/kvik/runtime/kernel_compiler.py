"""Compiling an engine's kernels while its weights load: processes that fill Triton's cache and never touch the GPU.

Processes, because Triton's front end holds Python's lock; forked, because to import torch takes longer than a kernel.
Each runs `kvik.runtime.warm_up` on torch's meta device and compiles a kernel only if it is the first to claim it, by
creating a file of its name:

    process 1   kernel a ■■■■■■   kernel c ■■■       kernel d ■■■■
    process 2   (a is claimed) kernel b ■■■■■■■■■■   (c, d are claimed) kernel e ■■

Whatever goes wrong here, the engine's own process compiles what is missing: later, but not wrong. Once that process
has run everything, it leaves a mark in the cache, and the next start with the same kernels needs no processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import triton
from triton.compiler.compiler import make_backend
from triton.runtime.cache import triton_key

from kvik.config import SchedulerConfig
from kvik.kernels.triton.compile_only import StandInDriver, compile_only, compile_shared, keep_out_dynamo
from kvik.kernels.triton.dispatch import load_table
from kvik.kernels.triton.features import Features
from kvik.kernels.triton.ops import TritonOps
from kvik.layers.rope import RopeTable
from kvik.log import logger
from kvik.models.decoder import Decoder
from kvik.models.loader import build_weights
from kvik.models.spec import DecoderSpec
from kvik.runtime.gpu import build_gpu_runner, gpu_attention
from kvik.runtime.gpu_runner import GpuRunner
from kvik.runtime.kv_pool import KVPool
from kvik.runtime.warm_up import warm_up

__all__ = ["CompileJob", "KernelCompiler"]

MAX_PROCESSES = 16
"""Forked, so that they share what this process has imported."""

LONGEST_WAIT = 120.0
"""Seconds that a start waits for the processes, once nothing else is left to do."""

_SOURCES = ("attention", "kernels", "models", "runtime")  # what decides which kernels are launched, and how


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileJob:
    """All that decides which kernels an engine launches."""

    spec: DecoderSpec
    settings: SchedulerConfig
    dtype: torch.dtype
    gpu: str  # its name, by which `load_table` knows it
    capability: tuple[int, int]
    deterministic: bool
    attention_backend: str = "auto"

    @property
    def mark(self) -> Path:
        """The file in Triton's cache that says that all kernels of this job are there."""
        digest = hashlib.sha256(f"{triton.__version__} {self} {load_table(self.gpu)}".encode())
        root = Path(__file__).parents[1]
        for folder in _SOURCES:
            for file in sorted((root / folder).rglob("*.py")):
                digest.update(file.read_bytes())
        return Path(triton.knobs.cache.dir) / f"kvik-{digest.hexdigest()[:32]}"

    def meta_runner(self) -> GpuRunner:
        """The runner of such an engine on the meta device, where tensors have no memory, with few layers."""
        spec, settings, meta = self.spec.shallow(), self.settings, torch.device("meta")
        features = Features.of_capability(self.capability)
        num_seqs, max_len = settings.max_num_seqs, settings.max_model_len
        weights = build_weights(spec, self.dtype, meta, fill=lambda views: None)
        table, exact = load_table(self.gpu), self.deterministic
        ops = TritonOps(meta, table=table, deterministic=exact, defer=True, features=features)
        attention = gpu_attention(
            spec, num_seqs, settings.max_num_batched_tokens, max_len, meta, dtype=self.dtype,
            deterministic=exact, block_size=settings.block_size, features=features, backend=self.attention_backend,
        )  # fmt: skip
        decoder = Decoder(spec, weights, RopeTable(spec.rope, max_len, meta), ops, attention)
        pool = KVPool(spec, settings.num_blocks, settings.block_size, self.dtype, meta)
        return build_gpu_runner(decoder, pool, num_seqs, max_len, use_graphs=False)


class KernelCompiler:
    """The processes that compile a job's kernels, and the folder of their claims.

    Starts at most `num_processes` of them, none where the job's mark says that there is nothing to do. To be closed.
    """

    def __init__(self, job: CompileJob, num_processes: int) -> None:
        self._job = job
        self._process: BaseProcess | None = None  # the first one, which forks into the others
        self._has_compiled = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if num_processes > 1 and not job.mark.exists():
            try:
                self._folder = tempfile.TemporaryDirectory(prefix="kvik-kernels-")
                arguments = job, Path(self._folder.name), min(num_processes, MAX_PROCESSES)
                process = multiprocessing.get_context("fork").Process(target=_run, args=arguments, daemon=True)
                process.start()
                self._process = process
            except (OSError, AssertionError) as error:  # no memory; or this process is a daemon itself
                logger.warning("kernels are compiled when they are first launched: no process for it: %s", error)

    def wait(self, seconds: float = LONGEST_WAIT) -> None:
        """Return when all processes have ended; those that have not after `seconds` are ended."""
        if self._process is None:
            return
        self._process.join(seconds)
        if self._process.is_alive():
            logger.warning("compiling kernels takes longer than %g s; the engine does the rest itself", seconds)
        elif self._process.exitcode:
            logger.warning(
                "processes that compile kernels failed, and the engine compiles what is missing; they said: %s",
                self._last_words(),
            )
        else:
            self._has_compiled = True
        self._stop()

    def leave_mark(self) -> None:
        """Say in Triton's cache that this job's kernels are there, if the processes have compiled all of them."""
        if not self._has_compiled:  # warming up alone does not launch all: graphs spare it the steps that have none
            return
        with contextlib.suppress(OSError):  # a cache that is elsewhere, or full: the next start asks again
            self._job.mark.touch()

    def close(self) -> None:
        """End what still runs and remove the folder."""
        self._stop()
        if self._folder is not None:
            self._folder.cleanup()

    def _last_words(self) -> str:
        assert self._folder is not None
        log = Path(self._folder.name, "log")
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        return lines[-1] if lines else "nothing"

    def _stop(self) -> None:
        if self._process is not None:
            if self._process.exitcode != 0:  # else all have ended, and their number may be another's by now
                assert self._process.pid is not None
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.kill()  # if it has no group yet
            self._process.join()
            self._process = None

    def __enter__(self) -> KernelCompiler:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _run(job: CompileJob, folder: Path, num_processes: int) -> None:
    """What the first process does, in a group of its own, with a log."""
    os.setsid()
    with (folder / "log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - until the process ends
    (folder / "claims").mkdir()
    sys.exit(_compile(job, folder / "claims", num_processes) > 0)


def _compile(job: CompileJob, claims: Path, num_processes: int) -> int:
    """Fork into `num_processes`, each of which compiles the kernels that no other has claimed.

    Returns how many others failed, in the first process, and 0 in the others.
    """
    torch.set_num_threads(1)
    keep_out_dynamo()
    runner = job.meta_runner()
    driver = StandInDriver(job.capability)
    compile_only(driver, lambda kernel: False)
    warm_up(runner, job.settings)  # hashes the sources of all kernels, in the order of launches
    make_backend(driver.get_current_target()).hash()  # and Triton itself
    triton_key()
    others: list[int] = []
    while len(others) < num_processes - 1 and (pid := os.fork()):
        others.append(pid)
    if len(others) < num_processes - 1:
        others.clear()
    compile_shared(job.capability, claims)
    warm_up(runner, job.settings)
    return sum(os.waitpid(pid, 0)[1] != 0 for pid in others)
