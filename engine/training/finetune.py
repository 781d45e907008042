"""A finetuning run put together from its configuration: model, rows, image stores, loader, engine, trainer.

Knows which part needs which; does not know flags, generation or metrics: validation's answers are judged elsewhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from miss.engine.data.augment import Limits
from miss.engine.data.images import decode_image
from miss.engine.data.loader import GroupedLoader, GroupedSampler, ImageStore
from miss.engine.data.processor import Processor, read_tokenizer
from miss.engine.training.config import TrainConfig
from miss.engine.training.features import (
    FeatureStore,
    PixelStore,
    channel_statistics,
    decode_all,
    digest,
    fold_standardisation,
    image_number,
    weights_digest,
)
from miss.engine.training.mix import ImageGroup, Questions, Tell, answered, read_mix, tokenise
from miss.engine.training.optimizer import freeze
from miss.engine.training.plain import Engine
from miss.engine.training.ranks import ALONE, Ranks
from miss.engine.training.setup import begin, build_engine, nothing, with_overrides
from miss.engine.training.state import load_model_tensors
from miss.engine.training.trainer import Trainer, Validate
from miss.models.conversion import Choices
from miss.models.pretrain_convert import answering
from miss.models.pretrain_files import is_pretraining
from miss.models.vqa import MissVQA
from miss.models.weights import TOKENIZER, build, load_checkpoint, save_checkpoint


@dataclass
class Finetuning:
    """What `prepare` put together; `mix_train` and `mix_validation` are all images, also where a few are used."""

    config: TrainConfig
    model: MissVQA
    processor: Processor
    train: Questions
    validation: Questions
    loader: GroupedLoader
    trainer: Trainer
    mix_train: list[ImageGroup]
    mix_validation: list[ImageGroup]
    num_leaks: int


def prepare(
    config: TrainConfig,
    output: Path,
    *,
    validate: Callable[[Processor, Questions], Validate],
    resume: Path | None = None,
    tell: Tell = print,
    most_images: int | None = None,
    ranks: Ranks = ALONE,
) -> Finetuning:
    """Reads data and checkpoint, encodes what is encoded once, and returns a run that is ready to `fit`.

    Args:
        validate: makes the trainer's `validate(model)` for a processor and the validation questions.
        resume: a training checkpoint of this run to go on from.
        most_images: use no more than so many images of each part, to try a configuration out.
        ranks: the processes that share the steps; they read and encode one after the other, into one cache.

    Raises:
        ValueError: data, checkpoint or configuration cannot serve; the message says which and why.
    """
    device = begin(config, ranks)
    tell = tell if ranks.first else nothing
    model, processor = load_model(config, tell)
    if resume is not None:
        # The image encoder must be the run's (its last norm may be folded) before anything is encoded with it.
        load_model_tensors(model, load_file(resume / "model.safetensors"))
    freeze(model, config.optimizer, config.train_vision)
    model.to(device)

    with ranks.in_turn():
        mix_train, mix_validation, num_leaks = read_mix(config, tell)
        mix_train = answered(mix_train, processor, tell)
        train_groups, validation_groups = mix_train[:most_images], mix_validation[:most_images]
        rows = [tokenise(groups, processor) for groups in (train_groups, validation_groups)]
        cache = Path(config.data.cache) if config.data.cache else output / "cache"
        pixels = [pixel_store(train_groups, config, processor, cache, augmented=True)]
        if validation_groups:
            pixels.append(pixel_store(validation_groups, config, processor, cache, augmented=False))

        def key() -> str:
            return digest(weights_digest(model.vision), processor.fingerprint, config.bf16, device.type)

        if config.standardise_features and resume is None:
            mean, deviation = channel_statistics(encoder(model, config, device), key(), pixels[0], cache)
            fold_standardisation(model.vision.norm, mean.to(device), deviation.to(device))
        stores: list[ImageStore] = list(pixels)
        if not config.train_vision:
            copies = [[group.copies for group in train_groups], [1] * len(validation_groups)]
            stores = [
                FeatureStore.build(
                    encoder(model, config, device), key(), store, count, features_dtype(config), cache, keep=keep
                )
                for store, count, keep in zip(pixels, copies, (config.augment.keep_tokens, 1.0), strict=False)
            ]
    train = Questions(train_groups, rows[0], stores[0])
    if config.answer_prior and resume is None:
        set_answer_prior(model, train)
    validation = Questions(validation_groups, rows[1], stores[-1])
    loader = make_loader(config, train, device, ranks)
    copy, engine = make_engine(config, model, ranks)
    trainer = Trainer(
        model,
        loader,
        engine,
        config,
        output,
        device=device,
        validate=validate(processor, validation) if validation_groups else None,
        export=lambda folder: export(copy or model, processor, folder),
        ranks=ranks,
        copy=copy,
    )
    if resume is not None:
        trainer.resume(resume)
    return Finetuning(
        config, model, processor, train, validation, loader, trainer, mix_train, mix_validation, num_leaks
    )


def load_model(config: TrainConfig, tell: Tell = print) -> tuple[MissVQA, Processor]:
    """The checkpoint to start from, with the configuration's overrides of dropout, drop-path and image size."""
    if config.init is None:
        raise ValueError(
            "init: no checkpoint to start from; give a checkpoint folder with --init (`miss convert` makes one from "
            "MISS, BLIP, or DINOv2 and MiniLM weights)"
        )
    loaded, processor = answering_model(Path(config.init), tell)
    new = with_overrides(loaded.config, config.model)
    if new == loaded.config:
        return loaded, processor
    model = MissVQA(new)
    model.load_state_dict(loaded.state_dict())
    return model, Processor(new.preprocess, processor.tokenizer, new.max_question_length)


