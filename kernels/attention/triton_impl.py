"""Attention in Triton, forward: a program takes BM queries of one head over key tiles of BN (the long form).

Full key tiles go without a mask, then what is left in narrow masked ones. Where every query sees all N keys these are
as wide as they must be (EDGE, from N mod BN): 197 = 3 x 64 + 5, 577 = 9 x 64 + 1 and 901 = 14 x 64 + 5 end in one of 16
columns. With lengths, offsets or `causal` they are 32 wide, and a row's own length says where they lie. Up to 64 tokens
the short form runs (triton_short_impl). Scores never leave the chip; softmax in base 2, the scale in its exponent.

Tiles follow the configuration, T and N; never the number of rows. Does not know gradients (triton_backward_impl).
Shapes: B batch, T queries, N keys, H heads, D head width.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.attention import triton_short_impl as short
from miss.kernels.attention.triton_rows_impl import (
    LOG2_E,
    SIZES,
    Problem,
    divisible,
    edge_width,
    line_of,
    normalise,
    packed,
    padded,
    rows_of,
    sequence,
    signature,
    start_of,
)
from miss.kernels.launches import Case, Launch, choose
from miss.kernels.triton_parts import dot, keep_mask

LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "long": (
        # 64 queries: one image of 577 tokens and 12 heads is 120 programs, not 60, on an H100's 132 multiprocessors.
        Launch({"BM": 64, "BN": 64}, 4, 3),
        Launch({"BM": 128, "BN": 64}, 8, 3),
        Launch({"BM": 128, "BN": 128}, 8, 2),
    ),
    "float32": (Launch({"BM": 32, "BN": 32}, 4, 1),),
    "short16": (Launch({"G": 4}, 4, 1),),
    "short32": (Launch({"G": 4}, 4, 1),),
    "short64": (Launch({"G": 1}, 4, 1),),
}


@triton.jit
def _step(
    acc, top, total, q, k, v, start, length, t, shift, line0, line_t, seed, k_n, v_n, N, log2_scale, dropout_p,
    D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """One key tile of online softmax; a causal query t sees keys to t + shift."""
    n = start + tl.arange(0, WIDTH)
    keys = rows_of(k, n, k_n, length, D, MASKED)
    values = rows_of(v, n, v_n, length, D, MASKED)
    s = dot(q, tl.trans(keys))
    if MASKED:
        visible = (n < length)[None, :]
        if CAUSAL:
            visible = visible & (n[None, :] <= (t + shift)[:, None])
        s = tl.where(visible, s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1) * log2_scale)
    base = tl.where(new == float("-inf"), 0.0, new)  # else -inf - -inf would be NaN before a finite score comes
    p = tl.exp2(s * log2_scale - base[:, None])
    old = tl.exp2(top - base)
    total = total * old + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(keep_mask(seed, (line0 + t * line_t)[:, None] * N + n[None, :], dropout_p), p, 0.0)
    acc = dot(p.to(values.dtype), values, acc * old[:, None])
    return acc, new, total


@triton.jit
def _forward(
    q, k, v, out, lse, rows, seed, q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, T, N, H, tiles, scale, dropout_p,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
    CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, VARLEN: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0) // tiles
    b, head, t0 = unit // H, unit % H, tl.program_id(0) % tiles * BM
    first, queries, keys, length = sequence(b, rows, T, N, LENGTHS, VARLEN)
    if t0 >= queries:
        return
    q = start_of(q, b, head, first, q_b, q_t, q_h, VARLEN)
    k = start_of(k, b, head, first, k_b, k_n, k_h, VARLEN)
    v = start_of(v, b, head, first, v_b, v_n, v_h, VARLEN)
    t = t0 + tl.arange(0, BM)
    d = tl.arange(0, D)
    inside = t < queries
    query = rows_of(q, t, q_t, queries, D, True)
    line0, line_t, dropout_seed = line_of(b, head, 0, first, T, H, VARLEN), 1, 0
    if VARLEN:
        line_t = H
    if DROPOUT:
        dropout_seed = tl.load(seed)
    log2_scale = scale * LOG2_E
    shift = keys - queries
    full, end = length // BN * BN, length
    if CAUSAL:
        full = tl.minimum(length, t0 + 1 + shift) // BN * BN
        end = tl.minimum(length, t0 + BM + shift)
    acc = tl.zeros((BM, D), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in tl.range(0, full, BN):
        acc, top, total = _step(
            acc, top, total, query, k, v, start, length, t, shift, line0, line_t, dropout_seed, k_n, v_n, N,
            log2_scale, dropout_p, D, BN, False, CAUSAL, DROPOUT,
        )  # fmt: skip
    for start in tl.range(full, end, EDGE, num_stages=1):  # one tile, but along causal's edge
        acc, top, total = _step(
            acc, top, total, query, k, v, start, length, t, shift, line0, line_t, dropout_seed, k_n, v_n, N,
            log2_scale, dropout_p, D, EDGE, True, CAUSAL, DROPOUT,
        )  # fmt: skip
    result, normaliser = normalise(acc, top, total, length, dropout_p, DROPOUT)
    at = out + ((first + t) * H + head)[:, None] * D + d[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + line0 + t * line_t, normaliser, mask=inside)


def _run(problem: Problem) -> tuple[Tensor, Tensor]:
    q, kind = problem.q, problem.kind
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(problem.lines, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    launch = choose("attention", kind, {name: table[0] for name, table in LAUNCHES.items()}, q, *problem.own)
    tensors = (q, problem.k, problem.v, out, lse, *problem.tensors(), *problem.sizes())
    numbers = (problem.scale, problem.dropout_p)
    options = problem.options(launch)
    if "G" in launch.blocks:
        size = int(kind.removeprefix("short"))
        groups = triton.cdiv(problem.heads, launch.blocks["G"])
        tiles = triton.cdiv(problem.queries, 16) if options["LENGTHS"] else 1
        grid = (problem.batch * groups, tiles)
        short.forward[grid](*tensors, *numbers, MOST=size, **options)
        return out, lse
    tiles, block = triton.cdiv(problem.queries, launch.blocks["BM"]), launch.blocks["BN"]
    edge = edge_width(problem.fixed_keys, block)
    _forward[(problem.batch * problem.heads * tiles,)](*tensors, tiles, *numbers, EDGE=edge, **options)
    return out, lse


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of (B, T, H, D); q, k and v are read where they lie."""
    return _run(padded(q, k, v, lengths, causal, scale, dropout_p, seed))


