"""Images with their captions, from JSON lines, from the original's two CSV forms, or packed: a record becomes a pair.

Knows files and records; does not decode images, tokenise captions or know which pair comes when.

JSON: `{"image": NAME, "captions": [TEXT, …]}` or `{"image": NAME, "caption": TEXT}`, one object a line, or an array.
CSV: a column of image names (`list`, `image`, or one without a name, as pandas writes an index), and `Caption` or
`describe1`, `describe2`, …, of which one is drawn each time; a name may lack its `.png`.
"""

import csv
import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miss.engine.data.datasets import Row, Where, read_rows
from miss.engine.data.paths import DataError
from miss.engine.data.processor import clean_text
from miss.engine.data.shards import PackedImage, is_packed

MAX_CAPTION_CHARACTERS = 20_000
NAME_COLUMNS = ("list", "image", "")
ENDINGS = ("", ".png")  # the original's RSNA file names images without their ending
CLOSING = ".!?;:,"  # punctuation that says nothing at a caption's end
_DESCRIBE = re.compile(r"describe[1-9][0-9]*")


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and what is said of it. image: what `decode_image` takes. captions: at least one, cleaned; one is drawn
    each time. key: names the image, the same for all pairs of one. source: the folder and file that it came from."""

    image: Path | PackedImage
    captions: tuple[str, ...]
    key: str
    source: str


def load_pairs(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    names: str | os.PathLike[str] | None = None,
) -> list[Pair]:
    """The pairs of a file in its order, or of a folder that `miss data pack --pairs` wrote.

    Args:
        path: a .csv file, a file of JSON, or the folder.
        images: the folder that image names are relative to. Default: the file's own, and `images` in it.
        names: of CSV, a text file of image names, one a line: only these are taken, in its order.

    Raises:
        DataError: a record is malformed, or its image is missing or outside its folder; file and record are named.
    """
    pairs, problems = scan_pairs(path, images, names)
    if problems:
        more = f" (and {len(problems) - 1} more: `miss data check --pairs {path}`)" if len(problems) > 1 else ""
        raise type(problems[0])(f"{problems[0]}{more}")
    return pairs


def scan_pairs(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    names: str | os.PathLike[str] | None = None,
) -> tuple[list[Pair], list[DataError]]:
    """As `load_pairs`: the pairs, and what is wrong with the other records.

    Raises:
        DataError: there is no such file or folder, it is no pairs' file, or holds no record.
    """
    path = Path(path)
    if path.is_dir():
        if not is_packed(path, "pairs"):
            raise DataError(f"{path}: holds no pairs; wanted a folder that `miss data pack --pairs` wrote, or a file")
        from miss.engine.data.pack_pairs import read_packed_pairs

        return read_packed_pairs(path), []
    if not path.is_file():
        raise DataError(f"{path}: no such file; wanted pairs as .jsonl or .csv, or a packed folder")
    is_csv = path.suffix.lower() == ".csv"
    if names is not None and not is_csv:
        raise DataError(f"{path}: a list of image names goes with a .csv file only")
    rows, unread = _read_csv(path) if is_csv else read_rows(path)
    pairs, refused = _read_all(path, rows, _roots(path, images), ENDINGS if is_csv else ("",))
    assert len(pairs) + len(refused) == len(rows), "every record becomes one pair or one problem"
    problems = unread + refused
    if not pairs and not problems:
        raise DataError(f"{path}: holds no record; wanted at least one image with a caption")
    if names is not None:
        pairs, missing = _listed(path, pairs, Path(names))
        problems += missing
    return pairs, problems


def _roots(path: Path, images: str | os.PathLike[str] | None) -> list[Path]:
    base = path.parent if images is None else Path(images)
    if not base.is_dir():
        raise DataError(f"{base}: no such folder; wanted the one that image names are relative to")
    return [base, *([base / "images"] if (base / "images").is_dir() else [])]


def _read_all(
    path: Path, rows: list[tuple[int, Row]], roots: list[Path], endings: tuple[str, ...]
) -> tuple[list[Pair], list[DataError]]:
    source = f"{path.resolve().parent.name}/{path.stem}"
    pairs: list[Pair] = []
    problems: list[DataError] = []
    known: dict[str, Path] = {}
    for number, row in rows:
        where = Where("pairs", path, number, roots, known, endings)
        try:
            name = where.text(row, "image") or ""
            pairs.append(Pair(where.image(name), _captions(row, where), f"{source}/{name}", source))
        except DataError as error:
            problems.append(error)
    return pairs, problems


def _captions(row: Row, where: Where) -> tuple[str, ...]:
    given = [key for key in ("caption", "captions") if row.get(key) is not None]
    if len(given) != 1:
        found = "both 'caption' and 'captions'" if given else "neither 'caption' nor 'captions'"
        raise where.error(f"has {found}; wanted one of them")
    value: Any = row[given[0]]
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise where.error(f"{given[0]!r} is empty; wanted at least one caption")
    return tuple(_caption(text, where) for text in texts)


def _caption(text: Any, where: Where) -> str:
    if not isinstance(text, str):
        raise where.error(f"a caption is {json.dumps(text)[:60]}; wanted text")
    if len(text) > MAX_CAPTION_CHARACTERS:
        raise where.error(f"a caption has {len(text):,} characters; accepted: up to {MAX_CAPTION_CHARACTERS:,}")
    cleaned = clean_text(text)
    if not cleaned:
        raise where.error("a caption is empty; wanted text")
    return cleaned


def _read_csv(path: Path) -> tuple[list[tuple[int, Row]], list[DataError]]:
    """The records as JSON's would be, numbered from 1 behind the header, and what could not be read.

    Raises:
        DataError: the header is not of one of the two forms, or the file is no CSV from some line on.
    """
    rows: list[tuple[int, Row]] = []
    problems: list[DataError] = []
    records = _csv_records(path)
    header = [name.strip() for name in next(records, [])]
    name_column, columns = _columns(path, header)
    for number, values in enumerate(records, 1):
        if len(values) != len(header):
            problems.append(
                DataError(f"{path}, record {number}: {len(values)} fields; the header has {len(header)}: check quotes")
            )
            continue
        captions = [values[c] for c in columns if values[c].strip()]
        rows.append((number, {"image": values[name_column], "captions": captions}))
    return rows, problems


def _csv_records(path: Path) -> Iterator[list[str]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            yield from (record for record in reader if record)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}; wanted CSV, quotes closed and doubled") from None
        except UnicodeDecodeError:
            raise DataError(f"{path}: not UTF-8 text; wanted CSV") from None


def _columns(path: Path, header: list[str]) -> tuple[int, list[int]]:
    """Which columns hold the image's name and the captions."""
    double = [name for name, count in Counter(header).items() if count > 1]
    if double:
        raise DataError(f"{path}: the header has {double[0]!r} more than once; wanted each column once")
    found = [header.index(name) for name in NAME_COLUMNS if name in header]
    single = [i for i, name in enumerate(header) if name in ("Caption", "caption")]
    several = [i for i, name in enumerate(header) if _DESCRIBE.fullmatch(name)]
    if not found or bool(single) == bool(several) or len(single) > 1:
        raise DataError(
            f"{path}: the header is {', '.join(header)[:200]!r}; wanted a column `list` of image names and either "
            f"`Caption` or `describe1`, `describe2`, …"
        )
    return found[0], single or several


