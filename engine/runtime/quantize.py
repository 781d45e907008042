"""Which tensors of a checkpoint are packed, how, and what that costs: the policy of `miss quantize`.

Knows a model's tensors, byte budgets and (where it is handed batches) what the answers depend on; does not know how
packed bytes lie, data sets or flags.

Schemes
  int8         every matrix to int8 by rows; the rest stays float32
  int4         linear layers to int4 in groups of 64, tables to int8 by rows; the rest to float16
  small-mixed  as int4, but each linear layer gets the form that saves the most error for its bytes until the budget is
               spent: int4 in groups of 128, 64 or 32, or int8
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from miss.engine.runtime.calibration import Moments, collect
from miss.engine.runtime.compensate import output_error, pack_int4_compensated
from miss.kernels.quant_linear import PackedWeight, pack_int4, pack_int8, unpack
from miss.models.config import MissConfig
from miss.models.fitting import POSITIONS
from miss.models.quantized import Quantization, linear_modules, pack_tensors
from miss.models.tensor_file import digest
from miss.models.vqa import MissVQA, VQABatch
from miss.models.weights import saved_state

Scheme = Literal["int8", "int4", "small-mixed"]
SCHEMES = ("int8", "int4", "small-mixed")
FORMS = ("int4-128", "int4-64", "int4-32", "int8")  # from the smallest to the most exact
TOWERS = ("vision.", "encoder.", "decoder.")  # in the order in which they run
WORDS = "embeddings.word.weight"
_HALF_LARGEST = 65504.0
_SAMPLED_ROWS = 48  # of a matrix, that its forms are compared on


class QuantizeError(ValueError):
    """A checkpoint that cannot be packed as asked."""


@dataclass(frozen=True)
class Options:
    """How to pack.

    budget:        bytes of tensors in the file (small-mixed)
    max_positions: rows of the text position tables that are kept; None keeps all
    compensate:    with batches, rounding errors are made good within each layer (GPTQ) and in its bias
    """

    scheme: Scheme = "small-mixed"
    budget: int | None = None
    max_positions: int | None = None
    compensate: bool = True


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
    """
    config, original = shortened(model.config, saved_state(model), options)
    parent = digest(saved_state(model))
    moments = _moments(model, batches) if batches else {}
    names = list(linear_modules(model))
    tables = {name: _table(value) for name, value in original.items() if _is_table(name, options.scheme)}
    rest = {name: _plain(v, options.scheme) for name, v in original.items() if name not in tables and name not in names}
    fixed = sum(t.nbytes for t in rest.values()) + sum(p.nbytes for p in tables.values())
    forms = _choose(original, names, moments, options, fixed)
    packed = dict(tables)
    for name, table in tables.items():
        _install(model, name, table)
    seen = batches
    for tower in TOWERS:
        stage = [name for name in names if name.startswith(tower)]
        fresh = moments
        if batches and options.compensate and tower != TOWERS[0]:
            # A later tower is calibrated on what the packed earlier ones give it.
            seen = encoded(model, seen)
            fresh = _moments(model, seen, stage)
        for name in stage:
            packed[name] = _pack(original[name], forms[name], fresh.get(name), options)
            bias = name.removesuffix("weight") + "bias"
            if name in fresh and bias in rest and options.compensate:
                rest[bias] = _plain(
                    corrected_bias(original[bias], original[name], packed[name], fresh[name]), options.scheme
                )
                model.get_parameter(bias).data.copy_(rest[bias])
            _install(model, name, packed[name])
            progress(name)
    tensors = pack_tensors({name: rest.get(name, value) for name, value in original.items()}, packed)
    shapes = {name: list(original[name].shape) for name in packed if original[name].dim() != 2}
    report = {"forms": _count(forms), "calibration_rows": sum(len(b.question_ids) for b in batches)}
    return Packed(
        config, tensors, Quantization(scheme=options.scheme, shapes=shapes, parent=parent, report=report), forms
    )


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


@dataclass
class _Layer:
    """A linear layer's forms from the smallest to the most exact, with the bytes and the error of each."""

    name: str
    forms: list[str]
    sizes: list[int]
    errors: list[float]
    level: int = 0

    def offer(self) -> "tuple[float, int] | None":
        """The finer form that saves the most error for a byte more: (error a byte, level)."""
        here = self.level
        offers = [
            ((self.errors[here] - self.errors[k]) / (self.sizes[k] - self.sizes[here]), k)
            for k in range(here + 1, len(self.forms))
        ]
        return max(offers, default=None)


