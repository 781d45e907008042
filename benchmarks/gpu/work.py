"""The commands of the parts that are made of several: tests, kernels, answers, finetuning steps, profiles.

Knows command lines and what of their output is kept; does not know processes or time. Most valuable first in each.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from miss.benchmarks import going_on
from miss.benchmarks.gpu.jobs import Job, last_object
from miss.benchmarks.gpu.plan import Plan, python
from miss.benchmarks.gpu.state import ROOT

KERNELS = (  # folders of kernels/, the most valuable first; their share of the time; whether aims.py has cases of them
    ("attention", 4.0, True),
    ("cross_attention", 3.0, True),
    ("cross_entropy", 1.5, True),
    ("contrastive", 1.5, True),
    ("layer_norm", 2.0, True),
    ("gelu_mlp", 1.0, False),
    ("decode_attention", 1.0, False),
    ("quant_linear", 2.0, False),
    ("linear", 1.0, False),
    ("ema", 0.5, False),
    ("kv_cache", 0.5, False),
    ("patch_embed", 0.5, False),
    ("linear_top_k", 0.5, False),
    ("tree_attention", 0.5, False),
)
_AIMS, _TINY = "aims", "aims-tiny"  # what aims.py calls its shapes; importing it would import torch
_QUICK_KERNELS = ("cross_entropy",)
_STALL = 60.0  # seconds that a case may take at least: some peers compile that long at a new shape
_WORKERS = 6  # test processes beside each other: a compilation keeps a core, and the GPU's memory is shared
_FOR_A_GPU = re.compile(r"\bmark\.gpu\b|\bDEVICES\b|\btriton\.device\b")  # what a file with tests for one says
_OUTCOME = re.compile(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)


def tests(plan: Plan) -> tuple[list[Job], int]:
    """A process a file: a kernel that reads beyond its memory takes the CUDA context of its process with it."""
    found = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: ("triton" not in path.parts, path))
    files = [path.relative_to(ROOT).as_posix() for path in found if _FOR_A_GPU.search(path.read_text("utf-8"))]
    if plan.device == "cpu":
        files = ["tests/kernels/test_memory.py"]
    marks = ["-m", "gpu"] if plan.device == "cuda" else []

    def command(file: str) -> Callable[[float], list[str]]:
        options = ["-v", "-p", "no:cacheprovider", "--tb=short", "-o", "console_output_style=classic"]
        return lambda seconds: python("pytest", *options, *marks, file)

    jobs = [Job(Path(file).stem, command(file), read=outcomes, fine=(5,)) for file in files]  # 5: none is for a GPU
    return jobs, max(1, min(_WORKERS, (os.cpu_count() or 1) // 2))


def outcomes(log: str) -> dict[str, Any]:
    """How many tests ended how, also of a run that was ended, and which did not pass."""
    found = dict(_OUTCOME.findall(log))
    counts = {kind.lower(): list(found.values()).count(kind) for kind in dict.fromkeys(found.values())}
    return counts | {"not_passed": [name for name, how in found.items() if how in ("FAILED", "ERROR")][:50]}


def kernels(plan: Plan) -> tuple[list[Job], int]:
    """Every operation against every peer present: at the shapes of the aims, then at base's."""
    jobs = []
    for folder, weight, aimed in KERNELS:
        if plan.quick and folder not in _QUICK_KERNELS:
            continue
        shapes = [_TINY] if plan.quick else [*([_AIMS] if aimed else []), "base"]

        def command(seconds: float, folder: str = folder, shapes: tuple[str, ...] = tuple(shapes)) -> list[str]:
            words = ["bench", "kernels", "--op", folder, "--device", plan.device, "--dtype", "bfloat16"]
            words += ["--shapes", *shapes, "--repeats", "2" if plan.quick else "30", "--no-plots", "--json"]
            words += ["--minutes", f"{seconds / 60:.3f}", "--stall", f"{max(_STALL, seconds / 2):.0f}"]
            return python("miss", *words, "--out", str(plan.work / "bench" / folder))

        earlier = plan.work / "bench" / folder / plan.kernels.name
        resume = ("--go-on", str(plan.kernels), str(earlier))
        # 1: one of ours is wrong, and says so
        jobs.append(Job(folder, command, weight, read=_counted, fine=(1,), resume=resume))
    few = ["--device", plan.device, *(["--quick"] if plan.quick else [])]
    jobs.append(Job("memory", lambda seconds: python("miss.benchmarks.gpu.memory", *few), 0.5))
    return jobs, 1


