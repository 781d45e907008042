"""The cleaner: what the labels do not say is found wherever it is planted, and every template caption passes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.engine.transcap.cleaning import Cleaner, is_same, tidy
from miss.engine.transcap.labels import clean_facts, read_labels
from miss.engine.transcap.sentences import ORGANS, captions
from miss.engine.transcap.vocabulary import concepts, mentions, stem, words
from miss.engine.transcap.vqa_med import MODALITIES, PLANES
from tests.helpers import data_root

SIDES, NEGATIONS = ("left", "right", "bilateral"), ("no", "without", "absent", "not", "never")
FINDINGS = ("pleural effusion", "rib fracture", "cyst", "pneumothorax", "mass", "glioblastoma", "normal", "no fracture")
PLAIN_ORGANS = ("chest", "brain", "knee", "hand", "liver", "abdomen", "spine", "breast", "kidney")
ORGANS_KNOWN = [c for c in concepts().values() if c.kind == "organ"]
MODALITY_NAMES = sorted({value for pairs in MODALITIES.values() for key, value in pairs if key == "modality"})


@st.composite
def label_sets(draw):
    """Facts as they come from label files: any of them may be missing, but not all."""
    pairs = [("modality", draw(st.sampled_from(MODALITY_NAMES)))] if draw(st.booleans()) else []
    pairs += [("plane", draw(st.sampled_from([*PLANES.values(), "axial"])))] if draw(st.booleans()) else []
    pairs += [("organ", draw(st.sampled_from([*ORGANS, *PLAIN_ORGANS])))]
    if draw(st.booleans()):
        finding = draw(st.sampled_from(FINDINGS))
        sided = draw(st.booleans()) and finding not in ("normal", "no fracture")
        pairs += [("finding", f"{draw(st.sampled_from(SIDES))} {finding}" if sided else finding)]
    return clean_facts("here", pairs)


def said_kinds(facts, kind):
    found = [m for _, value in facts for m in mentions(value) if m.concept and m.concept.kind == kind]
    return {m.name for m in found} | {name for m in found for name in m.concept.allows}


def plant(caption, word, seed):
    """The caption with a word at a random place behind the first word."""
    parts = caption.rstrip(".").split()
    at = random.Random(seed).randint(1, len(parts))
    return " ".join([*parts[:at], word, *parts[at:]]) + "."


@given(label_sets(), st.integers(0, 2**31))
def test_every_template_caption_passes(facts, seed):
    found = captions(facts, 8, seed)
    cleaner = Cleaner(facts)
    assert len(found) == 8
    assert {text: cleaner.problems(text) for text in found} == {text: [] for text in found}


@given(label_sets(), st.sampled_from(SIDES), st.integers(0, 2**31))
def test_a_side_that_no_label_has_is_rejected(facts, side, seed):
    if stem(side) not in said_kinds(facts, "side"):
        assert Cleaner(facts).problems(plant(captions(facts, 1, seed)[0], side, seed))


@given(label_sets(), st.integers(0, 2**31))
def test_an_exchanged_side_is_rejected(facts, seed):
    caption, other = captions(facts, 1, seed)[0], {"left": "right", "right": "left"}
    changed = " ".join(other.get(word, word) for word in caption.split())
    if changed != caption:
        rules = {p.rule for p in Cleaner(facts).problems(changed)}
        assert {"side", "missing"} <= rules


@given(label_sets(), st.sampled_from(NEGATIONS), st.integers(0, 2**31))
def test_a_negation_that_no_label_has_is_rejected(facts, negation, seed):
    if not any("no" in words(value) for _, value in facts):
        assert Cleaner(facts).problems(plant(captions(facts, 1, seed)[0], negation, seed))


@given(label_sets(), st.sampled_from(ORGANS_KNOWN), st.integers(0, 2**31))
def test_another_organ_is_rejected(facts, organ, seed):
    if organ.name in said_kinds(facts, "organ"):
        return
    for phrase in organ.phrases:
        planted = plant(captions(facts, 1, seed)[0], " ".join(phrase), seed)
        assert Cleaner(facts).problems(planted), planted


@given(
    label_sets(), st.sampled_from([c for c in concepts().values() if c.kind in ("modality", "finding", "sex", "age")])
)
def test_another_modality_finding_sex_or_age_is_rejected(facts, concept):
    if concept.name in {n for kind in ("modality", "finding", "plane") for n in said_kinds(facts, kind)}:
        return
    for phrase in concept.phrases:
        assert Cleaner(facts).problems(plant(captions(facts, 1, 0)[0], " ".join(phrase), 1)), phrase


@given(label_sets(), st.from_regex(r"[a-z]{5,12}", fullmatch=True), st.integers(0, 2**31))
def test_a_word_that_nobody_knows_is_rejected(facts, word, seed):
    cleaner = Cleaner(facts)
    if stem(word) not in cleaner.open_words | cleaner.supported:
        assert cleaner.problems(plant(captions(facts, 1, seed)[0], word, seed))


@given(label_sets(), st.integers(0, 2**31))
def test_a_caption_that_leaves_a_label_out_is_rejected(facts, seed):
    for left_out in range(len(facts)):
        rest = facts[:left_out] + facts[left_out + 1 :]
        own = {m.name for m in mentions(facts[left_out][1])}
        if rest and not own & {m.name for _, value in rest for m in mentions(value)}:
            found = Cleaner(facts).problems(captions(rest, 1, seed)[0])
            assert any(p.rule == "missing" for p in found), captions(rest, 1, seed)[0]


CHEST = (("modality", "CT"), ("organ", "chest"))
TWO_SIDES = (("finding", "left effusion"), ("finding", "right mass"))
DENIED = (("modality", "x-ray"), ("organ", "hand"), ("finding", "no fracture"))


@pytest.mark.parametrize(
    ("facts", "caption"),
    [
        (CHEST, "A chest CT."),
        (CHEST, "Thoracic computed tomography, shown here."),
        (CHEST, "The thorax is seen on this CT scan of a patient."),
        ((("modality", "MRI"), ("organ", "skull and contents")), "MR image of the brain."),
        ((("modality", "CT"), ("organ", "lung, mediastinum, pleura")), "CT of the chest."),
        (
            (("organ", "brain"), ("abnormality", "arteriovenous malformation (avm)")),
            "Brain with AVM, an arteriovenous malformation.",
        ),
        ((("organ", "brain"), ("abnormality", "normal")), "No abnormality of the brain is seen."),
        ((("modality", "CT"), ("technique", "with intravenous contrast")), "CT image with IV contrast."),
        (TWO_SIDES, "Left effusion and right mass are shown."),
        (TWO_SIDES, "A mass on the right, an effusion on the left."),
        (DENIED, "X-ray of the hand showing no fracture."),
        (DENIED, "Hand x-ray in which a fracture is absent."),
    ],
)
def test_what_is_kept(facts, caption):
    assert Cleaner(facts).problems(tidy(caption)) == []


@pytest.mark.parametrize(
    ("facts", "caption", "rule"),
    [
        (CHEST, "A CT of the chest and the liver.", "organ"),
        (CHEST, "A CT scan of the lungs in the chest.", "organ"),
        (CHEST, "An MRI and CT of the chest.", "modality"),
        (CHEST, "An axial CT of the chest.", "plane"),
        (CHEST, "A chest CT with contrast.", "technique"),
        (CHEST, "A chest CT with a nodule.", "finding"),
        (CHEST, "A normal chest CT.", "normality"),
        (CHEST, "A chest CT without any change.", "negation"),
        (CHEST, "A possible chest CT.", "hedge"),
        (CHEST, "A chest CT of a woman.", "sex"),
        (CHEST, "A chest CT of an elderly patient.", "age"),
        (CHEST, "A chest CT of 3 patients.", "number"),
        (CHEST, "A severe chest CT.", "unsupported"),
        (CHEST, "A CT scan.", "missing"),
        (CHEST, "Chest.", "short"),
        (CHEST, "A chest CT " + "of the image " * 9, "long"),
        (CHEST, "A chest chest CT.", "repeats"),
        (CHEST, "A CT scan of the chest in a CT scan.", "repeats"),
        (CHEST, "Is this a chest CT?", "form"),
        (CHEST, "A chest CT. It is shown.", "form"),
        (CHEST, "", "short"),
        ((("technique", "with contrast"), ("modality", "CT")), "CT without contrast.", "technique"),
        ((("technique", "without contrast"), ("modality", "CT")), "CT with contrast.", "technique"),
        (TWO_SIDES, "Right effusion and left mass are shown.", "side"),
        (TWO_SIDES, "An effusion on the right, a mass on the left.", "side"),
        (DENIED, "X-ray of the hand showing a fracture.", "missing"),
        (DENIED, "A fracture in a picture of an image, an x-ray, and no hand.", "negation"),
        ((("abnormality", "non-hodgkin lymphoma"),), "An image with no hodgkin lymphoma.", "negation"),
        ((("finding", "fracture (left)"),), "An image of a fracture.", "missing"),
    ],
)
def test_what_is_rejected_and_why(facts, caption, rule):
    assert rule in {p.rule for p in Cleaner(facts).problems(tidy(caption))}


def test_near_duplicates():
    assert is_same("A CT of the chest.", "A CT of a chest.") is False
    assert is_same("This is a CT scan of the chest of a patient.", "This is a CT scan of the chest of the patient.")
    assert is_same("A chest x-ray.", "a chest X ray") and not is_same("A chest CT.", "CT scan showing the chest.")


@given(st.text(max_size=80))
def test_any_text_is_judged(text):
    assert isinstance(Cleaner(CHEST).problems(tidy(text)), list)


@settings(max_examples=50)
@given(st.text(min_size=1, max_size=30).filter(words), st.integers(0, 99))
def test_whatever_a_label_says_its_captions_can_be_judged(value, seed):
    (facts,) = [clean_facts("here", [("organ", "chest"), ("finding", value)])]
    for text in captions(facts, 3, seed):
        assert not [p for p in Cleaner(facts).problems(text) if p.rule == "unsupported"]


def test_phrases_belong_to_one_concept():
    seen = {}
    for concept in concepts().values():
        for phrase in concept.phrases:
            assert seen.setdefault(phrase, concept.name) == concept.name, phrase


@pytest.mark.parametrize("name", ["mednist/labels", "vqa_med_2019/train"])
def test_templates_of_the_real_label_sets_pass(name):
    path = data_root() / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    for label_set in read_labels(path).sets[::9]:
        cleaner = Cleaner(label_set.facts)
        for text in captions(label_set.facts, 3, 1):
            assert not cleaner.problems(text), (label_set.facts, text)
