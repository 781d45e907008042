"""The language-model head: the best tokens of each row and the log-sum-exp, without logits; logits of chosen words."""

from miss.kernels.linear_top_k.chosen import linear_at
from miss.kernels.linear_top_k.op import linear_top_k

__all__ = ["linear_at", "linear_top_k"]
