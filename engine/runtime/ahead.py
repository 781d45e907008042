"""Several decode steps on the device between two looks of the host: tokens are chosen, fed again and stopped there.

Knows rows, the cache and the decoder; does not know requests, text, or what a search makes of the tokens. A row whose
answer has ended stands still: it writes its last token to its last position again, which changes nothing.

The host sees all steps' tokens in one copy, and tells each search of them as if it had asked step by step. One step is
a program over fixed tensors (`graphs`): on CUDA a graph that is replayed.

Steps are launched one by one, each once it is known that after the step `lead` before it some row went on: a flag that
comes back by itself. The device always has the next step in its queue, and of a flight at most lead - 1 steps are made
for nobody (`wasted`). Beside a prefill, during which nobody looks, all are launched at once, and all but the first may
be wasted. On CPU the lead is 1. Flags in page-locked memory and events have never run on a GPU.

Shapes: R rows of a bucket, S steps, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miss.engine.runtime.drawing import Cuts, draw_rows
from miss.engine.runtime.graphs import Graphs
from miss.engine.runtime.search import Ahead
from miss.engine.runtime.slots import Slots
from miss.models.vqa import MissVQA

CUDA_LEAD = 2  # the step that runs, and one behind it: a launch takes the host tens of microseconds, a step hundreds
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192)  # rows of a program; beyond, multiples of 64


def bucket_of(count: int) -> int:
    """The rows of the program that runs `count` rows."""
    return next((size for size in BUCKETS if size >= count), (count + 63) // 64 * 64)


@dataclass(frozen=True)
class Row:
    """One branch that goes on alone: its next token, slots and position, and how its tokens are chosen."""

    token: int
    slot: int
    position: int
    question: int
    rule: Ahead


class Loop:
    """The fixed tensors of R rows and S steps, and the one step that moves them on."""

    def __init__(self, model: MissVQA, slots: Slots, rows: int, steps: int, draws: str) -> None:
        device = slots.cache.self_k.device
        self.model, self.cache, self.draws = model, slots.cache, draws
        # A row's numbers: token, slot, position, question, how many tokens it may still make, [SEP].
        self.whole = torch.zeros(6, rows, dtype=torch.int64, device=device)
        self.slots, self.positions, self.questions = torch.zeros(3, rows, dtype=torch.int32, device=device)
        self.alive = torch.zeros(rows, dtype=torch.bool, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.real = torch.zeros(3 + steps, rows, dtype=torch.float64, device=device)  # temperature, top_k, top_p, draws
        self.tokens = torch.zeros(steps, rows, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(steps, rows, dtype=torch.float64, device=device)
        self.going = torch.ones(steps, dtype=torch.bool, device=device)  # whether any row goes on after the step
        cuda = device.type == "cuda"
        self._seen = torch.ones(steps, dtype=torch.bool).pin_memory() if cuda else self.going  # the host's copy
        self._events = [torch.cuda.Event() for _ in range(steps)] if cuda else []

    def fill(self, whole: Tensor, real: Tensor) -> None:
        """Sets every row to its start, from host tensors (6, R) and (3 + S, R)."""
        self.whole.copy_(whole, non_blocking=True)
        self.real.copy_(real, non_blocking=True)
        self.slots.copy_(self.whole[1])
        self.positions.copy_(self.whole[2])
        self.questions.copy_(self.whole[3])
        self.alive.copy_(self.whole[4] > 0)
        self.step.zero_()
        self.going.fill_(True)

    def send_flag(self, step: int) -> None:
        """After a step: its flag comes to the host without a wait."""
        if self._events:
            self._seen.copy_(self.going, non_blocking=True)
            self._events[step].record()

    def goes_on(self, step: int) -> bool:
        """Whether any row goes on after a step, once the step is done."""
        if self._events:
            self._events[step].synchronize()
        return bool(self._seen[step])

    def advance(self) -> None:
        """One step of all rows, without a word from the host."""
        fed, left, sep = self.whole[0], self.whole[4], self.whole[5]
        now = self.step.clamp(max=len(self.tokens) - 1)  # a capture warms up by steps that nobody asked for
        token, logprob = self._choose(fed, self.real.index_select(0, now + 3)[0])
        self.tokens.index_copy_(0, now, token[None])
        self.logprobs.index_copy_(0, now, logprob[None])
        self.alive &= (token != sep) & (self.step + 1 < left)
        self.going.index_copy_(0, now, self.alive.any()[None])
        fed.copy_(torch.where(self.alive, token, fed))
        self.positions += self.alive
        self.step += 1

    def _choose(self, fed: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        rows = (fed, self.cache, self.slots, self.positions, self.questions)
        if not self.draws:
            logprobs, ids = self.model.decode_best(*rows, 1)
            return ids[:, 0], logprobs[:, 0].double()
        states, logprobs, ids = self.model.decoder.step_and_states(*rows, 1)
        temperature, top_k, top_p = self.real[0], self.real[1].long(), self.real[2]
        greedy = temperature == 0
        cuts = Cuts(torch.where(greedy, 1.0, temperature), top_k, top_p)
        token, logprob = draw_rows(self.model.decoder.logits(states), at, cuts, self.draws == "cut")
        return torch.where(greedy, ids[:, 0], token), torch.where(greedy, logprobs[:, 0].double(), logprob)


class Flight:
    """Steps under way; `results` launches what is left of them while any row goes on, and waits for them.

    launched: steps so far. wasted: those of them that came after every row's end; known once there are results.
    """

    def __init__(self, loop: Loop, advance: Callable[[], None], count: int, steps: int, lead: int) -> None:
        self._loop, self._advance, self._count, self._steps, self._lead = loop, advance, count, steps, lead
        self.launched = self.wasted = 0

    def launch(self, most: int) -> None:
        """Further steps, up to `most` in all, without a look."""
        while self.launched < min(most, self._steps):
            self._advance()
            self._loop.send_flag(self.launched)
            self.launched += 1

    def results(self) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens and log-probabilities by row and step, in one copy; what stands behind a row's end means nothing."""
        while self.launched < self._steps and self._loop.goes_on(self.launched - self._lead):
            self.launch(self.launched + 1)
        packed = torch.stack([self._loop.tokens.double(), self._loop.logprobs])[:, : self.launched, : self._count]
        tokens, logprobs = packed.cpu().transpose(1, 2).tolist()
        self.wasted = sum(not self._loop.goes_on(step) for step in range(self.launched - 1))
        return [[int(token) for token in row] for row in tokens], logprobs


class Autopilot:
    """Runs rows ahead: `start` gives the device steps to do, `Flight.results` says what came of them."""

    def __init__(self, model: MissVQA, slots: Slots, graphs: Graphs, steps: int) -> None:
        self.model, self.slots, self.graphs, self.steps = model, slots, graphs, steps
        self.device = slots.cache.self_k.device
        self.lead = CUDA_LEAD if self.device.type == "cuda" else 1

    def start(self, rows: Sequence[Row], beside: bool = False) -> Flight:
        """At most `steps` steps of the rows (sorted by question). `beside`: a prefill comes before anybody looks."""
        steps = min(self.steps, max(row.rule.left for row in rows))
        draws = "" if all(row.rule.temperature == 0 for row in rows) else "plain"
        if draws and any(row.rule.top_k or row.rule.top_p < 1 for row in rows):
            draws = "cut"
        size = bucket_of(len(rows)) if self.slots.spare_answers else len(rows)

        def make() -> tuple[Loop, Callable[[], None]]:
            loop = Loop(self.model, self.slots, size, self.steps, draws)
            loop.fill(*self._host(rows, size))
            return loop, loop.advance

        loop, advance = self.graphs.program(("decode", size, draws), make)
        loop.fill(*self._host(rows, size))
        flight = Flight(loop, advance, len(rows), steps, self.lead)
        flight.launch(steps if beside and self.lead > 1 else self.lead)
        return flight

    def _host(self, rows: Sequence[Row], size: int) -> tuple[Tensor, Tensor]:
        """The rows as `Loop.fill` takes them. Those that fill the bucket stand still in the spare slots, each at a
        position of its own."""
        whole = [[r.token, r.slot, r.position, r.question, r.rule.left, r.rule.sep] for r in rows]
        spare, length = self.slots.spare_answers, self.slots.cache.answer_length
        for i in range(size - len(rows)):
            whole.append([0, spare[i // length], i % length, self.slots.spare_question, 0, 0])
        real = torch.zeros(3 + self.steps, size, dtype=torch.float64)
        real[2] = 1.0
        for i, row in enumerate(rows):
            cut = (row.rule.temperature, row.rule.top_k, row.rule.top_p)
            numbers = torch.tensor([*cut, *row.rule.uniforms[: self.steps]], dtype=torch.float64)
            real[: len(numbers), i] = numbers
        fixed = torch.tensor(whole, dtype=torch.int64).reshape(size, 6).T.contiguous()
        return (fixed.pin_memory(), real.pin_memory()) if self.device.type == "cuda" else (fixed, real)
