"""Every way of choosing an answer through the engine: what it promises, alone and among others of all kinds."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.engine.data.images import decode_image
from miss.engine.runtime.config import EngineConfig
from miss.engine.runtime.engine import Engine
from miss.engine.runtime.request import InvalidRequest
from miss.engine.runtime.sampler import SamplingParams
from miss.models.vqa import MissVQA
from tests.engine.answering import write_checkpoint, write_images
from tests.helpers import ROOT

XRAY = ROOT / "examples" / "chest-xray.jpg"
SMALL = EngineConfig(answer_slots=24, question_slots=8, cache_bytes=1 << 20)
LIST = ("left lung", "right lung", "left lung mass", "brain", "yes", "no", "no mass", "ct", "mri of the brain")
WAYS = {
    "greedy": SamplingParams(),
    "beams": SamplingParams(num_beams=3),
    "sample": SamplingParams(temperature=1.3, seed=11, num_alternatives=1),
    "careful": SamplingParams(temperature=0.7, top_p=0.8, top_k=9, seed=3, num_alternatives=0),
    "constrain": SamplingParams(constrain=LIST, num_alternatives=4),
    "unjumped": SamplingParams(constrain=LIST, num_alternatives=4, jump_forward=False),
    "scored": SamplingParams(constrain=LIST, num_alternatives=4, logprob_unconstrained=True),
    "rank": SamplingParams(candidates=LIST, num_alternatives=8),
    "only": SamplingParams(constrain=("left lung",)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vocabulary):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", vocabulary)


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.load(folder, config=SMALL)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def trained():
    return Engine.load("miss-small", config=EngineConfig(answer_slots=24, question_slots=8, cache_bytes=64 << 20))


def same(one, two):
    assert (one.text, one.token_ids, one.finished) == (two.text, two.token_ids, two.finished)
    assert one.logprob == pytest.approx(two.logprob, abs=1e-4)
    assert [a.text for a in one.alternatives] == [a.text for a in two.alternatives]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(WAYS)), st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=9))
def test_an_answer_does_not_depend_on_who_chooses_otherwise_beside_it(engine, images, mix):
    questions = ["ct", "is there a mass?", "what organ is shown in this image", "left lung or right lung?"]
    asked = [(images[image], questions[question], WAYS[way]) for way, image, question in mix]
    for pair, answer in zip(asked, engine.answer_many(asked, batch_size=5), strict=True):
        same(engine.answer(*pair), answer)
    stats = engine.stats
    assert stats.running == stats.waiting == stats.answer_slots == stats.question_slots == 0
    assert stats.received == stats.answered + stats.rejected


def test_jumping_changes_nothing_but_the_work(engine, images):
    found, rows = {}, {}
    for way in ("constrain", "unjumped", "scored", "only"):
        before = engine.stats.num_decoded_rows
        found[way] = engine.answer(images[0], "is there a mass?", WAYS[way])
        rows[way] = engine.stats.num_decoded_rows - before
    same(found["constrain"], found["unjumped"])
    same(found["constrain"], found["scored"])
    assert found["constrain"].logprob_unconstrained is None
    assert found["scored"].logprob_unconstrained < found["scored"].logprob
    assert found["only"].text == "left lung" and found["only"].score == 1 and rows["only"] == 0
    assert rows["constrain"] < rows["unjumped"] == rows["scored"] == len(found["scored"].token_ids)


def test_yes_or_no_is_one_step(trained):
    before = trained.stats.num_decoded_rows
    answer = trained.answer(XRAY, "is there a fracture?", SamplingParams(constrain=("yes", "no")))
    assert trained.stats.num_decoded_rows == before + 1
    (other,) = answer.alternatives
    assert {answer.text, other.text} == {"yes", "no"} and answer.score + other.score == pytest.approx(1)
    ranked = trained.answer(XRAY, "is there a fracture?", SamplingParams(candidates=("Yes", "No")))
    assert ranked.text.lower() == answer.text and ranked.text in ("Yes", "No")


def test_ranking_on_the_trained_model_is_scoring_one_by_one(trained):
    candidates = (
        "lung",
        "lungs",
        "chest",
        "left lung",
        "right lung",
        "the lung of the left side",
        "brain",
        "yes",
        "x-ray",
    )
    params = SamplingParams(candidates=candidates, num_alternatives=len(candidates))
    answer = trained.answer(XRAY, "which organ is shown?", params)
    scores = one_by_one(trained, "which organ is shown?", candidates)
    assert [answer.text, *(a.text for a in answer.alternatives)] == sorted(candidates, key=lambda c: -scores[c])
    for found in (answer, *answer.alternatives):
        assert found.logprob == pytest.approx(scores[found.text], abs=1e-4)
        assert found.score == pytest.approx(math.exp(scores[found.text]), rel=1e-3)


@torch.inference_mode()
def one_by_one(engine, question, candidates):
    """Each candidate's log-probability, teacher-forced by itself."""
    model, processor, scores = engine.model, engine.processor, {}
    pixels = torch.from_numpy(processor.image(decode_image(XRAY)))[None]
    index, ids = torch.zeros(1, dtype=torch.int32), torch.tensor([processor.question(question)])
    states = model.encode_questions(ids, None, model.project_images(model.encode_images(pixels)), index)
    kv = model.project_questions(states)
    for candidate in candidates:
        answer = torch.tensor([processor.answer(candidate)])
        hidden = model.decoder(answer[:, :-1], kv, index, None)
        table = torch.log_softmax(model.decoder.logits(model.decoder.head(hidden)).double(), -1)[0]
        scores[candidate] = table[range(answer.shape[1] - 1), answer[0, 1:]].sum().item()
    return scores


