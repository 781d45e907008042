"""A decode step by csrc/cpu's runner: one call for all layers.

Knows what the runner wants to know of the weights, and keeps them alive; does not know what it computes.
"""

from typing import Any

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.decoder_step.weights import Cache, Decoder, Matrix, Norm
from miss.kernels.quant_linear import PackedWeight

_PLAIN, _W8A8, _WEIGHT_ONLY = range(3)
_WRONG = ("token", "slot", "position", "question")


class Runner:
    """A decoder's weights as addresses. What they point at is kept here."""

    def __init__(self, decoder: Decoder) -> None:
        self._kept: list[Tensor] = []
        words, positions = self._keep(decoder.words), self._keep(decoder.positions)
        layers = [tuple(self._part(part) for part in layer) for layer in decoder.layers]
        inner = decoder.layers[0].input.weight.shape[0] if decoder.layers else 4
        head = decoder.vocabulary
        if head.bias is not None:
            head = head._replace(bias=head.bias.float())
        self._runner = extension.decoder_runner(
            decoder.words.dtype == torch.bfloat16,
            decoder.words.shape[1],
            inner,
            decoder.num_heads,
            len(decoder.words),
            len(decoder.positions),
            words,
            positions,
            self._part(decoder.norm),
            layers,
            self._part(decoder.transform),
            self._part(decoder.transform_norm),
            self._part(head),
        )
        self.step = self._runner.step

    def _keep(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self._kept.append(tensor.detach().contiguous())
        return self._kept[-1].data_ptr()

    def _part(self, part: Matrix | Norm) -> tuple[Any, ...]:
        if isinstance(part, Norm):
            return self._keep(part.weight.float()), self._keep(part.bias.float()), part.eps
        bias, bf16 = self._keep(part.bias), part.bias is not None and part.bias.dtype == torch.bfloat16
        weight = part.weight
        if not isinstance(weight, PackedWeight):
            return _PLAIN, self._keep(part.panels), *weight.shape, 0, 0, bias, bf16, 0, False
        assert weight.prepared is not None, "prepare() has looked"
        panels, offset = weight.prepared
        kind = _W8A8 if weight.dynamic else _WEIGHT_ONLY
        scale = 0 if weight.group else self._keep(weight.scale)
        return (
            *(kind, self._keep(panels), *weight.shape, scale, self._keep(offset)),
            *(bias, bf16, weight.group, weight.zero is not None),
        )


def _cache(t: Tensor) -> tuple[int, int, int, int]:
    size = t.element_size()
    layer, slot, token, _, _ = t.stride()
    return t.data_ptr(), layer * size, slot * size, token * size


def forward(
    words: Tensor,
    decoder: Decoder,
    cache: Cache,
    tokens: Tensor,
    slots: Tensor,
    positions: Tensor,
    questions: Tensor,
    num_best: int,
    runner: Runner,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = len(tokens), words.shape[1]
    states = torch.empty(rows, width, dtype=words.dtype)
    values = torch.empty(rows, num_best)
    ids = torch.empty(rows, num_best, dtype=torch.int64)
    total = torch.empty(rows if num_best else 0)
    given = [_of(tokens, torch.int64), *(_of(t, torch.int32) for t in (slots, positions, questions))]
    lengths = _of(cache.question_lengths, torch.int32)
    wrong = runner.step(
        rows, *(t.data_ptr() for t in given), [_cache(c) for c in cache[:4]],
        cache.self_k.shape[1], cache.self_k.shape[2], cache.cross_k.shape[1], cache.cross_k.shape[2],
        lengths.data_ptr(), num_best, states.data_ptr(), values.data_ptr(), ids.data_ptr(), total.data_ptr(),
    )  # fmt: skip
    if wrong:
        row, which = divmod(wrong - 1, 4)
        raise IndexError(f"decoder_step: the {_WRONG[which]} of row {row} is {int(given[which][row])}: out of range")
    return states, values, ids, total


def _of(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()
