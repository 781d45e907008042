"""The contrastive loss in Triton: student and teacher rows against each tile of columns once, no matrix in memory.

Forward, a program (BM rows, one of S parts of the columns; part 0 is the batch, the others share the queue): both rows
stay on chip, each tile K (BN, C) is read once for s = x K^T / T and s' = x' K^T / T, and online, under running maxima
m and m':  l = sum e^(s-m),  a = sum e^(s-m) s,  l' = sum e^(s'-m'),  a' = sum e^(s'-m') s.  `_combine` merges the parts
in a fixed order: loss = lse(s) - alpha a'/l' - (1 - alpha) s[own], and a gives the temperature's slope for nothing.
Backward, the same programs: ds = e^(s-lse) - alpha e^(s'-lse') - (1 - alpha)[own] again, rounded to the features'
dtype for ds K, which a program sums for its part alone; the parts are added in order. No atomics, so that two runs are
bitwise alike.

FLOPs 4 B (N + Q) C forward, 6 backward. Bytes: the columns once a pass for each BM rows (the second row of programs
finds them in the L2), 28 S B of sums, 4 S B C of parts backward; the original's matrices of B (N + Q) float32 are never
made. Knows tiles and parts; does not know who fills the queue.

Shapes: B rows, N columns of the batch, Q columns of the queue, C width, S parts.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.contrastive.reference import FLOOR
from miss.kernels.launches import Case, Launch, choose
from miss.kernels.triton_parts import dot

LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "forward": (Launch({"BM": 32, "BN": 64}, 4, 2), Launch({"BM": 64, "BN": 64}, 8, 2)),
    "backward": (Launch({"BM": 32, "BN": 32}, 4, 2),),
    "forward-float32": (Launch({"BM": 16, "BN": 16}, 4, 1),),
    "backward-float32": (Launch({"BM": 16, "BN": 16}, 4, 1),),
    "negatives": (Launch({"BM": 16, "BN": 16}, 4, 2),),  # one stage spills on sm_90 with Triton 3.7
}
PART = 512  # columns of the queue a program takes: a function of nothing else, so that no row sees its batch
_IDS = ("batch_ids", "queue_ids", "ids")


@triton.jit
def _rows(x, row, B, C, CP: tl.constexpr):
    c = tl.arange(0, CP)
    at = x + row[:, None].to(tl.int64) * C + c[None, :]
    return tl.load(at, mask=(row < B)[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def _keep(column, row, count, ids, own_id, first, own_part, HAS_IDS: tl.constexpr):
    """(BM, BN): which columns count, and which one is the row's own."""
    own = (column[None, :] == (row + first)[:, None]) & own_part
    keep = (column < count)[None, :] & (own | (row >= 0)[:, None])
    if HAS_IDS:
        other = tl.load(ids + column, mask=column < count, other=0)
        keep = keep & (own | (other[None, :] != own_id[:, None]))
    return keep, own


