"""The one truth about packed weights: what the bytes mean, how they are made, how they lie in a file.

Knows single matrices; does not know which layers are packed, calibration data, or the product's kernels.

Shapes: N rows (outputs, or tokens of a table), K columns (inputs, or width), G = ceil(K / group) groups.

int8   w[n, k] = data[n, k] * scale[n]                       data int8 (N, K) in -127 … 127; scale float32 (N,)
fp8    w[n, k] = data[n, k] * scale[n]                       data float8_e4m3fn (N, K); scale float32 (N,)
int4   w[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]     g = k // group; code 0 … 15; scale float16 (N, G), may be
                                                             negative; zero uint8 (N, G), or absent and then 8
       data uint8 (N, G * group / 2): byte j of a group holds the codes of its columns j (low nibble) and
       j + group / 2 (high nibble), so that unpacking yields runs, not single columns. Columns that the last group has
       beyond K hold the code of zero and are never read.

nf4    w[n, k] = NF4[code[n, k]] * scale[b]; b = (n * K + k) // 64: blocks run on over the ends of rows
       data uint8 (ceil(N * K / 2),): byte j holds the codes of the elements 2 j (high nibble) and 2 j + 1 (low);
       scale float32 (ceil(N * K / 64),)
llm-int8   as int8; columns of x with a number of at least OUTLIER in any row are multiplied unrounded

nf4 and llm-int8 are bitsandbytes' forms (arXiv 2305.14314, 2208.07339), bit for bit, so that it can multiply with them;
reading and unpacking them does not need it.

On a CPU with kernels of ours, int8's numbers may lie in the panels that those read, and there alone (`in_panels`):

       data int8 (ceil(N / 64), ceil(K / 4), 64, 4): [p, j, r, i] is that of row 64 p + r, column 4 j + i; 0 beyond

`row_major` gives them back; files, other devices and `pack_…` have rows.

int4's products are exact in float32 (4 + 11 bits), so that every implementation dequantises to the same numbers.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from miss.kernels.quant_linear import int4_fit
from miss.kernels.registry import lazy

GROUPS = (32, 64, 128)
PANEL = 64  # rows
# Numbers of a matrix that are rounded or unpacked at a time: base's largest whole takes 0.2 GB of float32 on the way.
_AT_ONCE = 1 << 18
_VERSION = 1
_CODES = {"int8": 8, "int4": 4, "llm-int8": 108, "nf4": 104, "fp8": 208}  # how `layout` calls the schemes
_DYNAMIC = {"int8": (0, 1), "fp8": (1,)}  # what `layout` may say of activations; 0 elsewhere
LIBRARY = ("nf4", "llm-int8")  # bitsandbytes' schemes
OUTLIER = 6.0
FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
NF4_BLOCK = 64
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class PackingError(ValueError):
    """A weight that cannot be packed, or tensors that are no packed weight."""


class Prepared(NamedTuple):
    """A packed weight laid out for csrc/cpu: panels of 64 rows, and for int8 128 times each row's sum of codes (N,)."""

    panels: Tensor
    offset: Tensor | None


class PackedWeight(NamedTuple):
    """A packed (N, K) matrix. `dynamic` asks for int8 activations too (W8A8), scaled row by row as they come; fp8
    weights always take activations of their own kind.

    `prepared` is what `prepare` adds on a CPU that has kernels of ours; it is no part of a file. `data` may then be its
    panels (`in_panels`): whoever reads single numbers of it reads `row_major(…)`.
    """

    data: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: str
    group: int
    shape: tuple[int, int]
    dynamic: bool = False
    prepared: Prepared | None = None

    def to(self, device: torch.device | str) -> "PackedWeight":
        """On another device row by row, to be prepared again where that is a CPU; the same where it is there."""
        if torch.device(device) == self.data.device:
            return self
        zero = None if self.zero is None else self.zero.to(device)
        data = row_major(self.data, self.scale, self.shape[1]).to(device)
        return self._replace(data=data, scale=self.scale.to(device), zero=zero, prepared=None)

    def in_panels(self) -> "PackedWeight":
        """With the panels for its only data, where they hold all of it: what a prepared int8 weight of base's 314 MB
        has twice otherwise. The same weight without `prepared`, and int4, whose panels are read one way only, stay."""
        if self.prepared is None or self.scheme != "int8":
            return self
        return self._replace(data=self.prepared.panels)

    @property
    def w8a8(self) -> bool:
        """Whether its products are those of int8 codes on both sides, which `QuantRows` are for."""
        return self.dynamic and self.scheme == "int8"

    @property
    def nbytes(self) -> int:
        """Row by row, as in a file."""
        parts = (self.data, self.scale, self.zero)
        padding = 0 if self.data.dim() < 4 else self.data.numel() - self.shape[0] * self.shape[1]
        return sum(t.nbytes for t in parts if t is not None) - padding


