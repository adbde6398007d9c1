"""HOW GOOD: distances between two sets of images, given any feature extractor.

Two sets are alike if one cannot tell which of them a picture came from. An extractor makes each picture a row of
numbers, its features, and everything here compares the rows (N, D) of one set with the rows (M, D) of another. So the
figures belong to the extractor: its name stands beside them, and those of two extractors cannot be compared.

    frechet_distance, kernel_distance     how far apart the two laws are: 0 if they are one
    precision_recall, density_coverage    are the samples good; are all kinds of pictures among them
    nearest, memorisation                 are the samples copies of the training pictures
    channel_shift                         of the pixels themselves: are they too bright, too flat

An `Estimate` carries its standard error: another set of pictures from the same source would give another value, and
that is by how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .features import ENTRIES, _check_images, _parts

ROWS = 2048  # how many rows of features are worked on at a time


class Estimate(NamedTuple):
    value: float
    standard_error: float | None


class ChannelShift(NamedTuple):
    """How one channel of the images differs from that of the reference."""

    mean: Estimate  # mean of the images' pixels minus that of the reference's; black is 0, white is 1
    std_ratio: Estimate  # standard deviation of the images' pixels over that of the reference's


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """|m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), m and S the means and covariances (over N - 1) of the rows.

    It is the squared 2-Wasserstein distance of two Gaussians, and the FID if the features are Inception's. It is too
    large for few pictures, by about 1 / N: compare only figures of equal N.

    With S_1 = R_1^T R_1 and S_2 = R_2^T R_2, the trace of (S_1 S_2)^(1/2) is the sum of the singular values of R_1
    R_2^T. We find R from the rows by QR and never form S. torchmetrics takes roots of the eigenvalues of S_1 S_2
    instead: where there are fewer rows than features, or features that repeat each other, rounding errors of 1e-16 in
    eigenvalues that should be 0 come out of the root as 1e-8 each, and two equal sets are at a distance below 0.

    Args:
        features: (N, D), float32 or float64; computed in float64.
        reference: (M, D).
    Returns:
        At least 0.
    Raises:
        ValueError: fewer than 2 rows, other D, numbers that are not finite, or rows that are all equal.
    References:
        Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500.
    """
    _check(2, features=features, reference=reference)
    mean_1, r_1 = _mean_and_root(features)
    mean_2, r_2 = _mean_and_root(reference)
    trace_of_root = torch.linalg.svdvals(r_1 @ r_2.T).sum()
    distance = (mean_1 - mean_2).square().sum() + r_1.square().sum() + r_2.square().sum() - 2 * trace_of_root
    return max(distance.item(), 0.0)  # of two equal sets: 0 up to rounding


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,) and R, (min(N, D), D), with R^T R the covariance: R of all rows is R of (R of the first, the rest).

    A thin QR of parts of the rows, so that they are not all in float64 at once.
    """
    mean = features.new_zeros(features.shape[1], dtype=torch.float64)
    for rows in features.split(ROWS):
        mean += rows.double().sum(dim=0) / len(features)
    root = mean.new_zeros(0, len(mean))
    for rows in features.split(ROWS):
        root = torch.linalg.qr(torch.cat([root, rows.double() - mean]), mode="r").R
    return mean, root / math.sqrt(len(features) - 1)


