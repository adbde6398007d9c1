"""Distances between feature sets, against closed forms, plain loops, scipy and torchmetrics."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from torch import nn

from ddpm_pipeline import fidelity, image_arrays
from ddpm_pipeline.fidelity import (
    accuracy,
    channel_shift,
    cmmd_kernel,
    cubic_kernel,
    density_coverage,
    frechet_distance,
    jackknife,
    kernel_distance,
    memorisation,
    nearest,
    precision_recall,
)
from tests.arrays import normal, random_images


class Identity(nn.Module):
    """Stands for torchmetrics' feature network; its input is the features themselves."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, x):
        return x


def by_torchmetrics(metric, features, reference, **options):
    # Imported from its own module: torchmetrics.image exports it only if torch-fidelity is installed.
    module = pytest.importorskip(f"torchmetrics.image.{metric}", reason="torchmetrics is not installed: extra `test`")
    name = {"fid": "FrechetInceptionDistance", "kid": "KernelInceptionDistance"}[metric]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it keeps all features in memory
        measure = getattr(module, name)(feature=Identity(features.shape[1]), **options)
        measure.set_dtype(torch.float64)
        measure.update(reference, real=True)
        measure.update(features, real=False)
        return measure.compute()


# ---- Frechet distance ------------------------------------------------------------------------------------------------


def by_sqrtm(mean_1, covariance_1, mean_2, covariance_2):
    root = linalg.sqrtm(covariance_1 @ covariance_2)
    return np.square(mean_1 - mean_2).sum() + np.trace(covariance_1 + covariance_2 - 2 * root).real


def moments(features):
    return features.numpy().mean(axis=0), np.cov(features.numpy().T)


ROTATION = torch.tensor([[math.cos(0.6), -math.sin(0.6)], [math.sin(0.6), math.cos(0.6)]], dtype=torch.float64)


def test_frechet_distance_of_gaussians_equals_the_closed_form():
    """A circle and a rotated ellipse, whose covariances commute, and two ellipses, whose covariances do not."""
    ellipse = torch.tensor([3.0, 0.5], dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0], dtype=torch.float64)
    x, y = normal(40_000, 2), normal(40_000, 2, seed=1)
    rotated = ROTATION @ torch.diag(ellipse.square()) @ ROTATION.T
    cases = (
        (x, (y * ellipse) @ ROTATION.T + shift, 5 + (3 - 1) ** 2 + (0.5 - 1) ** 2),
        # the trace of the square root of a 2 x 2 matrix P is sqrt(tr P + 2 sqrt(det P)); here det P is (1.5^2)^2
        (
            x * ellipse,
            (y * ellipse) @ ROTATION.T,
            2 * 9.25 - 2 * math.sqrt((torch.diag(ellipse.square()) @ rotated).trace().item() + 2 * 1.5**2),
        ),
    )
    for samples, reference, expected in cases:
        forward = jackknife(frechet_distance, samples, reference, groups=20)
        backward = jackknife(frechet_distance, reference, samples, groups=20)
        error = math.hypot(forward.standard_error, backward.standard_error)
        assert error < 0.06 and abs(forward.value - expected) < 4 * error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_frechet_distance_equals_the_formula_on_sample_moments(dtype, monkeypatch):
    x = (normal(150, 6) @ normal(6, 6, seed=2) + 1).to(dtype)
    y = (normal(97, 6, seed=1) @ normal(6, 6, seed=3)).to(dtype)
    expected = by_sqrtm(*moments(x.double()), *moments(y.double()))
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-11)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-11)
    monkeypatch.setattr(fidelity, "CHUNK", 10)  # 97 vectors do not fill the last chunk
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-11)


def test_frechet_distance_equals_torchmetrics_where_that_is_accurate():
    x, y = normal(150, 6) * 1.5 + 1, normal(100, 6, seed=1)
    assert frechet_distance(x, y) == pytest.approx(by_torchmetrics("fid", x, y).item(), rel=1e-10)


