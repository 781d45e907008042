"""A call of every operation's public function at a preset's sizes, for `miss explain` and `miss kernels validate`.

Knows the public functions and a preset's sizes; does not know any implementation, or what the calls are for.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from miss.kernels.attention import attention, attention_quantised, attention_varlen
from miss.kernels.contrastive import contrastive_loss, hard_negatives
from miss.kernels.cross_attention import KV, Tokens, cross_attention
from miss.kernels.cross_entropy import linear_cross_entropy
from miss.kernels.decode_attention import decode_attention, decode_attention_append
from miss.kernels.decoder_step import Cache, Decoder, Layer, Matrix, Norm, decoder_step
from miss.kernels.decoder_step import prepare as prepare_decoder
from miss.kernels.ema import ema_
from miss.kernels.encoder_layer import ImageLayer, image_layer, text_layer
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
from miss.models.config import MissConfig


class Shapes:
    """Random inputs in the sizes of a preset: by default 2 images, 4 questions over them, 20 tokens of text.

    `laid_out` says whether weights are laid out for a CPU's kernels, as models do there; on a GPU none are.
    """

    def __init__(
        self,
        config: MissConfig,
        dtype: torch.dtype,
        device: torch.device,
        images: int = 2,
        rows: int = 4,
        text: int = 20,
        laid_out: bool = True,
    ) -> None:
        self.config, self.dtype, self.device, self.laid_out = config, dtype, device, laid_out
        self.images, self.rows, self.text = images, rows, text
        vision, encoder = config.vision, config.encoder
        self.tokens = (config.preprocess.image_size // vision.patch_size) ** 2 + 1
        self.heads, self.width = encoder.num_heads, encoder.hidden_size
        self.head = self.width // self.heads

    def leaf(self, *shape: int) -> Tensor:
        """A float tensor that asks for a gradient."""
        return torch.randn(*shape, dtype=self.dtype, device=self.device).requires_grad_()

    def weight(self, *shape: int) -> Tensor:
        """The same, of the size that trained matrices have."""
        return (0.04 * torch.randn(*shape, device=self.device)).to(self.dtype).requires_grad_()

    def whole(self, *values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def pixels(self) -> Tensor:
        side = self.config.preprocess.image_size
        return torch.randint(0, 256, (self.images, side, side, 3), dtype=torch.uint8, device=self.device)

    def heads_of(self, *leading: int) -> Tensor:
        return self.leaf(*leading, self.heads, self.head)

    def cache(self) -> Tensor:
        return self.heads_of(max(self.rows, 4), 40).detach()

    def counted(self, count: int, start: int = 0, step: int = 1, below: int = 2**31) -> Tensor:
        """start, start + step, …, each modulo `below`."""
        return self.whole(*((start + step * i) % below for i in range(count)))

    def index(self) -> Tensor:
        """Which image a question is about: as many of each, in order."""
        return self.whole(*(row * self.images // self.rows for row in range(self.rows)))

    def lengths(self) -> Tensor:
        """5, 7, 9, …, tokens, from 5 again beyond the text's."""
        return self.whole(*(5 + (2 * row) % (self.text - 4) for row in range(self.rows)))

    def panels(self, weight: Tensor) -> Tensor | None:
        return prepare(weight) if self.laid_out else None

    def packed(self, weight: PackedWeight) -> PackedWeight:
        return prepare_packed(weight) if self.laid_out else weight


