"""Checkpoints as models that multiply with packed bytes: those that the file holds, or int8 made of it as it is read.

Knows checkpoint folders and which modules hold packed weights; does not know which form is worth taking
(`engine/runtime/loading.py`).

The file is mapped, and what was read of it given back matrix by matrix, so that loading takes little more memory than
the model does afterwards. Norms, biases and the word tables become tensors of the model's dtype. Packed bytes that no
kernel wants in another form stay views of the mapped file. It is written by replacing its folder whole, so that a
mapping stays what it was; overwriting a mapped file in place is the one thing that a user must not do.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.quant_linear import PackedWeight, pack_int8, prepare, unpack
from miss.models.config import MissConfig
from miss.models.fitting import CheckpointError, LoadReport, fit, shown
from miss.models.quantized import PARTS, Quantization, linear_modules, packed_weights, use_int8, use_packed
from miss.models.tensor_file import map_tensors
from miss.models.vqa import MissVQA
from miss.models.weights import (
    WEIGHTS,
    empty_model,
    load_checkpoint,
    model_shapes,
    read_config,
    tied_names,
    verify_files,
)

_TRIM_AFTER = 64 << 20


def load_packed(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    verify: bool = True,
    prepared: bool = False,
) -> tuple[MissVQA, LoadReport, Quantization]:
    """The model of a packed checkpoint folder, in evaluation mode, its linear layers packed as they are in the file.

    Args:
        dtype: of everything that is not packed, layers that were kept included.
        verify: whether digests are compared, which reads the whole file once.
        prepared: whether packed weights are laid out for this machine's kernels at once, so that both forms of no more
            than one stand in memory.

    Raises:
        CheckpointError: the folder is not packed; a file is missing, truncated or altered; or the tensors do not fit
            the configuration: the message names them.
        ConfigError: the configuration has an unknown key or a wrong value.
    """
    folder = Path(folder)
    config, values = read_config(folder)
    if values is None:
        raise CheckpointError(f"{folder}: its tensors are not packed; `miss quantize` packs a checkpoint")
    file = map_tensors(folder / WEIGHTS)
    tensors, header = file.tensors, file.metadata
    try:
        quantization = Quantization.read(values)
        packed = packed_weights(tensors)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: its packed tensors do not fit its configuration: {error}") from None
    plain = _plain(tensors, packed)
    _check(folder, config, plain, packed, quantization)
    if verify:
        verify_files(folder, tensors, header, file.forget)
    model = _assembled(config, plain, packed, quantization, dtype, file.forget if prepared else None)
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
    forget: Callable[[], None] | None,
) -> MissVQA:
    """`forget`: where packed weights are to be laid out for this machine, gives back what was read for one."""
    model = empty_model(config)
    layers = linear_modules(model)
    state = {name: value.to(dtype, copy=True) for name, value in plain.items()}
    held: dict[str, PackedWeight] = {}
    spent = _Spent()
    for name, weight in packed.items():
        if name not in layers:
            state[name] = unpack(weight, dtype).view(*quantization.shapes.get(name, weight.shape))
        else:
            held[name] = weight if forget is None else _laid_out(weight)
        if forget is not None:
            forget()
            spent.add(weight.nbytes)
    return _finished(model, held, state)


def _laid_out(weight: PackedWeight) -> PackedWeight:
    """For this machine's kernels; of int8 then nothing is left in the file."""
    ready = prepare(weight).in_panels()
    return ready if ready.data is weight.data else ready._replace(scale=weight.scale.clone())


def load_int8(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.bfloat16,
    verify: bool = True,
    prepared: bool = False,
) -> tuple[MissVQA, LoadReport]:
    """The model of a checkpoint folder as `use_int8` makes it of one in `dtype`, to the bit; of plain tensors matrix by
    matrix, so that the whole never stands in memory. Arguments as of `load_packed`.

    Raises:
        CheckpointError, ConfigError: as `load_checkpoint`.
    """
    folder = Path(folder)
    config, quantization = read_config(folder)
    if quantization is not None:  # packed to be stored, such as the model that ships: small, and unpacked whole
        model, report = load_checkpoint(folder, dtype=dtype, verify=verify)
        return use_int8(model), report
    file = map_tensors(folder / WEIGHTS)
    chosen, report = fit(model_shapes(config), file.tensors, where=str(folder / WEIGHTS))
    if verify:
        verify_files(folder, file.tensors, file.metadata, file.forget)
    model = empty_model(config)
    layers = linear_modules(model)
    packed: dict[str, PackedWeight] = {}
    state: dict[str, Tensor] = {}
    spent = _Spent()
    for name, value in chosen.items():
        value = value.to(dtype, copy=True)
        file.forget()
        if name in layers:
            made = pack_int8(value, dynamic=True)
            packed[name] = prepare(made).in_panels() if prepared else made
        else:
            state[name] = value
        spent.add(value.nbytes)
    model = _finished(model, packed, state)
    model.decoder.use_vocabulary(pack_int8(model.decoder.embeddings.word.weight, dynamic=True))
    return model, dataclasses.replace(report, digest=file.metadata.get("sha256", ""))


class _Spent:
    """Has the C library give freed memory back now and then: small tensors that stay lie between large ones that were
    passed through, which are then not used again. Of a base model 0.7 GB, at the end; each time takes milliseconds."""

    def __init__(self) -> None:
        self._bytes = 0

    def add(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        if self._bytes >= _TRIM_AFTER:
            extension.trim()
            self._bytes = 0


def _finished(model: MissVQA, packed: Mapping[str, PackedWeight], state: dict[str, Tensor]) -> MissVQA:
    """An empty model with its linear layers packed and everything else taken from `state`."""
    use_packed(model, packed, state)
    model.load_state_dict(state | tied_names(state, model.config), assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()
