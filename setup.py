"""Builds csrc/ where PyTorch, pybind11 and a C++17 compiler are found; all else is in pyproject.toml.

MISS_BUILD_CSRC  unset: build where possible, else go on without and say so in one line; 1: fail where impossible;
                 0: never.
MISS_SANITIZE    1: with address and undefined-behaviour sanitizers, for `make sanitize`.
"""

import importlib.util
import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
COMMON = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mprfchw"]
AVX512F = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
INSTRUCTIONS = {
    "avx2": AVX2,
    "avx512f": AVX512F,
    "avx512_vnni": [*AVX512F, "-mavx512vnni"],
    "avx512_bf16": [*AVX512F, "-mavx512vnni", "-mavx512bf16"],
}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1"]


def missing() -> str | None:
    """Why csrc/ cannot be built here; None where it can."""
    if os.environ.get("MISS_BUILD_CSRC") == "0":
        return "MISS_BUILD_CSRC=0"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"they are written for x86-64, this is {platform.machine()}"
    for package in ("torch", "pybind11"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed where this builds: run `make setup`, or pip with --no-build-isolation"
    return None


class BuildCsrc(build_ext):
    """Compiles each file with its own flags, two at a time, and only what changed."""

    def run(self) -> None:
        reason = missing()
        try:
            if reason is None:
                super().run()
        except Exception as error:  # whatever a compiler or its absence raises: the install goes on without kernels
            reason = " ".join(str(error).split()) or type(error).__name__
        if reason is not None:
            if os.environ.get("MISS_BUILD_CSRC") == "1":
                raise SystemExit(f"MISS_BUILD_CSRC=1, but the CPU kernels cannot be built: {reason}")
            self.extensions = []
            print(f"miss-engine: installed without its CPU kernels, PyTorch's run instead: {reason}", file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)[0]
        if shutil.which(compiler) is None:
            raise FileNotFoundError(f"no C++17 compiler is found: {compiler} (the variable CXX names another)")
        import pybind11
        import torch

        root = Path(torch.__file__).parent
        includes = [str(root / "include"), pybind11.get_include(), str(CSRC), *self.compiler.include_dirs]
        sanitize = SANITIZE if os.environ.get("MISS_SANITIZE") == "1" else []
        headers = max(p.stat().st_mtime for p in [*CSRC.rglob("*.h"), Path(__file__)])

        def build(source: str) -> str:
            target = Path(self.build_temp, source).with_suffix(".o")
            newest = max(headers, Path(source).stat().st_mtime)
            if self.force or not target.exists() or target.stat().st_mtime < newest:
                flags = [*COMMON, *INSTRUCTIONS.get(Path(source).stem, []), *sanitize]
                macros = [("TORCH_TARGET_VERSION", "0x020b000000000000")]
                self.compiler.compile([source], self.build_temp, macros, includes, extra_postargs=flags)
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(build, ext.sources))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["torch_cpu"],
            library_dirs=[str(root / "lib")],
            extra_postargs=sanitize,
            target_lang="c++",
        )


sources = sorted(map(str, [*CSRC.glob("*.cpp"), *(CSRC / "cpu").glob("*.cpp")]))
setup(ext_modules=[Extension("miss.kernels._C", sources, optional=False)], cmdclass={"build_ext": BuildCsrc})
