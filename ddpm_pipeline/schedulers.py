"""SCHEDULERS: which of diffusers' schedulers sample from a DDPM, and a copy with its own timesteps for each call."""

import copy
import inspect
import math
import threading
from collections.abc import Sequence
from typing import Any

from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as BuiltInDDPMScheduler

from .scheduling_ddpm import DDPMScheduler, check_int, check_timesteps

# Those whose images of Gaussian data are as right as DDIM's: see tests/test_other_schedulers.py.
COMPATIBLE = (
    "DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "DEISMultistepScheduler", "SASolverScheduler", "DPMSolverSinglestepScheduler",
    "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler", "TCDScheduler",
    "DDIMParallelScheduler", "DDPMParallelScheduler",
)  # fmt: skip

# Values of options with which a compatible class is one of another family, or gives wrong images of Gaussian data.
WRONG_OPTIONS = {
    "use_flow_sigmas": True, "timestep_type": "continuous", "interpolation_type": "log_linear", "predict_x0": False,
}  # fmt: skip
NOISE_SCHEDULE = ("beta_start", "beta_end", "beta_schedule")
PREDICTIONS = ("epsilon", "sample", "v_prediction")

_LOCK = threading.Lock()  # of all schedulers; not an attribute, since a pipeline can be pickled and deep-copied


def check_number(name: str, value: Any, least: float, most: float, allowed: str) -> float:
    """The value as a float; ValueError unless it is a number from least to most, which the text `allowed` says."""
    try:
        number = math.nan if isinstance(value, (str, bytes, bool)) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # the last but one: a tensor of several
        number = math.nan
    if not (least <= number <= most and math.isfinite(number)):
        raise ValueError(f"{name} is {value!r}: give {allowed}")
    return number


def check_scheduler(scheduler: Any, unet: UNet2DModel) -> None:
    """Raise ValueError for a scheduler whose images would be wrong: one of another family than DDPM.

    A class of the user's own is taken as it is, unless it is derived from such a class of diffusers.
    """
    name, family = type(scheduler).__name__, class_of_diffusers(scheduler)
    needed = ("config", "set_timesteps", "scale_model_input", "step", "init_noise_sigma")
    missing = [attribute for attribute in needed if not hasattr(scheduler, attribute)]
    if (family is not None and family not in COMPATIBLE) or missing:
        raise ValueError(
            f"the scheduler is a {name}, which cannot sample from a DDPM: give one of {', '.join(COMPATIBLE[:5])} or "
            f"the {len(COMPATIBLE) - 5} others that docs/pipeline.md lists"
        )
    for option, wrong in WRONG_OPTIONS.items():
        if (value := scheduler.config.get(option)) is not None and value == wrong:
            raise ValueError(
                f"the {name} has {option}={value!r}, with which it cannot sample from a DDPM: leave it out"
            )
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(f"the {name} has prediction_type={prediction!r}: give one of {', '.join(PREDICTIONS)}")
    channels, learned = unet.config["in_channels"], str(scheduler.config.get("variance_type")).startswith("learned")
    if unet.config["out_channels"] == 2 * channels and (not learned if takes_variance(scheduler) else channels > 3):
        raise ValueError(
            f"the network predicts a variance of {channels} channels, and the {name} is not made for it: give a "
            'DDPMScheduler with variance_type "learned" or "learned_range", as the network was trained'
        )


def class_of_diffusers(scheduler: Any) -> str | None:
    """The name of its class, or, for a class of the user's own, of the one of diffusers that it is derived from."""
    classes = (c for c in type(scheduler).__mro__ if c.__module__.startswith("diffusers.schedulers."))
    return next((c.__name__ for c in classes if c.__name__ != "SchedulerMixin"), None)


def takes_variance(scheduler: Any) -> bool:
    """Whether its step uses what a network predicts of the variance. Others get only the first half of the channels."""
    return class_of_diffusers(scheduler) in ("DDPMScheduler", "DDPMParallelScheduler")


