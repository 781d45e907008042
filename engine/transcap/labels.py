"""Label rows: which images have the same labels, whatever the file they come from.

Knows which rows are whose; does not know prompts, writers or captions.

A label set is what a caption is written for: (key, value) pairs such as ("modality", "CT"), ("organ", "chest").
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miss.engine.data.datasets import read_rows
from miss.engine.data.paths import DataError
from miss.engine.transcap.labels_qa import is_rad, is_slake, rad_facts, set_aside, slake_facts
from miss.engine.transcap.vocabulary import words
from miss.engine.transcap.vqa_med import read_answers

Facts = tuple[tuple[str, str], ...]
Row = dict[str, Any]
MEDNIST = {
    "AbdomenCT": (("modality", "CT"), ("organ", "abdomen")),
    "BreastMRI": (("modality", "MRI"), ("organ", "breast")),
    "CXR": (("modality", "x-ray"), ("organ", "chest")),
    "ChestCT": (("modality", "CT"), ("organ", "chest")),
    "Hand": (("modality", "x-ray"), ("organ", "hand")),
    "HeadCT": (("modality", "CT"), ("organ", "head")),
}
WANTED = (
    'rows {"image": NAME, "labels": {KEY: VALUE, …}}, MedNIST\'s {"image", "label"}, VQA-Med-2019\'s {"image", '
    '"question", "answer", "category"}, or train.json of SLAKE or VQA-RAD'
)
MOST_WORDS = 40


class LabelError(DataError):
    """A file of labels that cannot be read as it is; the message names the file and the row."""


@dataclass
class LabelSet:
    """What a caption may say, and the images that it is said of, in the order of the file."""

    facts: Facts
    images: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """A name that only the facts decide."""
        return hashlib.sha256(json.dumps(self.facts, ensure_ascii=False).encode()).hexdigest()[:16]


@dataclass
class Labels:
    """The label sets of a file, in the order of their first images, and what was left out and why."""

    sets: list[LabelSet]
    left_out: dict[str, int]

    @property
    def num_images(self) -> int:
        return sum(len(s.images) for s in self.sets)


def read_labels(path: Path, split: str = "train", keep_shared: bool = False) -> Labels:
    """The label sets of a file.

    Args:
        split: rows that name another split are left out; "all" keeps every row.
        keep_shared: keep images that are marked as also being in VQA-RAD (`image_in_vqa_rad`), whose validation a
            model pretrained on them could not be judged on.

    Raises:
        LabelError: the file is missing, a row is malformed, an image stands twice, or no row is left.
    """
    if not path.is_file():
        raise LabelError(f"{path}: no such file; wanted a file of {WANTED}")
    rows, problems = read_rows(path)
    if problems:
        raise LabelError(str(problems[0]))
    kept, left_out = _of_split(rows, split, keep_shared)
    by_image = _facts_by_image(path, kept)
    without = [image for image, facts in by_image.items() if not facts]
    if without:
        left_out["images whose rows state no fact"] = len(without)
    sets: dict[Facts, LabelSet] = {}
    for image, facts in by_image.items():
        if facts:
            sets.setdefault(facts, LabelSet(facts)).images.append(image)
    if not sets:
        why = "; ".join(f"{count} {what}" for what, count in left_out.items()) or "the file is empty"
        raise LabelError(f"{path}: no label is left ({why}); wanted {WANTED}. --split all takes every split")
    return Labels(list(sets.values()), dict(left_out))


def _of_split(rows: list[tuple[int, Row]], split: str, keep_shared: bool) -> tuple[list[tuple[int, Row]], Counter[str]]:
    kept, left_out = [], Counter[str]()
    for number, row in rows:
        if split != "all" and row.get("split", split) != split:
            left_out[f"rows of split {row['split']}"] += 1
        elif not keep_shared and row.get("image_in_vqa_rad") is True:
            left_out["rows of images that are also in VQA-RAD"] += 1
        elif (why := set_aside(row, split)) is not None:
            left_out[why] += 1
        else:
            kept.append((number, row))
    return kept, left_out


def _facts_by_image(path: Path, rows: list[tuple[int, Row]]) -> dict[str, Facts]:
    if rows and "category" in rows[0][1] and "labels" not in rows[0][1]:
        return _vqa_med(path, rows)
    if rows and is_slake(rows[0][1]):
        return _by_questions(path, rows, "img_name", slake_facts)
    if rows and is_rad(rows[0][1]):
        return _by_questions(path, rows, "image_name", rad_facts)
    read: Callable[[str, Row], Facts] = _mednist if rows and "label" in rows[0][1] else _user
    found: dict[str, Facts] = {}
    for number, row in rows:
        where = f"{path}, record {number}"
        image = _text(where, row, "image")
        if image in found:
            raise LabelError(f"{where}: image {image!r} stands twice; wanted one row an image")
        found[image] = read(where, row)
    return found


def _text(where: str, row: Row, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise LabelError(f"{where}: {key!r} is {json.dumps(value)[:60]}; wanted text. The file's rows may be {WANTED}")
    return value.strip()


def _mednist(where: str, row: Row) -> Facts:
    label = _text(where, row, "label")
    if label not in MEDNIST:
        raise LabelError(
            f"{where}: label {label!r} is no class of MedNIST; known: {', '.join(MEDNIST)}. Labels of your own: "
            '{"image": NAME, "labels": {"modality": "CT", "organ": "chest"}}'
        )
    return MEDNIST[label]


def _user(where: str, row: Row) -> Facts:
    labels = row.get("labels")
    if not isinstance(labels, dict):
        raise LabelError(f"{where}: 'labels' is {json.dumps(labels)[:60]}; wanted an object. Rows may be {WANTED}")
    pairs = []
    for key, value in labels.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, bool) or not isinstance(one, str | int | float) or not words(str(one)):
                raise LabelError(
                    f"{where}: label {key!r} is {json.dumps(one)[:60]}; wanted text, a number or a list of them"
                )
            if not words(key):
                raise LabelError(f"{where}: a label's name is {key!r}; wanted a word, such as organ")
            if str(one).strip().lower() in ("yes", "no", "true", "false"):
                raise LabelError(
                    f"{where}: label {key!r} is {one!r}; wanted what is the case, such as "
                    '{"finding": "fracture"} or {"finding": "no fracture"}'
                )
            pairs.append((key, str(one)))
    return clean_facts(where, pairs)


def _vqa_med(path: Path, rows: list[tuple[int, Row]]) -> dict[str, Facts]:
    answers: dict[str, list[tuple[str, str, str]]] = {}
    for number, row in rows:
        where = f"{path}, record {number}"
        category, question, answer = (_text(where, row, key) for key in ("category", "question", "answer"))
        answers.setdefault(_text(where, row, "image"), []).append((category, question, answer))
    return {image: clean_facts(f"{path}, image {image}", read_answers(found)) for image, found in answers.items()}


def _by_questions(
    path: Path, rows: list[tuple[int, Row]], key: str, read: Callable[[list[Row]], list[tuple[str, str]]]
) -> dict[str, Facts]:
    """Facts of data sets that ask many questions about an image."""
    by_image: dict[str, list[Row]] = {}
    for number, row in rows:
        by_image.setdefault(_text(f"{path}, record {number}", row, key), []).append(row)
    return {image: clean_facts(f"{path}, image {image}", read(found)) for image, found in by_image.items()}


def clean_facts(where: str, pairs: Iterable[tuple[str, str]]) -> Facts:
    """Pairs in plain spacing, lower-case names, none twice.

    Raises:
        LabelError: a value has more than 40 words: a caption that must repeat it could not be short.
    """
    facts = dict.fromkeys((" ".join(key.lower().replace("_", " ").split()), _plain(value)) for key, value in pairs)
    for key, value in facts:
        if len(words(value)) > MOST_WORDS:
            raise LabelError(f"{where}: label {key!r} has {len(words(value))} words; accepted: up to {MOST_WORDS}")
    return tuple(facts)


def _plain(value: str) -> str:
    """A value as it may stand in a sentence: no marks that sentences do not have, none at its end."""
    return " ".join(re.sub(r"[?{}<>|\[\]#*=\"“”`]|!(?=\s|$)", " ", value).split()).rstrip(" .,;:")
