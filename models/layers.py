"""The blocks that the two transformers share: norms, MLP, self-attention, and one post-norm text layer.

Knows the architecture of a layer; does not know which implementation of an operation runs, or how rows are batched.

Shapes: B batch (images or text rows), T text, N patches or keys, H heads, D head width, C width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from miss.kernels.attention import attention, attention_varlen
from miss.kernels.cross_attention import KV, cross_attention
from miss.kernels.decoder_step import Layer, Norm
from miss.kernels.dropout import as_seed, dropout
from miss.kernels.encoder_layer import takes_codes, text_layer
from miss.kernels.layer_norm import add_layer_norm, add_layer_norm_quantised, layer_norm, layer_norm_quantised
from miss.kernels.quant_linear import QuantRows
from miss.kernels.tree_attention import tree_attention
from miss.models.config import TextConfig
from miss.models.linear import Linear, QuantLinear
from miss.models.packing import Packing

EMBEDDINGS = 1 << 16  # the embeddings' site among a tower's, whose layers are 0, 1, …


def mix(seed: int | None, site: int) -> int | None:
    """A dropout seed for `site` from the step's seed: splitmix64's finaliser, so that neighbours are unrelated."""
    if seed is None:
        return None
    z = (seed + (site + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) >> 1  # non-negative in an int64


def first_tokens(x: Tensor, packing: Packing | None = None) -> Tensor:
    """The first token of each row: x (R, T, C), or (M, C) with its packing -> (R, C)."""
    return x[:, 0] if packing is None else x.index_select(0, packing.offsets[:-1].long())


def initialise(module: nn.Module) -> None:
    """BERT's and the ViT's own start: normal with standard deviation 0.02, biases zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class LayerNorm(nn.Module):
    """Layer normalization over the last dimension, alone or after adding a residual."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(Tensor(width)), nn.Parameter(Tensor(width)), eps
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def norm(self) -> Norm:
        """What an operation over a whole layer takes."""
        return Norm(self.weight, self.bias, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor, dropout: float = 0.0, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum) with sum = residual + dropout(x); nothing is dropped without a seed."""
        p = dropout if seed is not None else 0.0
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps, p, seed)

    def feed(self, x: Tensor, linear: Linear | QuantLinear) -> Tensor | QuantRows:
        """The norm of x as `linear` takes it: as int8 codes where it has int8 activations."""
        if linear.takes_codes and not needs_gradient(x):
            return layer_norm_quantised(x, self.weight, self.bias, self.eps)
        return self(x)

    def add_feed(self, x: Tensor, residual: Tensor, linear: Linear | QuantLinear) -> tuple[Tensor | QuantRows, Tensor]:
        """(the norm of the sum as `linear` takes it, the sum) with sum = residual + x."""
        if not linear.takes_codes or needs_gradient(x, residual):
            return self.add(x, residual)
        rows, _, summed = add_layer_norm_quantised(x, residual, self.weight, self.bias, self.eps, keep_y=False)
        return rows, summed

    def add_both(
        self, x: Tensor, residual: Tensor, linear: Linear | QuantLinear, dropout: float = 0.0, seed: int | None = None
    ) -> tuple[Tensor, Tensor | QuantRows]:
        """The norm of residual + dropout(x) as numbers, which a post-norm layer adds on, and as `linear` takes it."""
        if not linear.takes_codes or seed is not None or needs_gradient(x, residual):
            y, _ = self.add(x, residual, dropout, seed)
            return y, y
        rows, kept, _ = add_layer_norm_quantised(x, residual, self.weight, self.bias, self.eps, keep_y=True)
        assert kept is not None
        return kept, rows


def needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class Mlp(nn.Module):
    """Linear, exact GELU, linear, and what is added to it."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.input = Linear(width, inner)
        self.output = Linear(inner, width)

    def forward(self, x: Tensor | QuantRows, residual: Tensor | None = None) -> Tensor:
        return self.output(self.input.gelu(x, self.output), residual)


class TextMlp(Mlp):
    """An MLP with the norm that follows it in a post-norm layer."""

    def __init__(self, width: int, inner: int, eps: float) -> None:
        super().__init__(width, inner)
        self.norm = LayerNorm(width, eps)


class SelfAttention(nn.Module):
    """Projection to Q, K and V in one product, attention, output projection. The norm stands beside it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.output = Linear(width, width)

    def project(self, x: Tensor | QuantRows) -> tuple[Tensor, Tensor, Tensor]:
        """x (…, C) -> q, k, v (…, H, D), views of one product."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.unbind(-3)
        return q, k, v

    def forward(
        self,
        x: Tensor | QuantRows,
        lengths: Tensor | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        seed: int | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C); keys past `lengths` (B,) are not attended to. With a packing (M, C) -> (M, C), each
        token attending to its own row's."""
        q, k, v = self.project(x)
        p = dropout if seed is not None else 0.0
        if packing is None:
            out = attention(q, k, v, lengths, causal, None, p, seed)
        else:
            out = attention_varlen(q, k, v, packing.offsets, packing.max_length, causal, None, p, seed)
        return self.output(out.flatten(-2))

    def first(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        packing: Packing | None = None,
        dropout: float = 0.0,
        seed: int | None = None,
    ) -> Tensor:
        """What `forward` gives each row's first token, (B, C): x (B, T, C), or (M, C) with a packing.

        Keys and values of all tokens, the query and the output projection of one: 2 C^2 of 4 C^2 products a token.
        """
        assert isinstance(self.qkv, Linear), "the first token alone is for training: not of packed weights"
        width = x.shape[-1]
        k, v = self.qkv(x, part=slice(width, None)).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        if packing is not None:
            k, v = packing.unpack(k), packing.unpack(v)
        q = self.qkv(first_tokens(x, packing), part=slice(width)).unflatten(-1, (self.num_heads, -1))
        out = attention(q[:, None], k, v, lengths, False, None, dropout if seed is not None else 0.0, seed)
        return self.output(out[:, 0].flatten(-2))

    def tree(self, x: Tensor, ancestors: Tensor) -> Tensor:
        """Nodes of packed trees x (N, C), each attending to its `ancestors` (N, L)."""
        return self.output(tree_attention(*self.project(x), ancestors).flatten(-2))


class TextSelfAttention(SelfAttention):
    def __init__(self, width: int, num_heads: int, eps: float) -> None:
        super().__init__(width, num_heads)
        self.norm = LayerNorm(width, eps)


