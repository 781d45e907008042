"""Readers of SLAKE, VQA-RAD, VQA-Med-2019 and plain JSON lines: every record of a file becomes one sample.

Knows the files of each data set; does not decode images and does not know models.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miss.engine.data.paths import DataError, PathError, resolve_data_root, safe_path
from miss.engine.data.samples import AnswerType, Sample

__all__ = ["DATASETS", "DataError", "PathError", "Sample", "load_dataset", "resolve_data_root", "safe_path"]

SPLITS = ("train", "validate", "test", "all")
SPLIT_ALIASES = {"val": "validate", "validation": "validate", "dev": "validate"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps its files: folder names, manifests by split, image folders, one row's reader.

    `fields`: what its records have, by which a folder of unknown content is recognised.
    """

    folders: tuple[str, ...]
    files: dict[str, tuple[str, ...]]
    image_folders: tuple[str, ...]
    read: Callable[[Row, "Where"], Sample]
    fields: tuple[str, ...]


@dataclass
class Where:
    """Where a row stands, for its errors, and where its image lies."""

    dataset: str
    file: Path
    row: int
    roots: list[Path]
    known: dict[str, Path]
    endings: tuple[str, ...] = ("",)  # what may have been left off an image's name

    def error(self, message: str) -> DataError:
        return DataError(f"{self.file}, record {self.row}: {message}")

    def text(self, row: Row, key: str, required: bool = True) -> str | None:
        """A field as text, without white space around it; numbers become text."""
        value = row.get(key)
        if value is None and not required:
            return None
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            got = "is missing" if key not in row else f"holds {_json_kind(value)}"
            raise self.error(f"{key!r} {got}; wanted text")
        return str(value).strip()

    def image(self, name: str) -> Path:
        """The image's path: inside one of the roots, and there."""
        if name not in self.known:
            self.known[name] = self._find(name)
        return self.known[name]

    def _find(self, name: str) -> Path:
        try:
            paths = [safe_path(root, name + ending) for ending in self.endings for root in self.roots]
        except PathError as error:
            raise PathError(f"{self.file}, record {self.row}: {error}") from None
        for path in paths:
            if path.is_file():
                return path
        raise self.error(f"no image file {name!r}; looked in {', '.join(str(r) for r in self.roots)}")


def load_dataset(
    name: str, root: str | os.PathLike[str] | None = None, split: str = "train", language: str = "en"
) -> list[Sample]:
    """The samples of one split, in the order of its file.

    Args:
        name: slake, vqa-rad, vqa-med-2019, jsonl, or packed (all of a folder that `miss data pack` wrote; the other
            names read their part of such a folder, too).
        root: the data set's own folder, or one that holds it, or for jsonl the file itself. None: see
            `resolve_data_root`.
        split: train, validate, test, or all (train and validate). VQA-RAD's validation is a tenth of its training
            images.
        language: en, zh or all; only SLAKE has more than one.

    Raises:
        DataError: a file is missing or malformed, a qid stands twice, an image is missing or outside its folder.
    """
    split = SPLIT_ALIASES.get(split, split)
    if split not in SPLITS:
        raise DataError(f"split: got {split!r}; accepted: {', '.join(SPLITS)}")
    if language not in ("en", "zh", "all"):
        raise DataError(f"language: got {language!r}; accepted: en, zh, all")
    if name not in (*LAYOUTS, "packed"):
        raise DataError(f"data set: got {name!r}; accepted: {', '.join(DATASETS)}")
    base = resolve_data_root(root)
    if is_packed(base):
        from miss.engine.data.pack import read_packed

        return read_packed(base, None if name == "packed" else name, split, language)
    if name == "packed":
        raise DataError(f"{base}: no index.json; wanted a folder that `miss data pack` wrote")
    samples, problems = scan(name, base, split, language)
    if problems:
        more = f" (and {len(problems) - 1} more problems: see `miss data check`)" if len(problems) > 1 else ""
        raise type(problems[0])(f"{problems[0]}{more}")
    return samples


def is_packed(base: Path) -> bool:
    """Whether `miss data pack` wrote this folder."""
    return (base / "index.json").is_file() and (base / "samples.jsonl.gz").is_file()


def detect(base: Path) -> list[str]:
    """The data sets that a folder (or a manifest) holds, by the names and the first records of its files.

    Raises:
        DataError: none that is known.
    """
    if is_packed(base):
        return ["packed"]
    found: dict[Path, str] = {}
    for name, layout in LAYOUTS.items():
        for split in ("train", "validate", "test"):
            try:
                (file,), _ = _find_files(name, base, split)
            except DataError:
                continue
            rows, _ = read_rows(file)
            if rows and all(field in rows[0][1] for field in layout.fields):
                found.setdefault(file, name)  # VQA-Med-2019 comes before plain JSON lines, which have less to say
    if not found:
        raise DataError(f"{base}: holds no data set that is known; wanted one of: {', '.join(LAYOUTS)}")
    return list(dict.fromkeys(found.values()))


