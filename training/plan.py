"""PLAN: what a run will take on this machine, measured before its first step: network, batch, time and memory.

`--denoiser auto` tries the families from the smallest up, for a second each, and takes the largest one that sees ENOUGH
images in the time of the run. What the forward passes of two and of three images keep for the backward pass tells how
much memory an image needs, and so which batch fits.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training import tune
from training.budget import DEFAULT_MINUTES, Budget
from training.config import GLOBAL_BATCH
from training.denoiser import FAMILIES
from training.post_hoc_ema import TRACKED
from training.run.failures import flags_of_passes, is_out_of_memory

if TYPE_CHECKING:
    from training.config import Config
    from training.run.runtime import Runtime

# Images, each counted as often as it is seen; rules of thumb. The moons look right after 32,000, digits after 150,000,
# all with the smallest family; before a larger one is worth its time, it should see as many.
ENOUGH, RATHER_FEW, FEW = 200_000, 50_000, 10_000
ENOUGH_STEPS = {GLOBAL_BATCH: 2000, 32: 500}  # by images of a step; with fewer steps, a step has fewer images
LEAST_BATCH = 16
MANY_PASSES = 250  # over the training images; 300 digits were best after 256 (docs/training.md, "Small sets")
SECONDS = 2.0  # for one network
# Of the memory of a step: for each weight the gradient, two moments of AdamW (or one of Muon), the EMA and a copy in
# bf16, with post_hoc_ema its averages too; for what the forward pass keeps also gradients of activations, work space
# and fragments.
WEIGHTS, KEPT = 5.5, 2.0
LIBRARIES = 0.8e9  # bytes of a process that has loaded them
SAFE = 0.8  # of the memory that is free
CGROUP = Path("/sys/fs/cgroup")  # of this container

ImageShape = tuple[int, int, int]  # (C, H, W)


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step needs: fixed + images * per_image, which is infinite if the measurement ran out."""

    fixed: float
    per_image: float

    def of(self, images: int) -> float:
        return self.fixed + images * self.per_image

    def largest_batch(self, available: float) -> int:
        """How many images fit; 0: not one."""
        return max(0, math.floor((available - self.fixed) / self.per_image))


@dataclass(frozen=True)
class Passes:
    """The forward passes of a step on each rank: `number` of them with `batch_size` images."""

    batch_size: int
    number: int


# ---- The network -----------------------------------------------------------------------------------------------------


def choose_family(
    make: Callable[[str], Any], image_shape: ImageShape, runtime: Runtime, config: Config, budget: Budget
) -> str:
    """The largest family that sees ENOUGH images in time, the same on all ranks; prints why.

    The time of a run that is limited in steps alone is DEFAULT_MINUTES. Without trials (`tune` is off) the smallest on
    a CPU, and the second elsewhere.

    Args:
        make: a network of the family on the device of the runtime.
    """
    if config.tune == "off":
        return list(FAMILIES)[runtime.device.type != "cpu"]
    runtime.adapt_threads(at_once=True)
    minutes = min(budget.seconds / 60, DEFAULT_MINUTES if math.isinf(budget.seconds) else math.inf)
    most = budget.steps * config.global_batch(runtime.world_size)
    chosen, found = next(iter(FAMILIES)), []
    for name in FAMILIES:
        unet = make(name)
        tune.apply(tune.default_tuning(runtime.device.type, runtime.dtype), unet)
        fits = (
            measure_memory(unet, image_shape, runtime, averages_of(config)).largest_batch(
                SAFE * available_to_rank(runtime)
            )
            > 0
        )
        rate = images_per_second(unet, image_shape, runtime) if fits else 0.0
        rate, fits = runtime.broadcast((rate, fits))
        del unet
        seen = rate * 60 * minutes
        seen_text = f"{name} {rate:.3g} images/s, {seen:,.0f} in {minutes:g} minutes"
        found.append(seen_text if fits else f"{name} needs more memory")
        if min(seen, most) < ENOUGH:
            break
        chosen = name
    why = "the smallest" if chosen == next(iter(FAMILIES)) else f"the largest that sees {ENOUGH:,} images"
    runtime.print(f"denoiser: {chosen}, {why} ({'; '.join(found)})")
    return chosen


