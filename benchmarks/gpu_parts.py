"""The parts of gpu.py. Each is a function that yields rows, plain dicts, until its time is used up.

A row that fails has an "error"; one for which no time was left has "skipped". Scripts run in the part's process, one
after the other: starting each anew would take most of the time.
"""

from __future__ import annotations

import contextlib
import gc
import io
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.clock import Timing, run_script
from benchmarks.common import ROOT
from benchmarks.compare import three_digits
from benchmarks.networks import NETWORKS, count_flop, make_network
from benchmarks.peaks import DTYPES, measure_rates
from benchmarks.sampler import VARIANTS, make_sampler
from benchmarks.sampling import save_pipeline
from benchmarks.scripts import NUM_ROWS, OURS, our_arguments, peer_arguments, peer_script, write_table
from benchmarks.trace import analyse

Row = dict[str, Any]
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
PRECISION = "bf16" if HAS_GPU or torch.cpu._is_avx512_bf16_supported() else "no"
NAMES = tuple(network.name for network in NETWORKS) if HAS_GPU else ("tiny",)
ROWS = NUM_ROWS if HAS_GPU else 64  # of the data set
# In the order in which they are worth knowing.
BATCHES = (128, 512, 64, 256, 1024) if HAS_GPU else (2, 4)
PEER_BATCHES = (128, 64) if HAS_GPU else (2,)
SAMPLING_BATCHES = (64, 256) if HAS_GPU else (2,)
SAMPLING_STEPS = 50 if HAS_GPU else 2
SECONDS = 2.0 if HAS_GPU else 0.1  # of training that are timed
WARM_UP = 10 if HAS_GPU else 2  # steps
PROFILED = 10 if HAS_GPU else 2  # steps


@dataclass
class Job:
    """What a part is given.

    Args:
        folder: of `prepare`, shared by all parts.
        rows: file that the rows are written to.
        seconds: after which no row is begun.
        diffusers_repo: checkout of diffusers, or None.
    """

    folder: str
    rows: str
    seconds: float
    diffusers_repo: str | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def table(self) -> list[object]:
        return ["--dataset_name", Path(self.folder) / "table"]

    @property
    def seconds_left(self) -> float:
        return self.started + self.seconds - time.monotonic()

    def row(self, name: str, measure: Callable[[], Row]) -> Row:
        """The row that `measure` returns, or why there is none."""
        row: Row = {"name": name}
        if self.seconds_left <= 0:
            return row | {"skipped": "no time left"}
        output = io.StringIO()
        try:
            with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
                return row | measure()
        except Exception as error:
            last_lines = "; ".join(output.getvalue().strip().splitlines()[-2:])
            return row | {"error": f"{type(error).__name__}: {error} {last_lines}"[:1000]}
        finally:
            gc.collect()
            torch.compiler.reset()
            if HAS_GPU:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


def prepare(folder: Path) -> None:
    """Write what several parts need: the data set, and the configuration of each network."""
    write_table(folder / "table", ROWS)
    for name in NAMES:
        make_network(name).save_config(str(folder / name))


# ---- Tests and rates -------------------------------------------------------------------------------------------------


