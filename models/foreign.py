"""Checkpoints of others: original MISS and BLIP files, and Hugging Face's `BlipForQuestionAnswering`, to and from ours.

Knows their configurations and what they leave unsaid; does not know files: it is handed state dicts and JSON objects.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from miss.models import names
from miss.models.config import (
    GenerationConfig,
    MissConfig,
    PreprocessConfig,
    TextConfig,
    VisionConfig,
)
from miss.models.weights import (
    POSITIONS,
    CheckpointError,
    LoadReport,
    Resized,
    allowed,
    fit,
    model_shapes,
    resize_positions,
    shown,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
OWN_KEY = "miss_engine"  # where their configuration carries ours, so that a way there and back loses nothing
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
# What Hugging Face's classes assume where a config.json leaves a key out (transformers 5.23).
_HF_VISION = {"num_attention_heads": 12, "layer_norm_eps": 1e-5}
_HF_TEXT = {
    "num_attention_heads": 8,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


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


def from_original(
    state: Mapping[str, Tensor], own: Mapping[str, Any] | None, choices: Choices, where: str
) -> Converted:
    """A MISS or BLIP state dict, for question answering or from pretraining, of any width and depth.

    Args:
        own: our own configuration, where the file carries one (we wrote it).

    Raises:
        CheckpointError: tensors are missing, unexpected or of wrong shapes, or belong to the peft library's wrappers.
    """
    tensors, leftovers, dropped = _renamed(state, "original", choices.allow_missing, where)
    base = MissConfig.from_dict(dict(own)) if own else _original_config(tensors, choices)
    return _finished(base, tensors, leftovers, dropped, choices, where)


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
    tensors, leftovers, dropped = _renamed(state, "hf", choices.allow_missing, where)
    own = config.get(OWN_KEY)
    if own:
        base = MissConfig.from_dict(dict(own))
    else:
        base = _hf_config(tensors, config, choices)
        base = replace(
            base,
            preprocess=_hf_preprocess(preprocessor, base.vision.image_size),
            generation=_hf_generation(generation, base.decoder.max_positions),
        )
        _check_against(config, base, where)
    return _finished(base, tensors, leftovers, dropped, choices, where)


def from_ours(config: MissConfig, tensors: Mapping[str, Tensor], choices: Choices, where: str) -> Converted:
    """One of our own checkpoints under new choices."""
    return _finished(config, dict(tensors), (), (), choices, where)


def to_original(config: MissConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that MISS and BLIP load strictly: position ids and the head's copies included."""
    state = names.split(_table(config, "original"), _untied(config, tensors))
    for name, tower in zip(names.POSITION_IDS, (config.encoder, config.decoder), strict=True):
        state[name] = torch.arange(tower.max_positions)[None]
    for copy, source in names.TIED_COPIES.items():
        state[copy] = state[source]
    return state


