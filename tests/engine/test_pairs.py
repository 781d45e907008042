"""Image-text pairs: every record of every form becomes one pair or one named problem, nothing leaves its folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miss.engine.data.datasets import load_dataset
from miss.engine.data.images import decode_image
from miss.engine.data.leaks import exclude_held_out
from miss.engine.data.pack_pairs import pack_pairs
from miss.engine.data.pairs import Pair, load_pairs, normalise_caption, pairs_digest, scan_pairs
from miss.engine.data.paths import DataError, PathError
from miss.engine.data.shards import PackOptions
from tests.engine.test_check import sample, scene
from tests.helpers import data_root


def write_images(folder: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        scene(i, 40).save(path)


def write_pairs(folder: Path, count: int, name: str = "pairs.jsonl") -> Path:
    """`count` pairs with two captions each, and their images."""
    write_images(folder, [f"images/{i}.png" for i in range(count)])
    rows = [{"image": f"{i}.png", "captions": [f"ct {i}", f"mri of the chest {i}"]} for i in range(count)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def test_json_lines(tmp_path: Path) -> None:
    write_images(tmp_path / "set", ["a.png", "images/b/c.png"])
    file = tmp_path / "set" / "train.jsonl"
    rows = [
        {"image": "a.png", "captions": [" a  scan ", "ä CT"], "writer": {"seed": 3}},
        {"image": "b/c.png", "caption": "x"},
    ]
    file.write_text("\n" + "\n".join(json.dumps(row) for row in rows))
    assert load_pairs(file) == [
        Pair(tmp_path / "set" / "a.png", ("a scan", "ä CT"), "set/train/a.png", "set/train"),
        Pair(tmp_path / "set" / "images" / "b" / "c.png", ("x",), "set/train/b/c.png", "set/train"),
    ]
    array = tmp_path / "set" / "train.json"
    array.write_text(json.dumps(rows))
    assert load_pairs(array) == load_pairs(file)
    elsewhere = tmp_path / "captions.jsonl"
    elsewhere.write_text(json.dumps(rows[0]))
    with pytest.raises(DataError, match="record 1: no image file 'a.png'"):
        load_pairs(elsewhere)
    assert load_pairs(elsewhere, images=tmp_path / "set")[0].image == tmp_path / "set" / "a.png"


def test_the_two_csv_forms(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.1.png", "images/c.jpg"])
    one, five = tmp_path / "medicat.csv", tmp_path / "captions.csv"
    one.write_text('\ufeffnumber,list,Caption\n1,a.png,"CT, ""axial"",\nof the chest"\n\n2,c.jpg,MRI\n')
    assert [(p.image.name, p.captions) for p in load_pairs(one)] == [  # type: ignore[union-attr]
        ("a.png", ('CT, "axial", of the chest',)),
        ("c.jpg", ("MRI",)),
    ]
    columns = ",".join(f"describe{i}" for i in range(1, 6))
    five.write_text(f"list,{columns}\nb.1,one,two,three,four,five\na,one,,three,,\n")
    assert [(p.image.name, p.captions) for p in load_pairs(five)] == [  # type: ignore[union-attr]
        ("b.1.png", ("one", "two", "three", "four", "five")),
        ("a.png", ("one", "three")),
    ]
    names = tmp_path / "train.txt"
    names.write_text("c.jpg\n")
    assert [p.key for p in load_pairs(one, names=names)] == [f"{tmp_path.name}/medicat/c.jpg"]
    names.write_text("c.jpg\ngone.png\n")
    with pytest.raises(DataError, match="line 2: 'gone.png' has 0 records"):
        load_pairs(one, names=names)


@pytest.mark.parametrize("form", ["jsonl", "json", "caption.csv", "describe.csv"])
def test_one_record_is_one_pair(tmp_path: Path, form: str) -> None:
    """The original's reader lost the first line of a file, and all of a file of one line."""
    write_images(tmp_path, ["a.png"])
    text = {
        "jsonl": '{"image": "a.png", "caption": "x"}',
        "json": '[{"image": "a.png", "caption": "x"}]',
        "caption.csv": ",Caption\na.png,x",
        "describe.csv": "list,describe1\na,x",
    }
    file = tmp_path / f"f.{form}"
    file.write_text(text[form])
    assert [p.captions for p in load_pairs(file)] == [("x",)]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.one_of(st.none(), st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=3)), min_size=1, max_size=9
    )
)
def test_every_record_becomes_a_pair_or_a_problem(
    tmp_path_factory: pytest.TempPathFactory, given_captions: Any
) -> None:
    folder = tmp_path_factory.mktemp("records")
    write_images(folder, ["a.png"])
    file = folder / "f.jsonl"
    file.write_text("".join(json.dumps({"image": "a.png", "captions": c}) + "\n" for c in given_captions))
    pairs, problems = scan_pairs(file)
    assert len(pairs) + len(problems) == len(given_captions) and len(problems) >= sum(c is None for c in given_captions)
    assert all(text and text == " ".join(text.split()) for pair in pairs for text in pair.captions)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image": "a.png"}', "record 1: has neither 'caption' nor 'captions'"),
        ('{"image": "a.png", "caption": "x", "captions": ["y"]}', "record 1: has both"),
        ('{"image": "a.png", "captions": []}', "record 1: 'captions' is empty"),
        ('{"image": "a.png", "captions": ["x", 3]}', "record 1: a caption is 3; wanted text"),
        ('{"image": "a.png", "caption": " \\u200b "}', "record 1: a caption is empty"),
        ('{"image": "a.png", "caption": "' + "x" * 20_001 + '"}', "20,001 characters"),
        ('{"caption": "x"}', "record 1: 'image' is missing"),
        ('{"image": "a.png", "caption": "x"}\n{"image": "b.png", "caption": "x"}', "record 2: no image file 'b.png'"),
        ('{"image": "a.png", "caption": "x"}\n{"image": ', "line 2: not valid JSON"),
        ('["a.png", "x"]\n{}', "line 1: got an array"),
        ("\n", "holds no record"),
    ],
)
def test_malformed_json(tmp_path: Path, text: str, message: str) -> None:
    write_images(tmp_path, ["a.png"])
    (tmp_path / "f.jsonl").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_pairs(tmp_path / "f.jsonl")
    assert "f.jsonl" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "the header is ''"),
        (b"list,describe\na,x", "wanted a column `list`"),
        (b"name,Caption\na.png,x", "wanted a column `list`"),
        (b"list,Caption,describe1\na.png,x,y", "wanted a column `list`"),
        (b"list,Caption,Caption\na.png,x,y", "'Caption' more than once"),
        (b"list,Caption\n", "holds no record"),
        (b"list,Caption\na.png,x\na.png", "record 2: 1 fields; the header has 2"),
        (b"list,Caption\na.png,x,y", "record 1: 3 fields"),
        (b"list,Caption\na.png,", "record 1: 'captions' is empty"),
        (b"list,Caption\n,x", "record 1: image path ''"),
        (b'list,Caption\na.png,"x\na.png,y\n', "line 3: unexpected end of data"),
        (b'list,Caption\na.png,"x"y\n', "line 2:"),
        (b"list,Caption\na.png,\xff\xfe", "not UTF-8"),
        (b"list,Caption\na.png," + b"x" * 140_000, "line 2: field larger"),
        (b"list,describe1,describe2\na,x,y\ngone,x,y", "record 2: no image file 'gone'"),
    ],
)
def test_malformed_csv(tmp_path: Path, text: bytes, message: str) -> None:
    write_images(tmp_path, ["a.png"])
    (tmp_path / "f.csv").write_bytes(text)
    with pytest.raises(DataError, match=message) as caught:
        load_pairs(tmp_path / "f.csv")
    assert "f.csv" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "images/../../secret.png", "C:\\x.png", "link.png"])