def tests(job: Job) -> Iterator[Row]:
    """The tests with "cuda" or "gpu" in their names, by the result of each; only the failed ones one by one."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "cuda" in path.read_text(encoding="utf-8")]
    report = Path(job.folder) / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cuda or gpu", "-p", "no:cacheprovider", "--junit-xml",
               report, *files]  # fmt: skip
    process = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    if not report.exists():
        raise RuntimeError(f"pytest wrote no report:\n{(process.stdout + process.stderr)[-2000:]}")
    counts = dict.fromkeys(("passed", "failed", "error", "skipped"), 0)
    failed = []
    for case in ElementTree.parse(report).iter("testcase"):
        results = [child for child in case if child.tag in ("failure", "error", "skipped")]
        tag = results[0].tag.replace("failure", "failed") if results else "passed"
        counts[tag] += 1
        if tag in ("failed", "error"):
            message = results[0].get("message", "")[:500]
            failed.append({"name": f"{case.get('classname')}.{case.get('name')}", tag: message})
    yield {"name": "all", **counts}
    yield from failed
    if failed:
        raise RuntimeError(f"{len(failed)} tests failed")


def roofline(job: Job) -> Iterator[Row]:
    seconds = min(1.0, job.seconds / 20)
    yield {"name": "rates"} | measure_rates(DEVICE, DTYPES[PRECISION], seconds, None if HAS_GPU else 64)


# ---- Training --------------------------------------------------------------------------------------------------------


def profile(job: Job) -> Iterator[Row]:
    """A step of each network: kernels by time, the share of the time in which the GPU is idle, waits of the host."""
    batch = BATCHES[0]
    for compiled in (False, True) if HAS_GPU else (False,):
        for name in NAMES[::-1]:
            title = f"{name}, batch {batch}{', compiled' if compiled else ''}"
            yield job.row(title, lambda name=name, compiled=compiled: profile_steps(job, name, batch, compiled))  # type: ignore[misc]  # mypy takes no defaults


def profile_steps(job: Job, name: str, batch: int, compiled: bool) -> Row:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if HAS_GPU:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    steps = torch.profiler.record_function("profiled steps")

    def begin() -> None:
        profiler.start()
        steps.__enter__()

    timing = Timing(WARM_UP, PROFILED, seconds=600)
    arguments = arguments_of_ours(job, name, batch, compiled)
    run_script(OURS, arguments, timing, on_begin=begin, on_last=lambda: steps.__exit__(None, None, None))
    profiler.stop()
    file = Path(job.folder) / "trace.json"
    profiler.export_chrome_trace(str(file))
    return {"batch": batch, "compile": compiled} | analyse(file, "profiled steps", PROFILED)


def training(job: Job) -> Iterator[Row]:
    """Images per second of ours, without torch.compile, then with it: compiling may take the rest of the time."""
    for compiled, batches in ((False, BATCHES), (True, BATCHES[1:2]), (True, (BATCHES[0], *BATCHES[2:]))):
        for batch in batches if HAS_GPU or not compiled else ():
            for name in NAMES[::-1]:
                arguments = arguments_of_ours(job, name, batch, compiled)
                timing = Timing(WARM_UP, 10**6, SECONDS)
                title = f"ours, {name}, batch {batch}{', compiled' if compiled else ''}"
                yield job.row(title, Train(OURS, arguments, timing, name, batch)) | {"compile": compiled}


def peer_training(job: Job) -> Iterator[Row]:
    """The same of diffusers' script. Its timed steps end before the end of the epoch, where it draws samples."""
    assert job.diffusers_repo is not None
    script, folder = peer_script(Path(job.diffusers_repo)), Path(job.folder)
    for batch in PEER_BATCHES:
        for name in NAMES[::-1]:
            arguments = peer_arguments(job.table, folder / name, batch, PRECISION, folder)
            timing = Timing(WARM_UP, ROWS // batch - WARM_UP - 1, SECONDS)
            yield job.row(f"peer, {name}, batch {batch}", Train(script, arguments, timing, name, batch))


def arguments_of_ours(job: Job, name: str, batch: int, compiled: bool) -> list[object]:
    arguments = our_arguments(job.table, Path(job.folder) / name, batch, PRECISION, Path(job.folder))
    return [*arguments, *(["--compile", "true"] if compiled else [])]


@dataclass
class Train:
    """Runs a training script and makes a row of its times."""

    script: Path
    arguments: list[object]
    timing: Timing
    network: str
    batch: int

    def __call__(self) -> Row:
        started = time.time()
        times = run_script(self.script, self.arguments, self.timing)
        rate = times["steps"] * self.batch / (times["end"] - times["begin"])
        memory = torch.cuda.max_memory_allocated() / 2**30 if HAS_GPU else 0.0
        return {
            "network": self.network,
            "batch": self.batch,
            "images_per_second": three_digits(rate),
            "gflops": three_digits(rate * count_flop(self.network, backward=True) / 1e9),
            "seconds_to_first_step": round(times["first"] - started, 1),
            "peak_memory_gib": round(memory, 1),
        }


# ---- Sampling --------------------------------------------------------------------------------------------------------


def sampling(job: Job) -> Iterator[Row]:
    """Images per second of both pipelines, with the same weights and number of steps."""
    for batch in SAMPLING_BATCHES:
        for name in NAMES[::-1]:
            pipeline = Path(job.folder) / "pipelines" / name
            for side, variants in (("ours", ("",)), ("peer", VARIANTS[PRECISION])):
                for variant in variants:
                    title = f"{side}, {name}, batch {batch}{', ' if variant else ''}{variant}"
                    yield job.row(title, Sample(side, variant, pipeline, name, batch))


@dataclass
class Sample:
    """Samples with one side and makes a row of its times."""

    side: str
    variant: str
    pipeline: Path
    network: str
    batch: int

    def __call__(self) -> Row:
        if not self.pipeline.exists():
            save_pipeline(self.pipeline, self.network)
        sample = make_sampler(self.side, self.pipeline, PRECISION, self.batch, SAMPLING_STEPS, DEVICE)
        sample(self.variant)  # warm up
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            sample(self.variant)  # returns arrays on the CPU: nothing to wait for
            seconds.append(time.perf_counter() - start)
        rate = self.batch / median(seconds)
        return {
            "network": self.network,
            "batch": self.batch,
            "steps": SAMPLING_STEPS,
            "images_per_second": three_digits(rate),
            "gflops": three_digits(rate * SAMPLING_STEPS * count_flop(self.network) / 1e9),
        }


PARTS: dict[str, Callable[[Job], Iterator[Row]]] = {
    "roofline": roofline,
    "tests": tests,
    "profile": profile,
    "training": training,
    "peer_training": peer_training,
    "sampling": sampling,
}
