"""Checkpoint folders: written all at once, read strictly, every byte of the weights accounted for.

Knows our names, shapes and files; does not know training, requests, or other projects' checkpoints (`foreign.py`, whose
names are in `names.py`).

A folder holds config.json, model.safetensors, tokenizer.json, preprocessor_config.json, generation_config.json and the
model card README.md. The header of model.safetensors carries the SHA-256 of the tensors (names, types, shapes, bytes)
and of the files that give them their meaning, so that an altered byte is an error and not another answer.
"""

import dataclasses
import fnmatch
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from miss.models.card import default_card
from miss.models.config import ConfigError, GenerationConfig, MissConfig, PreprocessConfig, from_dict
from miss.models.files import atomic_folder
from miss.models.vision import interpolate_positions
from miss.models.vqa import MissVQA

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
PREPROCESSOR, GENERATION, CARD = "preprocessor_config.json", "generation_config.json", "README.md"
SEALED = (CONFIG, PREPROCESSOR, TOKENIZER)  # files whose digests stand in the header of the weights
MODEL_TYPE = "miss"
POSITIONS = "vision.position_embedding"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as it is; the message names the file or the tensor."""


class HasText(Protocol):
    """A tokenizer that can write itself, as `tokenizers.Tokenizer` can."""

    def to_str(self) -> str: ...


@dataclass(frozen=True)
class Resized:
    """A tensor that was interpolated to another shape."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint's tensors.

    matched:    taken as they are
    missing:    expected, not there; freshly initialised because that was allowed
    unexpected: there, not expected; left out because that was allowed
    resized:    interpolated to another shape
    dropped:    left out by rule (a conversion's momentum twins, queues and copies)
    digest:     SHA-256 of the tensors, "" where the file carries none
    """

    matched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    resized: tuple[Resized, ...] = ()
    dropped: tuple[str, ...] = ()
    digest: str = ""

    def __str__(self) -> str:
        lines = [
            f"{len(self.matched)} tensors matched, {len(self.missing)} missing, {len(self.unexpected)} unexpected, "
            f"{len(self.resized)} resized, {len(self.dropped)} dropped"
        ]
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected), ("dropped", self.dropped)):
            if names:
                lines.append(f"  {title}: {shown(names)}")
        lines += [f"  resized: {r.name} {list(r.before)} -> {list(r.after)}" for r in self.resized]
        return "\n".join(lines)


def save_checkpoint(
    model: MissVQA,
    folder: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | HasText | None = None,
    card: str | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a model's checkpoint folder, all of it or nothing.

    Args:
        tokenizer: a tokenizer.json, a folder that holds one, or a tokenizer object; None keeps the one that `folder`
            has, if any.
        card: the model card; None keeps the one that `folder` has, or writes a plain one.
        files: further files of the folder, by name.

    Raises:
        CheckpointError: the tokenizer is not there.
        OSError: the folder cannot be written; what it held is then unchanged.
    """
    write_checkpoint(
        model.config, saved_state(model), folder, tokenizer=read_tokenizer(tokenizer), card=card, files=files
    )


def saved_state(model: MissVQA) -> dict[str, Tensor]:
    """The tensors that a file holds: the state dict without the decoder's names for a shared embedding table."""
    state = model.state_dict()
    return {name: value for name, value in state.items() if not _is_tied(name, model.config)}


def write_checkpoint(
    config: MissConfig,
    tensors: Mapping[str, Tensor],
    folder: str | os.PathLike[str],
    *,
    tokenizer: bytes | None = None,
    card: str | None = None,
    files: Mapping[str, bytes] | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint folder from tensors under our names; see `save_checkpoint`."""
    contents = dict(files or {}) | config_files(config, quantization)
    folder = Path(folder)
    if tokenizer is None and (folder / TOKENIZER).is_file():
        tokenizer = (folder / TOKENIZER).read_bytes()
    if tokenizer is not None:
        contents[TOKENIZER] = tokenizer
    if card is not None or not (folder / CARD).is_file():
        contents[CARD] = (card or default_card(config)).encode()
    plain = unshared({name: value.detach().cpu() for name, value in tensors.items()})
    seals = {name: hashlib.sha256(contents[name]).hexdigest() for name in SEALED if name in contents}
    metadata = {"format": "pt", "sha256": digest(plain), "files": json.dumps(seals, sort_keys=True)}
    with atomic_folder(folder) as temporary:
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
        save_file(plain, temporary / WEIGHTS, metadata)


def config_files(config: MissConfig, quantization: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """The three JSON files of a configuration: the model's, the preprocessing's, the generation defaults'."""
    values = config.to_dict()
    preprocess, generation = values.pop("preprocess"), values.pop("generation")
    model = {"model_type": MODEL_TYPE, **values}
    if quantization is not None:
        model["quantization"] = dict(quantization)
    return {CONFIG: _json(model), PREPROCESSOR: _json(preprocess), GENERATION: _json(generation)}


def read_config(folder: str | os.PathLike[str]) -> tuple[MissConfig, dict[str, Any] | None]:
    """The configuration of a checkpoint folder, and how its tensors are packed (None where they are not).

    Raises:
        ConfigError: an unknown key or a wrong value; the message names the file.
        CheckpointError: a file is missing or is not JSON.
    """
    folder = Path(folder)
    values = read_json(folder / CONFIG)
    kind = values.pop("model_type", None)
    if kind != MODEL_TYPE:
        raise CheckpointError(
            f'{folder / CONFIG}: model_type is {kind!r}; wanted "{MODEL_TYPE}": translate other checkpoints with '
            f"`miss convert`"
        )
    quantization = values.pop("quantization", None)
    try:
        preprocess = from_dict(PreprocessConfig, read_json(folder / PREPROCESSOR))
    except ConfigError as error:
        raise ConfigError(f"{folder / PREPROCESSOR}: {error}") from None
    try:
        has_generation = (folder / GENERATION).exists()
        generation = from_dict(GenerationConfig, read_json(folder / GENERATION) if has_generation else {})
    except ConfigError as error:
        raise ConfigError(f"{folder / GENERATION}: {error}") from None
    try:
        for key, name in (("preprocess", PREPROCESSOR), ("generation", GENERATION)):
            if key in values:
                raise ConfigError(f"{key} does not belong here: it stands in {name}")
        config = MissConfig.from_dict(values)
        return dataclasses.replace(config, preprocess=preprocess, generation=generation), quantization
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from None


def load_checkpoint(
    folder: str | os.PathLike[str],
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    allow_resize: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> tuple[MissVQA, LoadReport]:
    """The model of a checkpoint folder, in evaluation mode, and what became of each tensor.

    Packed (quantized) tensors are unpacked to float32. Everything is checked before a model exists.

    Args:
        allow_missing: patterns (`decoder.cross_kv.*`) of tensors that may be absent; they are freshly initialised.
        allow_unexpected: patterns of tensors that may be there without being used.
        allow_resize: whether a position table of another grid is interpolated to the configuration's.
        dtype: what floating tensors become; None leaves them as the file has them.
        verify: whether digests are compared.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or tensors are missing, unexpected or of a wrong
            shape; the message names them.
        ConfigError: the configuration has an unknown key or a wrong value.
    """
    folder = Path(folder)
    config, tensors, found = _read(folder, verify)
    model, report = build(
        config,
        tensors,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
        allow_resize=allow_resize,
        device=device,
        dtype=dtype,
        where=str(folder / WEIGHTS),
    )
    return model, dataclasses.replace(report, digest=found)


def read_checkpoint(folder: str | os.PathLike[str], *, verify: bool = True) -> tuple[MissConfig, dict[str, Tensor]]:
    """A folder's configuration and its tensors, unpacked, not yet held against the configuration's shapes.

    Raises:
        CheckpointError, ConfigError: as `load_checkpoint`.
    """
    config, tensors, _ = _read(Path(folder), verify)
    return config, tensors


def build(
    config: MissConfig,
    tensors: Mapping[str, Tensor],
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    allow_resize: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    where: str = "the checkpoint",
) -> tuple[MissVQA, LoadReport]:
    """A model that takes `tensors` (our names) for its own, without a copy; see `load_checkpoint`."""
    model = _empty_model(config)
    chosen, report = fit(_shapes(model), tensors, allow_missing, allow_unexpected, allow_resize, where)
    state = {name: _placed(value, device, dtype) for name, value in unshared(chosen).items()}
    if config.tie_embeddings:
        state |= {f"decoder.{n.removeprefix('encoder.')}": v for n, v in state.items() if _is_embedding(n)}
    model.load_state_dict(state, assign=True)
    return model.eval(), report


def model_shapes(config: MissConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this configuration holds, and its shape."""
    return _shapes(_empty_model(config))


def fit(
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    allow_resize: bool = False,
    where: str = "the checkpoint",
) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors that a model of these shapes takes.

    Raises:
        CheckpointError: what is missing, unexpected or of a wrong shape and not allowed to be, all of it at once.
    """
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    chosen: dict[str, Tensor] = {}
    resized, wrong = [], []
    for name, shape in expected.items():
        value = tensors.get(name)
        if value is None:
            continue
        before = tuple(value.shape)
        if before != shape and allow_resize and name == POSITIONS and _is_grid(before, shape):
            value = resize_positions(value, shape[1])
            resized.append(Resized(name, before, shape))
        if tuple(value.shape) != shape or not value.is_floating_point():
            wrong.append(f"{name} is {list(before)} {_kind(value)}, wanted {list(shape)} floats")
        chosen[name] = value
    problems = [
        _listed("wrong shape", wrong),
        _listed("missing", [n for n in missing if not allowed(n, allow_missing)]),
        _listed("unexpected", [n for n in unexpected if not allowed(n, allow_unexpected)]),
    ]
    if any(problems):
        raise CheckpointError(f"{where}: does not fit its configuration: {'; '.join(filter(None, problems))}")
    matched = [name for name in chosen if not any(r.name == name for r in resized)]
    for name in missing:
        chosen[name] = fresh_tensor(name, expected[name])
    return chosen, LoadReport(tuple(matched), tuple(missing), tuple(unexpected), tuple(resized))


def resize_positions(table: Tensor, num_positions: int) -> Tensor:
    """A position table (1, 1 + n*n, C) on another square grid, bicubic: (1, num_positions, C)."""
    side = _side(num_positions)
    return interpolate_positions(table, (side, side))


def fresh_tensor(name: str, shape: tuple[int, ...], seed: int = 0, std: float = 0.02) -> Tensor:
    """An initial value for a tensor, the same on every machine: norms 1, biases 0, the rest normal (std 0.02)."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if ".norm" in name and len(shape) == 1:
        return torch.ones(shape)
    own = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
    return torch.empty(shape).normal_(0.0, std, generator=torch.Generator().manual_seed(own))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a safetensors file, in memory of its own, and the file's metadata.

    Raises:
        CheckpointError: the file is missing, truncated, or not a safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a checkpoint folder holds its tensors in {WEIGHTS}")
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned: the file may be overwritten while the model lives, and its tensors are aligned to 8 bytes only.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: truncated, altered or not a safetensors file ({size} bytes; {error}): copy or convert it again"
        ) from None


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


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, whatever order a file has them in."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def read_tokenizer(source: str | os.PathLike[str] | HasText | None) -> bytes | None:
    """The text of a tokenizer.json: from the file, from a folder that holds it, or from a tokenizer object."""
    if source is None:
        return None
    if not isinstance(source, str | os.PathLike):
        return source.to_str().encode()
    path = Path(source)
    path = path / TOKENIZER if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; wanted a tokenizer.json, or a folder that holds one")
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: there is no such file, or it does not hold a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a checkpoint folder has {CONFIG}, {WEIGHTS} and {PREPROCESSOR}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}; wanted a JSON object")
    return values


def _read(folder: Path, verify: bool) -> tuple[MissConfig, dict[str, Tensor], str]:
    config, quantization = read_config(folder)
    tensors, header = read_tensors(folder / WEIGHTS)
    if verify:
        _verify(folder, tensors, header)
    if quantization is not None:
        tensors = _unpacked(folder, tensors, quantization)
    return config, tensors, header.get("sha256", "")


def _verify(folder: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Compares the digests that the header carries; a file without them was not written by us and has none to fail."""
    if "sha256" in header and digest(tensors) != header["sha256"]:
        raise CheckpointError(
            f"{folder / WEIGHTS}: altered since it was written (its tensors do not have the SHA-256 that its header "
            f"states): copy it again"
        )
    try:
        seals = json.loads(header.get("files", "{}"))
    except ValueError:
        raise CheckpointError(
            f"{folder / WEIGHTS}: altered since it was written (its header is not readable)"
        ) from None
    for name, seal in seals.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file, but {WEIGHTS} was saved with one: copy the folder again")
        if hashlib.sha256(path.read_bytes()).hexdigest() != seal:
            raise CheckpointError(
                f"{path}: altered since {WEIGHTS} was saved with it: restore it, or, where the change is meant, "
                f"write the folder anew with `miss convert --no-verify`"
            )


def _unpacked(folder: Path, tensors: dict[str, Tensor], quantization: Mapping[str, Any]) -> dict[str, Tensor]:
    from miss.models.quantized import unpack_tensors  # not needed, and so not imported, for plain checkpoints

    try:
        return unpack_tensors(tensors, quantization)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: its packed tensors do not fit its configuration: {error}") from None


def _placed(value: Tensor, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
    return value.to(device, dtype if value.is_floating_point() else None)


def _is_grid(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return (
        len(before) == 3 and (before[0], before[2]) == (after[0], after[2]) and _side(before[1]) ** 2 + 1 == before[1]
    )


def _side(num_positions: int) -> int:
    return round((num_positions - 1) ** 0.5)


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _is_embedding(name: str) -> bool:
    return name.startswith("encoder.embeddings.")


def _is_tied(name: str, config: MissConfig) -> bool:
    return config.tie_embeddings and name.startswith("decoder.embeddings.")


def _empty_model(config: MissConfig) -> MissVQA:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return MissVQA(config)


def _shapes(model: MissVQA) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in saved_state(model).items()}


def allowed(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _listed(title: str, names: Sequence[str]) -> str:
    return f"{title}: {shown(names)}" if names else ""


def shown(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
