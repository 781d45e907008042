"""The image tensors that training reads: decoded pixels, or tokens that a frozen image encoder made of them once.

Knows arrays on disk, views of images and the image encoder; does not know questions, losses or optimisers.

Both are kept as plain arrays in files that are mapped into memory, named by a hash of all that they depend on, so that
a second run (or a resumed one) finds them. Shapes: I images, S side in pixels, N tokens, C width.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from miss.engine.data.augment import Limits, View, augment, draw_view, hash64

_COPY, _VIEW, _KEEP = 11, 12, 13  # what a hash is for


def digest(*parts: object) -> str:
    """32 hexadecimal digits that depend on everything in `parts` (anything that JSON can hold)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def image_number(image_key: str) -> int:
    """A stable number for an image, for hashes: the same whatever else is in the mix."""
    return int.from_bytes(hashlib.sha256(image_key.encode()).digest()[:8], "big")


def weights_digest(module: nn.Module) -> str:
    """A hash of a module's parameters: names, shapes, every bit."""
    total = hashlib.sha256()
    for name, parameter in module.named_parameters():
        total.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode())
        total.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()[:32]


def cached_array(path: Path, shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[Tensor], None]) -> Tensor:
    """The array in the file `path`, mapped; where there is none, `fill` writes it first, aside, renamed when whole."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if not (path.is_file() and path.stat().st_size == size):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(aside, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows here, not as a crash in a mapped write
            fill(torch.from_file(str(aside), shared=True, size=count, dtype=dtype).view(shape))
            os.replace(aside, path)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; {size / 1e6:.0f} MB are needed for", str(path)) from error
        finally:
            aside.unlink(missing_ok=True)
    return torch.from_file(str(path), shared=False, size=count, dtype=dtype).view(shape)


def stamp(image: Any) -> tuple[object, ...]:
    """What tells one image from another without reading it: a file's path, size and time, else its description."""
    if isinstance(image, Path):
        status = image.stat()
        return str(image), status.st_size, status.st_mtime_ns
    return (repr(image),)


def decode_all(
    images: Sequence[Any], size: int, decode: Callable[[Any], np.ndarray], key: str, cache: Path, workers: int
) -> Tensor:
    """All images as the model sees them: uint8 (I, S, S, 3), decoded and resized once by `decode`.

    Raises:
        ValueError: images that cannot be decoded, all of them named (the first ten) with their reasons.
    """
    stamps = [stamp(image) for image in images]

    def fill(out: Tensor) -> None:
        failures: list[str] = []

        def one(i: int) -> None:
            try:
                out[i] = torch.from_numpy(np.ascontiguousarray(decode(images[i])))
            except ValueError as error:
                failures.append(f"{images[i].name if isinstance(images[i], Path) else images[i]}: {error}")

        with ThreadPoolExecutor(workers) as pool:
            list(tqdm(pool.map(one, range(len(images))), total=len(images), desc="decoding images", disable=None))
        if failures:
            more = f" and {len(failures) - 10} more" if len(failures) > 10 else ""
            raise ValueError(
                f"{len(failures)} of {len(images)} images cannot be read: {'; '.join(sorted(failures)[:10])}{more}. "
                f"`miss data check` lists them all"
            )

    path = cache / f"pixels-{digest(key, size, stamps)}.bin"
    return cached_array(path, (len(images), size, size, 3), torch.uint8, fill)


