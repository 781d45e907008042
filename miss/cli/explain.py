"""`miss explain`: calls every operation with shapes of a model and shows which implementation ran, and why not others.

Knows the public functions of the operations and a preset's sizes; does not know any implementation.
"""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from miss.kernels import extension, registry
from miss.kernels.attention import attention, attention_varlen
from miss.kernels.contrastive import contrastive_loss, hard_negatives
from miss.kernels.cross_attention import KV, Tokens, cross_attention
from miss.kernels.cross_entropy import linear_cross_entropy
from miss.kernels.decode_attention import decode_attention
from miss.kernels.decoder_step import Cache, Decoder, Layer, Matrix, Norm, decoder_step
from miss.kernels.decoder_step import prepare as prepare_decoder
from miss.kernels.ema import ema_
from miss.kernels.gelu_mlp import gelu_mlp
from miss.kernels.kv_cache import kv_append, kv_reorder
from miss.kernels.layer_norm import add_layer_norm, add_layer_norm_quantised, layer_norm, layer_norm_quantised
from miss.kernels.linear import linear, linear_into, prepare
from miss.kernels.linear_top_k import linear_at, linear_top_k
from miss.kernels.patch_embed import patch_embed
from miss.kernels.quant_linear import (
    PackedWeight,
    pack_fp8,
    pack_int4,
    pack_int8,
    pack_llm_int8,
    pack_nf4,
    quant_embedding,
    quant_linear,
    quant_linear_into,
    quant_linear_rows,
    quant_linear_rows_quantised,
    quantise_rows,
)
from miss.kernels.quant_linear import prepare as prepare_packed
from miss.kernels.tree_attention import tree_attention
from miss.models.config import MissConfig, did_you_mean


@dataclass
class Args:
    """Show which implementation of each operation runs here, and why not the others."""

    op: tuple[str, ...] = ()
    """Only these operations; all where none is named."""
    preset: Literal["small", "base", "large"] = "small"
    """Whose shapes to ask about."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on cpu, bfloat16 on cuda."""
    json: bool = False
    """One JSON object instead of text."""


@dataclass
class Choice:
    """One choice that the registry made."""

    op: str
    inputs: list[dict[str, Any]]
    runs: str | None
    gradient: str | None
    candidates: list[dict[str, str | None]] = field(default_factory=list)


