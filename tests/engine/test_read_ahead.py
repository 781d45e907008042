"""Images decoded ahead of need: order and errors as without, bounded in count and pixels, and no thread left behind."""

import io
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from miss import Engine, SamplingParams
from miss.engine.data.images import ImageError, declared_pixels
from miss.engine.runtime import many, read_ahead
from miss.engine.runtime.image_source import EarlyImage
from miss.engine.runtime.read_ahead import Gate, ReadAhead
from tests.engine.answering import write_checkpoint

QUESTIONS = ("ct", "is there a mass?", "left lung?")
ONE = SamplingParams(max_new_tokens=1, num_alternatives=0)


@pytest.fixture(params=[False, True], ids=["between steps", "meanwhile"], autouse=True)
def leaves_cores(request, monkeypatch):
    monkeypatch.setattr(many, "_leaves_cores", lambda engine: request.param)


@pytest.fixture(scope="module")
def engine(tmp_path_factory, vocabulary):
    return Engine.load(write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", vocabulary))


def pixels(number, size=(30, 40)):
    return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)


def encoded(number, size=(30, 40), kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels(number, size)).save(file, kind)
    return file.getvalue()


class Source:
    """An object that hands out an encoded image, in the thread that asked."""

    def __init__(self, data):
        self.data, self.asked_in = data, None

    def read_bytes(self):
        self.asked_in = threading.current_thread()
        if self.data is None:
            raise KeyError("gone")
        return self.data


def threads_of_ours():
    return [t for t in threading.enumerate() if t.name.startswith("miss-read-ahead")]


def alone(engine, image, question):
    """What `answer` says: token ids, or the error's kind and text."""
    if isinstance(image, ValueError):
        return type(image), str(image)
    try:
        return engine.answer(image, question, ONE).token_ids
    except ValueError as error:
        return type(error), str(error)


def shown(result):
    return (type(result), str(result)) if isinstance(result, ValueError) else result.token_ids


BROKEN = encoded(0)[:60]
KINDS = {
    "array": lambda n, folder: pixels(n),
    "bytes": lambda n, folder: encoded(n),
    "path": lambda n, folder: _file(folder, n),
    "source": lambda n, folder: Source(encoded(n)),
    "broken": lambda n, folder: BROKEN,
    "no image": lambda n, folder: b"text",
    "no file": lambda n, folder: str(folder / "nowhere.png"),
    "wrong array": lambda n, folder: np.zeros((3, 3)),
    "an error": lambda n, folder: ImageError("not_found", "named wrongly"),
}


def _file(folder, number):
    path = folder / f"{number}.png"
    if not path.exists():
        path.write_bytes(encoded(number))
    return path


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(
        st.tuples(st.sampled_from([*KINDS]), st.integers(0, 3), st.sampled_from(["", *QUESTIONS])), max_size=24
    ),
    batch_size=st.integers(1, 9),
    forget=st.booleans(),
)
def test_answers_and_errors_are_those_of_one_by_one(engine, tmp_path, asked, batch_size, forget):
    pairs = [(KINDS[kind](number, tmp_path), question) for kind, number, question in asked]
    want = [alone(engine, *pair) for pair in pairs]
    if forget:
        engine.forget_images()
    got = list(engine.answer_many(iter(pairs), ONE, batch_size, on_error="return"))
    assert [shown(g) for g in got] == want
    assert not threads_of_ours() and not engine.busy


def test_the_first_error_is_raised_in_its_turn(engine):
    answers = engine.answer_many([(encoded(0), "ct"), (encoded(1), "ct"), (BROKEN, "ct"), (encoded(2), "ct")], ONE, 4)
    assert [len(next(answers).token_ids) for _ in range(2)] == [1, 1]
    with pytest.raises(ImageError, match="ends"):
        next(answers)
    assert not threads_of_ours() and not engine.busy


