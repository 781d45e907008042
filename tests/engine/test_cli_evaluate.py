"""`miss evaluate` as it is typed: files of predictions, on data generated here and on SLAKE's validation split."""

import json
import math
import os

import numpy as np
import pytest
from PIL import Image

from miss.cli import run
from tests.helpers import data_root


@pytest.fixture
def data(tmp_path):
    """A plain JSONL data set: 4 images of 3 questions to validate on, 2 to train on."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, first, num in (("train", 10, 2), ("validate", 0, 4)):
        rows = []
        for i in range(first, first + num):
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i}.png")
            answers = ("Yes", "closed"), ("left lung", "open"), ("No", "closed")
            rows += [
                {"qid": f"{i}-{q}", "image": f"{i}.png", "question": f"what is {q}?", "answer": a, "answer_type": t}
                for q, (a, t) in enumerate(answers)
            ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture
def evaluate(data, tmp_path, monkeypatch):
    """Runs the command on the generated data, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*flags, dataset="jsonl", root=data):
        flags = ("--dataset", dataset, "--split", "validate", "--data", root, "--bootstrap", 100, *flags)
        return run(["evaluate", *map(str, flags)])

    return call


def write_predictions(path, rows):
    path.write_text("\n".join(json.dumps({"qid": q, "answer": a}) for q, a in rows))
    return path


def truths(data, split="validate"):
    rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
    return [(r["qid"], r["answer"]) for r in rows]


def test_the_truth_scores_everything(evaluate, data, tmp_path, capsys):
    predictions = write_predictions(tmp_path / "p.jsonl", reversed(truths(data)))
    assert evaluate("--predictions", predictions, "--json", tmp_path / "m.json") == 0
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["dataset"] == "jsonl" and metrics["split"] == "validate" and metrics["n"] == 12
    assert metrics["overall"] == {"accuracy": 1.0, "ci95": [1.0, 1.0], "n": 12}
    assert metrics["open"]["n"] == 4 and metrics["closed"]["n"] == 8
    assert metrics["baselines"]["question_only"]["overall"]["accuracy"] == 1.0
    assert metrics["checkpoint"] is None and metrics["predictions"]["file"] == "p.jsonl"
    assert metrics["environment"]["packages"]["numpy"] == np.__version__
    out = tmp_path / "runs" / "evaluate-jsonl-validate"
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert {"predictions.jsonl", "report.md", "accuracy.png"} <= {p.name for p in out.iterdir()}
    assert "100.0 % [100.0, 100.0]" in capsys.readouterr().out


def test_json_on_standard_output_is_json_alone(evaluate, data, tmp_path, capfdbinary):
    predictions = write_predictions(tmp_path / "p.jsonl", truths(data))
    assert evaluate("--predictions", predictions, "--json", "-", "--out", tmp_path / "out") == 0
    captured = capfdbinary.readouterr()
    assert json.loads(captured.out)["n"] == 12
    assert b"question only" in captured.err


def test_a_limit_takes_the_first_questions(evaluate, data, tmp_path):
    predictions = write_predictions(tmp_path / "p.jsonl", truths(data))
    shorter = write_predictions(tmp_path / "s.jsonl", truths(data)[:5])
    for file in (predictions, shorter):
        assert evaluate("--predictions", file, "--limit", 5, "--json", tmp_path / "m.json") == 0
        assert json.loads((tmp_path / "m.json").read_text())["n"] == 5


def test_missing_extra_and_double_rows_are_listed(evaluate, data, tmp_path, capsys):
    rows = truths(data)
    predictions = write_predictions(tmp_path / "p.jsonl", [*rows[1:], rows[2], ("other", "yes")])
    assert evaluate("--predictions", predictions, "--json", tmp_path / "m.json") == 1
    error = capsys.readouterr().err
    assert "1 missing (no prediction for the qid): 0-0" in error
    assert "1 extra (no such question): other" in error
    assert "1 double (several predictions of one qid): 0-2" in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "m.json").exists() and not (tmp_path / "runs").exists()


def test_without_a_training_split_it_says_so(evaluate, data, tmp_path, capsys):
    (data / "train.jsonl").unlink()
    predictions = write_predictions(tmp_path / "p.jsonl", truths(data))
    assert evaluate("--predictions", predictions) == 0
    assert "question only: skipped (no train split of jsonl" in capsys.readouterr().out
    assert evaluate("--predictions", predictions, root=data / "validate.jsonl") == 0
    assert "question only: skipped (one file has no training split beside it)" in capsys.readouterr().out


def test_training_rows_are_not_their_own_baseline(evaluate, data, tmp_path, capsys):
    predictions = write_predictions(tmp_path / "p.jsonl", truths(data, "train"))
    assert evaluate("--predictions", predictions, "--split", "train") == 0
    assert "question only: skipped (the evaluated rows are training rows)" in capsys.readouterr().out


