"""Packed checkpoints as models that multiply with the packed bytes, mapped from the file.

Knows checkpoint folders and which modules hold packed weights; does not know which form is worth taking
(`engine/runtime/loading.py`).

The packed bytes are views of the mapped file: nothing is widened to float32 on the way. Norms, biases and the word
tables become tensors of the model's dtype. The file is written by replacing its folder whole, so that a mapping stays
what it was; overwriting a mapped file in place is the one thing that a user must not do.
"""

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from miss.kernels.quant_linear import PackedWeight, unpack
from miss.models.config import MissConfig
from miss.models.fitting import CheckpointError, LoadReport, shown
from miss.models.quantized import PARTS, Quantization, linear_modules, packed_weights, use_packed
from miss.models.tensor_file import map_tensors
from miss.models.vqa import MissVQA
from miss.models.weights import WEIGHTS, empty_model, model_shapes, read_config, tied_names, verify_files


def load_packed(
    folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, verify: bool = True
) -> tuple[MissVQA, LoadReport, Quantization]:
    """The model of a packed checkpoint folder, in evaluation mode, its linear layers packed as they are in the file.

    Args:
        dtype: of everything that is not packed, layers that were kept included.
        verify: whether digests are compared, which reads the whole file once.

    Raises:
        CheckpointError: the folder is not packed; a file is missing, truncated or altered; or the tensors do not fit
            the configuration: the message names them.
        ConfigError: the configuration has an unknown key or a wrong value.
    """
    folder = Path(folder)
    config, values = read_config(folder)
    if values is None:
        raise CheckpointError(f"{folder}: its tensors are not packed; `miss quantize` packs a checkpoint")
    tensors, header = map_tensors(folder / WEIGHTS)
    try:
        quantization = Quantization.read(values)
        packed = packed_weights(tensors)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: its packed tensors do not fit its configuration: {error}") from None
    plain = _plain(tensors, packed)
    _check(folder, config, plain, packed, quantization)
    if verify:
        verify_files(folder, tensors, header)
    model = _assembled(config, plain, packed, quantization, dtype)
    report = LoadReport(matched=tuple(model_shapes(config)), digest=header.get("sha256", ""))
    return model, report, quantization


def _plain(tensors: Mapping[str, Tensor], packed: Mapping[str, PackedWeight]) -> dict[str, Tensor]:
    parts = {f"{name}.{part}" for name in packed for part in PARTS}
    return {name: value for name, value in tensors.items() if name not in parts}


def _check(
    folder: Path,
    config: MissConfig,
    plain: Mapping[str, Tensor],
    packed: Mapping[str, PackedWeight],
    quantization: Quantization,
) -> None:
    """Every tensor that the configuration asks for, once, of its shape; and packed where the file says so."""
    expected = model_shapes(config)
    found = plain.keys() | packed.keys()
    problems = []
    for title, names in (
        ("missing", [name for name in expected if name not in found]),
        ("unexpected", [name for name in found if name not in expected]),
        ("packed, but stated to be kept", [name for name in quantization.kept if name in packed]),
    ):
        if names:
            problems.append(f"{title}: {shown(names)}")
    for name, shape in expected.items():
        if name in packed:
            stated = tuple(quantization.shapes.get(name, packed[name].shape))
            if stated != shape or prod(stated) != prod(packed[name].shape):
                problems.append(f"{name} is {list(stated)}, wanted {list(shape)}")
        elif name in plain and (tuple(plain[name].shape) != shape or not plain[name].is_floating_point()):
            problems.append(f"{name} is {list(plain[name].shape)} {plain[name].dtype}, wanted {list(shape)} floats")
    if problems:
        raise CheckpointError(f"{folder}: its packed tensors do not fit its configuration: {'; '.join(problems[:6])}")


def _assembled(
    config: MissConfig,
    plain: Mapping[str, Tensor],
    packed: Mapping[str, PackedWeight],
    quantization: Quantization,
    dtype: torch.dtype,
) -> MissVQA:
    model = empty_model(config)
    layers = linear_modules(model)
    state = {name: value.to(dtype, copy=True) for name, value in plain.items()}
    for name, weight in packed.items():
        if name not in layers:
            state[name] = unpack(weight, dtype).view(*quantization.shapes.get(name, weight.shape))
    use_packed(model, {name: weight for name, weight in packed.items() if name in layers}, state)
    state |= tied_names(state, config)
    model.load_state_dict(state, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()
