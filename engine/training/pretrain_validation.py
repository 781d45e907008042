"""How good a pretraining model is on pairs that it was not trained on: its losses, and retrieval in both directions.

Knows the pretraining model's towers; does not know training, files or ranks.

Shapes: I distinct images, C distinct captions, P width of a feature.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from miss.engine.data.pair_loader import PairLoader, PairStep
from miss.engine.data.pairs import Pair
from miss.engine.data.processor import Processor
from miss.engine.training.pretrain_config import PretrainConfig
from miss.engine.training.pretrain_task import weighed
from miss.models import objectives
from miss.models.pretrain import MissPretrain, PretrainBatch

RANKS = (1, 5)


class PairValidation:
    """Called with a model, gives its figures. Images are decoded once, unaugmented, each with one caption drawn once;
    negatives are the same every time, and PyTorch's own generator is left as it was."""

    def __init__(
        self, pairs: Sequence[Pair], processor: Processor, config: PretrainConfig, device: torch.device
    ) -> None:
        data = config.data
        self.config, self.device = config, device
        loader = PairLoader(
            pairs, processor, len(pairs), config.seed, max_tokens=data.max_tokens, workers=data.workers, ahead=0
        )
        steps = loader.steps()
        step: PairStep = next(steps)
        steps.close()
        self.batch, self.keys = step[0], step.keys[0]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, MissPretrain)
        parts = _cut(self.batch, self.config.validation.batch_pairs)
        devices = [] if self.device.type == "cpu" else [self.device]
        sums: dict[str, float] = {}
        features: list[tuple[Tensor, Tensor]] = []
        with torch.random.fork_rng(devices), self._autocast():
            torch.manual_seed(self.config.seed)
            for part in parts:
                batch = part.to(self.device)
                for name, value in self._losses(model, batch).items():
                    sums[name] = sums.get(name, 0.0) + value * len(batch.ids) / len(self.keys)
                features.append(features_of(model, batch))
        image, text = (torch.cat(some).float().cpu() for some in zip(*features, strict=True))
        return {**sums, **recall(image, text, self.keys, self.batch.numbers)}

    def _losses(self, model: MissPretrain, batch: PretrainBatch) -> dict[str, float]:
        """Against hard targets, so that figures of different steps compare."""
        losses = model(batch)
        found = {"loss": weighed(losses, self.config.losses), "loss_itc": losses.itc, "loss_itm": losses.itm}
        found |= {"loss_lm": losses.lm, "matched": losses.numbers["matched"]}
        if losses.mlm is not None:
            found["loss_mlm"] = losses.mlm
        return {name: float(value) for name, value in found.items()}

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.bf16 else nullcontext()


def features_of(model: MissPretrain, batch: PretrainBatch) -> tuple[Tensor, Tensor]:
    """The trained towers' features of images and of captions."""
    ids = objectives.with_first(batch.ids, model.config.tokens.cls)
    image = model.image_projection(model.vision.first(batch.pixels))
    text = model.text_projection(model.encoder.first(ids, batch.lengths))
    return objectives.normalised(image), objectives.normalised(text)


def recall(image: Tensor, text: Tensor, keys: Sequence[str], numbers: Tensor) -> dict[str, float]:
    """Recall@1 and @5 of distinct captions for distinct images and the other way; `recall` is the mean of both @1.

    Equal captions are one, and each is right for every image that has it; `recall_chance` is what @1 is by chance.
    """
    names = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    image_of = torch.tensor([names[key] for key in keys])
    caption_of = torch.unique(numbers, return_inverse=True)[1]
    num_images, num_captions = len(names), int(caption_of.max()) + 1
    right = torch.zeros(num_images, num_captions, dtype=torch.bool)
    right[image_of, caption_of] = True
    similarity = image[_firsts(image_of, num_images)] @ text[_firsts(caption_of, num_captions)].T
    found: dict[str, float] = {}
    for name, scores, hits in (
        ("image_to_text", similarity, right),
        ("text_to_image", similarity.T, right.T),
    ):
        for k in RANKS:
            best = scores.topk(min(k, scores.shape[1]), 1).indices
            found[f"{name}_{k}"] = float(hits.gather(1, best).any(1).double().mean())
    mean = (found["image_to_text_1"] + found["text_to_image_1"]) / 2
    return {**found, "recall": mean, "recall_chance": float(right.double().mean())}


def _firsts(groups: Tensor, count: int) -> Tensor:
    """Where each group comes first."""
    first = torch.full((count,), len(groups), dtype=torch.int64)
    return first.scatter_reduce(0, groups, torch.arange(len(groups)), "amin")


def _cut(batch: PretrainBatch, size: int) -> list[PretrainBatch]:
    """Pieces of about equal size, of at most `size` pairs."""
    count = -(-len(batch.ids) // size)
    pieces = zip(*(t.tensor_split(count) for t in vars(batch).values()), strict=True)
    return [PretrainBatch(*piece) for piece in pieces]
