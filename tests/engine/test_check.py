"""Duplicates, leaks between splits and sets, and the report of miss data check."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from miss.engine.data.check import check
from miss.engine.data.datasets import DataError, Sample, load_dataset
from miss.engine.data.duplicates import fingerprint, near_duplicates
from miss.engine.data.images import decode_image
from miss.engine.data.leaks import exclude_leaks
from tests.helpers import data_root


def scene(seed: int, size: int = 200) -> Image.Image:
    """A smooth random picture: what survives scaling."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def again(image: Image.Image, size: int, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    image.resize((size, size)).save(buffer, "JPEG", quality=quality)
    return decode_image(buffer.getvalue())


def test_copies_are_found_and_others_are_not() -> None:
    originals = [scene(i) for i in range(12)]
    copies = [again(originals[i], size, quality) for i, size, quality in ((3, 256, 60), (7, 90, 30), (11, 200, 95))]
    found = near_duplicates([pixels(o) for o in originals], copies)
    assert [(m.a, m.b, m.kind) for m in found] == [(3, 0, "copy"), (7, 1, "copy"), (11, 2, "copy")]
    exact = near_duplicates([pixels(originals[0])], [pixels(originals[0])])
    assert [(m.kind, m.distance) for m in exact] == [("exact", 0)]


def test_one_list_gives_each_pair_once_and_no_image_its_own_copy() -> None:
    images = [pixels(scene(i)) for i in (0, 1, 0, 2, 1)]
    assert [(m.a, m.b) for m in near_duplicates(images)] == [(0, 2), (1, 4)]
    assert near_duplicates([]) == [] and near_duplicates(images, []) == []


def test_brightness_does_not_hide_a_copy_but_a_mirror_is_another_picture() -> None:
    image = pixels(scene(5))
    darker = (image * 0.7 + 10).astype(np.uint8)
    assert [m.kind for m in near_duplicates([image], [darker])] == ["copy"]
    assert near_duplicates([image], [np.ascontiguousarray(image[:, ::-1])]) == []


def test_pictures_of_one_grey_match_only_where_equal() -> None:
    black, white = np.zeros((9, 9, 3), np.uint8), np.full((9, 9, 3), 255, np.uint8)
    assert [(m.a, m.b, m.exact) for m in near_duplicates([black, white, scene_array(1)], [black])] == [(0, 0, True)]


def scene_array(seed: int) -> np.ndarray:
    return pixels(scene(seed))


def test_many_against_many_in_blocks() -> None:
    prints = [fingerprint(pixels(scene(i, 40))) for i in range(40)]
    assert len(near_duplicates(prints * 30, prints[:5])) == 30 * 5


def sample(folder: Path, name: str, image: Image.Image, dataset: str = "jsonl", **changes: Any) -> Sample:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    values = {
        "qid": name, "image": path, "question": "q", "answer": "a", "answer_type": "open", "language": "en",
        "modality": None, "organ": None, "question_type": None, "image_key": f"{dataset}/{name}", "dataset": dataset,
    }  # fmt: skip
    return Sample(**{**values, **changes})


def test_leaks_are_excluded_across_sets_and_the_split_of_one_set_stands(tmp_path: Path) -> None:
    held_out = [sample(tmp_path, "held.png", scene(1), "slake")]
    copy = scene(1).resize((90, 90))
    train = [
        sample(tmp_path, "other.png", scene(2), "vqa-med-2019"),
        sample(tmp_path, "copy.png", copy, "vqa-med-2019"),
        sample(tmp_path, "marked.png", scene(3), "vqa-med-2019", also_in=("slake",)),
        sample(tmp_path, "elsewhere.png", scene(4), "vqa-med-2019", also_in=("vqa-rad",)),
        sample(tmp_path, "neighbour.png", copy, "slake"),
        sample(tmp_path, "equal.png", scene(1), "slake"),
        sample(tmp_path, "held.png", scene(1), "slake", language="zh"),
    ]
    kept, report = exclude_leaks(train, held_out)
    assert [s.qid for s in kept] == ["other.png", "elsewhere.png", "neighbour.png"]
    assert {leak.image_key: leak.kind for leak in report.leaks} == {
        "vqa-med-2019/copy.png": "copy",
        "vqa-med-2019/marked.png": "marked",
        "slake/equal.png": "exact",
        "slake/held.png": "same",
    }
    assert report.num_samples == 7 and report.num_kept == 3
    assert str(report) == "4 of 7 samples left out (1 copy, 1 exact, 1 marked, 1 same images)"


