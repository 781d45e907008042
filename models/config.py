"""What a MISS model is made of, as frozen dataclasses, and the three presets.

Knows sizes, token ids and preprocessing constants; does not know tensors, files or backends.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

T = TypeVar("T")

Behaviour = Literal["correct", "compat"]
BEHAVIOURS = ("correct", "compat")


class ConfigError(ValueError):
    """A configuration with a key or a value that is not known."""


@dataclass(frozen=True)
class VisionConfig:
    """ViT, pre-norm, exact GELU, [CLS] token and learned absolute positions (arXiv 2010.11929).

    `image_size` (pixels) is the grid that the position table was learned on; images of other sizes interpolate it.
    """

    image_size: int = 480
    patch_size: int = 16
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-6
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        _positive(self, "image_size", "patch_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
        _divides(self, "image_size", "patch_size")
        _divides(self, "hidden_size", "num_heads")
        _share(self, "drop_path")

    @property
    def num_positions(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True)
class TextConfig:
    """BERT, post-norm, with cross-attention between self-attention and MLP in every layer (BLIP, arXiv 2201.12086).

    `source_width` is the width of what the cross-attention reads: image tokens for the joint encoder, question states
    for the answer decoder.
    """

    vocab_size: int = 30524
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    source_width: int = 768

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
        _positive(self, "max_positions", "source_width")
        _divides(self, "hidden_size", "num_heads")
        _share(self, "dropout", "attention_dropout")


@dataclass(frozen=True)
class PreprocessConfig:
    """How an image becomes pixels: stretched to `image_size` squared, then `(value * rescale_factor - mean) / std`.

    The original divides by 255 twice and normalises nothing: `rescale_factor=1/255**2`, mean 0, std 1.
    """

    image_size: int = 480
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    image_mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    image_std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    rescale_factor: float = 1 / 255 / 255
    background: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        _positive(self, "image_size")
        if self.resample not in ("bilinear", "bicubic"):
            raise ConfigError(f"resample: got {self.resample!r}; accepted: bilinear, bicubic")
        for name in ("image_mean", "image_std", "background"):
            value = tuple(getattr(self, name))
            if len(value) != 3:
                raise ConfigError(f"{name}: got {len(value)} numbers; wanted 3, one for each of red, green and blue")
            object.__setattr__(self, name, value)
        if min(self.image_std) <= 0:
            raise ConfigError(f"image_std: got {self.image_std}; wanted numbers above 0")

    @property
    def affine(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Per-channel (scale, shift) with normalised = pixel * scale + shift."""
        scale = tuple(self.rescale_factor / s for s in self.image_std)
        shift = tuple(-m / s for m, s in zip(self.image_mean, self.image_std, strict=True))
        return scale, shift


@dataclass(frozen=True)
class TokenConfig:
    """Ids in the bert-base-uncased vocabulary, extended by [DEC] and [ENC] in that order."""

    pad: int = 0
    cls: int = 101
    sep: int = 102
    dec: int = 30522
    enc: int = 30523


@dataclass(frozen=True)
class GenerationConfig:
    """Defaults of answering that travel with a checkpoint. `max_new_tokens` counts the closing [SEP]."""

    num_beams: int = 1
    max_new_tokens: int = 20

    def __post_init__(self) -> None:
        _positive(self, "num_beams", "max_new_tokens")


