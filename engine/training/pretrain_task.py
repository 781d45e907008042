"""Pretraining as the training loop's task: the objective of a part, the momentum twin and the queue after an update.

Knows the pretraining model and how its losses are weighed; does not know where pairs come from, or the loop.
"""

import dataclasses
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from miss.engine.data.augment import hash64
from miss.engine.data.pair_loader import PairLoader, PairStep
from miss.engine.training.flops import pretraining_flops
from miss.engine.training.plain import Engine, PlainEngine
from miss.engine.training.pretrain_config import LossesConfig, PretrainConfig
from miss.engine.training.ranks import Ranks
from miss.engine.training.task import DROPOUT, Outcome
from miss.models.pretrain import Losses, MissPretrain


def weighed(losses: Losses, weights: LossesConfig) -> Tensor:
    """The sum of the losses as the run weighs them."""
    total = weights.itc * losses.itc + weights.itm * losses.itm + weights.lm * losses.lm
    return total if losses.mlm is None else total + weights.mlm * losses.mlm


class Pretraining:
    """The task of `MissPretrain`. Make it before the engine, which may shard the model.

    Args:
        ramp: in how many steps the momentum twin's opinion reaches its full weight.
    """

    unit, loss_is = "pairs", "loss (means over pairs, matched rows, words)"
    names: tuple[str, ...] = ("itc", "itm", "lm", "mlm", "temperature", "right", "matching", "words")

    def __init__(
        self, model: MissPretrain, config: PretrainConfig, loader: PairLoader, device: torch.device, ranks: Ranks
    ) -> None:
        self.model, self.config, self.loader, self.device, self.ranks = model, config, loader, device, ranks
        ramp = config.losses.alpha_ramp_steps
        self.ramp = 2 * loader.sampler.steps_per_epoch if ramp is None else ramp
        followed = {name for name, _ in model.memory.twin.named_parameters()}
        self._trained = {n for n, p in model.named_parameters() if p.requires_grad and n in followed}
        # An engine hands out what it trains; the twin follows the rest, too, which may differ from it at the start.
        self._frozen = {
            n: p.detach().float().clone() for n, p in model.named_parameters() if n in followed - self._trained
        }

    def alpha(self, step: int) -> float:
        """How much the twin's opinion counts at a step: a linear ramp (`objectives.alpha_at` over two epochs)."""
        most = self.config.losses.alpha
        return most * min(1.0, step / self.ramp) if self.ramp else most

    def run(self, engine: Engine, work: PairStep, number: int) -> Outcome:
        """Each part counts alike, whatever pairs it lacks: its losses are means over all processes' rows."""
        batch = work.parts[number].to(self.device, non_blocking=True)
        seed = hash64(self.config.seed, DROPOUT, work.index, number) >> 1  # the same on every process
        losses: Losses = engine(batch, self.ranks.gather, self.alpha(work.index), seed)
        loss = weighed(losses, self.config.losses) / len(work.parts)
        return Outcome(loss, self._sums(losses, len(work.parts)), _detached(losses))

    def _sums(self, losses: Losses, num_parts: int) -> Tensor:
        """Means as shares of the step's mean; counts as they are."""
        numbers = losses.numbers
        mlm = torch.zeros_like(losses.lm) if losses.mlm is None else losses.mlm
        means = [losses.itc, losses.itm, losses.lm, mlm, numbers["temperature"].reshape(())]
        counts = [numbers["matched"] * numbers["pairs"], numbers["pairs"], numbers["words"]]
        shares = torch.stack([m.detach().double() for m in means]) / (num_parts * self.ranks.world_size)
        return torch.cat([shares, torch.stack([c.double() for c in counts])])

    def updated(self, engine: Engine, outcomes: list[Outcome]) -> None:
        parts = [outcome.output for outcome in outcomes]
        if isinstance(engine, PlainEngine):
            self.model.after_update(*parts)
        else:
            values = chain(engine.values(self._trained), (self._frozen,) if self._frozen else ())
            self.model.after_update(*parts, values=values)

    def rows(self, work: PairStep, number: int) -> list[str]:
        return work.keys[number]

    def not_finite(self, work: PairStep, outcomes: list[Outcome]) -> list[str]:
        """By the features of both towers, which every process holds of all: its own pairs follow those before it."""
        counts = self.ranks.gather_objects([len(keys) for keys in work.keys])
        found: list[str] = []
        for number, (keys, outcome) in enumerate(zip(work.keys, outcomes, strict=True)):
            first = sum(each[number] for each in counts[: self.ranks.rank])
            features = outcome.output.features
            bad = ~(features.image.isfinite().all(1) & features.text.isfinite().all(1))
            own = bad[first : first + len(keys)].tolist()
            found += [key for key, is_bad in zip(keys, own, strict=True) if is_bad]
        return found

    def figures(self, sums: dict[str, float], loss: float, steps: int, rows: int) -> dict[str, Any]:
        values: dict[str, Any] = {f"loss_{n}": sums[n] / steps for n in ("itc", "itm", "lm")}
        if self.config.losses.mlm:
            values["loss_mlm"] = sums["mlm"] / steps
        values |= {"temperature": sums["temperature"] / steps, "matched": sums["right"] / max(1.0, sums["matching"])}
        values |= {"words_per_step": sums["words"] / steps}
        values["truncated_share"] = round(self.loader.counts.truncated_share, 4)
        if self.loader.quarantine is not None:
            values["quarantined"] = sum(self.loader.quarantine.counts().values())
        return values

    def flops(self, work: PairStep) -> float:
        model, alpha = self.model, self.alpha(work.index) > 0
        return sum(pretraining_flops(model.config, model.objective, part, alpha) for part in work.parts)

    def tensors(self) -> dict[str, Tensor]:
        return self.model.memory.tensors()

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.model.memory.load(tensors)


def _detached(losses: Losses) -> Losses:
    """Without the graph, which would hold every part's states until the update."""
    itc, itm, lm, total = (t.detach() for t in (losses.itc, losses.itm, losses.lm, losses.total))
    mlm = None if losses.mlm is None else losses.mlm.detach()
    return dataclasses.replace(losses, itc=itc, itm=itm, lm=lm, mlm=mlm, total=total)
