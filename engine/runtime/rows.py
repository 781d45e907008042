"""The tensors of one decode step, from what searches ask and back.

Knows feeds, wants and the decoder's outputs; does not know requests, or what a search makes of its answers.

Shapes: R rows (a token each), F feeds (their last rows), V vocabulary, k best tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miss.engine.runtime.search import Choice, Feed, Wants
from miss.models.decoder import AnswerDecoder

# More best tokens than this come from another implementation (kernels/linear_top_k): who asks for fewer keeps to his,
# so that his numbers do not depend on who shares the step.
_FEW_BEST = 16


@dataclass(frozen=True)
class Asked:
    """One request's part of a step: its question slot, its answer slots by branch, what it feeds and wants."""

    question: int
    slots: list[int]
    feeds: list[Feed]
    wants: Wants


@dataclass
class Rows:
    """tokens int64 (R,); slots, positions, questions int32 (R,). last: the row of each feed's last token; None where
    every feed has one token."""

    tokens: Tensor
    slots: Tensor
    positions: Tensor
    questions: Tensor
    last: list[int] | None


class RowTensors:
    """Builds a step's rows; what does not change from one step to the next (which branches of whom) is made once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._slots: list[int] = []
        self._questions: list[int] = []
        self._made: tuple[Tensor, Tensor] | None = None

    def of(self, asked: Sequence[Asked], held: list[int]) -> Rows:
        """The rows of what was asked, in order; `held`: the tokens that each answer slot holds already."""
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        questions: list[int] = []
        last: list[int] = []
        for one in asked:
            for feed in one.feeds:
                slot, count = one.slots[feed.branch], len(feed.tokens)
                tokens += feed.tokens
                slots += [slot] * count
                positions += range(held[slot], held[slot] + count)
                questions += [one.question] * count
                last.append(len(tokens) - 1)
        if self._made is None or slots != self._slots or questions != self._questions:
            self._slots, self._questions, self._made = slots, questions, (self._int32(slots), self._int32(questions))
        made = torch.tensor(tokens, device=self.device)
        return Rows(
            made, self._made[0], self._int32(positions), self._made[1], last if len(last) < len(tokens) else None
        )

    def _int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


def best_alone(asked: Sequence[Asked], rows: Rows) -> int:
    """How many best tokens suffice where nothing else is wanted, after every row: the step's own head finds them. 0
    where something else is."""
    wants = [one.wants for one in asked]
    alone = rows.last is None and all(0 < w.num_best <= _FEW_BEST and w.allowed is None and not w.logits for w in wants)
    return max((w.num_best for w in wants), default=0) if alone else 0


def best_choices(logprobs: Tensor, ids: Tensor, asked: Sequence[Asked]) -> list[list[Choice]]:
    """The best tokens of every row (R, k) as choices, a list a request."""
    found = iter(_pairs(logprobs, ids))
    return [[Choice(next(found)) for _ in one.feeds] for one in asked]


def _pairs(logprobs: Tensor, ids: Tensor) -> list[list[tuple[int, float]]]:
    rows = zip(ids.tolist(), logprobs.tolist(), strict=True)
    return [list(zip(tokens, values, strict=True)) for tokens, values in rows]


def answer_wants(
    decoder: AnswerDecoder, states: Tensor, last: list[int] | None, asked: Sequence[Asked]
) -> list[list[Choice]]:
    """What each search wanted to know after its feeds: states (R, C) to choices, a list a request."""
    if last is not None:
        states = states[torch.tensor(last, device=states.device)]
    starts, total = [], 0
    for one in asked:
        starts.append(total)
        total += len(one.feeds)
    answers = _Answers(decoder, states, starts, asked)
    return [answers.of(i) for i in range(len(asked))]


_Rows = dict[int, tuple[Wants, int]]


class _Answers:
    """The decoder asked once for each kind of want, for the rows of those who want it."""

    def __init__(self, decoder: AnswerDecoder, states: Tensor, starts: list[int], asked: Sequence[Asked]) -> None:
        self.decoder, self.states, self.starts, self.asked = decoder, states, starts, asked
        self.best: dict[int, list[tuple[int, float]]] = {}
        self.allowed: dict[int, list[float]] = {}
        self.logits: dict[int, Tensor] = {}
        few = self._rows(lambda w: 0 < w.num_best <= _FEW_BEST)
        many = self._rows(lambda w: w.num_best > _FEW_BEST)
        self._find_best(few)
        self._find_best(many)
        self._find_allowed(self._rows(lambda w: w.allowed is not None))
        self._find_logits(self._rows(lambda w: w.logits))

    def of(self, index: int) -> list[Choice]:
        wants, start = self.asked[index].wants, self.starts[index]
        rows = range(start, start + len(self.asked[index].feeds))
        if wants.allowed is None and not wants.logits:
            return [Choice(self.best.get(row, [])) for row in rows]
        return [Choice(self.best.get(r, []), self.allowed.get(r, []), self.logits.get(r)) for r in rows]

    def _rows(self, wanted: Callable[[Wants], bool]) -> _Rows:
        """The feeds whose wants are so, by row of `states`: the wants, and which of its search's feeds it is."""
        return {
            start + feed: (one.wants, feed)
            for start, one in zip(self.starts, self.asked, strict=True)
            if wanted(one.wants)
            for feed in range(len(one.feeds))
        }

    def _take(self, rows: _Rows) -> Tensor:
        if len(rows) == len(self.states):
            return self.states
        return self.states[torch.tensor(list(rows), device=self.states.device)]

    def _find_best(self, rows: _Rows) -> None:
        if not rows:
            return
        count = min(max(wants.num_best for wants, _ in rows.values()), self.decoder.config.vocab_size)
        logprobs, ids, _ = self.decoder.best(self._take(rows), count)
        self.best.update(zip(rows, _pairs(logprobs, ids), strict=True))

    def _find_allowed(self, rows: _Rows) -> None:
        if not rows:
            return
        states = self._take(rows)
        lists = [list(wants.allowed[feed]) for wants, feed in rows.values() if wants.allowed is not None]
        longest = max(map(len, lists))
        ids = torch.tensor([ids + ids[:1] * (longest - len(ids)) for ids in lists], device=states.device)
        logprobs = self.decoder.logits_at(states, ids) - self.decoder.best(states, 1)[2][:, None]
        for row, ids_, values in zip(rows, lists, logprobs.tolist(), strict=True):
            self.allowed[row] = values[: len(ids_)]

    def _find_logits(self, rows: _Rows) -> None:
        if rows:
            logits = self.decoder.logits(self._take(rows)).float().cpu()
            self.logits.update(zip(rows, logits, strict=True))
