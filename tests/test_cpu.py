"""Memory and threads of a process on a CPU: page faults are counted, not timed, and /proc/stat is made up."""

import itertools
import os
import random
import subprocess
import sys
import time

import pytest

from ddpm_pipeline.cpu import SharedCores, _allocator_is_chosen, _own_seconds, keep_memory

# ---- keep_memory -----------------------------------------------------------------------------------------------------

# Page faults of ten steps after the first three. A step allocates, fills and frees two tensors of 40 MB.
COUNT_FAULTS = """
import resource, torch
from ddpm_pipeline.cpu import keep_memory
def steps(number):
    for _ in range(number):
        tensors = [torch.ones(10_000_000) for _ in range(2)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
"""


def count_faults(before, **variables):
    """What `before` evaluates to in a new process, and then its page faults."""
    inherited = {name: value for name, value in os.environ.items() if not _allocator_is_chosen({name: value})}
    code = f"{COUNT_FAULTS}\nprint({before})\nfirst = steps(20)\nprint(steps(10) - first)"
    child = subprocess.run([sys.executable, "-c", code], env=inherited | variables, capture_output=True, text=True)
    assert (child.returncode, child.stderr) == (0, "")
    kept, faults = child.stdout.splitlines()
    return kept, int(faults)


def is_glibc():
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") is not None
    except (AttributeError, OSError, ValueError):  # Windows has no confstr, others have not this name
        return False


@pytest.mark.skipif(not is_glibc(), reason="the C library is not glibc")
def test_freed_memory_is_used_again():
    _, by_default = count_faults("__import__('ddpm_pipeline').DDPMPipeline.__name__")  # importing changes nothing
    assert by_default > 200  # 800 MB in pages of 2 MB at most
    kept, faults = count_faults("keep_memory(), keep_memory()")
    assert kept == "True True"
    assert faults < by_default / 10
    kept, faults = count_faults("keep_memory()", MALLOC_TOP_PAD_="0")
    assert kept == "False"
    assert faults > by_default / 10


@pytest.mark.parametrize(
    ("variables", "chosen"),
    [
        ({"MALLOC_ARENA_MAX": "2"}, True),
        ({"MALLOC_CONF": "narenas:1"}, True),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1:glibc.elision.enable=1"}, True),
        ({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}, True),
        ({"LD_PRELOAD": "/usr/lib/libtcmalloc.so.4"}, True),
        ({"GLIBC_TUNABLES": "glibc.elision.enable=1", "LD_PRELOAD": "libgomp.so"}, False),
        ({}, False),
    ],
)
def test_a_chosen_allocator_is_left_alone(variables, chosen):
    assert _allocator_is_chosen(variables) == chosen


@pytest.mark.parametrize("library", [object(), OSError("no such library"), TypeError("name is None")])
def test_other_c_libraries_are_left_alone(library, monkeypatch, capfd):
    """musl has no gnu_get_libc_version; Windows has no library without a name."""

    def load(name):
        if isinstance(library, Exception):
            raise library
        return library

    monkeypatch.setattr("ddpm_pipeline.cpu.ctypes.CDLL", load)
    monkeypatch.setattr("ddpm_pipeline.cpu.os.environ", {})
    assert keep_memory() is False
    assert capfd.readouterr() == ("", "")


# ---- SharedCores -----------------------------------------------------------------------------------------------------

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Machine:
    """A machine whose CPUs are as busy as a test says; time passes in `run` only."""

    def __init__(self, cores, cpus=None, most=None, allowed=None):
        self.now, self.own = 1000.0, 50.0
        self.busy = [17.0 * i for i in range(cpus or cores)]  # seconds since it started
        self.column = itertools.cycle(["user", "nice", "system", "irq", "softirq", "steal"])
        self.columns = [dict.fromkeys(("user", "nice", "system", "irq", "softirq", "steal"), 0.0) for _ in self.busy]
        self.reads, self.changes = 0, []
        self.shared = SharedCores(
            most or cores,
            cores,
            set(range(cpus or cores)) if allowed is None else allowed,
            read_stat=self.read_stat,
            own_seconds=lambda: self.own,
            clock=lambda: self.now,
            set_threads=self.changes.append,
        )

    def read_stat(self):
        self.reads += 1
        idle = self.now * 0.3
        lines = ["cpu  1 2 3 4 5 6 7 8 9 10"]
        for i, times in enumerate(self.columns):
            user, nice, system, irq, softirq, steal = (round(seconds * TICKS) for seconds in times.values())
            lines.append(
                f"cpu{i} {user} {nice} {system} {round(idle * TICKS)} {round(idle * TICKS)} {irq} {softirq} {steal} "
                f"{user} 0"
            )
        return "\n".join([*lines, "intr 1 2 3", "ctxt 99"]) + "\n"

    def run(self, seconds, others=0.0, *, own=None, step=0.1, first_cpu=0):
        """Steps of `step` seconds, in which others keep so many CPUs busy and this process `own`: its threads."""
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now += step
            own_now = self.shared.threads if own is None else own
            self.own += own_now * step
            for share in (others, own_now):
                for i in range(len(self.columns)):
                    cpu = self.columns[(first_cpu + i) % len(self.columns)]
                    cpu[next(self.column)] += min(1.0, max(0.0, share - i)) * step
            self.shared.update()


