"""INPAINTING: RePaint, which fills in masked pixels with an unconditional model.

At each sampling step the known pixels are replaced by those of the noised image. Resampling, jumps back to more noise,
makes the two parts agree. Lugmayr et al. 2022, arXiv 2201.09865.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .denoiser import Denoiser
from .scheduling_ddpm import DDPMScheduler


def repaint_levels(num_steps: int, jump_length: int, resamples: int) -> list[int]:
    """The noise levels that RePaint visits, from `num_steps` (pure noise) to 0 (the image), one up or down at a time.

    At every `jump_length`-th level it jumps back up by that many levels, until it has reached this level `resamples`
    times (section 4.2 and the listing in the appendix).
    """
    jumps_left = dict.fromkeys(range(0, num_steps - jump_length, jump_length), resamples - 1)
    levels, level = [num_steps], num_steps
    while level > 0:
        level -= 1
        levels.append(level)
        if jumps_left.get(level, 0) > 0:
            jumps_left[level] -= 1
            for _ in range(jump_length):
                level += 1
                levels.append(level)
    return levels


def repaint(
    denoiser: Denoiser,
    scheduler: DDPMScheduler,
    known: Tensor,
    mask: Tensor,
    levels: Sequence[int],
    *,
    generator: torch.Generator | list[torch.Generator] | None = None,
    ddim_eta: float = 1.0,
) -> Tensor:
    """Algorithm 1 of RePaint over the timesteps that the scheduler is set to.

    Args:
        known: images, (B, C, H, W), in [-1, 1].
        mask: bool, same shape, True where to paint.
        levels: noise levels from `repaint_levels`, for the scheduler's number of timesteps.
        generator: for all noise; a list has one for each image.
        ddim_eta: of the reverse steps, from 0 (deterministic) to 1 (ancestral).
    Returns:
        (B, C, H, W); outside the mask these are the known pixels, bit for bit.
    """
    # index[level] is the timestep index with that noise level; level 0 is the clean image.
    index = [torch.tensor([t]) for t in (-1, *reversed(scheduler.timesteps.tolist()))]

    def noise() -> Tensor:
        return randn_tensor(known.shape, generator, device=known.device, dtype=known.dtype)

    x_t = noise()
    for level, next_level in pairwise(levels):
        if next_level < level:
            t = int(index[level])
            x_t = scheduler.step(denoiser(x_t, t), t, x_t, generator=generator, return_dict=False, ddim_eta=ddim_eta)[0]
            noised = known if next_level == 0 else scheduler.add_noise(known, noise(), index[next_level])
            x_t = torch.where(mask, x_t, noised)
        else:
            x_t = scheduler.q_step(x_t, index[next_level], index[level], noise())
    return x_t
