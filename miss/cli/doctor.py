"""`miss doctor`: what is installed and works here, and what to do where `miss answer` does not.

Knows which package is for what; imports torch and the engine only to try them, so that it can tell of their absence.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

# By distribution: the module that it is imported as. All are dependencies of pyproject.toml.
NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "pillow": "PIL",
    "pydicom": "pydicom",
    "pyyaml": "yaml",
    "tyro": "tyro",
    "tqdm": "tqdm",
}
# By distribution: its module, and what is not to be had without it.
OPTIONAL = {
    "pyjpegls": ("jpeg_ls", "DICOM files compressed with JPEG-LS"),
    "pylibjpeg": ("pylibjpeg", "DICOM files in HTJ2K, and the first choice for JPEG 2000"),
    "pylibjpeg-openjpeg": ("openjpeg", "DICOM files in HTJ2K, and the first choice for JPEG 2000"),
    "python-gdcm": ("gdcm", "DICOM files in lossless JPEG"),
    "matplotlib": ("matplotlib", "`miss evaluate` (its plots) and the curves of a finetuning run"),
    "scipy": ("scipy", "`miss evaluate` (its exact intervals)"),
    "tensorboard": ("tensorboard", "TensorBoard files of a finetuning run (log.tensorboard: false goes without)"),
    "deepspeed": ("deepspeed", "finetuning on several devices with ZeRO"),
    "onnx": ("onnx", "`miss convert` of starting weights that come as ONNX"),
    "transformers": ("transformers", "the tests that compare with Hugging Face; nothing that users run"),
    "pybind11": ("pybind11", "building the CPU kernels"),
    "triton": ("triton", "our kernels on a CUDA device (none is proven yet), `miss kernels compile`"),
    "flash-attn": ("flash_attn", "attention of packed sequences on a GPU (never run here)"),
    "xformers": ("xformers", "attention on a GPU where it is forced (never run here)"),
    "bitsandbytes": ("bitsandbytes", "`miss quantize --scheme nf4` and `llm-int8`"),
}


@dataclass
class Args:
    """Show what is installed and works here. Exit code 0 where `miss answer` works, 1 with what to do where not."""

    checkpoint: str = "miss-small"
    """The checkpoint to try: a folder, or the name of one that ships with the project."""
    json: bool = False
    """Print everything as one JSON object."""


def main(args: Args) -> int:
    problems: list[str] = []
    report: dict[str, Any] = {
        "python": {"version": platform.python_version(), "executable": sys.executable, "machine": platform.machine()},
        "needed": _needed(problems),
        "optional": [
            {"name": name, "version": _version(name, module), "for": use} for name, (module, use) in OPTIONAL.items()
        ],
    }
    if not problems:
        report["torch"] = _torch(problems)
    if not problems:
        report["cpu_kernels"] = _cpu_kernels(problems)
    if not problems:
        report["answer"] = _answer(args.checkpoint, problems)
        report["data"] = _data()
    report |= {"problems": problems, "ok": not problems}
    print(json.dumps(report) if args.json else "\n".join(_lines(report)))
    return 1 if problems else 0


def _version(distribution: str, module: str) -> str | None:
    """The version that is installed; None where the module is not there."""
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except (ImportError, ValueError):  # what half an installation leaves behind
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _needed(problems: list[str]) -> list[dict[str, str | None]]:
    rows = [{"name": name, "version": _version(name, module)} for name, module in NEEDED.items()]
    absent = [str(row["name"]) for row in rows if row["version"] is None]
    if absent:
        problems.append(f"not installed: {', '.join(absent)}; run `make answer`, or pip install {' '.join(absent)}")
    return rows


def _torch(problems: list[str]) -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a broken installation raises what it likes
        problems.append(f"torch cannot be imported ({_one_line(error)}); install it again")
        return {}
    found = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "built_for_cuda": torch.version.cuda,
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if found else [],
    }


def _cpu_kernels(problems: list[str]) -> dict[str, Any]:
    from miss.kernels import extension

    try:
        return asdict(extension.report())
    except ValueError as error:  # MISS_CPU_ISA: every operation on the CPU would raise it
        problems.append(f"{_one_line(error)}; unset it, or name one of these")
        return {}


def _answer(checkpoint: str, problems: list[str]) -> dict[str, Any]:
    """Loads the checkpoint and answers a question about a grey image: the only proof that it works."""
    try:
        import numpy as np

        from miss.engine.runtime.engine import Engine, find_checkpoint

        folder = find_checkpoint(checkpoint)
        engine = Engine.load(folder)
        start = time.perf_counter()
        engine.answer(np.full((64, 64, 3), 128, np.uint8), "what is shown?")
        seconds = time.perf_counter() - start
    except Exception as error:  # whatever it is that keeps it from answering is what is asked for
        problems.append(f"checkpoint {checkpoint} does not answer: {_one_line(error)} (--checkpoint names another)")
        return {"checkpoint": checkpoint, "answers": False}
    return {
        "checkpoint": str(folder),
        "answers": True,
        "load_seconds": round(engine.load_seconds, 2),
        "answer_seconds": round(seconds, 2),
    }


def _data() -> dict[str, str | None]:
    from miss.engine.data.datasets import detect, resolve_data_root

    try:
        root = resolve_data_root()
        return {"folder": str(root), "datasets": ", ".join(detect(root)) or None, "reason": None}
    except ValueError as error:
        return {"folder": None, "datasets": None, "reason": _one_line(error)}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _lines(report: dict[str, Any]) -> list[str]:
    python = report["python"]
    lines = [f"Python {python['version']} ({python['executable']}, {python['machine']})"]
    if torch := report.get("torch"):
        cuda = ", ".join(torch["cuda_devices"]) or (
            f"none found (built for CUDA {torch['built_for_cuda']})" if torch["built_for_cuda"] else "not built for it"
        )
        lines.append(f"torch {torch['version']}: {torch['threads']} threads on {torch['processors']} processors")
        lines.append(f"CUDA: {cuda}")
    if kernels := report.get("cpu_kernels"):
        from miss.cli.kernels import describe
        from miss.kernels.extension import Report

        lines += describe(Report(**kernels))
    if (answer := report.get("answer")) and answer["answers"]:
        lines.append(
            f"checkpoint {answer['checkpoint']}: loads in {answer['load_seconds']:.2f} s, "
            f"answers in {answer['answer_seconds']:.2f} s"
        )
    if data := report.get("data"):
        lines.append(
            f"data: {data['folder']}: {data['datasets'] or 'no data set known here'}"
            if data["folder"]
            else f"data: none, which `miss answer` does not need ({data['reason']})"
        )
    lines.append("needed    " + ", ".join(f"{row['name']} {row['version'] or 'ABSENT'}" for row in report["needed"]))
    present = [row for row in report["optional"] if row["version"]]
    lines.append("optional  " + (", ".join(f"{row['name']} {row['version']}" for row in present) or "none"))
    for row in report["optional"]:
        if row["version"] is None:
            lines.append(f"  without {row['name']:<18} {row['for']}")
    lines += [f"problem: {problem}" for problem in report["problems"]]
    lines.append("`miss answer` works here" if report["ok"] else "`miss answer` does not work here")
    return lines
