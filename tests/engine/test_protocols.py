"""The normaliser's golden answers, and the protocols against slow readings of their definitions."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.engine.evaluation.protocols import (
    answer_type,
    bleu1,
    contains,
    exact_match,
    judge,
    literal_yes_no,
    normalise,
    token_recall_f1,
    tokens,
)

GOLDEN = {
    "Yes": "yes",
    " YES. ": "yes",
    "yeah": "yes",
    "Yes, it is.": "yes",
    "No, there isn't": "no",
    "no there is not": "no",
    "Nope!": "no",
    "true": "yes",
    "Yes, in the left lung": "yes in left lung",
    "Yes, there isn't": "yes there isnt",
    "not sure": "not sure",
    "normal": "normal",
    "The Left Lung": "left lung",
    "X-Ray": "x ray",
    "x - ray": "x ray",
    "Xray - plain film": "xray plain film",
    "MRI/FLAIR": "mri flair",
    "Small Bowel,Rectum,Colon": "small bowel rectum colon",
    "Small bowel, rectum , colon.": "small bowel rectum colon",
    "Two": "2",
    "none": "0",
    "zero": "0",
    "twenty-one": "21",
    "ninety nine lesions": "99 lesions",
    "twenty ten": "20 10",
    "Someone": "someone",
    "6.5 x 6.2 x 8.8cm": "6.5 x 6.2 x 8.8cm",
    "6. 5 cm": "6.5 cm",
    ".5 cm": ".5 cm",
    "1,000": "1000",
    "1,2": "1 2",
    "5 %": "5%",
    "<5 cm": "<5 cm",
    "no.5": "no 5",
    "superficial to the patient's skin": "superficial to patients skin",
    "superficial to the patient ' s skin": "superficial to patients skin",
    "the body\u2019s 'left' side": "bodys left side",
    "\uff23\uff34": "ct",
    "cm\u00b2": "cm2",
    "caf\u0065\u0301": "caf\u00e9",
    "\u4e24\u4e2a\uff0c\u5de6": "\u4e24\u4e2a \u5de6",
    "a": "a",
    "The": "the",
    "?": "?",
    "...": "...",
    "": "",
    "  \n ": "",
}


@pytest.mark.parametrize(("text", "wanted"), GOLDEN.items())
def test_golden(text, wanted):
    assert normalise(text) == wanted


@settings(max_examples=400)
@given(st.text(max_size=30) | st.text("aetwonyis .,'-%0159\u2019\u0130\u0301", max_size=20))
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


def test_punctuation_alone_matches_only_itself():
    assert not exact_match("?", ".")
    assert exact_match("?", " ? ")


def test_answer_type_falls_back_to_yes_and_no():
    assert answer_type(None, "Yes") == "closed"
    assert answer_type(None, "left") == "open"
    assert answer_type("open", "Yes") == "open"
    assert answer_type("closed", "left") == "closed"


def test_the_originals_rule_is_literal():
    assert [literal_yes_no(t) for t in ("yes", "Yes", "no", "No")] == ["yes", "yes", "no", "no"]
    # VQA-RAD has 'YES'; the original's script calls it open, and a prediction 'YES' wrong.
    assert [literal_yes_no(t) for t in ("YES", "yes.", "No ", "none", "people")] == [None] * 5
    assert judge("Yes", "yes").original
    assert not judge("YES", "yes").original and judge("YES", "yes").exact
    assert judge("the lung", "Lung").original, "open rows: exact match"


def test_containment():
    assert contains("Yes, there is a mass", "yes")
    assert not contains("normal", "no"), "whole words"
    assert not contains("yes and no", "no"), "both is neither"
    assert contains("the CT scan", "ct")
    assert not contains("lung left", "left lung"), "one run, in order"
    assert not contains("", "no")


def slow_overlap(ours, truth):
    """Cross out, one by one, the truth's tokens that the prediction has."""
    left, num = list(truth), 0
    for token in ours:
        if token in left:
            left.remove(token)
            num += 1
    return num


WORDS = st.lists(st.sampled_from("left right lung liver mass the ct 5 no".split()), max_size=6).map(" ".join)


@given(WORDS, WORDS)
def test_recall_f1_and_bleu_by_their_definitions(prediction, answer):
    ours, truth = tokens(prediction), tokens(answer)
    num = slow_overlap(ours, truth)
    recall, f1 = token_recall_f1(prediction, answer)
    if not num:
        assert (recall, f1, bleu1(prediction, answer)) == (0, 0, 0)
        return
    precision = num / len(ours)
    assert recall == pytest.approx(num / len(truth))
    assert f1 == pytest.approx(2 * precision * recall / (precision + recall))
    penalty = 1.0 if len(ours) > len(truth) else math.exp(1 - len(truth) / len(ours))
    assert bleu1(prediction, answer) == pytest.approx(precision * penalty)


@given(WORDS, WORDS)
def test_bleu1_is_sacrebleus_sentence_bleu(prediction, answer):
    from sacrebleu.metrics import BLEU

    ours, truth = " ".join(tokens(prediction)), " ".join(tokens(answer))
    theirs = BLEU(max_ngram_order=1, tokenize="none", smooth_method="none", effective_order=False)
    wanted = theirs.sentence_score(ours, [truth]).score / 100 if truth and ours else 0.0
    assert bleu1(prediction, answer) == pytest.approx(wanted)


def test_repeating_a_right_word_gains_nothing():
    assert token_recall_f1("left left left left", "left upper lobe")[0] == pytest.approx(1 / 3)


def test_chinese_counts_by_character():
    assert tokens("\u5de6\u80ba CT") == ["\u5de6", "\u80ba", "ct"]
    assert token_recall_f1("\u5de6\u4fa7", "\u5de6\u80ba")[0] == 0.5
