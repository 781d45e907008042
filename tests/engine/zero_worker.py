"""One of the processes of `test_zero.py`: DeepSpeed is loaded once, then every case runs in one process group.

    python -m tests.engine.zero_worker PLACE RESULTS CASE…

with RANK, WORLD_SIZE, … set as torchrun sets them. RESULTS gets {case: null or the traceback} of this rank.
"""

import json
import sys
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from miss.engine.data.loader import GroupedLoader, GroupedSampler
from miss.engine.training import trainer as trainer_module
from miss.engine.training.checkpoint import CheckpointStore
from miss.engine.training.config import OptimizerConfig
from miss.engine.training.finetune import make_engine
from miss.engine.training.log import read_log
from miss.engine.training.optimizer import freeze
from miss.engine.training.plain import PlainEngine
from miss.engine.training.ranks import Ranks
from miss.engine.training.trainer import NotFinite, Trainer
from miss.engine.training.zero_config import RunFacts, filled, read_ds_config
from miss.kernels.ema import ema_
from miss.models.pretrain import MissPretrain
from miss.models.recompute import recompute_layers
from tests.engine.tiny import RandomTokens, tiny_model, tiny_rows, tiny_train_config
from tests.models.test_pretrain import OBJECTIVE, batch_of, pretrain_config

PRESETS = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"
STAGES = (0, 1, 2, 3)
# Parameters of up to 10 x the width stay gathered by default: here all are, so that each use must gather.
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


# ---- finetuning, by the loop itself ----


