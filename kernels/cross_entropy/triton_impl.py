"""Linear and cross entropy in Triton: a product whose epilogue reduces each tile of logits to four numbers a row.

Forward, a program a tile (BM rows, BN words):  z = X W^T + b, then of the tile max, sum(exp(z - max)), sum(z) and the
label's z; `_combine` merges the tiles of a row in a fixed order. Logits are never written. Backward, the same program
shape: z again, dz = dloss (exp(z - lse) - (1 - e) onehot - e / V) in the logits' dtype, whose two products with W and
X are the library's GEMMs; dbias is summed in float32. No atomics.

FLOPs 2 M V C forward, 8 M V C with backward (one product again). Bytes: X and W once each from memory, 16 M V / BN of
partial sums forward, M V elements of dz backward. Rows that are ignored are taken out first (`nonzero`: one wait for
the device, as in the `torch` row). Knows tiles; does not know which rows a model ignores, or why.

Shapes: R rows, M rows that count, C width, V vocabulary, T tiles of the vocabulary.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.launches import Case, Launch, choose
from miss.kernels.triton_parts import dot

LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "few": (Launch({"BM": 16, "BN": 128, "BK": 64}, 4, 3), Launch({"BM": 32, "BN": 128, "BK": 64}, 4, 3)),
    "many": (
        Launch({"BM": 64, "BN": 128, "BK": 64}, 4, 3),
        Launch({"BM": 128, "BN": 128, "BK": 64}, 8, 3),
    ),
    "float32": (Launch({"BM": 32, "BN": 64, "BK": 32}, 4, 2),),
}
PART = 2**28  # elements of dz that are held at once
DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


@triton.jit
def _logits(x, w, bias, M, V, C, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Float32 (BM, BN), minus infinity beyond the vocabulary, and the tile's row and word numbers."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    word = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_at = x + row[:, None].to(tl.int64) * C + k[None, :]
    w_at = w + word[None, :].to(tl.int64) * C + k[:, None]
    z = tl.zeros((BM, BN), tl.float32)
    for start in range(0, C, BK):
        inside = start + k < C
        a = tl.load(x_at + start, mask=(row < M)[:, None] & inside[None, :], other=0.0)
        b = tl.load(w_at + start, mask=(word < V)[None, :] & inside[:, None], other=0.0)
        z = dot(a, b, z)
    if HAS_BIAS:
        z += tl.load(bias + word, mask=word < V, other=0.0).to(tl.float32)[None, :]
    return z, row, word


@triton.jit
def _forward(
    x, w, bias, labels, partial, M, V, C,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """partial (T, 4, M): max, sum of exponentials, sum, the label's logit (0 where it is in another tile)."""
    z, row, word = _logits(x, w, bias, M, V, C, HAS_BIAS, BM, BN, BK)
    here = (word < V)[None, :]
    label = tl.load(labels + row, mask=row < M, other=-1)
    top = tl.max(tl.where(here, z, float("-inf")), 1)
    base = tl.where(top == float("-inf"), 0.0, top)  # a tile of nothing but minus infinities
    total = tl.sum(tl.where(here, tl.exp(z - base[:, None]), 0.0), 1)
    added = tl.sum(tl.where(here, z, 0.0), 1)
    chosen = tl.sum(tl.where(word[None, :] == label[:, None], z, 0.0), 1)
    at = partial + tl.program_id(1).to(tl.int64) * 4 * M + row
    tl.store(at, top, mask=row < M)
    tl.store(at + M, total, mask=row < M)
    tl.store(at + 2 * M, added, mask=row < M)
    tl.store(at + 3 * M, chosen, mask=row < M)


@triton.jit
def _combine(partial, loss, lse, M, V, T, smoothing, SMOOTH: tl.constexpr, BM: tl.constexpr):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    live = row < M
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    added = tl.zeros((BM,), tl.float32)
    chosen = tl.zeros((BM,), tl.float32)
    for tile in range(0, T):
        at = partial + tl.cast(tile, tl.int64) * 4 * M + row
        other = tl.load(at, mask=live, other=0.0)
        new = tl.maximum(top, other)
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - base) + tl.load(at + M, mask=live, other=0.0) * tl.exp(other - base)
        added += tl.load(at + 2 * M, mask=live, other=0.0)
        chosen += tl.load(at + 3 * M, mask=live, other=0.0)
        top = new
    normaliser = top + tl.log(total)
    value = normaliser - (1.0 - smoothing) * chosen
    if SMOOTH:
        value -= smoothing * (added / V)
    tl.store(loss + row, value, mask=live)
    tl.store(lse + row, normaliser, mask=live)


