"""The asyncio front: answers as the engine's own, tokens as they come, cancellation, and an orderly end."""

import asyncio
import threading

import numpy as np
import pytest

from miss import Engine, SamplingParams
from miss.engine.data.images import ImageError
from miss.engine.runtime.async_engine import AsyncEngine, Closed
from miss.engine.runtime.config import EngineConfig
from miss.engine.runtime.request import DeadlinePassed, EngineFault
from tests.engine.answering import write_checkpoint

QUESTIONS = ("ct", "is there a mass?", "which organ", "left lung?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vocabulary):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", vocabulary)


@pytest.fixture
def engine(folder):
    return Engine.load(folder, config=EngineConfig(answer_slots=12, question_slots=4))


def image(number):
    return np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def idle(engine):
    stats = engine.stats
    assert stats.received == stats.rejected + stats.answered + stats.failed + stats.cancelled
    assert stats.waiting == stats.running == stats.answer_slots == stats.question_slots == 0
    return stats


def test_many_at_once_are_answered_as_one_by_one(folder, engine):
    asked = [(i % 3, QUESTIONS[i % 4]) for i in range(20)]

    async def main():
        async with AsyncEngine(engine) as front:
            return await asyncio.gather(*(front.answer(image(i), q) for i, q in asked))

    truth = Engine.load(folder)
    for (i, question), answer in zip(asked, asyncio.run(main()), strict=True):
        assert answer.token_ids == truth.answer(image(i), question).token_ids
    assert idle(engine).answered == 20
    assert not [t for t in threading.enumerate() if t.name.startswith("miss-")]


def test_the_thread_that_steps_loads_and_looks_and_says_what_is_wrong(folder):
    """A second thread with OpenMP workers of its own slows all: 1.65 times with int8."""
    threads = []

    def load():
        threads.append(threading.current_thread().name)
        return Engine.load(folder)

    async def main():
        async with AsyncEngine(load) as front:
            answer = await front.answer(image(0), QUESTIONS[0])
            pixels = front.engine.processor.image(image(0))
            look, seen = front.engine.look, (pixels, QUESTIONS[0], answer.token_ids)
            front.engine.look = lambda *asked: (threads.append(threading.current_thread().name), look(*asked))[1]
            found = await front.look(*seen)
            with pytest.raises(ValueError):
                await front.look(pixels, "", answer.token_ids)
            assert (found.maps == look(*seen).maps).all()
        with pytest.raises(Closed):
            await front.look(*seen)

    asyncio.run(main())
    assert threads == ["miss-step"] * 3
    with pytest.raises(ZeroDivisionError):
        AsyncEngine(lambda: 1 // 0)


def test_who_is_cancelled_as_the_thread_wakes_up_does_not_end_it(engine, monkeypatch):
    seen = []

    def busy(engine):  # as the thread is woken: somebody waits; when it looks again: nobody any more
        if seen and seen.pop():
            return True
        return engine.scheduler.busy

    async def main():
        async with AsyncEngine(engine) as front:
            monkeypatch.setattr(Engine, "busy", property(busy))
            with front._stepper._change:
                seen.append(True)
                front._stepper._change.notify()
            await asyncio.sleep(0.2)
            assert not seen
            return await asyncio.wait_for(front.answer(image(0), QUESTIONS[0]), 20)

    assert asyncio.run(main()).token_ids


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(num_alternatives=0)])
def test_greedy_streams_beginnings_of_its_answer(engine, params):
    async def main():
        async with AsyncEngine(engine) as front:
            return [event async for event in front.stream(image(0), "is there a mass?", params)]

    *events, last = asyncio.run(main())
    assert len(events) == len(last.answer.token_ids) > 1
    for i, event in enumerate(events):
        assert event.answer is None and event.token_ids == last.token_ids[: i + 1]
        assert last.answer.text.startswith(event.text)
    assert last.text == last.answer.text


def test_beams_give_one_event_at_their_end(engine):
    async def main():
        async with AsyncEngine(engine) as front:
            return [event async for event in front.stream(image(0), "ct", SamplingParams(num_beams=3))]

    (event,) = asyncio.run(main())
    assert event.answer.token_ids == event.token_ids


def test_a_cancelled_await_ends_its_request_and_no_other(folder, engine):
    async def main():
        async with AsyncEngine(engine) as front:
            tasks = [asyncio.create_task(front.answer(image(i % 3), QUESTIONS[i % 4])) for i in range(16)]
            await asyncio.sleep(0.005)
            for task in tasks[::2]:
                task.cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    truth = Engine.load(folder)
    results = asyncio.run(main())
    for i, result in enumerate(results):
        if i % 2:
            assert result.token_ids == truth.answer(image(i % 3), QUESTIONS[i % 4]).token_ids
        else:
            assert isinstance(result, asyncio.CancelledError) or result.token_ids
    stats = idle(engine)
    assert stats.answered + stats.cancelled == stats.received


def test_a_stream_that_is_left_ends_its_request(engine):
    async def main():
        async with AsyncEngine(engine) as front:
            stream = front.stream(image(0), "is there a mass?")
            async for _ in stream:
                break
            await stream.aclose()
            return (await front.answer(image(0), "ct")).token_ids

    assert asyncio.run(main())
    idle(engine)


def test_errors_reach_those_who_await_them(engine, monkeypatch):
    async def main():
        async with AsyncEngine(engine) as front:
            with pytest.raises(ImageError):
                await front.answer(b"not an image", "ct")
            with pytest.raises(DeadlinePassed):
                await front.answer(image(0), "ct", timeout=1e-9)
            with monkeypatch.context() as broken:
                for name in ("decode", "decode_best"):
                    broken.setattr(engine.model, name, lambda *a: (_ for _ in ()).throw(RuntimeError("a bug")))
                with pytest.raises(EngineFault):
                    await front.answer(image(0), "ct")
            return await front.answer(image(0), "ct")

    assert asyncio.run(main()).token_ids
    idle(engine)


def test_closing_answers_what_is_there_and_takes_no_more(engine):
    async def main():
        front = AsyncEngine(engine)
        tasks = [asyncio.create_task(front.answer(image(i), "ct")) for i in range(6)]
        await asyncio.sleep(0)
        await front.aclose()
        with pytest.raises(Closed):
            await front.answer(image(0), "ct")
        return await asyncio.gather(*tasks)

    assert len(asyncio.run(main())) == 6
    idle(engine)


def test_an_idle_engine_waits_for_a_batch_to_fill(folder):
    engine = Engine.load(folder, config=EngineConfig(max_prefill_questions=2))

    async def took(*numbers):
        start = asyncio.get_running_loop().time()
        await asyncio.gather(*(front.answer(image(i), "ct") for i in numbers))
        return asyncio.get_running_loop().time() - start

    async def main():
        nonlocal front
        async with AsyncEngine(engine, max_wait=0.5) as front:
            return await took(0), await took(1, 2)

    front = None
    alone, together = asyncio.run(main())
    assert alone >= 0.5 > together
    idle(engine)
