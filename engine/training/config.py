"""What a training run is made of, as frozen dataclasses.

Knows names, numbers and their limits; does not know files, tensors or flags: only the command line reads YAML.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, get_type_hints

from miss.models.config import ConfigError, from_dict


def _whole(config: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name}: got {value!r}; wanted a whole number of at least {least}")


def _at_least(config: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name}: got {value!r}; wanted a number of at least {least}")


@dataclass(frozen=True)
class SourceConfig:
    """One data set in the mix.

    `weight` is how often each of its images comes in an epoch: 1 once, 2 twice, 0.5 every other epoch.
    `copies` overrides `augment.copies` for this set's images. `root` overrides `data.root`.
    """

    dataset: str = "slake"
    split: str = "train"
    language: str = "en"
    weight: float = 1.0
    copies: int | None = None
    root: str | None = None

    def __post_init__(self) -> None:
        _at_least(self, 0.0, "weight")
        if self.copies is not None:
            _whole(self, 1, "copies")


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how a step is composed.

    A step has `images_per_step` images with `questions_per_image` random questions of each (0: all of them); the
    images of a step are worked on in `accumulation` parts whose gradients add up to those of the whole.
    `epoch="images"`: an epoch visits each image once, and its questions take turns over the epochs.
    `epoch="samples"`: an epoch asks each question exactly once.
    `exclude_leaks` leaves training images out that are, or look like, images of the validation sets.
    `root` is the folder of the data sets; without it `$MISS_DATA`, then `../shared/data`. `cache` holds decoded images
    and encoded tokens, which runs may share; without it the run's own folder does.
    """

    train: tuple[SourceConfig, ...] = (SourceConfig(),)
    validation: tuple[SourceConfig, ...] = (SourceConfig(split="validate"),)
    root: str | None = None
    cache: str | None = None
    images_per_step: int = 12
    questions_per_image: int = 4
    accumulation: int = 1
    epoch: Literal["images", "samples"] = "images"
    exclude_leaks: bool = True
    prefetch: int = 2
    workers: int = 2

    def __post_init__(self) -> None:
        _whole(self, 1, "images_per_step", "accumulation", "workers")
        _whole(self, 0, "questions_per_image", "prefetch")
        if not self.train:
            raise ConfigError("data.train: got no data set; wanted at least one")
        if all(source.weight == 0 for source in self.train):
            raise ConfigError("data.train: every weight is 0; wanted at least one above 0")
        if self.accumulation > self.images_per_step:
            raise ConfigError(
                f"data.accumulation: got {self.accumulation}; wanted at most data.images_per_step "
                f"({self.images_per_step}): an image is not split"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Overrides of the checkpoint's own regularisation; None keeps what the checkpoint says."""

    dropout: float | None = None
    attention_dropout: float | None = None
    drop_path: float | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("dropout", "attention_dropout", "drop_path"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"model.{name}: got {value!r}; wanted 0 <= {name} < 1")
        if self.image_size is not None:
            _whole(self, 14, "image_size")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW in three layer groups: new parameters (cross-attention, head), pretrained text, vision.

    `freeze`: shell patterns of parameter names that stay as they are, for example `*.embeddings.*`.
    Norms, biases, [CLS] and single vectors have no weight decay. `clip` bounds the norm of all gradients; 0 does not.
    `name: adamw8bit` is bitsandbytes' AdamW with 8-bit moments.
    """

    name: Literal["adamw", "adamw8bit"] = "adamw"
    rate_new: float = 3e-4
    rate_text: float = 1e-4
    rate_vision: float = 2e-5
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "adamw8bit"):
            raise ConfigError(f"optimizer.name: got {self.name!r}; accepted: adamw, adamw8bit")
        _at_least(self, 0.0, "rate_new", "rate_text", "rate_vision", "weight_decay", "clip")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}: got {getattr(self, name)!r}; wanted 0 <= {name} < 1")
        if not all(isinstance(pattern, str) for pattern in self.freeze):
            raise ConfigError(f"optimizer.freeze: got {self.freeze!r}; wanted patterns of parameter names")
        if self.eps <= 0:
            raise ConfigError(f"optimizer.eps: got {self.eps!r}; wanted a number above 0")


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then a cosine down to `final_share` of each group's rate at `total_steps`."""

    total_steps: int = 1000
    warmup_steps: int = 50
    final_share: float = 0.0

    def __post_init__(self) -> None:
        _whole(self, 1, "total_steps")
        _whole(self, 0, "warmup_steps")
        if not 0 <= self.final_share <= 1:
            raise ConfigError(f"schedule.final_share: got {self.final_share!r}; wanted 0 to 1")
        if self.warmup_steps >= self.total_steps:
            raise ConfigError(
                f"schedule.warmup_steps: got {self.warmup_steps}; wanted less than total_steps ({self.total_steps})"
            )


@dataclass(frozen=True)
class EmaConfig:
    """Moving average of the trained weights in float32; `decay` 0 keeps none. Early steps average over fewer."""

    decay: float = 0.998

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"ema.decay: got {self.decay!r}; wanted 0 <= decay < 1")


