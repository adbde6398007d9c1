"""INTERPOLATION: images between two images, or among several, along a path through latents or noised images.

The pixel mean of a full and a half moon is a grey double exposure; these paths pass through a three-quarter moon:

    latent  DDIM inversion of the endpoints, spherical interpolation between their latents, sampling with eta = 0
    noise   the pixel mean of the endpoints, noised to an index t and sampled from there (SDEdit)

Equal steps along a path are not equal steps between the images: much of a path may look like one endpoint. A
distance-balanced weight is the one that gives a wanted ratio of distances to the endpoints, found by bisection.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from .denoiser import Denoiser
from .images import squared_pixel_distance
from .inversion import ddim_sample
from .precision import as_float64
from .scheduling_ddpm import DDPMScheduler

Distance = Callable[[Tensor, Tensor], Tensor]  # two batches of images in [-1, 1] to (B,), each at least 0
ImageAt = Callable[[Tensor, Tensor], Tensor]  # indices of endpoint sets (M,), weights (M, N) to images (M, C, H, W)

MAX_BISECTIONS = 16  # then the weight is known to 2^-16


@dataclass
class FusionOutput(BaseOutput):
    """Output of `fuse`.

    Args:
        images: in the given output_type, pair by pair, and for each pair weight by weight.
        weights: the interpolation weight of each image; with balance, the one that bisection found.
        distance_ratios: d(a, x) / (d(a, x) + d(b, x)) of each image x between two images, 0 at a and 1 at b; None for
            more than two.
        network_calls: number of calls of the network, each for a batch.
        double_exposures: for each image whether it looks like two laid over each other: see `is_double_exposure`.
    """

    images: Any
    weights: list[Any]
    distance_ratios: list[float] | None
    network_calls: int
    double_exposures: list[bool] | None = None


class Interpolation(NamedTuple):
    """B = P K images (B, C, H, W), the weights (B, N) of their endpoints and, if N is 2, their distance ratios (B,)."""

    images: Tensor
    weights: Tensor
    distance_ratios: Tensor | None
    double_exposures: list[bool]


def stack_endpoints(a: Tensor, b: Tensor | None) -> Tensor:
    """P sets of N endpoints, (P, N, C, H, W): pairs of two batches, or one set of all images of a."""
    if b is None:
        return a[None]
    if a.shape != b.shape:
        raise ValueError(f"image_a has shape {tuple(a.shape)} and image_b {tuple(b.shape)}: they must be equal")
    return torch.stack([a, b], dim=1)


def check_weights(weight: Any, num_images: int, several: bool) -> Tensor:
    """Interpolation weights as (K, N) float64: for each of K results the weights of N images, with sum 1.

    Args:
        several: weight lists the weights of all N images; else it is that of the second of two.
    """
    allowed = f"{num_images} numbers of at least 0 with sum 1, or lists of them" if several else "numbers from 0 to 1"
    try:
        if np.array(weight).dtype.kind not in "iuf":  # numpy reads a text as a number
            raise ValueError
        values = torch.as_tensor(np.array(weight, dtype=np.float64))
    except (TypeError, ValueError):
        raise ValueError(f"weight is {weight!r}: give {allowed}") from None
    if several:
        weights = values[None] if values.ndim == 1 else values
        valid = weights.ndim == 2 and weights.shape[1] == num_images and len(weights) > 0
        valid = valid and bool((weights >= 0).all()) and bool(((weights.sum(1) - 1).abs() < 1e-6).all())
    else:
        second = values.reshape(-1)
        weights = torch.stack([1 - second, second], dim=1)
        valid = values.ndim <= 1 and len(second) > 0 and bool(((second >= 0) & (second <= 1)).all())
    if not valid:
        raise ValueError(f"weight is {weight!r}: give {allowed}")
    return weights


# ---- Paths -----------------------------------------------------------------------------------------------------------


def latent_path(denoiser: Denoiser, scheduler: DDPMScheduler, latents: Tensor, timesteps: Sequence[int]) -> ImageAt:
    """The path through latents: their spherical mean, sampled without noise.

    Args:
        latents: of P sets of N endpoints, from `ddim_invert`, (P, N, C, H, W).
        timesteps: descending, those of the inversion.
    """

    def image_at(index: Tensor, weights: Tensor) -> Tensor:
        mean = spherical_mean(latents[index], weights)
        return ddim_sample(denoiser, scheduler, mean, timesteps).clamp(-1, 1)

    return image_at


def noise_path(
    image_to_image: Callable[[Tensor, list[int]], Tensor], endpoints: Tensor, seeds: Sequence[int]
) -> ImageAt:
    """The path through noised pixel means. All images of one set of endpoints get the same noise.

    The mean is taken before the noise is added. The mean of two images with independent noise would have noise of
    standard deviation 0.71 where the network expects 1.

    Args:
        image_to_image: (images, one seed for each) to images: noises and samples them.
        endpoints: (P, N, C, H, W).
        seeds: one for each set of endpoints.
    """

    def image_at(index: Tensor, weights: Tensor) -> Tensor:
        weights = weights.to(endpoints.dtype).to(endpoints.device)
        mean = torch.einsum("mn,mnchw->mchw", weights, endpoints[index])
        return image_to_image(mean, [seeds[i] for i in index.tolist()]).clamp(-1, 1)

    return image_at


def spherical_mean(latents: Tensor, weights: Tensor, max_iterations: int = 100) -> Tensor:
    """Weighted mean on the sphere; of two latents it is the point on their great circle (slerp).

    The direction minimizes the weighted sum of squared angles (Buss and Fillmore 2001, algorithm A1). The norm is the
    weighted mean of the norms, so the mean has a norm that the network has seen; the straight mean is shorter.

    Args:
        latents: (M, N, C, H, W), N for each mean.
        weights: (M, N), not negative, each row with sum 1.
    Returns:
        (M, C, H, W), dtype of latents. A weight of exactly 1 returns that latent, bit for bit.
    """
    points = as_float64(latents).flatten(2)  # (M, N, D)
    w = as_float64(weights).to(points.device)[..., None]  # (M, N, 1)
    norms = points.norm(dim=2, keepdim=True)
    units = points / norms.clamp(min=1e-30)
    direction = _normalize((w * units).sum(1, keepdim=True))  # (M, 1, D)
    for _ in range(max_iterations):
        cosine = (direction * units).sum(2, keepdim=True)
        tangent = units - cosine * direction  # from the mean towards each point, orthogonal to the mean
        sine = tangent.norm(dim=2, keepdim=True)
        step = (w * torch.atan2(sine, cosine) * tangent / sine.clamp(min=1e-30)).sum(1, keepdim=True)
        angle = step.norm(dim=2, keepdim=True)
        direction = _normalize(angle.cos() * direction + angle.sin() * step / angle.clamp(min=1e-30))
        if angle.max() < 1e-12:
            break
    mean = direction[:, 0] * (w * norms).sum(1)
    is_endpoint, endpoint = (weights == 1).any(1), weights.argmax(1)
    mean[is_endpoint] = points[is_endpoint, endpoint[is_endpoint]]
    return mean.unflatten(1, latents.shape[2:]).to(latents.dtype).to(latents.device)


def _normalize(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-30)


# ---- Distances and balance -------------------------------------------------------------------------------------------


def distance_ratio(distance: Distance, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """d(a, x) / (d(a, x) + d(b, x)): 0 at a, 1 at b.

    Raises:
        ValueError: the distance does not give a number for each image that is 0 or more.
    """
    distances = distance(a, x), distance(b, x)
    for d in distances:
        if not isinstance(d, Tensor) or d.shape != x.shape[:1]:
            found = tuple(d.shape) if isinstance(d, Tensor) else type(d).__name__
            raise ValueError(f"distance gives {found} for two batches of {len(x)} images: give numbers, ({len(x)},)")
        if not (d >= -1e-5).all() or d.isinf().any():  # 1 - cosine is rounded to less than 0
            raise ValueError(f"distance gives {d.tolist()}: give finite numbers of 0 or more")
    to_a, to_b = (d.clamp(min=0) for d in distances)
    return to_a / (to_a + to_b).clamp(min=1e-30)


def is_double_exposure(images: Tensor, endpoints: Tensor, weights: Tensor) -> list[bool]:
    """Whether each image is clearly nearer to the mean of the pixels than to one that has each pixel of some endpoint.

    A model that is trained too little gives such images. It is the most that can be known without the data.

    Args:
        images: K for each of P sets of endpoints, (P K, C, H, W).
        endpoints: (P, N, C, H, W). Of two the mean is taken with the weights at which it is nearest.
        weights: (P K, N), of the endpoints; used if N is not 2.
    """
    points = endpoints.repeat_interleave(len(images) // len(endpoints), dim=0).flatten(2)  # (P K, N, C H W)
    x, w = images.flatten(1), weights.to(points.dtype).to(points.device)
    if points.shape[1] == 2:
        a, difference = points[:, 0], points[:, 1] - points[:, 0]
        second = ((x - a) * difference).sum(1) / difference.square().sum(1).clamp(min=1e-30)
        w = torch.stack([1 - second.clamp(0, 1), second.clamp(0, 1)], dim=1)
    to_mean = (x - (w[..., None] * points).sum(1)).square().mean(1)
    to_one_of_them = (x[:, None] - points).square().amin(1).mean(1)
    between = to_one_of_them > 0.02 * 2 * points.var(dim=1).mean(1)  # an endpoint comes back with an error
    return (between & (2 * to_mean < to_one_of_them)).tolist()


def _warn_if_outside(images: Tensor, endpoints: Tensor) -> None:
    """Warn of images on a latent path between two that are farther from both than these are from each other.

    Noise is such an image, at a distance ratio of about one half.

    Args:
        images: K for each of P pairs, (P K, C, H, W).
        endpoints: (P, 2, C, H, W).
    """
    a, b = endpoints.repeat_interleave(len(images) // len(endpoints), dim=0).unbind(1)
    apart = squared_pixel_distance(a, b)
    outside = (squared_pixel_distance(images, a) > apart) & (squared_pixel_distance(images, b) > apart) & (apart > 0)
    if outside.any():
        warnings.warn(
            f"{int(outside.sum())} of {len(images)} images are farther from both endpoints than these are from each "
            "other, so they are not between them: the model may be trained too little, or the steps too few",
            stacklevel=5,
        )


def interpolate(
    image_at: ImageAt,
    endpoints: Tensor,
    weights: Tensor,
    *,
    balance: bool = False,
    distance: Distance = squared_pixel_distance,
    tolerance: float = 0.005,
    deterministic: bool = False,
) -> Interpolation:
    """K images for each of P sets of endpoints, at given weights or, with balance, at given distance ratios.

    Args:
        image_at: a path, `latent_path` or `noise_path`.
        endpoints: (P, N, C, H, W).
        weights: (K, N), float64, on the CPU; with balance N is 2 and weights[:, 1] are the wanted ratios.
        tolerance: of the distance ratio, with balance.
        deterministic: the path adds no noise, so its images should lie between two endpoints: if not, this warns.
    """
    num_sets, num_endpoints = endpoints.shape[:2]
    set_index = torch.arange(num_sets).repeat_interleave(len(weights))
    weights = weights.repeat(num_sets, 1)

    def ratio_of(which: Tensor, images: Tensor) -> Tensor:
        a, b = endpoints[set_index[which]].unbind(1)
        return distance_ratio(distance, images, a, b)

    def balanced_image_at(which: Tensor, weight: Tensor) -> Tensor:
        return image_at(set_index[which], torch.stack([1 - weight, weight], dim=1))

    if balance:
        weight, images = bisect_weights(balanced_image_at, ratio_of, weights[:, 1], tolerance=tolerance)
        weights = torch.stack([1 - weight, weight], dim=1)
    else:
        images = image_at(set_index, weights)
    all_indices = torch.arange(len(weights))
    if deterministic and num_endpoints == 2:
        _warn_if_outside(images, endpoints)
    ratios = ratio_of(all_indices, images) if num_endpoints == 2 else None
    return Interpolation(images, weights, ratios, is_double_exposure(images, endpoints, weights))


def bisect_weights(
    image_at: Callable[[Tensor, Tensor], Tensor],
    ratio_of: Callable[[Tensor, Tensor], Tensor],
    target_ratios: Tensor,
    *,
    tolerance: float = 0.005,
    max_bisections: int = MAX_BISECTIONS,
) -> tuple[Tensor, Tensor]:
    """Distance-balanced weights: the weights with the wanted distance ratios, by bisection of all paths at once.

    Sampling without noise is continuous, and the ratio is 0 at weight 0 and 1 at weight 1, so every ratio between is
    reached somewhere. Where the path is too steep for bisection to come within the tolerance, the nearest image found
    is returned.

    Args:
        image_at: (indices of targets (M,), weights (M,)) to images (M, C, H, W).
        ratio_of: (indices of targets (M,), images) to distance ratios (M,).
        target_ratios: (N,), float64, in [0, 1], on the CPU; 0 and 1 are the endpoints themselves.
    Returns:
        weights (N,) in [0, 1] and images (N, C, H, W): of all evaluated, the nearest to the target.
    """
    low, high = torch.zeros_like(target_ratios), torch.ones_like(target_ratios)
    low, high = torch.where(target_ratios == 1, high, low), torch.where(target_ratios == 0, low, high)
    best_weights, error = (low + high) / 2, torch.full_like(target_ratios, math.inf)
    best_images: Tensor | None = None
    for _ in range(max_bisections):
        which = (error > tolerance).nonzero().flatten()
        if best_images is not None:
            which = which[(low < high)[which]]  # the endpoints are evaluated once
        if not len(which):
            break
        middle = (low[which] + high[which]) / 2
        images = image_at(which, middle)
        ratios = ratio_of(which, images).cpu().double()
        if best_images is None:
            best_images = images.clone()
        new_error = (ratios - target_ratios[which]).abs()
        better = new_error < error[which]
        improved = which[better]
        best_images[improved], best_weights[improved] = images[better], middle[better]
        error[improved] = new_error[better]
        below = ratios < target_ratios[which]
        low[which[below]], high[which[~below]] = middle[below], middle[~below]
    assert best_images is not None
    return best_weights, best_images
