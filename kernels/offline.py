"""Compiles every Triton kernel ahead of time, for GPUs that are not here: triton's second door.

Finds the cases of every kernels/*/triton_impl.py and triton_*_impl.py by itself, compiles each to the machine code that
would be loaded, and reads registers, spills and tensor core instructions from it with the two tools that Triton brings
along (cuobjdump, nvdisasm). Knows cases; does not know what their kernels compute, nor what a good figure is
(kernels/compiled.py). Compiled is not run: nothing here shows that a kernel is right or fast.
"""

import ast
import contextlib
import functools
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from miss.kernels.compiled import ARCHS, Key, Row
from miss.kernels.launches import Case

VERSION: str = triton.__version__


@dataclass(frozen=True)
class Found:
    """A case, and the module that yields it: another process finds it again by these."""

    module: str
    case: Case


@dataclass(frozen=True)
class Failure:
    """A case that does not compile."""

    key: Key
    reason: str


def modules() -> list[str]:
    """Every module of kernels/ that may hold Triton kernels: "ema.triton_impl"."""
    files = [f for f in Path(__file__).parent.glob("*/triton_*.py") if f.stem.endswith("_impl")]
    return sorted(f"{f.parent.name}.{f.stem}" for f in files)


def find() -> list[Found]:
    """Every case of every module; a case that two modules yield, once.

    Raises:
        ValueError: Triton interprets in this process, or two cases have one name.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ValueError("TRITON_INTERPRET is set: Triton then interprets kernels and compiles none; unset it")
    found: dict[tuple[str, str], Found] = {}
    for module in modules():
        for case in _cases(module):
            first = found.setdefault((case.op, case.name), Found(module, case))
            if first.case != case:
                name = f"{case.op} {case.name}"
                raise ValueError(f"{module}: a second case named {name}, other than that of {first.module}: rename one")
    return list(found.values())


def _cases(module: str) -> list[Case]:
    """What its own `cases()` yields; nothing where it has none, or imports another's."""
    cases = getattr(importlib.import_module(f"miss.kernels.{module}"), "cases", None)
    return list(cases()) if cases is not None and cases.__module__ == f"miss.kernels.{module}" else []


