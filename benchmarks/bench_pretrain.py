"""A pretraining step of ours beside the step as the original writes it, in turn, in float32 and under bf16 autocast.

Both: forward, backward, fused AdamW, momentum twin, queue; no dropout; the same weights, batch and draws, so that their
losses can be held against each other first. Captions of 8 to 30 tokens, 16 on average, padded to the longest as the
original's are. The queue is in proportion to the batch as the original's 57,600 to its 100, so that a small batch does
not carry the large queue's cost. Knows no data and no files.

FLOPs: ours by formula (within 2 % of PyTorch's counter, which fused operators would hide from), the original's by that
counter. `mfu` is our step's FLOPs, which suffice for the result, over time and over this machine's best matrix product
of that dtype, for both; `made` is what each really multiplies, over the same.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from miss.benchmarks.peers.literal_pretrain import Step
from miss.engine.training.flops import matmul_ceiling, pretraining_flops
from miss.models.config import MissConfig
from miss.models.pretrain import Losses, MissPretrain, ObjectiveConfig, PretrainBatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LENGTHS = (8, 11, 12, 13, 14, 15, 25, 30)  # 16 on average
ALPHA, SEED, RATE = 0.4, 0, 1e-5
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}  # of the total loss at the first step


@dataclass(frozen=True)
class Options:
    """preset: whose shapes. pairs: of a step. size: pixels a side. steps: timed, of each. ceiling_seconds: before and
    after, for the best product of each dtype."""

    preset: str = "small"
    pairs: int = 16
    size: int = 224
    steps: int = 5
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    ceiling_seconds: float = 1.0


def configured(options: Options) -> tuple[MissConfig, ObjectiveConfig]:
    base = MissConfig.preset(options.preset)
    encoder = replace(base.encoder, dropout=0.0, attention_dropout=0.0)
    config = replace(
        base,
        vision=replace(base.vision, image_size=options.size, drop_path=0.0),
        encoder=encoder,
        decoder=replace(base.decoder, dropout=0.0, attention_dropout=0.0),
        preprocess=replace(base.preprocess, image_size=options.size),
    )
    return config, ObjectiveConfig(queue_size=576 * options.pairs)


def make_batch(options: Options, config: MissConfig) -> PretrainBatch:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([LENGTHS[i % len(LENGTHS)] for i in range(options.pairs)], dtype=torch.int32)
    longest = int(lengths.max())
    ids = torch.randint(1000, 30000, (options.pairs, longest), generator=generator)
    ids[torch.arange(options.pairs), lengths.long() - 1] = config.tokens.sep
    ids = ids.masked_fill(torch.arange(longest) >= lengths[:, None], config.tokens.pad)
    pixels = torch.randint(0, 256, (options.pairs, options.size, options.size, 3), generator=generator).byte()
    return PretrainBatch(pixels, ids, lengths, torch.arange(options.pairs))


def ours(model: MissPretrain, batch: PretrainBatch) -> Callable[[], Tensor]:
    """One whole step; its total loss."""
    optimiser = torch.optim.AdamW(model.parameters(), RATE, fused=True)

    def step() -> Tensor:
        losses: Losses = model(batch, alpha=ALPHA, seed=SEED)
        losses.total.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        model.after_update(losses)
        return losses.total.detach()

    return step


def literal(model: MissPretrain) -> Step:
    """The literal step from copies of the model's weights, twin and queue."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    twin = {name: p.clone() for name, p in model.memory.twin.named_parameters()}
    image, text, ids = (t.clone() for t in model.memory.queue.features)
    return Step(model.config, parameters, twin, image, text, ids, momentum=model.objective.momentum)


def original(model: MissPretrain, batch: PretrainBatch) -> Callable[[], Tensor]:
    """One whole step as the original writes it; its total loss."""
    theirs, pixels = literal(model), batch.pixels.float()
    optimiser = torch.optim.AdamW(theirs.p.values(), RATE, fused=True)

    def step() -> Tensor:
        losses = theirs(pixels, batch.ids, batch.lengths, batch.numbers, ALPHA, SEED)
        losses["total"].backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return losses["total"].detach()

    return step


