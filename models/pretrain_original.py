"""Pretraining checkpoints of the original MISS and of BLIP: to and from ours, momentum twin and queue included.

Knows the original's names, what of its file says the same thing twice, and that its twin is one update behind ours;
does not know files.

The original moves its twin at the start of a step, ours moves at the end of the one before: both use the same twin in
every step, but between steps, when a file is written, theirs is m and ours is 0.995 m + 0.005 weights.
The way out undoes that update and the way in makes it, with the original's momentum, which is a constant of its code: a
run that is resumed on either side goes on with the twin that the other one would have used next (to rounding: one unit
in the last place of float32).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from miss.models import names
from miss.models.config import MissConfig
from miss.models.conversion import Choices, renamed, table_of, with_choices
from miss.models.fitting import POSITIONS, CheckpointError, LoadReport, Resized, allowed, fit, resize_positions, shown
from miss.models.momentum import check_memory
from miss.models.original import original_config
from miss.models.pretrain import ObjectiveConfig
from miss.models.pretrain_weights import MEMORY, both_towers, fit_pretraining, pretraining_shapes
from miss.models.queue import Queue

_OWN = {"image_projection": "vision_proj", "text_projection": "text_proj", "matching_head": "itm_head"}
_PROJECTIONS = ("image_projection", "text_projection")
Tensors = dict[str, Tensor]

MOMENTUM = 0.995  # the original's, not in its files

_TWIN, _QUEUE = f"{MEMORY}twin.", f"{MEMORY}queue."
_QUEUES = {"image": "image_queue", "text": "text_queue", "pointer": "queue_ptr"}
_TOWERS = ("text_encoder", "text_encoder_m", "text_decoder.bert")


@dataclass(frozen=True)
class Pretrained:
    """A pretraining checkpoint in our terms, ready for `load_pretraining`."""

    config: MissConfig
    objective: ObjectiveConfig
    tensors: dict[str, Tensor]
    report: LoadReport


def to_original_pretraining(
    config: MissConfig, tensors: Mapping[str, Tensor], queue_size: int = ObjectiveConfig.queue_size
) -> dict[str, Tensor]:
    """The state dict that MISS's and BLIP's pretraining models load strictly, from `saved_pretraining`.

    Without a memory the twin is the weights and the queue that of a run that begins, of `queue_size` places. Their twin
    also carries cross-attention that nothing reads: it is written as the weights are now. The captions' numbers in the
    queue have no place there.

    Raises:
        CheckpointError: tensors are missing, unexpected or of wrong shapes.
    """
    own = {name: t for name, t in tensors.items() if not name.startswith(MEMORY)}
    fit(pretraining_shapes(config, len(own.get("image_projection.weight", ()))), own)
    both = both_towers(config, tensors)
    state = names.split(table_of(config, "original"), both)
    table = _twin_table(config, cross=True)
    twin = {entry.ours: both[entry.ours] for entry in table}
    for name in twin:
        if f"{_TWIN}{name}" in tensors:
            twin[name] = _before(tensors[f"{_TWIN}{name}"], both[name])
    state |= names.split(table, twin)
    for ours, theirs in _own_table():
        state[theirs] = tensors[ours].clone()
    for tower in _TOWERS:
        state[f"{tower}.embeddings.position_ids"] = torch.arange(config.encoder.max_positions)[None]
    for copy, source in names.TIED_COPIES.items():
        state[copy] = state[source]
    queue = {kind: tensors[f"{_QUEUE}{kind}"] for kind in _QUEUES if f"{_QUEUE}{kind}" in tensors}
    if len(queue) < len(_QUEUES):
        queue = Queue.fresh(queue_size, len(tensors["image_projection.weight"])).tensors()
    for kind, theirs in _QUEUES.items():
        state[theirs] = queue[kind].reshape(1).clone() if kind == "pointer" else queue[kind].T.contiguous()
    return state


def from_original_pretraining(
    state: Mapping[str, Tensor],
    choices: Choices,
    where: str,
    config: MissConfig | None = None,
) -> Pretrained:
    """A MISS or BLIP pretraining state dict, of any width and depth.

    What is there of the momentum twin and of the queue is taken; what is missing of them is named in the report, and
    starts as the weights (the twin) or as a run begins (the queue).

    Args:
        choices: as for an answering model; `allow_missing` are patterns of our names, `allow_unexpected` of theirs.
        config: our configuration, where it is known; else sizes come from shapes and the rest from the original's code.

    Raises:
        CheckpointError: tensors are missing, unexpected or of wrong shapes and not allowed to be, or encoder and
            decoder differ in what pretraining shares.
    """
    state, resized = _on_grid(dict(state), choices.image_size)
    tensors, leftovers, dropped = renamed(state, "original", choices.allow_missing, where)
    config = with_choices(config or original_config(dict(tensors), choices), choices)
    config = replace(config, tie_embeddings=False)
    own = {name: t for name, t in tensors.items() if name not in _twice(config, tensors, choices, where)}
    own |= {ours: state[theirs] for ours, theirs in _own_table() if theirs in state}
    objective = _objective(state)
    extra = {name: torch.empty(0) for name in leftovers}
    chosen, report = fit_pretraining(config, objective, own | extra, choices, where)
    twin, queue, lacking = _memory(config, objective, chosen, state, where)
    read = {theirs for _, theirs in _own_table()} | set(_QUEUES.values())
    read |= {part for entry in _twin_table(config, cross=False) for part in entry.theirs}
    report = replace(
        report,
        matched=(*(n for n in report.matched if not (resized and n == POSITIONS)), *twin, *queue),
        missing=(*report.missing, *lacking),
        resized=resized,
        dropped=tuple(name for name in dropped if name not in read),
        notes=_notes(twin, queue, lacking),
    )
    return Pretrained(config, objective, chosen | twin | queue, report)


def _memory(
    config: MissConfig, objective: ObjectiveConfig, weights: Tensors, state: Tensors, where: str
) -> tuple[Tensors, Tensors, tuple[str, ...]]:
    """(twin, queue, what of theirs is missing); the first two are empty where the file has nothing of either."""
    table = _twin_table(config, cross=False)
    parts = names.split(table, weights)  # what is missing follows the weights
    lacking = tuple(name for name in (*parts, *_QUEUES.values()) if name not in state)
    if len(lacking) == len(parts) + len(_QUEUES):
        return {}, {}, lacking
    try:
        twin, _ = names.stack(table, parts | {name: state[name] for name in parts if name in state})
    except ValueError as error:
        raise CheckpointError(f"{where}: wrong shape: {error}") from None
    begun = Queue.fresh(objective.queue_size, objective.feature_width).tensors()
    own = {f"twin.{name}": weights[name] for name in twin} | {f"queue.{name}": t for name, t in begun.items()}
    queue = begun | {kind: _queue_of(state[theirs]) for kind, theirs in _QUEUES.items() if theirs in state}
    given = {f"twin.{name}": t for name, t in twin.items()} | {f"queue.{name}": t for name, t in queue.items()}
    check_memory(own, given, where)
    twin = {f"{_TWIN}{name}": _after(t, weights[name]) for name, t in twin.items()}
    return twin, {f"{_QUEUE}{name}": t for name, t in queue.items()}, lacking


def _queue_of(tensor: Tensor) -> Tensor:
    """Their queue (P, Q), or pointer (1,), as ours."""
    if tensor.is_floating_point():
        return tensor.T.contiguous() if tensor.dim() == 2 else tensor
    return tensor.long().reshape(()).clone() if tensor.numel() == 1 else tensor


def _after(twin: Tensor, weights: Tensor) -> Tensor:
    """Their twin as ours is between steps: the update that theirs makes first thing in the next one is made."""
    w = weights.double()
    return (w + MOMENTUM * (twin.double() - w)).to(torch.promote_types(twin.dtype, torch.float32))


def _before(twin: Tensor, weights: Tensor) -> Tensor:
    """Our twin as theirs is between steps: the inverse of `_after`."""
    w = weights.double()
    return (w + (twin.double() - w) / MOMENTUM).to(twin.dtype)


def _notes(twin: Tensors, queue: Tensors, lacking: tuple[str, ...]) -> tuple[str, ...]:
    if not twin:
        return ("no momentum twin in it: the twin starts as the weights, the queue anew",)
    notes = ["the queue's captions have no numbers: none of them is spared as an equal one until it is full"]
    of_queue = [name for name in lacking if name in _QUEUES.values()]
    of_twin = [name for name in lacking if name not in of_queue]
    if of_twin:
        notes.append(f"the momentum twin lacks {shown(of_twin)}: there it starts as the weights")
    if of_queue:
        notes.append(f"the queue lacks {shown(of_queue)}: there it starts anew")
    return tuple(notes)


def _objective(state: Mapping[str, Tensor]) -> ObjectiveConfig:
    """Sizes that the file states, by whatever of it is there."""
    default = ObjectiveConfig()
    width = next(
        (len(state[f"{kind}_proj.weight"]) for kind in ("vision", "text") if f"{kind}_proj.weight" in state), 0
    )
    size = next((state[n].shape[-1] for n in ("image_queue", "text_queue") if n in state), default.queue_size)
    return replace(default, feature_width=width or default.feature_width, queue_size=size)


def _on_grid(state: Tensors, image_size: int | None) -> tuple[Tensors, tuple[Resized, ...]]:
    """The state with both image encoders' position tables for images of that size."""
    table, patches = (f"visual_encoder.{name}" for name in ("pos_embed", "patch_embed.proj.weight"))
    if image_size is None or table not in state or patches not in state:
        return state, ()
    wanted = (image_size // state[patches].shape[-1]) ** 2 + 1
    before = tuple(state[table].shape)
    if before[1] == wanted:
        return state, ()
    for name in (table, table.replace("encoder", "encoder_m", 1)):
        if name in state:
            state[name] = resize_positions(state[name], wanted)
    return state, (Resized(POSITIONS, before, tuple(state[table].shape)),)


def _twice(config: MissConfig, tensors: Tensors, choices: Choices, where: str) -> set[str]:
    """The decoder's names for tensors that it shares, after checking that it does."""
    encoder = {name: t for name, t in tensors.items() if name.startswith("encoder.")}
    shared = {name: t for name, t in both_towers(config, encoder).items() if name not in encoder}
    wrong = [
        name
        for name, t in shared.items()
        if not (torch.equal(t, tensors[name]) if name in tensors else allowed(name, choices.allow_missing))
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: encoder and decoder differ in {shown(wrong)}: pretraining shares these; this file was trained "
            f"on after they were untied. Convert it as an answering model"
        )
    return set(shared)


def _own_table() -> list[tuple[str, str]]:
    """What pretraining adds, ours and theirs."""
    pairs = [(f"{a}.{kind}", f"{b}.{kind}") for a, b in _OWN.items() for kind in ("weight", "bias")]
    return [*pairs, ("temperature", "temp")]


def _twin_table(config: MissConfig, cross: bool) -> list[names.Entry]:
    """The twin: the same names of ours as the weights, theirs with `_m`."""
    table = []
    for entry in table_of(config, "original"):
        if entry.ours.startswith("decoder.") or (not cross and "cross_" in entry.ours):
            continue
        theirs = tuple(
            name.replace("visual_encoder.", "visual_encoder_m.", 1).replace("text_encoder.", "text_encoder_m.", 1)
            for name in entry.theirs
        )
        table.append(names.Entry(entry.ours, theirs))
    kinds = ("weight", "bias")
    return table + [names.Entry(f"{n}.{k}", (f"{_OWN[n]}_m.{k}",)) for n in _PROJECTIONS for k in kinds]