def test_two_files_are_compared(evaluate, data, tmp_path, capsys):
    right = write_predictions(tmp_path / "a.jsonl", truths(data))
    wrong = write_predictions(tmp_path / "b.jsonl", [(q, "?") for q, _ in truths(data)])
    assert evaluate("--predictions", right, "--against", wrong) == 0
    assert "only this / only those right 12 / 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--predictions", "p", "--checkpoint", "c"), 2, "one or the other"),
        (("--predictions", "p", "--limit", 0), 2, "--limit: got 0; wanted at least 1"),
        (("--predictions", "p", "--bootstrap", -1), 2, "--bootstrap: got -1"),
        (("--predictions", "absent.jsonl"), 1, "No such file or directory: absent.jsonl"),
        (("--predictions", "."), 1, "Is a directory"),
        (("--predictions", "p", "--json", "."), 2, "--json: . is a folder"),
        (("--predictions", "p", "--out", "p"), 2, "--out: p is a file"),
        (("--predictions", "p", "--split", "vlidate"), 1, "split: got 'vlidate'"),
        (("--checkpoint", "no-such-model"), 1, "no-such-model"),
    ],
)
def test_bad_input_is_one_line(evaluate, data, tmp_path, capsys, flags, code, message):
    write_predictions(tmp_path / "p", truths(data))
    assert evaluate(*flags) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_unknown_flag_is_usage(evaluate, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate("--predicitons", "p")
    assert stop.value.code == 2
    assert "--predictions" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_fails_before_the_work(evaluate, data, tmp_path, capsys):
    predictions = write_predictions(tmp_path / "p.jsonl", truths(data))
    (tmp_path / "shut").mkdir(mode=0o500)
    assert evaluate("--predictions", predictions, "--out", tmp_path / "shut" / "out") == 1
    assert "cannot write to" in capsys.readouterr().err


@pytest.fixture
def checkpoint(processor, tmp_path):
    """A two-layer model of random weights with the tiny vocabulary."""
    import torch

    from miss.models.config import MissConfig, TextConfig, TokenConfig, VisionConfig
    from miss.models.vqa import MissVQA
    from miss.models.weights import save_checkpoint

    width = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
    text = TextConfig(vocab_size=processor.tokenizer.get_vocab_size(), source_width=32, **width)
    tokens = TokenConfig(
        processor.pad, processor.tokenizer.token_to_id("[CLS]"), processor.sep, processor.dec, processor.enc
    )
    config = MissConfig(
        vision=VisionConfig(image_size=28, patch_size=14, **width),
        encoder=text,
        decoder=text,
        preprocess=processor.preprocess,
        tokens=tokens,
        name="tiny",
    )
    torch.manual_seed(1)
    model = MissVQA(config)
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that the image matters
            parameter.add_(torch.randn_like(parameter) * 0.3)
    save_checkpoint(model, tmp_path / "tiny", tokenizer=processor.tokenizer)
    return tmp_path / "tiny"


def test_a_checkpoint_is_asked_with_and_without_the_image(evaluate, checkpoint, tmp_path):
    flags = ("--checkpoint", checkpoint, "--shuffled", "--max-new-tokens", 4, "--json", tmp_path / "m.json")
    assert evaluate(*flags) == 0
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["model"]["name"] == "tiny" and len(metrics["model"]["sha256"]) == 64
    assert metrics["calibration"]["n"] == 12
    assert set(metrics["seconds"]) == {"image", "blank", "shuffled", "total"}
    baselines = metrics["baselines"]
    assert {name for name, run in baselines.items() if "overall" in run} == {"blank", "shuffled", "question_only"}
    rows = [json.loads(line) for line in (tmp_path / "runs/evaluate-jsonl-validate/predictions.jsonl").open()]
    assert all(0 < row["score"] <= 1 and row["seconds"] > 0 for row in rows)
    assert all(row["score"] == pytest.approx(math.exp(row["logprob"])) for row in rows)

    # The same answers one at a time, and from the file of the first run.
    assert evaluate(*flags, "--batch-size", 1, "--no-baselines", "--out", tmp_path / "one") == 0
    one = [json.loads(line) for line in (tmp_path / "one/predictions.jsonl").open()]
    assert [row["prediction"] for row in one] == [row["prediction"] for row in rows]
    again = ("--predictions", tmp_path / "one/predictions.jsonl", "--json", tmp_path / "again.json")
    assert evaluate(*again) == 0
    assert json.loads((tmp_path / "again.json").read_text())["overall"] == metrics["overall"]


def test_slakes_own_answers_are_all_right(tmp_path, monkeypatch):
    root = data_root()
    manifest = root / "slake" / "validate.json"
    if not manifest.is_file():
        pytest.skip(f"{manifest} is not there")
    rows = [r for r in json.loads(manifest.read_text()) if r["q_lang"] == "en"]
    monkeypatch.chdir(tmp_path)
    predictions = tmp_path / "p.json"
    predictions.write_text(json.dumps([{"qid": r["qid"], "answer": r["answer"].lower()} for r in rows]))
    flags = ["--dataset", "slake", "--split", "validate", "--data", str(root), "--predictions", str(predictions)]
    assert run(["evaluate", *flags, "--json", "m.json"]) == 0
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["n"] == len(rows) == 1053 and metrics["num_images"] == 96
    assert (metrics["open"]["n"], metrics["closed"]["n"]) == (631, 422)
    for part in ("overall", "open", "closed"):
        assert metrics[part]["accuracy"] == 1.0
    assert metrics["protocols"]["original"]["closed"]["n"] == 358
    assert metrics["protocols"]["llava_med"]["open"]["bleu1"]["value"] == 1.0
    # The lookup that never sees an image: what a model has to beat.
    low, high = metrics["baselines"]["question_only"]["overall"]["ci95"]
    assert 0.4 < low < high < 0.7
    assert metrics["train"]["rows_on_training_images"] == 0
