"""Images in tar shards with an index: what every packed folder has in common, whatever stands beside the images.

Knows files, bytes and formats; does not know what the rows beside the images say. The reader unpacks nothing: it reads
bytes from known places in a shard.

A folder holds index.json (what was packed and how, shards with their SHA-256, the place and CRC of each image), one
NAME.jsonl.gz of rows and shard-00000.tar … (one WebP file an image, plain tar).
"""

import gzip
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from miss.engine.data.errors import ImageError, Reason
from miss.engine.data.images import decode_image
from miss.engine.data.paths import DataError
from miss.engine.data.processor import RESAMPLE
from miss.models.files import atomic_folder

FORMAT, VERSION = "miss-packed", 1
INDEX = "index.json"
ROWS = {"samples": "samples.jsonl.gz", "pairs": "pairs.jsonl.gz"}  # what a folder may hold, and in which file
MAX_INDEX_BYTES = 256 * 1024 * 1024
SHARD_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class PackOptions:
    """How images are packed.

    image_size: no side becomes longer; a side that is shorter stays. resample: as the model's preprocessing, so that
    an image whose sides are both longer becomes exactly what the model would be given. quality: WebP's, 0 to 100.
    lossless: WebP without loss, some three times the size.
    """

    image_size: int = 256
    resample: str = "bicubic"
    quality: int = 84
    lossless: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.image_size <= 8192:
            raise DataError(f"image_size: got {self.image_size}; wanted 1 to 8192")
        if self.resample not in RESAMPLE:
            raise DataError(f"resample: got {self.resample!r}; accepted: {', '.join(RESAMPLE)}")
        if not 0 <= self.quality <= 100:
            raise DataError(f"quality: got {self.quality}; wanted 0 to 100")


