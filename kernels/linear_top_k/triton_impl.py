"""The head in Triton: a product whose epilogue keeps of each tile of logits the best k words and two numbers a row.

`_tiles`, a program a tile (BN words, BM rows):  z^T = W X^T + b; of the tile the maximum, sum(exp(z - max)) and, k
times, the largest value that comes after the one before it, the lowest word first: values fall and words rise, so that
nothing need be marked as taken. `_merge`, a program a row, takes k times the best of all tiles and adds sums.
Logits are never written. W is the first operand: its words fill the tensor cores' 64 rows where x has one.

FLOPs 2 M V C. Bytes: W once from memory (the programs of one tile of words run side by side, so that its other readers
find it in L2), and 8 M T (k + 1) of the tiles' best and sums, written and read. The tile depends on the dtype alone, so
that a row's bits do not depend on what shares the batch. int8 sums are exact. A row with NaN among its logits has lse
NaN, values NaN and words 0 … k - 1, as in csrc/cpu. Knows tiles; does not know tokens.

Shapes: M rows, C width, V vocabulary, T tiles of the vocabulary, k the words wanted.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.launches import Case, Launch, choose
from miss.kernels.quant_linear import quantise_rows
from miss.kernels.triton_parts import dense_rows, dot

LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "half": (
        Launch({"BM": 32, "BN": 128, "BK": 64}, 4, 4),
        Launch({"BM": 16, "BN": 128, "BK": 64}, 4, 4),
        Launch({"BM": 64, "BN": 128, "BK": 64}, 4, 3),
    ),
    "float32": (Launch({"BM": 16, "BN": 64, "BK": 32}, 4, 2),),
    "int8": (Launch({"BM": 32, "BN": 128, "BK": 128}, 4, 3), Launch({"BM": 16, "BN": 128, "BK": 128}, 4, 4)),
}
NOBODY = tl.constexpr(2147483647)  # the word of a place that no word is left for: after every other


@triton.jit
def _after(value, word, last, last_word):
    """Whether a logit comes after another: smaller, or as large with a higher word. Never where it is NaN."""
    return (value < last) | ((value == last) & (word > last_word))


@triton.jit
def _tiles(
    x, w, steps, scale, bias, best, words, stats, M, V, C, T, k, x_stride, w_stride,
    HAS_BIAS: tl.constexpr, INT8: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows, T). best and words (M, T, k); stats (2, M, T): maximum, sum of exponentials.

    Rows beyond M and words beyond V compute the last one again. INT8: x is codes and 128, `steps` their scales.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    word = tl.program_id(1) * BN + tl.arange(0, BN)
    live = row < M
    c = tl.arange(0, BK)
    x_at = x + tl.minimum(row, M - 1)[None, :].to(tl.int64) * x_stride + c[:, None]
    w_at = w + tl.minimum(word, V - 1)[:, None].to(tl.int64) * w_stride + c[None, :]
    total = tl.zeros((BN, BM), tl.int32 if INT8 else tl.float32)
    for start in range(0, C, BK):
        inside = start + c < C
        b = tl.load(x_at + start, mask=inside[:, None], other=0)
        a = tl.load(w_at + start, mask=inside[None, :], other=0)
        if INT8:
            codes = (b ^ 128).to(tl.int8, bitcast=True)  # beyond the end -128 times a weight of 0
            total = tl.dot(a, codes, total, out_dtype=tl.int32)
        else:
            total = dot(a, b, total)
    z = total.to(tl.float32)
    if INT8:
        step = tl.load(steps + row, mask=live, other=0.0)
        z = (z * step[None, :]) * tl.load(scale + word, mask=word < V, other=0.0)[:, None]
    if HAS_BIAS:
        z += tl.load(bias + word, mask=word < V, other=0.0).to(tl.float32)[:, None]
    inside = (word < V)[:, None]
    top = tl.max(tl.where(inside, z, float("-inf")), 0)
    away = tl.where(inside & (z != top[None, :]), z - top[None, :], 0.0)  # infinity less itself is 0 too
    exponentials = tl.where(inside & (z != float("-inf")), tl.exp(away), 0.0)
    to = row.to(tl.int64) * T + tl.program_id(1)
    tl.store(stats + to, top, mask=live)
    tl.store(stats + tl.cast(M, tl.int64) * T + to, tl.sum(exponentials, 0), mask=live)
    last = tl.full((BM,), float("inf"), tl.float32)
    last_word = tl.full((BM,), -1, tl.int32)
    for i in range(0, k):
        left = inside & _after(z, word[:, None], last[None, :], last_word[None, :])
        last = tl.max(tl.where(left, z, float("-inf")), 0)
        last_word = tl.min(tl.where(left & (z == last[None, :]), word[:, None], NOBODY), 0)
        tl.store(best + to * k + i, last, mask=live)
        tl.store(words + to * k + i, last_word, mask=live)


@triton.jit
def _merge(best, words, stats, values, indices, lse, M, T, k, BT: tl.constexpr):
    """Grid (M,); BT holds all tiles of a row."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BT)
    live = t < T
    tops = tl.load(stats + row * T + t, mask=live, other=float("-inf"))
    sums = tl.load(stats + (M + row) * T + t, mask=live, other=0.0)
    top = tl.max(tops, 0)
    total = tl.sum(tl.where(tops == top, sums, sums * tl.exp(tops - top)), 0)
    broken = total != total
    tl.store(lse + row, tl.where(broken, float("nan"), top + tl.log(total)))
    used = tl.zeros((BT,), tl.int32)
    for i in range(0, k):
        at = (row * T + t) * k + used
        value = tl.load(best + at, mask=live, other=float("-inf"))
        word = tl.load(words + at, mask=live, other=NOBODY)
        chosen_value = tl.max(value, 0)
        chosen = tl.min(tl.where(value == chosen_value, word, NOBODY), 0)
        used += tl.where((word == chosen) & live & (used < k - 1), 1, 0)
        tl.store(values + row * k + i, tl.where(broken, float("nan"), chosen_value))
        tl.store(indices + row * k + i, tl.where(broken, i, chosen).to(tl.int64))


