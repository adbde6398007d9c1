"""FIDELITY: distances between two sets of images, in the features of any extractor.

An extractor (features.py) maps each image to a feature vector. Everything here compares the features (N, D) of one set
with the features (M, D) of another. So a value belongs to its extractor: report the extractor's name with it, and never
compare the values of two extractors.

    frechet_distance, kernel_distance     distance between the two distributions, 0 if they are equal
    precision_recall, density_coverage    whether samples look real, and whether they cover all kinds of images
    nearest, memorisation                 whether samples are copies of training images
    accuracy                              whether samples are of the class that was asked for
    channel_shift                         brightness and contrast, of the pixels themselves

An `Estimate` has a standard error: how much the value would vary with other images from the same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .image_arrays import check_images, chunks
from .pixels import num_levels
from .precision import as_float64

CHUNK = 2048  # feature vectors in float64, or sides of a kernel matrix, in memory at a time
CHUNK_DISTANCES = 2**23  # entries of a distance matrix in memory at a time

Kernel = Callable[[Tensor, Tensor], Tensor]  # two sets of vectors, (N, D) and (M, D), to k of each pair, (N, M)


class Estimate(NamedTuple):
    value: float
    standard_error: float | None


class ChannelShift(NamedTuple):
    """How the pixels of one channel differ from those of the reference set."""

    mean: Estimate  # difference of the means, images minus reference; black is 0, white is 1
    std_ratio: Estimate  # ratio of the standard deviations, images over reference


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """|m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), with m and S the mean and covariance (over N - 1) of a set.

    This is the squared 2-Wasserstein distance of two Gaussians, and the FID if the features are those of Inception.
    It is biased upwards by about 1 / N: compare only values of equal N.

    With S_1 = R_1^T R_1 and S_2 = R_2^T R_2, the trace of (S_1 S_2)^(1/2) is the sum of the singular values of
    R_1 R_2^T. R comes from the features by QR, and S is never formed. torchmetrics takes square roots of the
    eigenvalues of S_1 S_2 instead. With fewer vectors than dimensions, or dependent features, eigenvalues that are 0
    have rounding errors of 1e-16, each root an error of 1e-8, and the distance of two equal sets comes out below 0.

    Args:
        features: (N, D), float32 or float64; computed in float64.
        reference: (M, D).
    Returns:
        At least 0.
    Raises:
        ValueError: fewer than 2 vectors, different D, non-finite values, or a set of vectors that are all equal.
    References:
        Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500.
    """
    _check(2, features=features, reference=reference)
    mean_1, r_1 = _mean_and_root(features)
    mean_2, r_2 = _mean_and_root(reference)
    trace_of_root = torch.linalg.svdvals(r_1 @ r_2.T).sum()
    distance = (mean_1 - mean_2).square().sum() + r_1.square().sum() + r_2.square().sum() - 2 * trace_of_root
    return max(distance.item(), 0.0)  # rounding can make the distance of equal sets negative


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and R, (min(N, D), D), where R^T R is the covariance.

    A QR of [R of the previous chunks; next chunk] at a time, so that not all features are in float64 at once.
    """
    mean = as_float64(features.new_zeros(features.shape[1]))
    for chunk in features.split(CHUNK):
        mean += as_float64(chunk).sum(dim=0) / len(features)
    root = mean.new_zeros(0, len(mean))
    for chunk in features.split(CHUNK):
        root = torch.linalg.qr(torch.cat([root, as_float64(chunk) - mean]), mode="r").R
    return mean, root / math.sqrt(len(features) - 1)


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """k(x, y) = (x . y / D + 1)^3 of vectors (N, D) and (M, D): (N, M).

    References:
        Binkowski et al. 2018, arXiv 1801.01401, section 3.
    """
    return ((x @ y.T).div_(x.shape[1]).add_(1)).pow(3)


def cmmd_kernel(x: Tensor, y: Tensor) -> Tensor:
    """k(x, y) = 1000 exp(-|x - y|^2 / (2 sigma^2)), sigma = 10, of vectors (N, D) and (M, D): (N, M).

    The factor, with which the paper multiplies the distance, makes it a number of ordinary size.

    References:
        Jayasumana et al. 2024, arXiv 2401.09603, section 4.
    """
    sigma = 10
    squared_norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    return (squared_norms - 2 * (x @ y.T)).div_(-2 * sigma**2).exp_().mul_(1000)


