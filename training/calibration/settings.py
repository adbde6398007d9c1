"""SETTINGS: the schedulers of diffusers at their best, which calibrated sampling is compared with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import diffusers

from ddpm_pipeline.calibrated import Table
from ddpm_pipeline.schedulers import match_betas

GUIDANCE = ("guidance_scale", "autoguidance_scale", "guidance_interval")  # arguments of a call


@dataclass(frozen=True)
class Setting:
    """A scheduler with options, made from the model's scheduler by `from_config` as users make it.

    Args:
        name: for tables and plots.
        scheduler: name of a class of diffusers; None: the class of the model's own scheduler.
        options: of the scheduler; an own scheduler without options is the model's itself.
        call: further arguments of a call of the pipeline.
        at_table: whether it samples at the timesteps of one of the model's calibrated tables.
    """

    name: str
    scheduler: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    at_table: bool = False

    @property
    def is_calibrated(self) -> bool:
        """Whether its steps are those of a table, too: this is not a built-in scheduler."""
        return self.at_table and self.scheduler is None

    @property
    def guidance(self) -> dict[str, Any]:
        return {name: value for name, value in self.call.items() if name in GUIDANCE}


class Plan(NamedTuple):
    """How a setting samples with a number of network calls for each image.

    scheduler: made for this model.
    call: arguments of a call of the pipeline.
    num_calls: network calls for each image.
    table: that it samples at, see Setting.
    """

    scheduler: Any
    call: dict[str, Any]
    num_calls: int
    table: Table | None


def make_plan(setting: Setting, scheduler: Any, calls: int, fitted: Table | None = None) -> Plan:
    """With as many steps as need at most this many calls: Heun and KDPM2 need two for each step but the last.

    Args:
        scheduler: of the model.
        fitted: the table for a setting that samples at one, with this number of calls.
    Raises:
        ValueError: no number of steps has so few calls, there is no table, or the options are not allowed.
        ImportError: a library is missing: beta sigmas and LMS need scipy.
    """
    made = scheduler
    if setting.scheduler is not None or setting.options:
        kind = type(scheduler) if setting.scheduler is None else getattr(diffusers, setting.scheduler)
        made = kind.from_config(scheduler.config, **setting.options)
        match_betas(made, scheduler)
    if setting.at_table:
        if fitted is None:
            raise ValueError("there is no calibrated table")
        number = {"num_inference_steps": len(fitted.timesteps)}
        call = number if setting.scheduler is None else {"timesteps": fitted.timesteps}
        return Plan(made, {**call, **setting.call}, num_calls(fitted.network_timesteps, setting.guidance), fitted)
    for steps in range(min(calls, scheduler.config.num_train_timesteps), 0, -1):
        made.set_timesteps(steps)
        needed = num_calls(made.timesteps.tolist(), setting.guidance)
        if needed <= calls:
            return Plan(made, {"num_inference_steps": steps, **setting.call}, needed, None)
    raise ValueError(f"a single step needs more than {calls} network calls")


def num_calls(timesteps: Iterable[float], guidance: Mapping[str, Any]) -> int:
    """Network calls for each image: one at each timestep, two where it is guided."""
    lo, hi = guidance.get("guidance_interval") or (-math.inf, math.inf)
    is_guided = any(guidance.get(name, 1) != 1 for name in ("guidance_scale", "autoguidance_scale"))
    return sum(2 if is_guided and lo <= t < hi else 1 for t in timesteps)


Axis = dict[str, dict[str, Any]]  # a word for the name, and the options of that choice


def variants(name: str, scheduler: str, options: Mapping[str, Any], *axes: Axis, **fields: Any) -> list[Setting]:
    """A setting for each combination of one choice from each axis."""
    settings = []
    for choices in itertools.product(*(axis.items() for axis in axes)):
        words = [name, *(word for word, _ in choices if word)]
        merged = dict(options)
        for _, more in choices:
            merged |= more
        settings.append(Setting(", ".join(words), scheduler, merged, **fields))
    return settings


# ---- The settings ----------------------------------------------------------------------------------------------------

TRAILING, LEADING = ({"timestep_spacing": spacing} for spacing in ("trailing", "leading"))
SPACINGS: Axis = {"": {}, "leading": LEADING}
KARRAS, LU, EXPONENTIAL, BETA = (
    {f"use_{name}": True} for name in ("karras_sigmas", "lu_lambdas", "exponential_sigmas", "beta_sigmas")
)
# Beta: quantiles of sigma itself, instead of t, so that few steps are left for the details, with any number of them.
SIGMAS: Axis = SPACINGS | {"Karras": KARRAS, "exponential": EXPONENTIAL, "beta": BETA}
# In some classes these sigmas end at that of the last timestep: with linspace, t = 0.
SIGMAS_OF_SPACING = SIGMAS | {"Karras to t = 0": {**KARRAS, "timestep_spacing": "linspace"}}
# With this maximum, dynamic thresholding is clipping to [-1, 1]; these classes have no clip_sample.
CLIPPING: Axis = {"": {}, "clipped": {"thresholding": True, "sample_max_value": 1.0}}
# Of UniPC. bh1 takes the step in log SNR as a factor, which is infinite to sigma 0: all its images would be NaN. At
# sigma_min the last call still corrects the image.
KINDS: Axis = {"bh1": {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, "bh2": {"solver_type": "bh2"}}

DDIM = Setting("DDIM", "DDIMScheduler", TRAILING)
DDPM = Setting("DDPM", None, TRAILING, {"eta": 1.0})
CALIBRATED = Setting("calibrated", None, call={"calibrated": True}, at_table=True)

SETTINGS = [
    DDIM,
    Setting("DDIM, leading", "DDIMScheduler", LEADING),
    DDPM,
    Setting("DDPM, leading", None, LEADING, {"eta": 1.0}),
    *variants("DPM-Solver++ 2M", "DPMSolverMultistepScheduler", TRAILING, SIGMAS | {"Lu": LU}, CLIPPING),
    *variants(
        "DPM-Solver++ 3M", "DPMSolverMultistepScheduler", {**TRAILING, "solver_order": 3}, SIGMAS | {"Lu": LU}, CLIPPING
    ),
    *variants("DPM-Solver++ 2M at the table's timesteps", "DPMSolverMultistepScheduler", {}, CLIPPING, at_table=True),
    *variants(
        "SDE-DPM-Solver++ 2M",
        "DPMSolverMultistepScheduler",
        {**TRAILING, "algorithm_type": "sde-dpmsolver++"},
        SPACINGS | {"Karras": KARRAS},
        CLIPPING,
    ),
    *variants("DPM-Solver++ 2S", "DPMSolverSinglestepScheduler", {"lower_order_final": True}, CLIPPING),
    *variants(
        "DPM-Solver++ 3S", "DPMSolverSinglestepScheduler", {"lower_order_final": True, "solver_order": 3}, CLIPPING
    ),
    *variants("UniPC 2", "UniPCMultistepScheduler", TRAILING, KINDS, SIGMAS, CLIPPING),
    *variants("UniPC 3", "UniPCMultistepScheduler", {**TRAILING, "solver_order": 3}, KINDS, SIGMAS, CLIPPING),
    # DEIS and SA-Solver end at sigma_0 instead of 0, and repeat it after Karras, exponential or beta sigmas. Then the
    # last call of DEIS is lost, while SA-Solver corrects with it.
    *variants("DEIS 2", "DEISMultistepScheduler", TRAILING, SPACINGS, CLIPPING),
    *variants("DEIS 3", "DEISMultistepScheduler", {**TRAILING, "solver_order": 3}, SPACINGS, CLIPPING),
    *variants(
        "SA-Solver", "SASolverScheduler", TRAILING, SPACINGS | {"Karras": KARRAS, "exponential": EXPONENTIAL}, CLIPPING
    ),
    # These clip if the model's scheduler does.
    *variants("Heun", "HeunDiscreteScheduler", TRAILING, SIGMAS_OF_SPACING),
    # These never clip.
    *variants("Euler", "EulerDiscreteScheduler", TRAILING, SIGMAS_OF_SPACING),
    Setting("Euler ancestral", "EulerAncestralDiscreteScheduler", TRAILING),
    *variants("KDPM2", "KDPM2DiscreteScheduler", TRAILING, SIGMAS_OF_SPACING),
    *variants("LMS", "LMSDiscreteScheduler", TRAILING, SIGMAS_OF_SPACING),
    Setting("PNDM", "PNDMScheduler", {**TRAILING, "skip_prk_steps": True, "set_alpha_to_one": True}),
]