def scan(name: str, base: Path, split: str, language: str = "en") -> tuple[list[Sample], list[DataError]]:
    """The samples of one split of an official layout, and what is wrong with its other records.

    Raises:
        DataError: there is no file of that split.
    """
    files, folder = _find_files(name, base, split)
    layout = LAYOUTS[name]
    samples: list[Sample] = []
    problems: list[DataError] = []
    known: dict[str, Path] = {}
    roots = [folder / f for f in layout.image_folders if (folder / f).is_dir()] or [folder]
    for file in files:
        rows, unread = read_rows(file)
        read, refused = _read_all(rows, layout, name, file, roots, known)
        assert len(read) + len(refused) == len(rows), "every record becomes one sample or one problem"
        samples, problems = samples + read, problems + unread + refused
    problems += find_double(samples, ", ".join(str(f) for f in files))
    if name == "slake" and language != "all":
        samples = [s for s in samples if s.language == language]
    if name == "vqa-rad" and split in ("train", "validate"):
        samples = [s for s in samples if is_validation_image(Path(s.image_key).name) == (split == "validate")]
    return samples, problems


def _read_all(
    rows: list[tuple[int, Row]], layout: Layout, name: str, file: Path, roots: list[Path], known: dict[str, Path]
) -> tuple[list[Sample], list[DataError]]:
    samples, problems = [], []
    for number, row in rows:
        try:
            samples.append(layout.read(row, Where(name, file, number, roots, known)))
        except DataError as error:
            problems.append(error)
    return samples, problems


def is_validation_image(image_name: str) -> bool:
    """Whether a VQA-RAD training image belongs to the validation tenth, by a hash of its name."""
    return int(hashlib.sha256(image_name.encode()).hexdigest(), 16) % 10 == 0


def find_double(samples: Iterable[Sample], where: str) -> list[DataError]:
    """One problem where qids stand more than once in a data set, which names them; else none."""
    counts = Counter((s.dataset, s.qid) for s in samples)
    double = [qid for (_, qid), count in counts.items() if count > 1]
    if not double:
        return []
    shown = ", ".join(q[:80] for q in double[:10]) + (f" and {len(double) - 10} more" if len(double) > 10 else "")
    return [DataError(f"{where}: these qids stand more than once: {shown}; every record needs its own")]


def read_rows(file: Path) -> tuple[list[tuple[int, Row]], list[DataError]]:
    """The records of a manifest, with the number of their line or record, and what could not be read.

    A manifest is a JSON array of objects, or has one JSON object a line.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return [], [DataError(f"{file}: not UTF-8 text; wanted JSON")]
    if file.suffix != ".jsonl" and text.lstrip().startswith("["):
        return _read_array(file, text)
    rows, problems = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            problems.append(DataError(f"{file}, line {number}: not valid JSON; wanted one object a line"))
            continue
        if isinstance(row, dict):
            rows.append((number, row))
        else:
            problems.append(DataError(f"{file}, line {number}: got {_json_kind(row)}; wanted an object"))
    return rows, problems


def _read_array(file: Path, text: str) -> tuple[list[tuple[int, Row]], list[DataError]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        return [], [DataError(f"{file}, line {line}: not valid JSON; wanted an array of objects")]
    rows = [(number, row) for number, row in enumerate(found, 1) if isinstance(row, dict)]
    wrong = [(number, row) for number, row in enumerate(found, 1) if not isinstance(row, dict)]
    return rows, [DataError(f"{file}, record {n}: got {_json_kind(row)}; wanted an object") for n, row in wrong]


def _json_kind(value: Any) -> str:
    names = {list: "an array", str: "text", int: "a number", float: "a number", bool: "true or false"}
    return names.get(type(value), "null")


def _find_files(name: str, base: Path, split: str) -> tuple[list[Path], Path]:
    """The manifests of a split and the folder that they lie in."""
    if base.is_file():
        if name != "jsonl":
            raise DataError(f"{base} is a file; wanted the folder of {name}")
        return [base], base.parent
    layout = LAYOUTS[name]
    folders = [base, *(base / f for f in layout.folders)]
    wanted = [layout.files[s] for s in (("train", "validate") if split == "all" else (split,))]
    if name == "vqa-rad" and split == "all":
        wanted = [layout.files["train"]]
    for folder in folders:
        found = [next((folder / n for n in names if (folder / n).is_file()), None) for names in wanted]
        if all(found) and _is_of(folder, base, layout):
            return [f for f in found if f], folder
    names = ", ".join(n for group in wanted for n in group)
    raise DataError(
        f"no {split} split of {name} under {base}: looked for {names} in {', '.join(str(f) for f in folders)}"
    )


def _is_of(folder: Path, base: Path, layout: Layout) -> bool:
    """Whether a manifest in `folder` is this data set's: a folder of another set may hold files of the same name."""
    return (
        folder != base
        or base.name.lower() in [f.lower() for f in layout.folders]
        or not any((base / f).is_dir() for f in layout.folders)
    )


