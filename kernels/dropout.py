"""Dropout's mask as a function of (seed, shape) alone: the same on every device, in forward and in backward.

Knows counters and a hash; does not know what is dropped, or PyTorch's generators beyond drawing a seed where none came.

    h(g) = splitmix64(seed + (g + 1) * 0x9E3779B97F4A7C15)        one 64-bit word for four elements, g = index // 4
    element `index` (row-major in the mask's shape) is kept where the signed 16-bit field index % 4 of h(g), lowest
    first, is at least round(p * 65536) - 32768

A counter and no generator's state: any implementation can make the bits of any element where it needs them (a kernel in
registers), a tensor seed is never read by the host, and CPU and CUDA agree bit for bit. p is rounded to 1/65536; kept
values are scaled by 1 / (1 - p), which moves the expectation by less than 1e-5 of itself at p = 0.1.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (the generator's finaliser).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Seed = Tensor | int | None

_STEPS = 65536


def _signed(word: int) -> int:
    """A 64-bit word as the int64 of the same bits."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


_WEYL = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def check_dropout(p: float) -> None:
    """Raises ValueError unless 0 <= p < 1."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p: got {p}; wanted 0 <= p < 1 (1 would drop everything)")


def as_seed(seed: Seed, p: float) -> Tensor | None:
    """The seed as an int64 0-dim tensor; None where p is 0.

    A tensor stays on its device. An int, or a draw from PyTorch's default generator where seed is None, becomes a CPU
    tensor: adding one of those to a CUDA tensor neither copies nor waits.

    Raises:
        ValueError: p outside of [0, 1), or a seed tensor that is not one int64.
    """
    check_dropout(p)
    if p == 0.0:
        return None
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ValueError(f"seed: got {seed.dtype} {tuple(seed.shape)}; wanted an int64 0-dim tensor or an int")
        return seed.reshape(())
    return torch.full((), seed if torch.compiler.is_compiling() else _signed(seed), dtype=torch.int64)


def _shift_xor(z: Tensor, bits: int) -> Tensor:
    """z ^= z >>> bits; int64's own shift drags the sign along."""
    return z.bitwise_xor_((z >> bits).bitwise_and_((1 << (64 - bits)) - 1))


def _words(seed: Tensor, count: int, device: torch.device, start: int = 0) -> Tensor:
    """h(start) … h(start + count - 1) as int64."""
    z = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device)
    z = z.mul_(_WEYL).add_(seed if seed.device.type == "cpu" else seed.to(device))
    z = _shift_xor(z, 30).mul_(_FIRST)
    z = _shift_xor(z, 27).mul_(_SECOND)
    return _shift_xor(z, 31)


def uniform(seed: Tensor, shape: Sequence[int], device: torch.device, start: int = 0) -> Tensor:
    """Float32 numbers inside (0, 1): (k + 1/2) / 2**23, k the highest 23 bits of h(index), one word an element.

    `start` is the first element's index: a part of something larger draws as it would within the whole.
    Every value is exact in float32, and neither 0 nor 1: log() of it and of that again are finite.
    """
    words = (_words(seed, math.prod(shape), device, start) >> 41).bitwise_and_((1 << 23) - 1)
    return words.float().add_(0.5).mul_(2.0**-23).view(tuple(shape))


def keep_mask(seed: Tensor, shape: Sequence[int], p: float, device: torch.device) -> Tensor:
    """The bool mask of `shape` on `device`, True where an element is kept.

    seed: int64 0-dim (`as_seed`), on CPU or on `device`: then nothing waits for the device.
    """
    count = math.prod(shape)
    z = _words(seed, (count + 3) // 4, device)
    fields = z.view(torch.int16)[:count]  # little-endian: the lowest 16 bits come first
    return (fields >= min(round(p * _STEPS), _STEPS - 1) - _STEPS // 2).view(tuple(shape))


def keep_scale(seed: Tensor, shape: Sequence[int], p: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`keep_mask` as numbers: 0 where dropped, 1 / (1 - p) where kept."""
    return keep_mask(seed, shape, p, device).to(dtype).mul_(1.0 / (1.0 - p))


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """x with the mask of its shape applied, kept values scaled; x itself where p is 0. Differentiable."""
    if p == 0.0:
        return x
    assert seed is not None, "dropout needs the seed that as_seed made"
    return x * keep_scale(seed, x.shape, p, x.device, x.dtype)
