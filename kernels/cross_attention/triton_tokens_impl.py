"""The weight-absorbed form in Triton: all heads of all questions of an image are queries over its tokens, C wide.

    a = q w_k (a head at a time)      scores = scale a . x,  P = softmax      out = (M P x) w_v^T + b_v sum M P

The queries of an image are c T H lines of one tile list (`triton_impl.plan`). `_scores`, a program a tile of lines and
a tile of keys, sums over C and writes float32 scores with the tile's maximum and sum; `_mix`, a program a tile of lines
and a block of C, merges those sums in their order and sums P x over the keys. One kernel for both would hold C float32
sums a line and the queries: at C = 768 and 64 lines 192 KB, of the 256 KB of registers that a multiprocessor has. The
scores, 4 T H N bytes a row, are written once and read C / BC times, from L2 (0.55 MB for 20 words over 577 tokens in
12 heads). The two products with weights are the library's GEMMs.

FLOPs 4 R T H N C, and 4 R T H C D with the weights; keys and values made first take 4 I N H D C and 4 R T N H D. Blocks
follow from N, C and T H alone: bits do not depend on what shares the batch, the library's GEMMs aside. Knows tiles;
does not know what a source shows, or gradients (`triton_tokens_backward_impl`).

Shapes: R rows, T queries, I images, N keys, H heads, D head width, C token width; a line is a (row, head, query).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.cross_attention.triton_impl import LOG2E, Plan, on_device, plan
from miss.kernels.launches import Case, Launch, choose
from miss.kernels.triton_parts import dot, keep_mask

LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "few": (Launch({"BM": 16, "BN": 64, "BC": 64}, 4, 3), Launch({"BM": 32, "BN": 64, "BC": 64}, 4, 3)),
    "many": (Launch({"BM": 64, "BN": 64, "BC": 64}, 4, 2), Launch({"BM": 64, "BN": 32, "BC": 64}, 4, 3)),
    "float32": (Launch({"BM": 16, "BN": 32, "BC": 32}, 4, 2),),
}
FEW = 32  # heads up to which a row of one query, as in a decoding step, takes a small tile


@triton.jit
def _lines(first_rows, tiles, image, T, H, BM: tl.constexpr):
    """(row, query, head, line, live) of a tile's BM lines, int64 but for the mask. Heads of a query are neighbours."""
    begin = tl.load(first_rows + image)
    m = tl.load(tiles + 2 * tl.program_id(0) + 1) + tl.arange(0, BM)
    live = m < (tl.load(first_rows + image + 1) - begin) * T * H
    row = (begin + m // (T * H)).to(tl.int64)
    query, head = (m % (T * H) // H).to(tl.int64), (m % H).to(tl.int64)
    return row, query, head, (row * H + head) * T + query, live


@triton.jit
def _scores(
    a, x, scores, stats, first_rows, tiles, lengths, scale, lines, T, H, N, pitch, C,
    a_row, a_query, a_head, x_image, x_token,
    HAS_LENGTHS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (bound, tiles of keys). scores (lines, pitch) in base 2; stats (tiles of keys, 2, lines): maximum, sum."""
    image = tl.load(tiles + 2 * tl.program_id(0))
    if image < 0:
        return
    row, query, head, line, live = _lines(first_rows, tiles, image, T, H, BM)
    image = image.to(tl.int64)
    valid = tl.minimum(tl.load(lengths + image), N) if HAS_LENGTHS else N
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    c = tl.arange(0, BC)
    a_at = a + (row * a_row + query * a_query + head * a_head)[:, None] + c[None, :]
    x_at = x + image * x_image + n[None, :].to(tl.int64) * x_token + c[:, None]
    s = tl.zeros((BM, BN), tl.float32)
    for start in range(0, C, BC):
        inside = start + c < C
        left = tl.load(a_at + start, mask=live[:, None] & inside[None, :], other=0.0)
        right = tl.load(x_at + start, mask=(n < valid)[None, :] & inside[:, None], other=0.0)
        s = dot(left, right, s)
    s = tl.where((n < valid)[None, :], s * scale, float("-inf"))
    top = tl.max(s, 1)
    base = tl.where(top == float("-inf"), 0.0, top)
    at = stats + tl.program_id(1).to(tl.int64) * 2 * lines + line
    tl.store(at, top, mask=live)
    tl.store(at + lines, tl.sum(tl.exp2(s - base[:, None]), 1), mask=live)
    tl.store(scores + line[:, None] * pitch + n[None, :], s, mask=live[:, None] & (n < pitch)[None, :])


@triton.jit
def _mix(
    scores, stats, x, mixed, sums, lse, first_rows, tiles, lengths, seed, dropout_p, lines, T, H, N, pitch, C,
    key_tiles, m_row, m_query, m_head, x_image, x_token,
    HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (bound, blocks of C): M P x, in mixed; the first block writes sum M P in sums, and lse (both lines)."""
    image = tl.load(tiles + 2 * tl.program_id(0))
    if image < 0:
        return
    row, query, head, line, live = _lines(first_rows, tiles, image, T, H, BM)
    image = image.to(tl.int64)
    valid = tl.minimum(tl.load(lengths + image), N) if HAS_LENGTHS else N
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for tile in range(0, key_tiles):
        at = stats + tl.cast(tile, tl.int64) * 2 * lines + line
        other = tl.load(at, mask=live, other=0.0)
        new = tl.maximum(top, other)
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - base) + tl.load(at + lines, mask=live, other=0.0) * tl.exp2(other - base)
        top = new
    normaliser = top + tl.log2(total)  # minus infinity less itself where nothing visible is above it: NaN, as softmax
    number = tl.load(seed) if DROPOUT else 0
    n = tl.arange(0, BN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    x_at = x + image * x_image + n[:, None].to(tl.int64) * x_token + c[None, :]
    s_at = scores + line[:, None] * pitch + n[None, :]
    total = tl.zeros((BM,), tl.float32)
    result = tl.zeros((BM, BC), tl.float32)
    for start in range(0, valid, BN):
        seen = start + n < valid
        written = live[:, None] & (start + n < pitch)[None, :]  # a multiple of 16, so that loads are 16 bytes
        s = tl.load(s_at + start, mask=written, other=float("-inf"))
        right = tl.load(x_at + tl.cast(start, tl.int64) * x_token, mask=seen[:, None] & (c < C)[None, :], other=0.0)
        p = tl.where(seen[None, :], tl.exp2(s - normaliser[:, None]), 0.0)
        if DROPOUT:
            p = tl.where(keep_mask(number, line[:, None] * N + (start + n)[None, :], dropout_p), p, 0.0)
        total += tl.sum(p, 1)
        result = dot(p.to(right.dtype), right, result)
    at = mixed + (row * m_row + query * m_query + head * m_head)[:, None] + c[None, :]
    result = result / (1.0 - dropout_p)
    tl.store(at, result.to(mixed.dtype.element_ty), mask=live[:, None] & (c < C)[None, :])
    if tl.program_id(1) == 0:
        tl.store(lse + line, normaliser / LOG2E, mask=live)
        tl.store(sums + line, total / (1.0 - dropout_p), mask=live)


class Absorbed(NamedTuple):
    """What the two kernels make and read. A line is a (row, head, query); kernels' arguments in their order."""

    a: Tensor  # (H, R, T, C), the queries over tokens
    mixed: Tensor  # (H, R, T, C), M P x
    sums: Tensor  # float32 (R, H, T), sum M P
    lse: Tensor  # float32 (R, H, T)
    scores: Tensor  # float32 (lines, pitch), in base 2
    plan: Plan
    valid: Tensor  # lengths, or anything where there are none
    seed: Tensor  # on the device, or anything without dropout
    sizes: tuple[int, ...]  # lines, T, H, N, pitch, C


def launch_for(op: str, tables: dict[str, tuple[Launch, ...]], q: Tensor) -> Launch:
    """By the dtype, the heads and whether a row has one query or is a text: nothing that other rows decide, and they
    decide how far a text is padded."""
    small = q.shape[1] == 1 and q.shape[2] <= FEW
    kind = "float32" if q.dtype == torch.float32 else "few" if small else "many"
    return choose(op, kind, {k: v[0] for k, v in tables.items()}, q, q.shape[3])


def options_of(launch: Launch) -> dict[str, int]:
    return {**launch.blocks, "num_warps": launch.num_warps, "num_stages": launch.num_stages}


def by_head(rows: Tensor, weight: Tensor) -> Tensor:
    """(R, T, H, D) times each head's of (H * D, C) -> (H, R, T, C)."""
    heads, width = rows.shape[2:]
    made = torch.matmul(rows.flatten(0, 1).transpose(0, 1), weight.unflatten(0, (heads, width)))
    return made.unflatten(1, rows.shape[:2])


def steps_of(by_head: Tensor) -> tuple[int, int, int]:
    """The strides (row, query, head) of (H, R, T, C)."""
    return by_head.stride(1), by_head.stride(2), by_head.stride(0)


def absorb(
    q: Tensor,
    x: Tensor,
    w_k: Tensor,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Absorbed:
    """For at least one query and token."""
    rows, queries, heads, _ = q.shape
    images, keys, channels = x.shape
    lse = torch.empty(rows, heads, queries, dtype=torch.float32, device=q.device)
    a = by_head(q, w_k)
    mixed = torch.empty_like(a)
    launch = launch_for("cross_attention_tokens", LAUNCHES, q)
    made = plan(image_index, images, queries * heads, launch.blocks["BM"])
    pitch = triton.cdiv(keys, 16) * 16  # rows of scores that begin on 16 bytes
    key_tiles, sizes = triton.cdiv(keys, launch.blocks["BN"]), (lse.numel(), queries, heads, keys, pitch, channels)
    scores = torch.empty(lse.numel(), pitch, dtype=torch.float32, device=q.device)
    stats = torch.empty(key_tiles, 2, lse.numel(), dtype=torch.float32, device=q.device)
    sums = torch.empty_like(lse)
    valid = image_index if lengths is None else lengths.contiguous()
    number = on_device(seed if dropout_p else None, image_index)
    options = options_of(launch)
    _scores[(made.bound, key_tiles)](
        *(a, x, scores, stats, made.first_rows, made.tiles, valid, scale * LOG2E.value, *sizes),
        *(*steps_of(a), *x.stride()[:2]), HAS_LENGTHS=lengths is not None, **options,
    )  # fmt: skip
    _mix[(made.bound, triton.cdiv(channels, launch.blocks["BC"]))](
        *(scores, stats, x, mixed, sums, lse, made.first_rows, made.tiles, valid),
        *(number, dropout_p, *sizes, key_tiles, *steps_of(mixed)),
        *x.stride()[:2], HAS_LENGTHS=lengths is not None, DROPOUT=dropout_p > 0, **options,
    )  # fmt: skip
    return Absorbed(a, mixed, sums, lse, scores, made, valid, number, sizes)


def tokens_forward(
    q: Tensor,
    x: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows, queries, heads, width = q.shape
    if not q.numel() or not x.numel():
        lse = torch.empty(rows, heads, queries, dtype=torch.float32, device=q.device)
        return q.new_zeros(q.shape), lse.fill_(float("-inf"))
    made = absorb(q, x, w_k, image_index, lengths, scale, dropout_p, seed)
    weight = w_v.unflatten(0, (heads, width)).transpose(1, 2)
    if b_v is None:
        out = torch.matmul(made.mixed.flatten(1, 2), weight)
    else:
        added = made.sums.transpose(0, 1).flatten(1)[..., None] * b_v.view(heads, 1, width)
        out = torch.baddbmm(added.to(q.dtype), made.mixed.flatten(1, 2), weight)
    return out.transpose(0, 1).unflatten(0, (rows, queries)), made.lse


def cases() -> Iterator[Case]:
    """Both kernels of every entry, bfloat16 and float32's own, with dropout and lengths (without, there is less)."""
    for kind, launches in LAUNCHES.items():
        t = "*fp32" if kind == "float32" else "*bf16"
        pointers = {**dict.fromkeys(("a", "x", "mixed"), t), "first_rows": "*i32", "tiles": "*i32", "lengths": "*i32"}
        pointers |= {**dict.fromkeys(("scores", "stats", "sums", "lse"), "*fp32"), "seed": "*i64"}
        strides = ("a_row", "a_query", "a_head", "m_row", "m_query", "m_head", "x_image", "x_token")
        known = {**pointers, "scale": "fp32", "dropout_p": "fp32"}
        known |= dict.fromkeys(("lines", "T", "H", "N", "pitch", "C", "key_tiles", *strides), "i32")
        for i, launch in enumerate(launches):
            for part, kernel in (("scores", _scores), ("mix", _mix)):
                signature = {n: known[n] for n in kernel.arg_names if n in known}
                constants = {"HAS_LENGTHS": True, **({"DROPOUT": True} if part == "mix" else {}), **launch.blocks}
                divisible = tuple(n for n in signature if n in pointers or n in strides or n in ("C", "pitch"))
                name = f"{part}-{kind}-{'x'.join(map(str, launch.blocks.values()))}"
                yield Case("cross_attention_tokens", name, kernel, signature, constants, launch, i == 0, divisible)
