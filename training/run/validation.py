"""A loss that means something: of pictures that are held out, with the same noise each time, of the averaged weights.

The loss of a training step is of other pictures, noise and t each time, so it hardly seems to go down. Here all of
these are fixed and t is spread evenly over the walk, so what is left of the change is learning. It is split into bands
of log SNR = log(alpha_bar / (1 - alpha_bar)), as a mean over all t hides that a network still learns the fine details
(high) when it has long learned the outlines (low). Beside it the bound on the bits per dimension, estimated from a few
steps of each picture: see ddpm_pipeline/likelihood.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_pipeline import DDPMScheduler, likelihood, objective, rng
from ddpm_pipeline.pixels import from_pixels, num_levels, to_pixels
from training.data.split import evenly

EDGES = (-4.0, -1.0, 1.0, 4.0)  # of log SNR
STEPS_OF_EACH = 4  # t for one picture
STRATA = 8  # steps of the bound for one picture
SEED = 0  # not the run's: another seed shall be compared by the same noise

Network = Callable[[Tensor, Tensor], Tensor]
Gather = Callable[[list[Any]], list[Any]]  # the values of all processes


class Validation:
    """The held-out pictures of a run, and what is fixed with them.

    Args:
        images: (M, C, H, W) uint8 or uint16.
        number: so many of them, evenly spread, are used.
        share: (process, processes): pictures process, process + processes, ... are measured here.
    """

    def __init__(
        self,
        images: np.ndarray,
        number: int,
        scheduler: DDPMScheduler,
        *,
        device: torch.device,
        batch_size: int = 64,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.pixels = np.asarray(images[evenly(len(images), number)])
        self.number = len(self.pixels)
        self._scheduler, self._device, self._batch_size = scheduler, device, batch_size
        self._index = torch.arange(self.number)[share[0] :: share[1]]
        # Evenly spaced over the walk, each picture with t of its own: a random one of them for each.
        pairs = self.number * STEPS_OF_EACH
        shuffled = rng.bits(rng.key(SEED, rng.Stream.VALIDATION_TIMESTEP), torch.arange(pairs)).argsort(stable=True)
        places = (torch.arange(pairs) + 0.5) / max(1, pairs) * scheduler.num_steps
        self._t = places.long()[shuffled.argsort()].view(self.number, STEPS_OF_EACH)

    @torch.no_grad()
    def measure(self, network: Network, gather: Gather = lambda values: values) -> dict[str, float]:
        """validation_loss, in bands of log SNR too, and bits_per_dim, with the standard error over the images.

        Args:
            network: (x_t, t) to the output, with the EMA weights and without dropout.
            gather: a list of values of this process to the list of those of all processes.
        """
        loss_parts: list[tuple[list[int], list[list[float]]]] = []  # image indices, losses of each at its t
        bits: list[tuple[list[int], list[float]]] = []
        for index in self._index.split(self._batch_size):
            if not len(index):  # more processes than images
                continue
            x_0 = from_pixels(self.pixels[index.numpy()], self._device)
            losses = []
            for k in range(STEPS_OF_EACH):
                eps = rng.normal(
                    rng.key(SEED, rng.Stream.VALIDATION_NOISE, k), index.to(self._device), tuple(x_0.shape[1:])
                )
                lesson = objective.noised_batch(self._scheduler, x_0, self._t[index, k].to(self._device), eps)
                prediction = network(lesson.x_t, lesson.t).float()
                losses.append((prediction - lesson.target).square().flatten(1).mean(1).double().cpu())
            loss_parts.append((index.tolist(), torch.stack(losses, dim=1).tolist()))
            strata = min(STRATA, max(1, self._scheduler.num_steps - 1))
            levels = num_levels(self.pixels.dtype)
            bound = likelihood.variational_bound(
                network, self._scheduler, x_0, index=index, seed=SEED, strata=strata, levels=levels
            )
            bits.append((index.tolist(), likelihood.bits_per_dim(bound.total, x_0.shape[1:]).tolist()))
        # Means and standard errors are of the gathered values, in float64 and in the order of the images: sums of
        # squares would lose the digits of a small variance beside a large mean, and depend on the number of processes.
        loss = self._in_order(gather(loss_parts))
        band = torch.bucketize(self._scheduler.snr(self._t).log(), torch.tensor(EDGES, dtype=torch.float64))
        found = {"validation_loss": loss.mean().item()}
        for number, name in enumerate(bands()):
            if (band == number).any():
                found[f"validation_loss/{name}"] = loss[band == number].mean().item()
        each = self._in_order(gather(bits))
        found["bits_per_dim"] = each.mean().item()
        if self.number > 1:
            found["bits_per_dim_standard_error"] = each.std().item() / math.sqrt(self.number)
        return found

    def _in_order(self, parts: list[tuple[list[int], list[Any]]]) -> Tensor:
        """Values of all images, from the parts that each process measured: float64, (number, ...)."""
        by_index = {i: value for index, values in parts for i, value in zip(index, values)}
        return torch.tensor([by_index[i] for i in range(self.number)], dtype=torch.float64)


def bands() -> list[str]:
    """What the bands of log SNR are called, from noise to picture."""
    edges = [f"{edge:g}" for edge in EDGES]
    between = [f"log_snr_{low}_to_{high}" for low, high in zip(edges, edges[1:])]
    return [f"log_snr_below_{edges[0]}", *between, f"log_snr_above_{edges[-1]}"]


def kernel_distance(samples: Tensor, held_out: np.ndarray, extractor: Any, cache_dir: Path) -> dict[str, float]:
    """The kernel distance (KID's estimator) of samples in [-1, 1] to held-out pictures, with its standard error.

    Nothing, and a warning, if there is none: of a single held-out picture, or of samples that are all alike.
    """
    from ddpm_pipeline import fidelity
    from ddpm_pipeline.features import extract_features

    drawn = to_pixels(samples, held_out.dtype)
    features = extract_features(extractor, drawn)
    try:
        found = fidelity.kernel_distance(features, extract_features(extractor, held_out, cache_dir=cache_dir))
    except ValueError as error:
        print(f"WARNING: no kernel distance: {error}. Training is not touched by it.", file=sys.stderr)
        return {}
    return {"kernel_distance": found.value, "kernel_distance_standard_error": found.standard_error or math.nan}
