"""CALIBRATED SAMPLING: a few large steps with numbers that were fitted to this network (see calibration.py).

A step of any linear multistep solver is a sum of x_t and the last predictions of x_0:

    x_prev = c_x x_t + c_0 x_0_pred(t) + c_1 x_0_pred(of the step before) + c_2 x_0_pred(of the one before that)

DDIM and DPM-Solver++ compute the numbers from the noise schedule. A table has its own ones for each step, its own
timesteps, and for each step the timestep that the network is told. Tables are saved in scheduler_config.json, in a
field that the built-in classes keep and ignore, with the hash of the weights that they were fitted to.
"""

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from .scheduling_ddpm import DDPMScheduler, check_int, check_timesteps

FIELD = "_calibration"  # of the scheduler's configuration
HISTORY = 3  # predictions of x_0 that a step may use
MAX_COEFFICIENT = 1e3  # far above any that was fitted
# Options of a scheduler that change x_0_pred: those of the noise schedule are in the hash of alpha_bar.
OPTIONS = ("prediction_type", "clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio",
           "sample_max_value")  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in which a network is loaded


class Guidance(NamedTuple):
    """What the predictions of x_0 are made of: the arguments of a call."""

    guidance_scale: float = 1.0
    autoguidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None


class Table(NamedTuple):
    """The steps of a calibrated sampler.

    timesteps: where each step starts, descending integers in [0, T).
    network_timesteps: what the network is told in each step, integers in [0, T).
    coefficients: for each step those of x_t and of the last x_0_pred, the newest first; up to 1 + HISTORY numbers.
    guidance: with which it was fitted.
    """

    timesteps: list[int]
    network_timesteps: list[int]
    coefficients: list[list[float]]
    guidance: Guidance = Guidance()


class CalibratedScheduler:
    """A scheduler for one sampling run that takes its steps from a table. Deterministic.

    Args:
        scheduler: of the model: what the network predicts, noise schedule and clipping.
    """

    init_noise_sigma = 1.0

    def __init__(self, scheduler: DDPMScheduler, table: Table) -> None:
        self.config, self._scheduler, self._table = scheduler.config, scheduler, table
        self.timesteps, self.network_timesteps = torch.tensor(table.timesteps), torch.tensor(table.network_timesteps)
        self._index_of = {t: i for i, t in enumerate(table.timesteps)}
        self._history: list[Tensor] = []  # x_0_pred, the newest first

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        return sample

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor) -> DDPMSchedulerOutput:
        """One step. The steps must be taken in order: each needs the predictions of those before.

        Args:
            model_output: of the network at the network timestep of this step, (B, C, H, W).
            timestep: one of `timesteps`.
            sample: x_t, (B, C, H, W).
        """
        i = self._index_of[int(timestep)]
        x_0_pred = self._scheduler.predict_x_0(model_output, self._table.network_timesteps[i], sample)
        self._history = [x_0_pred, *self._history[: HISTORY - 1]]
        x_prev = next_state(self._table.coefficients[i], sample, self._history)
        return DDPMSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_0_pred)


def next_state(coefficients: list[float], x_t: Tensor, predictions: list[Tensor]) -> Tensor:
    """c_x x_t + sum_k c_k predictions_k."""
    coef_x_t, *others = coefficients
    x_prev = x_t * coef_x_t
    for coefficient, prediction in zip(others, predictions):
        x_prev.add_(prediction, alpha=coefficient)
    return x_prev


# ---- Saved tables ----------------------------------------------------------------------------------------------------


def save_tables(scheduler: DDPMScheduler, unet: UNet2DModel, tables: list[Table]) -> None:
    """Put tables into the configuration of a scheduler, bound to the weights of the network, float32."""
    saved = {
        "weights": {str(dtype).removeprefix("torch."): hash_weights(unet, dtype) for dtype in DTYPES},
        "scheduler": _options(scheduler),
        "tables": [{**table._asdict(), "guidance": table.guidance._asdict()} for table in tables],
    }
    scheduler.register_to_config(**{FIELD: saved})


def load_tables(scheduler: DDPMScheduler) -> list[Table]:
    """The tables in its configuration, checked. ValueError: they are damaged."""
    saved = scheduler.config.get(FIELD)
    if saved is None:
        return []
    try:
        return [_checked(table, scheduler.num_steps) for table in saved["tables"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the field {FIELD} of the scheduler is damaged: {error}: calibrate again, or remove it") from None


def _checked(table: Mapping[str, Any], num_steps: int) -> Table:
    timesteps = check_timesteps(table["timesteps"], num_steps)
    network_timesteps = [check_int("network_timesteps", t, 0, num_steps - 1) for t in table["network_timesteps"]]
    coefficients = [[float(number) for number in row] for row in table["coefficients"]]
    if not len(timesteps) == len(network_timesteps) == len(coefficients):
        raise ValueError("timesteps, network_timesteps and coefficients differ in length")
    for row in coefficients:
        if not (2 <= len(row) <= 1 + HISTORY and all(abs(number) <= MAX_COEFFICIENT for number in row)):
            raise ValueError(f"coefficients has {row}")
    guidance, interval = table["guidance"], table["guidance"]["interval"]
    return Table(
        timesteps,
        network_timesteps,
        coefficients,
        Guidance(float(guidance["scale"]), None if interval is None else (float(interval[0]), float(interval[1]))),
    )


def why_not(scheduler: DDPMScheduler, unet: UNet2DModel) -> str | None:
    """Why the tables of a scheduler are not for this network and these options; None: they are."""
    saved = scheduler.config[FIELD]
    options = _options(scheduler)
    changed = [name for name, value in options.items() if saved["scheduler"].get(name) != value]
    if changed:
        return f"they are for a scheduler with {changed[0]}={saved['scheduler'].get(changed[0])!r}, and this one has {options[changed[0]]!r}"
    dtype = str(unet.dtype).removeprefix("torch.")
    if dtype not in saved["weights"]:
        return f"they are for weights in {', '.join(saved['weights'])}, and these are in {dtype}"
    if saved["weights"][dtype] != hash_weights(unet, unet.dtype):
        return "they were fitted to other weights"
    return None


def _options(scheduler: DDPMScheduler) -> dict[str, Any]:
    alpha_bar = scheduler.alphas_cumprod.float().cpu().numpy().tobytes()
    options = {name: scheduler.config[name] for name in OPTIONS}
    return {**options, "noise_schedule": hashlib.sha256(alpha_bar).hexdigest()}


def hash_weights(unet: UNet2DModel, dtype: torch.dtype) -> str:
    """sha256 of all weights, cast to this dtype."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        plain = tensor.detach().to("cpu", dtype).contiguous()
        sha256.update(f"{name} {tuple(plain.shape)} ".encode())
        sha256.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
    return sha256.hexdigest()