@dataclass(frozen=True)
class AugmentConfig:
    """Rotation, crop, brightness and contrast; never a flip: left and right are findings.

    `copies` is the number of cached versions of each training image where the image encoder is frozen (the first is
    the image itself); where it is trained every visit draws anew. `keep_tokens` is the share of an image's cached
    patch tokens that a visit sees, drawn anew each time ([CLS] always; PatchDropout, arXiv 2208.07220).
    """

    copies: int = 1
    rotate_degrees: float = 10.0
    crop_share: float = 0.8
    brightness: float = 0.2
    contrast: float = 0.2
    keep_tokens: float = 1.0

    def __post_init__(self) -> None:
        _whole(self, 1, "copies")
        if not 0 < self.keep_tokens <= 1:
            raise ConfigError(f"augment.keep_tokens: got {self.keep_tokens!r}; wanted above 0, at most 1")
        if not 0 <= self.rotate_degrees <= 45:
            raise ConfigError(f"augment.rotate_degrees: got {self.rotate_degrees!r}; wanted 0 to 45")
        if not 0 < self.crop_share <= 1:
            raise ConfigError(f"augment.crop_share: got {self.crop_share!r}; wanted above 0, at most 1")
        for name in ("brightness", "contrast"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"augment.{name}: got {getattr(self, name)!r}; wanted 0 <= {name} < 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """Every `every` steps (0: only at the end); the last `keep_last` and the best are kept."""

    every: int = 200
    keep_last: int = 2

    def __post_init__(self) -> None:
        _whole(self, 0, "every")
        _whole(self, 1, "keep_last")


@dataclass(frozen=True)
class ValidationConfig:
    """Every `every` steps and at the end (0: only at the end); `metric` chooses the best.

    `patience` ends the run after so many validations without a better one; 0 never does.
    """

    every: int = 200
    metric: str = "accuracy"
    patience: int = 0
    batch_questions: int = 64
    max_new_tokens: int = 20

    def __post_init__(self) -> None:
        _whole(self, 0, "every", "patience")
        _whole(self, 1, "batch_questions", "max_new_tokens")


@dataclass(frozen=True)
class LogConfig:
    """A line every `every` steps. `ceiling` measures the matrix product rate here once, to log the share of it."""

    every: int = 10
    tensorboard: bool = True
    ceiling: bool = True

    def __post_init__(self) -> None:
        _whole(self, 1, "every")


class RunConfig(Protocol):
    """What the training loop reads of a run's configuration, whatever is trained."""

    @property
    def seed(self) -> int: ...
    @property
    def bf16(self) -> bool: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def schedule(self) -> ScheduleConfig: ...
    @property
    def ema(self) -> EmaConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def validation(self) -> "ValidationPart": ...
    @property
    def log(self) -> LogConfig: ...

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries, ready for YAML and JSON."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """The inverse of `to_dict`."""


class ValidationPart(Protocol):
    """When validation is due, what of it counts, and after how many without a better one a run ends."""

    @property
    def every(self) -> int: ...
    @property
    def metric(self) -> str: ...
    @property
    def patience(self) -> int: ...


@dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    `train_vision: false` encodes every image once and trains on the cached tokens. `standardise_features` then folds
    the channels' mean and deviation over the training tokens into the image encoder's last norm before training.
    `engine: zero` drives the updates through DeepSpeed's ZeRO of `zero_stage` 0 to 3; `ds_config` is a DeepSpeed
    configuration file, whose "auto" values are filled from here and whose contradictions are errors. Under `bf16` its
    weights are bfloat16 with float32 masters; the plain engine's are float32 under autocast.
    `recompute` throws the layers' inner states away and computes them again for the backward pass.
    `features_dtype: auto` caches bfloat16 under `bf16`, else float16.
    `answer_prior` starts the head's bias at the log-frequency of the training answers' tokens: AdamW alone takes some
    hundred steps to move a bias by the several nats that separate a fresh head from it.
    """

    init: str | None = None
    seed: int = 17
    device: str = "auto"
    bf16: bool = True
    engine: Literal["plain", "zero"] = "plain"
    zero_stage: int = 2
    ds_config: str | None = None
    recompute: bool = False
    deterministic: bool = False
    train_vision: bool = False
    standardise_features: bool = False
    features_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    answer_prior: bool = False
    label_smoothing: float = 0.0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        for name in ("engine", "features_dtype"):
            accepted = get_args(get_type_hints(TrainConfig)[name])
            if getattr(self, name) not in accepted:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}; accepted: {', '.join(accepted)}")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"zero_stage: got {self.zero_stage!r}; accepted: 0, 1, 2, 3")
        if self.ds_config is not None and self.engine != "zero":
            raise ConfigError(f"ds_config: {self.ds_config} is DeepSpeed's; wanted engine: zero, got {self.engine}")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing: got {self.label_smoothing!r}; wanted 0 <= label_smoothing < 1")
        if self.train_vision and self.augment.keep_tokens < 1:
            raise ConfigError("augment.keep_tokens drops cached tokens; with train_vision there are none: set it to 1")
        if self.train_vision and self.standardise_features:
            raise ConfigError(
                "standardise_features folds statistics of a frozen image encoder; set train_vision or it to false"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries, ready for YAML and JSON."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """The inverse of `to_dict`; keys that are left out take their defaults.

        Raises:
            ConfigError: an unknown key (the closest known one is named), a value of the wrong kind or out of range.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"a training configuration: got {type(values).__name__}; wanted a mapping of keys")
        values = dict(values)
        data = values.pop("data", {})
        if not isinstance(data, dict):
            raise ConfigError(f"data: got {type(data).__name__}; wanted a mapping")
        sources: dict[str, Any] = {
            name: _sources(data[name], f"data.{name}") for name in ("train", "validation") if name in data
        }
        rest = from_dict(DataConfig, {k: v for k, v in data.items() if k not in sources}, "data.")
        return dataclasses.replace(from_dict(cls, values), data=dataclasses.replace(rest, **sources))


def _sources(values: Any, where: str) -> tuple[SourceConfig, ...]:
    if not isinstance(values, list | tuple):
        raise ConfigError(f"{where}: got {type(values).__name__}; wanted a list of data sets")
    return tuple(from_dict(SourceConfig, value, f"{where}[{i}].") for i, value in enumerate(values))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
