"""Sharing survives: saved once, loaded exactly, to the original's names and back, and undone for answering."""

import dataclasses

import pytest
import torch

from miss.benchmarks.peers.literal_pretrain import Step
from miss.models.conversion import Choices
from miss.models.fitting import CheckpointError
from miss.models.pretrain import MissPretrain, ObjectiveConfig
from miss.models.pretrain_original import from_original_pretraining, to_original_pretraining
from miss.models.pretrain_weights import begin_pretraining, load_pretraining, saved_pretraining, untie
from miss.models.vqa import MissVQA
from miss.models.weights import build, saved_state
from tests.models.test_pretrain import OBJECTIVE, batch_of, literal_of, pretrain_config, pretrain_model
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


def test_nothing_is_written_before_all_is_checked():
    """A memory that does not fit leaves weights, twin and queue as they were, and is a CheckpointError."""
    good = copies(trained())
    for name, wrong in {
        "memory.queue.image": good["memory.queue.image"][:3],
        "memory.queue.pointer": torch.tensor(99),
        "memory.queue.ids": good["memory.queue.ids"].int(),
        "memory.twin.vision.cls_token": good["memory.twin.vision.cls_token"][0],
        "memory.twin.elsewhere": torch.zeros(1),
    }.items():
        model = MissPretrain(pretrain_config(), OBJECTIVE).double()
        before = copies(model)
        with pytest.raises(CheckpointError, match=f"here: .*do not fit this model: .*{name.removeprefix('memory.')}"):
            load_pretraining(model, good | {name: wrong}, "here")
        lacking = {n: t for n, t in good.items() if n != name}
        if name in good:
            with pytest.raises(CheckpointError, match=f"missing: {name.removeprefix('memory.')}"):
                load_pretraining(model, lacking, "here")
        assert all(torch.equal(t, before[n]) for n, t in saved_pretraining(model).items())


def test_without_a_memory_nothing_of_an_earlier_run_is_left():
    model = trained()
    fresh = MissPretrain(pretrain_config(), OBJECTIVE).double().memory.queue
    load_pretraining(model, {name: t.clone() for name, t in saved_pretraining(model, memory=False).items()})
    assert int(model.memory.queue.pointer) == 0
    assert all(torch.equal(a, b) for a, b in zip(model.memory.queue.features, fresh.features, strict=True))


