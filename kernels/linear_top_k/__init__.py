"""The language-model head: the best tokens of each row and the log-sum-exp, without logits."""

from miss.kernels.linear_top_k.op import linear_top_k

__all__ = ["linear_top_k"]