class Shapes:
    """Random inputs in the sizes of a preset: 2 images, 4 questions, 20 tokens of text."""

    images, rows, text = 2, 4, 20

    def __init__(self, config: MissConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        vision, encoder = config.vision, config.encoder
        self.tokens = (config.preprocess.image_size // vision.patch_size) ** 2 + 1
        self.heads, self.width = encoder.num_heads, encoder.hidden_size
        self.head = self.width // self.heads

    def leaf(self, *shape: int) -> Tensor:
        """A float tensor that asks for a gradient."""
        return torch.randn(*shape, dtype=self.dtype, device=self.device).requires_grad_()

    def whole(self, *values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def pixels(self) -> Tensor:
        side = self.config.preprocess.image_size
        return torch.randint(0, 256, (self.images, side, side, 3), dtype=torch.uint8, device=self.device)

    def heads_of(self, *leading: int) -> Tensor:
        return self.leaf(*leading, self.heads, self.head)

    def cache(self) -> Tensor:
        return self.heads_of(self.rows, 40).detach()


def calls(s: Shapes) -> dict[str, Callable[[], Any]]:
    """By operation, a call of its public function."""
    vision, width = s.config.vision, s.width
    wide, inner, vocabulary = vision.hidden_size, vision.intermediate_size, s.config.decoder.vocab_size
    index, slots, lengths = s.whole(0, 0, 1, 1), s.whole(0, 1, 2, 3), s.whole(5, 7, 9, 11)
    affine = (torch.ones(3, device=s.device), torch.zeros(3, device=s.device))
    image, text = (s.images, s.tokens, wide), (s.rows, s.text, width)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=s.device)

    def labels() -> Tensor:
        return s.whole(*range(s.rows * 5), dtype=torch.int64)

    def new() -> Tensor:
        return s.heads_of(s.rows).detach()

    def by_head() -> Tensor:
        """(I, N, H, D), in memory head by head."""
        return s.heads_of(s.images).new_empty(s.images, s.heads, s.tokens, s.head).transpose(1, 2)

    def attend() -> Tensor:
        q, k, v = s.leaf(s.images, s.tokens, 3, vision.num_heads, wide // vision.num_heads).unbind(2)
        return attention(q, k, v)

    def project(x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight, s.leaf(wide), s.leaf(*image), prepare(weight))

    def expand(x: Tensor, weight: Tensor) -> Tensor:
        return gelu_mlp(x, weight, s.leaf(inner), prepare(weight))

    def int4() -> PackedWeight:
        return prepare_packed(pack_int4(matrix(inner, width), search=False))

    def int8(outputs: int) -> PackedWeight:
        return prepare_packed(pack_int8(matrix(outputs, wide), dynamic=True))

    def kv_source() -> KV:
        return KV(s.heads_of(s.images, s.tokens), s.heads_of(s.images, s.tokens))

    def token_source() -> Tokens:
        return Tokens(s.leaf(*image), s.leaf(width, wide), s.leaf(width, wide), s.leaf(width))

    def head() -> tuple[Tensor, ...]:
        weight = s.leaf(vocabulary, width).detach()
        return linear_top_k(s.leaf(s.rows, width).detach(), weight, None, 3, prepare(weight))

    def packed_head() -> tuple[Tensor, ...]:
        weight = prepare_packed(pack_int8(matrix(vocabulary, width), dynamic=True))
        return linear_top_k(s.leaf(s.rows, width).detach(), weight, None, 1)

    def step() -> tuple[Tensor, ...]:
        decoder = one_layer(s)
        own, crossed = ((s.cache()[None], s.cache()[None]) for _ in range(2))
        cache, positions = Cache(*own, *crossed, lengths), s.whole(0, 3, 5, 2)
        tokens = s.whole(1, 2, 3, 4, dtype=torch.int64)
        return decoder_step(decoder, cache, tokens, slots, positions, index, 3, prepare_decoder(decoder))

    def chosen(weight: Tensor | PackedWeight) -> Tensor:
        return linear_at(s.leaf(s.rows, width).detach(), weight, None, labels().view(s.rows, 5))

    return {
        "patch_embed": lambda: patch_embed(
            s.pixels(), s.leaf(wide, 3, vision.patch_size, vision.patch_size), s.leaf(wide), *affine
        ),
        "layer_norm": lambda: layer_norm(s.leaf(*image), s.leaf(wide), s.leaf(wide)),
        "add_layer_norm": lambda: add_layer_norm(
            s.leaf(*text), s.leaf(*text), s.leaf(width), s.leaf(width), dropout_p=0.1, seed=1
        ),
        "layer_norm_quantised": lambda: layer_norm_quantised(
            s.leaf(*image).detach(), s.leaf(wide).detach(), s.leaf(wide).detach()
        ),
        "add_layer_norm_quantised": lambda: add_layer_norm_quantised(
            s.leaf(*text).detach(), s.leaf(*text).detach(), s.leaf(width).detach(), s.leaf(width).detach()
        ),
        "linear": lambda: project(s.leaf(*image), s.leaf(wide, wide)),
        "linear_into": lambda: linear_into(s.leaf(*image).detach(), s.leaf(width, wide).detach(), None, by_head()),
        "gelu_mlp": lambda: expand(s.leaf(*image), s.leaf(inner, wide)),
        "attention": attend,
        "attention_varlen": lambda: attention_varlen(
            s.heads_of(32), s.heads_of(32), s.heads_of(32), s.whole(0, 5, 12, 21, 32), 11
        ),
        "cross_attention": lambda: cross_attention(s.heads_of(s.rows, s.text), kv_source(), index),
        "cross_attention_tokens": lambda: cross_attention(s.heads_of(s.rows, s.text), token_source(), index),
        "decode_attention": lambda: decode_attention(new(), s.cache(), s.cache(), slots, lengths),
        "kv_append": lambda: kv_append(s.cache(), s.cache(), new(), new(), slots, lengths),
        "kv_reorder": lambda: kv_reorder(s.cache(), s.cache(), s.whole(0, 0), s.whole(1, 2)),
        "linear_cross_entropy": lambda: linear_cross_entropy(
            s.leaf(s.rows * 5, width), s.leaf(vocabulary, width), s.leaf(vocabulary), labels(), 0.1
        ),
        "contrastive": lambda: contrastive_loss(
            *(s.leaf(rows, 256) for rows in (s.rows, s.rows, s.rows, 512)), torch.full((), 0.07, device=s.device), 0.4
        ),
        "hard_negatives": lambda: hard_negatives(
            s.leaf(s.rows, 256), s.leaf(s.rows, 256), torch.full((), 0.07, device=s.device), 1
        ),
        "ema": lambda: ema_([torch.zeros(width, device=s.device)], [s.leaf(width)], 0.995),
        "quant_linear": lambda: quant_linear(s.leaf(*text), int4()),
        **library_calls(lambda: s.leaf(*text), lambda: matrix(inner, width)),
        "quant_linear_w8a8": lambda: quant_linear(s.leaf(*image), int8(inner)),
        "quant_linear_into": lambda: quant_linear_into(s.leaf(*image).detach(), int8(width), None, by_head()),
        "quantise_rows": lambda: quantise_rows(s.leaf(*image)),
        "quant_linear_rows": lambda: quant_linear_rows(quantise_rows(s.leaf(*image)), int8(wide), dtype=s.dtype),
        "quant_linear_rows_quantised": lambda: quant_linear_rows_quantised(
            quantise_rows(s.leaf(*image)), int8(inner), gelu=True
        ),
        "tree_attention": lambda: tree_attention(new(), new(), new(), s.whole(0, -1, 0, 1, 0, 2, 3, -1).view(4, 2)),
        "decoder_step": step,
        "linear_at": lambda: chosen(s.leaf(vocabulary, width).detach()),
        "linear_at_w8a8": lambda: chosen(pack_int8(matrix(vocabulary, width), dynamic=True)),
        "linear_top_k": head,
        "linear_top_k_w8a8": packed_head,
        "quant_embedding": lambda: quant_embedding(labels(), pack_int8(matrix(100, width)), s.dtype),
    }


def one_layer(s: Shapes) -> Decoder:
    """A decoder of one layer, laid out."""
    width = s.width

    def norm() -> Norm:
        return Norm(s.leaf(width).detach(), s.leaf(width).detach(), 1e-6)

    def dense(outputs: int, inputs: int) -> Matrix:
        weight = (s.leaf(outputs, inputs) * inputs**-0.5).detach()
        return Matrix(weight, s.leaf(outputs).detach(), prepare(weight))

    layer = Layer(
        *(dense(3 * width, width), dense(width, width), norm()),
        *(dense(width, width), dense(width, width), norm()),
        *(dense(4 * width, width), dense(width, 4 * width), norm()),
    )
    words, places = (s.leaf(rows, width).detach() for rows in (s.config.decoder.vocab_size, 40))
    head = dense(s.config.decoder.vocab_size, width)
    return Decoder(words, places, norm(), (layer,), dense(width, width), norm(), head, s.heads)


def library_calls(x: Callable[[], Tensor], weight: Callable[[], Tensor]) -> dict[str, Callable[[], Any]]:
    """Of weights that bitsandbytes packs: only where it is installed; `miss kernels list` names them anywhere."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    return {
        "quant_linear_nf4": lambda: quant_linear(x(), pack_nf4(weight())),
        "quant_linear_fp8": lambda: quant_linear(x(), pack_fp8(weight())),
        "quant_linear_llm_int8": lambda: quant_linear(x(), pack_llm_int8(weight())),
    }


def observe(call: Callable[[], Any]) -> list[Choice]:
    """Runs `call` and the gradient of what it gives; every choice on the way, those that failed included."""
    seen: list[Choice] = []

    def watcher(op: registry.Op, args: tuple[Any, ...], chosen: registry.Impl | None) -> None:
        inputs = [_input(a) for a in args if isinstance(a, Tensor)]
        rows = [{"name": impl.name, "reason": reason} for impl, reason in op.candidates(*args)]
        # Of what is not composite the gradient has a table, and comes by as a choice of its own.
        through = chosen is not None and chosen.composite and f"{op.name}{registry.BACKWARD}" in registry.OPS
        choice = Choice(op.name, inputs, chosen.name if chosen else None, "autograd" if through else None, rows)
        if choice not in seen:  # a custom operator asks again inside
            seen.append(choice)

    with registry.watch(watcher):
        try:
            result = call()
            first = result[0] if isinstance(result, tuple) else result
            if isinstance(first, Tensor) and first.requires_grad:
                first.float().sum().backward()
        except NotImplementedError:
            pass  # a forced implementation that cannot run: the watcher has its reasons
    return seen


def _input(tensor: Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "device": str(tensor.device)}


def _where(args: Args) -> tuple[torch.device, torch.dtype]:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    cuda = args.device != "cpu" and torch.cuda.is_available()
    dtype = ("bfloat16" if cuda else "float32") if args.dtype == "auto" else args.dtype
    return torch.device("cuda" if cuda else "cpu"), getattr(torch, dtype)


def render(choice: Choice) -> str:
    inputs = ", ".join(f"({', '.join(map(str, i['shape']))}) {i['dtype']}" for i in choice.inputs)
    lines = [f"{choice.op}  {inputs}"]
    for row in choice.candidates:
        says = row["reason"] or ("runs" if row["name"] == choice.runs else "fits, but stands below")
        lines.append(f"  {row['name']:<10} {says}")
    if choice.runs is None:
        lines.append("  nothing can run: a call raises NotImplementedError")
    elif choice.gradient:
        lines.append("  its gradient: autograd through PyTorch's own")
    return "\n".join(lines)


def main(args: Args) -> int:
    registry.load_all()
    device, dtype = _where(args)
    table = calls(Shapes(MissConfig.preset(args.preset), dtype, device))
    for name in args.op:
        if name not in table:
            raise ValueError(f"no operation named {name}{did_you_mean(name, list(table))}; known: {', '.join(table)}")
    choices = [choice for name in args.op or table for choice in observe(table[name])]
    hardware, isa = "cpu", extension.isa()
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    elif isa:
        hardware = f"cpu ({isa})"
    head = {"torch": torch.__version__, "device": hardware, "preset": args.preset, "forced": registry.environment()}
    if args.json:
        print(json.dumps({**head, "ops": [vars(choice) for choice in choices]}))
        return 0
    forced = ",".join(f"{op}={impl}" for op, impl in registry.environment().items()) or "nothing"
    print(f"torch {torch.__version__}, {hardware}, shapes of {args.preset}; MISS_KERNELS forces {forced}\n")
    print("\n\n".join(map(render, choices)))
    return 0
