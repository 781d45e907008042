"""Which implementation of an operation runs: one table an operation, one rule, one way to ask why.

Knows tensors, devices and installed packages; does not know models, requests or files.

An operation lists its implementations from the fastest to the plainest; the first whose needs the machine and the
arguments meet is run. Above the reference stands a `torch` row: what a good PyTorch programmer would write. The
reference comes last, needs nothing, takes float64 and is what every other implementation is tested against.

Force one with `with use(layer_norm="reference"):` or `MISS_KERNELS=layer_norm=reference,attention=torch`.

Forced, a GPU kernel of ours always runs; by itself only where a record shows it correct and faster (evidence.py).
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miss.kernels import evidence
from miss.kernels.evidence import Target, Verdict
from miss.kernels.forcing import BACKWARD, Forced
from miss.kernels.shape_classes import signature

FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})
ALL_FLOATS = FLOATS | {torch.float64}
HALVES = frozenset({torch.float16, torch.bfloat16})

OPS: dict[str, "Op"] = {}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What an operation accumulates in: float64 in float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: choosing is on the path of every call
class Impl:
    """One implementation and what it needs.

    `run` imports the module that holds it, so that what this machine cannot run is never imported.
    `composite` says that it is made of PyTorch operations alone: autograd sees through it, so that a call that needs
    gradients may run it directly instead of going through the opaque custom operator.
    `sources` says that it is a GPU kernel of ours: the modules of miss.kernels that it is made of ("ema.triton_impl"),
    whose hash its evidence holds.
    """

    name: str
    run: Callable[..., Any]
    device: str | None = None
    capability: tuple[int, int] = (0, 0)
    before: tuple[int, int] | None = None  # the first capability that it has no code for
    dtypes: frozenset[torch.dtype] = FLOATS
    requires: str | None = None  # a module that must be installed
    needs: Callable[[], str | None] | None = None  # of the machine, once a process: None, or what is missing
    limits: Callable[..., str | None] | None = None  # shapes, strides, options: None, or why not
    composite: bool = False
    sources: tuple[str, ...] = ()


def lazy(module: str, function: str) -> Callable[..., Any]:
    """`function` of miss.kernels.`module`, imported at the first call: `Impl("cpu", lazy("linear.cpu_impl", …))`."""
    found: list[Callable[..., Any]] = []

    def run(*args: Any) -> Any:
        if not found:
            found.append(getattr(importlib.import_module(f"miss.kernels.{module}"), function))
        return found[0](*args)

    return run


def triton(
    module: str,
    function: str,
    limits: Callable[..., str | None] | None = None,
    dtypes: frozenset[torch.dtype] = FLOATS,
    capability: tuple[int, int] = (8, 0),
) -> Impl:
    """The `triton` row of a table: `function` of miss.kernels.`module`, for GPUs of `capability` and above."""
    return Impl(
        "triton",
        lazy(module, function),
        device="cuda",
        capability=capability,
        dtypes=dtypes,
        requires="triton",
        limits=limits,
        sources=(module,),
    )


def load_all() -> None:
    """Imports every operation's folder, so that all tables are registered, and checks MISS_KERNELS against them.

    Raises:
        ValueError: MISS_KERNELS names an operation or an implementation that does not exist.
    """
    floor = importlib.import_module("miss.kernels")
    for module in pkgutil.iter_modules(floor.__path__):
        if module.ispkg:
            importlib.import_module(f"miss.kernels.{module.name}")
    _forced.check_complete()


_forced = Forced(OPS, os.environ.get("MISS_KERNELS", ""))


def forced(op: str) -> str | None:
    """The implementation that `use()` or MISS_KERNELS asks for; None where the choice is free."""
    return _forced.get(op)


def environment() -> dict[str, str]:
    """What MISS_KERNELS asks for."""
    return dict(_forced.environment)


@contextlib.contextmanager
def use(**choice: str) -> Iterator[None]:
    """Run the named implementations inside this block, in every thread: `with use(layer_norm="reference"): …`

    Forcing `op` forces its backward table (`op_backward`) too wherever that has an implementation of the name.

    Raises:
        ValueError: an operation or implementation of that name is not known.
    """
    _forced.push(choice)
    try:
        yield
    finally:
        _forced.remove(choice)


Watcher = Callable[["Op", tuple[Any, ...], Impl | None], None]
_watchers: list[Watcher] = []


@contextlib.contextmanager
def watch(watcher: Watcher) -> Iterator[None]:
    """Calls `watcher(op, arguments, chosen)` at every choice inside this block; chosen is None where nothing fits."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


Wrapper = Callable[["Op", Impl, tuple[Any, ...], Callable[[], Any]], Any]
_wrappers: list[Wrapper] = []