def kernel_distance(features: Tensor, reference: Tensor, kernel: Kernel = cubic_kernel) -> Estimate:
    """The unbiased MMD^2 with kernel k; with the cubic one the KID, if the features are those of Inception.

        mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean over i, j of k(x_i, y_j)

    It uses all pairs, not subsets. For equal distributions its expectation is 0 at any N, so values may be below 0.
    To first order (Hajek projection) it is its expectation plus 2 mean_i h_x(x_i) + 2 mean_j h_y(y_j), h centred, with

        h_x(x) = E k(x, x') - E k(x, y),    h_y(y) = E k(y, y') - E k(x, y)

    and its variance is 4 var(h_x) / N + 4 var(h_y) / M. Here h is estimated by means over the given vectors. For equal
    distributions h is 0 and only the error of these means remains, which makes the standard error too large, by a
    factor of about sqrt(2).

    Args:
        features: (N, D), float32 or float64; computed in float64.
        reference: (M, D).
        kernel: k, `cubic_kernel` or `cmmd_kernel`.
    Raises:
        ValueError: as for frechet_distance.
    References:
        Binkowski et al. 2018, arXiv 1801.01401; Gretton et al. 2012, Lemma 6.
    """
    _check(2, features=features, reference=reference)
    n, m = len(features), len(reference)
    k_xx = sum(_kernel_sums(kernel, features, features)) / (n - 1)
    k_yy = sum(_kernel_sums(kernel, reference, reference)) / (m - 1)
    k_xy, k_yx = _kernel_sums(kernel, features, reference)
    h_x, h_y = k_xx - k_xy / m, k_yy - k_yx / n
    variance = 4 * h_x.var() / n + 4 * h_y.var() / m
    return Estimate((h_x.mean() + h_y.mean()).item(), variance.sqrt().item())


