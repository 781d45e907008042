"""What becomes of a pretraining checkpoint: an answering model, or a pretraining checkpoint in our terms.

Knows which of the forms it is in and what the user chose; does not know flags, or how a pickled file is read (it is
handed what was in one).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from miss.models.config import MissConfig
from miss.models.conversion import Choices, Converted, from_ours, with_choices
from miss.models.fitting import POSITIONS, resize_positions
from miss.models.pretrain_files import read_pretraining
from miss.models.pretrain_original import Pretrained, from_original_pretraining
from miss.models.pretrain_weights import MEMORY, fit_pretraining, untie
from miss.models.weights import WEIGHTS


def answering(folder: Path, choices: Choices, verify: bool = True, seed: int = 0) -> Converted:
    """An answering model of one of our pretraining folders, untied, under the user's choices.

    Raises:
        CheckpointError: a file is missing or altered, or tensors do not fit.
    """
    config, _, tensors = read_pretraining(folder, verify=verify)
    untied = untie(config, tensors, seed, str(folder / WEIGHTS))
    chosen = from_ours(untied.config, untied.tensors, choices, str(folder))
    matched = tuple(name for name in chosen.report.matched if name not in untied.report.missing)
    return replace(chosen, report=replace(untied.report, matched=matched, resized=chosen.report.resized))


def read_any(
    source: Path, pickled: tuple[Mapping[str, Tensor], Mapping[str, Any] | None] | None, choices: Choices, verify: bool
) -> Pretrained:
    """A pretraining checkpoint of whoever, in our terms.

    Args:
        pickled: the state dict of a .pth file, and our configuration where it carries one; None where `source` is a
            folder of ours.

    Raises:
        CheckpointError: it is no pretraining checkpoint, or tensors do not fit.
    """
    if pickled is not None:
        state, own = pickled
        config = None if own is None else MissConfig.from_dict(dict(own))
        return from_original_pretraining(state, choices, str(source), config)
    config, objective, tensors = read_pretraining(source, verify=verify)
    config = with_choices(config, choices)
    tensors = dict(tensors)
    for name in (POSITIONS, f"{MEMORY}twin.{POSITIONS}"):
        if name in tensors and tensors[name].shape[1] != config.vision.num_positions and choices.image_size is not None:
            tensors[name] = resize_positions(tensors[name], config.vision.num_positions)
    memory = {name: t for name, t in tensors.items() if name.startswith(MEMORY)}
    own = {name: t for name, t in tensors.items() if name not in memory}
    chosen, report = fit_pretraining(config, objective, own, choices, str(source / WEIGHTS))
    report = replace(report, matched=(*report.matched, *memory))
    return Pretrained(config, objective, chosen | memory, report)