def test_kin_bind_other_sets_alone(tmp_path: Path) -> None:
    held_out = [sample(tmp_path, "held.png", scene(1), "vqa-rad")]
    kin = [*held_out, sample(tmp_path, "train.png", scene(2), "vqa-rad")]
    train = [kin[1], sample(tmp_path, "copy.png", scene(2).resize((80, 80)), "vqa-med-2019")]
    kept, _ = exclude_leaks(train, held_out, kin)
    assert [s.qid for s in kept] == ["train.png"]
    assert exclude_leaks(train, [])[0] == train


def rows(tmp_path: Path, split: str, content: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps({"question": "is it?", "answer": "yes", **row}) + "\n" for row in content)
    (tmp_path / f"{split}.jsonl").write_text(text)


def test_a_clean_set_has_no_errors(tmp_path: Path) -> None:
    for i in range(3):
        scene(i).save(tmp_path / f"{i}.png")
    rows(tmp_path, "train", [{"image": "0.png", "answer": "a b c"}, {"image": "1.png", "answer_type": "closed"}])
    rows(tmp_path, "validate", [{"image": "2.png", "answer_type": "open"}])
    report = check(["jsonl"], tmp_path)
    assert report.errors == [] and report.warnings == []
    train, validate = report.facts["splits"]
    assert (train["split"], train["samples"], train["images"], train["closed"], train["untyped"]) == (
        "train", 2, 2, 1, 1
    )  # fmt: skip
    assert train["answer_words"] == {"1": 1, "3": 1} and validate["open"] == 1
    json.dumps(report.to_dict())


def test_everything_that_is_wrong_is_found_in_one_go(tmp_path: Path) -> None:
    for i in range(4):
        scene(i).save(tmp_path / f"{i}.png")
    scene(0).resize((120, 120)).save(tmp_path / "copy.png")
    (tmp_path / "equal.png").write_bytes((tmp_path / "1.png").read_bytes())
    (tmp_path / "cut.png").write_bytes((tmp_path / "2.png").read_bytes()[:500])
    rows(
        tmp_path,
        "train",
        [
            *({"image": f"{i}.png", "qid": f"t{i}"} for i in range(4)),
            {"image": "cut.png", "qid": "cut"},
            {"image": "missing.png", "qid": "gone"},
            {"image": "../up.png", "qid": "up"},
            {"image": "3.png", "qid": "t3"},
            {"image": "3.png", "qid": "nothing", "answer": ""},
        ],
    )
    rows(tmp_path, "validate", [{"image": name, "qid": name} for name in ("copy.png", "equal.png", "3.png")])
    report = check(["jsonl"], tmp_path)
    text = "\n".join(report.errors)
    for part in ("missing.png", "..", "more than once: t3", "cut.png: the PNG file ends early"):
        assert part in text
    assert "jsonl/1.png (train) and jsonl/equal.png (validate) are the same image" in text
    assert "jsonl/3.png (train) and jsonl/3.png (validate) are the same image" in text
    assert len(report.errors) == 6
    assert {(p["a"], p["b"], p["kind"]) for p in report.facts["shared_by_splits"]} == {
        ("jsonl/0.png", "jsonl/copy.png", "copy"),
        ("jsonl/1.png", "jsonl/equal.png", "exact"),
        ("jsonl/3.png", "jsonl/3.png", "same"),
    }
    assert [u["reason"] for u in report.facts["undecodable"]] == ["truncated"]
    assert any("1 answers are empty" in w for w in report.warnings)
    assert any("all but equal" in w for w in report.warnings)
    exact_only = check(["jsonl"], tmp_path, perceptual=False)
    assert {p["kind"] for p in exact_only.facts["shared_by_splits"]} == {"exact", "same"}


def test_a_folder_without_the_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no test split of slake"):
        check(["slake"], tmp_path)


def test_the_publisher_s_marks_agree_with_the_eye() -> None:
    """VQA-Med-2019 marks 38 of these images as being in VQA-RAD; every one is found without the mark."""
    root = data_root()
    med = {s.image_key: s for s in load_dataset("vqa-med-2019", root, "all")}
    rad = {s.image_key: s for s in load_dataset("vqa-rad", root, "all")}
    marked = [s for s in med.values() if s.also_in][::3]
    others = [s for s in med.values() if not s.also_in][::300]
    twins = [rad["vqa-rad/" + s.image_key.split("/")[1]] for s in marked]
    left = [fingerprint(decode_image(s.image)) for s in (*marked, *others)]
    found = near_duplicates(left, [fingerprint(decode_image(s.image)) for s in twins])
    assert {(m.a, m.b) for m in found if m.kind == "copy"} == {(i, i) for i in range(len(marked))}
