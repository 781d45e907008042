"""A batch of questions answered to its end without a queue: what validation during training asks.

Knows tensors of questions and images, or of images' tokens; does not know files, texts or arrivals.

Shapes: I images, R questions, T question length, N image tokens, C width.
"""

import torch
from torch import Tensor

from miss.engine.runtime.config import EngineConfig
from miss.engine.runtime.image_cache import ImageCache
from miss.engine.runtime.request import Request, RequestImage
from miss.engine.runtime.runner import Runner
from miss.engine.runtime.sampler import SamplingParams, make_search
from miss.engine.runtime.search import Hypothesis
from miss.engine.runtime.slots import Slots
from miss.models.vqa import MissVQA


@torch.inference_mode()
def answer_batch(
    model: MissVQA,
    images: Tensor,
    image_index: Tensor,
    question_ids: Tensor,
    question_lengths: Tensor,
    params: SamplingParams | None = None,
) -> list[list[Hypothesis]]:
    """The hypotheses of each question, best first.

    Args:
        images: uint8 (I, S, S, 3), or tokens (I, N, C) that `encode_images` made of them.
        image_index: int32 (R,), non-decreasing.
        question_ids: int64 (R, T), padded with 0; in `compat` behaviour the padding counts.
        question_lengths: int32 (R,).
        params: one way of choosing for all; the default is greedy, without alternatives.
    """
    params = params or SamplingParams(num_alternatives=0)
    if not len(question_ids):
        return []
    shown = [
        RequestImage(str(i).encode(), pixels=one.cpu().numpy()) if one.dim() == 3 else RequestImage(b"", tokens=one)
        for i, one in enumerate(images)
    ]
    requests = [
        Request(i, shown[image], ids[:length], params, make_search(params, model.config))
        for i, (image, ids, length) in enumerate(
            zip(image_index.tolist(), question_ids.tolist(), question_lengths.tolist(), strict=True)
        )
    ]
    runner = Runner(model, _slots(model, requests, question_ids.shape[1], params), ImageCache(0))
    for request in requests:
        request.question_slot, request.answer_slots = runner.slots.take(request.search.branches)
    runner.prefill(requests)
    while active := [r for r in requests if not (r.done or r.search.done)]:
        runner.decode(active)
    for request in requests:
        if request.error is not None:
            raise request.error
    return [request.search.hypotheses for request in requests]


def _slots(model: MissVQA, requests: list[Request], question_length: int, params: SamplingParams) -> Slots:
    """Exactly as many as the batch needs."""
    config = EngineConfig(
        answer_slots=max(1, sum(r.search.branches for r in requests)),
        question_slots=len(requests),
        answer_length=params.max_new_tokens or model.config.generation.max_new_tokens,
    )
    return Slots.allocate(model, config, question_length)
