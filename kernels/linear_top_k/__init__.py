"""The language-model head: the best tokens of each row and the log-sum-exp, without logits."""

from miss.kernels.linear_top_k.op import HeadPanels, linear_top_k, pack_head

__all__ = ["HeadPanels", "linear_top_k", "pack_head"]
