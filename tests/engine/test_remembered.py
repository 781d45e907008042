"""Tokens of a frozen image encoder: encoded once an image, the same losses, the same run when it is resumed."""

from pathlib import Path

import pytest
import torch

from miss.engine.training.checkpoint import CheckpointStore
from miss.engine.training.log import read_log
from miss.engine.training.pretrain import prepare
from miss.engine.training.remembered import RememberedTokens
from tests.engine.tiny_pairs import tiny_pretrain_config, write_pairs, write_start

STILL = {"rotate_degrees": 0.0, "crop_share": 1.0, "brightness": 0.0, "contrast": 0.0}
QUIET = {"every": 0, "pairs": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remembered")
    write_start(folder / "start")
    write_pairs(folder / "pairs")
    return folder


def begun(place, output, augment=STILL, **values):
    config = tiny_pretrain_config(place, train_vision=False, augment=augment, validation=QUIET, **values)
    return prepare(config, Path(output), tell=lambda text: None)


def test_an_image_is_encoded_once_by_itself_and_known_by_its_pixels():
    seen = []

    def encode(pixels):
        seen.append(pixels.shape)
        return pixels.float().flatten(1).mean(1)[:, None, None].expand(-1, 3, 4)

    remembered = RememberedTokens(encode)
    images = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)
    first = remembered(images)
    again = remembered(images[[3, 0, 3]])
    assert len(seen) == len(remembered) == 5 and set(seen) == {(1, 8, 8, 3)}
    assert torch.equal(again, first[[3, 0, 3]])
    images[0, 0, 0, 0] ^= 1
    remembered(images)
    assert len(remembered) == 6


def test_losses_are_those_of_a_run_that_looks_every_time(place, tmp_path):
    runs = [begun(place, tmp_path / name) for name in ("remembering", "looking")]
    runs[1].trainer.task._may_remember = False
    for run in runs:
        run.trainer.fit()
    known, looked = (
        [row for row in read_log(tmp_path / n / "log.jsonl") if "loss" in row] for n in ("remembering", "looking")
    )
    assert [row["loss"] for row in known] == pytest.approx([row["loss"] for row in looked], rel=1e-4)
    assert len(runs[0].trainer.task._remembered) <= 40 and runs[1].trainer.task._remembered is None
    weights = [dict(run.model.named_parameters()) for run in runs]
    for name, one in weights[0].items():
        torch.testing.assert_close(one, weights[1][name], rtol=1e-3, atol=1e-4)


def test_a_resumed_run_is_the_whole_one_bitwise(place, tmp_path):
    whole = begun(place, tmp_path / "whole")
    whole.trainer.fit()
    begun(place, tmp_path / "parts").trainer.fit(2)
    config = whole.config
    newest = CheckpointStore(tmp_path / "parts" / "checkpoints").newest()
    resumed = prepare(config, tmp_path / "parts", resume=newest, tell=lambda text: None)
    resumed.trainer.fit()
    ours, theirs = dict(resumed.model.named_parameters()), dict(whole.model.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_changed_images_a_trained_encoder_or_another_twin_are_looked_at(place, tmp_path):
    for name, values in (("augmented", {"augment": {**STILL, "brightness": 0.2}}), ("twin", {})):
        run = begun(place, tmp_path / name, **values)
        if name == "twin":
            with torch.no_grad():
                run.model.memory.twin.vision.norm.bias.add_(0.1)
        run.trainer.fit(1)
        remembered = run.trainer.task._remembered
        assert remembered is None or len(remembered) == 0
