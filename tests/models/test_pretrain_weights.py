"""Sharing survives: saved once, loaded exactly, to the original's names and back, and undone for answering."""

import csv
import dataclasses
from pathlib import Path

import pytest
import torch

from miss.models.conversion import Choices
from miss.models.fitting import CheckpointError
from miss.models.pretrain import MissPretrain, ObjectiveConfig
from miss.models.pretrain_original import from_original_pretraining, to_original_pretraining
from miss.models.pretrain_weights import begin_pretraining, load_pretraining, saved_pretraining, untie
from miss.models.vqa import MissVQA
from miss.models.weights import build, saved_state
from tests.models.test_pretrain import OBJECTIVE, batch_of, pretrain_config, pretrain_model
from tests.models.test_weights import tiny

CHOICES = Choices(num_heads=2, text_num_heads=3)


def trained(config=None) -> MissPretrain:
    """A model whose twin and queue are no longer what they began as."""
    model = pretrain_model(config or pretrain_config())
    losses = model(batch_of(0), seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.97)
    model.after_update(losses)
    return model


def copies(model: MissPretrain) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in saved_pretraining(model).items()}


def total(model: MissPretrain) -> torch.Tensor:
    return model(batch_of(1), alpha=0.3, seed=1).total


def test_each_shared_tensor_is_saved_once_and_comes_back():
    model = trained()
    tensors = copies(model)
    pointers = [t.data_ptr() for t in saved_pretraining(model).values() if t.numel()]
    assert len(pointers) == len(set(pointers)) and len(tensors) < len(model.state_dict()) + 200
    other = MissPretrain(pretrain_config(), OBJECTIVE).double()
    report = load_pretraining(other, tensors)
    assert set(report.matched) == set(tensors) and torch.equal(total(model), total(other))
    assert other.decoder.layers[0].mlp is other.encoder.layers[0].mlp
    with pytest.raises(CheckpointError, match="missing: temperature"):
        load_pretraining(other, {name: t for name, t in tensors.items() if name != "temperature"})


def test_without_a_memory_the_twin_becomes_the_weights():
    tensors = {name: t.clone() for name, t in saved_pretraining(trained(), memory=False).items()}
    model = MissPretrain(pretrain_config(), OBJECTIVE).double()
    assert "no momentum twin" in load_pretraining(model, tensors).notes[0]
    for name, average in model.memory.twin.named_parameters():
        assert torch.equal(average, tensors[name])


def test_to_the_original_and_back_is_exact():
    model = trained()
    tensors = copies(model)
    state = to_original_pretraining(model.config, tensors)
    assert state["image_queue"].shape == (OBJECTIVE.feature_width, OBJECTIVE.queue_size)
    back = from_original_pretraining(state, CHOICES, "file", model.config)
    same = {name for name, t in back.tensors.items() if torch.equal(t, tensors[name])}
    assert back.tensors.keys() == tensors.keys()
    assert tensors.keys() - same == {"memory.queue.ids"} and not back.report.unexpected
    assert (back.objective.feature_width, back.objective.queue_size) == (24, 10)
    other = MissPretrain(back.config, dataclasses.replace(OBJECTIVE, queue_size=10)).double()
    load_pretraining(other, back.tensors)
    shapes = from_original_pretraining(state, CHOICES, "file").config  # without ours: sizes from shapes
    assert (shapes.vision.hidden_size, shapes.encoder.num_layers) == (64, 2)


def test_every_key_of_the_original_is_there():
    path = Path(__file__).parents[3] / "shared/docs/miss_state_dict_keys.tsv"
    if not path.is_file():
        pytest.skip("miss_state_dict_keys.tsv is not beside the repository")
    keys = {row[1] for row in csv.reader(path.open(), delimiter="\t") if row[0] == "pretrain224"}
    config = tiny(12, 12, 12, tie=False, width=4)
    model = MissPretrain(config, ObjectiveConfig(feature_width=4, queue_size=6))
    state = to_original_pretraining(config, saved_pretraining(model))
    assert set(state) == keys
    back = from_original_pretraining(state, Choices(num_heads=2, text_num_heads=2), "file")
    assert set(back.report.dropped) <= {n for n in keys if n.startswith("text_encoder_m.") or "position_ids" in n} | {
        n for n in keys if n.startswith("text_decoder.cls.predictions.decoder")
    }


def test_a_file_that_was_untied_is_refused():
    model = trained()
    state = to_original_pretraining(model.config, copies(model))
    state["text_decoder.bert.encoder.layer.1.output.dense.bias"] += 1
    with pytest.raises(CheckpointError, match=r"differ in decoder\.layers\.1\.mlp\.output\.bias"):
        from_original_pretraining(state, CHOICES, "file", model.config)


def test_untying_copies_drops_and_draws():
    """The image is wider than the text here: the decoder's keys and values cannot be kept."""
    model = trained()
    out = untie(model.config, saved_pretraining(model))
    assert out.report.missing == ("decoder.cross_kv.weight", "decoder.cross_kv.bias")
    assert "temperature" in out.report.dropped and "memory.queue.ids" in out.report.dropped
    assert not any(name in out.report.dropped for name in out.tensors)
    vqa, _ = build(out.config, out.tensors)
    own, theirs = dict(vqa.named_parameters()), dict(model.named_parameters())
    for name in ("vision.cls_token", "encoder.cross_kv.bias", "decoder.layers.1.self_attention.qkv.weight"):
        assert torch.equal(own[name], theirs[name])
    shared = "layers.1.mlp.input.weight"
    assert torch.equal(own[f"decoder.{shared}"], theirs[f"encoder.{shared}"])
    with torch.no_grad():
        own[f"encoder.{shared}"].zero_()
    assert own[f"decoder.{shared}"].any() and theirs[f"encoder.{shared}"].any()


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("decoder_layers", [1, 2])
def test_untying_equal_widths_and_beginning_again(tie, decoder_layers):
    config = tiny(decoder_layers=decoder_layers, tie=tie)
    objective = ObjectiveConfig(feature_width=4, queue_size=6)
    model = MissPretrain(config, objective)
    out = untie(config, saved_pretraining(model))
    assert not out.report.missing and "question states" in out.report.notes[0]
    rows = out.tensors["decoder.cross_kv.weight"]
    assert torch.equal(rows, model.encoder.cross_kv.weight[: len(rows)]) and len(rows) == decoder_layers * 2 * 8
    again = MissPretrain(config, objective)
    report = begin_pretraining(again, saved_state(build(config, out.tensors)[0]))
    assert set(report.missing) == {
        *(f"{m}.{k}" for m in ("image_projection", "text_projection", "matching_head") for k in ("weight", "bias")),
        "temperature",
    }
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert name in report.missing or torch.equal(a, b)
    assert torch.equal(again.memory.twin.vision.cls_token, model.vision.cls_token)


def test_beginning_from_an_answering_model_takes_its_encoder():
    config = tiny(tie=False)
    vqa, model = MissVQA(config), MissPretrain(config, ObjectiveConfig(feature_width=4, queue_size=6))
    report = begin_pretraining(model, saved_state(vqa))
    assert torch.equal(model.decoder.layers[0].mlp.input.weight, vqa.encoder.layers[0].mlp.input.weight)
    own = "layers.0.self_attention.qkv.weight"
    assert torch.equal(model.decoder.get_parameter(own), vqa.decoder.get_parameter(own))
    assert "decoder.cross_kv.weight" in report.dropped and "decoder.embeddings.word.weight" in report.dropped
