"""Label rows: MedNIST's, VQA-Med-2019's and a user's, on rows written here and on the real files."""

import json

import pytest

from miss.engine.transcap.labels import LabelError, clean_facts, read_labels
from miss.engine.transcap.vqa_med import read_answers
from tests.helpers import data_root


@pytest.fixture
def write(tmp_path):
    def call(*rows):
        path = tmp_path / "labels.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return call


def test_images_with_equal_labels_are_one_set(write):
    path = write(
        {"image": "a.png", "labels": {"modality": "CT", "organ": "chest"}},
        {"image": "b.png", "labels": {"modality": "MRI", "finding": ["left mass", "edema"], "age": 54}},
        {"image": "c.png", "labels": {"modality": "CT", "organ": "chest"}},
    )
    labels = read_labels(path)
    assert [s.images for s in labels.sets] == [["a.png", "c.png"], ["b.png"]]
    expected = (("modality", "MRI"), ("finding", "left mass"), ("finding", "edema"), ("age", "54"))
    assert labels.sets[1].facts == expected
    assert labels.sets[0].key != labels.sets[1].key and labels.num_images == 3


def test_splits_and_shared_images_are_left_out_and_counted(write):
    row = {"labels": {"organ": "chest"}}
    path = write(
        {"image": "a", "split": "train", **row},
        {"image": "b", "split": "test", **row},
        {"image": "c", "image_in_vqa_rad": True, **row},
        {"image": "d", "labels": {}},
    )
    labels = read_labels(path)
    assert [s.images for s in labels.sets] == [["a"]]
    assert sorted(labels.left_out.values()) == [1, 1, 1]
    assert read_labels(path, split="all", keep_shared=True).sets[0].images == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"image": "a", "label": "Knee"}], "no class of MedNIST"),
        ([{"image": "a", "labels": {"fracture": "no"}}], "what is the case"),
        ([{"image": "a", "labels": {"fracture": True}}], "wanted text"),
        ([{"image": "a", "labels": {"organ": "?!"}}], "wanted text"),
        ([{"image": "a", "labels": {"finding": "word " * 41}}], "41 words"),
        ([{"image": "a", "labels": ["CT"]}], "wanted an object"),
        ([{"labels": {"organ": "chest"}}], "'image'"),
        ([{"image": "a", "labels": {"organ": "chest"}}] * 2, "twice"),
        ([{"image": "a", "category": "plane", "question": "q"}], "'answer'"),
        ([{"image": "a", "label": "CXR", "split": "test"}], "--split all"),
        ([], "empty"),
    ],
)
def test_what_is_refused(write, rows, says):
    with pytest.raises(LabelError, match=says):
        read_labels(write(*rows))


def test_a_damaged_line_is_named(write, tmp_path):
    path = write({"image": "a", "labels": {"organ": "chest"}})
    path.write_text(path.read_text() + '{"image": "b"')
    with pytest.raises(LabelError, match="line 2"):
        read_labels(path)
    with pytest.raises(LabelError, match="no such file"):
        read_labels(tmp_path / "other.jsonl")


@pytest.mark.parametrize(
    ("answers", "facts"),
    [
        ([("modality", "is this a ct scan?", "no")], []),
        ([("modality", "is this a ct scan?", "yes")], [("modality", "CT")]),
        ([("modality", "was the ct scan taken with contrast?", "no")], "CT; without contrast"),
        ([("modality", "was iv contrast given to the patient?", "no")], []),
        ([("modality", "was iv contrast given to the patient?", "yes")], "with intravenous contrast"),
        ([("modality", "is this a contrast or noncontrast ct?", "contrast")], "CT; with contrast"),
        ([("modality", "is this a noncontrast mri?", "no")], []),
        ([("modality", "what is the mr weighting in this image?", "t2")], "MRI; T2-weighted"),
        ([("modality", "is this a t1 weighted image?", "yes")], "MRI; T1-weighted"),
        (
            [
                ("modality", "what was used?", "cta - ct angiography"),
                ("plane", "in what plane is this ct scan?", "axial"),
            ],
            "CT angiography; axial",
        ),
        ([("plane", "what plane is this?", "mammo - mlo")], "mediolateral oblique"),
        ([("abnormality", "is this a normal mri?", "yes")], "MRI; normal"),
        ([("abnormality", "is this image normal?", "no")], []),
        ([("abnormality", "is there an abnormality in the x-ray?", "no")], "x-ray; normal"),
        ([("abnormality", "is there an abnormality in the x-ray?", "yes")], "x-ray"),
        (
            [("abnormality", "what is abnormal in the mri?", "cyst"), ("organ", "which organ?", "breast")],
            "MRI; breast; cyst",
        ),
    ],
)
def test_answers_of_vqa_med_say_what_they_say(answers, facts):
    found = read_answers(answers)
    assert found == facts if isinstance(facts, list) else "; ".join(value for _, value in found) == facts


def test_values_are_fit_for_a_sentence():
    assert clean_facts("here", [("Body_Part", " left  hand. "), ("body part", "left hand")]) == (
        ("body part", "left hand"),
    )


@pytest.mark.parametrize(("name", "images", "sets"), [("mednist/labels", 1440, 6), ("vqa_med_2019/train", 3168, 2763)])
def test_the_real_files(name, images, sets):
    path = data_root() / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    labels = read_labels(path)
    assert (labels.num_images, len(labels.sets)) == (images, sets)
    modalities = [dict(s.facts).get("modality") for s in labels.sets]
    assert sum(m is None for m in modalities) < 0.06 * sets  # those whose only answer about it is a no
