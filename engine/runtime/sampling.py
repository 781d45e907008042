"""Sampling: tokens drawn from the model's distribution, sharpened by a temperature and cut to its likeliest part.

Knows logits and one request's seed; does not know models, caches or what else is being answered.

The draws are counter-based: the uniform number of a step is a function of (seed, which sample, step) alone, so that the
same request gives the same tokens alone, in any batch and in any order (as far as its logits are the same).
"""

import secrets

import numpy as np
from numpy.typing import NDArray

from miss.engine.runtime.search import Ahead, Choice, Feed, Hypothesis, Wants

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
_FIRST_LOOK = 256  # of top-p: most distributions hold their mass in fewer tokens; sorting 30,524 takes 2 ms


class Sampling:
    """One answer, and as many further independent ones as alternatives are asked for, each in a branch of its own.

    `hypotheses`: the answer is the first sample, whatever the others score; those follow, best first. Equal samples are
    not merged: how often one comes up says how likely it is. Log-probabilities are those of the model itself: under the
    full vocabulary's softmax at temperature 1.

    Args:
        dec, sep: the tokens that begin and end an answer.
        max_new_tokens: the closing [SEP] included.
        temperature: above 0; the logits are divided by it.
        top_k: only the k likeliest tokens, ties by lower id; 0 is all.
        top_p: only the likeliest tokens that together reach this share, the one that crosses it included, after top_k.
        seed: at least 0; None draws one.
        num_alternatives: further samples.
    """

    streams = True

    def __init__(
        self,
        dec: int,
        sep: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        num_alternatives: int = 0,
    ) -> None:
        assert temperature > 0 and top_k >= 0 and 0 < top_p <= 1, (temperature, top_k, top_p)
        self.branches = 1 + num_alternatives
        self.seed = secrets.randbits(63) if seed is None else seed
        self._cut = (temperature, top_k, top_p)
        self._dec, self._sep, self._left = dec, sep, max_new_tokens
        self._samples = [Hypothesis() for _ in range(self.branches)]
        self._started = False

    @property
    def done(self) -> bool:
        return self._left == 0 or all(sample.finished for sample in self._samples)

    @property
    def hypotheses(self) -> list[Hypothesis]:
        first, *others = self._samples
        return [first, *sorted(others, key=lambda sample: -sample.logprob)]

    def feed(self) -> list[Feed]:
        if not self._started:
            return [Feed(0, (self._dec,))]
        return [Feed(b, (s.token_ids[-1],)) for b, s in enumerate(self._samples) if not s.finished]

    def wants(self) -> Wants:
        return Wants(logits=True)

    def advance(self, choices: list[Choice]) -> list[tuple[int, int]]:
        """All samples draw from the first step's one distribution; the branches are copied only then."""
        started, self._started = self._started, True
        going = [b for b, s in enumerate(self._samples) if not s.finished]
        step = len(self._samples[going[0]].token_ids)
        for branch, choice in zip(going, choices if started else choices * self.branches, strict=True):
            token, logprob = choice.drawn or self._draw(choice, branch, step)
            if not np.isfinite(logprob):
                raise _cannot_sample(logprob)
            self._samples[branch] = self._samples[branch].extended(token, logprob, self._sep)
        self._left -= 1
        return [] if started else [(0, b) for b in going[1:] if not self._samples[b].finished]

    def _draw(self, choice: Choice, branch: int, step: int) -> tuple[int, float]:
        assert choice.logits is not None, "sampling chooses from logits"
        return draw(choice.logits.double().numpy(), uniform(self.seed, branch, step), *self._cut)

    def ahead(self, steps: int) -> list[Ahead] | None:
        """Once the first tokens are drawn, all from one distribution."""
        if not self._started and self.branches > 1:
            return None
        temperature, top_k, top_p = self._cut
        steps = min(steps, self._left)
        going = [b for b, sample in enumerate(self._samples) if not sample.finished]
        begin = len(self._samples[going[0]].token_ids)
        return [
            Ahead(
                *(self._left, self._sep, temperature, top_k, top_p),
                tuple(uniform(self.seed, branch, begin + i) for i in range(steps)),
            )
            for branch in going
        ]


def _cannot_sample(largest: float) -> ValueError:
    return ValueError(
        f"cannot sample: the largest of the logits is {largest}; the model overflowed here: use a wider precision"
    )


def uniform(seed: int, sample: int, step: int) -> float:
    """A number in [0, 1) of a request's seed, which of its samples, and the step: Philox, 53 bits."""
    bits = np.random.Philox(key=[seed % 2**64, sample], counter=[0, 0, 0, step]).random_raw()
    return float(int(bits) >> 11) * 2.0**-53


def draw(logits: Floats, at: float, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> tuple[int, float]:
    """The token at `at` in [0, 1) of the cut distribution, and its log-probability under the whole one.

    Args:
        logits: float64 (V,); -inf says never.

    Raises:
        ValueError: a logit is NaN or +inf, or all are -inf.
    """
    largest = float(logits.max())
    if not np.isfinite(largest):
        raise _cannot_sample(largest)
    ids, share = keep(logits, temperature, top_k, top_p)
    reached = share.cumsum()
    place = int(np.searchsorted(reached, at * reached[-1], side="right"))
    token = int(ids[min(place, len(ids) - 1)])
    return token, float(logits[token] - largest - np.log(np.exp(logits - largest).sum()))


def keep(logits: Floats, temperature: float, top_k: int, top_p: float) -> tuple[Ids, Floats]:
    """The ids that may be drawn, and their shares up to a common factor (the largest is 1); what has none is left out.

    Top-k keeps exactly k, of equal ones those with the lower ids. Top-p keeps a token where those before it, in order
    of probability and then of id, hold less than p of what top-k left: Hugging Face's rule, where ties are undefined.
    """
    share = np.exp((logits - logits.max()) / temperature)
    if 0 < top_k < len(share):
        ids = _largest(share, top_k)
    elif top_p < 1:
        return _nucleus(share, top_p)
    else:
        ids = np.arange(len(share))
    if top_p < 1:
        ids = ids[: _crossing(share[ids], top_p * float(share[ids].sum()))]
    ids = ids[share[ids] > 0]
    return ids, share[ids]


def _nucleus(share: Floats, top_p: float) -> tuple[Ids, Floats]:
    """Top-p of the whole vocabulary: ever more of its largest, until they hold enough."""
    wanted, count = top_p * float(share.sum()), _FIRST_LOOK
    while True:
        ids = _largest(share, min(count, len(share)))
        kept = _crossing(share[ids], wanted)
        if kept < len(ids) or len(ids) == len(share):
            ids = ids[:kept]
            ids = ids[share[ids] > 0]
            return ids, share[ids]
        count *= 8


def _crossing(ordered: Floats, wanted: float) -> int:
    """How many, from the largest on, until `wanted` is reached; at least one."""
    before = np.concatenate([[0.0], ordered.cumsum()[:-1]])
    return max(1, int(np.searchsorted(before, wanted, side="left")))


def _largest(share: Floats, count: int) -> Ids:
    """The ids of the `count` largest, in order of size and then of id."""
    if count < len(share):
        least = np.partition(share, len(share) - count)[len(share) - count]
        above, equal = np.flatnonzero(share > least), np.flatnonzero(share == least)
        ids = np.sort(np.concatenate([above, equal[: count - len(above)]]))
    else:
        ids = np.arange(len(share))
    return ids[np.argsort(-share[ids], kind="stable")]
