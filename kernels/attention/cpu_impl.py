"""Attention by the compiled CPU kernels: float32 and bfloat16, heads 32 or 64 wide.

Knows the extension's operations; does not know what they take (limits.py) or other implementations.
"""

from torch import Tensor

from miss.kernels import extension


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
    return extension.ops().attention(q, k, v, lengths, causal, scale, dropout_p, seed)  # type: ignore[no-any-return]


def quantised(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return extension.ops().attention_quantised(q, k, v, scale)  # type: ignore[no-any-return]


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
    return extension.ops().attention_varlen(  # type: ignore[no-any-return]
        q, k, v, offsets, max_length, causal, scale, dropout_p, seed
    )


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
    return extension.ops().attention_backward(  # type: ignore[no-any-return]
        dout.contiguous(), q, k, v, out.contiguous(), lse.contiguous(), lengths, causal, scale, dropout_p, seed
    )


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
    tensors = (dout.contiguous(), q, k, v, out.contiguous(), lse.contiguous())
    return extension.ops().attention_varlen_backward(  # type: ignore[no-any-return]
        *tensors, offsets, max_length, causal, scale, dropout_p, seed
    )