@dataclass(frozen=True)
class PackedImage:
    """An image inside a shard; `decode_image` takes it as it takes a path."""

    shard: Path
    offset: int
    size: int
    crc: int

    def read_bytes(self) -> bytes:
        """The encoded image.

        Raises:
            ImageError: the shard is missing, cut short or altered.
        """
        try:
            with open(self.shard, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError:
            raise ImageError(Reason.UNREADABLE, f"{self.shard} cannot be read; pack the data again") from None
        if len(data) < self.size:
            raise ImageError(Reason.TRUNCATED, f"{self.shard} ends early; copy or pack the data again")
        if zlib.crc32(data) != self.crc:
            raise ImageError(Reason.CORRUPT, f"{self.shard} has been altered; copy or pack the data again")
        return data


def write_folder(
    out: str | os.PathLike[str],
    content: str,
    images: dict[str, Any],
    lines: Callable[[dict[str, int]], list[str]],
    facts: dict[str, Any],
    options: PackOptions,
    progress: bool = False,
    shard_bytes: int = SHARD_BYTES,
    refused: list[ImageError] | None = None,
) -> tuple[int, int]:
    """Writes a packed folder, all of it or nothing; returns how many shards and bytes it has.

    Args:
        out: the folder; it must not exist, be empty, or hold an older pack of the same content.
        content: a key of `ROWS`.
        images: what `decode_image` takes, by key.
        lines: the rows as JSON texts, given the number of each packed image's key.
        facts: what else index.json says.
        shard_bytes: a shard is closed once it is as large.
        refused: where given, takes the errors of images that cannot be decoded, which are then left out.

    Raises:
        DataError: `out` holds something else.
        ImageError: an image cannot be decoded, and `refused` is not given; the message names it.
        OSError: the folder cannot be written, as on a full disk. Nothing is left behind.
    """
    target = Path(out)
    _check_target(target, content)
    with atomic_folder(target) as folder:
        shards, places = _write_shards(folder, images, options, progress, shard_bytes, refused)
        rows = lines({place[0]: n for n, place in enumerate(places)})
        body = "".join(f"{line}\n" for line in rows).encode()
        (folder / ROWS[content]).write_bytes(gzip.compress(body, 9, mtime=0))
        index = {
            "format": FORMAT,
            "version": VERSION,
            "options": asdict(options),
            **facts,
            content: {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest(), "rows": len(rows)},
            "shards": shards,
            "images": places,
        }
        (folder / INDEX).write_text(json.dumps(index, ensure_ascii=False, separators=(",", ":")) + "\n", "utf-8")
        num_bytes = sum(f.stat().st_size for f in folder.iterdir())
    # An older pack's shards that the new one has no use for were kept beside the new files.
    for old in set(target.glob("shard-*.tar")) - {target / s["name"] for s in shards}:
        old.unlink()
    return len(shards), num_bytes


def _check_target(target: Path, content: str) -> None:
    if target.is_dir() and any(target.iterdir()) and not is_packed(target, content):
        raise DataError(
            f"{target}: holds other files; wanted a new folder, an empty one, or an older pack of {content}"
        )


def is_packed(folder: Path, content: str) -> bool:
    """Whether `miss data pack` wrote this folder, and put such rows into it."""
    return (folder / INDEX).is_file() and (folder / ROWS[content]).is_file()


def _write_shards(
    folder: Path,
    images: dict[str, Any],
    options: PackOptions,
    progress: bool,
    shard_bytes: int,
    refused: list[ImageError] | None,
) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """Writes the shards; returns their names, sizes and digests, and [key, shard, offset, size, crc] of each image."""
    shards: list[dict[str, Any]] = []
    places: list[list[Any]] = []
    encoded: Iterable[tuple[str, bytes | ImageError]] = _encoded(images, options)
    if progress:
        from tqdm import tqdm

        encoded = tqdm(encoded, total=len(images), desc="pack", unit="image")
    rest = _accepted(encoded, refused)
    while first := next(rest, None):
        name = f"shard-{len(shards):05d}.tar"
        with open(folder / name, "w+b") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                item: tuple[str, bytes] | None = first
                while item:
                    key, data = item
                    member = tarfile.TarInfo(f"{len(places):08d}.webp")
                    member.size, member.mode = len(data), 0o644
                    tar.addfile(member, io.BytesIO(data))
                    at = file.tell() - (-(-len(data) // 512) * 512)
                    places.append([key, len(shards), at, len(data), zlib.crc32(data)])
                    item = next(rest, None) if file.tell() < shard_bytes else None
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        shards.append({"name": name, "bytes": (folder / name).stat().st_size, "sha256": digest})
    return shards, places


def _accepted(
    encoded: Iterable[tuple[str, bytes | ImageError]], refused: list[ImageError] | None
) -> Iterator[tuple[str, bytes]]:
    """The images that could be decoded; the errors of the others are put aside, or raised where nobody takes them."""
    for key, data in encoded:
        if isinstance(data, bytes):
            yield key, data
        elif refused is None:
            raise data
        else:
            refused.append(data)


def _encoded(images: dict[str, Any], options: PackOptions) -> Iterator[tuple[str, bytes | ImageError]]:
    """Each image's key and packed bytes, in order, made on all cores, a bounded number ahead of the writing."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        items = iter(images.items())
        waiting: list[tuple[str, Any]] = []
        while True:
            for key, image in islice(items, 8 * workers - len(waiting)):
                waiting.append((key, pool.submit(_encode, key, image, options)))
            if not waiting:
                return
            key, future = waiting.pop(0)
            yield key, future.result()


def _encode(key: str, image: Any, options: PackOptions) -> bytes | ImageError:
    try:
        pixels = decode_image(image)
    except ImageError as error:
        return ImageError(error.reason, f"{key}: {error}")
    buffer = io.BytesIO()
    Image.fromarray(shrink(pixels, options)).save(
        buffer, "WEBP", quality=options.quality, method=4, lossless=options.lossless, exact=options.lossless
    )
    return buffer.getvalue()


def shrink(pixels: np.ndarray, options: PackOptions) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (min(H, S), min(W, S), 3): each side for itself, as the model's square stretches it."""
    height, width = (min(side, options.image_size) for side in pixels.shape[:2])
    if (height, width) == pixels.shape[:2]:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), RESAMPLE[options.resample]))


