"""Which tensors of a checkpoint are packed, how, and what that costs: the policy of `miss quantize`.

Knows a model's tensors, byte budgets and (where it is handed batches) what the answers depend on; does not know how
packed bytes lie, data sets or flags.

Schemes
  int8         every matrix to int8 by rows, multiplied with int8 activations; outlier channels scaled where something
               before takes it up, layers whose activations lose too much kept in bf16 (of the decoder: int8 weights
               alone); the rest stays float32
  int8-weight  int8 by rows, the activations as they are
  fp8          linear layers to float8 (e4m3) by rows, multiplied with float8 activations; tables to int8 by rows; the
               rest stays float32
  int4-weight  linear layers to int4 in groups of 64, tables to int8 by rows; the rest stays float32
  nf4, llm-int8   bitsandbytes' forms of the linear layers; tables to int8 by rows; the rest stays float32
  int4         as int4-weight, with the rest in float16
  small-mixed  as int4, but each linear layer gets the form that saves the most error for its bytes until the budget is
               spent: int4 in groups of 128, 64 or 32, or int8
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from miss.engine.runtime.calibration import Moments, collect
from miss.engine.runtime.forms import FORMS, QuantizeError, form_bytes, pack, with_int8_activations, within_budget
from miss.engine.runtime.smoothing import rounding_errors, smooth
from miss.kernels.quant_linear import PackedWeight, pack_int8, unpack
from miss.models.config import MissConfig
from miss.models.fitting import POSITIONS
from miss.models.quantized import Quantization, linear_modules, pack_tensors
from miss.models.tensor_file import digest
from miss.models.vqa import MissVQA, VQABatch
from miss.models.weights import saved_state

Scheme = Literal["int8", "int8-weight", "fp8", "int4-weight", "nf4", "llm-int8", "int4", "small-mixed"]
SCHEMES = ("int8", "int8-weight", "fp8", "int4-weight", "nf4", "llm-int8", "int4", "small-mixed")
_FORM = {
    "int8-weight": "int8",
    "fp8": "fp8",
    "int4-weight": "int4-64",
    "int4": "int4-64",
    "nf4": "nf4",
    "llm-int8": "llm-int8",
}
_HALF = ("int4", "small-mixed")  # schemes whose small tensors are float16
TOWERS = ("vision.", "encoder.", "decoder.")  # in the order in which they run
WORDS = "embeddings.word.weight"
__all__ = ["FORMS", "SCHEMES", "Options", "Packed", "QuantizeError", "agreement", "encoded", "form_bytes", "quantize"]
_HALF_LARGEST = 65504.0


@dataclass(frozen=True)
class Options:
    """How to pack.

    budget:        bytes of tensors in the file (small-mixed)
    max_positions: rows of the text position tables that are kept; None keeps all
    compensate:    with batches, rounding errors are made good within each layer (GPTQ) and in its bias
    smooth:        with batches, outlier channels are scaled (int8)
    float_share:   of all products, that may keep their activations as they are (int8)
    """

    scheme: Scheme = "small-mixed"
    budget: int | None = None
    max_positions: int | None = None
    compensate: bool = True
    smooth: bool = True
    float_share: float = 0.08


@dataclass
class Packed:
    """What a checkpoint folder is written from, and how it came about."""

    config: MissConfig
    tensors: dict[str, Tensor]
    quantization: Quantization
    forms: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def quantize(
    model: MissVQA,
    options: Options,
    batches: Sequence[VQABatch] = (),
    progress: Callable[[str], object] = lambda layer: None,
) -> Packed:
    """Packs a model. The model's own weights become the packed ones', unpacked, as the packing goes on.

    Args:
        batches: training questions with answers; without them, errors are those of the weights alone.
        progress: told each linear layer that has been packed.

    Raises:
        QuantizeError: the budget is too small for any form, or a tensor cannot be packed.
        ImportError: bitsandbytes, which the scheme needs, is not installed.
    """
    parent = digest(saved_state(model))
    config, original = shortened(model.config, saved_state(model), options)
    moments = _moments(model, batches) if batches else {}
    alphas = smooth(model, original, moments) if options.scheme == "int8" and options.smooth else {}
    work = _Work(model, options, original, list(linear_modules(model)), moments)
    forms = work.choose(batches)
    layers = work.pack(forms, batches, progress)
    for name, alpha in alphas.items():
        layers[name]["alpha"] = alpha
    report = {
        "forms": _count(forms),
        "calibration_rows": sum(len(b.question_ids) for b in batches),
        "bytes_before": sum(4 * value.numel() for value in original.values()),
        "layers": layers,
    }
    shapes = {name: list(original[name].shape) for name in work.packed if original[name].dim() != 2}
    kept = [name for name, form in forms.items() if form == "bf16"]
    quantization = Quantization(scheme=options.scheme, shapes=shapes, parent=parent, report=report, kept=kept)
    tensors = pack_tensors({name: work.rest.get(name, value) for name, value in original.items()}, work.packed)
    return Packed(config, tensors, quantization, forms)


class _Work:
    """A packing under way. rest: what is not packed, as it is written; packed: what is."""

    def __init__(
        self,
        model: MissVQA,
        options: Options,
        original: dict[str, Tensor],
        names: list[str],
        moments: dict[str, Moments],
    ) -> None:
        self.model, self.options, self.original, self.names, self.moments = model, options, original, names, moments
        scheme = options.scheme
        self.packed = {name: _table(value) for name, value in original.items() if _is_table(name, scheme)}
        self.rest = {n: _plain(v, scheme) for n, v in original.items() if n not in self.packed and n not in names}

    def choose(self, batches: Sequence[VQABatch]) -> dict[str, str]:
        """The form of every linear layer."""
        options, weights = self.options, {name: self.original[name] for name in self.names}
        if options.scheme == "small-mixed":
            fixed = sum(t.nbytes for t in self.rest.values()) + sum(p.nbytes for p in self.packed.values())
            return within_budget(weights, self.names, self.moments, options.budget, fixed)
        if options.scheme == "int8":
            images = sum(len(batch.image_index.unique()) for batch in batches)
            rows = sum(len(batch.question_ids) for batch in batches)
            return with_int8_activations(weights, self.moments, images, rows, options.float_share)
        return dict.fromkeys(self.names, _FORM[options.scheme])

    def pack(
        self, forms: Mapping[str, str], batches: Sequence[VQABatch], progress: Callable[[str], object]
    ) -> dict[str, dict[str, Any]]:
        """Packs tower by tower, each calibrated on what the packed earlier ones give it -> what each layer lost."""
        for name, table in self.packed.items():
            _install(self.model, name, unpack(table))
        seen, layers = batches, {}
        for tower in TOWERS:
            stage = [name for name in self.names if name.startswith(tower)]
            fresh = self.moments
            if batches and self.options.compensate and tower != TOWERS[0]:
                seen = encoded(self.model, seen)
                fresh = _moments(self.model, seen, stage)
            for name in stage:
                layers[name] = self._layer(name, forms[name], fresh.get(name))
                progress(name)
        return layers

    def _layer(self, name: str, form: str, moments: Moments | None) -> dict[str, Any]:
        """Packs a layer, or keeps it -> its form and the relative error of its outputs (of its weights, where nothing
        is known of its inputs)."""
        weight = self.original[name]
        if form == "bf16":
            self.rest[name] = weight.bfloat16()
            lost = _weight_error(weight, self.rest[name].float())  # before `weight`, the model's own, becomes it
            _install(self.model, name, self.rest[name])
            return {"form": form, "error": _rounded(lost)}
        packed = pack(weight, form, moments, self.options.compensate)
        if moments is not None and moments.tokens:
            error, size = rounding_errors(weight.flatten(1), moments.sample, packed, packed.dynamic)
            found = float((error.sum() / size.sum().clamp_min(1e-30)).sqrt())
        else:
            found = _weight_error(weight.flatten(1), unpack(packed))
        bias = name.removesuffix("weight") + "bias"
        bends = moments is not None and (moments.suffices or form not in ("int8", "w8a8", "fp8"))
        if moments is not None and bends and bias in self.rest and self.options.compensate:
            new = corrected_bias(self.original[bias], weight, packed, moments)
            self.rest[bias] = _plain(new, self.options.scheme)
            self.model.get_parameter(bias).data.copy_(self.rest[bias])
        self.packed[name] = packed
        _install(self.model, name, unpack(packed))
        return {"form": form, "error": _rounded(found)}


def _weight_error(weight: Tensor, rounded: Tensor) -> float:
    return float((rounded - weight).norm() / weight.norm().clamp_min(1e-30))


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def shortened(config: MissConfig, tensors: dict[str, Tensor], options: Options) -> tuple[MissConfig, dict[str, Tensor]]:
    """Text position tables cut to `max_positions` rows.

    Raises:
        ConfigError: fewer than the questions or answers that the configuration allows.
    """
    keep = options.max_positions
    if keep is None or keep >= max(config.encoder.max_positions, config.decoder.max_positions):
        return config, tensors
    encoder, decoder = (replace(t, max_positions=min(keep, t.max_positions)) for t in (config.encoder, config.decoder))
    cut = {n: v[:keep].clone() if n.endswith("embeddings.position.weight") else v for n, v in tensors.items()}
    return replace(config, encoder=encoder, decoder=decoder), cut


def corrected_bias(bias: Tensor, weight: Tensor, packed: PackedWeight, moments: Moments) -> Tensor:
    """The bias that keeps the layer's mean output where it was: b + (W - Q) mean(x)."""
    if moments.weight == 0:
        return bias
    return bias + (weight.float() - unpack(packed)) @ (moments.mean / moments.weight)