def vqa_config(ranks, **values):
    """Two parts of a step in all, so that dropout's seeds are the same on one rank and on two."""
    data = {"images_per_step": 4, "accumulation": 2 // ranks.world_size}
    optimizer = {"clip": 5.0} | values.pop("optimizer", {})
    return tiny_train_config(data=data, schedule={"total_steps": 6}, optimizer=optimizer, log={"every": 1}, **values)


def vqa_trainer(config, output, ranks, given=None, store=None):
    rows, data = tiny_rows(), config.data
    model = tiny_model(dropout=0.1)
    freeze(model, config.optimizer, config.train_vision)
    sampler = GroupedSampler([len(r) for r in rows], None, data.images_per_step, data.questions_per_image, config.seed)
    store = store or RandomTokens(len(rows))
    place = {"rank": ranks.rank, "world_size": ranks.world_size}
    loader = GroupedLoader(sampler, rows, store, data.accumulation, data.prefetch, **place)
    copy, engine = make_engine(config, model, ranks)
    hands = {"device": ranks.device, "validate": validate, "ranks": ranks, "copy": copy}
    return Trainer(model, loader, engine, config, Path(output), **hands)


def validate(model):
    return {"accuracy": float(sum(p.double().sum() for p in model.parameters()).sin())}


def fitted(config, output, ranks, stop_at=None, resume=None, **hands):
    trainer = vqa_trainer(config, output, ranks, **hands)
    if resume is not None:
        trainer.resume(resume)
    trainer.fit(stop_at)
    return trainer


def newest(output):
    return CheckpointStore(Path(output) / "checkpoints").newest()


def saved(output):
    folder = newest(output)
    return {f"{p.name}:{k}": t for p in folder.glob("*.safetensors") for k, t in load_file(p).items()}


def farthest(a, b):
    """The largest difference of two runs' weights and averages; moments have scales of their own."""
    names = [n for n in a if n.startswith(("model", "average"))]
    assert names and set(names) <= set(b)
    return max((a[n] - b[n]).abs().max().item() for n in names)


def losses(output):
    return [line["loss"] for line in read_log(Path(output) / "log.jsonl") if line["kind"] == "train"]


def vqa_parity(ranks, place):
    """Every engine, on one rank and on two: the losses and weights of plain PyTorch on one rank.

    To 2e-6 where weights moved by more than 1e-2 in 6 steps: parts and ranks add gradients up in other orders, and
    AdamW's first steps turn a relative difference of a gradient near 0 into one of up to the rate's share.
    """
    one = place / "one" / "plain"
    everything = place / f"shard-all-{ranks.rank}.json"
    everything.write_text(json.dumps(SHARD_ALL))
    zeros = [(f"zero{s}", {"engine": "zero", "zero_stage": s, "ds_config": str(everything)}) for s in STAGES]
    for name, values in [("plain", {}), *zeros]:
        output = place / f"w{ranks.world_size}" / name
        if name == "plain" and ranks.world_size == 1:
            output = one
        fitted(vqa_config(ranks, ema={"decay": 0.9}, **values), output, ranks)
        if ranks.first:
            assert farthest(saved(one), saved(output)) < 2e-6, (name, farthest(saved(one), saved(output)))
            worst = max(abs(a - b) for a, b in zip(losses(one), losses(output), strict=True))
            assert len(losses(one)) == 6 and worst < 1e-5, (name, worst)
    if ranks.first:
        end = saved(one)
        start = tiny_model(dropout=0.1).named_parameters()
        assert max(float((end[f"model.safetensors:{n}"] - p).abs().max()) for n, p in start) > 1e-2


def vqa_resume(ranks, place):
    """3 steps, a new engine, 3 steps: bit for bit 6 steps, generators, moments and averages included."""
    for stage in (1, 2, 3):
        config = vqa_config(ranks, engine="zero", zero_stage=stage, ema={"decay": 0.9})
        output = place / f"parts{ranks.world_size}" / str(stage)
        fitted(config, output, ranks, stop_at=3)
        half = newest(output)
        torch.manual_seed(999)
        fitted(config, output, ranks, resume=half)
        if ranks.first:
            whole, parts = saved(place / f"w{ranks.world_size}" / f"zero{stage}"), saved(output)
            assert whole.keys() == parts.keys()
            assert not [n for n in whole if not torch.equal(whole[n], parts[n])]


def vqa_elastic(ranks, place):
    """From what the other number of ranks saved after 3 steps: the losses and weights of the run that went on there,
    to the same 2e-6; also under another stage than the one that saved, and the plain engine."""
    other = 3 - ranks.world_size
    source = CheckpointStore(place / f"parts{other}" / "2" / "checkpoints").folder / "step-00000003"
    for name, values in [
        ("3", {"engine": "zero", "zero_stage": 3}),
        ("1", {"engine": "zero", "zero_stage": 1}),
        ("p", {}),
    ]:
        output = place / f"from{other}" / name
        fitted(vqa_config(ranks, ema={"decay": 0.9}, **values), output, ranks, resume=source)
        if ranks.first:
            assert farthest(saved(place / f"w{other}" / "zero2"), saved(output)) < 2e-6, name


def vqa_halves(ranks, place):
    """bfloat16 weights with float32 masters: near the float32 run, and its resume is bitwise, too."""
    for stage in (1,) if ranks.world_size == 1 else (3,):
        config = vqa_config(ranks, engine="zero", zero_stage=stage, bf16=True, ema={"decay": 0.9})
        output = place / f"halves{ranks.world_size}" / str(stage)
        whole = fitted(config, output / "whole", ranks)
        assert not whole.engine.whole and whole.shown is not whole.model
        fitted(config, output / "parts", ranks, stop_at=3)
        fitted(config, output / "parts", ranks, resume=newest(output / "parts"))
        if ranks.first:
            a, b = saved(output / "whole"), saved(output / "parts")
            assert a.keys() == b.keys() and not [n for n in a if not torch.equal(a[n], b[n])]
            assert farthest(a, saved(place / "one" / "plain")) < 2e-2
            assert (
                max(abs(x - y) for x, y in zip(losses(output / "whole"), losses(place / "one" / "plain"), strict=True))
                < 0.1
            )
            # masters, not halves: most of their bits are lost in bfloat16
            w = a["model.safetensors:decoder.head.transform.weight"]
            assert w.dtype == torch.float32 and not torch.equal(w, w.bfloat16().float())


def vqa_nan(ranks, place):
    """A row that only the last rank has: every rank stops before the update, and names it."""

    class Bad(RandomTokens):
        def gather(self, images, visits):
            pixels, tokens = super().gather(images, visits)
            if ranks.rank == ranks.world_size - 1 and trainer.progress.step == 2:
                tokens = tokens.clone()
                tokens[-1] = float("nan")
            return pixels, tokens

    for stage in (0, 2, 3):
        config = vqa_config(ranks, engine="zero", zero_stage=stage)
        data = config.data
        assert data.prefetch == 2
        trainer = vqa_trainer(config, place / f"nan{ranks.world_size}" / str(stage), ranks, store=Bad(7))
        trainer.loader.prefetch = 0
        try:
            trainer.fit()
        except NotFinite as error:
            visit = trainer.loader.sampler.step(2)[-1]
            assert f"q{visit.image}." in str(error) and "step 3" in str(error), str(error)
        else:
            raise AssertionError("a loss that is not finite went through")
        weights = trainer.engine.weights()
        assert all(w.isfinite().all() for w in weights.values()) and bool(weights) == ranks.first


def vqa_eight_bit(ranks, place):
    """bitsandbytes' AdamW: whole or in shards it resumes bitwise; a shard of another cut is refused."""
    results = {}
    for name, values in [("plain", {}), ("0", {"engine": "zero", "zero_stage": 0}), ("2", {"engine": "zero"})]:
        config = vqa_config(ranks, optimizer={"name": "adamw8bit"}, **values)
        output = place / f"eight{ranks.world_size}" / name
        fitted(config, output / "whole", ranks)
        fitted(config, output / "parts", ranks, stop_at=3)
        half = newest(output / "parts")
        fitted(config, output / "parts", ranks, resume=half)
        if ranks.first:
            a, b = results[name] = saved(output / "whole"), saved(output / "parts")
            assert a.keys() == b.keys() and not [n for n in a if not torch.equal(a[n], b[n])], name
    for values, words in [({"zero_stage": 3}, "saved 8-bit moments are cut for ZeRO stage 2"), ({"zero_stage": 0}, "")]:
        trainer = vqa_trainer(
            vqa_config(ranks, optimizer={"name": "adamw8bit"}, engine="zero", **values), place / "x", ranks
        )
        try:
            trainer.resume(half)
        except ValueError as error:
            assert words in str(error)
        else:
            raise AssertionError("another cut was taken")


# ---- pretraining, by a loop of a few lines ----


def pretrain_batch(seed):
    batch = batch_of(seed)
    batch.pixels = batch.pixels.float()
    return batch


def pretrain_run(ranks, make, steps, held=None, recompute=False, bf16=False, start=0):
    """Steps of two parts on each rank: (losses and norms, everything that a checkpoint holds)."""
    torch.manual_seed(0)
    model = MissPretrain(pretrain_config(dropout=0.1), OBJECTIVE)
    if recompute:
        recompute_layers(model)
    engine, out = make(model), []
    if held is not None:
        engine.load_weights(held["weights"])
        engine.load_state(held["state"])
        model.memory.load(held["memory"])
    twin = dict(model.memory.twin.named_parameters())
    for step in range(start, steps):
        parts = []
        for part in range(2):
            batch = pretrain_batch(100 * step + 10 * ranks.rank + part)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                parts.append(engine(batch, ranks.gather, 0.2, 7 * step + ranks.rank))
            engine.backward(parts[-1].total / 2, part == 1)
        norm = float(engine.gradient_norm())
        total = sum(part.total.detach() for part in parts) / 2 / ranks.world_size
        out.append((float(ranks.reduce_sum(total)), norm))
        engine.step(1.0, 1.0, norm)
        model.after_update(*parts, values=engine.values(twin))
    memory = {name: t.clone() for name, t in model.memory.tensors().items()}
    return out, {"weights": engine.weights(), "state": engine.state(), "memory": memory}


RATES = OptimizerConfig(rate_new=1e-3, rate_text=1e-3, rate_vision=1e-3)


def zero(ranks, stage, bf16=False, extra=None, optimizer=RATES, parts=2):
    from miss.engine.training.zero import ZeroEngine

    given = {"zero_optimization": {**SHARD_ALL["zero_optimization"], **(extra or {})}}
    facts = RunFacts(optimizer, None, stage, 4 * parts * ranks.world_size, parts, ranks.world_size, bf16, 64)
    return lambda model: ZeroEngine(model, facts, ranks, given)


def differences(a, b):
    """The largest difference of weights, twin and queue; both hold the same names."""
    found = []
    for part in ("weights", "memory", "state"):
        assert a[part].keys() == b[part].keys()
        if part != "state":
            found += [(a[part][n].double() - b[part][n].double()).abs().max().item() for n in a[part]]
    return max(found)


def pretrain_parity(ranks, place):
    """The whole objective with dropout, two parts a rank, clipped, and the twin after each update; all weights sharded
    at stage 3, so that everything that reads one from outside its module must have it gathered."""
    want, end = pretrain_run(ranks, lambda model: PlainEngine(model, RATES, ranks), 3)
    for stage in STAGES:
        got, state = pretrain_run(ranks, zero(ranks, stage), 3)
        for (loss, norm), (loss_0, norm_0) in zip(got, want, strict=True):
            assert abs(loss - loss_0) < 2e-5 and abs(norm - norm_0) < 1e-5 * norm_0, (stage, got, want)
        if ranks.first:
            assert differences(state, end) < 5e-6, (stage, differences(state, end))
            assert state["weights"]["temperature"].shape == ()
            save_file({n: t.contiguous() for n, t in state["weights"].items()}, place / f"export{stage}.safetensors")
    # twins and queues are one on all ranks
    for name in ("twin.encoder.embeddings.word.weight", "queue.image"):
        rows = state["memory"][name][None]
        everyone = ranks.gather(rows)[0]
        assert all(torch.equal(other, everyone[0]) for other in everyone)


def pretrain_recomputed(ranks, place):
    """Layers' states computed again: the same numbers as without, also where stage 3 gathers weights anew."""
    want, end = pretrain_run(ranks, zero(ranks, 2), 2)
    got, state = pretrain_run(ranks, zero(ranks, 3), 2, recompute=True)
    assert all(abs(a[0] - b[0]) < 2e-5 for a, b in zip(got, want, strict=True))
    assert not ranks.first or differences(state, end) < 5e-6


def pretrain_resume(ranks, place):
    """Bitwise, with the twin and the queue, at every stage and with the optimiser offloaded."""
    for stage, bf16, extra in [
        (3, False, {}),
        (2, False, {"offload_optimizer": {"device": "cpu"}}),
        (2, True, {}),
    ]:
        make = zero(ranks, stage, bf16, extra)
        whole = pretrain_run(ranks, make, 2, bf16=bf16)
        half = pretrain_run(ranks, make, 1, bf16=bf16)[1]
        held = ranks.broadcast_object(half)
        rest = pretrain_run(ranks, make, 2, held, bf16=bf16, start=1)
        assert rest[0] == whole[0][1:], (stage, bf16)
        for part, tensors in whole[1].items():
            assert not [n for n, t in tensors.items() if not torch.equal(t, rest[1][part][n])], (stage, bf16, part)


class Weights(torch.nn.Module):
    """A loss whose gradients are known without the weights: both are what a factor says."""

    def __init__(self):
        super().__init__()
        self.matrix, self.vector = torch.nn.Parameter(torch.ones(7, 5)), torch.nn.Parameter(torch.ones(3))

    def forward(self, factor):
        return (self.matrix * factor).sum() + (self.vector * factor).sum()


def twin_1000(ranks, place):
    """The moving average over 1,000 updates against float64: AdamW and the average computed alone, from the same
    gradients. Averages of bfloat16 weights, or of a rank's shard, are far off it."""
    rate, momentum, steps = 1e-3, 0.995, 1000 if ranks.world_size == 1 else 150
    optimizer = OptimizerConfig(rate_new=rate, rate_text=rate, rate_vision=rate, weight_decay=0.0)
    factors = [[0.5, -0.25, 1.0, 0.125][(s * s + s // 7) % 4] for s in range(steps)]
    weight, average, m, v = 1.0, 1.0, 0.0, 0.0
    for t, g in enumerate(factors, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        weight -= rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)) ** 0.5 + 1e-8)
        average = momentum * average + (1 - momentum) * weight
    for stage in (2, 3) if ranks.world_size == 1 else (1, 3):
        model = Weights()
        engine = zero(ranks, stage, bf16=True, optimizer=optimizer, parts=1)(model)
        averages = {"matrix": torch.ones(7, 5), "vector": torch.ones(3)}
        for factor in factors:
            engine.backward(engine(factor), True)
            engine.step(1.0, 0.0, 1.0)
            for values in engine.values():
                ema_([averages[n] for n in values], list(values.values()), momentum)
        off = max((a.double() - average).abs().max().item() for a in averages.values())
        assert abs(average - 1) > 0.005 and off < 2e-5, (stage, average, off)


def presets(ranks, place):
    """Every preset trains; the width is the tiny model's."""
    from miss.engine.training.zero import ZeroEngine

    for path in sorted(PRESETS.glob("*.json")):
        facts = RunFacts(RATES, None, None, 8 * ranks.world_size, 2, ranks.world_size, False, 64)
        given = read_ds_config(path)
        out, _ = pretrain_run(ranks, lambda model, g=given, f=facts: ZeroEngine(model, f, ranks, g), 1)
        assert out[0][0] < 20 and filled(given, facts)["zero_optimization"]["stage"] == int(path.stem[4])


def together(ranks, place):
    """What ranks say to each other: rows of different numbers, none, every dtype; failures of the first."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool):
        for counts in ([3, 0], [0, 2], [1, 4], [0, 0]):
            everyone = [(torch.arange(n * 6).reshape(n, 2, 3) + 7 * r).to(dtype) for r, n in enumerate(counts)]
            everyone = everyone[: ranks.world_size]
            rows, first = ranks.gather(everyone[ranks.rank])
            assert rows.dtype == dtype and torch.equal(rows, torch.cat(everyone))
            assert first == sum(counts[: ranks.rank])
    assert ranks.gather(torch.arange(ranks.rank + 1))[0].tolist() == [0, 0, 1][: 1 if ranks.world_size == 1 else 3]
    assert ranks.all_true(True) and not ranks.all_true(ranks.rank != 0)
    assert ranks.broadcast_object({"from": ranks.rank}) == {"from": 0}
    assert ranks.gather_objects(ranks.rank) == list(range(ranks.world_size))
    assert float(ranks.reduce_sum(torch.tensor(2.0))) == 2.0 * ranks.world_size
    assert ranks.on_first(lambda: ranks.rank) == 0
    try:
        ranks.on_first(lambda: {}["missing"])
    except (KeyError, ValueError) as error:
        assert "missing" in str(error) and isinstance(error, KeyError) == ranks.first
    ranks.barrier()


def main() -> None:
    place, results = Path(sys.argv[1]), Path(sys.argv[2])
    found = {}
    trainer_module.draw_curves = lambda *arguments: None  # a second a run, and nothing here looks at them
    with Ranks.from_environment("cpu", timeout=60) as ranks:
        for case in sys.argv[3:]:
            started = time.perf_counter()
            try:
                globals()[case](ranks, place)
                failure = None
            except Exception:
                failure = traceback.format_exc()
            found[case] = {"failure": failure, "seconds": round(time.perf_counter() - started, 2)}
            if not ranks.all_true(failure is None):
                break  # the others may be anywhere
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
