"""`miss answer` as its users call it: flags, JSON, batches that go on where they stopped, and bad input."""

import json
import subprocess
import sys

import pytest

from miss.cli import run
from tests.engine.answering import write_checkpoint, write_images

KEYS = {"answer", "score", "logprob", "token_ids", "alternatives", "model", "seconds"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, vocabulary):
    return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", vocabulary))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def batch(folder, rows):
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_json_is_one_object_a_question(checkpoint, images, capsys):
    flags = [
        "--image",
        str(images[0]),
        "--question",
        "ct",
        "--question",
        "is there a mass?",
        "--checkpoint",
        checkpoint,
    ]
    assert run(["answer", *flags, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == 2 and all(KEYS <= set(r) for r in records)
    assert set(records[0]["seconds"]) == {"load", "image", "queue", "question", "decode", "total"}


def test_text_shows_score_alternatives_model_and_notice(checkpoint, images, capsys):
    assert run(["answer", "--image", str(images[0]), "--question", "ct", "--checkpoint", checkpoint]) == 0
    out = capsys.readouterr().out
    assert "score" in out and " or: " in out and "tiny, research only, not for diagnosis" in out


def test_a_batch_goes_on_where_it_stopped(checkpoint, images, tmp_path, capsys):
    rows = [{"qid": f"q{i}", "image": images[i % 3].name, "question": q} for i, q in enumerate(["ct", "mri", "", "no"])]
    rows.append({"qid": "q4", "image": "../outside.png", "question": "ct"})
    source, output = batch(tmp_path, rows), tmp_path / "answers.jsonl"
    flags = ["answer", "--batch", str(source), "--output", str(output), "--root", str(images[0].parent)]
    flags += ["--checkpoint", checkpoint, "--batch-size", "2"]
    assert run(flags) == 1  # two rows cannot be served
    whole = lines(output)
    assert [r["qid"] for r in whole] == [r["qid"] for r in rows]
    assert ["error" in r for r in whole] == [False, False, True, False, True]
    text = output.read_text(encoding="utf-8").splitlines(keepends=True)
    output.write_text("".join(text[:2]) + text[2][:9], encoding="utf-8")  # killed in the middle of a line
    run(flags)
    again = lines(output)
    assert [r.get("answer") for r in again] == [r.get("answer") for r in whole]
    assert "2 kept" in capsys.readouterr().out


def test_an_output_of_another_batch_is_left_alone(checkpoint, images, tmp_path, capsys):
    source, output = batch(tmp_path, [{"image": images[0].name, "question": "ct"}]), tmp_path / "answers.jsonl"
    output.write_text('{"image": "other.png", "question": "ct", "answer": "x"}\n', encoding="utf-8")
    before = output.read_bytes()
    assert run(["answer", "--batch", str(source), "--output", str(output), "--checkpoint", checkpoint]) == 1
    assert "belongs to another run" in capsys.readouterr().err and output.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 2, "wants --image"),
        (["--image", "x.png"], 2, "wants --image"),
        (["--image", "x.png", "--question", "ct", "--batch", "b.jsonl"], 2, "one or the other"),
        (["--batch", "b.jsonl"], 2, "--output"),
        (["--image", "no-such.png", "--question", "ct"], 1, "no-such.png"),
        (["--image", "/", "--question", "ct"], 1, "folder"),
        (["--image", "IMAGE", "--question", "  "], 1, "empty"),
        (["--image", "IMAGE", "--question", "word " * 10_000], 1, "characters"),
        (["--image", "IMAGE", "--question", "ct", "--beams", "0"], 1, "num_beams"),
        (["--image", "IMAGE", "--question", "ct", "--precision", "int3"], 1, "accepted"),
    ],
)
def test_bad_input_is_one_line(checkpoint, images, capsys, flags, code, message):
    flags = [str(images[0]) if f == "IMAGE" else f for f in flags]
    assert run(["answer", *flags, "--checkpoint", checkpoint]) == code
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err


@pytest.mark.parametrize("argv", [["answr"], ["answer", "--imge", "x.png"], []])
def test_wrong_usage_exits_with_2(argv):
    done = subprocess.run([sys.executable, "-m", "miss", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    if argv:
        assert "answer" in done.stderr + done.stdout or "--image" in done.stderr
