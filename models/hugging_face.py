"""Hugging Face's `BlipForQuestionAnswering`: its tensors and the JSON files of its folder, to and from ours.

Knows that class's settings and defaults; does not know files, and imports nothing of the transformers library.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from miss.models import names
from miss.models.config import GenerationConfig, MissConfig, PreprocessConfig, TextConfig, VisionConfig
from miss.models.conversion import (
    OWN_KEY,
    Choices,
    Converted,
    finished,
    renamed,
    table_of,
    text_config,
    untied,
    vision_config,
)
from miss.models.fitting import CheckpointError
from miss.models.original import CLIP_MEAN, CLIP_STD

_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
# What Hugging Face's classes assume where a config.json leaves a key out (transformers 5.23).
_VISION_DEFAULTS: dict[str, Any] = {"num_attention_heads": 12, "layer_norm_eps": 1e-5}
_TEXT_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 8,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def from_hf(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    generation: Mapping[str, Any],
    choices: Choices,
    where: str,
) -> Converted:
    """A Hugging Face `BlipForQuestionAnswering`: its tensors and the contents of its JSON files ({} where absent).

    Raises:
        CheckpointError: as `from_original`; also where config.json and the tensors' shapes disagree.
    """
    tensors, leftovers, dropped = renamed(state, "hf", choices.allow_missing, where)
    own = config.get(OWN_KEY)
    if own:
        base = MissConfig.from_dict(dict(own))
    else:
        base = _hf_config(tensors, config, preprocessor, generation, choices)
        _check_against(config, base, where)
    return finished(base, tensors, leftovers, dropped, choices, where)


def to_hf(config: MissConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder, without the tied copies that its class makes itself."""
    return names.split(table_of(config, "hf"), untied(config, tensors))


def hf_files(config: MissConfig) -> dict[str, dict[str, Any]]:
    """The JSON files of a Hugging Face folder.

    Raises:
        CheckpointError: the model is one that Hugging Face's class cannot express: it has one text configuration for
            both towers, and both read a source as wide as the image encoder.
    """
    text = _common_text(config)
    vision, preprocess = config.vision, config.preprocess
    tokens = {"bos_token_id": config.tokens.dec, "sep_token_id": config.tokens.sep, "pad_token_id": config.tokens.pad}
    return {
        "config.json": {
            "architectures": ["BlipForQuestionAnswering"],
            "model_type": "blip",
            "text_config": {
                "model_type": "blip_text_model",
                "vocab_size": text.vocab_size,
                "hidden_size": text.hidden_size,
                "encoder_hidden_size": text.source_width,
                "intermediate_size": text.intermediate_size,
                "num_hidden_layers": text.num_layers,
                "num_attention_heads": text.num_heads,
                "max_position_embeddings": text.max_positions,
                "hidden_act": "gelu",
                "layer_norm_eps": text.layer_norm_eps,
                "hidden_dropout_prob": text.dropout,
                "attention_probs_dropout_prob": text.attention_dropout,
                "eos_token_id": config.tokens.sep,
                **tokens,
            },
            "vision_config": {
                "model_type": "blip_vision_model",
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "hidden_size": vision.hidden_size,
                "intermediate_size": vision.intermediate_size,
                "num_hidden_layers": vision.num_layers,
                "num_attention_heads": vision.num_heads,
                "hidden_act": "gelu",
                "layer_norm_eps": vision.layer_norm_eps,
            },
            OWN_KEY: config.to_dict(),
        },
        "preprocessor_config.json": {
            "image_processor_type": "BlipImageProcessor",
            "processor_class": "BlipProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": preprocess.image_size, "width": preprocess.image_size},
            "resample": {name: number for number, name in _RESAMPLE.items()}[preprocess.resample],
            "do_rescale": True,
            "rescale_factor": preprocess.rescale_factor,
            "do_normalize": preprocess.image_mean != (0.0, 0.0, 0.0) or preprocess.image_std != (1.0, 1.0, 1.0),
            "image_mean": list(preprocess.image_mean),
            "image_std": list(preprocess.image_std),
        },
        "generation_config.json": {
            "num_beams": config.generation.num_beams,
            "max_new_tokens": config.generation.max_new_tokens,
            "eos_token_id": config.tokens.sep,
            **{key: value for key, value in tokens.items() if key != "sep_token_id"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": True,
            "model_max_length": text.max_positions,
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "mask_token": "[MASK]",
            "bos_token": "[DEC]",
        },
    }


