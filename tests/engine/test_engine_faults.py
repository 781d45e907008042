"""What goes wrong with one request stays with it: the others' answers, slots and counts are as they should be."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from miss import Engine, SamplingParams
from miss.engine.data.images import ImageError
from miss.engine.data.processor import QuestionError
from miss.engine.runtime.config import EngineConfig
from miss.engine.runtime.many import outcome
from miss.engine.runtime.request import (
    Cancelled,
    DeadlinePassed,
    EngineFault,
    InvalidRequest,
    OutOfMemory,
    QueueFull,
    RequestError,
    State,
)
from tests.engine.answering import write_checkpoint

POISON = "fracture"
QUESTIONS = ("ct", "is there a mass?", "which organ", "left lung?", "mri or ct", "what does this picture show?")
MEMORY_ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vocabulary):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", vocabulary)


@pytest.fixture
def engine(folder):
    return Engine.load(folder, config=EngineConfig(answer_slots=24, question_slots=8))


def image(number):
    return np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)


DECODES = ("decode", "decode_best")  # a step where searches want anything, and where they want best tokens alone


def poison(engine, monkeypatch, where, error, words=POISON):
    """The model's method runs out of memory whenever the question with these words is in the batch."""
    word = engine.processor.tokenizer.token_to_id(words)
    slots = set()
    encode = engine.model.encode

    def on_encode(image_kv, index, ids, lengths, cache, into):
        bad = (ids == word).any(1)
        slots.update(into[bad].tolist())
        slots.difference_update(into[~bad].tolist())
        if where == "encode" and bad.any():
            raise error
        return encode(image_kv, index, ids, lengths, cache, into)

    def failing(decode):
        def on_decode(tokens, cache, rows, positions, questions, *more):
            done = decode(
                tokens, cache, rows, positions, questions, *more
            )  # so that it has written to the cache before
            if where == "decode" and slots & set(questions.tolist()) and int(positions.max()) > 0:
                raise error
            return done

        return on_decode

    monkeypatch.setattr(engine.model, "encode", on_encode)
    for name in DECODES:
        monkeypatch.setattr(engine.model, name, failing(getattr(engine.model, name)))


def balanced(engine):
    stats = engine.stats
    ended = stats.rejected + stats.answered + stats.failed + stats.cancelled
    assert stats.received == ended + stats.waiting + stats.running
    return stats


def idle(engine):
    stats = balanced(engine)
    assert stats.waiting == stats.running == stats.answer_slots == stats.question_slots == stats.waiting_pixels == 0
    assert not engine.busy
    return stats


def same(got, want):
    assert got.token_ids == want.token_ids and got.logprob == pytest.approx(want.logprob, abs=1e-5)


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=["cuda", "cpu", "python"])
@pytest.mark.parametrize("where", ["encode", "decode"])
def test_out_of_memory_fails_the_poison_request_alone(folder, engine, monkeypatch, where, error):
    pairs = [(image(i % 3), q) for i, q in enumerate([*QUESTIONS, f"is there a {POISON}?", "chest x ray"])]
    truth = Engine.load(folder)
    poison(engine, monkeypatch, where, error)
    got = list(engine.answer_many(pairs, on_error="return", batch_size=8))
    for (shown, question), answer in zip(pairs, got, strict=True):
        if POISON in question:
            assert isinstance(answer, OutOfMemory) and answer.code == "out_of_memory"
        else:
            same(answer, truth.answer(shown, question))
    stats = idle(engine)
    assert (stats.answered, stats.failed) == (7, 1)
    same(engine.answer(image(9), "ct"), truth.answer(image(9), "ct"))


def test_out_of_memory_in_the_image_fails_those_who_asked_about_it(engine, monkeypatch):
    encode = engine.model.encode_images

    def on_encode(pixels):
        if (pixels == 7).flatten(1).all(1).any():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(pixels)

    monkeypatch.setattr(engine.model, "encode_images", on_encode)
    flat = np.full((28, 28, 3), 7, np.uint8)
    got = list(engine.answer_many([(image(0), "ct"), (flat, "ct"), (flat, "mri"), (image(1), "ct")], on_error="return"))
    assert [isinstance(g, OutOfMemory) for g in got] == [False, True, True, False]
    idle(engine)


