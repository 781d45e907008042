"""Readers: N records in, N samples out; official layouts from any folder; manifests that try to leave theirs."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from miss.engine.data.datasets import DataError, Sample, is_validation_image, load_dataset, resolve_data_root
from miss.engine.data.paths import PathError, safe_path
from tests.helpers import data_root


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(np.kron(values, np.ones((8, 8, 1), np.uint8))).save(path)


def slake_row(qid: int, image: int, language: str = "en", **changes: Any) -> dict[str, Any]:
    row = {
        "img_id": image, "img_name": f"xmlab{image}/source.jpg", "question": "What modality?", "answer": "MRI",
        "q_lang": language, "location": "Abdomen", "modality": "MRI", "answer_type": "OPEN", "base_type": "vqa",
        "content_type": "Modality", "triple": ["vhead", "_", "_"], "qid": qid,
    }  # fmt: skip
    return {**row, **changes}


def rad_row(qid: int, image: str, **changes: Any) -> dict[str, Any]:
    row = {
        "qid": qid, "image_name": image, "image_organ": "HEAD", "answer": "Yes", "answer_type": "CLOSED",
        "question_type": "PRES", "question": "Is it normal?", "phrase_type": "freeform",
    }  # fmt: skip
    return {**row, **changes}


def write_slake(folder: Path, images: str = "images") -> None:
    for image in range(4):
        picture(folder / images / f"xmlab{image}" / "source.jpg", image)
    rows = [slake_row(i, i % 3, "zh" if i % 4 == 3 else "en") for i in range(12)]
    (folder / "train.json").write_text(json.dumps(rows), "utf-8")
    (folder / "validate.json").write_text(json.dumps([slake_row(100, 3, answer="  Left Lung ")]), "utf-8")
    (folder / "test.json").write_text(json.dumps([slake_row(200, 3, answer_type="CLOSED")]), "utf-8")


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), "utf-8")
    return path


# --- SLAKE


@pytest.mark.parametrize("images", ["images", "imgs"])
def test_slake_by_language_from_its_own_folder_and_from_its_parent(tmp_path: Path, images: str) -> None:
    folder = tmp_path / "slake"
    folder.mkdir()
    write_slake(folder, images)
    for root in (folder, tmp_path):
        assert len(load_dataset("slake", root, "train")) == 9
        assert len(load_dataset("slake", root, "train", "zh")) == 3
        assert len(load_dataset("slake", root, "train", "all")) == 12
        assert [s.qid for s in load_dataset("slake", root, "all", "all")] == [*map(str, range(12)), "100"]
    (sample,) = load_dataset("slake", folder, "validate")
    assert (sample.answer, sample.modality, sample.organ, sample.question_type) == (
        "Left Lung", "MRI", "Abdomen", "Modality"
    )  # fmt: skip
    assert sample.image.is_file() and sample.image_key == "slake/xmlab3/source.jpg"  # type: ignore[union-attr]
    (sample,) = load_dataset("slake", folder, "test")
    assert sample.answer_type == "closed" and sample.dataset == "slake" and sample.language == "en"
    assert load_dataset("slake", folder, "val") == load_dataset("slake", folder, "validation")


def test_a_missing_split_names_the_files_that_were_looked_for(tmp_path: Path) -> None:
    write_slake(tmp_path)
    (tmp_path / "test.json").unlink()
    with pytest.raises(DataError, match=r"no test split of slake .*test\.json"):
        load_dataset("slake", tmp_path, "test")
    with pytest.raises(DataError, match=r"test\.jsonl"):
        load_dataset("vqa-med-2019", tmp_path, "test")


def test_a_parent_folder_with_another_set_s_manifest_is_not_mistaken(tmp_path: Path) -> None:
    (tmp_path / "vqa_rad").mkdir()
    picture(tmp_path / "vqa_rad" / "images" / "a.jpg")
    (tmp_path / "vqa_rad" / "test.json").write_text(json.dumps([rad_row(1, "a.jpg")]))
    (tmp_path / "test.json").write_text("[]")
    assert len(load_dataset("vqa-rad", tmp_path, "test")) == 1


# --- VQA-RAD


def test_vqa_rad_s_oddities(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / "images" / name)
    rows = [
        rad_row(1, "a.jpg", answer_type="CLOSED "),
        rad_row(2, "b.jpg", answer=5, answer_type="OPEN"),
        rad_row(3, "b.jpg", question_type="PRES, ABN"),
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    samples = load_dataset("vqa-rad", tmp_path, "test")
    assert [s.answer_type for s in samples] == ["closed", "open", "closed"]
    assert samples[1].answer == "5" and samples[0].organ == "HEAD" and samples[2].question_type == "PRES, ABN"


def test_vqa_rad_s_validation_is_by_image_and_fixed(tmp_path: Path) -> None:
    names = [f"synpic{i}.jpg" for i in range(200)]
    for name in names:
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"not decoded here")
    rows = [rad_row(2 * i + k, name) for i, name in enumerate(names) for k in range(2)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    train, validate, everything = (load_dataset("vqa-rad", tmp_path, s) for s in ("train", "validate", "all"))
    assert len(train) + len(validate) == len(everything) == 400
    assert not {s.image_key for s in train} & {s.image_key for s in validate}
    assert 10 <= len({s.image_key for s in validate}) <= 32
    # The rule is part of every figure that is reported on this split, so it may never change.
    assert [n for n in names[:40] if is_validation_image(n)] == _VALIDATION


_VALIDATION = ["synpic1.jpg", "synpic35.jpg"]


# --- VQA-Med-2019 and plain JSON lines


def test_vqa_med_has_no_answer_type(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.jpg")
    rows = [
        {"qid": "val-0", "image": "a.jpg", "question": "q?", "answer": a, "category": "modality", "split": "val",
         "image_in_vqa_rad": a == "yes"}
        for a in ("yes", "No", "cta - ct angiography")
    ]  # fmt: skip
    for i, row in enumerate(rows):
        row["qid"] = f"val-{i}"
    write_jsonl(tmp_path / "val.jsonl", rows)
    samples = load_dataset("vqa-med-2019", tmp_path, "validate")
    assert [s.answer_type for s in samples] == ["closed", "closed", "open"]
    assert samples[0].question_type == "modality"
    assert samples[0].also_in == ("vqa-rad",) and samples[1].also_in == ()


def test_plain_json_lines(tmp_path: Path) -> None:
    picture(tmp_path / "scan one.png")
    picture(tmp_path / "images" / "two.png")
    rows: list[Any] = [
        {"image": "scan one.png", "question": "is it?", "answer": "yes"},
        {
            "image": "two.png",
            "question": "ob es ist?",
            "answer": 3,
            "answer_type": "OPEN",
            "qid": "x-7",
            "organ": "liver",
        },
        "",
        {"image": "images/two.png", "question": "what?", "answer": "", "answer_type": "closed"},
    ]  # fmt: skip
    file = write_jsonl(tmp_path / "test.jsonl", rows)
    for root in (file, tmp_path):
        samples = load_dataset("jsonl", root, "test")
        assert [s.qid for s in samples] == ["1", "x-7", "4"]
        assert [s.answer_type for s in samples] == [None, "open", "closed"]
        assert samples[1].answer == "3" and samples[1].organ == "liver" and samples[2].answer == ""
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert len(load_dataset("jsonl", file, "test")) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.png", "question": "q", "answer": "y"', "line 2: not valid JSON"),
        ("[1, 2]", "line 2: got an array; wanted an object"),
        ('{"image": "a.png", "question": "q"}', "record 2: 'answer' is missing; wanted text"),
        ('{"image": "a.png", "question": null, "answer": "y"}', "record 2: 'question' holds null; wanted text"),
        ('{"image": "a.png", "question": ["q"], "answer": "y"}', "record 2: 'question' holds an array"),
        ('{"image": "a.png", "question": "q", "answer": true}', "record 2: 'answer' holds true or false"),
        ('{"image": "b.png", "question": "q", "answer": "y"}', "record 2: no image file 'b.png'"),
        ('{"image": "", "question": "q", "answer": "y"}', "record 2: image path ''"),
        ('{"image": "a.png", "question": "q", "answer": "y", "answer_type": "maybe"}', "accepted: open, closed"),
        ("[" * 100_000, "line 2: not valid JSON"),
    ],
)
def test_malformed_rows_say_where(tmp_path: Path, line: str, message: str) -> None:
    picture(tmp_path / "a.png")
    good = {"image": "a.png", "question": "q", "answer": "y"}
    file = write_jsonl(tmp_path / "test.jsonl", [good, line, {**good, "qid": "z"}])
    with pytest.raises(DataError) as caught:
        load_dataset("jsonl", file, "test")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    write_jsonl(file, [good, line, line])
    with pytest.raises(DataError, match="1 more problems: see `miss data check`"):
        load_dataset("jsonl", file, "test")


def test_double_qids_are_listed(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    row = {"image": "a.png", "question": "q", "answer": "y"}
    file = write_jsonl(tmp_path / "test.jsonl", [{**row, "qid": q} for q in ("a", 7, "b", "7", "a")])
    with pytest.raises(DataError, match="more than once: a, 7;"):
        load_dataset("jsonl", file, "test")


def test_files_that_are_no_manifests(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('[{"qid": 1,\n "broken')
    with pytest.raises(DataError, match=r"train\.json, line 2: not valid JSON"):
        load_dataset("slake", tmp_path, "train")
    (tmp_path / "train.json").write_text("[1]")
    with pytest.raises(DataError, match="record 1: got a number"):
        load_dataset("slake", tmp_path, "train")
    (tmp_path / "train.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        load_dataset("slake", tmp_path, "train")


def test_names_that_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="accepted: slake, vqa-rad"):
        load_dataset("slack", tmp_path, "train")
    with pytest.raises(DataError, match="accepted: train, validate"):
        load_dataset("slake", tmp_path, "trian")
    with pytest.raises(DataError, match="accepted: en, zh, all"):
        load_dataset("slake", tmp_path, "train", "de")


# --- Paths


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "a/../../secret.png", "/etc/passwd", "..\\secret.png", "\\\\server\\share", "C:\\secret.png",
     "a\x00b", "", "  ", "..", "link/secret.png", "outside.png"],
)  # fmt: skip
def test_image_paths_may_not_leave_their_folder(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    picture(tmp_path / "secret.png")
    (root / "link").symlink_to(tmp_path)
    (root / "outside.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(PathError):
        safe_path(root, name)
    file = write_jsonl(root / "test.jsonl", [{"image": name, "question": "q", "answer": "y"}])
    with pytest.raises(DataError, match="record 1"):
        load_dataset("jsonl", file, "test")


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    picture(root / "a.png")
    (root / "b.png").symlink_to(root / "a.png")
    (tmp_path / "alias").symlink_to(root)
    assert safe_path(root, "b.png").is_file() and safe_path(tmp_path / "alias", "a.png").is_file()
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(DataError):
        load_dataset(
            "jsonl", write_jsonl(root / "t.jsonl", [{"image": "loop", "question": "q", "answer": "y"}]), "test"
        )


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["..", ".", "a", "b", "/", "\\", "\x00", "~", " ", "C:", "link", "…"]), max_size=8))
def test_no_path_whatever_leaves(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    root = _rooted(tmp_path_factory)
    try:
        path = safe_path(root, "/".join(parts))
    except PathError:
        return
    assert Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


_ROOTS: list[Path] = []


def _rooted(factory: pytest.TempPathFactory) -> Path:
    if not _ROOTS:
        root = factory.mktemp("paths") / "root"
        root.mkdir()
        (root / "link").symlink_to(root.parent)
        _ROOTS.append(root)
    return _ROOTS[0]


def test_where_the_data_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISS_DATA", str(tmp_path))
    assert resolve_data_root() == tmp_path
    assert resolve_data_root(tmp_path / "..") == tmp_path / ".."
    with pytest.raises(DataError, match="--data"):
        resolve_data_root(tmp_path / "missing")
    monkeypatch.setenv("MISS_DATA", str(tmp_path / "missing"))
    with pytest.raises(DataError, match=r"\$MISS_DATA"):
        resolve_data_root()
    monkeypatch.delenv("MISS_DATA")
    monkeypatch.setattr("miss.engine.data.paths.BESIDE", tmp_path / "missing")
    with pytest.raises(DataError, match="--data DIR"):
        resolve_data_root()


# --- The real sets


@functools.cache
def real(name: str, split: str, language: str) -> list[Sample]:
    return load_dataset(name, data_root(), split, language)


@pytest.mark.parametrize(
    ("name", "split", "language", "num_samples", "num_images"),
    [
        ("slake", "train", "en", 4919, 450),
        ("slake", "train", "all", 9043, 514),
        ("slake", "validate", "en", 1053, 96),
        ("vqa-rad", "all", "en", 2780, 313),
        ("vqa-rad", "train", "en", 2472, 282),
        ("vqa-rad", "validate", "en", 308, 31),
        ("vqa-med-2019", "train", "en", 12792, 3200),
        ("vqa-med-2019", "validate", "en", 2000, 500),
    ],
)
def test_real_counts(name: str, split: str, language: str, num_samples: int, num_images: int) -> None:
    samples = real(name, split, language)
    assert len(samples) == num_samples == len({s.qid for s in samples})
    assert len({s.image_key for s in samples}) == num_images
    assert all(s.answer_type in ("open", "closed") for s in samples)
    assert sum(not s.answer for s in samples) <= 1  # SLAKE's training split has one


def test_no_record_of_the_real_files_is_lost() -> None:
    root = data_root()
    for name, split, language, file in (
        ("slake", "train", "all", "slake/train.json"),
        ("vqa-rad", "all", "en", "vqa_rad/train.json"),
        ("vqa-med-2019", "validate", "en", "vqa_med_2019/val.jsonl"),
    ):
        text = (root / file).read_text("utf-8")
        rows = json.loads(text) if text[0] == "[" else [json.loads(line) for line in text.splitlines()]
        samples = real(name, split, language)
        assert [s.qid for s in samples] == [str(r["qid"]) for r in rows]
        assert [s.question for s in samples] == [r["question"].strip() for r in rows]
        assert [s.answer for s in samples] == [str(r["answer"]).strip() for r in rows]
