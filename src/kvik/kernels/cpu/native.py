"""The compiled kernel library: finding and loading it, its structs, and the thread pool that runs its operations.

The library is optional: a wheel built without a compiler has none, and `available()` says so. `KVIK_CPU_ISA` forces a
lower instruction set than the CPU has (generic, avx2, avx512, avx512_vnni, avx512_bf16, amx); asking for a higher one
is an error. A pool belongs to whoever made it; its threads sleep when nothing runs.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import psutil
from torch import Tensor

from kvik.errors import CapacityError, ConfigError, did_you_mean

__all__ = [
    "OP_CODES",
    "LinearStruct",
    "NativeLibrary",
    "NativePool",
    "OpStruct",
    "StepStruct",
    "available",
    "data_pointer",
    "load_library",
    "usable_cores",
]

ABI_VERSION = 4
_LIBRARY_NAME = "_kvik_cpu"
_SPIN_NS = 200_000  # between steps; longer than what lies between two decode steps, shorter than anyone notices

OP_CODES = {
    "embed": 0,
    "norm": 1,
    "gather_norm": 2,
    "linear": 3,
    "rope_store": 4,
    "attention": 5,
    "argmax": 6,
    "pack": 7,
    "pack_quantized": 8,
    "unpack": 9,
    "unpack_quantized": 10,
    "read": 11,
    "peak": 12,
}


class LinearStruct(ctypes.Structure):
    """`KvikLinear`: a packed projection."""

    _fields_ = (
        ("format", ctypes.c_int32), ("group", ctypes.c_int32), ("n", ctypes.c_int32), ("k", ctypes.c_int32),
        ("panels", ctypes.c_int32), ("blocks", ctypes.c_int32), ("swiglu", ctypes.c_int32), ("words", ctypes.c_int32),
        ("fine", ctypes.c_int32), ("panel_bytes", ctypes.c_int64), ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p), ("bias", ctypes.c_void_p),
    )  # fmt: skip


class OpStruct(ctypes.Structure):
    """`KvikOp`: one entry of a tape."""

    _fields_ = (
        ("code", ctypes.c_int32), ("type", ctypes.c_int32), ("x", ctypes.c_void_p), ("y", ctypes.c_void_p),
        ("residual", ctypes.c_void_p), ("norm", ctypes.c_void_p), ("norm2", ctypes.c_void_p),
        ("scales", ctypes.c_void_p), ("linear", ctypes.POINTER(LinearStruct)), ("k_cache", ctypes.c_void_p),
        ("v_cache", ctypes.c_void_p), ("k_scales", ctypes.c_void_p), ("v_scales", ctypes.c_void_p),
        ("block_rows", ctypes.c_int64), ("num_heads", ctypes.c_int32), ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32), ("block_size", ctypes.c_int32), ("window", ctypes.c_int32),
        ("rows", ctypes.c_int32), ("width", ctypes.c_int64), ("eps", ctypes.c_float), ("scale", ctypes.c_float),
    )  # fmt: skip


class StepStruct(ctypes.Structure):
    """`KvikStep`: what changes from one run of a tape to the next."""

    _fields_ = (
        ("num_tokens", ctypes.c_int32), ("num_seqs", ctypes.c_int32), ("num_rows", ctypes.c_int32),
        ("table_stride", ctypes.c_int32), ("input_ids", ctypes.c_void_p), ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p), ("slots", ctypes.c_void_p), ("query_starts", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p), ("block_tables", ctypes.c_void_p), ("logit_indices", ctypes.c_void_p),
    )  # fmt: skip


def data_pointer(tensor: Tensor | None) -> int | None:
    """The address of a contiguous tensor's elements; None for None."""
    if tensor is None:
        return None
    assert tensor.is_contiguous(), "the kernels take contiguous tensors"
    return tensor.data_ptr()