def test_a_fault_in_a_step_is_raised_and_nobody_waits_for_ever(folder, engine, monkeypatch):
    running = [engine.add(image(0), q) for q in QUESTIONS[:3]]
    engine.step()
    with monkeypatch.context() as broken:
        for name in DECODES:
            broken.setattr(engine.model, name, lambda *a: (_ for _ in ()).throw(RuntimeError("a bug")))
        with pytest.raises(RuntimeError, match="a bug"):
            while engine.busy:
                engine.step()
    assert all(isinstance(r.error, EngineFault) and str(r.error.__cause__) == "a bug" for r in running if r.error)
    assert any(r.error for r in running)
    idle(engine)
    same(engine.answer(image(0), "ct"), Engine.load(folder).answer(image(0), "ct"))


def test_numbers_that_are_none_fail_their_request_alone(engine, monkeypatch):
    request, other = engine.add(image(0), "ct"), engine.add(image(0), "mri")

    def advance(choices):
        raise ValueError("the model's logits are not numbers")

    monkeypatch.setattr(request.search, "advance", advance)
    while engine.busy:
        engine.step()
    assert request.state == State.FAILED and "not numbers" in str(request.error)
    assert outcome(other).token_ids
    idle(engine)


def test_cancelling_frees_the_slot_within_a_step_and_touches_nobody(folder, engine):
    wants = SamplingParams(num_beams=3)
    requests = [engine.add(image(i % 2), q, wants) for i, q in enumerate(QUESTIONS)]
    late = engine.add(image(3), "ct", wants)
    engine.step()
    assert engine.stats.running == 7 and engine.stats.answer_slots == 21
    assert engine.cancel(requests[1]) and not engine.cancel(requests[1])
    assert engine.stats.running == 6 and engine.stats.answer_slots == 18
    while engine.busy:
        engine.step()
    assert isinstance(requests[1].error, Cancelled) and requests[1].answer is None
    truth = Engine.load(folder)
    for i, (request, question) in enumerate(zip(requests, QUESTIONS, strict=True)):
        if i != 1:
            same(request.answer, truth.answer(image(i % 2), question, wants))
    same(late.answer, truth.answer(image(3), "ct", wants))
    assert not engine.cancel(late)
    assert idle(engine).cancelled == 1


def test_cancelling_one_that_waits_and_from_within_a_step(engine):
    waiting = engine.add(image(0), "ct")
    assert engine.cancel(waiting) and idle(engine).cancelled == 1
    other = engine.add(image(0), "ct")
    mine = engine.add(image(0), "mri", on_token=lambda request: engine.cancel(other))
    while engine.busy:
        engine.step()
    assert mine.state == State.ANSWERED and other.done
    idle(engine)


def test_a_deadline_that_passed_costs_no_work(engine, monkeypatch):
    seen = []
    encode = engine.model.encode_images
    monkeypatch.setattr(engine.model, "encode_images", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    late = engine.add(image(0), "ct", timeout=0.01)
    time.sleep(0.02)
    assert engine.step() == [late] and seen == []
    assert isinstance(late.error, DeadlinePassed) and late.error.code == "deadline"
    with pytest.raises(DeadlinePassed):
        outcome(late)
    running = engine.add(image(0), "ct", timeout=60)
    engine.step()
    running.deadline = time.monotonic() - 1
    engine.scheduler._deadlines[0] = (running.deadline, running.id, running)
    if not running.done:
        assert running in engine.step() and isinstance(running.error, DeadlinePassed)
    assert idle(engine).failed >= 1


def test_a_full_queue_refuses_and_goes_on(folder):
    engine = Engine.load(folder, config=EngineConfig(max_waiting=3))
    requests = [engine.add(image(i), "ct") for i in range(3)]
    with pytest.raises(QueueFull):
        engine.add(image(0), "mri")
    assert balanced(engine).rejected == 1
    while engine.busy:
        engine.step()
    assert all(r.answer for r in requests)
    assert len(list(engine.answer_many([(image(i), "ct") for i in range(8)], batch_size=100))) == 8


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((image(0), ""), QuestionError),
        ((image(0), "x" * 30_000), QuestionError),
        ((b"not an image", "ct"), ImageError),
        (("nowhere.png", "ct"), ImageError),
        ((np.zeros((4, 4)), "ct"), ValueError),
        ((image(0), "ct", SamplingParams(max_new_tokens=41)), InvalidRequest),
        ((image(0), "ct", SamplingParams(num_beams=25)), InvalidRequest),
        ((image(0), "ct", None, 0.0), InvalidRequest),
        ((image(0), "ct", None, float("nan")), InvalidRequest),
    ],
)
def test_what_is_wrong_is_said_at_once(engine, arguments, error):
    with pytest.raises(error):
        engine.add(*arguments)
    assert idle(engine).rejected == 1


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"num_beams": 0}, {"candidates": ()}, {"constrain": ()}, {"temperature": -1.0}]
)
def test_parameters_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="got"):
        SamplingParams(**wrong)