def kernel_distance(features: Tensor, reference: Tensor) -> Estimate:
    """The unbiased MMD^2 with the kernel k(x, y) = (x . y / D + 1)^3: "KID" if the features are Inception's.

        mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean over i, j of k(x_i, y_j)

    All pairs are in it, not subsets of them. It is 0 on average if both laws are one, whatever N, so it may be below 0.
    To first order it is its mean plus 2 mean_i h_x(x_i) + 2 mean_j h_y(y_j) (Hajek projection), with h centred and

        h_x(x) = E k(x, x') - E k(x, y),    h_y(y) = E k(y, y') - E k(x, y)

    so that its variance is 4 var(h_x) / N + 4 var(h_y) / M. Here h is estimated by means over the rows at hand. For
    one law h is 0, only the error of these means is left, and the standard error is too large, by about sqrt(2).

    Args:
        features: (N, D), float32 or float64; computed in float64.
        reference: (M, D).
    Raises:
        ValueError: as for frechet_distance.
    References:
        Binkowski et al. 2018, arXiv 1801.01401; Gretton et al. 2012, Lemma 6.
    """
    _check(2, features=features, reference=reference)
    n, m = len(features), len(reference)
    k_xx = sum(_kernel_sums(features, features)) / (n - 1)
    k_yy = sum(_kernel_sums(reference, reference)) / (m - 1)
    k_xy, k_yx = _kernel_sums(features, reference)
    h_x, h_y = k_xx - k_xy / m, k_yy - k_yx / n
    variance = 4 * h_x.var() / n + 4 * h_y.var() / m
    return Estimate((h_x.mean() + h_y.mean()).item(), variance.sqrt().item())


