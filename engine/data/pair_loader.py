"""Pretraining batches: images decoded ahead, captions drawn and tokenised, what cannot be used set aside and counted.

Knows pairs, a checkpoint's processor and threads; does not know ranks' ways to talk, models' weights or devices.

Shapes: B pairs of a part, S side in pixels, T caption length.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miss.engine.data.augment import Limits, View, draw_view, hash64
from miss.engine.data.decoding import Decoder, Here, Processes
from miss.engine.data.errors import ImageError
from miss.engine.data.loader import pad
from miss.engine.data.pair_sampler import PairSampler, PairVisit, share_of
from miss.engine.data.pairs import CLOSING, Pair, normalise_caption
from miss.engine.data.processor import Processor
from miss.engine.data.quarantine import CorruptLimit, Guard, Quarantine, TooManyCorrupt
from miss.models.pretrain import PretrainBatch

__all__ = [
    "CorruptLimit",
    "LoadCounts",
    "PairLoader",
    "PairSampler",
    "PairStep",
    "TooManyCorrupt",
    "caption_number",
]

_CAPTION, _VIEW = 22, 23  # what a hash is for
EMPTY_CAPTION = "empty_caption"  # beside the reasons of errors.py
SHORTEST = 2  # tokens: a part without pairs still has room for a first token and [SEP]


@dataclass
class Loaded:
    """A pair as the model takes it, or why it cannot be used."""

    visit: PairVisit
    pixels: np.ndarray | None = None
    ids: list[int] = field(default_factory=list)
    number: int = 0
    truncated: bool = False
    reason: str = ""
    message: str = ""


class PairStep(list[PretrainBatch]):
    """A process's parts of step `number`, with the keys of each part's pairs, and what became of all of them.

    `num_rows`: pairs of the whole step, of all processes, those that could not be used included.
    """

    def __init__(
        self,
        number: int,
        parts: Sequence[PretrainBatch],
        keys: list[list[str]],
        loaded: list[Loaded],
        num_rows: int = 0,
    ) -> None:
        super().__init__(parts)
        self.number, self.keys, self.loaded, self.num_rows = number, keys, loaded, num_rows

    @property
    def index(self) -> int:  # type: ignore[override]  # the step's, as of every step; nobody asks a list's own
        return self.number

    @property
    def parts(self) -> "PairStep":
        return self

    @property
    def num_images(self) -> int:
        return self.num_rows


@dataclass
class LoadCounts:
    """What this process's steps had since the loader was made: pairs asked for, captions cut off, pairs left out."""

    pairs: int = 0
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def truncated_share(self) -> float:
        """Of the captions that were used."""
        return self.truncated / max(1, self.pairs - self.dropped.total())


