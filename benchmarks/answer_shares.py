"""What an answer costs by the count: bytes that a decode step reads, operations of a question; and shares of those.

Knows a configuration's sizes; does not know who computes, or how.
"""

import statistics
from typing import Any

from miss.benchmarks.answer_rounds import Turns
from miss.models.config import MissConfig

_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def step_bytes(config: MissConfig, precision: str) -> int:
    """Weights that one step of the decoder reads: all layers but their source's keys and values, and the words."""
    decoder = config.decoder
    width, inner = decoder.hidden_size, decoder.intermediate_size
    layer = 3 * width * width + 3 * width * width + 2 * width * inner
    return _BYTES[precision] * (decoder.num_layers * layer + width * width + decoder.vocab_size * width)


def flops(config: MissConfig, questions: int, question_length: int, tokens: int) -> float:
    """Of `questions` over one image, a multiply-add counted as two."""
    vision, encoder, decoder = config.vision, config.encoder, config.decoder
    size = config.preprocess.image_size // vision.patch_size
    seen, width, inner = size * size + 1, vision.hidden_size, vision.intermediate_size
    layer = seen * (4 * width * width + 2 * width * inner) + 2 * seen * seen * width
    image = vision.num_layers * layer + size * size * 3 * vision.patch_size**2 * width
    image += encoder.num_layers * seen * 2 * width * encoder.hidden_size
    width, inner, length = encoder.hidden_size, encoder.intermediate_size, question_length
    layer = length * (6 * width * width + 2 * width * inner) + 2 * length * width * (length + seen)
    question = encoder.num_layers * layer + decoder.num_layers * length * 2 * width * decoder.hidden_size
    return 2.0 * (image + questions * (question + tokens * step_bytes(config, "int8")))


def shares(config: MissConfig, tokens: int, precision: str, turns: Turns, read: float) -> dict[str, Any]:
    """decode_share_of_read: of the bandwidth `read` (bytes a second) that was measured in the same rounds. cached_ms:
    an answer about an image just asked about; cached_over_stages: that / its own question and decode stages."""
    step = statistics.median(turns.seconds["decode"]) / tokens
    found: dict[str, Any] = {
        "decode_step_ms": round(1e3 * step, 3),
        "read_gbps": round(read / 1e9, 1),
        "decode_share_of_read": round(step_bytes(config, precision) / step / read, 3),
    }
    if turns.cached["total"]:
        parts = {stage: statistics.median(values) for stage, values in turns.cached.items()}
        found["cached_ms"] = {stage: round(1e3 * value, 2) for stage, value in parts.items()}
        found["cached_over_stages"] = round(parts["total"] / (parts["question"] + parts["decode"]), 3)
    return found


def grouped(
    config: MissConfig, one_ms: float, many_ms: float, questions: int, length: int, tokens: int
) -> dict[str, float]:
    """How much faster `questions` over one image are than asked apart, and the share of what the operations allow."""
    allowed = questions * flops(config, 1, length, tokens) / flops(config, questions, length, tokens)
    reached = questions * one_ms / many_ms
    return {"speed_up": round(reached, 3), "allowed": round(allowed, 3), "share": round(reached / allowed, 3)}
