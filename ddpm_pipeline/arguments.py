"""ARGUMENTS: the pipeline's arguments, checked before anything is computed.

Every ValueError names the argument, its value and what is allowed.
"""

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .denoiser import UNetDenoiser, check_class_labels
from .images import check_image_size
from .precision import compute_dtype
from .sampling import SamplingRun
from .scheduling_ddpm import DDPMScheduler, check_int

MAX_SEED = 2**32 - 1  # torch's CPU generator uses only the last 32 bits of a larger seed


def check_batch_size(batch_size: int, **per_image: Any) -> int:
    """The batch size B; if batch_size is 1, the length of the arguments with one entry for each image."""
    size = check_int("batch_size", batch_size, 1, 2**31)
    lengths = {}
    for name, values in per_image.items():
        with contextlib.suppress(TypeError):  # None, or one label for all images
            lengths[name] = len(values)
    if size == 1:
        size = max([1, *lengths.values()])
    for name, length in lengths.items():
        if length != size:
            raise ValueError(f"{name} has {length} entries, but the batch has {size}: give one for each image")
    return size


# ---- Random numbers --------------------------------------------------------------------------------------------------


def check_seeds(seeds: int | Sequence[int] | None, generator: Any) -> list[int] | None:
    """A list of seeds, or None if there are none."""
    if seeds is None:
        return None
    values = [seeds] if isinstance(seeds, (int, np.integer)) else list(seeds)
    if generator is not None:
        raise ValueError(f"generator and seeds={values} are both given: give one of the two")
    return [check_int("seeds", seed, 0, MAX_SEED) for seed in values]


def make_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator for each image, so that an image does not depend on the batch it is sampled in."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def check_generator(generator: Any, batch_size: int) -> Any:
    """A generator, a list with one for each image, or None."""
    if not isinstance(generator, (list, tuple)):
        return generator
    if len(generator) != batch_size:
        raise ValueError(
            f"generator is a list of {len(generator)}, but the number of images is {batch_size}: give one for each"
        )
    return list(generator)  # diffusers treats a tuple as a single generator


def image_seeds(generator: Any, seeds: int | Sequence[int] | None, num_images: int) -> list[int]:
    """A seed for each image: the given ones, or random ones from the generator, by default torch's global one."""
    values = check_seeds(seeds, generator)
    if values is not None:
        if len(values) != num_images:
            raise ValueError(
                f"seeds has {len(values)} entries, but the number of images is {num_images}: give one for each "
                "(repeat an image to get several results from it)"
            )
        return values
    generators = check_generator(generator, num_images)
    generators = generators if isinstance(generators, list) else [generators] * num_images
    devices = ["cpu" if each is None else each.device for each in generators]
    return [int(torch.randint(2**32, (), generator=g, device=device)) for g, device in zip(generators, devices)]


# ---- Timesteps -------------------------------------------------------------------------------------------------------


def set_schedule(
    scheduler: Any, num_inference_steps: int | None, timesteps: Sequence[int] | None, default: int | None = None
) -> list[int]:
    """Set the scheduler's timesteps and return them; by default `default` of them, or all if there are fewer."""
    if timesteps is not None:
        if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
            name = type(scheduler).__name__
            raise ValueError(f"timesteps is given, but {name} does not take it: give num_inference_steps")
        if num_inference_steps is not None:
            raise ValueError(f"timesteps and num_inference_steps={num_inference_steps} are both given: give one")
        scheduler.set_timesteps(timesteps=timesteps)
    else:
        longest = scheduler.config.num_train_timesteps
        number = min(default or longest, longest) if num_inference_steps is None else num_inference_steps
        scheduler.set_timesteps(check_int("num_inference_steps", number, 1, longest))
    return [int(t) for t in scheduler.timesteps]


def partial_timesteps(t: int, num_inference_steps: int, num_train_timesteps: int) -> list[int]:
    """Descending timesteps from exactly t, as dense as num_inference_steps from pure noise."""
    number = max(1, round(num_inference_steps * (t + 1) / num_train_timesteps))
    return [round(i * (t + 1) / number) - 1 for i in range(number, 0, -1)]


