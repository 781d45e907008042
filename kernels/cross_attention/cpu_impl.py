"""Cross-attention by the compiled CPU kernels: an image's keys and values are packed once for all rows that read it.

Knows the extension's operations; does not know other implementations.
"""

from torch import Tensor

from miss.kernels import extension
from miss.kernels.cross_attention.rows import check_index


def kv_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    try:
        return extension.ops().cross_attention(  # type: ignore[no-any-return]
            q, k, v, image_index, lengths, scale, dropout_p, seed
        )
    except RuntimeError:
        check_index(image_index, k.shape[0])  # says which row, as a ValueError
        raise


def tokens_forward(
    q: Tensor,
    x: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    try:
        out, lse = extension.ops().cross_attention_tokens(q, x, w_k, w_v, b_v, image_index, lengths, scale)
    except RuntimeError:
        check_index(image_index, x.shape[0])
        raise
    return out, lse.unflatten(1, q.shape[1:3]).transpose(1, 2).contiguous()


def kv_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    image_index: Tensor,
    lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return extension.ops().cross_attention_backward(  # type: ignore[no-any-return]
        dout.contiguous(), q, k, v, out.contiguous(), lse.contiguous(), image_index, lengths, scale, dropout_p, seed
    )
