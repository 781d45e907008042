"""The names of a checkpoint's tensors: ours, the original MISS/BLIP's and Hugging Face's, one table for both ways.

Knows names and how tensors are stacked; does not know files, configurations or what the tensors mean.

The original names (arXiv 2201.12086's code, which MISS shares) and Hugging Face's `BlipForQuestionAnswering` differ in
the vision tower alone. Ours stack what runs as one product: Q, K and V of a text layer's self-attention, and the
cross-attention K and V of all layers of a tower.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Family = Literal["original", "hf"]

# ours -> theirs below a block or a layer; {} takes "weight" and "bias".
_VISION_BLOCK = {
    "original": {
        "norm1": "norm1",
        "attention.qkv": "attn.qkv",
        "attention.output": "attn.proj",
        "norm2": "norm2",
        "mlp.input": "mlp.fc1",
        "mlp.output": "mlp.fc2",
    },
    "hf": {
        "norm1": "layer_norm1",
        "attention.qkv": "self_attn.qkv",
        "attention.output": "self_attn.projection",
        "norm2": "layer_norm2",
        "mlp.input": "mlp.fc1",
        "mlp.output": "mlp.fc2",
    },
}
_VISION_TOP = {
    "original": {
        "vision.cls_token": "visual_encoder.cls_token",
        "vision.position_embedding": "visual_encoder.pos_embed",
        "vision.patch_embed.weight": "visual_encoder.patch_embed.proj.weight",
        "vision.patch_embed.bias": "visual_encoder.patch_embed.proj.bias",
        "vision.norm.weight": "visual_encoder.norm.weight",
        "vision.norm.bias": "visual_encoder.norm.bias",
    },
    "hf": {
        "vision.cls_token": "vision_model.embeddings.class_embedding",
        "vision.position_embedding": "vision_model.embeddings.position_embedding",
        "vision.patch_embed.weight": "vision_model.embeddings.patch_embedding.weight",
        "vision.patch_embed.bias": "vision_model.embeddings.patch_embedding.bias",
        "vision.norm.weight": "vision_model.post_layernorm.weight",
        "vision.norm.bias": "vision_model.post_layernorm.bias",
    },
}
_VISION_LAYERS = {"original": "visual_encoder.blocks", "hf": "vision_model.encoder.layers"}
_TOWERS = {"encoder": "text_encoder", "decoder": "text_decoder.bert"}
_HEAD = {
    "decoder.head.transform.weight": "text_decoder.cls.predictions.transform.dense.weight",
    "decoder.head.transform.bias": "text_decoder.cls.predictions.transform.dense.bias",
    "decoder.head.norm.weight": "text_decoder.cls.predictions.transform.LayerNorm.weight",
    "decoder.head.norm.bias": "text_decoder.cls.predictions.transform.LayerNorm.bias",
    "decoder.head.bias": "text_decoder.cls.predictions.bias",
}
_EMBEDDINGS = {
    "word.weight": "word_embeddings.weight",
    "position.weight": "position_embeddings.weight",
    "norm.weight": "LayerNorm.weight",
    "norm.bias": "LayerNorm.bias",
}
# Copies of other tensors that their files carry: the vocabulary matrix and its bias, which the head shares.
TIED_COPIES = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}
POSITION_IDS = ("text_encoder.embeddings.position_ids", "text_decoder.bert.embeddings.position_ids")
# What pretraining adds to the answering model: momentum twins, queues, projections and matching heads.
_PRETRAINING = re.compile(
    r"(visual_encoder_m|text_encoder_m|vision_proj|vision_proj_m|text_proj|text_proj_m|itm_head)\..+"
    r"|image_queue|text_queue|queue_ptr|ptr_queue|idx_queue|temp"
)


@dataclass(frozen=True)
class Entry:
    """One tensor of ours and the tensors of theirs that it stacks along its first dimension."""

    ours: str
    theirs: tuple[str, ...]


@dataclass(frozen=True)
class Depths:
    """How many layers each tower has."""

    vision: int
    encoder: int
    decoder: int


def entries(depths: Depths, family: Family) -> list[Entry]:
    """Every tensor of an answering model (with an embedding table of its own in each text tower)."""
    table = [Entry(ours, (theirs,)) for ours, theirs in _VISION_TOP[family].items()]
    for i in range(depths.vision):
        for ours, theirs in _VISION_BLOCK[family].items():
            table += _pair(f"vision.blocks.{i}.{ours}", f"{_VISION_LAYERS[family]}.{i}.{theirs}")
    for tower, num_layers in (("encoder", depths.encoder), ("decoder", depths.decoder)):
        table += text_entries(tower, _TOWERS[tower], num_layers)
    table += [Entry(ours, (theirs,)) for ours, theirs in _HEAD.items()]
    return table


def text_entries(tower: str, theirs: str, num_layers: int, cross: bool = True) -> list[Entry]:
    """The tensors of one text tower: `tower` is our prefix, `theirs` BERT's; `cross` adds the cross-attention."""
    table = [Entry(f"{tower}.embeddings.{a}", (f"{theirs}.embeddings.{b}",)) for a, b in _EMBEDDINGS.items()]
    layers = [f"{theirs}.encoder.layer.{i}" for i in range(num_layers)]
    for i, layer in enumerate(layers):
        ours = f"{tower}.layers.{i}"
        table += _pair(
            f"{ours}.self_attention.qkv", *(f"{layer}.attention.self.{p}" for p in ("query", "key", "value"))
        )
        table += _pair(f"{ours}.self_attention.output", f"{layer}.attention.output.dense")
        table += _pair(f"{ours}.self_attention.norm", f"{layer}.attention.output.LayerNorm")
        if cross:
            table += _pair(f"{ours}.cross_attention.query", f"{layer}.crossattention.self.query")
            table += _pair(f"{ours}.cross_attention.output", f"{layer}.crossattention.output.dense")
            table += _pair(f"{ours}.cross_attention.norm", f"{layer}.crossattention.output.LayerNorm")
        table += _pair(f"{ours}.mlp.input", f"{layer}.intermediate.dense")
        table += _pair(f"{ours}.mlp.output", f"{layer}.output.dense")
        table += _pair(f"{ours}.mlp.norm", f"{layer}.output.LayerNorm")
    if cross:
        parts = [f"{layer}.crossattention.self.{p}" for layer in layers for p in ("key", "value")]
        table += _pair(f"{tower}.cross_kv", *parts)
    return table


