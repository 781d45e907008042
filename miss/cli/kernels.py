"""miss kernels list: every operation, its implementations in order, what runs here for a dtype and why not the others.
miss kernels built: whether the CPU kernels are compiled, and for which instruction sets.
miss kernels compile: the Triton kernels for GPUs that need not be here: registers, spills, shared memory, a report.
miss kernels report: the report of the last such compilation that the repository holds.
miss kernels validate: measures our GPU kernels on the GPU at hand, so that those that are proven run by themselves.

Knows the tables and the report of the compiled kernels; does not know shapes: `miss explain` asks with a model's.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from miss.cli.kernels_compile import CompileArgs, ReportArgs, compile_kernels, show_report
from miss.cli.kernels_validate import ValidateArgs, validate
from miss.kernels import extension, registry
from miss.models.config import did_you_mean

DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class ListArgs:
    """List every operation's implementations, the fastest first: which one runs here, and why not the others.

    What depends on shapes is not asked here: `miss explain` shows that.
    """

    op: tuple[str, ...] = ()
    """Only these operations; all where none is named."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the tensors would lie."""
    json: bool = False
    """Print everything as one JSON object."""


def list_kernels(args: ListArgs) -> int:
    registry.load_all()
    names = args.op or tuple(registry.OPS)
    for name in names:
        if name not in registry.OPS:
            hint = did_you_mean(name, list(registry.OPS))
            raise ValueError(f"no operation named {name}{hint}; known: {', '.join(registry.OPS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    report = extension.report()
    ops = [{"op": name, "implementations": _rows(registry.OPS[name], torch.device(args.device))} for name in names]
    if args.json:
        head = {"torch": torch.__version__, "device": args.device, "forced": registry.environment()}
        print(json.dumps({**head, "cpu_kernels": asdict(report), "ops": ops}))
        return 0
    print("\n".join(describe(report)))
    for op in ops:
        print("\n" + _render(op, report))
    return 0


@dataclass
class BuiltArgs:
    """Say whether the CPU kernels are compiled, for which instruction sets, and which one is used here."""


def built(args: BuiltArgs) -> int:
    print("\n".join(describe(extension.report())))
    return 0


def describe(report: extension.Report) -> list[str]:
    """The report of the compiled kernels in lines; `miss doctor` shows them too."""
    if report.reason is not None:
        lines = [f"CPU kernels: none of ours run: {report.reason}"]
        if not report.built and extension.buildable():
            lines.append(f"  to build them: {extension.BUILD}")
        return lines
    return [
        f"CPU kernels: {report.isa} in use; built for {', '.join(report.built)}",
        f"  {report.processor or 'this processor'} runs {', '.join(report.supported)}; MISS_CPU_ISA forces one",
        f"  it reports {' '.join(report.features)}",
    ]


def _rows(op: registry.Op, device: torch.device) -> list[dict[str, Any]]:
    """By implementation: what it is made of, and by dtype whether it runs here."""
    by_dtype = {_name(dtype): op.here(device, dtype) for dtype in DTYPES}
    rows = []
    for at, impl in enumerate(op.impls):
        here = {}
        for dtype, candidates in by_dtype.items():
            runs = [i for i, reason in candidates if reason is None]
            # An implementation with limits may hand on to the next that fits.
            last = next((k for k, i in enumerate(runs) if i.limits is None), len(runs))
            here[dtype] = {"reason": candidates[at][1], "runs": impl in runs[: last + 1], "first": runs[:1] == [impl]}
        rows.append(
            {
                "name": impl.name,
                "compiled_for": extension.report().built if impl.needs is extension.missing else None,
                "dtypes": sorted(map(_name, impl.dtypes)),
                "depends_on_shape": impl.limits is not None,
                "here": here,
            }
        )
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _says(row: dict[str, Any], here: dict[str, Any], isa: str | None) -> str:
    if here["reason"]:
        return str(here["reason"])
    if not here["runs"]:
        return "fits, but stands below"
    if not here["first"]:
        return "runs where the one above refuses a shape"
    notes = [isa] if row["compiled_for"] and isa else []
    notes += ["shapes permitting"] if row["depends_on_shape"] else []
    return "runs" + (f" ({', '.join(notes)})" if notes else "")


def _render(op: dict[str, Any], report: extension.Report) -> str:
    lines = [op["op"]]
    for row in op["implementations"]:
        says = {dtype: _says(row, here, report.isa) for dtype, here in row["here"].items()}
        same = len(set(says.values())) == 1
        text = next(iter(says.values())) if same else "; ".join(f"{dtype}: {what}" for dtype, what in says.items())
        lines.append(f"  {row['name']:<12} {text}")
    return "\n".join(lines)


COMMANDS = {
    "list": (ListArgs, list_kernels),
    "built": (BuiltArgs, built),
    "compile": (CompileArgs, compile_kernels),
    "validate": (ValidateArgs, validate),
    "report": (ReportArgs, show_report),
}
