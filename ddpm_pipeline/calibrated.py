"""CALIBRATED SAMPLING: a few large steps with numbers that were fitted to this network (see calibration.py).

A step of any linear multistep solver is a sum of x_t and the last predictions of x_0:

    x_prev = c_x x_t + c_0 x_0_pred(t) + c_1 x_0_pred(of the step before) + c_2 x_0_pred(of the one before that)

and fresh noise, if it is not deterministic.

DDIM and DPM-Solver++ compute the numbers from the noise schedule. A table has its own ones for each step, its own
timesteps, and for each step the timestep that the network is conditioned on. Tables are saved in scheduler_config.json,
in a field that the built-in classes keep and ignore, with the hash of the weights that they were fitted to.
"""

import hashlib
import math
import reprlib
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .betas import MAX_TRAIN_TIMESTEPS
from .pixels import height_width
from .schedulers import check_number, count_steps
from .scheduling_ddpm import DDPMScheduler, check_choice, check_int, check_timesteps

CALIBRATION = "_calibration"  # the field of the scheduler's configuration
HISTORY = 3  # predictions of x_0 that a step may use
MAX_COEFFICIENT = 1e3  # far above any that was fitted
MAX_TABLES = 1000
NUM_ALPHA_BARS = 9  # saved to recognise the noise schedule; not a hash, since processors round differently
# Options of a scheduler that change x_0_pred, beside its noise schedule.
OF_PREDICTIONS = (
    "prediction_type", "clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio",
    "sample_max_value",
)  # fmt: skip
LOADED_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}  # of a network


class Guidance(NamedTuple):
    """What the predictions of x_0 are made of: the arguments of a call. Without guidance these are the defaults."""

    guidance_scale: float = 1.0
    autoguidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None


class Table(NamedTuple):
    """The steps of a calibrated sampler.

    timesteps: where each step starts, descending integers in [0, T).
    network_timesteps: what the network is conditioned on in each step, integers in [0, T).
    coefficients: for each step those of x_t and of the last x_0_pred, the newest first; up to 1 + HISTORY numbers.
    guidance: with which it was fitted.
    noise: for each step the standard deviation of the noise that is added; none in a deterministic sampler.
    """

    timesteps: list[int]
    network_timesteps: list[int]
    coefficients: list[list[float]]
    guidance: Guidance = Guidance()
    noise: tuple[float, ...] = ()


class CalibratedScheduler:
    """A scheduler for one sampling run that takes its steps from a table.

    Args:
        scheduler: of the model: what the network predicts, noise schedule and clipping.
    """

    init_noise_sigma = 1.0

    def __init__(self, scheduler: DDPMScheduler, table: Table) -> None:
        self.config, self._scheduler, self._table = scheduler.config, scheduler, table
        self.timesteps, self.network_timesteps = torch.tensor(table.timesteps), torch.tensor(table.network_timesteps)
        self.q_step = scheduler.q_step
        self._num_taken = 0  # steps
        self._history: list[Tensor] = []  # x_0_pred, the newest first

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        return sample

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: Any = None
    ) -> DDPMSchedulerOutput:
        """One step. The steps must be taken in order: each needs the predictions of those before.

        Args:
            model_output: of the network at the network timestep of this step, (B, C, H, W).
            timestep: one of `timesteps`, on the host.
            sample: x_t, (B, C, H, W).
            generator: for the noise, or a list with one for each image.
        Raises:
            ValueError: this is not the timestep of the next step.
        """
        i, t, timesteps = self._num_taken, int(timestep), self._table.timesteps
        if i == len(timesteps) or t != timesteps[i]:
            raise ValueError(
                f"timestep is {t} after {i} steps: a calibrated sampler takes each of its steps once, in the order "
                f"{timesteps}"
            )
        x_0_pred = self._scheduler.predict_x_0(model_output, self._table.network_timesteps[i], sample)
        self._num_taken, self._history = i + 1, [x_0_pred, *self._history[: HISTORY - 1]]
        x_prev = next_state(self._table.coefficients[i], sample, self._history)
        if self._table.noise and self._table.noise[i]:
            noise = randn_tensor(x_prev.shape, generator=generator, device=x_prev.device, dtype=x_prev.dtype)
            x_prev.add_(noise, alpha=self._table.noise[i])
        if i + 1 == len(timesteps):
            x_prev = self._scheduler.bounded(x_prev, in_place=True)  # the image, as predictions of it
        # a copy: the caller may change its x_0_pred, and the next steps need it
        return DDPMSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_0_pred.clone())