def test_frechet_distance_with_fewer_vectors_than_dimensions():
    """Vectors in a subspace have the distance that they have within the subspace."""
    basis = torch.linalg.qr(normal(64, 3, seed=5)).Q.T
    x, y = normal(40, 3) + 1, normal(30, 3, seed=1) * 2
    within = by_sqrtm(*moments(x), *moments(y))
    assert frechet_distance(x @ basis, y @ basis) == pytest.approx(within, rel=1e-12)
    # In orthogonal subspaces the matrix square root is 0.
    orthogonal = torch.linalg.qr(normal(64, 6, seed=6)).Q.T
    expected = sum(np.trace(np.cov(z.numpy().T)) + z.mean(dim=0).square().sum().item() for z in (x, y))
    assert frechet_distance(x @ orthogonal[:3], y @ orthogonal[3:]) == pytest.approx(expected, rel=1e-12)
    # A set and itself, and a set and one that differs by less than the square roots of rounding errors.
    few = normal(20, 64, seed=7)
    assert 0 <= frechet_distance(few, few) < 1e-12
    assert frechet_distance(few, few + 1e-5) == pytest.approx(64e-10, rel=1e-3)


# ---- Kernel distance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "k"),
    [
        (cubic_kernel, lambda a, b: (a @ b / 4 + 1).item() ** 3),
        (cmmd_kernel, lambda a, b: 1000 * math.exp(-((a - b).norm().item() ** 2) / (2 * 10**2))),
    ],
)
def test_kernel_distance_equals_the_sum_over_all_pairs(monkeypatch, kernel, k):
    x, y = normal(23, 4), normal(17, 4, seed=1) * 1.5 + 0.3
    within = {
        name: np.mean([k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j])
        for name, z in (("x", x), ("y", y))
    }
    expected = within["x"] + within["y"] - 2 * np.mean([k(a, b) for a in x for b in y])
    h_x = [np.mean([k(x[i], x[j]) for j in range(23) if j != i]) - np.mean([k(x[i], b) for b in y]) for i in range(23)]
    h_y = [np.mean([k(y[i], y[j]) for j in range(17) if j != i]) - np.mean([k(y[i], a) for a in x]) for i in range(17)]
    error = math.sqrt(4 * np.var(h_x, ddof=1) / 23 + 4 * np.var(h_y, ddof=1) / 17)
    for chunk in (2048, 5):
        monkeypatch.setattr(fidelity, "CHUNK", chunk)
        assert kernel_distance(x, y, kernel) == pytest.approx((expected, error), rel=1e-10)
        assert kernel_distance(y, x, kernel) == pytest.approx((expected, error), rel=1e-10)


def test_kernel_distance_equals_torchmetrics():
    x, y = normal(60, 8), normal(60, 8, seed=1) + 0.5
    value, _ = by_torchmetrics("kid", x, y, subsets=1, subset_size=60)
    assert kernel_distance(x, y).value == pytest.approx(value.item(), rel=1e-6)  # torchmetrics returns float32


def test_kernel_distance_is_unbiased_and_its_standard_error_correct():
    """The mean of 300 draws is the closed form within 4 standard errors, 0 for equal distributions. For different
    distributions the reported standard error is the standard deviation of the draws.
    """

    def draws(shift, scale):
        generator = torch.Generator().manual_seed(11)
        x, y = (torch.randn(300, n, 4, generator=generator, dtype=torch.float64) for n in (60, 90))
        value, error = np.array([kernel_distance(a, b * scale + shift) for a, b in zip(x, y)]).T
        return value.mean(), value.std(ddof=1), math.sqrt(np.square(error).mean())

    mean, std, error = draws(0, 1)
    assert abs(mean) < 4 * std / math.sqrt(300)
    assert std < error < 2 * std
    mean, std, error = draws(0.5, 1.3)
    # E k = E (s + 1)^3 with s = x . y / 4: 1 + 3 E s + 3 E s^2 + E s^3, by the moments of a Gaussian
    mean_y, variance_y = 0.5, 1.3**2
    square, cube = variance_y + mean_y**2, mean_y**3 + 3 * mean_y * variance_y  # E y^2, E y^3
    k_xx = 1 + 3 / 4
    s_yy_2 = (4 * square**2 + 12 * mean_y**4) / 16
    s_yy_3 = (4 * cube**2 + 36 * square**2 * mean_y**2 + 24 * mean_y**6) / 64
    k_yy = 1 + 3 * mean_y**2 + 3 * s_yy_2 + s_yy_3
    k_xy = 1 + 3 * square / 4
    assert abs(mean - (k_xx + k_yy - 2 * k_xy)) < 4 * std / math.sqrt(300)
    assert error == pytest.approx(std, rel=0.2)  # the std of 300 Gaussian draws has a standard error of 4%


