"""Batches grouped by image: which images and questions step n has, and their tensors.

Knows tokenised rows and stores of image tensors; does not know models' weights, devices or optimisers.

Shapes: I images, R rows (questions), T question length, A answer length.
"""

import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from miss.engine.data.augment import hash64
from miss.models.vqa import VQABatch

_ORDER, _QUESTIONS, _PHASE = 1, 2, 3  # what a hash is for


class Row(NamedTuple):
    """One question with its answer, as token ids."""

    qid: str
    question_ids: list[int]
    answer_ids: list[int]


class Visit(NamedTuple):
    """One image in a step: its number, how often it came before, and which of its rows are asked."""

    image: int
    number: int
    rows: tuple[int, ...]


class GroupedSampler:
    """Which images and questions step n has: a pure function of (seed, n), so that resuming needs only n.

    An epoch holds image i `weights[i]` times: exactly once for 1, twice for 2, every other epoch for 0.5. Its order is
    a permutation drawn from (seed, epoch); steps cut the endless sequence of epochs into `images_per_step` pieces.
    Each visit asks `questions_per_image` of the image's rows (0: all). They follow a permutation drawn anew for each
    round, so that every row is asked once before one is asked twice; a round's last visit is filled up from the
    round's first rows. With `whole_rounds`, an epoch holds a whole round of each image and fills nothing up: every row
    is asked exactly once an epoch.
    """

    def __init__(
        self,
        num_rows: Sequence[int],
        weights: Sequence[float] | None,
        images_per_step: int,
        questions_per_image: int,
        seed: int,
        whole_rounds: bool = False,
    ) -> None:
        self.num_rows = np.asarray(num_rows, dtype=np.int64)
        if len(self.num_rows) == 0 or self.num_rows.min() < 1:
            raise ValueError("a sampler needs at least one image, and a row for each image")
        self.weights = np.asarray(weights if weights is not None else np.ones(len(num_rows)), dtype=np.float64)
        self.images_per_step, self.seed, self.whole_rounds = images_per_step, seed, whole_rounds
        self.per_visit = np.minimum(self.num_rows, questions_per_image or self.num_rows)
        self.visits_per_round = -(-self.num_rows // self.per_visit)
        self._phases = np.array([hash64(seed, _PHASE, i) / 2**64 for i in range(len(self.num_rows))])
        self._starts = [0]  # where each epoch begins in the endless sequence of visits
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None
        self._lock = threading.Lock()

    def step(self, index: int) -> list[Visit]:
        """The visits of step `index`, from 0."""
        first = index * self.images_per_step
        return [self.visit(position) for position in range(first, first + self.images_per_step)]

    def epoch_of_step(self, index: int) -> float:
        """How many epochs are done when step `index` begins."""
        position = index * self.images_per_step
        epoch = self._epoch_at(position)
        return epoch + (position - self._starts[epoch]) / (self._starts[epoch + 1] - self._starts[epoch])

    def visit(self, position: int) -> Visit:
        """The visit at a position of the endless sequence."""
        epoch = self._epoch_at(position)
        images, numbers = self._epoch(epoch)
        image, number = (int(a[position - self._starts[epoch]]) for a in (images, numbers))
        return Visit(image, number, self._rows(image, number))

    def epoch_length(self, epoch: int) -> int:
        """Visits in an epoch."""
        return int((self._times(epoch + 1) - self._times(epoch)).sum())

    def _times(self, epoch: int) -> np.ndarray:
        """How many visits each image has had before an epoch (I,)."""
        times = np.floor(self.weights * epoch + self._phases).astype(np.int64)
        return times * self.visits_per_round if self.whole_rounds else times

    def _epoch_at(self, position: int) -> int:
        with self._lock:
            while self._starts[-1] <= position:
                self._starts.append(self._starts[-1] + self.epoch_length(len(self._starts) - 1))
        return int(np.searchsorted(self._starts, position, side="right")) - 1

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The images of an epoch in their order, and each one's visit number."""
        held = self._order
        if held is None or held[0] != epoch:
            before, after = self._times(epoch), self._times(epoch + 1)
            images = np.repeat(np.arange(len(before)), after - before)
            firsts = np.cumsum(after - before) - (after - before)
            numbers = before[images] + np.arange(len(images)) - firsts[images]
            keys = np.array([hash64(self.seed, _ORDER, epoch, i) for i in range(len(images))], dtype=np.uint64)
            order = np.argsort(keys, kind="stable")
            held = self._order = (epoch, images[order], numbers[order])
        return held[1], held[2]

    def _rows(self, image: int, number: int) -> tuple[int, ...]:
        count, size = int(self.num_rows[image]), int(self.per_visit[image])
        round_, chunk = divmod(number, int(self.visits_per_round[image]))
        keys = [(hash64(self.seed, _QUESTIONS, image, round_, row), row) for row in range(count)]
        permuted = [row for _, row in sorted(keys)]
        chosen = permuted[chunk * size : (chunk + 1) * size]
        if not self.whole_rounds:
            chosen += permuted[: size - len(chosen)]
        return tuple(sorted(chosen))


class ImageStore(Protocol):
    """Gives the tensors of images: either their pixels, or tokens that an image encoder made of them."""

    def gather(self, images: Sequence[int], visits: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """(pixels uint8 (I, S, S, 3), None) or (None, tokens (I, N, C)) of images at the given visits."""


@dataclass
class Part:
    """A part of a step: a batch, and the question ids of its rows."""

    batch: VQABatch
    qids: list[str]


@dataclass
class Step:
    """This rank's parts of a step; their sums over `num_rows`, on all ranks, make its loss.

    `num_rows` and `num_images` are of all ranks; `first_part` is the first part's number among those of all ranks.
    """

    index: int
    parts: list[Part]
    num_rows: int
    num_images: int
    first_part: int = 0


def collate(
    visits: Sequence[Visit], rows: Sequence[Sequence[Row]], pixels: Tensor | None, tokens: Tensor | None
) -> Part:
    """Visits and their images' tensors as one batch."""
    chosen = [(i, rows[visit.image][r]) for i, visit in enumerate(visits) for r in visit.rows]
    question_ids, question_lengths = pad([row.question_ids for _, row in chosen])
    answer_ids, answer_lengths = pad([row.answer_ids for _, row in chosen])
    batch = VQABatch(
        pixels=pixels,
        image_tokens=tokens,
        question_ids=question_ids,
        question_lengths=question_lengths,
        image_index=torch.tensor([i for i, _ in chosen], dtype=torch.int32),
        answer_ids=answer_ids,
        answer_lengths=answer_lengths,
    )
    return Part(batch, [row.qid for _, row in chosen])


def pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Lists of ids as int64 (R, longest), padded with 0, and their lengths int32 (R,)."""
    lengths = [len(s) for s in sequences]
    padded = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
    for i, sequence in enumerate(sequences):
        padded[i, : lengths[i]] = sequence
    return torch.from_numpy(padded), torch.tensor(lengths, dtype=torch.int32)


class GroupedLoader:
    """Steps in order from any step on, built `prefetch` ahead by one thread; a failure there is raised here.

    Rank r of w takes the r-th w-th of each step's images, so that the order of the whole does not depend on w.

    Raises:
        ValueError: a step has fewer images than ranks have parts.
    """

    def __init__(
        self,
        sampler: GroupedSampler,
        rows: Sequence[Sequence[Row]],
        store: ImageStore,
        num_parts: int = 1,
        prefetch: int = 2,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if sampler.images_per_step < num_parts * world_size:
            raise ValueError(
                f"{sampler.images_per_step} images in a step; wanted at least one for each of {num_parts} parts on "
                f"{world_size} ranks: more data.images_per_step, or less data.accumulation"
            )
        self.sampler, self.rows, self.store = sampler, rows, store
        self.rank, self.world_size = rank, world_size
        self.num_parts, self.prefetch, self.pin_memory = num_parts, prefetch, pin_memory

    def epoch_of_step(self, index: int) -> float:
        """How many epochs are done when step `index` begins."""
        return self.sampler.epoch_of_step(index)

    def build(self, index: int) -> Step:
        """Step `index`; the same whenever it is asked for."""
        visits = self.sampler.step(index)
        first, count = self.rank * self.num_parts, self.world_size * self.num_parts
        bounds = [len(visits) * i // count for i in range(first, first + self.num_parts + 1)]
        parts = [self._part(visits[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
        return Step(index, parts, sum(len(visit.rows) for visit in visits), len(visits), first)

    def _part(self, visits: list[Visit]) -> Part:
        pixels, tokens = self.store.gather([v.image for v in visits], [v.number for v in visits])
        part = collate(visits, self.rows, pixels, tokens)
        if self.pin_memory:
            pinned: dict[str, Any] = {k: v if v is None else v.pin_memory() for k, v in vars(part.batch).items()}
            part.batch = VQABatch(**pinned)
        return part

    def steps(self, first: int) -> Generator[Step, None, None]:
        """Steps first, first + 1, … without end."""
        if self.prefetch == 0:
            while True:
                yield self.build(first)
                first += 1
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
            waiting: list[Future[Step]] = []
            try:
                while True:
                    while len(waiting) < self.prefetch:
                        waiting.append(pool.submit(self.build, first + len(waiting)))
                    future, first = waiting.pop(0), first + 1
                    waiting.append(pool.submit(self.build, first + len(waiting)))
                    yield future.result()
            finally:
                for future in waiting:
                    future.cancel()