def next_state(coefficients: Sequence[float], x_t: Tensor, predictions: Sequence[Tensor]) -> Tensor:
    """The state after a step: c_x x_t + c_0 predictions[0] + c_1 predictions[1] + ..., (B, C, H, W).

    Args:
        coefficients: c_x, c_0, c_1, ...
        predictions: of x_0, the newest first.
    """
    coef_x_t, *coefs = coefficients
    x_prev = x_t * coef_x_t
    for coef, prediction in zip(coefs, predictions):
        x_prev.add_(prediction, alpha=coef)
    return x_prev


# ---- Saved tables ----------------------------------------------------------------------------------------------------


def save_tables(
    scheduler: DDPMScheduler, unet: UNet2DModel, tables: Sequence[Table], guide: UNet2DModel | None = None
) -> None:
    """Put tables into the configuration of a scheduler, bound to the weights of the networks, float32.

    Args:
        guide: with which those with autoguidance were fitted.
    """
    if guide is None and any(table.guidance.autoguidance_scale != 1 for table in tables):
        raise ValueError("guide is None, but a table has autoguidance: give the guide that it was fitted with")

    def hashes(network: UNet2DModel) -> dict[str, str]:
        return {name: hash_weights(network, dtype) for name, dtype in LOADED_DTYPES.items()}

    saved: dict[str, Any] = {
        "weights": hashes(unet),
        "guide": None if guide is None else hashes(guide),
        "scheduler": _options_of_predictions(scheduler),
        "tables": [table_to_json(table) for table in tables],
    }
    checked = _check_saved(saved)  # with plain numbers
    scheduler.register_to_config(**{CALIBRATION: {**saved, "tables": [table_to_json(table) for table in checked]}})


def table_to_json(table: Table) -> dict[str, Any]:
    """An object of JSON, for `table_from_json`."""
    return {**table._asdict(), "guidance": table.guidance._asdict()}


def load_tables(scheduler: DDPMScheduler) -> list[Table]:
    """The tables in its configuration, checked. ValueError: they are damaged."""
    saved = scheduler.config.get(CALIBRATION)
    if saved is None:
        return []
    try:
        return _check_saved(saved)
    except ValueError as error:
        raise ValueError(f"{CALIBRATION}: {error}; remove this field, then calibrate again") from None


def _check_saved(saved: Any) -> list[Table]:
    _check_fields_of("the field", saved, ("weights", "guide", "scheduler", "tables"))
    _check_fields_of("weights", saved["weights"], [*LOADED_DTYPES])
    if saved["guide"] is not None:
        _check_fields_of("guide", saved["guide"], [*LOADED_DTYPES])
    _check_fields_of("scheduler", saved["scheduler"], [*OF_PREDICTIONS, "num_train_timesteps", "alpha_bar"])
    for alpha_bar in _check_list("alpha_bar", saved["scheduler"]["alpha_bar"], NUM_ALPHA_BARS, NUM_ALPHA_BARS):
        check_number("alpha_bar", alpha_bar, 0, 1, "numbers from 0 to 1")
    # of the process that they were fitted with: the scheduler may have another one now, see `why_not`
    num_steps = check_int("num_train_timesteps", saved["scheduler"]["num_train_timesteps"], 1, MAX_TRAIN_TIMESTEPS)
    tables = [table_from_json(table, num_steps) for table in _check_list("tables", saved["tables"], MAX_TABLES)]
    for i, table in enumerate(tables):
        if any(_is_for(other, len(table.timesteps), table.guidance) for other in tables[:i]):
            raise ValueError(f"tables has two for {_described(len(table.timesteps), table.guidance)}: give one")
    return tables


