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

import hashlib
import math
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

FORMAT = 1  # part of every cache key: raise it when the same pixels would give other features
ROWS = 2048  # how many rows of features are worked on at a time
ENTRIES = 2**23  # about how many entries of a matrix of distances, or pixels, are in memory at a time


class Estimate(NamedTuple):
    value: float
    standard_error: float | None


class ChannelShift(NamedTuple):
    """How one channel of the images differs from that of the reference."""

    mean: Estimate  # mean of the images' pixels minus that of the reference's; black is 0, white is 1
    std_ratio: Estimate  # standard deviation of the images' pixels over that of the reference's


# ---- Distances between two laws --------------------------------------------------------------------------------------


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


# ---- Neighbours ------------------------------------------------------------------------------------------------------


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


# ---- Pixels ----------------------------------------------------------------------------------------------------------


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


# ---- A standard error for what has no formula ------------------------------------------------------------------------


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


# ---- Features --------------------------------------------------------------------------------------------------------


class Extractor:
    """Pictures to features.

    Attributes:
        name: what a report says, as "pixels-16x16".
        key: of what the features depend on besides the picture; part of the cache's file names.
        is_inception: it is the network that FID and KID are defined with.
        accuracy: of the classifier on pictures it was not trained on; else None.
    """

    def __init__(
        self,
        name: str,
        key: str,
        compute: Callable[[Tensor], Tensor],
        *,
        device: torch.device | str = "cpu",
        is_inception: bool = False,
        accuracy: float | None = None,
    ) -> None:
        self.name, self.key, self.is_inception, self.accuracy = name, key, is_inception, accuracy
        self._compute, self._device = compute, device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W), uint8 or uint16, of any size, to (B, D), float32, on the CPU.

        Raises:
            ValueError: another dtype or shape, or a number of channels that this extractor cannot take.
        """
        if images.ndim != 4 or images.dtype not in (torch.uint8, torch.uint16):
            raise ValueError(f"images are {tuple(images.shape)} {images.dtype}: give (B, C, H, W) uint8 or uint16")
        white = 255 if images.dtype == torch.uint8 else 65535
        features = self._compute((images.float() / white).to(self._device)).float().cpu()
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(f"{self.name} makes of {len(images)} images {tuple(features.shape)}: (B, D) is needed")
        return features


def features_of(
    extractor: Extractor, images: np.ndarray, *, cache_dir: Path | None = None, batch_size: int = 256
) -> Tensor:
    """Features of all images, (N, D) float32, on the CPU; with cache_dir, from there if they were computed before.

    Args:
        images: (N, C, H, W), uint8 or uint16; may be memory-mapped.
        cache_dir: made if missing. A file is named by a hash of extractor.key and of the pixels; one that is damaged
            is made again.
    Raises:
        ValueError: another dtype or shape, no images, or a batch_size below 1.
    """
    _check_images("images", images, 1)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}: give an int of at least 1")
    path = None if cache_dir is None else cache_dir / f"features-{_digest_of_images(extractor.key, images)}.safetensors"
    cached = None if path is None else _load(path)
    if cached is not None:
        return cached["features"]
    features = []
    with tqdm(total=len(images), desc=f"features, {extractor.name}", unit=" images", leave=False) as progress:
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(np.array(images[start : start + batch_size]))
            features.append(extractor(batch))
            progress.update(len(batch))
    whole = torch.cat(features)
    if path is not None:
        _save(path, {"features": whole})
    return whole


def make_extractor(
    which: str,
    *,
    images: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    cache_dir: Path | None = None,
    device: torch.device | str = "cpu",
) -> Extractor:
    """An extractor by its name or file.

    Args:
        which: "pixels": averages over at most 16 x 16 places, in [-1, 1].
            "classifier": a small network, trained here on the images to tell their labels or, without labels, how a
            picture is turned (Gidaris et al. 2018, arXiv 1803.07728).
            A .th file: the ResNet-56 for CIFAR-10 of github.com/akamaster/pytorch_resnet_cifar10; gray or RGB, resized
            to 32 x 32.
            A .pt file: TorchScript, called with pictures in [-1, 1]; or the Inception network as it is handed out in
            this form for FID, gray or RGB.
        images: (N, C, H, W) uint8 or uint16: what the classifier learns from. The size of "pixels" is theirs if that
            is below 16.
        labels: (N,), for the classifier.
        cache_dir: where the trained classifier is kept; made if missing.
    Raises:
        ValueError: another name, a file that is missing or is not what its name says, or images and labels that the
            classifier cannot learn from.
    """
    if images is not None:
        _check_images("images", images, 1)
    if which == "pixels":
        return _pixels(images)
    if which == "classifier":
        if images is None:
            raise ValueError("images is None: the classifier has nothing to learn from")
        return _classifier(images, labels, cache_dir, device)
    path = Path(which).expanduser()
    if path.suffix not in (".th", ".pt"):
        raise ValueError(f'extractor is {which!r}: give "pixels", "classifier", or the path of a .th or .pt file')
    if not path.is_file():
        raise ValueError(f"extractor is {which!r}: there is no such file")
    return _resnet(path, device) if path.suffix == ".th" else _torchscript(path, device)


def _pixels(images: np.ndarray | None) -> Extractor:
    def compute(x: Tensor) -> Tensor:
        places = min(16, x.shape[2]), min(16, x.shape[3])
        return F.adaptive_avg_pool2d(2 * x - 1, places).flatten(1)

    height, width = (16, 16) if images is None else images.shape[2:]
    key = hashlib.sha256(f"pixels {FORMAT}".encode()).hexdigest()
    return Extractor(f"pixels-{min(16, height)}x{min(16, width)}", key, compute)


# ---- Networks from a file --------------------------------------------------------------------------------------------


class _Block(nn.Module):
    """Two convolutions around a shortcut; where the size halves, the shortcut takes every second pixel and adds zeros.

    He et al. 2016, arXiv 1512.03385, section 4.2, option A. Names of layers are those of the file.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.new_channels = stride, channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        half = self.new_channels // 2
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(y + shortcut)


