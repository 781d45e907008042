"""Looks data sets over before anything is trained: what is there, what cannot be used, what leaks between splits.

Knows readers, decoding and fingerprints of images; does not know models or how a report is shown.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miss.engine.data.datasets import LAYOUTS, is_packed, load_dataset, scan
from miss.engine.data.duplicates import Fingerprint, near_duplicates
from miss.engine.data.errors import ImageError
from miss.engine.data.leaks import fingerprints_of
from miss.engine.data.paths import DataError
from miss.engine.data.samples import Sample

SPLITS = ("train", "validate", "test")
Splits = dict[tuple[str, str], list[Sample]]


@dataclass(frozen=True)
class Report:
    """What a check found. `facts`: plain JSON. `errors`: what makes the data unusable or a figure wrong, one line
    each. `warnings`: what the one who trains should know."""

    facts: dict[str, Any]
    errors: list[str]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**self.facts, "errors": self.errors, "warnings": self.warnings}


def check(
    names: Sequence[str], base: Path, language: str = "en", perceptual: bool = True, progress: bool = False
) -> Report:
    """Checks every split that is there of some data sets.

    Args:
        names: data sets; for a packed folder `packed` means all of it.
        base: their folder, or a manifest of JSON lines.
        language: of SLAKE's rows.
        perceptual: whether images are compared by eye, too; without it only equal pixels are found.
        progress: whether a progress bar is shown.

    Raises:
        DataError: a data set has no split at all here.
    """
    splits, problems = read_splits(names, base, language)
    prints, undecodable = _decode_all((s for rows in splits.values() for s in rows), progress)
    shared, duplicates, near = _compare(splits, prints, perceptual)
    facts = {
        "data": str(base),
        "language": language,
        "splits": [_describe(name, split, rows) for (name, split), rows in splits.items()],
        "images": len(prints) + len(undecodable),
        "undecodable": undecodable,
        "shared_by_splits": shared,
        "duplicates": duplicates,
        "near_duplicates": near,
    }
    errors = [str(p) for p in problems]
    errors += [f"{u['image']}: {u['message']}" for u in undecodable]
    errors += [
        f"{p['a']} ({p['split_a']}) and {p['b']} ({p['split_b']}) are the same image in two splits of {p['dataset']}"
        for p in shared
        if p["kind"] in ("same", "exact")
    ]
    return Report(facts, errors, _warnings(facts, splits))


def read_splits(names: Sequence[str], base: Path, language: str) -> tuple[Splits, list[DataError]]:
    """The samples of all splits that are there, and what is wrong with the other records."""
    splits: Splits = {}
    problems: list[DataError] = []
    for name in names:
        found = False
        for split in SPLITS if not base.is_file() else ("all",):
            try:
                rows, refused = _read(name, base, split, language)
            except DataError as error:
                missing = error
                continue
            found = True
            for dataset in dict.fromkeys(s.dataset for s in rows):
                splits[(dataset, split)] = [s for s in rows if s.dataset == dataset]
            problems += [p for p in refused if str(p) not in {str(q) for q in problems}]
        if not found:
            raise missing
    return splits, problems


def _read(name: str, base: Path, split: str, language: str) -> tuple[list[Sample], list[DataError]]:
    if is_packed(base) or name not in LAYOUTS:
        return load_dataset(name, base, split, language), []
    return scan(name, base, split, language)


def _decode_all(samples: Iterable[Sample], progress: bool) -> tuple[dict[str, Fingerprint], list[dict[str, str]]]:
    """The fingerprint of every image that decodes, and which do not, with the reason."""
    found = fingerprints_of({s.image_key: s.image for s in samples}, "images" if progress else "")
    return split_undecodable(found)


def split_undecodable(
    found: Mapping[str, Fingerprint | ImageError],
) -> tuple[dict[str, Fingerprint], list[dict[str, str]]]:
    """The fingerprints, and what the report says of the images that have none."""
    prints: dict[str, Fingerprint] = {}
    undecodable = []
    for key, result in found.items():
        if isinstance(result, ImageError):
            undecodable.append({"image": key, "reason": str(result.reason), "message": str(result)})
        else:
            prints[key] = result
    return prints, undecodable


def _describe(name: str, split: str, rows: Sequence[Sample]) -> dict[str, Any]:
    words = Counter(len(s.answer.split()) for s in rows)
    return {
        "dataset": name,
        "split": split,
        "samples": len(rows),
        "images": len({s.image_key for s in rows}),
        "open": sum(s.answer_type == "open" for s in rows),
        "closed": sum(s.answer_type == "closed" for s in rows),
        "untyped": sum(s.answer_type is None for s in rows),
        "languages": dict(Counter(s.language for s in rows)),
        "distinct_answers": len({s.answer.lower() for s in rows}),
        "empty_answers": [s.qid for s in rows if not s.answer],
        "answer_words": {str(n): words[n] for n in sorted(words)},
        "longest_answer_characters": max((len(s.answer) for s in rows), default=0),
        "longest_question_characters": max((len(s.question) for s in rows), default=0),
    }


def _compare(
    splits: Splits, prints: dict[str, Fingerprint], perceptual: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Images shared by splits of a data set; equal or re-encoded images otherwise; images that look alike."""
    where: dict[str, list[tuple[str, str]]] = {}
    for place, rows in splits.items():
        for key in dict.fromkeys(s.image_key for s in rows):
            where.setdefault(key, []).append(place)
    shared = [
        {"kind": "same", "dataset": places[0][0], "a": key, "split_a": places[0][1], "b": key, "split_b": other[1]}
        for key, places in where.items()
        for other in places[1:]
    ]
    duplicates: list[dict[str, Any]] = []
    near: list[dict[str, Any]] = []
    keys = list(prints)
    limits = {} if perceptual else {"max_distance": 0, "min_correlation": 0.99999}
    for match in near_duplicates(list(prints.values()), **limits):  # type: ignore[arg-type]
        if not perceptual and not match.exact:
            continue
        a, b = keys[match.a], keys[match.b]
        (set_a, split_a), (set_b, split_b) = where[a][0], where[b][0]
        pair: dict[str, Any] = {"kind": match.kind, "a": a, "split_a": split_a, "b": b, "split_b": split_b}
        pair |= {"distance": match.distance, "correlation": round(match.correlation, 4)}
        if set_a == set_b and split_a != split_b:
            shared.append({"dataset": set_a, **pair})
        else:
            (near if match.kind == "near" else duplicates).append(pair)
    return shared, duplicates, near


def _warnings(facts: dict[str, Any], splits: Splits) -> list[str]:
    found = []
    for kind, text in (("copy", "all but equal"), ("near", "alike")):
        pairs = [p for p in facts["shared_by_splits"] if p["kind"] == kind]
        if pairs:
            found.append(f"{len(pairs)} pairs of images in different splits of one data set are {text}")
    across = [p for p in (*facts["duplicates"], *facts["near_duplicates"]) if _set(p["a"]) != _set(p["b"])]
    if across:
        found.append(
            f"{len({p['a'] for p in across})} images look like images of another of these data sets: leave them out "
            f"of training where that one is evaluated"
        )
    within = [p for p in facts["duplicates"] if _set(p["a"]) == _set(p["b"])]
    if within:
        found.append(f"{len(within)} pairs of images within one split are equal or all but equal")
    for (name, split), rows in splits.items():
        if empty := sum(not s.answer for s in rows):
            found.append(f"{name} {split}: {empty} answers are empty")
    return found


def _set(image_key: str) -> str:
    return image_key.split("/", 1)[0]
