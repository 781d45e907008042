"""Figures of captions against values worked out by hand and against sacreBLEU."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miss.engine.transcap.measure import bleu, distinct, measure, self_bleu
from miss.engine.transcap.writer import number

WORDS = st.lists(st.sampled_from("a ct mri of the chest hand shows".split()), min_size=1, max_size=9)


def test_distinct_by_hand():
    assert distinct(["a b a", "A b."], 1) == pytest.approx(2 / 5)
    assert distinct(["a b a", "a b"], 2) == pytest.approx(2 / 3, abs=1e-4)  # ab ba ab: two of three
    assert distinct([], 1) is None and distinct(["word"], 2) is None


def test_bleu_by_hand():
    assert bleu("a b c d".split(), ["a b c d".split()]) == pytest.approx(1.0)
    assert bleu("x y".split(), ["a b".split()]) == 0.0
    # 1-grams 3/4, 2-grams 1/3, 3-grams none: 1/2 of 2, 4-grams none: 1/4 of 1; equal length
    expected = (3 / 4 * 1 / 3 * (1 / 2) / 2 * (1 / 4) / 1) ** 0.25
    assert bleu("a b x c".split(), ["a b c d".split()]) == pytest.approx(expected)
    assert bleu("a b".split(), ["a b c d".split()]) == pytest.approx(math.exp(1 - 4 / 2))


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_bleu_is_sacrebleus(text, others):
    from sacrebleu.metrics import BLEU

    theirs = BLEU(tokenize="none", effective_order=True, smooth_method="exp")
    expected = theirs.sentence_score(" ".join(text), [" ".join(other) for other in others]).score / 100
    assert bleu(text, others) == pytest.approx(expected, abs=1e-6)


def test_self_bleu_is_high_where_captions_are_alike():
    assert self_bleu([["one two three four"] * 3]) == 1.0
    assert self_bleu([["one two three four", "five six seven eight"]]) == 0.0
    assert self_bleu([["alone"]]) is None


def test_a_report_by_hand():
    records = [
        {
            "candidates": 4,
            "captions": [{"text": "a b"}, {"text": "c d", "filled": True}],
            "rejected": [{"why": ["missing: x", "organ: y"]}, {"why": ["same: z"]}],
            "tokens": {"read": 5},
        }
    ]
    found = measure(records, 2.0, "local")
    assert (found["kept"], found["filled"], found["rejected_share"]) == (1, 1, 0.5)
    assert found["fidelity"] == {"states_every_label": 0.75, "states_nothing_else": 0.75, "faithful": 0.75}
    assert found["captions_per_second"] == 0.5 and found["rejected_by_rule"] == {"missing": 1, "organ": 1, "same": 1}


def test_numbers_are_the_same_everywhere():
    assert number(0, "a") == number(0, "a") != number(1, "a")
    assert 0 <= number(3, "b", 4) < 2**63 and number(0, "ab", "c") != number(0, "a", "bc")