def _kernel_sums(kernel: Kernel, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of k(x_i, y_j) over j, (N,), and over i, (M,).

    If y is x, both sums are over pairs i < j only, so that the two add up to the sum over all j != i.
    """
    over_j, over_i = (as_float64(z.new_zeros(len(z))) for z in (x, y))
    for i in range(0, len(x), CHUNK):
        for j in range(i if y is x else 0, len(y), CHUNK):
            a, b = as_float64(x[i : i + CHUNK]), as_float64(y[j : j + CHUNK])
            k = kernel(a, b)
            if y is x and j == i:
                k.triu_(diagonal=1)
            over_j[i : i + CHUNK] += k.sum(dim=1)
            over_i[j : j + CHUNK] += k.sum(dim=0)
    return over_j, over_i


def precision_recall(features: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision: the fraction of features within the manifold of the reference. Recall: the same with the sets swapped.

    The manifold of a set is the union of closed balls around its vectors, each with the distance to the vector's k-th
    nearest neighbour in the set (without itself) as its radius.

    Raises:
        ValueError: as for frechet_distance, or no more than k vectors.
    References:
        Kynkaanniemi et al. 2019, arXiv 1904.06991, Eqs. (1) and (2).
    """
    _check(_checked_k(k) + 1, features=features, reference=reference)
    radii_x, radii_y = _radii(features, k), _radii(reference, k)
    num_precise = 0
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for indices, distance in _distances(features, reference):
        num_precise += int((distance <= radii_y).any(dim=1).sum())
        recalled |= (distance <= radii_x[indices, None]).any(dim=0)
    return num_precise / len(features), recalled.sum().item() / len(reference)


def density_coverage(features: Tensor, reference: Tensor, k: int = 5) -> tuple[float, float]:
    """Density: how many of the reference's balls contain a feature vector, on average, over k. Coverage: the fraction
    of these balls that contain any.

    The balls are those of `precision_recall`. For equal distributions the expected density is 1, and the expected
    coverage about 1 - 2^-k if both sets have the same size. Outliers of the reference set, which have large balls,
    matter less here.

    Raises:
        ValueError: as for precision_recall.
    References:
        Naeem et al. 2020, arXiv 2002.09797, Eqs. (3) and (4).
    """
    _check(_checked_k(k) + 1, features=features, reference=reference)
    radii = _radii(reference, k)
    num_inside = 0
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for _, distance in _distances(features, reference):
        within = distance <= radii
        num_inside += int(within.sum())
        covered |= within.any(dim=0)
    return num_inside / (k * len(features)), covered.sum().item() / len(reference)


def nearest(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest vector of the reference, (N,), and its index, (N,) int64 (the first of several).

    Raises:
        ValueError: no vectors, different D, or non-finite values.
    """
    _check(1, features=features, reference=reference)
    minima = [distance.min(dim=1) for _, distance in _distances(features, reference)]
    return torch.cat([chunk.values for chunk in minima]), torch.cat([chunk.indices for chunk in minima])


def memorisation(samples: Tensor, training: Tensor, held_out: Tensor) -> Estimate:
    """P(a sample is nearer to its nearest training image than a held-out image is to its own); ties count half.

    0.5: samples are as near to the training images as new images are. Near 1: they are copies. Below 0.5: they are
    farther away, as blurred images are. This is the U statistic of Meehan et al., which compares three samples, as a
    probability and with the sides swapped. The standard error is DeLong's, conditional on the training images, which
    both sides share. It is 0 if every sample is nearer than every held-out image.

    Args:
        samples, training, held_out: features, (N, D) each; held-out images are from the distribution of the training
            images, and the model was not trained on them.
    Raises:
        ValueError: as for frechet_distance.
    References:
        Meehan, Chaudhuri and Dasgupta 2020, arXiv 2004.05675; DeLong, DeLong and Clarke-Pearson 1988.
    """
    _check(2, samples=samples, training=training, held_out=held_out)
    sample_distance, held_out_distance = nearest(samples, training)[0], nearest(held_out, training)[0]
    wins = 1 - _fraction_below(sample_distance, held_out_distance)  # of each sample, over held-out images
    losses = _fraction_below(held_out_distance, sample_distance)  # of each held-out image, against samples
    variance = wins.var() / len(wins) + losses.var() / len(losses)
    return Estimate(wins.mean().item(), variance.sqrt().item())


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> Estimate:
    """Fraction k / N of the predictions, (N,), that are equal to the labels, (N,).

    The standard error is sqrt(q (1 - q) / (N + 4)) at q = (k + 2) / (N + 4): not 0 when all are right or all wrong.

    Raises:
        ValueError: no predictions, or another number of labels.
    References:
        Agresti and Coull 1998, "Approximate is better than exact for interval estimation of binomial proportions".
    """
    if predicted.shape != labels.shape or predicted.ndim != 1 or not len(labels):
        raise ValueError(f"predicted has shape {predicted.shape}, labels {labels.shape}: give (N,) for both, N above 0")
    k, n = (predicted == labels).sum().item(), len(labels)
    q = (k + 2) / (n + 4)
    return Estimate(k / n, math.sqrt(q * (1 - q) / (n + 4)))


def _fraction_below(values: Tensor, others: Tensor) -> Tensor:
    """For each value, the fraction of the others that are smaller; ties count half."""
    ordered = others.sort().values
    below, up_to = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    return as_float64(below + up_to) / (2 * len(others))


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance of each vector to its k-th nearest neighbour in the set, without itself: (N,)."""
    radii = []
    for indices, distance in _distances(features, features):
        distance[torch.arange(len(indices)), indices] = math.inf
        radii.append(distance.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(radii)


def _distances(features: Tensor, reference: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The distance matrix in chunks: indices of feature vectors, (n,), and their distances to the reference, (n, M).

    Computed from differences, not as |a|^2 - 2 a . b + |b|^2: equal vectors have distance 0, and results do not depend
    on the size of the chunks.
    """
    size = max(1, CHUNK_DISTANCES // len(reference))
    for indices in torch.arange(len(features), device=features.device).split(size):
        yield indices, torch.cdist(features[indices], reference, compute_mode="donot_use_mm_for_euclid_dist")


def channel_shift(images: np.ndarray, reference: np.ndarray) -> list[ChannelShift]:
    """Difference of mean and ratio of standard deviation of the pixels, for each channel.

    Standard errors treat images, not pixels, as independent; that of the ratio is to first order. The sets may differ
    in bit depth and image size.

    Args:
        images, reference: (N, C, H, W) and (M, C, H', W'), uint8 or uint16.
    Raises:
        ValueError: another dtype or shape, different channels, fewer than 2 images, or a constant channel.
    """
    check_images("images", images, 2)
    check_images("reference", reference, 2)
    if images.shape[1] != reference.shape[1]:
        raise ValueError(
            f"images have {images.shape[1]} channels, reference has {reference.shape[1]}: give equal numbers"
        )
    mean_x, square_x = _means_and_squared_deviations("images", images)
    mean_y, square_y = _means_and_squared_deviations("reference", reference)
    shift = mean_x.mean(axis=0) - mean_y.mean(axis=0)
    shift_error = np.hypot(_standard_error(mean_x), _standard_error(mean_y))
    variance_x, variance_y = square_x.mean(axis=0), square_y.mean(axis=0)
    ratio = np.sqrt(variance_x / variance_y)
    # d ratio / ratio = (d variance_x / variance_x - d variance_y / variance_y) / 2
    ratio_error = ratio / 2 * np.hypot(_standard_error(square_x) / variance_x, _standard_error(square_y) / variance_y)
    return [
        ChannelShift(Estimate(*map(float, mean)), Estimate(*map(float, std)))
        for mean, std in zip(zip(shift, shift_error), zip(ratio, ratio_error))
    ]


def _means_and_squared_deviations(name: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per image and channel, (N, C): mean of the pixels, and mean squared deviation from the mean of the whole set."""
    # Relative to one pixel of the set: a constant channel is exactly 0 then, without rounding errors.
    origin = images[0, :, :1, :1].astype(np.float64)
    white = num_levels(images.dtype) - 1
    means, squares = [], []
    for chunk in chunks(images):
        x = (chunk - origin) / white
        means.append(x.mean(axis=(2, 3)))
        squares.append(np.square(x).mean(axis=(2, 3)))
    mean, square = np.concatenate(means), np.concatenate(squares)
    constant = np.flatnonzero(~square.any(axis=0))
    if constant.size:
        raise ValueError(f"all pixels of channel {constant[0]} of {name} are {origin[constant[0]].item():g}")
    set_mean = mean.mean(axis=0)
    return mean + origin[:, 0, 0] / white, square - 2 * set_mean * mean + set_mean**2


def _standard_error(values: np.ndarray) -> np.ndarray:
    """Of the mean over the first axis."""
    error: np.ndarray = values.std(axis=0, ddof=1) / math.sqrt(len(values))
    return error


def jackknife(
    statistic: Callable[[Tensor, Tensor], float], features: Tensor, reference: Tensor, groups: int = 10
) -> Estimate:
    """The statistic of all features, with its standard error by the delete-a-group jackknife.

        SE^2 = (G - 1) / G sum_g (statistic without group g - mean of these)^2

    Group g is the vectors g, g + G, g + 2 G and so on. The reference is treated as fixed, without an error of its own.

    Raises:
        ValueError: groups is not an int from 2 to the number of vectors; and whatever the statistic raises.
    References:
        Kott 2001, "The delete-a-group jackknife"; Efron and Stein 1981.
    """
    (estimate,) = jackknives(lambda x, y: (statistic(x, y),), features, reference, groups)
    return estimate


def jackknives(
    statistic: Callable[[Tensor, Tensor], Sequence[float]], features: Tensor, reference: Tensor, groups: int = 10
) -> list[Estimate]:
    """`jackknife` of a statistic that returns several values at once."""
    if not isinstance(groups, int) or not 2 <= groups <= len(features):
        raise ValueError(f"groups is {groups!r}: give an int from 2 to the number of feature vectors, {len(features)}")
    group = torch.arange(len(features), device=features.device) % groups
    without = np.array([statistic(features[group != g], reference) for g in range(groups)])
    variance = (groups - 1) / groups * np.square(without - without.mean(axis=0)).sum(axis=0)
    return [Estimate(value, math.sqrt(v)) for value, v in zip(statistic(features, reference), variance)]


def _check(min_vectors: int, **sets: Tensor) -> None:
    """Raise ValueError unless these features can be compared. With min_vectors above 1 a constant set is an error."""
    for name, features in sets.items():
        shape = tuple(features.shape)
        if features.ndim != 2 or features.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} has shape {shape}, {features.dtype}: give (N, D), float32 or float64")
        if len(features) < min_vectors or features.shape[1] < 1:
            raise ValueError(f"{name} has shape {shape}: give (N, D) with N at least {min_vectors} and D at least 1")
        low, high = features.amin(dim=0), features.amax(dim=0)  # NaN if there is any
        if not (low.isfinite() & high.isfinite()).all():
            num_bad = int((~features.isfinite()).any(dim=1).sum())
            raise ValueError(f"{name} has NaN or infinity in {num_bad} of {len(features)} feature vectors")
        # Networks round differently in batches of different sizes, so equal images may differ by that.
        if min_vectors > 1 and (high - low).max() <= 1e-6 * torch.maximum(high, -low).max():
            raise ValueError(f"all {len(features)} feature vectors of {name} are equal: no distance is defined")
    if len({features.shape[1] for features in sets.values()}) > 1:
        dimensions = ", ".join(f"{name} {features.shape[1]}" for name, features in sets.items())
        raise ValueError(f"feature dimensions differ: {dimensions}; give features of one extractor")


def _checked_k(k: int) -> int:
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}: give an int of at least 1")
    return k
