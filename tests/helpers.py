"""What tests of several floors share: the error rule, and where the real data is."""

import os
from pathlib import Path

import pytest
from torch import Tensor

BESIDE = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def assert_as_good_as(
    got: Tensor, plain: Tensor, exact: Tensor, slack: float = 2.0, floor: float = 1e-6, what: str = "result"
) -> None:
    """`got` may err from the truth `exact` at most `slack` times as much as `plain` does, plus a tiny absolute term.

    Args:
        got: ours. plain: what plain PyTorch gives in the same dtype. exact: float64 (or float32) from the same inputs.
        floor: absolute, times the truth's largest value where that is above 1.
    """
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    error, allowed = ((t.detach().double() - exact.detach().double()).abs().max().item() for t in (got, plain))
    limit = slack * allowed + floor * max(1.0, exact.detach().abs().max().item())
    assert error <= limit, f"{what}: error {error:.2e} from the truth; plain PyTorch's is {allowed:.2e}"


def data_root() -> Path:
    """The folder of the real data sets: $MISS_DATA, else ../shared/data; the test skips where there is none."""
    root = Path(os.environ.get("MISS_DATA") or BESIDE)
    if not root.is_dir():
        pytest.skip(f"no real data: {root} is not there and $MISS_DATA is not set")
    return root
