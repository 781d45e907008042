"""The shapes that operations are measured at: a preset of the model, or one linear by its numbers.

Knows the presets' sizes; does not know operations or implementations.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from miss.models.config import MissConfig

NUM_QUESTION_TOKENS = 18  # a question of SLAKE-English in word pieces, [ENC] and [SEP] included
IMAGES = 8  # of a batch, and questions over one image
_IMAGE_SIZE = {"base": 384, "large": 384}  # 577 tokens; `small` says its own, 224 pixels and 257 tokens


@dataclass(frozen=True)
class Linear:
    """x (rows, columns) times a weight (outputs, columns)."""

    name: str
    rows: int
    outputs: int
    columns: int

    @property
    def label(self) -> str:
        return f"{self.name} M={self.rows} N={self.outputs} K={self.columns}"

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.outputs * self.columns


class Shapes:
    """What `--shapes` names, on a device. `config` is None where it names one linear."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.custom: Linear | None = None
        self.config: MissConfig | None = None
        if "," in name:
            self.custom = _parse(name)
            return
        self.config = MissConfig.preset(name)
        size = _IMAGE_SIZE.get(name, self.config.preprocess.image_size)
        self.image_size = size
        self.tokens = (size // self.config.vision.patch_size) ** 2 + 1

    @property
    def preset(self) -> MissConfig:
        assert self.config is not None
        return self.config

    def tower(self, name: str, rows: int) -> Iterator[Linear]:
        """The four linears of a layer of the image (`vit`) or a text (`bert`) tower."""
        part = self.preset.vision if name == "vit" else self.preset.encoder
        width, inner = part.hidden_size, part.intermediate_size
        yield Linear(f"{name}.qkv", rows, 3 * width, width)
        yield Linear(f"{name}.out", rows, width, width)
        yield Linear(f"{name}.fc1", rows, inner, width)
        yield Linear(f"{name}.fc2", rows, width, inner)

    def vision(self) -> Iterator[Linear]:
        """Of one image and of a batch."""
        for rows in (self.tokens, IMAGES * self.tokens):
            yield from self.tower("vit", rows)

    def text(self) -> Iterator[Linear]:
        """Of one question."""
        yield from self.tower("bert", NUM_QUESTION_TOKENS)

    def image_kv(self) -> Linear:
        """Keys and values of an image for all layers of the text encoder."""
        encoder, width = self.preset.encoder, self.preset.vision.hidden_size
        return Linear("image_kv", self.tokens, 2 * encoder.num_layers * encoder.hidden_size, width)

    def decoding(self, rows: int) -> Iterator[Linear]:
        """One token of `rows` answers: where the weights come from memory."""
        yield from self.tower("bert", rows)

    def head(self, rows: int) -> Linear:
        decoder = self.preset.decoder
        return Linear("head", rows, decoder.vocab_size, decoder.hidden_size)


def _parse(text: str) -> Linear:
    parts = text.split(",")
    if len(parts) != 4 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f'--shapes: got "{text}"; wanted small, base, large, or four numbers B,M,N,K')
    batch, rows, outputs, columns = map(int, parts)
    return Linear("custom", batch * rows, outputs, columns)
