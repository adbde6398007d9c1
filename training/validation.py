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

from ddpm_pipeline import DDPMScheduler, chance, likelihood, objective
from training.data import evenly
from training.samples import to_images, to_pixels

EDGES = (-4.0, -1.0, 1.0, 4.0)  # of log SNR
STEPS_OF_EACH = 4  # t for one picture
STRATA = 8  # steps of the bound for one picture
NOISE, PAIRING = 11, 12  # purposes of random numbers, besides those of the package and of batches.py
SEED = 0  # not the run's: another seed shall be compared by the same noise

Network = Callable[[Tensor, Tensor], Tensor]
Total = Callable[[Tensor], Tensor]  # the sum over all processes


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
        shuffled = chance.bits(chance.key(SEED, PAIRING), torch.arange(pairs)).argsort(stable=True)
        places = (torch.arange(pairs) + 0.5) / max(1, pairs) * scheduler.num_steps
        self._t = places.long()[shuffled.argsort()].view(self.number, STEPS_OF_EACH)

    @torch.no_grad()
    def measure(self, network: Network, total: Total = lambda sums: sums) -> dict[str, float]:
        """validation_loss, in bands of log SNR too, and bits_per_dim, with the standard error over the pictures.

        Args:
            network: (x_t, t) to the output, with the averaged weights and without dropout.
            total: the sum of a tensor over the processes.
        """
        band_sums = torch.zeros(2, len(EDGES) + 1, dtype=torch.float64)  # of losses, and how many
        bits = torch.zeros(2, dtype=torch.float64)  # sum and sum of squares
        edges = torch.tensor(EDGES, dtype=torch.float64)
        for index in self._index.split(self._batch_size):
            if not len(index):  # more processes than pictures
                continue
            x_0 = to_images(self.pixels[index.numpy()], self._device)
            for k in range(STEPS_OF_EACH):
                t = self._t[index, k]
                eps = chance.normal(chance.key(SEED, NOISE, k), index.to(self._device), tuple(x_0.shape[1:]))
                lesson = objective.lesson(self._scheduler, x_0, t.to(self._device), eps)
                prediction = network(lesson.x_t, lesson.t).float()
                losses = (prediction - lesson.target).square().flatten(1).mean(1).double().cpu()
                band = torch.bucketize(self._scheduler.snr(t).log(), edges)
                band_sums[0].index_add_(0, band, losses)
                band_sums[1].index_add_(0, band, torch.ones_like(losses))
            strata = min(STRATA, max(1, self._scheduler.num_steps - 1))
            levels = likelihood.levels_of(self.pixels)
            bound = likelihood.bound(
                network, self._scheduler, x_0, index=index, seed=SEED, strata=strata, levels=levels
            )
            each = likelihood.bits_per_dim(bound.total, x_0.shape[1:]).cpu()
            bits += torch.stack([each.sum(), each.square().sum()])
        summed = total(torch.cat([band_sums.flatten(), bits]).float().to(self._device)).double().cpu()
        losses, counts = summed[: band_sums.numel()].view(2, -1)
        mean = (summed[-2] / self.number).item()
        variance = max(0.0, (summed[-1] / self.number).item() - mean**2)
        found = {"validation_loss": (losses.sum() / counts.sum()).item()}
        found |= {
            f"validation_loss/{name}": (loss / count).item()
            for name, loss, count in zip(bands(), losses, counts)
            if count
        }
        found |= {"bits_per_dim": mean}
        if self.number > 1:
            found |= {"bits_per_dim_standard_error": math.sqrt(variance / (self.number - 1))}
        return found


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

    drawn = to_pixels(samples, held_out.dtype)
    features = fidelity.features_of(extractor, drawn)
    try:
        found = fidelity.kernel_distance(features, fidelity.features_of(extractor, held_out, cache_dir=cache_dir))
    except ValueError as error:
        print(f"WARNING: no kernel distance: {error}. Training is not touched by it.", file=sys.stderr)
        return {}
    return {"kernel_distance": found.value, "kernel_distance_standard_error": found.standard_error or math.nan}