def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_length: int,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of packed (total, H, D)."""
    return _run(packed(q, k, v, offsets, max_length, causal, scale, dropout_p, seed))


def cases() -> Iterator[Case]:
    """Every launch, the defaults also at heads of 32 and with what changes a kernel most; float32's own; backward.

    One head is a case: Triton makes a constant of an argument that is 1."""
    from miss.kernels.attention import triton_backward_impl

    for kind, launches in LAUNCHES.items():
        for i, launch in enumerate(launches):
            yield _case(kind, launch, "", 64, i == 0)
        if kind != "float32":
            yield _case(kind, launches[0], "", 32, True)
        if kind in ("long", "short32", "short64"):
            for option in ("lengths-dropout", "causal", "varlen"):
                yield _case(kind, launches[0], option, 64, True)
    yield _case("short32", LAUNCHES["short32"][0], "one-head", 64, True)
    yield from triton_backward_impl.cases()


def _case(kind: str, launch: Launch, option: str, width: int, default: bool) -> Case:
    element, long = "fp32" if kind == "float32" else "bf16", "G" not in launch.blocks
    types = signature(element, f"q k v out lse rows seed {SIZES}{' tiles' if long else ''} scale dropout_p")
    constants: dict[str, Any] = {"D": width, **launch.blocks}
    constants |= {flag.upper(): flag in option for flag in ("causal", "lengths", "varlen", "dropout")}
    if option == "one-head":
        types.pop("H")
        constants["H"] = 1
    if long:
        constants["EDGE"] = edge_width(None if option else 577, launch.blocks["BN"])
    else:
        constants["MOST"] = int(kind.removeprefix("short"))
    name = "-".join(filter(None, (kind, "x".join(map(str, launch.blocks.values())), str(width), option)))
    kernel = _forward if long else short.forward
    return Case("attention", name, kernel, types, constants, launch, default, divisible(types))
