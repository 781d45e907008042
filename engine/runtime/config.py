"""How much an engine takes on at once: slots, batches, its queue and its cache of images.

Knows numbers, their limits and kinds of devices; does not know models, tensors or requests.
"""

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class EngineConfig:
    """Bounds that hold whatever is asked.

    answer_slots: branches decoded together; a greedy answer with two alternatives takes three, a beam search its width.
    question_slots: requests that run together.
    answer_length: the longest answer in tokens, the closing [SEP] included, that a slot holds.
    max_prefill_questions, max_prefill_images: of one batch of new requests.
    max_new_images: of those images, the ones that are yet to be encoded.
    steps_between: decode steps that running requests are given after images were encoded, before the next ones are;
        0: where images keep coming, each token of an answer waits for a batch of them.
    max_waiting: requests that wait, before a further one is refused.
    max_waiting_pixels: of the images that waiting requests hold, each at the model's size and counted once.
    cache_bytes: of encoded images kept, their tokens and their layers' keys and values together; 0 keeps none.
    refill_share: a batch of new requests that does not hold all that wait is put off until this share of the
        answer slots is free, so that a busy engine encodes questions by many.
    steps_ahead: tokens of a greedy or sampled answer that are made between two looks at them, all chosen where the
        model runs; a new request waits for the steps under way, and tokens stream so many at a time. 0: 8 on CUDA,
        where each look costs a wait for the device, and 1 on CPU, where it costs nothing.
    fill_up: fill batches up to few sizes, each of which has a program of its own; None: on CUDA, where a program is
        captured as a graph.
    graph_bytes: what captured graphs may hold, their tensors included; 0 captures none.
    """

    answer_slots: int = 192
    question_slots: int = 64
    answer_length: int = 40
    max_prefill_questions: int = 64
    max_prefill_images: int = 8
    max_new_images: int = 8
    steps_between: int = 0
    max_waiting: int = 1024
    max_waiting_pixels: int = 1 << 26
    cache_bytes: int = 512 << 20
    refill_share: float = 0.25
    steps_ahead: int = 0
    fill_up: bool | None = None
    graph_bytes: int = 1 << 30

    def fills_up(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.fill_up is None else self.fill_up

    def steps_on(self, device: torch.device) -> int:
        return self.steps_ahead or (8 if device.type == "cuda" else 1)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "fill_up":
                if value not in (None, True, False):
                    raise ValueError(f"{field.name}: got {value!r}; wanted true, false or nothing")
                continue
            if field.name == "refill_share":
                if not 0 <= value <= 1:
                    raise ValueError(f"{field.name}: got {value!r}; wanted a number from 0 to 1")
                continue
            least = 0 if field.name in ("cache_bytes", "graph_bytes", "steps_ahead", "steps_between") else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{field.name}: got {value!r}; wanted a whole number of at least {least}")
