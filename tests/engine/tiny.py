"""A model and a loader small enough to train in a test."""

from pathlib import Path

import torch

from miss.engine.data.loader import GroupedLoader, GroupedSampler, Row
from miss.engine.training.config import TrainConfig
from miss.engine.training.optimizer import freeze
from miss.engine.training.plain import PlainEngine
from miss.engine.training.trainer import Trainer
from miss.models.config import MissConfig, PreprocessConfig, TextConfig, VisionConfig
from miss.models.vqa import MissVQA

NUM_TOKENS, WIDTH, VOCABULARY = 5, 32, 30524


def tiny_config(dropout=0.0, vocabulary=VOCABULARY):
    text = TextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        num_layers=2,
        num_heads=2,
        intermediate_size=48,
        max_positions=48,
        dropout=dropout,
        attention_dropout=dropout,
        source_width=WIDTH,
    )
    vision = VisionConfig(
        image_size=28, patch_size=14, hidden_size=WIDTH, num_layers=2, num_heads=2, intermediate_size=48
    )
    return MissConfig(
        vision=vision,
        encoder=text,
        decoder=text,
        preprocess=PreprocessConfig(image_size=28, rescale_factor=1 / 255),
        tie_embeddings=True,
        name="tiny",
    )


def tiny_model(dropout=0.0, seed=0, vocabulary=96):
    torch.manual_seed(seed)
    return MissVQA(tiny_config(dropout, vocabulary))


def tiny_rows(num_images=7, seed=3, vocabulary=96):
    generator = torch.Generator().manual_seed(seed)

    def ids(first, most):
        length = int(torch.randint(1, most, (), generator=generator))
        return [first, *torch.randint(5, vocabulary - 2, (length,), generator=generator).tolist(), 4]

    counts = torch.randint(1, 6, (num_images,), generator=generator).tolist()
    return [[Row(f"q{i}.{r}", ids(3, 8), ids(2, 4)) for r in range(n)] for i, n in enumerate(counts)]


class RandomTokens:
    """Fixed random tokens for each image."""

    def __init__(self, num_images):
        self.tokens = torch.randn(num_images, NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(9))

    def gather(self, images, visits):
        return None, self.tokens[list(images)]


class RandomPixels:
    def __init__(self, num_images):
        generator = torch.Generator().manual_seed(9)
        self.pixels = torch.randint(0, 256, (num_images, 28, 28, 3), dtype=torch.uint8, generator=generator)

    def gather(self, images, visits):
        return self.pixels[list(images)], None


def tiny_train_config(**values):
    defaults = {
        "bf16": False,
        "device": "cpu",
        "data": {"images_per_step": 3, "questions_per_image": 2, "validation": []},
        "schedule": {"total_steps": 8, "warmup_steps": 2},
        "optimizer": {"rate_new": 3e-3, "rate_text": 1e-3},
        "checkpoint": {"every": 0},
        "validation": {"every": 0},
        "log": {"every": 2, "tensorboard": False, "ceiling": False},
    }
    merged = {k: {**v, **values.pop(k, {})} if isinstance(v, dict) else values.pop(k, v) for k, v in defaults.items()}
    return TrainConfig.from_dict({**merged, **values})


def tiny_trainer(config, output, *, dropout=0.0, seed=0, store=None, rows=None, engine=PlainEngine, **hands):
    rows = rows or tiny_rows()
    model = tiny_model(dropout, seed)
    freeze(model, config.optimizer, config.train_vision)
    data = config.data
    sampler = GroupedSampler([len(r) for r in rows], None, data.images_per_step, data.questions_per_image, config.seed)
    store = store or RandomTokens(len(rows))
    loader = GroupedLoader(sampler, rows, store, data.accumulation, data.prefetch)
    return Trainer(
        model,
        loader,
        engine(model, config.optimizer),
        config,
        Path(output),
        device=torch.device("cpu"),
        **hands,
    )
