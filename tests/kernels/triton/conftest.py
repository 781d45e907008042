"""Triton kernels against float64: interpreted in a process of their own (tests/kernels/test_triton.py starts it), or,
marked `gpu`, on a GPU. Elsewhere nothing here is collected: whether Triton interprets is settled at its import."""

from pathlib import Path

import pytest

from tests.kernels.triton.device import DEVICE, RUNS

collect_ignore_glob = [] if RUNS else ["test_*.py"]


def pytest_collection_modifyitems(items):
    for item in items:
        if DEVICE == "cuda" and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)
