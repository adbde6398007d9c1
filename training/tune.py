"""TUNE: how the network computes on this machine, chosen by a short trial of training steps.

Which of two implementations is faster depends on the processor, the network, the size of the images and the batch, and
no rule has held on two machines. So each is tried for a few steps at the start of a run: the memory format of the
images, the implementation of attention, and on a CPU with many cores the number of threads. Results depend on the
choice by rounding only. It is kept in cache_dir for the next run, and in the run record: a resumed run computes as
before, so it continues bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ddpm_pipeline import fast_unet, kernels
from ddpm_pipeline.attention import ChunkedAttnProcessor
from ddpm_pipeline.fast_unet import as_channels_last, speed_up
from ddpm_pipeline.files import replacing

if TYPE_CHECKING:
    from training.config import Config
    from training.run.runtime import Runtime

FILE = "tuning.json"  # in cache_dir
SECONDS = 4.0  # no candidate is begun later than this; the last one ends within a second
STEP_SECONDS = 0.2  # the batch of the trial is cut until a step takes about this long
ROUNDS = 3  # steps of each of two candidates
# On other devices than the CPU attention is always fused.
CHOICES: dict[str, tuple[str, ...]] = {
    "attention": ("chunks", "fused"),
    "memory_format": ("channels_last", "contiguous"),
}
MARGIN = 1.05  # a candidate must be this much faster than the one chosen so far: noise must not choose


@dataclass(frozen=True)
class Tuning:
    """How the network computes.

    Args:
        memory_format: of the images in the network.
        attention: "chunks" or "fused", see ddpm_pipeline/attention.py.
        threads: on a CPU; None: as many as the runtime has set.
        images_per_second: that it was measured at on each rank, in steps without optimizer; None: it was not.
    """

    memory_format: Literal["channels_last", "contiguous"] = "contiguous"
    attention: Literal["chunks", "fused"] = "fused"
    threads: int | None = None
    images_per_second: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        threads = self.threads
        if (
            self.memory_format not in CHOICES["memory_format"]
            or self.attention not in CHOICES["attention"]
            or not (threads is None or (isinstance(threads, int) and threads >= 1))
            or not isinstance(self.images_per_second, int | float | None)
        ):
            raise ValueError(f"{self} is no way to compute: give values of {CHOICES} and at least 1 thread")

    @classmethod
    def read(cls, values: Any) -> Tuning | None:
        """From a JSON object; None if that is damaged or of another version."""
        try:
            return cls(**values)
        except (TypeError, ValueError):
            return None

    def __str__(self) -> str:
        threads = f" + {self.threads} threads" if self.threads else ""
        return f"{self.memory_format} + {self.attention}{threads}"


def choose(
    config: Config,
    runtime: Runtime,
    unet: torch.nn.Module,
    image_shape: tuple[int, int, int],
    found: tuple[Path, dict[str, Any]] | None,
) -> Tuning:
    """What a run computes with: what it had before if it is resumed, else by its configuration.

    Args:
        image_shape: (C, H, W).
        found: path and manifest of the checkpoint to resume from.
    """
    tuning = None
    if found is not None and (recorded := found[1].get("tuning")) is not None:
        tuning = Tuning.read(recorded)
        if tuning is None:
            runtime.print(
                f"WARNING: this version cannot compute as the checkpoint says, {recorded}: results differ by rounding"
            )
    if tuning is None and (config.tune == "off" or config.compile):  # a compiled network has its own kernels
        tuning = default_tuning(runtime.device.type, runtime.dtype)
    if tuning is None:
        runtime.adapt_threads(at_once=True)  # with more threads than free cores nothing could be measured
        batch_size = config.train_batch_size
        if batch_size == "auto":
            batch_size = config.batch_of_rank(runtime.world_size) // config.gradient_accumulation_steps
        tuning = tune(unet, image_shape, batch_size, runtime, Path(config.cache_dir).expanduser())
    for parameter in unet.parameters():
        if 1 in parameter.shape:
            parameter.register_hook(_with_plain_strides)
    if tuning.threads is not None:
        runtime.limit_threads(tuning.threads)
    return tuning


def _with_plain_strides(gradient: Tensor) -> Tensor:
    """Convolutions of channels-last images give the gradient of a kernel with one pixel or channel unusual strides, of
    which DistributedDataParallel warns and makes a copy."""
    return gradient.flatten().view(gradient.shape)


def default_tuning(device_type: str, dtype: torch.dtype) -> Tuning:
    """What is used without a trial."""
    on_cpu = device_type == "cpu"
    return Tuning(
        memory_format="channels_last" if on_cpu and kernels.group_norm_kernel() is not None else "contiguous",
        attention="chunks" if on_cpu and dtype == torch.bfloat16 else "fused",
    )


def apply(tuning: Tuning, unet: torch.nn.Module) -> None:
    """Let the network compute so. It can be called again with another choice."""
    speed_up(unet)
    for module in unet.modules():
        if isinstance(processor := getattr(module, "processor", None), ChunkedAttnProcessor):
            processor.implementation = tuning.attention
    for identifier, hook in list(unet._forward_pre_hooks.items()):
        if isinstance(hook, _InMemoryFormat):
            del unet._forward_pre_hooks[identifier]
    unet.register_forward_pre_hook(_InMemoryFormat(tuning.memory_format))


@dataclass(frozen=True)
class _InMemoryFormat:
    """A hook of the network that puts the images it is called with in a memory format."""

    name: str

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = args
        return (as_channels_last(x) if self.name == "channels_last" else x.contiguous(), *others)


def tune(
    unet: torch.nn.Module, image_shape: tuple[int, int, int], batch_size: int, runtime: Runtime, cache_dir: Path
) -> Tuning:
    """The fastest of the candidates, by a trial, or as an earlier trial found. All ranks get the choice of rank 0.

    The network has the weights and the random state that it had before.

    Args:
        image_shape: (C, H, W).
        batch_size: images of a forward pass on each rank.
        cache_dir: folder of the results of earlier trials; created if missing.
    """
    key = _key(unet, image_shape, batch_size, runtime)
    cached = runtime.broadcast(_read(cache_dir).get(key))
    if cached is not None:
        runtime.print(f"tuned before: {cached} ({cache_dir / FILE})")
        return cached
    started = time.monotonic()
    trial, threads = Trial(unet, image_shape, batch_size, runtime, started + SECONDS), runtime.threads
    tuning = trial.run(default_tuning(runtime.device.type, runtime.dtype))
    tuning = runtime.broadcast(replace(tuning, images_per_second=trial.rates.get(tuning)))
    runtime.adapt_threads(at_once=True)
    is_kept = len(trial.rates) > 1 and runtime.threads == threads
    if runtime.is_main and is_kept:
        _write(cache_dir, key, tuning)
    rates = ", ".join(f"{candidate} {rate:.3g}" for candidate, rate in trial.rates.items() if candidate != tuning)
    speed = f" {trial.rates[tuning]:.3g} images/s" if tuning in trial.rates else ""
    runtime.print(
        f"tuned in {time.monotonic() - started:.1f} s: {tuning}{speed}"
        + (f"; {rates}" if rates else "")
        + ("" if runtime.device.type != "cpu" or kernels.load()[0] else f"; GroupNorm by torch: {kernels.load()[1]}")
        + ("" if is_kept else "; the next run tries again, for this machine was too busy to compare")
    )
    return tuning


@contextmanager
def without_traces(unet: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """A context for training steps of which neither the mode of the network nor the random numbers keep a trace."""
    was_training = unet.training
    unet.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        unet.train(was_training)


def random_inputs(
    unet: Any, image_shape: tuple[int, int, int], number: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x_t, t and class labels (None for a network without classes) of so many images."""
    x_t, t = torch.randn(number, *image_shape, device=device), torch.randint(1000, (number,), device=device)
    return x_t, t, None if unet.config["num_class_embeds"] is None else torch.zeros_like(t)