# ---- Nearest neighbours ----------------------------------------------------------------------------------------------


def balls(features, k):
    """(centre, radius) of each ball, as the paper defines them."""
    result = []
    for i, centre in enumerate(features):
        others = sorted(math.dist(centre, vector) for j, vector in enumerate(features) if j != i)
        result.append((centre, others[k - 1]))
    return result


def in_ball(point, ball):
    return math.dist(point, ball[0]) <= ball[1]


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("chunk", [2**23, 1, 100])
def test_precision_recall_density_and_coverage_equal_plain_loops(k, chunk, monkeypatch):
    monkeypatch.setattr(fidelity, "CHUNK_DISTANCES", chunk)
    x, y = normal(40, 3) * 1.2 + 1.5, normal(31, 3, seed=1)
    points, reference = x.tolist(), y.tolist()
    balls_x, balls_y = balls(points, k), balls(reference, k)
    precision = np.mean([any(in_ball(point, ball) for ball in balls_y) for point in points])
    recall = np.mean([any(in_ball(point, ball) for ball in balls_x) for point in reference])
    density = sum(in_ball(point, ball) for point in points for ball in balls_y) / (k * len(points))
    coverage = np.mean([any(in_ball(point, ball) for point in points) for ball in balls_y])
    assert 0 < precision < 1 and 0 < recall < 1 and 0 < coverage < 1 and precision != recall
    assert precision_recall(x, y, k) == pytest.approx((precision, recall), rel=1e-12)
    assert density_coverage(x, y, k) == pytest.approx((density, coverage), rel=1e-12)


def test_precision_and_recall_of_a_set_with_duplicates_against_itself_are_1():
    x = normal(50, 8, dtype=torch.float32).repeat(3, 1) + 1000  # balls of radius 0, and values that float32 rounds
    assert precision_recall(x, x, k=2) == (1, 1)
    assert density_coverage(x, x, k=2) == (1.5, 1)  # each ball of radius 0 contains its vector and 2 copies
    assert precision_recall(x, x + 100, k=2) == (0, 0)
    assert density_coverage(x, x + 100, k=2) == (0, 0)


def test_expected_density_and_coverage_of_equal_distributions():
    """The means of 100 pairs of sets are within 4 standard errors of the closed form.

    Density: 1. A ball contains none of the m samples if its k nearest neighbours, of the n - 1 + m other vectors, are
    all from its own set: sampling without replacement.
    """
    n, m, k = 40, 30, 5
    values = np.array([density_coverage(normal(m, 2, seed=s), normal(n, 2, seed=s + 1000), k) for s in range(100)])
    expected = 1, 1 - math.prod((n - 1 - i) / (n + m - 1 - i) for i in range(k))
    assert (abs(values.mean(axis=0) - expected) < 4 * values.std(axis=0, ddof=1) / 10).all()
    assert values[:, 1].std() < 0.1


def test_nearest_equals_brute_force(monkeypatch):
    x, y = normal(37, 5), normal(23, 5, seed=1)
    y[20] = y[3]  # the first of two equally near vectors
    x[5] = y[20]
    squares = np.square(x.numpy()[:, None] - y.numpy()).sum(axis=-1)
    for chunk in (2**23, 100, 1):
        monkeypatch.setattr(fidelity, "CHUNK_DISTANCES", chunk)
        distance, index = nearest(x, y)
        np.testing.assert_allclose(distance, np.sqrt(squares.min(axis=1)), rtol=1e-12, atol=0)
        assert index.tolist() == squares.argmin(axis=1).tolist()
    assert (distance[5], index[5], index.dtype) == (0, 3, torch.int64)
    assert nearest(x[:1], y[:1])[1].tolist() == [0]


