"""MISS for visual question answering: image encoder, joint encoder, answer decoder.

Knows the order in which the three run, and the answer loss; does not know requests, files, optimisers or backends.

Shapes: I images, N image tokens, R questions, T question length, A answer length, C width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from miss.kernels.cross_attention import KV
from miss.kernels.cross_entropy import linear_cross_entropy
from miss.models.cache import KVCache
from miss.models.config import MissConfig
from miss.models.cross_kv import split_layers
from miss.models.decoder import AnswerDecoder
from miss.models.joint import JointEncoder
from miss.models.layers import TextLayer, initialise, mix
from miss.models.linear import Linear, QuantLinear
from miss.models.vision import PatchEmbed, VisionBlock, VisionTransformer


@dataclass
class VQABatch:
    """Questions with answers, grouped by image, so that each image is encoded once for all of its questions.

    pixels:            uint8 (I, S, S, 3), or None where image_tokens are given
    image_tokens:      (I, N, C), or None where pixels are given
    question_ids:      int64 (R, T), [ENC] … [SEP], padded with 0
    question_lengths:  int32 (R,)
    image_index:       int32 (R,), non-decreasing
    answer_ids:        int64 (R, A), [DEC] … [SEP], padded with 0
    answer_lengths:    int32 (R,)
    """

    pixels: Tensor | None
    image_tokens: Tensor | None
    question_ids: Tensor
    question_lengths: Tensor
    image_index: Tensor
    answer_ids: Tensor
    answer_lengths: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "VQABatch":
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return VQABatch(
            None if self.pixels is None else move(self.pixels),
            None if self.image_tokens is None else move(self.image_tokens),
            move(self.question_ids),
            move(self.question_lengths),
            move(self.image_index),
            move(self.answer_ids),
            move(self.answer_lengths),
        )


@dataclass
class VQAOutput:
    """loss_per_row: float32 (R,), the sum over the row's answer tokens; num_tokens: int64 (R,)."""

    loss_per_row: Tensor
    num_tokens: Tensor


class MissVQA(nn.Module):
    """The model of arXiv 2401.05163 in its answering form."""

    def __init__(self, config: MissConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision, config.preprocess)
        self.encoder = JointEncoder(config.encoder)
        self.decoder = AnswerDecoder(config.decoder, self.encoder.embeddings if config.tie_embeddings else None)
        self.apply(initialise)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """pixels uint8 (I, S, S, 3) -> image tokens (I, N, C), [CLS] first."""
        return self.vision(pixels)

    def project_images(self, image_tokens: Tensor, out: Tensor | None = None) -> list[KV]:
        """Image tokens (I, N, C) -> the joint encoder's cross-attention K and V of every layer, (I, N, H, D).

        `out`: (I, N, layers, 2, H, D) of any strides, written in inference instead of new memory (`cross_kv.new_room`).
        """
        return split_layers(self.encoder.cross_kv.product(image_tokens, out))

    def encode_questions(
        self,
        question_ids: Tensor,
        question_lengths: Tensor | None,
        image_kv: list[KV],
        image_index: Tensor,
        seed: int | None = None,
        padded: bool = False,
    ) -> Tensor:
        """Questions (R, T) over their images -> states (R, T, C); `padded` computes those of padding, too."""
        return self.encoder(question_ids, question_lengths, image_kv, image_index, seed, padded)

    def project_questions(self, states: Tensor) -> list[KV]:
        """Question states (R, T, C) -> the decoder's cross-attention K and V of every layer, (R, T, H, D)."""
        return self.decoder.cross_kv.layers(states)

    def encode(
        self,
        image_kv: list[KV],
        image_index: Tensor,
        question_ids: Tensor,
        question_lengths: Tensor,
        cache: KVCache,
        slots: Tensor,
    ) -> None:
        """Reads questions over images and puts what decoding needs into the cache's question `slots` int64 (R,).

        `image_kv`: per layer K and V (I, N, H, D), from `project_images` or a store of them; row r reads image
        `image_index[r]`, non-decreasing.

        In `compat` behaviour the whole padded length counts as the question when the decoder looks at it, as in the
        original, whose answers therefore depend on what shares their batch.
        """
        compat = self.config.behaviour == "compat"
        states = self.encode_questions(question_ids, question_lengths, image_kv, image_index, padded=compat)
        seen = torch.full_like(question_lengths, question_ids.shape[1]) if compat else question_lengths
        cache.put_questions(slots, self.project_questions(states), seen)

    def decode(self, tokens: Tensor, cache: KVCache, slots: Tensor, positions: Tensor, questions: Tensor) -> Tensor:
        """One token a row -> states (R, C), of which `decoder.best` and `decoder.logits` make what comes next; see
        `AnswerDecoder.states`."""
        return self.decoder.states(tokens, cache, slots, positions, questions)

    def decode_best(
        self, tokens: Tensor, cache: KVCache, slots: Tensor, positions: Tensor, questions: Tensor, num_best: int
    ) -> tuple[Tensor, Tensor]:
        """`decode` and `decoder.best` of it in one go: log-probabilities and ids (R, num_best); see
        `AnswerDecoder.step`."""
        return self.decoder.step(tokens, cache, slots, positions, questions, num_best)

    def prepare(self) -> "MissVQA":
        """For inference: lays every weight out for this machine's kernels, once, in memory of their own."""
        for module in self.modules():
            if isinstance(module, Linear | QuantLinear | PatchEmbed | AnswerDecoder):
                module.prepare()
        for module in self.modules():
            if isinstance(module, VisionBlock | TextLayer):
                module.prepare()
        return self

    def forward(self, batch: VQABatch, label_smoothing: float = 0.0, seed: int | None = None) -> VQAOutput:
        """The answers' loss, teacher-forced; dropout acts only where a seed is given.

        The original's loss is the mean over rows of the sum over tokens: `output.loss_per_row.mean()`.

        Raises:
            ValueError: neither pixels nor image tokens are given, or both.
        """
        if (batch.pixels is None) == (batch.image_tokens is None):
            raise ValueError("a batch carries either pixels or image_tokens")
        tokens = batch.image_tokens if batch.pixels is None else self.vision(batch.pixels, mix(seed, 0))
        assert tokens is not None
        states = self.encode_questions(
            batch.question_ids, batch.question_lengths, self.project_images(tokens), batch.image_index, mix(seed, 1)
        )
        rows = torch.arange(len(states), dtype=torch.int32, device=states.device)
        hidden = self.decoder(
            batch.answer_ids[:, :-1],
            self.project_questions(states),
            rows,
            batch.question_lengths,
            batch.answer_lengths - 1,
            mix(seed, 2),
        )
        return self._loss(hidden, batch, label_smoothing)

    def _loss(self, hidden: Tensor, batch: VQABatch, label_smoothing: float) -> VQAOutput:
        """Only real tokens reach the head: padding is two thirds of a usual batch, and the head its largest product."""
        labels = batch.answer_ids[:, 1:]
        real = torch.arange(labels.shape[1], device=labels.device) < (batch.answer_lengths - 1)[:, None]
        row = real.nonzero()[:, 0]
        loss = linear_cross_entropy(
            self.decoder.head(hidden[real]),
            self.decoder.embeddings.word.weight,
            self.decoder.head.bias,
            labels[real],
            label_smoothing,
        )
        total = torch.zeros(len(labels), dtype=loss.dtype, device=loss.device).index_add(0, row, loss)
        return VQAOutput(total, real.sum(1))
