"""The rows of a run: data sets mixed, leaks and empty answers left out, grouped by image, tokenised.

Knows samples and the processor; does not know models or where images' tensors come from.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from miss.engine.data.datasets import Sample, load_dataset, resolve_data_root
from miss.engine.data.leaks import exclude_leaks
from miss.engine.data.loader import ImageStore, Part, Row, Visit, collate
from miss.engine.data.processor import Processor
from miss.engine.training.config import SourceConfig, TrainConfig

Tell = Callable[[str], None]


@dataclass
class ImageGroup:
    """One image with its samples; `weight` and `copies` come from its data set's place in the mix."""

    key: str
    image: Any  # what `decode_image` takes: a path, or an entry of a packed data set
    samples: list[Sample]
    weight: float
    copies: int


@dataclass
class Questions:
    """Grouped samples with their token ids and where their images' tensors come from."""

    groups: list[ImageGroup]
    rows: list[list[Row]]
    store: ImageStore

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows)

    def batches(self, num_questions: int) -> Iterator[tuple[Part, list[Sample]]]:
        """All questions once, whole images together, in batches of at least `num_questions` (the last may be less)."""
        visits: list[Visit] = []
        for i, rows in enumerate(self.rows):
            visits.append(Visit(i, 0, tuple(range(len(rows)))))
            if sum(len(v.rows) for v in visits) >= num_questions or i == len(self.rows) - 1:
                tensors = self.store.gather([v.image for v in visits], [0] * len(visits))
                yield (
                    collate(visits, self.rows, *tensors),
                    [self.groups[v.image].samples[r] for v in visits for r in v.rows],
                )
                visits = []


def read_mix(config: TrainConfig, tell: Tell) -> tuple[list[ImageGroup], list[ImageGroup], int]:
    """Training and validation images with their samples, and how many training samples were left out as leaks."""
    validation = [(source, read_source(source, config)) for source in config.data.validation]
    train = [(source, read_source(source, config)) for source in config.data.train]
    num_leaks = 0
    if config.data.exclude_leaks and validation:
        held_out = [sample for _, samples in validation for sample in samples]
        names = {sample.dataset for sample in held_out}
        kin = [sample for _, samples in train for sample in samples if sample.dataset in names]
        for i, (source, samples) in enumerate(train):
            kept, report = exclude_leaks(samples, held_out, kin)
            if report.leaks:
                tell(f"{source.dataset} {source.split}: {report}, to keep validation images out of training")
            num_leaks += len(samples) - len(kept)
            train[i] = source, kept
    groups = [group_by_image(part, config.augment.copies) for part in (train, validation)]
    if not groups[0]:
        raise ValueError("data.train: no question is left to train on")
    return groups[0], groups[1], num_leaks


def read_source(source: SourceConfig, config: TrainConfig) -> list[Sample]:
    root = resolve_data_root(source.root or config.data.root)
    return load_dataset(source.dataset, root, source.split, source.language)


def group_by_image(mix: Sequence[tuple[SourceConfig, list[Sample]]], copies: int) -> list[ImageGroup]:
    """Samples by image, in the order of their first appearance. A data set with weight 0 is left out."""
    groups: dict[tuple[int, str], ImageGroup] = {}
    for number, (source, samples) in enumerate(mix):
        for sample in samples if source.weight else ():
            key = (number, sample.image_key)
            if key not in groups:
                groups[key] = ImageGroup(sample.image_key, sample.image, [], source.weight, source.copies or copies)
            groups[key].samples.append(sample)
    return list(groups.values())


def answered(groups: Sequence[ImageGroup], processor: Processor, tell: Tell) -> list[ImageGroup]:
    """The images without questions whose answer holds nothing to learn; those are named."""
    kept, dropped = [], []
    for group in groups:
        samples = [s for s in group.samples if has_text(s.answer, processor)]
        dropped += [f"{s.dataset}/{s.qid}" for s in group.samples if s not in samples]
        if samples:
            kept.append(dataclasses.replace(group, samples=samples))
    if dropped:
        shown = ", ".join(dropped[:10]) + (f" and {len(dropped) - 10} more" if len(dropped) > 10 else "")
        tell(f"{len(dropped)} training questions left out, their answer is empty: {shown}")
    if not kept:
        raise ValueError("data.train: no question is left to train on")
    return kept


def has_text(answer: str, processor: Processor) -> bool:
    return bool(processor.tokenizer.encode(answer, add_special_tokens=False).ids)


def tokenise(groups: Sequence[ImageGroup], processor: Processor) -> list[list[Row]]:
    """Each sample's question and answer as token ids; an empty answer (of a validation set) is [DEC] [SEP]."""

    def ids(answer: str) -> list[int]:
        return processor.answer(answer) if has_text(answer, processor) else [processor.dec, processor.sep]

    return [
        [Row(f"{s.dataset}/{s.qid}", processor.question(s.question), ids(s.answer)) for s in group.samples]
        for group in groups
    ]
