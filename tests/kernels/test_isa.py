"""Every operation's `cpu` row under every instruction set that this processor has, each in a process of its own.

An operation takes part by having a `cpu` row and a line in `miss explain`'s calls(), which tests/cli/test_explain.py
asks for; one that does not fit the error rule's usual slack gets a line in SLACK.
"""

import contextlib
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from miss.cli import explain
from miss.kernels import extension, registry
from miss.kernels.registry import OPS, Impl, Op
from tests.helpers import assert_as_good_as, route, run_python

SUPPORTED = [] if isinstance(extension._module(), str) else extension._module().supported()
SLACK: dict[str, float] = {}
# A gelu that is good for codes: one code in a thousand is the next, and a row's scale 5e-5 of itself off.
LEAST = {("quant_linear_rows_quantised", torch.uint8): 1.0, ("quant_linear_rows_quantised", torch.float32): 1e-4}
Run = tuple[Op, tuple[Any, ...]]


def shapes(dtype: torch.dtype, head: int) -> explain.Shapes:
    """Sizes that fill no vector, panel or tile; `head` is 32 or 64."""
    sizes = SimpleNamespace(
        vision=SimpleNamespace(hidden_size=3 * head, num_heads=3, intermediate_size=197, patch_size=7),
        encoder=SimpleNamespace(hidden_size=2 * head, num_heads=2),
        decoder=SimpleNamespace(vocab_size=391),
        preprocess=SimpleNamespace(image_size=42),
    )
    return explain.Shapes(sizes, dtype, torch.device("cpu"))  # type: ignore[arg-type]


def change(value: Any, function: Callable[[Any], Any]) -> Any:
    """`function` of each tensor and dtype in nested tuples."""
    if isinstance(value, Tensor | torch.dtype):
        return function(value)
    if isinstance(value, tuple):
        items = [change(v, function) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Clones with the strides that they have, without gradients."""

    def clone(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        fresh = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        return fresh.copy_(value) if 0 not in value.stride() else value.clone()

    return change(args, clone)


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    def double(value: Any) -> Any:
        floating = value.is_floating_point() if isinstance(value, Tensor) else value.is_floating_point
        return value if not floating else value.double() if isinstance(value, Tensor) else torch.float64

    return change(args, double)


def runs(dtype: torch.dtype, head: int) -> list[Run]:
    """Every choice that `miss explain`'s calls, forward and backward, come to where there is a `cpu` row.

    Through the custom operators, which are what comes to the backward table of a composite row too.
    """
    found: dict[tuple[str, str], Run] = {}
    for name, call in explain.calls(shapes(dtype, head)).items():

        def watcher(op: Op, args: tuple[Any, ...], chosen: Impl | None, name: str = name) -> None:
            if "cpu" in op.names and (name, op.name) not in found:
                found[name, op.name] = op, copied(args)

        with registry.watch(watcher), contextlib.ExitStack() as stack:
            for op in OPS.values():
                if any(impl.name == "cpu" and impl.composite for impl in op.impls):
                    stack.enter_context(route("custom", op))
            explain.observe(call)
    return list(found.values())


def outcome(op: Op, row: str, args: tuple[Any, ...]) -> list[Tensor | None]:
    """The results (None where a row keeps nothing), and the tensors of the arguments as they were left: some operations
    write into them."""
    impl = next(i for i in op.impls if i.name == row)
    results = impl.run(*args)
    left: list[Tensor | None] = []
    change(args, lambda v: left.append(v) if isinstance(v, Tensor) else None)
    flat: list[Tensor | None] = []
    for result in results if isinstance(results, tuple) else (results,):
        flat += result if isinstance(result, tuple) else [result]
    return flat + left


def compare(op: Op, args: tuple[Any, ...]) -> None:
    got, plainer = outcome(op, "cpu", copied(args)), "torch" if "torch" in op.names else "composed"
    plain, exact = outcome(op, plainer, copied(args)), outcome(op, "reference", in_float64(copied(args)))
    for i, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
        if g is None or p is None or e is None:
            continue
        if p.shape == e.shape or i == 0:  # what a row keeps for its own backward may differ
            least = LEAST.get((op.name, g.dtype), 2e-6)
            assert_as_good_as(g, p, e, SLACK.get(op.name, 2.0), least, f"{op.name}, {g.dtype}, result {i}")


def check() -> None:
    """What a process of one instruction set does. Every row has to run at least once."""
    assert extension.isa() == os.environ["MISS_CPU_ISA"]
    registry.load_all()
    wanted = {op.name: "never called" for op in OPS.values() if "cpu" in op.names}
    for dtype in (torch.float32, torch.bfloat16):
        for head in (32, 64):
            torch.manual_seed(head)
            for op, args in runs(dtype, head):
                if reason := op.why_not(next(i for i in op.impls if i.name == "cpu"), *args):
                    wanted[op.name] = wanted[op.name] and reason
                    continue
                compare(op, args)
                wanted[op.name] = ""
    refused = {name: reason for name, reason in wanted.items() if reason}
    assert not refused, f"rows that none of explain's calls reached: {refused}"
    print(f"{len(wanted)} operations")


@pytest.mark.skipif(not SUPPORTED, reason=str(extension._module()))
@pytest.mark.parametrize("isa", SUPPORTED)
def test_every_cpu_row(isa):
    code = """
import pytest
from tests.kernels import test_isa
test_isa.check()
raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/kernels/test_vectors.py"]))
"""
    done = run_python(code, MISS_CPU_ISA=isa, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " skipped" not in done.stdout
