"""The cases that the aims on a GPU are stated for: shapes of real batches, forward alone and with the gradient.

Knows those shapes and the peers that are only there on a GPU; does not know how a case is measured, or what of it is
met (summary.py). `miss bench kernels --shapes aims`; `aims-tiny` are the same calls at sizes that only try them out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from miss.benchmarks.cases import Case
from miss.benchmarks.peers import losses, sdpa

NAME, TINY = "aims", "aims-tiny"


@dataclass(frozen=True)
class Sizes:
    """batch: images of a training batch. questions: of one, each `text` tokens long. losses: rows of the loss."""

    batch: int = 32
    tokens: tuple[int, ...] = (577, 197, 901)
    heads: int = 12
    width: int = 64
    questions: int = 240
    text: int = 35
    together: int = 64  # questions over one image
    losses: int = 2400
    vocabulary: int = 30524
    rows: int = 80
    queue: int = 57600

    @property
    def columns(self) -> int:
        return self.heads * self.width


FULL = Sizes()
SIZES = {NAME: FULL, TINY: Sizes(2, (17, 5), 2, 32, 3, 7, 4, 6, 40, 4, 24)}


def cases(folder: str, dtypes: tuple[torch.dtype, ...], device: torch.device, sizes: Sizes = FULL) -> Iterator[Case]:
    """Those of a folder of kernels/; most have none, as the shapes of a preset say enough of them."""
    make = _CASES.get(folder)
    for dtype in dtypes if make is not None else ():
        assert make is not None
        yield from make(sizes, dtype, device)


def with_gradient(case: Case, wanted: tuple[int, ...], **changes: Any) -> Case:
    """The same call with its gradient: the result, then the gradients of the inputs `wanted`."""

    def call(*inputs: Any) -> tuple[Any, ...]:
        return _both(case.call, inputs, wanted)

    return replace(case, shape=f"forward+backward {case.shape}", call=call, bind=None, **changes)


def _both(call: Callable[..., Any], inputs: tuple[Any, ...], wanted: tuple[int, ...]) -> tuple[Any, ...]:
    with torch.enable_grad():
        args = [x.detach().requires_grad_() if i in wanted else x for i, x in enumerate(inputs)]
        out = call(*args)
        grads = torch.autograd.grad(out, [args[i] for i in wanted], torch.ones_like(out))
    return out.detach(), *grads


def _attention(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    from miss.benchmarks import bench_attention
    from miss.kernels.registry import OPS

    peers = tuple(
        peer for peer in sdpa.backends(device) if peer.name not in OPS["attention"].names
    )  # those are timed as rows
    for tokens in sizes.tokens:
        plain = bench_attention.case("vit", sizes.batch, tokens, sizes.heads, sizes.width, dtype)
        plain = replace(plain, peers=(*plain.peers, *peers))
        yield plain
        # Three and a half times the forward's products; the gradient reads and writes four more matrices each.
        more = {"flops": 3.5 * plain.flops, "reads": plain.reads * 8 / 3, "writes": plain.writes * 4}
        yield with_gradient(replace(plain, peers=tuple(map(_gradient, plain.peers))), (0, 1, 2), tolerance=5e-2, **more)
    text = bench_attention.case("bert", sizes.questions, sizes.text, sizes.heads, sizes.width, dtype, padded=True)
    peer = tuple(map(_gradient, text.peers))
    yield with_gradient(replace(text, peers=peer), (0, 1, 2), flops=3.5 * text.flops, tolerance=5e-2)


def _gradient(peer: Any) -> Any:
    """A peer of a forward pass, both passes of it."""

    def bind(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Callable[[], Any]:
        def forward(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return peer.bind(q, k, v, valid)()

        return lambda: _both(forward, (q, k, v), (0, 1, 2))

    return replace(peer, bind=bind)


def _cross_attention(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    from miss.benchmarks import bench_cross_attention as bench

    for questions in (sizes.together, 1):
        yield bench.case(sizes.tokens[0], 1, questions, sizes.heads, sizes.width, dtype)


def _cross_entropy(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    from miss.benchmarks import bench_cross_entropy as bench

    plain = bench.case(sizes.losses, sizes.vocabulary, sizes.columns, dtype)
    plain = replace(plain, peers=tuple(losses.cross_entropy(device)))
    yield with_gradient(plain, (0, 1), flops=3 * plain.flops, reads=2 * plain.reads, tolerance=5e-2)


def _contrastive(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    from miss.benchmarks import bench_contrastive as bench

    plain = bench.loss(sizes.rows, sizes.queue, dtype)
    yield with_gradient(plain, (0, 4), flops=1.5 * plain.flops, tolerance=5e-2)


def _layer_norm(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    from miss.benchmarks import bench_layer_norm as bench

    rows = sizes.batch * sizes.tokens[0]
    for way in bench.WAYS[:2]:
        yield bench.case(way, "vit", rows, sizes.columns, dtype)
    yield bench.backward("layer_norm_backward", rows, sizes.columns, dtype)


_CASES: dict[str, Callable[[Sizes, torch.dtype, torch.device], Iterator[Case]]] = {
    "attention": _attention,
    "cross_attention": _cross_attention,
    "cross_entropy": _cross_entropy,
    "contrastive": _contrastive,
    "layer_norm": _layer_norm,
}
