"""The answer decoder: a causal BERT over question states, with a language-model head tied to its word table.

Knows token ids, projected question states and the cache's tensors; does not know how a next token is chosen.

Shapes: R rows, T answer length, Q questions, C width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from miss.kernels.cross_attention import KV
from miss.kernels.linear import linear
from miss.kernels.linear_top_k import linear_top_k
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

    def states(
        self, tokens: Tensor, cache: KVCache, slots: Tensor, positions: Tensor, question_index: Tensor
    ) -> Tensor:
        """One token a row through all layers -> (R, C), what the vocabulary's matrix is multiplied with.

        Rows of one slot may come at successive positions in one call: all keys and values of the call are written
        before any row attends, and a row attends to positions up to its own.

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
        return self.head(x)  # type: ignore[no-any-return]

    def best(self, states: Tensor, num_best: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best next tokens after `states` (R, C), under the full vocabulary's softmax: log-probabilities
        (R, num_best), descending, and ids int64 (R, num_best); the logits' log-sum-exp (R,). float32 (float64 in
        float64)."""
        table = self.embeddings.word.weight
        panels = None if self._vocabulary is None else self._vocabulary.of(table)
        logits, ids, total = linear_top_k(states, table, self.head.bias, num_best, panels)
        return logits - total[:, None], ids, total

    def step(
        self,
        tokens: Tensor,
        cache: KVCache,
        slots: Tensor,
        positions: Tensor,
        question_index: Tensor,
        num_best: int,
    ) -> tuple[Tensor, Tensor]:
        """`states`, then `best`: log-probabilities and ids (R, num_best) of the best next tokens."""
        logprobs, ids, _ = self.best(self.states(tokens, cache, slots, positions, question_index), num_best)
        return logprobs, ids

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
        """States (…, C), as `states` and `head` give them, to logits (…, V); float32 unless in float64."""
        return accumulated(linear(states, self.embeddings.word.weight, self.head.bias))

    def logits_at(self, states: Tensor, ids: Tensor) -> Tensor:
        """The logits (R, A) of words `ids` int64 (R, A) alone after `states` (R, C); float32 unless in float64."""
        words = accumulated(self.embeddings.word.weight[ids])
        return (words @ accumulated(states)[:, :, None])[:, :, 0] + accumulated(self.head.bias[ids])


def accumulated(x: Tensor) -> Tensor:
    """In the dtype that sums are kept in: float32, or float64 in float64."""
    return x if x.dtype == torch.float64 else x.float()