def test_threads_are_left_without_a_wait_on_request():
    machine = Machine(cores=2)
    machine.run(0.9, others=1, step=0.3)
    machine.now += 0.2
    assert machine.shared.update(at_once=True) == 1
    machine.run(5)
    assert machine.shared.update(at_once=True) is None  # more of them only after a while


def test_a_constant_neighbour_takes_a_thread_at_once_and_gives_it_back_later():
    machine = Machine(cores=2)
    machine.run(10)
    assert machine.changes == []
    machine.run(1.5, others=1)
    assert machine.changes == []
    machine.run(2.5, others=1)
    assert machine.changes == [1]
    assert machine.shared.others == pytest.approx(1, abs=0.35)
    machine.run(100, others=1)
    assert machine.changes == [1]
    machine.run(5)
    assert machine.changes == [1]
    machine.run(3)
    assert machine.changes == [1, 2]
    assert machine.shared.others == pytest.approx(0, abs=0.1)
    machine.run(100)
    assert machine.changes == [1, 2]


def test_two_threads_and_a_neighbour_that_share_two_cores_evenly():
    """Three threads on two cores: each has two thirds of one."""
    machine = Machine(cores=2)
    machine.run(2)
    machine.run(5, others=2 / 3, own=4 / 3)
    assert machine.changes == [1]


def test_a_short_command_changes_nothing():
    machine = Machine(cores=4)
    for _ in range(20):
        machine.run(1.0, others=3)
        machine.run(4)
    assert machine.changes == []


def test_a_pause_of_the_neighbour_raises_nothing():
    machine = Machine(cores=4)
    machine.run(8, others=3)
    assert machine.changes == [1]
    for _ in range(20):
        machine.run(4)
        machine.run(3, others=3)
    assert machine.changes == [1]