def read_index(folder: Path) -> dict[str, Any]:
    """index.json, checked as far as reading relies on it.

    Raises:
        DataError: it is missing, not a pack's, of another version, or its shards are missing or of another size.
    """
    path = folder / INDEX
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise DataError(f"{path}: larger than any index; pack the data again")
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; wanted a folder that `miss data pack` wrote") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise DataError(f"{path}: not valid JSON; copy or pack the data again") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(f"{path}: not the index of a packed data set; wanted a folder that `miss data pack` wrote")
    if index.get("version") != VERSION:
        raise DataError(f"{path}: version {index.get('version')!r}; this program reads {VERSION}; pack the data again")
    try:
        for shard in index["shards"]:
            _check_shard(folder, shard)
    except (KeyError, TypeError, AttributeError, OSError):  # OSError: a name longer than any file's
        raise DataError(f"{path}: damaged; copy or pack the data again") from None
    return index


def _check_shard(folder: Path, shard: dict[str, Any]) -> None:
    name = shard["name"]
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".tar"):
        raise DataError(f"{folder / INDEX}: names a shard {name!r}; wanted plain file names that end in .tar")
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise DataError(f"{path}: no such file; copy or pack the data again")
    if path.stat().st_size != shard["bytes"]:
        raise DataError(
            f"{path}: {path.stat().st_size:,} bytes; wanted {shard['bytes']:,}; copy or pack the data again"
        )


def read_places(folder: Path, index: dict[str, Any]) -> list[tuple[str, PackedImage]]:
    """The key and place of each image; places outside their shard are refused."""
    shards = [(folder / s["name"], s["bytes"]) for s in index["shards"]]
    places = []
    for key, number, offset, size, crc in index["images"]:
        path, end = shards[number]
        if not 0 <= offset <= offset + size <= end or number < 0:
            raise DataError(f"{folder / INDEX}: places {key!r} outside {path.name}; copy or pack the data again")
        places.append((str(key), PackedImage(path, offset, size, crc)))
    return places


def read_rows(folder: Path, index: dict[str, Any], content: str) -> list[dict[str, Any]]:
    """The rows of a packed folder, which must be the bytes that were written."""
    path, expected = folder / ROWS[content], index[content]
    try:
        with gzip.open(path) as file:
            body = file.read(min(int(expected["bytes"]), MAX_INDEX_BYTES) + 1)  # a bomb would go on
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; copy or pack the data again") from None
    except (OSError, EOFError, zlib.error):
        raise DataError(f"{path}: cut short or altered; copy or pack the data again") from None
    if hashlib.sha256(body).hexdigest() != expected["sha256"]:
        raise DataError(f"{path}: altered; copy or pack the data again")
    return [json.loads(line) for line in body.decode().split("\n") if line]


def placed(number: Any, places: list[tuple[str, PackedImage]]) -> tuple[str, PackedImage]:
    """The image that a row names by its number.

    Raises:
        IndexError: there is none.
    """
    if not isinstance(number, int) or not 0 <= number < len(places):
        raise IndexError(number)
    return places[number]


@contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Turns what a damaged index or row makes the reading code raise into one DataError that names the folder."""
    try:
        yield
    except DataError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise DataError(f"{folder}: its index is damaged; copy or pack the data again") from None


def verify_shards(folder: Path) -> list[str]:
    """The shards whose bytes are not those that were written."""
    index = read_index(folder)
    damaged = []
    for shard in index["shards"]:
        with open(folder / shard["name"], "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                damaged.append(shard["name"])
    return damaged
