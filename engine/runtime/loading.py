"""A checkpoint folder as a model that is ready to answer.

Knows checkpoints, precisions and devices; does not know requests.
"""

from dataclasses import replace
from pathlib import Path

import torch

from miss.engine.runtime.gate import verdict
from miss.kernels import extension
from miss.models.packed_loading import load_int8, load_packed
from miss.models.vqa import MissVQA
from miss.models.weights import LoadReport, load_checkpoint, read_config

# int8: bfloat16 with every linear layer packed a scale a row and multiplied with int8 activations (W8A8). Between the
# products bfloat16 gives 1,035 of SLAKE's 1,053 validation answers as the float32 reference does, float32 gave 1,031.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}
PACKED = ("int8-weight", "fp8", "int4-weight", "nf4", "llm-int8")  # precisions that a packed checkpoint alone has
_BETWEEN = {"int8": torch.bfloat16, "fp8": torch.bfloat16}  # dtypes between packed products; others: the precision's
FP8_CAPABILITY = (8, 9)  # GPUs from Ada on multiply float8
CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"


def find_checkpoint(path_or_name: str | Path) -> Path:
    """A checkpoint folder: a path, or the name of one that ships with the project.

    Raises:
        ValueError: neither; the message names the ones that ship.
    """
    path = Path(path_or_name)
    if path.is_dir():
        return path
    shipped = CHECKPOINTS / path
    if len(path.parts) == 1 and shipped.is_dir():
        return shipped
    known = sorted(p.name for p in CHECKPOINTS.iterdir() if p.is_dir()) if CHECKPOINTS.is_dir() else []
    raise ValueError(
        f"no checkpoint {str(path_or_name)!r}: wanted a folder with config.json and model.safetensors"
        + (f", or one of: {', '.join(known)}" if known else "")
    )


def load_model(folder: Path, precision: str, device: str) -> tuple[MissVQA, LoadReport]:
    """The folder's model on its device, in its precision, its weights laid out for this machine.

    A packed checkpoint keeps its packed form under the precision of its scheme's name, and under auto on a CPU where
    its report says that it passed the agreement gate and the scheme is not fp8; elsewhere it is unpacked. The report's
    notes say which.

    Raises:
        ValueError: the precision or the device is unknown, or not what the checkpoint carries; or it is damaged.
    """
    dtype = _dtype(precision, device)
    scheme, notes = _packed_scheme(folder, precision, device)
    with torch.inference_mode(False):  # a caller's: tensors made in it count no changes, and are never prepared
        on_cpu = device == "cpu"
        if scheme is not None:
            model, report, _ = load_packed(folder, dtype=_BETWEEN.get(scheme, dtype), prepared=on_cpu)
            model = model.to(device)
        elif precision == "int8":
            model, report = load_int8(folder, dtype=dtype, prepared=on_cpu)
            model = model.to(device)
        else:
            model, report = load_checkpoint(folder)
            model = model.to(device, dtype)
        model.prepare()
    extension.trim()  # what the weights went through on their way
    return model, replace(report, notes=notes)


def _packed_scheme(folder: Path, precision: str, device: str) -> tuple[str | None, tuple[str, ...]]:
    """The scheme whose packed form is to be run, or None, and what the user should know about it."""
    _, values = read_config(folder)
    scheme = None if values is None else str(values.get("scheme"))
    if precision in PACKED:
        if precision == "fp8":
            check_float8(device)
        if scheme != precision:
            raise ValueError(
                f"precision: got {precision!r}; {folder} carries {scheme or 'plain tensors'}: "
                f"`miss quantize {folder} DST --scheme {precision}` makes one"
            )
        return scheme, ()
    if scheme not in (*PACKED, "int8"):
        return None, ()
    if precision == "int8" and scheme == "int8":
        return scheme, ()
    if precision != "auto" or device != "cpu":
        run = "packed anew as" if precision == "int8" else "run unpacked in"
        return None, (f"packed as {scheme}, {run} {precision}",)
    assert values is not None, "a scheme stands in a description of packed tensors"
    if scheme == "fp8":
        note = "packed as fp8, run unpacked in float32: CPUs have no float8 product; --precision fp8 takes it as it is"
        return None, (note,)
    passed, why = verdict(values.get("report", {}))
    if passed:
        return scheme, (f"runs packed as {scheme}: its report says that it passed the agreement gate",)
    return None, (f"packed as {scheme}, run unpacked in float32: {why}; --precision {scheme} takes it as it is",)


def check_float8(device: str) -> None:
    """A CPU computes what a GPU would, in float32 and slowly; a GPU must have the products.

    Raises:
        ValueError: the GPU is older.
    """
    if not device.startswith("cuda"):
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        raise ValueError(
            f"precision: got 'fp8', but {torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}; float8 products need {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]}: "
            "take int8 or bf16"
        )


def _dtype(precision: str, device: str) -> torch.dtype:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: got {device!r}, but no CUDA device is available here; accepted: cpu")
    if not device.startswith(("cpu", "cuda")):
        raise ValueError(f"device: got {device!r}; accepted: cpu, cuda, cuda:N")
    if precision == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if precision in PACKED:
        return torch.float32
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}; accepted: auto, {', '.join((*PRECISIONS, *PACKED))}")
    return PRECISIONS[precision]
