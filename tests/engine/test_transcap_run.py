"""Runs of `miss transcap`: outputs, provenance, and that nothing is lost by kill -9, a torn line or a full disk."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from miss.cli import run as miss
from miss.engine.transcap import store as store_file
from miss.engine.transcap.labels import read_labels
from miss.engine.transcap.prompts import get_prompt
from miss.engine.transcap.run import TransCapConfig, run
from miss.engine.transcap.store import RunFolder, StoreError
from miss.engine.transcap.template import TemplateWriter
from miss.engine.transcap.writer import Candidate, WriterError, Written

ROOT = Path(__file__).resolve().parents[2]
OUTPUTS = ("captions.jsonl", "captions.csv", "sets.jsonl")
ORGANS = ("chest", "hand", "knee", "liver", "brain", "spine", "breast", "kidney", "hip", "foot")


@pytest.fixture
def labels(tmp_path):
    """40 images of 30 label sets: the last ten share one."""
    path = tmp_path / "labels.jsonl"
    rows = [
        {"image": f"{i}.png", "labels": {"modality": ("CT", "MRI", "x-ray")[i // 10], "organ": ORGANS[i % 10]}}
        for i in range(30)
    ]
    rows += [{"image": f"{i}.png", "labels": rows[0]["labels"]} for i in range(30, 40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(folder):
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Slow:
    """The template writer, stopped after some batches."""

    name, prompt = "template", None
    identity = TemplateWriter().identity

    def __init__(self, batches):
        self.left = batches

    def prepare(self):
        pass

    def write(self, sets, wanted, seed):
        if not self.left:
            raise WriterError("the model is gone")
        self.left -= 1
        return TemplateWriter().write(sets, wanted, seed)


class Says:
    """A writer that says the same few things of everything."""

    name, prompt = "local", get_prompt("labels")
    identity = {"model": "tests", "revision": "1"}

    def __init__(self, *texts):
        self.texts = texts

    def prepare(self):
        pass

    def write(self, sets, wanted, seed):
        return [Written([Candidate(text, -0.5 * i) for i, text in enumerate(self.texts)], {"read": 3}) for _ in sets]


def test_the_command_writes_what_its_help_says(labels, tmp_path, capsys):
    out = tmp_path / "out"
    assert miss(["transcap", "--labels", str(labels), "--out", str(out), "--writer", "template", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 40 and report["label_sets"] == 30 and report["images_without_caption"] == []
    assert report["fidelity"]["faithful"] == 1.0
    rows = lines(out / "captions.jsonl")
    assert [row["image"] for row in rows[:2]] == ["0.png", "30.png"] and len(rows) == 40
    assert all(len(set(row["captions"])) == 5 for row in rows)
    assert rows[0]["labels"] == {"modality": "CT", "organ": "chest"} and rows[0]["provenance"]["model"] == "template"
    assert len({tuple(row["captions"]) for row in rows[:11]}) > 5, "images of one label set draw differently"
    with open(out / "captions.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["list", *(f"describe{i}" for i in range(1, 6))]
    assert {r["list"]: [r[f"describe{i}"] for i in range(1, 6)] for r in table} == {
        row["image"]: row["captions"] for row in rows
    }
    pool = {record["set"]: [c["text"] for c in record["captions"]] for record in lines(out / "sets.jsonl")}
    assert all(set(row["captions"]) <= set(pool[row["set"]]) for row in rows)


def test_a_seed_decides(labels, tmp_path):
    found = read_labels(labels)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(found, TemplateWriter(), tmp_path / name, TransCapConfig(seed=seed))
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")


@pytest.mark.parametrize("batches", [0, 1, 3, 9])
def test_a_stopped_run_goes_on_to_the_same_result(labels, tmp_path, batches):
    found, config = read_labels(labels), TransCapConfig(batch=3)
    run(found, TemplateWriter(), tmp_path / "whole", config)
    with pytest.raises(WriterError, match="gone"):
        run(found, Slow(batches), tmp_path / "cut", config)
    assert not (tmp_path / "cut" / "captions.jsonl").exists()
    seen = []
    run(found, TemplateWriter(), tmp_path / "cut", config, tell=lambda done, batch: seen.append(done))
    assert seen[0] == 3 * batches and seen[-1] == 30
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_kill_9_and_resume_equals_the_undisturbed_run(labels, tmp_path):
    """The command in a process of its own, killed when some batches are on the disk, at another moment each time."""
    run(read_labels(labels), TemplateWriter(), tmp_path / "whole", TransCapConfig(batch=1))
    out, slow = tmp_path / "killed", tmp_path / "slow.py"
    slow.write_text(
        "import sys, time\nfrom miss.cli import run\nfrom miss.engine.transcap.template import TemplateWriter\n"
        "write = TemplateWriter.write\n"
        "def slowly(*args):\n    time.sleep(0.01)\n    return write(*args)\n"
        "TemplateWriter.write = slowly\nsys.exit(run(sys.argv[1:]))\n"
    )
    command = [sys.executable, str(slow), "transcap", "--labels", str(labels), "--out", str(out), "--batch", "1"]
    path, environment = out / "batches.jsonl", {**os.environ, "PYTHONPATH": str(ROOT)}
    for least in (1, 300, 2500, 7000):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        before = path.stat().st_size if path.exists() else 0
        while process.poll() is None and (not path.exists() or path.stat().st_size < before + least):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was done before it could be killed"
        assert not (out / "captions.jsonl").exists()
    kept = len(path.read_bytes().splitlines())
    assert kept >= 3
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "going on behind" in done.stderr
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage"])
def test_a_damaged_line_costs_what_stands_behind_it_and_is_said(labels, tmp_path, capsys, damage):
    found, config = read_labels(labels), TransCapConfig(batch=5)
    run(found, TemplateWriter(), tmp_path / "whole", config)
    with pytest.raises(WriterError):
        run(found, Slow(4), tmp_path / "cut", config)
    path = tmp_path / "cut" / "batches.jsonl"
    whole = path.read_bytes()
    starts = [0, *(i + 1 for i, byte in enumerate(whole) if byte == 10)]
    if damage == "cut":
        path.write_bytes(whole[: starts[3] + 40])
    elif damage == "flipped":
        path.write_bytes(whole[: starts[3] + 40] + bytes([whole[starts[3] + 40] ^ 1]) + whole[starts[3] + 41 :])
    else:
        path.write_bytes(whole[: starts[3]] + b"\x00" * 100)
    seen = []
    run(found, TemplateWriter(), tmp_path / "cut", config, tell=lambda done, batch: seen.append(done))
    assert seen[0] == 15 and "written anew" in capsys.readouterr().err
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_full_disk_leaves_whole_batches(labels, tmp_path, monkeypatch):
    found, config, real = read_labels(labels), TransCapConfig(batch=5), os.fsync
    left = [8]

    def fsync(descriptor):
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(store_file.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        run(found, TemplateWriter(), tmp_path / "full", config)
    monkeypatch.undo()
    content = (tmp_path / "full" / "batches.jsonl").read_bytes()
    assert content and all(store_file.unseal(line) for line in content.splitlines(keepends=True))
    run(found, TemplateWriter(), tmp_path / "full", config)
    run(found, TemplateWriter(), tmp_path / "whole", config)
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


def test_another_run_is_not_gone_on_with(labels, tmp_path):
    found = read_labels(labels)
    run(found, TemplateWriter(), tmp_path, TransCapConfig(seed=1))
    with pytest.raises(StoreError, match="seed was 1, is 2"):
        run(found, TemplateWriter(), tmp_path, TransCapConfig(seed=2))
    run(found, TemplateWriter(), tmp_path, TransCapConfig(seed=2), resume="none")
    with pytest.raises(StoreError, match="accepted: auto, none"):
        run(found, TemplateWriter(), tmp_path, TransCapConfig(seed=2), resume="maybe")
    with RunFolder(tmp_path / "held", {}), pytest.raises(StoreError, match="another process"):
        RunFolder(tmp_path / "held", {})


def test_what_is_rejected_is_kept_with_its_reasons_and_templates_fill_up(labels, tmp_path):
    found = read_labels(labels)
    config = TransCapConfig(limit=1, seed=3)
    writer = Says("a caption: it rains", "an image with a fracture of the left knee", "")
    report = run(found, writer, tmp_path / "fill", config)
    (record,) = lines(tmp_path / "fill" / "sets.jsonl")
    assert [c["writer"] for c in record["captions"]] == ["template"] * 5 and record["captions"][0]["filled"]
    whys = {r["text"]: r["why"] for r in record["rejected"]}
    assert any("left" in why for why in whys["An image with a fracture of the left knee."])
    assert report["filled"] == 5 and report["kept"] == 0 and report["sets_without_own"] == 1
    assert report["tokens"] == {"read": 3} and report["rejected_share"] == 1.0
    row = lines(tmp_path / "fill" / "captions.jsonl")[0]
    assert row["provenance"]["prompt_hash"] == writer.prompt.hash and row["sources"][0]["filled"]

    bare = run(found, writer, tmp_path / "bare", TransCapConfig(limit=1, seed=3, fill=False))
    assert bare["images"] == 0 and bare["images_without_caption"] == [
        i for s in found.sets for i in s.images if s.key == record["set"]
    ]
    assert (tmp_path / "bare" / "captions.jsonl").read_bytes() == b""


def test_fewer_captions_than_columns_come_again(labels, tmp_path):
    found = read_labels(labels)
    organ = dict(found.sets[0].facts)["organ"]
    writer = Says(f"a CT of the {organ}", f"this image, a CT scan, shows the {organ}")
    run(found, writer, tmp_path / "few", TransCapConfig(fill=False))
    (row, *_) = csv.reader((tmp_path / "few" / "captions.csv").read_text().splitlines()[1:])
    assert len(row) == 6 and set(row[1:3]) == set(row[1:]) and len(set(row[1:])) == 2


def test_limit_draws_label_sets_by_the_seed(labels, tmp_path):
    found = read_labels(labels)
    drawn = []
    for seed in (0, 1):
        run(found, TemplateWriter(), tmp_path / str(seed), TransCapConfig(limit=7, seed=seed))
        drawn.append([r["set"] for r in lines(tmp_path / str(seed) / "sets.jsonl")])
    assert len(drawn[0]) == len(drawn[1]) == 7 and drawn[0] != drawn[1]
    assert set(drawn[0]) <= {s.key for s in found.sets}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--writer", "poet"], "accepted: template, local, endpoint"),
        (["--writer", "endpoint"], "--url"),
        (["--writer", "local", "--model", "nowhere"], "wanted a .gguf file"),
        (["--writer", "local", "--prompt", "ode", "--model", "nowhere"], "--model"),
        (["--k", "0"], "--k: got 0"),
        (["--pool", "3"], "--pool: got 3"),
        (["--limit", "0"], "--limit: got 0"),
        (["--split", "test2", "--labels", "absent.jsonl"], "no such file"),
    ],
)
def test_wrong_flags_are_one_clear_line(labels, tmp_path, capsys, flags, says):
    base = ["transcap", "--out", str(tmp_path / "out"), *([] if "--labels" in flags else ["--labels", str(labels)])]
    assert miss([*base, *flags]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_several_runs_are_compared(labels, tmp_path, capsys):
    other = tmp_path / "more" / "other.jsonl"
    other.parent.mkdir()
    other.write_text(labels.read_text())
    assert miss(["transcap", "--labels", str(labels), str(other), "--out", str(tmp_path / "out"), "--limit", "3"]) == 0
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert len(table) == 4 and "more-other" in table[3]
    assert "Kept: 20 of" in (tmp_path / "out" / "examples.md").read_text()
    assert (tmp_path / "out" / "more-other-template" / "captions.jsonl").is_file()