def _hf_config(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    generation: Mapping[str, Any],
    choices: Choices,
) -> MissConfig:
    theirs_vision: dict[str, Any] = _VISION_DEFAULTS | dict(config.get("vision_config") or {})
    theirs_text: dict[str, Any] = _TEXT_DEFAULTS | dict(config.get("text_config") or {})
    vision = vision_config(tensors, choices.num_heads or theirs_vision["num_attention_heads"], VisionConfig())
    vision = replace(vision, layer_norm_eps=theirs_vision["layer_norm_eps"])
    heads = choices.text_num_heads or theirs_text["num_attention_heads"]
    like = TextConfig(
        layer_norm_eps=theirs_text["layer_norm_eps"],
        dropout=float(theirs_text["hidden_dropout_prob"]),
        attention_dropout=float(theirs_text["attention_probs_dropout_prob"]),
    )
    encoder, decoder = (text_config(tensors, tower, heads, like) for tower in ("encoder", "decoder"))
    return MissConfig(
        vision,
        encoder,
        decoder,
        _hf_preprocess(preprocessor, vision.image_size),
        generation=_hf_generation(generation, decoder.max_positions),
        max_question_length=min(35, encoder.max_positions),
        name="blip-converted",
    )


def _hf_preprocess(values: Mapping[str, Any], image_size: int) -> PreprocessConfig:
    """What BlipImageProcessor does with these settings, which default to BLIP's own."""
    size = values.get("size", image_size)
    if isinstance(size, Mapping):
        height, width = size.get("height"), size.get("width")
        if height != width or height is None:
            raise CheckpointError(f'preprocessor_config.json: size is {dict(size)}; wanted equal "height" and "width"')
        size = height
    resample = _RESAMPLE.get(values.get("resample", 3))
    if resample is None:
        raise CheckpointError(
            f"preprocessor_config.json: resample is {values['resample']!r}; accepted: 2 (bilinear), 3 (bicubic)"
        )
    normalize, rescale = values.get("do_normalize", True), values.get("do_rescale", True)
    return PreprocessConfig(
        image_size=size,
        resample=resample,  # type: ignore[arg-type]
        image_mean=tuple(values.get("image_mean", CLIP_MEAN)) if normalize else (0.0, 0.0, 0.0),
        image_std=tuple(values.get("image_std", CLIP_STD)) if normalize else (1.0, 1.0, 1.0),
        rescale_factor=float(values.get("rescale_factor", 1 / 255)) if rescale else 1.0,
    )


def _hf_generation(values: Mapping[str, Any], max_positions: int) -> GenerationConfig:
    """Their `max_length` (default 20) counts [DEC]; our `max_new_tokens` does not."""
    new_tokens = values.get("max_new_tokens") or (values.get("max_length") or 20) - 1
    return GenerationConfig(int(values.get("num_beams") or 1), min(int(new_tokens), max_positions))


def _check_against(theirs: Mapping[str, Any], config: MissConfig, where: str) -> None:
    """Compares the sizes that a config.json states with those of the tensors."""
    for part, sizes in (("vision_config", config.vision), ("text_config", config.encoder)):
        stated = theirs.get(part) or {}
        for key, value in (
            ("hidden_size", sizes.hidden_size),
            ("intermediate_size", sizes.intermediate_size),
            ("num_hidden_layers", sizes.num_layers),
            ("vocab_size", getattr(sizes, "vocab_size", None)),
            ("max_position_embeddings", getattr(sizes, "max_positions", None)),
            ("patch_size", getattr(sizes, "patch_size", None)),
            ("image_size", getattr(sizes, "image_size", None)),
        ):
            if value is not None and key in stated and stated[key] != value:
                raise CheckpointError(f"{where}: config.json says {part}.{key} {stated[key]}, its tensors have {value}")


def _common_text(config: MissConfig) -> TextConfig:
    different = [
        field.name
        for field in dataclasses.fields(TextConfig)
        if getattr(config.encoder, field.name) != getattr(config.decoder, field.name)
    ]
    if config.encoder.source_width != config.encoder.hidden_size and "source_width" not in different:
        different.append("source_width")
    if different:
        raise CheckpointError(
            f"Hugging Face's BlipForQuestionAnswering has one text configuration for both towers, but encoder and "
            f"decoder differ in {', '.join(different)}: convert with --to miss or --to blip"
        )
    return config.encoder
