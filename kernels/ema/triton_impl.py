"""Moving averages in Triton: one launch over all pairs of one dtype, through a table of addresses.

table (K, 3) int64 holds each pair's addresses and size, chunks (P, 2) int32 which pair and which block of it a program
owns: average += weight (value - average) in float32, read and written once. 12 bytes a number for float32 values (10
for bfloat16, which need no cast copy), 3 operations: bound by memory alone. The tables are made once for a list and
kept; a call that finds them is one launch, of a few hundred that a loop takes.

Knows addresses; does not know whose parameters they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.launches import Case, Launch, choose

LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "any": (Launch({"BLOCK": 4096}, 8, 1), Launch({"BLOCK": 2048}, 4, 1), Launch({"BLOCK": 8192}, 8, 1)),
}
_KEPT = 8  # lists whose tables are kept: a model has one


@dataclass(frozen=True)
class _Plan:
    """One launch: the pairs whose values have one dtype."""

    like: Tensor  # an empty tensor of that dtype
    table: Tensor
    chunks: Tensor
    aligned: bool


_plans: dict[tuple[object, ...], list[_Plan]] = {}


@triton.jit
def _update(table, chunks, average_like, value_like, weight, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    pair = tl.load(chunks + 2 * program).to(tl.int64)
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * BLOCK
    averages = tl.load(table + 3 * pair).to(average_like.dtype)
    values = tl.load(table + 3 * pair + 1).to(value_like.dtype)
    count = tl.load(table + 3 * pair + 2)
    if ALIGNED:
        averages = tl.multiple_of(averages, 16)
        values = tl.multiple_of(values, 16)
    at = start + tl.arange(0, BLOCK)
    average = tl.load(averages + at, mask=at < count, other=0.0)
    value = tl.load(values + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(averages + at, average + weight * (value - average), mask=at < count)


def _make(averages: list[Tensor], values: list[Tensor], block: int) -> list[_Plan]:
    plans, device = [], averages[0].device
    for dtype in dict.fromkeys(v.dtype for v in values):
        pairs = [(a, v) for a, v in zip(averages, values, strict=True) if v.dtype == dtype and a.numel()]
        rows = [(a.data_ptr(), v.data_ptr(), a.numel()) for a, v in pairs]
        owned = [(i, j) for i, row in enumerate(rows) for j in range(triton.cdiv(row[2], block))]
        if owned:
            table = torch.tensor(rows, dtype=torch.int64).to(device)
            chunks = torch.tensor(owned, dtype=torch.int32).to(device)
            aligned = all(a % 16 == 0 and v % 16 == 0 for a, v, _ in rows)
            plans.append(_Plan(torch.empty(0, dtype=dtype, device=device), table, chunks, aligned))
    return plans


def _planned(averages: list[Tensor], values: list[Tensor], block: int) -> list[_Plan]:
    """Kept by every address, size and dtype of the lists, so that a parameter that moved is seen."""
    pairs = zip(averages, values, strict=True)
    key = (block, averages[0].device, *((a.data_ptr(), v.data_ptr(), v.numel(), v.dtype) for a, v in pairs))
    if key not in _plans:
        while len(_plans) >= _KEPT:
            _plans.pop(next(iter(_plans)))
        _plans[key] = _make(averages, values, block)
    return _plans[key]


def update(first: Tensor, averages: list[Tensor], values: list[Tensor], momentum: float) -> None:
    launch = choose("ema", "any", {k: v[0] for k, v in LAUNCHES.items()}, values[0])
    for plan in _planned(averages, values, launch.blocks["BLOCK"]):
        _update[(len(plan.chunks),)](
            *(plan.table, plan.chunks, first, plan.like, 1 - momentum),
            ALIGNED=plan.aligned, **launch.blocks, num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip


def cases() -> Iterator[Case]:
    """Every block size, for float32 and bfloat16 values."""
    for i, launch in enumerate(LAUNCHES["any"]):
        for value in ("fp32", "bf16"):
            signature = {"table": "*i64", "chunks": "*i32", "average_like": "*fp32", "value_like": f"*{value}"}
            yield Case(
                "ema", f"{value}-{launch.blocks['BLOCK']}", _update, {**signature, "weight": "fp32"},
                {"ALIGNED": True, **launch.blocks}, launch, i == 0, tuple(signature),
            )  # fmt: skip
