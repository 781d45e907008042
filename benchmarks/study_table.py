"""The pretraining study's table: both arms on both validation splits, their difference, and whether it is noise.

    python -m miss.benchmarks.study_table runs/study

Knows the predictions that `miss evaluate` wrote and the images behind their questions; does not know how an arm came
about.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miss.engine.evaluation.metrics import ClusterBootstrap, Figure
from miss.engine.evaluation.report import percent

ARMS = ("without", "with")
SETS = ("slake", "vqa-rad")
PARTS = ("overall", "open", "closed")
NUM_RESAMPLES = 10_000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """An arm's right and wrong on one split, (seeds, questions), with each question's id, image and kind."""

    right: Floats
    qids: list[str]
    images: list[str]
    closed: NDArray[np.bool_]


@dataclass(frozen=True)
class Row:
    """A line of the table. `seeds`: the difference of each seed, with less without."""

    dataset: str
    part: str
    without: Figure
    pretrained: Figure
    difference: Figure
    seeds: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """Outside the noise: the interval excludes 0 and every seed's difference has its sign."""
        value, interval = self.difference.value, self.difference.interval
        if value is None or interval is None:
            return "no interval"
        outside = interval[0] > 0 or interval[1] < 0
        agree = all(s * value > 0 for s in self.seeds)
        return ("better" if value > 0 else "worse") if outside and agree else "inside the noise"

    def to_dict(self) -> dict[str, Any]:
        figures = {"without": self.without, "with": self.pretrained, "difference": self.difference}
        found = {name: figure.to_dict("value") for name, figure in figures.items()}
        return {"dataset": self.dataset, "part": self.part, **found, "seeds": self.seeds, "verdict": self.verdict}


def read_answers(folders: Sequence[Path], images: dict[str, str]) -> Answers:
    """The predictions of runs that differ in their seed.

    Args:
        images: the image of each qid.

    Raises:
        ValueError: runs answered different questions, or one whose image is not known.
    """
    runs = []
    for folder in folders:
        path = folder / "predictions.jsonl"
        if not path.is_file():
            raise ValueError(f"{path}: missing; wanted what `miss evaluate --out {folder}` writes")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        runs.append({row["qid"]: row for row in rows})
    qids = sorted(runs[0])
    for folder, run in zip(folders, runs, strict=True):
        if run.keys() != runs[0].keys():
            raise ValueError(f"{folder}: answers other questions than {folders[0]}; evaluate all runs on one split")
    unknown = [qid for qid in qids if qid not in images]
    if unknown:
        raise ValueError(f"{folders[0]}: {len(unknown)} questions are not in the split, {unknown[0]} first")
    right = np.asarray([[float(run[qid]["correct"]) for qid in qids] for run in runs])
    closed = np.asarray([runs[0][qid]["answer_type"] == "closed" for qid in qids], dtype=bool)
    return Answers(right, qids, [images[qid] for qid in qids], closed)


def compare(dataset: str, without: Answers, pretrained: Answers, num_resamples: int = NUM_RESAMPLES) -> list[Row]:
    """The lines of one split: a question's figure is its mean over seeds, intervals resample images, in pairs.

    Raises:
        ValueError: the arms answered different questions.
    """
    if without.qids != pretrained.qids or without.right.shape != pretrained.right.shape:
        raise ValueError(f"{dataset}: the arms have other questions or seeds; wanted the same ones")
    bootstrap = ClusterBootstrap(without.images, num_resamples)
    gains = pretrained.right - without.right
    masks = {"overall": without.closed | True, "open": ~without.closed, "closed": without.closed}
    columns = {"without": without.right.mean(0), "with": pretrained.right.mean(0), "gain": gains.mean(0)}
    requests = {(part, name): (values, masks[part]) for part in PARTS for name, values in columns.items()}
    figures = bootstrap.figures(requests)
    rows = []
    for part in PARTS:
        seeds = tuple(float(gain[masks[part]].mean()) for gain in gains) if masks[part].any() else ()
        without_it, with_it, gain = (figures[part, name] for name in columns)
        rows.append(Row(dataset, part, without_it, with_it, gain, seeds))
    return rows


def markdown(rows: Sequence[Row]) -> str:
    head = ["validation", "without pretraining", "with", "difference, points", "of each seed", "verdict"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        name = f"{row.dataset}, {row.part} (n = {row.difference.n})"
        arms = [percent(figure.to_dict()) for figure in (row.without, row.pretrained)]
        seeds = ", ".join(f"{100 * seed:+.1f}" for seed in row.seeds)
        lines.append([name, *arms, _points(row.difference), seeds, row.verdict])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _points(figure: Figure) -> str:
    if figure.value is None:
        return "n/a"
    interval = "" if figure.interval is None else f" [{100 * figure.interval[0]:+.1f}, {100 * figure.interval[1]:+.1f}]"
    return f"{100 * figure.value:+.1f}{interval}"


def write_table(out: Path, seeds: Sequence[int], data: Path | None = None) -> str:
    """Writes study.md and study.json into the study's folder and returns the table."""
    from miss.engine.data.datasets import load_dataset

    rows: list[Row] = []
    for name in SETS:
        images = {sample.qid: sample.image_key for sample in load_dataset(name, data, "validate")}
        without, pretrained = (read_answers([out / f"{arm}-{seed}" / name for seed in seeds], images) for arm in ARMS)
        rows += compare(name, without, pretrained)
    table = markdown(rows)
    (out / "study.md").write_text(table, encoding="utf-8")
    (out / "study.json").write_text(json.dumps([row.to_dict() for row in rows], indent=1) + "\n", encoding="utf-8")
    return table


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m miss.benchmarks.study_table STUDY_FOLDER  ($MISS_DATA: the data sets)")
    out = Path(sys.argv[1])
    seeds = sorted(int(folder.name.removeprefix("with-")) for folder in out.glob("with-*"))
    if not seeds:
        sys.exit(f"{out}: holds no run; wanted the folder of study_pretraining")
    print(write_table(out, seeds), end="")


if __name__ == "__main__":
    main()