class CrossAttention(nn.Module):
    """Queries from text over keys and values that were projected elsewhere (`CrossKV`), once for all layers."""

    def __init__(self, width: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = Linear(width, width)
        self.output = Linear(width, width)
        self.norm = LayerNorm(width, eps)

    def forward(
        self,
        x: Tensor | QuantRows,
        source: KV,
        index: Tensor,
        lengths: Tensor | None = None,
        dropout: float = 0.0,
        seed: int | None = None,
    ) -> Tensor:
        """x (R, T, C) over `source` (I, N, H, D); row r reads source `index[r]` (R,), its first `lengths` (I,) keys.
        Also x (M, C), whose tokens are rows of their own."""
        q = self.query(x).unflatten(-1, (self.num_heads, -1))
        packed = q.dim() == 3
        q = q[:, None] if packed else q
        out = cross_attention(q, source, index, lengths, None, dropout if seed is not None else 0.0, seed).flatten(-2)
        return self.output(out[:, 0] if packed else out)


class TextLayer(nn.Module):
    """Self-attention, cross-attention (skipped where there is no source) and MLP, each followed by add and norm."""

    _whole: Layer | None = None

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.dropout, self.attention_dropout = config.dropout, config.attention_dropout
        self.self_attention = TextSelfAttention(width, config.num_heads, eps)
        self.cross_attention = CrossAttention(width, config.num_heads, eps)
        self.mlp = TextMlp(width, config.intermediate_size, eps)

    def weights(self) -> Layer:
        """What an operation over the whole layer takes."""
        own, cross, mlp = self.self_attention, self.cross_attention, self.mlp
        return Layer(
            *(own.qkv.matrix(), own.output.matrix(), own.norm.norm()),
            *(cross.query.matrix(), cross.output.matrix(), cross.norm.norm()),
            *(mlp.input.matrix(), mlp.output.matrix(), mlp.norm.norm()),
        )

    def prepare(self) -> None:
        """For inference, after the linear layers were: those that take codes throughout run as one operation."""
        self._whole = weights if takes_codes(weights := self.weights()) else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TextLayer":
        super()._apply(fn, recurse)
        if self._whole is not None:
            self.prepare()
        return self

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None,
        source: KV | None,
        index: Tensor | None,
        source_lengths: Tensor | None = None,
        causal: bool = False,
        seed: int | None = None,
        packing: Packing | None = None,
        first: bool = False,
    ) -> Tensor:
        """x (R, T, C) -> the same shape; with a packing x (M, C), whose tokens are rows of their own in cross-attention
        (a token attends to the source alone), so that `index` is (M,). `first`: as the method of that name."""
        if first:
            return self.first(x, lengths, source, index, seed, packing)
        plain = source_lengths is None and not causal and seed is None
        if self._whole is not None and plain and not needs_gradient(x):
            heads, whole = self.self_attention.num_heads, self._whole
            if packing is None:
                return text_layer(x, whole, heads, lengths, source=source, index=index)
            return text_layer(x, whole, heads, None, packing.offsets, packing.max_length, source, index)
        attended = self.self_attention(x, lengths, causal, self.attention_dropout, mix(seed, 0), packing)
        following = self.mlp.input if source is None else self.cross_attention.query
        x, rows = self.self_attention.norm.add_both(attended, x, following, self.dropout, mix(seed, 1))
        if source is not None:
            assert index is not None, "a cross-attention source comes with the rows' index into it"
            read = self.cross_attention(rows, source, index, source_lengths, self.attention_dropout, mix(seed, 2))
            x, rows = self.cross_attention.norm.add_both(read, x, self.mlp.input, self.dropout, mix(seed, 3))
        return self.mlp.norm.add(self.mlp(rows), x, self.dropout, mix(seed, 4))[0]

    def first(
        self,
        x: Tensor,
        lengths: Tensor | None,
        source: KV | None,
        index: Tensor | None,
        seed: int | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """What `forward` gives the first token of each row, (R, C), where nobody reads the others: x as there, `index`
        (R,) also with a packing. Without dropout exactly that; with it another draw, as the masks are smaller."""
        attended = self.self_attention.first(x, lengths, packing, self.attention_dropout, mix(seed, 0))
        x = self.self_attention.norm.add(attended, first_tokens(x, packing), self.dropout, mix(seed, 1))[0]
        if source is not None:
            assert index is not None, "a cross-attention source comes with the rows' index into it"
            read = self.cross_attention(x, source, index, None, self.attention_dropout, mix(seed, 2))
            x = self.cross_attention.norm.add(read, x, self.dropout, mix(seed, 3))[0]
        return self._mlp(x, seed)

    def tree(self, x: Tensor, ancestors: Tensor, source: KV, index: Tensor, source_lengths: Tensor | None) -> Tensor:
        """Nodes of packed trees through the layer: x (N, C) -> (N, C)."""
        x, _ = self.self_attention.norm.add(self.self_attention.tree(x, ancestors), x)
        return self.after_self_attention(x[:, None], source, index, source_lengths)[:, 0]

    def after_self_attention(
        self, x: Tensor, source: KV, index: Tensor, source_lengths: Tensor | None = None
    ) -> Tensor:
        """The rest of the layer, without dropout: x (R, T, C) -> the same shape."""
        x, _ = self.cross_attention.norm.add(self.cross_attention(x, source, index, source_lengths), x)
        return self._mlp(x, None)

    def _mlp(self, x: Tensor, seed: int | None) -> Tensor:
        return self.mlp.norm.add(self.mlp(x), x, self.dropout, mix(seed, 4))[0]


class TextEmbeddings(nn.Module):
    """Words plus positions, normalised. No token types: the joint encoder tells its modes apart by the first token."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_positions, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, ids: Tensor, positions: Tensor | None = None, seed: int | None = None) -> Tensor:
        """ids (…, T) -> (…, T, C); `positions` (broadcast against ids) default to 0 … T-1. `seed`: the tower's.

        Raises:
            ValueError: more tokens than the position table has rows.
        """
        if positions is None:
            if ids.shape[-1] > self.position.num_embeddings:
                raise ValueError(
                    f"{ids.shape[-1]} tokens; the position table has {self.position.num_embeddings}: shorten the text"
                )
            positions = torch.arange(ids.shape[-1], device=ids.device)
        where = self.position(positions)  # as a module, padded or packed: ranks must enter the same ones in one order
        x = self.norm(self.word(ids) + where)
        p = self.dropout if seed is not None else 0.0
        return dropout(x, p, as_seed(mix(seed, EMBEDDINGS), p))
