"""A checkpoint folder as a model that is ready to answer.

Knows checkpoints, precisions and devices; does not know requests.
"""

from pathlib import Path

import torch

from miss.models.quantized import use_int8
from miss.models.vqa import MissVQA
from miss.models.weights import LoadReport, load_checkpoint

# int8: bfloat16 with every linear layer packed a scale a row and multiplied with int8 activations (W8A8). Between the
# products bfloat16 gives 1,035 of SLAKE's 1,053 validation answers as the float32 reference does, float32 gave 1,031.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}
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

    Raises:
        ValueError: the precision or the device is unknown, or the checkpoint is damaged.
    """
    dtype = _dtype(precision, device)
    with torch.inference_mode(False):  # a caller's: tensors made in it count no changes, and are never prepared
        model, report = load_checkpoint(folder)
        model = model.to(device, dtype)
        if precision == "int8":
            use_int8(model)
        return model.prepare(), report


def _dtype(precision: str, device: str) -> torch.dtype:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: got {device!r}, but no CUDA device is available here; accepted: cpu")
    if not device.startswith(("cpu", "cuda")):
        raise ValueError(f"device: got {device!r}; accepted: cpu, cuda, cuda:N")
    if precision == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}; accepted: auto, {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]
