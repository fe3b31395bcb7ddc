"""Compiling an engine's kernels while its weights load: processes that fill Triton's cache and never touch the GPU.

Processes, because Triton's front end holds Python's lock. Each runs all of `kvik.runtime.warm_up` on torch's meta
device and compiles a kernel only if it is the first to claim it, by creating a file of its name:

    process 1   kernel a ■■■■■■   kernel c ■■■       kernel d ■■■■
    process 2   (a is claimed) kernel b ■■■■■■■■■■   (c, d are claimed) kernel e ■■

Whatever goes wrong here, the engine's own process compiles what is missing: later, but not wrong. Once that process
has run everything, it leaves a mark in the cache, and the next start with the same kernels needs no processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvik.config import SchedulerConfig
from kvik.kernels.triton.compile_only import compile_shared
from kvik.kernels.triton.dispatch import load_table
from kvik.kernels.triton.ops import TritonOps
from kvik.layers.rope import RopeSpec, RopeTable
from kvik.log import logger
from kvik.models.decoder import Decoder
from kvik.models.loader import build_weights
from kvik.models.spec import DecoderSpec
from kvik.runtime.gpu import build_gpu_runner, gpu_attention
from kvik.runtime.gpu_runner import GpuRunner
from kvik.runtime.kv_pool import KVPool
from kvik.runtime.warm_up import warm_up

__all__ = ["CompileJob", "KernelCompiler", "main"]

MAX_PROCESSES = 16
"""Each takes about 400 MB while it runs."""

LONGEST_WAIT = 120.0
"""Seconds that a start waits for the processes, once nothing else is left to do."""

_HOPPER = (9, 0)
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

    def to_json(self) -> str:
        """Every field, in plain values."""
        return json.dumps(asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> CompileJob:
        """What `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        spec = fields["spec"] | {
            "rope": RopeSpec(**fields["spec"]["rope"]),
            "windows": tuple(fields["spec"]["windows"]),
        }
        return cls(
            spec=DecoderSpec(**spec), settings=SchedulerConfig(**fields["settings"]),
            dtype=getattr(torch, fields["dtype"]), gpu=fields["gpu"], capability=tuple(fields["capability"]),
            deterministic=fields["deterministic"],
        )  # fmt: skip

    @property
    def mark(self) -> Path:
        """The file in Triton's cache that says that all kernels of this job are there."""
        import triton

        digest = hashlib.sha256(f"{triton.__version__} {self.to_json()} {load_table(self.gpu)}".encode())
        root = Path(__file__).parents[1]
        for folder in _SOURCES:
            for file in sorted((root / folder).rglob("*.py")):
                digest.update(file.read_bytes())
        return Path(triton.knobs.cache.dir) / f"kvik-{digest.hexdigest()[:32]}"

    def meta_runner(self) -> GpuRunner:
        """The runner of such an engine on the meta device, where tensors have no memory."""
        spec, settings, meta = self.spec, self.settings, torch.device("meta")
        pdl = self.capability >= _HOPPER
        num_seqs, max_len = settings.max_num_seqs, settings.max_model_len
        weights = build_weights(spec, self.dtype, meta, fill=lambda views: None)
        ops = TritonOps(meta, table=load_table(self.gpu), deterministic=self.deterministic, defer=True, pdl=pdl)
        attention = gpu_attention(
            spec, num_seqs, settings.max_num_batched_tokens, max_len, meta, dtype=self.dtype,
            deterministic=self.deterministic, pdl=pdl,
        )  # fmt: skip
        decoder = Decoder(spec, weights, RopeTable(spec.rope, max_len, meta), ops, attention)
        pool = KVPool(spec, settings.num_blocks, settings.block_size, self.dtype, meta)
        return build_gpu_runner(decoder, pool, num_seqs, max_len, use_graphs=False)


class KernelCompiler:
    """The processes that compile a job's kernels, and the folder where they find the job and their claims.

    Starts at most `num_processes` of them, none where the job's mark says that there is nothing to do. To be closed.
    """

    def __init__(self, job: CompileJob, num_processes: int) -> None:
        self._job = job
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if num_processes > 1 and not job.mark.exists():
            try:
                self._folder = tempfile.TemporaryDirectory(prefix="kvik-kernels-")
                self._start(Path(self._folder.name), min(num_processes, MAX_PROCESSES))
            except OSError as error:
                logger.warning("kernels are compiled by %d processes, no more start: %s", len(self._processes), error)

    def _start(self, folder: Path, count: int) -> None:
        (folder / "claims").mkdir()
        (folder / "job.json").write_text(self._job.to_json())
        command = [sys.executable, "-m", "kvik.runtime.kernel_compiler", str(folder)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        for index in range(count):
            with (folder / f"log-{index}").open("wb") as log:
                process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            self._processes.append(process)

    def wait(self, seconds: float = LONGEST_WAIT) -> None:
        """Return when all processes have ended; those that have not after `seconds` are ended."""
        deadline, failed = time.monotonic() + seconds, []
        for index, process in enumerate(self._processes):
            try:
                if process.wait(max(0.0, deadline - time.monotonic())):
                    failed.append(index)
            except subprocess.TimeoutExpired:
                logger.warning("compiling kernels takes longer than %g s; the engine does the rest itself", seconds)
                break
        if failed:
            logger.warning(
                "%d of %d processes that compile kernels failed, and the engine compiles what is missing; one said: %s",
                len(failed), len(self._processes), self._last_words(failed[0]),
            )  # fmt: skip
        self._stop()

    def leave_mark(self) -> None:
        """Say in Triton's cache that this job's kernels are there; all have been launched."""
        with contextlib.suppress(OSError):  # a cache that is elsewhere, or full: the next start asks again
            self._job.mark.touch()

    def close(self) -> None:
        """End what still runs and remove the folder."""
        self._stop()
        if self._folder is not None:
            self._folder.cleanup()

    def _last_words(self, index: int) -> str:
        assert self._folder is not None
        lines = Path(self._folder.name, f"log-{index}").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing"

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes.clear()

    def __enter__(self) -> KernelCompiler:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def main(folder: Path) -> None:
    """What one process does: compile the kernels of the job in `folder` that no other has claimed."""
    torch.set_num_threads(1)
    job = CompileJob.from_json((folder / "job.json").read_text())
    compile_shared(job.capability, folder / "claims")
    warm_up(job.meta_runner(), job.settings)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
