"""How many floating point operations a training step has, and how fast this machine multiplies matrices.

Knows the architecture's sizes and a clock; does not know the loop. Counts are the model's own work, two for a
multiply-add: padding, recomputation and element-wise work are left out.
"""

import time

import torch
from torch import Tensor

from miss.models.config import MissConfig, TextConfig
from miss.models.objectives import HIDDEN
from miss.models.pretrain import ObjectiveConfig, PretrainBatch
from miss.models.vqa import VQABatch


def vision_flops(config: MissConfig, num_images: int, num_tokens: int) -> float:
    """Forward FLOPs of the image encoder."""
    v = config.vision
    per_layer = 2 * num_tokens * (4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size)
    per_layer += 4 * num_tokens**2 * v.hidden_size
    patches = 2 * (num_tokens - 1) * 3 * v.patch_size**2 * v.hidden_size
    return float(num_images * (patches + v.num_layers * per_layer))


def text_flops(config: TextConfig, lengths: Tensor, keys: Tensor | int) -> float:
    """Forward FLOPs of a text tower without its stacked K/V projection.

    `lengths` (R,) are the rows' tokens, `keys` what each row cross-attends to: a number for all, or (R,).
    """
    c, f = config.hidden_size, config.intermediate_size
    lengths = lengths.double()
    per_layer = 2 * lengths * (6 * c * c + 2 * c * f) + 4 * lengths * (lengths + keys) * c
    return config.num_layers * float(per_layer.sum())


def training_flops(config: MissConfig, batch: VQABatch, train_vision: bool, train_words: bool) -> float:
    """Forward and backward FLOPs of a batch.

    A trained product costs three times its forward (values, gradient of the input, gradient of the weight), one over
    cached image tokens or with a frozen word table twice, a frozen image encoder nothing more than its forward.
    """
    if batch.image_tokens is not None:
        images, tokens = batch.image_tokens.shape[:2]
        total = 0.0
    else:
        assert batch.pixels is not None
        images = batch.pixels.shape[0]
        tokens = (batch.pixels.shape[1] // config.vision.patch_size) ** 2 + 1
        total = vision_flops(config, images, tokens) * (3 if train_vision else 1)
    e, d = config.encoder, config.decoder
    questions, answers = batch.question_lengths, batch.answer_lengths - 1
    image_kv = 4.0 * images * tokens * e.source_width * e.num_layers * e.hidden_size
    question_kv = 4.0 * int(questions.sum()) * d.source_width * d.num_layers * d.hidden_size
    head = 2.0 * int(answers.sum()) * d.hidden_size**2
    words = 2.0 * int(answers.sum()) * d.hidden_size * d.vocab_size
    text = text_flops(e, questions, tokens) + text_flops(d, answers, questions)
    total += image_kv * (3 if train_vision else 2) + words * (3 if train_words else 2)
    return total + 3 * (text + question_kv + head)


def pretraining_flops(
    config: MissConfig,
    objective: ObjectiveConfig,
    batch: PretrainBatch,
    alpha: bool = True,
    hidden: int | None = None,
    known: bool = False,
) -> float:
    """Forward and backward FLOPs of a pretraining step as `models/pretrain.py` runs it.

    A negative text counts as long as the pair's own: which is drawn stands on the device. The momentum twin has a
    forward only, patches get no gradient, the queue's features none. `alpha`: whether the twin's opinion counts.
    `hidden`: how many words MLM hid (`Losses.numbers`), else as many as are to be expected. `known`: the image tokens
    were there already.
    """
    v, e, d, width = config.vision, config.encoder, config.decoder, objective.feature_width
    images, lengths = len(batch.ids), batch.lengths.double()
    tokens = (batch.pixels.shape[1] // v.patch_size) * (batch.pixels.shape[2] // v.patch_size) + 1
    vision = vision_flops(config, images, tokens)
    patches = 2.0 * images * (tokens - 1) * 3 * v.patch_size**2 * v.hidden_size
    last = 2.0 * (tokens - 1) * (2 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size)
    last += 4.0 * (tokens - 1) * tokens * v.hidden_size
    if known:
        vision = patches = last = 0.0
    image_kv = 4.0 * images * tokens * e.source_width * e.num_layers * e.hidden_size
    alone, matching = first_token_flops(e, lengths, 0), 3 * first_token_flops(e, lengths, tokens)
    words = float((lengths - 1).sum())
    captions = text_flops(d, lengths - 1, tokens) + 2.0 * words * d.hidden_size * (d.hidden_size + d.vocab_size)
    projections = 2.0 * images * width * (v.hidden_size + e.hidden_size)
    contrast = 4.0 * images * (images + objective.queue_size) * width
    among = min(objective.negatives_among or images, images)
    negatives = 4.0 * images * among * width
    trained = vision + image_kv + alone + matching + captions + projections + 12.0 * images * e.hidden_size
    twin = vision - images * last + alone + projections + (contrast if alpha else 0.0)
    masked = 0.0
    if objective.mlm:
        hidden_words = HIDDEN * float((lengths - 2).clamp(min=0).sum()) if hidden is None else hidden
        masked = text_flops(e, lengths, tokens) + 2.0 * hidden_words * e.hidden_size * (e.hidden_size + e.vocab_size)
    return 3 * (trained + masked) - patches + 2 * contrast + twin + negatives


def first_token_flops(config: TextConfig, lengths: Tensor, keys: int) -> float:
    """Forward FLOPs of the joint encoder where only the first token's last state is wanted; `keys` 0: text alone."""
    c, f = config.hidden_size, config.intermediate_size
    lengths = lengths.double()
    products = 4 * c * c + 2 * c * f + (2 * c * c if keys else 0)
    layer = 2 * lengths * products + 4 * lengths * (lengths + keys) * c
    last = 2 * (products + (lengths - 1) * 2 * c * c) + 4 * (lengths + keys) * c
    return float(((config.num_layers - 1) * layer + last).sum())


def matmul_ceiling(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """FLOP/s of the best square matrix product (1,024 on CPU, 4,096 on CUDA) that this machine reaches right now."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