def to_ours(scheduler: BuiltInDDPMScheduler) -> Any:
    """Our scheduler with the configuration of a built-in one, which lists positional arguments as left at a default.

    A table that was assigned to the built-in one, instead of that of its configuration, is kept.
    """
    config, parameters = dict(scheduler.config), inspect.signature(BuiltInDDPMScheduler).parameters
    listed = config.pop("_use_default_values", [])
    defaulted = [name for name in listed if config[name] is parameters[name].default]
    ours: Any = DDPMScheduler.from_config({**config, "_use_default_values": defaulted})
    table = scheduler.alphas_cumprod
    if table.shape == ours.alphas_cumprod.shape and not table.cpu().float().allclose(ours.alphas_cumprod, rtol=1e-3):
        ours.alphas_cumprod = table
    return ours


def match_betas(scheduler: Any, model: Any) -> None:
    """Give a scheduler the betas of the model's one where both were left at their defaults, which differ.

    `from_config` leaves out the options that were left at their defaults, so that
    HeunDiscreteScheduler.from_config(DDPMScheduler().config) has the betas of Stable Diffusion.
    """
    if class_of_diffusers(scheduler) not in COMPATIBLE or not isinstance(getattr(model, "config", None), dict):
        return
    config, of_ddpm = dict(scheduler.config), inspect.signature(BuiltInDDPMScheduler).parameters
    parameters = inspect.signature(type(scheduler).__init__).parameters
    defaulted = [name for name in config.get("_use_default_values", []) if config[name] == parameters[name].default]
    left = [name for name in NOISE_SCHEDULE if name in defaulted and model.config.get(name) == of_ddpm[name].default]
    taken = {name: of_ddpm[name].default for name in left if config[name] != of_ddpm[name].default}
    if taken and config.get("trained_betas") is None:
        chosen = {name: config[name] for name in parameters if name in config and name not in defaulted}
        type(scheduler).__init__(scheduler, **chosen, **taken)


def count_steps(scheduler: Any, num_inference_steps: int | None, default: int | None = None) -> int:
    """The number of sampling steps; by default `default` of them, or all if there are fewer."""
    longest = scheduler.config.num_train_timesteps
    number = min(default or longest, longest) if num_inference_steps is None else num_inference_steps
    return check_int("num_inference_steps", number, 1, longest)


def set_schedule(
    scheduler: Any, num_inference_steps: int | None, timesteps: Sequence[int] | None, default: int | None = None
) -> Any:
    """A copy of the scheduler with its timesteps set, for one call, so that calls in several threads do not mix.

    The scheduler itself gets the same timesteps, for readers of `pipe.scheduler.timesteps`, and is not used further.
    """
    options: dict[str, Any]
    if timesteps is None:
        options = {"num_inference_steps": count_steps(scheduler, num_inference_steps, default)}
    else:
        if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
            name = type(scheduler).__name__
            raise ValueError(f"timesteps is given, but {name} does not take it: give num_inference_steps")
        if num_inference_steps is not None:
            raise ValueError(f"timesteps and num_inference_steps={num_inference_steps} are both given: give one")
        has_order = hasattr(timesteps, "__len__") and getattr(timesteps, "ndim", 1) > 0
        if isinstance(timesteps, (str, bytes, dict, set)) or not has_order:
            raise ValueError(f"timesteps is {timesteps!r}: give a list of integers in descending order")
        options = {"timesteps": check_timesteps(timesteps, scheduler.config.num_train_timesteps)}
    with _LOCK:
        scheduler.set_timesteps(**options)
        # ours keeps nothing between steps: the copy can share its tables
        return copy.copy(scheduler) if isinstance(scheduler, DDPMScheduler) else copy.deepcopy(scheduler)


def partial_timesteps(t: int, num_inference_steps: int, num_train_timesteps: int) -> list[int]:
    """Descending timesteps from exactly t, as dense as num_inference_steps from pure noise."""
    number = max(1, round(num_inference_steps * (t + 1) / num_train_timesteps))
    return [round(i * (t + 1) / number) - 1 for i in range(number, 0, -1)]


def sdedit_schedule(scheduler: DDPMScheduler, t: int | None, num_steps: int) -> DDPMScheduler:
    """A copy of the scheduler that is set to start at index t, as dense as `num_steps` from pure noise (t None)."""
    if t is None:
        return set_schedule(scheduler, num_steps, None)
    return set_schedule(scheduler, None, partial_timesteps(t, num_steps, scheduler.num_steps))


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
            raise ValueError(f"eta is {eta!r}, but {type(scheduler).__name__} has no eta: leave it out")
        options[name] = check_number("eta", eta, 0, 1, "a number from 0 (deterministic) to 1 (ancestral)")
    return options
