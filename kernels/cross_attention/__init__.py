"""Text over images (or over questions): rows index into sources' keys and values, which are never repeated."""

from miss.kernels.cross_attention.op import KV, Tokens, cross_attention

__all__ = ["KV", "Tokens", "cross_attention"]
