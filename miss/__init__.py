"""MISS: training and inference engine for a generative medical visual question answering model.

The names below load what they need on first use: `import miss` itself imports neither torch nor numpy.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miss.engine.runtime.async_engine import AsyncEngine as AsyncEngine
    from miss.engine.runtime.config import EngineConfig as EngineConfig
    from miss.engine.runtime.engine import Answer as Answer
    from miss.engine.runtime.engine import Engine as Engine
    from miss.engine.runtime.sampler import SamplingParams as SamplingParams
    from miss.engine.training.config import TrainConfig as TrainConfig
    from miss.engine.training.trainer import Trainer as Trainer
    from miss.models.config import MissConfig as MissConfig

__version__ = "0.1.0"

_HOMES = {
    "Engine": "miss.engine.runtime.engine",
    "AsyncEngine": "miss.engine.runtime.async_engine",
    "EngineConfig": "miss.engine.runtime.config",
    "Answer": "miss.engine.runtime.engine",
    "SamplingParams": "miss.engine.runtime.sampler",
    "MissConfig": "miss.models.config",
    "Trainer": "miss.engine.training.trainer",
    "TrainConfig": "miss.engine.training.config",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module miss has no attribute {name}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
