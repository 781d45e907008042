"""What pretraining asks of a model, as functions of tensors: contrast, matching, language modelling, masked words.

Knows the formulas and what of them waits for the host (nothing); does not know modules, ranks or weights of losses.

    contrast  ITC  half the sum of both directions of `kernels/contrastive`: students against the momentum features of
                   the batch and of the queue, targets alpha * softmax(momentum) + (1 - alpha) * onehot(own)
    matching  ITM  each pair, each text with a drawn image, each image with a drawn text: does the text belong?
    captions  LM   every next token of the caption over its image, label-smoothed
    masked    MLM  the words behind [MASK] over the image; an option that MISS itself does not use

A caption that is equal to the row's own is never a negative, neither in the contrast nor among the drawn; `compat`
repeats the original, where only the diagonal is spared.

Shapes: B pairs of this process, N of all, P width of a feature, T caption length, C width. Source: arXiv 2107.07651
(ALBEF), 2201.12086 (BLIP), 2401.05163 (MISS).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.kernels.contrastive import contrastive_loss, hard_negatives
from miss.kernels.dropout import as_seed, uniform
from miss.models.layers import mix
from miss.models.queue import Features

IGNORED = -100
HIDDEN = 0.15  # of the words, where masked words are asked for
TEMPERATURES = (0.001, 0.5)  # the original clamps to these before every step


def alpha_at(step: int, steps_per_epoch: int, most: float = 0.4) -> float:
    """How much the momentum model's own opinion counts at a step: a ramp over the first two epochs.

    Raises:
        ValueError: no step in an epoch, or a step before the first.
    """
    if steps_per_epoch < 1 or step < 0:
        raise ValueError(f"step {step} of {steps_per_epoch} an epoch: wanted 0 or more, of 1 or more")
    return most * min(1.0, step / (2 * steps_per_epoch))


def clamped(temperature: Tensor) -> Tensor:
    """The temperature inside its bounds, with the gradient at that value, also where it was outside.

    The original clamps the parameter itself before a step; here the values that a sharding engine owns stay its own.
    """
    return temperature + (temperature.detach().clamp(*TEMPERATURES) - temperature.detach())


def normalised(x: Tensor) -> Tensor:
    """Rows of length 1, in float32 at least."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def contrast(
    image: Tensor,
    text: Tensor,
    teacher: Features,
    batch: Features,
    first: int,
    queue: Features,
    temperature: Tensor,
    alpha: float,
    compat: bool = False,
) -> Tensor:
    """The contrastive loss of each pair, (B,).

    Args:
        image, text: (B, P), of length 1; they and the temperature get gradients.
        teacher: the momentum features of these pairs.
        batch: those of all processes' pairs, (N, P); this process's start at row `first`.
        queue: those of the batches before.
    """
    here, before = (None, None) if compat else (batch.ids, queue.ids)
    to_text = contrastive_loss(image, teacher.image, batch.text, queue.text, temperature, alpha, here, before, first)
    to_image = contrastive_loss(text, teacher.text, batch.image, queue.image, temperature, alpha, here, before, first)
    return (to_text + to_image) / 2


class Pairs(NamedTuple):
    """Rows of the matching objective, sorted by image, all (3B,).

    image, text: int64, which of the batch; label: int64, 1 where they belong together; weight: 0 where no negative
    could be drawn (every other caption of the batch is equal), else 1.
    """

    image: Tensor
    text: Tensor
    label: Tensor
    weight: Tensor


def matching_pairs(
    image: Tensor,
    text: Tensor,
    teacher: Features,
    temperature: Tensor,
    seed: int | None = None,
    compat: bool = False,
    first: int = 0,
    among: int = 0,
) -> Pairs:
    """The pairs, and one hard negative of each image and of each text, drawn within the process's batch on the device.

    Drawn with weights softmax(similarity / temperature) + 1e-4 of the student to the momentum features, as the source
    does.

    Args:
        first: which pair of all processes' is the first of these.
        among: draw within so many neighbours of all processes' pairs (0: of the process's own), so that the draw is the
            same on any number of processes whose parts are multiples of it.
    """
    ids = None if compat else teacher.ids
    drawn_image = _drawn(text, teacher.image, temperature, mix(seed, 0), ids, first, among)
    drawn_text = _drawn(image, teacher.text, temperature, mix(seed, 1), ids, first, among)
    own = torch.arange(len(image), device=image.device)
    images = torch.cat([own, drawn_image.clamp(min=0), own])
    texts = torch.cat([own, own, drawn_text.clamp(min=0)])
    label = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])
    weight = torch.cat([torch.ones_like(own), drawn_image >= 0, drawn_text >= 0])
    order = images.argsort(stable=True)
    return Pairs(*(t[order] for t in (images, texts, label, weight)))


