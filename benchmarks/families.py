"""The four families by size of the images: `python benchmarks/families.py [--families tiny small] [--sizes 32 64]`.

For each: parameters, operations, images per second in training and in a sampling step, and the memory of a training
step, measured and predicted by training/plan.py. Training is whole optimizer steps as training/loop.py takes them, on
random images, with the batch that a run would choose, halved until a step takes at most STEP_SECONDS.
Each pair is a process of its own, whose peak memory is measured; about 9 minutes in all on two cores. Prints a table,
and writes benchmarks/results/families-NAME.json after each pair. On an idle machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch

from benchmarks.common import RESULTS, file_name, machine, minutes_since, write_json
from benchmarks.compare import seconds_per_call, three_digits
from benchmarks.networks import count_flop, make_network
from ddpm_pipeline import DDPMPipeline, DDPMScheduler
from ddpm_pipeline.objective import Loss
from training import loop, plan, tune
from training.budget import with_defaults
from training.config import GLOBAL_BATCH, Config
from training.data.batches import Batches
from training.denoiser import FAMILIES
from training.ema import FlatEMA
from training.run.runtime import Runtime
from training.run.state import TrainingState
from training.step import Outcome, Updater, make_optimizer

SIZES = (32, 64, 128, 256)  # sides of the images in pixels
STEP_SECONDS = 5.0  # longest step; the batch is cut for it
SECONDS = 4.0  # of timed steps, and of timed sampling
LIMIT = 180  # seconds for one pair; it takes about 45
COLUMNS = {
    "family": "network", "size": "px", "parameters_m": "parameters, M", "gflop": "GFLOP forward", "batch": "batch",
    "training": "training, images/s", "sampling": "one sampling step, images/s", "peak_gb": "memory, GB",
    "predicted_gb": "predicted, GB", "predicted_gpu_gb": f"predicted for batch {GLOBAL_BATCH} on a GPU, GB",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the speed and memory of each family at each size.")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--sizes", nargs="+", type=int, choices=SIZES, default=SIZES, help="sides in pixels")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/families-NAME.json")
    parser.add_argument("--pair", nargs=2, help=argparse.SUPPRESS)  # measure this family and size, in this process
    args = parser.parse_args()
    if args.pair:
        print(json.dumps(measure(args.pair[0], int(args.pair[1]))))
        return
    started, hardware, rows = time.monotonic(), machine(), []
    title = hardware["gpu"] or f"{hardware['processor']} {hardware['cores']} cores"
    path = args.output or RESULTS / f"families-{file_name(title)}.json"
    print(title, table_row(COLUMNS.values()), table_row(["---"] * len(COLUMNS)), sep="\n", flush=True)
    for family in args.families:
        for side in args.sizes:
            row = {"family": family, "size": side} | in_own_process(family, side)
            rows.append(row)
            print(row["error"] if "error" in row else table_row(row[name] for name in COLUMNS), flush=True)
            write_json(path, {"machine": hardware, "minutes": minutes_since(started), "results": rows})
    print(f"{minutes_since(started)} minutes; results: {path}")


def table_row(values: Iterable[object]) -> str:
    return "| " + " | ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values) + " |"


def in_own_process(family: str, side: int) -> dict[str, Any]:
    """What `measure` returns there, or the error that ended it."""
    command = [sys.executable, __file__, "--pair", family, str(side)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {LIMIT} s"}
    if process.returncode:
        return {"error": "\n".join(process.stderr.splitlines()[-5:]) or f"ended with code {process.returncode}"}
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def measure(family: str, side: int) -> dict[str, Any]:
    """One row, without its family and size. The process must be a new one: its peak memory is part of the row."""
    runtime = Runtime("auto", cpu_threads=torch.get_num_threads())
    device, image_shape, flop = runtime.device, (3, side, side), count_flop(family, side)
    unet: Any = make_network(family, side)  # Any: diffusers annotates .to() without its argument
    tune.apply(tune.default_tuning(device.type, runtime.dtype), unet.to(device))
    memory = plan.measure_memory(unet, image_shape, runtime)
    most = plan.fit_passes(Config(dataset_name="moons"), GLOBAL_BATCH, memory, plan.available_bytes(device)).batch_size
    steps, batch = Steps(unet, side, runtime), 1
    steps.take(batch)  # warm up
    while batch < most and 2 * seconds_per_call(partial(steps.take, batch), 1) <= STEP_SECONDS:
        batch *= 2
    training = batch / median_seconds(partial(steps.take, batch))
    peak = peak_bytes(device)
    sampling = batch / sampling_seconds(family, side, batch, runtime)
    gpu = memory if device.type == "cuda" else predict_for_gpu(family, side)
    return {
        "parameters_m": round(unet.num_parameters() / 1e6, 1),
        "gflop": three_digits(flop / 1e9),
        "precision": runtime.mixed_precision,
        "batch": batch,
        "training": three_digits(training),
        "training_gflops": three_digits(training * count_flop(family, side, backward=True) / 1e9),
        "sampling": three_digits(sampling),
        "sampling_gflops": three_digits(sampling * flop / 1e9),
        "peak_gb": three_digits(peak / 1e9),
        "predicted_gb": three_digits(memory.of(batch) / 1e9),
        "predicted_gpu_gb": three_digits(gpu.of(GLOBAL_BATCH) / 1e9),
    }


class Steps:
    """Optimizer steps as training/loop.py takes them, on random images.

    Args:
        unet: on the device of the runtime, as `tune.apply` has set it.
        side: of the images, in pixels.
        optimizer: default: that of a run with such a network.
    """

    def __init__(self, unet: Any, side: int, runtime: Runtime, optimizer: Any = None) -> None:
        config = with_defaults(Config(dataset_name="moons", optimizer=optimizer), unet.num_parameters())
        pixels = np.random.default_rng(0).integers(0, 256, (GLOBAL_BATCH, 3, side, side), dtype=np.uint8)
        self.ema = FlatEMA(unet)
        self._config, self._state = config, TrainingState()
        self._updater = Updater(make_optimizer(config, unet, runtime.matmul_dtype()), config.max_grad_norm, runtime)
        scheduler = DDPMScheduler(prediction_type=config.prediction_type)
        self._run: Any = SimpleNamespace(  # what `accumulate_gradients` uses of a Run
            config=config,
            runtime=runtime,
            batches=Batches(pixels, batch_size=GLOBAL_BATCH, seed=config.seed, device=runtime.device),
            scheduler=scheduler,
            loss=Loss(scheduler),
            importance=None,
            model=runtime.accelerator.prepare(unet.train(), device_placement=[False]),
        )

    def take(self, batch_size: int) -> tuple[float, Outcome]:
        """One step with so many images, at most GLOBAL_BATCH, at the full learning rate: its loss and outcome."""
        assert self._config.learning_rate is not None  # `with_defaults`
        self._run.passes = plan.Passes(batch_size, 1)
        loss, passes = loop.accumulate_gradients(self._run, self._state)
        self._state.step += 1
        pending = self._updater.step(self._state.step, self._config.learning_rate, loss, passes, False)
        self.ema.update(self._state.step, pending.skip)
        return loss.item(), pending.outcome()  # both wait for the device


def sampling_seconds(family: str, side: int, batch_size: int, runtime: Runtime) -> float:
    """Of one sampling step of the pipeline, with the weights in the dtype of the runtime."""
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    pipe: Any = DDPMPipeline(make_network(family, side), scheduler).to(runtime.device, runtime.dtype)
    pipe.set_progress_bar_config(disable=True)
    return median_seconds(partial(pipe, batch_size, num_inference_steps=3, output_type="np")) / 3


def predict_for_gpu(family: str, side: int) -> plan.Memory:
    """What a training step in bf16 is expected to need on a GPU, found on a CPU.

    With the operations that a GPU would use, which keep what they keep there; the memory of libraries is not counted.
    """
    unet = make_network(family, side)
    tune.apply(tune.default_tuning("cuda", torch.bfloat16), unet)
    on_cpu: Any = SimpleNamespace(device=torch.device("cpu"), autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    memory = plan.measure_memory(unet, (3, side, side), on_cpu)
    return plan.Memory(memory.fixed - plan.LIBRARIES, memory.per_image)


def median_seconds(call: Callable[[], object]) -> float:
    """The median time of a call after one to warm up, over at least three, and at least SECONDS."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < SECONDS:
        times.append(seconds_per_call(call, 1))
    return median(times)


def peak_bytes(device: torch.device) -> float:
    """The most memory that this process has held so far; on a GPU, the most that torch has allocated there."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


if __name__ == "__main__":
    main()
