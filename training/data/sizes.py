"""SIZES: which sizes of images a U-net can take, and which one is nearest to that of the data.

A U-net halves its images a few times, and doubles them again on the way up, so both sides must be multiples of a power
of two. How often it halves is fixed, or follows from the size, see `halvings`.
"""

from __future__ import annotations

import math

LARGEST = 256  # pixels: the longest side that is trained at without being asked for
PROPOSED = 64  # the longer side that is proposed instead

Rule = int | None  # the power of two of which both sides are multiples; None: that of `halvings`


def halvings(height: int, width: int) -> int:
    """How often a network of a family halves an image: until the shorter side is 4, 5 or 6 pixels."""
    return max(0, math.floor(math.log2(min(height, width) / 3.5)))


def nearest_size(rule: Rule, height: int, width: int) -> tuple[int, int]:
    """The size (H, W) in pixels, nearest to this one, that the network can halve as often as it needs to.

    Without a fixed power of two the shorter side becomes 4, 5 or 6 times one: 28 x 28 becomes 32 x 32, 50 x 70 48 x 72.
    """
    if rule is not None:
        return max(rule, _round(height, rule)), max(rule, _round(width, rule))
    unit = 2 ** halvings(height, width)
    # 7 units are 4 of twice the unit, so what is less is nearer to 6
    near = [6 * unit if 6 * unit < side < 7 * unit else _round(side, unit) for side in (height, width)]
    return max(4 * unit, near[0]), max(4 * unit, near[1])


def check_square(height: int, width: int) -> None:
    """Raise ValueError if images of this size have another size after a quarter turn."""
    if height != width:
        raise ValueError(
            f"random_rotate90 is true and the images are {height}x{width} (height x width): give a square "
            "--resolution, or leave out --random_rotate90"
        )


def proposed_size(rule: Rule, height: int, width: int) -> tuple[int, int]:
    """A small size of about the same shape."""
    scale = PROPOSED / max(height, width)
    return nearest_size(rule, max(1, round(scale * height)), max(1, round(scale * width)))


def _round(side: int, unit: int) -> int:
    """The multiple of a unit that is nearest; of two equally near ones the larger."""
    return unit * math.floor(side / unit + 0.5)