def _slake(row: Row, where: Where) -> Sample:
    name = where.text(row, "img_name") or ""
    return Sample(
        qid=where.text(row, "qid") or "",
        image=where.image(name),
        question=where.text(row, "question") or "",
        answer=where.text(row, "answer") or "",
        answer_type=_answer_type(row, where),
        language=where.text(row, "q_lang") or "en",
        modality=where.text(row, "modality", required=False),
        organ=where.text(row, "location", required=False),
        question_type=where.text(row, "content_type", required=False),
        image_key=f"slake/{name}",
        content_type=where.text(row, "content_type", required=False),
        dataset="slake",
    )


def _vqa_rad(row: Row, where: Where) -> Sample:
    name = where.text(row, "image_name") or ""
    return Sample(
        qid=where.text(row, "qid") or "",
        image=where.image(name),
        question=where.text(row, "question") or "",
        answer=where.text(row, "answer") or "",
        answer_type=_answer_type(row, where),
        language="en",
        modality=None,
        organ=where.text(row, "image_organ", required=False),
        question_type=where.text(row, "question_type", required=False),
        image_key=f"vqa-rad/{name}",
        content_type=where.text(row, "phrase_type", required=False),
        dataset="vqa-rad",
    )


def _vqa_med(row: Row, where: Where) -> Sample:
    name = where.text(row, "image") or ""
    answer = where.text(row, "answer") or ""
    return Sample(
        qid=where.text(row, "qid") or "",
        image=where.image(name),
        question=where.text(row, "question") or "",
        answer=answer,
        # The set does not say; a question is closed where its answer is yes or no.
        answer_type="closed" if answer.lower() in ("yes", "no") else "open",
        language="en",
        modality=None,
        organ=None,
        question_type=where.text(row, "category", required=False),
        image_key=f"vqa-med-2019/{name}",
        content_type=where.text(row, "category", required=False),
        dataset="vqa-med-2019",
        also_in=("vqa-rad",) if row.get("image_in_vqa_rad") is True else (),
    )


def _jsonl(row: Row, where: Where) -> Sample:
    name = where.text(row, "image") or ""
    return Sample(
        qid=where.text(row, "qid", required=False) or str(where.row),
        image=where.image(name),
        question=where.text(row, "question") or "",
        answer=where.text(row, "answer") or "",
        answer_type=_answer_type(row, where) if row.get("answer_type") is not None else None,
        language=where.text(row, "language", required=False) or "en",
        modality=where.text(row, "modality", required=False),
        organ=where.text(row, "organ", required=False),
        question_type=where.text(row, "question_type", required=False),
        image_key=f"jsonl/{name}",
        content_type=where.text(row, "content_type", required=False),
        dataset="jsonl",
    )


def _answer_type(row: Row, where: Where) -> AnswerType:
    """`open` or `closed`; VQA-RAD writes 'CLOSED ' with a space at times."""
    value = (where.text(row, "answer_type") or "").lower()
    if value == "open":
        return "open"
    if value == "closed":
        return "closed"
    raise where.error(f"answer_type is {value!r}; accepted: open, closed")


LAYOUTS = {
    "slake": Layout(
        ("slake", "SLAKE", "Slake", "Slake1.0"),
        {"train": ("train.json",), "validate": ("validate.json", "validation.json"), "test": ("test.json",)},
        ("images", "imgs"),
        _slake,
        ("img_name", "q_lang"),
    ),
    "vqa-rad": Layout(
        ("vqa_rad", "vqa-rad", "VQA_RAD", "VQA-RAD", "VQARAD"),
        {"train": ("train.json",), "validate": ("train.json",), "test": ("test.json",)},
        ("images", "VQA_RAD Image Folder"),
        _vqa_rad,
        ("image_name", "image_organ"),
    ),
    "vqa-med-2019": Layout(
        ("vqa_med_2019", "vqa-med-2019", "VQA-Med-2019"),
        {"train": ("train.jsonl",), "validate": ("val.jsonl", "validate.jsonl"), "test": ("test.jsonl",)},
        ("images",),
        _vqa_med,
        ("image", "category"),
    ),
    "jsonl": Layout(
        (),
        {"train": ("train.jsonl",), "validate": ("validate.jsonl", "val.jsonl"), "test": ("test.jsonl",)},
        (".", "images"),
        _jsonl,
        ("image", "question"),
    ),
}
DATASETS = (*LAYOUTS, "packed")