def row_major(data: Tensor, scale: Tensor, columns: int) -> Tensor:
    """A matrix's `data` row by row: as it is, or int8 (N, K) out of its panels, as a copy."""
    if not _is_in_panels(data, scale):
        return data
    return data.transpose(1, 2).flatten(0, 1).flatten(-2)[: len(scale), :columns].contiguous()


def rows_at(data: Tensor, scale: Tensor, ids: Tensor, columns: int) -> Tensor:
    """The rows `ids` (…) of a matrix's `data`, wherever they lie."""
    if not _is_in_panels(data, scale):
        return data[ids]
    return data.transpose(1, 2)[ids // PANEL, ids % PANEL].flatten(-2)[..., :columns]


def _is_in_panels(data: Tensor, scale: Tensor) -> bool:
    return data.dim() == 4 and scale.dim() == 1


class QuantRows(NamedTuple):
    """Rows as int8 numbers, in the form that passes from one operation to the next.

    x[…, k] = (codes[…, k] - 128) * scale[…]            codes uint8 (…, K) in 1 … 255; scale float32 (…)

    The codes are those of round(x / scale), ties to even, plus 128: unsigned, because the processors' products take
    unsigned times signed bytes. scale = max|row| / 127 (1 where the row is all zero, at least the smallest normal
    float32); a row that holds NaN or infinity has the scale NaN and codes 128.
    """

    codes: Tensor
    scale: Tensor


def quantise_rows(x: Tensor) -> QuantRows:
    """x (…, K) as codes and a scale a row, from float32 values (from float64 ones in float64)."""
    xf = x if x.dtype == torch.float64 else x.float()
    largest = xf.abs().amax(-1) if x.shape[-1] else xf.new_zeros(x.shape[:-1])
    scale = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)  # NaN stays NaN
    scale = torch.where(largest == 0, 1.0, torch.where(largest.isinf(), torch.nan, scale))
    codes = torch.nan_to_num(torch.round(xf / scale[..., None]), nan=0.0) + 128
    return QuantRows(codes.to(torch.uint8), scale.float())


def quantise_rows_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (…, K) as float8_e4m3fn codes and a float32 scale a row, max|row| / 448; otherwise as `quantise_rows`."""
    xf = x if x.dtype == torch.float64 else x.float()
    largest = xf.abs().amax(-1) if x.shape[-1] else xf.new_zeros(x.shape[:-1])
    scale = (largest / FP8_LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.where(largest == 0, 1.0, torch.where(largest.isinf(), torch.nan, scale)).float()
    codes = torch.nan_to_num(xf / scale[..., None], nan=0.0).clamp(-FP8_LARGEST, FP8_LARGEST)
    return codes.float().to(FP8), scale


def dequantise_rows(rows: QuantRows, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers (…, K) that `rows` stands for."""
    return ((rows.codes.to(torch.float32) - 128) * rows.scale[..., None]).to(dtype)


def pack_int8(weight: Tensor, dynamic: bool = False) -> PackedWeight:
    """Symmetric, a scale a row: round(w / scale) with scale = max|row| / 127.

    Args:
        weight: float (N, K).
        dynamic: multiply with int8 activations (W8A8).

    Raises:
        PackingError: the weight is not a finite float matrix.
    """
    _check_matrix(weight)
    data = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for rows in _blocks(weight.shape):
        data[rows], scale[rows] = _int8_rows(_finite(weight[rows]))
    return PackedWeight(data, scale, None, "int8", 0, _shape(weight), dynamic)


