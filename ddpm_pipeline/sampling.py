"""SAMPLING: the reverse process step by step with any scheduler of diffusers, and the forward process step by step."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .denoiser import UNetDenoiser
from .schedulers import takes_variance
from .scheduling_ddpm import DDPMScheduler

StepCallback = Callable[[int, int, Tensor], Tensor]  # (step number, t, x_prev) to the x_prev to continue with


class TrajectoryStep(NamedTuple):
    """One step of a trajectory; x_t and x_0_pred are (B, C, H, W). x_0_pred is None if the scheduler returns none."""

    t: int
    x_t: Tensor
    x_0_pred: Tensor | None


class LastStep(TrajectoryStep):
    """The last step, with the generated images, which no x_0_pred shows if the scheduler returns none."""

    images: Tensor


SamplingStep = tuple[TrajectoryStep, Tensor]  # a step, and its x_prev


class SamplingRun(NamedTuple):
    """What the sampling loop starts from: x_T, the network, a scheduler for this call alone, options of its step."""

    x_t: Tensor
    denoiser: UNetDenoiser
    scheduler: Any
    step_options: dict[str, Any]


@torch.no_grad()
def sampling_steps(
    run: SamplingRun,
    *,
    interrupted: Callable[[], bool],
    callback: StepCallback | None = None,
) -> Iterator[SamplingStep]:
    """Algorithm 2, DDPM, or that of another scheduler, over the scheduler's timesteps.

    Args:
        interrupted: called before each step; True ends the loop.
        callback: called after each step.
    """
    x_t, scheduler = run.x_t, run.scheduler
    timesteps = scheduler.timesteps
    channels = None if takes_variance(scheduler) else x_t.shape[1]
    # of the network, on its device, moved once; the scheduler needs its own ones on the host
    network_timesteps = getattr(scheduler, "network_timesteps", timesteps).to(x_t.device)
    for i, t in enumerate(timesteps):
        if interrupted():
            break
        model_output = run.denoiser(scheduler.scale_model_input(x_t, t), network_timesteps[i])
        try:
            output = scheduler.step(model_output[:, :channels], t, x_t, **run.step_options)
        except NotImplementedError as error:  # several do not take x_0-prediction
            raise ValueError(f"the {type(scheduler).__name__} cannot sample from this model: {error}") from error
        step = TrajectoryStep(int(t), x_t, output.get("pred_original_sample"))
        x_t = output.prev_sample
        if callback is not None:
            x_t = callback(i, step.t, x_t)
            run.denoiser.forget_weights()
        if i == len(timesteps) - 1:
            step = LastStep(*step)
            step.images = x_t
        yield step, x_t


def noising_steps(
    scheduler: DDPMScheduler, x_0: Tensor, generator: torch.Generator | list[torch.Generator] | None
) -> Iterator[TrajectoryStep]:
    """The forward process over the scheduler's timesteps, ascending: Eq. (2), DDPM, from one to the next."""
    x_t, prev_t = x_0, -1
    for t in reversed(scheduler.timesteps.tolist()):
        noise = randn_tensor(x_0.shape, generator=generator, device=x_0.device, dtype=x_0.dtype)
        x_t = scheduler.q_step(x_t, torch.tensor([t]), torch.tensor([prev_t]), noise)
        yield TrajectoryStep(t, x_t, x_0)
        prev_t = t
