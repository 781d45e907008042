"""Text over images (or over questions): rows index into sources' keys and values, which are never repeated."""

from miss.kernels.cross_attention.op import KV, Tokens, cross_attention
from miss.kernels.cross_attention.reference import probabilities

__all__ = ["KV", "Tokens", "cross_attention", "probabilities"]