class Trial:
    """Training steps with each candidate, without an update of the weights.

    Args:
        deadline: on time.monotonic(); no candidate is begun later.
    Attributes:
        rates: images per second of each candidate that was tried, in its fastest step.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        image_shape: tuple[int, int, int],
        batch_size: int,
        runtime: Runtime,
        deadline: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._unet, self._image_shape, self._runtime = unet, image_shape, runtime
        self._deadline, self._clock = deadline, clock
        self._batch_size, self._threads = batch_size, torch.get_num_threads()
        self.rates: dict[Tuning, float] = {}

    def run(self, default: Tuning) -> Tuning:
        """The fastest candidate, or the default where none is clearly faster or there is no time to try."""
        device, threads, best = self._runtime.device, self._threads, default
        with without_traces(self._unet, device):
            self._cut_batch(default)
            for field, values in CHOICES.items():
                if self._clock() < self._deadline and not (field == "attention" and device.type != "cpu"):
                    others = [value for value in values if value != getattr(best, field)]
                    for value in others:
                        best = self._faster(best, replace(best, **{field: value}))  # type: ignore[arg-type]  # CHOICES
            while self._runtime.adapts_threads and threads >= 4 and self._clock() < self._deadline:
                # A small network on many cores waits more than it computes.
                threads //= 2
                if best is (best := self._faster(best, replace(best, threads=threads))):
                    break
        if device.type == "cpu":
            torch.set_num_threads(self._threads)
        return best

    def measure(self, tuning: Tuning) -> float:
        """Images per second with this candidate alone, on this rank."""
        with without_traces(self._unet, self._runtime.device):
            self._cut_batch(tuning)
            self._seconds(tuning)  # it warms up
            seconds = [self._seconds(tuning)]
            while len(seconds) < ROUNDS and self._clock() < self._deadline:
                seconds.append(self._seconds(tuning))
            return self._batch_size / min(seconds)

    def _faster(self, best: Tuning, candidate: Tuning) -> Tuning:
        """The first unless the other one is clearly faster: by steps in turn, so that other load affects both alike."""
        pair = (best, candidate)
        seconds: dict[Tuning, list[float]] = {tuning: [] for tuning in pair}
        for i in range(1 + ROUNDS):  # the first round warms up
            for tuning in pair if i % 2 else reversed(pair):
                seconds[tuning].append(self._seconds(tuning))
            if i and self._clock() > self._deadline:
                break
        for tuning in pair:
            self.rates[tuning] = max(self.rates.get(tuning, 0.0), self._batch_size / min(seconds[tuning][1:]))
        ratio = median(of_best / of_candidate for of_best, of_candidate in list(zip(*seconds.values()))[1:])
        return candidate if ratio > MARGIN else best

    def _cut_batch(self, tuning: Tuning) -> None:
        """Find out how long a step takes with few images, and so how many a step of the trial may have."""
        wanted, self._batch_size = self._batch_size, min(self._batch_size, 2)
        seconds = min(self._seconds(tuning) for _ in range(2))
        self._batch_size = max(1, min(wanted, round(self._batch_size * STEP_SECONDS / seconds)))

    def _seconds(self, tuning: Tuning) -> float:
        """Of a training step with this candidate."""
        apply(tuning, self._unet)
        device = self._runtime.device
        if device.type == "cpu":
            torch.set_num_threads(tuning.threads or self._threads)
        inputs = random_inputs(self._unet, self._image_shape, self._batch_size, device)
        self._wait()
        begin = time.perf_counter()
        with self._runtime.autocast():
            prediction = self._unet(*inputs, return_dict=False)[0]
        prediction.float().square().mean().backward()
        self._wait()
        seconds = time.perf_counter() - begin
        for parameter in self._unet.parameters():
            parameter.grad = None
        return seconds

    def _wait(self) -> None:
        if self._runtime.device.type != "cpu":
            torch.accelerator.synchronize()


def _key(unet: Any, image_shape: tuple[int, int, int], batch_size: int, runtime: Runtime) -> str:
    """A hash of all that the choice may depend on."""
    name = torch.cuda.get_device_name() if runtime.device.type == "cuda" else kernels.processor()
    config = {field: value for field, value in unet.config.items() if not field.startswith("_")}  # those vary
    parts = [
        name, runtime.device.type, torch.get_num_threads(), runtime.world_size, torch.__version__, str(runtime.dtype),
        config, image_shape, batch_size, unet.is_gradient_checkpointing, kernels.load()[1],
        *(Path(file).read_text(encoding="utf-8") for file in (kernels.SOURCE, fast_unet.__file__, __file__)),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()[:32]


def _read(cache_dir: Path) -> dict[str, Tuning]:
    """The results of earlier trials by key; those that cannot be read do not count."""
    try:
        found = {key: Tuning.read(values) for key, values in json.loads((cache_dir / FILE).read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        return {}
    return {key: tuning for key, tuning in found.items() if tuning is not None}


def _write(cache_dir: Path, key: str, tuning: Tuning) -> None:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with replacing(cache_dir / FILE) as temporary:
            content = {name: asdict(found) for name, found in (_read(cache_dir) | {key: tuning}).items()}
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError:
        pass  # the next run tries again
