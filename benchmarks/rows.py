"""The rows that a good PyTorch programmer would have written: what ours are held against.

Knows the tables' names; does not know any operation.
"""

from miss.kernels import registry

_PLAIN = ("torch", "composed", "reference")  # the first that a table has


def plain_rows() -> dict[str, str]:
    """For `registry.use(**plain_rows())`: every operation by PyTorch's own functions."""
    registry.load_all()
    return {name: next(row for row in _PLAIN if row in op.names) for name, op in registry.OPS.items()}