def answering_model(folder: Path, tell: Tell) -> tuple[MissVQA, Processor]:
    """The model of a checkpoint folder; a pretraining one is untied, and what became of its tensors is said."""
    if not is_pretraining(folder):
        return load_checkpoint(folder, dtype=torch.float32)[0], Processor.from_folder(folder)
    converted = answering(folder, Choices())
    new = converted.config
    processor = Processor(new.preprocess, read_tokenizer(folder / TOKENIZER), new.max_question_length)
    model, _ = build(converted.config, converted.tensors, dtype=torch.float32, where=str(folder))
    tell(f"{folder} is of pretraining: {converted.report}")
    return model, processor


@torch.no_grad()
def set_answer_prior(model: MissVQA, train: Questions) -> None:
    """The head's bias at the log-frequency of the tokens of the training answers, each image weighted as it is drawn.

    Every token of the vocabulary counts once more than it occurs, so that none is ruled out.
    """
    counts = torch.ones(model.config.decoder.vocab_size, dtype=torch.float64)
    for group, rows in zip(train.groups, train.rows, strict=True):
        ids = torch.tensor([token for row in rows for token in row.answer_ids[1:]], dtype=torch.int64)
        counts.index_add_(0, ids, torch.full(ids.shape, group.weight, dtype=torch.float64))
    model.decoder.head.bias.copy_((counts / counts.sum()).log())


def pixel_store(
    groups: Sequence[ImageGroup], config: TrainConfig, processor: Processor, cache: Path, augmented: bool
) -> PixelStore:
    """Decoded images; `augmented` says whether visits after the first see them changed."""

    def decode(image: Any) -> np.ndarray:
        return processor.image(decode_image(image))

    a = config.augment
    return PixelStore(
        decode_all(
            [group.image for group in groups],
            processor.preprocess.image_size,
            decode,
            processor.fingerprint,
            cache,
            config.data.workers,
        ),
        [image_number(group.key) for group in groups],
        Limits(a.rotate_degrees, a.crop_share, a.brightness, a.contrast) if augmented else None,
        config.seed,
        processor.preprocess.background,
        config.data.workers,
    )


def encoder(model: MissVQA, config: TrainConfig, device: torch.device) -> Callable[[Tensor], Tensor]:
    """pixels -> tokens, in the run's precision, without gradients."""

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        model.eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            return model.encode_images(pixels.to(device)).float()

    return encode


def features_dtype(config: TrainConfig) -> torch.dtype:
    automatic = torch.bfloat16 if config.bf16 else torch.float16
    return automatic if config.features_dtype == "auto" else getattr(torch, config.features_dtype)


def make_loader(config: TrainConfig, train: Questions, device: torch.device, ranks: Ranks = ALONE) -> GroupedLoader:
    sampler = GroupedSampler(
        [len(rows) for rows in train.rows],
        [group.weight for group in train.groups],
        config.data.images_per_step,
        config.data.questions_per_image,
        config.seed,
        whole_rounds=config.data.epoch == "samples",
    )
    data, pin = config.data, device.type == "cuda"
    shares = {"rank": ranks.rank, "world_size": ranks.world_size}
    return GroupedLoader(sampler, train.rows, train.store, data.accumulation, data.prefetch, pin, **shares)


def make_engine(config: TrainConfig, model: MissVQA, ranks: Ranks = ALONE) -> tuple[MissVQA | None, Engine]:
    """The engine, and a copy of the model for validation where it does not keep the model itself whole."""
    data = config.data
    return build_engine(config, model, ranks, data.images_per_step, data.accumulation, model.config.encoder.hidden_size)


def export(model: MissVQA, processor: Processor, folder: Path) -> None:
    """The model as it is now, as a checkpoint folder for answering."""
    save_checkpoint(model, folder, tokenizer=processor.tokenizer)
