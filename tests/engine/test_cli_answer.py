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


def file_of(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def one_json(capsys, flags):
    assert run(["answer", *flags, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_candidates_and_constraints_answer_from_the_list(checkpoint, images, tmp_path, capsys):
    answers = file_of(tmp_path, "answers.txt", "Left lung\n\n  yes\nno\nbrain\nNO\n")
    flags = ["--image", str(images[0]), "--question", "is there a mass?", "--checkpoint", checkpoint]
    (ranked,) = one_json(capsys, [*flags, "--candidates", answers, "--alternatives", "9"])
    texts = [ranked["answer"], *(a["text"] for a in ranked["alternatives"])]
    assert sorted(texts) == ["Left lung", "brain", "no", "yes"] and len(ranked["warnings"]) == 1
    scores = [ranked["logprob"], *(a["logprob"] for a in ranked["alternatives"])]
    assert scores == sorted(scores, reverse=True)
    (chosen,) = one_json(capsys, [*flags, "--constrain", answers, "--alternatives", "9"])
    probabilities = [chosen["score"], *(a["score"] for a in chosen["alternatives"])]
    assert chosen["answer"] in texts and sum(probabilities) == pytest.approx(1)  # each is decided by its first token


def test_sampling_repeats_by_its_seed(checkpoint, images, capsys):
    flags = ["--image", str(images[0]), "--question", "ct", "--question", "mri", "--checkpoint", checkpoint, "--sample"]
    one, two = (one_json(capsys, [*flags, "--seed", "5", "--top-p", "0.9", "--top-k", "20"]) for _ in range(2))
    assert [r["token_ids"] for r in one] == [r["token_ids"] for r in two]
    drawn = {tuple(one_json(capsys, [*flags, "--temperature", "3"])[0]["token_ids"]) for _ in range(5)}
    assert len(drawn) > 1


def test_a_batch_takes_the_ways_of_choosing_too(checkpoint, images, tmp_path):
    source = batch(
        tmp_path, [{"qid": q, "image": images[0].name, "question": q} for q in ("ct", "mri", "is there a mass")]
    )
    answers, output = file_of(tmp_path, "answers.txt", "yes\nno\n"), tmp_path / "answers.jsonl"
    flags = ["answer", "--batch", str(source), "--root", str(images[0].parent), "--checkpoint", checkpoint]
    for way in ("--constrain", "--candidates"):
        output.unlink(missing_ok=True)
        assert run([*flags, "--output", str(output), way, answers]) == 0
        assert len(lines(output)) == 3 and {r["answer"] for r in lines(output)} <= {"yes", "no"}


def test_an_attention_map_is_drawn_for_each_question(checkpoint, images, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    flags = ["--image", str(images[0]), "--question", "ct", "--question", "mri", "--checkpoint", checkpoint]
    assert run(["answer", *flags, "--attention-map", str(tmp_path / "map.png")]) == 0
    said = capsys.readouterr().err
    for name in ("map.png", "map-2.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG" and name in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--candidates", "EMPTY"], "has no answers"),
        (["--constrain", "EMPTY"], "has no answers"),
        (["--constrain", "BINARY"], "UTF-8"),
        (["--candidates", "GOOD", "--constrain", "GOOD"], "--candidates together with --constrain"),
        (["--candidates", "GOOD", "--sample"], "--candidates together with --sample"),
        (["--constrain", "GOOD", "--beams", "3"], "--constrain together with --beams"),
        (["--sample", "--beams", "3"], "--sample together with --beams"),
        (["--temperature", "0.5"], "--temperature without --sample"),
        (["--seed", "0"], "--seed without --sample"),
        (["--sample", "--temperature", "0"], "wanted a number above 0"),
    ],
)
def test_wrong_ways_of_choosing_are_one_line(checkpoint, tmp_path, capsys, flags, message):
    files = {"EMPTY": file_of(tmp_path, "empty.txt", " \n\n"), "GOOD": file_of(tmp_path, "good.txt", "yes\n")}
    files["BINARY"] = str(tmp_path / "binary")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00yes")
    flags = [files.get(f, f) for f in flags]
    assert run(["answer", "--image", "x.png", "--question", "ct", "--checkpoint", checkpoint, *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1


def test_a_batch_has_no_map(capsys):
    assert run(["answer", "--batch", "b.jsonl", "--output", "o.jsonl", "--attention-map", "m.png"]) == 2
    assert "--attention-map" in capsys.readouterr().err