@triton.jit
def _dlogits(
    x, w, bias, labels, lse, dloss, dz, M, V, C, smoothing,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    z, row, word = _logits(x, w, bias, M, V, C, HAS_BIAS, BM, BN, BK)
    live = row < M
    label = tl.load(labels + row, mask=live, other=-1)
    normaliser = tl.load(lse + row, mask=live, other=0.0)
    p = tl.exp(z - normaliser[:, None]) - smoothing / V
    p -= tl.where(word[None, :] == label[:, None], 1.0 - smoothing, 0.0)
    p *= tl.load(dloss + row, mask=live, other=0.0)[:, None]
    at = dz + row[:, None].to(tl.int64) * V + word[None, :]
    tl.store(at, p.to(dz.dtype.element_ty), mask=live[:, None] & (word < V)[None, :])


def _launch(rows: Tensor, weight: Tensor) -> Launch:
    kind = "float32" if rows.dtype == torch.float32 else "few" if len(rows) <= 64 else "many"
    return choose("linear_cross_entropy", kind, {k: v[0] for k, v in LAUNCHES.items()}, rows, *weight.shape)


def _grid(launch: Launch, rows: int, words: int) -> tuple[int, int]:
    return triton.cdiv(rows, launch.blocks["BM"]), triton.cdiv(words, launch.blocks["BN"])


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """(loss, lse), both float32 (R,)."""
    valid = (labels != ignore_index).nonzero()[:, 0]
    rows, wanted, weight = hidden[valid].contiguous(), labels[valid], weight.contiguous()
    (count, width), vocabulary = rows.shape, len(weight)
    out = torch.zeros(2, len(labels), dtype=torch.float32, device=hidden.device)
    if not count:
        return out[0], out[1].clone()
    launch = _launch(rows, weight)
    grid = _grid(launch, count, vocabulary)
    partial = torch.empty(grid[1], 4, count, dtype=torch.float32, device=hidden.device)
    _forward[grid](
        *(rows, weight, rows if bias is None else bias.contiguous(), wanted, partial, count, vocabulary, width),
        HAS_BIAS=bias is not None, **launch.blocks, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    merged = torch.empty(2, count, dtype=torch.float32, device=hidden.device)
    _combine[(triton.cdiv(count, 32),)](
        partial, merged[0], merged[1], count, vocabulary, grid[1], label_smoothing, SMOOTH=label_smoothing > 0, BM=32,
        num_warps=1,
    )  # fmt: skip
    out[:, valid] = merged
    return out[0], out[1].clone()


def backward(
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias), the logits computed again; dweight of several parts is summed in float32."""
    valid = (labels != ignore_index).nonzero()[:, 0]
    weight, dhidden = weight.contiguous(), torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    dweight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    dbias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
    size = max(1, PART // len(weight))
    for at in valid.split(size) if len(valid) else ():
        rows = hidden[at].contiguous()
        launch = _launch(rows, weight)
        dz = torch.empty(len(rows), len(weight), dtype=hidden.dtype, device=hidden.device)
        _dlogits[_grid(launch, len(rows), len(weight))](
            *(rows, weight, rows if bias is None else bias.contiguous(), labels[at], lse[at], dloss[at].float(), dz),
            *(len(rows), len(weight), rows.shape[1], label_smoothing),
            HAS_BIAS=bias is not None, **launch.blocks, num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
        dhidden[at] = dz @ weight
        dbias += dz.sum(0, dtype=torch.float32)
        product = dz.T @ rows
        dweight = product if len(valid) <= size else dweight.add_(product)
    return dhidden, dweight.to(weight.dtype), dbias.to(weight.dtype)


def cases() -> Iterator[Case]:
    """Forward and backward of every configuration in bfloat16; float32's own."""
    for kind, launches in LAUNCHES.items():
        t = "*fp32" if kind == "float32" else "*bf16"
        sizes = {"M": "i32", "V": "i32", "C": "i32"}
        head = {"x": t, "w": t, "bias": t, "labels": "*i64"}
        ends = ("x", "w", "bias", "labels", "lse", "dloss", "dz", "partial", "C")
        for i, launch in enumerate(launches):
            constants = {"HAS_BIAS": True, **launch.blocks}
            name = f"{kind}-{'x'.join(map(str, launch.blocks.values()))}"
            forward = {**head, "partial": "*fp32", **sizes}
            back = {**head, "lse": "*fp32", "dloss": "*fp32", "dz": t, **sizes, "smoothing": "fp32"}
            for part, kernel, signature in (("forward", _forward, forward), ("backward", _dlogits, back)):
                divisible = tuple(e for e in ends if e in signature)
                yield Case(
                    "linear_cross_entropy", f"{part}-{name}", kernel, signature, constants, launch, i == 0, divisible
                )
    signature = {"partial": "*fp32", "loss": "*fp32", "lse": "*fp32", "M": "i32", "V": "i32", "T": "i32"}
    signature["smoothing"] = "fp32"
    merge = Launch({"BM": 32}, 1)
    yield Case("linear_cross_entropy", "combine", _combine, signature, {"SMOOTH": True, "BM": 32}, merge, True)
