"""The loop: exact resume, accumulation, grouping, non-finite values, signals, crashes, features, the log."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from miss.engine.data.augment import Limits
from miss.engine.data.loader import Visit, collate
from miss.engine.training.checkpoint import CheckpointCorrupt, CheckpointNotSaved, CheckpointStore
from miss.engine.training.features import (
    FeatureStore,
    PixelStore,
    cached_array,
    channel_statistics,
    fold_standardisation,
    weights_digest,
)
from miss.engine.training.log import read_log
from miss.engine.training.plain import PlainEngine
from miss.engine.training.state import seed_everything
from miss.engine.training.trainer import NotFinite, Stopped
from tests.engine.tiny import RandomPixels, RandomTokens, tiny_model, tiny_rows, tiny_train_config, tiny_trainer

ROOT = Path(__file__).resolve().parents[2]


def state(folder):
    """Everything that a run's last checkpoint holds, bit for bit."""
    newest = CheckpointStore(Path(folder) / "checkpoints").newest()
    tensors = {f"{p.name}:{k}": t for p in newest.glob("*.safetensors") for k, t in load_file(p).items()}
    texts = {p.name: p.read_text() for p in newest.glob("*.json") if p.name != "MANIFEST.json"}
    return newest.name, tensors, texts


def assert_same_state(a, b):
    (name_a, tensors_a, texts_a), (name_b, tensors_b, texts_b) = state(a), state(b)
    assert name_a == name_b and texts_a == texts_b and tensors_a.keys() == tensors_b.keys()
    different = [key for key, t in tensors_a.items() if not torch.equal(t, tensors_b[key])]
    assert not different


def fake_accuracy(model):
    """A validation figure that depends on every bit of the weights."""
    return {"accuracy": float(sum(p.double().sum() for p in model.parameters()).sin())}


def resumed(config, folder, stop_at, **hands):
    trainer = tiny_trainer(config, folder, **hands)
    trainer.resume(CheckpointStore(folder / "checkpoints").newest())
    return trainer.fit(stop_at)


EVERYTHING = {
    "data": {"images_per_step": 4, "accumulation": 2},
    "ema": {"decay": 0.9},
    "validation": {"every": 3},
    "label_smoothing": 0.1,
}


def test_2n_steps_are_n_and_resume_and_n_bitwise(tmp_path):
    config = tiny_train_config(**EVERYTHING)
    hands = {"dropout": 0.2, "validate": fake_accuracy}
    tiny_trainer(config, tmp_path / "whole", **hands).fit()
    first = tiny_trainer(config, tmp_path / "parts", **hands)
    assert first.fit(4)["step"] == 4
    torch.manual_seed(999)  # what the new process happens to have
    random.seed(999)
    np.random.seed(999)
    summary = resumed(config, tmp_path / "parts", None, **hands)
    assert (summary["step"], summary["resumed_from"]) == (8, 4)
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    timeless = [
        [
            (line["kind"], line["step"], line.get("loss"), line.get("accuracy"))
            for line in read_log(folder / "log.jsonl")
        ]
        for folder in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert timeless[0] == timeless[1]


def test_resume_continues_the_generators(tmp_path):
    config = tiny_train_config()
    tiny_trainer(config, tmp_path).fit(2)
    expected = random.random(), np.random.rand(), torch.rand(3)
    trainer = tiny_trainer(config, tmp_path)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    trainer.resume(CheckpointStore(tmp_path / "checkpoints").newest())
    assert (random.random(), np.random.rand()) == expected[:2] and torch.equal(torch.rand(3), expected[2])


def test_resume_refuses_another_run_and_another_model(tmp_path):
    tiny_trainer(tiny_train_config(), tmp_path).fit(1)
    newest = CheckpointStore(tmp_path / "checkpoints").newest()
    with pytest.raises(ValueError, match=r"optimizer.rate_new: 0.003 there, 0.1 now"):
        tiny_trainer(tiny_train_config(optimizer={"rate_new": 0.1}), tmp_path).resume(newest)
    tiny_trainer(tiny_train_config(log={"every": 1}), tmp_path).resume(newest)  # how much is logged may change
    (newest / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointCorrupt):
        tiny_trainer(tiny_train_config(), tmp_path).resume(newest)


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_accumulated_parts_are_the_whole_step(tmp_path, parts):
    """The gradients that an update would be made with, in float64."""

    class Recording(PlainEngine):
        def step(self, rate_share, max_norm, norm):
            found.append({self._names[id(p)]: p.grad.clone() for p in self._parameters if p.grad is not None})
            self.optimizer.zero_grad()

    class Doubles(RandomTokens):
        def gather(self, images, visits):
            return None, self.tokens[list(images)].double()

    found, rows = [], tiny_rows()
    for n in (1, parts):
        config = tiny_train_config(
            data={"images_per_step": 5, "accumulation": n}, schedule={"total_steps": 1, "warmup_steps": 0}
        )
        trainer = tiny_trainer(config, tmp_path / str(n), engine=Recording, store=Doubles(len(rows)), rows=rows)
        trainer.model.double()
        trainer.fit()
    assert found[0].keys() == found[1].keys() and len(found) == 2
    for name, whole in found[0].items():
        assert torch.allclose(whole, found[1][name], rtol=1e-9, atol=1e-11), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("pixels", [False, True])
def test_grouped_batches_are_ungrouped_ones_in_loss_and_gradients(dtype, pixels):
    rows = tiny_rows(5)
    store = RandomPixels(5) if pixels else RandomTokens(5)
    grouped = [Visit(i, 0, tuple(range(len(r)))) for i, r in enumerate(rows)]
    single = [Visit(i, 0, (r,)) for i, group in enumerate(rows) for r in range(len(group))]
    results = []
    for visits in (grouped, single):
        model = tiny_model().to(dtype)
        values = store.gather([v.image for v in visits], [0] * len(visits))
        batch = collate(
            visits, rows, *[t if t is None or t.dtype == torch.uint8 else t.to(dtype) for t in values]
        ).batch
        output = model(batch, 0.1, None)
        output.loss_per_row.mean().backward()
        results.append((output.loss_per_row.detach(), {n: p.grad for n, p in model.named_parameters()}))
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-6}
    assert torch.allclose(results[0][0], results[1][0], **tolerance)
    for name, gradient in results[0][1].items():
        other = results[1][1][name]
        assert (gradient is None) == (other is None) and (
            gradient is None or torch.allclose(gradient, other, **tolerance)
        )