def original_names(vision: int, text: int) -> set[str]:
    """The names in a pretraining checkpoint of the original, read off its modules."""
    both = ("weight", "bias")
    linear = lambda *stems: {f"{stem}.{kind}" for stem in stems for kind in both}  # noqa: E731
    image = {"cls_token", "pos_embed"} | linear("patch_embed.proj", "norm")
    for i in range(vision):
        image |= linear(*(f"blocks.{i}.{n}" for n in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")))
    parts = [f"{a}.self.{p}" for a in ("attention", "crossattention") for p in ("query", "key", "value")]
    parts += [f"{a}.output.{p}" for a in ("attention", "crossattention") for p in ("dense", "LayerNorm")]
    parts += ["intermediate.dense", "output.dense", "output.LayerNorm"]
    bert = {f"embeddings.{n}" for n in ("position_ids", "word_embeddings.weight", "position_embeddings.weight")}
    bert |= linear("embeddings.LayerNorm", *(f"encoder.layer.{i}.{part}" for i in range(text) for part in parts))
    names = {"temp", "image_queue", "text_queue", "queue_ptr"}
    names |= {f"visual_encoder{m}.{n}" for m in ("", "_m") for n in image}
    names |= {f"{tower}.{n}" for tower in ("text_encoder", "text_encoder_m", "text_decoder.bert") for n in bert}
    names |= linear("vision_proj", "vision_proj_m", "text_proj", "text_proj_m", "itm_head")
    head = "text_decoder.cls.predictions"
    return (
        names | {f"{head}.bias"} | linear(f"{head}.decoder", f"{head}.transform.dense", f"{head}.transform.LayerNorm")
    )


@pytest.mark.parametrize("memory", [True, False])
def test_every_key_of_the_original_is_there_and_no_other(memory):
    """Also without a memory: what the original loads strictly has a twin and queues of the configured size."""
    config = tiny(12, 12, 12, tie=False, width=4)
    objective = ObjectiveConfig(feature_width=4, queue_size=6)
    model = MissPretrain(config, objective)
    state = to_original_pretraining(config, saved_pretraining(model, memory), 6)
    assert set(state) == original_names(12, 12) and len(state) == 1272
    assert state["image_queue"].shape == state["text_queue"].shape == (4, 6) and state["queue_ptr"].tolist() == [0]
    for name, tensor in state.items():
        if "_m." in name and "position_ids" not in name:
            assert torch.equal(tensor, state[name.replace("_m.", ".", 1)])
    back = from_original_pretraining(state, Choices(num_heads=2, text_num_heads=2), "file")
    redundant = ("text_encoder_m.", "position_ids", "text_decoder.cls.predictions.decoder")
    assert all(any(part in n for part in redundant) for n in back.report.dropped) and not back.report.missing


def test_to_the_original_and_back():
    """Everything comes back bit by bit, but the captions' numbers; the twin to rounding, as an update lies between."""
    model = trained()
    tensors = copies(model)
    state = to_original_pretraining(model.config, tensors)
    assert state["image_queue"].shape == (OBJECTIVE.feature_width, OBJECTIVE.queue_size)
    back = from_original_pretraining(state, CHOICES, "file", model.config)
    assert back.tensors.keys() == tensors.keys() and set(back.report.matched) == set(tensors)
    for name, t in back.tensors.items():
        if name.startswith("memory.twin."):
            torch.testing.assert_close(t, tensors[name], rtol=0, atol=1e-15)
        else:
            assert torch.equal(t, tensors[name]) or name == "memory.queue.ids"
    assert (back.objective.feature_width, back.objective.queue_size, back.objective.momentum) == (24, 10, 0.995)
    other = MissPretrain(back.config, back.objective).double()
    load_pretraining(other, back.tensors)
    shapes = from_original_pretraining(state, CHOICES, "file").config  # without ours: sizes from shapes
    assert (shapes.vision.hidden_size, shapes.encoder.num_layers) == (64, 2)


def test_a_resumed_original_has_the_twin_that_it_would_have_had():
    """Two steps of both; ours is then written as theirs, whose third step uses the same twin as if it had made all
    three; and theirs, read in, goes on as ours."""
    config = pretrain_config("compat")
    model = pretrain_model(config, dataclasses.replace(OBJECTIVE, momentum=0.995))
    theirs = literal_of(model)
    for step in range(2):
        for mine in (model, theirs):
            walk(mine, step)
    state = to_original_pretraining(config, saved_pretraining(model))
    for name, key in {
        "vision.blocks.1.mlp.input.weight": "visual_encoder_m.blocks.1.mlp.fc1.weight",
        "text_projection.bias": "text_proj_m.bias",
        "encoder.embeddings.norm.bias": "text_encoder_m.embeddings.LayerNorm.bias",
    }.items():
        torch.testing.assert_close(state[key], theirs.m[name], rtol=0, atol=1e-12)
        ahead = model.memory.twin.get_parameter(name)
        assert (ahead - theirs.m[name]).abs().max() > 1e-6  # what would have been written without the step back
    read = from_original_pretraining(state, CHOICES, "file", config)
    other = MissPretrain(config, OBJECTIVE).double()
    load_pretraining(other, read.tensors)
    batch = batch_of(2)
    want = theirs(batch.pixels, batch.ids, batch.lengths, batch.numbers, 0.3, 2)["total"]
    for mine in (model, other):
        torch.testing.assert_close(mine(batch, alpha=0.3, seed=2).total, want, rtol=0, atol=1e-12)
    for name, average in other.memory.twin.named_parameters():
        torch.testing.assert_close(average, theirs.m[name], rtol=0, atol=1e-12)


def walk(side: MissPretrain | Step, step: int) -> None:
    """One update of either: plain descent."""
    batch, parameters = batch_of(step), dict(side.named_parameters()) if isinstance(side, MissPretrain) else side.p
    if isinstance(side, MissPretrain):
        losses = side(batch, alpha=0.3, seed=step)
        total = losses.total
    else:
        total = side(batch.pixels, batch.ids, batch.lengths, batch.numbers, 0.3, step)["total"]
    grads = torch.autograd.grad(total, list(parameters.values()))
    with torch.no_grad():
        for parameter, grad in zip(parameters.values(), grads, strict=True):
            parameter.sub_(0.1 * grad)
    if isinstance(side, MissPretrain):
        side.after_update(losses)


@pytest.mark.parametrize(
    "lost",
    [
        ("visual_encoder_m.blocks.1.attn.qkv.weight",),
        ("text_encoder_m.encoder.layer.0.attention.self.key.bias", "vision_proj_m.weight"),
        ("text_queue",),
        ("queue_ptr", "image_queue", "text_queue"),
        ("twin",),
    ],
)
def test_what_is_there_of_twin_and_queue_is_taken_and_what_is_not_is_named(lost):
    model = trained()
    tensors = copies(model)
    state = to_original_pretraining(model.config, tensors)
    gone = {n for n in state if "_m." in n and "crossattention" not in n and "position_ids" not in n}
    gone = gone if lost == ("twin",) else set(lost)
    partial = {name: t for name, t in state.items() if name not in gone}
    back = from_original_pretraining(partial, CHOICES, "file", model.config)
    assert set(back.report.missing) == gone and any(sorted(gone)[0] in n for n in back.report.notes) == (len(gone) < 7)
    other = MissPretrain(model.config, back.objective).double()
    load_pretraining(other, back.tensors)
    assert not gone & {*back.report.dropped, *back.report.unexpected}
    for name, average in other.memory.twin.named_parameters():
        keys = [key for key in gone if key in THEIRS.get(name, ())]
        if lost == ("twin",) or (keys and name != "encoder.layers.0.self_attention.qkv.bias"):
            assert torch.equal(average, tensors[name])
        elif keys:  # of a stacked one only the part that is missing follows the weights
            q, k, v = average.chunk(3)
            for part, want in zip((q, v), tensors[f"memory.twin.{name}"].chunk(3)[::2], strict=True):
                torch.testing.assert_close(part, want, rtol=0, atol=1e-14)
            assert torch.equal(k, tensors[name].chunk(3)[1])
        else:
            torch.testing.assert_close(average, tensors[f"memory.twin.{name}"], rtol=0, atol=1e-14)
    if "text_queue" not in gone:
        assert torch.equal(other.memory.queue.features.text, tensors["memory.queue.text"])
    elif "image_queue" not in gone:
        assert torch.equal(other.memory.queue.features.image, tensors["memory.queue.image"])
    assert int(other.memory.queue.pointer) == (0 if "queue_ptr" in gone else int(tensors["memory.queue.pointer"]))


THEIRS = {
    "vision.blocks.1.attention.qkv.weight": ("visual_encoder_m.blocks.1.attn.qkv.weight",),
    "encoder.layers.0.self_attention.qkv.bias": ("text_encoder_m.encoder.layer.0.attention.self.key.bias",),
    "image_projection.weight": ("vision_proj_m.weight",),
}


def test_without_twin_and_queue_both_begin():
    model = trained()
    state = to_original_pretraining(model.config, copies(model))
    bare = {n: t for n, t in state.items() if "_m." not in n and "queue" not in n}
    back = from_original_pretraining(bare, CHOICES, "file", model.config)
    assert not any(n.startswith("memory.") for n in back.tensors) and "no momentum twin" in back.report.notes[0]
    assert {"image_queue", "visual_encoder_m.cls_token"} <= set(back.report.missing)
    load_pretraining(MissPretrain(model.config, OBJECTIVE).double(), back.tensors)


def test_the_choices_act():
    model = trained()
    state = to_original_pretraining(model.config, copies(model))
    read = lambda more, **choices: from_original_pretraining(  # noqa: E731
        state | more, dataclasses.replace(CHOICES, **choices), "file"
    )
    stranger = {"stranger.weight": torch.zeros(3)}
    with pytest.raises(CheckpointError, match="unexpected: stranger.weight"):
        read(stranger)
    assert read(stranger, allow_unexpected=("stranger.*",)).report.unexpected == ("stranger.weight",)
    assert read({}, behaviour="compat").config.behaviour == "compat"
    assert read({}, preprocess="blip").config.preprocess.resample == "bicubic"
    assert (read({}).config.vision.num_heads, read({}).config.encoder.num_heads) == (2, 3)
    larger = read({}, image_size=56)
    assert larger.config.vision.image_size == 56 and larger.report.resized[0].after == (1, 50, 64)
    other = MissPretrain(larger.config, larger.objective).double()
    assert other.memory.twin.vision.position_embedding.shape == (1, 50, 64)
    load_pretraining(other, larger.tensors)
    for name in ("itm_head.weight", "temp"):
        del state[name]
    with pytest.raises(CheckpointError, match="missing: matching_head.weight, temperature"):
        read({})
    some = read({}, allow_missing=("matching_head.*", "temperature"))
    assert some.report.missing == ("matching_head.weight", "temperature")
    assert float(some.tensors["temperature"]) == pytest.approx(0.07)
    state["image_queue"] = state["image_queue"][:, :4]
    with pytest.raises(CheckpointError, match="queue.text is"):
        read({}, allow_missing=("matching_head.*", "temperature"))


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
    assert "untied" in out.report.notes[0] and "was drawn" in out.report.notes[1]
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
    assert not out.report.missing and "untied" in out.report.notes[0] and "question states" in out.report.notes[1]
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
