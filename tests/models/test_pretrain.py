"""A pretraining step equals the literal one: losses, every gradient and the state that it leaves, in float64."""

import dataclasses

import pytest
import torch

from miss.benchmarks.peers.literal_pretrain import Step
from miss.kernels.dropout import as_seed, keep_mask
from miss.kernels.registry import use
from miss.models.config import ConfigError, MissConfig
from miss.models.layers import EMBEDDINGS, TextEmbeddings, mix
from miss.models.pretrain import MissPretrain, ObjectiveConfig, PretrainBatch
from tests.models.test_parity import USED, small_config

PAIRS, PLACES = 4, 10
SEEDS = (1, 5, 28)  # in each of which masked words hide some
LENGTHS, NUMBERS = [7, 4, 2, 5], [2, 0, 2, 1]
OBJECTIVE = ObjectiveConfig(feature_width=24, queue_size=PLACES, momentum=0.9)
OPERATIONS = (*USED, "contrastive", "hard_negatives", "ema", "linear")


def pretrain_config(behaviour: str = "correct", dropout: float = 0.0) -> MissConfig:
    config = small_config()
    rates = {"dropout": dropout, "attention_dropout": dropout}
    encoder = dataclasses.replace(config.encoder, **rates)
    tokens = dataclasses.replace(config.tokens, cls=91, sep=92, dec=95, enc=96)
    decoder = dataclasses.replace(config.decoder, **rates)
    return dataclasses.replace(config, encoder=encoder, decoder=decoder, tokens=tokens, behaviour=behaviour)


def pretrain_model(config: MissConfig, objective: ObjectiveConfig = OBJECTIVE) -> MissPretrain:
    torch.manual_seed(0)
    model = MissPretrain(config, objective)
    with torch.no_grad():
        for p in model.parameters():  # biases and norms start at 0 and 1: make every one count
            if p.dim():
                p.add_(torch.randn_like(p) * 0.1)
    model.reset_twin()
    return model.double()


def batch_of(seed: int, numbers: list[int] = NUMBERS) -> PretrainBatch:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS)
    ids = torch.randint(1, 90, (PAIRS, max(LENGTHS)), generator=g)
    ids[torch.arange(PAIRS), lengths - 1] = 92
    pixels = torch.randn(PAIRS, 40, 40, 3, generator=g, dtype=torch.float64)
    ids = ids.masked_fill(torch.arange(ids.shape[1]) >= lengths[:, None], 0)
    return PretrainBatch(pixels, ids, lengths.int(), torch.tensor(numbers))


def literal_of(model: MissPretrain) -> Step:
    p = {name: t.detach().clone().requires_grad_() for name, t in model.named_parameters()}
    memory, queue = model.memory, model.memory.queue.features
    return Step(
        model.config,
        p,
        {name: t.clone() for name, t in memory.twin.named_parameters()},
        *(t.clone() for t in queue),
        momentum=model.objective.momentum,
        compat=model.config.behaviour == "compat",
        mlm=model.objective.mlm,
        mask=model.objective.mask,
    )


@pytest.mark.parametrize("kernels", ["torch", "reference"])
@pytest.mark.parametrize("behaviour, places, mlm", [("correct", 10, 0.5), ("compat", 10, 0.0), ("correct", 3, 0.0)])
def test_steps_are_the_original_s(behaviour, places, mlm, kernels):
    """Three updates: losses, gradients and, after each, weights, twin and queue, which wraps around or is smaller than
    a batch; the temperature starts too high."""
    objective = dataclasses.replace(OBJECTIVE, queue_size=places, mlm=mlm, mask=3)
    model = pretrain_model(pretrain_config(behaviour), objective)
    with torch.no_grad():
        model.temperature.fill_(0.6)
    literal = literal_of(model)
    for step in range(3):
        batch, alpha = batch_of(step), 0.2 * step
        with use(**dict.fromkeys(OPERATIONS, kernels)):
            losses = model(batch, alpha=alpha, seed=SEEDS[step])
        want = literal(batch.pixels, batch.ids, batch.lengths, batch.numbers, alpha, SEEDS[step])
        for name in want:
            torch.testing.assert_close(getattr(losses, name), want[name], rtol=0, atol=1e-12)
        assert ("mlm" in want) == bool(mlm) and (not mlm or want["mlm"] > 0)
        named = dict(model.named_parameters())
        assert named.keys() == literal.p.keys()
        got = torch.autograd.grad(losses.total, list(named.values()))
        expected = torch.autograd.grad(want["total"], [literal.p[name] for name in named])
        for name, a, b in zip(named, got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        with torch.no_grad():
            model.temperature.clamp_(max=0.5)  # theirs was clamped by the step itself
            for name, mine, theirs in zip(named, got, expected, strict=True):
                named[name].sub_(0.05 * mine)
                literal.p[name].sub_(0.05 * theirs)
        model.after_update(losses)
        queue = model.memory.queue
        for mine, theirs in zip(
            queue.features, (literal.image_queue, literal.text_queue, literal.id_queue), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
        assert int(queue.pointer) == literal.pointer


def test_the_twin_follows_as_the_original_s():
    """Ours after the update, the original's before the next features: the same twin at every use."""
    model = pretrain_model(pretrain_config())
    literal = literal_of(model)
    for step in range(3):
        batch = batch_of(step)
        losses = model(batch, seed=step)
        literal(batch.pixels, batch.ids, batch.lengths, batch.numbers, 0.0, step)
        for name, average in model.memory.twin.named_parameters():
            torch.testing.assert_close(average, literal.m[name], rtol=0, atol=1e-12)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.mul_(0.99)
                literal.p[name].mul_(0.99)
        model.after_update(losses)


def test_a_float32_twin_after_1000_updates_is_the_float64_one():
    """Momentum 0.995, weights that wander: rounding stays at float32's last places, in the weights' bf16, too."""
    config, objective = pretrain_config(), dataclasses.replace(OBJECTIVE, momentum=0.995)
    twin = MissPretrain(config, objective).memory.twin
    name = "vision.cls_token"
    exact = twin.get_parameter(name).double()
    value = exact.clone()
    for _ in range(1000):
        value = value + 0.01 * torch.randn_like(value)
        seen = value.bfloat16()
        twin.follow({name: seen}, objective.momentum)
        exact = 0.995 * exact + (1 - 0.995) * seen.double()
    assert (twin.get_parameter(name) - exact).abs().max() < 2e-6 * exact.abs().max()
    with pytest.raises(ValueError, match="follows none of elsewhere"):
        twin.follow({"elsewhere": value}, 0.9)


def test_what_is_shared_and_what_is_not():
    model = pretrain_model(pretrain_config())
    assert model.decoder.embeddings is model.encoder.embeddings and model.decoder.cross_kv is model.encoder.cross_kv
    own = {name for name, _ in model.named_parameters() if name.startswith("decoder.")}
    assert {name.split(".")[1] for name in own} == {"layers", "head"}
    assert all(".self_attention." in name for name in own if ".layers." in name)
    config = pretrain_config()
    with pytest.raises(ConfigError, match="same sizes"):
        MissPretrain(dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, num_layers=3)))


