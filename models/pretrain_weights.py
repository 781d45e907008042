"""A pretraining model's tensors: each shared one saved once, loaded strictly, begun from and turned into an answering
model.

Knows our names and which tensors are one; does not know files (`pretrain_files.py`), or the original's names
(`pretrain_original.py`).
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from miss.models.config import MissConfig
from miss.models.conversion import Choices, Converted
from miss.models.fitting import LoadReport, fit, fresh_tensor
from miss.models.momentum import check_memory
from miss.models.pretrain import MissPretrain, ObjectiveConfig
from miss.models.weights import model_shapes

MEMORY = "memory."
ADDED = ("image_projection.*", "text_projection.*", "matching_head.*", "temperature")  # what answering has not
_SHARED = re.compile(r"decoder\.(embeddings|cross_kv|layers\.\d+\.(cross_attention|mlp))\..+")
_KEYS_AND_VALUES = ("cross_kv.weight", "cross_kv.bias")


def saved_pretraining(model: MissPretrain, memory: bool = True) -> dict[str, Tensor]:
    """Every parameter once, under the encoder's name where towers share it; `memory.…` are the twin and the queue."""
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    if memory:
        tensors |= {f"{MEMORY}{name}": t for name, t in model.memory.tensors().items()}
    return tensors


def pretraining_shapes(config: MissConfig, feature_width: int) -> dict[str, tuple[int, ...]]:
    """Every parameter of a pretraining model, under the names of `saved_pretraining`, and its shape."""
    shapes = model_shapes(replace(config, tie_embeddings=True))
    shapes = {name: shape for name, shape in shapes.items() if not _SHARED.fullmatch(name)}
    widths = {"image": config.vision.hidden_size, "text": config.encoder.hidden_size}
    for kind, width in widths.items():
        shapes |= {f"{kind}_projection.weight": (feature_width, width), f"{kind}_projection.bias": (feature_width,)}
    return shapes | {"matching_head.weight": (2, widths["text"]), "matching_head.bias": (2,), "temperature": ()}


def fit_pretraining(
    config: MissConfig, objective: ObjectiveConfig, tensors: Mapping[str, Tensor], choices: Choices, where: str
) -> tuple[dict[str, Tensor], LoadReport]:
    """Every parameter of a pretraining model, from tensors without a memory; what may be missing is drawn.

    Raises:
        CheckpointError: what is missing, unexpected or of a wrong shape and not allowed to be, all of it at once.
    """
    shapes = pretraining_shapes(config, objective.feature_width)
    chosen, report = fit(shapes, tensors, choices.allow_missing, choices.allow_unexpected, where=where)
    if "temperature" in report.missing:
        chosen["temperature"] = torch.tensor(objective.temperature)
    return chosen, report


def memory_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The twin and the queue among a checkpoint's tensors, as `Memory` names them."""
    return {name.removeprefix(MEMORY): t for name, t in tensors.items() if name.startswith(MEMORY)}


@torch.no_grad()
def load_pretraining(model: MissPretrain, tensors: Mapping[str, Tensor], where: str = "the checkpoint") -> LoadReport:
    """The inverse of `saved_pretraining`, exactly. Without any `memory.…` the twin becomes the weights and the queue
    starts anew. Nothing of the model is written before everything has been checked.

    Raises:
        CheckpointError: tensors are missing, unexpected or of wrong shapes or types, those of the memory among them.
    """
    given = {name: t for name, t in tensors.items() if not name.startswith(MEMORY)}
    parameters, memory = dict(model.named_parameters()), memory_of(tensors)
    chosen, report = fit({name: tuple(p.shape) for name, p in parameters.items()}, given, where=where)
    if memory:
        check_memory(model.memory.tensors(), memory, where)
    for name, parameter in parameters.items():
        parameter.copy_(chosen[name])
    if not memory:
        model.reset_memory()
        return replace(report, notes=("no momentum twin in it: the twin starts as the weights, the queue anew",))
    model.memory.load(memory, where)
    return replace(report, matched=(*report.matched, *(f"{MEMORY}{name}" for name in memory)))


