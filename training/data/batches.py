"""Which pictures a step sees: order, flips, scaling to [-1, 1]; all functions of (seed, step, place in the batch)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ddpm_pipeline import rng
from ddpm_pipeline.pixels import from_pixels

MAX_ON_DEVICE = 4 * 2**30  # bytes of pictures that are moved to an accelerator once and for all


class Batches:
    """Batches of pictures. Step s has the pictures s B, ..., (s + 1) B - 1 of an endless row of shuffled passes.

    Args:
        images: (M, C, H, W) uint8 or uint16, in memory or memory-mapped.
        train_indices: which of them, (N,) int64; all by default.
        batch_size: B, of the global batch.
        seed: of order and flips.
        random_flip: mirror half of the pictures, left to right.
        device: where batches shall be.
    """

    def __init__(
        self,
        images: np.ndarray,
        *,
        train_indices: np.ndarray | None = None,
        batch_size: int,
        seed: int,
        random_flip: bool,
        device: torch.device,
    ) -> None:
        self._images = images
        self._train_indices = np.arange(len(images)) if train_indices is None else train_indices
        self._batch_size, self._seed, self._random_flip, self._device = batch_size, seed, random_flip, device
        self._pass, self._order = -1, np.empty(0, dtype=np.int64)
        self._on_device: Tensor | None = None
        if device.type != "cpu" and images.nbytes <= MAX_ON_DEVICE:
            self._on_device = torch.from_numpy(np.array(images)).to(device)

    def indices(self, step: int, place: Tensor) -> np.ndarray:
        """Which pictures are at these places, (b,) int64 in [0, B), on the CPU, of the batch of this step, 0, 1, ..."""
        position = step * self._batch_size + place.numpy()
        passes, within = np.divmod(position, len(self._train_indices))
        return np.array([self._shuffled(number)[i] for number, i in zip(passes.tolist(), within.tolist())])

    def images(self, step: int, place: Tensor) -> Tensor:
        """The pictures at these places: (b, C, H, W) float32 in [-1, 1], on the device."""
        indices = self.indices(step, place)
        if self._on_device is not None:
            batch = self._on_device[torch.from_numpy(indices).to(self._device, non_blocking=True)]
        else:
            batch = torch.from_numpy(self._images[indices]).to(self._device, non_blocking=True)
        x_0 = from_pixels(batch)
        if self._random_flip:
            mirrored = rng.bits(rng.key(self._seed, rng.Stream.FLIP, step), place.to(self._device)) < 0
            x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(-1), x_0)
        return x_0

    def _shuffled(self, number: int) -> np.ndarray:
        """The order of the pictures in pass 0, 1, ...: sorted by a random number for each."""
        if number != self._pass:
            index = torch.arange(len(self._train_indices))
            shuffled = (
                rng.bits(rng.key(self._seed, rng.Stream.SAMPLE_ORDER, number), index).argsort(stable=True).numpy()
            )
            self._order = self._train_indices[shuffled]
            self._pass = number
        return self._order