class NativeLibrary:
    """The loaded library. `isa` is the level in use, of `isa_names`, lowest first."""

    def __init__(self, path: Path, forced_isa: str | None) -> None:
        self.path = path
        self._lib = ctypes.CDLL(str(path))
        if (found := self._lib.kvik_abi_version()) != ABI_VERSION:
            raise ConfigError(
                f"{path} is version {found} of the kernels and this Kvik needs {ABI_VERSION}; reinstall Kvik"
            )
        self._declare()
        self.isa_names = self._names()
        self.best_isa = self.isa_names[self._lib.kvik_isa_best()]
        self.isa = self._choose(forced_isa)

    def _declare(self) -> None:
        lib, pointer = self._lib, ctypes.c_void_p
        lib.kvik_isa_name.restype = ctypes.c_char_p
        lib.kvik_linear_layout.argtypes = [ctypes.POINTER(LinearStruct)]
        lib.kvik_pool_create.restype = pointer
        lib.kvik_pool_create.argtypes = [ctypes.c_int32, ctypes.c_int32, pointer, ctypes.c_int64]
        lib.kvik_pool_destroy.argtypes = [pointer]
        lib.kvik_pool_destroy.restype = None
        lib.kvik_run.argtypes = [pointer, ctypes.POINTER(OpStruct), ctypes.c_int32, ctypes.POINTER(StepStruct)]
        lib.kvik_run.restype = None
        lib.kvik_profile.argtypes = [pointer, ctypes.POINTER(ctypes.c_double)]
        lib.kvik_profile.restype = None

    def _names(self) -> tuple[str, ...]:
        names: list[str] = []
        while (name := self._lib.kvik_isa_name(len(names))) is not None:
            names.append(name.decode())
        return tuple(names)

    def _choose(self, forced: str | None) -> str:
        if not forced:
            return str(self.best_isa)
        if forced not in self.isa_names:
            hint, known = did_you_mean(forced, self.isa_names), ", ".join(self.isa_names)
            raise ConfigError(f"KVIK_CPU_ISA={forced!r} is not known{hint}; the kernels have {known}")
        if self.isa_names.index(forced) > self.isa_names.index(self.best_isa):
            raise ConfigError(f"KVIK_CPU_ISA={forced} needs a CPU that has it; this one goes up to {self.best_isa}")
        return forced

    def layout(self, linear: LinearStruct) -> None:
        """Fill in the derived fields of `linear`. Raises ConfigError for a shape that cannot be packed."""
        if not self._lib.kvik_linear_layout(ctypes.byref(linear)):
            raise ConfigError(f"a projection of {linear.k} to {linear.n} features cannot be packed (1 <= in <= 65536)")

    def create_pool(self, threads: int, isa: str, cores: Sequence[int] | None, spin_ns: int) -> int:
        array = None if cores is None else (ctypes.c_int32 * threads)(*cores)
        pool = self._lib.kvik_pool_create(threads, self.isa_names.index(isa), array, spin_ns)
        if pool is None:
            raise CapacityError(
                f"the system does not let this process start {threads} threads; use fewer (--threads), or raise its"
                " limits (ulimit -u and -v, pids.max of its control group)"
            )
        return int(pool)

    def destroy_pool(self, pool: int) -> None:
        self._lib.kvik_pool_destroy(pool)

    def run(self, pool: int, ops: ctypes.Array[OpStruct], num_ops: int, step: StepStruct) -> None:
        self._lib.kvik_run(pool, ops, num_ops, ctypes.byref(step))

    def profile(self, pool: int) -> dict[str, float]:
        seconds = (ctypes.c_double * len(OP_CODES))()
        self._lib.kvik_profile(pool, seconds)
        return dict(zip(OP_CODES, seconds, strict=True))


class NativePool:
    """Threads that run the kernels: `threads` in all (by default one per core), the caller being one of them.

    `pin` binds each thread to a core. Measured on two cores it gains nothing when they are free, and loses more when
    another process wants one of them, since a bound thread cannot move away. A thread that another process keeps from
    running in the middle of its work is moved to the core of a thread that waits for it, on Linux (`placement.hpp`).
    One run at a time.
    """

    def __init__(self, threads: int | None = None, *, pin: bool = False, isa: str | None = None) -> None:
        self.library = load_library()
        cores = usable_cores()
        self.threads = threads or len(cores)
        if self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {threads}")
        self.pinned = pin and self.threads <= len(cores)
        self.isa = isa or self.library.isa
        self._process = os.getpid()
        self._pool: int | None = self.library.create_pool(
            self.threads, self.isa, cores[: self.threads] if self.pinned else None, _SPIN_NS
        )

    def run(self, ops: ctypes.Array[OpStruct], num_ops: int, step: StepStruct) -> None:
        """Execute a tape. Everything that `ops` and `step` point to must be alive."""
        assert self._pool is not None, "the pool is closed"
        self.library.run(self._pool, ops, num_ops, step)

    def run_one(self, op: OpStruct, step: StepStruct | None = None) -> None:
        """Execute one operation."""
        self.run((OpStruct * 1)(op), 1, step or StepStruct())

    def profile(self) -> dict[str, float]:
        """Seconds per operation since the last call. The first call starts the measurement."""
        assert self._pool is not None, "the pool is closed"
        return self.library.profile(self._pool)

    def close(self) -> None:
        """End the threads, unless this process was forked by theirs and has none of them. Idempotent."""
        if self._pool is not None and self._process == os.getpid():
            self.library.destroy_pool(self._pool)
        self._pool = None

    def __del__(self) -> None:
        if getattr(self, "_pool", None) is not None:
            self.close()


def usable_cores() -> list[int]:
    """CPU numbers of one hardware thread per physical core, of those that this process may run on."""
    process = psutil.Process()
    allowed = list(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else list(range(os.cpu_count() or 1))
    seen: set[str] = set()
    cores = []
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        key = siblings.read_text().strip() if siblings.exists() else str(cpu)
        if key not in seen:
            seen.add(key)
            cores.append(cpu)
    return cores


def available() -> bool:
    """Whether the compiled library is there."""
    return _find() is not None


def load_library() -> NativeLibrary:
    """The library, loaded once per process and setting of KVIK_CPU_ISA. Raises ConfigError when there is none."""
    path = _find()
    if path is None:
        raise ConfigError("Kvik was installed without its native CPU kernels; reinstall it where a C++ compiler is")
    return _load(path, os.environ.get("KVIK_CPU_ISA") or None)


@lru_cache(maxsize=8)
def _load(path: Path, forced_isa: str | None) -> NativeLibrary:
    return NativeLibrary(path, forced_isa)


def _find() -> Path | None:
    return next(iter(sorted(Path(__file__).parent.glob(f"{_LIBRARY_NAME}*.so"))), None)