def literal_flops(model: MissPretrain, batch: PretrainBatch) -> float:
    """Of the literal step's products, forward and backward, counted as they are made."""
    with FlopCounterMode(display=False) as counter:
        losses = literal(model)(batch.pixels.float(), batch.ids, batch.lengths, batch.numbers, ALPHA, SEED)
        losses["total"].backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops())


def _ceilings(options: Options) -> dict[str, float]:
    cpu, seconds = torch.device("cpu"), options.ceiling_seconds
    return {dtype: matmul_ceiling(cpu, DTYPES[dtype], seconds) for dtype in options.dtypes}


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Checks the losses, then times; medians over `steps` rounds in which each takes a step in turn.

    Raises:
        ValueError: the two steps' losses differ by more than the dtype explains.
    """
    config, objective = configured(options)
    torch.manual_seed(0)
    model, batch = MissPretrain(config, objective), make_batch(options, config)
    flops = {"ours": pretraining_flops(config, objective, batch), "original": literal_flops(model, batch)}
    before = _ceilings(options)
    runners: dict[str, tuple[str, Callable[[], Tensor]]] = {}
    for dtype in options.dtypes:
        mine = MissPretrain(config, objective)
        mine.load_state_dict(model.state_dict())
        mine.memory.load(model.memory.tensors())
        runners[f"ours {dtype}"] = dtype, ours(mine, batch)
        runners[f"original {dtype}"] = dtype, original(model, batch)
    times: dict[str, list[float]] = {name: [] for name in runners}
    first: dict[str, float] = {}
    for turn in range(options.steps + 1):
        for name, (dtype, step) in runners.items():
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                loss = step()
            if turn:
                times[name].append(time.perf_counter() - start)
            else:  # the first step warms up, and starts from the same weights
                first[name] = float(loss)
        if not turn:
            _check(options, first)
    after = _ceilings(options)
    ceilings = {dtype: max(before[dtype], after[dtype]) for dtype in options.dtypes}
    rows = {
        name: _row(options, values, flops["ours"], flops[name.split()[0]], ceilings[runners[name][0]])
        for name, values in times.items()
    }
    for name, row in rows.items():
        say(f"{name:>14}: " + "  ".join(f"{key} {value}" for key, value in row.items()) + f"  loss {first[name]:.5f}")
    seconds = {name: statistics.median(values) for name, values in times.items()}
    pairs = [(f"original {d}", f"ours {d}") for d in options.dtypes]
    if len(options.dtypes) == 2:
        pairs.append(("original fp32", "ours bf16"))
    ratios = {f"{a} / {b}": round(seconds[a] / seconds[b], 2) for a, b in pairs}
    say("\n".join(f"{name}: {ratio:.2f}x" for name, ratio in ratios.items()))
    return {
        "benchmark": "pretrain",
        "preset": options.preset,
        "pairs": options.pairs,
        "image_size": options.size,
        "steps": options.steps,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "queue": objective.queue_size,
        "gflop_per_step": {name: round(value / 1e9, 2) for name, value in flops.items()},
        "flops_ratio": round(flops["original"] / flops["ours"], 3),
        "ceiling_gflops": {
            dtype: {"before": round(before[dtype] / 1e9, 1), "after": round(after[dtype] / 1e9, 1)}
            for dtype in options.dtypes
        },
        "first_loss": first,
        "rows": rows,
        "ratios": ratios,
    }


def _check(options: Options, first: dict[str, float]) -> None:
    for dtype in options.dtypes:
        a, b = first[f"ours {dtype}"], first[f"original {dtype}"]
        if not abs(a - b) <= TOLERANCES[dtype] * abs(b):
            raise ValueError(f"{dtype}: our first step's loss is {a}, the original's {b}: not the same work")


def _row(options: Options, times: list[float], useful: float, made: float, ceiling: float) -> dict[str, float]:
    """`useful`: our step's FLOPs, `made`: the step's own."""
    seconds = statistics.median(times)
    return {
        "s_per_step": round(seconds, 4),
        "fastest": round(min(times), 4),
        "slowest": round(max(times), 4),
        "pairs_per_s": round(options.pairs / seconds, 2),
        "gflops_per_s": round(made / seconds / 1e9, 1),
        "mfu": round(useful / seconds / ceiling, 3),
        "made": round(made / seconds / ceiling, 3),
    }
