"""What tests of several floors share: where the real data is."""

import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def data_root() -> Path:
    """The folder of the real data sets: $MISS_DATA, else ../shared/data; the test skips where there is none."""
    root = Path(os.environ.get("MISS_DATA") or BESIDE)
    if not root.is_dir():
        pytest.skip(f"no real data: {root} is not there and $MISS_DATA is not set")
    return root
