"""The contrastive loss and hard negatives in Triton against float64, by the error rule; planted bugs are seen.

Interpreted, this does not show what a GPU's bfloat16 products round, races between programs, or alignment.
"""

import pytest
import torch
from torch.nn import functional as F

from miss.kernels.contrastive import reference, torch_impl, triton_impl
from tests.helpers import assert_as_good_as
from tests.kernels.triton.device import DEVICE

# rows, columns of the batch, of the queue, width, first
SIZES = [
    (7, 7, 61, 24, 0),
    (1, 1, 5, 8, 0),
    (17, 41, 197, 64, 11),
    (3, 4, 0, 8, 1),
    (0, 3, 4, 8, 0),
    (37, 37, 67, 16, 0),
]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Several parts, the last of them not full."""
    monkeypatch.setattr(triton_impl, "PART", 48)


def inputs(rows, columns, queue, width, dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = (rows, rows, columns, queue)
    features = [F.normalize(torch.randn(n, width, generator=generator), dim=1).to(DEVICE, dtype) for n in sizes]
    return features, torch.randn(rows, generator=generator).to(DEVICE)


def ids(columns, queue):
    return (torch.arange(columns) % 5).to(DEVICE), (torch.arange(queue) % 7).to(DEVICE)


def run(module, features, dloss, alpha, given, first):
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    temperature = torch.tensor(0.07, device=DEVICE).to(dtype)
    args = (*features, temperature, alpha, *given, first)
    loss, *kept = module.forward(*args)
    return [loss, *kept, *module.backward(dloss.to(dtype), *args, *kept)]


def check(size, alpha, with_ids, dtype, module=triton_impl):
    *sizes, first = size
    features, dloss = inputs(*sizes, dtype)
    given = ids(*sizes[1:3]) if with_ids else (None, None)
    got, low = (run(m, features, dloss, alpha, given, first) for m in (module, torch_impl))
    exact = run(reference, [t.double() for t in features], dloss, alpha, given, first)
    names = ("loss", "lse", "teacher's lse", "slope", "dstudent", "dtemperature")
    for name, g, p, e in zip(names, got, low, exact, strict=True):
        assert_as_good_as(g, p, e, floor=3e-6 if dtype == torch.float32 else 4e-3, what=name)


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_error_rule(size, alpha, with_ids):
    check(size, alpha, with_ids, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves(dtype):
    """The floor is a place of bfloat16: the interpreter truncates where a GPU rounds."""
    check(SIZES[2], 0.4, True, dtype)


@pytest.mark.parametrize("with_ids", [False, True])
def test_draws_are_the_references(with_ids):
    """Same counters, so the same draws but where two scores are equal to rounding; never the pair, never a twin."""
    (rows, _, batch, _), _ = inputs(17, 41, 0, 24, torch.float32)
    given, temperature = (ids(41, 0)[0] if with_ids else None), torch.tensor(0.07, device=DEVICE)
    same = 0
    for seed in (torch.tensor(5), torch.tensor(-3), torch.tensor(2**62 + 1)):
        args = (rows, batch, temperature, seed, given, 11)
        drawn = triton_impl.hard_negatives(*args)
        same += int((drawn == reference.hard_negatives(*args)).sum())
        own = torch.arange(11, 28, device=DEVICE)
        assert (drawn != own).all() and (given is None or (given[drawn] != given[own]).all())
    assert same >= 3 * 17 - 1


def test_nothing_to_draw_is_minus_one():
    (rows, _, batch, _), _ = inputs(3, 3, 0, 8, torch.float32)
    args = (torch.tensor(0.07, device=DEVICE), torch.tensor(1))
    assert triton_impl.hard_negatives(rows[:1], batch[:1], *args, None, 0).tolist() == [-1]
    equal = torch.full((3,), 4, device=DEVICE)
    assert triton_impl.hard_negatives(rows, batch, *args, equal, 0).tolist() == [-1] * 3


@pytest.mark.parametrize("bug", ["tail", "scale", "mask", "own"])
def test_planted_bugs_are_seen(bug):
    def wrong(student, teacher, batch, queue, temperature, alpha, batch_ids, queue_ids, first):
        if bug == "tail":
            queue, queue_ids = queue[:-1], queue_ids[:-1]
        elif bug == "scale":
            temperature = temperature * 1.001
        elif bug == "mask":
            batch_ids = queue_ids = None
        else:
            first += 1
        return student, teacher, batch, queue, temperature, alpha, batch_ids, queue_ids, first

    class Wrong:
        @staticmethod
        def forward(*args):
            return triton_impl.forward(*wrong(*args))

        backward = triton_impl.backward

    with pytest.raises(AssertionError, match="error"):
        check(SIZES[2], 0.4, True, torch.float32, module=Wrong)
