"""Whose turn it is: fair between images, bounded, nobody overtaken for ever, nothing lost."""

import random
import time
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.engine.runtime.config import EngineConfig
from miss.engine.runtime.request import QueueFull, Request, RequestImage, State
from miss.engine.runtime.sampler import Greedy, SamplingParams
from miss.engine.runtime.scheduler import Scheduler
from miss.engine.runtime.slots import Pool, Slots
from miss.models.cache import KVCache

PIXELS = 100


def scheduler(whole_batches=False, **limits):
    config = EngineConfig(**{"answer_slots": 24, "question_slots": 8, **limits})
    tensor = torch.zeros(1, config.answer_slots, 2, 1, 1)
    question = torch.zeros(1, config.question_slots, 2, 1, 1)
    slots = Slots(KVCache(tensor, tensor, question, question, torch.zeros(config.question_slots, dtype=torch.int32)))
    return Scheduler(config, slots, PIXELS, whole_batches)


def request(number, image, branches=1):
    search = Greedy(3, 2, 5, branches - 1)
    return Request(number, RequestImage(image.encode()), [1, 2], SamplingParams(), search)


def end(requests):
    for r in requests:
        r.state = State.ANSWERED


def test_a_single_question_does_not_wait_for_two_hundred_about_one_image():
    turns = scheduler()
    for i in range(200):
        turns.add(request(i, "many"))
    first = turns.admit()
    assert len(first) == 8  # all slots are the many's, as long as nobody else is there
    single = request(200, "single")
    turns.add(single)
    end(first)
    turns.collect()
    assert single in turns.admit() and turns.num_waiting == 200 - 8 - 7


def test_the_circle_goes_round_all_images_and_the_many_are_not_starved_either():
    turns = scheduler(max_prefill_images=2)
    for i in range(40):
        turns.add(request(i, "many"))
    singles = [request(40 + i, f"single {i}") for i in range(6)]
    for single in singles:
        turns.add(single)
    served: list[list[Request]] = []
    while turns.num_waiting:
        batch = turns.admit()
        served.append(batch)
        end(batch)
        turns.collect()
    for i, single in enumerate(singles):
        assert any(single in batch for batch in served[: 2 + i])
    with_many = [i for i, batch in enumerate(served) if any(r.id < 40 for r in batch)]
    assert max(b - a for a, b in zip(with_many, with_many[1:], strict=False)) <= 4


def test_questions_of_an_image_keep_their_order():
    turns = scheduler()
    for i in range(8):
        turns.add(request(i, "a" if i % 3 else "b"))
    ids = [r.id for r in turns.admit()]
    assert [i for i in ids if i % 3] == [1, 2, 4, 5, 7] and [i for i in ids if i % 3 == 0] == [0, 3, 6]


def test_a_wide_request_is_not_overtaken():
    turns = scheduler(answer_slots=8)
    narrow = [request(i, "a", 2) for i in range(3)]
    for r in narrow:
        turns.add(r)
    turns.admit()
    wide, later = request(3, "b", 8), request(4, "c", 1)
    turns.add(wide)
    turns.add(later)
    end(narrow[:2])
    turns.collect()
    assert turns.admit() == []  # the wide one is next, and does not fit yet
    end(narrow[2:])
    turns.collect()
    assert turns.admit() == [wide]


def test_a_busy_engine_waits_for_a_share_of_its_slots_and_an_idle_one_for_none():
    turns = scheduler(refill_share=0.5)
    for i in range(12):
        turns.add(request(i, "a"))
    first = turns.admit()
    assert len(first) == 8
    end(first[:3])
    turns.collect()
    assert turns.admit() == []  # 3 of 8 are free, and 4 wait
    end(first[3:4])
    turns.collect()
    assert len(turns.admit()) == 4


def test_whole_batches_begin_when_the_last_has_ended():
    turns = scheduler(whole_batches=True)
    turns.add(request(0, "a"))
    first = turns.admit()
    turns.add(request(1, "a"))
    assert turns.admit() == []
    end(first)
    turns.collect()
    assert [r.id for r in turns.admit()] == [1]


