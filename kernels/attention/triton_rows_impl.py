"""What attention's Triton kernels share: where a batch row's or a packed sequence's numbers lie, and a call's numbers.

Knows the two layouts; does not know tiles. Shapes: B batch, T queries, N keys, H heads, D head width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from miss.kernels.launches import Launch

SHORT = 64  # queries and keys that one tile of the short form holds
LOG2_E = tl.constexpr(1.4426950408889634)
SIZES = "q_b q_t q_h k_b k_n k_h v_b v_n v_h T N H"


@dataclass(frozen=True)
class Problem:
    """A call; `rows` are lengths, or the offsets of packed sequences, for which `queries` and `keys` are max_length."""

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor | None
    batch: int
    queries: int
    keys: int
    causal: bool
    scale: float
    dropout_p: float
    seed: Tensor | None

    @property
    def varlen(self) -> bool:
        return self.q.dim() == 3

    @property
    def kind(self) -> str:
        """The shape class."""
        if self.q.dtype == torch.float32:
            return "float32"
        longest = max(self.queries, self.keys)
        return f"short{max(16, triton.next_power_of_2(longest))}" if longest <= SHORT else "long"

    @property
    def fixed_keys(self) -> int | None:
        """How many keys every query sees; None where that differs."""
        return self.keys if self.rows is None and not self.causal else None

    @property
    def own(self) -> tuple[int, ...]:
        """The sizes that a tuned launch is for: the head width, and lengths in which no other row has a say."""
        return (self.q.shape[-1], *((self.queries, self.keys) if self.rows is None else ()))

    @property
    def heads(self) -> int:
        return self.q.shape[-2]

    @property
    def lines(self) -> tuple[int, ...]:
        """The shape of lse."""
        return tuple(self.q.shape[:2]) if self.varlen else (self.batch, self.heads, self.queries)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """rows and seed for a kernel; q stands in for what the kernel does not read. A seed on the host goes along as
        an argument of an addition: nothing is copied, nothing waits."""
        seed = self.seed
        if seed is not None and seed.device != self.q.device:
            seed = torch.zeros((), dtype=torch.int64, device=self.q.device) + seed
        return self.q if self.rows is None else self.rows, self.q if seed is None else seed

    def sizes(self) -> tuple[int, ...]:
        """What SIZES names."""
        places = (t.stride()[:2] if self.varlen else t.stride()[:3] for t in (self.q, self.k, self.v))
        each = ((0, *place) if self.varlen else place for place in places)
        return (*(n for place in each for n in place), self.queries, self.keys, self.heads)

    def options(self, launch: Launch) -> dict[str, Any]:
        """A kernel's constants, and what it is launched with."""
        return {
            **launch.blocks,
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "D": self.q.shape[-1],
            "CAUSAL": self.causal,
            "LENGTHS": self.rows is not None and not self.varlen,
            "VARLEN": self.varlen,
            "DROPOUT": self.seed is not None,
        }


def padded(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float, p: float, seed: Tensor | None
) -> Problem:
    return Problem(q, k, v, lengths, q.shape[0], q.shape[1], k.shape[1], causal, scale, p, seed)


def packed(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, causal: bool, scale: float, p: float,
    seed: Tensor | None,
) -> Problem:  # fmt: skip
    return Problem(q, k, v, offsets, len(offsets) - 1, longest, longest, causal, scale, p, seed)


EDGE = 32  # the widest masked tile: 64 spills in backward on sm_80, and wastes more on a row that ends in it


def edge_width(size: int | None, block: int) -> int:
    """How wide masked tiles behind full ones of `block` are, where all rows have `size`, or each its own (None)."""
    return min(block, EDGE) if size is None else min(block, EDGE, max(16, triton.next_power_of_2(size % block)))


def signature(element: str, names: str) -> dict[str, str]:
    """Types of a kernel's arguments by their names, tensors of `element` but for what is known to differ."""
    known = {"lse": "*fp32", "delta": "*fp32", "rows": "*i32", "seed": "*i64", "scale": "fp32", "dropout_p": "fp32"}
    numbers = {*SIZES.split(), "tiles"}
    return {name: known.get(name, "i32" if name in numbers else f"*{element}") for name in names.split()}


def divisible(types: dict[str, str]) -> tuple[str, ...]:
    """Tensors from the allocator and views of a projection in it: addresses and strides divide by 16."""
    return tuple(name for name, type in types.items() if type[0] == "*" or name[1:2] == "_")


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
def rows_of(x, row, row_stride, rows, D: tl.constexpr, MASKED: tl.constexpr):
    """(row, D); zeros past the last of `rows`, which is asked only where MASKED."""
    at = x + row[:, None] * row_stride + tl.arange(0, D)[None, :]
    if MASKED:
        return tl.load(at, mask=(row < rows)[:, None], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def normalise(acc, top, total, length, dropout_p, DROPOUT: tl.constexpr):
    """(out, lse): zeros and -inf where nothing is visible; 0 / 0 = NaN where all that is visible is -inf."""
    if DROPOUT:
        acc = acc * (1.0 / (1.0 - dropout_p))
    out = tl.where(length > 0, acc / tl.expand_dims(total, -1), 0.0)
    return out, (top + tl.log2(total)) * 0.6931471805599453
