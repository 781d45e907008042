"""Where a model looks: the cross-attention probabilities of its two text towers, on a path of their own.

Knows the towers' layers; does not know images, text, or what is made of the probabilities. The answering path computes
no probabilities (its kernels never hold them); here they are computed beside the same layers' outputs, for one text.

Shapes: T text length, K keys (image tokens or question states), C width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from miss.kernels.cross_attention import KV, probabilities
from miss.models.decoder import AnswerDecoder
from miss.models.joint import JointEncoder
from miss.models.layers import TextLayer


@torch.no_grad()
def look(
    tower: JointEncoder | AnswerDecoder, ids: Tensor, source: list[KV], layers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """A text through a tower -> its states (1, T, C), and what its tokens look at, float32 (T, K): rows sum to 1, the
    mean over heads and over the given layers.

    Args:
        ids: int64 (1, T), without padding; for a decoder it begins with [DEC].
        source: per layer K and V of one source, (1, K, H, D).
        layers: at least one, by number.
    """
    causal = isinstance(tower, AnswerDecoder)
    index = torch.zeros(1, dtype=torch.int32, device=ids.device)
    x, seen = tower.embeddings(ids), list[Tensor]()
    for i, layer in enumerate(tower.layers):
        assert isinstance(layer, TextLayer)
        x, _ = layer.self_attention.norm.add(layer.self_attention(x, None, causal), x)
        if i in layers:
            q = layer.cross_attention.query(x).unflatten(-1, (layer.cross_attention.num_heads, -1))
            seen.append(probabilities(q, source[i].k, index)[0].mean(0))
        x = layer.after_self_attention(x, source[i], index)
    return x, torch.stack(seen).mean(0)