class PixelStore:
    """Pixels, each visit augmented anew where `limits` are given (the visit's number decides how)."""

    def __init__(
        self,
        pixels: Tensor,
        numbers: Sequence[int],
        limits: Limits | None,
        seed: int,
        background: tuple[int, int, int],
        workers: int = 1,
    ) -> None:
        self.pixels, self.numbers, self.limits, self.seed, self.background = pixels, numbers, limits, seed, background
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="augment")

    def content(self) -> str:
        """A hash of all pixels."""
        return hashlib.sha256(self.pixels.numpy().data).hexdigest()

    def view(self, image: int, visit: int) -> View:
        return View() if self.limits is None else draw_view(self.limits, self.seed, _VIEW, self.numbers[image], visit)

    def gather(self, images: Sequence[int], visits: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """(pixels uint8 (I, S, S, 3), None)."""

        def one(image: int, visit: int) -> np.ndarray:
            return augment(self.pixels[image].numpy(), self.view(image, visit), self.background)

        # NumPy copies on one thread: a second OpenMP team, beside the one of the training step, would stall both.
        return torch.from_numpy(np.stack(list(self._pool.map(one, images, visits)))), None


class FeatureStore:
    """Tokens of every image, in one or more copies of which the first is the image itself and the others augmented.

    `keep`: the share of the patch tokens that a visit gets, [CLS] besides.
    """

    def __init__(self, tokens: Tensor, copies: Sequence[int], seed: int, keep: float = 1.0) -> None:
        self.copies, self.seed, self.dtype = list(copies), seed, tokens.dtype
        self.num_patches = tokens.shape[1] - 1
        self.num_kept = max(1, round(keep * self.num_patches))
        # As bytes for NumPy, which has no bfloat16 and copies on one thread: a second OpenMP team, beside the one of
        # the training step, would stall both.
        self._bytes = tokens.view(torch.uint8).numpy()
        self._first = np.cumsum([0, *copies])[:-1]

    def gather(self, images: Sequence[int], visits: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """(None, tokens (I, N, C)); which copy a visit gets depends on seed, image and visit alone."""
        chosen = [hash64(self.seed, _COPY, i, visit) % self.copies[i] for i, visit in zip(images, visits, strict=True)]
        rows = self._first[list(images)] + chosen
        if self.num_kept == self.num_patches:
            return None, torch.from_numpy(self._bytes[rows]).view(self.dtype)
        kept = np.stack([self._kept(i, visit) for i, visit in zip(images, visits, strict=True)])
        return None, torch.from_numpy(self._bytes[rows[:, None], kept]).view(self.dtype)

    def _kept(self, image: int, visit: int) -> np.ndarray:
        """Which tokens a visit gets: [CLS] and a random subset of the patches, in order."""
        random = np.random.default_rng(hash64(self.seed, _KEEP, image, visit))
        return np.concatenate([[0], np.sort(random.permutation(self.num_patches)[: self.num_kept]) + 1])

    @classmethod
    def build(
        cls,
        encode: Callable[[Tensor], Tensor],
        key: str,
        pixels: PixelStore,
        copies: Sequence[int],
        dtype: torch.dtype,
        cache: Path,
        batch: int = 8,
        keep: float = 1.0,
    ) -> "FeatureStore":
        """Encodes each image `copies[i]` times; `key` says what `encode` is (weights, preprocessing, precision)."""
        jobs = [(i, k) for i, n in enumerate(copies) for k in range(n)]
        shape = (len(jobs), *encode_batch(encode, pixels, jobs[:1]).shape[1:])

        def fill(out: Tensor) -> None:
            for start in tqdm(range(0, len(jobs), batch), desc="encoding images", unit_scale=batch, disable=None):
                part = jobs[start : start + batch]
                out[start : start + len(part)] = encode_batch(encode, pixels, part).to("cpu", dtype)

        changes = (pixels.seed, str(pixels.limits)) if max(copies) > 1 else ("as they are",)
        name = digest(key, shape, str(dtype), *changes, pixels.numbers, list(copies))
        content = digest(name, pixels.content())
        return cls(cached_array(cache / f"tokens-{content}.bin", shape, dtype, fill), copies, pixels.seed, keep)


@torch.no_grad()
def encode_batch(encode: Callable[[Tensor], Tensor], pixels: PixelStore, jobs: Sequence[tuple[int, int]]) -> Tensor:
    """Tokens of (image, copy) pairs; copy 0 is the image as it is."""
    views = [View() if copy == 0 else pixels.view(image, copy) for image, copy in jobs]
    arrays = [
        augment(pixels.pixels[image].numpy(), view, pixels.background)
        for (image, _), view in zip(jobs, views, strict=True)
    ]
    return encode(torch.from_numpy(np.stack(arrays)))


@torch.no_grad()
def channel_statistics(
    encode: Callable[[Tensor], Tensor], key: str, pixels: PixelStore, cache: Path, batch: int = 8
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float64 (C,), of the tokens of all images as they are; `key` as for the tokens."""
    width = encode_batch(encode, pixels, [(0, 0)]).shape[-1]
    images = range(len(pixels.pixels))

    def fill(out: Tensor) -> None:
        total, squares, count = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64), 0
        for start in tqdm(range(0, len(images), batch), desc="token statistics", unit_scale=batch, disable=None):
            tokens = encode_batch(encode, pixels, [(i, 0) for i in images[start : start + batch]])
            tokens = tokens.double().flatten(0, 1).cpu()
            total, squares, count = total + tokens.sum(0), squares + tokens.square().sum(0), count + len(tokens)
        out[0] = total / count
        out[1] = (squares / count - out[0].square()).clamp_min(0).sqrt().clamp_min(1e-6)

    path = cache / f"statistics-{digest(key, pixels.content())}.bin"
    mean, deviation = cached_array(path, (2, width), torch.float64, fill).unbind(0)
    return mean, deviation


@torch.no_grad()
def fold_standardisation(norm: nn.Module, mean: Tensor, deviation: Tensor) -> None:
    """Makes a LayerNorm give (output - mean) / deviation, exactly: weight / deviation, (bias - mean) / deviation."""
    weight, bias = norm.weight, norm.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    weight.copy_(weight.double() / deviation)
    bias.copy_((bias.double() - mean) / deviation)
