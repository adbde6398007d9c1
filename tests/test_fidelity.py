"""Distances against closed forms, loops, scipy and torchmetrics; extractors against files and pictures made here."""

import io
import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg, stats
from torch import nn

from ddpm_pipeline import classifier, features, fidelity
from ddpm_pipeline.features import extract_features, make_extractor
from ddpm_pipeline.fidelity import (
    density_coverage,
    frechet_distance,
    jackknife,
    kernel_distance,
    memorisation,
    nearest,
    precision_recall,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pictures(*shape, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


class Same(nn.Module):
    """The features themselves, in the place where torchmetrics wants a network."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, x):
        return x


def by_torchmetrics(metric, features, reference, **options):
    # from its own module: torchmetrics.image shows it only beside torch-fidelity, whose network is not needed here
    module = pytest.importorskip(f"torchmetrics.image.{metric}", reason="torchmetrics is not installed: extra `eval`")
    name = {"fid": "FrechetInceptionDistance", "kid": "KernelInceptionDistance"}[metric]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps all features
        measure = getattr(module, name)(feature=Same(features.shape[1]), **options)
        measure.set_dtype(torch.float64)
        measure.update(reference, real=True)
        measure.update(features, real=False)
        return measure.compute()


# ---- The Frechet distance --------------------------------------------------------------------------------------------


def by_sqrtm(mean_1, covariance_1, mean_2, covariance_2):
    root = linalg.sqrtm(covariance_1 @ covariance_2)
    return np.square(mean_1 - mean_2).sum() + np.trace(covariance_1 + covariance_2 - 2 * root).real


def moments(features):
    return features.numpy().mean(axis=0), np.cov(features.numpy().T)


TURN = torch.tensor([[math.cos(0.6), -math.sin(0.6)], [math.sin(0.6), math.cos(0.6)]], dtype=torch.float64)


def test_frechet_of_gaussians_is_the_closed_form():
    """A circle and a turned ellipse, where the covariances commute, and two ellipses, where they do not."""
    ellipse = torch.tensor([3.0, 0.5], dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0], dtype=torch.float64)
    x, y = normal(40_000, 2), normal(40_000, 2, seed=1)
    turned = TURN @ torch.diag(ellipse.square()) @ TURN.T
    cases = (
        (x, (y * ellipse) @ TURN.T + shift, 5 + (3 - 1) ** 2 + (0.5 - 1) ** 2),
        # the trace of the root of a 2 x 2 product P is sqrt(tr P + 2 sqrt(det P)); det P is (1.5^2)^2 here
        (
            x * ellipse,
            (y * ellipse) @ TURN.T,
            2 * 9.25 - 2 * math.sqrt((torch.diag(ellipse.square()) @ turned).trace().item() + 2 * 1.5**2),
        ),
    )
    for samples, reference, truth in cases:
        there = jackknife(frechet_distance, samples, reference, groups=20)
        back = jackknife(frechet_distance, reference, samples, groups=20)
        error = math.hypot(there.standard_error, back.standard_error)
        assert error < 0.06 and abs(there.value - truth) < 4 * error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_frechet_is_the_formula_on_the_sample_moments(dtype, monkeypatch):
    x = (normal(150, 6) @ normal(6, 6, seed=2) + 1).to(dtype)
    y = (normal(97, 6, seed=1) @ normal(6, 6, seed=3)).to(dtype)
    expected = by_sqrtm(*moments(x.double()), *moments(y.double()))
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-11)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-11)
    monkeypatch.setattr(fidelity, "ROWS", 10)  # parts that do not fill the last, and of one row with 97
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-11)


def test_frechet_is_what_torchmetrics_says_where_that_is_right():
    x, y = normal(150, 6) * 1.5 + 1, normal(100, 6, seed=1)
    assert frechet_distance(x, y) == pytest.approx(by_torchmetrics("fid", x, y).item(), rel=1e-10)


def test_frechet_with_fewer_rows_than_features():
    """Rows in one plane of many: the distance is that within the plane, whatever the plane."""
    plane = torch.linalg.qr(normal(64, 3, seed=5)).Q.T
    x, y = normal(40, 3) + 1, normal(30, 3, seed=1) * 2
    within = by_sqrtm(*moments(x), *moments(y))
    assert frechet_distance(x @ plane, y @ plane) == pytest.approx(within, rel=1e-12)
    # In planes at right angles the root is 0.
    apart = torch.linalg.qr(normal(64, 6, seed=6)).Q.T
    expected = sum(np.trace(np.cov(z.numpy().T)) + z.mean(dim=0).square().sum().item() for z in (x, y))
    assert frechet_distance(x @ apart[:3], y @ apart[3:]) == pytest.approx(expected, rel=1e-12)
    # One set, and one that differs from it by less than the roots of rounding errors.
    few = normal(20, 64, seed=7)
    assert 0 <= frechet_distance(few, few) < 1e-12
    assert frechet_distance(few, few + 1e-5) == pytest.approx(64e-10, rel=1e-3)


# ---- The kernel distance ---------------------------------------------------------------------------------------------


def test_kernel_distance_is_the_sum_over_all_pairs(monkeypatch):
    x, y = normal(23, 4), normal(17, 4, seed=1) * 1.5 + 0.3

    def k(a, b):
        return (a @ b / 4 + 1).item() ** 3

    within = {
        name: np.mean([k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j])
        for name, z in (("x", x), ("y", y))
    }
    expected = within["x"] + within["y"] - 2 * np.mean([k(a, b) for a in x for b in y])
    h_x = [np.mean([k(x[i], x[j]) for j in range(23) if j != i]) - np.mean([k(x[i], b) for b in y]) for i in range(23)]
    h_y = [np.mean([k(y[i], y[j]) for j in range(17) if j != i]) - np.mean([k(y[i], a) for a in x]) for i in range(17)]
    error = math.sqrt(4 * np.var(h_x, ddof=1) / 23 + 4 * np.var(h_y, ddof=1) / 17)
    for rows in (2048, 5):
        monkeypatch.setattr(fidelity, "ROWS", rows)
        assert kernel_distance(x, y) == pytest.approx((expected, error), rel=1e-12)
        assert kernel_distance(y, x) == pytest.approx((expected, error), rel=1e-12)


def test_kernel_distance_is_what_torchmetrics_says():
    x, y = normal(60, 8), normal(60, 8, seed=1) + 0.5
    value, _ = by_torchmetrics("kid", x, y, subsets=1, subset_size=60)
    assert kernel_distance(x, y).value == pytest.approx(value.item(), rel=1e-6)  # torchmetrics gives float32


def test_kernel_distance_is_unbiased_and_its_error_honest():
    """Equal laws: 0 on average within 4 standard errors of 300 draws. Others: the error is the scatter of the draws."""

    def draws(shift, scale):
        generator = torch.Generator().manual_seed(11)
        x, y = (torch.randn(300, n, 4, generator=generator, dtype=torch.float64) for n in (60, 90))
        found = [kernel_distance(a, b * scale + shift) for a, b in zip(x, y)]
        value, error = np.array(found).T
        return value.mean(), value.std(ddof=1), math.sqrt(np.square(error).mean())

    mean, scatter, error = draws(0, 1)
    assert abs(mean) < 4 * scatter / math.sqrt(300)
    assert scatter < error < 2 * scatter
    mean, scatter, error = draws(0.5, 1.3)
    # E k = E (s + 1)^3 with s = x . y / 4: 1 + 3 E s + 3 E s^2 + E s^3, by the moments of a Gaussian
    centre, spread = 0.5, 1.3**2
    square, cube = spread + centre**2, centre**3 + 3 * centre * spread  # E y^2, E y^3
    k_xx = 1 + 3 / 4
    s_yy_2 = (4 * square**2 + 12 * centre**4) / 16
    s_yy_3 = (4 * cube**2 + 36 * square**2 * centre**2 + 24 * centre**6) / 64
    k_yy = 1 + 3 * centre**2 + 3 * s_yy_2 + s_yy_3
    k_xy = 1 + 3 * square / 4
    assert abs(mean - (k_xx + k_yy - 2 * k_xy)) < 4 * scatter / math.sqrt(300)
    assert error == pytest.approx(scatter, rel=0.2)  # a scatter of 300 draws is known to 4%, if they are Gaussian


# ---- Neighbours ------------------------------------------------------------------------------------------------------


def balls(features, k):
    """(centre, radius) of each ball, by the words of the paper."""
    found = []
    for i, centre in enumerate(features):
        others = sorted(math.dist(centre, row) for j, row in enumerate(features) if j != i)
        found.append((centre, others[k - 1]))
    return found


def in_ball(point, ball):
    return math.dist(point, ball[0]) <= ball[1]


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("entries", [2**23, 1, 100])
def test_precision_recall_density_and_coverage_by_loops(k, entries, monkeypatch):
    monkeypatch.setattr(fidelity, "ENTRIES", entries)
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


def test_a_set_lies_within_itself_also_with_copies_in_it():
    x = normal(50, 8, dtype=torch.float32).repeat(3, 1) + 1000  # balls of radius 0, and numbers that round
    assert precision_recall(x, x, k=2) == (1, 1)
    assert density_coverage(x, x, k=2) == (1.5, 1)  # in the ball of radius 0 around a row lie the row and 2 copies
    assert precision_recall(x, x + 100, k=2) == (0, 0)
    assert density_coverage(x, x + 100, k=2) == (0, 0)


def test_density_and_coverage_of_one_law():
    """Density 1. No ball of n covers any of m others if the k nearest of all are of its own set: a draw without return.

    100 pairs of sets, whose means are within 4 standard errors of this.
    """
    n, m, k = 40, 30, 5
    found = np.array([density_coverage(normal(m, 2, seed=s), normal(n, 2, seed=s + 1000), k) for s in range(100)])
    truth = 1, 1 - math.prod((n - 1 - i) / (n + m - 1 - i) for i in range(k))
    assert (abs(found.mean(axis=0) - truth) < 4 * found.std(axis=0, ddof=1) / 10).all()
    assert found[:, 1].std() < 0.1


def test_nearest_by_brute_force(monkeypatch):
    x, y = normal(37, 5), normal(23, 5, seed=1)
    y[20] = y[3]  # of two at one distance, the first
    x[5] = y[20]
    squares = np.square(x.numpy()[:, None] - y.numpy()).sum(axis=-1)
    for entries in (2**23, 100, 1):
        monkeypatch.setattr(fidelity, "ENTRIES", entries)
        distance, index = nearest(x, y)
        np.testing.assert_allclose(distance, np.sqrt(squares.min(axis=1)), rtol=1e-12, atol=0)
        assert index.tolist() == squares.argmin(axis=1).tolist()
    assert (distance[5], index[5], index.dtype) == (0, 3, torch.int64)
    assert nearest(x[:1], y[:1])[1].tolist() == [0]


def test_order_and_parts_change_nothing(monkeypatch):
    x, y, z = normal(60, 5), normal(50, 5, seed=1) + 0.2, normal(40, 5, seed=2)

    def figures(a, b, c):
        return np.array(
            [
                frechet_distance(a, b),
                *kernel_distance(a, b),
                *precision_recall(a, b),
                *density_coverage(a, b),
                *memorisation(a, b, c),
            ]
        )

    expected = figures(x, y, z)
    np.testing.assert_allclose(figures(x.flip(0), y.roll(7, 0), z.flip(0)), expected, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(fidelity, "ROWS", 7)
    monkeypatch.setattr(fidelity, "ENTRIES", 150)
    np.testing.assert_allclose(figures(x, y, z), expected, rtol=1e-12, atol=1e-12)


def test_memorisation_of_new_pictures_and_of_copies():
    found = np.array([memorisation(*(normal(n, 3, seed=3 * s + n) for n in (80, 200, 60))) for s in range(100)])
    scatter = found[:, 0].std(ddof=1)
    assert abs(found[:, 0].mean() - 0.5) < 4 * scatter / 10
    assert math.sqrt(np.square(found[:, 1]).mean()) == pytest.approx(scatter, rel=0.3)  # 4 times 7%, of 100 draws

    training, held_out = normal(200, 3), normal(60, 3, seed=1)
    copies = training[:80] + 1e-4 * normal(80, 3, seed=2)
    assert memorisation(copies, training, held_out).value > 0.99
    mixed = torch.cat([copies[:40], normal(40, 3, seed=3)])
    assert 0.65 < memorisation(mixed, training, held_out).value < 0.85
    assert memorisation(training[:80], training, training[80:]) == (0.5, 0)  # all at distance 0: ties
    assert memorisation(held_out + 9, training, held_out).value == 0


def test_memorisation_is_the_u_statistic_of_scipy():
    # whole numbers, so that there are ties
    samples, training, held_out = (normal(n, 2, seed=n).mul(2).round() for n in (30, 20, 25))
    value, error = memorisation(samples, training, held_out)
    to_training = [[min(math.dist(a, b) for b in training.tolist()) for a in s.tolist()] for s in (samples, held_out)]
    wins = stats.mannwhitneyu(to_training[1], to_training[0]).statistic
    assert value == pytest.approx(wins / (30 * 25), rel=1e-12) and value != 0.5
    table = np.array([[(a < b) + (a == b) / 2 for b in to_training[1]] for a in to_training[0]])
    delong = table.mean(axis=1).var(ddof=1) / 30 + table.mean(axis=0).var(ddof=1) / 25
    assert error == pytest.approx(math.sqrt(delong), rel=1e-12)


# ---- Pixels ----------------------------------------------------------------------------------------------------------


def test_channel_shift_of_shifted_and_scaled_images(monkeypatch):
    reference = pictures(40, 3, 6, 5) // 4 + 50
    images = reference.copy()
    images[:, 1] += 51  # a fifth of 255
    images[:, 2] = (reference[:, 2] - 50) * 3 + 50
    for entries in (2**23, 200):
        monkeypatch.setattr(fidelity, "ENTRIES", entries)
        plain, brighter, wider = fidelity.channel_shift(images, reference)
        assert (plain.mean.value, plain.std_ratio.value) == pytest.approx((0, 1), abs=1e-12)
        assert (brighter.mean.value, brighter.std_ratio.value) == pytest.approx((0.2, 1), abs=1e-12)
        shift = 2 * (reference[:, 2].mean() - 50) / 255
        assert (wider.mean.value, wider.std_ratio.value) == pytest.approx((shift, 3), rel=1e-12)
        means = reference[:, 0].mean(axis=(1, 2)) / 255
        assert plain.mean.standard_error == pytest.approx(math.sqrt(2 / 40) * means.std(ddof=1), rel=1e-10)
    # Of sets that differ in all: what numpy says of the pixels of both, where the images differ in brightness too.
    bright = (reference // 2) + pictures(40, 1, 1, 1, seed=1) // 2
    for channel, shift in enumerate(fidelity.channel_shift(bright, images)):
        x, y = bright[:, channel] / 255, images[:, channel] / 255
        assert (shift.mean.value, shift.std_ratio.value) == pytest.approx(
            (x.mean() - y.mean(), x.std() / y.std()), rel=1e-10
        )
    # the same in 16 bits, against 8 bits, and each picture in another size
    doubled = (images.astype(np.uint16) * 257).repeat(2, axis=2)
    for small, large in zip(fidelity.channel_shift(images, reference), fidelity.channel_shift(doubled, reference)):
        np.testing.assert_allclose(large, small, rtol=1e-10, atol=1e-12)


def test_errors_of_channel_shift_are_the_scatter_of_many_sets():
    rng = np.random.default_rng(0)

    def draw(n, spread):
        level, contrast = rng.normal(128, 15, (n, 1, 1, 1)), rng.uniform(5, spread, (n, 1, 1, 1))
        return (level + contrast * rng.normal(0, 1, (n, 1, 4, 4))).clip(0, 255).astype(np.uint8)

    found = np.array([fidelity.channel_shift(draw(50, 40), draw(80, 20)) for _ in range(200)])[:, 0]
    value, error = found[..., 0], found[..., 1]
    scatter = value.std(axis=0, ddof=1)
    np.testing.assert_allclose(np.sqrt(np.square(error).mean(axis=0)), scatter, rtol=0.2)  # 4 times 5%, of 200 draws
    assert abs(value[:, 0].mean()) < 4 * scatter[0] / math.sqrt(200)


# ---- The jackknife ---------------------------------------------------------------------------------------------------


def test_jackknife_of_a_mean_is_the_textbook():
    x, y = normal(30, 2), normal(5, 2, seed=1)

    def shift(features, reference):
        return (features[:, 0].mean() - reference[:, 0].mean()).item()

    one_by_one = jackknife(shift, x, y, groups=30)
    textbook = x[:, 0].std().item() / math.sqrt(30)
    assert one_by_one == pytest.approx((shift(x, y), textbook), rel=1e-12)
    by_groups = jackknife(shift, x, y, groups=5)
    means = x[:, 0].reshape(6, 5).mean(dim=0)  # group g: rows g, g + 5 and so on
    assert by_groups == pytest.approx((shift(x, y), means.std().item() / math.sqrt(5)), rel=1e-12)
    assert jackknife(lambda *_: 3.0, x, y) == (3.0, 0.0)

    def square(features, _):
        return features[:, 0].mean().item() ** 2  # not the mean of what it is without each group

    left = [square(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(30)]
    assert jackknife(square, x, y, groups=30) == pytest.approx((square(x, y), np.std(left) * math.sqrt(29)), rel=1e-10)


def test_jackknife_of_the_frechet_distance_is_the_scatter_of_many_sets():
    y = normal(2000, 3, seed=5)
    x = 1.3 * normal(100, 200, 3)
    value, error = np.array([jackknife(frechet_distance, part, y) for part in x]).T
    assert math.sqrt(np.square(error).mean()) == pytest.approx(value.std(ddof=1), rel=0.3)  # 4 times 7%, of 100 draws


# ---- What is refused -------------------------------------------------------------------------------------------------

DISTANCES = [frechet_distance, kernel_distance, precision_recall, density_coverage]


@pytest.mark.parametrize("distance", [*DISTANCES, lambda x, y: memorisation(x, y, normal(20, 4)), nearest])
def test_features_that_cannot_be_compared_are_refused(distance):
    good, bad = normal(20, 4), normal(20, 4, seed=1)
    distance(good, bad)
    for x, y in ((normal(20, 3), good), (good, normal(20, 5))):
        with pytest.raises(ValueError, match="numbers of features differ"):
            distance(x, y)
    for shape in ((20,), (20, 4, 1)):
        with pytest.raises(ValueError, match=r"give \(N, D\)"):
            distance(good, normal(*shape))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        distance(good.round().long(), good)
    for value in (math.nan, math.inf, -math.inf):
        bad[7, 2] = value
        for x, y in ((good, bad), (bad, good)):
            with pytest.raises(ValueError, match="in 1 of 20 rows"):
                distance(x, y)
    for rows in (0,) if distance is nearest else (0, 1):
        for x, y in ((good[:rows], good), (good, good[:rows])):
            with pytest.raises(ValueError, match="give at least"):
                distance(x, y)
    if distance is not nearest:
        constant = torch.full((20, 4), -0.3) * (1 + 1e-7 * normal(20, 4, dtype=torch.float32))
        for x, y in ((constant, good.float()), (good.float(), constant)):
            with pytest.raises(ValueError, match="20 rows that are all equal"):
                distance(x, y)


@pytest.mark.parametrize("distance", [precision_recall, density_coverage])
def test_k_needs_more_rows_than_k(distance):
    assert distance(normal(5, 2), normal(6, 2, seed=1), k=4)
    for x, y in ((5, 9), (9, 5)):
        with pytest.raises(ValueError, match="at least 6 rows"):
            distance(normal(x, 2), normal(y, 2, seed=1), k=5)
    for k in (0, -1, 2.0):
        with pytest.raises(ValueError, match=f"k is {k}"):
            distance(normal(9, 2), normal(9, 2, seed=1), k=k)


def test_images_that_cannot_be_compared_are_refused():
    good = pictures(5, 2, 4, 4)
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
                fidelity.channel_shift(x, y)
    with pytest.raises(ValueError, match="float32"):
        extract_features(make_extractor("pixels"), good.astype(np.float32))
    with pytest.raises(ValueError, match="at least 1"):
        extract_features(make_extractor("pixels"), good[:0])
    with pytest.raises(ValueError, match="batch_size is 0"):
        extract_features(make_extractor("pixels"), good, batch_size=0)
    with pytest.raises(ValueError, match="uint8 or uint16"):
        make_extractor("pixels")(torch.zeros(1, 1, 4, 4))
    for groups in (1, 21, 2.0):
        with pytest.raises(ValueError, match=f"groups is {groups}"):
            jackknife(frechet_distance, normal(20, 2), normal(20, 2), groups=groups)


# ---- Features and their cache ----------------------------------------------------------------------------------------


class Counted(features.Extractor):
    """Sum and first pixel, and how many pictures were seen."""

    def __init__(self, key="a"):
        super().__init__("counted", key, lambda x: torch.stack([x.sum(dim=(1, 2, 3)), x[:, 0, 0, 0]], dim=1))
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return super().__call__(images)


def test_features_come_from_the_cache(tmp_path, monkeypatch):
    images, cache = pictures(7, 1, 3, 3), tmp_path / "not" / "there"
    extractor = Counted()
    first = extract_features(extractor, images, cache_dir=cache, batch_size=3)
    assert first.shape == (7, 2) and first.dtype == torch.float32 and extractor.seen == 7
    np.testing.assert_allclose(first[:, 0], images.sum(axis=(1, 2, 3)) / 255, rtol=1e-6)
    assert torch.equal(extract_features(extractor, images, cache_dir=cache), first) and extractor.seen == 7
    (file,) = cache.iterdir()  # and no temporary one

    memory_mapped = np.lib.format.open_memmap(tmp_path / "images.npy", "w+", images.dtype, images.shape)
    memory_mapped[:] = images
    monkeypatch.setattr(fidelity, "ENTRIES", 20)  # hashed in parts
    assert torch.equal(extract_features(extractor, memory_mapped, cache_dir=cache), first) and extractor.seen == 7

    whole = file.read_bytes()
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    for number, damaged in enumerate((whole[:-1], b"", b"no such thing", flipped), start=2):
        file.write_bytes(damaged)
        assert torch.equal(extract_features(extractor, images, cache_dir=cache), first) and extractor.seen == 7 * number
        assert file.read_bytes() == whole


def test_the_cache_tells_extractors_and_pictures_apart(tmp_path):
    images = pictures(6, 1, 4, 4)
    other = images.copy()
    other[-1, -1, -1, -1] ^= 1
    for extractor, given in (
        (Counted("a"), images),
        (Counted("b"), images),
        (Counted("a"), other),
        (Counted("a"), images.reshape(6, 1, 2, 8)),
        (Counted("a"), images.view(np.uint16)),  # the same bytes
        (Counted("a"), images[::-1]),
    ):
        extract_features(extractor, given, cache_dir=tmp_path)
        assert extractor.seen == 6
    assert len(list(tmp_path.iterdir())) == 6


def test_a_failed_extractor_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(fidelity.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        extract_features(Counted(), pictures(2, 1, 2, 2), cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- Extractors ------------------------------------------------------------------------------------------------------


def same_in_8_and_16_bits(extractor, images):
    assert torch.equal(extractor(torch.from_numpy(images)), extractor(torch.from_numpy(images * np.uint16(257))))


def test_pixels():
    extractor = make_extractor("pixels")
    assert extractor.name == "pixels-16x16" and not extractor.is_inception and extractor.accuracy is None
    images = pictures(5, 3, 32, 48)
    features = extract_features(extractor, images)
    means = images.reshape(5, 3, 16, 2, 16, 3).mean(axis=(3, 5)) / 127.5 - 1
    np.testing.assert_allclose(features, means.reshape(5, -1), rtol=0, atol=1e-6)
    assert torch.equal(extract_features(extractor, images, batch_size=2), features)
    assert torch.equal(extract_features(extractor, images[::-1]), features.flip(0))
    same_in_8_and_16_bits(extractor, images)

    small = pictures(4, 1, 9, 20)
    assert make_extractor("pixels", images=small).name == "pixels-9x16"
    assert extract_features(extractor, small).shape == (4, 9 * 16)
    extremes = np.array([0, 255], dtype=np.uint8).reshape(1, 2, 1, 1)
    assert extract_features(extractor, extremes).tolist() == [[-1, 1]]


def cifar10_test(folder):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(next(folder.glob("test*.parquet"))).to_pydict()
    images = [np.asarray(Image.open(io.BytesIO(image["bytes"]))).transpose(2, 0, 1) for image in rows["img"]]
    return np.stack(images), np.array(rows["label"])


def test_the_resnet_knows_cifar10(shared_data):
    file, folder = shared_data / "features" / "resnet56-4bfd9763.th", shared_data / "cifar10" / "plain_text"
    if not file.is_file() or not folder.is_dir():
        pytest.skip("the ResNet-56 or CIFAR-10 is not there: ../shared/data/features and ../shared/data/cifar10")
    before = torch.get_rng_state()
    extractor = make_extractor(str(file))
    assert torch.equal(torch.get_rng_state(), before)
    assert extractor.name == "cifar10-resnet56" and not extractor.is_inception
    images, labels = cifar10_test(folder)
    features = extract_features(extractor, images)
    assert features.shape == (1000, 64)
    weights = torch.load(file, weights_only=True, map_location="cpu")["state_dict"]
    answers = (features @ weights["module.linear.weight"].T + weights["module.linear.bias"]).argmax(dim=1)
    assert (answers.numpy() == labels).mean() == pytest.approx(0.926, abs=0.0015)
    torch.testing.assert_close(extract_features(extractor, images[::-1][-90:], batch_size=7).flip(0), features[:90])
    same_in_8_and_16_bits(extractor, images[:4])

    gray = images[:3, :1]
    assert torch.equal(extract_features(extractor, gray), extract_features(extractor, gray.repeat(3, axis=1)))
    # Larger pictures are seen smaller: doubled ones nearly as they were, and not cropped.
    likeness = torch.cosine_similarity(
        extract_features(extractor, images[:50].repeat(2, axis=2).repeat(2, axis=3)), features[:50]
    )
    assert likeness.mean() > 0.9
    with pytest.raises(ValueError, match="4 channels"):
        extract_features(extractor, pictures(1, 4, 32, 32))


class InceptionV3(nn.Module):
    def __init__(self, num_features: int = 2048) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert x.dtype == torch.uint8 and x.shape[1] == 3 and return_features
        return x.double().flatten(1).repeat(1, self.num_features)[:, : self.num_features]


class Half(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x / 2).flatten(1)


def script(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return str(path)


def test_torchscript(tmp_path):
    inception = make_extractor(script(InceptionV3(), tmp_path / "any.pt"))
    assert inception.name == "inception" and inception.is_inception
    images = pictures(3, 3, 20, 31)
    features = extract_features(inception, images)
    assert features.dtype == torch.float32
    np.testing.assert_array_equal(features[:, :1860], images.reshape(3, -1))  # its own size, 0..255, all values whole
    same_in_8_and_16_bits(inception, np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16))
    between = np.array([7 * 257 - 100, 7 * 257 + 100], dtype=np.uint16).reshape(1, 1, 1, 2)  # rounded, not cut off
    assert extract_features(inception, between)[0, :2].tolist() == [7, 7]
    np.testing.assert_array_equal(
        extract_features(inception, images[:, :1])[:, :1860], images[:, :1].repeat(3, axis=1).reshape(3, -1)
    )
    with pytest.raises(ValueError, match="2 channels"):
        extract_features(inception, images[:, :2])

    other = make_extractor(script(Half(), tmp_path / "half.pt"))
    assert other.name == "half.pt" and not other.is_inception and other.key != inception.key
    images = pictures(2, 5, 3, 4)
    np.testing.assert_allclose(extract_features(other, images), (images.reshape(2, -1) / 127.5 - 1) / 2, atol=1e-6)
    same_in_8_and_16_bits(other, images)

    class Images(nn.Module):  # no features
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ValueError, match=r"images.pt makes of 2 images \(2, 5, 3, 4\): \(B, D\) is needed"):
        extract_features(make_extractor(script(Images(), tmp_path / "images.pt")), images)
    with pytest.raises(ValueError, match="as if channels came last"):
        extract_features(other, np.zeros((2, 20, 20, 3), np.uint8))

    class Inception(nn.Module):  # by name only
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Other(InceptionV3):  # in all but name
        pass

    assert make_extractor(script(Inception(), tmp_path / "named.pt")).name == "named.pt"
    assert not make_extractor(script(Other(), tmp_path / "other.pt")).is_inception
    assert not make_extractor(script(InceptionV3(1000), tmp_path / "1000.pt")).is_inception


def test_what_is_no_extractor_is_refused(tmp_path):
    for which in ("inception", "", "network.pth", "pixels-16x16"):
        with pytest.raises(ValueError, match=f"extractor is '{which}': give \"pixels\""):
            make_extractor(which)
    for which in (str(tmp_path / "none.th"), str(tmp_path / "none.pt")):
        with pytest.raises(ValueError, match=r"none\.\w+': there is no such file"):
            make_extractor(which)
    weights = {"state_dict": {"module.conv1.weight": torch.zeros(16, 3, 3, 3)}}
    torch.save(weights, tmp_path / "other.th")
    torch.save(weights, tmp_path / "other.pt")
    (tmp_path / "text.th").write_text("hello")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("other.th", "text.th"):
        with pytest.raises(ValueError, match=f"{name} does not hold the ResNet-56"):
            make_extractor(str(tmp_path / name))
    for name in ("other.pt", "text.pt"):
        with pytest.raises(ValueError, match=f"{name} is not a TorchScript file"):
            make_extractor(str(tmp_path / name))


# ---- The classifier --------------------------------------------------------------------------------------------------


def blobs(n, seed=0):
    """A bright square on the left (0) or on the right (1), in noise: (N, 1, 8, 8) and (N,)."""
    images, labels = pictures(n, 1, 8, 8, seed=seed) // 3, np.random.default_rng(seed).integers(2, size=n)
    for image, label in zip(images, labels):
        image[0, 2:6, 4 * label : 4 * label + 3] += 120
    return images, labels


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    cache = tmp_path_factory.mktemp("classifier")
    images, labels = blobs(300)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.no_grad():
        extractor = make_extractor("classifier", images=images, labels=labels, cache_dir=cache)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    return cache, extractor


def test_the_classifier_learns(trained):
    _, extractor = trained
    assert extractor.accuracy == 1 and not extractor.is_inception
    assert extractor.name == f"classifier (2 labels, {extractor.key[:8]})"
    images, labels = blobs(100, seed=1)
    features = extract_features(extractor, images)
    assert features.shape == (100, 128) and not features.requires_grad
    between = torch.cdist(features, features)
    between.fill_diagonal_(math.inf)
    assert (labels[between.argmin(dim=1)] == labels).all()
    torch.testing.assert_close(extract_features(extractor, images[::-1], batch_size=7).flip(0), features)
    same_in_8_and_16_bits(extractor, images)
    assert extractor(torch.zeros(2, 1, 5, 131, dtype=torch.uint8)).shape == (2, 128)
    with pytest.raises(ValueError, match="3 channels: the classifier was trained on 1"):
        extract_features(extractor, pictures(1, 3, 8, 8))


def test_the_classifier_is_trained_once(trained, monkeypatch):
    cache, extractor = trained
    images, labels = blobs(300)
    (file,) = cache.iterdir()
    weights, calls = classifier._load(file), []

    def train(*arguments):
        calls.append(arguments)
        return dict(weights)

    monkeypatch.setattr(fidelity, "_train", train)
    before = torch.get_rng_state()
    again = make_extractor("classifier", images=images, labels=labels, cache_dir=cache)
    assert torch.equal(torch.get_rng_state(), before)
    assert calls == []
    assert (again.key, again.name, again.accuracy) == (extractor.key, extractor.name, 1)
    assert torch.equal(extract_features(again, images), extract_features(extractor, images))

    file.write_bytes(file.read_bytes()[:-1])
    make_extractor("classifier", images=images, labels=labels, cache_dir=cache)
    for other in ({"images": images, "labels": 1 - labels}, {"images": 255 - images, "labels": labels}):
        make_extractor("classifier", cache_dir=cache, **other)
    assert len(calls) == 3 and len(list(cache.iterdir())) == 3


def test_the_classifier_is_the_same_whatever_was_drawn_before(trained):
    _, extractor = trained
    images, labels = blobs(300)
    torch.manual_seed(99)
    assert make_extractor("classifier", images=images, labels=np.array(["left", "right"])[labels]).key == extractor.key


@pytest.mark.parametrize(("shape", "turns"), [((8, 8), 4), ((8, 6), 2)])
def test_without_labels_the_classifier_learns_which_way_is_up(shape, turns):
    images = pictures(400, 3, *shape) // 3
    images[:, :, 0] += 120  # a bright sky
    extractor = make_extractor("classifier", images=images)
    assert extractor.name == f"classifier ({turns} rotations, {extractor.key[:8]})"
    assert extractor.accuracy > 0.9


def test_accuracy_is_that_on_pictures_it_was_not_trained_on():
    """Labels that say nothing can be learned by heart but not told: of 20 pictures, 1 in 4 is right by chance."""
    labels = np.random.default_rng(5).integers(4, size=400)
    extractor = make_extractor("classifier", images=pictures(400, 1, 6, 6), labels=labels)
    assert extractor.accuracy < 0.25 + 4 * math.sqrt(0.25 * 0.75 / 20)


def test_what_the_classifier_cannot_learn_from_is_refused():
    images = pictures(4, 1, 5, 5)
    for given, message in (
        ({}, "images is None"),
        ({"images": images[:1]}, "1 image"),
        ({"images": images.astype(float)}, "float64"),
        ({"images": images, "labels": np.zeros(3)}, r"labels have shape \(3,\)"),
        ({"images": images, "labels": np.full(4, 7)}, "all labels are .*7"),
    ):
        with pytest.raises(ValueError, match=message):
            make_extractor("classifier", **given)
