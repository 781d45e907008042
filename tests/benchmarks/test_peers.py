"""Peers of a whole answer: the protocol, what is absent, and that all of them compute the same function."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from miss.benchmarks import answer_errors, answer_models, answer_report, answer_rounds, bench_answer
from miss.benchmarks.answer_models import QUESTION_TOKENS, Model, calibration_jobs, timed_job
from miss.benchmarks.peers import catalogue, miss_engine
from miss.benchmarks.peers.catalogue import ENTRIES, Entry
from miss.benchmarks.peers.job import TOP, Job
from miss.benchmarks.peers.process import PeerError, PeerProcess
from miss.benchmarks.peers.worker import Worker
from miss.cli import run
from miss.models.config import MissConfig, PreprocessConfig, TextConfig, VisionConfig
from miss.models.vqa import MissVQA
from miss.models.weights import save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    """A tiny checkpoint with the shipped tokenizer."""
    text = TextConfig(
        hidden_size=64, num_layers=2, num_heads=2, intermediate_size=96, max_positions=64, source_width=64
    )
    config = MissConfig(
        vision=VisionConfig(
            image_size=32, patch_size=8, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=96
        ),
        encoder=text,
        decoder=text,
        preprocess=PreprocessConfig(image_size=32, rescale_factor=1 / 255, image_mean=(0.5,) * 3, image_std=(0.2,) * 3),
        tie_embeddings=True,
    )
    torch.manual_seed(0)
    vqa = MissVQA(config).eval()
    with torch.no_grad():
        for parameter in vqa.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        vqa.decoder.head.bias[config.tokens.sep] = -1e4
    folder = tmp_path_factory.mktemp("peers")
    save_checkpoint(vqa, folder / "checkpoint", tokenizer=ROOT / "checkpoints" / "miss-small")
    return Model(folder / "checkpoint", folder / "work")


@pytest.fixture(scope="module")
def job(model) -> Job:
    return timed_job(model, Path("/nowhere"), 2, 2, TOKENS)


def loaded(name: str, model: Model):
    """A peer in this process; skips with a reason where its packages are not installed."""
    entry = ENTRIES[name]
    if reason := entry.missing():
        pytest.skip(f"{name}: {reason}")
    pytest.importorskip("matplotlib", reason="benchmarks draw")
    module = entry.load_module()
    paths = calibration_jobs(model, Path("/nowhere"), 2, model.work / "calibration")
    module.convert(entry.variant, model.checkpoint, model.work, paths)
    return module.load(entry.variant, model.checkpoint, model.work, 1, False)


def test_a_job_is_the_same_after_a_file_and_new_after_a_stamp(job, tmp_path):
    job.save(tmp_path / "job.npz")
    again = Job.load(tmp_path / "job.npz")
    assert np.array_equal(again.pixels, job.pixels) and again.texts == job.texts and np.array_equal(again.ids, job.ids)
    assert again.ids.shape == (4, QUESTION_TOKENS) and again.image_index.tolist() == [0, 0, 1, 1]
    stamped = {job.stamped(n).pixels.tobytes() for n in (1, 2, 257, 258)}
    assert len(stamped) == 4 and np.array_equal(again.pixels, job.pixels)


@pytest.mark.parametrize("name", ["hf-fp32", "hf-sdpa-fp32", "onnxruntime-fp32"])
def test_peers_compute_the_same_function(name, model, job):
    """fp32: token for token, and first logits to rounding."""
    ours, theirs = loaded("miss-fp32", model), loaded(name, model)
    theirs.prepare(job)
    assert theirs.run(job).tokens == ours.run(job).tokens
    ids, logprobs = theirs.first(job)
    expected_ids, expected = ours.first(job)
    assert ids.shape == (4, TOP)
    np.testing.assert_array_equal(ids[:, 0], expected_ids[:, 0])
    np.testing.assert_allclose(logprobs, expected, atol=2e-4)


@pytest.mark.parametrize("name", ["openvino-bf16", "openvino-int8", "openvino-wint8", "onnxruntime-int8", "torch-int8"])
def test_lossy_peers_are_near_the_truth(name, model, job):
    peer = loaded(name, model)
    peer.prepare(job)
    output = peer.run(job)
    assert all(len(row) == TOKENS for row in output.tokens) and set(output.seconds) == set(miss_engine.STAGES)
    exact = answer_errors.truth(model.checkpoint, job)
    ids, logprobs = peer.first(job)
    shifted = exact - np.log(np.exp(exact - exact.max(-1, keepdims=True)).sum(-1, keepdims=True))
    shifted -= exact.max(-1, keepdims=True)
    spread = np.abs(exact[exact > -1e3]).max()
    assert np.abs(np.take_along_axis(shifted, ids, -1) - logprobs).mean() < 0.1 * spread


def test_truth_is_what_ours_computes(model, job):
    exact = answer_errors.truth(model.checkpoint, job)
    ids, logprobs = loaded("miss-fp32", model).first(job)
    expected = exact - exact.max(-1, keepdims=True)
    expected -= np.log(np.exp(expected).sum(-1, keepdims=True))
    np.testing.assert_allclose(np.take_along_axis(expected, ids, -1), logprobs, atol=2e-4)


def test_processes_answer_in_turn_while_the_others_wait(model, job):
    file = model.work / "job.npz"
    job.save(file)
    entries = [ENTRIES["miss-fp32"], ENTRIES["miss-bf16"]]
    bursts: list[None] = []
    with answer_rounds.started(
        [lambda e=entry: PeerProcess(e, model.checkpoint, model.work, 1) for entry in entries],
        {},
        [entry.name for entry in entries],
    ) as peers:
        found, failed = answer_rounds.in_turn(peers, file, 3, lambda: bursts.append(None), frozenset({"miss-fp32"}))
        memory = peers[0].memory()
        errors = answer_errors.logit_errors(peers, model.checkpoint, job, model.work / "first.npz")
        with pytest.raises(PeerError, match="miss-fp32: FileNotFoundError"):
            peers[0].ask("run", model.work / "none.npz", stamp=1)
        assert peers[0].ask("run", file, stamp=1)["tokens"]  # and goes on
    assert not failed and len(bursts) == 3 and peers[0]._process.returncode == 0
    assert [len(found[e.name].seconds["total"]) for e in entries] == [3, 3]
    assert len(found["miss-fp32"].cached["total"]) == 3 and not found["miss-bf16"].cached["total"]
    assert all(len(row) == TOKENS for row in found["miss-bf16"].tokens)
    assert not memory or memory["peak_mb"] >= memory["resident_mb"] > 50
    assert errors["miss-fp32"]["relative_max"] < 1e-4 < errors["miss-bf16"]["relative_max"]
    ratio = answer_rounds.ratio(found["miss-fp32"], found["miss-bf16"])
    assert ratio["min"] <= ratio["median"] <= ratio["max"]


def test_a_peer_that_cannot_load_says_why(model):
    with pytest.raises(PeerError, match="miss-fp32 has ended: .*no checkpoint"):
        PeerProcess(ENTRIES["miss-fp32"], model.checkpoint.parent / "none", model.work / "empty", 1)


def test_absent_peers_are_named_with_what_installs_them(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    peers, absent = catalogue.chosen(("openvino-int8", "miss-torch-fp32"))
    assert [peer.name for peer in peers] == ["miss-torch-fp32"]
    assert "openvino" in absent["openvino-int8"] and "miss-engine[peer-openvino]" in absent["openvino-int8"]
    with pytest.raises(ValueError, match=r"openvino-int9 \(did you mean openvino-int8\?\)"):
        catalogue.chosen(("openvino-int9",))


def test_a_worker_tells_an_error_and_goes_on(model, job, tmp_path):
    import io

    from miss.benchmarks.peers.worker import serve

    job.save(tmp_path / "job.npz")
    asked = [{"do": "prepare", "job": "none"}, {"do": "run", "job": str(tmp_path / "job.npz"), "stamp": 3}]
    replies = io.StringIO()
    serve(Worker(loaded("miss-fp32", model)), io.StringIO("".join(json.dumps(a) + "\n" for a in asked)), replies)
    first, second = map(json.loads, replies.getvalue().splitlines())
    assert "FileNotFoundError" in first["error"] and second["seconds"]["total"] > 0


def test_the_command_prints_a_table_writes_files_and_ends_with_one_object(model, job, tmp_path, capsys, monkeypatch):
    from miss.benchmarks import answer_models

    monkeypatch.setattr(answer_models, "timed_model", lambda preset, size, work: model)
    flags = ["--preset", "small", "--precision", "bf16", "--peers", "none", "--rounds", "2", "--judged", "0"]
    flags += ["--questions-per-image", "1", "3", "--tokens", "2", "--data", "/nowhere", "--threads", "1"]
    assert run(["bench", "answer", *flags, "--work", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found["benchmark"] == "answer" and set(found["stages"]) == {"miss-bf16"}
    assert {"ratios", "memory", "errors", "environment"} <= set(found) and len(found["settings"]) == 2
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"answer.md", "answer-small-224px-b1-q3-t2.json", "answer-questions-small.png"} <= names
    assert found["settings"][1]["rows"]["miss-bf16"]["grouped"]["allowed"] > 1
    assert len(answer_report.read(tmp_path / "out")) == 2
    assert any(line.startswith("| **miss-bf16** |") for line in lines)


def test_what_compiles_for_minutes_is_alone_and_last():
    names = ["hf-compiled-bf16", "hf-bf16", "hf-sdpa-bf16", "miss-torch-bf16"]
    found = bench_answer.groups([ENTRIES[name] for name in names], 2)
    assert [[entry.name for entry in group] for group in found] == [
        ["hf-bf16", "hf-sdpa-bf16"], ["miss-torch-bf16"], ["hf-compiled-bf16"],
    ]  # fmt: skip
    assert bench_answer.groups([], 6) == [[]]


def test_a_run_that_is_killed_in_a_later_group_has_written_the_earlier_ones(model, tmp_path, monkeypatch):
    """A planted fault: nothing comes back from the second group."""
    right, names = bench_answer._group, []

    def planted(setting, options, model, file, entries, *rest):
        names.append([entry.name for entry in entries])
        if len(names) > 1:
            raise KeyboardInterrupt
        return right(setting, options, model, file, entries, *rest)

    monkeypatch.setattr(bench_answer, "_group", planted)
    monkeypatch.setattr(answer_models, "timed_model", lambda preset, size, work: model)
    monkeypatch.setattr(bench_answer, "_converted", lambda *_: True)
    flags = ["--preset", "small", "--precision", "bf16", "--rounds", "1", "--judged", "0", "--together", "1"]
    flags += ["--tokens", "2", "--data", "/nowhere", "--threads", "1", "--no-plots"]
    flags += ["--peers", "miss-nographs-bf16", "miss-torch-bf16"]
    assert run(["bench", "answer", *flags, "--work", str(tmp_path), "--out", str(tmp_path / "out")]) != 0
    (found,) = answer_report.read(tmp_path / "out")
    assert set(found["rows"]) == {"miss-bf16", "miss-nographs-bf16"} and set(found["ratios"]) == {"miss-nographs-bf16"}


def test_every_peer_has_a_file_and_an_extra():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for entry in ENTRIES.values():
        assert isinstance(entry, Entry) and (ROOT / "benchmarks" / "peers" / f"{entry.module}.py").is_file()
        assert not entry.packages or entry.extra in extras