def expected_steps(budget: Budget, steps_per_second: float | None) -> float:
    """How many optimizer steps a run will have at this speed; infinity: that is not known."""
    if steps_per_second is None or math.isinf(budget.seconds):
        return budget.total
    return min(budget.total, max(1, round(budget.seconds * steps_per_second)))


def length_warnings(images: float, num_images: int, images_per_second: float, config: Config) -> list[str]:
    """What is said before the first step if the length of a run is hopeless, short, or long for so few images.

    Args:
        images: that the run sees, each counted as often as it is seen.
        num_images: the training images.
    """
    found = []
    if config.init_from is None and config.dataset_name != "moons" and images < RATHER_FEW:
        more = f"{ENOUGH:,} take {ENOUGH / images_per_second / 60:,.0f} minutes here"
        if images < FEW:
            more = f"give more time, --max_train_minutes {math.ceil(FEW / images_per_second / 60)} at least"
        so_few = "may be little more than noise" if images < FEW else "are still rough"
        found.append(
            f"WARNING: this run sees {images:,.0f} images, and after so few samples {so_few}: {more}; smaller images "
            "(--resolution) are faster"
        )
    if math.isfinite(images) and images > MANY_PASSES * num_images:
        found.append(
            f"WARNING: this run sees each image {images / num_images:,.0f} times, and a network learns so few by "
            "heart: give it more of them, flips where they make sense, --dropout 0.1 or less time, and see "
            '"Small sets" in docs/training.md'
        )
    return found


def images_per_second(unet: Any, image_shape: ImageShape, runtime: Runtime) -> float:
    """Of a training step without its optimizer, all ranks together."""
    tuning = tune.default_tuning(runtime.device.type, runtime.dtype)
    trial = tune.Trial(unet, image_shape, GLOBAL_BATCH, runtime, time.monotonic() + SECONDS)
    return runtime.world_size * trial.measure(tuning)


# ---- Memory and batch ------------------------------------------------------------------------------------------------


