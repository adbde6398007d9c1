"""Averages of any length after training: profiles against numerical integration, averages against direct sums."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import nn

from training.ema import FlatEMA
from training.post_hoc_ema import (
    LONGEST,
    SHORTEST,
    TRACKED,
    PostHocEMA,
    Profile,
    coefficients,
    gamma_of,
    inner_product,
    length_of,
    reconstruct,
    weight_of_step,
)

STEPS, SNAPSHOTS = 1280, 64


def density(gamma, t):
    return lambda tau: (gamma + 1) * (tau / t) ** gamma / t


# ---- Profiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0, 0.5, 6.94, 16.97, 100])
def test_the_length_is_the_standard_deviation_of_the_profile(gamma):
    p = density(gamma, 1)
    total, mean, square = (quad(lambda tau, k=k: p(tau) * tau**k, 0, 1)[0] for k in range(3))
    assert total == pytest.approx(1)
    assert length_of(gamma) == pytest.approx(math.sqrt(square - mean**2), rel=1e-6)


@pytest.mark.parametrize("length", [0.005, SHORTEST, 0.05, 0.1, 0.2, LONGEST, 0.288])
def test_the_exponent_is_the_root(length):
    """scipy finds it by bisection."""
    gamma = gamma_of(length)
    assert gamma >= 0 and length_of(gamma) == pytest.approx(length, rel=1e-9)
    assert gamma == pytest.approx(brentq(lambda g: length_of(g) - length, 0, 1e4), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("length", [0, -0.1, 0.2887, 0.3, 1, math.nan])
def test_there_is_no_profile_of_another_length(length):
    with pytest.raises(ValueError, match=r"length of an average is .*: give a number above 0, at most 0.2887"):
        gamma_of(length)


@pytest.mark.parametrize(("a", "b"), [((3.0, 10), (3.0, 10)), ((16.97, 40), (6.94, 64)), ((16.97, 64), (0.5, 40))])
def test_inner_products_are_integrals(a, b):
    p, q = density(*a), density(*b)
    expected = quad(lambda tau: p(tau) * q(tau), 0, min(a[1], b[1]))[0]
    assert inner_product(Profile(*a), Profile(*b)) == pytest.approx(expected)
    assert inner_product(Profile(*b), Profile(*a)) == pytest.approx(expected)


# ---- Updates ---------------------------------------------------------------------------------------------------------


class Motion:
    """A model whose weights move at random, with its EMA and averages, and all weights that it has had."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Linear(7, 11))
        self.ema = FlatEMA(self.model)
        self.averages = PostHocEMA(self.ema)
        self.step, self.history = 0, []

    def move(self, skip=None):
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape))
        self.step += 1
        self.history.append(self.flat(dict(self.model.named_parameters())))
        self.ema.update(self.step, skip)
        self.averages.update(self.step, skip)

    @staticmethod
    def flat(weights):
        return torch.cat([tensor.detach().double().flatten() for tensor in weights.values()])

    def direct(self, length):
        """The average of this length, updated in float64 from all weights."""
        gamma, average = gamma_of(length), torch.zeros(())
        for t, weights in enumerate(self.history, start=1):
            beta = (1 - 1 / t) ** (gamma + 1)
            average = beta * average + (1 - beta) * weights
        return average