def _listed(path: Path, pairs: list[Pair], names: Path) -> tuple[list[Pair], list[DataError]]:
    """The pairs of the names in a list, in its order; a name without a record, or with two, is a problem."""
    try:
        lines = [line.strip() for line in names.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{names}: cannot be read; wanted text, one image name a line") from None
    by_name: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_name.setdefault(pair.key.removeprefix(f"{pair.source}/"), []).append(pair)
    kept: list[Pair] = []
    problems: list[DataError] = []
    for number, name in enumerate(lines, 1):
        found = by_name.get(name, [])
        if name and len(found) == 1:
            kept.append(found[0])
        elif name:
            problems.append(
                DataError(f"{names}, line {number}: {name[:120]!r} has {len(found)} records in {path}; wanted one")
            )
    if not kept and not problems:
        raise DataError(f"{names}: holds no name; wanted one a line")
    return kept, problems


def images_of(pairs: Iterable[Pair]) -> dict[str, Path | PackedImage]:
    """The image of each key.

    Raises:
        DataError: two images have one key.
    """
    images: dict[str, Path | PackedImage] = {}
    for pair in pairs:
        if images.setdefault(pair.key, pair.image) != pair.image:
            raise DataError(
                f"{pair.key} names two images, {images[pair.key]} and {pair.image}; rename a pairs' file or its folder"
            )
    return images


def pairs_digest(pairs: Iterable[Pair]) -> str:
    """SHA-256 over keys, captions and order: whether processes, or a run and the one it resumes, have the same pairs.

    What the image files hold is not read.
    """
    total = hashlib.sha256()
    for pair in pairs:
        total.update(json.dumps([pair.key, *pair.captions]).encode() + b"\n")
    return total.hexdigest()


def normalise_caption(text: str) -> str:
    """A caption as it is compared with others: compatible characters folded, no capitals, no closing punctuation."""
    return clean_text(unicodedata.normalize("NFKC", text)).casefold().rstrip(f" {CLOSING}")