@dataclass(frozen=True)
class MissConfig:
    """A whole model.

    `tie_embeddings`: encoder and decoder share one table of words, positions and their norm.
    `behaviour`: `correct` masks padding everywhere, so that an answer does not depend on its batch; `compat` repeats
    the original, whose decoder attends to the padding of the questions and whose beams follow Transformers 4.15.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    encoder: TextConfig = field(default_factory=TextConfig)
    decoder: TextConfig = field(default_factory=TextConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    tokens: TokenConfig = field(default_factory=TokenConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    tie_embeddings: bool = False
    behaviour: Behaviour = "correct"
    max_question_length: int = 35
    name: str = "miss"

    def __post_init__(self) -> None:
        if self.behaviour not in BEHAVIOURS:
            raise ConfigError(f"behaviour: got {self.behaviour!r}; accepted: {', '.join(BEHAVIOURS)}")
        if self.encoder.source_width != self.vision.hidden_size:
            raise ConfigError(
                f"encoder.source_width is {self.encoder.source_width}, but the encoder reads image tokens that are "
                f"{self.vision.hidden_size} wide (vision.hidden_size): set them equal"
            )
        if self.decoder.source_width != self.encoder.hidden_size:
            raise ConfigError(
                f"decoder.source_width is {self.decoder.source_width}, but the decoder reads question states that are "
                f"{self.encoder.hidden_size} wide (encoder.hidden_size): set them equal"
            )
        if not 2 <= self.max_question_length <= self.encoder.max_positions:
            raise ConfigError(
                f"max_question_length: got {self.max_question_length}; wanted 2 to {self.encoder.max_positions} "
                f"(encoder.max_positions)"
            )
        if self.generation.max_new_tokens > self.decoder.max_positions:
            raise ConfigError(
                f"generation.max_new_tokens: got {self.generation.max_new_tokens}; the decoder has "
                f"{self.decoder.max_positions} positions"
            )
        if self.tie_embeddings and (
            (self.encoder.vocab_size, self.encoder.hidden_size, self.encoder.max_positions)
            != (self.decoder.vocab_size, self.decoder.hidden_size, self.decoder.max_positions)
        ):
            raise ConfigError("tie_embeddings: encoder and decoder differ in vocab_size, hidden_size or max_positions")

    @classmethod
    def preset(cls, name: str) -> "MissConfig":
        """`small` (DINOv2-S/14 + MiniLM shapes), `base` (the paper) or `large`.

        Raises:
            ConfigError: no preset of that name.
        """
        if name not in PRESETS:
            raise ConfigError(
                f"no preset named {name!r}{did_you_mean(name, list(PRESETS))}; known: {', '.join(PRESETS)}"
            )
        return PRESETS[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries, ready for JSON."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MissConfig":
        """The inverse of `to_dict`; keys that are left out take their defaults.

        Raises:
            ConfigError: a key is unknown (the message names the known ones) or a value is of the wrong kind.
        """
        return from_dict(cls, values)


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Builds a (nested) dataclass from a dictionary, strictly.

    Raises:
        ConfigError: an unknown key, with the known ones and the closest named; a value of the wrong kind.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where or cls.__name__}: got {type(values).__name__}; wanted a mapping")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(
                f"unknown key {where}{key}{did_you_mean(str(key), list(known))}; known: {', '.join(known)}"
            )
    chosen: dict[str, Any] = {}
    for key, value in values.items():
        default = _default(known[key])
        chosen[key] = (
            from_dict(type(default), value, f"{where}{key}.")
            if dataclasses.is_dataclass(default) and not isinstance(default, type)
            else _checked(value, default, f"{where}{key}")
        )
    return cls(**chosen)


def did_you_mean(name: str, known: list[str]) -> str:
    """` (did you mean X?)` where something known is close, else nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return None if item.default is dataclasses.MISSING else item.default


def _checked(value: Any, default: Any, where: str) -> Any:
    """`value` as the kind of `default`: an int serves as a float, a list as a tuple; nothing else is bent."""
    if default is None or (type(value) is type(default) and not isinstance(value, tuple)):
        return value
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        if default and not all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
            raise ConfigError(f"{where}: got {value!r}; wanted numbers")
        return tuple(value)
    raise ConfigError(f"{where}: got {value!r} ({type(value).__name__}); wanted {type(default).__name__}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}: got {value!r}; wanted a whole number of at least 1")


def _divides(config: object, name: str, divisor: str) -> None:
    a, b = getattr(config, name), getattr(config, divisor)
    if a % b:
        raise ConfigError(f"{name}: got {a}; wanted a multiple of {divisor} ({b})")


def _share(config: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"{name}: got {getattr(config, name)}; wanted 0 <= {name} < 1")


_SMALL_TEXT = TextConfig(hidden_size=384, num_layers=6, num_heads=12, intermediate_size=1536, source_width=384)
_LARGE_VISION = VisionConfig(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096, drop_path=0.1)
PRESETS: dict[str, MissConfig] = {
    "small": MissConfig(
        # DINOv2 learned its positions on 37 x 37 patches (518 px).
        vision=VisionConfig(
            image_size=518, patch_size=14, hidden_size=384, num_layers=12, num_heads=6, intermediate_size=1536
        ),
        encoder=_SMALL_TEXT,
        decoder=_SMALL_TEXT,
        preprocess=PreprocessConfig(
            image_size=224,
            resample="bicubic",
            image_mean=(0.485, 0.456, 0.406),
            image_std=(0.229, 0.224, 0.225),
            rescale_factor=1 / 255,
        ),
        tie_embeddings=True,
        name="miss-small",
    ),
    "base": MissConfig(name="miss-base"),
    "large": MissConfig(vision=_LARGE_VISION, encoder=TextConfig(source_width=1024), name="miss-large"),
}
