"""What translating a checkpoint of others has in common, whoever they are: choices, sizes from shapes, a last check.

Knows their tensors under their names and our configuration; does not know files, or what their own settings mean
(`original.py`, `hugging_face.py`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from miss.models import names
from miss.models.config import MissConfig, TextConfig, VisionConfig
from miss.models.fitting import (
    POSITIONS,
    CheckpointError,
    LoadReport,
    Resized,
    allowed,
    fit,
    resize_positions,
    shown,
)
from miss.models.weights import model_shapes

OWN_KEY = "miss_engine"  # where their configuration carries ours, so that a way there and back loses nothing

DECODER_EMBEDDINGS = "decoder.embeddings."


@dataclass(frozen=True)
class Choices:
    """What a user may decide about a conversion.

    image_size:      interpolate the position table to this many pixels; None keeps it
    behaviour:       None is `correct`, or what the checkpoint says
    preprocess:      whose preprocessing an original file was trained with: MISS's or BLIP's
    num_heads:       of the image encoder; None is 64 wide, or what the checkpoint says
    text_num_heads:  of both text towers
    """

    image_size: int | None = None
    behaviour: Literal["correct", "compat"] | None = None
    preprocess: Literal["miss", "blip"] = "miss"
    num_heads: int | None = None
    text_num_heads: int | None = None
    allow_missing: Sequence[str] = ()
    allow_unexpected: Sequence[str] = ()


@dataclass(frozen=True)
class Converted:
    """A checkpoint in our terms: every tensor that its configuration asks for, and no other."""

    config: MissConfig
    tensors: dict[str, Tensor]
    report: LoadReport


def from_ours(config: MissConfig, tensors: Mapping[str, Tensor], choices: Choices, where: str) -> Converted:
    """One of our own checkpoints under new choices."""
    return finished(config, dict(tensors), (), (), choices, where)


def renamed(
    state: Mapping[str, Tensor], family: names.Family, allow_missing: Sequence[str], where: str
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """Our tensors, what nobody asked for, and what is dropped by rule."""
    wrapped = [name for name in state if names.is_adapter(name)]
    if wrapped:
        raise CheckpointError(
            f"{where}: {len(wrapped)} tensors ({wrapped[0]}, …) are wrapped by the peft library: merge the adapters "
            f"first (`model.merge_and_unload()`), then convert the merged state dict"
        )
    state = _with_tied_sources(state, where)
    depths = names.depths_of(state, family)
    for tower, depth in dataclasses.asdict(depths).items():
        if depth == 0:
            raise CheckpointError(f"{where}: missing: no layer of the {tower} tower; wanted a question answering model")
    table = names.entries(depths, family)
    try:
        tensors, lacking = names.stack(table, state)
    except ValueError as error:
        raise CheckpointError(f"{where}: wrong shape: {error}") from None
    absent = [part for ours, parts in lacking.items() if not allowed(ours, allow_missing) for part in parts]
    if absent:
        raise CheckpointError(f"{where}: missing: {shown(absent)}")
    known = {name for entry in table for name in entry.theirs}
    rest = [name for name in state if name not in known]
    dropped = tuple(n for n in rest if n in names.TIED_COPIES or n in names.POSITION_IDS or names.is_pretraining(n))
    return tensors, tuple(name for name in rest if name not in dropped), dropped


def finished(
    config: MissConfig,
    tensors: dict[str, Tensor],
    leftovers: Sequence[str],
    dropped: Sequence[str],
    choices: Choices,
    where: str,
) -> Converted:
    """Applies the choices, then checks every tensor against the shapes of the model that the configuration makes."""
    size, resized = config.vision.image_size, []
    config = with_choices(config, choices)
    if config.vision.image_size != size:
        before = needed(tensors, POSITIONS)
        tensors[POSITIONS] = resize_positions(before, config.vision.num_positions)
        resized.append(Resized(POSITIONS, tuple(before.shape), tuple(tensors[POSITIONS].shape)))
    if config.tie_embeddings and _same_embeddings(tensors):
        tensors = {name: value for name, value in tensors.items() if not name.startswith(DECODER_EMBEDDINGS)}
    elif config.tie_embeddings:
        # Ours once, then trained elsewhere with a table in each tower.
        config = replace(config, tie_embeddings=False)
    extra = {name: torch.empty(0) for name in leftovers}
    chosen, report = fit(
        model_shapes(config), tensors | extra, choices.allow_missing, choices.allow_unexpected, where=where
    )
    matched = tuple(name for name in report.matched if name not in {r.name for r in resized})
    return Converted(
        config, chosen, dataclasses.replace(report, matched=matched, resized=tuple(resized), dropped=tuple(dropped))
    )


def with_choices(config: MissConfig, choices: Choices) -> MissConfig:
    """The configuration with what the user decided in it."""
    vision, encoder, decoder, preprocess = config.vision, config.encoder, config.decoder, config.preprocess
    if choices.image_size is not None:
        vision = replace(vision, image_size=choices.image_size)
        preprocess = replace(preprocess, image_size=choices.image_size)
    if choices.num_heads is not None:
        vision = replace(vision, num_heads=choices.num_heads)
    if choices.text_num_heads is not None:
        encoder, decoder = (replace(text, num_heads=choices.text_num_heads) for text in (encoder, decoder))
    behaviour = choices.behaviour or config.behaviour
    return replace(config, vision=vision, encoder=encoder, decoder=decoder, preprocess=preprocess, behaviour=behaviour)


def _same_embeddings(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the decoder's embeddings, where there are any, are the encoder's bit by bit."""
    return all(
        torch.equal(value, tensors[name.replace("decoder", "encoder", 1)])
        for name, value in tensors.items()
        if name.startswith(DECODER_EMBEDDINGS)
    )


