"""RNG: counter-based random numbers, pure functions of a key and an index.

Training needs random numbers: the order of the images, flips, t and noise. Number `index` of a stream is a function of
the stream's key, such as (seed, stream id, step), and of the index, such as that of an image in the global batch. There
is no state to save for a resumed run. One process or four, one batch or several micro-batches, a CPU or a GPU use the
same numbers (up to the rounding of a logarithm and a cosine in `normal`). The function is SplitMix64 (Steele, Lea and
Flood 2014): a counter times an odd number, then mixed.
"""

import enum
import math

import torch
from torch import Tensor

from .precision import as_float64

GAMMA = 0x9E3779B97F4A7C15  # increment of SplitMix64's counter: 2^64 over the golden ratio, made odd
MULTIPLIERS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of SplitMix64's mixing function
MASK = 2**64 - 1


@enum.unique
class Stream(enum.IntEnum):
    """Stream ids, the second number of a key: what is drawn from one stream is never drawn from another.

    Never change a number: old runs resume with it.
    """

    MOON_PHASE = 0
    TIMESTEP = 1
    NOISE = 2
    SAMPLE_ORDER = 3
    FLIP = 4
    DROPOUT = 5
    INITIAL_WEIGHTS = 6
    BOUND_NOISE = 7
    BOUND_TIMESTEP = 8
    DEQUANTISATION = 9
    DIVERGENCE_PROBE = 10
    VALIDATION_NOISE = 11
    VALIDATION_TIMESTEP = 12
    MOON_TILT = 13
    LABEL_DROPOUT = 14
    VERTICAL_FLIP = 15
    QUARTER_TURN = 16
    TIMESTEP_SHIFT = 17
    TIMESTEP_LOG_SNR = 18
    NOISE_CANDIDATE = 19
    INPUT_PERTURBATION = 20
    SHARD_ORDER = 21
    TIMESTEP_KIND = 22


def key(*numbers: int) -> int:
    """One 64-bit key of several integers, such as (seed, stream id, step)."""
    mixed = 0
    for number in numbers:
        mixed = _mix_int((mixed + number) & MASK)
    return mixed


def bits(key: int, index: Tensor) -> Tensor:
    """64 random bits for each index: int64, shape and device of index (int64, 0 or more)."""
    z = (index + 1) * _signed(GAMMA) + _signed(key)
    z = (z ^ _shift_right(z, 30)) * _signed(MULTIPLIERS[0])
    z = (z ^ _shift_right(z, 27)) * _signed(MULTIPLIERS[1])
    return z ^ _shift_right(z, 31)


def uniform(key: int, index: Tensor) -> Tensor:
    """Uniform in [0, 1): float64, multiples of 2^-53, shape of index."""
    return as_float64(_shift_right(bits(key, index), 11)) * 2.0**-53


def integers(key: int, index: Tensor, high: int) -> Tensor:
    """Uniform in {0, ..., high - 1}: int64, shape of index."""
    return (uniform(key, index) * high).long().to(index.device)


def permutation(key: int, count: int) -> Tensor:
    """A random order of range(count), (count,) int64, on the CPU."""
    return bits(key, torch.arange(count)).argsort(stable=True)


def normal(key: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """N(0, 1) for each index (B,): float32 (B, *shape), by the Box-Muller transform (1958)."""
    size = math.prod(shape)
    pairs = (size + 1) // 2
    counter = index[:, None] * pairs + torch.arange(pairs, device=index.device)
    random_bits = bits(key, counter)
    # The upper 32 bits give the radius, the lower 32 the angle; adding one half avoids the logarithm of 0.
    radius = ((_shift_right(random_bits, 32).float() + 0.5) * 2.0**-32).log().mul_(-2).sqrt_()
    angle = (random_bits & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)
    values = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return values.flatten(1)[:, :size].reshape(-1, *shape)


def _shift_right(z: Tensor, count: int) -> Tensor:
    """Logical shift: >> of an int64 tensor repeats the sign bit."""
    return (z >> count) & (MASK >> count)


def _signed(number: int) -> int:
    """The int64 with the bits of a 64-bit unsigned number."""
    return number - 2**64 if number >= 2**63 else number


def _mix_int(z: int) -> int:
    """The mixing function of `bits` on a Python integer."""
    z = ((z ^ (z >> 30)) * MULTIPLIERS[0]) & MASK
    z = ((z ^ (z >> 27)) * MULTIPLIERS[1]) & MASK
    return z ^ (z >> 31)
