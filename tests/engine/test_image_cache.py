"""Two tiers under one budget: never over it, the least recently used goes, and what is found is what was kept."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miss import Engine
from miss.engine.runtime.config import EngineConfig
from miss.engine.runtime.image_cache import KV_SHARE, ImageCache
from miss.engine.runtime.image_source import ImageReader
from tests.engine.answering import write_checkpoint, write_images

TOKENS, SHAPE = (4, 8), (2, 2, 2, 8)  # (N, C); (layers, 2, H, D)
TOKEN_BYTES, KV_BYTES = 4 * 32, 4 * 256


def tokens(i):
    return torch.full(TOKENS, float(i))


def keep(cache, ids):
    """As a prefill does: what is not there is kept, tokens first. Returns each image's slot, or None."""
    keys = [bytes([i]) for i in ids]
    slots = cache.kv_slots(keys)
    missing = [i for i, slot in zip(ids, slots, strict=True) if slot is None]
    for i in missing:
        cache.keep_tokens(bytes([i]), tokens(i))
    in_use = {slot for slot in slots if slot is not None}
    with cache.reserved([bytes([i]) for i in missing], torch.zeros(1, *TOKENS), SHAPE, in_use) as placed:
        for i, slot in zip(missing, placed, strict=True):
            if slot is not None:
                cache.pool[slot] = i
    new = dict(zip(missing, placed, strict=True))
    return [new.get(i, slot) for i, slot in zip(ids, slots, strict=True)]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 12 * (KV_BYTES + TOKEN_BYTES)),
    st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=5, unique=True), max_size=25),
)
def test_the_budget_holds_and_slots_hold_what_they_should(budget, batches):
    cache = ImageCache(budget)
    for ids in batches:
        slots = keep(cache, ids)
        taken = [s for s in slots if s is not None]
        assert len(set(taken)) == len(taken)
        for i, slot in zip(ids, slots, strict=True):
            if slot is not None:
                layers, first = cache.layers(taken)
                assert all((kv.k[slot - first] == i).all() and (kv.v[slot - first] == i).all() for kv in layers)
        assert cache.tokens_tier.bytes + cache.kv_tier.bytes <= budget
    for i in range(21):
        found = cache.tokens(bytes([i]))
        assert found is None or (found == i).all()
    used = cache.kv_tier
    assert used.hits + used.misses == sum(map(len, batches)) and used.evictions <= used.misses


def test_the_least_recently_used_goes_first():
    cache = ImageCache(round(3 * KV_BYTES / KV_SHARE))
    for i in (0, 1, 2):
        keep(cache, [i])
    keep(cache, [0])
    keep(cache, [3])
    assert [slot is not None for slot in cache.kv_slots([bytes([i]) for i in range(4)])] == [True, False, True, True]
    assert cache.kv_tier.evictions == 1 and cache.kv_tier.num_images == 3
    assert cache.tokens(bytes([1])) is not None  # tokens are small: theirs is another tier


def test_images_seen_once_do_not_drive_out_the_one_that_is_asked_about():
    cache = ImageCache(round(3 * KV_BYTES / KV_SHARE))
    for i in range(1, 21):
        keep(cache, [0, i])
    assert cache.kv_slots([bytes([0])]) != [None]


def test_what_could_not_be_written_is_not_kept():
    cache = ImageCache(1 << 20)
    cache.keep_tokens(b"a", tokens(1))
    with pytest.raises(MemoryError), cache.reserved([b"a"], torch.zeros(1, *TOKENS), SHAPE, set()):
        raise MemoryError
    assert cache.kv_slots([b"a"]) == [None] and cache.kv_tier.bytes == 0


def test_no_budget_keeps_nothing():
    cache = ImageCache(0)
    assert keep(cache, [0, 1]) == [None, None] and cache.tokens(bytes([0])) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vocabulary):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", vocabulary)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 6)


def test_an_image_is_encoded_once_for_all_its_questions(folder, images):
    engine = Engine.load(folder)
    pairs = [(images[i % 3], question) for i in range(3) for question in ("ct", "mri", "is there a mass?")]
    first = list(engine.answer_many(pairs, batch_size=4))
    assert engine.stats.num_encoded_images == 3
    again = list(engine.answer_many(pairs, batch_size=9))
    assert engine.stats.num_encoded_images == 3 and engine.stats.image_kv.hits >= 3
    assert [a.token_ids for a in first] == [a.token_ids for a in again]