def compiles_for(case: Case, arch: str) -> bool:
    """Whether a case is meant for an architecture: named in it, or, of those that no case names, newer than one."""
    return arch in case.archs or (arch not in ARCHS and _number(arch) > min(map(_number, case.archs)))


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def fingerprint(case: Case) -> str:
    """Hash of the kernel's source, of every function and constant that it names, and of the case's fields.

    Not of whole files: a change of what runs on the host alone leaves the machine code, and this, as it was.
    """
    parts: dict[str, str] = {}
    _gather(case.kernel.fn, parts)
    for value in case.constants.values():
        if isinstance(function := getattr(value, "fn", None), FunctionType):
            _gather(function, parts)
    constants = {name: _plain(value) for name, value in case.constants.items()}
    launch = (case.launch.num_warps, case.launch.num_stages, case.default)
    fields = [*case.signature.items()], sorted(constants.items()), sorted(case.divisible), launch
    return hashlib.sha256(json.dumps([parts, fields], sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any) -> str:
    function = getattr(value, "fn", None)
    return function.__qualname__ if isinstance(function, FunctionType) else str(getattr(value, "value", value))


def _gather(function: FunctionType, parts: dict[str, str]) -> None:
    """Adds a function's source by its name, and all that its body names; Triton's own functions are its version's."""
    name = f"{function.__module__}.{function.__qualname__}"
    if name in parts or function.__module__.split(".")[0] == "triton":
        return
    parts[name] = textwrap.dedent(inspect.getsource(function))
    for node in ast.walk(ast.parse(parts[name])):
        if not isinstance(node, ast.Name | ast.Attribute):
            continue
        value = _named(node, function.__globals__)
        # Only what is jitted too: a kernel's own name may be that of a function of the host beside it.
        if isinstance(inner := getattr(value, "fn", None), FunctionType):
            _gather(inner, parts)
        elif isinstance(value, int | float | str | triton.language.constexpr | triton.language.dtype):
            parts[f"{function.__module__}: {ast.unparse(node)}"] = _plain(value)


def _named(node: ast.expr, names: dict[str, Any]) -> Any:
    """What a name, or a module's attribute, stands for; None where that is only known at run time."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(module := _named(node.value, names), ModuleType):
        return getattr(module, node.attr, None)
    return None


def compile_case(case: Case, arch: str) -> Row:
    """Compiles a case (in Triton's cache, where it was compiled before) and reads what it takes.

    Raises:
        ValueError: the case does not fit its kernel's arguments.
        Exception: whatever Triton raises for a kernel that it cannot compile.
    """
    names = case.kernel.arg_names
    if wrong := (set(names) ^ {*case.signature, *case.constants}) | (set(case.divisible) - set(case.signature)):
        raise ValueError(f"the kernel's arguments and the case's do not agree on {', '.join(sorted(wrong))}")
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs=dict(case.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in case.divisible},
    )
    # Fusing multiplications and additions is the default up to 3.9, which warns of its end where it is not asked for.
    options = {"num_warps": case.launch.num_warps, "num_stages": case.launch.num_stages, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=GPUTarget("cuda", _number(arch), 32), options=options)
    registers, spill, tensor = read_cubin(kernel.asm["cubin"])
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    return Row(
        case.op, case.name, arch, fingerprint(case), case.default, warps, registers, spill, shared, tensor
    )  # fmt: skip


def read_cubin(cubin: bytes) -> tuple[int, int, dict[str, int]]:
    """Registers and bytes of stack and local memory a thread, and how often each tensor core instruction occurs.

    The tools come with Triton. Its ptxas, which would say the same while compiling, refuses 3.9's own PTX.
    """
    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools.cuobjdump.path, "-res-usage", file.name)
        code = _output(tools.nvdisasm.path, "-c", file.name)
    used = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    if used is None:
        raise ValueError(f"cuobjdump -res-usage names no registers: {usage[:200]!r}")
    registers, stack, local = map(int, used.groups())
    return registers, stack + local, dict(sorted(Counter(re.findall(r"(?<![.\w])[A-Z]+MMA\b", code)).items()))


def _output(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"{Path(command[0]).name}: {result.stderr.strip()[:300]}")
    return result.stdout


@functools.cache
def _by_name(module: str) -> dict[tuple[str, str], Case]:
    return {(case.op, case.name): case for case in _cases(module)}


def _one(module: str, key: Key) -> Row | Failure:
    op, name, arch = key
    try:
        return compile_case(_by_name(module)[op, name], arch)
    except Exception as error:  # a compiler raises what it likes; one kernel's fault is not the others'
        return Failure(key, " ".join(f"{type(error).__name__}: {error}".split())[:500])


def compile_all(work: Iterable[tuple[Found, str]], jobs: int) -> Iterator[Row | Failure]:
    """Each case for its architecture, as they are done, in `jobs` processes that share Triton's cache of this user."""
    calls = [(found.module, (found.case.op, found.case.name, arch)) for found, arch in work]
    if jobs == 1 or len(calls) < 4:  # a process takes as long to start as two kernels to compile
        yield from (_one(*call) for call in calls)
        return
    # Started anew: a process that was forked from one in which PyTorch's threads run may hang.
    pool = ProcessPoolExecutor(min(jobs, len(calls)), multiprocessing.get_context("spawn"))
    try:
        yield from (future.result() for future in as_completed([pool.submit(_one, *call) for call in calls]))
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def compiling(say: Callable[[bool], None]) -> Iterator[None]:
    """Inside this block says True as Triton begins to compile a kernel that is launched, False when it has; one that
    does not compile raises in place of the latter."""
    knobs = triton.knobs.runtime
    before = knobs.jit_cache_hook, knobs.jit_post_compile_hook
    # What the first one gives back would tell Triton to leave the compiling to it.
    knobs.jit_cache_hook, knobs.jit_post_compile_hook = lambda **_: say(True), lambda **_: say(False)
    try:
        yield
    finally:
        knobs.jit_cache_hook, knobs.jit_post_compile_hook = before