def test_the_queue_is_bounded_by_count_and_by_pixels_of_distinct_images():
    turns = scheduler(max_waiting=5, max_waiting_pixels=2 * PIXELS)
    for i, image in enumerate("abab"):
        turns.add(request(i, image))
    with pytest.raises(QueueFull, match="300 pixels; accepted: 200") as caught:
        turns.add(request(4, "c"))
    assert caught.value.code == "queue_full"
    turns.add(request(5, "a"))
    with pytest.raises(QueueFull, match="5 requests wait"):
        turns.add(request(6, "a"))
    assert turns.num_waiting == 5 and turns.waiting_pixels == 2 * PIXELS


def test_few_new_images_a_batch_and_those_who_run_have_their_steps_before_the_next():
    turns = scheduler(max_new_images=2, steps_between=3)
    for i, image in enumerate("abcabc"):
        turns.add(request(i, image))
    first = turns.admit()
    assert sorted(r.image.key for r in first) == [b"a", b"a", b"b", b"b"]
    kept = request(6, "kept")
    kept.image.tokens = torch.zeros(1)
    turns.add(kept)
    assert turns.admit() == [kept]  # no image is encoded for it
    assert turns.admit() == []
    assert [r.image.key for r in turns.admit()] == [b"c", b"c"]  # after three steps
    turns.add(request(7, "d"))
    assert turns.admit() == []
    end(turns.running)
    turns.collect()
    assert [r.image.key for r in turns.admit()] == [b"d"]  # at once: nobody waits for a step


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 8)), max_size=40),
    st.integers(1, 8),
    st.integers(0, 4),
    st.integers(0, 2**32),
)
def test_everyone_gets_a_turn_and_every_slot_comes_back(asked, new, steps, seed):
    """Any arrivals between any ends: all are admitted once, within the limits, and at the end all slots are free."""
    chance = random.Random(seed)  # a draw of hypothesis for each turn took 45 s
    limits = {"max_prefill_questions": 5, "max_prefill_images": 3, "max_new_images": new, "steps_between": steps}
    turns = scheduler(refill_share=0.3, **limits)
    everyone = [request(i, image, branches) for i, (image, branches) in enumerate(asked)]
    coming, admitted = list(everyone), []
    while coming or turns.num_waiting or turns.running:
        for _ in range(chance.randint(0, 6)):
            if coming:
                turns.add(coming.pop(0))
        batch = turns.admit()
        assert len(batch) <= 5 and len({r.image.key for r in batch}) <= min(3, new)
        admitted += batch
        slots = [s for r in turns.running for s in r.answer_slots]
        assert len(set(slots)) == len(slots) and len({r.question_slot for r in turns.running}) == len(turns.running)
        assert [r.question_slot for r in turns.running] == sorted(r.question_slot for r in turns.running)
        if turns.running:
            end(turns.running[: chance.randint(1, len(turns.running))])
        turns.collect()
    assert sorted(r.id for r in admitted) == list(range(len(asked)))
    assert turns.slots.answers.num_used == turns.slots.questions.num_used == turns.waiting_pixels == 0


def test_a_slot_is_not_released_twice():
    pool = Pool(3)
    slots = pool.take(2)
    pool.release(slots)
    with pytest.raises(KeyError):
        pool.release(slots)
    assert pool.take(3) == [0, 1, 2]


def test_what_ended_is_not_kept_until_its_time_would_have_been_over():
    """Behind one that has less time and has not ended: a service's clients ask with different timeouts."""
    turns, now = scheduler(max_waiting=5000), time.monotonic()
    slow = request(0, "slow")
    slow.deadline = now + 10
    turns.add(slow)
    left, images = [], []
    for i in range(1, 2000):
        one = request(i, f"image {i}")
        assert one.image is not None
        one.deadline, one.image.pixels = now + 60, np.zeros((4, 4, 3), np.uint8)
        images.append(weakref.ref(one.image))
        turns.add(one)
        turns.cancel(one)
        turns.drop()
        turns.collect()
        left.append(weakref.ref(one))
    del one
    assert sum(ref() is not None for ref in left) < 200
    assert not any(ref() is not None for ref in images), "an image is kept that nobody waits for"
    assert turns.num_waiting == 1 and not slow.done
    late = request(2000, "late")
    late.deadline = now - 1
    turns.add(late)
    turns.drop()
    assert late.done and late.state == State.FAILED and not slow.done  # deadlines are still heeded
