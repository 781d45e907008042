"""Self-attention: bidirectional, padded, causal, packed sequences; dropout; forward and backward."""

from miss.kernels.attention.op import attention, attention_varlen
from miss.kernels.attention.quantised import attention_quantised
from miss.kernels.attention.reference import attention_probabilities

__all__ = ["attention", "attention_probabilities", "attention_quantised", "attention_varlen"]
