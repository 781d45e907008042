"""Dropout's mask: the hash as it is documented, its rate, and that nothing but the seed decides it."""

import pytest
import torch

from miss.kernels.dropout import as_seed, dropout, keep_mask, keep_scale

CPU = torch.device("cpu")
WORD = (1 << 64) - 1


def splitmix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def kept(seed: int, index: int, p: float) -> bool:
    """The documented rule in Python's integers."""
    field = (splitmix64((seed + (index // 4 + 1) * 0x9E3779B97F4A7C15) & WORD) >> (16 * (index % 4))) & 0xFFFF
    return (field - 65536 if field >= 32768 else field) >= round(p * 65536) - 32768


def mask(seed: int, shape: tuple[int, ...], p: float) -> torch.Tensor:
    tensor = as_seed(seed, p)
    assert tensor is not None
    return keep_mask(tensor, shape, p, CPU)


@pytest.mark.parametrize("seed", [0, 5, -3, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_mask_is_the_documented_hash(seed: int, p: float) -> None:
    assert mask(seed, (3, 7), p).flatten().tolist() == [kept(seed & WORD, i, p) for i in range(21)]


def test_rate_and_independence() -> None:
    one, two = mask(1, (1 << 18,), 0.1).double(), mask(2, (1 << 18,), 0.1).double()
    for values in (one, two):
        assert abs(values.mean().item() - 0.9) < 5 * (0.09 / (1 << 18)) ** 0.5
    for lag in range(1, 5):  # the four fields of a word, and neighbours
        assert abs(torch.corrcoef(torch.stack([one[lag:], one[:-lag]]))[0, 1]) < 5 / 512
    assert abs(torch.corrcoef(torch.stack([one, two]))[0, 1]) < 5 / 512


def test_seeds() -> None:
    assert as_seed(7, 0.0) is None
    tensor = torch.tensor(7)
    assert as_seed(tensor, 0.1) is not None and torch.equal(mask(7, (99,), 0.1), keep_mask(tensor, (99,), 0.1, CPU))
    torch.manual_seed(3)
    drawn = as_seed(None, 0.1)
    torch.manual_seed(3)
    again = as_seed(None, 0.1)
    assert drawn is not None and again is not None and drawn == again
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="dropout_p"):
            as_seed(1, p)
    with pytest.raises(ValueError, match="seed"):
        as_seed(torch.tensor([1, 2]), 0.1)


def test_dropout_scales_what_it_keeps() -> None:
    x = torch.randn(5, 33, requires_grad=True)
    seed = as_seed(11, 0.25)
    assert seed is not None
    (dropout(x, 0.25, seed)).sum().backward()
    assert torch.equal(x.grad, mask(11, (5, 33), 0.25) / 0.75)
    assert torch.equal(keep_scale(seed, (5, 33), 0.25, CPU, torch.float32), mask(11, (5, 33), 0.25) / 0.75)
    assert dropout(x, 0.0, None) is x
    assert keep_mask(seed, (0, 4), 0.25, CPU).shape == (0, 4)
