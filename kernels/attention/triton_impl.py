"""Attention in Triton, forward: a program a query tile of one head (long), or all of several heads (short).

Knows tiles; does not know which tower asks. Scores never leave the chip; softmax in base 2, the scale in its exponent.

Long: BM query rows run over key tiles of BN, the full ones without a mask, then what is left in one masked tile. Where
every row has N keys that tile is only as wide as it must be (TAIL, from N mod BN): 577 = 9 x 64 + 1 and 901 = 14 x 64 + 5
end in 16 columns, 197 = 3 x 64 + 5 too. With lengths, offsets or `causal` it is BN wide: a row's own length decides.
Short: queries and keys fit one tile of at most 64; a program takes G heads, a warp each, as one product with G planes.

Tiles follow the configuration, T and N: never the batch. Shapes: B batch, T queries, N keys, H heads, D head width.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.launches import Case, Launch, choose
from miss.kernels.triton_parts import dot, keep_mask

SHORT = 64  # queries and keys that one tile holds
LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "long": (
        # 64 query rows: 12 heads of 577 tokens are 120 programs, not 60, on 132 multiprocessors.
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
def sequence(b, rows, T, N, LENGTHS: tl.constexpr, VARLEN: tl.constexpr):
    """Of batch row b: its first token's number among the queries' (int64), queries, keys, keys that are visible."""
    first, queries, keys = b.to(tl.int64) * T, T, N
    length = N
    if LENGTHS:
        length = tl.minimum(tl.load(rows + b).to(tl.int32), N)
    if VARLEN:
        first = tl.load(rows + b).to(tl.int64)
        length = (tl.load(rows + b + 1) - first).to(tl.int32)
        queries = length
        keys = length
    return first, queries, keys, length


@triton.jit
def start_of(x, b, head, first, batch_stride, row_stride, head_stride, VARLEN: tl.constexpr):
    """Where head `head` of batch row b begins."""
    if VARLEN:
        at = first * row_stride
    else:
        at = b.to(tl.int64) * batch_stride
    return x + at + head * head_stride


@triton.jit
def line_of(b, head, t, first, T, H, VARLEN: tl.constexpr):
    """The number (int64) of query t among the rows of lse: (B, H, T), packed (total, H)."""
    if VARLEN:
        return (first + t) * H + head
    else:
        return (b.to(tl.int64) * H + head) * T + t


@triton.jit
def _normalise(acc, top, total, length, dropout_p, DROPOUT: tl.constexpr):
    """(out, lse): zeros and -inf where nothing is visible; 0 / 0 = NaN where all that is visible is -inf."""
    if DROPOUT:
        acc = acc * (1.0 / (1.0 - dropout_p))
    out = tl.where(length > 0, acc / tl.expand_dims(total, -1), 0.0)
    return out, (top + tl.log2(total)) * 0.6931471805599453


@triton.jit
def _step(
    acc, top, total, q, k, v, start, length, below, line, seed, k_n, v_n, N, log2_scale, dropout_p,
    D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """One key tile of online softmax; `below` is the last key that each query sees."""
    n = start + tl.arange(0, WIDTH)
    d = tl.arange(0, D)
    if MASKED:
        keys = tl.load(k + n[:, None] * k_n + d[None, :], mask=(n < length)[:, None], other=0.0)
        values = tl.load(v + n[:, None] * v_n + d[None, :], mask=(n < length)[:, None], other=0.0)
    else:
        keys = tl.load(k + n[:, None] * k_n + d[None, :])
        values = tl.load(v + n[:, None] * v_n + d[None, :])
    s = dot(q, tl.trans(keys))
    if MASKED:
        visible = (n < length)[None, :]
        if CAUSAL:
            visible = visible & (n[None, :] <= below[:, None])
        s = tl.where(visible, s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1) * log2_scale)
    base = tl.where(new == float("-inf"), 0.0, new)  # else -inf - -inf would be NaN before a finite score comes
    p = tl.exp2(s * log2_scale - base[:, None])
    old = tl.exp2(top - base)
    total = total * old + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(keep_mask(seed, line[:, None] * N + n[None, :], dropout_p), p, 0.0)
    acc = dot(p.to(values.dtype), values, acc * old[:, None])
    return acc, new, total


@triton.jit
def _forward(
    q, k, v, out, lse, rows, seed, q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, T, N, H, tiles, scale, dropout_p,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr,
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
    query = tl.load(q + t[:, None] * q_t + d[None, :], mask=inside[:, None], other=0.0)
    line, dropout_seed = t, 0
    if DROPOUT:
        line, dropout_seed = line_of(b, head, t, first, T, H, VARLEN), tl.load(seed)
    log2_scale = scale * 1.4426950408889634
    below = t + keys - queries
    full, end = length // BN * BN, length
    if CAUSAL:
        full = tl.minimum(length, t0 + 1 + keys - queries) // BN * BN
        end = tl.minimum(length, t0 + BM + keys - queries)
    acc = tl.zeros((BM, D), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in tl.range(0, full, BN):
        acc, top, total = _step(
            acc, top, total, query, k, v, start, length, below, line, dropout_seed, k_n, v_n, N, log2_scale, dropout_p,
            D, BN, False, CAUSAL, DROPOUT,
        )  # fmt: skip
    for start in tl.range(full, end, TAIL, num_stages=1):  # one tile, but along causal's edge
        acc, top, total = _step(
            acc, top, total, query, k, v, start, length, below, line, dropout_seed, k_n, v_n, N, log2_scale, dropout_p,
            D, TAIL, True, CAUSAL, DROPOUT,
        )  # fmt: skip
    result, normaliser = _normalise(acc, top, total, length, dropout_p, DROPOUT)
    at = out + ((first + t) * H + head)[:, None] * D + d[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + line_of(b, head, t, first, T, H, VARLEN), normaliser, mask=inside)


@triton.jit
def by_head(head, row, head_stride, row_stride, G: tl.constexpr):
    """Offsets (G, rows) of G heads; (rows,) of one, whose number is a scalar."""
    if G == 1:
        return head * head_stride + row * row_stride
    else:
        return head[:, None] * head_stride + row[None, :] * row_stride


@triton.jit
def inside_of(head, row, H, rows, G: tl.constexpr):
    """Which of the rows that `by_head` places there are."""
    if G == 1:
        return row < rows
    else:
        return (head < H)[:, None] & (row < rows)[None, :]


@triton.jit
def flip(x):
    """The last two axes exchanged."""
    if len(x.shape) == 2:
        return tl.trans(x)
    else:
        return tl.permute(x, (0, 2, 1))


@triton.jit
def tile_of(x, head, row, H, rows, head_stride, row_stride, D: tl.constexpr, G: tl.constexpr):
    """(G, rows, D), or (rows, D) of one head; zeros past the last row or head."""
    at = tl.expand_dims(by_head(head, row, head_stride, row_stride, G), -1) + tl.arange(0, D)
    return tl.load(x + at, mask=tl.expand_dims(inside_of(head, row, H, rows, G), -1), other=0.0)


@triton.jit
def place(rows, T, N, H, BT: tl.constexpr, G: tl.constexpr, LENGTHS: tl.constexpr, VARLEN: tl.constexpr):
    """Of a program of the short form: batch row, its heads, and what `sequence` and `line_of` say of them."""
    groups = tl.cdiv(H, G)
    b = tl.program_id(0) // groups
    head = tl.program_id(0) % groups
    if G > 1:
        head = head * G + tl.arange(0, G)
    first, queries, keys, length = sequence(b, rows, T, N, LENGTHS, VARLEN)
    t = tl.arange(0, BT)
    if VARLEN:
        line = by_head(head, first + t, 1, H, G)
    else:
        line = by_head(b.to(tl.int64) * H + head, t, T, 1, G)
    return b, head, first, queries, keys, length, line


@triton.jit
def visible_in(t, n, queries, keys, length, CAUSAL: tl.constexpr):
    """(queries, keys), or (1, keys): which keys a query sees."""
    visible = (n < length)[None, :]
    if CAUSAL:
        visible = visible & (n[None, :] <= t[:, None] + (keys - queries))
    return visible


@triton.jit
def _short(
    q, k, v, out, lse, rows, seed, q_b, q_t, q_h, k_b, k_n, k_h, v_b, v_n, v_h, T, N, H, scale, dropout_p,
    D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, G: tl.constexpr,
    CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, VARLEN: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    b, head, first, queries, keys, length, line = place(rows, T, N, H, BT, G, LENGTHS, VARLEN)
    t, n = tl.arange(0, BT), tl.arange(0, BN)
    query = tile_of(start_of(q, b, 0, first, q_b, q_t, q_h, VARLEN), head, t, H, queries, q_h, q_t, D, G)
    key = tile_of(start_of(k, b, 0, first, k_b, k_n, k_h, VARLEN), head, n, H, length, k_h, k_n, D, G)
    value = tile_of(start_of(v, b, 0, first, v_b, v_n, v_h, VARLEN), head, n, H, length, v_h, v_n, D, G)
    s = tl.where(visible_in(t, n, queries, keys, length, CAUSAL), dot(query, flip(key)), float("-inf"))
    log2_scale = scale * 1.4426950408889634
    top = tl.max(s, -1) * log2_scale
    base = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(s * log2_scale - tl.expand_dims(base, -1))
    total = tl.sum(p, -1)
    if DROPOUT:
        p = tl.where(keep_mask(tl.load(seed), tl.expand_dims(line, -1) * N + n, dropout_p), p, 0.0)
    acc = dot(p.to(value.dtype), value)
    result, normaliser = _normalise(acc, top, total, length, dropout_p, DROPOUT)
    inside = inside_of(head, t, H, queries, G)
    at = by_head(head, first + t, 1, H, G) * D
    tl.store(
        out + (tl.expand_dims(at, -1) + tl.arange(0, D)),
        result.to(out.dtype.element_ty),
        mask=tl.expand_dims(inside, -1),
    )
    tl.store(lse + line, normaliser, mask=inside)


def shape_class(q: Tensor, queries: int, keys: int) -> str:
    if q.dtype == torch.float32:
        return "float32"
    longest = max(queries, keys)
    return f"short{max(16, triton.next_power_of_2(longest))}" if longest <= SHORT else "long"


def seed_on(device: torch.device, seed: Tensor | None) -> Tensor | None:
    """A seed on the host goes along as an argument of an addition: nothing is copied, nothing waits."""
    if seed is None or seed.device == device:
        return seed
    return torch.zeros((), dtype=torch.int64, device=device) + seed


def tail_width(size: int, block: int) -> int:
    """The narrowest tile for what is left of `size` behind full tiles."""
    return min(block, max(16, triton.next_power_of_2(size % block)))


def strides(t: Tensor) -> tuple[int, int, int]:
    """(batch, row, head) of (B, T, H, D); 0 for the batch of packed (total, H, D)."""
    return (0, *t.stride()[:2]) if t.dim() == 3 else (t.stride(0), t.stride(1), t.stride(2))


def _run(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, sizes: tuple[int, int, int], causal: bool, varlen: bool,
    scale: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rows`: lengths or offsets; sizes: B, T, N."""
    (batch, queries, keys), (heads, width) = sizes, q.shape[-2:]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lines = q.shape[:2] if varlen else (batch, heads, queries)
    lse = torch.empty(lines, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    kind = shape_class(q, queries, keys)
    launch = choose("attention", kind, {name: table[0] for name, table in LAUNCHES.items()}, q.device)
    seed = seed_on(q.device, seed)
    head = (q, k, v, out, lse, q if rows is None else rows, q if seed is None else seed)
    tail = (*strides(q), *strides(k), *strides(v), queries, keys, heads)
    options: dict[str, Any] = {
        "D": width, "CAUSAL": causal, "LENGTHS": rows is not None and not varlen, "VARLEN": varlen,
        "DROPOUT": seed is not None, "num_warps": launch.num_warps, "num_stages": launch.num_stages, **launch.blocks,
    }  # fmt: skip
    if "G" in launch.blocks:
        size = int(kind.removeprefix("short"))
        grid = (batch * triton.cdiv(heads, launch.blocks["G"]),)
        _short[grid](*head, *tail, scale, dropout_p, BT=size, BN=size, **options)
        return out, lse
    tiles, block = triton.cdiv(queries, launch.blocks["BM"]), launch.blocks["BN"]
    every = rows is None and not causal  # every query sees all N keys
    _forward[(batch * heads * tiles,)](
        *head, *tail, tiles, scale, dropout_p, TAIL=tail_width(keys, block) if every else block, **options
    )
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
    sizes = (q.shape[0], q.shape[1], k.shape[1])
    return _run(q, k, v, lengths, sizes, causal, False, scale, dropout_p, seed)


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
    return _run(q, k, v, offsets, (len(offsets) - 1, max_length, max_length), causal, True, scale, dropout_p, seed)


def signature(t: str, names: str) -> dict[str, str]:
    """Types of a kernel's arguments by their names: element type `t`, but for what is known to differ."""
    known = {"lse": "*fp32", "delta": "*fp32", "rows": "*i32", "seed": "*i64", "scale": "fp32", "dropout_p": "fp32"}
    numbers = {"T", "N", "H", "tiles"}
    return {n: known.get(n, "i32" if n in numbers or "_" in n else f"*{t}") for n in names.split()}


SIZES = "q_b q_t q_h k_b k_n k_h v_b v_n v_h T N H"


def cases() -> Iterator[Case]:
    """Every launch at both head widths without options, the defaults with each; float32's own."""
    for kind, launches in LAUNCHES.items():
        t = "fp32" if kind == "float32" else "bf16"
        for i, launch in enumerate(launches):
            yield from _cases(kind, launch, t, "", 64, i == 0)
            if i == 0 and t != "fp32":
                yield from _cases(kind, launch, t, "", 32, True)
                options = ("lengths-dropout", "causal", "varlen") if kind != "short16" else ("lengths-causal-dropout",)
                for option in options:
                    yield from _cases(kind, launch, t, option, 64, True)


def _cases(kind: str, launch: Launch, t: str, option: str, width: int, default: bool) -> Iterator[Case]:
    long = "G" not in launch.blocks
    names = f"q k v out lse rows seed {SIZES}{' tiles' if long else ''} scale dropout_p"
    flags = {f.upper(): f in option for f in ("causal", "lengths", "varlen", "dropout")}
    constants: dict[str, Any] = {"D": width, **launch.blocks, **flags}
    if long:
        constants["TAIL"] = launch.blocks["BN"] if option else 16
    else:
        constants["BT"] = constants["BN"] = int(kind.removeprefix("short"))
    types = signature(t, names)
    divisible = tuple(n for n, type in types.items() if type[0] == "*" or (n in SIZES and n not in "TNH"))
    name = "-".join(filter(None, (kind, "x".join(map(str, launch.blocks.values())), str(width), option)))
    yield Case("attention", name, _forward if long else _short, types, constants, launch, default, divisible)
