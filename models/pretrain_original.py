"""Pretraining checkpoints of the original MISS and of BLIP: to and from ours, momentum twin and queue included.

Knows the original's names and what of its file says the same thing twice; does not know files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from miss.models import names
from miss.models.config import MissConfig
from miss.models.conversion import Choices, renamed, table_of
from miss.models.fitting import CheckpointError, LoadReport, shown
from miss.models.original import original_config
from miss.models.pretrain import ObjectiveConfig
from miss.models.pretrain_weights import MEMORY, both_towers
from miss.models.queue import NO_CAPTION

_OWN = {"image_projection": "vision_proj", "text_projection": "text_proj", "matching_head": "itm_head"}
_PROJECTIONS = ("image_projection", "text_projection")
_TWIN, _QUEUE = f"{MEMORY}twin.", f"{MEMORY}queue."


@dataclass(frozen=True)
class Pretrained:
    """A pretraining checkpoint in our terms, ready for `load_pretraining`."""

    config: MissConfig
    objective: ObjectiveConfig
    tensors: dict[str, Tensor]
    report: LoadReport


def to_original_pretraining(config: MissConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that MISS's and BLIP's pretraining models load strictly, from `saved_pretraining`.

    Their twin also carries cross-attention that nothing reads: it is written as the weights are now. The captions'
    numbers in the queue have no place there.
    """
    both = both_towers(config, tensors)
    state = names.split(table_of(config, "original"), both)
    twin = {name: tensors.get(f"{_TWIN}{name}", both[name]) for name in both if not name.startswith(MEMORY)}
    state |= names.split(_twin_table(config, cross=True), twin)
    for ours, theirs in _own_table():
        state[theirs] = tensors[ours].clone()
    for ours, theirs in _twin_projections():
        state[theirs] = twin[ours].clone()
    for tower in ("text_encoder", "text_encoder_m", "text_decoder.bert"):
        state[f"{tower}.embeddings.position_ids"] = torch.arange(config.encoder.max_positions)[None]
    for copy, source in names.TIED_COPIES.items():
        state[copy] = state[source]
    for kind in ("image", "text"):
        if f"{_QUEUE}{kind}" in tensors:
            state[f"{kind}_queue"] = tensors[f"{_QUEUE}{kind}"].T.contiguous()
            state["queue_ptr"] = tensors[f"{_QUEUE}pointer"].reshape(1).clone()
    return state


def from_original_pretraining(
    state: Mapping[str, Tensor], choices: Choices, where: str, config: MissConfig | None = None
) -> Pretrained:
    """A MISS or BLIP pretraining state dict, of any width and depth.

    Args:
        config: our configuration, where it is known; else sizes come from shapes and the rest from the original's code.

    Raises:
        CheckpointError: tensors are missing, or encoder and decoder differ in what pretraining shares.
    """
    tensors, leftovers, dropped = renamed(state, "original", choices.allow_missing, where)
    config = config or original_config(dict(tensors), choices)
    config = replace(config, tie_embeddings=False)
    own = {name: t for name, t in tensors.items() if name not in _twice(config, tensors, where)}
    read = set()
    for ours, theirs in _own_table():
        if theirs not in state:
            raise CheckpointError(f"{where}: missing: {theirs}; wanted a checkpoint of pretraining")
        own[ours] = state[theirs]
        read.add(theirs)
    twin, lacking = names.stack(_twin_table(config, cross=False), state)
    twin |= {ours: state[theirs] for ours, theirs in _twin_projections() if theirs in state}
    notes = []
    if lacking:
        notes.append("no momentum twin in it: the twin starts as the weights, the queue anew")
    else:
        own |= {f"{_TWIN}{name}": t for name, t in twin.items()} | _queue(state, where)
        read |= {n for e in _twin_table(config, cross=False) for n in e.theirs} | {t for _, t in _twin_projections()}
        read |= {"image_queue", "text_queue", "queue_ptr"}
        notes.append("the queue's captions have no numbers: none of them is spared as an equal one until it is full")
    objective = ObjectiveConfig(
        feature_width=own["image_projection.weight"].shape[0],
        queue_size=state["image_queue"].shape[1] if "image_queue" in state else ObjectiveConfig().queue_size,
    )
    report = LoadReport(
        matched=tuple(own),
        unexpected=leftovers,
        dropped=tuple(name for name in dropped if name not in read),
        notes=tuple(notes),
    )
    return Pretrained(config, objective, own, report)


def _twice(config: MissConfig, tensors: Mapping[str, Tensor], where: str) -> set[str]:
    """The decoder's names for tensors that it shares, after checking that it does."""
    encoder = {name: t for name, t in tensors.items() if name.startswith("encoder.")}
    shared = {name: t for name, t in both_towers(config, encoder).items() if name not in encoder}
    wrong = [name for name, t in shared.items() if name not in tensors or not torch.equal(t, tensors[name])]
    if wrong:
        raise CheckpointError(
            f"{where}: encoder and decoder differ in {shown(wrong)}: pretraining shares these; this file was trained "
            f"on after they were untied. Convert it as an answering model"
        )
    return set(shared)


def _queue(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    lacking = [name for name in ("image_queue", "text_queue", "queue_ptr") if name not in state]
    if lacking:
        raise CheckpointError(f"{where}: missing: {', '.join(lacking)}, beside a momentum twin")
    image, text = (state[f"{kind}_queue"].T.contiguous() for kind in ("image", "text"))
    queue = {"image": image, "text": text, "pointer": state["queue_ptr"].long().reshape(()).clone()}
    queue["ids"] = torch.full((len(image),), NO_CAPTION, dtype=torch.int64)
    return {f"{_QUEUE}{name}": t for name, t in queue.items()}


def _own_table() -> list[tuple[str, str]]:
    """What pretraining adds, ours and theirs."""
    pairs = [(f"{a}.{kind}", f"{b}.{kind}") for a, b in _OWN.items() for kind in ("weight", "bias")]
    return [*pairs, ("temperature", "temp")]


def _twin_projections() -> list[tuple[str, str]]:
    return [(f"{name}.{kind}", f"{_OWN[name]}_m.{kind}") for name in _PROJECTIONS for kind in ("weight", "bias")]


def _twin_table(config: MissConfig, cross: bool) -> list[names.Entry]:
    """The twin's towers: the same names of ours, theirs with `_m`."""
    table = []
    for entry in table_of(config, "original"):
        if entry.ours.startswith("decoder.") or (not cross and "cross_" in entry.ours):
            continue
        theirs = tuple(
            name.replace("visual_encoder.", "visual_encoder_m.", 1).replace("text_encoder.", "text_encoder_m.", 1)
            for name in entry.theirs
        )
        table.append(names.Entry(entry.ours, theirs))
    return table