def _choose(
    tensors: Mapping[str, Tensor], names: Sequence[str], moments: Mapping[str, Moments], options: Options, fixed: int
) -> dict[str, str]:
    """The form of every linear layer."""
    if options.scheme != "small-mixed":
        return dict.fromkeys(names, "int8" if options.scheme == "int8" else "int4-64")
    layers = [_layer(name, tensors[name], moments.get(name)) for name in names]
    smallest = fixed + sum(layer.sizes[0] for layer in layers)
    if options.budget is not None and smallest > options.budget:
        raise QuantizeError(f"budget: got {options.budget:,} bytes for tensors; wanted at least {smallest:,}")
    left = float("inf") if options.budget is None else options.budget - smallest
    # Best offer first; the number breaks ties, so that layers are never compared.
    heap = [(-offer[0], i, offer[1]) for i, layer in enumerate(layers) if (offer := layer.offer())]
    heapq.heapify(heap)
    while heap:
        rank, i, level = heapq.heappop(heap)
        layer = layers[i]
        cost = layer.sizes[level] - layer.sizes[layer.level]
        if cost <= left:
            left -= cost
            layer.level = level
            if offer := layer.offer():
                heapq.heappush(heap, (-offer[0], i, offer[1]))
        elif level - 1 > layer.level:
            heapq.heappush(heap, (rank, i, level - 1))
    return {layer.name: layer.forms[layer.level] for layer in layers}


def _layer(name: str, weight: Tensor, moments: Moments | None) -> _Layer:
    forms = [form for form, size in _useful(weight)]
    sizes = [size for form, size in _useful(weight)]
    return _Layer(name, forms, sizes, [_error(weight, form, moments) for form in forms])


def _useful(weight: Tensor) -> list[tuple[str, int]]:
    """The forms that no more exact one undercuts, with their bytes: a narrow matrix fills no wide group."""
    kept: list[tuple[str, int]] = []
    for form in reversed(FORMS):
        size = form_bytes(weight, form)
        if not kept or size < kept[-1][1]:
            kept.append((form, size))
    return kept[::-1]


def form_bytes(weight: Tensor, form: str) -> int:
    """Bytes of a packed matrix."""
    rows, columns = weight.shape[0], weight[0].numel()
    if form == "int8":
        return rows * columns + 4 * rows
    group = int(form.removeprefix("int4-"))
    num_groups = -(-columns // group)
    return rows * num_groups * (group // 2 + 2)


def _error(weight: Tensor, form: str, moments: Moments | None) -> float:
    """What a form costs: the loss's rise to second order where that is known, else the relative squared error."""
    matrix = weight.flatten(1).float()
    rows = torch.linspace(0, len(matrix) - 1, min(_SAMPLED_ROWS, len(matrix))).long()  # all would take minutes
    sample = matrix[rows]
    packed = unpack(_pack(sample, form, moments, Options(compensate=False)))
    if moments is None or moments.tokens == 0:
        return float((packed - sample).square().sum() / sample.square().sum().clamp_min(1e-30)) * matrix.numel()
    error = output_error(sample, packed, moments.hessian, moments.outputs[rows])
    return error * len(matrix) / len(rows)


def _pack(weight: Tensor, form: str, moments: Moments | None, options: Options) -> PackedWeight:
    matrix = weight.flatten(1)
    if form == "int8":
        return pack_int8(matrix)
    group = int(form.removeprefix("int4-"))
    if moments is None or moments.tokens == 0:
        return pack_int4(matrix, group)
    if options.compensate:
        return pack_int4_compensated(matrix, moments.hessian, group)
    return pack_int4(matrix, group, importance=moments.hessian.diagonal())


def _is_table(name: str, scheme: str) -> bool:
    """Word tables, the patch projection and the image positions: packed by rows, to int8, under every scheme."""
    if name.endswith(WORDS) or name == "vision.patch_embed.weight":
        return True
    return name == POSITIONS and scheme != "int8"


def _table(value: Tensor) -> PackedWeight:
    """int8 by rows; a position table (1, N, C) counts as N rows."""
    return pack_int8(value[0] if value.dim() == 3 else value.flatten(1))


def _plain(value: Tensor, scheme: str) -> Tensor:
    """Norms, biases and small tables: float16 where it holds them, float32 under int8 and where it does not."""
    fits = value.abs().max() <= _HALF_LARGEST if value.numel() else True
    return value.half() if scheme != "int8" and fits else value.float()


def _install(model: MissVQA, name: str, packed: PackedWeight) -> None:
    weight = model.get_parameter(name).data
    weight.copy_(unpack(packed).reshape(weight.shape))


def _count(forms: Mapping[str, str]) -> dict[str, int]:
    return {form: sum(f == form for f in forms.values()) for form in FORMS if form in forms.values()}
