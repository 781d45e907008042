"""Pretraining: one batch of images with captions to the losses of contrast, matching and language modelling.

Knows the order of a step and what in it is computed once; does not know ranks (`gather` is handed in), optimisers or
schedules. Encoder and decoder share all but self-attention and the head, so that an image's keys and values of all
layers, one product, serve the matching pairs, both kinds of negatives and the captions.

Shapes: B pairs, N image tokens, T caption length, C width, P width of a feature.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from miss.kernels.cross_attention import KV
from miss.kernels.cross_entropy import linear_cross_entropy
from miss.models import objectives
from miss.models.config import ConfigError, MissConfig
from miss.models.decoder import AnswerDecoder
from miss.models.joint import JointEncoder
from miss.models.layers import initialise, mix
from miss.models.linear import Linear
from miss.models.momentum import Memory, MomentumTwin
from miss.models.queue import Features, Queue
from miss.models.vision import VisionTransformer

# Rows of every process, one behind another in the order of ranks, and where this process's start.
Gather = Callable[[Tensor], tuple[Tensor, int]]

SHARED_OF_LAYER = ("cross_attention", "mlp")  # what a decoder's layer has of the encoder's


def alone(rows: Tensor) -> tuple[Tensor, int]:
    """The gather of one process."""
    return rows, 0


@dataclass(frozen=True)
class ObjectiveConfig:
    """Sizes and weights of the objective; the original's values.

    `mlm` weighs the masked words' loss, which MISS does not have: 0 leaves it out. `mask` is [MASK]'s id.
    `negatives_among`: hard negatives are drawn within so many neighbours of the global batch, which makes the draw the
    same on any number of processes whose parts are multiples of it; 0: within each process's part, as the original.
    """

    feature_width: int = 256
    queue_size: int = 57600
    momentum: float = 0.995
    temperature: float = 0.07
    label_smoothing: float = 0.1
    mlm: float = 0.0
    mask: int = 103
    negatives_among: int = 0

    def __post_init__(self) -> None:
        if self.feature_width < 1 or self.queue_size < 0:
            raise ConfigError(f"feature_width {self.feature_width}, queue_size {self.queue_size}: wanted 1, 0 or more")
        if not (0 <= self.momentum <= 1 and 0 <= self.label_smoothing < 1 and self.mlm >= 0 and self.temperature > 0):
            raise ConfigError(
                "wanted momentum 0 to 1, label_smoothing 0 to below 1, mlm 0 or more, temperature above 0"
            )
        if self.negatives_among < 0 or self.negatives_among == 1:
            raise ConfigError(f"negatives_among {self.negatives_among}: wanted 0 or at least 2, as one has no negative")


@dataclass
class PretrainBatch:
    """Images with one caption each.

    pixels:   uint8 (B, S, S, 3)
    ids:      int64 (B, T), any first token, … [SEP], padded with 0
    lengths:  int32 (B,)
    numbers:  int64 (B,), 0 or more, equal where captions are equal, over the whole data set
    """

    pixels: Tensor
    ids: Tensor
    lengths: Tensor
    numbers: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PretrainBatch":
        tensors = (self.pixels, self.ids, self.lengths, self.numbers)
        return PretrainBatch(*(t.to(device, non_blocking=non_blocking) for t in tensors))


@dataclass
class Losses:
    """Scalars, each this process's share of the mean over all processes' rows: their average over processes is it.

    numbers: for the log, on the device. features: what `after_update` puts into the queue.
    """

    itc: Tensor
    itm: Tensor
    lm: Tensor
    mlm: Tensor | None
    total: Tensor
    numbers: dict[str, Tensor]
    features: Features


class MissPretrain(nn.Module):
    """The model of arXiv 2401.05163 in its pretraining form. The twin and the queue stand in `memory`, no submodule.

    Raises:
        ConfigError: encoder and decoder differ in what they share, or masked words have no mask in the vocabulary.
    """

    def __init__(self, config: MissConfig, objective: ObjectiveConfig | None = None) -> None:
        super().__init__()
        self.config, self.objective = config, objective or ObjectiveConfig()
        width = self.objective.feature_width
        if self.objective.mlm and not 0 <= self.objective.mask < config.encoder.vocab_size:
            raise ConfigError(f"mask {self.objective.mask}: wanted [MASK]'s id, below {config.encoder.vocab_size}")
        self.vision = VisionTransformer(config.vision, config.preprocess)
        self.encoder = JointEncoder(config.encoder)
        self.decoder = _sharing_decoder(config, self.encoder)
        self.image_projection = Linear(config.vision.hidden_size, width)
        self.text_projection = Linear(config.encoder.hidden_size, width)
        self.matching_head = Linear(config.encoder.hidden_size, 2)
        self.temperature = nn.Parameter(torch.tensor(self.objective.temperature))
        self.apply(initialise)
        twin = MomentumTwin(self.vision, self.encoder, self.image_projection, self.text_projection)
        self.memory = Memory(twin, Queue.fresh(self.objective.queue_size, width))

    def forward(
        self,
        batch: PretrainBatch,
        gather: Gather = alone,
        alpha: float = 0.0,
        seed: int | None = None,
        tokens: Tensor | None = None,
    ) -> Losses:
        """The step's losses. Dropout acts only where a seed is given; the draws of negatives follow the seed, too.

        Args:
            batch: this process's pairs, also none.
            gather: rows of this process -> rows of all; called thrice, without gradients, whatever the batch is.
            alpha: the weight of the momentum model's opinion (`objectives.alpha_at`).
            seed: the step's (and the part's), the same on every process. What is dropped depends on it and on where the
                process's pairs start among all, what is hidden or drawn on it and on the pair's place among all.
            tokens: (B, 1 + N, C) of the image encoder, where it is frozen and they are known: it does not look again,
                nor does its twin, which is then equal to it.
        """
        numbers, first = gather(batch.numbers)
        own = mix(mix(seed, 0), first)  # processes drop different places
        known = None if tokens is None else tokens[:, 0]
        tokens = self.vision(batch.pixels, mix(own, 0)) if tokens is None else tokens
        image_kv = self.encoder.cross_kv.layers(tokens)
        index = torch.arange(len(tokens), dtype=torch.int32, device=tokens.device)
        student, teacher = self._features(batch, tokens[:, 0], own, known)
        images, texts = gather(torch.cat([teacher.image, teacher.text], 1))[0].chunk(2, 1)
        features = Features(images, texts, numbers)
        itc, pairs = self._contrast(student, teacher, features, first, alpha, mix(seed, 1))
        logits = self._matching(batch, image_kv, pairs, mix(own, 3))
        captions, num_words = self._captions(batch, image_kv, index, mix(own, 4))
        hidden, num_hidden = torch.zeros_like(captions), torch.zeros_like(num_words)
        if self.objective.mlm:
            hidden, num_hidden = self._masked_words(batch, image_kv, index, first, mix(seed, 2), mix(own, 5))
        sums = itc.sum(), objectives.matching_loss(logits, pairs).sum(), captions, hidden
        counts = torch.full_like(num_words, len(index)), pairs.weight.sum(), num_words, num_hidden
        return self._losses(sums, counts, gather, features, ((logits.detach().argmax(1) == pairs.label) * pairs.weight))

    def _losses(
        self,
        sums: tuple[Tensor, ...],
        counts: tuple[Tensor, ...],
        gather: Gather,
        features: Features,
        right: Tensor,
    ) -> Losses:
        """Shares of means over all processes' rows: an average over processes of sums over the mean count is that."""
        count = torch.stack([t.double() for t in counts])
        everyone = gather(count[None])[0].mean(0).clamp(min=1e-9)  # of chance, nobody may have hidden a word
        itc, itm, lm, words = (loss / share.to(loss) for loss, share in zip(sums, everyone, strict=True))
        mlm = words if self.objective.mlm else None
        total = itc + itm + lm if mlm is None else itc + itm + lm + self.objective.mlm * mlm
        numbers = {
            "temperature": self._temperature().detach(),
            "matched": right.sum() / count[1].clamp(min=1),
            "words": count[2],
            "pairs": count[1],
        }
        return Losses(itc, itm, lm, mlm, total, numbers if mlm is None else numbers | {"hidden": count[3]}, features)

    def after_update(
        self, *losses: Losses, values: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]] | None = None
    ) -> None:
        """What follows the optimiser's step: the momentum twin, then the queue takes what the step's parts saw.

        values: the parameters by name, where they are not whole or not precise in this model (sharded, halves); at once
            or part after part, each of which holds some that the twin follows.

        Raises:
            ValueError: a parameter that the twin follows is not among `values`; given at once, nothing was changed.
        """
        if values is None:
            with torch.no_grad():
                self.temperature.clamp_(*objectives.TEMPERATURES)
            values = dict(self.named_parameters())
        left = {name for name, _ in self.memory.twin.named_parameters()}
        if isinstance(values, Mapping):
            self._complete(left - values.keys())
            values = (values,)
        for some in values:
            self.memory.twin.follow(some, self.objective.momentum)
            left -= some.keys()
        self._complete(left)
        for part in losses:
            self.memory.queue.put(part.features)

    @staticmethod
    def _complete(left: set[str]) -> None:
        if left:
            raise ValueError(
                f"the momentum twin also follows {', '.join(sorted(left)[:3])} ({len(left)} in all): wanted values of "
                f"all, or the twin falls behind there"
            )

    def reset_twin(self) -> None:
        """The twin as the weights are now: after loading weights that come without one."""
        self.memory.twin.become(dict(self.named_parameters()))

    def reset_memory(self) -> None:
        """The twin as the weights are now and the queue as a run begins: nothing of an earlier run is left."""
        self.reset_twin()
        self.memory.queue.restart()

    def _features(
        self, batch: PretrainBatch, cls: Tensor, seed: int | None, known: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], Features]:
        """(image and text features with gradients, the twin's) of this process's pairs; `known`: the twin's [CLS]."""
        ids = objectives.with_first(batch.ids, self.config.tokens.cls)
        image = objectives.normalised(self.image_projection(cls))
        states = self.encoder.first(ids, batch.lengths, seed=mix(seed, 1))
        text = objectives.normalised(self.text_projection(states))
        # The original's twin drops out as its model does; a teacher without noise is the better one.
        noise = mix(seed, 2) if self.config.behaviour == "compat" else None
        image_m, text_m = self.memory.twin(
            batch.pixels, ids, batch.lengths, self.matching_head.weight.dtype, noise, known
        )
        return (image, text), Features(image_m, text_m, batch.numbers)

    def _contrast(
        self,
        student: tuple[Tensor, Tensor],
        teacher: Features,
        everyone: Features,
        first: int,
        alpha: float,
        seed: int | None,
    ) -> tuple[Tensor, objectives.Pairs]:
        """The contrastive loss of each pair, and the pairs of the matching objective."""
        compat, queue = self.config.behaviour == "compat", self.memory.queue.features
        temperature = self._temperature()
        loss = objectives.contrast(*student, teacher, everyone, first, queue, temperature, alpha, compat)
        among = self.objective.negatives_among
        pairs = objectives.matching_pairs(*student, teacher, temperature.detach(), seed, compat, first, among)
        return loss, pairs

    def _temperature(self) -> Tensor:
        return objectives.clamped(self.temperature).reshape(())  # an engine may keep it as a vector of one

    def _matching(self, batch: PretrainBatch, image_kv: list[KV], pairs: objectives.Pairs, seed: int | None) -> Tensor:
        """Logits (3B, 2) of all pairs in one pass, of which the last layer computes the first token alone."""
        ids = objectives.with_first(batch.ids, self.config.tokens.enc)[pairs.text]
        lengths = batch.lengths[pairs.text]
        return self.matching_head(self.encoder.first(ids, lengths, image_kv, pairs.image.int(), seed))

    def _captions(
        self, batch: PretrainBatch, image_kv: list[KV], index: Tensor, seed: int | None
    ) -> tuple[Tensor, Tensor]:
        """The sum over next tokens of their loss, and how many there are."""
        ids = objectives.with_first(batch.ids, self.config.tokens.dec)
        states = self.decoder(ids[:, :-1], image_kv, index, None, batch.lengths - 1, seed)
        labels = objectives.next_tokens(ids, batch.lengths)
        return self._words(states, labels, self.objective.label_smoothing), (labels != objectives.IGNORED).sum()

    def _masked_words(
        self,
        batch: PretrainBatch,
        image_kv: list[KV],
        index: Tensor,
        first: int,
        seed: int | None,
        own: int | None,
    ) -> tuple[Tensor, Tensor]:
        """(sum over this process's hidden words, how many): with the language-model head, which both then share."""
        tokens, text = self.config.tokens, self.config.encoder
        specials = (tokens.pad, tokens.cls, tokens.sep, tokens.dec, tokens.enc)
        ids, mask = objectives.with_first(batch.ids, tokens.enc), self.objective.mask
        hidden, labels = objectives.masked_words(
            ids, batch.lengths, mask, text.vocab_size, seed, specials=specials, first=first, width=text.max_positions
        )
        states = self.encoder(hidden, batch.lengths, image_kv, index, own)
        return self._words(states, labels, 0.0), (labels != objectives.IGNORED).sum()

    def _words(self, states: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        rows, words = objectives.counted(states, labels)
        table, head = self.decoder.embeddings.word.weight, self.decoder.head
        return linear_cross_entropy(head(rows), table, head.bias, words, label_smoothing, objectives.IGNORED).sum()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MissPretrain":
        super()._apply(fn, recurse)
        self.memory.apply(fn)
        return self


def _sharing_decoder(config: MissConfig, encoder: JointEncoder) -> AnswerDecoder:
    """A decoder over image tokens that owns its self-attention and head; all else is the encoder's own modules."""
    text = replace(config.decoder, source_width=config.encoder.source_width)
    if replace(text, num_layers=config.encoder.num_layers) != config.encoder or text.num_layers > len(encoder.layers):
        raise ConfigError(
            "pretraining shares embeddings, cross-attention and MLPs between the text towers: wanted encoder and "
            "decoder of the same sizes, the decoder of no more layers"
        )
    decoder = AnswerDecoder(text, encoder.embeddings)
    decoder.cross_kv = encoder.cross_kv
    for mine, theirs in zip(decoder.layers, encoder.layers, strict=False):
        for part in SHARED_OF_LAYER:
            setattr(mine, part, getattr(theirs, part))
    return decoder
