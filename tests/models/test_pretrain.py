"""A pretraining step equals the literal one: losses, every gradient and the state that it leaves, in float64."""

import dataclasses

import pytest
import torch

from miss.benchmarks.peers.literal_pretrain import Step
from miss.kernels.registry import use
from miss.models.config import ConfigError, MissConfig
from miss.models.pretrain import MissPretrain, ObjectiveConfig, PretrainBatch
from tests.models.test_parity import USED, small_config

PAIRS, PLACES = 4, 10
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
    )


@pytest.mark.parametrize("kernels", ["torch", "reference"])
@pytest.mark.parametrize("behaviour", ["correct", "compat"])
def test_steps_are_the_original_s(behaviour, kernels):
    """Three updates: losses, gradients and, after each, weights, twin and queue; the temperature starts too high."""
    model = pretrain_model(pretrain_config(behaviour))
    with torch.no_grad():
        model.temperature.fill_(0.6)
    literal = literal_of(model)
    for step in range(3):
        batch, alpha = batch_of(step), 0.2 * step
        with use(**dict.fromkeys(OPERATIONS, kernels)):
            losses = model(batch, alpha=alpha, seed=step)
        want = literal(batch.pixels, batch.ids, batch.lengths, batch.numbers, alpha, step)
        for name in ("itc", "itm", "lm", "total"):
            torch.testing.assert_close(getattr(losses, name), want[name], rtol=0, atol=1e-10)
        named = dict(model.named_parameters())
        assert named.keys() == literal.p.keys()
        got = torch.autograd.grad(losses.total, list(named.values()))
        expected = torch.autograd.grad(want["total"], [literal.p[name] for name in named])
        for name, a, b in zip(named, got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
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
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
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


def test_processes_together_are_one():
    """Rows of two processes of uneven size, gathered: the average of their losses and gradients is one process's."""
    model = pretrain_model(pretrain_config())
    batch = batch_of(0, [0, 1, 2, 3])
    parts = [cut(batch, slice(0, 3)), cut(batch, slice(3, 4))]
    teachers = [model(part, seed=0).features for part in parts]
    firsts = [0, 3]

    def gather_of(rank: int, counts: list[torch.Tensor]):
        def gather(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
            assert not rows.requires_grad
            if rows.dtype == torch.int64:
                return torch.cat([t.ids for t in teachers]), firsts[rank]
            if rows.shape[1] == 4:
                counts[rank] = rows
                return torch.cat(counts), rank
            return torch.cat([torch.cat(t[:2], 1) for t in teachers]), firsts[rank]

        return gather

    counts = [torch.zeros(1, 4, dtype=torch.float64)] * 2
    for rank, part in enumerate(parts):  # a first round tells each the other's counts
        model(part, gather_of(rank, counts), 0.3, 0)
    both = [model(part, gather_of(rank, counts), 0.3, 0) for rank, part in enumerate(parts)]
    whole = model(batch, alpha=0.3, seed=0)
    for name in ("itc", "lm"):
        mean = sum(getattr(x, name) for x in both) / 2
        torch.testing.assert_close(mean, getattr(whole, name), rtol=0, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(both[0].features, both[1].features, strict=True))
    p = [model.temperature, model.vision.cls_token, model.decoder.head.bias]
    mean_grads = torch.autograd.grad(sum(x.itc + x.lm for x in both) / 2, p)
    for a, b in zip(mean_grads, torch.autograd.grad(whole.itc + whole.lm, p), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def cut(batch: PretrainBatch, rows: slice) -> PretrainBatch:
    return PretrainBatch(batch.pixels[rows], batch.ids[rows], batch.lengths[rows], batch.numbers[rows])


def test_masked_words_are_an_option():
    model = pretrain_model(pretrain_config(), dataclasses.replace(OBJECTIVE, mlm=0.5, mask=3))
    losses = model(batch_of(0), seed=3)
    assert losses.mlm is not None
    torch.testing.assert_close(losses.total, losses.itc + losses.itm + losses.lm + 0.5 * losses.mlm)
    assert pretrain_model(pretrain_config())(batch_of(0), seed=3).mlm is None


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


def test_dropout_follows_the_seed():
    model = pretrain_model(pretrain_config(dropout=0.2))
    totals = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        totals.append(model(batch_of(0), seed=seed).total)
    assert torch.equal(totals[0], totals[1]) and not torch.equal(totals[0], totals[2])


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


def test_hidden_words_count_over_all_processes():
    """A process that hid few words weighs little: its loss is over the mean count of all."""
    model = pretrain_model(pretrain_config(), dataclasses.replace(OBJECTIVE, mlm=0.5, mask=3))
    counts: list[torch.Tensor] = []

    def gather(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        if rows.shape[1:] == (4,) and rows.dtype == torch.float64:
            counts.append(rows)
            return torch.cat([rows, rows * torch.tensor([1.0, 1.0, 1.0, 3.0])]), 0  # another, with thrice the words
        return rows, 0

    seed = next(seed for seed in range(40) if model(batch_of(0), seed=seed).mlm > 0)  # most hide no word of so few
    alone, shared = model(batch_of(0), seed=seed), model(batch_of(0), gather, seed=seed)
    assert counts[0][0, 3] > 0
    torch.testing.assert_close(shared.mlm, alone.mlm / 2)
    torch.testing.assert_close(shared.lm, alone.lm)