def _kernel_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of k(x_i, y_j) over j and over i: (N,) and (M,).

    If y is x, only the pairs i < j are in both sums, so that together they are the sums over all j that are not i.
    """
    over_j, over_i = (z.new_zeros(len(z), dtype=torch.float64) for z in (x, y))
    for i in range(0, len(x), ROWS):
        for j in range(i if y is x else 0, len(y), ROWS):
            a, b = x[i : i + ROWS].double(), y[j : j + ROWS].double()
            k = ((a @ b.T).div_(x.shape[1]).add_(1)).pow(3)
            if y is x and j == i:
                k.triu_(diagonal=1)
            over_j[i : i + ROWS] += k.sum(dim=1)
            over_i[j : j + ROWS] += k.sum(dim=0)
    return over_j, over_i


def precision_recall(features: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """How much of the features lies within the manifold of the reference, and how much of the reference within theirs.

    The manifold of a set is the union of balls around its rows, each reaching to the row's k-th nearest neighbour in
    the set, itself not counted; the surface belongs to the ball.

    Raises:
        ValueError: as for frechet_distance, or no more than k rows.
    References:
        Kynkaanniemi et al. 2019, arXiv 1904.06991, Eqs. (1) and (2).
    """
    _check(_checked_k(k) + 1, features=features, reference=reference)
    radii_x, radii_y = _radii(features, k), _radii(reference, k)
    precise = 0
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows, distance in _distances(features, reference):
        precise += int((distance <= radii_y).any(dim=1).sum())
        recalled |= (distance <= radii_x[rows, None]).any(dim=0)
    return precise / len(features), recalled.double().mean().item()


def density_coverage(features: Tensor, reference: Tensor, k: int = 5) -> tuple[float, float]:
    """1 / k of the number of the reference's balls that a row of features lies in, and the part of balls with any in.

    Balls are those of `precision_recall`. For one law the density is 1 on average, and the coverage is about 1 - 2^-k
    if there are as many features as references. An outlier in the reference with a wide ball matters less here.

    Raises:
        ValueError: as for precision_recall.
    References:
        Naeem et al. 2020, arXiv 2002.09797, Eqs. (3) and (4).
    """
    _check(_checked_k(k) + 1, features=features, reference=reference)
    radii = _radii(reference, k)
    inside = 0
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for _, distance in _distances(features, reference):
        within = distance <= radii
        inside += int(within.sum())
        covered |= within.any(dim=0)
    return inside / (k * len(features)), covered.double().mean().item()


def nearest(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest row of the reference, and its index (of several, the first): (N,) and (N,) int64.

    Raises:
        ValueError: no rows, other D, or numbers that are not finite.
    """
    _check(1, features=features, reference=reference)
    found = [distance.min(dim=1) for _, distance in _distances(features, reference)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def memorisation(samples: Tensor, training: Tensor, held_out: Tensor) -> Estimate:
    """P(a sample is nearer to its nearest training picture than a held-out picture is to its own); ties count half.

    The U statistic of a test with three samples, with the sides swapped, as a probability. 0.5: samples are as near to
    the training pictures as new ones are. Near 1: they are copies. Below 0.5: they keep away, as blurred ones would.
    The standard error is DeLong's, given the training pictures, which both sides share. It is 0 where every sample is
    nearer than every held-out picture, though no finite number of them is certain.

    Args:
        samples, training, held_out: features, (N, D) each; held-out pictures are from the training pictures' source,
            but the model never saw them.
    Raises:
        ValueError: as for frechet_distance.
    References:
        Meehan, Chaudhuri and Dasgupta 2020, arXiv 2004.05675; DeLong, DeLong and Clarke-Pearson 1988.
    """
    _check(2, samples=samples, training=training, held_out=held_out)
    of_samples, of_held_out = nearest(samples, training)[0], nearest(held_out, training)[0]
    wins = 1 - _part_below(of_samples, of_held_out)  # for each sample, over how many of the held-out pictures
    losses = _part_below(of_held_out, of_samples)
    variance = wins.var() / len(wins) + losses.var() / len(losses)
    return Estimate(wins.mean().item(), variance.sqrt().item())


def _part_below(values: Tensor, others: Tensor) -> Tensor:
    """For each value, the part of the others that are smaller; equal ones count half."""
    ordered = others.sort().values
    below, up_to = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    return (below + up_to).double() / (2 * len(others))


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest neighbour, itself not counted: (N,)."""
    radii = []
    for rows, distance in _distances(features, features):
        distance[torch.arange(len(rows)), rows] = math.inf
        radii.append(distance.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(radii)


def _distances(features: Tensor, reference: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices of some rows of features, (n,), and their distances to all rows of the reference, (n, M); part by part.

    Taken from differences, not as |a|^2 - 2 a . b + |b|^2: so equal rows are at distance 0, and the parts make no
    difference.
    """
    for rows in torch.arange(len(features), device=features.device).split(max(1, ENTRIES // len(reference))):
        yield rows, torch.cdist(features[rows], reference, compute_mode="donot_use_mm_for_euclid_dist")


def channel_shift(images: np.ndarray, reference: np.ndarray) -> list[ChannelShift]:
    """For each channel, by how much the pixels are brighter than the reference's, and how much wider they spread.

    Each image is one draw, its pixels are not: standard errors are over images, and that of the ratio is to first
    order. One set may be of 8 bits and the other of 16, or of another size.

    Args:
        images, reference: (N, C, H, W) and (M, C, H', W'), uint8 or uint16.
    Raises:
        ValueError: another dtype or shape, other channels, fewer than 2 images, or a channel that is constant.
    """
    for name, given in (("images", images), ("reference", reference)):
        _check_images(name, given, 2)
    if images.shape[1] != reference.shape[1]:
        raise ValueError(f"images have {images.shape[1]} channels, the reference has {reference.shape[1]}: give one")
    mean_x, parts_x = _mean_and_variance_parts("images", images)
    mean_y, parts_y = _mean_and_variance_parts("reference", reference)
    mean_error = np.hypot(_error_of_mean(mean_x), _error_of_mean(mean_y))
    shift = mean_x.mean(axis=0) - mean_y.mean(axis=0)
    variance_x, variance_y = parts_x.mean(axis=0), parts_y.mean(axis=0)
    ratio = np.sqrt(variance_x / variance_y)
    # d ratio / ratio = (d variance_x / variance_x - d variance_y / variance_y) / 2
    ratio_error = ratio / 2 * np.hypot(_error_of_mean(parts_x) / variance_x, _error_of_mean(parts_y) / variance_y)
    return [
        ChannelShift(Estimate(*map(float, mean)), Estimate(*map(float, std)))
        for mean, std in zip(zip(shift, mean_error), zip(ratio, ratio_error))
    ]


def _mean_and_variance_parts(name: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per image and channel, (N, C): the mean of the pixels, and of their squared differences from the mean of all."""
    # From a pixel of the set, so that of a constant channel nothing is left, not even rounding.
    origin = images[0, :, :1, :1].astype(np.float64)
    white = np.iinfo(images.dtype).max
    means, squares = [], []
    for part in _parts(images):
        x = (part - origin) / white
        means.append(x.mean(axis=(2, 3)))
        squares.append(np.square(x).mean(axis=(2, 3)))
    mean, square = np.concatenate(means), np.concatenate(squares)
    constant = np.flatnonzero(~square.any(axis=0))
    if constant.size:
        raise ValueError(f"all pixels of channel {constant[0]} of {name} are {origin[constant[0]].item():g}")
    mean_of_all = mean.mean(axis=0)
    return mean + origin[:, 0, 0] / white, square - 2 * mean_of_all * mean + mean_of_all**2


def _error_of_mean(draws: np.ndarray) -> np.ndarray:
    error: np.ndarray = draws.std(axis=0, ddof=1) / math.sqrt(len(draws))
    return error


def jackknife(
    statistic: Callable[[Tensor, Tensor], float], features: Tensor, reference: Tensor, groups: int = 10
) -> Estimate:
    """The statistic of all, and its standard error by leaving out one of `groups` groups of features at a time.

        SE^2 = (G - 1) / G sum_g (statistic without group g - mean of these)^2         delete-a-group jackknife

    Group g is the rows g, g + G, g + 2 G and so on. The reference is taken as it is, without an error of its own.

    Raises:
        ValueError: groups is not an int from 2 to the number of rows; and what the statistic raises.
    References:
        Kott 2001, "The delete-a-group jackknife"; Efron and Stein 1981.
    """
    (found,) = jackknives(lambda x, y: (statistic(x, y),), features, reference, groups)
    return found


def jackknives(
    statistic: Callable[[Tensor, Tensor], Sequence[float]], features: Tensor, reference: Tensor, groups: int = 10
) -> list[Estimate]:
    """`jackknife` of a statistic that gives several values at once."""
    if not isinstance(groups, int) or not 2 <= groups <= len(features):
        raise ValueError(f"groups is {groups!r}: give an int from 2 to the number of rows, {len(features)}")
    group = torch.arange(len(features), device=features.device) % groups
    left = np.array([statistic(features[group != g], reference) for g in range(groups)])
    variance = (groups - 1) / groups * np.square(left - left.mean(axis=0)).sum(axis=0)
    return [Estimate(value, math.sqrt(v)) for value, v in zip(statistic(features, reference), variance)]


def _check(least: int, **sets: Tensor) -> None:
    """Raise ValueError if these features cannot be compared. least: rows that are needed; if 1, they may be equal."""
    for name, features in sets.items():
        if features.ndim != 2 or features.dtype not in (torch.float32, torch.float64):
            shape = tuple(features.shape)
            raise ValueError(f"{name} has shape {shape}, {features.dtype}: give (N, D), float32 or float64")
        if len(features) < least or features.shape[1] < 1:
            raise ValueError(f"{name} has shape {tuple(features.shape)}: give at least {least} rows, of 1 or more")
        low, high = features.amin(dim=0), features.amax(dim=0)  # NaN if there is any
        if not (low.isfinite() & high.isfinite()).all():
            bad = int((~features.isfinite()).any(dim=1).sum())
            raise ValueError(f"{name} has NaN or infinity in {bad} of {len(features)} rows: give finite numbers")
        # A network rounds in another way in a batch of another size, so equal pictures may differ by that.
        if least > 1 and (high - low).max() <= 1e-6 * torch.maximum(high, -low).max():
            raise ValueError(f"{name} has {len(features)} rows that are all equal: a constant has no distance")
    if len({features.shape[1] for features in sets.values()}) > 1:
        columns = ", ".join(f"{name} {features.shape[1]}" for name, features in sets.items())
        raise ValueError(f"numbers of features differ: {columns}; give those of one extractor")


def _checked_k(k: int) -> int:
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}: give an int of at least 1")
    return k
