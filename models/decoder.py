"""The answer decoder: a causal BERT over question states, with a language-model head tied to its word table.

Knows token ids, projected question states and the cache's tensors; does not know how a next token is chosen.

Shapes: R rows, T answer length, Q questions, C width, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from miss.kernels.cross_attention import KV
from miss.kernels.decoder_step import Decoder, decoder_step
from miss.kernels.linear import linear
from miss.kernels.linear_top_k import linear_at, linear_top_k
from miss.kernels.quant_linear import PackedWeight, quant_linear
from miss.kernels.quant_linear import prepare as prepare_packed
from miss.models.cache import KVCache
from miss.models.config import TextConfig
from miss.models.cross_kv import CrossKV
from miss.models.decoding import Laid, cache_of, collect, vocabulary
from miss.models.layers import LayerNorm, TextEmbeddings, TextLayer, mix
from miss.models.linear import Linear, Panels
from miss.models.packing import Packing
from miss.models.recompute import Stack


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


class AnswerDecoder(Stack):
    """The JTM's stack made causal; its cross-attention reads the states of the question, never the image."""

    vocabulary_panels: Panels | None = None
    packed_vocabulary: PackedWeight | None = None
    # Who owns the model may promise to call `forget` when weights change: to look at all of them costs 0.2 ms a step of
    # base, whose weights have just passed through the caches.
    steady = False
    _laid: Laid | None = None
    _prepared = False

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
            source, inner = question_kv[i], mix(seed, i)
            x = self.through(layer, x, lengths, source, question_index, question_lengths, True, inner, packing)
        return x if packing is None else packing.unpack(x)

    def use_vocabulary(self, packed: PackedWeight | None) -> None:
        """Multiplies with a packed word table (V, C) at the end of a step, W8A8; embeddings are read from the table
        itself. None: with the table again.

        Raises:
            ValueError: it is not of the table's shape, or not int8 with int8 activations.
        """
        table = self.embeddings.word.weight
        if packed is not None and (packed.shape != tuple(table.shape) or not packed.w8a8):
            raise ValueError(
                f"a packed vocabulary: got {packed.scheme} {packed.shape}, dynamic {packed.dynamic}; wanted int8 "
                f"{tuple(table.shape)}, dynamic"
            )
        self.packed_vocabulary = None if packed is None else packed.to(table.device)
        self.forget()

    def prepare(self) -> None:
        """For inference: lays the vocabulary's matrix out once instead of at every step, and collects the layers'
        weights at the first step. To be called again after modules were replaced."""
        if self.packed_vocabulary is None:
            self.vocabulary_panels = Panels(self.embeddings.word.weight)
        else:
            self.packed_vocabulary = prepare_packed(self.packed_vocabulary).in_panels()
        self.forget()
        self._prepared = True

    def forget(self) -> None:
        """What was collected of the layers; it is collected anew where it is wanted."""
        self._laid = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AnswerDecoder":
        super()._apply(fn, recurse)
        if self.packed_vocabulary is not None:
            self.packed_vocabulary = self.packed_vocabulary.to(self.head.bias.device)
        self.forget()
        return self

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
            slots: int32 (R,), the row's answer slot; one slot's rows stand one behind another, at successive positions.
            positions: int32 (R,), the token's position: 0 for [DEC].
            question_index: int32 (R,), the row's question slot, non-decreasing: beams of a question stand together.
        """
        _, logits, ids, total = self._run(tokens, cache, slots, positions, question_index, num_best)
        return logits - total[:, None], ids

    def step_and_states(
        self,
        tokens: Tensor,
        cache: KVCache,
        slots: Tensor,
        positions: Tensor,
        question_index: Tensor,
        num_best: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`states` and `step` of one pass: states (R, C), log-probabilities and ids (R, num_best)."""
        states, logits, ids, total = self._run(tokens, cache, slots, positions, question_index, num_best)
        return states, logits - total[:, None], ids

    def states(
        self, tokens: Tensor, cache: KVCache, slots: Tensor, positions: Tensor, question_index: Tensor
    ) -> Tensor:
        """The same, but (R, C): what the vocabulary matrix is multiplied with (`best`, `logits`, `logits_at`)."""
        return self._run(tokens, cache, slots, positions, question_index, 0)[0]

    def _run(
        self, tokens: Tensor, cache: KVCache, slots: Tensor, positions: Tensor, questions: Tensor, num_best: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights, runner = self._weights()
        return decoder_step(weights, cache_of(cache), tokens, slots, positions, questions, num_best, runner)

    def _weights(self) -> tuple[Decoder, object | None]:
        if not self._prepared or torch.compiler.is_compiling():
            return collect(self), None
        if self._laid is None or not (self._laid.counted if self.steady else self._laid.fresh):
            self._laid = Laid(self)
        return self._laid.weights, self._laid.runner

    def best(self, states: Tensor, num_best: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best next tokens after states (R, C): log-probabilities (R, num_best), descending; ids int64
        (R, num_best); the log-sum-exp of all logits (R,)."""
        weight, bias, panels = vocabulary(self)
        logits, ids, total = linear_top_k(states, weight, bias, num_best, panels)
        return logits - total[:, None], ids, total

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
        """All logits (…, V) after states (…, C), which are `states`' or, teacher-forced, `head(forward(…))`; float32
        (float64 in float64)."""
        weight, bias, panels = vocabulary(self)
        if isinstance(weight, PackedWeight):
            logits = quant_linear(states, weight, bias)
        else:
            logits = linear(states, weight, bias, None, panels)
        return logits if logits.dtype == torch.float64 else logits.float()

    def logits_at(self, states: Tensor, ids: Tensor) -> Tensor:
        """Logits (R, A) of the words `ids` int64 (R, A) alone, after states (R, C)."""
        weight, bias, _ = vocabulary(self)
        return linear_at(states, weight, bias, ids)
