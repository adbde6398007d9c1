"""POST-HOC EMA: averages of the weights of any length, chosen after training (Karras et al. 2024, arXiv 2312.02696).

The average of gamma at step t weighs the weights of an earlier step tau by a power of it (section 3.1):

    profile   p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),   0 <= tau <= t
    update    beta_t = (1 - 1/t)^(gamma + 1),   average_t = beta_t average_(t-1) + (1 - beta_t) weights_t
    length    sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))

The length is the standard deviation of the profile as a share of t: an average of 0.10 is about as long as a tenth of
the run, however long that is. beta_1 is 0, so the initial weights do not count. Two averages are updated in training,
and snapshots of both are saved now and then. Afterwards any other one is a linear combination of all snapshots, whose
profile is as near to its own as possible (section 3.2, appendix C).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from training.ema import FlatEMA

TRACKED = (0.05, 0.10)  # lengths of the averages that are updated in training
# Of those to reconstruct. With snapshots at every 1/64 of a run in fp16, the error in weights that move at random is
# 0.3% for the shortest, mostly of rounding, and below 0.2% for the longest; beyond both it grows fast.
SHORTEST, LONGEST = 0.02, 0.25
NEGLIGIBLE = 1e-9  # a coefficient that changes no float32
# Of a profile that is put together, relative. With all snapshots of a run it is at most 0.015.
LARGEST_ERROR = 0.1


class Profile(NamedTuple):
    """Which average: its exponent gamma, and the optimizer step t, from 1, that it is of."""

    gamma: float
    step: int


def length_of(gamma: float) -> float:
    """sigma_rel of the profile with this exponent, which is at least 0."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def gamma_of(length: float) -> float:
    """The exponent of the profile with this sigma_rel.

    The square of `length_of` is a cubic equation, (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2. Its largest
    real root is the only one of at least 0.

    Raises:
        ValueError: there is none.
    """
    if not 0 < length <= length_of(0):
        raise ValueError(f"the length of an average is {length:g}: give a number above 0, at most {length_of(0):.4f}")
    ratio = length**-2
    return float(np.roots([1, 7, 16 - ratio, 12 - ratio]).real.max())


def weight_of_step(gamma: float, step: int) -> float:
    """1 - beta_t = 1 - (1 - 1/t)^(gamma + 1), for the update after optimizer step t = 1, 2, ..."""
    return 1.0 if step == 1 else -math.expm1((gamma + 1) * math.log1p(-1 / step))


def inner_product(a: Profile, b: Profile) -> float:
    """The integral of p_a(tau) p_b(tau) from 0 to the earlier of both steps (appendix C)."""
    (gamma_1, t_1), (gamma_2, t_2) = sorted((a, b), key=lambda profile: profile.step)
    return (gamma_1 + 1) * (gamma_2 + 1) / (gamma_1 + gamma_2 + 1) * (t_1 / t_2) ** gamma_2 / t_2


def coefficients(snapshots: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """Those x with which the sum of x_i p_i has the smallest squared difference, integrated, from the wanted profile.

    They sum to 1, so that constant weights are their own average. The paper leaves that out, and with 64 snapshots it
    makes next to no difference; with the few of a short run, the weights would shrink by some per cent. The solution
    has a Lagrange multiplier m: sum_j <p_i, p_j> x_j + m = <p_i, p> for all i, and sum_j x_j = 1.

    Beside them |sum of x_i p_i - p| / |p|, the relative error of the profile.

    Args:
        snapshots: their profiles, all different.
    """
    n = len(snapshots)
    matrix = np.ones((n + 1, n + 1))
    matrix[:n, :n] = [[inner_product(a, b) for b in snapshots] for a in snapshots]
    matrix[n, n] = 0
    products = np.array([inner_product(snapshot, wanted) for snapshot in snapshots])
    x = np.linalg.solve(matrix, [*products, 1])[:n]
    square = inner_product(wanted, wanted)
    error = math.sqrt(max(0.0, 1 + (x @ matrix[:n, :n] @ x - 2 * x @ products) / square))
    return [float(each) if abs(each) > NEGLIGIBLE else 0.0 for each in x], error


def coefficients_of(snapshots: Sequence[Profile], length: float) -> list[float]:
    """`coefficients` for the average of this length at the last step of the snapshots.

    Raises:
        ValueError: the length is outside of SHORTEST to LONGEST, or these snapshots are too few for it.
    """
    check_length(length)
    found, error = coefficients(snapshots, Profile(gamma_of(length), max(profile.step for profile in snapshots)))
    if error > LARGEST_ERROR:
        raise ValueError(
            f"the average of length {length:g} cannot be put together from the {len(snapshots)} snapshots that are "
            f"there, only one that differs by {error:.0%}: some are missing, or the run had few steps; lengths near "
            f"{TRACKED[0]:g} and {TRACKED[1]:g} need the fewest"
        )
    return found


def reconstruct(snapshots: Mapping[Profile, Callable[[], Mapping[str, Tensor]]], length: float) -> dict[str, Tensor]:
    """The average of this length at the last step of the snapshots: float32 weights on the CPU, by name.

    Args:
        snapshots: what reads each, so that only one at a time is in memory.
    Raises:
        ValueError: as `coefficients_of`; or weights that are non-finite.
    """
    sums: dict[str, Tensor] = {}
    for read, x in zip(snapshots.values(), coefficients_of(list(snapshots), length)):
        if x:
            for name, tensor in read().items():
                sums[name] = sums.get(name, 0) + x * tensor.double()
    if bad := next((name for name, tensor in sums.items() if not tensor.isfinite().all()), None):
        raise ValueError(f"{bad} is non-finite in the average of length {length:g}: a snapshot has such weights")
    return {name: tensor.float() for name, tensor in sums.items()}


def check_length(length: float) -> None:
    """Raise ValueError if an average is too short or too long to be reconstructed."""
    if not SHORTEST <= length <= LONGEST:
        raise ValueError(
            f"the length of an average is {length:g}: give a number from {SHORTEST:g} to {LONGEST:g}, a share of the "
            "run such as 0.1"
        )


class PostHocEMA:
    """The averages of TRACKED lengths of the weights that an EMA has in its block of memory."""

    def __init__(self, ema: FlatEMA) -> None:
        self._averages = {length: ema.another_average() for length in TRACKED}
        self._gammas = {length: gamma_of(length) for length in TRACKED}

    @property
    def numel(self) -> int:
        """Numbers in all averages."""
        return sum(average.numel for average in self._averages.values())

    def update(self, step: int, skip: Tensor | None = None) -> None:
        """After optimizer step `step` = 1, 2, ... and after the update of the EMA; `skip` as for that."""
        for length, average in self._averages.items():
            average.move(weight_of_step(self._gammas[length], step), skip)

    def state_dicts(self) -> dict[float, dict[str, Tensor]]:
        """The averages by length, each as `FlatAverage.state_dict`."""
        return {length: average.state_dict() for length, average in self._averages.items()}

    def load_state_dicts(self, states: Mapping[float, Mapping[str, Tensor]]) -> None:
        """Set the averages; ValueError: as `FlatAverage.load_state_dict`."""
        for length, average in self._averages.items():
            average.load_state_dict(states[length])
