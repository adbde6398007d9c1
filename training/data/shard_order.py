"""SHARD ORDER: the order of streamed images: shards are shuffled, and images within a window of a few shards.

An epoch takes the shards in a random order, a group of them at a time, and the images of a group in a random order. So
a process needs the shards of one group at a time, and each of them once in an epoch. Like that of Batches, the order is
a pure function of (seed, position) and of the numbers of images in the shards: nothing has to be saved, and any number
of processes sees the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ddpm_pipeline import rng

WINDOW = 65_536  # images that are shuffled together, about


class Group(NamedTuple):
    """Group `number` of an epoch."""

    epoch: int
    number: int


class ShardOrder:
    """Epochs of the images of many shards.

    Args:
        counts: the number of images in each shard.
        train_indices: (N,) int64, ascending: which of the images, numbered through all shards, are trained on.
        seed: of the order.
        window: images that are shuffled together, about; at least two shards.
    """

    def __init__(self, counts: Sequence[int], train_indices: np.ndarray, seed: int, window: int = WINDOW) -> None:
        self.starts = np.cumsum([0, *counts])
        self.train_indices, self._seed = train_indices, seed
        self.bounds = np.searchsorted(train_indices, self.starts)  # of the train indices in each shard
        self._shards = np.flatnonzero(np.diff(self.bounds))
        wanted = max(2, round(window * len(self._shards) / max(1, len(train_indices))))
        self.group_size = max(1, min(wanted, len(self._shards)))  # in shards
        self.num_groups = -(-len(self._shards) // self.group_size)
        self._epoch = lru_cache(maxsize=3)(self._make_epoch)
        self._group = lru_cache(maxsize=3)(self._make_group)

    def groups(self, first: int, last: int) -> list[Group]:
        """The groups of the images at these positions, both included, in the sequence of all epochs."""
        group, end = self._find(first), self._find(last)
        groups = [group]
        while groups[-1] != end:
            groups.append(self.after(groups[-1]))
        return groups

    def after(self, group: Group) -> Group:
        """The next group."""
        is_last = group.number == self.num_groups - 1
        return Group(group.epoch + 1, 0) if is_last else Group(group.epoch, group.number + 1)

    def shards(self, group: Group) -> np.ndarray:
        """The numbers of its shards."""
        start = group.number * self.group_size
        return self._epoch(group.epoch)[0][start : start + self.group_size]

    def indices(self, epoch: int, within: np.ndarray) -> np.ndarray:
        """The images at these positions of an epoch, (b,) int64."""
        _, ends = self._epoch(epoch)
        numbers = np.searchsorted(ends, within, side="right")
        indices = np.empty_like(within)
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            start = ends[number - 1] if number else 0
            indices[chosen] = self._group(Group(epoch, number))[within[chosen] - start]
        return indices

    def _find(self, position: int) -> Group:
        epoch, within = divmod(position, len(self.train_indices))
        return Group(epoch, int(np.searchsorted(self._epoch(epoch)[1], within, side="right")))

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of this epoch, and where in the epoch each group ends."""
        key = rng.key(self._seed, rng.Stream.SHARD_ORDER, epoch)
        shards = self._shards[rng.permutation(key, len(self._shards)).numpy()]
        ends = np.cumsum(self.bounds[shards + 1] - self.bounds[shards])
        last = np.minimum(np.arange(1, self.num_groups + 1) * self.group_size, len(shards)) - 1
        return shards, ends[last]

    def _make_group(self, group: Group) -> np.ndarray:
        """The images of a group in their order."""
        parts = [self.train_indices[self.bounds[i] : self.bounds[i + 1]] for i in self.shards(group)]
        images = np.concatenate(parts)
        key = rng.key(self._seed, rng.Stream.SHARD_ORDER, *group)
        return images[rng.permutation(key, len(images)).numpy()]
