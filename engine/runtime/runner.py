"""The model's work for a batch of requests: their images and questions once, then a token a branch and step.

Knows the model, the cache's slots and what searches ask; does not know who waits, how a token is chosen, or text.

Where the engine goes several steps ahead, requests whose branches go on by themselves are given to the device
(`begin`) before new ones are prefilled, and told of their tokens after it (`decode`); others are asked step by step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from miss.engine.runtime.ahead import Autopilot, Flight, Row
from miss.engine.runtime.config import EngineConfig
from miss.engine.runtime.faults import is_out_of_memory, survive
from miss.engine.runtime.graphs import Graphs
from miss.engine.runtime.image_cache import ImageCache
from miss.engine.runtime.prefill import Prefill
from miss.engine.runtime.ranker import Ranking, rank_questions
from miss.engine.runtime.request import Request
from miss.engine.runtime.rows import Asked, RowTensors, answer_wants, best_alone, best_choices
from miss.engine.runtime.search import Choice, Hypothesis
from miss.engine.runtime.slots import Slots
from miss.engine.runtime.stages import stage
from miss.models.vqa import MissVQA

Steps = list[dict[int, Choice]]  # what a request's branches chose, step by step


class Runner:
    """`prefill` puts new requests into their slots, `decode` feeds every running one what its search asks for."""

    def __init__(self, model: MissVQA, slots: Slots, images: ImageCache, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        self.model, self.slots, self.images = model, slots, images
        self.device = slots.cache.self_k.device
        self.graphs = Graphs(self.device, config.graph_bytes)
        self.prefilling = Prefill(model, slots, images, self.graphs, slots.spare_question >= 0)
        self.num_rows = 0
        self.num_steps_ahead = self.num_steps_wasted = 0  # launched; after every row's end
        self._rows = RowTensors(self.device)
        steps = config.steps_on(self.device)
        self._autopilot = Autopilot(model, slots, self.graphs, steps) if steps > 1 else None
        self._under_way: tuple[list[Request], Flight] | None = None

    @property
    def num_encoded(self) -> int:
        return self.prefilling.num_encoded

    def begin(self, requests: Sequence[Request], waiting: bool = True) -> None:
        """Gives the device the next steps of running requests (sorted by question slot), so that a prefill may run
        beside them, if anybody is waiting; what comes of them is `decode`'s. Only where batches are filled up, as on
        CUDA: elsewhere nothing runs beside anything."""
        self._under_way = None  # of a step that failed
        if not self.slots.spare_answers or not (ready := self._independent(requests)):
            return
        try:
            self._under_way = ready, self._start(ready, waiting)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise  # else `decode` starts them again, and finds the one that is too much

    def prefill(self, requests: Sequence[Request]) -> None:
        """Encodes the requests' images (each once) and questions into their question slots; one that memory does not
        suffice for fails."""
        self.prefilling.run(requests)

    def decode(self, requests: Sequence[Request]) -> None:
        """One step of every request (sorted by question slot), several of those whose branches go on by themselves: its
        search's feeds through the model, what it wants to know back, and the copies it asks for made in all layers at
        once. Those that rank are done in one step."""
        with stage("decode", self.device):
            self._decode(requests)

    def _decode(self, requests: Sequence[Request]) -> None:
        going = [request for request in requests if not request.search.done]  # one allowed answer: done before it began
        independent = self._independent(going)
        flown = self._landed()  # those that were prefilled beside them come along the next time
        self.prefilling.wait()
        if flown is None:
            flown = survive(independent, lambda some: self._results(some, self._start(some)))
        moves: list[tuple[int, int]] = []
        for request, steps in flown:
            self._follow(request, steps)
        rest = [request for request in going if request not in independent]
        for request, ranked in survive([r for r in rest if isinstance(r.search, Ranking)], self._rank):
            assert isinstance(request.search, Ranking)
            request.search.settle(ranked)
        for request, choices in survive([r for r in rest if not isinstance(r.search, Ranking)], self._ask):
            moves += self._told(request, choices)
        self._copy(moves)

    def _landed(self) -> list[tuple[Request, Steps]] | None:
        """What came of the steps that `begin` started; None where it started none, or memory ran out on the way: they
        can be made again, for what they wrote is written again."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return None
        try:
            return list(zip(under_way[0], self._results(*under_way), strict=True))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _told(self, request: Request, choices: list[Choice]) -> list[tuple[int, int]]:
        """Tells a search; the copies (source, target) of answer slots that it wants."""
        try:
            copies = request.search.advance(choices)
        except ValueError as error:  # of this request alone: probabilities that are none, say
            request.fail(error)
            return []
        return [(request.answer_slots[source], request.answer_slots[target]) for source, target in copies]

    def _independent(self, requests: Sequence[Request]) -> list[Request]:
        """Those whose branches go on by themselves, where the engine makes use of it."""
        if self._autopilot is None:
            return []
        return [r for r in requests if not r.search.done and r.search.ahead(1) is not None]

    def _start(self, requests: Sequence[Request], beside: bool = False) -> Flight:
        assert self._autopilot is not None
        rows = []
        for request in requests:
            rules = request.search.ahead(self._autopilot.steps)
            assert rules is not None
            for feed, rule in zip(request.search.feed(), rules, strict=True):
                slot = request.answer_slots[feed.branch]
                rows.append(Row(feed.tokens[0], slot, self.slots.positions[slot], request.question_slot, rule))
        return self._autopilot.start(rows, beside)

    def _results(self, requests: Sequence[Request], flight: Flight) -> list[Steps]:
        """What every request's branches chose, step by step."""
        found = iter(zip(*flight.results(), strict=True))
        self.num_steps_ahead += flight.launched
        self.num_steps_wasted += flight.wasted
        results = []
        for request in requests:
            steps: Steps = [{} for _ in range(flight.launched)]
            for feed in request.search.feed():
                for step, token, logprob in zip(steps, *next(found), strict=True):
                    step[feed.branch] = Choice([(token, logprob)], drawn=(token, logprob))
            results.append(steps)
        return results

    def _follow(self, request: Request, steps: Steps) -> None:
        """Tells a search of the steps that were made for it, until it is done."""
        for step in steps:
            if request.search.done or request.done:
                return
            feeds = request.search.feed()
            for feed in feeds:
                self.slots.positions[request.answer_slots[feed.branch]] += 1
            self.num_rows += len(feeds)
            copies = self._told(request, [step[feed.branch] for feed in feeds])
            assert not copies, "a search that goes ahead keeps its branches apart"

    def _rank(self, requests: Sequence[Request]) -> list[list[Hypothesis]]:
        """Every request's candidates, best first. The original's ranking masks a question's padding, unlike its
        generation, so that the cache's lengths are not the questions' own there."""
        lengths = self.slots.cache.question_lengths.clone()
        slots = [request.question_slot for request in requests]
        lengths[slots] = self._int32([len(request.question_ids) for request in requests])
        trees = [request.search.tree for request in requests if isinstance(request.search, Ranking)]
        return rank_questions(self.model, self.slots.cache, slots, trees, lengths)

    def _ask(self, requests: Sequence[Request]) -> list[list[Choice]]:
        """What each search wants to know, a choice a feed. Nothing but the cache's next positions is written, so that
        it may be asked again."""
        asked = [Asked(r.question_slot, r.answer_slots, r.search.feed(), r.search.wants()) for r in requests]
        rows = self._rows.of(asked, self.slots.positions)
        fed = (rows.tokens, self.slots.cache, rows.slots, rows.positions, rows.questions)
        if num_best := best_alone(asked, rows):
            num_best = min(num_best, self.model.config.decoder.vocab_size)
            choices = best_choices(*self.model.decode_best(*fed, num_best), asked)
        else:
            choices = answer_wants(self.model.decoder, self.model.decode(*fed), rows.last, asked)
        for one in asked:
            for feed in one.feeds:
                self.slots.positions[one.slots[feed.branch]] += len(feed.tokens)
        self.num_rows += len(rows.tokens)
        return choices

    def _copy(self, moves: list[tuple[int, int]]) -> None:
        """Copies answer slots (source, target), all at once."""
        if not moves:
            return
        positions = self.slots.positions
        length = max(positions[source] for source, _ in moves)
        pairs = self._int32([source for source, _ in moves] + [target for _, target in moves])
        self.slots.cache.reorder(pairs[: len(moves)], pairs[len(moves) :], length)
        held = [positions[source] for source, _ in moves]
        for (_, target), count in zip(moves, held, strict=True):
            positions[target] = count

    def _int32(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)
