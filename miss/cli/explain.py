"""`miss explain`: calls every operation with shapes of a model and shows which implementation ran, and why not others.

For a GPU that is not here (`--device sm_90`) the choices are made as they would be there; what is chosen is computed on
the CPU, so that the calls that follow from it are made too.

Knows the public functions of the operations and a preset's sizes; does not know any implementation.
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from miss.cli.calls import Shapes, calls
from miss.kernels import extension, registry
from miss.kernels.evidence import Target, find_target
from miss.models.config import MissConfig, did_you_mean


@dataclass
class Args:
    """Show which implementation of each operation runs here, and why not the others."""

    op: tuple[str, ...] = ()
    """Only these operations; all where none is named."""
    preset: Literal["small", "base", "large"] = "small"
    """Whose shapes to ask about."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda; or a GPU that need not be here: its architecture (sm_90) or its name
    ("NVIDIA H100 80GB HBM3")."""
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on cpu, bfloat16 on a GPU."""
    json: bool = False
    """One JSON object instead of text."""


@dataclass
class Choice:
    """One choice that the registry made."""

    op: str
    inputs: list[dict[str, Any]]
    runs: str | None
    gradient: str | None
    candidates: list[dict[str, str | None]] = field(default_factory=list)


def observe(call: Callable[[], Any]) -> list[Choice]:
    """Runs `call` and the gradient of what it gives; every choice on the way, those that failed included."""
    seen: list[Choice] = []

    def watcher(op: registry.Op, args: tuple[Any, ...], chosen: registry.Impl | None) -> None:
        inputs = [_input(a) for a in args if isinstance(a, Tensor)]
        rows = [_row(op, impl, reason, args) for impl, reason in op.candidates(*args)]
        # Of what is not composite the gradient has a table, and comes by as a choice of its own.
        through = chosen is not None and chosen.composite and f"{op.name}{registry.BACKWARD}" in registry.OPS
        choice = Choice(op.name, inputs, chosen.name if chosen else None, "autograd" if through else None, rows)
        if choice not in seen:  # a custom operator asks again inside
            seen.append(choice)

    with registry.watch(watcher):
        try:
            result = call()
            first = result[0] if isinstance(result, tuple) else result
            if isinstance(first, Tensor) and first.requires_grad:
                first.float().sum().backward()
        except NotImplementedError:
            pass  # a forced implementation that cannot run: the watcher has its reasons
    return seen


def _row(op: registry.Op, impl: registry.Impl, reason: str | None, args: tuple[Any, ...]) -> dict[str, str | None]:
    row = {"name": impl.name, "reason": reason}
    if impl.sources and reason is None and registry.forced(op.name) is None:
        row["evidence"] = str(op.verdict(impl, *args).record)
    return row


def _input(tensor: Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "device": str(tensor.device)}


def _where(args: Args) -> tuple[torch.device, torch.dtype, Target | None]:
    """Where tensors lie, of which dtype, and the GPU that is meant where it is not theirs."""
    target = None
    if args.device not in ("auto", "cpu", "cuda"):
        target = find_target(args.device)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: this PyTorch sees no CUDA device; use --device cpu, or name a GPU (--device sm_90)"
        )
    here = args.device in ("auto", "cuda") and torch.cuda.is_available()
    dtype = ("bfloat16" if here or target else "float32") if args.dtype == "auto" else args.dtype
    return torch.device("cuda" if here else "cpu"), getattr(torch, dtype), target


def render(choice: Choice) -> str:
    inputs = ", ".join(f"({', '.join(map(str, i['shape']))}) {i['dtype']}" for i in choice.inputs)
    lines = [f"{choice.op}  {inputs}"]
    for row in choice.candidates:
        says = row["reason"] or ("runs" if row["name"] == choice.runs else "fits, but stands below")
        says += f": {row['evidence']}" if "evidence" in row else ""
        lines.append(f"  {row['name']:<12} {says}")
    if choice.runs is None:
        lines.append("  nothing can run: a call raises NotImplementedError")
    elif choice.gradient:
        lines.append("  its gradient: autograd through PyTorch's own")
    return "\n".join(lines)


def main(args: Args) -> int:
    registry.load_all()
    device, dtype, target = _where(args)
    table = calls(Shapes(MissConfig.preset(args.preset), dtype, device, laid_out=target is None))
    for name in args.op:
        if name not in table:
            raise ValueError(f"no operation named {name}{did_you_mean(name, list(table))}; known: {', '.join(table)}")
    with contextlib.nullcontext() if target is None else registry.pretend(target):
        choices = [choice for name in args.op or table for choice in observe(table[name])]
    hardware = _hardware(device) if target is None else str(target)
    head = {"torch": torch.__version__, "device": hardware, "preset": args.preset, "forced": registry.environment()}
    if args.json:
        print(json.dumps({**head, "here": target is None, "ops": [vars(choice) for choice in choices]}))
        return 0
    forced = ",".join(f"{op}={impl}" for op, impl in registry.environment().items()) or "nothing"
    print(f"torch {torch.__version__}, {hardware}, shapes of {args.preset}; MISS_KERNELS forces {forced}")
    if target is not None:
        print("asked of a GPU that is not used here, with the packages and the evidence that are")
    print("\n" + "\n\n".join(map(render, choices)))
    return 0


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    isa = extension.isa()
    return f"cpu ({isa})" if isa else "cpu"