def _run(
    kind: str,
    x: Tensor,
    weight: Tensor,
    steps: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    (rows, width), num_words = x.shape, len(weight)
    values = torch.empty(rows, k, dtype=torch.float32, device=x.device)
    indices, lse = torch.empty_like(values, dtype=torch.int64), values.new_empty(rows)
    if not rows:
        return values, indices, lse
    defaults = {name: launches[0] for name, launches in LAUNCHES.items()}
    launch = choose("linear_top_k", kind, defaults, x, num_words, width)
    tiles = triton.cdiv(num_words, launch.blocks["BN"])
    best = values.new_empty(rows, tiles, k)
    words, stats = torch.empty_like(best, dtype=torch.int32), values.new_empty(2, rows, tiles)
    _tiles[(triton.cdiv(rows, launch.blocks["BM"]), tiles)](
        *(x, weight, lse if steps is None else steps, lse if scale is None else scale),
        *(lse if bias is None else bias.contiguous(), best, words, stats, rows, num_words, width, tiles, k),
        *(x.stride(0), weight.stride(0)),
        HAS_BIAS=bias is not None, INT8=steps is not None,
        **launch.blocks, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    block = triton.next_power_of_2(tiles)
    warps = min(8, max(1, block // 128))
    _merge[(rows,)](best, words, stats, values, indices, lse, rows, tiles, k, BT=block, num_warps=warps)
    return values, indices, lse


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, panels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    kind = "float32" if hidden.dtype == torch.float32 else "half"
    return _run(kind, dense_rows(hidden), dense_rows(weight), None, None, bias, k)


def quant(
    hidden: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    k: int,
    panels: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    codes, steps = quantise_rows(hidden)
    return _run("int8", codes, data, steps, scale, bias, k)


def cases() -> Iterator[Case]:
    """Every launch with a bias, bfloat16 for halves; the merge of the vocabulary's 239 tiles."""
    sizes = dict.fromkeys(("M", "V", "C", "T", "k", "x_stride", "w_stride"), "i32")
    parts = {"best": "*fp32", "words": "*i32", "stats": "*fp32"}
    for kind, launches in LAUNCHES.items():
        t = {"half": "*bf16", "float32": "*fp32", "int8": "*bf16"}[kind]
        x, w = ("*u8", "*i8") if kind == "int8" else (t, t)
        signature = {"x": x, "w": w, "steps": "*fp32", "scale": "*fp32", "bias": t, **parts, **sizes}
        ends = tuple(n for n in signature if n not in sizes) + ("C", "x_stride", "w_stride")
        op = "linear_top_k_w8a8" if kind == "int8" else "linear_top_k"
        for i, launch in enumerate(launches):
            constants = {"HAS_BIAS": True, "INT8": kind == "int8", **launch.blocks}
            name = f"tiles-{kind}-{'x'.join(map(str, launch.blocks.values()))}"
            yield Case(op, name, _tiles, signature, constants, launch, i == 0, ends)
    signature = {**parts, "values": "*fp32", "indices": "*i64", "lse": "*fp32", "M": "i32", "T": "i32", "k": "i32"}
    ends = tuple(n for n in signature if n not in ("M", "T", "k"))
    yield Case("linear_top_k", "merge", _merge, signature, {"BT": 256}, Launch({"BT": 256}, 2), True, ends)