def test_training_lowers_the_loss(tmp_path):
    rates = {"rate_new": 2e-2, "rate_text": 1e-2}
    config = tiny_train_config(schedule={"total_steps": 40}, log={"every": 10}, optimizer=rates)
    tiny_trainer(config, tmp_path).fit()
    losses = [line["loss"] for line in read_log(tmp_path / "log.jsonl") if line["kind"] == "train"]
    assert losses[-1] < 0.8 * losses[0]
    line = read_log(tmp_path / "log.jsonl")[-1]
    wanted = {"samples_per_s", "images_per_s", "eta_s", "data_wait_share", "gflops_per_s", "gradient_norm", "epoch"}
    assert wanted <= line.keys() and 0 <= line["data_wait_share"] < 1 and line["gflops_per_s"] > 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "summary.json").read_text())["step"] == 40


class SomeNan(RandomTokens):
    """Tokens of one image that are not numbers."""

    def __init__(self, num_images, bad):
        super().__init__(num_images)
        self.tokens[bad] = float("nan")


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_rows(tmp_path):
    rows = tiny_rows()
    config = tiny_train_config(ema={"decay": 0.5})
    trainer = tiny_trainer(config, tmp_path, store=SomeNan(len(rows), bad=2), rows=rows)
    with pytest.raises(NotFinite) as caught:
        trainer.fit()
    step = trainer.progress.step
    asked = [qid for part in trainer.loader.build(step).parts for qid in part.qids if qid.startswith("q2.")]
    assert asked and f"Rows: {', '.join(asked)}." in str(caught.value) and f"step {step + 1}" in str(caught.value)
    for tensors in (trainer.model.state_dict(), trainer.ema.average):
        assert all(t.isfinite().all() for t in tensors.values())


def test_a_gradient_that_is_not_finite_stops_and_names_the_step(tmp_path):
    trainer = tiny_trainer(tiny_train_config(), tmp_path)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.model.decoder.head.bias.register_hook(lambda g: g * float("inf"))
    with pytest.raises(NotFinite, match="gradient norm (inf|nan)") as caught:
        trainer.fit()
    assert all(qid in str(caught.value) for part in trainer.loader.build(0).parts for qid in part.qids)
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


@pytest.mark.parametrize("moment", ["step", "validation"])
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_at_the_steps_end_and_leaves(tmp_path, moment, name, code, capsys):
    config = tiny_train_config(**EVERYTHING)
    sent = []

    def send():
        if not sent:
            sent.append(1)
            os.kill(os.getpid(), getattr(signal, name))

    class Sending(RandomTokens):
        def gather(self, images, visits):
            if moment == "step" and len(sent) == 0 and trainer.progress.step == 2:
                send()
            return super().gather(images, visits)

    def validate(model):
        if moment == "validation":
            send()
            time.sleep(0.01)
        return fake_accuracy(model)

    before = signal.getsignal(signal.SIGTERM)
    tiny_trainer(config, tmp_path / "whole", dropout=0.2, validate=fake_accuracy).fit()
    rows = tiny_rows()
    trainer = tiny_trainer(
        config, tmp_path / "cut", dropout=0.2, validate=validate, store=Sending(len(rows)), rows=rows
    )
    with pytest.raises(Stopped) as caught:
        trainer.fit()
    assert caught.value.code == code and f"{name}: saved" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before
    assert trainer.progress.step == 3 and trainer.progress.best is None or moment == "step"
    resumed(config, tmp_path / "cut", None, dropout=0.2, validate=fake_accuracy)
    assert_same_state(tmp_path / "whole", tmp_path / "cut")


