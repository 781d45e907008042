"""Builds and runs csrc/tests/ under the address and undefined-behaviour sanitizers, and by `make sanitize` the kernels'
own tests too, on a build of its own in build/sanitize.

    python -m tests.sanitize            everything: the checks of every instruction set, then tests/kernels
    python -m tests.sanitize checks     the checks alone
    python -m tests.sanitize tests …    the tests alone, with pytest's arguments
"""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "build" / "sanitize"
NOT_SUPPORTED = 77  # the exit code of a check whose instruction set the processor lacks
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}
# What torch.compile and processes of their own do under the sanitizers is not ours to find out.
NOT_THESE = "not compiles and not opcheck and not test_isa and not sanitize and not environment"


def setup_names() -> dict[str, Any]:
    """What setup.py defines: the flags of each instruction set, and why csrc/ cannot be built."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def compiler() -> str | None:
    """The C++ compiler's path; None where there is none."""
    named = os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "g++").split()[0]
    return shutil.which(named) or shutil.which("g++")


def build_checks(isa: str, folder: Path, extra: Sequence[str] = ()) -> Path:
    """The program of csrc/tests/ for one instruction set. Without PyTorch: parallel.cpp's place takes serial.cpp.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's.
    """
    names = setup_names()
    program = folder / f"checks_{isa}"
    # -O0 last: an instruction set's kernels compile in 5 s so, in 15 s at -O1; the checks then run 4 s instead of 2.
    flags = [
        *names["COMMON"],
        *names["INSTRUCTIONS"][isa],
        *names["SANITIZE"],
        "-fsanitize-address-use-after-scope",
        "-O0",
        *extra,
    ]
    sources = [f"csrc/cpu/{isa}.cpp", "csrc/cpu/isa.cpp", *sorted(str(p) for p in (ROOT / "csrc/tests").glob("*.cpp"))]
    command = [str(compiler()), *flags, "-Icsrc", f"-DMISS_ONE_ISA={isa}", "-o", str(program), *sources]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-8000:]}")
    return program


def run_checks(program: Path, names: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Exit code 0: all held. NOT_SUPPORTED: the processor lacks the instruction set."""
    return subprocess.run([str(program), *names], env={**os.environ, **OPTIONS}, capture_output=True, text=True)


def all_checks() -> bool:
    """Every instruction set's checks, one after the other; whether none failed."""
    HERE.mkdir(parents=True, exist_ok=True)
    fine = True
    for isa in setup_names()["INSTRUCTIONS"]:
        done = run_checks(build_checks(isa, HERE))
        says = {0: "clean", NOT_SUPPORTED: "this processor does not have it"}.get(done.returncode, "FAILED")
        print(f"checks for {isa}: {says}", flush=True)
        if says == "FAILED":
            print(done.stdout[-4000:] + done.stderr[-8000:])
            fine = False
    return fine


def tree() -> Path:
    """A copy of what the kernels' tests need, with a sanitized build in it: the normal one stays as it is."""
    copy = HERE / "tree"
    for name in ("csrc", "kernels", "miss", "tests"):
        shutil.rmtree(copy / name, ignore_errors=True)
        # copy2 keeps the times, so that only what changed is compiled again.
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy2(ROOT / name, copy / name)
    for name in ("engine", "models", "benchmarks", "checkpoints"):
        if not (copy / name).exists():
            (copy / name).symlink_to(ROOT / name)
    environment = {**os.environ, "MISS_SANITIZE": "1", "MISS_BUILD_CSRC": "1"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=copy, env=environment, check=True)
    return copy


def preloaded() -> dict[str, str]:
    """The environment in which Python, which is not built for it, runs code that is: its libraries come first."""
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        found = subprocess.run([str(compiler()), f"-print-file-name={name}"], capture_output=True, text=True)
        libraries.append(str(Path(found.stdout.strip()).resolve()))
    return {**OPTIONS, "LD_PRELOAD": " ".join(libraries), "PYTHONMALLOC": "malloc", "OMP_NUM_THREADS": "2"}


def run_tests(arguments: Sequence[str]) -> bool:
    """tests/kernels under the sanitizers; whether they passed. Tensors lie on the heap, in blocks of their own size.

    Not pytest's usual capture: what the sanitizer writes as it ends the process would be lost with it.
    """
    copy = tree()
    asked = list(arguments) or ["tests/kernels", "-k", NOT_THESE]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--capture=sys", *asked]
    return subprocess.run(command, cwd=copy, env={**os.environ, **preloaded()}).returncode == 0


def main(arguments: Sequence[str]) -> int:
    if compiler() is None:
        print("sanitize: no C++ compiler is found: install g++, or name one in the variable CXX", file=sys.stderr)
        return 1
    what, *rest = arguments or ["all"]
    fine = what == "tests" or all_checks()
    if fine and what != "checks":
        fine = run_tests(rest)
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
