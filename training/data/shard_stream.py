"""SHARD STREAM: the images of shards in the order of training, fetched in the background a group ahead.

`ShardedImages` looks like an array of all images. `ShardStream` fetches the shards of the group after the one that is
trained on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from training.data.disk import CacheError
from training.data.shard_cache import Opened, ShardCache
from training.data.shard_order import Group, ShardOrder
from training.data.stores import ShardError
from training.messages import some

FETCHES = 4  # shards that are fetched at once


class ShardedImages:
    """The images of many shards as an array (N, C, H, W), which is read where it is indexed.

    Args:
        cache: of the shards.
        log: takes a line about images that cannot be read.
    """

    def __init__(self, cache: ShardCache, log: Callable[[str], None]) -> None:
        self.cache, self._log = cache, log
        self.counts = [shard.count for shard in cache.found.shards]
        self.starts = np.cumsum([0, *self.counts])
        self.shape, self.dtype = (int(self.starts[-1]), *cache.shape), cache.dtype
        self._opened: dict[int, Opened] = {}
        self._reported: set[int] = set()
        self.num_unreadable = 0  # of the shards that were opened so far

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """The images at these indices, (b, C, H, W); those that cannot be read are black."""
        indices = np.asarray(indices)
        images = np.empty((len(indices), *self.shape[1:]), self.dtype)
        shards = self.shards_of(indices)
        for shard in np.unique(shards).tolist():
            chosen = shards == shard
            images[chosen] = self.opened(shard)[0][indices[chosen] - self.starts[shard]]
        return images

    def indices_in(self, shards: Collection[int]) -> np.ndarray:
        """All images of these shards."""
        return np.concatenate([np.arange(self.starts[i], self.starts[i + 1]) for i in shards])

    def shards_of(self, indices: np.ndarray) -> np.ndarray:
        """The shard that each of these images is in."""
        return np.searchsorted(self.starts, indices, side="right") - 1

    def opened(self, shard: int) -> Opened:
        """The images of a shard, and "name: reason" of those that cannot be read, by their rows."""
        if shard not in self._opened:
            self._opened[shard] = self.cache.open(shard)
            self._report(shard, self._opened[shard][1])
        return self._opened[shard]

    def close_all_but(self, shards: Collection[int]) -> None:
        self._opened = {shard: opened for shard, opened in self._opened.items() if shard in shards}

    def _report(self, shard: int, unreadable: dict[int, str]) -> None:
        if not unreadable or shard in self._reported:
            return
        self._reported.add(shard)
        self.num_unreadable += len(unreadable)
        file = self.cache.found.shards[shard].file
        self._log(
            f"WARNING: {len(unreadable)} of {self.counts[shard]} images of {file.name} cannot be read, others of it "
            f"take their place ({self.num_unreadable} so far): {some(list(unreadable.values()))}"
        )


class ShardStream:
    """The images of a run in their order, fetched a group ahead.

    Args:
        images: of all shards.
        order: of the images.
        batch_size: B, the global batch.
        fetches: shards that are fetched at once.
        turn: (rank, number) of the processes of this machine, which share the work.
    """

    def __init__(
        self,
        images: ShardedImages,
        order: ShardOrder,
        batch_size: int,
        fetches: int = FETCHES,
        turn: tuple[int, int] = (0, 1),
    ) -> None:
        self.images, self.order, self._batch_size, self._turn = images, order, batch_size, turn
        self._pool = ThreadPoolExecutor(fetches, thread_name_prefix="shards")
        self._fetched: dict[int, Future[None]] = {}
        self._current: list[Group] = []  # that were waited for
        self._replaced: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.seconds_waited = 0.0

    def begins_group(self, step: int) -> bool:
        """Whether this step needs shards that were not waited for; the same on all ranks."""
        return self._groups(step) != self._current

    def _groups(self, step: int) -> list[Group]:
        return self.order.groups(step * self._batch_size, (step + 1) * self._batch_size - 1)

    def wait(self, step: int, is_stopped: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the shards of this step, and begin to fetch those of the next group. False: the run is to end.

        Raises:
            ShardError: a shard cannot be read or kept.
        """
        started, groups = time.monotonic(), self._groups(step)
        if groups == self._current:
            return True
        now = {int(shard) for group in groups for shard in self.order.shards(group)}
        following: set[int] = set()
        if len(groups) == 1:  # else the next batch has room for them: it needs one group less
            following = set(self.order.shards(self.order.after(groups[0])).tolist()) - now
        self._submit(now, now | following)
        pending = {self._fetched[shard] for shard in now}
        while pending:
            pending = wait(pending, timeout=0.5).not_done
            if pending and is_stopped():
                return False
        try:
            for shard in now:
                self._fetched[shard].result()
                if self.images.opened(shard)[1]:
                    self._replacements(shard)
        except (OSError, CacheError) as error:
            raise ShardError(str(error)) from error
        self.images.close_all_but(now)
        self._current = groups
        self.seconds_waited += time.monotonic() - started
        self._submit(following, now | following)
        return True

    def _submit(self, shards: set[int], keep: set[int]) -> None:
        """Fetch these shards in the background. The processes of a machine begin with different ones."""
        self.images.cache.make_room(keep)
        self._fetched = {shard: future for shard, future in self._fetched.items() if shard in keep}
        rank, number = self._turn
        order = sorted(shards)
        start = rank * len(order) // number
        for shard in order[start:] + order[:start]:
            if shard not in self._fetched:
                self._fetched[shard] = self._pool.submit(self.images.cache.fetch, shard)

    def readable(self, indices: np.ndarray) -> np.ndarray:
        """These indices, with the next image of its shard that is trained on in place of one that cannot be read."""
        shards = self.images.shards_of(indices)
        for shard in np.unique(shards).tolist():
            if self.images.opened(shard)[1]:
                bad, others = self._replacements(shard)
                at = np.minimum(np.searchsorted(bad, indices), len(bad) - 1)
                indices = np.where(bad[at] == indices, others[at], indices)
        return indices

    def _replacements(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """The images of a shard that cannot be read, ascending, and those in their place."""
        if shard not in self._replaced:
            order = self.order
            trained_on = order.train_indices[order.bounds[shard] : order.bounds[shard + 1]]
            unreadable = self.images.opened(shard)[1]
            bad = np.array(sorted(unreadable)) + order.starts[shard]
            good = np.setdiff1d(trained_on, bad)
            if not len(good):
                name, reason = self.images.cache.found.shards[shard].file.name, next(iter(unreadable.values()))
                raise ShardError(
                    f"no image of {name} can be read ({reason}): replace it, or leave it out and begin a new run"
                )
            self._replaced[shard] = bad, good[np.searchsorted(good, bad) % len(good)]
        return self._replaced[shard]

    def close(self) -> None:
        """End the threads."""
        self.images.cache.stopped.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._fetched.clear()  # a failed one refers to what has waited for it, and so to all of the run
