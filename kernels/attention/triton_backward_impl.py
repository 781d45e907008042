"""Attention's gradients in Triton: one kernel for dq, one for dk and dv, probabilities made again from lse. No atomics.

`_dq`: a program owns BM queries of a head and runs over key tiles as forward does; it also sums dout * out for its
rows (delta), which both need: a pass of its own would read dout once more. `_dkv` then: a program owns BN keys and runs
over query tiles, full ones and narrow masked ones (EDGE, from T mod BM), products transposed so that what
multiplies dout and q stays in registers. Up to 64 tokens the short form's one kernel runs (triton_short_impl).

Seven products of T x N x D instead of five: the scores and dP are made twice. Does not know the forward pass.
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
    "long": (Launch({"BM": 64, "BN": 64}, 4, 2), Launch({"BM": 128, "BN": 64}, 8, 2)),
    "long_keys": (Launch({"BM": 64, "BN": 64}, 4, 2), Launch({"BM": 64, "BN": 128}, 8, 2)),
    # Dropout's 64-bit arithmetic takes registers: 64 x 64 spilled on sm_80 (dk and dv 272 bytes, dq 8), these do not.
    "long_dropout": (Launch({"BM": 64, "BN": 32}, 4, 2),),
    "long_dropout_keys": (Launch({"BM": 32, "BN": 64}, 4, 2),),
    "float32": (Launch({"BM": 32, "BN": 16}, 4, 1),),
    "float32_keys": (Launch({"BM": 16, "BN": 32}, 4, 1),),
    "short16": (Launch({"G": 4}, 4, 1),),
    # A warp a head, four heads a program, spilled with causal and dropout on sm_90 (80 bytes); two warps hold one head.
    "short32": (Launch({"G": 1}, 2, 1),),
    "short64": (Launch({"G": 1}, 4, 1),),
}


@triton.jit
def _query_step(
    acc, q, dout, normaliser, delta, k, v, start, length, t, shift, line0, line_t, seed, k_n, v_n, N,
    log2_scale, dropout_p,
    D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dq / scale of one key tile, added."""
    n = start + tl.arange(0, WIDTH)
    keys = rows_of(k, n, k_n, length, D, MASKED)
    values = rows_of(v, n, v_n, length, D, MASKED)
    p = tl.exp2(dot(q, tl.trans(keys)) * log2_scale - normaliser[:, None])
    if MASKED:
        visible = (n < length)[None, :]
        if CAUSAL:
            visible = visible & (n[None, :] <= (t + shift)[:, None])
        p = tl.where(visible, p, 0.0)
    dp = dot(dout, tl.trans(values))
    if DROPOUT:
        kept = keep_mask(seed, (line0 + t * line_t)[:, None] * N + n[None, :], dropout_p)
        dp = tl.where(kept, dp * (1.0 / (1.0 - dropout_p)), 0.0)
    ds = p * (dp - delta[:, None])
    return dot(ds.to(keys.dtype), keys, acc)