def table_from_json(table: Any, num_steps: int) -> Table:
    """The table of `table_to_json`. ValueError: it is damaged, or not for a process of `num_steps` timesteps."""
    _check_fields_of("a table", table, Table._fields)
    timesteps = check_timesteps(_check_list("timesteps", table["timesteps"], num_steps), num_steps)
    number = len(timesteps)
    network_timesteps = _check_list("network_timesteps", table["network_timesteps"], number, number)
    rows = _check_list("coefficients", table["coefficients"], number, number)
    for i, row in enumerate(rows):
        _check_list(f"coefficients of step {i}", row, 1 + min(i + 1, HISTORY), 2)
    allowed = f"numbers from {-MAX_COEFFICIENT:g} to {MAX_COEFFICIENT:g}"
    noise = _check_list("noise", table["noise"], number, number if table["noise"] else 0)
    allowed_noise = "numbers from 0 to 10"
    _check_fields_of("guidance", table["guidance"], Guidance._fields)
    guidance = dict(table["guidance"])
    for name in ("guidance_scale", "autoguidance_scale"):
        guidance[name] = check_number(name, guidance[name], -math.inf, math.inf, "a number")
    if (interval := guidance["guidance_interval"]) is not None:
        ends = _check_list("guidance_interval", interval, 2, 2)
        ends = [check_number("guidance_interval", end, 0, num_steps, "two timesteps") for end in ends]
        guidance["guidance_interval"] = tuple(ends)
    return Table(
        timesteps,
        [check_int("network_timesteps", t, 0, num_steps - 1) for t in network_timesteps],
        [[check_number("coefficients", c, -MAX_COEFFICIENT, MAX_COEFFICIENT, allowed) for c in row] for row in rows],
        Guidance(**guidance),
        tuple(check_number("noise", deviation, 0, 10, allowed_noise) for deviation in noise),
    )


def _check_fields_of(name: str, value: Any, fields: Sequence[str]) -> None:
    if not isinstance(value, Mapping) or set(value) != set(fields):
        shown = sorted(map(str, value)) if isinstance(value, Mapping) else value
        raise ValueError(f"{name} has {reprlib.repr(shown)}: give {', '.join(fields)}")


def _check_list(name: str, value: Any, most: int, least: int = 1) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} is {reprlib.repr(value)}: give a list")
    if not least <= len(value) <= most:
        raise ValueError(f"{name} has {len(value)} entries: give {least if least == most else f'{least} to {most}'}")
    return value


# ---- Which table a call uses -----------------------------------------------------------------------------------------


def choose_table(
    calibrated: bool | None,
    scheduler: Any,
    unet: UNet2DModel,
    guide: UNet2DModel | None,
    guidance: Guidance,
    num_inference_steps: int | None,
    size: tuple[int, int],
    **not_of_a_table: Any,
) -> Table | None:
    """The table that a call of the pipeline uses, or None.

    Args:
        calibrated: None: a table if there is one for this call; it warns if that was fitted to another model.
        guide: of the pipeline.
        guidance, size: of the call, (H, W); `not_of_a_table` are arguments that a table does not take.
    Raises:
        ValueError: calibrated is True, and there is no such table.
    """
    check_choice("calibrated", calibrated, (None, True, False))
    if calibrated is not None and not calibrated:
        return None
    number = count_steps(scheduler, num_inference_steps)
    table = find_table(scheduler, number, guidance)
    given = [name for name, value in not_of_a_table.items() if value is not None]
    own = unet.config["sample_size"]
    own = size if own is None else height_width(own)
    problem = None
    if given:
        problem = f"{given[0]} is given, and a table takes none: leave one of the two out"
    elif not isinstance(scheduler, DDPMScheduler):
        problem = f"the scheduler is a {type(scheduler).__name__}: tables are for our DDPMScheduler"
    elif table is None:
        there_are = ", ".join(_described(len(each.timesteps), each.guidance) for each in load_tables(scheduler))
        others = f"tables for {there_are}" if there_are else "no tables"
        problem = f"there is no table for {_described(number, guidance)}: this model has {others}"
    elif size != own:
        problem = f"the tables are for {own[0]} x {own[1]} pixels, and these images have {size[0]} x {size[1]}"
    elif mismatch := why_not(scheduler, unet, guide, table):
        problem = f"the tables are not for this model: {mismatch}"
        if calibrated is None:
            warnings.warn(f"sampling without calibration: {problem}; calibrated=False avoids this", stacklevel=4)
    if calibrated and problem:
        raise ValueError(f"calibrated=True, but {problem}")
    return None if problem else table


def find_table(scheduler: Any, num_steps: int, guidance: Guidance) -> Table | None:
    """The table of a scheduler for this number of steps and this guidance, whatever model it was fitted to."""
    tables = load_tables(scheduler) if isinstance(scheduler, DDPMScheduler) else []
    return next((table for table in tables if _is_for(table, num_steps, guidance)), None)


def _is_for(table: Table, num_steps: int, guidance: Guidance) -> bool:
    return len(table.timesteps) == num_steps and table.guidance == guidance


def _described(num_steps: int, guidance: Guidance) -> str:
    """Such as "10 steps with guidance_scale=2"."""
    scales = {"guidance_scale": guidance.guidance_scale, "autoguidance_scale": guidance.autoguidance_scale}
    texts = [f"{name}={scale:g}" for name, scale in scales.items() if scale != 1]
    if guidance.guidance_interval is not None:
        texts.append("guidance_interval=({:g}, {:g})".format(*guidance.guidance_interval))
    return f"{num_steps} steps" + (f" with {', '.join(texts)}" if texts else "")


