"""The answer decoder: a causal BERT over question states, with a language-model head tied to its word table.

Knows token ids, projected question states and the cache's tensors; does not know how a next token is chosen.

Shapes: R rows, T answer length, Q questions, C width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from miss.kernels.cross_attention import KV
from miss.kernels.linear import linear
from miss.kernels.linear_top_k import linear_top_k
from miss.kernels.registry import accumulator
from miss.models.cache import KVCache
from miss.models.config import TextConfig
from miss.models.cross_kv import CrossKV
from miss.models.layers import LayerNorm, TextEmbeddings, TextLayer, mix
from miss.models.linear import Linear, Panels
from miss.models.packing import Packing


class LanguageModelHead(nn.Module):
    """dense, GELU, norm; then the vocabulary product, whose matrix is the word table of the embeddings."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.transform = Linear(config.hidden_size, config.hidden_size)
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """x (…, C) -> (…, C), what the vocabulary matrix is multiplied with."""
        return self.norm(self.transform.gelu(x))


class AnswerDecoder(nn.Module):
    """The JTM's stack made causal; its cross-attention reads the states of the question, never the image."""

    _vocabulary: Panels | None = None

    def __init__(self, config: TextConfig, embeddings: TextEmbeddings | None = None) -> None:
        super().__init__()
        self.config = config
        self.embeddings = embeddings or TextEmbeddings(config)
        self.cross_kv = CrossKV(config)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.num_layers))
        self.head = LanguageModelHead(config)

    def forward(
        self,
        ids: Tensor,
        question_kv: list[KV],
        question_index: Tensor,
        question_lengths: Tensor | None,
        lengths: Tensor | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """States (R, T, C) of whole answers, teacher-forced: ids int64 (R, T); row r reads question_index[r]."""
        packing = Packing.of(lengths, ids.shape[1])
        if packing is None:
            x = self.embeddings(ids, seed=seed)
        else:
            x = self.embeddings(packing.pack(ids), packing.position, seed)
            question_index = question_index[packing.row]
        for i, layer in enumerate(self.layers):
            x = layer(x, lengths, question_kv[i], question_index, question_lengths, True, mix(seed, i), packing)
        return x if packing is None else packing.unpack(x)

    def prepare(self) -> None:
        """For inference: lays the vocabulary's matrix out once instead of at every step."""
        self._vocabulary = Panels(self.embeddings.word.weight)

    def step(
        self,
        tokens: Tensor,
        cache: KVCache,
        slots: Tensor,
        positions: Tensor,
        question_index: Tensor,
        num_best: int,
    ) -> tuple[Tensor, Tensor]:
        """One more token a row -> the best next tokens: log-probabilities (R, num_best), float32 (float64 in float64),
        descending, under the full vocabulary's softmax; ids int64 (R, num_best).

        Args:
            tokens: int64 (R,), written to the cache.
            slots: int32 (R,), the row's answer slot.
            positions: int32 (R,), the token's position: 0 for [DEC].
            question_index: int32 (R,), the row's question slot, non-decreasing: beams of a question stand together.
        """
        x = self.embeddings(tokens, positions.long())
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, TextLayer)
            x = layer.step(
                x, cache.layer(i), slots, positions, cache.question(i), question_index, cache.question_lengths
            )
        return self.best(self.head(x), num_best)[:2]

    def best(self, states: Tensor, num_best: int) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probabilities (R, num_best), ids (R, num_best), log-sum-exp (R,)) of states (R, C) behind the head."""
        table = self.embeddings.word.weight
        panels = None if self._vocabulary is None else self._vocabulary.of(table)
        logits, ids, total = linear_top_k(states, table, self.head.bias, num_best, panels)
        return logits - total[:, None], ids, total

    def logits_at(self, states: Tensor, ids: Tensor) -> Tensor:
        """Logits (R, A) of chosen words ids (R, A) of states (R, C) behind the head."""
        dtype = accumulator(states.dtype)
        rows = self.embeddings.word(ids).to(dtype)
        return (rows @ states.to(dtype)[..., None])[..., 0] + self.head.bias[ids].to(dtype)

    def tree(
        self,
        ids: Tensor,
        depths: Tensor,
        ancestors: Tensor,
        question_kv: list[KV],
        question_index: Tensor,
        question_lengths: Tensor | None = None,
    ) -> Tensor:
        """The nodes of packed trees of answers, teacher-forced in one pass -> what the vocabulary matrix is multiplied
        with, (N, C), as `states` gives it.

        Args:
            ids: int64 (N,): [DEC] at a root, below it the answers' tokens.
            depths: int64 (N,): the positions of their tokens, 0 at a root.
            ancestors: int32 (N, L): the rows from the root to the node itself, filled up with -1.
            question_kv: per layer K and V (Q, T, H, D).
            question_index: int32 (N,), non-decreasing: whose answers a node belongs to.
            question_lengths: int32 (Q,).
        """
        x = self.embeddings(ids, depths)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, TextLayer)
            x = layer.tree(x, ancestors, question_kv[i], question_index, question_lengths)
        return self.head(x)

    def logits(self, states: Tensor) -> Tensor:
        """States (…, C) behind the head to logits (…, V)."""
        return linear(states, self.embeddings.word.weight, self.head.bias)
