"""Layer normalization in Triton, plain and after residual and dropout, its result as numbers or as int8 codes.

Forward: a program holds ROWS whole rows in registers, reads each once and writes what is asked for; the mean, then the
mean of squared deviations, so that a large mean cancels nothing. Backward in two stages: PROGRAMS persistent programs
take every PROGRAMS-th block of rows, write dx and add up their part of dweight and dbias in float32 registers; a second
kernel adds the parts in their order. No atomics: the same rows give the same bits, and a row's results do not depend on
the others. The mask of dropout is made again from the seed, never kept.

Bytes a row: C elements a tensor, each read or written once (2 tensors plain, 4 with a residual; backward 3, and 5 with
dsummed), 8 of statistics, and 16 C PROGRAMS of partial sums in all. Knows rows; does not know which layer asks.

Shapes: R rows, C width, CP the power of two from C on, P programs.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.launches import Case, Launch, choose
from miss.kernels.triton_parts import dense_rows, keep_mask, sum_parts

# PROGRAMS: two for each of an H200's 132 multiprocessors. A function of nothing else: it orders the sums over rows.
LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "forward": (Launch({"ROWS": 4}, 4), Launch({"ROWS": 1}, 1)),
    "forward-wide": (Launch({"ROWS": 1}, 8), Launch({"ROWS": 1}, 4)),
    "backward": (
        Launch({"ROWS": 4, "PROGRAMS": 264, "STAGES": 2}, 4),
        Launch({"ROWS": 2, "PROGRAMS": 528, "STAGES": 2}, 4),
    ),
    "backward-wide": (Launch({"ROWS": 1, "PROGRAMS": 264, "STAGES": 2}, 8),),
    "sum": (Launch({"BP": 32, "BC": 32}, 4),),
}
NARROW = 1024  # columns up to which a program takes several rows


@triton.jit
def _forward(
    x, residual, weight, bias, seed, summed, y, mean, rstd, codes, scale, R, C, x_stride, residual_stride, eps, p, kept,
    ADD: tl.constexpr, DROPOUT: tl.constexpr, QUANTISED: tl.constexpr, WRITES_Y: tl.constexpr,
    CP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """QUANTISED writes codes and scale (and y where WRITES_Y), otherwise y, mean and rstd; ADD writes summed too."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CP)
    live = (row < R)[:, None] & (c < C)[None, :]
    wide = row[:, None].to(tl.int64)
    dense = wide * C + c[None, :]
    s = tl.load(x + wide * x_stride + c[None, :], mask=live, other=0.0).to(tl.float32)
    if DROPOUT:
        s *= tl.where(keep_mask(tl.load(seed), dense, p), kept, 0.0)
    if ADD:
        s += tl.load(residual + wide * residual_stride + c[None, :], mask=live, other=0.0).to(tl.float32)
        stored = s.to(summed.dtype.element_ty)  # the norm reads the sum as it is stored: backward has only that one
        tl.store(summed + dense, stored, mask=live)
        s = stored.to(tl.float32)
    centre = tl.sum(s, 1) / C
    s = tl.where(live, s - centre[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(s * s, 1) / C + eps)
    s = s * factor[:, None] * tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    s += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if WRITES_Y:
        tl.store(y + dense, s.to(y.dtype.element_ty), mask=live)
    if QUANTISED:
        size, code = _codes(s)
        tl.store(codes + dense, code, mask=live)
        tl.store(scale + row, size, mask=row < R)
    else:
        tl.store(mean + row, centre, mask=row < R)
        tl.store(rstd + row, factor, mask=row < R)


@triton.jit
def _codes(s):
    """(scale, codes) of float32 rows as `quant_linear.packing.quantise_rows` makes them; 0 beyond the width.

    Adding and taking away 1.5 * 2**23 leaves a float32 below 2**22 rounded to even, which Triton has no word for that
    the interpreter knows.
    """
    most = tl.max(tl.abs(s), 1)
    unbounded = tl.max(((s - s) != 0.0).to(tl.int32), 1) > 0  # NaN or infinity
    size = tl.where(most == 0.0, 1.0, tl.maximum(tl.div_rn(most, tl.full(most.shape, 127.0, tl.float32)), 2.0**-126))
    code = (tl.div_rn(s, tl.broadcast_to(size[:, None], s.shape)) + 12582912.0) - 12582912.0
    code = tl.where(unbounded[:, None], 0.0, code) + 128.0
    return tl.where(unbounded, float("nan"), size), code.to(tl.int32).to(tl.uint8)


@triton.jit
def _backward(
    dy, dsummed, x, weight, mean, rstd, seed, dx, dresidual, partial,
    R, C, dy_stride, dsummed_stride, x_stride, p, kept,
    ADD: tl.constexpr, DROPOUT: tl.constexpr,
    CP: tl.constexpr, ROWS: tl.constexpr, PROGRAMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partial (P, 2, C): what this program's rows add to dweight and to dbias."""
    c = tl.arange(0, CP)
    inside = c < C
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((CP,), tl.float32)
    dbias = tl.zeros((CP,), tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, R, PROGRAMS * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        live = (row < R)[:, None] & inside[None, :]
        wide = row[:, None].to(tl.int64)
        dense = wide * C + c[None, :]
        g = tl.load(dy + wide * dy_stride + c[None, :], mask=live, other=0.0).to(tl.float32)
        xhat = tl.load(x + wide * x_stride + c[None, :], mask=live, other=0.0).to(tl.float32)
        centre = tl.load(mean + row, mask=row < R, other=0.0)
        factor = tl.load(rstd + row, mask=row < R, other=0.0)
        xhat = tl.where(live, (xhat - centre[:, None]) * factor[:, None], 0.0)
        dweight += tl.sum(g * xhat, 0)
        dbias += tl.sum(g, 0)
        g *= w[None, :]
        along = tl.sum(g * xhat, 1) / C
        across = tl.sum(g, 1) / C
        g = (g - xhat * along[:, None] - across[:, None]) * factor[:, None]
        if ADD:
            g += tl.load(dsummed + wide * dsummed_stride + c[None, :], mask=live, other=0.0).to(tl.float32)
            tl.store(dresidual + dense, g.to(dresidual.dtype.element_ty), mask=live)
        if DROPOUT:
            g *= tl.where(keep_mask(tl.load(seed), dense, p), kept, 0.0)
        tl.store(dx + dense, g.to(dx.dtype.element_ty), mask=live)
    at = partial + tl.program_id(0).to(tl.int64) * 2 * C + c
    tl.store(at, dweight, mask=inside)
    tl.store(at + C, dbias, mask=inside)


def _launch(part: str, x: Tensor) -> tuple[Launch, dict[str, int]]:
    width = x.shape[-1]
    kind = part if width <= NARROW or part == "sum" else f"{part}-wide"
    launch = choose("layer_norm", kind, {k: v[0] for k, v in LAUNCHES.items()}, x, width)
    return launch, {**launch.blocks, "num_warps": launch.num_warps, "num_stages": launch.num_stages}


def _chance(dropout_p: float, seed: Tensor | None, like: Tensor) -> tuple[Tensor, float, float]:
    """(seed on the device, p, what kept values are multiplied with). A seed on the host is an addition's argument."""
    where = like if seed is None else torch.zeros((), dtype=torch.int64, device=like.device) + seed
    return where, dropout_p, 1 / (1 - dropout_p)


def _run(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    dropout_p: float = 0.0, seed: Tensor | None = None, quantised: bool = False, writes_y: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """y, summed, mean, rstd, codes, scale, those that are not asked for with no elements."""
    width, lines = x.shape[-1], x.shape[:-1]
    none, added = x.new_empty(0), residual is not None
    out = {
        "y": torch.empty(x.shape, dtype=x.dtype, device=x.device) if writes_y else x.new_empty(0),
        "summed": torch.empty(x.shape, dtype=x.dtype, device=x.device) if added else none,
        "mean": none if quantised else torch.empty(lines, dtype=torch.float32, device=x.device),
        "rstd": none if quantised else torch.empty(lines, dtype=torch.float32, device=x.device),
        "codes": torch.empty(x.shape, dtype=torch.uint8, device=x.device) if quantised else none,
        "scale": torch.empty(lines, dtype=torch.float32, device=x.device) if quantised else none,
    }
    rows = dense_rows(x)
    if not len(rows):
        return out
    other = rows if residual is None else dense_rows(residual)
    launch, options = _launch("forward", x)
    where, p, kept = _chance(dropout_p, seed, rows)
    _forward[(triton.cdiv(len(rows), launch.blocks["ROWS"]),)](
        *(rows, other, weight.contiguous(), bias.contiguous(), where),
        *(out[name] for name in ("summed", "y", "mean", "rstd", "codes", "scale")),
        *(len(rows), width, rows.stride(0), other.stride(0), eps, p, kept),
        ADD=added, DROPOUT=dropout_p > 0, QUANTISED=quantised, WRITES_Y=writes_y,
        CP=triton.next_power_of_2(width), **options,
    )  # fmt: skip
    return out


def _run_backward(
    dy: Tensor, dsummed: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    dropout_p: float = 0.0, seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dresidual, dweight, dbias); dresidual has no elements without dsummed."""
    rows, width = dense_rows(x), x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dresidual = x.new_empty(0) if dsummed is None else torch.empty_like(dx)
    dweight, dbias = (torch.zeros(width, dtype=weight.dtype, device=x.device) for _ in range(2))
    if not len(rows):
        return dx, dresidual, dweight, dbias
    launch, options = _launch("backward", x)
    gradient = dense_rows(dy)
    other = gradient if dsummed is None else dense_rows(dsummed)
    count = min(launch.blocks["PROGRAMS"], triton.cdiv(len(rows), launch.blocks["ROWS"]))
    partial = torch.empty(count, 2, width, dtype=torch.float32, device=x.device)
    where, p, kept = _chance(dropout_p, seed, rows)
    _backward[(count,)](
        *(gradient, other, rows, weight.contiguous(), mean.contiguous(), rstd.contiguous(), where),
        *(dx, dresidual, partial, len(rows), width, gradient.stride(0), other.stride(0), rows.stride(0), p, kept),
        ADD=dsummed is not None, DROPOUT=dropout_p > 0, CP=triton.next_power_of_2(width), **options,
    )  # fmt: skip
    launch, options = _launch("sum", x)
    sum_parts[(triton.cdiv(width, launch.blocks["BC"]), 2)](partial, dweight, dbias, count, width, OUTPUTS=2, **options)
    return dx, dresidual, dweight, dbias


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    out = _run(x, None, weight, bias, eps)
    return out["y"], out["mean"], out["rstd"]


def backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx, _, dweight, dbias = _run_backward(dy, None, x, weight, mean, rstd)
    return dx, dweight, dbias


def add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = _run(x, residual, weight, bias, eps, dropout_p, seed)
    return out["y"], out["summed"], out["mean"], out["rstd"]


def add_backward(
    dy: Tensor,
    dsummed: Tensor,
    summed: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run_backward(dy, dsummed, summed, weight, mean, rstd, dropout_p, seed)


def quantised(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out = _run(x, None, weight, bias, eps, quantised=True, writes_y=False)
    return out["codes"], out["scale"]


def add_quantised(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, keep_y: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = _run(x, residual, weight, bias, eps, quantised=True, writes_y=keep_y)
    return out["codes"], out["scale"], out["y"], out["summed"]


_FORMS = {  # name -> ADD, DROPOUT, QUANTISED, WRITES_Y
    "plain": (False, False, False, True),
    "add": (True, False, False, True),
    "add-dropout": (True, True, False, True),
    "quantised": (False, False, True, False),
    "add-quantised": (True, False, True, True),
}


def _case(kind: str, launch: Launch, form: str, element: str, width: int, default: bool) -> Case:
    add, dropout, quantised, writes_y = _FORMS[form]
    seed = {"seed": "*i64" if dropout else element}
    statistics = {"mean": "*fp32", "rstd": "*fp32"}
    t: dict[str, str] = dict.fromkeys(("x", "residual", "dy", "dsummed"), element)
    parameters = {"weight": element, "bias": element}
    constants: dict[str, Any] = {"ADD": add, "DROPOUT": dropout, "CP": width, **launch.blocks}
    ends = {"p": "fp32", "kept": "fp32"}
    if kind.startswith("forward"):
        kernel, constants = _forward, {**constants, "QUANTISED": quantised, "WRITES_Y": writes_y}
        signature = {
            **{"x": t["x"], "residual": t["residual"], **parameters, **seed, "summed": element, "y": element},
            **(dict.fromkeys(statistics, element) if quantised else statistics),
            **{"codes": "*u8" if quantised else element, "scale": "*fp32" if quantised else element},
            **dict.fromkeys(("R", "C", "x_stride", "residual_stride"), "i32"),
            **{"eps": "fp32", **ends},
        }
    else:
        kernel = _backward
        signature = {
            **{"dy": element, "dsummed": element, "x": element, "weight": element, **statistics, **seed},
            **{"dx": element, "dresidual": element, "partial": "*fp32"},
            **dict.fromkeys(("R", "C", "dy_stride", "dsummed_stride", "x_stride"), "i32"),
            **ends,
        }
    divisible = tuple(n for n, v in signature.items() if v.startswith("*") or n == "C" or n.endswith("stride"))
    name = "x".join(map(str, launch.blocks.values()))
    label = f"{kind}-{name}-{launch.num_warps}w-{width}-{form}-{element.removeprefix('*')}"
    return Case("layer_norm", label, kernel, signature, constants, launch, default, divisible)


def cases() -> Iterator[Case]:
    """Width 768 in every form and launch; 4096 the defaults and 384's plain one; float32 the defaults."""
    for kind, launches in LAUNCHES.items():
        if kind == "sum":
            continue
        backward, wide = kind.startswith("backward"), kind.endswith("-wide")
        forms = ("plain", "add-dropout") if backward or wide else tuple(_FORMS)
        for i, launch in enumerate(launches):
            for form in forms if i == 0 else ("plain",):
                yield _case(kind, launch, form, "*bf16", 4096 if wide else 1024, i == 0)
        yield _case(kind, launches[0], "add-dropout", "*fp32", 4096 if wide else 1024, True)
        if not wide:
            yield _case(kind, launches[0], "plain", "*bf16", 512, True)
    (launch,) = LAUNCHES["sum"]
    signature = {"partial": "*fp32", "first": "*bf16", "second": "*bf16", "P": "i32", "C": "i32"}
    ends = ("partial", "first", "second", "C")
    yield Case("layer_norm", "sum", sum_parts, signature, {"OUTPUTS": 2, **launch.blocks}, launch, True, ends)