class PairLoader:
    """Steps in order from any step on, each a list of this process's parts.

    The step's pairs, their captions and views follow from (seed, step), never from the number of processes: process r
    of w has the r-th contiguous slice. A pair that cannot be used is missing from its part, and nothing moves up.

    Args:
        pairs: all of them, the same on every process.
        processor: of the checkpoint.
        pairs_per_step: of all processes together.
        accumulation: into how many parts a process's slice is cut; a part may be empty.
        only: which of these parts are made, by number; None: all.
        max_tokens: a caption's, the first and [SEP] included.
        limits: of augmentation; None: images as they are. Never a flip.
        workers: how many images are decoded at a time.
        processes: decode in as many processes instead of threads.
        ahead: how many steps are made ready behind the one that is given out.
        quarantine: the run's folder, for `quarantine.jsonl`.
        corrupt: when to give up.
        pin_memory: for copies to a GPU that overlap with work.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        processor: Processor,
        pairs_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        *,
        only: Sequence[int] | None = None,
        max_tokens: int = 30,
        limits: Limits | None = None,
        workers: int = 2,
        processes: bool = False,
        ahead: int = 2,
        quarantine: Path | None = None,
        corrupt: CorruptLimit | None = None,
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= rank < world_size or accumulation < 1 or workers < 1 or ahead < 0 or max_tokens < 3:
            raise ValueError(
                f"rank {rank} of {world_size}, accumulation {accumulation}, workers {workers}, ahead {ahead}, "
                f"max_tokens {max_tokens}: wanted 0 <= rank < world_size, at least 1, 1, 0 and 3"
            )
        self.pairs, self.processor, self.seed = pairs, processor, seed
        self.sampler = PairSampler(len(pairs), pairs_per_step, seed)
        self.rank, self.world_size, self.accumulation = rank, world_size, accumulation
        self.only = range(accumulation) if only is None else only
        self.max_tokens, self.limits, self.pin_memory = max_tokens, limits, pin_memory
        self.workers, self.processes, self.ahead = workers, processes, ahead
        self.counts = LoadCounts()
        self.quarantine = Quarantine(quarantine) if quarantine is not None else None
        self._guard = Guard(corrupt or CorruptLimit(), len(pairs))

    def epoch_of_step(self, index: int) -> float:
        """How many epochs are done when step `index` begins."""
        return self.sampler.epoch_of_step(index)

    def steps(self, first: int = 0) -> Generator[PairStep, None, None]:
        """Steps first, first + 1, … without end.

        Raises:
            WorkerDied: a decoding process ended.
            TooManyCorrupt: more than `corrupt` allows.
        """
        waiting: deque[Future[PairStep]] = deque()
        preprocess = self.processor.preprocess
        decoder: Decoder = Processes(preprocess, self.workers) if self.processes else Here(preprocess)
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        builder = ThreadPoolExecutor(1, thread_name_prefix="batch")
        try:
            while True:
                while len(waiting) <= self.ahead:
                    waiting.append(self._begin(first + len(waiting), decoder, pool, builder))
                step, first = waiting.popleft().result(), first + 1
                self._account(step)
                yield step
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            decoder.close()
            builder.shutdown(wait=True, cancel_futures=True)
            pool.shutdown(wait=True)

    def _begin(
        self, index: int, decoder: Decoder, pool: ThreadPoolExecutor, builder: ThreadPoolExecutor
    ) -> Future[PairStep]:
        parts = share_of(self.sampler.visits(index), self.rank, self.world_size, self.accumulation)
        jobs = [[pool.submit(self._load, visit, decoder) for visit in parts[number]] for number in self.only]
        return builder.submit(self._build, index, jobs)

    def _load(self, visit: PairVisit, decoder: Decoder) -> Loaded:
        pair, key = self.pairs[visit.index], (self.seed, visit.index, visit.epoch)
        view = View() if self.limits is None else draw_view(self.limits, *key, _VIEW)
        try:
            pixels = decoder.decode(pair.image, view)
        except ImageError as error:
            return Loaded(visit, reason=str(error.reason), message=str(error))
        text = pair.captions[hash64(*key, _CAPTION) % len(pair.captions)]
        try:
            ids, truncated = self.processor.caption(text, self.max_tokens)
        except ValueError as error:
            return Loaded(visit, reason=EMPTY_CAPTION, message=str(error))
        return Loaded(visit, pixels, ids, caption_number(text, self.processor, self.max_tokens), truncated)

    def _build(self, index: int, jobs: list[list[Future[Loaded]]]) -> PairStep:
        parts = [[job.result() for job in part] for part in jobs]
        kept = [[one for one in part if not one.reason] for part in parts]
        keys = [[self.pairs[one.visit.index].key for one in part] for part in kept]
        loaded = [one for part in parts for one in part]
        batches = [self._batch(part) for part in kept]
        for one in loaded:
            one.pixels = None  # in the batch now
        return PairStep(index, batches, keys, loaded, self.sampler.pairs_per_step)

    def _batch(self, part: list[Loaded]) -> PretrainBatch:
        if part:
            pixels = torch.from_numpy(np.stack([p for one in part if (p := one.pixels) is not None]))
            ids, lengths = pad([one.ids for one in part])
        else:
            size = self.processor.preprocess.image_size
            pixels = torch.zeros(0, size, size, 3, dtype=torch.uint8)
            ids, lengths = torch.zeros(0, SHORTEST, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
        batch = PretrainBatch(pixels, ids, lengths, torch.tensor([one.number for one in part], dtype=torch.int64))
        if self.pin_memory:
            batch = PretrainBatch(**{name: tensor.pin_memory() for name, tensor in vars(batch).items()})
        return batch

    def _account(self, step: PairStep) -> None:
        """Counts a step that is given out, writes down what it lacks, and gives up where that is too much."""
        dropped = [one for one in step.loaded if one.reason]
        self.counts.pairs += len(step.loaded)
        self.counts.truncated += sum(one.truncated for one in step.loaded)
        self.counts.dropped.update(one.reason for one in dropped)
        if self.quarantine is not None:
            self.quarantine.add(self._record(one, step.number) for one in dropped)
        for one in step.loaded:
            if self._guard.exceeded_by(bool(one.reason)):
                raise self._too_many(one)

    def _record(self, one: Loaded, step: int) -> dict[str, Any]:
        pair = self.pairs[one.visit.index]
        place = {"source": pair.source, "index": one.visit.index, "step": step}
        return {"key": pair.key, "reason": one.reason, **place, "message": one.message}

    def _too_many(self, last: Loaded) -> TooManyCorrupt:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.dropped.most_common())
        return TooManyCorrupt(
            f"{self._guard} ({reasons} so far). The last: {self.pairs[last.visit.index].key}: {last.message}. Mend the "
            f"data (`miss data check --pairs` lists all) or raise the limit"
        )


def caption_number(text: str, processor: Processor, max_tokens: int) -> int:
    """A number from 0 to 2^63 - 1 that is the same where captions are, whatever else the data holds.

    Captions are the same if they are after `normalise_caption`, or as far as the model sees them. A hash, so that it
    stays the same when data is added and a queue from before goes on; of a million captions, two different ones have
    one number with a chance of 5e-8.
    """
    ids = processor.tokenizer.encode(normalise_caption(text), add_special_tokens=False).ids[: max_tokens - 2]
    closing = {processor.tokenizer.token_to_id(mark) for mark in CLOSING}
    while ids and ids[-1] in closing:  # where the cut left one at the end
        ids.pop()
    digest = hashlib.blake2b(np.asarray(ids, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