def test_doubles_are_answered_alike(engine):
    asked = [(image(0), "is there a mass?")] * 9
    answers = list(engine.answer_many(asked, batch_size=9))
    assert len({tuple(a.token_ids) for a in answers}) == 1 and engine.stats.num_encoded_images == 1


def test_leaving_many_early_leaves_nothing_behind(engine):
    lengths = [SamplingParams(max_new_tokens=1 if i % 2 else 6) for i in range(30)]
    answers = engine.answer_many([(image(1), "ct", lengths[1 - i % 2]) for i in range(30)], batch_size=8)
    next(answers)
    answers.close()
    assert idle(engine).cancelled > 0


def test_a_listener_that_raises_ends_its_request_alone(engine, caplog):
    def broken(request):
        raise KeyError("mine")

    mine, other = engine.add(image(0), "ct", on_token=broken), engine.add(image(0), "ct")
    while engine.busy:
        engine.step()
    assert type(mine.error) is RequestError and isinstance(mine.error.__cause__, KeyError) and other.answer
    idle(engine)


def test_threads_that_ask_at_once_get_their_own_answers(folder, engine):
    truth = Engine.load(folder)
    want = {(i, q): truth.answer(image(i), q) for i in range(3) for q in QUESTIONS}
    got = {}

    def ask(i):
        for q in QUESTIONS:
            got[i, q] = engine.answer(image(i), q)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key, answer in want.items():
        same(got[key], answer)
    assert idle(engine).answered == 18


class Life(RuleBasedStateMachine):
    """Adds, steps, cancels, deadlines and faults in any order: the law of conservation holds between all of them, and
    every answer that is given is the one that is given alone."""

    folder = None
    truth: dict = {}

    @initialize(cache=st.sampled_from([0, 3000, 1 << 20]))
    def begin(self, cache):
        config = EngineConfig(
            answer_slots=7, question_slots=3, max_waiting=5, max_prefill_images=2, cache_bytes=cache, refill_share=0.5
        )
        self.engine = Engine.load(self.folder, config=config)
        self.failing = False
        for name in DECODES:
            setattr(self.engine.model, name, self.sometimes(getattr(self.engine.model, name)))
        self.asked = []

    def sometimes(self, decode):
        def on_decode(*arguments):
            if self.failing and len(arguments[0]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return decode(*arguments)

        return on_decode

    @rule(
        number=st.integers(0, 3),
        question=st.sampled_from([*QUESTIONS[:4], ""]),
        beams=st.sampled_from([1, 2, 9]),
        timeout=st.sampled_from([None, None, 1e-9, 1000.0]),
    )
    def add(self, number, question, beams, timeout):
        try:
            params = SamplingParams(num_beams=beams, num_alternatives=1)
            request = self.engine.add(image(number), question, params, timeout)
        except (QueueFull, InvalidRequest, QuestionError):
            return
        self.asked.append((request, (number, question, beams)))

    @rule()
    def step(self):
        self.engine.step()

    @rule(data=st.data())
    def cancel(self, data):
        if self.asked:
            request, _ = data.draw(st.sampled_from(self.asked))
            was = request.state
            assert self.engine.cancel(request) == (was in (State.WAITING, State.RUNNING))
            assert request.done

    @rule()
    def fail_batches(self):
        """From now on (or no more) only one row at a time fits into memory."""
        self.failing = not self.failing

    @invariant()
    def conserved(self):
        if not hasattr(self, "engine"):
            return
        stats = balanced(self.engine)
        states = [request.state for request, _ in self.asked]
        assert stats.answered == states.count(State.ANSWERED) and stats.cancelled == states.count(State.CANCELLED)
        assert stats.failed == states.count(State.FAILED)
        assert stats.waiting <= 5 and stats.question_slots == stats.running <= 3 and stats.answer_slots <= 7

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        while self.engine.busy:
            self.engine.step()
        idle(self.engine)
        for request, key in self.asked:
            assert (request.answer is None) != (request.error is None)
            if request.answer is not None:
                same(request.answer, self.alone(key))
            else:
                assert isinstance(request.error, Cancelled | DeadlinePassed | OutOfMemory)

    def alone(self, key):
        if key not in Life.truth:
            number, question, beams = key
            params = SamplingParams(num_beams=beams, num_alternatives=1)
            Life.truth[key] = Engine.load(self.folder).answer(image(number), question, params)
        return Life.truth[key]


def test_the_life_of_an_engine(folder):
    Life.folder = folder
    run_state_machine_as_test(Life, settings=settings(max_examples=25, stateful_step_count=25, deadline=None))