class _ResNet56(nn.Module):
    """(B, 3, 32, 32) to the 64 averages that its linear layer sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(_Block(channels_in, channels, stride), *(_Block(channels, channels, 1) for _ in range(8)))
            for channels_in, channels, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3))


def _resnet(path: Path, device: torch.device | str) -> Extractor:
    with torch.random.fork_rng(devices=[]):  # the first weights, which the file's replace, are drawn
        network = _ResNet56().eval()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        network.load_state_dict({name.removeprefix("module."): tensor for name, tensor in weights.items()})
    except Exception as error:  # of many types: not a file of torch's, other names, other shapes
        raise ValueError(f"{path} does not hold the ResNet-56 for CIFAR-10 ({type(error).__name__})") from None
    network.to(device)
    # of ImageNet's pixels, which this network was trained with on CIFAR-10
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]

    def compute(x: Tensor) -> Tensor:
        x = _rgb(x)
        if x.shape[2:] != (32, 32):
            x = F.interpolate(x, size=(32, 32), mode="bilinear", align_corners=False, antialias=True)
        return network((x - mean) / std)

    return Extractor("cifar10-resnet56", _digest_of_file("resnet", path), compute, device=device)


def _torchscript(path: Path, device: torch.device | str) -> Extractor:
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{path} is not a TorchScript file: {error}") from error
    key = _digest_of_file("torchscript", path)

    def inception(x: Tensor) -> Tensor:
        return network((_rgb(x) * 255).round().to(torch.uint8), return_features=True)

    takes = [argument.name for argument in network.forward.schema.arguments]
    if "Inception" in network.original_name and "return_features" in takes:
        with torch.no_grad():
            features = inception(torch.zeros(1, 3, 32, 32, device=device))
        if features.shape == (1, 2048):
            return Extractor("inception", key, inception, device=device, is_inception=True)
    return Extractor(path.name, key, lambda x: network(2 * x - 1), device=device)


def _rgb(x: Tensor) -> Tensor:
    if x.shape[1] not in (1, 3):
        raise ValueError(f"images have {x.shape[1]} channels: this extractor takes 1 or 3")
    return x.expand(-1, 3, -1, -1)


# ---- A network trained here ------------------------------------------------------------------------------------------


class _Network(nn.Module):
    """About 0.2 M parameters: 128 features, and a linear layer that tells classes by them."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for channels_in, channels_out in ((channels, 32), (32, 64), (64, 64)):
            blocks += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU()]
            blocks += [nn.MaxPool2d(2, ceil_mode=True)]
        self.features = nn.Sequential(
            *blocks, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU()
        )
        self.head = nn.Linear(128, classes)

    def extract(self, x: Tensor) -> Tensor:
        """(B, C, H, W), in [0, 1], to (B, 128); sides above 64 are averaged down, which bounds memory and time."""
        side = min(64, x.shape[2]), min(64, x.shape[3])
        features: Tensor = self.features(F.adaptive_avg_pool2d(2 * x - 1, side))
        return features