def _drawn(
    rows: Tensor, columns: Tensor, temperature: Tensor, seed: int | None, ids: Tensor | None, first: int, among: int
) -> Tensor:
    """The column that is each row's negative, -1 where there is none: every group draws with a seed of its own."""
    drawn = []
    for start, end in groups(len(rows), first, among):
        own = None if ids is None else ids[start:end]
        column = hard_negatives(rows[start:end], columns[start:end], temperature, mix(seed, first + start), own)
        drawn.append(torch.where(column < 0, column, column + start))
    return torch.cat(drawn)


def groups(count: int, first: int, size: int) -> list[tuple[int, int]]:
    """Where `count` rows that start at row `first` of all are cut, so that no piece crosses a multiple of `size`."""
    edges = range(size - first % size, count, size) if size else ()
    return list(pairwise([0, *edges, count]))


def matching_loss(logits: Tensor, pairs: Pairs) -> Tensor:
    """The loss of each row, (3B,), 0 where its weight is; the mean is over the weights' sum."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, pairs.label, reduction="none") * pairs.weight


def with_first(ids: Tensor, token: int) -> Tensor:
    """ids (B, T) with another first token: [CLS], [ENC] or [DEC] says which mode reads them."""
    return torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], 1)


def real_tokens(ids: Tensor, lengths: Tensor) -> Tensor:
    """Which positions hold tokens and not padding: bool (B, T)."""
    return torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]


def next_tokens(ids: Tensor, lengths: Tensor) -> Tensor:
    """What follows each of ids (B, T) but the last: int64 (B, T - 1), `IGNORED` behind the caption's end."""
    return ids[:, 1:].masked_fill(~real_tokens(ids[:, 1:], lengths - 1), IGNORED)


def counted(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of states (B, T, C) that have a label, (M, C), and these labels (M,).

    Only where the host may know M: elsewhere all rows, whose labels say that they do not count.
    """
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return states.flatten(0, 1), labels.flatten()
    real = labels != IGNORED
    return states[real], labels[real]


def masked_words(
    ids: Tensor,
    lengths: Tensor,
    mask: int,
    num_words: int,
    seed: int | None,
    share: float = HIDDEN,
    specials: Sequence[int] = (),
    first: int = 0,
    width: int = 512,
) -> tuple[Tensor, Tensor]:
    """ids (B, T) with a share of the words hidden, and the labels (B, T): the hidden words, elsewhere `IGNORED`.

    Of those chosen 80 % become `mask`, 10 % any of `num_words` words, 10 % stay (BERT, arXiv 1810.04805). The first and
    the last token of a caption are never chosen, nor are `specials` between them. What is drawn for a place depends on
    the seed, on the caption's number among all processes' (`first` is that of the first one here) and on the place
    alone, not on padding: `width` is how many places a caption has at most.
    """
    inner = real_tokens(ids, lengths - 1)
    inner[:, :1] = False
    for special in specials:
        inner &= ids != special
    chance, fate, word = (_uniform(mix(seed, site), ids, first, width) for site in range(3))
    chosen = inner & (chance < share)
    hidden = torch.where(fate < 0.8, mask, torch.where(fate < 0.9, (word * num_words).long(), ids))
    return torch.where(chosen, hidden, ids), ids.masked_fill(~chosen, IGNORED)


def _uniform(seed: int | None, like: Tensor, first: int, width: int) -> Tensor:
    drawn = as_seed(seed, 0.5)
    assert drawn is not None and like.shape[1] <= width
    return uniform(drawn, (len(like), width), like.device, first * width)[:, : like.shape[1]]
