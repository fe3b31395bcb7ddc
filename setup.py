"""Builds the native CPU kernels. Everything else about the distribution is in pyproject.toml.

One shared library without dependencies, loaded by ctypes, so a wheel fits every Python version. It is optional: where
there is no C++ compiler (gcc 11, clang 12 or newer), the build warns and Kvik runs on torch.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("src/kvik/kernels/cpu/native")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-g0", "-fno-math-errno", "-fvisibility=hidden", "-Wno-uninitialized"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISA_FLAGS = {
    "isa_avx2": AVX2,
    "isa_avx512": AVX512,
    "isa_avx512_vnni": [*AVX512, "-mavx512vnni"],
    "isa_avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
    "isa_amx": [*AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}


class BuildKernels(build_ext):
    """Compiles each instruction set's file with its own flags; the library chooses among them when it is loaded."""

    def build_extension(self, ext: Extension) -> None:
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        objects: list[str] = []
        for source in ext.sources:
            flags = [*FLAGS, *(ISA_FLAGS.get(Path(source).stem, []) if x86 else [])]
            objects += self.compiler.compile(
                [source], output_dir=self.build_temp, extra_postargs=flags, depends=ext.depends
            )
        target = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, target, libraries=["pthread"], target_lang="c++")

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


class PythonVersionFreeWheel(bdist_wheel):
    """py3-none-PLATFORM: the library has no Python in it. Without the library, a wheel for any platform."""

    def get_tag(self) -> tuple[str, str, str]:
        built = any(Path(self.get_finalized_command("build_ext").build_lib).rglob("_kvik_cpu.so"))
        return "py3", "none", super().get_tag()[2] if built else "any"


setup(
    ext_modules=[
        Extension(
            "kvik.kernels.cpu._kvik_cpu",
            sources=sorted(str(path) for path in NATIVE.glob("*.cpp")),
            depends=sorted(str(path) for path in NATIVE.glob("*.h*")),
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PythonVersionFreeWheel},
)
