"""One new token a row against the slot cache."""

from miss.kernels.decode_attention.append import decode_attention_append
from miss.kernels.decode_attention.op import decode_attention

__all__ = ["decode_attention", "decode_attention_append"]
