"""miss data: exit codes, one line an error, JSON that programs can read."""

import json
from pathlib import Path
from typing import Any

import pytest

from miss.cli import run
from tests.engine.test_check import scene


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
