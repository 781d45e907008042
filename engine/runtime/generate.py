"""Generation over a KV cache: a plain loop that encodes a batch of questions and decodes it to the end.

Knows the model's encode and decode and the cache's slots; does not know text, images' files, or requests' arrival.

Shapes: I images, R questions, T question length, K beams or branches a question, V vocabulary.
"""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from miss.engine.runtime.sampler import BeamSearch
from miss.engine.runtime.search import Hypothesis
from miss.models.cache import KVCache
from miss.models.vqa import MissVQA


@dataclass
class Generated:
    """hypotheses: for each question, best first. seconds: time by stage for the whole batch."""

    hypotheses: list[list[Hypothesis]]
    seconds: dict[str, float] = field(default_factory=dict)


class Decoding:
    """The rows being decoded: question q owns answer slots q*K … q*K + K-1 and question slot q."""

    def __init__(self, model: MissVQA, cache: KVCache, branches: int, device: torch.device) -> None:
        self.model, self.cache, self.branches, self.device = model, cache, branches, device
        self.position = 0

    def step(self, slots: list[int], tokens: list[int], num_best: int) -> tuple[Tensor, Tensor]:
        """Feeds one token to each slot (sorted), all at the same position -> the best next ones: log-probabilities and
        ids (rows, num_best), or all of a vocabulary that has no more."""
        best = self.model.decode(
            torch.tensor(tokens, dtype=torch.int64, device=self.device),
            self.cache,
            self._int32(slots),
            torch.full((len(slots),), self.position, dtype=torch.int32, device=self.device),
            self._int32([slot // self.branches for slot in slots]),
            min(num_best, self.model.config.decoder.vocab_size),
        )
        self.position += 1
        return best

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copies answer slots (source, target), all at once."""
        moved = [(s, t) for s, t in pairs if s != t]
        if moved:
            self.cache.reorder(self._int32([s for s, _ in moved]), self._int32([t for _, t in moved]))

    def _int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


@torch.inference_mode()
def generate(
    model: MissVQA,
    pixels: Tensor | None,
    image_index: Tensor,
    question_ids: Tensor,
    question_lengths: Tensor,
    max_new_tokens: int,
    num_beams: int = 1,
    num_alternatives: int = 0,
    image_tokens: Tensor | None = None,
) -> Generated:
    """Answers a batch of questions over images.

    Args:
        pixels: uint8 (I, S, S, 3), or None where the images are encoded already.
        image_index: int32 (R,), non-decreasing.
        question_ids: int64 (R, T), padded with 0.
        question_lengths: int32 (R,).
        max_new_tokens: the closing [SEP] included.
        num_beams: 1 is greedy, with `num_alternatives` more branches from the next-best first tokens.
        image_tokens: (I, N, C), what `encode_images` made of the images; read instead of `pixels`.
    """
    device = question_ids.device
    clock = Clock(device)
    if image_tokens is None:
        assert pixels is not None, "images come as pixels or as tokens"
        image_tokens = model.encode_images(pixels)
    clock.lap("image")
    rows, branches = len(question_ids), num_beams if num_beams > 1 else 1 + num_alternatives
    cache = KVCache.allocate(
        model.config.decoder,
        rows * branches,
        rows,
        max_new_tokens,
        question_ids.shape[1],
        image_tokens.dtype,
        device,
    )
    slots = torch.arange(rows, device=device)
    model.encode(image_tokens, image_index, question_ids, question_lengths, cache, slots)
    clock.lap("question")
    decoding = Decoding(model, cache, branches, device)
    search = _greedy if num_beams == 1 else _beams
    hypotheses = search(decoding, rows, max_new_tokens) if rows else []
    clock.lap("decode")
    return Generated(hypotheses, clock.seconds)


def _greedy(decoding: Decoding, num_questions: int, max_new_tokens: int) -> list[list[Hypothesis]]:
    """Branch 0 is the greedy answer; branch j starts with the (j+1)-th best first token and is greedy from there."""
    tokens, branches = decoding.model.config.tokens, decoding.branches
    first = decoding.step([q * branches for q in range(num_questions)], [tokens.dec] * num_questions, branches)
    logprobs, ids = (t.flatten().tolist() for t in first)
    decoding.copy([(s // branches * branches, s) for s in range(num_questions * branches)])
    hypotheses = [Hypothesis().extended(i, p, tokens.sep) for i, p in zip(ids, logprobs, strict=True)]
    active = [s for s, h in enumerate(hypotheses) if not h.finished]
    while active and decoding.position < max_new_tokens:
        logprob, best = decoding.step(active, [hypotheses[s].token_ids[-1] for s in active], 1)
        for s, i, p in zip(active, best[:, 0].tolist(), logprob[:, 0].tolist(), strict=True):
            hypotheses[s] = hypotheses[s].extended(i, p, tokens.sep)
        active = [s for s in active if not hypotheses[s].finished]
    groups = [hypotheses[q * branches : (q + 1) * branches] for q in range(num_questions)]
    return [[group[0], *sorted(group[1:], key=lambda h: -h.logprob)] for group in groups]


def _beams(decoding: Decoding, num_questions: int, max_new_tokens: int) -> list[list[Hypothesis]]:
    """Beam search for every question at once; a question that is done leaves the batch."""
    config, width = decoding.model.config, decoding.branches
    searches = [BeamSearch(width, config.tokens.sep, config.behaviour) for _ in range(num_questions)]
    while decoding.position < max_new_tokens:
        active = [q for q, s in enumerate(searches) if not s.done]
        if not active:
            break
        slots = [q * width + b for q in active for b in range(len(searches[q].open))]
        last = [(h.token_ids or [config.tokens.dec])[-1] for q in active for h in searches[q].open]
        logprobs, ids = decoding.step(slots, last, 2 * width)
        moves, start = [], 0
        for q in active:
            rows = slice(start, start + len(searches[q].open))
            start = rows.stop
            parents = searches[q].advance(_candidates(logprobs[rows], ids[rows], searches[q].open, 2 * width))
            moves += [(q * width + parent, q * width + b) for b, parent in enumerate(parents)]
        decoding.copy(moves)
    return [search.finish() for search in searches]


def _candidates(logprobs: Tensor, ids: Tensor, beams: list[Hypothesis], count: int) -> list[tuple[int, int, float]]:
    """The `count` best (beam, token, log-probability of the token) by the beams' totals, of each beam's own best:
    logprobs, ids (beams, count)."""
    so_far = torch.tensor([b.logprob for b in beams], dtype=torch.float64, device=logprobs.device)
    totals = (logprobs.double() + so_far[:, None]).flatten()
    best = totals.topk(min(count, len(totals))).indices
    tokens, picked = ids.flatten()[best].tolist(), logprobs.flatten()[best].tolist()
    each = logprobs.shape[1]
    return [(i // each, token, p) for i, token, p in zip(best.tolist(), tokens, picked, strict=True)]


class Clock:
    """Seconds by stage; waits for the device at each lap, so that a stage's time is its own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