def test_the_memory_is_seen_by_no_engine_and_stays_wide():
    model = MissPretrain(pretrain_config(dropout=0.1), OBJECTIVE)
    assert not any("twin" in name or "queue" in name for name in model.state_dict())
    model.bfloat16()
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.memory.twin.parameters())
    assert model.memory.queue.features.image.dtype == torch.float32
    losses = model(dataclasses.replace(batch_of(0), pixels=torch.randint(0, 256, (PAIRS, 40, 40, 3)).byte()), seed=1)
    losses.total.backward()
    assert losses.total.isfinite() and all(p.grad is not None for p in model.parameters())
    model.after_update(losses, values={name: p.float() for name, p in model.named_parameters()})


@pytest.mark.parametrize("drops", ["dropout", "drop_path"])
def test_dropout_follows_the_seed_alone(drops):
    """Whatever PyTorch's own generator is at, embeddings and left-out branches among it: it is not even touched."""
    config = pretrain_config(dropout=0.2 if drops == "dropout" else 0.0)
    if drops == "drop_path":
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, drop_path=0.5))
    model = pretrain_model(config, dataclasses.replace(OBJECTIVE, mlm=0.5, mask=3))
    before = torch.random.get_rng_state()
    totals = [model(batch_of(0), seed=seed).total for seed in (1, 1, 2)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(totals[0], totals[1]) and not torch.equal(totals[0], totals[2])
    plain = pretrain_model(pretrain_config(), model.objective)(batch_of(0), seed=1).total
    assert not torch.equal(totals[0], plain)
    if drops == "drop_path":  # of training alone; dropout is the seed's
        assert torch.equal(model.eval()(batch_of(0), seed=1).total, plain)


def test_embeddings_drop_by_the_counter():
    """A word's channel is dropped where the documented mask of the tower's seed says, and scaled elsewhere."""
    config = dataclasses.replace(pretrain_config().encoder, dropout=0.3)
    embeddings, ids = TextEmbeddings(config).double(), torch.randint(1, 90, (3, 5))
    seed = as_seed(mix(11, EMBEDDINGS), 0.3)
    kept = keep_mask(seed, (3, 5, config.hidden_size), 0.3, ids.device)
    want = torch.where(kept, embeddings(ids) / 0.7, 0.0)
    torch.testing.assert_close(embeddings(ids, seed=11), want, rtol=1e-12, atol=1e-12)
    assert 0.2 < 1 - kept.double().mean() < 0.4


def test_memory_comes_back_exactly():
    model, other = pretrain_model(pretrain_config()), MissPretrain(pretrain_config(), OBJECTIVE).double()
    losses = model(batch_of(0), seed=0)
    model.after_update(losses)
    other.load_state_dict(model.state_dict())
    other.memory.load({name: t.clone() for name, t in model.memory.tensors().items()})
    a, b = (m(batch_of(1), alpha=0.3, seed=1).total for m in (model, other))
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="queue.image"):
        MissPretrain(pretrain_config(), dataclasses.replace(OBJECTIVE, queue_size=3)).memory.load(
            model.memory.tensors()
        )