@pytest.fixture(scope="module")
def moved():
    """A motion of STEPS, and snapshots of its averages in float32."""
    motion, snapshots = Motion(), {}
    for step in range(1, STEPS + 1):
        motion.move()
        if step % (STEPS // SNAPSHOTS) == 0:
            for length, weights in motion.averages.state_dicts().items():
                snapshots[Profile(gamma_of(length), step)] = weights
    return motion, snapshots


def readers(snapshots, dtype=torch.float32):
    """As `reconstruct` takes them: what a file of this dtype would give."""
    return {
        profile: lambda weights=weights: {name: tensor.to(dtype) for name, tensor in weights.items()}
        for profile, weights in snapshots.items()
    }


def error(found, expected):
    return ((Motion.flat(found) - expected).norm() / expected.norm()).item()


def test_each_step_weighs_what_the_profile_has_there(moved):
    """The share of the weights of step n is the integral of the profile from n - 1 to n."""
    motion, _ = moved
    for length, weights in motion.averages.state_dicts().items():
        gamma = gamma_of(length)
        n = torch.arange(STEPS + 1, dtype=torch.float64) / STEPS
        shares = (n ** (gamma + 1)).diff()
        assert shares.sum() == pytest.approx(1)
        expected = (shares[:, None] * torch.stack(motion.history)).sum(0)
        assert error(weights, expected) < 1e-5
        assert error(weights, motion.direct(length)) < 1e-5


def test_the_first_step_forgets_the_initial_weights_and_weights_far_on_are_small():
    assert weight_of_step(6.94, 1) == 1
    assert weight_of_step(6.94, 10**9) == pytest.approx(7.94e-9)


def test_a_skipped_step_leaves_the_averages_alone():
    motion = Motion()
    for step in range(3):
        before = motion.averages.state_dicts()
        motion.move(skip=torch.tensor(float(step == 2)))
    after = motion.averages.state_dicts()
    assert all(torch.equal(Motion.flat(after[length]), Motion.flat(before[length])) for length in TRACKED)
    assert not torch.equal(Motion.flat(after[0.05]), Motion.flat(after[0.10]))


def test_averages_are_saved_and_loaded():
    motion, other = Motion(), Motion()
    for _ in range(3):
        motion.move()
    other.averages.load_state_dicts(motion.averages.state_dicts())
    for length, weights in motion.averages.state_dicts().items():
        assert torch.equal(Motion.flat(weights), Motion.flat(other.averages.state_dicts()[length]))
    assert motion.averages.numel == 2 * len(motion.history[0])


# ---- Reconstruction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [SHORTEST, 0.03, 0.07, 0.15, 0.2])
def test_a_length_that_was_not_tracked_is_found_again(moved, length):
    """Against the average that is updated directly; with 16 bits, fp16 is nearer than bf16."""
    motion, snapshots = moved
    expected = motion.direct(length)
    assert error(reconstruct(readers(snapshots), length), expected) < 1e-3
    in_fp16, in_bf16 = (
        error(reconstruct(readers(snapshots, dtype), length), expected) for dtype in (torch.float16, torch.bfloat16)
    )
    assert in_fp16 < 4e-3
    assert in_fp16 < in_bf16 / 4


def test_the_longest_average_is_found_again(moved):
    motion, snapshots = moved
    assert error(reconstruct(readers(snapshots), LONGEST), motion.direct(LONGEST)) < 2e-3


@pytest.mark.parametrize("length", TRACKED)
def test_a_snapshot_is_reproduced_exactly(moved, length):
    """Weights of 0 too, which the others would move by what is left of their coefficients, 1e-14."""
    last = Profile(gamma_of(length), STEPS)
    expected = moved[1][last] | {"1.bias": torch.zeros(11)}
    found = reconstruct(readers(moved[1] | {last: expected}), length)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_coefficients_are_those_of_least_squares(moved):
    """numpy's least squares on the profiles themselves, at 20,000 points; the last coefficient makes the sum 1."""
    profiles = list(moved[1])[-24:]
    wanted = Profile(gamma_of(0.07), STEPS)
    tau = (np.arange(20_000) + 0.5) / 20_000 * STEPS
    *columns, last, target = (np.where(tau <= t, density(gamma, t)(tau), 0) for gamma, t in [*profiles, wanted])
    differences = np.stack([column - last for column in columns], axis=1)
    expected = np.linalg.lstsq(differences, target - last, rcond=None)[0]
    found, relative = coefficients(profiles, wanted)
    assert found == pytest.approx([*expected, 1 - expected.sum()], abs=1e-3)
    difference = np.sqrt(np.mean((differences @ expected + last - target) ** 2) / np.mean(target**2))
    assert relative == pytest.approx(difference, rel=0.01) and relative > 1e-3


@pytest.mark.parametrize(
    ("length", "is_there", "is_enough"),
    [
        (0.02, lambda profile: True, True),
        (0.25, lambda profile: True, True),
        (0.02, lambda profile: profile != Profile(gamma_of(0.05), STEPS), False),
        (0.07, lambda profile: profile != Profile(gamma_of(0.05), STEPS), True),
        (0.25, lambda profile: profile.step > STEPS / 2, False),
        (0.07, lambda profile: profile.step > STEPS / 2, True),
        (0.25, lambda profile: profile == Profile(gamma_of(0.05), STEPS), False),
        (0.05, lambda profile: profile == Profile(gamma_of(0.05), STEPS), True),
    ],
)
def test_lengths_for_which_snapshots_are_missing_are_refused(moved, length, is_there, is_enough):
    motion, snapshots = moved
    left = {profile: weights for profile, weights in snapshots.items() if is_there(profile)}
    if is_enough:
        assert error(reconstruct(readers(left), length), motion.direct(length)) < 0.1
    else:
        with pytest.raises(ValueError, match=rf"length {length} cannot be put together from the {len(left)} snapshots"):
            reconstruct(readers(left), length)


def test_the_average_of_one_step_is_its_weights():
    """Whatever its length: the coefficients sum to 1."""
    motion = Motion()
    motion.move()
    snapshots = {Profile(gamma_of(length), 1): weights for length, weights in motion.averages.state_dicts().items()}
    assert error(reconstruct(readers(snapshots), 0.07), motion.history[0]) < 1e-6


@pytest.mark.parametrize("length", [0, -0.1, 0.019, 0.251, 0.3, math.nan])
def test_other_lengths_are_refused(moved, length):
    with pytest.raises(
        ValueError, match=rf"average is {length:g}: give a number from 0.02 to 0.25, a share of the run"
    ):
        reconstruct(readers(moved[1]), length)


def test_non_finite_weights_are_named(moved):
    snapshots = readers(moved[1])
    last = list(snapshots)[-1]
    weights = snapshots[last]()
    weights["1.bias"][2] = torch.inf  # what fp16 makes of 70,000
    with pytest.raises(ValueError, match=r"1.bias is non-finite in the average of length 0.07"):
        reconstruct(snapshots | {last: lambda: weights}, 0.07)