def _int8_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    largest = w.abs().amax(1) if w.shape[1] else w.new_zeros(len(w))
    scale = torch.where(largest > 0, largest / 127, 1.0)
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.round(w / scale[:, None]).clamp_(-127, 127).to(torch.int8), scale


def pack_fp8(weight: Tensor) -> PackedWeight:
    """Float8 (e4m3) numbers, a scale a row: w / scale rounded to them, with scale = max|row| / 448.

    Args:
        weight: float (N, K).

    Raises:
        PackingError: the weight is not a finite float matrix.
    """
    w = _checked(weight)
    data, scale = quantise_rows_fp8(w)
    return PackedWeight(data, scale, None, "fp8", 0, _shape(w), True)


def pack_int4(
    weight: Tensor, group: int = 64, symmetric: bool = True, search: bool = True, importance: Tensor | None = None
) -> PackedWeight:
    """Groups of `group` columns with a float16 scale each, and a zero point each unless symmetric.

    Args:
        weight: float (N, K).
        group: 32, 64 or 128.
        search: choose each group's scale (and zero) for the least squared error, not to cover its range; never worse.
        importance: non-negative (K,), what a column's squared error counts, such as its input's mean square.

    Raises:
        PackingError: the weight is not a finite float matrix, is too large for float16 scales, or `group` is another.
    """
    if group not in GROUPS:
        raise PackingError(f"int4 group: got {group}; accepted: {', '.join(map(str, GROUPS))}")
    w = _checked(weight)
    if importance is not None and importance.shape != w.shape[1:]:
        raise PackingError(f"importance is {tuple(importance.shape)}; wanted ({w.shape[1]},), one number a column")
    if w.numel() and w.abs().max() > 65504 * 7:
        raise PackingError(f"weights up to {w.abs().max():.3g}: their int4 scales do not fit float16")
    counted = torch.ones(w.shape[1], device=w.device) if importance is None else importance.float().to(w.device)
    groups, cost = _grouped(w, group), _grouped(counted[None], group)
    best = int4_fit.range_fit(groups, cost, symmetric)
    if search:
        for fraction in int4_fit.FRACTIONS:
            for candidate in int4_fit.candidates(groups, cost, symmetric, fraction):
                best = int4_fit.better(best, candidate)
        for _ in range(2):
            best = int4_fit.better(best, int4_fit.least_squares(groups, cost, best))
    return PackedWeight(
        _to_nibbles(best.codes), best.scale.half(), None if symmetric else best.zero.to(torch.uint8),
        "int4", group, _shape(w),
    )  # fmt: skip


def pack_nf4(weight: Tensor) -> PackedWeight:
    """A float matrix (N, K) with an even number of elements a row as nf4.

    Raises:
        PackingError: the weight is not a finite float matrix, or has an odd number of columns.
        ImportError: bitsandbytes, which packs it, is not installed.
    """
    w = _checked(weight)
    if w.shape[1] % 2:
        raise PackingError(f"nf4: {w.shape[1]} columns; wanted an even number")
    return _by_library("pack_nf4", w)


def pack_llm_int8(weight: Tensor) -> PackedWeight:
    """A float matrix (N, K) as LLM.int8's rows; errors as `pack_nf4`."""
    w = _checked(weight)
    if w.numel() and w.abs().max() > 65504:
        raise PackingError(f"llm-int8: weights up to {w.abs().max():.3g} do not fit float16")
    return _by_library("pack_llm_int8", w)


def _by_library(function: str, weight: Tensor) -> PackedWeight:
    packed: PackedWeight = lazy("quant_linear.bitsandbytes_impl", function)(weight)
    return packed


