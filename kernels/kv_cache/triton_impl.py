"""The cache's two writes in Triton: one launch to append, two to reorder.

Append, a program a row and a block of its numbers: both new rows are read once, cast and written at cache[slot,
position]. Reorder goes through a buffer: the first launch copies source slots into it, the second copies it to target
slots, and the boundary between launches is what makes overlapping permutations right. A row whose source is its target
is left alone by both, as most beams are. Bytes: 4 R H D elements appended (read and written, K and V); 8 L H D a moved
slot. No index is read on the host.

Knows addresses; does not know what is stored. An index out of range writes nothing when appending; reordering with one
is undefined, as the contract says.

Shapes: R rows, S slots, L positions, H heads, D head width.
"""

from collections.abc import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.launches import Case, Launch, choose

LAUNCHES: dict[str, tuple[Launch, ...]] = {
    "append": (Launch({"BLOCK": 1024}, 4, 1), Launch({"BLOCK": 256}, 1, 1)),
    "reorder": (Launch({"BLOCK": 2048}, 4, 1), Launch({"BLOCK": 1024}, 4, 1)),
}


@triton.jit
def _append(
    k_cache, v_cache, k, v, slots, positions, S, L,
    k_slot, k_position, k_head, k_along, v_slot, v_position, v_head, v_along,
    new_k_row, new_k_head, new_k_along, new_v_row, new_v_head, new_v_along,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (R, blocks of H * D)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head, along = at // D, at % D
    inside = at < H * D
    new_k = tl.load(k + row * new_k_row + head * new_k_head + along * new_k_along, mask=inside)
    new_v = tl.load(v + row * new_v_row + head * new_v_head + along * new_v_along, mask=inside)
    to_k = k_cache + slot * k_slot + position * k_position + head * k_head + along * k_along
    to_v = v_cache + slot * v_slot + position * v_position + head * v_head + along * v_along
    if (slot >= 0) & (slot < S) & (position >= 0) & (position < L):
        tl.store(to_k, new_k.to(k_cache.dtype.element_ty), mask=inside)
        tl.store(to_v, new_v.to(v_cache.dtype.element_ty), mask=inside)


@triton.jit
def _reorder(
    k_cache, v_cache, buffer, source, target, R, L,
    k_slot, k_position, k_head, k_along, v_slot, v_position, v_head, v_along,
    H: tl.constexpr, D: tl.constexpr, GATHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (R, blocks of L * H * D): slots to the buffer (2, R, L * H * D), or the buffer to slots."""
    row = tl.program_id(0).to(tl.int64)
    origin = tl.load(source + row).to(tl.int64)
    end = tl.load(target + row).to(tl.int64)
    if origin != end:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        position, head, along = at // (H * D), at // D % H, at % D
        inside = at < L * H * D
        slot = origin if GATHER else end
        in_k = k_cache + slot * k_slot + position * k_position + head * k_head + along * k_along
        in_v = v_cache + slot * v_slot + position * v_position + head * v_head + along * v_along
        held = buffer + row * L * H * D + at
        other = held + tl.cast(R, tl.int64) * L * H * D
        if GATHER:
            tl.store(held, tl.load(in_k, mask=inside), mask=inside)
            tl.store(other, tl.load(in_v, mask=inside), mask=inside)
        else:
            tl.store(in_k, tl.load(held, mask=inside), mask=inside)
            tl.store(in_v, tl.load(other, mask=inside), mask=inside)


def _launch(kind: str, cache: Tensor) -> Launch:
    return choose(f"kv_{kind}", kind, {k: v[0] for k, v in LAUNCHES.items()}, cache, *cache.shape[2:])


def append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor) -> None:
    rows, heads, width = k.shape
    if not k.numel():
        return
    launch = _launch("append", k_cache)
    _append[(rows, triton.cdiv(heads * width, launch.blocks["BLOCK"]))](
        *(k_cache, v_cache, k, v, slots.contiguous(), positions.contiguous(), *k_cache.shape[:2]),
        *(*k_cache.stride(), *v_cache.stride(), *k.stride(), *v.stride()),
        H=heads, D=width, **launch.blocks, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip


def reorder(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
    rows, (_, length, heads, width) = len(source), k_cache.shape
    if not rows or not k_cache.numel():
        return
    launch = _launch("reorder", k_cache)
    buffer = torch.empty(2, rows, length * heads * width, dtype=k_cache.dtype, device=k_cache.device)
    for gather in (True, False):
        _reorder[(rows, triton.cdiv(length * heads * width, launch.blocks["BLOCK"]))](
            *(k_cache, v_cache, buffer, source.contiguous(), target.contiguous(), rows, length),
            *(*k_cache.stride(), *v_cache.stride()),
            H=heads, D=width, GATHER=gather, **launch.blocks, num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip


def cases() -> Iterator[Case]:
    """bfloat16, 12 heads of 64 and of 32, heads one behind another; strides of 1 are constants, as in a launch."""
    sides = ("k", "v")
    strides = [f"{side}_{axis}" for side in sides for axis in ("slot", "position", "head", "along")]
    new_strides = [f"new_{side}_{axis}" for side in sides for axis in ("row", "head", "along")]
    caches = {"k_cache": "*bf16", "v_cache": "*bf16"}
    for width in (64, 32):
        constants = {"H": 12, "D": width}
        for i, launch in enumerate(LAUNCHES["append"]):
            pointers = {**caches, "k": "*bf16", "v": "*bf16", "slots": "*i32", "positions": "*i32"}
            numbers = ["S", "L", *strides, *new_strides]
            yield _case("kv_append", f"{width}", _append, pointers, numbers, constants, launch, i)
        for i, launch in enumerate(LAUNCHES["reorder"]):
            pointers = {**caches, "buffer": "*bf16", "source": "*i32", "target": "*i32"}
            for name, gather in (("gather", True), ("scatter", False)):
                fixed = {**constants, "GATHER": gather}
                numbers = ["R", "L", *strides]
                yield _case("kv_reorder", f"{name}-{width}", _reorder, pointers, numbers, fixed, launch, i)


def _case(
    op: str,
    name: str,
    kernel: object,
    pointers: dict[str, str],
    numbers: list[str],
    constants: Mapping[str, object],
    launch: Launch,
    place: int,
) -> Case:
    along = [n for n in numbers if n.endswith("along")]
    strides = [n for n in numbers if "_" in n and n not in along]
    signature = {**pointers, **{n: "i32" for n in numbers if n not in along}}
    constants = {**constants, **dict.fromkeys(along, 1), **launch.blocks}
    full = f"{name}-{launch.blocks['BLOCK']}"
    return Case(op, full, kernel, signature, constants, launch, place == 0, (*pointers, *strides))