def to_hf(config: MissConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder, without the tied copies that its class makes itself."""
    return names.split(_table(config, "hf"), _untied(config, tensors))


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


def _renamed(
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


def _finished(
    config: MissConfig,
    tensors: dict[str, Tensor],
    leftovers: Sequence[str],
    dropped: Sequence[str],
    choices: Choices,
    where: str,
) -> Converted:
    """Applies the choices, then checks every tensor against the shapes of the model that the configuration makes."""
    if choices.behaviour is not None:
        config = replace(config, behaviour=choices.behaviour)
    resized = []
    if choices.image_size is not None and choices.image_size != config.vision.image_size:
        vision = replace(config.vision, image_size=choices.image_size)
        before = tuple(tensors[POSITIONS].shape)
        tensors[POSITIONS] = resize_positions(tensors[POSITIONS], vision.num_positions)
        resized.append(Resized(POSITIONS, before, tuple(tensors[POSITIONS].shape)))
        config = replace(config, vision=vision)
    if choices.image_size is not None:
        config = replace(config, preprocess=replace(config.preprocess, image_size=choices.image_size))
    if config.tie_embeddings:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("decoder.embeddings.")}
    extra = {name: torch.empty(0) for name in leftovers}
    chosen, report = fit(
        model_shapes(config), tensors | extra, choices.allow_missing, choices.allow_unexpected, where=where
    )
    matched = tuple(name for name in report.matched if name not in {r.name for r in resized})
    return Converted(
        config, chosen, dataclasses.replace(report, matched=matched, resized=tuple(resized), dropped=tuple(dropped))
    )


def _original_config(tensors: dict[str, Tensor], choices: Choices) -> MissConfig:
    """Sizes from shapes; what shapes do not tell (epsilons, dropout) from the original's code."""
    vision = _vision_config(tensors, choices.num_heads, MissConfig.preset("base").vision)
    encoder = _text_config(tensors, "encoder", choices.text_num_heads, TextConfig())
    decoder = _text_config(tensors, "decoder", choices.text_num_heads, TextConfig())
    if decoder.source_width != encoder.hidden_size:
        # Pretraining's decoder reads image tokens; the answering decoder reads question states, of another width.
        # The tensor is taken out, so that it is missing: allowed or an error, never silently random.
        del tensors["decoder.cross_kv.weight"]
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


def _hf_config(tensors: Mapping[str, Tensor], config: Mapping[str, Any], choices: Choices) -> MissConfig:
    theirs_vision = _HF_VISION | dict(config.get("vision_config") or {})
    theirs_text = _HF_TEXT | dict(config.get("text_config") or {})
    vision = _vision_config(tensors, choices.num_heads or theirs_vision["num_attention_heads"], VisionConfig())
    vision = replace(vision, layer_norm_eps=theirs_vision["layer_norm_eps"])
    heads = choices.text_num_heads or theirs_text["num_attention_heads"]
    like = TextConfig(
        layer_norm_eps=theirs_text["layer_norm_eps"],
        dropout=float(theirs_text["hidden_dropout_prob"]),
        attention_dropout=float(theirs_text["attention_probs_dropout_prob"]),
    )
    encoder = _text_config(tensors, "encoder", heads, like)
    return MissConfig(
        vision,
        encoder,
        _text_config(tensors, "decoder", heads, like),
        max_question_length=min(35, encoder.max_positions),
        name="blip-converted",
    )


def _vision_config(tensors: Mapping[str, Tensor], num_heads: int | None, like: VisionConfig) -> VisionConfig:
    patches = _needed(tensors, "vision.patch_embed.weight")
    width, patch = patches.shape[0], patches.shape[-1]
    return replace(
        like,
        image_size=round((_needed(tensors, POSITIONS).shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
        hidden_size=width,
        num_layers=names.count_layers(tensors, "vision.blocks"),
        num_heads=num_heads or max(1, width // 64),
        intermediate_size=_needed(tensors, "vision.blocks.0.mlp.input.weight").shape[0],
    )


def _text_config(tensors: Mapping[str, Tensor], tower: str, num_heads: int | None, like: TextConfig) -> TextConfig:
    words = _needed(tensors, f"{tower}.embeddings.word.weight")
    return replace(
        like,
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        num_layers=names.count_layers(tensors, f"{tower}.layers"),
        num_heads=num_heads or max(1, words.shape[1] // 64),
        intermediate_size=_needed(tensors, f"{tower}.layers.0.mlp.input.weight").shape[0],
        max_positions=_needed(tensors, f"{tower}.embeddings.position.weight").shape[0],
        source_width=_needed(tensors, f"{tower}.cross_kv.weight").shape[1],
    )


def _needed(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"missing: {name}, without which the model's sizes are not known")
    return tensors[name]


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


def _table(config: MissConfig, family: names.Family) -> list[names.Entry]:
    depths = names.Depths(config.vision.num_layers, config.encoder.num_layers, config.decoder.num_layers)
    return names.entries(depths, family)


def _untied(config: MissConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Theirs have a table in each tower: a shared one is written twice."""
    own = dict(tensors)
    if config.tie_embeddings:
        for name, value in tensors.items():
            if name.startswith("encoder.embeddings."):
                own[f"decoder.{name.removeprefix('encoder.')}"] = value
    return own


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
