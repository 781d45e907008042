"""One safetensors file: written the same each time, read in one pass, with a digest over all of it.

Knows tensors by name and bytes; does not know what they are for.
"""

import hashlib
import json
import mmap
import os
import sys
from collections.abc import Callable, Mapping
from io import FileIO
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from miss.models.fitting import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BOOL": torch.bool,
}  # as the file format calls them

# What a file that is none makes the library raise, and PyTorch of a size beyond 64 bits, which no bytes may have.
BROKEN = (SafetensorError, KeyError, TypeError, RuntimeError)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Tensors that share no memory (`unshared`), with metadata beside them, as a safetensors file."""
    save_file(dict(tensors), path, dict(metadata))
    _sort_metadata(path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a safetensors file, in memory of its own, and the file's metadata.

    Raises:
        CheckpointError: the file is missing, truncated, or not a safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a checkpoint folder holds its tensors there")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            empty = {name: torch.empty(s.get_shape(), dtype=_DTYPES[s.get_dtype()]) for name, s in slices.items()}
            metadata = file.metadata() or {}
        # Read, not mapped: the file may be overwritten while the model lives, mapped tensors are aligned to 8 bytes
        # only, and reading is twice as fast. The library has checked that the tensors lie side by side to the end.
        with path.open("rb", buffering=0) as raw:
            raw.seek(-sum(tensor.nbytes for tensor in empty.values()), os.SEEK_END)
            for name, tensor in empty.items():
                _fill(tensor, raw, f"{path}: truncated while it was read, at {name}")
        return empty, metadata
    except BROKEN as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: truncated, altered or not a safetensors file ({size} bytes; {error}): copy or convert it again"
        ) from None


class MappedFile(NamedTuple):
    """A safetensors file's tensors as views of the mapped file, and its metadata. Pages are read when they are used,
    shared between processes, and dropped where memory is short. The views are for reading. The file is mapped for as
    long as there is one of them, or this.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    memory: mmap.mmap

    def forget(self) -> None:
        """Gives back the memory of what was read; it is read again where it is used again."""
        if sys.platform.startswith("linux"):
            self.memory.madvise(mmap.MADV_DONTNEED)


def map_tensors(path: Path) -> MappedFile:
    """A safetensors file, mapped.

    Raises:
        CheckpointError: as `read_tensors`.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a checkpoint folder holds its tensors there")
    size = path.stat().st_size
    try:
        with safe_open(path, framework="pt") as file:  # checks the header, and that the tensors fill the file
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            metadata = file.metadata() or {}
            shapes = {name: (s.get_shape(), _DTYPES[s.get_dtype()]) for name, s in slices.items()}
    except BROKEN as error:
        raise CheckpointError(
            f"{path}: truncated, altered or not a safetensors file ({size} bytes; {error}): copy or convert it again"
        ) from None
    with path.open("rb") as raw:
        memory = mmap.mmap(raw.fileno(), size, access=mmap.ACCESS_COPY)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    mapped, end = {}, size
    for name, (shape, dtype) in reversed(shapes.items()):
        start = end - prod(shape) * dtype.itemsize
        part = whole[start:end]
        if start % dtype.itemsize:  # other writers' files; the library's are aligned
            part = part.clone()
        mapped[name] = part.view(dtype).view(shape)
        end = start
    return MappedFile(dict(reversed(mapped.items())), metadata, memory)


def _fill(tensor: Tensor, file: FileIO, message: str) -> None:
    """Reads a tensor's bytes from a file's position on."""
    left = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
    while len(left):
        size = file.readinto(left)
        if not size:
            raise CheckpointError(message)
        left = left[size:]


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, contiguous and each with memory of its own; only those that share or waste some are copied."""
    seen: set[int] = set()
    result = {}
    for name, value in tensors.items():
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes or not value.is_contiguous():
            value = value.clone(memory_format=torch.contiguous_format)
        seen.add(value.untyped_storage().data_ptr())
        result[name] = value
    return result


def digest(tensors: Mapping[str, Tensor], after_each: Callable[[], None] = lambda: None) -> str:
    """SHA-256 over names, types, shapes and bytes, whatever order a file has them in."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
        after_each()
    return total.hexdigest()


def _sort_metadata(path: Path) -> None:
    """Puts a file's metadata in order: the library writes it in another one each time, so that copies would differ."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the same header in another order is as long, but for the spaces at its end"
        file.seek(8)
        file.write(text.ljust(size))
