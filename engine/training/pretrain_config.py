"""What a pretraining run is made of, as frozen dataclasses; what it shares with finetuning is that one's.

Knows names, numbers and their limits; does not know files, tensors or flags.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from miss.engine.training.config import (
    AugmentConfig,
    CheckpointConfig,
    EmaConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    _at_least,
    _plain,
    _whole,
)
from miss.models.config import PRESETS, ConfigError, from_dict


@dataclass(frozen=True)
class PairDataConfig:
    """What is read, and how a step is composed.

    `pairs`: files (.jsonl, .csv) and folders that `miss data pack --pairs` wrote; `images`: the folder that image names
    are relative to, where it is not the file's own. A step has `pairs_per_step` pairs of all processes together, each
    process's worked on in `accumulation` parts. Captions are cut at `max_tokens`.
    `exclude_held_out` leaves out pairs whose images are, or look like, images of any validation or test split under
    `root` (without it $MISS_DATA, then ../shared/data); `language` is that of SLAKE's splits.
    """

    pairs: tuple[str, ...] = ()
    images: str | None = None
    root: str | None = None
    exclude_held_out: bool = True
    language: str = "en"
    pairs_per_step: int = 32
    accumulation: int = 1
    max_tokens: int = 30
    workers: int = 2
    processes: bool = False
    ahead: int = 2
    corrupt_share: float = 0.05

    def __post_init__(self) -> None:
        _whole(self, 1, "pairs_per_step", "accumulation", "workers")
        _whole(self, 0, "ahead")
        _whole(self, 3, "max_tokens")
        if not 0 <= self.corrupt_share <= 1:
            raise ConfigError(f"data.corrupt_share: got {self.corrupt_share!r}; wanted 0 to 1")
        if self.language not in ("en", "zh", "all"):
            raise ConfigError(f"data.language: got {self.language!r}; accepted: en, zh, all")


@dataclass(frozen=True)
class LossesConfig:
    """Weights of the four losses and the sizes behind them (`models/pretrain.py`).

    `mlm` 0 leaves masked words out, which MISS does not have. `alpha` is how much the momentum twin's opinion counts
    once `alpha_ramp_steps` are done (None: two epochs). `negatives_among`: 0 draws hard negatives within a process's
    part, as the original; a divisor of every part makes the draw the same on any number of processes.
    """

    itc: float = 1.0
    itm: float = 1.0
    lm: float = 1.0
    mlm: float = 0.0
    feature_width: int = 256
    queue_size: int = 57600
    momentum: float = 0.995
    temperature: float = 0.07
    label_smoothing: float = 0.1
    alpha: float = 0.4
    alpha_ramp_steps: int | None = None
    negatives_among: int = 0

    def __post_init__(self) -> None:
        _at_least(self, 0.0, "itc", "itm", "lm", "mlm")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"losses.alpha: got {self.alpha!r}; wanted 0 to 1")
        if self.alpha_ramp_steps is not None:
            _whole(self, 0, "alpha_ramp_steps")
        if self.itc + self.itm + self.lm + self.mlm == 0:
            raise ConfigError("losses: every weight is 0; wanted at least one above 0")


@dataclass(frozen=True)
class PairValidationConfig:
    """Every `every` steps and at the end (0: only at the end), on `pairs` pairs that are held out of the training
    (whole images; at most a tenth of all; 0: none), `batch_pairs` at a time.

    `metric` chooses the best: recall (the mean of both directions' recall@1), any other figure, or a loss, of which
    less is better. `patience` ends the run after so many validations without a better one; 0 never does.
    """

    every: int = 500
    metric: str = "recall"
    patience: int = 0
    pairs: int = 256
    batch_pairs: int = 32

    def __post_init__(self) -> None:
        _whole(self, 0, "every", "patience", "pairs")
        _whole(self, 2, "batch_pairs")


@dataclass(frozen=True)
class PretrainConfig:
    """A whole run.

    It starts from `init`, a checkpoint folder (of an answering or a pretraining model), or from a fresh model of
    `preset` with the vocabulary of `tokenizer` (a vocab.txt, a tokenizer.json or a folder with one).
    Engine, precision and recomputation are as in finetuning; the image encoder is trained unless `train_vision` is
    false, and there is no moving average unless `ema.decay` says so: the momentum twin is another thing.
    """

    init: str | None = None
    preset: str = "small"
    tokenizer: str | None = None
    seed: int = 17
    device: str = "auto"
    bf16: bool = True
    engine: Literal["plain", "zero"] = "plain"
    zero_stage: int = 2
    ds_config: str | None = None
    recompute: bool = False
    deterministic: bool = False
    train_vision: bool = True
    model: ModelConfig = field(default_factory=ModelConfig)
    data: PairDataConfig = field(default_factory=PairDataConfig)
    losses: LossesConfig = field(default_factory=LossesConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(decay=0.0))
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: PairValidationConfig = field(default_factory=PairValidationConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if self.engine not in ("plain", "zero"):
            raise ConfigError(f"engine: got {self.engine!r}; accepted: plain, zero")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"zero_stage: got {self.zero_stage!r}; accepted: 0, 1, 2, 3")
        if self.ds_config is not None and self.engine != "zero":
            raise ConfigError(f"ds_config: {self.ds_config} is DeepSpeed's; wanted engine: zero, got {self.engine}")
        if self.preset not in PRESETS:
            raise ConfigError(f"preset: got {self.preset!r}; accepted: {', '.join(PRESETS)}")
        if self.augment.copies != 1 or self.augment.keep_tokens != 1:
            raise ConfigError("augment.copies and keep_tokens are of cached tokens, which pretraining has not: leave 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries, ready for YAML and JSON."""
        return _plain(dataclasses.asdict(self))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PretrainConfig":
        """The inverse of `to_dict`; keys that are left out take their defaults.

        Raises:
            ConfigError: an unknown key (the closest known one is named), a value of the wrong kind or out of range.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"a pretraining configuration: got {type(values).__name__}; wanted a mapping of keys")
        return from_dict(cls, {"ema": {"decay": 0.0}, **values})
