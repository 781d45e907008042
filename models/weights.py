"""Checkpoint folders: written all at once, read strictly, every byte of the weights accounted for.

Knows our names, shapes and files; does not know training, requests, or other projects' checkpoints
(`conversion.py`, whose names are in `names.py`).

A folder holds config.json, model.safetensors, tokenizer.json, preprocessor_config.json, generation_config.json and the
model card README.md. The header of model.safetensors carries the SHA-256 of the tensors (names, types, shapes, bytes)
and of the files that give them their meaning, so that an altered byte is an error and not another answer.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from miss.models.card import default_card
from miss.models.config import ConfigError, GenerationConfig, MissConfig, PreprocessConfig, from_dict
from miss.models.files import atomic_folder
from miss.models.fitting import CheckpointError, LoadReport, fit
from miss.models.tensor_file import digest, read_tensors, unshared, write_tensors
from miss.models.vqa import MissVQA

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
PREPROCESSOR, GENERATION, CARD = "preprocessor_config.json", "generation_config.json", "README.md"
SEALED = (CONFIG, PREPROCESSOR, TOKENIZER)  # files whose digests stand in the header of the weights
MODEL_TYPE, PRETRAINING_TYPE = "miss", "miss-pretraining"


class HasText(Protocol):
    """A tokenizer that can write itself, as `tokenizers.Tokenizer` can."""

    def to_str(self) -> str: ...


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
    objective: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint folder from tensors under our names; see `save_checkpoint`. With an `objective` it is a
    pretraining model's."""
    contents = dict(files or {}) | config_files(config, quantization, objective)
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
        write_tensors(plain, temporary / WEIGHTS, metadata)


def config_files(
    config: MissConfig, quantization: Mapping[str, Any] | None = None, objective: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """The three JSON files of a configuration: the model's, the preprocessing's, the generation defaults'."""
    values = config.to_dict()
    preprocess, generation = values.pop("preprocess"), values.pop("generation")
    model = {"model_type": MODEL_TYPE, **values}
    if quantization is not None:
        model["quantization"] = dict(quantization)
    if objective is not None:
        model |= {"model_type": PRETRAINING_TYPE, "objective": dict(objective)}
    return {CONFIG: _json(model), PREPROCESSOR: _json(preprocess), GENERATION: _json(generation)}


def read_config(folder: str | os.PathLike[str]) -> tuple[MissConfig, dict[str, Any] | None]:
    """The configuration of a checkpoint folder, and how its tensors are packed (None where they are not).

    Raises:
        ConfigError: an unknown key or a wrong value; the message names the file.
        CheckpointError: a file is missing or is not JSON.
    """
    folder = Path(folder)
    values = read_json(folder / CONFIG)
    model_type = values.pop("model_type", None)
    if model_type != MODEL_TYPE:
        raise CheckpointError(
            f'{folder / CONFIG}: model_type is {model_type!r}; wanted "{MODEL_TYPE}": translate other checkpoints with '
            f"`miss convert`"
        )
    quantization = values.pop("quantization", None)
    return configuration(folder, values), quantization


def configuration(folder: Path, values: dict[str, Any]) -> MissConfig:
    """The configuration of a folder from what its config.json says of it and the files beside.

    Raises:
        ConfigError, CheckpointError: as `read_config`.
    """
    parts: dict[str, tuple[str, type]] = {
        "preprocess": (PREPROCESSOR, PreprocessConfig),
        "generation": (GENERATION, GenerationConfig),
    }
    for key, (name, kind) in parts.items():
        if key in values:
            raise ConfigError(f"{folder / CONFIG}: {key} does not belong here: it stands in {name}")
        if name == GENERATION and not (folder / name).exists():
            continue
        values[key] = read_json(folder / name)
        with naming(folder / name):
            from_dict(kind, values[key])
    with naming(folder / CONFIG):
        return MissConfig.from_dict(values)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file's name before a configuration's errors."""
    try:
        yield
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from None


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

    Packed (quantized) tensors are unpacked to float32. No model is returned unless everything has been checked.

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
    config, tensors, raw, header = _read(folder)
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
    if verify:
        verify_files(folder, raw, header)
    return model, dataclasses.replace(report, digest=header.get("sha256", ""))


def read_checkpoint(folder: str | os.PathLike[str], *, verify: bool = True) -> tuple[MissConfig, dict[str, Tensor]]:
    """A folder's configuration and its tensors, unpacked, not yet held against the configuration's shapes.

    Raises:
        CheckpointError, ConfigError: as `load_checkpoint`.
    """
    config, tensors, raw, header = _read(Path(folder))
    if verify:
        verify_files(Path(folder), raw, header)
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
    model = empty_model(config)
    chosen, report = fit(_shapes(model), tensors, allow_missing, allow_unexpected, allow_resize, where)
    state = {name: _placed(value, device, dtype) for name, value in unshared(chosen).items()}
    state |= tied_names(state, config)
    model.load_state_dict(state, assign=True)
    return model.eval(), report


def model_shapes(config: MissConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this configuration holds, and its shape."""
    return _shapes(empty_model(config))


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
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}; wanted a JSON object")
    return values


def _read(folder: Path) -> tuple[MissConfig, dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """Configuration, tensors, the tensors as the file has them (the same where nothing is packed), and its header."""
    config, quantization = read_config(folder)
    raw, header = read_tensors(folder / WEIGHTS)
    tensors = raw if quantization is None else _unpacked(folder, raw, quantization)
    return config, tensors, raw, header


def verify_files(
    folder: Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    after_each: Callable[[], None] = lambda: None,
) -> None:
    """Compares the digests that the header carries; a file without them was not written by us and has none to fail."""
    if "sha256" in header and digest(tensors, after_each) != header["sha256"]:
        raise CheckpointError(
            f"{folder / WEIGHTS}: altered since it was written (its tensors do not have the SHA-256 that its header "
            f"states): copy it again"
        )
    try:
        seals = json.loads(header.get("files", "{}"))
        plain = all(Path(name).name == name and len(name.encode()) < 256 for name in seals)
    except (ValueError, TypeError, RecursionError):
        plain = False
    if not plain or not isinstance(seals, dict):
        raise CheckpointError(f"{folder / WEIGHTS}: altered since it was written (its header is not readable)")
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


def tied_names(state: Mapping[str, Tensor], config: MissConfig) -> dict[str, Tensor]:
    """The decoder's names for a shared embedding table, which a file does not hold twice."""
    if not config.tie_embeddings:
        return {}
    return {f"decoder.{n.removeprefix('encoder.')}": v for n, v in state.items() if _is_embedding(n)}


def _is_embedding(name: str) -> bool:
    return name.startswith("encoder.embeddings.")


def _is_tied(name: str, config: MissConfig) -> bool:
    return config.tie_embeddings and name.startswith("decoder.embeddings.")


class _Uninitialised(TorchFunctionMode):
    """Leaves out initial values: on tensors without memory they cost 1.3 s of imports and change nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init" or getattr(func, "__name__", "") in _IN_PLACE:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


_IN_PLACE = frozenset({"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"})


def empty_model(config: MissConfig) -> MissVQA:
    """A model without memory for its weights."""
    with torch.device("meta"), _Uninitialised():
        return MissVQA(config)


def _shapes(model: MissVQA) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in saved_state(model).items()}


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
