"""Pretraining checkpoint folders: those of an answering model, with the objective in config.json and the memory beside
the weights.

Knows which files say what; does not know names of others, training state (optimisers, schedules) or processes.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from miss.models.config import MissConfig, from_dict
from miss.models.fitting import CheckpointError, LoadReport
from miss.models.pretrain import MissPretrain, ObjectiveConfig
from miss.models.pretrain_weights import load_pretraining
from miss.models.tensor_file import read_tensors
from miss.models.weights import (
    CONFIG,
    PRETRAINING_TYPE,
    WEIGHTS,
    configuration,
    naming,
    read_json,
    verify_files,
    write_checkpoint,
)


def write_pretraining(
    config: MissConfig,
    objective: ObjectiveConfig,
    tensors: Mapping[str, Tensor],
    folder: str | os.PathLike[str],
    *,
    tokenizer: bytes | None = None,
    card: str | None = None,
) -> None:
    """Writes a folder from `saved_pretraining`'s tensors, with or without the memory; all of it or nothing."""
    write_checkpoint(config, tensors, folder, tokenizer=tokenizer, card=card, objective=asdict(objective))


def is_pretraining(folder: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint folder is of a pretraining model.

    Raises:
        CheckpointError: its configuration is missing or is not JSON.
    """
    return read_json(Path(folder) / CONFIG).get("model_type") == PRETRAINING_TYPE


def read_pretraining(
    folder: str | os.PathLike[str], *, verify: bool = True
) -> tuple[MissConfig, ObjectiveConfig, dict[str, Tensor]]:
    """Configuration, objective and tensors, not yet held against the model's shapes.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or the folder is no pretraining checkpoint.
        ConfigError: an unknown key or a wrong value; the message names the file.
    """
    folder = Path(folder)
    values = read_json(folder / CONFIG)
    model_type = values.pop("model_type", None)
    if model_type != PRETRAINING_TYPE:
        raise CheckpointError(
            f'{folder / CONFIG}: model_type is {model_type!r}; wanted "{PRETRAINING_TYPE}", as pretraining and '
            f"`miss convert --pretraining` write it"
        )
    with naming(folder / CONFIG):
        objective = from_dict(ObjectiveConfig, values.pop("objective", {}))
    config = configuration(folder, values)
    tensors, header = read_tensors(folder / WEIGHTS)
    if verify:
        verify_files(folder, tensors, header)
    return config, objective, tensors


def load_pretrained(folder: str | os.PathLike[str], *, verify: bool = True) -> tuple[MissPretrain, LoadReport]:
    """The pretraining model of a folder, and what became of each tensor.

    Raises:
        CheckpointError, ConfigError: as `read_pretraining`, or tensors that do not fit.
    """
    config, objective, tensors = read_pretraining(folder, verify=verify)
    model = MissPretrain(config, objective)
    return model, load_pretraining(model, tensors, str(Path(folder) / WEIGHTS))
