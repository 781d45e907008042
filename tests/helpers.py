"""What tests of several floors share: the error rule, routes through an operation, and where the real data is."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.registry import Op, use

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ROOT.parent / "shared" / "data"
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]
CPU_ROUTES = [] if extension.missing() else ["cpu"]  # the compiled kernels, where they are built
Outputs = Tensor | tuple[Tensor, ...]


def assert_as_good_as(
    got: Tensor, plain: Tensor, exact: Tensor, slack: float = 2.0, floor: float = 1e-6, what: str = "result"
) -> None:
    """`got` may err from the truth `exact` at most `slack` times as much as `plain` does, plus a tiny absolute term.

    Args:
        got: ours. plain: what plain PyTorch gives in the same dtype. exact: float64 (or float32) from the same inputs.
        floor: absolute, times the truth's largest value where that is above 1.
    """
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    error, allowed = ((t.detach().double() - exact.detach().double()).abs().max().item() for t in (got, plain))
    limit = slack * allowed + floor * max(1.0, exact.detach().abs().max().item())
    assert error <= limit, f"{what}: error {error:.2e} from the truth; plain PyTorch's is {allowed:.2e}"


def data_root() -> Path:
    """The folder of the real data sets: $MISS_DATA, else ../shared/data; the test skips where there is none."""
    root = Path(os.environ.get("MISS_DATA") or BESIDE)
    if not root.is_dir():
        pytest.skip(f"no real data: {root} is not there and $MISS_DATA is not set")
    return root


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -c code` at the project's root: what is chosen once a process can be chosen anew there."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def check_error_rule(
    ours: Callable[..., Outputs],
    plain: Callable[..., Outputs],
    inputs: list[Tensor],
    dtype: torch.dtype,
    slack: float = 2.0,
    floor: float = 1e-6,
) -> None:
    """The error rule for every output and for the gradient of every input.

    `ours` and `plain` are called on leaves of `dtype` made from `inputs`, with their strides; the truth is `plain` on
    the same values in float64, under the same incoming gradients.
    """
    rounded = [t.detach().to(dtype) for t in inputs]

    def run(function: Callable[..., Outputs], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [t.to(dtype).requires_grad_() for t in rounded]
        result = function(*leaves)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        generator = torch.Generator().manual_seed(1)
        incoming = [torch.randn(o.shape, generator=generator).to(rounded[0].dtype).to(o) for o in outputs]
        return outputs, list(torch.autograd.grad(outputs, leaves, incoming))

    got, low, exact = run(ours, dtype), run(plain, dtype), run(plain, torch.float64)
    for kind, *triples in zip(("output", "gradient"), got, low, exact, strict=True):
        for i, (g, p, e) in enumerate(zip(*triples, strict=True)):
            assert_as_good_as(g, p, e, slack, floor, f"{kind} {i}")


@contextlib.contextmanager
def route(name: str, op: Op) -> Iterator[None]:
    """Runs an operation's public function one way: an implementation by its name, or `custom`.

    `custom` is the custom operator over the table's own choice, which is what torch.compile calls; an eager call would
    run a composite row directly. The test skips where `cpu` is asked for and the kernels are not built.
    """
    if name == "cpu" and (reason := extension.missing()):
        pytest.skip(reason)
    if name != "custom":
        with use(**{op.name: name}):
            yield
        return
    op.call = lambda custom_op, *args: custom_op(*args)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del op.call


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs PyTorch's pool with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def unaligned(tensor: Tensor) -> Tensor:
    """The same values one element behind an aligned address."""
    shifted = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    return shifted.copy_(tensor)