def pack_codes(codes: Tensor, scale: Tensor, zero: Tensor | None, group: int) -> PackedWeight:
    """int4 codes that were chosen elsewhere: codes (N, K) in 0 … 15, scale (N, G), zero (N, G) in 0 … 15 or None.

    Raises:
        PackingError: shapes or ranges do not fit.
    """
    num_groups = -(-codes.shape[1] // group) if group in GROUPS else 0
    if (
        group not in GROUPS
        or scale.shape != (len(codes), num_groups)
        or (zero is not None and zero.shape != scale.shape)
    ):
        raise PackingError(f"codes {tuple(codes.shape)}, scale {tuple(scale.shape)}, group {group}: do not fit")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) <= 15:
        raise PackingError(f"codes from {codes.min()} to {codes.max()}; wanted 0 to 15")
    blank = torch.full_like(scale, 8) if zero is None else zero
    padding = num_groups * group - codes.shape[1]
    filled = torch.cat([codes.float(), blank[:, -1:].float().expand(-1, padding)], 1) if padding else codes.float()
    data = _to_nibbles(filled.unflatten(1, (num_groups, group)))
    zeros = None if zero is None else zero.to(torch.uint8)
    return PackedWeight(data, scale.half(), zeros, "int4", group, (len(codes), codes.shape[1]))


