"""Attention of the nodes of packed trees over their ancestors."""

from miss.kernels.tree_attention.op import tree_attention

__all__ = ["tree_attention"]
