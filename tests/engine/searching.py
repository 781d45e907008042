"""Drives a search with distributions that are computed from the whole prefix: the truth, without a cache or a batch."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from miss.engine.runtime.search import Choice, Search, Wants

Distribution = Callable[[tuple[int, ...]], torch.Tensor]
"""All tokens of a branch, [DEC] first, to the next one's logits float64 (V,)."""


def drive(search: Search, distribution: Distribution, most_steps: int = 100) -> int:
    """Feeds the search until it is done; returns the number of steps."""
    held: dict[int, list[int]] = {branch: [] for branch in range(search.branches)}
    steps = 0
    while not search.done:
        feeds, wants = search.feed(), search.wants()
        assert feeds and [f.branch for f in feeds] == sorted({f.branch for f in feeds})
        for feed in feeds:
            assert feed.tokens
            held[feed.branch] += feed.tokens
        choices = [_choice(distribution(tuple(held[f.branch])), wants, i) for i, f in enumerate(feeds)]
        copies = search.advance(choices)
        before = {branch: list(tokens) for branch, tokens in held.items()}
        for source, target in copies:
            held[target] = list(before[source])
        steps += 1
        assert steps <= most_steps, "the search does not end"
    return steps


def _choice(logits: torch.Tensor, wants: Wants, feed: int) -> Choice:
    logprobs = torch.log_softmax(logits, -1)
    choice = Choice()
    if wants.num_best:
        values, ids = logprobs.topk(wants.num_best)
        choice.best.extend(zip(ids.tolist(), values.tolist(), strict=True))
    if wants.allowed is not None:
        choice.allowed.extend(logprobs[list(wants.allowed[feed])].tolist())
    return Choice(choice.best, choice.allowed, logits.float() if wants.logits else None)


def random_distribution(seed: int, vocabulary: int, size: float = 2.0) -> Distribution:
    """Independent logits for every prefix."""

    def logits(prefix: tuple[int, ...]) -> torch.Tensor:
        random = np.random.default_rng([seed, *prefix])
        return torch.from_numpy(random.standard_normal(vocabulary) * size)

    return logits


def logprob(distribution: Distribution, dec: int, answer: Sequence[int]) -> float:
    """Of a whole answer under the full vocabulary's softmax."""
    total = 0.0
    for i, token in enumerate(answer):
        total += torch.log_softmax(distribution((dec, *answer[:i])), -1)[token].item()
    return total
