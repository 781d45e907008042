"""What an engine has done and is doing, in numbers.

Knows counters and gauges; does not know where they are shown.

The law of conservation, at any moment between steps: received = rejected + answered + failed + cancelled + waiting +
running. Rejected: `add` raised (the queue was full, or the request was wrong). Failed: its time ran out, or its memory
did, or the engine failed under it.
"""

import threading
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from miss.engine.runtime.image_cache import ImageCache, TierCounts

if TYPE_CHECKING:
    from miss.engine.runtime.runner import Runner
    from miss.engine.runtime.scheduler import Scheduler


class Counters:
    """Counts that several threads raise."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)


@dataclass(frozen=True)
class Stats:
    """A snapshot. Counters: received … num_steps_wasted; gauges: waiting … question_slots. image_tokens, image_kv: the
    two tiers of the image cache. num_steps_ahead: decode steps of many rows that the device made without a look;
    num_steps_wasted: those of them that came after every row's end."""

    received: int
    rejected: int
    answered: int
    failed: int
    cancelled: int
    num_encoded_images: int
    num_decoded_rows: int
    num_steps_ahead: int
    num_steps_wasted: int
    waiting: int
    waiting_pixels: int
    running: int
    answer_slots: int
    question_slots: int
    image_tokens: TierCounts
    image_kv: TierCounts

    @classmethod
    def of(cls, counters: Counters, scheduler: "Scheduler", images: ImageCache, runner: "Runner") -> "Stats":
        counts = counters.snapshot()
        outcomes = ("received", "rejected", "answered", "failed", "cancelled")
        return cls(
            **{name: counts.get(name, 0) for name in outcomes},
            num_encoded_images=runner.num_encoded,
            num_decoded_rows=runner.num_rows,
            num_steps_ahead=runner.num_steps_ahead,
            num_steps_wasted=runner.num_steps_wasted,
            waiting=scheduler.num_waiting,
            waiting_pixels=scheduler.waiting_pixels,
            running=len(scheduler.running),
            answer_slots=scheduler.slots.answers.num_used,
            question_slots=scheduler.slots.questions.num_used,
            image_tokens=replace(images.tokens_tier),
            image_kv=replace(images.kv_tier),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