def test_distances_do_not_depend_on_order_or_chunks(monkeypatch):
    x, y, z = normal(60, 5), normal(50, 5, seed=1) + 0.2, normal(40, 5, seed=2)

    def distances(a, b, c):
        return np.array(
            [
                frechet_distance(a, b),
                *kernel_distance(a, b),
                *precision_recall(a, b),
                *density_coverage(a, b),
                *memorisation(a, b, c),
            ]
        )

    expected = distances(x, y, z)
    np.testing.assert_allclose(distances(x.flip(0), y.roll(7, 0), z.flip(0)), expected, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(fidelity, "CHUNK", 7)
    monkeypatch.setattr(fidelity, "CHUNK_DISTANCES", 150)
    np.testing.assert_allclose(distances(x, y, z), expected, rtol=1e-12, atol=1e-12)


def test_memorisation_of_new_images_and_of_copies():
    draws = [memorisation(*(normal(n, 3, seed=3 * s + n) for n in (80, 200, 60))) for s in range(100)]
    value, error = np.array(draws).T
    std = value.std(ddof=1)
    assert abs(value.mean() - 0.5) < 4 * std / 10
    assert math.sqrt(np.square(error).mean()) == pytest.approx(std, rel=0.3)  # 4 standard errors of 7%

    training, held_out = normal(200, 3), normal(60, 3, seed=1)
    copies = training[:80] + 1e-4 * normal(80, 3, seed=2)
    assert memorisation(copies, training, held_out).value > 0.99
    mixed = torch.cat([copies[:40], normal(40, 3, seed=3)])
    assert 0.65 < memorisation(mixed, training, held_out).value < 0.85
    assert memorisation(training[:80], training, training[80:]) == (0.5, 0)  # all distances are 0: ties
    assert memorisation(held_out + 9, training, held_out).value == 0


def test_memorisation_equals_the_u_statistic_of_scipy():
    # rounded to integers, so that there are ties
    samples, training, held_out = (normal(n, 2, seed=n).mul(2).round() for n in (30, 20, 25))
    value, error = memorisation(samples, training, held_out)
    to_training = [[min(math.dist(a, b) for b in training.tolist()) for a in s.tolist()] for s in (samples, held_out)]
    wins = stats.mannwhitneyu(to_training[1], to_training[0]).statistic
    assert value == pytest.approx(wins / (30 * 25), rel=1e-12) and value != 0.5
    table = np.array([[(a < b) + (a == b) / 2 for b in to_training[1]] for a in to_training[0]])
    delong = table.mean(axis=1).var(ddof=1) / 30 + table.mean(axis=0).var(ddof=1) / 25
    assert error == pytest.approx(math.sqrt(delong), rel=1e-12)


def test_accuracy_is_a_fraction_with_the_error_of_many_draws():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=50)
    draws = [accuracy(np.where(rng.random(50) < 0.8, labels, labels + 1), labels) for _ in range(2000)]
    value, error = np.array(draws).T
    std = math.sqrt(0.8 * 0.2 / 50)  # of a binomial fraction
    assert abs(value.mean() - 0.8) < 4 * std / math.sqrt(2000)
    assert value.std() == pytest.approx(std, rel=0.07) and error.mean() == pytest.approx(std, rel=0.03)
    assert accuracy(np.array(["a", "b"]), np.array(["a", "b"])).value == 1
    for predicted in (labels[:0], labels[:49]):
        with pytest.raises(ValueError, match="predicted has shape"):
            accuracy(predicted, labels[: len(predicted) // 49 * 50])


@pytest.mark.parametrize("p", [0.9, 0.98, 0.995])
def test_two_standard_errors_of_an_accuracy_near_1_hold_it(p):
    """In at least 95% of draws, by the exact binomial distribution; p +- 2 sqrt(p (1 - p) / n) does so in 22 to 88%."""
    n = 50
    estimates = [accuracy(np.arange(n) < k, np.ones(n, bool)) for k in range(n + 1)]
    holds = [abs(value - p) <= 2 * error for value, error in estimates]
    assert stats.binom.pmf(np.arange(n + 1), n, p) @ holds >= 0.95


# ---- Pixel statistics ------------------------------------------------------------------------------------------------


def test_channel_shift_of_shifted_and_scaled_images(monkeypatch):
    reference = random_images(40, 3, 6, 5) // 4 + 50
    images = reference.copy()
    images[:, 1] += 51  # a fifth of 255
    images[:, 2] = (reference[:, 2] - 50) * 3 + 50
    for chunk in (2**23, 200):
        monkeypatch.setattr(image_arrays, "CHUNK_PIXELS", chunk)
        plain, brighter, wider = channel_shift(images, reference)
        assert (plain.mean.value, plain.std_ratio.value) == pytest.approx((0, 1), abs=1e-12)
        assert (brighter.mean.value, brighter.std_ratio.value) == pytest.approx((0.2, 1), abs=1e-12)
        shift = 2 * (reference[:, 2].mean() - 50) / 255
        assert (wider.mean.value, wider.std_ratio.value) == pytest.approx((shift, 3), rel=1e-12)
        means = reference[:, 0].mean(axis=(1, 2)) / 255
        assert plain.mean.standard_error == pytest.approx(math.sqrt(2 / 40) * means.std(ddof=1), rel=1e-10)
    # Sets that differ in every respect, with images of different brightness: numpy's statistics of all pixels.
    bright = (reference // 2) + random_images(40, 1, 1, 1, seed=1) // 2
    for channel, shift in enumerate(channel_shift(bright, images)):
        x, y = bright[:, channel] / 255, images[:, channel] / 255
        assert (shift.mean.value, shift.std_ratio.value) == pytest.approx(
            (x.mean() - y.mean(), x.std() / y.std()), rel=1e-10
        )
    # the same images in 16 bits and another size, against 8 bits
    doubled = (images.astype(np.uint16) * 257).repeat(2, axis=2)
    for small, large in zip(channel_shift(images, reference), channel_shift(doubled, reference)):
        np.testing.assert_allclose(large, small, rtol=1e-10, atol=1e-12)


def test_standard_errors_of_channel_shift_are_the_standard_deviation_of_many_draws():
    rng = np.random.default_rng(0)

    def draw(n, max_contrast):
        level, contrast = rng.normal(128, 15, (n, 1, 1, 1)), rng.uniform(5, max_contrast, (n, 1, 1, 1))
        return (level + contrast * rng.normal(0, 1, (n, 1, 4, 4))).clip(0, 255).astype(np.uint8)

    draws = np.array([channel_shift(draw(50, 40), draw(80, 20)) for _ in range(200)])[:, 0]
    value, error = draws[..., 0], draws[..., 1]
    std = value.std(axis=0, ddof=1)
    # 200 draws: 0.2 is 4 standard errors of 5%
    np.testing.assert_allclose(np.sqrt(np.square(error).mean(axis=0)), std, rtol=0.2)
    assert abs(value[:, 0].mean()) < 4 * std[0] / math.sqrt(200)


# ---- Jackknife -------------------------------------------------------------------------------------------------------


def test_jackknife_of_a_mean_equals_its_standard_error():
    x, y = normal(30, 2), normal(5, 2, seed=1)

    def shift(features, reference):
        return (features[:, 0].mean() - reference[:, 0].mean()).item()

    leave_one_out = jackknife(shift, x, y, groups=30)
    standard_error = x[:, 0].std().item() / math.sqrt(30)
    assert leave_one_out == pytest.approx((shift(x, y), standard_error), rel=1e-12)
    by_groups = jackknife(shift, x, y, groups=5)
    means = x[:, 0].reshape(6, 5).mean(dim=0)  # group g: vectors g, g + 5 and so on
    assert by_groups == pytest.approx((shift(x, y), means.std().item() / math.sqrt(5)), rel=1e-12)
    assert jackknife(lambda *_: 3.0, x, y) == (3.0, 0.0)

    def square(features, _):
        return features[:, 0].mean().item() ** 2  # differs from the mean over the groups left out

    without = [square(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(30)]
    assert jackknife(square, x, y, groups=30) == pytest.approx(
        (square(x, y), np.std(without) * math.sqrt(29)), rel=1e-10
    )


def test_jackknife_of_the_frechet_distance_is_the_standard_deviation_of_many_draws():
    y = normal(2000, 3, seed=5)
    x = 1.3 * normal(100, 200, 3)
    value, error = np.array([jackknife(frechet_distance, draw, y) for draw in x]).T
    assert math.sqrt(np.square(error).mean()) == pytest.approx(value.std(ddof=1), rel=0.3)  # 4 standard errors of 7%


# ---- Errors ----------------------------------------------------------------------------------------------------------

DISTANCES = [frechet_distance, kernel_distance, precision_recall, density_coverage]


@pytest.mark.parametrize("distance", [*DISTANCES, lambda x, y: memorisation(x, y, normal(20, 4)), nearest])
def test_features_that_cannot_be_compared_are_an_error(distance):
    good, bad = normal(20, 4), normal(20, 4, seed=1)
    distance(good, bad)
    for x, y in ((normal(20, 3), good), (good, normal(20, 5))):
        with pytest.raises(ValueError, match="feature dimensions differ"):
            distance(x, y)
    for shape in ((20,), (20, 4, 1)):
        with pytest.raises(ValueError, match=r"give \(N, D\)"):
            distance(good, normal(*shape))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        distance(good.round().long(), good)
    for value in (math.nan, math.inf, -math.inf):
        bad[7, 2] = value
        for x, y in ((good, bad), (bad, good)):
            with pytest.raises(ValueError, match="in 1 of 20 feature vectors"):
                distance(x, y)
    for n in (0,) if distance is nearest else (0, 1):
        for x, y in ((good[:n], good), (good, good[:n])):
            with pytest.raises(ValueError, match="with N at least"):
                distance(x, y)
    if distance is not nearest:
        constant = torch.full((20, 4), -0.3) * (1 + 1e-7 * normal(20, 4, dtype=torch.float32))
        for x, y in ((constant, good.float()), (good.float(), constant)):
            with pytest.raises(ValueError, match=r"all 20 feature vectors of .* are equal"):
                distance(x, y)


@pytest.mark.parametrize("distance", [precision_recall, density_coverage])
def test_k_must_be_less_than_the_number_of_vectors(distance):
    assert distance(normal(5, 2), normal(6, 2, seed=1), k=4)
    for x, y in ((5, 9), (9, 5)):
        with pytest.raises(ValueError, match="N at least 6"):
            distance(normal(x, 2), normal(y, 2, seed=1), k=5)
    for k in (0, -1, 2.0):
        with pytest.raises(ValueError, match=f"k is {k}"):
            distance(normal(9, 2), normal(9, 2, seed=1), k=k)


def test_images_that_cannot_be_compared_are_an_error():
    good = random_images(5, 2, 4, 4)
    constant = good.copy()
    constant[:, 1] = 7
    for bad, message in (
        (good.astype(np.float32), "float32"),
        (good.tolist(), "list"),
        (good[0], r"\(2, 4, 4\)"),
        (good[:1], "at least 2"),
        (good[:, :, :0], r"\(5, 2, 0, 4\)"),
        (good[:, :1], "channels"),
        (constant, "channel 1 of .* are 7"),
    ):
        for x, y in ((good, bad), (bad, good)):
            with pytest.raises(ValueError, match=message):
                channel_shift(x, y)


def test_jackknife_needs_2_to_n_groups():
    for groups in (1, 21, 2.0):
        with pytest.raises(ValueError, match=f"groups is {groups}"):
            jackknife(frechet_distance, normal(20, 2), normal(20, 2), groups=groups)