def unpack(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The (N, K) matrix that the packed one stands for, computed in float32 (float64 in float64), in `dtype`."""
    if packed.scheme == "nf4":
        return dequantise_nf4(packed.data, packed.scale, packed.shape, dtype)
    if packed.scheme == "int4":
        return dequantise(packed.data, packed.scale, packed.zero, packed.shape[1], packed.group, dtype)
    data, scale = row_major(packed.data, packed.scale, packed.shape[1]), packed.scale
    whole = torch.empty(packed.shape, dtype=dtype, device=data.device)
    for rows in _blocks(packed.shape):
        whole[rows] = dequantise(data[rows], scale[rows], None, packed.shape[1], 0, dtype)
    return whole


def _blocks(shape: Sequence[int]) -> Iterator[slice]:
    """A matrix's rows, some at a time."""
    step = max(1, _AT_ONCE // max(1, shape[1]))
    return (slice(first, first + step) for first in range(0, shape[0], step))


def dequantise(
    data: Tensor, scale: Tensor, zero: Tensor | None, columns: int, group: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`unpack` on bare tensors; the leading dimensions of data, scale and zero are any, but the same (or data is a
    matrix's panels)."""
    data = row_major(data, scale, columns)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    if data.dtype in (torch.int8, FP8):
        return (data.to(acc) * scale.to(acc)[..., None]).to(dtype)
    codes = from_nibbles(data, group).to(acc)
    s = scale.to(acc)
    offset = s * -8 if zero is None else s * -zero.to(acc)
    # code * scale and zero * scale are exact, hence so is their difference, (code - zero) * scale.
    w = torch.addcmul(offset[..., None], codes, s[..., None]).flatten(-2)
    return w[..., :columns].to(dtype)


def dequantise_nf4(data: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The (N, K) matrix of nf4 codes and block scales."""
    table = torch.tensor(NF4, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=data.device)
    codes = torch.stack([data >> 4, data & 15], 1).flatten()[: shape[0] * shape[1]]
    scales = scale.to(table.dtype).repeat_interleave(NF4_BLOCK)[: len(codes)]
    return (table[codes.long()] * scales).view(shape).to(dtype)


def from_nibbles(data: Tensor, group: int) -> Tensor:
    """Codes uint8 (…, G, group) of bytes (…, G * group / 2)."""
    pairs = data.unflatten(-1, (data.shape[-1] * 2 // group, group // 2))
    return torch.cat([pairs & 15, pairs >> 4], -1)


def to_flat(packed: PackedWeight, prefix: str) -> dict[str, Tensor]:
    """The packed weight as `{prefix}.data`, `.scale`, `.zero` (where there is one) and `.layout`, for safetensors."""
    layout = [_VERSION, _CODES[packed.scheme], packed.group, *packed.shape, int(packed.dynamic)]
    data = row_major(packed.data, packed.scale, packed.shape[1])
    flat = {"data": data, "scale": packed.scale, "layout": torch.tensor(layout, dtype=torch.int64)}
    if packed.zero is not None:
        flat["zero"] = packed.zero
    return {f"{prefix}.{name}": tensor.contiguous() for name, tensor in flat.items()}


def from_flat(tensors: Mapping[str, Tensor], prefix: str) -> PackedWeight:
    """The inverse of `to_flat`; other names in `tensors` are left alone.

    Raises:
        PackingError: a part is missing, or its dtype or shape is not what the layout says.
    """
    parts = {name: tensors.get(f"{prefix}.{name}") for name in ("data", "scale", "zero", "layout")}
    data, scale, layout = parts["data"], parts["scale"], parts["layout"]
    if data is None or scale is None or layout is None:
        missing = [f"{prefix}.{name}" for name in ("data", "scale", "layout") if parts[name] is None]
        raise PackingError(f"packed weight {prefix}: missing {', '.join(missing)}")
    if layout.dtype != torch.int64 or layout.shape != (6,) or layout[0] != _VERSION or layout.min() < 0:
        raise PackingError(
            f"packed weight {prefix}: layout {layout.tolist()}; wanted six whole numbers, version {_VERSION} first"
        )
    _, code, group, rows, columns, dynamic = (int(v) for v in layout.tolist())
    scheme = next((name for name, known in _CODES.items() if known == code), None)
    groups = {"int4": GROUPS, "nf4": (NF4_BLOCK,)}
    if scheme is None or group not in groups.get(scheme, (0,)) or dynamic not in _DYNAMIC.get(scheme, (0,)):
        raise PackingError(f"packed weight {prefix}: code {code}, group {group}, dynamic {dynamic} is not a scheme")
    packed = PackedWeight(data, scale, parts["zero"], scheme, group, (rows, columns), bool(dynamic))
    _check_parts(packed, prefix)
    return packed


def packed_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """The prefixes of the packed weights among `tensors`, in their order."""
    return [name.removesuffix(".layout") for name in tensors if name.endswith(".layout")]


def _wanted(packed: PackedWeight) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of every part that the scheme knows."""
    rows, columns = packed.shape
    if packed.scheme in ("int8", "llm-int8", "fp8"):
        return {
            "data": (FP8 if packed.scheme == "fp8" else torch.int8, (rows, columns)),
            "scale": (torch.float32, (rows,)),
        }
    if packed.scheme == "nf4":
        size = rows * columns
        return {"data": (torch.uint8, (-(-size // 2),)), "scale": (torch.float32, (-(-size // NF4_BLOCK),))}
    num_groups = -(-columns // packed.group)
    return {
        "data": (torch.uint8, (rows, num_groups * packed.group // 2)),
        "scale": (torch.float16, (rows, num_groups)),
        "zero": (torch.uint8, (rows, num_groups)),
    }


def _check_parts(packed: PackedWeight, prefix: str) -> None:
    wanted = _wanted(packed)
    for name in ("data", "scale", "zero"):
        tensor = getattr(packed, name)
        if tensor is None:
            continue
        if name not in wanted:
            raise PackingError(f"packed weight {prefix}: {prefix}.{name} does not belong to {packed.scheme}")
        dtype, shape = wanted[name]
        if tensor.dtype != dtype or tensor.shape != shape:
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise PackingError(f"packed weight {prefix}: {prefix}.{name} is {got}; wanted {dtype} {shape}")


def _grouped(w: Tensor, group: int) -> Tensor:
    """(N, K) as (N, G, group), padded with zeros."""
    num_groups = -(-w.shape[1] // group)
    return torch.nn.functional.pad(w, (0, num_groups * group - w.shape[1])).unflatten(1, (num_groups, group))


def _to_nibbles(codes: Tensor) -> Tensor:
    low, high = codes.to(torch.uint8).chunk(2, -1)
    return (low | (high << 4)).flatten(1)


def _shape(w: Tensor) -> tuple[int, int]:
    return int(w.shape[0]), int(w.shape[1])


def _checked(weight: Tensor) -> Tensor:
    _check_matrix(weight)
    return _finite(weight)


def _check_matrix(weight: Tensor) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise PackingError(f"a weight to pack is a float matrix; got {weight.dtype} {tuple(weight.shape)}")


def _finite(weight: Tensor) -> Tensor:
    w = weight.detach().float()
    if not torch.isfinite(w).all():
        raise PackingError("a weight to pack has infinite or NaN values")
    return w
