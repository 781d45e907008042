"""The one door to csrc/: whether it is built, for which instruction sets, which one runs, and its operations.

Knows the compiled module; does not know what its kernels compute.

`ops()` are the operations that csrc/cpu/ registers with PyTorch (`torch.ops.miss_cpu`), without autograd or fakes: an
operation of kernels/ stands in front of each.
"""

import functools
import importlib
import importlib.util
import os
import platform
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

X86 = ("x86_64", "amd64")
BUILD = (
    "install a C++17 compiler (g++), then run `make -B setup`, or `pip install --no-build-isolation -e .` where "
    "PyTorch and pybind11 are installed; with MISS_BUILD_CSRC=1 it fails and says why"
)


@dataclass(frozen=True)
class Report:
    """What is compiled and what of it this processor runs; `reason` says why nothing does, else None."""

    processor: str
    features: list[str]
    built: list[str]
    supported: list[str]
    isa: str | None
    reason: str | None


def buildable() -> bool:
    """Whether the kernels are written for this kind of processor."""
    return platform.machine().lower() in X86


@functools.cache
def _module() -> ModuleType | str:
    """The compiled module, or why there is none."""
    if importlib.util.find_spec("miss.kernels._C") is None:
        if not buildable():
            return f"the CPU kernels are written for x86-64, this is {platform.machine()}"
        return "the CPU kernels are not built (`miss doctor` says how)"
    try:
        return importlib.import_module("miss.kernels._C")
    except ImportError as error:  # built against another PyTorch or Python
        return f"the CPU kernels do not load and want to be built again (`miss doctor` says how): {error}"


@functools.cache
def missing() -> str | None:
    """Why no CPU kernel of ours runs here; None where they do.

    Raises:
        ValueError: MISS_CPU_ISA asks for an instruction set that this processor does not have.
    """
    module = _module()
    if isinstance(module, str):
        return module
    try:
        module.isa()
    except ValueError as error:
        if os.environ.get("MISS_CPU_ISA"):
            raise
        return str(error)
    return None


def isa() -> str | None:
    """The instruction set in use: avx2, avx512f, avx512_vnni, avx512_bf16; None where `missing` gives a reason."""
    module = _module()
    return None if missing() is not None or isinstance(module, str) else str(module.isa())


def report() -> Report:
    """What `miss doctor` and `miss kernels list` show."""
    module, reason = _module(), missing()
    if isinstance(module, str):
        return Report("", [], [], [], None, reason)
    return Report(module.processor(), module.features(), module.built(), module.supported(), isa(), reason)


def ops() -> Any:
    """`torch.ops.miss_cpu`, loaded.

    Raises:
        NotImplementedError: the kernels are not built or do not run here.
    """
    reason = missing()
    if reason is not None:
        raise NotImplementedError(reason)
    return torch.ops.miss_cpu


def decoder_runner(*description: Any) -> Any:
    """A `DecoderRunner` of csrc/cpu/decoder_runner.h.

    Raises:
        NotImplementedError: the kernels are not built or do not run here.
    """
    reason, module = missing(), _module()
    if reason is not None or isinstance(module, str):
        raise NotImplementedError(reason)
    return module.DecoderRunner(*description)


def trim() -> None:
    """Gives memory that was freed back to the system, where the kernels are built and the C library can."""
    module = _module()
    if not isinstance(module, str):
        module.trim()