@contextlib.contextmanager
def around(wrapper: Wrapper) -> Iterator[None]:
    """Inside this block every run of an implementation is `wrapper(op, implementation, arguments, run)`, which calls
    `run()` and returns what came of it: for profilers. An operation that is made of others wraps those too."""
    _wrappers.append(wrapper)
    try:
        yield
    finally:
        _wrappers.remove(wrapper)


def _wrapped(op: "Op", impl: Impl, args: tuple[Any, ...], run: Callable[[], Any]) -> Any:
    return _wrappers[-1](op, impl, args, run) if _wrappers else run()


_pretended: Target | None = None


@contextlib.contextmanager
def pretend(target: Target) -> Iterator[None]:
    """Inside this block every choice is made as for tensors on that GPU, wherever they are; what is chosen and cannot
    run where they are is computed by the reference in its place. For explanations: one block at a time."""
    global _pretended
    _pretended = target
    try:
        yield
    finally:
        _pretended = None


@functools.cache
def _target(device: torch.device) -> Target:
    return Target(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def _absent(module: str) -> str | None:
    """Why a module cannot be imported; None where it is there. Of "package.module" the package is imported for it."""
    package = module.partition(".")[0]
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        if error.name != package:
            return f"the package {package} cannot be imported: {error}"
        found = False
    except Exception as error:  # a package built for another PyTorch raises what it likes
        return f"the package {package} cannot be imported: {type(error).__name__}: {error}"
    return None if found else f"needs the package {module}, which is not installed"


def _wrong_device(impl: Impl, where: torch.device | Target, dtype: torch.dtype) -> str | None:
    kind = where.type if isinstance(where, torch.device) else "cuda"
    if impl.device is not None and kind != impl.device:
        return f"needs a {impl.device} tensor, got {kind}"
    if kind == "cuda":
        capability = (_target(where) if isinstance(where, torch.device) else where).capability
        if capability < impl.capability:
            return f"needs compute capability {impl.capability}, got {capability}"
        if impl.before is not None and capability >= impl.before:
            return f"needs compute capability below {impl.before}, got {capability}"
    if dtype not in impl.dtypes:
        return f"does not take {str(dtype).removeprefix('torch.')}"
    return None


@functools.cache
def _misfit(impl: Impl, where: torch.device | Target, dtype: torch.dtype) -> str | None:
    """Why `impl` cannot serve this device and dtype; None where it can."""
    reason = _wrong_device(impl, where, dtype)
    if reason is None and impl.requires is not None:
        reason = _absent(impl.requires)
    if reason is None and impl.needs is not None:
        reason = impl.needs()
    return reason


@functools.cache
def _serving(op: "Op", where: torch.device | Target, dtype: torch.dtype) -> tuple[Impl, ...]:
    """The rows for this device and dtype, so that a call asks the others nothing. Packages are looked for only where a
    row's turn comes: to find some, they must be imported."""
    return tuple(impl for impl in op.impls if _wrong_device(impl, where, dtype) is None)


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    return next(a for a in args if isinstance(a, Tensor))


class Op:
    """An operation and its implementations, the fastest first and the reference last."""

    def __init__(self, name: str, *impls: Impl) -> None:
        assert impls[-1].name == "reference", f"{name}: the last implementation must be the reference"
        assert name not in OPS, f"{name} is registered twice"
        assert len({i.name for i in impls}) == len(impls), f"{name}: two implementations of one name"
        self.name, self.impls = name, impls
        self.names = [i.name for i in impls]
        _forced.check_environment(self)
        OPS[name] = self

    def why_not(self, impl: Impl, *args: Any) -> str | None:
        """Why the choice passes over `impl`; None where it would run (device and dtype are the first tensor's)."""
        first = args[0] if isinstance(args[0], Tensor) else _first_tensor(args)
        reason = _misfit(impl, first.device if _pretended is None else _pretended, first.dtype)
        if reason is None and impl.limits is not None:
            reason = impl.limits(*args)
        if reason is None and impl.sources and _forced.get(self.name) is None:
            reason = self.verdict(impl, *args).reason
        return reason

    def cannot(self, impl: Impl, *args: Any) -> str | None:
        """Why `impl` cannot serve these arguments, whatever the evidence says; None where it can."""
        with use(**{self.name: impl.name}):
            return self.why_not(impl, *args)

    def verdict(self, impl: Impl, *args: Any) -> Verdict:
        """What the evidence says of a GPU kernel of ours at these arguments, on their GPU."""
        target = _target(_first_tensor(args).device) if _pretended is None else _pretended
        gradient = (
            torch.is_grad_enabled()
            and self.name + BACKWARD in OPS
            and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        )
        return evidence.judge(self.name, impl.name, impl.sources, target, signature(args), gradient)

    def select(self, *args: Any) -> Impl:
        """The implementation that runs for these arguments.

        Raises:
            NotImplementedError: none fits (or the forced one does not); the message gives each one's reason.
        """
        forced = _forced.get(self.name)
        first = args[0] if isinstance(args[0], Tensor) else _first_tensor(args)
        where, dtype = first.device if _pretended is None else _pretended, first.dtype
        for impl in _serving(self, where, dtype):
            if forced is not None and forced != impl.name:
                continue
            if _misfit(impl, where, dtype) or (impl.limits is not None and impl.limits(*args)):
                continue
            if impl.sources and forced is None and self.verdict(impl, *args).reason:
                continue
            chosen = impl
            break
        else:
            chosen = None
        for watcher in _watchers:
            watcher(self, args, chosen)
        if chosen is None:
            raise NotImplementedError(self.explain(*args))
        if _pretended is not None and (chosen.device, chosen.requires) != (None, None):
            return self.impls[-1]
        return chosen

    def candidates(self, *args: Any) -> list[tuple[Impl, str | None]]:
        """Every implementation, the fastest first, with why it cannot run (None where it can)."""
        return self._rows(lambda impl: self.why_not(impl, *args))

    def here(self, device: torch.device, dtype: torch.dtype) -> list[tuple[Impl, str | None]]:
        """The same before arguments are known: what an implementation's `limits` say of shapes is left out, and of
        the evidence it is asked whether there is a shape at which it speaks for the implementation."""

        def why_not(impl: Impl) -> str | None:
            reason = _misfit(impl, device, dtype)
            if reason is None and impl.sources and _forced.get(self.name) is None:
                return evidence.on_record(self.name, impl.name, impl.sources, _target(device)).reason
            return reason

        return self._rows(why_not)

    def _rows(self, why_not: Callable[[Impl], str | None]) -> list[tuple[Impl, str | None]]:
        forced = _forced.get(self.name)
        rows = []
        for impl in self.impls:
            reason = why_not(impl)
            if not reason and forced not in (None, impl.name):
                reason = f"not asked for: {forced} is forced"
            rows.append((impl, reason))
        return rows

    def explain(self, *args: Any) -> str:
        """A line an implementation, the first that fits being the one that runs, or why it cannot."""
        shown = ", ".join(
            f"{tuple(a.shape)} {str(a.dtype).removeprefix('torch.')} {a.device}" for a in args if isinstance(a, Tensor)
        )
        lines = [f"  {impl.name:<10} {reason or 'fits'}" for impl, reason in self.candidates(*args)]
        return "\n".join([f"{self.name}({shown}):", *lines])

    def __call__(self, *args: Any) -> Any:
        return self._run(self.select(*args), args)

    def with_autocast(self, *args: Any) -> Any:
        """The same as a call, but under autocast it stays on: for an operation whose composed row leaves it to its
        parts to cast what is to be cast."""
        impl = self.select(*args)
        return _wrapped(self, impl, args, lambda: impl.run(*args))

    def _run(self, impl: Impl, args: tuple[Any, ...]) -> Any:
        return _wrapped(self, impl, args, lambda: self._run_plainly(impl, args))

    def _run_plainly(self, impl: Impl, args: tuple[Any, ...]) -> Any:
        """Runs with autocast off: the public function has cast what is to be cast, and an implementation that turns to
        float32 for accuracy must not have its products turned back."""
        device = _first_tensor(args).device.type
        if not torch.is_autocast_enabled(device):
            return impl.run(*args)
        with torch.autocast(device, enabled=False):
            return impl.run(*args)

    def call(self, custom_op: Callable[..., Any], *args: Any) -> Any:
        """The way a public function runs its operation.

        Directly where nothing is recorded or autograd sees through the chosen implementation (a custom operator costs
        about 9 us a call on CPU); through the custom operator where gradients need its backward, or under
        torch.compile, which must see one opaque node instead of this choice.
        """
        if torch.compiler.is_compiling():
            return custom_op(*args)
        impl = self.select(*args)
        if impl.composite or not (
            torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        ):
            return self._run(impl, args)
        return custom_op(*args)


def autocast_to(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """Under autocast, floating tensors in `dtype` (the autocast dtype where None); unchanged outside of it.

    Linears, attention and MLP take the autocast dtype; norms and losses pass `dtype=torch.float32`.
    float64 is left alone, as PyTorch's own autocast does.
    """
    first = next((t for t in tensors if t is not None), None)
    if first is None or not torch.is_autocast_enabled(first.device.type):
        return tensors
    target = dtype or torch.get_autocast_dtype(first.device.type)
    return tuple(
        t.to(target) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )
