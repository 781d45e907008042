"""Who waits, who runs, and who is next.

Knows requests, their images and deadlines, and how many slots are free; does not know models, or what slots hold.

The rule of turns: images that are waited for stand in a circle. Each batch takes the first few of them and goes round
them, one question an image a round, until the slots or the batch are full; images that still have questions go to the
circle's end. So a single question behind two hundred about one other image is in the next batch, and a batch still
shares each of its images among as many questions as there are. A request that does not fit ends the batch: smaller ones
behind it do not overtake it for ever.
"""

import heapq
import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from miss.engine.runtime.config import EngineConfig
from miss.engine.runtime.request import Cancelled, DeadlinePassed, QueueFull, Request, RequestImage, State
from miss.engine.runtime.slots import Slots

_LEAST_KEPT = 64  # entries of deadlines that are never worth a look through


@dataclass
class Turn:
    """An image and those who wait for it, in the order in which they came."""

    image: RequestImage
    waiting: "OrderedDict[int, Request]" = field(default_factory=OrderedDict)


class Scheduler:
    """`add` and `cancel` may be called from any thread at any time; the rest by the one that steps.

    pixels_an_image: of an image at the model's size. whole_batches: a batch begins only when the last one has ended, as
    the original answers, whose answers depend on what shares their batch.
    """

    def __init__(self, config: EngineConfig, slots: Slots, pixels_an_image: int, whole_batches: bool = False) -> None:
        self.config, self.slots, self.whole_batches = config, slots, whole_batches
        self.pixels_an_image = pixels_an_image
        self.running: list[Request] = []
        self.num_waiting = self._waiting_branches = 0
        self._steps = 0  # since images were encoded
        self._turns: OrderedDict[bytes, Turn] = OrderedDict()
        self._deadlines: list[tuple[float, int, Request]] = []
        self._to_cancel: deque[Request] = deque()
        self._ended: list[Request] = []
        self._lock = threading.Lock()

    @property
    def waiting_pixels(self) -> int:
        return len(self._turns) * self.pixels_an_image

    @property
    def busy(self) -> bool:
        return bool(self.num_waiting or self.running or self._to_cancel or self._ended)

    def waiting_image(self, key: bytes) -> RequestImage | None:
        """The image that others wait for already."""
        with self._lock:
            turn = self._turns.get(key)
            return None if turn is None else turn.image

    def add(self, request: Request) -> None:
        """Puts a request behind the others of its image.

        Raises:
            QueueFull: as many requests wait as may, or their images have as many pixels.
        """
        assert request.image is not None
        with self._lock:
            turn = self._turns.get(request.image.key)
            self._check_room(turn is None)
            if turn is None:
                turn = self._turns[request.image.key] = Turn(request.image)
            request.image = turn.image
            turn.waiting[request.id] = request
            self.num_waiting += 1
            self._waiting_branches += request.search.branches
            if request.deadline is not None:
                heapq.heappush(self._deadlines, (request.deadline, request.id, request))

    def _check_room(self, new_image: bool) -> None:
        if self.num_waiting >= self.config.max_waiting:
            raise QueueFull(f"{self.num_waiting} requests wait already, as many as may; ask again later")
        pixels = self.waiting_pixels + self.pixels_an_image * new_image
        if self._turns and pixels > self.config.max_waiting_pixels:
            raise QueueFull(
                f"the images that requests wait for would have {pixels:,} pixels; accepted: "
                f"{self.config.max_waiting_pixels:,}; ask again later"
            )

    def cancel(self, request: Request) -> None:
        """Ends a request before the next step."""
        self._to_cancel.append(request)

    def drop(self) -> None:
        """Ends what was cancelled and what came too late, before any work is done for it."""
        while self._to_cancel:
            self._end(self._to_cancel.popleft(), Cancelled("the request was cancelled"))
        now = time.monotonic()
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][2].done):
            deadline, _, request = heapq.heappop(self._deadlines)
            late = now - deadline
            self._end(request, DeadlinePassed(f"the request's time ran out {late:.3f} s ago; give it a longer timeout"))
        if len(self._deadlines) > _LEAST_KEPT + 2 * (self.num_waiting + len(self.running)):
            self._forget_ended()

    def _forget_ended(self) -> None:
        """Requests that ended long before their time, behind one of less time that has not: they held their answers,
        or their images, until its end."""
        with self._lock:
            self._deadlines = [entry for entry in self._deadlines if not entry[2].done]
            heapq.heapify(self._deadlines)

    def _end(self, request: Request, error: ValueError) -> None:
        if request.done:
            return
        if request.state == State.WAITING:
            with self._lock:
                self._leave(request)
            request.image = None  # its pixels are not kept for those who still look at how it ended
            self._ended.append(request)
        request.fail(error)

    def _leave(self, request: Request) -> None:
        """Takes a request out of its image's line."""
        assert request.image is not None
        turn = self._turns[request.image.key]
        del turn.waiting[request.id]
        self.num_waiting -= 1
        self._waiting_branches -= request.search.branches
        if not turn.waiting:
            del self._turns[request.image.key]

    def admit(self) -> list[Request]:
        """The next batch of those who wait, with slots of their own; they run from now on."""
        self._steps += 1
        with self._lock:
            if not self._may_admit():
                return []
            batch = self._go_round(self._next_turns())
        if any(request.image is not None and request.image.tokens is None for request in batch):
            self._steps = 0
        now = time.monotonic()
        for request in batch:
            request.state, request.admitted = State.RUNNING, now
        self.running = sorted(self.running + batch, key=lambda request: request.question_slot)
        return batch

    def _may_admit(self) -> bool:
        if not self.num_waiting:
            return False
        if not self.running or self.whole_batches:
            return not self.running
        questions, answers, share = self.slots.questions, self.slots.answers, self.config.refill_share
        if self.num_waiting <= questions.num_free and self._waiting_branches <= answers.num_free:
            return True
        return questions.num_free >= share * questions.size and answers.num_free >= share * answers.size

    def _next_turns(self) -> list[Turn]:
        """The circle's first images; of those that are yet to be encoded few, and none before running requests have had
        their steps. The others keep their places."""
        room = self.config.max_new_images if self._steps >= self.config.steps_between or not self.running else 0
        found: list[Turn] = []
        for turn in self._turns.values():
            if turn.image.tokens is None:
                if not room:
                    continue
                room -= 1
            found.append(turn)
            if len(found) == self.config.max_prefill_images:
                break
        return found

    def _go_round(self, turns: list[Turn]) -> list[Request]:
        batch: list[Request] = []
        while turns:
            for turn in turns:
                request = next(iter(turn.waiting.values()))
                if len(batch) == self.config.max_prefill_questions or not self.slots.fits(request.search.branches):
                    return self._rotated(batch)
                request.question_slot, request.answer_slots = self.slots.take(request.search.branches)
                self._leave(request)
                batch.append(request)
            turns = [turn for turn in turns if turn.waiting]
        return self._rotated(batch)

    def _rotated(self, batch: list[Request]) -> list[Request]:
        for key in dict.fromkeys(request.image.key for request in batch if request.image):
            if key in self._turns:
                self._turns.move_to_end(key)
        return batch

    def active(self) -> list[Request]:
        """Those who run and have not ended, by question slot."""
        return [request for request in self.running if not request.done]

    def collect(self) -> list[Request]:
        """Those who ended since the last time, their slots free again."""
        ended, self._ended = self._ended, []
        if any(request.done for request in self.running):
            for request in self.running:
                if request.done:
                    self.slots.release(request.question_slot, request.answer_slots)
                    ended.append(request)
            self.running = [request for request in self.running if not request.done]
        return ended