def _counted(log: str) -> Any:
    """Rows are in a file of their own: here only how many, and what was refused of ours."""
    found = last_object(log)
    if found is None or "rows" not in found:
        return None
    late = [s for s in found["skipped"] if s["reason"] == going_on.LATE]
    refused = [f"{r['op']} {r['implementation']} {r['shape']}: {r['reason']}" for r in found["refused"] if r["ours"]]
    counts = {"rows": len(found["rows"]), "not_measured_for_time": len(late), "ours_refused": refused[:50]}
    return {"complete": not late, **counts}


def answers(plan: Plan) -> tuple[list[Job], int]:
    """Whole answers: eager, SDPA, compiled, ours on PyTorch's rows, without graphs, and with them."""
    if plan.quick:
        few = ["--preset", "small", "--tokens", "2", "--rounds", "1", "--peers", "miss-nographs-bf16"]
        points: dict[str, list[str]] = {"b1": few}
    else:
        # Compiling takes Hugging Face's model most of a minute at each new shape: at one answer alone, and in a command
        # of its own, so that nobody's results wait for it.
        one = ["--tokens", "4", "--rounds", "30", "--peers"]
        many = ["--tokens", "4", "--rounds", "7", "--peers", "hf-sdpa-bf16", "miss-nographs-bf16"]
        # One answer alone is what the aims are of: a command a peer, so that none takes another's results along.
        points = {
            "b1": [*one, "hf-bf16"],
            "b1-nographs": [*one, "miss-nographs-bf16"],
            "b1-sdpa": [*one, "hf-sdpa-bf16"],
            "b1-torch": [*one, "miss-torch-bf16"],
            "b32": ["--batch", "32", *many],
            "q64": ["--questions-per-image", "64", *many],
            "b1-compiled": [*one, "hf-compiled-bf16"],
        }

    def command(name: str, words: list[str]) -> Callable[[float], list[str]]:
        fixed = ["bench", "answer", "--device", plan.device, "--precision", "bf16", "--judged", "0"]
        folders = ["--out", str(plan.work / "answers" / name), "--work", str(plan.work / "models")]
        return lambda seconds: python("miss", *fixed, *words, *folders, "--no-plots", "--json")

    weights = {"b32": 1.5, "q64": 1.5, "b1-compiled": 2.5}
    return [Job(name, command(name, words), weights.get(name, 1.0), read=_ratios) for name, words in points.items()], 1


def _ratios(log: str) -> Any:
    """The results are in a file of their own: here only who was how much slower than ours, and who failed."""
    found = last_object(log)
    return None if found is None else {name: found.get(name) for name in ("ratios", "failed")}


def finetune(plan: Plan) -> tuple[list[Job], int]:
    """The training step by the rows that run by themselves against PyTorch's rows (bf16, SDPA), then by groups."""
    few = ["--images", "2", "--questions", "1", "--repeats", "1", "--size", "32", "--layers", "1"]
    few += ["--modes", "cached"]
    many = ["--repeats", "10", "--modes", "trained,cached"]

    def command(*words: str) -> Callable[[float], list[str]]:
        fixed = ["--device", plan.device, *(few if plan.quick else many)]
        return lambda seconds: python("miss.benchmarks.bench_finetune", *fixed, *words)

    jobs = [Job("rows", command("--rows"))]
    return jobs if plan.quick else [*jobs, Job("grouped", command())], 1


def profiles(plan: Plan) -> tuple[list[Job], int]:
    """Where an answer's time goes, as a table and as a Chrome trace."""
    points: dict[str, list[str]] = {"answer": [], "cached": ["--cached"]}
    if plan.quick:
        points = {"answer": ["--max-new-tokens", "2"]}

    def command(name: str, words: list[str]) -> Callable[[float], list[str]]:
        fixed = ["profile", "answer", "--device", plan.device, "--precision", "bf16", "--json"]
        fixed += ["--repeats", "1" if plan.quick else "9", "--trace", str(plan.traces / f"{name}.json")]
        return lambda seconds: python("miss", *fixed, *words)

    plan.traces.mkdir(parents=True, exist_ok=True)
    return [Job(name, command(name, words)) for name, words in points.items()], 1


PARTS: dict[str, Callable[[Plan], tuple[list[Job], int]]] = {
    "tests": tests,
    "kernels": kernels,
    "answers": answers,
    "finetune": finetune,
    "profiles": profiles,
}
