"""SLAKE's and VQA-RAD's rows as label facts, on rows written here and on the real files."""

import json

import pytest

from miss.engine.data.datasets import is_validation_image, load_dataset
from miss.engine.transcap.cleaning import Cleaner
from miss.engine.transcap.labels import read_labels
from miss.engine.transcap.labels_qa import rad_facts, slake_facts
from miss.engine.transcap.sentences import captions
from tests.helpers import data_root


def slake(question, answer, kind="Abnormality", **fields):
    row = {"img_name": "x/source.jpg", "q_lang": "en", "modality": "CT", "location": "Abdomen"}
    return row | {"question": question, "answer": answer, "content_type": kind} | fields


def rad(question, answer, kind="PRES", organ="CHEST", name="a.jpg"):
    return {"image_name": name, "image_organ": organ, "question": question, "answer": answer, "question_type": kind}


@pytest.mark.parametrize(
    ("rows", "facts"),
    [
        ([("Is the liver healthy?", "No")], [("finding", "abnormal liver")]),
        ([("Is the liver healthy?", "Yes"), ("Does the liver look abnormal?", "Yes")], []),
        (
            [("Which organ is abnormal, heart or lung?", "Both")],
            [("finding", "abnormal heart"), ("finding", "abnormal lung")],
        ),
        ([("What diseases are included in the picture?", "None")], [("finding", "no disease")]),
        ([("Is this image normal?", "Yes")], [("finding", "normal")]),
        (
            [("Is this image normal?", "Yes"), ("What diseases are included in the picture?", "Liver Cancer")],
            [("finding", "liver cancer")],
        ),
        (
            [("Where is/are the abnormality located?", "Left Lung, Right")],
            [("finding", "abnormality in left lung, right")],
        ),
        ([("Where is/are the abnormality located?", "Right")], []),
        ([("How many abnormalities are there?", "3")], []),
    ],
)
def test_findings_of_slake(rows, facts):
    found = slake_facts([slake(*row) for row in rows])
    assert found == [("modality", "CT"), ("organ", "abdomen"), *facts]


def test_what_is_in_the_picture_and_what_is_not():
    rows = [slake(f"Does the picture contain {o}?", a, "Organ") for o, a in (("liver", "Yes"), ("spleen", "Yes"))]
    rows += [
        slake("Does the heart appear in this image?", "No", "Organ"),
        slake("Is there kidney in this image?", "No", "Organ"),
    ]
    expected = [("containing", "liver and spleen"), ("containing", "no heart or kidney")]
    assert slake_facts(rows)[2:] == expected
    rows += [slake("Does the picture contain heart?", "Yes", "Organ")]  # paraphrases contradict: said neither way
    assert slake_facts(rows)[2:] == [("containing", "liver and spleen"), ("containing", "no kidney")]


def test_sequence_and_plane():
    mri = {"modality": "MRI", "location": "Brain_Tissue"}
    rows = [slake("What is the mr weighting in this image?", "T2", "Modality", **mri)]
    rows += [slake("Is this a transverse plane?", "Yes", "Plane", **mri)]
    rows += [slake("Is this sagittal plane?", "No", "Plane", **mri)]
    expected = [("modality", "MRI"), ("sequence", "T2-weighted"), ("plane", "transverse"), ("organ", "brain")]
    assert slake_facts(rows) == expected
    other = slake("What is the mr weighting in this image?", "T1", "Modality", **mri)
    assert [key for key, _ in slake_facts([*rows, other])] == ["modality", "plane", "organ"]  # rows disagree


@pytest.mark.parametrize(
    ("rows", "facts"),
    [
        ([("Is/Are there a pleural effusion?", "No")], [("finding", "no pleural effusion")]),
        ([("Is there evidence of a pneumothorax", "Yes")], [("finding", "pneumothorax")]),
        ([("Is a pleural effusion present?", "No")], [("finding", "no pleural effusion")]),
        ([("Is there a pneumothorax?", "yes"), ("Is there pneumothorax present?", "no")], []),
        ([("Is the heart normal in size?", "yes", "ABN")], []),
        ([("Is the heart normal appearing?", "yes", "ABN")], [("finding", "normal heart")]),
        ([("Is there air under the left hemidiaphragm?", "no")], []),
        ([("What type of imaging does this not represent?", "ultrasound", "MODALITY")], []),
        ([("What type of image is this?", "chest x-ray", "MODALITY")], [("modality", "x-ray")]),
        ([("Is this a CT image?", "no", "MODALITY")], []),
        ([("Is this an AP or PA film?", "PA", "PLANE")], [("plane", "posteroanterior")]),
        ([("Is this a PA film?", "yes", "PLANE")], [("plane", "posteroanterior")]),
        ([("Where is the mass located?", "left hilum", "POS")], [("finding", "mass in left hilum")]),
        ([("Where is the lesion?", "in the right hilum", "POS")], [("finding", "lesion in the right hilum")]),
        (
            [("Where is the abnormality located?", "left lung", "POS"), ("Where is the mass?", "left lung", "POS")],
            [("finding", "mass in left lung")],
        ),
        (
            [
                ("What is abnormal in this image?", "left apical pneumothorax", "ABN"),
                ("Is there a tension pneumothorax?", "no"),
            ],
            [("finding", "left apical pneumothorax")],
        ),
    ],
)
def test_facts_of_vqa_rad(rows, facts):
    found = rad_facts([rad(*row) for row in rows])
    assert sorted(found) == sorted([("organ", "chest"), *facts])


def test_languages_and_validation_images_are_left_out_and_counted(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([slake("Is the liver healthy?", "No"), slake("?", "?", q_lang="zh")]))
    labels = read_labels(path)
    assert labels.num_images == 1 and labels.left_out == {"SLAKE's rows in Chinese": 1}
    names = [f"{i}.jpg" for i in range(40)]
    path.write_text(json.dumps([rad("Is there a mass?", "yes", name=name) for name in names]))
    kept = {image for s in read_labels(path).sets for image in s.images}
    assert kept == {name for name in names if not is_validation_image(name)} and len(kept) < 40


@pytest.mark.parametrize("name", ["slake", "vqa-rad"])
def test_real_rows_give_captions_that_the_cleaner_keeps_and_no_validation_image(name):
    root = data_root()
    labels = read_labels(root / name.replace("-", "_") / "train.json")
    held = {s.image_key.removeprefix(f"{name}/") for s in load_dataset(name, root, "validate")}
    images = {image for s in labels.sets for image in s.images}
    assert not images & held
    assert images == {s.image_key.removeprefix(f"{name}/") for s in load_dataset(name, root, "train")}
    unfit = [s.facts for s in labels.sets if all(Cleaner(s.facts).problems(text) for text in captions(s.facts, 3, 0))]
    assert len(unfit) <= 0.02 * len(labels.sets), unfit[:3]