def test_requests_that_wait_share_an_image_without_any_cache(folder, images):
    engine = Engine.load(folder, config=EngineConfig(cache_bytes=0, question_slots=2))
    requests = [engine.add(images[0], "ct") for _ in range(7)]
    while engine.busy:
        engine.step()
    assert engine.stats.num_encoded_images == 1 and len({tuple(r.answer.token_ids) for r in requests}) == 1


@pytest.mark.parametrize("room", [0, 0.5, 1.4, 2.3, 50])
def test_answers_do_not_depend_on_what_is_kept(folder, images, room):
    """Room for none, for tokens only, for one, for two and for all images' keys and values."""
    truth = Engine.load(folder, config=EngineConfig(cache_bytes=0))
    model = truth.model.config
    each = 5 * model.encoder.num_layers * 2 * model.encoder.hidden_size * 4
    engine = Engine.load(folder, config=EngineConfig(cache_bytes=round(room * each / KV_SHARE)))
    for batch in ([0, 1, 2], [0, 3], [3, 0, 1], [4, 5, 0, 1, 2, 3], [0]):
        got = list(engine.answer_many([(images[i], "is there a mass?") for i in batch]))
        want = [truth.answer(images[i], "is there a mass?") for i in batch]
        assert [a.token_ids for a in got] == [a.token_ids for a in want]
        assert [a.logprob for a in got] == pytest.approx([a.logprob for a in want], abs=1e-5)
    assert (engine.stats.image_kv.num_images > 0) == (room > 1)


def test_a_cached_image_is_not_decoded_and_a_changed_file_is(folder, images, tmp_path, monkeypatch):
    engine = Engine.load(folder)
    path = tmp_path / "image.png"
    path.write_bytes(images[0].read_bytes())
    decoded = []
    pixels = ImageReader.pixels
    monkeypatch.setattr(ImageReader, "pixels", lambda *a: decoded.append(1) or pixels(*a))
    first = engine.answer(path, "ct")
    assert engine.answer(path, "ct").logprob == pytest.approx(first.logprob, abs=1e-6) and len(decoded) == 1
    path.write_bytes(images[1].read_bytes())
    other = engine.answer(path, "ct")
    assert len(decoded) == 2
    assert other.logprob == pytest.approx(engine.answer(images[1], "ct").logprob, abs=1e-6)


def test_a_key_is_of_content_preprocessing_and_weights(processor, images, tmp_path):
    reader = ImageReader(processor, "weights")
    copy = tmp_path / "copy.png"
    copy.write_bytes(images[0].read_bytes())
    key = reader.key(images[0])[0]
    assert key == reader.key(copy)[0] == reader.key(str(copy))[0] == reader.key(copy.read_bytes())[0]
    assert key != reader.key(images[1])[0]
    assert key != ImageReader(processor, "other weights").key(copy)[0]
    flat = np.zeros((2, 8, 3), np.uint8)
    assert reader.key(flat)[0] != reader.key(flat.reshape(4, 4, 3))[0]


def test_a_file_that_was_just_written_is_read_again(processor, images, tmp_path):
    """Two writes within one tick of the file system's clock, of one size, are two contents."""
    reader = ImageReader(processor, "weights")
    path = tmp_path / "image"
    path.write_bytes(b"a" * 100)
    stamp = path.stat().st_mtime_ns
    first = reader.key(path)[0]
    path.write_bytes(b"b" * 100)
    os.utime(path, ns=(stamp, stamp))
    assert reader.key(path)[0] != first
    os.utime(path, ns=(stamp - 10**10, stamp - 10**10))
    assert reader.key(path)[1] is not None and reader.key(path)[1] is None  # settled: remembered from now on


def test_forgetting_images(folder, images):
    engine = Engine.load(folder)
    engine.answer(images[0], "ct")
    engine.forget_images()
    engine.answer(images[0], "ct")
    assert engine.stats.num_encoded_images == 2
