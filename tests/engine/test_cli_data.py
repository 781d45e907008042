"""miss data: exit codes, one line an error, JSON that programs can read."""

import json
from pathlib import Path
from typing import Any

import pytest

from miss.cli import run
from tests.engine.test_check import scene
from tests.engine.test_pairs import write_pairs


def fill(folder: Path, images: dict[str, int], splits: dict[str, list[str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in images.items():
        scene(seed, 60).save(folder / name)
    for split, names in splits.items():
        rows = [{"image": n, "question": "is it?", "answer": "yes", "qid": f"{split}-{i}"} for i, n in enumerate(names)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_check_a_clean_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fill(tmp_path / "d", {"a.png": 0, "b.png": 1}, {"train": ["a.png"], "validate": ["b.png"]})
    assert run(["data", "check", "--data", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "jsonl train: 1 samples of 1 images" in out and "0 errors, 0 warnings" in out
    assert run(["data", "check", "--data", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [s["split"] for s in report["splits"]] == ["train", "validate"] and report["errors"] == []
    assert run(["data", "check", "--data", str(folder / "train.jsonl")]) == 0


def test_check_a_folder_with_a_leak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fill(tmp_path / "d", {"a.png": 0, "b.png": 0}, {"train": ["a.png"], "validate": ["b.png"]})
    assert run(["data", "check", "--data", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "error: jsonl/a.png (train) and jsonl/b.png (validate) are the same image in two splits of jsonl" in out
    assert run(["data", "check", "--data", str(folder), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["errors"]) == 1


def test_pack_and_check_the_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fill(tmp_path / "d", {"a.png": 0, "b.png": 1}, {"train": ["a.png"], "validate": ["b.png"]})
    args = ["data", "pack", "--datasets", "jsonl", "--data", str(folder), "--image-size", "32"]
    assert run([*args, "--out", str(tmp_path / "p"), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["num_samples"] == 2 and written["num_images"] == 2
    assert run(["data", "check", "--data", str(tmp_path / "p"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(s["dataset"], s["split"], s["samples"]) for s in report["splits"]] == [
        ("jsonl", "train", 1),
        ("jsonl", "validate", 1),
    ]


def test_pairs_are_packed_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = write_pairs(tmp_path / "in", 5)
    assert (
        run(["data", "pack", "--pairs", str(pairs), "--image-size", "32", "--out", str(tmp_path / "p"), "--json"]) == 0
    )
    written = json.loads(capsys.readouterr().out)
    assert (written["num_pairs"], written["num_captions"], written["num_images"]) == (5, 10, 5)
    assert run(["data", "check", "--pairs", str(tmp_path / "p"), str(pairs)]) == 1
    assert "names two images" in capsys.readouterr().err  # of one name: the pack's and the file's
    assert run(["data", "check", "--pairs", str(tmp_path / "p")]) == 0
    out = capsys.readouterr().out
    assert "5 pairs, 5 images, 10 captions, 0 malformed records" in out and "0 errors, 0 warnings" in out
    assert run(["data", "pack", "--pairs", str(tmp_path / "p"), "--out", str(tmp_path / "again")]) == 0
    assert "5 pairs, 10 captions, 5 images, 1 shards" in capsys.readouterr().out


def test_what_is_wrong_with_pairs_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = write_pairs(tmp_path / "in", 5)
    rows = [{"image": "4.png", "captions": ["A scan."]}, {"image": "0.png", "caption": "a  scan"}, {"image": "0.png"}]
    pairs.write_text(pairs.read_text() + "".join(json.dumps(row) + "\n" for row in rows))
    images = tmp_path / "in" / "images"
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:80])
    (images / "3.png").write_bytes((images / "2.png").read_bytes())
    held = fill(tmp_path / "d", {"a.png": 50, "b.png": 51}, {"train": ["a.png"], "validate": ["b.png"]})
    (held / "b.png").write_bytes((images / "4.png").read_bytes())
    assert run(["data", "check", "--pairs", str(pairs), "--data", str(held), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["files"][0]["malformed"] == 1 and report["pairs"] == 7 and report["captions"] == 12
    assert report["distinct_captions"] == 11 and report["pairs_with_another_s_caption"] == 2
    assert report["most_common"] == [{"caption": "A scan.", "images": 2}]
    assert report["caption_words"] == {"2": 7, "5": 5} and report["longest_caption_characters"] == 18
    assert [u["reason"] for u in report["undecodable"]] == ["truncated"]
    assert report["equal_images"] == [["in/pairs/2.png", "in/pairs/3.png"]]
    assert [leak["kind"] for leak in report["held_out"]] == ["exact"]
    assert len(report["errors"]) == 3 and len(report["warnings"]) == 2
    assert run(["data", "check", "--pairs", str(pairs)]) == 1
    assert "      2 images: A scan." in capsys.readouterr().out
    # Packing stops at the first of these, or leaves out what cannot be decoded where that was asked for.
    assert run(["data", "pack", "--pairs", str(pairs), "--out", str(tmp_path / "p")]) == 1
    assert "record 8: has neither" in capsys.readouterr().err
    pairs.write_text("\n".join(pairs.read_text().splitlines()[:7]))
    assert run(["data", "pack", "--pairs", str(pairs), "--out", str(tmp_path / "p")]) == 1
    assert "in/pairs/1.png: the PNG file ends early" in capsys.readouterr().err and not (tmp_path / "p").exists()
    assert run(["data", "pack", "--pairs", str(pairs), "--out", str(tmp_path / "p"), "--skip-corrupt"]) == 0
    out = capsys.readouterr().out
    assert "left out: in/pairs/1.png: the PNG file ends early" in out and "6 pairs, 10 captions, 4 images" in out
    assert run(["data", "check", "--pairs", str(tmp_path / "p")]) == 0


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["data"], 2, "usage: miss data {check,pack}"),
        (["data", "chek"], 2, "did you mean 'check'"),
        (["data", "check", "--data", "{tmp}/none"], 1, "no such folder"),
        (["data", "check", "--data", "{tmp}"], 1, "holds no data set that is known"),
        (["data", "check", "--datasets", "slack", "--data", "{tmp}"], 1, "accepted: slake, vqa-rad"),
        (["data", "pack", "--out", "{tmp}/o", "--data", "{tmp}"], 1, "no train split of slake"),
        (["data", "pack", "--out", "{tmp}/o", "--quality", "200"], 1, "wanted 0 to 100"),
        (["data", "pack", "--out", "{tmp}/o", "--datasets", ","], 1, "got nothing"),
        (["data", "pack", "--out", "{tmp}/o", "--skip-corrupt"], 1, "--skip-corrupt goes with --pairs"),
        (["data", "check", "--names", "x"], 1, "--names goes with --pairs"),
        (["data", "check", "--pairs", "{tmp}/none.csv"], 1, "no such file"),
        (["data", "pack", "--out", "{tmp}/o", "--pairs", "{tmp}"], 1, "holds no pairs"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: list[str], code: int,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("MISS_DATA", str(tmp_path))
    assert run([a.replace("{tmp}", str(tmp_path)) for a in args]) == code
    shown: Any = capsys.readouterr()
    assert message in shown.out + shown.err and "Traceback" not in shown.err
    if code == 1:
        assert shown.err.count("\n") == 1 and shown.out == ""
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("args", [["check", "--jsn"], ["pack"], ["pack", "--out", "x", "--qualty", "3"]])
def test_usage_errors(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(["data", *args])
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