def default_batch(
    config: Config, budget: Budget, images_per_second: float | None, manifest: dict[str, Any] | None
) -> int:
    """Images of a step if no batch size is given: GLOBAL_BATCH; in a run that is limited in images or time and comes to
    fewer steps than ENOUGH_STEPS, a half or a quarter.

    Args:
        budget: for steps of GLOBAL_BATCH images.
        images_per_second: of a trial; None: it is not known.
        manifest: of the checkpoint that the run continues from, with its batch.
    """
    if manifest is not None:
        return max(1, int(manifest["global_batch"]) // config.gradient_accumulation_steps)
    if config.max_train_steps is not None or config.gradient_accumulation_steps > 1:
        return GLOBAL_BATCH
    images = budget.steps * GLOBAL_BATCH
    if images_per_second:
        images = min(images, budget.seconds * images_per_second)
    return next((batch for batch, steps in ENOUGH_STEPS.items() if images >= steps * batch), LEAST_BATCH)


def plan_passes(
    config: Config,
    runtime: Runtime,
    memory: Memory,
    manifest: dict[str, Any] | None,
    default_batch: int = GLOBAL_BATCH,
) -> Passes:
    """How each rank computes its images of a step, the same on all ranks.

    Args:
        manifest: of the checkpoint that the run continues from, with its batches if that is possible.
    Raises:
        ValueError: that does not fit into memory; the message says what does.
    """
    available = available_to_rank(runtime)
    of_rank, memory = config.batch_of_rank(runtime.world_size, default_batch), runtime.broadcast(memory)
    before = (manifest or {}).get("batch_size")
    if config.train_batch_size == "auto" and before and of_rank % before == 0 and memory.of(before) <= available:
        return Passes(before, of_rank // before)
    return fit_passes(config, of_rank, memory, available)


def fit_passes(config: Config, of_rank: int, memory: Memory, available: float) -> Passes:
    """Passes for `of_rank` images of a step, if so many bytes are available; ValueError: see `plan_passes`."""
    train_batch_size = config.train_batch_size
    if train_batch_size != "auto" and memory.of(train_batch_size) <= available:
        return Passes(train_batch_size, of_rank // train_batch_size)
    fitting = min(of_rank, memory.largest_batch(SAFE * available))
    best = next((n for n in range(fitting, 0, -1) if of_rank % n == 0), None)
    if best is None:
        needed = (
            f"about {memory.of(1) / 1e9:.1f} GB" if math.isfinite(memory.per_image) else "more memory than there is"
        )
        raise ValueError(
            f"a step with one image needs {needed}, and {available / 1e9:.1f} GB are free: give a smaller --resolution "
            "or --denoiser"
        )
    if train_batch_size != "auto":
        raise ValueError(
            f"train_batch_size is {train_batch_size}, which needs about {memory.of(train_batch_size) / 1e9:.1f} GB, "
            f"and {available / 1e9:.1f} GB are free: give {flags_of_passes(config, best, of_rank // best)}, which is "
            "the same global batch"
        )
    return Passes(best, of_rank // best)


def averages_of(config: Config) -> int:
    """The number of averages of the weights beside the EMA."""
    return len(TRACKED) if config.post_hoc_ema else 0


def check_weights(unet: Any, runtime: Runtime, averages: int = 0) -> None:
    """Raise ValueError if the weights of this network, which may be on the meta device, leave no memory to train it.

    Args:
        averages: as for `measure_memory`.
    """
    parameters, available = unet.num_parameters(), available_to_rank(runtime)
    if (needed := (WEIGHTS + averages) * 4 * parameters) > available:
        raise ValueError(
            f"the network has {parameters / 1e6:,.1f} M parameters: training needs about {needed / 1e9:,.1f} GB for "
            f"them, and {available / 1e9:.1f} GB are free: give a smaller --denoiser"
        )


def measure_memory(unet: Any, image_shape: ImageShape, runtime: Runtime, averages: int = 0) -> Memory:
    """What a training step of this network needs.

    Args:
        averages: number of averages of the weights beside the EMA.
    """
    weights = 4 * sum(parameter.numel() for parameter in unet.parameters())
    fixed = (WEIGHTS + averages) * weights + (LIBRARIES if runtime.device.type == "cpu" else 0.0)
    try:
        two, three = (_kept_bytes(unet, image_shape, number, runtime) for number in (2, 3))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Memory(fixed, math.inf)
    return Memory(fixed, KEPT * max(1, three - two))


def _kept_bytes(unet: Any, image_shape: ImageShape, number: int, runtime: Runtime) -> int:
    """Bytes that a forward pass of so many images keeps for the backward pass, and of the weights."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        tune.without_traces(unet, runtime.device),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        runtime.autocast(),
    ):
        output = unet(*tune.random_inputs(unet, image_shape, number, runtime.device), return_dict=False)
        total = sum(kept.values())
        del output
    return total


def available_to_rank(runtime: Runtime) -> float:
    """Bytes that each rank may take, the same number on all: on a CPU the processes of a machine share its memory."""
    processes = runtime.processes_per_node if runtime.device.type == "cpu" else 1
    return runtime.broadcast(available_bytes(runtime.device) / processes)


def available_bytes(device: torch.device) -> float:
    """Memory that is free on this device; in a container, what its limit leaves."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = float(psutil.virtual_memory().available)
    try:
        limit, used = (float((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = re.search(r"^inactive_file (\d+)$", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no container, or no limit
        return free
    return min(free, limit - used + (float(cached[1]) if cached else 0.0))
