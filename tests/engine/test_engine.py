"""The engine from files to answers: scores, grouping by image, errors in place."""

import ast
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from miss import Engine, SamplingParams
from miss.engine.data.images import ImageError, decode_image
from miss.engine.runtime import engine as engine_file
from miss.engine.runtime.engine import CHECKPOINTS, find_checkpoint
from tests.engine.answering import write_checkpoint, write_images

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vocabulary):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", vocabulary)


@pytest.fixture
def engine(folder):
    return Engine.load(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def test_an_answer_carries_what_it_says(engine, images):
    answer = engine.answer(images[0], "is there a mass?")
    assert isinstance(answer.text, str) and answer.text == engine.processor.decode(answer.token_ids)
    assert answer.score == pytest.approx(math.exp(answer.logprob)) and 0 < answer.score <= 1
    assert len(answer.alternatives) == 2
    assert all(a.score == pytest.approx(math.exp(a.logprob)) for a in answer.alternatives)
    assert answer.finished == (answer.token_ids[-1] == engine.model.config.tokens.sep)
    *stages, total = answer.seconds.values()
    assert list(answer.seconds) == ["image", "queue", "question", "decode", "total"]
    assert min(stages) >= 0 and answer.seconds["image"] > 0 and sum(stages) == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_loaded_inside_inference_mode(folder, images, precision):
    """The weights are prepared all the same, and the answer is that of an engine that was loaded outside."""
    with torch.inference_mode():
        inside = Engine.load(folder, precision)
        answer = inside.answer(images[0], "is there a mass?")
    wanted = Engine.load(folder, precision).answer(images[0], "is there a mass?")
    assert answer.token_ids == wanted.token_ids and answer.logprob == wanted.logprob


def test_path_bytes_and_pixels_are_the_same_image(engine, images):
    ways = [images[0], str(images[0]), images[0].read_bytes(), decode_image(images[0])]
    answers = [engine.answer(way, "is there a mass?") for way in ways]
    assert len({a.logprob for a in answers}) == 1


def test_many_equal_one_by_one_and_encode_an_image_once(engine, images, monkeypatch):
    asked = [(images[i % 3], q) for i, q in enumerate(["is there a mass?", "which organ", "ct", "left lung?", "mri"])]
    seen = []
    encode = engine.model.encode_images
    monkeypatch.setattr(engine.model, "encode_images", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    together = list(engine.answer_many(asked, batch_size=5))
    assert seen == [3]
    for (image, question), got in zip(asked, together, strict=True):
        alone = engine.answer(image, question)
        assert got.token_ids == alone.token_ids and got.logprob == pytest.approx(alone.logprob, abs=1e-5)


def test_an_error_stays_with_its_own_pair(engine, images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:90])
    asked = [(images[0], "ct"), (broken, "ct"), (images[1], ""), (tmp_path / "none.png", "ct"), (images[1], "mri")]
    got = list(engine.answer_many(asked, on_error="return"))
    assert [isinstance(g, ValueError) for g in got] == [False, True, True, True, False]
    assert isinstance(got[1], ImageError) and isinstance(got[3], ImageError)
    with pytest.raises(ImageError):
        list(engine.answer_many(asked))


def test_a_cut_question_says_so(engine, images):
    answer = engine.answer(images[0], "is there a mass in the left lung of this image or a fracture or an effusion?")
    assert any("tokens" in warning for warning in answer.warnings)


def test_parameters_reach_the_search(engine, images):
    short = engine.answer(images[0], "ct", SamplingParams(max_new_tokens=1, num_alternatives=0))
    assert len(short.token_ids) == 1 and not short.alternatives
    beams = engine.answer(images[0], "ct", SamplingParams(num_beams=3))
    greedy = engine.answer(images[0], "ct")
    assert beams.logprob >= greedy.logprob - 1e-5 and len(beams.alternatives) == 2


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_lower_precision_is_close(folder, images, precision):
    exact, lower = Engine.load(folder, "fp32"), Engine.load(folder, precision)
    assert {p.dtype for p in lower.model.parameters()} == {torch.bfloat16}
    pair = (images[0], "is there a mass?", SamplingParams(max_new_tokens=1))
    assert lower.answer(*pair).logprob == pytest.approx(exact.answer(*pair).logprob, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int3"}, "accepted: auto, fp32, bf16, fp16, int8"),
        ({"device": "tpu"}, "accepted: cpu, cuda"),
        ({"path_or_name": "no-such-model"}, "no checkpoint 'no-such-model'"),
    ],
)
def test_what_cannot_be_loaded_says_why(folder, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Engine.load(**{"path_or_name": folder, **arguments})


def test_pixels_of_the_wrong_kind(engine):
    with pytest.raises(ValueError, match="wanted uint8"):
        engine.answer(np.zeros((4, 4)), "ct")


@pytest.mark.skipif(not (CHECKPOINTS / "miss-small").is_dir(), reason="the embedded checkpoint is not here")
def test_the_example_of_the_readme(monkeypatch, capsys):
    """Its six lines, run as they stand."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example, "README.md has no Python example"
    ast.parse(example[1])
    monkeypatch.chdir(ROOT)
    exec(compile(example[1], "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_a_checkpoint_is_found_by_path(folder):
    assert find_checkpoint(folder) == folder and engine_file.CHECKPOINTS.name == "checkpoints"
