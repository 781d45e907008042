"""Joining, baselines, breakdown, the runner and what is written, on samples and answerers made up here."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miss.engine.data.datasets import Sample
from miss.engine.evaluation.baselines import LEVELS, QuestionOnly, other_images
from miss.engine.evaluation.breakdown import answer_length
from miss.engine.evaluation.files import write_files
from miss.engine.evaluation.predictions import Prediction, PredictionError, join, read_predictions
from miss.engine.evaluation.report import files, json_bytes, markdown, summary, write_report
from miss.engine.evaluation.runner import Options, evaluate, quick_accuracy


def sample(qid, question="is there a mass?", answer="Yes", image="a", answer_type="closed", **fields):
    values = dict.fromkeys(("modality", "organ", "question_type")) | {"language": "en"} | fields
    return Sample(
        qid=str(qid),
        image=Path(f"{image}.png"),
        question=question,
        answer=answer,
        answer_type=answer_type,
        image_key=image,
        **values,
    )


def made_up(num_images=6, questions=4):
    """Rows whose truth depends on the image (odd or even), so that blank and question-only runs are half right."""
    rows = []
    for i in range(num_images):
        for q in range(questions):
            closed = q % 2 == 0
            answer = ("Yes", "No")[i % 2] if closed else ("Left Lung", "the Liver")[i % 2]
            rows.append(
                sample(
                    f"{i}.{q}",
                    f"question number {q}?",
                    answer,
                    f"image{i}",
                    "closed" if closed else "open",
                    modality=("CT", "MRI")[i % 2],
                    question_type="rare" if (i, q) == (0, 0) else "common",
                    content_type="freeform",
                )
            )
    return rows


class Looks:
    """Right when shown the image, answers as for the first image when it is blank; backwards, to try the join."""

    def __init__(self):
        self.modes = []

    def __call__(self, samples, mode):
        self.modes.append(mode)
        shown = other_images(samples, 0) if mode == "shuffled" else samples
        first = {s.question: s.answer for s in reversed(samples)}
        for s, other in reversed(list(zip(samples, shown, strict=True))):
            same = [t for t in samples if t.image_key == other.image_key and t.question == s.question]
            answer = first[s.question] if mode == "blank" else same[0].answer
            yield Prediction(s.qid, answer.lower(), 0.8, -0.223, 0.01)


OPTIONS = Options("made-up", "test", num_resamples=200, shuffled=True)


# Joining.


def test_join_is_by_qid_in_the_order_of_the_samples():
    samples = [sample(q) for q in ("b", "a", "c")]
    joined = join(samples, [Prediction(q, q) for q in ("a", "c", "b")])
    assert [p.answer for p in joined] == ["b", "a", "c"]


@given(st.lists(st.integers(0, 5), max_size=8))
def test_join_takes_permutations_only(qids):
    samples = [sample(q) for q in range(4)]
    predictions = [Prediction(str(q), "x") for q in qids]
    if sorted(qids) == [0, 1, 2, 3]:
        assert len(join(samples, predictions)) == 4
    else:
        with pytest.raises(PredictionError, match="wanted exactly one a qid"):
            join(samples, predictions)


def test_join_lists_what_is_wrong():
    samples = [sample(q) for q in range(3)]
    with pytest.raises(PredictionError) as error:
        join(samples, [Prediction(q, "x") for q in ("0", "0", "9")], "answers.jsonl")
    message = str(error.value)
    assert message.startswith("answers.jsonl: got 3 rows for 3 questions")
    assert "2 missing (no prediction for the qid): 1, 2" in message
    assert "1 extra (no such question): 9" in message
    assert "1 double (several predictions of one qid): 0" in message
    with pytest.raises(PredictionError, match="1 double qid in the data set: 7"):
        join([sample(7), sample(7)], [Prediction("7", "x")])
    with pytest.raises(PredictionError, match="990 more"):
        join([sample(q) for q in range(1000)], [])


# Reading predictions.


def read(tmp_path, text):
    path = tmp_path / "predictions"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_predictions(path)


def test_both_forms_and_our_own_file_are_read(tmp_path):
    wanted = [Prediction("1", "yes"), Prediction("b", "2.5")]
    rows = [{"qid": 1, "answer": "yes"}, {"qid": "b", "answer": 2.5, "more": None}]
    assert read(tmp_path, json.dumps(rows)) == wanted
    assert read(tmp_path, "\n\n".join(map(json.dumps, rows))) == wanted
    assert read(tmp_path, b"\xef\xbb\xbf" + json.dumps(rows).encode()) == wanted, "with a byte order mark"
    assert read(tmp_path, '{"qid": "a", "answer": "x\u2028y"}')[0].answer == "x\u2028y"
    ours = {"qid": "1", "prediction": "no", "answer": "yes", "score": 0.5, "logprob": -0.7, "seconds": 0.1}
    assert read(tmp_path, json.dumps(ours)) == [Prediction("1", "no", 0.5, -0.7, 0.1)]
    assert read(tmp_path, '{"qid": 1, "answer": "a", "logprob": 0.0}')[0].score == 1.0
    assert read(tmp_path, "") == [] == read(tmp_path, "[]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"qid": 1, "answer": "a"}\n{"qid": 2, "ans', "line 2: not JSON"),
        ('[{"qid": 1, "answer": "a"}', "cut short"),
        ('["yes"]', "row 1: got str; wanted an object"),
        ('{"answer": "a"}', "qid is null"),
        ('{"qid": true, "answer": "a"}', "qid is true"),
        ('{"qid": 1}', r"\(qid 1\): answer is null"),
        ('{"qid": 1, "answer": ["a"]}', "answer is"),
        ('{"qid": 1, "answer": "a", "score": 1.5}', "score is 1.5; wanted a probability"),
        ('{"qid": 1, "answer": "a", "logprob": NaN}', "logprob is nan; wanted a finite number"),
        (b"\xff\xfe\x00", "not UTF-8"),
        ("[" * 100_000, "not a whole JSON list"),
        ("{}\n" + '{"a":' * 100_000, "line 1|line 2"),
    ],
)
def test_bad_files_say_where(tmp_path, text, message):
    with pytest.raises(PredictionError, match=message):
        read(tmp_path, text)


# Baselines.


def test_question_only_takes_the_most_frequent_answer_and_falls_back():
    train = [
        sample(1, "What organ is it?", "Liver", question_type="organ"),
        sample(2, "what organ is it", "liver", question_type="organ"),
        sample(3, "what organ is it", "Lung", question_type="organ"),
        sample(4, "what colour is it", "white", question_type="colour"),
        sample(5, "is it big", "no", question_type="size"),
        sample(6, "is it small", "no", question_type="size"),
        sample(7, "is it red", "no", question_type="colour"),
    ]
    lookup = QuestionOnly(train)
    asked = [
        sample("a", "what organ is it??", question_type=None),
        sample("b", "what is brightest", question_type="colour"),
        sample("c", "what is left", question_type="unheard of"),
        sample("d", "where is it", question_type="organ"),
    ]
    answers = lookup(asked)
    assert [p.answer for p in answers] == ["Liver", "white", "Liver", "no"]
    assert answers[0].score == pytest.approx(2 / 3)
    assert lookup.used == dict.fromkeys(LEVELS, 1)
    with pytest.raises(ValueError, match="no training rows"):
        QuestionOnly([])


def test_equally_frequent_answers_do_not_depend_on_the_order():
    train = [sample(1, "q", "b"), sample(2, "q", "a")]
    assert {QuestionOnly(t)([sample(3, "q")])[0].answer for t in (train, train[::-1])} == {"a"}


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=20), st.integers(0, 50))
def test_shuffled_images_are_never_ones_own(images, seed):
    samples = [sample(i, image=image) for i, image in enumerate(images)]
    if len(set(images)) < 2:
        with pytest.raises(ValueError, match="wanted at least 2"):
            other_images(samples, seed)
        return
    shown = [s.image_key for s in other_images(samples, seed)]
    pairs = set(zip(images, shown, strict=True))
    assert all(own != other for own, other in pairs)
    assert len(pairs) == len(set(images)) == len(set(shown))


# The runner.


def test_an_evaluation_of_an_answerer():
    answerer, samples = Looks(), made_up()
    metrics = evaluate(samples, answerer, OPTIONS, train=made_up(2)).metrics
    assert answerer.modes == ["image", "blank", "shuffled"]
    assert metrics["n"] == 24 and metrics["num_images"] == 6
    assert metrics["overall"] == {"accuracy": 1.0, "ci95": [1.0, 1.0], "n": 24}
    assert metrics["open"]["n"] == metrics["closed"]["n"] == 12
    blank = metrics["baselines"]["blank"]
    assert blank["overall"]["accuracy"] == 0.5
    assert blank["gain"]["difference"]["value"] == 0.5
    assert blank["gain"]["mcnemar"] == {"only_this": 12, "only_other": 0, "p_value": pytest.approx(2 / 2**12)}
    assert blank["answers_changed"]["value"] == 0.5
    assert metrics["baselines"]["shuffled"]["overall"]["accuracy"] < 1
    only = metrics["baselines"]["question_only"]
    # Two training images of opposite answers: the alphabetically first of each pair, right for half the images.
    assert only["overall"]["accuracy"] == 0.5 and only["answered_from"]["question"] == 24
    protocols = metrics["protocols"]
    assert protocols["original"]["closed"]["n"] == 12 and protocols["original"]["closed"]["accuracy"] == 1.0
    assert protocols["exact_match"]["strict"]["accuracy"] == 0.0, "lower case is not the truth's"
    assert protocols["llava_med"]["open"]["recall"] == {"value": 1.0, "ci95": [1.0, 1.0], "n": 12}
    calibration = metrics["calibration"]
    assert calibration["ece_equal_width"]["value"] == pytest.approx(0.2)
    assert calibration["risk_coverage"] == [[1.0, 0.0]]
    assert metrics["train"] == {"n": 8, "rows_on_training_images": 8}
    json_bytes(metrics)


def test_cells_under_ten_rows_are_counted_not_shown():
    found = evaluate(made_up(), Looks(), OPTIONS, train=made_up(1)).metrics["breakdown"]
    assert set(found) == {"modality", "question_type", "content_type", "answer_length", "answer_seen"}
    assert set(found["modality"]["cells"]) == {"CT", "MRI"}
    assert found["modality"]["cells"]["CT"]["n"] == 12 and found["modality"]["cells"]["CT"]["num_images"] == 3
    assert found["question_type"]["hidden"] == {"num_cells": 1, "n": 1}
    assert found["answer_seen"]["cells"]["seen"]["n"] == found["answer_seen"]["cells"]["unseen"]["n"] == 12


def test_answer_lengths():
    texts = ("?", "the lung", "left lung", "a b c", "one two three four", "left right up down in")
    assert [answer_length(t) for t in texts] == [
        "1 word",
        "1 word",
        "2 words",
        "2 words",
        "3-4 words",
        "5 or more words",
    ]


@pytest.mark.parametrize(
    "samples",
    [[], [sample(1)], [sample(1), sample(2)], [sample(1, answer_type="open")], [sample(i, image="") for i in range(3)]],
    ids=["no rows", "one row", "one image", "all open", "no image keys"],
)
def test_nothing_divides_by_zero(samples, tmp_path):
    answers = [Prediction(s.qid, "yes", 0.5) for s in samples]
    evaluation = evaluate(samples, answers, OPTIONS)
    metrics = evaluation.metrics
    assert metrics["overall"]["n"] == len(samples)
    assert metrics["overall"]["accuracy"] == (1.0 if samples else None)
    for part in ("open", "closed"):
        if not metrics[part]["n"]:
            assert metrics[part] == {"accuracy": None, "ci95": None, "n": 0}
    assert metrics["num_images"] == len({s.image_key or s.qid for s in samples})
    assert "no model is loaded" in metrics["baselines"]["blank"]["skipped"]
    assert metrics["baselines"]["question_only"]["skipped"] == "there is no training split"
    write_report(evaluation, tmp_path, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "metrics.json").read_bytes()
    assert (tmp_path / "reliability.png").exists() == bool(samples)


def test_one_image_cannot_be_shuffled():
    metrics = evaluate([sample(1), sample(2)], Looks(), OPTIONS).metrics
    assert metrics["baselines"]["shuffled"]["skipped"] == "there is no other image to give"


def test_no_baselines_is_visible():
    options = dataclasses.replace(OPTIONS, baselines=False)
    answerer = Looks()
    metrics = evaluate(made_up(), answerer, options, train=made_up()).metrics
    assert answerer.modes == ["image"]
    assert "baselines: skipped (not asked for)" in summary(metrics)


def test_an_answerer_that_drops_a_question_is_an_error():
    def forgetful(samples, mode):
        yield from (Prediction(s.qid, "yes") for s in samples[1:])

    with pytest.raises(PredictionError, match=r"answers of the image run.*1 missing.*0\.0"):
        evaluate(made_up(), forgetful, OPTIONS)


def test_against_another_file_is_paired():
    samples = made_up()
    right = [Prediction(s.qid, s.answer) for s in samples]
    wrong = [Prediction(s.qid, "?" if s.qid.startswith("0") else s.answer) for s in samples]
    metrics = evaluate(samples, wrong, OPTIONS, against=right).metrics
    assert metrics["against"]["gain"]["mcnemar"] == {"only_this": 0, "only_other": 4, "p_value": 0.125}
    assert metrics["calibration"] == {"skipped": "24 of 24 predictions have no score"}
    assert "McNemar p 0.1250" in summary(metrics)
    assert "## Against other predictions" in markdown(metrics, [])


def test_quick_accuracy_for_choosing_a_checkpoint():
    samples = made_up(2)
    found = quick_accuracy(samples, [Prediction(s.qid, "yes") for s in samples])
    assert found == {"overall": 0.25, "open": 0.0, "closed": 0.5}


# What is written.


def without_times(data):
    metrics = json.loads(data)
    del metrics["seconds"]
    return metrics


def test_the_same_answers_give_the_same_files(tmp_path):
    one, other = (files(evaluate(made_up(), Looks(), OPTIONS, train=made_up(2)), tmp_path, None) for _ in range(2))
    assert {p.name for p in one} == {
        "metrics.json",
        "predictions.jsonl",
        "report.md",
        "accuracy.png",
        "breakdown.png",
        "reliability.png",
        "risk_coverage.png",
    }
    for path in one:
        if path.name == "metrics.json":
            assert without_times(one[path]) == without_times(other[path])
        else:
            assert one[path] == other[path], path.name


def test_the_predictions_can_be_scored_again(tmp_path):
    evaluation = evaluate(made_up(), Looks(), OPTIONS)
    write_report(evaluation, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [r["qid"] for r in rows] == [s.qid for s in made_up()], "in the order of the data set"
    assert list(rows[0])[:8] == ["qid", "question", "prediction", "answer", "correct", "score", "logprob", "seconds"]
    again = evaluate(made_up(), read_predictions(tmp_path / "predictions.jsonl"), OPTIONS).metrics
    for key in ("overall", "open", "closed", "protocols", "calibration", "breakdown"):
        assert again[key] == evaluation.metrics[key]


def test_the_report_shows_every_figure_with_its_interval():
    metrics = evaluate(made_up(), Looks(), OPTIONS, train=made_up(2)).metrics
    text = markdown(metrics, ["accuracy.png"])
    assert "| answers | 100.0 % [100.0, 100.0] | 100.0 % [100.0, 100.0] | 100.0 % [100.0, 100.0] |" in text
    assert "| blank image | 50.0 % [" in text and "| question only | 50.0 % [" in text
    assert "![accuracy](accuracy.png)" in text and "breakdown.png" not in text
    assert "None" not in text and "nan" not in text


def test_a_surrogate_in_an_answer_is_written_as_its_escape():
    assert json.loads(json_bytes({"answer": "a\ud800"})) == {"answer": "a\ud800"}


def test_an_earlier_plot_does_not_stay(tmp_path):
    write_report(evaluate(made_up(), Looks(), OPTIONS), tmp_path)
    assert (tmp_path / "reliability.png").exists()
    write_report(evaluate(made_up(), [Prediction(s.qid, "yes") for s in made_up()], OPTIONS), tmp_path)
    assert not (tmp_path / "reliability.png").exists()


FULL_DISK = """
import resource, sys
from pathlib import Path
from miss.engine.evaluation.files import write_files
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path(sys.argv[1])
try:
    write_files({folder / "small": b"new", folder / "large": b"x" * 5000, folder / "other": b"new"})
except OSError as error:
    print(error.filename)
"""


def test_a_full_disk_leaves_everything_as_it_was(tmp_path):
    # The limit on a file's size fails the write as a full disk does, part of the bytes written.
    (tmp_path / "small").write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == str(tmp_path / "large")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"small": "old"}
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def test_devices_and_links_are_written_to_not_replaced(tmp_path):
    real, link, pipe = tmp_path / "real", tmp_path / "link", tmp_path / "pipe"
    real.write_text("old")
    link.symlink_to(real)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_files({link: b"new", pipe: b"through"})
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert link.is_symlink() and real.read_text() == "new"
    assert pipe.is_fifo() and len(list(tmp_path.iterdir())) == 3
    with pytest.raises(IsADirectoryError):
        write_files({tmp_path: b""})
