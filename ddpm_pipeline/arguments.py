"""ARGUMENTS: the pipeline's arguments, checked before anything is computed.

Every ValueError names the argument, its value and what is allowed.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .calibrated import CalibratedScheduler, Guidance, choose_table
from .denoiser import UNetDenoiser, prepare_denoiser
from .images import check_image_size
from .precision import compute_dtype
from .sampling import SamplingRun
from .schedulers import check_scheduler, set_schedule, step_options
from .scheduling_ddpm import DDPMScheduler, check_choice, check_int

MAX_SEED = 2**32 - 1  # torch's CPU generator uses only the last 32 bits of a larger seed


def check_batch_size(batch_size: int, **per_image: Any) -> int:
    """The batch size B; if batch_size is 1, the length of the arguments with one entry for each image."""
    size = check_int("batch_size", batch_size, 1, 2**31)
    lengths: dict[str, int] = {}
    for name, values in per_image.items():
        with contextlib.suppress(TypeError):  # None, or one label for all images, whose name has a length
            lengths |= {} if isinstance(values, str) else {name: len(values)}
    if size == 1:
        size = max([1, *lengths.values()])
    for name, length in lengths.items():
        if length != size:
            raise ValueError(f"{name} has {length} entries, but the batch has {size}: give one for each image")
    return size


def check_fusion(path: str, balanced_several: bool, **of_noise: Any) -> None:
    """Raise ValueError for arguments of `fuse` that do not go together; `of_noise` are those of path="noise"."""
    check_choice("path", path, ("latent", "noise"))
    given = [name for name, value in of_noise.items() if value is not None]
    if path == "latent" and given:
        raise ValueError(f'{given[0]} is given, but path="latent" adds no noise: give it with path="noise"')
    if balanced_several:
        raise ValueError("balance needs two images: give image_a and image_b, or leave balance out")


# ---- Random numbers --------------------------------------------------------------------------------------------------


def check_seeds(seeds: int | Sequence[int] | None, generator: Any) -> list[int] | None:
    """A list of seeds, or None if there are none."""
    if seeds is None:
        return None
    single = isinstance(seeds, (int, float, str, bytes, dict, set, np.generic)) or getattr(seeds, "ndim", 1) == 0
    values: list[Any] = [seeds]
    try:
        values = values if single else list(seeds)  # type: ignore[arg-type]  # no integer
    except TypeError:
        raise ValueError(f"seeds is {seeds!r}: give an integer from 0 to {MAX_SEED}, or a list of them") from None
    if generator is not None:
        raise ValueError(f"generator and seeds={values} are both given: give one of the two")
    return [check_int("seeds", seed, 0, MAX_SEED) for seed in values]


def make_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator for each image, so that an image does not depend on the batch it is sampled in."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def check_generator(generator: Any, batch_size: int) -> Any:
    """A generator, a list with one for each image, or None."""
    generators = generator if isinstance(generator, (list, tuple)) else [] if generator is None else [generator]
    wrong = [each for each in generators if not isinstance(each, torch.Generator)]
    if wrong:
        raise ValueError(f"generator is {wrong[0]!r}: give a torch.Generator, a list of them, or seeds, integers")
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
                f"seeds has {len(values)} entries, but the number of images is {num_images}: give one for each"
            )
        return values
    generators = check_generator(generator, num_images)
    generators = generators if isinstance(generators, list) else [generators] * num_images
    devices = ["cpu" if each is None else each.device for each in generators]
    return [int(torch.randint(2**32, (), generator=g, device=device)) for g, device in zip(generators, devices)]


def repeat_for_seeds(images: Tensor, generator: Any, seeds: int | Sequence[int] | None) -> Tensor:
    """A single image once for each of several seeds or generators, so that each gives a result of its own."""
    several = check_seeds(seeds, generator) if seeds is not None else generator
    if len(images) > 1 or not isinstance(several, (list, tuple)) or len(several) < 2:
        return images
    return images.repeat(len(several), *[1] * (images.ndim - 1))


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
    calibrated: bool | None,
    class_labels: Any,
    guidance_scale: float,
    guidance_interval: tuple[float, float] | None,
    autoguidance_scale: float,
    guide: UNet2DModel | None,
    latents: Tensor | None,
    height: int | None,
    width: int | None,
    image: Tensor | None = None,
) -> SamplingRun:
    """Check the arguments of a call of the pipeline, set the schedule of a scheduler of its own and draw x_T.

    Args:
        device: of x_T and the labels.
        image: images that give the batch size, height and width.
    """
    check_scheduler(scheduler, unet)
    if latents is not None and not (isinstance(latents, Tensor) and latents.layout == torch.strided):
        raise ValueError(f"latents is a {type(latents).__name__}: give a dense tensor, (B, C, H, W)")
    if image is not None:
        height, width = image.shape[2:]
    seeds = check_seeds(seeds, generator)
    batch_size = check_batch_size(batch_size, seeds=seeds, class_labels=class_labels, latents=latents, image=image)
    generator = make_generators(seeds) if seeds is not None else check_generator(generator, batch_size)
    guidance = guidance_scale, guidance_interval, autoguidance_scale, guide
    denoiser = prepare_denoiser(unet, scheduler, device, batch_size, class_labels, *guidance)

    shape = (batch_size, unet.config["in_channels"], *check_image_size(unet, height, width, latents))
    if latents is not None and (tuple(latents.shape) != shape or not latents.is_floating_point()):
        raise ValueError(f"latents are {latents.dtype} of shape {tuple(latents.shape)}: give floats of shape {shape}")
    if latents is not None and (latents.is_meta or not latents.float().isfinite().all()):
        raise ValueError("latents have values that are nan or infinite: give finite numbers, about N(0, I)")
    table = choose_table(
        calibrated, scheduler, unet, guide, guidance_of(denoiser), num_inference_steps, shape[2:],
        timesteps=timesteps, eta=eta,
    )  # fmt: skip
    if table is None:
        scheduler = set_schedule(scheduler, num_inference_steps, timesteps)
    else:
        scheduler = CalibratedScheduler(set_schedule(scheduler, None, table.timesteps), table)
    options = step_options(scheduler, generator, eta)

    dtype = compute_dtype(unet.dtype)  # sampling is float32 even if the network is not
    if latents is None:
        noise_device = torch.device("cpu") if device.type == "mps" else device  # mps is not reproducible
        latents = randn_tensor(shape, generator=generator, device=noise_device, dtype=dtype)
    x_t = latents.to(device=device, dtype=dtype) * scheduler.init_noise_sigma  # 1 except for Euler and similar ones
    return SamplingRun(x_t, denoiser, scheduler, options)


def guidance_of(denoiser: UNetDenoiser) -> Guidance:
    """The guidance of a call, the defaults where it has no effect."""
    if denoiser.autoguidance_scale != 1:
        return Guidance(1.0, denoiser.autoguidance_scale, denoiser.guidance_interval)
    if denoiser.class_labels is None or denoiser.guidance_scale == 1:
        return Guidance()
    return Guidance(denoiser.guidance_scale, guidance_interval=denoiser.guidance_interval)


def prepare_sdedit(
    scheduler: DDPMScheduler,
    denoiser: UNetDenoiser,
    x_0: Tensor,
    t: int | None,
    *,
    seeds: Sequence[int],
    eta: float | None,
) -> SamplingRun:
    """SDEdit: add noise to x_0 up to index t, Eq. (4), DDPM.

    Args:
        scheduler: of this call alone, set to the timesteps from t on.
        t: in [0, T), or None for pure noise, which gives fresh samples.
    """
    generators = make_generators(seeds)
    options = step_options(scheduler, generators, eta)
    x_t = randn_tensor(x_0.shape, generators, device=x_0.device, dtype=x_0.dtype)
    if t is not None:
        x_t = scheduler.add_noise(x_0, x_t, torch.tensor([t]))
    return SamplingRun(x_t, denoiser, scheduler, options)