def _with_tied_sources(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Fills a tensor in from its tied copy where a file kept only that, and refuses copies that differ."""
    filled = dict(state)
    for copy, source in names.TIED_COPIES.items():
        if copy in filled and source not in filled:
            filled[source] = filled[copy]
        elif copy in filled and not torch.equal(filled[copy], filled[source]):
            raise CheckpointError(
                f"{where}: {copy} differs from {source}: a head of its own is not supported, the model ties the two"
            )
    return filled


def vision_config(tensors: Mapping[str, Tensor], num_heads: int | None, like: VisionConfig) -> VisionConfig:
    """The image encoder's sizes from its tensors' shapes; heads that nobody states are 64 wide."""
    patches = needed(tensors, "vision.patch_embed.weight")
    width, patch = patches.shape[0], patches.shape[-1]
    return replace(
        like,
        image_size=round((needed(tensors, POSITIONS).shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
        hidden_size=width,
        num_layers=names.count_layers(tensors, "vision.blocks"),
        num_heads=num_heads or max(1, width // 64),
        intermediate_size=needed(tensors, "vision.blocks.0.mlp.input.weight").shape[0],
    )


def text_config(tensors: Mapping[str, Tensor], tower: str, num_heads: int | None, like: TextConfig) -> TextConfig:
    """A text tower's sizes from its tensors' shapes; heads that nobody states are 64 wide."""
    words = needed(tensors, f"{tower}.embeddings.word.weight")
    return replace(
        like,
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        num_layers=names.count_layers(tensors, f"{tower}.layers"),
        num_heads=num_heads or max(1, words.shape[1] // 64),
        intermediate_size=needed(tensors, f"{tower}.layers.0.mlp.input.weight").shape[0],
        max_positions=needed(tensors, f"{tower}.embeddings.position.weight").shape[0],
        source_width=needed(tensors, f"{tower}.cross_kv.weight").shape[1],
    )


def needed(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor that must be there.

    Raises:
        CheckpointError: it is not.
    """
    if name not in tensors:
        raise CheckpointError(f"missing: {name}, without which the model's sizes are not known")
    return tensors[name]


def table_of(config: MissConfig, family: names.Family) -> list[names.Entry]:
    """The names of every tensor of this configuration, ours and theirs."""
    depths = names.Depths(config.vision.num_layers, config.encoder.num_layers, config.decoder.num_layers)
    return names.entries(depths, family)


def untied(config: MissConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Theirs have a table in each tower: a shared one is written twice."""
    own = dict(tensors)
    if config.tie_embeddings:
        for name, value in tensors.items():
            if name.startswith("encoder.embeddings."):
                own[f"decoder.{name.removeprefix('encoder.')}"] = value
    return own
