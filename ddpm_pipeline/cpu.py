"""CPU: memory and threads of this process. For commands that own their process; importing the library changes nothing.

Both are about what a process does between its computations. Of glibc's defaults, that large blocks go back to the
kernel, which has to clear each page again before the next use. And of OpenMP's, that all threads wait for the slowest:
one that shares its core with another process.
"""

import ctypes
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

# Parameters of mallopt, from glibc's malloc.h, and what each is set to.
_MALLOPT = (
    (-4, 0),  # M_MMAP_MAX: no block is a mapping of its own, which would be unmapped when it is freed
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD: the end of the heap stays, however much of it is free
    (-2, 64 * 2**20),  # M_TOP_PAD, in bytes: the heap grows by this at least
)


def keep_memory() -> bool:
    """Let this process keep freed memory for its next step, instead of giving it back to the kernel.

    Each step of training allocates and frees the same tensors. glibc maps every large block anew, so in each step the
    kernel clears all their pages again. A step of the network `tiny` with 32 images has 7,000 page faults by default
    and 20 to 40 with this: 10 to 20 % less CPU time on one thread, more on several, which wait for one another there.
    The peak of the memory grows by a few percent at most. But what the process has once used it keeps until its end,
    as with any pool of memory.

    Does nothing with other C libraries (macOS, Windows, musl), or where the environment sets how memory is allocated:
    MALLOC_*, GLIBC_TUNABLES with glibc.malloc, or another allocator in LD_PRELOAD.

    Returns:
        Whether freed memory is kept.
    """
    if _allocator_is_chosen(os.environ):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  only glibc has it
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library without a name
        return False
    return sum(mallopt(parameter, value) for parameter, value in _MALLOPT) == len(_MALLOPT)  # each: 1 if it is set


