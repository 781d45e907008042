"""The nodes of a tree of answers over their ancestors: a list of some hundred answers in one pass."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from miss.benchmarks.cases import Bound, Case, Peer
from miss.benchmarks.inputs import normal
from miss.benchmarks.shapes import Shapes
from miss.kernels.tree_attention import tree_attention

_LEVELS = (1, 120, 90, 60, 20, 9)  # about 220 answers of SLAKE-English in word pieces; 300 nodes


def cases(shapes: Shapes, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    if shapes.custom is not None:
        return
    decoder = shapes.preset.decoder
    heads, width = decoder.num_heads, decoder.hidden_size // decoder.num_heads
    for dtype in dtypes:
        for trees in (1, 6):
            yield _case(trees, heads, width, dtype)


def _ancestors(trees: int) -> Tensor:
    """int32 (N, L): level by level, the children of a level spread over it."""
    seen: list[list[int]] = []
    for _ in range(trees):
        above = list[list[int]]()
        for size in _LEVELS:
            level = [[*(above[i % len(above)] if above else []), len(seen) + i] for i in range(size)]
            seen, above = seen + level, level
    longest = len(_LEVELS)
    return torch.tensor([[*a, *[-1] * (longest - len(a))] for a in seen], dtype=torch.int32)


def _case(trees: int, heads: int, width: int, dtype: torch.dtype) -> Case:
    ancestors = _ancestors(trees)
    nodes, pairs = len(ancestors), int((ancestors >= 0).sum())

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        q, k, v = normal(generator, nodes, 3, heads, width, dtype=dtype).unbind(1)
        return q, k, v, ancestors.to(generator.device)

    row = heads * width * dtype.itemsize
    return Case(
        "tree_attention", f"{trees} trees: {nodes} nodes L={len(_LEVELS)} H={heads} D={width}",
        str(dtype).removeprefix("torch."), make, tree_attention, 4.0 * pairs * heads * width,
        reads=3 * nodes * row + ancestors.nbytes, writes=nodes * row, peers=(Peer("SDPA, masked", _masked),),
    )  # fmt: skip


def _masked(q: Tensor, k: Tensor, v: Tensor, ancestors: Tensor) -> Bound:
    """Dense attention of all nodes under a mask that is made once."""
    nodes = torch.arange(len(q), device=q.device)
    mask = (ancestors[:, :, None] == nodes).any(1)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return lambda: F.scaled_dot_product_attention(q, k, v, mask)[0].transpose(0, 1)
