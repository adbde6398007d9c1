"""BATCHES: which images an optimizer step sees, in which order, mirrored or turned, and their labels.

Everything is a pure function of (seed, step, index in the global batch). So nothing has to be saved to resume a run,
and one process or four see the same global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ddpm_pipeline import rng
from ddpm_pipeline.pixels import from_pixels
from ddpm_pipeline.transfer import to_device
from training.data.sizes import check_square

if TYPE_CHECKING:
    from training.data.shard_stream import ShardStream

MAX_ON_DEVICE = 4 * 2**30  # bytes; a data set of up to this size is copied to the accelerator once


@dataclass(frozen=True)
class Labels:
    """The classes of the images, and how they are used.

    Args:
        labels: (M,) int64 in [0, num_classes), of every image.
        num_classes: K, without the null class.
        dropout: probability of the null class, K, instead of the label.
        balance: how often a class of n images is drawn, relative to others: "none" n, "sqrt" sqrt(n), "equal" 1.
    """

    labels: np.ndarray
    num_classes: int
    dropout: float = 0.0
    balance: str = "none"


def draws_per_epoch(counts: np.ndarray, balance: str) -> np.ndarray:
    """How often each class is drawn in an epoch: (K,) int64, at least 1 for a class with images, about N in all.

    Args:
        counts: (K,) int64, the numbers of images of the classes, N in all.
        balance: "none", "sqrt" or "equal", see Labels.
    """
    weights = counts.astype(np.float64) ** {"none": 1.0, "sqrt": 0.5, "equal": 0.0}[balance] * (counts > 0)
    return np.maximum(np.rint(counts.sum() * weights / weights.sum()).astype(np.int64), counts > 0)


class Batches:
    """Batches of images in [-1, 1].

    The epochs, each shuffled, form one endless sequence. Step s takes its images s B to (s + 1) B - 1, so a batch may
    span two epochs. An epoch has every image once; with balanced classes it has every class as often as
    `draws_per_epoch` says, and of a class every image is drawn once before any is drawn twice.

    Args:
        images: (M, C, H, W) uint8 or uint16, in memory or memory-mapped.
        train_indices: (N,) int64, which of them to use; default: all.
        batch_size: B, the global batch.
        seed: of the order, the flips and turns, and the dropout of labels.
        random_flip: flip half of the images horizontally, at random.
        random_vertical_flip: flip half of the images vertically, at random.
        random_rotate90: turn each image by 0, 1, 2 or 3 quarter turns, at random.
        labels: of the images; None: they have none.
        stream: of images in shards, which have another order, see shard_order.py; None: they are in one array.
        device: of the returned batches.
    Raises:
        ValueError: quarter turns of images that are not square.
    """

    def __init__(
        self,
        images: np.ndarray,
        *,
        train_indices: np.ndarray | None = None,
        batch_size: int,
        seed: int,
        random_flip: bool = False,
        random_vertical_flip: bool = False,
        random_rotate90: bool = False,
        labels: Labels | None = None,
        stream: ShardStream | None = None,
        device: torch.device,
    ) -> None:
        self._images, self._labels, self.stream = images, labels, stream
        self._train_indices = np.arange(len(images)) if train_indices is None else train_indices
        self._batch_size, self._seed, self._device = batch_size, seed, device
        self._random_flip, self._random_vertical_flip = random_flip, random_vertical_flip
        self._random_rotate90 = random_rotate90
        if random_rotate90:
            check_square(*images.shape[2:])
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)  # of the epoch that was shuffled last
        self._epoch_length = len(self._train_indices)
        self._classes: list[np.ndarray] | None = None  # the train indices of each class, if they are balanced
        if labels is not None and labels.balance != "none":
            of_images = labels.labels[self._train_indices]
            self._classes = [self._train_indices[of_images == label] for label in range(labels.num_classes)]
            self._draws = draws_per_epoch(np.array([len(images) for images in self._classes]), labels.balance)
            self._epoch_length = int(self._draws.sum())
        self._on_device: Tensor | None = None
        if device.type != "cpu" and images.nbytes <= MAX_ON_DEVICE and stream is None:
            self._on_device = torch.from_numpy(np.array(images)).to(device)

    def indices(self, step: int, index: Tensor) -> np.ndarray:
        """Indices into `images` of these images of the global batch, (b,) int64.

        Args:
            step: optimizer step, 0, 1, ...
            index: (b,) int64 in [0, B), index in the global batch, on the CPU.
        """
        position = step * self._batch_size + index.numpy()
        epochs, within = np.divmod(position, self._epoch_length)
        indices = np.empty_like(position)
        for epoch in np.unique(epochs).tolist():
            in_epoch = within[epochs == epoch]
            if self.stream is not None:
                indices[epochs == epoch] = self.stream.order.indices(epoch, in_epoch)
            else:
                indices[epochs == epoch] = self._shuffled(epoch)[in_epoch]
        return indices

    def batch(self, step: int, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The images at these indices of the global batch, and their labels with dropout, on the device.

        Returns:
            (b, C, H, W) float32 in [-1, 1], and (b,) int64, or None if the images have no labels.
        """
        indices, labels = self.indices(step, index), None
        if self.stream is not None:
            indices = self.stream.readable(indices)
        if self._on_device is not None:
            pixels = self._on_device[to_device(torch.from_numpy(indices), self._device)]
        else:
            pixels = to_device(torch.from_numpy(self._images[indices]), self._device)
        if self._labels is not None:
            dropped = rng.uniform(rng.key(self._seed, rng.Stream.LABEL_DROPOUT, step), index) < self._labels.dropout
            labels = torch.from_numpy(self._labels.labels[indices]).masked_fill(dropped, self._labels.num_classes)
            labels = to_device(labels, self._device)
        return self._augmented(from_pixels(pixels), step, to_device(index, self._device)), labels

    def close(self) -> None:
        """End what fetches images in the background."""
        if self.stream is not None:
            self.stream.close()

    def _augmented(self, x_0: Tensor, step: int, index: Tensor) -> Tensor:
        """The images flipped and turned. How is independent for each operation, step and index."""
        for is_wanted, stream, dim in (
            (self._random_flip, rng.Stream.FLIP, -1),
            (self._random_vertical_flip, rng.Stream.VERTICAL_FLIP, -2),
        ):
            if is_wanted:
                mirrored = rng.bits(rng.key(self._seed, stream, step), index) < 0
                x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(dim), x_0)
        if self._random_rotate90:
            turns = rng.integers(rng.key(self._seed, rng.Stream.QUARTER_TURN, step), index, 4)[:, None, None, None]
            x_0 = torch.where(turns % 2 == 1, x_0.rot90(1, (-2, -1)), x_0)
            x_0 = torch.where(turns >= 2, x_0.flip(-2, -1), x_0)  # a half turn
        return x_0

    def _shuffled(self, epoch: int) -> np.ndarray:
        """Indices into `images` in the order of this epoch."""
        if epoch != self._epoch:
            key = rng.key(self._seed, rng.Stream.SAMPLE_ORDER, epoch)
            shuffled = rng.permutation(key, self._epoch_length).numpy()
            self._order = self._train_indices[shuffled] if self._classes is None else self._balanced(epoch, shuffled)
            self._epoch = epoch
        return self._order

    def _balanced(self, epoch: int, shuffled: np.ndarray) -> np.ndarray:
        """`shuffled` decides which class is drawn when. Each class has epochs of its own, shuffled, over all epochs."""
        assert self._classes is not None
        classes = np.repeat(np.arange(len(self._draws)), self._draws)[shuffled]
        order = np.empty_like(classes)
        for label, (images, draws) in enumerate(zip(self._classes, self._draws.tolist())):
            if not draws:
                continue
            first, last = epoch * draws // len(images), -(-(epoch + 1) * draws // len(images))  # epochs of the class
            key = rng.key(self._seed, rng.Stream.SAMPLE_ORDER, label, 0)
            random_bits = rng.bits(key, torch.arange(first * len(images), last * len(images)))
            drawn = images[random_bits.view(-1, len(images)).argsort(dim=1, stable=True).numpy()].ravel()
            start = epoch * draws - first * len(images)
            order[classes == label] = drawn[start : start + draws]
        return order
