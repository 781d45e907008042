"""Who owns which slots of the cache.

Knows numbers of slots; does not know what they hold, or for how long.
"""

import heapq
from collections.abc import Iterable

from miss.engine.runtime.config import EngineConfig
from miss.models.cache import KVCache
from miss.models.vqa import MissVQA

MOST_FILL = 63  # rows that a batch is filled up with, each at a position of its own in a spare slot


def _spare_answers(answer_length: int) -> int:
    return -(-MOST_FILL // answer_length)


class Pool:
    """Slots 0 … size - 1; the lowest free ones are taken first, so that memory which is never needed is not touched."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size))
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._taken)

    def take(self, count: int) -> list[int]:
        assert count <= len(self._free), f"{count} slots of {len(self._free)} free ones"
        slots = [heapq.heappop(self._free) for _ in range(count)]
        self._taken.update(slots)
        return slots

    def release(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self._taken.remove(slot)  # KeyError: released twice
            heapq.heappush(self._free, slot)


class Slots:
    """Answer and question slots over one cache, and how many tokens each answer slot holds.

    spare_answers, spare_question: slots behind them that nobody owns, for the rows that fill a batch up to a size of
    which there is a program; none where batches are never filled up.
    """

    def __init__(self, cache: KVCache, spare: bool = False) -> None:
        self.cache = cache
        answers, questions = cache.self_k.shape[1], cache.cross_k.shape[1]
        self.spare_answers = range(answers - _spare_answers(cache.answer_length) if spare else answers, answers)
        self.spare_question = questions - 1 if spare else -1
        self.answers = Pool(answers - len(self.spare_answers))
        self.questions = Pool(questions - 1 if spare else questions)
        self.positions = [0] * self.answers.size

    @classmethod
    def allocate(cls, model: MissVQA, config: EngineConfig, question_length: int | None = None) -> "Slots":
        """The slots of `config` in the model's dtype, as long as its questions where nothing else is said."""
        weight = model.decoder.head.norm.weight
        spare = config.fills_up(weight.device)
        longest = min(config.answer_length, model.config.decoder.max_positions)
        answers = config.answer_slots + (_spare_answers(longest) if spare else 0)
        sizes = answers, config.question_slots + spare, longest, question_length or model.config.max_question_length
        return cls(KVCache.allocate(model.config.decoder, *sizes, weight.dtype, weight.device), spare)

    def fits(self, num_answers: int) -> bool:
        """Whether one more request with so many branches does."""
        return self.questions.num_free > 0 and self.answers.num_free >= num_answers

    def take(self, num_answers: int) -> tuple[int, list[int]]:
        """A question slot and answer slots, empty."""
        (question,), answers = self.questions.take(1), self.answers.take(num_answers)
        for slot in answers:
            self.positions[slot] = 0
        return question, answers

    def release(self, question: int, answers: list[int]) -> None:
        self.questions.release([question])
        self.answers.release(answers)
