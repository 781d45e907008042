"""Which pairs a pretraining run trains on, and which it keeps for validation.

Knows pairs, data sets' splits and one file of notes in the run's folder; does not know models or steps.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miss.engine.data.augment import hash64
from miss.engine.data.check import read_splits
from miss.engine.data.datasets import detect, resolve_data_root
from miss.engine.data.leaks import exclude_held_out
from miss.engine.data.pairs import Pair, load_pairs, pairs_digest
from miss.engine.data.paths import DataError
from miss.engine.data.samples import Sample
from miss.engine.training.checkpoint import write_atomic
from miss.engine.training.features import image_number
from miss.engine.training.mix import Tell
from miss.engine.training.pretrain_config import PairDataConfig, PretrainConfig
from miss.engine.training.ranks import Ranks

NOTES = "pairs.json"
_HELD = 24  # what a hash is for


@dataclass(frozen=True)
class ChosenPairs:
    """`excluded`: images left out by kind (exact, copy, near)."""

    train: list[Pair]
    validation: list[Pair]
    excluded: dict[str, int]


def choose_pairs(config: PretrainConfig, output: Path, resumed: bool, ranks: Ranks, tell: Tell) -> ChosenPairs:
    """Reads all pairs and splits them; rank 0 looks for held-out images, once a run.

    Raises:
        DataError: no pairs, malformed ones, other pairs than the run began with, or others than other ranks have.
    """
    pairs = read_pairs(config.data)
    digest = pairs_digest(pairs)
    digests = ranks.gather_objects(digest)
    if len(set(digests)) > 1:
        raise DataError(f"rank {ranks.rank}: ranks read different pairs; give all the same files (data.pairs)")
    notes = ranks.on_first(lambda: _notes(config, pairs, digest, output, resumed, tell))
    kept = [pair for pair in pairs if pair.key not in notes["excluded"]]
    train, validation = split(kept, config.validation.pairs, config.seed)
    if len(train) < 2:
        raise DataError(f"{len(train)} pairs left to train on, of {len(pairs)}: wanted at least 2")
    kinds: dict[str, int] = {}
    for kind in notes["excluded"].values():
        kinds[kind] = kinds.get(kind, 0) + 1
    return ChosenPairs(train, validation, kinds)


def read_pairs(data: PairDataConfig) -> list[Pair]:
    if not data.pairs:
        raise DataError("data.pairs: no file of pairs; give --data FILE, or data.pairs in the configuration")
    return [pair for path in data.pairs for pair in load_pairs(path, data.images)]


def _notes(
    config: PretrainConfig, pairs: Sequence[Pair], digest: str, output: Path, resumed: bool, tell: Tell
) -> dict[str, Any]:
    """What the run's folder knows of its pairs: written when it begins, held against them when it goes on."""
    path, data = output / NOTES, config.data
    wanted = {"digest": digest, "num_pairs": len(pairs), "exclude_held_out": data.exclude_held_out}
    wanted |= {"validation_pairs": config.validation.pairs}
    if resumed:
        notes: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        different = [f"{k}: {notes.get(k)} there, {v} now" for k, v in wanted.items() if notes.get(k) != v]
        if different:
            raise DataError(f"{path}: the run began with other pairs ({'; '.join(different)}); give it the same ones")
        return notes
    notes = {**wanted, "excluded": _held_out(data, pairs, tell) if data.exclude_held_out else {}}
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(notes, indent=1).encode())
    return notes


def _held_out(data: PairDataConfig, pairs: Sequence[Pair], tell: Tell) -> dict[str, str]:
    """The kind of leak of each image that is left out."""
    held_out = evaluated(data, tell)
    if not held_out:
        return {}
    _, report = exclude_held_out(pairs, held_out)
    tell(f"pairs: {report}, to keep {len(held_out):,} validation and test questions' images out of training")
    return {leak.image_key: leak.kind for leak in report.leaks}


def evaluated(data: PairDataConfig, tell: Tell) -> list[Sample]:
    """The samples of every validation and test split of the data sets' folder.

    Raises:
        DataError: `root` was given and holds no such split.
    """
    try:
        base = resolve_data_root(data.root)
        splits, problems = read_splits(detect(base), base, data.language)
    except DataError as error:
        if data.root is not None:
            raise
        tell(f"warning: no data sets found, so no held-out image is kept out of training ({error}); give --data.root")
        return []
    if problems:
        raise problems[0]
    held_out = [sample for (_, name), rows in splits.items() if name not in ("train", "all") for sample in rows]
    if not held_out and data.root is not None:
        raise DataError(f"data.root: {base} holds no validation or test split; wanted one, or exclude_held_out: false")
    return held_out


def split(pairs: Sequence[Pair], count: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and validation pairs: whole images, drawn by the seed and their keys, until `count` pairs or a tenth of
    all are held out."""
    count = min(count, len(pairs) // 10)
    per_image: dict[str, int] = {}
    for pair in pairs:
        per_image[pair.key] = per_image.get(pair.key, 0) + 1
    held: set[str] = set()
    taken = 0
    for key in sorted(per_image, key=lambda k: hash64(seed, _HELD, image_number(k))):
        if taken + per_image[key] > count:
            break
        held.add(key)
        taken += per_image[key]
    return [p for p in pairs if p.key not in held], [p for p in pairs if p.key in held]