@torch.no_grad()
def begin_pretraining(model: MissPretrain, tensors: Mapping[str, Tensor]) -> LoadReport:
    """Starts from an answering model's tensors (our names): what pretraining adds stays as it was drawn.

    The decoder's own cross-attention, MLPs and embeddings are dropped: it takes the encoder's.

    Raises:
        CheckpointError: tensors are missing, unexpected or of wrong shapes; nothing was written then.
    """
    shared = tuple(name for name in tensors if _SHARED.fullmatch(name))
    parameters = dict(model.named_parameters())
    given = {name: t for name, t in tensors.items() if name not in shared}
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    chosen, report = fit(shapes, given, allow_missing=ADDED, allow_resize=True)
    for name in set(parameters) - set(report.missing):
        parameters[name].copy_(chosen[name])
    model.reset_memory()
    return replace(report, dropped=shared)


def both_towers(config: MissConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the shared ones under the decoder's names, too, the same memory twice."""
    width, layers = config.encoder.hidden_size, config.decoder.num_layers
    out = dict(tensors)
    for name, tensor in tensors.items():
        twice = name.replace("encoder.", "decoder.", 1)
        if not name.startswith("encoder.") or not _SHARED.fullmatch(twice):
            continue
        layer = re.match(r"encoder\.layers\.(\d+)\.", name)
        if layer is None or int(layer.group(1)) < layers:
            out[twice] = tensor[: layers * 2 * width] if name.endswith(_KEYS_AND_VALUES) else tensor
    return out


def untie(config: MissConfig, tensors: Mapping[str, Tensor], seed: int = 0, where: str = "the checkpoint") -> Converted:
    """An answering model from pretraining's tensors: the decoder gets copies of what it shared.

    Its cross-attention read image tokens and will read question states: where these are of another width its keys and
    values are drawn anew, as copying them is impossible. With `config.tie_embeddings` the table of words stays one.

    Returns:
        the tensors, all with memory of their own; of the report `matched` are copied, `missing` drawn, `dropped` are
        pretraining's alone (twin, queue, projections, matching head, temperature).

    Raises:
        CheckpointError: tensors are missing, unexpected or of wrong shapes.
    """
    features = tensors.get("image_projection.weight")
    own = {name: t for name, t in tensors.items() if not name.startswith(MEMORY)}
    fit(pretraining_shapes(config, 1 if features is None else len(features)), own, where=where)
    both = both_towers(config, tensors)
    shapes, copied = model_shapes(config), {}
    for name, shape in shapes.items():
        reads_anew = name.startswith("decoder.cross_kv") and config.vision.hidden_size != config.encoder.hidden_size
        if not reads_anew:
            assert tuple(both[name].shape) == shape, f"{name}: {tuple(both[name].shape)}, wanted {shape}"
            copied[name] = both[name].detach().clone(memory_format=torch.contiguous_format)
    drawn = {name: fresh_tensor(name, shape, seed) for name, shape in shapes.items() if name not in copied}
    return Converted(config, copied | drawn, _untied(tuple(copied), tuple(drawn), tensors))


def _untied(copied: tuple[str, ...], drawn: tuple[str, ...], tensors: Mapping[str, Tensor]) -> LoadReport:
    """What was tied and is not, in figures and in words."""
    twice = [name for name in copied if _SHARED.fullmatch(name)]
    notes = [f"untied: the decoder has copies of its own of {len(twice)} tensors that it shared with the encoder"]
    notes += [f"{name} read image tokens and now reads question states" for name in twice if "cross_kv" in name]
    notes += [f"{name} was drawn: it read image tokens, of another width than question states" for name in drawn]
    dropped = tuple(name for name in tensors if name not in copied)
    return LoadReport(matched=copied, missing=drawn, dropped=dropped, notes=tuple(notes))
