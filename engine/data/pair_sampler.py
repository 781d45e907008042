"""Which pairs a pretraining step has, on every process together and on each.

Knows numbers; does not know pairs, images or captions.
"""

import threading
from dataclasses import dataclass

import numpy as np

from miss.engine.data.augment import hash64_each

_ORDER = 21  # what a hash is for; the finetuning loader has 1 to 13


@dataclass(frozen=True, slots=True)
class PairVisit:
    """A pair in a step: its index, and in which epoch it comes."""

    index: int
    epoch: int


class PairSampler:
    """Which pairs step n has: a pure function of (seed, n), so that resuming needs only n.

    An epoch holds every pair exactly once, in an order drawn from (seed, epoch); steps cut the endless sequence of
    epochs into `pairs_per_step` pieces, so that a step may end one epoch and begin the next.
    """

    def __init__(self, num_pairs: int, pairs_per_step: int, seed: int) -> None:
        if num_pairs < 1 or pairs_per_step < 1:
            raise ValueError(f"num_pairs {num_pairs}, pairs_per_step {pairs_per_step}: wanted at least 1 of each")
        self.num_pairs, self.pairs_per_step, self.seed = num_pairs, pairs_per_step, seed
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def step(self, index: int) -> list[int]:
        """The pairs of step `index`, from 0, of all processes together."""
        return [visit.index for visit in self.visits(index)]

    def visits(self, index: int) -> list[PairVisit]:
        """As `step`, each with its epoch."""
        if index < 0:
            raise ValueError(f"step {index}: wanted 0 or more")
        first = index * self.pairs_per_step
        found = []
        for position in range(first, first + self.pairs_per_step):
            epoch, place = divmod(position, self.num_pairs)
            found.append(PairVisit(int(self._order(epoch)[place]), epoch))
        return found

    def epoch_of_step(self, index: int) -> float:
        """How many epochs are done when step `index` begins."""
        return index * self.pairs_per_step / self.num_pairs

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every pair has come at least once."""
        return -(-self.num_pairs // self.pairs_per_step)

    def _order(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._orders:
                if len(self._orders) > 1:  # the one that a step may still end, and the next: 8 bytes a pair each
                    del self._orders[min(self._orders)]
                keys = hash64_each(np.arange(self.num_pairs), self.seed, _ORDER, epoch)
                self._orders[epoch] = np.argsort(keys, kind="stable")
            return self._orders[epoch]


def share_of(visits: list[PairVisit], rank: int, world_size: int, parts: int) -> list[list[PairVisit]]:
    """The `rank`-th of `world_size` contiguous slices of a step, itself cut into contiguous parts.

    Sizes differ by at most one; with fewer visits than slices some are empty.
    """
    mine = _cut(visits, rank, world_size)
    return [_cut(mine, part, parts) for part in range(parts)]


def _cut(visits: list[PairVisit], which: int, count: int) -> list[PairVisit]:
    return visits[len(visits) * which // count : len(visits) * (which + 1) // count]