def agreement(parent: MissVQA, child: MissVQA, batches: Sequence[VQABatch]) -> dict[str, Any]:
    """How far the packed model is from its parent on rows that it was not calibrated on, teacher-forced.

    Returns:
        rows; `same_tokens`, the share of rows whose most likely token is the parent's at every place; both losses, the
        mean over rows of the sum over tokens.
    """
    same, rows, losses = 0, 0, [0.0, 0.0]
    with torch.inference_mode():
        for batch in batches:
            answers = []
            for i, model in enumerate((parent, child)):
                (seen,) = encoded(model, [batch])
                answers.append(_most_likely(model, seen))
                losses[i] += float(model(seen).loss_per_row.sum())
            real = torch.arange(answers[0].shape[1])[None] < (batch.answer_lengths - 1)[:, None]
            same += int(((answers[0] == answers[1]) | ~real).all(1).sum())
            rows += len(real)
    rows = max(rows, 1)
    return {"rows": rows, "same_tokens": same / rows, "parent_loss": losses[0] / rows, "loss": losses[1] / rows}


def gap_where_they_part(
    model: MissVQA, pixels: Tensor, question: list[int], mine: list[int], other: list[int]
) -> float:
    """What the model's log-probability of `mine` lies above that of `other` at the first token in which they differ.

    Args:
        pixels: uint8 (S, S, 3). question: token ids. mine, other: generated token ids, not the same.
    """
    shared = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
    start = [model.config.tokens.dec, *mine[:shared]]
    if shared == min(len(mine), len(other)):  # one goes on where the other ran out of tokens
        return 0.0
    answers = torch.tensor([[*start, mine[shared]], [*start, other[shared]]])
    batch = VQABatch(
        pixels[None],
        None,
        torch.tensor([question, question]),
        torch.full((2,), len(question), dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        answers,
        torch.full((2,), answers.shape[1], dtype=torch.int32),
    )
    with torch.inference_mode():
        losses = model(batch).loss_per_row
    return float(losses[1] - losses[0])


def _most_likely(model: MissVQA, batch: VQABatch) -> Tensor:
    """The most likely next token at every place of the answers: int64 (R, A - 1)."""
    tokens = batch.image_tokens
    assert tokens is not None
    states = model.encode_questions(
        batch.question_ids, batch.question_lengths, model.project_images(tokens), batch.image_index
    )
    rows = torch.arange(len(states), dtype=torch.int32)
    hidden = model.decoder(
        batch.answer_ids[:, :-1],
        model.project_questions(states),
        rows,
        batch.question_lengths,
        batch.answer_lengths - 1,
    )
    return model.decoder.logits(model.decoder.head(hidden)).argmax(-1)


def _moments(model: MissVQA, batches: Sequence[VQABatch], names: Sequence[str] | None = None) -> dict[str, Moments]:
    wanted = None if names is None else set(names)
    return collect(model, batches, lambda name: wanted is None or name in wanted)


def encoded(model: MissVQA, batches: Sequence[VQABatch]) -> list[VQABatch]:
    """The batches with image tokens in place of pixels."""
    result = []
    with torch.no_grad():
        for batch in batches:
            if batch.pixels is not None:
                batch = replace(batch, pixels=None, image_tokens=model.encode_images(batch.pixels))
            result.append(batch)
    return result


def _is_table(name: str, scheme: str) -> bool:
    """Word tables and the patch projection: packed by rows, to int8. The image positions, too, where bytes count."""
    if name.endswith(WORDS) or name == "vision.patch_embed.weight":
        return True
    return name == POSITIONS and scheme in _HALF


def _table(value: Tensor) -> PackedWeight:
    """int8 by rows; a position table (1, N, C) counts as N rows."""
    return pack_int8(value[0] if value.dim() == 3 else value.flatten(1))


def _plain(value: Tensor, scheme: str) -> Tensor:
    """Norms, biases and small tables: float16 where it holds them, float32 elsewhere and where it does not."""
    fits = value.abs().max() <= _HALF_LARGEST if value.numel() else True
    return value.half() if scheme in _HALF and fits else value.float()


def _install(model: MissVQA, name: str, value: Tensor) -> None:
    weight = model.get_parameter(name).data
    weight.copy_(value.reshape(weight.shape))


def _count(forms: Mapping[str, str]) -> dict[str, int]:
    found = list(forms.values())
    return {form: found.count(form) for form in (*FORMS, "w8a8", "fp8", "nf4", "llm-int8", "bf16") if form in found}