def test_it_rises_to_what_is_free_all_the_time():
    machine = Machine(cores=4)
    machine.run(8, others=3)
    for _ in range(10):
        machine.run(1.5, others=1)
        machine.run(1.5, others=2)
    assert machine.changes == [1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_a_flickering_neighbour_changes_little(seed):
    """Busy or not at random, for half a second to three seconds: the number never leaves its bounds, and changes at
    most as often as DOWN and UP allow."""
    rng, machine = random.Random(seed), Machine(cores=4)
    machine.run(1)
    started = machine.now
    while machine.now < started + 300:
        machine.run(rng.uniform(0.5, 3), others=rng.choice([0, 1, 2, 3, 4]))
    assert set(machine.changes) <= {1, 2, 3, 4}
    ups = sum(after > before for before, after in itertools.pairwise([4, *machine.changes]))
    assert ups <= 300 / SharedCores.UP
    assert len(machine.changes) <= 300 / SharedCores.DOWN
    machine.run(20)
    assert machine.shared.threads == 4


@pytest.mark.parametrize("own", [0.0, 1.0, 2.0, 3.9])
def test_own_threads_are_no_neighbours(own):
    """Whatever they do: they may wait in the kernel, or spin."""
    machine = Machine(cores=4)
    machine.run(60, own=own)
    assert machine.changes == []


@pytest.mark.parametrize("others", [0, 1, 2, 3.4, 4, 6, 50])
@pytest.mark.parametrize("most", [1, 2, 4])
def test_the_number_stays_within_its_bounds(others, most):
    machine = Machine(cores=4, most=most)
    machine.run(30, others=min(others, 4), own=0)
    assert machine.shared.threads == min(most, max(1, 4 - round(min(others, 4))))
    assert machine.changes == ([] if machine.shared.threads == most else [machine.shared.threads])


@pytest.mark.parametrize(("others", "threads"), [(0, 4), (0.9, 4), (2, 3), (4, 2), (6, 1), (8, 1)])
def test_a_busy_hyperthread_is_half_a_core(others, threads):
    """4 cores with 8 CPUs, of which this process keeps no more than 4 busy."""
    machine = Machine(cores=4, cpus=8)
    machine.run(30, others=others, own=0)
    assert machine.shared.threads == threads


def test_only_allowed_cpus_count():
    machine = Machine(cores=2, cpus=8, allowed={6, 7})
    machine.run(30, others=4, own=0)
    assert machine.changes == []
    machine.run(30, others=4, own=0, first_cpu=4)
    assert machine.changes == [1]


def test_steps_longer_than_the_interval():
    """A step of 20 seconds: the first one with a neighbour is enough."""
    machine = Machine(cores=2)
    machine.run(40, step=20)
    machine.run(20, others=1, step=20)
    assert machine.changes == [1]
    machine.run(20, step=20)
    assert machine.changes == [1, 2]


def test_the_start_counts_for_fewer_threads():
    """It takes seconds: with a neighbour the first step is one with fewer threads."""
    machine = Machine(cores=2)
    machine.run(5, others=1, own=1, step=5)
    assert machine.changes == [1]


def test_the_start_does_not_count_for_more_threads_than_a_resumed_run_had():
    machine = Machine(cores=2)
    machine.now += 100
    machine.shared.begin(1)
    machine.run(5, own=1)
    assert machine.changes == [1]
    machine.run(3)
    assert machine.changes == [1, 2]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no /proc/stat")
def test_children_that_have_ended_are_no_neighbours():
    """Such as those that decode the images before training begins."""
    before = _own_seconds()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    assert 0.4 < _own_seconds() - before < 5


def test_between_two_intervals_nothing_is_read():
    machine = Machine(cores=2)
    machine.run(10, step=0.01)
    assert 10 <= machine.reads <= 11


def test_it_can_begin_with_fewer_threads():
    machine = Machine(cores=4)
    machine.shared.begin(2)
    machine.run(5)
    assert machine.changes == [2]
    machine.run(5)
    assert machine.changes == [2, 4]
    machine.shared.begin(9)
    assert machine.changes == [2, 4, 4]
    with pytest.raises(ValueError, match="threads is 0: give at least 1"):
        machine.shared.begin(0)


@pytest.mark.parametrize("text", ["", "cpu 1 2 3\n", "cpu0 1 2 3\n", "cpu0 a b c d e f g h\n", OSError("no /proc")])
def test_without_proc_stat_nothing_changes(text):
    def read():
        if isinstance(text, Exception):
            raise text
        return text

    clock = itertools.count()
    shared = SharedCores(2, 2, {0, 1}, read_stat=read, clock=lambda: float(next(clock)), set_threads=pytest.fail)
    assert [shared.update() for _ in range(20)] == [None] * 20


def test_without_affinity_nothing_changes(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    clock = itertools.count()
    shared = SharedCores(2, 2, clock=lambda: float(next(clock)), own_seconds=lambda: 0.0, set_threads=pytest.fail)
    assert [shared.update() for _ in range(20)] == [None] * 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is no /proc/stat")
def test_a_real_neighbour_is_found():
    cpus = len(os.sched_getaffinity(0))
    if cpus < 2:
        pytest.skip("this process may use one CPU only")
    load = os.getloadavg()[0]
    changes = []
    shared = SharedCores(cpus, cpus, set_threads=changes.append)
    if not watch(shared, 3, until=lambda: bool(changes)):
        neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            found = watch(shared, 15, until=lambda: bool(changes))
        finally:
            neighbour.kill()
            neighbour.wait()
        assert found
        assert changes[0] < cpus
        assert shared.others > 0.5
        if not watch(shared, 10, until=lambda: changes[-1] == cpus):
            pytest.skip(f"others keep this machine busy (load {load:.1f} at the start)")
    else:
        pytest.skip(f"others keep this machine busy (load {load:.1f} at the start)")


def watch(shared, seconds, until):
    """Update until the condition holds: True; False once so many seconds have passed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        shared.update()
        if until():
            return True
        time.sleep(0.1)
    return False