def _classifier(
    images: np.ndarray, labels: np.ndarray | None, cache_dir: Path | None, device: torch.device | str
) -> Extractor:
    if len(images) < 2:
        raise ValueError(f"images has {len(images)} image: the classifier needs one to learn and one to be tested")
    channels = images.shape[1]
    classes, answers, task = _task(images, labels)
    digest = _digest_of_images(
        "classifier" if labels is None else hashlib.sha256(answers.tobytes()).hexdigest(), images
    )
    path = None if cache_dir is None else cache_dir / f"classifier-{digest}.safetensors"
    tensors = None if path is None else _load(path)
    if tensors is None:
        tensors = _train(images, None if labels is None else answers, classes, device)
        if path is not None:
            _save(path, tensors)
    key = _digest(tensors)  # of what was learned, which another machine may round in another way
    accuracy, scale = tensors.pop("accuracy").item(), tensors.pop("scale").item()
    with torch.random.fork_rng(devices=[]):
        network = _Network(channels, classes)
    network.load_state_dict(tensors)
    network.to(device).eval()

    def compute(x: Tensor) -> Tensor:
        if x.shape[1] != channels:
            raise ValueError(f"images have {x.shape[1]} channels: the classifier was trained on {channels}")
        return network.extract(x) / scale  # so that x . y / D in the kernel's (x . y / D + 1)^3 is about 1

    return Extractor(f"classifier ({task}, {key[:8]})", key, compute, device=device, accuracy=accuracy)


def _task(images: np.ndarray, labels: np.ndarray | None) -> tuple[int, np.ndarray, str]:
    """How many classes, the class of each image, (N,) int64 (empty if that is how it is turned), and both in words."""
    if labels is None:
        turns = len(_turns(images.shape))
        return turns, np.zeros(0, dtype=np.int64), f"{turns} rotations"
    if np.shape(labels) != (len(images),):
        raise ValueError(f"labels have shape {np.shape(labels)}: give one for each of the {len(images)} images")
    names, answers = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"all labels are {names[0]!r}: give at least 2 different ones")
    return len(names), answers.astype(np.int64), f"{len(names)} labels"


def _turns(shape: tuple[int, ...]) -> tuple[int, ...]:
    """By how many quarters pictures of this shape can be turned without a change of shape."""
    return (0, 1, 2, 3) if shape[-2] == shape[-1] else (0, 2)