def test_no_image_outside_the_folder(tmp_path: Path, name: str) -> None:
    write_images(tmp_path, ["secret.png", "set/a.png"])
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "set" / "f.jsonl").write_text(json.dumps({"image": name, "caption": "x"}))
    (tmp_path / "set" / "f.csv").write_text(f"list,describe1\n{name},x\n")
    for file in ("f.jsonl", "f.csv"):
        with pytest.raises(PathError, match=f"{file}, record 1: image path"):
            load_pairs(tmp_path / "set" / file)


def test_all_problems_are_counted_and_what_is_no_file_is_said(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png"])
    (tmp_path / "f.csv").write_text("list,Caption\na.png,x\nb.png,x\na.png,\n")
    pairs, problems = scan_pairs(tmp_path / "f.csv")
    assert len(pairs) == 1 and len(problems) == 2
    with pytest.raises(DataError, match=r"record 2: no image file 'b.png'.*\(and 1 more: `miss data check --pairs"):
        load_pairs(tmp_path / "f.csv")
    for path in (tmp_path / "gone.jsonl", tmp_path):
        with pytest.raises(DataError, match="no such file|holds no pairs"):
            load_pairs(path)
    with pytest.raises(DataError, match="no such folder"):
        load_pairs(tmp_path / "f.csv", images=tmp_path / "gone")


def test_captions_that_are_equal_but_for_their_writing() -> None:
    same = ["A chest X-ray.", " a  CHEST x-ray", "a chest x-ray!?", "a chest\u00a0x-ray ."]
    assert len({normalise_caption(text) for text in same}) == 1
    assert len({normalise_caption(text) for text in ("left lung", "right lung", "left lungs")}) == 3


def test_the_digest_tells_pairs_apart(tmp_path: Path) -> None:
    pairs = load_pairs(write_pairs(tmp_path, 3))
    other = Pair(pairs[2].image, ("another",), pairs[2].key, pairs[2].source)
    digests = [pairs_digest(p) for p in (pairs, pairs[::-1], pairs[:2], [*pairs[:2], other])]
    assert len(set(digests)) == 4 and pairs_digest(load_pairs(tmp_path / "pairs.jsonl")) == digests[0]


# --- Leaks


def test_images_of_a_validation_split_are_left_out(tmp_path: Path) -> None:
    pairs = load_pairs(write_pairs(tmp_path / "p", 4))
    broken = tmp_path / "p" / "images" / "3.png"
    broken.write_bytes(broken.read_bytes()[:50])
    held = [
        sample(tmp_path / "v", "same.png", scene(0, 40), "slake"),
        sample(tmp_path / "v", "scaled.jpg", scene(2, 40).resize((120, 120)), "slake"),
        sample(tmp_path / "v", "other.png", scene(77, 40), "slake"),
    ]
    kept, report = exclude_held_out(pairs, held)
    assert [p.key for p in kept] == ["p/pairs/1.png", "p/pairs/3.png"]  # what cannot be decoded is not shown either
    assert [(leak.image_key, leak.like, leak.kind) for leak in report.leaks] == [
        ("p/pairs/0.png", "slake/same.png", "exact"),
        ("p/pairs/2.png", "slake/scaled.jpg", "copy"),
    ]
    assert (report.num_samples, report.num_kept) == (4, 2)
    assert [p.key for p in exclude_held_out(pairs, held, kinds=("exact",))[0]] == [pairs[i].key for i in (1, 2, 3)]
    assert exclude_held_out(pairs, [])[0] == pairs


# --- The real sets


def test_mednist_as_pairs_comes_back_from_a_pack(tmp_path: Path) -> None:
    root = data_root() / "mednist"
    rows = [json.loads(line) for line in (root / "labels.jsonl").read_text().splitlines()][:40]
    file = tmp_path / "captions.csv"
    file.write_text("list,Caption\n" + "".join(f"{row['image']},an image of {row['label']}\n" for row in rows))
    pairs = load_pairs(file, images=root)
    assert len(pairs) == 40
    pack_pairs(pairs, tmp_path / "packed", PackOptions(lossless=True))
    back = load_pairs(tmp_path / "packed")
    assert [(p.captions, p.key, p.source) for p in back] == [(p.captions, p.key, p.source) for p in pairs]
    for before, after in zip(pairs, back, strict=True):  # 64 x 64: smaller than the pack's side
        assert np.array_equal(decode_image(before.image), decode_image(after.image))


def test_a_slake_validation_image_among_pairs_is_found(tmp_path: Path) -> None:
    root = data_root()
    held = load_dataset("slake", root, "validate")[:60]
    train = {s.image_key: s for s in load_dataset("slake", root, "train")}
    chosen = [list(train.values())[0], held[0]]
    file = tmp_path / "p.jsonl"
    names = [s.image_key.removeprefix("slake/") for s in chosen]
    file.write_text("".join(json.dumps({"image": n, "caption": "a scan"}) + "\n" for n in names))
    pairs = load_pairs(file, images=root / "slake")
    kept, report = exclude_held_out(pairs, held, kinds=("exact", "copy"))
    assert [p.key for p in kept] == [pairs[0].key] and report.leaks[0].kind == "exact"