def why_not(scheduler: DDPMScheduler, unet: UNet2DModel, guide: UNet2DModel | None, table: Table) -> str | None:
    """Why a table of a scheduler is not for these networks and options; None: it is."""
    saved = scheduler.config[CALIBRATION]
    now, then = _options_of_predictions(scheduler), saved["scheduler"]
    for name in (*OF_PREDICTIONS, "num_train_timesteps"):
        if now[name] != then[name]:
            return f"they were fitted with {name}={then[name]!r}, and it has {now[name]!r}"
    alpha_bar, fitted = (torch.tensor(each["alpha_bar"], dtype=torch.float32) for each in (now, then))
    if not torch.allclose(alpha_bar, fitted, rtol=1e-4, atol=0):
        return "they were fitted with another noise schedule"
    networks = [("weights", unet)]
    if table.guidance.autoguidance_scale != 1:
        if guide is None or saved["guide"] is None:
            return "they were fitted with a guide"
        networks.append(("guide", guide))
    for name, network in networks:
        if any(tensor.is_meta for tensor in network.state_dict().values()):
            return "its weights are on the meta device, where they cannot be compared"
        own_first = sorted(LOADED_DTYPES.items(), key=lambda item: item[1] != network.dtype)  # mostly the only one
        hashes = ((saved[name][of_dtype], _cached_hash(network, dtype)) for of_dtype, dtype in own_first)
        if not any(then is not None and then == now for then, now in hashes):
            return "they were fitted to other weights" if name == "weights" else "they were fitted with another guide"
    return None


def with_tables(scheduler: DDPMScheduler, saved: Any) -> DDPMScheduler:
    """A copy of a scheduler with the tables of another one, whose field CALIBRATION is `saved`; None: with none."""
    copy: Any = DDPMScheduler.from_config({**scheduler.config, CALIBRATION: saved})
    return copy


def fitted_tables(
    scheduler: DDPMScheduler, unet: UNet2DModel, guide: UNet2DModel | None
) -> tuple[list[Table], str | None]:
    """The tables of a scheduler that are for these networks, and why others are not; None: there are no others.

    Raises:
        ValueError: they are damaged.
    """
    reasons = [(table, why_not(scheduler, unet, guide, table)) for table in load_tables(scheduler)]
    fitted = [table for table, reason in reasons if reason is None]
    return fitted, next((reason for _, reason in reasons if reason is not None), None)


def _options_of_predictions(scheduler: DDPMScheduler) -> dict[str, Any]:
    options = {name: scheduler.config[name] for name in OF_PREDICTIONS}
    alpha_bar = scheduler.alphas_cumprod
    some = torch.linspace(0, len(alpha_bar) - 1, NUM_ALPHA_BARS).round().long()
    return {**options, "num_train_timesteps": len(alpha_bar), "alpha_bar": alpha_bar.cpu()[some].tolist()}


# ---- Weights ---------------------------------------------------------------------------------------------------------


def hash_weights(unet: UNet2DModel, dtype: torch.dtype) -> str:
    """sha256 of all weights, cast to this dtype."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        plain = tensor.to("cpu", dtype).contiguous()
        sha256.update(f"{name.removeprefix('_orig_mod.')} {tuple(plain.shape)} ".encode())  # that of torch.compile
        sha256.update(plain.flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


_HASHES = weakref.WeakKeyDictionary[torch.nn.Module, tuple[Any, dict[torch.dtype, str | None]]]()


def _cached_hash(unet: UNet2DModel, dtype: torch.dtype) -> str | None:
    """`hash_weights`, computed anew if the weights have changed; None if they are not the same numbers in this dtype.

    A change is seen by the versions, addresses and sums of the tensors: `weight.data.copy_(...)` changes only the sum.
    """
    tensors = list(unet.state_dict(keep_vars=True).values())
    sums = torch.stack([tensor.detach().sum(dtype=torch.float32).to(tensors[0].device) for tensor in tensors]).tolist()
    state = sums, [(tensor.data_ptr(), tensor.is_inference() or tensor._version) for tensor in tensors]
    known = _HASHES.get(unet)
    if known is None or known[0] != state:
        known = _HASHES[unet] = state, {}
    hashes = known[1]
    if dtype not in hashes:
        keeps = all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in tensors)
        hashes[dtype] = hash_weights(unet, dtype) if keeps else None
    return hashes[dtype]
