"""MOMENTS: mean and covariance of features of samples, beside those of training images, as a sum of squares.

Few steps, and errors of the network, show in what samples have in common: contrast, noise, how often a shape appears.
A calibrated sampler has a few numbers, and this is what they are fitted to. The features are of several kinds, so that
none of them can be met at the expense of the others: means of pixels on a grid, the strength of each octave of detail,
and all layers of a classifier that is trained on the images (see ddpm_pipeline/classifier.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_pipeline.classifier import Classifier
from ddpm_pipeline.features import Extractor
from ddpm_pipeline.pixels import from_pixels

GRID = 4  # cells of each side, of the means of pixels
DIMENSIONS = 24  # principal components that are kept of each kind of features
BATCH_SIZE = 256
LEAST_VARIANCE = 1e-3  # of a principal component, relative to the largest


class _Projection(NamedTuple):
    """The principal components of one kind of features, scaled so that their variances sum to 1."""

    mean: Tensor  # (F,)
    components: Tensor  # (F, D)


class Moments:
    """An `Objective` (see ddpm_pipeline/calibration.py): the squared Frechet distance to training images, near zero.

    With features in which the covariance of the images is diag(v), d^2 = |m - m_r|^2 + sum_ij (C - C_r)_ij^2 /
    (2 (v_i + v_j)) to second order in C - C_r: the metric of Bures (Bhatia, Jain and Lim 2019).

    Args:
        images: (N, C, H, W), uint8 or uint16; may be memory-mapped.
        classifiers: trained on them or on others.
        extractors: further features.
        gather: the rows of all processes.
    """

    def __init__(
        self,
        images: np.ndarray,
        classifiers: Sequence[Classifier],
        extractors: Sequence[Extractor],
        gather: Callable[[Tensor], Tensor],
    ) -> None:
        self._classifiers, self._extractors, self._gather = classifiers, extractors, gather
        batches = [
            self._kinds(from_pixels(torch.from_numpy(np.array(images[start : start + BATCH_SIZE]))))
            for start in range(0, len(images), BATCH_SIZE)
        ]
        kinds = [torch.cat(parts) for parts in zip(*batches)]
        self._projections = [_principal_components(features) for features in kinds]
        features = torch.cat([_project(each, p) for each, p in zip(kinds, self._projections)], dim=1)
        mean, covariance = _mean_and_covariance(features)
        variances, self._axes = torch.linalg.eigh(covariance)
        variances = variances.clamp(min=LEAST_VARIANCE * variances.max().item())
        self._mean, self._covariance = mean, self._axes.T @ covariance @ self._axes
        self._weights = (2 * (variances[:, None] + variances)).rsqrt()

    @property
    def extractors(self) -> list[str]:
        """Keys of the further features."""
        return [extractor.key for extractor in self._extractors]

    def residuals(self, images: Tensor) -> Tensor:
        """(D + D^2,) for the images, (B, C, H, W) in [-1, 1], of all processes."""
        kinds = zip(*(self._kinds(batch) for batch in images.clamp(-1, 1).split(BATCH_SIZE)))
        projected = [_project(torch.cat(parts), p) for parts, p in zip(kinds, self._projections)]
        mean, covariance = _mean_and_covariance(self._gather(torch.cat(projected, dim=1).contiguous()))
        difference = self._axes.T @ covariance @ self._axes - self._covariance
        return torch.cat([mean - self._mean, (difference * self._weights).flatten()])

    def total(self, products: Tensor) -> Tensor:
        return products

    @torch.no_grad()
    def _kinds(self, images: Tensor) -> list[Tensor]:
        """Each kind of features, (B, F) on the CPU."""
        kinds = [octaves(images), F.adaptive_avg_pool2d(images, GRID).flatten(1)]
        for classifier in self._classifiers:
            kinds += classifier.layers((images + 1) / 2)
        kinds += [extractor.of_floats((images + 1) / 2) for extractor in self._extractors]
        return [kind.float().cpu() for kind in kinds]


def octaves(images: Tensor) -> Tensor:
    """For each channel the mean, and half the log of the mean square of each octave of detail, (B, F).

    An octave is what is lost when the sides are halved: from the finest detail down to 4 pixels, and the rest.
    """
    features, octave = [images.mean(dim=(2, 3))], images
    while min(octave.shape[2:]) >= 4:
        halved = F.avg_pool2d(octave, 2)
        kept = F.interpolate(halved, size=octave.shape[2:], mode="nearest")
        features.append(_half_log_mean_square(octave - kept))
        octave = halved
    features.append(_half_log_mean_square(octave - octave.mean(dim=(2, 3), keepdim=True)))
    return torch.cat(features, dim=1)


def _half_log_mean_square(detail: Tensor) -> Tensor:
    return detail.square().mean(dim=(2, 3)).add(1e-6).log() / 2  # 1e-6: a quarter of a level of 255, squared


def _mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.double()
    mean = features.mean(dim=0)
    return mean, (features - mean).T @ (features - mean) / (len(features) - 1)


def _principal_components(features: Tensor) -> _Projection:
    mean, covariance = _mean_and_covariance(features)
    variances, axes = torch.linalg.eigh(covariance)
    scale = variances[-DIMENSIONS:].sum().clamp(min=1e-12).rsqrt()
    return _Projection(mean.float(), (axes[:, -DIMENSIONS:] * scale).float())


def _project(features: Tensor, projection: _Projection) -> Tensor:
    return (features - projection.mean) @ projection.components