def test_best_is_exported_and_patience_ends_the_run(tmp_path):
    figures = iter([0.2, 0.5, 0.4, 0.3, 0.9])
    weights = []

    def export(folder):
        folder.mkdir(exist_ok=True)
        weights.append((folder.name, trainer.model.decoder.head.bias.detach().clone()))

    config = tiny_train_config(validation={"every": 1, "patience": 2}, ema={"decay": 0.9})
    trainer = tiny_trainer(config, tmp_path, validate=lambda model: {"accuracy": next(figures)}, export=export)
    summary = trainer.fit()
    assert (summary["best"], summary["best_step"], summary["step"]) == (0.5, 2, 4)
    assert [name for name, _ in weights] == ["best", "best", "last"]
    average = trainer.ema.average["decoder.head.bias"]
    assert torch.equal(weights[-1][1], average) and not torch.equal(average, trainer.model.decoder.head.bias)
    assert resumed(config, tmp_path, None, validate=lambda model: {"accuracy": 1.0})["step"] == 4


def test_a_metric_that_validation_does_not_give(tmp_path):
    config = tiny_train_config(validation={"every": 1, "metric": "accuracy_slaek"})
    with pytest.raises(ValueError, match="accuracy_slaek.*validation gives accuracy"):
        tiny_trainer(config, tmp_path, validate=fake_accuracy).fit()


def test_a_full_disk_ends_the_run_with_one_error_and_the_old_checkpoint(tmp_path):
    import resource

    config = tiny_train_config(checkpoint={"every": 2})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Filling(RandomTokens):
        def gather(self, images, visits):
            if trainer.progress.step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            return super().gather(images, visits)

    rows = tiny_rows()
    trainer = tiny_trainer(config, tmp_path, store=Filling(len(rows)), rows=rows)
    try:
        with pytest.raises(CheckpointNotSaved, match="File too large.*--resume auto"):
            trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    newest = CheckpointStore(tmp_path / "checkpoints").newest()
    assert newest.name == "step-00000002"
    resumed(config, tmp_path, None)
    tiny_trainer(config, tmp_path / "whole").fit()
    assert_same_state(tmp_path / "whole", tmp_path)


def test_frozen_parameters_and_bf16(tmp_path):
    config = tiny_train_config(bf16=True, optimizer={"freeze": ["*.embeddings.*"]})
    trainer = tiny_trainer(config, tmp_path)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.fit()
    for name, parameter in trainer.model.named_parameters():
        stays = name.startswith("vision.") or ".embeddings." in name
        assert torch.equal(parameter, before[name]) == stays, name
        assert parameter.dtype == torch.float32


# ---- image tensors ----


def pixel_store(num=4, limits=None):
    return PixelStore(RandomPixels(num).pixels, list(range(100, 100 + num)), limits, 7, (0, 0, 0))


def test_cached_tokens_are_what_the_encoder_gives(tmp_path):
    model, pixels = tiny_model(), pixel_store(limits=Limits(10, 0.8, 0.2, 0.2))
    store = FeatureStore.build(model.encode_images, "key", pixels, [1, 3, 2, 1], torch.float32, tmp_path, batch=3)
    with torch.no_grad():
        expected = model.encode_images(pixels.pixels)
    assert torch.allclose(store.gather([0, 3, 0], [5, 6, 7])[1], expected[[0, 3, 0]], atol=1e-6)
    seen = {bytes(store.gather([1], [v])[1].numpy().tobytes()) for v in range(40)}
    assert len(seen) == 3, "three copies, all of them used"
    assert torch.equal(store.gather([1, 2], [8, 9])[1], store.gather([1, 2], [8, 9])[1])


