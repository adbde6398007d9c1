"""BATCHES: which images an optimizer step sees, in which order, and mirrored or not.

Everything is a pure function of (seed, step, index in the global batch). So nothing has to be saved to resume a run,
and one process or four see the same global batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ddpm_pipeline import rng
from ddpm_pipeline.pixels import from_pixels
from ddpm_pipeline.transfer import to_device

MAX_ON_DEVICE = 4 * 2**30  # bytes; a data set of up to this size is copied to the accelerator once


class Batches:
    """Batches of images in [-1, 1].

    The epochs, each shuffled, form one endless sequence. Step s takes its images s B to (s + 1) B - 1, so a batch may
    span two epochs.

    Args:
        images: (M, C, H, W) uint8 or uint16, in memory or memory-mapped.
        train_indices: (N,) int64, which of them to use; default: all.
        batch_size: B, the global batch.
        seed: of the order and the flips.
        random_flip: flip half of the images horizontally, at random.
        device: of the returned batches.
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
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)  # of the epoch that was shuffled last
        self._on_device: Tensor | None = None
        if device.type != "cpu" and images.nbytes <= MAX_ON_DEVICE:
            self._on_device = torch.from_numpy(np.array(images)).to(device)

    def indices(self, step: int, index: Tensor) -> np.ndarray:
        """Indices into `images` of these images of the global batch, (b,) int64.

        Args:
            step: optimizer step, 0, 1, ...
            index: (b,) int64 in [0, B), index in the global batch, on the CPU.
        """
        position = step * self._batch_size + index.numpy()
        epochs, within = np.divmod(position, len(self._train_indices))
        indices = np.empty_like(position)
        for epoch in np.unique(epochs).tolist():
            indices[epochs == epoch] = self._shuffled(epoch)[within[epochs == epoch]]
        return indices

    def images(self, step: int, index: Tensor) -> Tensor:
        """The images at these indices of the global batch: (b, C, H, W) float32 in [-1, 1], on the device."""
        indices = self.indices(step, index)
        if self._on_device is not None:
            batch = self._on_device[to_device(torch.from_numpy(indices), self._device)]
        else:
            batch = to_device(torch.from_numpy(self._images[indices]), self._device)
        x_0 = from_pixels(batch)
        if self._random_flip:
            mirrored = rng.bits(rng.key(self._seed, rng.Stream.FLIP, step), to_device(index, self._device)) < 0
            x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(-1), x_0)
        return x_0

    def _shuffled(self, epoch: int) -> np.ndarray:
        """The train indices in the order of this epoch: sorted by one random number for each."""
        if epoch != self._epoch:
            key = rng.key(self._seed, rng.Stream.SAMPLE_ORDER, epoch)
            random_bits = rng.bits(key, torch.arange(len(self._train_indices)))
            self._order = self._train_indices[random_bits.argsort(stable=True).numpy()]
            self._epoch = epoch
        return self._order
