"""`correct` behaviour: an answer's text does not depend on batch, padding, order, threads or what the cache holds.

Over the shipped checkpoint and a two-layer base whose random weights are far enough from uniform that answers differ.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miss import Engine, SamplingParams
from miss.engine.data.images import decode_image
from miss.engine.data.processor import Processor
from miss.engine.runtime.config import EngineConfig
from miss.engine.runtime.loading import CHECKPOINTS
from miss.models.config import PRESETS
from miss.models.vqa import MissVQA

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QUESTIONS = (
    "what modality is this image?",
    "is there a fracture?",
    "which organ is shown?",
    "ct",
    "is this image normal, or is there a mass in the left lung, an effusion, a fracture or pneumonia in it?",
)
WAYS = (
    SamplingParams(num_alternatives=0),
    SamplingParams(num_alternatives=2),
    SamplingParams(num_beams=3),
    SamplingParams(max_new_tokens=2, num_alternatives=1),
)
pytestmark = pytest.mark.skipif(not (CHECKPOINTS / "miss-small").is_dir(), reason="the shipped checkpoint is not here")


def small() -> tuple[MissVQA, Processor]:
    engine = Engine.load("miss-small")
    return engine.model, engine.processor


def base() -> tuple[MissVQA, Processor]:
    """Base's widths, two layers a tower, 64 pixels, few words."""
    whole = PRESETS["base"]
    processor = Processor.from_folder(CHECKPOINTS / "miss-small")
    text = {"num_layers": 2, "vocab_size": processor.tokenizer.get_vocab_size(), "max_positions": 64}
    config = dataclasses.replace(
        whole,
        vision=dataclasses.replace(whole.vision, num_layers=2, image_size=64),
        encoder=dataclasses.replace(whole.encoder, **text),
        decoder=dataclasses.replace(whole.decoder, **text),
        preprocess=dataclasses.replace(whole.preprocess, image_size=64, rescale_factor=1 / 64),
        generation=dataclasses.replace(whole.generation, max_new_tokens=5),
    )
    torch.manual_seed(1)
    model = MissVQA(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.06 if p.dim() > 1 else 0.1))
    return model.prepare(), Processor(config.preprocess, processor.tokenizer, config.max_question_length)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    random = np.random.default_rng(5).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    return [*(decode_image(EXAMPLES / name) for name in ("chest-xray.jpg", "brain-mri.jpg")), random]


class Alone:
    """Each question answered by itself, by an engine that keeps nothing: the truth for all mixes."""

    def __init__(self, parts: tuple[MissVQA, Processor], images: list[np.ndarray]) -> None:
        self.parts, self.images = parts, images
        self.engine = Engine(*parts, config=EngineConfig(cache_bytes=0))
        self.known = {}

    def __call__(self, asked):
        if asked not in self.known:
            image, question, way = asked
            self.known[asked] = self.engine.answer(self.images[image], QUESTIONS[question], WAYS[way])
        return self.known[asked]


@pytest.fixture(scope="module", params=[small, base], ids=["small", "base"])
def alone(request, images) -> Alone:
    return Alone(request.param(), images)


def test_answers_differ_so_that_mixing_them_up_would_show(alone):
    found = {alone((image, question, 0)).text for image in range(3) for question in range(4)}
    assert len(found) >= 4


asked_lists = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, len(QUESTIONS) - 1), st.integers(0, len(WAYS) - 1)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=4, deadline=None)
@given(asked_lists, st.integers(1, 9), st.sampled_from([0, 5_000_000, 1 << 28]), st.sampled_from([1, 2]), st.booleans())
def test_an_answer_is_its_own(alone, asked, batch_size, cache_bytes, num_threads, warm):
    """Any mix, in any order, in batches of any size, over a cache that is off, tight or large, cold or warm."""
    config = EngineConfig(answer_slots=9, question_slots=5, cache_bytes=cache_bytes, max_prefill_images=2)
    engine = Engine(*alone.parts, config=config)
    pairs = [(alone.images[image], QUESTIONS[question], WAYS[way]) for image, question, way in asked]
    wanted = [alone(one) for one in asked]
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        if warm:
            engine.answer(*pairs[0])
        found = list(engine.answer_many(pairs, batch_size=batch_size))
    finally:
        torch.set_num_threads(threads)
    for got, want in zip(found, wanted, strict=True):
        assert (got.text, got.token_ids) == (want.text, want.token_ids)
        assert got.logprob == pytest.approx(want.logprob, abs=2e-4)
        assert [a.token_ids for a in got.alternatives] == [a.token_ids for a in want.alternatives]


def test_ten_thousand_questions_in_bounded_memory(tmp_path, vocabulary):
    """In order, never more taken up ahead than two batches, one image encoded once, and nothing left over."""
    from tests.engine.answering import write_checkpoint

    engine = Engine.load(write_checkpoint(tmp_path / "tiny", vocabulary), config=EngineConfig(cache_bytes=1 << 20))
    shown = [np.random.default_rng(i).integers(0, 256, (28, 28, 3), dtype=np.uint8) for i in range(5)]
    questions, count, taken, most = ("ct", "mri", "left lung?"), 10_000, 0, 0

    def pairs():
        nonlocal taken
        for i in range(count):
            taken += 1
            yield shown[i // 50 % 5], questions[i % 3], SamplingParams(max_new_tokens=1 + i % 2, num_alternatives=0)

    want = {(i, j, k): engine.answer(shown[i], questions[j], SamplingParams(max_new_tokens=k, num_alternatives=0))
            for i in range(5) for j in range(3) for k in (1, 2)}  # fmt: skip
    given_ = 0
    for i, answer in enumerate(engine.answer_many(pairs(), batch_size=50)):
        given_ += 1
        most = max(most, taken - given_)
        assert answer.token_ids == want[i // 50 % 5, i % 3, 1 + i % 2].token_ids
    assert given_ == count and most <= 100
    stats = engine.stats
    assert stats.num_encoded_images == 5 and stats.answered == count + 30 and stats.waiting == stats.running == 0
