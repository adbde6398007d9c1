"""CHANCE: random numbers that are functions of where they are used, and of nothing else.

Training needs random numbers: which images, turned or not, which t, which noise. Here number `index` of a stream is a
function of the stream's key, say (seed, purpose, step), and of the index, say the place in the global batch. So nothing
has to be saved to go on where a run was interrupted, and one process or four, one batch or several small ones, a CPU or
a GPU use the same numbers (but for the rounding of a logarithm and a cosine in `normal`). The function is SplitMix64
(Steele, Lea and Flood 2014): a counter times an odd number, then mixed.
"""

import enum
import math

import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15  # the step of SplitMix64's counter: 2^64 over the golden ratio, made odd
MULTIPLIERS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of its mixing function
MASK = 2**64 - 1


@enum.unique
class Stream(enum.IntEnum):
    """What random numbers are for: the second number of a key, so that no two purposes share numbers.

    Never change a number: runs that were begun with it resume with it.
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


def key(*numbers: int) -> int:
    """One 64-bit key of several integers, such as (seed, purpose, step)."""
    mixed = 0
    for number in numbers:
        mixed = _mix_int((mixed + number) & MASK)
    return mixed


def bits(key: int, index: Tensor) -> Tensor:
    """64 random bits for each index: int64, shape and device of index (int64, 0 or more)."""
    z = (index + 1) * _signed(GAMMA) + _signed(key)
    z = (z ^ _shifted(z, 30)) * _signed(MULTIPLIERS[0])
    z = (z ^ _shifted(z, 27)) * _signed(MULTIPLIERS[1])
    return z ^ _shifted(z, 31)


def uniform(key: int, index: Tensor) -> Tensor:
    """Uniform in [0, 1): float64, multiples of 2^-53, shape of index."""
    return _shifted(bits(key, index), 11).double() * 2.0**-53


def integers(key: int, index: Tensor, high: int) -> Tensor:
    """Uniform in {0, ..., high - 1}: int64, shape of index."""
    return (uniform(key, index) * high).long()


def normal(key: int, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """N(0, 1) for each index (B,): float32 (B, *shape), by the method of Box and Muller (1958)."""
    number = math.prod(shape)
    pairs = (number + 1) // 2
    counter = index[:, None] * pairs + torch.arange(pairs, device=index.device)
    both = bits(key, counter)
    # The upper 32 bits give the radius, the lower 32 the angle; one half, so that no logarithm of 0 is taken.
    radius = ((_shifted(both, 32).float() + 0.5) * 2.0**-32).log().mul_(-2).sqrt_()
    angle = (both & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)
    values = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return values.flatten(1)[:, :number].reshape(-1, *shape)


def _shifted(z: Tensor, places: int) -> Tensor:
    """z >> places with zeros coming in from the left: int64 has a sign, and >> repeats it."""
    return (z >> places) & (MASK >> places)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _mix_int(z: int) -> int:
    """The same mixing as in `bits`, of a Python integer."""
    z = ((z ^ (z >> 30)) * MULTIPLIERS[0]) & MASK
    z = ((z ^ (z >> 27)) * MULTIPLIERS[1]) & MASK
    return z ^ (z >> 31)