def test_compat_ranks_the_same_in_any_batch(engine, images):
    """The original's ranking masks the padding that its generation attends to."""
    model = MissVQA(dataclasses.replace(engine.model.config, behaviour="compat"))
    model.load_state_dict(engine.model.state_dict())
    engine = Engine(model, engine.processor, config=SMALL)
    params = SamplingParams(candidates=LIST, num_alternatives=8)
    asked = [(images[0], q, params) for q in ("ct", "what organ is shown in this image?", "is there a mass")]
    for pair, answer in zip(asked, engine.answer_many(asked), strict=True):
        alone = engine.answer(*pair)
        same(alone, answer)
        scores = [answer.beam_score, *(a.beam_score for a in answer.alternatives)]
        assert scores == sorted(scores, reverse=True) and alone.beam_score == pytest.approx(answer.beam_score, abs=1e-4)


def test_a_list_that_cannot_be_served_fails_its_own_request_alone(engine, images):
    long = "left lung " * 40
    asked = [
        (images[0], "ct", SamplingParams(candidates=(long,))),
        (images[0], "ct", SamplingParams(constrain=("yes", "left lung"), max_new_tokens=2)),
        (images[0], "ct", SamplingParams(candidates=("yes", "YES", "no", "yes"))),
    ]
    first, second, third = engine.answer_many(asked, on_error="return")
    assert isinstance(first, InvalidRequest) and "accepted: up to 40" in str(first)
    assert isinstance(second, InvalidRequest) and "'left lung' has 3 tokens" in str(second)
    assert {third.text, *(a.text for a in third.alternatives)} == {"yes", "no"}
    assert any("'YES' is the same as 'yes'" in w for w in third.warnings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"candidates": ()},
        {"constrain": []},
        {"candidates": ("yes", " ")},
        {"candidates": "yes"},
        {"candidates": ("yes",), "constrain": ("no",)},
        {"candidates": ("yes",), "temperature": 1.0},
        {"constrain": ("yes",), "num_beams": 2},
        {"temperature": 1.0, "num_beams": 2},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0, "temperature": 1.0},
        {"top_k": -1, "temperature": 1.0},
        {"seed": 1},
        {"top_p": 0.5},
        {"logprob_unconstrained": True},
    ],
    ids=str,
)
def test_wrong_wishes_say_what_was_wanted(wrong):
    with pytest.raises(ValueError, match="wanted|give one"):
        SamplingParams(**wrong)
