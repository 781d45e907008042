"""How many floating point operations a training step has, and how fast this machine multiplies matrices.

Knows the architecture's sizes and a clock; does not know the loop. Counts are the model's own work, two for a
multiply-add: padding inside a batch counts, recomputation does not, element-wise work is left out.
"""

import time

import torch
from torch import Tensor

from miss.models.config import MissConfig, TextConfig
from miss.models.vqa import VQABatch


def vision_flops(config: MissConfig, num_images: int, num_tokens: int) -> float:
    """Forward FLOPs of the image encoder."""
    v = config.vision
    per_layer = 2 * num_tokens * (4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size)
    per_layer += 4 * num_tokens**2 * v.hidden_size
    patches = 2 * (num_tokens - 1) * 3 * v.patch_size**2 * v.hidden_size
    return float(num_images * (patches + v.num_layers * per_layer))


def text_flops(config: TextConfig, lengths: Tensor, keys: Tensor | int) -> float:
    """Forward FLOPs of a text tower without its stacked K/V projection, padding not counted: rows of `lengths` (R,)
    tokens, each of which cross-attends to `keys` (R,)."""
    c, f = config.hidden_size, config.intermediate_size
    tokens = lengths.double()
    per_layer = 2 * tokens * (6 * c * c + 2 * c * f) + 4 * tokens * (tokens + keys) * c
    return float(config.num_layers * per_layer.sum())


def training_flops(
    config: MissConfig, batch: VQABatch, num_answer_tokens: int, train_vision: bool, train_words: bool
) -> float:
    """Forward and backward FLOPs of a batch whose head sees `num_answer_tokens` tokens, padding not counted.

    A trained product costs three times its forward (values, gradient of the input, gradient of the weight), one over
    cached image tokens or with a frozen word table twice, a frozen image encoder nothing.
    """
    rows, padded = batch.question_ids.shape
    question, answer = batch.question_lengths.cpu(), batch.answer_lengths.cpu() - 1
    if batch.image_tokens is not None:
        images, tokens = batch.image_tokens.shape[:2]
        total = 0.0
    else:
        assert batch.pixels is not None
        images = batch.pixels.shape[0]
        tokens = (batch.pixels.shape[1] // config.vision.patch_size) ** 2 + 1
        total = vision_flops(config, images, tokens) * (3 if train_vision else 1)
    e, d = config.encoder, config.decoder
    image_kv = 2.0 * images * tokens * e.source_width * 2 * e.num_layers * e.hidden_size
    question_kv = 2.0 * rows * padded * d.source_width * 2 * d.num_layers * d.hidden_size
    head = 2.0 * num_answer_tokens * d.hidden_size**2
    words = 2.0 * num_answer_tokens * d.hidden_size * d.vocab_size
    text = text_flops(e, question, tokens) + text_flops(d, answer, question)
    total += image_kv * (3 if train_vision else 2) + words * (3 if train_words else 2)
    return total + 3 * (text + question_kv + head)


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