def step_options(scheduler: Any, generator: Any, eta: float | None) -> dict[str, Any]:
    """Keyword arguments of `scheduler.step`: the generator, if this scheduler takes one, and eta, if it is not None.

    Our scheduler calls it `ddim_eta`.

    Raises:
        ValueError: eta is not in [0, 1], or this scheduler has none.
    """
    parameters = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"generator": generator} if "generator" in parameters else {}
    if eta is not None:
        name = next((name for name in ("ddim_eta", "eta") if name in parameters), None)
        if name is None:
            raise ValueError(f"eta is {eta}, but {type(scheduler).__name__} has no eta: leave it out")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}: give a number from 0 (deterministic) to 1 (ancestral)")
        options[name] = eta
    return options


# ---- Sampling runs ---------------------------------------------------------------------------------------------------


def prepare_sampling(
    unet: UNet2DModel,
    scheduler: Any,
    device: torch.device,
    *,
    batch_size: int,
    generator: Any,
    seeds: int | Sequence[int] | None,
    num_inference_steps: int | None,
    timesteps: Sequence[int] | None,
    eta: float | None,
    class_labels: Any,
    guidance_scale: float,
    latents: Tensor | None,
    height: int | None,
    width: int | None,
    image: Tensor | None = None,
) -> SamplingRun:
    """Check the arguments of a call of the pipeline, set the schedule and draw x_T.

    Args:
        device: of x_T and the labels.
        image: images that give the batch size, height and width.
    """
    if image is not None:
        height, width = image.shape[2:]
    seeds = check_seeds(seeds, generator)
    batch_size = check_batch_size(batch_size, seeds=seeds, class_labels=class_labels, latents=latents, image=image)
    generator = make_generators(seeds) if seeds is not None else check_generator(generator, batch_size)
    labels = check_class_labels(unet, class_labels, guidance_scale, batch_size, device)

    shape = (batch_size, unet.config["in_channels"], *check_image_size(unet, height, width, latents))
    if latents is not None and (tuple(latents.shape) != shape or not latents.is_floating_point()):
        raise ValueError(f"latents are {latents.dtype} of shape {tuple(latents.shape)}: give floats of shape {shape}")
    set_schedule(scheduler, num_inference_steps, timesteps)
    options = step_options(scheduler, generator, eta)

    dtype = compute_dtype(unet.dtype)  # sampling is float32 even if the network is not
    if latents is None:
        noise_device = torch.device("cpu") if device.type == "mps" else device  # mps is not reproducible
        latents = randn_tensor(shape, generator=generator, device=noise_device, dtype=dtype)
    x_t = latents.to(device=device, dtype=dtype) * scheduler.init_noise_sigma  # 1 except for Euler and similar ones
    return SamplingRun(x_t, UNetDenoiser(unet, labels, guidance_scale), options)


def prepare_sdedit(
    scheduler: DDPMScheduler,
    denoiser: UNetDenoiser,
    x_0: Tensor,
    t: int | None,
    num_inference_steps: int,
    *,
    seeds: Sequence[int],
    eta: float | None,
) -> SamplingRun:
    """SDEdit: add noise to x_0 up to index t, Eq. (4), DDPM, and set the schedule to start there.

    Args:
        t: in [0, T), or None for pure noise and the schedule that is set, which gives fresh samples.
        num_inference_steps: sampling steps from pure noise; from t they are as dense.
    """
    generators = make_generators(seeds)
    options = step_options(scheduler, generators, eta)
    x_t = randn_tensor(x_0.shape, generators, device=x_0.device, dtype=x_0.dtype)
    if t is not None:
        x_t = scheduler.add_noise(x_0, x_t, torch.tensor([t]))
        scheduler.set_timesteps(timesteps=partial_timesteps(t, num_inference_steps, scheduler.num_steps))
    return SamplingRun(x_t, denoiser, options)
