"""VALIDATION: held-out loss, bits per dimension, and the distance between samples and held-out images, during training.

Each step measures the training loss on other images, noise and timesteps, so it is noisy and hardly seems to fall. Here
all three are fixed and the timesteps are evenly spaced, so only the network changes from one validation to the next.
The loss is also reported in bands of log SNR = log(alpha_bar / (1 - alpha_bar)), because its mean over all timesteps
hides that the network still learns fine details (high SNR) long after the outlines (low SNR). Bits per dimension are
the variational bound, estimated from a few timesteps per image: see ddpm_pipeline/likelihood.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ddpm_pipeline import DDPMScheduler, likelihood, objective, rng
from ddpm_pipeline.pixels import from_pixels, num_levels, to_pixels
from training.data.split import evenly_spaced
from training.run.record import bits_caveat
from training.run.sampling import images_at_once

if TYPE_CHECKING:
    from ddpm_pipeline.features import Extractor
    from training.config import Config
    from training.run.best import Best
    from training.run.inputs import Inputs
    from training.run.log import Log
    from training.run.runtime import Runtime
    from training.run.sampling import EMASampler

BAND_EDGES = (-4.0, -1.0, 1.0, 4.0)  # of log SNR
TIMESTEPS_PER_IMAGE = 4  # for the loss
STRATA = 8  # timesteps per image for the bound
SEED = 0  # not the run's seed: runs with different seeds are validated with the same noise

Network = Callable[..., Tensor]  # of x_t, t and, if there are labels, class_labels=
Gather = Callable[[list[Any]], list[Any]]  # maps the values of this rank to those of all ranks


class Validator:
    """Measures the EMA weights of a run on held-out images, on all ranks, logs the result and tells `best`."""

    def __init__(
        self, config: Config, runtime: Runtime, inputs: Inputs, sampler: EMASampler, log: Log, best: Best
    ) -> None:
        split, classes = inputs.split, inputs.classes
        self._num_samples, self._num_inference_steps = config.validation_samples, config.ddpm_num_inference_steps
        self._sample_labels = None if classes is None else classes.of_samples(np.arange(config.validation_samples))
        self._runtime, self._sampler, self._log, self._best = runtime, sampler, log, best
        self._held_out = split.held_out
        self._feature_cache = Path(config.cache_dir).expanduser() / "features"
        self._validation = Validation(
            split.held_out,
            config.num_validation_images,
            sampler.scheduler,
            labels=None if classes is None else classes.held_out,
            device=runtime.device,
            batch_size=None if config.train_batch_size == "auto" else config.train_batch_size,
            rank=runtime.rank,
            world_size=runtime.world_size,
        )
        self._extractor = None
        if self._num_samples and self._validation.num_images and runtime.is_main:
            from ddpm_pipeline.features import make_extractor

            of_training = split.in_memory()
            self._extractor = make_extractor(
                config.extractor,
                images=of_training.train_images,
                labels=of_training.train_labels(),
                cache_dir=self._feature_cache,
                device=runtime.device,
            )

    @property
    def network_images(self) -> int:
        """How many images go through the network in one validation, roughly."""
        of_samples = self._num_samples * self._num_inference_steps
        return self._validation.num_images * (TIMESTEPS_PER_IMAGE + STRATA + 1) + of_samples

    def validate(self, step: int, images_seen: int) -> str | None:
        """Measure and log. Returns a summary for the progress bar, which is empty if there are no held-out images.

        None, on all ranks, and nothing is logged, if a signal ends the run before all is measured.
        """
        if not self._validation.num_images:
            return ""
        unet = self._sampler.unet
        with self._sampler.ema_weights(), self._runtime.autocast():
            metrics, losses = self._validation.measure(
                lambda x_t, t, **labels: unet(x_t, t, return_dict=False, **labels)[0],
                gather=self._runtime.gather_objects,
            )
        if self._num_samples:
            samples = self._sampler.draw(step, self._num_samples, self._sample_labels)
            if samples is None and self._sampler.is_interrupted():
                return None
            if samples is not None and self._extractor is not None:
                metrics |= kernel_distance(samples, self._held_out, self._extractor, self._feature_cache)
            metrics = self._runtime.broadcast(metrics)  # rank 0 alone has the extractor
        self._best.see(step, metrics, losses)
        self._log.metrics(step, images=images_seen, **metrics)
        summary = f"held-out loss {metrics['validation_loss']:.4f}"
        scheduler = self._sampler.scheduler
        if bits_caveat(scheduler.prediction_type, scheduler.variance_type) is None:
            summary += f", {metrics['bits_per_dim']:.2f} bits/dim"
        if "kernel_distance" in metrics:
            summary += f", kernel distance {metrics['kernel_distance']:.4f}"
        return summary


class Validation:
    """Held-out images with fixed noise and timesteps.

    Args:
        images: (M, C, H, W) uint8 or uint16.
        num_images: number of them to use, evenly spaced.
        labels: (M,) int64, of the images; None: the network takes none.
        batch_size: images per forward pass; None: as many as for sampling.
        rank, world_size: this process measures images rank, rank + world_size, ...
    """

    def __init__(
        self,
        images: np.ndarray,
        num_images: int,
        scheduler: DDPMScheduler,
        *,
        labels: np.ndarray | None = None,
        device: torch.device,
        batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        chosen = evenly_spaced(len(images), num_images)
        self.pixels = np.asarray(images[chosen])
        self._labels = None if labels is None else torch.from_numpy(labels[chosen])
        self.num_images = len(self.pixels)
        self._scheduler, self._device = scheduler, device
        self._batch_size = batch_size or images_at_once(*images.shape[2:])
        self._index = torch.arange(self.num_images)[rank::world_size]
        # Evenly spaced over all timesteps, in random order, so that no image gets only small or only large ones.
        pairs = self.num_images * TIMESTEPS_PER_IMAGE
        evenly_spaced_t = ((torch.arange(pairs) + 0.5) / max(1, pairs) * scheduler.num_steps).long()
        order = rng.permutation(rng.key(SEED, rng.Stream.VALIDATION_TIMESTEP), pairs).argsort()
        self._t = evenly_spaced_t[order].view(self.num_images, TIMESTEPS_PER_IMAGE)

    @torch.no_grad()
    def measure(self, network: Network, gather: Gather = lambda values: values) -> tuple[dict[str, float], list[float]]:
        """validation_loss, also per band of log SNR, and bits_per_dim with its standard error over the images.

        Beside these metrics the loss of each image, of which validation_loss is the mean.

        Args:
            network: maps (x_t, t) and the labels to the prediction, with EMA weights and without dropout.
            gather: Runtime.gather_objects if there are several ranks.
        """
        losses: list[tuple[list[int], list[list[float]]]] = []  # per batch: image indices; losses at each image's t
        bits: list[tuple[list[int], list[float]]] = []
        for index in self._index.split(self._batch_size):
            if not len(index):  # with more ranks than images, some ranks have none
                continue
            x_0 = from_pixels(self.pixels[index.numpy()], self._device)
            of_batch = network
            if self._labels is not None:
                of_batch = partial(network, class_labels=self._labels[index].to(self._device))
            losses.append((index.tolist(), self._losses(of_batch, x_0, index).tolist()))
            bound = likelihood.variational_bound(
                of_batch,
                self._scheduler,
                x_0,
                index=index,
                seed=SEED,
                strata=min(STRATA, max(1, self._scheduler.num_steps - 1)),
                levels=num_levels(self.pixels.dtype),
            )
            bits.append((index.tolist(), likelihood.bits_per_dim(bound.total, x_0.shape[1:]).tolist()))
        # Means and standard errors are computed from the gathered values, in float64 and in the order of the images.
        # Sums of squares per rank would depend on the world size, and lose the digits of a small variance.
        loss = self._in_order(gather(losses))
        band = torch.bucketize(self._scheduler.snr(self._t).log(), torch.tensor(BAND_EDGES, dtype=torch.float64))
        metrics = {"validation_loss": loss.mean().item()}
        for i, name in enumerate(band_names()):
            if (band == i).any():
                metrics[f"validation_loss/{name}"] = loss[band == i].mean().item()
        bits_per_dim = self._in_order(gather(bits))
        metrics["bits_per_dim"] = bits_per_dim.mean().item()
        if self.num_images > 1:
            metrics["bits_per_dim_standard_error"] = bits_per_dim.std().item() / math.sqrt(self.num_images)
        return metrics, loss.mean(dim=1).tolist()

    def _losses(self, network: Network, x_0: Tensor, index: Tensor) -> Tensor:
        """Mean squared error of each image at each of its timesteps: (B, TIMESTEPS_PER_IMAGE), float64, on the CPU."""
        losses = []
        for k in range(TIMESTEPS_PER_IMAGE):
            key = rng.key(SEED, rng.Stream.VALIDATION_NOISE, k)
            eps = rng.normal(key, index.to(self._device), tuple(x_0.shape[1:]))
            batch = objective.noised_batch(self._scheduler, x_0, self._t[index, k].to(self._device), eps)
            prediction = network(batch.x_t, batch.t)[:, : x_0.shape[1]].float()  # without a learned variance
            losses.append((prediction - batch.target).square().flatten(1).mean(1).cpu().double())
        return torch.stack(losses, dim=1)

    def _in_order(self, parts: list[tuple[list[int], list[Any]]]) -> Tensor:
        """The values of all batches in the order of the images: (num_images, ...), float64."""
        by_index = {i: value for index, values in parts for i, value in zip(index, values)}
        return torch.tensor([by_index[i] for i in range(self.num_images)], dtype=torch.float64)


def band_names() -> list[str]:
    """Names of the bands of log SNR, from low (noise) to high (image)."""
    edges = [f"{edge:g}" for edge in BAND_EDGES]
    between = [f"log_snr_{low}_to_{high}" for low, high in zip(edges, edges[1:])]
    return [f"log_snr_below_{edges[0]}", *between, f"log_snr_above_{edges[-1]}"]


def kernel_distance(samples: Tensor, held_out: np.ndarray, extractor: Extractor, cache_dir: Path) -> dict[str, float]:
    """Kernel distance between samples in [-1, 1] and held-out images, with its standard error.

    Where it is not defined, for a single held-out image or if all samples are equal, it warns and returns {}.
    """
    from ddpm_pipeline import fidelity
    from ddpm_pipeline.features import extract_features

    sample_features = extract_features(extractor, to_pixels(samples, held_out.dtype))
    held_out_features = extract_features(extractor, held_out, cache_dir=cache_dir)
    try:
        distance = fidelity.kernel_distance(sample_features, held_out_features, extractor.kernel)
    except ValueError as error:
        print(f"WARNING: kernel distance skipped: {error}. Training continues.", file=sys.stderr)
        return {}
    standard_error = distance.standard_error or math.nan
    return {"kernel_distance": distance.value, "kernel_distance_standard_error": standard_error}