@triton.jit
def _dq(
    dout, q, k, v, out, lse, delta, dq, rows, seed,
    q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, T, N, H, tiles, scale, dropout_p,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
    CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, VARLEN: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dout, out and dq dense."""
    unit = tl.program_id(0) // tiles
    b, head, t0 = unit // H, unit % H, tl.program_id(0) % tiles * BM
    first, queries, keys, length = sequence(b, rows, T, N, LENGTHS, VARLEN)
    if t0 >= queries:
        return
    k = start_of(k, b, head, first, k_b, k_n, k_h, VARLEN)
    v = start_of(v, b, head, first, v_b, v_n, v_h, VARLEN)
    t = t0 + tl.arange(0, BM)
    line0, line_t = line_of(b, head, 0, first, T, H, VARLEN), 1
    if VARLEN:
        line_t = H
    line = line0 + t * line_t
    dense = (first * H + head) * D
    query = rows_of(start_of(q, b, head, first, q_b, q_t, q_h, VARLEN), t, q_t, queries, D, True)
    incoming = rows_of(dout + dense, t, H * D, queries, D, True)
    result = rows_of(out + dense, t, H * D, queries, D, True)
    sums = tl.sum(incoming.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + line, sums, mask=t < queries)
    # Infinity makes probabilities of 0 in the rows that are not there.
    normaliser = tl.load(lse + line, mask=t < queries, other=float("inf")) * LOG2_E
    dropout_seed = 0
    if DROPOUT:
        dropout_seed = tl.load(seed)
    shift = keys - queries
    full, end = length // BN * BN, length
    if CAUSAL:
        full = tl.minimum(length, t0 + 1 + shift) // BN * BN
        end = tl.minimum(length, t0 + BM + shift)
    acc = tl.zeros((BM, D), tl.float32)
    for start in tl.range(0, full, BN):
        acc = _query_step(
            acc, query, incoming, normaliser, sums, k, v, start, length, t, shift, line0, line_t, dropout_seed,
            k_n, v_n, N, scale * LOG2_E, dropout_p, D, BN, False, CAUSAL, DROPOUT,
        )  # fmt: skip
    for start in tl.range(full, end, EDGE, num_stages=1):
        acc = _query_step(
            acc, query, incoming, normaliser, sums, k, v, start, length, t, shift, line0, line_t, dropout_seed,
            k_n, v_n, N, scale * LOG2_E, dropout_p, D, EDGE, True, CAUSAL, DROPOUT,
        )  # fmt: skip
    at = dq + dense + t[:, None] * (H * D) + tl.arange(0, D)[None, :]
    tl.store(at, (acc * scale).to(dq.dtype.element_ty), mask=(t < queries)[:, None])


@triton.jit
def _key_step(
    dk, dv, keys, values, q, dout, lse, delta, line0, start, queries, n, shift, seed, q_t, line_t, N, H,
    log2_scale, dropout_p,
    D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv of one query tile, added; everything lies transposed, keys down and queries across."""
    t = start + tl.arange(0, WIDTH)
    query = rows_of(q, t, q_t, queries, D, MASKED)
    incoming = rows_of(dout, t, H * D, queries, D, MASKED)
    line = line0 + t * line_t
    if MASKED:
        normaliser = tl.load(lse + line, mask=t < queries, other=float("inf")) * LOG2_E
        sums = tl.load(delta + line, mask=t < queries, other=0.0)
    else:
        normaliser = tl.load(lse + line) * LOG2_E
        sums = tl.load(delta + line)
    p = tl.exp2(dot(keys, tl.trans(query)) * log2_scale - normaliser[None, :])
    if CAUSAL:
        p = tl.where(n[:, None] <= (t + shift)[None, :], p, 0.0)
    dp = dot(values, tl.trans(incoming))
    dropped = p
    if DROPOUT:
        kept = keep_mask(seed, line[None, :] * N + n[:, None], dropout_p)
        dropped = tl.where(kept, p * (1.0 / (1.0 - dropout_p)), 0.0)
        dp = tl.where(kept, dp * (1.0 / (1.0 - dropout_p)), 0.0)
    dv = dot(dropped.to(incoming.dtype), incoming, dv)
    ds = p * (dp - sums[None, :])
    dk = dot(ds.to(query.dtype), query, dk)
    return dk, dv


@triton.jit
def _dkv(
    dout, q, k, v, lse, delta, dk, dv, rows, seed,
    q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, T, N, H, tiles, scale, dropout_p,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
    CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, VARLEN: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dout, dk and dv dense; zeros for keys that are not visible."""
    unit = tl.program_id(0) // tiles
    b, head, n0 = unit // H, unit % H, tl.program_id(0) % tiles * BN
    first, queries, keys, length = sequence(b, rows, T, N, LENGTHS, VARLEN)
    n = n0 + tl.arange(0, BN)
    source = b.to(tl.int64) * N  # the number of the first key's token
    line_t = 1
    if VARLEN:
        source, line_t = first, H
        if n0 >= length:
            return
    key_grad = tl.zeros((BN, D), tl.float32)
    value_grad = tl.zeros((BN, D), tl.float32)
    if n0 < length:
        q = start_of(q, b, head, first, q_b, q_t, q_h, VARLEN)
        dout += (first * H + head) * D
        key = rows_of(start_of(k, b, head, first, k_b, k_n, k_h, VARLEN), n, k_n, length, D, True)
        value = rows_of(start_of(v, b, head, first, v_b, v_n, v_h, VARLEN), n, v_n, length, D, True)
        line0 = line_of(b, head, 0, first, T, H, VARLEN)
        dropout_seed = 0
        if DROPOUT:
            dropout_seed = tl.load(seed)
        shift = keys - queries
        start, full = 0, queries // BM * BM
        if CAUSAL:
            start = tl.maximum(n0 - shift, 0) // BM * BM
        for t0 in tl.range(start, full, BM):
            key_grad, value_grad = _key_step(
                key_grad, value_grad, key, value, q, dout, lse, delta, line0, t0, queries, n, shift, dropout_seed,
                q_t, line_t, N, H, scale * LOG2_E, dropout_p, D, BM, False, CAUSAL, DROPOUT,
            )  # fmt: skip
        for t0 in tl.range(full, queries, EDGE, num_stages=1):
            key_grad, value_grad = _key_step(
                key_grad, value_grad, key, value, q, dout, lse, delta, line0, t0, queries, n, shift, dropout_seed,
                q_t, line_t, N, H, scale * LOG2_E, dropout_p, D, EDGE, True, CAUSAL, DROPOUT,
            )  # fmt: skip
    seen = (n < length)[:, None]  # a key past the length took part as zeros: its sums mean nothing
    key_grad = tl.where(seen, key_grad * scale, 0.0)
    value_grad = tl.where(seen, value_grad, 0.0)
    at = (source * H + head) * D + n[:, None] * (H * D) + tl.arange(0, D)[None, :]
    tl.store(dk + at, key_grad.to(dk.dtype.element_ty), mask=(n < keys)[:, None])
    tl.store(dv + at, value_grad.to(dv.dtype.element_ty), mask=(n < keys)[:, None])


def _run(problem: Problem, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, kind = problem.q, problem.k, problem.v, problem.kind
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
    defaults = {name: table[0] for name, table in LAUNCHES.items()}
    rest = (*problem.tensors(), *problem.sizes())
    numbers = (problem.scale, problem.dropout_p)
    if kind == "long" and problem.seed is not None:
        kind = "long_dropout"
    launch = choose("attention_backward", kind, defaults, q, *problem.own)
    if "G" in launch.blocks:
        size = int(kind.removeprefix("short"))
        grid = (problem.batch * triton.cdiv(problem.heads, launch.blocks["G"]),)
        tensors = (dout, q, k, v, out, lse, dq, dk, dv)
        short.backward[grid](*tensors, *rest, *numbers, BT=size, BN=size, **problem.options(launch))
        return dq, dk, dv
    delta, units = torch.empty_like(lse), problem.batch * problem.heads
    tiles, block = triton.cdiv(problem.queries, launch.blocks["BM"]), launch.blocks["BN"]
    edge = edge_width(problem.fixed_keys, block)
    _dq[(units * tiles,)](
        dout, q, k, v, out, lse, delta, dq, *rest, tiles, *numbers, EDGE=edge, **problem.options(launch)
    )
    launch = choose("attention_backward", f"{kind}_keys", defaults, q, *problem.own)
    tiles, block = triton.cdiv(problem.keys, launch.blocks["BN"]), launch.blocks["BM"]
    edge = edge_width(None if problem.varlen else problem.queries, block)
    _dkv[(units * tiles,)](
        dout, q, k, v, lse, delta, dk, dv, *rest, tiles, *numbers, EDGE=edge, **problem.options(launch)
    )
    return dq, dk, dv


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, T, H, D), dk and dv (B, N, H, D), dense."""
    return _run(padded(q, k, v, lengths, causal, scale, dropout_p, seed), dout, out, lse)


def varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    max_length: int,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv (total, H, D), dense."""
    return _run(packed(q, k, v, offsets, max_length, causal, scale, dropout_p, seed), dout, out, lse)


def cases() -> Iterator[Case]:
    """Every launch, the defaults also at heads of 32 and with what changes a kernel most; float32's own."""
    for kind, launches in LAUNCHES.items():
        least = "dropout" if "dropout" in kind else ""
        for i, launch in enumerate(launches):
            yield _case(kind, launch, least, 64, i == 0)
        if kind.startswith("long") or kind == "short32":
            yield _case(kind, launches[0], least, 32, True)
            most = "lengths-causal" if kind in ("long", "long_keys") else "lengths-causal-dropout"
            yield _case(kind, launches[0], most, 64, True)
    yield _case("short32", LAUNCHES["short32"][0], "one-head", 64, True)


def _case(kind: str, launch: Launch, option: str, width: int, default: bool) -> Case:
    constants: dict[str, Any] = {"D": width, **launch.blocks}
    constants |= {flag.upper(): flag in option for flag in ("causal", "lengths", "varlen", "dropout")}
    kernel, tensors, tiles = _dq, "dout q k v out lse delta dq rows seed", " tiles"
    if kind.endswith("_keys"):
        kernel, tensors = _dkv, "dout q k v lse delta dk dv rows seed"
    if "G" in launch.blocks:
        kernel, tensors, tiles = short.backward, "dout q k v out lse dq dk dv rows seed", ""
        constants["BT"] = constants["BN"] = int(kind.removeprefix("short"))
    else:
        constants["EDGE"] = edge_width(
            None if "causal" in option else 577, launch.blocks["BM" if kernel is _dkv else "BN"]
        )
    types = signature("fp32" if "float32" in kind else "bf16", f"{tensors} {SIZES}{tiles} scale dropout_p")
    if option == "one-head":
        types.pop("H")
        constants["H"] = 1
    name = "-".join(filter(None, (kind, "x".join(map(str, launch.blocks.values())), str(width), option)))
    return Case("attention_backward", name, kernel, types, constants, launch, default, divisible(types))
