"""A whole decode step: one token a row through embeddings, all layers and the head.

Knows the contract and who computes it; does not know who owns a slot, or how a next token is chosen.

    x = norm(words[tokens] + positions[position])
    a layer:  K and V of x are appended to the row's slot; x = norm(x + W_o attention(x over the slot up to position));
              x = norm(x + W_c attention(W_q x over the question's states)); x = norm(x + W_2 gelu(W_1 x))
    states = norm(gelu(W_t x));   z = states W_v^T + b;   the `num_best` largest z, and log(sum(exp(z)))

tokens int64 (R,); slots, positions, questions int32 (R,); caches as `weights.Cache`. Rows of one slot may come in one
call, one behind another at successive positions: each row attends to the positions up to its own, those of the call's
other rows included. (slot, position) pairs are distinct; indices are in range (the `cpu` row raises IndexError where
one is not). Results: states (R, C) in the weights' dtype; values float32 (R, k) descending, ids int64 (R, k) and total
float32 (R,) (float64 in float64), as `linear_top_k`'s.

The `cpu` row is one call of csrc/ (`decoder_step.inl.h`) on PyTorch's threads without an allocation but its results; it
wants what `prepare` returned. Its results are bitwise the same for any number of threads and whatever shares the call.
`composed` is the same sequence of single operations, each of which chooses its own row. On a GPU it is the step,
captured as a graph: no kernel of ours holds all layers, and docs/gpu/decoder_step.md says why. No gradient.
"""

import torch
from torch import Tensor

from miss.kernels import extension
from miss.kernels.decoder_step import composed, reference
from miss.kernels.decoder_step.weights import Cache, Decoder, Matrix
from miss.kernels.quant_linear import PackedWeight
from miss.kernels.registry import ALL_FLOATS, Impl, Op, lazy

CPU_DTYPES = frozenset({torch.float32, torch.bfloat16})
MOST_BEST = 16  # csrc/cpu/top_k.h
Results = tuple[Tensor, Tensor, Tensor, Tensor]


def _runs(cache: Tensor, heads: int) -> bool:
    """Whether the numbers of a token's heads stand one behind another."""
    width = cache.shape[-1]
    return cache.stride(-1) == 1 and (cache.stride(-2) == width or heads == 1)


def _cpu_limits(
    words: Tensor,
    decoder: Decoder,
    cache: Cache,
    tokens: Tensor,
    slots: Tensor,
    positions: Tensor,
    questions: Tensor,
    num_best: int,
    runner: object | None,
) -> str | None:
    if runner is None:
        return "the decoder is not prepared (`prepare`)"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if num_best > MOST_BEST:
        return f"takes num_best up to {MOST_BEST}, got {num_best}"
    caches = cache[:4]
    if not all(c.dtype == words.dtype for c in caches):
        return f"the weights are {words.dtype}, the cache {cache.self_k.dtype}"
    if not all(_runs(c, decoder.num_heads) for c in caches):
        return "needs the heads of a cached token one behind another"
    return None


FORWARD = Op(
    "decoder_step",
    Impl(
        "cpu",
        lazy("decoder_step.cpu_impl", "forward"),
        device="cpu",
        dtypes=CPU_DTYPES,
        needs=extension.missing,
        limits=_cpu_limits,
    ),
    Impl("composed", composed.forward, dtypes=ALL_FLOATS, composite=True),
    Impl("reference", reference.forward, dtypes=ALL_FLOATS),
)


def decoder_step(
    decoder: Decoder,
    cache: Cache,
    tokens: Tensor,
    slots: Tensor,
    positions: Tensor,
    questions: Tensor,
    num_best: int,
    runner: object | None = None,
) -> Results:
    """(states, values, ids, total) of one token a row; num_best 0: the last three are empty.

    Args:
        runner: `prepare(decoder)`.

    Raises:
        ValueError: indices that do not fit each other, or num_best beyond the vocabulary.
        IndexError: the `cpu` row, an index out of its range.
    """
    if not tokens.dim() == 1 or not tokens.shape == slots.shape == positions.shape == questions.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (tokens, slots, positions, questions))
        raise ValueError(f"decoder_step: tokens, slots, positions, questions are {shapes}; wanted (R,) four times")
    if not 0 <= num_best <= decoder.words.shape[0]:
        raise ValueError(f"decoder_step: num_best is {num_best}; wanted 0 … {decoder.words.shape[0]}")
    args = (decoder.words, decoder, cache, tokens, slots, positions, questions, num_best, runner)
    if torch.compiler.is_compiling():  # a graph sees the single operations
        return composed.forward(*args)
    return FORWARD.with_autocast(*args)  # type: ignore[no-any-return]


def prepare(decoder: Decoder) -> object | None:
    """What the `cpu` row reads in the weights' place, for as long as they stay what they are; None where it does not
    fit: another device or dtype, weights that are not laid out, sizes that the kernels do not have."""
    if decoder.words.device.type != "cpu" or extension.missing() is not None or misfit(decoder) is not None:
        return None
    return lazy("decoder_step.cpu_impl", "Runner")(decoder)


def misfit(decoder: Decoder) -> str | None:
    """Why the `cpu` row cannot run these weights; None where it can."""
    width, heads = decoder.words.shape[1], decoder.num_heads
    if decoder.words.dtype not in CPU_DTYPES:
        return f"takes float32 and bfloat16, got {decoder.words.dtype}"
    if width % 64 or width // heads not in (32, 64):
        return f"needs a width that 64 divides and heads 32 or 64 wide, got {width} and {heads} heads"
    if any(layer.input.weight.shape[0] % 4 for layer in decoder.layers):
        return "needs an inner width that 4 divides"
    head = decoder.vocabulary.weight
    if isinstance(head, PackedWeight) and not head.w8a8:
        return "the vocabulary's matrix is packed for weight-only products"
    reasons = (_matrix_misfit(m, decoder.words.dtype) for m in decoder.matrices())
    return next((reason for reason in reasons if reason is not None), None)


def _matrix_misfit(matrix: Matrix, dtype: torch.dtype) -> str | None:
    if matrix.bias is not None and matrix.bias.dtype not in (dtype, torch.float32):
        return f"a bias is {matrix.bias.dtype}"
    if isinstance(matrix.weight, PackedWeight):
        return "a packed weight is not prepared" if matrix.weight.prepared is None else None
    if matrix.panels is None or matrix.panels.dtype != dtype:
        return "a weight is not laid out (`linear.prepare`)"
    return None
