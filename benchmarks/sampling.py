"""Sampling with ours against diffusers' DDPMPipeline: same weights, number of steps, precision and threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import IO, Any

import torch
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline as BuiltInDDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as BuiltInDDPMScheduler

from benchmarks.common import ROOT
from benchmarks.compare import Comparison
from benchmarks.networks import NETWORKS, Network, count_flop, make_network
from benchmarks.sampler import VARIANTS

NAMES = {"float32": "float32", "autocast": "bf16 by autocast", "weights": "bf16 weights"}


def save_pipeline(folder: Path, name: str) -> Path:
    """A pipeline with an untrained network, as diffusers saves it."""
    torch.manual_seed(0)
    # Any: diffusers types the scheduler as its dummy.
    scheduler: Any = BuiltInDDPMScheduler(timestep_spacing="trailing")
    BuiltInDDPMPipeline(make_network(name), scheduler).save_pretrained(str(folder))
    return folder


def sampling(folder: Path, *, precision: str, rounds: int, quick: bool = False) -> list[Comparison]:
    """Milliseconds for one sampling step of the whole batch, the pipeline around the network included."""
    results = []
    for network in NETWORKS[:2] if quick else NETWORKS:
        pipeline = save_pipeline(folder / network.name, network.name)
        for batch_size in network.sampling_batches:
            results += sampling_of(pipeline, network, batch_size, precision, rounds)
    return results


def sampling_of(pipeline: Path, network: Network, batch_size: int, precision: str, rounds: int) -> list[Comparison]:
    """Ours against the faster variant of the peer. The target is for ours as a library, which changes no process."""
    steps = network.sampling_steps * (4 if batch_size == 1 else 1)
    sides = [("peer", variant) for variant in VARIANTS[precision]] + [("ours", ""), ("ours_keeping_memory", "")]
    times: dict[tuple[str, str], list[float]] = {side: [] for side in sides}
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(sampler_process(name, pipeline, precision, batch_size, steps))
            for name in dict.fromkeys(name for name, _ in sides)
        }
        for i in range(rounds + 1):
            for name, variant in sides if i % 2 else sides[::-1]:
                seconds = ask(processes[name], variant)
                if i:  # the first round is the warm-up
                    times[name, variant].append(1e3 * seconds / steps)
    fastest = min(VARIANTS[precision], key=lambda variant: median(times["peer", variant]))
    peer = times["peer", fastest]
    flop = batch_size * count_flop(network.name)
    title = f"sampling {network.name}, batch {batch_size}, one step"
    return [
        Comparison(title, "ms", peer, times["ours", ""], 1.5, flop, f"peer, {NAMES[fastest]}"),
        Comparison(f"{title}, keeping freed memory", "ms", peer, times["ours_keeping_memory", ""], None, flop),
    ]


@contextmanager
def sampler_process(
    side: str, pipeline: Path, precision: str, batch_size: int, steps: int
) -> Iterator[subprocess.Popen[str]]:
    """A process that samples with this side, ready to be asked."""
    script = ROOT / "benchmarks" / "sampler.py"
    command = [sys.executable, script, side, pipeline, precision, batch_size, steps, torch.get_num_threads()]
    process = subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        answer(process)
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(process: subprocess.Popen[str], variant: str) -> float:
    """Seconds of one sampling."""
    pipe: IO[str] | None = process.stdin
    assert pipe is not None
    pipe.write(variant + "\n")
    pipe.flush()
    return float(answer(process).split()[0])


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"sampler.py failed:\n{process.stderr.read()[-2000:]}")
    return line
