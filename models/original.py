"""Checkpoints of the original MISS and of BLIP, whose names are the same: to and from ours.

Knows what the original's code leaves unsaid in its files; does not know files, or Hugging Face's form.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from miss.models import names
from miss.models.config import GenerationConfig, MissConfig, PreprocessConfig, TextConfig
from miss.models.conversion import Choices, Converted, finished, renamed, table_of, text_config, untied, vision_config

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def from_original(
    state: Mapping[str, Tensor], own: Mapping[str, Any] | None, choices: Choices, where: str
) -> Converted:
    """A MISS or BLIP state dict, for question answering or from pretraining, of any width and depth.

    Args:
        own: our own configuration, where the file carries one (we wrote it).

    Raises:
        CheckpointError: tensors are missing, unexpected or of wrong shapes, or belong to the peft library's wrappers.
    """
    tensors, leftovers, dropped = renamed(state, "original", choices.allow_missing, where)
    base = MissConfig.from_dict(dict(own)) if own is not None else original_config(tensors, choices)
    converted = finished(base, tensors, leftovers, dropped, choices, where)
    if not any(names.is_pretraining(name) for name in dropped):
        return converted
    note = "from pretraining: what the decoder shared with the encoder is its own from here on, copied"
    drawn = [name for name in converted.report.missing if name.startswith("decoder.cross_kv")]
    notes = (
        note,
        *(f"{name} was drawn: it read image tokens, of another width than question states" for name in drawn),
    )
    return replace(converted, report=replace(converted.report, notes=notes))


def to_original(config: MissConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that MISS and BLIP load strictly: position ids and the head's copies included."""
    state = names.split(table_of(config, "original"), untied(config, tensors))
    for name, tower in zip(names.POSITION_IDS, (config.encoder, config.decoder), strict=True):
        state[name] = torch.arange(tower.max_positions)[None]
    for copy, source in names.TIED_COPIES.items():
        state[copy] = state[source]
    return state


def original_config(tensors: dict[str, Tensor], choices: Choices) -> MissConfig:
    """Sizes from shapes; what shapes do not tell (epsilons, dropout) from the original's code."""
    vision = vision_config(tensors, choices.num_heads, MissConfig.preset("base").vision)
    encoder = text_config(tensors, "encoder", choices.text_num_heads, TextConfig())
    decoder = text_config(tensors, "decoder", choices.text_num_heads, TextConfig())
    if decoder.source_width != encoder.hidden_size:
        # Pretraining's decoder reads image tokens; the answering decoder reads question states, of another width.
        # These two are taken out, so that they are missing: allowed or an error, never silently random.
        del tensors["decoder.cross_kv.weight"], tensors["decoder.cross_kv.bias"]
        decoder = replace(decoder, source_width=encoder.hidden_size)
    size = vision.image_size
    preprocess = PreprocessConfig(image_size=size)
    if choices.preprocess == "blip":
        preprocess = PreprocessConfig(size, "bicubic", CLIP_MEAN, CLIP_STD, 1 / 255)
    # Both answer with 3 beams and at most 10 tokens, [DEC] included.
    generation = GenerationConfig(num_beams=3, max_new_tokens=min(9, decoder.max_positions))
    return MissConfig(
        vision,
        encoder,
        decoder,
        preprocess,
        generation=generation,
        max_question_length=min(35, encoder.max_positions),
        name=f"{choices.preprocess}-converted",
    )
