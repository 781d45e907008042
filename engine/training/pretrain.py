"""A pretraining run put together from its configuration: model, pairs, loader, task, engine, trainer.

Knows which part needs which; does not know flags, or the order of things in a step.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from miss.engine.data.augment import Limits
from miss.engine.data.pair_loader import CorruptLimit, PairLoader
from miss.engine.data.pairs import Pair
from miss.engine.data.processor import DEC, ENC, Processor, build_tokenizer, read_tokenizer
from miss.engine.training.mix import Tell
from miss.engine.training.optimizer import freeze
from miss.engine.training.pretrain_config import PretrainConfig
from miss.engine.training.pretrain_pairs import ChosenPairs, choose_pairs
from miss.engine.training.pretrain_pass import give_back
from miss.engine.training.pretrain_task import Pretraining
from miss.engine.training.pretrain_validation import PairValidation
from miss.engine.training.ranks import ALONE, Ranks
from miss.engine.training.setup import begin, build_engine, nothing, with_overrides
from miss.engine.training.state import load_model_tensors
from miss.engine.training.trainer import Trainer
from miss.models.config import ConfigError, MissConfig
from miss.models.pretrain import MissPretrain, ObjectiveConfig
from miss.models.pretrain_files import is_pretraining, read_pretraining, write_pretraining
from miss.models.pretrain_weights import MEMORY, begin_pretraining, load_pretraining, memory_of
from miss.models.weights import TOKENIZER, read_checkpoint


@dataclass
class PretrainRun:
    """What `prepare` put together."""

    config: PretrainConfig
    model: MissPretrain
    processor: Processor
    pairs: ChosenPairs
    loader: PairLoader
    trainer: Trainer


def prepare(
    config: PretrainConfig,
    output: Path,
    *,
    resume: Path | None = None,
    tell: Tell = print,
    ranks: Ranks = ALONE,
    pairs: ChosenPairs | None = None,
) -> PretrainRun:
    """Reads pairs and checkpoint and returns a run that is ready to `fit`.

    Args:
        resume: a training checkpoint of this run to go on from.
        ranks: the processes that share the steps.
        pairs: instead of those that the configuration names.

    Raises:
        ValueError: pairs, checkpoint or configuration cannot serve; the message says which and why.
    """
    device = begin(config, ranks)
    tell = tell if ranks.first else nothing
    model, processor = load_model(config, tell)
    if resume is not None:
        load_model_tensors(model, load_file(resume / "model.safetensors"))
    freeze(model, config.optimizer, config.train_vision)
    model.to(device)
    chosen = choose_pairs(config, output, resume is not None, ranks, tell) if pairs is None else pairs
    loader = make_loader(config, chosen.train, processor, output, device, ranks)
    task = Pretraining(model, config, loader, device, ranks)
    data = config.data
    width = model.config.encoder.hidden_size
    copy, engine = build_engine(config, model, ranks, data.pairs_per_step, data.accumulation, width)
    shown = model if copy is None else copy
    validation = PairValidation(chosen.validation, processor, config, device, ranks) if chosen.validation else None
    trainer = Trainer(
        model,
        loader,
        engine,
        config,
        output,
        device=device,
        task=task,
        validate=validation,
        export=lambda folder: export(shown, processor, folder),
        ranks=ranks,
        copy=copy,
    )
    if resume is not None:
        trainer.resume(resume)
    give_back()
    return PretrainRun(config, model, processor, chosen, loader, trainer)


def load_model(config: PretrainConfig, tell: Tell = print) -> tuple[MissPretrain, Processor]:
    """The model to start from, with the run's objective and overrides: of a checkpoint folder, or fresh.

    Raises:
        CheckpointError: the folder cannot serve.
        ConfigError: neither a folder nor a tokenizer is given.
    """
    if config.init is None:
        return _fresh(config)
    folder = Path(config.init)
    tokenizer = read_tokenizer(folder / TOKENIZER)
    if is_pretraining(folder):
        old, objective, tensors = read_pretraining(folder)
        model = MissPretrain(with_overrides(old, config.model), _objective(config, tokenizer))
        report = load_pretraining(model, _fitting(model, objective, tensors, tell), str(folder))
    else:
        old, tensors = read_checkpoint(folder)
        model = MissPretrain(with_overrides(old, config.model), _objective(config, tokenizer))
        report = begin_pretraining(model, tensors)
    tell(f"{folder}: {report}")
    return model, Processor(model.config.preprocess, tokenizer, model.config.max_question_length)


def _objective(config: PretrainConfig, tokenizer: Tokenizer) -> ObjectiveConfig:
    mask = tokenizer.token_to_id("[MASK]")
    if mask is None and config.losses.mlm:
        raise ConfigError("losses.mlm: the vocabulary has no [MASK]; wanted 0, or a vocabulary with one")
    own = {f.name for f in dataclasses.fields(ObjectiveConfig)}
    values = {k: v for k, v in vars(config.losses).items() if k in own}
    return ObjectiveConfig(**values, **({} if mask is None else {"mask": mask}))


def _fresh(config: PretrainConfig) -> tuple[MissPretrain, Processor]:
    if config.tokenizer is None:
        raise ConfigError(
            "init: no checkpoint to start from; give a checkpoint folder with --init (`miss convert` makes one from "
            "DINOv2 and MiniLM weights), or a vocabulary with --tokenizer for a fresh model"
        )
    path = Path(config.tokenizer)
    if path.is_dir():
        path = path / TOKENIZER
    tokenizer = build_tokenizer(path) if path.suffix == ".txt" else read_tokenizer(path)
    new: MissConfig = with_overrides(MissConfig.preset(config.preset), config.model)
    _check_vocabulary(new, tokenizer, path)
    model = MissPretrain(new, _objective(config, tokenizer))
    return model, Processor(new.preprocess, tokenizer, new.max_question_length)


def _check_vocabulary(config: MissConfig, tokenizer: Tokenizer, path: Path) -> None:
    ids = config.tokens
    wanted = {"[PAD]": ids.pad, "[CLS]": ids.cls, "[SEP]": ids.sep, DEC: ids.dec, ENC: ids.enc}
    size, most = tokenizer.get_vocab_size(), config.encoder.vocab_size
    if size > most or any(tokenizer.token_to_id(token) != place for token, place in wanted.items()):
        raise ConfigError(f"tokenizer: {path} has {size} tokens; wanted a vocabulary with {wanted}, {most} in all")


def _fitting(
    model: MissPretrain, objective: ObjectiveConfig, tensors: dict[str, Tensor], tell: Tell
) -> dict[str, Tensor]:
    """Without twin and queue where the run's queue is of another size than the checkpoint's."""
    if not memory_of(tensors) or model.objective.queue_size == objective.queue_size:
        return tensors
    tell(
        f"losses.queue_size: {objective.queue_size} in the checkpoint, {model.objective.queue_size} here: the queue "
        f"starts anew, the twin as the weights"
    )
    return {name: t for name, t in tensors.items() if not name.startswith(MEMORY)}


def make_loader(
    config: PretrainConfig,
    pairs: list[Pair],
    processor: Processor,
    output: Path,
    device: torch.device,
    ranks: Ranks,
) -> PairLoader:
    data, a = config.data, config.augment
    changed = a.rotate_degrees or a.crop_share < 1 or a.brightness or a.contrast
    return PairLoader(
        pairs,
        processor,
        data.pairs_per_step,
        config.seed,
        ranks.rank,
        ranks.world_size,
        data.accumulation,
        max_tokens=data.max_tokens,
        limits=Limits(a.rotate_degrees, a.crop_share, a.brightness, a.contrast) if changed else None,
        workers=data.workers,
        processes=data.processes,
        ahead=data.ahead,
        quarantine=output,
        corrupt=CorruptLimit(share=data.corrupt_share),
        pin_memory=device.type == "cuda",
    )


def export(model: nn.Module, processor: Processor, folder: Path) -> None:
    """The model as it is now, with its twin and queue, as a pretraining checkpoint folder."""
    assert isinstance(model, MissPretrain)
    tensors = {name: p.detach().float() for name, p in model.named_parameters()}
    tensors["temperature"] = tensors["temperature"].reshape(())  # an engine may keep it as a vector
    tensors |= {f"{MEMORY}{name}": t for name, t in model.memory.tensors().items()}
    tokenizer = processor.tokenizer.to_str().encode()
    write_pretraining(model.config, model.objective, tensors, folder, tokenizer=tokenizer)
