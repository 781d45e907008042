"""How good a pretraining model is on pairs that it was not trained on: its losses, and retrieval in both directions.

Knows the pretraining model's towers and how ranks share the pairs; does not know training or files.

Shapes: I distinct images, C distinct captions, P width of a feature.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from miss.engine.data.augment import hash64
from miss.engine.data.pair_loader import CorruptLimit, PairLoader, PairStep
from miss.engine.data.pairs import Pair
from miss.engine.data.processor import Processor
from miss.engine.training.pretrain_config import PretrainConfig
from miss.engine.training.pretrain_task import weighed
from miss.engine.training.ranks import ALONE, Ranks
from miss.models import objectives
from miss.models.pretrain import MissPretrain, PretrainBatch

RANKS = (1, 5)
_DRAWN = 25  # what a hash is for


class PairValidation:
    """Called with a model on every rank, gives its figures, the same on all. Images are decoded once, unaugmented, each
    with one caption drawn once; negatives are the same every time, and PyTorch's own generator is left as it was.

    The pairs are cut into parts of at most `validation.batch_pairs`, whatever the number of ranks; rank r has parts r,
    r + ranks, …, maybe none. What a part gives depends on nothing beside it, and parts are added up in their order: the
    figures are those of one rank. The model must be whole on each rank, as the trainer hands it over (under ZeRO-3 a
    copy): between two gathers a rank runs as many passes as it has parts, and waits for nobody.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        processor: Processor,
        config: PretrainConfig,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        data = config.data
        self.config, self.device, self.ranks = config, device, ranks
        count = -(-len(pairs) // config.validation.batch_pairs)
        self.numbers = range(ranks.rank, count, ranks.world_size)
        loader = PairLoader(
            pairs,
            processor,
            len(pairs),
            config.seed,
            accumulation=count,
            only=self.numbers,
            max_tokens=data.max_tokens,
            workers=data.workers,
            ahead=0,
            corrupt=CorruptLimit(share=data.corrupt_share),
        )
        steps = loader.steps()
        self.step: PairStep = next(steps)
        steps.close()
        self.keys = [key for part in ranks.gather_objects(self.step.keys) for keys in part for key in keys]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, MissPretrain)
        devices = [] if self.device.type == "cpu" else [self.device]
        width = model.objective.feature_width
        sums = [torch.zeros(0, 2 + len(self._names()), dtype=torch.float64)]
        features = [torch.zeros(0, 1 + 2 * width)]
        with torch.random.fork_rng(devices), self._autocast():
            for number, part in zip(self.numbers, self.step, strict=True):
                if not len(part.ids):  # none of its images could be used
                    continue
                torch.manual_seed(hash64(self.config.seed, _DRAWN, number))
                batch = part.to(self.device)
                found = self._losses(model, batch)
                sums.append(torch.tensor([[number, len(batch.ids), *found]], dtype=torch.float64))
                both = torch.cat(features_of(model, batch), 1).float().cpu()
                features.append(torch.cat([torch.full((len(both), 1), float(number)), both], 1))
        return self._figures(torch.cat(sums), torch.cat(features))

    def _figures(self, sums: Tensor, features: Tensor) -> dict[str, float]:
        """Of all ranks' parts, which each row of both begins with the number of."""
        captions = torch.cat([torch.zeros(0, dtype=torch.int64), *(part.numbers for part in self.step)])
        sums, features, captions = (
            self.ranks.gather(t.to(self.ranks.device))[0].cpu() for t in (sums, features, captions)
        )
        sums = sums[sums[:, 0].argsort()]
        count, values = sums[:, 1:2], sums[:, 2:]
        means = (values * count).sum(0) / count.sum()
        order = features[:, 0].argsort(stable=True)
        image, text = features[order, 1:].chunk(2, 1)
        found = recall(image, text, [self.keys[i] for i in order.tolist()], captions[order])
        return dict(zip(self._names(), means.tolist(), strict=True)) | found

    def _names(self) -> tuple[str, ...]:
        names = ("loss", "loss_itc", "loss_itm", "loss_lm", "matched")
        return (*names, "loss_mlm") if self.config.losses.mlm else names

    def _losses(self, model: MissPretrain, batch: PretrainBatch) -> list[float]:
        """By `_names`; against hard targets, so that figures of different steps compare."""
        losses = model(batch)
        total = weighed(losses, self.config.losses)
        found = [total, losses.itc, losses.itm, losses.lm, losses.numbers["matched"]]
        return [float(value) for value in (found if losses.mlm is None else [*found, losses.mlm])]

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
