"""`miss convert` of what is in pretraining: untied for answering, with a report, or kept and translated both ways."""

import dataclasses
import io
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from miss.cli import run
from miss.engine.runtime.engine import Engine
from miss.models.config import MissConfig
from miss.models.fitting import CheckpointError
from miss.models.pretrain import MissPretrain, ObjectiveConfig
from miss.models.pretrain_files import load_pretrained, read_pretraining, write_pretraining
from miss.models.pretrain_weights import begin_pretraining, saved_pretraining
from miss.models.weights import load_checkpoint, read_checkpoint, read_tokenizer
from tests.models.test_weights import tiny

SMALL = Path(__file__).parents[2] / "checkpoints/miss-small"
OBJECTIVE = ObjectiveConfig(feature_width=4, queue_size=6, momentum=0.9)


def convert(*flags: object) -> int:
    return run(["convert", *map(str, flags)])


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return buffer.getvalue()


def pretrained(folder: Path, config: MissConfig | None = None, memory: bool = True) -> MissPretrain:
    """A folder of a model whose twin, queue and weights are three things."""
    torch.manual_seed(0)
    model = MissPretrain(config or tiny(tie=False), OBJECTIVE)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        model.memory.queue.pointer.fill_(2)
    write_pretraining(model.config, OBJECTIVE, saved_pretraining(model, memory), folder)
    return model


def test_pretraining_of_the_shipped_shapes_becomes_a_model_that_answers(tmp_path, capsys):
    """From the shipped checkpoint into pretraining, out again by the command, then questions are answered."""
    config, tensors = read_checkpoint(SMALL)
    model = MissPretrain(config, dataclasses.replace(OBJECTIVE, queue_size=8))
    begin_pretraining(model, tensors)
    write_pretraining(
        config, model.objective, saved_pretraining(model), tmp_path / "in", tokenizer=read_tokenizer(SMALL)
    )
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    told = capsys.readouterr().out
    shared = sum(name.startswith("encoder.layers.") and ("cross" in name or "mlp" in name) for name in tensors) + 2
    assert f"untied: the decoder has copies of its own of {shared} tensors that it shared with the encoder" in told
    assert "decoder.cross_kv.weight read image tokens and now reads question states" in told and "dropped" in told
    kept = dict(model.named_parameters())
    answering, _ = load_checkpoint(tmp_path / "out")
    for name, p in answering.named_parameters():
        if name.startswith("decoder.layers.") and ".self_attention." not in name:
            assert torch.equal(p, kept[name.replace("decoder", "encoder", 1)])
        elif name in kept:
            assert torch.equal(p, kept[name])
    del answering
    engine = Engine.load(tmp_path / "out", precision="fp32")
    answers = [engine.answer(picture(colour), "is there a mass?") for colour in ("black", "white")]
    assert all(isinstance(a.text, str) and 0 < a.score <= 1 for a in answers)


def test_a_folder_comes_back_and_is_no_answering_model(tmp_path):
    model = pretrained(tmp_path / "in")
    config, objective, tensors = read_pretraining(tmp_path / "in")
    assert (config, objective) == (model.config, OBJECTIVE)
    assert all(torch.equal(t, tensors[name]) for name, t in saved_pretraining(model).items())
    again, report = load_pretrained(tmp_path / "in")
    assert len(report.matched) == len(tensors) and int(again.memory.queue.pointer) == 2
    with pytest.raises(CheckpointError, match="model_type is 'miss-pretraining'.*`miss convert`"):
        load_checkpoint(tmp_path / "in")
    shutil.copytree(tmp_path / "in", tmp_path / "bad")
    weights = tmp_path / "bad" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    for read in (load_pretrained, read_pretraining):
        with pytest.raises(CheckpointError, match="altered"):
            read(tmp_path / "bad")
    assert convert(tmp_path / "bad", tmp_path / "out") != 0 and not (tmp_path / "out").exists()
    assert convert(tmp_path / "in", tmp_path / "out") == 0
    with pytest.raises(CheckpointError, match='wanted "miss-pretraining"'):
        read_pretraining(tmp_path / "out")


def test_to_the_original_and_back_by_the_command(tmp_path, capsys):
    pretrained(tmp_path / "in")
    assert convert(tmp_path / "in", tmp_path / "a.pth", "--pretraining", "--to", "miss") == 0
    heads = ("--num-heads", 2, "--text-num-heads", 2)
    assert convert(tmp_path / "a.pth", tmp_path / "back", "--pretraining", *heads) == 0
    assert "none of them is spared as an equal one" in capsys.readouterr().out
    before, after = (read_pretraining(tmp_path / name)[2] for name in ("in", "back"))
    assert before.keys() == after.keys()
    for name, t in before.items():
        if name.startswith("memory.twin."):  # an update lies between, of momentum 0.995
            torch.testing.assert_close(after[name], t, rtol=2e-7, atol=1e-8)
        else:
            assert torch.equal(after[name], t) or name == "memory.queue.ids"
    assert convert(tmp_path / "a.pth", tmp_path / "answering", *heads) == 0  # the same file, for answering
    assert "from pretraining: what the decoder shared with the encoder" in capsys.readouterr().out
    load_checkpoint(tmp_path / "answering")
    assert convert(tmp_path / "in", tmp_path / "hf", "--pretraining", "--to", "hf") != 0


def test_the_choices_act_on_our_folders_too(tmp_path):
    pretrained(tmp_path / "in")
    flags = ("--image-size", 16, "--behaviour", "compat")
    assert convert(tmp_path / "in", tmp_path / "kept", "--pretraining", *flags) == 0
    assert convert(tmp_path / "in", tmp_path / "out", *flags) == 0
    for config in (read_pretraining(tmp_path / "kept")[0], load_checkpoint(tmp_path / "out")[0].config):
        assert config.vision.image_size == config.preprocess.image_size == 16 and config.behaviour == "compat"
    assert load_pretrained(tmp_path / "kept")[0].memory.twin.vision.position_embedding.shape == (1, 17, 8)


def test_what_does_not_fit_is_an_error_and_leaves_nothing(tmp_path, capsys):
    model = pretrained(tmp_path / "in", memory=False)
    tensors = saved_pretraining(model, memory=False)
    strange = tensors | {"stranger": torch.zeros(2)}
    lacking = {name: t for name, t in tensors.items() if name != "vision.norm.weight"}
    for name, wrong in {"stranger": strange, "vision.norm.weight": lacking}.items():
        write_pretraining(model.config, OBJECTIVE, wrong, tmp_path / name)
        for flags in ((), ("--pretraining",)):
            assert convert(tmp_path / name, tmp_path / "out", *flags) != 0 and not (tmp_path / "out").exists()
            assert f"{'missing' if name in tensors else 'unexpected'}: {name}" in capsys.readouterr().err
    assert convert(tmp_path / "in", tmp_path / "out") == 0  # a memory is not needed for answering
    assert load_pretrained(tmp_path / "in")[1].notes
