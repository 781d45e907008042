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
from collections.abc import Iterable
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
# Without use-after-scope, which csrc/tests has: with it an instruction set's kernels take 33 s to compile, not 17.
SANITIZE = [
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize-address-use-after-scope"),
    *("-fno-omit-frame-pointer", "-g1", "-O1"),
]


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


def newest(files: Iterable[str | Path]) -> float:
    """When the last of the files, the headers and this file was changed."""
    return max(Path(p).stat().st_mtime for p in [*files, *(CSRC / "cpu").glob("*.h"), Path(__file__)])


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
            for ext in self.extensions:
                built = Path(self.get_ext_fullpath(ext.name))
                if built.exists() and built.stat().st_mtime < newest(ext.sources):
                    built.unlink()  # of older sources: it may lack operations that Python asks for
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
        # Not build_temp: an editable install makes that anew each time, and would compile everything again.
        objects = Path("build", f"csrc-{self.plat_name}-{sys.implementation.cache_tag}-torch{torch.__version__}")
        objects = objects.with_name(objects.name + "-sanitize" * bool(sanitize))

        def build(source: str) -> str:
            target = Path(objects, source).with_suffix(".o")
            if self.force or not target.exists() or target.stat().st_mtime < newest([source]):
                flags = [*COMMON, *INSTRUCTIONS.get(Path(source).stem, []), *sanitize]
                macros = [("TORCH_TARGET_VERSION", "0x020b000000000000")]
                try:
                    self.compiler.compile([source], str(objects), macros, includes, extra_postargs=flags)
                except Exception as error:
                    raise RuntimeError(f"{compiler} does not compile {source}; its own messages say why") from error
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = list(pool.map(build, ext.sources))
        self.compiler.link_shared_object(
            compiled,
            self.get_ext_fullpath(ext.name),
            libraries=["torch_cpu"],
            library_dirs=[str(root / "lib")],
            extra_postargs=sanitize,
            target_lang="c++",
        )


sources = sorted(map(str, [*CSRC.glob("*.cpp"), *(CSRC / "cpu").glob("*.cpp")]))
setup(ext_modules=[Extension("miss.kernels._C", sources, optional=False)], cmdclass={"build_ext": BuildCsrc})
