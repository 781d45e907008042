"""`miss explain`: calls every operation with shapes of a model and shows which implementation ran, and why not others.

Knows the public functions of the operations and a preset's sizes; does not know any implementation.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from miss.cli.calls import Shapes, calls
from miss.kernels import extension, registry
from miss.models.config import MissConfig, did_you_mean


@dataclass
class Args:
    """Show which implementation of each operation runs here, and why not the others."""

    op: tuple[str, ...] = ()
    """Only these operations; all where none is named."""
    preset: Literal["small", "base", "large"] = "small"
    """Whose shapes to ask about."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on cpu, bfloat16 on cuda."""
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
        rows = [{"name": impl.name, "reason": reason} for impl, reason in op.candidates(*args)]
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


def _input(tensor: Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "device": str(tensor.device)}


def _where(args: Args) -> tuple[torch.device, torch.dtype]:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    cuda = args.device != "cpu" and torch.cuda.is_available()
    dtype = ("bfloat16" if cuda else "float32") if args.dtype == "auto" else args.dtype
    return torch.device("cuda" if cuda else "cpu"), getattr(torch, dtype)


def render(choice: Choice) -> str:
    inputs = ", ".join(f"({', '.join(map(str, i['shape']))}) {i['dtype']}" for i in choice.inputs)
    lines = [f"{choice.op}  {inputs}"]
    for row in choice.candidates:
        says = row["reason"] or ("runs" if row["name"] == choice.runs else "fits, but stands below")
        lines.append(f"  {row['name']:<10} {says}")
    if choice.runs is None:
        lines.append("  nothing can run: a call raises NotImplementedError")
    elif choice.gradient:
        lines.append("  its gradient: autograd through PyTorch's own")
    return "\n".join(lines)


def main(args: Args) -> int:
    registry.load_all()
    device, dtype = _where(args)
    table = calls(Shapes(MissConfig.preset(args.preset), dtype, device))
    for name in args.op:
        if name not in table:
            raise ValueError(f"no operation named {name}{did_you_mean(name, list(table))}; known: {', '.join(table)}")
    choices = [choice for name in args.op or table for choice in observe(table[name])]
    hardware, isa = "cpu", extension.isa()
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    elif isa:
        hardware = f"cpu ({isa})"
    head = {"torch": torch.__version__, "device": hardware, "preset": args.preset, "forced": registry.environment()}
    if args.json:
        print(json.dumps({**head, "ops": [vars(choice) for choice in choices]}))
        return 0
    forced = ",".join(f"{op}={impl}" for op, impl in registry.environment().items()) or "nothing"
    print(f"torch {torch.__version__}, {hardware}, shapes of {args.preset}; MISS_KERNELS forces {forced}\n")
    print("\n\n".join(map(render, choices)))
    return 0
