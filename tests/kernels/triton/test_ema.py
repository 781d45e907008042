"""Moving averages in Triton against float64: many shapes in one launch, tails, dtypes of values; planted bugs are seen.

Interpreted, this does not show what widths of loads a GPU takes, or races between programs.
"""

import pytest
import torch

from miss.kernels.ema import torch_impl, triton_impl
from miss.kernels.launches import Launch
from tests.helpers import assert_as_good_as
from tests.kernels.triton.device import DEVICE

SHAPES = [(7,), (33, 5), (), (0, 4), (2, 64), (129,), (1,)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setitem(triton_impl.LAUNCHES, "any", (Launch({"BLOCK": 64}, 1, 1),))


def tensors(dtypes):
    generator = torch.Generator().manual_seed(0)
    averages = [torch.randn(s, generator=generator).to(DEVICE) for s in SHAPES]
    values = [torch.randn(s, generator=generator).to(DEVICE) for s in SHAPES]
    return averages, [v.to(dtypes[i % len(dtypes)]) for i, v in enumerate(values)]


def check(dtypes, update, steps=3):
    averages, values = tensors(dtypes)
    plain, exact = [a.clone() for a in averages], [a.double() for a in averages]
    for _ in range(steps):
        update(averages[0], averages, values, 0.995)
        torch_impl.update(plain[0], plain, values, 0.995)
        for e, v in zip(exact, values, strict=True):
            e.lerp_(v.double(), 0.005)
    for got, p, e in zip(averages, plain, exact, strict=True):
        assert_as_good_as(got, p, e)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float16, torch.float32, torch.bfloat16)], ids=str
)
def test_error_rule(dtypes):
    check(dtypes, triton_impl.update)


def test_a_thousand_steps_stay_at_the_truth():
    average, value = torch.randn(5, device=DEVICE), torch.randn(5, device=DEVICE).bfloat16()
    plain, exact = average.clone(), average.double()
    for _ in range(1000):
        triton_impl.update(average, [average], [value], 0.995)
        plain.mul_(0.995).add_(value.float(), alpha=0.005)
        exact.lerp_(value.double(), 0.005)
    assert_as_good_as(average, plain, exact)


def test_neighbours_and_unaligned_views_are_left_alone():
    """Tensors as views of one buffer, one behind another and off the 16 bytes: nothing beside them is written."""
    flat, value = torch.zeros(301, device=DEVICE), torch.ones(300, device=DEVICE)
    averages, values = [flat[1:100], flat[101:300]], [value[1:100], value[100:299]]
    triton_impl.update(flat, averages, values, 0.5)
    wanted = torch.full((301,), 0.5, device=DEVICE)
    wanted[[0, 100, 300]] = 0
    assert torch.equal(flat, wanted)


def test_a_tensor_that_moved_is_seen_and_tables_are_kept():
    averages, values = tensors((torch.float32,))
    triton_impl._plans.clear()
    for _ in range(3):
        triton_impl.update(averages[0], averages, values, 0.5)
    assert len(triton_impl._plans) == 1
    values[1] = values[1] * 0 + 100
    triton_impl.update(averages[0], averages, values, 0.0)
    assert (averages[1] == 100).all() and len(triton_impl._plans) == 2
    kept = [torch.zeros(3, device=DEVICE) for _ in range(12)]
    for a in kept:
        triton_impl.update(a, [a], [torch.ones(3, device=DEVICE)], 0.5)
    assert len(triton_impl._plans) <= triton_impl._KEPT and all((a == 0.5).all() for a in kept)


@pytest.mark.parametrize("bug", ["tail", "scale", "swapped"])
def test_planted_bugs_are_seen(bug):
    def wrong(first, averages, values, momentum):
        if bug == "tail":
            averages, values = ([t.flatten()[:-1] for t in each if t.numel()] for each in (averages, values))
        elif bug == "swapped":
            momentum = 1 - momentum
        else:
            momentum += 1e-4
        triton_impl.update(first, averages, values, momentum)

    with pytest.raises(AssertionError, match="error"):
        check((torch.float32,), wrong)
