"""Linear and cross entropy in Triton against float64, by the error rule; planted bugs are seen.

Interpreted, this does not show what a GPU's bfloat16 products round, races between programs, or alignment.
"""

import pytest
import torch

from miss.kernels.cross_entropy import reference, torch_impl, triton_impl
from tests.helpers import assert_as_good_as
from tests.kernels.triton.device import DEVICE

# rows, width, vocabulary, share ignored
SIZES = [(37, 48, 197, 0.4), (1, 33, 7, 0.0), (70, 64, 131, 0.5), (5, 16, 64, 1.0), (0, 16, 5, 0.0)]


def inputs(rows, width, vocabulary, ignored, dtype):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    h, w, b = (torch.randn(s, generator=generator) for s in ((rows, width), (vocabulary, width), (vocabulary,)))
    dloss = torch.randn(rows, generator=generator)
    return [t.to(DEVICE, dtype) for t in (h, w * width**-0.5, b * 0.1)], labels.to(DEVICE), dloss.to(DEVICE)


def run(module, tensors, labels, dloss, smoothing, bias=True):
    h, w, b = tensors
    args = (h, w, b if bias else None, labels)
    loss, lse = module.forward(*args, smoothing, -100)
    return [loss, lse, *module.backward(dloss.to(loss.dtype), *args, lse, smoothing, -100)]


def check(size, smoothing, dtype, bias=True, module=triton_impl):
    tensors, labels, dloss = inputs(*size, dtype)
    got = run(module, tensors, labels, dloss, smoothing, bias)
    low = run(torch_impl, tensors, labels, dloss, smoothing, bias)
    exact = run(reference, [t.double() for t in tensors], labels, dloss, smoothing, bias)
    names = ("loss", "lse", "dhidden", "dweight", "dbias")
    for name, g, p, e in zip(names, got, low, exact, strict=True):
        assert_as_good_as(g, p, e, floor=2e-6 if dtype == torch.float32 else 4e-3, what=name)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_error_rule(size, smoothing):
    check(size, smoothing, torch.float32, bias=size[0] != 70)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves(dtype):
    """The floor is a place of bfloat16: the interpreter truncates where a GPU rounds."""
    check(SIZES[0], 0.1, dtype)


def test_parts_and_strides(monkeypatch):
    monkeypatch.setattr(triton_impl, "PART", 7 * 197)
    check(SIZES[0], 0.1, torch.float32)
    (h, w, b), labels, _ = inputs(*SIZES[0], torch.float32)
    wanted = triton_impl.forward(h, w, b, labels, 0.1, -100)
    strided = (h.T.contiguous().T, torch.cat([w, w], 1)[:, : w.shape[1]], torch.stack([b, b], 1)[:, 0])
    assert all(map(torch.equal, triton_impl.forward(*strided, labels, 0.1, -100), wanted))


def test_ignored_rows_are_never_read_and_minus_infinity_is_no_word():
    (h, w, b), labels, dloss = inputs(9, 16, 101, 0.0, torch.float32)
    labels[:] = 3
    labels[2] = -100
    h[2] = float("nan")
    assert all(t.isfinite().all() for t in run(triton_impl, (h, w, b), labels, dloss, 0.1))
    b[16:] = float("-inf")  # whole tiles of nothing
    got = triton_impl.forward(h, w, b, labels, 0.0, -100)[0]
    torch.testing.assert_close(got, reference.forward(h, w[:16], b[:16], labels, 0.0, -100)[0])


@pytest.mark.parametrize("bug", ["tail", "scale", "label"])
def test_planted_bugs_are_seen(bug):
    class Wrong:
        @staticmethod
        def forward(h, w, b, labels, smoothing, ignore):
            if bug == "tail":
                return triton_impl.forward(h, w[:-1], b[:-1], labels.clamp(max=len(w) - 2), smoothing, ignore)
            if bug == "label":
                return triton_impl.forward(h, w, b, (labels + 1) % len(w), smoothing, ignore)
            return triton_impl.forward(h, w, b, labels, smoothing * 0.9, ignore)

        backward = triton_impl.backward

    with pytest.raises(AssertionError, match="error"):
        check((37, 48, 197, 0.0), 0.1, torch.float32, module=Wrong)