def test_cache_is_found_again_and_not_mistaken(tmp_path):
    model, calls = tiny_model(), []

    def encode(pixels):
        calls.append(len(pixels))
        return model.encode_images(pixels)

    build = lambda key, store, copies: FeatureStore.build(encode, key, store, copies, torch.bfloat16, tmp_path)  # noqa: E731
    limits = Limits(10, 0.8, 0.2, 0.2)
    build("a", pixel_store(limits=limits), [2] * 4)
    count = len(calls)
    build("a", pixel_store(limits=limits), [2] * 4)
    assert len(calls) == count + 1, "only the shape is asked for"
    for key, store, copies in (
        ("b", pixel_store(limits=limits), [2] * 4),
        ("a", pixel_store(limits=Limits(5, 0.8, 0.2, 0.2)), [2] * 4),
        ("a", pixel_store(limits=limits), [2, 2, 2, 3]),
    ):
        before = len(list(tmp_path.iterdir()))
        build(key, store, copies)
        assert len(list(tmp_path.iterdir())) == before + 1
    digest = weights_digest(model)
    with torch.no_grad():
        model.vision.norm.bias[0] += 1e-7
    assert weights_digest(model) != digest


def test_an_interrupted_cache_is_not_taken_for_a_whole_one(tmp_path):
    def broken(out):
        out[0] = 1
        raise ValueError("cut")

    with pytest.raises(ValueError, match="cut"):
        cached_array(tmp_path / "x.bin", (3,), torch.float32, broken)
    assert list(tmp_path.iterdir()) == []
    assert cached_array(tmp_path / "x.bin", (3,), torch.float32, lambda out: out.fill_(2)).tolist() == [2, 2, 2]


def test_standardisation_folds_exactly_into_the_last_norm(tmp_path):
    model, pixels = tiny_model().double(), pixel_store(6)
    with torch.no_grad():
        model.vision.norm.weight.uniform_(0.5, 2)
        model.vision.norm.bias.uniform_(-3, 3)
        raw = model.encode_images(pixels.pixels)
        mean, deviation = channel_statistics(model.encode_images, "k", pixels, tmp_path, batch=4)
        assert torch.allclose(mean, raw.flatten(0, 1).mean(0), atol=1e-10)
        assert torch.allclose(deviation, raw.flatten(0, 1).std(0, correction=0), atol=1e-8)
        fold_standardisation(model.vision.norm, mean, deviation)
        tokens = model.encode_images(pixels.pixels)
    assert torch.allclose(tokens, (raw - mean) / deviation, atol=1e-9)
    assert torch.allclose(tokens.flatten(0, 1).std(0, correction=0), torch.ones(32, dtype=torch.float64), atol=1e-8)


def test_pixel_batches_are_augmented_by_visit():
    store = pixel_store(limits=Limits(10, 0.8, 0.2, 0.2))
    first, again, other = (store.gather([1, 2], visits)[0] for visits in ([0, 5], [0, 5], [1, 5]))
    assert torch.equal(first, again) and torch.equal(first[1], other[1]) and not torch.equal(first[0], other[0])
    plain = pixel_store().gather([1, 2], [0, 5])[0]
    assert torch.equal(plain, RandomPixels(4).pixels[[1, 2]])


# ---- kill -9 while training ----

# Imports once; for each folder on its standard input forks a process that goes on with the run in it.
CHILD = """
import os, sys
from pathlib import Path
from tests.engine.test_trainer import go_on
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        steps, folder = line.strip().split(maxsplit=1)
        go_on(Path(folder), int(steps))
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""
KILLED = {
    **EVERYTHING,
    "checkpoint": {"every": 1},
    "validation": {"every": 7},
    "log": {"every": 100},
}


def go_on(output, steps):
    seed_everything(0)
    config = tiny_train_config(**KILLED, schedule={"total_steps": steps})
    trainer = tiny_trainer(config, output, dropout=0.2, validate=fake_accuracy)
    store = CheckpointStore(output / "checkpoints")
    store.clean()
    newest = store.newest()
    if newest:
        trainer.resume(newest)
    trainer.fit()


def kill_while_training(tmp_path, rng, kills):
    """A run that is killed again and again ends bit for bit as one that never was."""
    parent = subprocess.Popen(
        [sys.executable, "-c", CHILD], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin is not None and parent.stdout is not None

    def start(name):
        parent.stdin.write(f"{25 + 5 * kills} {tmp_path / name}\n")
        parent.stdin.flush()
        return int(parent.stdout.readline())

    num_killed = 0
    for _ in range(kills):
        child = start("killed")
        time.sleep(rng.uniform(0.05, 0.5))
        os.kill(child, signal.SIGKILL)
        num_killed += int(parent.stdout.readline()) == signal.SIGKILL
    for name in ("killed", "whole"):
        start(name)
        assert int(parent.stdout.readline()) == 0
    parent.stdin.close()
    parent.wait()
    assert num_killed == kills, "the run was over before it could be killed: give it more steps"
    assert_same_state(tmp_path / "whole", tmp_path / "killed")


def test_kill_9_while_training(tmp_path):
    kill_while_training(tmp_path, random.Random(3), 3)


@pytest.mark.torture
def test_kill_9_while_training_often(tmp_path):
    kill_while_training(tmp_path, random.Random(4), 20)