@pytest.mark.parametrize("after", [0, 1, 3, 4, 7, 8, 11])
def test_what_the_source_raises_comes_in_its_turn(engine, after):
    """As without threads: the batches before it are answered, nothing of its own is."""

    def pairs():
        for i in range(after):
            yield encoded(i % 3), "ct"
        raise OSError("the list cannot be read")

    got = []
    with pytest.raises(OSError, match="the list"):
        for answer in engine.answer_many(pairs(), ONE, 4):
            got.append(answer)
    assert len(got) >= max(0, after // 4 * 4 - 2) and len(got) <= after
    assert not threads_of_ours() and not engine.busy


def test_a_pair_that_is_none(engine):
    with pytest.raises(ValueError, match="unpack"):
        list(engine.answer_many([(encoded(0), "ct"), (encoded(0),)], ONE, 4))
    assert not threads_of_ours() and not engine.busy


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_leaving_early_leaves_no_thread(engine, taken):
    asked = 0

    def pairs():
        nonlocal asked
        while True:
            asked += 1
            yield encoded(asked % 5), "ct"

    answers = engine.answer_many(pairs(), ONE, 6)
    for _ in range(taken):
        next(answers)
    answers.close()
    assert not threads_of_ours() and not engine.busy and asked <= taken + 2 * 6


def test_a_failing_step_leaves_no_thread(engine, monkeypatch):
    def fail(pixels):
        raise KeyError("a bug")

    engine.forget_images()
    with monkeypatch.context() as patched, pytest.raises(KeyError, match="a bug"):
        patched.setattr(engine.model, "encode_images", fail)
        list(engine.answer_many([(encoded(i), "ct") for i in range(20)], ONE, 6))
    assert not threads_of_ours() and not engine.busy


def test_a_fault_in_a_thread_is_raised_where_it_is_asked_for(engine, monkeypatch):
    engine.forget_images()
    resize = engine.processor.image

    def sometimes(image):
        if image.shape[0] == 31:
            raise MemoryError("no room to resize")
        return resize(image)

    with monkeypatch.context() as patched, pytest.raises(MemoryError, match="no room"):
        patched.setattr(engine.processor, "image", sometimes)
        list(engine.answer_many([(pixels(i, (30 + (i == 3), 40)), "ct") for i in range(9)], ONE, 6, "return"))
    assert not threads_of_ours() and not engine.busy


def test_one_by_one_nothing_is_asked_for_early(engine):
    """A source may wait for the last answer: with batches of one it is asked for a pair after that was taken."""
    answered = 0

    def pairs():
        for i in range(5):
            assert answered == i and not threads_of_ours()
            yield encoded(i), "ct"

    for _ in engine.answer_many(pairs(), ONE, 1):
        answered += 1
    assert answered == 5


@pytest.mark.parametrize("batch_size", [2, 7, 40])
def test_the_source_is_never_two_batches_ahead(engine, batch_size):
    asked, most = 0, 0

    def pairs():
        nonlocal asked
        for i in range(200):
            asked += 1
            yield pixels(i % 7), "ct"

    for number, _ in enumerate(engine.answer_many(pairs(), ONE, batch_size), 1):
        most = max(most, asked - number + 1)
    assert number == 200 and most <= 2 * batch_size
    assert many.MOST_AHEAD >= 1


def test_an_image_is_decoded_once_however_many_ask(engine, monkeypatch):
    engine.forget_images()
    decoded, resize = [], engine.processor.image

    def counted(image):
        decoded.append(image.shape)
        time.sleep(0.005)
        return resize(image)

    monkeypatch.setattr(engine.processor, "image", counted)
    data = [encoded(n, (33, 44)) for n in (50, 51)]
    got = list(engine.answer_many([(data[i // 20], "ct") for i in range(40)], ONE, 8))
    assert len(got) == 40 and len(decoded) == 2


def test_one_that_left_the_cache_meanwhile_is_decoded_after_all(engine):
    engine.forget_images()
    data = encoded(60)
    engine.answer(data, "ct", ONE)
    reading = ReadAhead(iter([(data, "ct")]), engine.intake.reader, engine.intake.needs_no_pixels, threads=1)
    (early, question), *_ = reading.take(1)
    assert isinstance(early, EarlyImage) and early.found().pixels is None
    engine.forget_images()
    request = engine.add(early, question, ONE)
    while engine.busy:
        engine.step()
    assert request.answer is not None
    reading.close()
    assert not threads_of_ours()


def test_objects_are_asked_in_the_callers_thread(engine):
    sources = [Source(encoded(i)) for i in range(6)]
    list(engine.answer_many([(s, "ct") for s in sources], ONE, 6))
    assert {s.asked_in for s in sources} == {threading.current_thread()}
    with pytest.raises(KeyError, match="gone"):
        list(engine.answer_many([(Source(None), "ct")], ONE, 6))
    assert not threads_of_ours() and not engine.busy


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=12), threads=st.integers(1, 4))
def test_the_gate(sizes, threads):
    """Never more than its measure inside, unless something larger is alone; and everyone gets in."""
    gate, inside, seen, lock = Gate(8), [], [], threading.Lock()
    todo = iter(sizes)

    def work(size):
        with lock:
            inside.append(size)
            seen.append(list(inside))
        time.sleep(0.0005)
        with lock:
            inside.remove(size)
        return size

    def run():
        while True:
            with lock:
                size = next(todo, None)
            if size is None:
                return
            assert gate.run(size, lambda: work(size)) == size  # noqa: B023

    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(10)
    assert len(seen) == len(sizes)
    assert all(sum(now) <= 8 or sum(n > 0 for n in now) == 1 for now in seen)


def test_large_images_are_decoded_one_at_a_time(engine, monkeypatch):
    engine.forget_images()
    running, most, lock, resize = 0, 0, threading.Lock(), engine.processor.image

    def watched(image):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return resize(image)

    monkeypatch.setattr(engine.processor, "image", watched)
    pairs = [(encoded(100 + i, (50, 50)), "ct") for i in range(6)]
    for threads, limit, wanted in ((4, 1 << 26, {2, 3, 4}), (4, 2500, {1}), (4, 5000, {1, 2})):
        most = 0
        reading = ReadAhead(iter(pairs), engine.intake.reader, lambda key: False, threads, limit)
        for early, _ in reading.take(6):
            early.found()
        reading.close()
        assert most in wanted


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_declared_pixels(kind):
    assert declared_pixels(encoded(0, kind=kind)) == 30 * 40
    assert declared_pixels(encoded(0, kind=kind)[:40]) in (0, 30 * 40) and declared_pixels(b"text") == 0
    assert read_ahead.MOST_PIXELS >= 64_000_000