def _pair(ours: str, *theirs: str) -> list[Entry]:
    return [Entry(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs)) for kind in ("weight", "bias")]


def stack(table: Iterable[Entry], theirs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Their tensors under our names, and the tensors of ours that lack parts, each with the parts' names.

    A tensor of ours whose parts are all there is stacked; one that lacks a part is left out.

    Raises:
        ValueError: parts of one tensor differ in shape.
    """
    ours: dict[str, Tensor] = {}
    lacking: dict[str, list[str]] = {}
    for entry in table:
        absent = [name for name in entry.theirs if name not in theirs]
        if absent:
            lacking[entry.ours] = absent
            continue
        parts = [theirs[name] for name in entry.theirs]
        for name, part in zip(entry.theirs, parts, strict=True):
            if part.shape != parts[0].shape:
                raise ValueError(
                    f"{name} is {list(part.shape)}, but {entry.theirs[0]} beside it is {list(parts[0].shape)}"
                )
        ours[entry.ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return ours, lacking


def split(table: Iterable[Entry], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names: the inverse of `stack`, every tensor with memory of its own.

    Raises:
        KeyError: a tensor of the table is not there.
    """
    theirs: dict[str, Tensor] = {}
    for entry in table:
        whole = ours[entry.ours]
        for name, part in zip(entry.theirs, whole.chunk(len(entry.theirs)), strict=True):
            theirs[name] = part.clone(memory_format=torch.contiguous_format)
    return theirs


def count_layers(names: Iterable[str], prefix: str) -> int:
    """One more than the highest layer number under `prefix.`; 0 where there is none."""
    start = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return max((int(m.group(1)) + 1 for name in names if (m := start.match(name))), default=0)


def depths_of(names: Iterable[str], family: Family) -> Depths:
    """How deep each tower of their checkpoint is."""
    names = list(names)
    return Depths(
        count_layers(names, _VISION_LAYERS[family]),
        count_layers(names, "text_encoder.encoder.layer"),
        count_layers(names, "text_decoder.bert.encoder.layer"),
    )


def family_of(names: Iterable[str]) -> Family | Literal["ours"] | None:
    """Whose names these are; None where they are nobody's that is known here."""
    names = set(names)
    if "visual_encoder.cls_token" in names:
        return "original"
    if "vision_model.embeddings.class_embedding" in names:
        return "hf"
    return "ours" if "vision.cls_token" in names else None


def is_pretraining(name: str) -> bool:
    """Whether a tensor of an original checkpoint belongs to pretraining alone."""
    return _PRETRAINING.fullmatch(name) is not None


def is_adapter(name: str) -> bool:
    """Whether a tensor belongs to a tower that the peft library has wrapped."""
    return ".base_model.model." in name or name.startswith("base_model.model.")