def calls(s: Shapes) -> dict[str, Callable[[], Any]]:
    """By operation, a call of its public function."""
    vision, width = s.config.vision, s.width
    wide, inner, vocabulary = vision.hidden_size, vision.intermediate_size, s.config.decoder.vocab_size
    index, slots, lengths = s.index(), s.counted(s.rows), s.lengths()
    offsets = torch.cat([s.whole(0), lengths.cumsum(0, dtype=torch.int32)])
    ancestors = torch.stack([slots, slots - 1], 1)
    affine = (torch.ones(3, device=s.device), torch.zeros(3, device=s.device))
    image, text = (s.images, s.tokens, wide), (s.rows, s.text, width)

    def matrix(rows: int, columns: int) -> Tensor:
        return 0.04 * torch.randn(rows, columns, device=s.device)

    def features(*rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one, two, three, four = (functional.normalize(s.leaf(count, 256).detach()) for count in rows)
        return one.requires_grad_(), two, three, four

    def attend_packed() -> Tensor:
        total = int(lengths.sum())
        return attention_varlen(s.heads_of(total), s.heads_of(total), s.heads_of(total), offsets, int(lengths.max()))

    def labels() -> Tensor:
        return s.counted(s.rows * 5).long()

    def new() -> Tensor:
        return s.heads_of(s.rows).detach()

    def by_head() -> Tensor:
        """(I, N, H, D), in memory head by head."""
        return s.heads_of(s.images).new_empty(s.images, s.heads, s.tokens, s.head).transpose(1, 2)

    def image_heads() -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = s.leaf(s.images, s.tokens, 3, vision.num_heads, wide // vision.num_heads).unbind(2)
        return q, k, v

    def attend() -> Tensor:
        return attention(*image_heads())

    def attend_by_codes() -> Tensor:
        with torch.no_grad():
            return attention_quantised(*image_heads())

    def project(x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight, s.leaf(wide), s.leaf(*image), s.panels(weight))

    def expand(x: Tensor, weight: Tensor) -> Tensor:
        return gelu_mlp(x, weight, s.leaf(inner), s.panels(weight))

    def int4() -> PackedWeight:
        return s.packed(pack_int4(matrix(inner, width), search=False))

    def int8(outputs: int) -> PackedWeight:
        return s.packed(pack_int8(matrix(outputs, wide), dynamic=True))

    def kv_source() -> KV:
        return KV(s.heads_of(s.images, s.tokens), s.heads_of(s.images, s.tokens))

    def token_source() -> Tokens:
        return Tokens(s.leaf(*image), s.weight(width, wide), s.weight(width, wide), s.weight(width))

    def head() -> tuple[Tensor, ...]:
        weight = s.weight(vocabulary, width).detach()
        return linear_top_k(s.leaf(s.rows, width).detach(), weight, None, 3, s.panels(weight))

    def packed_head() -> tuple[Tensor, ...]:
        weight = s.packed(pack_int8(matrix(vocabulary, width), dynamic=True))
        return linear_top_k(s.leaf(s.rows, width).detach(), weight, None, 1)

    def step() -> tuple[Tensor, ...]:
        decoder = one_layer(s)
        own, crossed = ((s.cache()[None], s.cache()[None]) for _ in range(2))
        questions = s.lengths() if s.rows > 3 else torch.full((4,), 5, dtype=torch.int32, device=s.device)
        cache, positions = Cache(*own, *crossed, questions), s.counted(s.rows, 0, 3, 7)
        tokens = s.counted(s.rows, 1).long()
        runner = prepare_decoder(decoder) if s.laid_out else None
        return decoder_step(decoder, cache, tokens, slots, positions, index, 3, runner)

    def coded(outputs: int, inputs: int) -> Matrix:
        return Matrix(s.packed(pack_int8(matrix(outputs, inputs), dynamic=True)), s.leaf(outputs).detach())

    def normed(columns: int) -> Norm:
        return Norm(s.leaf(columns).detach(), s.leaf(columns).detach(), 1e-6)

    def encode_image() -> Tensor:
        own = normed(wide), coded(3 * wide, wide), coded(wide, wide)
        layer = ImageLayer(*own, normed(wide), coded(inner, wide), coded(wide, inner))
        return image_layer(s.leaf(*image).detach(), layer, vision.num_heads)

    def encode_text() -> Tensor:
        own, crossed = coded(3 * width, width), coded(width, width)
        mlp = coded(4 * width, width), coded(width, 4 * width), normed(width)
        layer = Layer(own, crossed, normed(width), crossed, crossed, normed(width), *mlp)
        with torch.no_grad():
            return text_layer(s.leaf(*text).detach(), layer, s.heads, source=kv_source(), index=index)

    def chosen(weight: Tensor | PackedWeight) -> Tensor:
        return linear_at(s.leaf(s.rows, width).detach(), weight, None, labels().view(s.rows, 5))

    return {
        "patch_embed": lambda: patch_embed(
            s.pixels(), s.weight(wide, 3, vision.patch_size, vision.patch_size), s.weight(wide), *affine
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
        "linear": lambda: project(s.leaf(*image), s.weight(wide, wide)),
        "linear_into": lambda: linear_into(s.leaf(*image).detach(), s.weight(width, wide).detach(), None, by_head()),
        "gelu_mlp": lambda: expand(s.leaf(*image), s.weight(inner, wide)),
        "attention": attend,
        "attention_quantised": attend_by_codes,
        "attention_varlen": attend_packed,
        "cross_attention": lambda: cross_attention(s.heads_of(s.rows, s.text), kv_source(), index),
        "cross_attention_tokens": lambda: cross_attention(s.heads_of(s.rows, s.text), token_source(), index),
        "decode_attention": lambda: decode_attention(new(), s.cache(), s.cache(), slots, lengths),
        "decode_attention_append": lambda: decode_attention_append(
            new(), new(), new(), s.cache(), s.cache(), slots, lengths
        ),
        "kv_append": lambda: kv_append(s.cache(), s.cache(), new(), new(), slots, lengths),
        "kv_reorder": lambda: kv_reorder(s.cache(), s.cache(), s.whole(0, 0), s.whole(1, 2)),
        "linear_cross_entropy": lambda: linear_cross_entropy(
            s.leaf(s.rows * 5, width), s.weight(vocabulary, width), s.weight(vocabulary), labels(), 0.1
        ),
        "contrastive": lambda: contrastive_loss(
            *features(s.rows, s.rows, s.rows, 512), torch.full((), 0.07, device=s.device), 0.4
        ),
        "hard_negatives": lambda: hard_negatives(
            *features(s.rows, s.rows, 0, 0)[:2], torch.full((), 0.07, device=s.device), 1
        ),
        "ema": lambda: ema_([torch.zeros(width, device=s.device)], [s.leaf(width)], 0.995),
        "quant_linear": lambda: quant_linear(s.leaf(*text), int4()),
        **library_calls(lambda: s.leaf(*text), lambda: matrix(inner, width)),
        "quant_linear_fp8": lambda: quant_linear(s.leaf(*text), s.packed(pack_fp8(matrix(inner, width)))),
        "quant_linear_w8a8": lambda: quant_linear(s.leaf(*image), int8(inner)),
        "quant_linear_into": lambda: quant_linear_into(s.leaf(*image).detach(), int8(width), None, by_head()),
        "quantise_rows": lambda: quantise_rows(s.leaf(*image)),
        "quant_linear_rows": lambda: quant_linear_rows(quantise_rows(s.leaf(*image)), int8(wide), dtype=s.dtype),
        "quant_linear_rows_quantised": lambda: quant_linear_rows_quantised(
            quantise_rows(s.leaf(*image)), int8(inner), gelu=True
        ),
        "tree_attention": lambda: tree_attention(new(), new(), new(), ancestors),
        "decoder_step": step,
        "image_layer": encode_image,
        "text_layer": encode_text,
        "linear_at": lambda: chosen(s.weight(vocabulary, width).detach()),
        "linear_at_w8a8": lambda: chosen(pack_int8(matrix(vocabulary, width), dynamic=True)),
        "linear_top_k": head,
        "linear_top_k_w8a8": packed_head,
        "quant_embedding": lambda: quant_embedding(labels(), pack_int8(matrix(100, width)), s.dtype),
    }


def variants(s: Shapes) -> dict[str, list[Callable[[], Any]]]:
    """The other forms in which the model calls some of them: the text towers', with dropout, one token a row."""
    vision, encoder = s.config.vision, s.config.encoder
    image, text, token = (s.images, s.tokens, vision.hidden_size), (s.rows, s.text, s.width), (s.rows, 1, s.width)

    def attend(causal: bool, dropout_p: float) -> Tensor:
        q, k, v = s.leaf(s.rows, s.text, 3, s.heads, s.head).unbind(2)
        return attention(q, k, v, None if causal else s.lengths(), causal, None, dropout_p, 1)

    def norm(shape: tuple[int, ...]) -> Tensor:
        return layer_norm(s.leaf(*shape), s.leaf(shape[-1]), s.leaf(shape[-1]))

    def add_norm(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        return add_layer_norm(s.leaf(*shape), s.leaf(*shape), s.leaf(shape[-1]), s.leaf(shape[-1]))

    def project(shape: tuple[int, ...], outputs: int) -> Tensor:
        weight = s.weight(outputs, shape[-1])
        return linear(s.leaf(*shape), weight, s.leaf(outputs), None, s.panels(weight))

    def expand(shape: tuple[int, ...]) -> Tensor:
        weight = s.weight(encoder.intermediate_size, shape[-1])
        return gelu_mlp(s.leaf(*shape), weight, s.leaf(encoder.intermediate_size), s.panels(weight))

    def cross() -> Tensor:
        source = KV(s.heads_of(s.images, s.tokens), s.heads_of(s.images, s.tokens))
        return cross_attention(s.heads_of(s.rows, s.text), source, s.index(), None, None, 0.1, 1)

    return {
        "attention": [_of(attend, causal, p) for causal in (False, True) for p in (0.0, 0.1)],
        "layer_norm": [_of(norm, text), _of(norm, token)],
        "add_layer_norm": [_of(add_norm, shape) for shape in (image, text, token)],
        "linear": [_of(project, shape, n * shape[-1]) for shape in (image, text, token) for n in (1, 3)],
        "gelu_mlp": [_of(expand, shape) for shape in (text, token)],
        "cross_attention": [cross],
    }


def _of(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: function(*args)


def one_layer(s: Shapes) -> Decoder:
    """A decoder of one layer, laid out."""
    width = s.width

    def norm() -> Norm:
        return Norm(s.leaf(width).detach(), s.leaf(width).detach(), 1e-6)

    def dense(outputs: int, inputs: int) -> Matrix:
        weight = (s.leaf(outputs, inputs) * inputs**-0.5).detach()
        return Matrix(weight, s.leaf(outputs).detach(), s.panels(weight))

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
        "quant_linear_llm_int8": lambda: quant_linear(x(), pack_llm_int8(weight())),
    }
