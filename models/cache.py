"""The tensors that decoding reads and writes: fixed slots for answers, and the projected question states beside them.

Knows shapes and dtypes; does not know who owns a slot, or for how long. An answer has at most a few dozen tokens and a
question at most 35 states, so that slots of full length cost less than the tables that paging would need.

Shapes: S answer slots (a beam each), Q question slots, L answer length, T question length, H heads, D head width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from miss.kernels.cross_attention import KV
from miss.kernels.kv_cache import kv_reorder
from miss.kernels.memory import sparse_zeros
from miss.models.config import TextConfig


class LayerCache(NamedTuple):
    """One layer's self-attention keys and values: (S, L, H, D) each."""

    k: Tensor
    v: Tensor


@dataclass
class KVCache:
    """Self-attention K/V of every decoder layer, and the questions' cross-attention K/V.

    self_k, self_v:    (layers, S, L, H, D)
    cross_k, cross_v:  (layers, Q, T, H, D)
    question_lengths:  int32 (Q,), the valid states of each question
    """

    self_k: Tensor
    self_v: Tensor
    cross_k: Tensor
    cross_v: Tensor
    question_lengths: Tensor

    @classmethod
    def allocate(
        cls,
        config: TextConfig,
        num_slots: int,
        num_questions: int,
        answer_length: int,
        question_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "KVCache":
        """Zeroed tensors; base in bf16 costs 36,864 bytes a cached position. On CPU a page takes memory, and the time
        to zero it, only once it is written: slots that are never used cost neither."""
        heads = (config.num_heads, config.hidden_size // config.num_heads)

        def make(rows: int, length: int) -> Tensor:
            return zeros((config.num_layers, rows, length, *heads), dtype, torch.device(device))

        return cls(
            make(num_slots, answer_length),
            make(num_slots, answer_length),
            make(num_questions, question_length),
            make(num_questions, question_length),
            torch.zeros(num_questions, dtype=torch.int32, device=device),
        )

    @property
    def answer_length(self) -> int:
        return self.self_k.shape[2]

    def layer(self, i: int) -> LayerCache:
        return LayerCache(self.self_k[i], self.self_v[i])

    def question(self, i: int) -> KV:
        return KV(self.cross_k[i], self.cross_v[i])

    def put_questions(self, slots: Tensor, projected: list[KV], lengths: Tensor) -> None:
        """Stores a batch of questions: `projected` per layer (R, T, H, D) into question `slots` int64 (R,)."""
        length = projected[0].k.shape[1]
        for i, kv in enumerate(projected):
            self.cross_k[i, slots, :length] = kv.k.to(self.cross_k.dtype)
            self.cross_v[i, slots, :length] = kv.v.to(self.cross_v.dtype)
        self.question_lengths[slots] = lengths.to(torch.int32)

    def reorder(self, source: Tensor, target: Tensor, length: int | None = None) -> None:
        """Copies answer slots `source` int32 (R,) to `target` (R,) in every layer, in one go: beams that change their
        parent. `length`: of the slots' positions, only so many; None copies all."""
        layers, slots = self.self_k.shape[:2]
        first = torch.arange(layers, dtype=source.dtype, device=source.device)[:, None] * slots
        k, v = (t.flatten(0, 1)[:, :length] for t in (self.self_k, self.self_v))
        kv_reorder(k, v, (first + source).flatten(), (first + target).flatten())


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on CPU pages that take memory, and time, only once they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return sparse_zeros(shape, dtype)