@torch.enable_grad()
def _train(
    images: np.ndarray, answers: np.ndarray | None, classes: int, device: torch.device | str
) -> dict[str, Tensor]:
    """Weights of a _Network; its accuracy on every 20th image, which it is not trained on; the scale of its features.

    The scale is the root of their mean square on these images.
    """
    held_out = np.arange(0, len(images), 20)
    training = np.setdiff1d(np.arange(len(images)), held_out)
    steps = max(200, min(1500, 3 * len(training) // 128))
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)  # torch.manual_seed would seed the devices as well
        network = _Network(images.shape[1], classes).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    turns = _turns(images.shape)

    def lesson(chosen: np.ndarray, turn: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures in [0, 1] and what to say of them. turn: (B,), an index into turns; not used if there are labels."""
        x = torch.from_numpy(images[chosen]).float() / np.iinfo(images.dtype).max
        if answers is not None:
            return x.to(device), torch.from_numpy(answers[chosen]).to(device)
        x = torch.stack([image.rot90(turns[t], (1, 2)) for image, t in zip(x, turn.tolist())])
        return x.to(device), turn.to(device)

    for _ in tqdm(range(steps), desc="training the classifier", unit=" steps", leave=False):
        chosen = training[torch.randint(len(training), (128,), generator=generator).numpy()]
        x, answer = lesson(chosen, torch.randint(len(turns), (128,), generator=generator))
        loss = F.cross_entropy(network.head(network.extract(x)), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    network.eval()
    right, asked, squares = 0, 0, []
    with torch.no_grad():
        for turn in range(1 if answers is not None else len(turns)):
            for start in range(0, len(held_out), 256):
                chosen = held_out[start : start + 256]
                x, answer = lesson(chosen, torch.full((len(chosen),), turn))
                features = network.extract(x)
                squares.append(features.square().flatten())
                right += int((network.head(features).argmax(dim=1) == answer).sum())
                asked += len(chosen)
    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    scale = torch.cat(squares).double().mean().sqrt().cpu()
    return {**weights, "accuracy": torch.tensor(right / asked, dtype=torch.float64), "scale": scale}


# ---- Files and hashes ------------------------------------------------------------------------------------------------


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Written beside its place and renamed, so that under this name there is all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        save_file(tensors, temporary, metadata={"sha256": _digest(tensors)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: Path) -> dict[str, Tensor] | None:
    """What _save wrote; None if there is no file, or it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
            whole = (file.metadata() or {}).get("sha256") == _digest(tensors)
    except SafetensorError:
        return None
    return tensors if whole else None


def _digest(tensors: dict[str, Tensor]) -> str:
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].contiguous().numpy()
        sha256.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        sha256.update(array.data)
    return sha256.hexdigest()


def _digest_of_images(purpose: str, images: np.ndarray) -> str:
    sha256 = hashlib.sha256(f"{FORMAT} {purpose} {images.dtype.str} {images.shape} ".encode())
    for part in _parts(images):
        sha256.update(np.ascontiguousarray(part).data)
    return sha256.hexdigest()


def _digest_of_file(purpose: str, path: Path) -> str:
    return hashlib.sha256(f"{FORMAT} {purpose} ".encode() + path.read_bytes()).hexdigest()


def _parts(images: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, ENTRIES // math.prod(images.shape[1:]))
    return (images[start : start + step] for start in range(0, len(images), step))


# ---- Checking --------------------------------------------------------------------------------------------------------


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


def _check_images(name: str, images: np.ndarray, least: int) -> None:
    if not isinstance(images, np.ndarray) or images.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{name} is {getattr(images, 'dtype', type(images))}: give an array of uint8 or uint16")
    if images.ndim == 4 and images.shape[3] <= 4 and images.shape[1] > 16:
        raise ValueError(f"{name} has shape {images.shape}, as if channels came last: give (N, C, H, W)")
    if images.ndim != 4 or 0 in images.shape[1:] or len(images) < least:
        raise ValueError(f"{name} has shape {images.shape}: give (N, C, H, W), N at least {least}")
