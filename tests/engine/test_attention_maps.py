"""Where the model looked: probabilities that are those of the answering path, maps that add up, and their picture."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from miss.engine.data.images import decode_image
from miss.engine.runtime.attention_maps import attention_maps, draw, last_half
from miss.engine.runtime.engine import Engine
from miss.kernels.cross_attention import KV, cross_attention, probabilities
from miss.models.looking import look
from tests.engine.answering import write_checkpoint
from tests.helpers import ROOT

XRAY = ROOT / "examples" / "chest-xray.jpg"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_probabilities_are_the_softmax_that_cross_attention_applies(dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 5, 2, 32).to(dtype), torch.randn(2, 7, 2, 32).to(dtype), torch.randn(2, 7, 2, 32).to(dtype)
    index, lengths = torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([7, 4], dtype=torch.int32)
    p = probabilities(q, k, index, lengths)
    assert p.shape == (3, 2, 5, 7) and not p[1:, :, :, 4:].any()
    assert_close(p.sum(-1), torch.ones_like(p[..., 0]))
    scores = torch.einsum("rthd,rnhd->rhtn", q.to(p.dtype), k[index.long()].to(p.dtype)) / 32**0.5
    assert_close(p[0], torch.softmax(scores[0], -1))
    assert_close(p[1:, ..., :4], torch.softmax(scores[1:, ..., :4], -1))
    mixed = torch.einsum("rhtn,rnhd->rthd", p, v[index.long()].to(p.dtype))
    close = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {}
    assert_close(mixed.to(dtype), cross_attention(q, KV(k, v), index, lengths), **close)
    assert not probabilities(q[:1], k, index[:1], torch.zeros(2, dtype=torch.int32)).any()
    with pytest.raises(ValueError, match="wanted"):
        probabilities(q, k[..., :8], index)


@pytest.fixture(scope="module")
def engine():
    return Engine.load("miss-small")


@pytest.fixture(scope="module")
def seen(engine):
    answer = engine.answer(XRAY, "which organ is shown?")
    pixels = engine.processor.image(decode_image(XRAY))
    ids = engine.processor.question("which organ is shown?")
    return answer, ids, attention_maps(engine.model, engine.processor, pixels, ids, answer.token_ids)


def test_maps_of_a_real_answer(engine, seen):
    answer, ids, maps = seen
    tokens = len(answer.token_ids)
    assert maps.maps.shape == (tokens, 16, 16) and maps.of_question.shape == (tokens, len(ids))
    assert maps.tokens[-1] == "(end)" and maps.question_tokens[0] == "[ENC]" and len(maps.question_tokens) == len(ids)
    assert np.allclose(maps.maps.sum((1, 2)) + maps.elsewhere, 1, atol=1e-5) and maps.maps.min() >= 0
    assert np.allclose(maps.of_question.sum(1), 1, atol=1e-5)
    assert (maps.maps.max((1, 2)) > 2 * maps.maps.mean((1, 2))).all()  # it looks somewhere


def test_the_path_beside_gives_the_answering_paths_states(engine):
    model, ids = engine.model, torch.tensor([engine.processor.question("is there a fracture?")])
    pixels = torch.from_numpy(engine.processor.image(decode_image(XRAY)))[None]
    with torch.inference_mode():
        kv = model.project_images(model.encode_images(pixels))
        index = torch.zeros(1, dtype=torch.int32)
        states, seen = look(model.encoder, ids, kv, [0])
        assert_close(states, model.encode_questions(ids, None, kv, index))
        assert seen.shape == (ids.shape[1], kv[0].k.shape[1])
        question_kv, answer = model.project_questions(states), torch.tensor([[model.config.tokens.dec, 2053]])
        assert_close(look(model.decoder, answer, question_kv, [0])[0], model.decoder(answer, question_kv, index, None))


def test_a_map_follows_what_is_looked_at(tmp_path, vocabulary):
    """A patch whose keys agree with every query: the map must point there, wherever it is."""
    engine = Engine.load(write_checkpoint(tmp_path / "tiny", vocabulary))
    model, processor = engine.model, engine.processor
    ids, answer = processor.question("is there a mass?"), processor.answer("no")[1:]
    looking = [model.encoder.layers[i].cross_attention for i in last_half(model.config.encoder.num_layers)]
    with torch.no_grad():
        for layer in looking:
            layer.query.weight.zero_()  # every query is the bias
    project, found = model.project_images, []
    for patch in (0, 3):

        def pointed(tokens, patch=patch):
            kv = project(tokens)
            for layer, source in zip(looking, kv[-len(looking) :], strict=True):
                source.k.zero_()
                source.k[:, 1 + patch] = 1000 * layer.query.bias.unflatten(0, (layer.num_heads, -1))
            return kv

        model.project_images = pointed
        maps = attention_maps(model, processor, processor.blank, ids, answer)
        found.append(maps.maps.reshape(len(answer), -1).argmax(1).tolist())
    assert found == [[0] * len(answer), [3] * len(answer)]


def test_the_picture(seen, tmp_path):
    pytest.importorskip("matplotlib")
    answer, _, maps = seen
    wide = np.random.default_rng(0).integers(0, 256, (60, 200, 3), dtype=np.uint8)
    for name, image in (("xray.png", decode_image(XRAY)), ("wide.png", wide)):
        draw(maps, image, tmp_path / name, "costs $5 or $6?", answer.text)
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 150
            assert np.asarray(picture.convert("RGB")).std() > 10


def test_what_is_missing_is_said(seen, tmp_path, monkeypatch, engine):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"miss-engine\[evaluate\]"):
        draw(seen[2], np.zeros((8, 8, 3), np.uint8), tmp_path / "x.png", "q", "a")
    with pytest.raises(ValueError, match="at least one token"):
        attention_maps(engine.model, engine.processor, engine.processor.blank, [1, 2], [])