@triton.jit
def _online(top, total, weighted, s, value, keep):
    """A tile's part in the running maximum, sum of exponentials and their sum weighted by `value`."""
    new = tl.maximum(top, tl.max(tl.where(keep, s, float("-inf")), 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    old = tl.exp(top - base)
    e = tl.where(keep, tl.exp(s - base[:, None]), 0.0)
    return new, total * old + tl.sum(e, 1), weighted * old + tl.sum(e * value, 1)


@triton.jit
def _forward(
    student, teacher, batch, queue, temperature, batch_ids, queue_ids, partial, own_logit, B, N, Q, C, first, PART,
    HAS_IDS: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """partial (S, 6, B): m, l, a, m', l', a'. own_logit (B,), by part 0."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    live = row < B
    x = _rows(student, row, B, C, CP)
    y = _rows(teacher, row, B, C, CP)
    scale = 1.0 / tl.load(temperature)
    columns, ids, start, stop = batch, batch_ids, 0, N
    if part > 0:
        columns, ids, start, stop = queue, queue_ids, (part - 1) * PART, tl.minimum(part * PART, Q)
    own_id = tl.zeros((BM,), tl.int64)
    if HAS_IDS:
        own_id = tl.load(batch_ids + first + row, mask=live, other=0)
    top = tl.full((BM,), float("-inf"), tl.float32)
    taught = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    weighted = tl.zeros((BM,), tl.float32)
    taught_total = tl.zeros((BM,), tl.float32)
    taught_weighted = tl.zeros((BM,), tl.float32)
    logit = tl.zeros((BM,), tl.float32)
    for at in range(start, stop, BN):
        column = at + tl.arange(0, BN)
        k = tl.trans(_rows(columns, column, stop, C, CP))
        s = dot(x, k) * scale
        t = dot(y, k) * scale
        keep, own = _keep(column, row, stop, ids, own_id, first, part == 0, HAS_IDS)
        logit += tl.sum(tl.where(own, s, 0.0), 1)
        top, total, weighted = _online(top, total, weighted, s, s, keep)
        taught, taught_total, taught_weighted = _online(taught, taught_total, taught_weighted, t, s, keep)
    out = partial + part.to(tl.int64) * 6 * B + row
    tl.store(out, top, mask=live)
    tl.store(out + B, total, mask=live)
    tl.store(out + 2 * B, weighted, mask=live)
    tl.store(out + 3 * B, taught, mask=live)
    tl.store(out + 4 * B, taught_total, mask=live)
    tl.store(out + 5 * B, taught_weighted, mask=live)
    if part == 0:
        tl.store(own_logit + row, logit, mask=live)


@triton.jit
def _merged(at, B, S, live, BM: tl.constexpr):
    """(lse, weighted sum / sum) over the parts, in their order; `at` points to part 0's maximum."""
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    weighted = tl.zeros((BM,), tl.float32)
    for part in range(0, S):
        here = at + tl.cast(part, tl.int64) * 6 * B
        other = tl.load(here, mask=live, other=0.0)
        new = tl.maximum(top, other)
        base = tl.where(new == float("-inf"), 0.0, new)
        old, add = tl.exp(top - base), tl.exp(other - base)
        total = total * old + tl.load(here + B, mask=live, other=1.0) * add
        weighted = weighted * old + tl.load(here + 2 * B, mask=live, other=0.0) * add
        top = new
    return top + tl.log(total), weighted / total


@triton.jit
def _combine(partial, own_logit, temperature, out, alpha, B, S, BM: tl.constexpr):
    """out (4, B): loss, lse, teacher's lse, slope."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    live = row < B
    lse, expected = _merged(partial + row, B, S, live, BM)
    taught_lse, taught = _merged(partial + 3 * B + row, B, S, live, BM)
    wanted = alpha * taught + (1.0 - alpha) * tl.load(own_logit + row, mask=live, other=0.0)
    tl.store(out + row, lse - wanted, mask=live)
    tl.store(out + B + row, lse, mask=live)
    tl.store(out + 2 * B + row, taught_lse, mask=live)
    tl.store(out + 3 * B + row, (wanted - expected) / tl.load(temperature), mask=live)


@triton.jit
def _backward(
    student, teacher, batch, queue, temperature, batch_ids, queue_ids, lse, teacher_lse, partial,
    alpha, B, N, Q, C, first, PART,
    HAS_IDS: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """partial (S, B, C): ds @ K of the part's columns, before dloss / temperature."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    live = row < B
    x = _rows(student, row, B, C, CP)
    y = _rows(teacher, row, B, C, CP)
    scale = 1.0 / tl.load(temperature)
    columns, ids, start, stop = batch, batch_ids, 0, N
    if part > 0:
        columns, ids, start, stop = queue, queue_ids, (part - 1) * PART, tl.minimum(part * PART, Q)
    own_id = tl.zeros((BM,), tl.int64)
    if HAS_IDS:
        own_id = tl.load(batch_ids + first + row, mask=live, other=0)
    normaliser = tl.load(lse + row, mask=live, other=0.0)
    taught = tl.load(teacher_lse + row, mask=live, other=0.0)
    gradient = tl.zeros((BM, CP), tl.float32)
    for at in range(start, stop, BN):
        column = at + tl.arange(0, BN)
        k = _rows(columns, column, stop, C, CP)
        turned = tl.trans(k)
        keep, own = _keep(column, row, stop, ids, own_id, first, part == 0, HAS_IDS)
        p = tl.exp(dot(x, turned) * scale - normaliser[:, None])
        p -= alpha * tl.exp(dot(y, turned) * scale - taught[:, None])
        ds = tl.where(keep & live[:, None], p, 0.0) - tl.where(own, 1.0 - alpha, 0.0)
        gradient = dot(ds.to(k.dtype), k, gradient)
    c = tl.arange(0, CP)
    out = partial + (part.to(tl.int64) * B + row[:, None]) * C + c[None, :]
    tl.store(out, gradient, mask=live[:, None] & (c < C)[None, :])


@triton.jit
def _uniform(seed, index):
    """`dropout.uniform` of the element `index`, bit for bit."""
    z = seed.to(tl.uint64, bitcast=True) + (index.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return ((z >> 41).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 8388608.0)


@triton.jit
def _negatives(
    rows, batch, temperature, seed, ids, out, B, N, C, first, floor,
    HAS_IDS: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Two passes over the batch: the normaliser, then the race of (softmax + floor) / -log(u)."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    x = _rows(rows, row, B, C, CP)
    scale = 1.0 / tl.load(temperature)
    start = tl.load(seed)
    own_id = tl.zeros((BM,), tl.int64)
    if HAS_IDS:
        own_id = tl.load(ids + first + row, mask=row < B, other=0)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    unused = tl.zeros((BM,), tl.float32)
    for at in range(0, N, BN):
        column = at + tl.arange(0, BN)
        s = dot(x, tl.trans(_rows(batch, column, N, C, CP))) * scale
        inside = (column < N)[None, :] & (row >= 0)[:, None]
        top, total, unused = _online(top, total, unused, s, s, inside)
    best = tl.zeros((BM,), tl.float32)
    drawn = tl.full((BM,), -1, tl.int64)
    for at in range(0, N, BN):
        column = at + tl.arange(0, BN)
        s = dot(x, tl.trans(_rows(batch, column, N, C, CP))) * scale
        keep, own = _keep(column, row, N, ids, own_id, first, True, HAS_IDS)
        u = _uniform(start, row[:, None].to(tl.int64) * N + column[None, :])
        race = (tl.exp(s - top[:, None]) / total[:, None] + floor) / -tl.log(u)
        race = tl.where(keep & (own == 0), race, 0.0)
        most = tl.max(race, 1)
        which = at + tl.argmax(race, 1)
        drawn = tl.where(most > best, which.to(tl.int64), drawn)
        best = tl.maximum(best, most)
    tl.store(out + row, drawn, mask=row < B)


def _launch(kind: str, rows: Tensor) -> Launch:
    kind += "-float32" if rows.dtype == torch.float32 and kind != "negatives" else ""
    return choose("contrastive", kind, {k: v[0] for k, v in LAUNCHES.items()}, rows, rows.shape[1])


def _options(launch: Launch, width: int) -> dict[str, int]:
    wide = max(16, triton.next_power_of_2(width))
    return {**launch.blocks, "CP": wide, "num_warps": launch.num_warps, "num_stages": launch.num_stages}


def _dense(*tensors: Tensor | None) -> list[Tensor]:
    """What is not there becomes a pointer to the first, which is not read: both arms of a kernel's `if` have a type."""
    assert tensors[0] is not None
    return [(tensors[0] if t is None else t).contiguous() for t in tensors]


def _parts(queue: Tensor) -> int:
    return 1 + triton.cdiv(len(queue), PART)


def forward(
    student: Tensor,
    teacher: Tensor,
    batch: Tensor,
    queue: Tensor,
    temperature: Tensor,
    alpha: float,
    batch_ids: Tensor | None,
    queue_ids: Tensor | None,
    first: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, lse, teacher's lse, slope), float32 (B,)."""
    count, width = student.shape
    out = torch.empty(4, count, dtype=torch.float32, device=student.device)
    if count:
        launch, parts = _launch("forward", student), _parts(queue)
        partial = torch.empty(parts, 6, count, dtype=torch.float32, device=student.device)
        own = torch.empty(count, dtype=torch.float32, device=student.device)
        _forward[(triton.cdiv(count, launch.blocks["BM"]), parts)](
            *_dense(student, teacher, batch, queue, temperature, batch_ids, queue_ids),
            *(partial, own, count, len(batch), len(queue), width, first, PART),
            HAS_IDS=batch_ids is not None, **_options(launch, width),
        )  # fmt: skip
        grid = (triton.cdiv(count, 32),)
        _combine[grid](partial, own, temperature, out, alpha, count, parts, BM=32, num_warps=1)
    loss, lse, teacher_lse, slope = (t.clone() for t in out)
    return loss, lse, teacher_lse, slope


def backward(
    dloss: Tensor,
    student: Tensor,
    teacher: Tensor,
    batch: Tensor,
    queue: Tensor,
    temperature: Tensor,
    alpha: float,
    batch_ids: Tensor | None,
    queue_ids: Tensor | None,
    first: int,
    lse: Tensor,
    teacher_lse: Tensor,
    slope: Tensor,
) -> tuple[Tensor, Tensor]:
    """(dstudent, dtemperature)."""
    count, width = student.shape
    launch, parts = _launch("backward", student), _parts(queue)
    partial = torch.empty(parts, count, width, dtype=torch.float32, device=student.device)
    if count:
        _backward[(triton.cdiv(count, launch.blocks["BM"]), parts)](
            *_dense(student, teacher, batch, queue, temperature, batch_ids, queue_ids, lse, teacher_lse),
            *(partial, alpha, count, len(batch), len(queue), width, first, PART),
            HAS_IDS=batch_ids is not None, **_options(launch, width),
        )  # fmt: skip
    dstudent = partial.sum(0) * (dloss / temperature)[:, None]
    return dstudent.to(student.dtype), (dloss * slope).sum().to(temperature.dtype)


def hard_negatives(
    rows: Tensor, batch: Tensor, temperature: Tensor, seed: Tensor, batch_ids: Tensor | None, first: int
) -> Tensor:
    """int64 (B,), -1 where nothing may be drawn. A seed on the host goes along as an argument of an addition."""
    count, width = rows.shape
    out = torch.empty(count, dtype=torch.int64, device=rows.device)
    if count:
        launch = _launch("negatives", rows)
        seed = torch.zeros((), dtype=torch.int64, device=rows.device) + seed
        _negatives[(triton.cdiv(count, launch.blocks["BM"]),)](
            *_dense(rows, batch, temperature, seed, batch_ids), out, count, len(batch), width, first, FLOOR,
            HAS_IDS=batch_ids is not None, **_options(launch, width),
        )  # fmt: skip
    return out


def cases() -> Iterator[Case]:
    """Every configuration at width 256, with ids; the defaults without them, too."""
    ints, ids = dict.fromkeys(("B", "N", "Q", "C", "first", "PART"), "i32"), {"batch_ids": "*i64", "queue_ids": "*i64"}
    for kind, launches in LAUNCHES.items():
        t = "*fp32" if kind.endswith("float32") else "*bf16"
        head = {"student": t, "teacher": t, "batch": t, "queue": t, "temperature": "*fp32", **ids}
        kernel, signature = _forward, {**head, "partial": "*fp32", "own_logit": "*fp32", **ints}
        if kind.startswith("backward"):
            sums = {"lse": "*fp32", "teacher_lse": "*fp32", "partial": "*fp32", "alpha": "fp32"}
            kernel, signature = _backward, {**head, **sums, **ints}
        elif kind == "negatives":
            head = {"rows": t, "batch": t, "temperature": "*fp32", "seed": "*i64", "ids": "*i64", "out": "*i64"}
            kernel, signature = (
                _negatives,
                {**head, "B": "i32", "N": "i32", "C": "i32", "first": "i32", "floor": "fp32"},
            )
        divisible = tuple(n for n, kind in signature.items() if kind.startswith("*") or n in ("C", "PART"))
        for i, launch in enumerate(launches):
            name = f"{kind}-{'x'.join(map(str, launch.blocks.values()))}"
            for with_ids in (True, False) if i == 0 else (True,):
                constants = {"HAS_IDS": with_ids, "CP": 256, **launch.blocks}
                types = signature if with_ids else {n: t if n in _IDS else kind for n, kind in signature.items()}
                label = name if with_ids else f"{name}-no-ids"
                yield Case("contrastive", label, kernel, types, constants, launch, i == 0, divisible)
    signature = {**dict.fromkeys(("partial", "own_logit", "temperature", "out"), "*fp32"), "alpha": "fp32"}
    merge = Launch({"BM": 32}, 1)
    yield Case("contrastive", "combine", _combine, {**signature, "B": "i32", "S": "i32"}, {"BM": 32}, merge, True)