def _own_seconds() -> float:
    """CPU time of this process, all its threads together, and of its children that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def _allocator_is_chosen(environment: Mapping[str, str]) -> bool:
    """Whether these variables set how memory is allocated."""
    return (
        any(name.startswith("MALLOC_") for name in environment)
        or "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
        or "malloc" in environment.get("LD_PRELOAD", "")  # jemalloc, tcmalloc, mimalloc
    )


@contextmanager
def importing() -> Iterator[None]:
    """A context for the first import of diffusers in a process: without searches for garbage, and without transformers.

    Importing diffusers' U-net makes so many objects that searches for garbage, of which there is next to none, take a
    third of its two seconds. Where transformers is installed diffusers imports that too, for components that no DDPM
    has, and takes twice as long. Inside this context transformers is as if not installed. diffusers looks for it once,
    so it goes without until the process ends; anything else can import it after the context. A process that has
    imported diffusers before keeps transformers, too, which diffusers then counts on.
    """
    was_enabled = gc.isenabled()
    hides = sys.modules.keys().isdisjoint({"transformers", "diffusers"})
    gc.disable()
    if hides:
        sys.modules["transformers"] = None  # type: ignore[assignment]  # Python's mark of a module that does not exist
    try:
        yield
    finally:
        if hides:
            del sys.modules["transformers"]
        if was_enabled:
            gc.enable()


class SharedCores:
    """How many threads to compute with, while other processes come and go.

    All threads of an operation wait for the slowest. On two cores of which another process takes one, two threads
    therefore reach a tenth of their speed or less, and one thread two thirds. So `update()`, called once a step, counts
    the cores that others keep busy, and sets torch's number of threads to what they leave.

    It lowers the number once others have been there for DOWN seconds, and raises it after UP quiet seconds: a short
    command changes nothing. The first `update()` judges the time since this object was made. The number is never larger
    than `most`, nor smaller than 1. What containers beside this one do counts, and what the hypervisor takes. Where
    there is no /proc/stat, as on macOS and Windows, nothing changes.

    Args:
        most: number of threads when nothing else runs.
        cores: physical cores that this process may use.
        cpus: numbers of the CPUs it may use; default: those of its affinity. With hyperthreads they are more than
            cores, and a busy one counts as its part of a core.
        read_stat: text of /proc/stat.
        own_seconds: CPU time of this process and its children so far.
        clock: seconds from any point on.
        set_threads: called with the new number.
    Attributes:
        threads: current number.
        others: cores that others kept busy just before the number changed.
    """

    INTERVAL, DOWN, UP = 1.0, 2.5, 6.0  # seconds

    def __init__(
        self,
        most: int,
        cores: int,
        cpus: Collection[int] | None = None,
        *,
        read_stat: Callable[[], str] = Path("/proc/stat").read_text,
        own_seconds: Callable[[], float] = _own_seconds,
        clock: Callable[[], float] = time.monotonic,
        set_threads: Callable[[int], None] = torch.set_num_threads,
    ) -> None:
        self.most, self.cores, self.threads, self.others = most, cores, most, 0.0
        self._cpus = cpus
        if cpus is None and hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
            self._cpus = os.sched_getaffinity(0)
        self._read_stat, self._own_seconds, self._clock, self._set_threads = read_stat, own_seconds, clock, set_threads
        self._counted = now, busy, _ = clock(), self._busy_seconds(), own_seconds()
        self._begun = now  # when the number was set from outside
        self._next = math.inf if math.isnan(busy) else now + self.INTERVAL  # when to count again; infinity: never
        self._direction, self._since, self._free = 0, 0.0, most

    def begin(self, threads: int) -> None:
        """Set the number, such as that of an earlier part of the run; one that is too large becomes `most`."""
        if threads < 1:
            raise ValueError(f"threads is {threads}: give at least 1")
        self.threads, self._begun = min(threads, self.most), self._clock()
        self._begin_streak(0, self._begun, self.threads)
        self._set_threads(self.threads)

    def update(self, at_once: bool = False) -> int | None:
        """The new number of threads if it has changed, else None. Costs nothing until INTERVAL has passed.

        Args:
            at_once: lower the number without waiting for DOWN.
        """
        now = self._clock()
        if now < self._next:
            return None
        before, self._counted = self._counted, (now, self._busy_seconds(), self._own_seconds())
        self._next = now + self.INTERVAL
        seconds, busy, own = (after - earlier for after, earlier in zip(self._counted, before))
        others = max(0.0, busy - own) / seconds  # in CPUs
        others *= self.cores / max(self.cores, len(self._cpus or ()))  # in cores
        return self._judge(now, seconds, others, 0.0 if at_once else self.DOWN)

    def _judge(self, now: float, seconds: float, others: float, down: float) -> int | None:
        """What follows from the last `seconds`, in which others kept so many cores busy on average."""
        free = min(self.most, max(1, self.cores - round(others)))
        direction = (free > self.threads) - (free < self.threads)
        if direction != self._direction:
            since = now - seconds
            self._begin_streak(direction, max(since, self._begun) if direction > 0 else since, free)
        # What was free all the time when there is more, what was free at some time when there is less.
        self._free = min(self._free, free) if direction > 0 else max(self._free, free)
        if direction == 0 or now - self._since < (self.UP if direction > 0 else down):
            return None
        self.threads, self.others = self._free, others
        self._begin_streak(0, now, self.threads)
        self._set_threads(self.threads)
        return self.threads

    def _begin_streak(self, direction: int, since: float, free: int) -> None:
        """From now on more (1), as many (0) or fewer cores (-1) are free than there are threads."""
        self._direction, self._since, self._free = direction, since, free

    def _busy_seconds(self) -> float:
        """CPU time that the allowed CPUs have spent on anything since the machine started; NaN if that is unknown."""
        try:
            lines = [line.split() for line in self._read_stat().splitlines() if line.startswith("cpu")]
            times = {name: [int(value) for value in values] for name, *values in lines}
            ticks = os.sysconf("SC_CLK_TCK")
        except (AttributeError, OSError, ValueError):
            return math.nan
        # user nice system idle iowait irq softirq steal; guest time, which follows, is part of user time
        rows = [times.get(f"cpu{cpu}", [])[:8] for cpu in self._cpus or ()]
        busy = [sum(row) - row[3] - row[4] for row in rows if len(row) == 8]
        return sum(busy) / ticks if busy else math.nan
