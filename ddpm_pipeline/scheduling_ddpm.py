"""THE SCHEDULER: tables, forward process, one reverse step, conversions between predictions.

Notation is that of DDPM (Ho et al. 2020, arXiv 2006.11239), with array index t = paper's t - 1, so index 0 is one step
of noise and index -1 the clean image. alpha_bar is diffusers' `alphas_cumprod`; images are (B, C, H, W) in [-1, 1].

    Eq. 2   one forward step     x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps
    Eq. 4   t steps at once      x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
    Eq. 15  prediction of x_0    x_0_pred = (x_t - sqrt(1 - alpha_bar_t) eps_pred) / sqrt(alpha_bar_t)
    Eq. 7   one reverse step     x_prev = coef_x_0 x_0_pred + coef_x_t x_t + std noise

The scheduler is diffusers' DDPMScheduler with the same configuration and, wherever that one is right, the same numbers.
"""

import functools
import inspect
import math
import operator
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as BuiltInDDPMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # diffusers looks for it in this module
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .betas import BETA_SCHEDULES, MAX_TRAIN_TIMESTEPS, check_betas, make_betas, rescale_zero_terminal_snr
from .precision import as_float64, compute_dtype, take_float64

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")

OLD_FIELDS = {"tensor_format", "timestep_values", "predict_epsilon"}  # of configurations from 2022
INDEX_DTYPES = (torch.int64, torch.int32)  # a bool or uint8 index would be a mask
TINY_VARIANCE = 1e-20  # replaces beta_tilde = 0 at the first index, where its logarithm is needed


class MeanVariance(NamedTuple):
    """Moments of a Gaussian: mean (B, C, H, W), variance (B, 1, 1, 1)."""

    mean: Tensor
    variance: Tensor


class ReverseMeanVariance(NamedTuple):
    """Moments of p(x_{t-1} | x_t): mean and x_0_pred (B, C, H, W), its variance (B, 1, 1, 1) or (B, C, H, W)."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x_0_pred: Tensor


class StepCoefficients(NamedTuple):
    """x_0_pred = a x_t + b output,  x_prev = coef_x_0 x_0_pred + coef_x_t x_t + std exp(slope v) noise.

    Python floats or 0-d tensors. v is the network's output for the variance, its second half of channels; slope is 0
    where the variance is fixed.
    """

    a: Any
    b: Any
    coef_x_0: Any
    coef_x_t: Any
    std: Any
    slope: Any


def _named_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """Turn positional arguments into keyword ones: `register_to_config` mistakes positional ones for defaults."""
    names = list(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) > len(names):
            raise TypeError(f"DDPMScheduler takes {len(names)} arguments, got {len(args)}")
        init(self, **dict(zip(names, args)), **kwargs)

    return __init__


class DDPMScheduler(BuiltInDDPMScheduler):
    """Forward and reverse process of DDPM, a drop-in for diffusers' DDPMScheduler with the same options and defaults.

    What it adds:

    - `beta_schedule="su"`: alpha_t = 1 - 0.02 t / T, t = 1..T (Su Jianlin 2022). The betas are saved as `trained_betas`
      as well, so that every diffusers scheduler can use them. `trained_betas` passed together with it are ignored.
    - `step(ddim_eta=...)`: 1 is ancestral sampling (DDPM), 0 deterministic (DDIM), on any sub-sequence of timesteps.
      It is not called `eta`, since many pipelines of diffusers pass an `eta` of 0 to any scheduler that takes one.
    - The last step of every schedule adds no noise.
    - `variance_type="learned"`: the network predicts the log-variance; `"learned_range"`: it predicts v in [-1, 1] that
      interpolates between log beta_tilde (-1) and log beta (1) (Nichol and Dhariwal 2021, Eq. 15).

    As in diffusers, `thresholding=True` with the default `sample_max_value=1` equals clipping: set it above 1.

    Raises:
        ValueError: an option has a value that is not allowed, a beta is not in (0, 1], or the schedule has zero
            terminal SNR (`rescale_betas_zero_snr`) and the network predicts epsilon: x_0 cannot be computed from it.
    """

    _alphas_cumprod: Tensor

    @_named_arguments
    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "su"] = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: Literal[
            "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"
        ] = "fixed_small",
        clip_sample: bool = True,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        # The built-in constructor is not called: it makes the same attributes from float32 tables.
        check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
        check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        num_train_timesteps = check_int("num_train_timesteps", num_train_timesteps, 1, MAX_TRAIN_TIMESTEPS)
        check_int("steps_offset", steps_offset, 0, num_train_timesteps)
        if not 0 < dynamic_thresholding_ratio <= 1:
            raise ValueError(f"dynamic_thresholding_ratio is {dynamic_thresholding_ratio!r}: give a number in (0, 1]")
        for name, bound in (("clip_sample_range", clip_sample_range), ("sample_max_value", sample_max_value)):
            if not 0 < bound < math.inf:
                raise ValueError(f"{name} is {bound!r}: give a positive number")

        if beta_schedule == "su" or trained_betas is None:
            betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        else:
            betas = torch.as_tensor(np.array(trained_betas, dtype=np.float64))
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        check_betas(betas, prediction_type)
        if trained_betas is not None:
            self.register_to_config(num_train_timesteps=len(betas))
        if beta_schedule == "su":
            self.register_to_config(trained_betas=betas.tolist())

        self.__module__ = BuiltInDDPMScheduler.__module__  # which a pipeline saves: its folder loads without ours
        # float32, since code that was written for the built-in class computes x_t from them
        self.betas, self.alphas = betas.float(), (1.0 - betas).float()
        self._set_alpha_bar(torch.cumprod(1.0 - betas, dim=0))
        self.one = torch.tensor(1.0)
        self.init_noise_sigma = 1.0
        self._range_checked = False

        self.num_inference_steps: int | None = None  # type: ignore[assignment]  # built in: None
        self.custom_timesteps = False
        self.timesteps = torch.arange(len(betas)).flip(0)

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the options of a step whenever scripts or pipelines set the config, which is slow to read."""
        super().__setattr__(name, value)
        if name != "_internal_dict" or "variance_type" not in value:  # a subclass first registers its own options
            return
        self.variance_type, self.prediction_type = value["variance_type"], value["prediction_type"]
        self._thresholding, clips = value["thresholding"], value["clip_sample"]
        check_choice("variance_type", self.variance_type, VARIANCE_TYPES)
        check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        check_choice("thresholding", self._thresholding, (True, False, None))
        check_choice("clip_sample", clips, (True, False, None))
        self._clip_bound = value["clip_sample_range"] if clips and not self._thresholding else None
        if "_schedule" in self.__dict__:
            self._set_schedule(self._schedule, self._timesteps)

    def register_to_config(self, **options: Any) -> None:
        """diffusers' method, but `from_config` keeps these options: it drops those that are listed as defaults."""
        listed = self.__dict__.get("_internal_dict", {}).get("_use_default_values", [])
        super().register_to_config(**{"_use_default_values": [n for n in listed if n not in options], **options})

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha_bar_t for each t, (T,) float32. The scheduler itself computes with float64."""
        return self._alphas_cumprod

    @alphas_cumprod.setter
    def alphas_cumprod(self, alpha_bar: Tensor) -> None:
        """Code for the built-in class assigns it: to move it to a device, or to change the noise schedule."""
        if not torch.equal(alpha_bar.cpu().float(), self._alpha_bar[1:].float()):
            if alpha_bar.shape != self._alphas_cumprod.shape:
                raise ValueError(f"alphas_cumprod has shape {tuple(alpha_bar.shape)}: give {self.num_steps} numbers")
            self._set_alpha_bar(as_float64(alpha_bar).cpu())
        self._alphas_cumprod = alpha_bar

    def _set_alpha_bar(self, alpha_bar: Tensor) -> None:
        self._alphas_cumprod = alpha_bar.float()
        # Index t + 1 holds alpha_bar_t, so that index 0, before the first step, holds 1.
        self._alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar])
        self._tables = {
            "signal": alpha_bar.sqrt(),
            "noise_std": (1 - alpha_bar).sqrt(),
            "noise_variance": 1 - alpha_bar,
            "snr": alpha_bar / (1 - alpha_bar),
        }
        self._plans: dict[float, Tensor] = {}
        self._rows: dict[float, list[list[float]]] = {}
        self._cast: dict[tuple[str | float, torch.device, torch.dtype], Tensor] = {}

    @property
    def timesteps(self) -> Tensor:
        """The timesteps of the sampling steps, descending."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, timesteps: Tensor) -> None:
        """Code for the built-in class assigns a part of them, or their copy on a device."""
        self._set_schedule(check_timesteps(timesteps.tolist(), self.num_steps), timesteps)

    def _set_schedule(self, schedule: list[int], timesteps: Tensor) -> None:
        self._schedule, self._timesteps = schedule, timesteps
        self._index_of = {t: i for i, t in enumerate(schedule)}
        self._plans, self._rows = {}, {}
        self._cast = {key: table for key, table in list(self._cast.items()) if key[0] in self._tables}

    @classmethod
    def extract_init_dict(
        cls, config_dict: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """diffusers' method, which also reads the fields of 2022: `predict_epsilon`, and some that mean nothing now."""
        old = {name: kwargs.pop(name) for name in OLD_FIELDS if name in kwargs}
        config = _without_old_fields({**config_dict, **old}, known_fields(cls))
        extracted: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] = super().extract_init_dict(config, **kwargs)
        return extracted

    # ---- Forward process: q ------------------------------------------------------------------------------------------

    def q_mean_variance(self, x_0: Tensor, t: Tensor) -> MeanVariance:
        """Eq. (4), DDPM: mean sqrt(alpha_bar_t) x_0 and variance 1 - alpha_bar_t of q(x_t | x_0).

        Args:
            x_0: clean images, (B, C, H, W), in [-1, 1].
            t: (B,) int64 in [0, T).
        Returns:
            mean (B, C, H, W), variance (B, 1, 1, 1), in the dtype of x_0.
        """
        self._check_images(x_0)
        signal, variance = self._at(t, x_0, "signal", "noise_variance")
        return MeanVariance((signal * x_0).to(x_0.dtype), variance.to(x_0.dtype))

    def q_step(self, x_prev: Tensor, t: Tensor, prev_t: Tensor, noise: Tensor) -> Tensor:
        """Eq. (2), DDPM, between any two indices: x_t = sqrt(alpha) x_prev + sqrt(1 - alpha) noise.

        alpha = alpha_bar_t / alpha_bar_prev, which is alpha_t for prev_t = t - 1. Computed in float32 or float64.

        Args:
            x_prev: images at index prev_t, (B, C, H, W), floats; clean images in [-1, 1] if prev_t is -1.
            t: (B,) int64 in [0, T), or one for all.
            prev_t: (B,) int64 in [-1, t), or one for all.
            noise: N(0, I), same shape as x_prev.
        Returns:
            x_t, (B, C, H, W), dtype of x_prev.
        Raises:
            ValueError: images are integers, shapes differ, or some t or prev_t is out of range.
        """
        self._check_images(x_prev)
        _check_shapes(x_prev=x_prev, noise=noise)
        if prev_t is None:
            raise ValueError("prev_t is None: give the index of each image in x_prev, -1 for a clean one")
        alpha_bar_t, alpha_bar_prev = self.alpha_bars(t, prev_t)
        alpha = alpha_bar_t / alpha_bar_prev
        signal, noise_std = (self._broadcast(table, x_prev) for table in (alpha.sqrt(), (1 - alpha).sqrt()))
        return _add_scaled(signal * x_prev, _widened(noise), noise_std).to(x_prev.dtype)

    def q_posterior_mean_variance(
        self, x_0: Tensor, x_t: Tensor, t: Tensor, prev_t: Tensor | None = None
    ) -> MeanVariance:
        """Eqs. (6) and (7), DDPM: mean and variance beta_tilde of q(x_prev | x_t, x_0).

        Args:
            x_0: clean images, (B, C, H, W), in [-1, 1].
            x_t: noisy images at index t, same shape and dtype.
            t: (B,) int64 in [0, T).
            prev_t: (B,) int64 in [-1, t), the index that the step ends at; t - 1 by default.
        Returns:
            mean (B, C, H, W), variance (B, 1, 1, 1), in the dtype of x_t. At t = 0 these are x_0 and 0.
        Raises:
            ValueError: shapes differ, or some t or prev_t is out of range.
        """
        _check_shapes(x_0=x_0, x_t=x_t)
        coef_x_0, coef_x_t, variance = (
            self._broadcast(table, x_t) for table in self.posterior_coefficients(*self.alpha_bars(t, prev_t))
        )
        return MeanVariance((coef_x_0 * x_0 + coef_x_t * x_t).to(x_t.dtype), variance.to(x_t.dtype))

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Eq. (4), DDPM: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, computed in float32 or float64.

        Args:
            original_samples: x_0, (B, C, H, W), floats in [-1, 1].
            noise: eps, same shape.
            timesteps: (B,) integers in [0, T), or one for all. On an accelerator their range is not checked.
        Returns:
            (B, C, H, W), dtype of original_samples.
        Raises:
            ValueError: images are integers, or some t is out of range.
        """
        self._check_images(original_samples)
        signal, noise_std = self._at(timesteps, original_samples, "signal", "noise_std")
        return _add_scaled(signal * original_samples, _widened(noise), noise_std).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0: Salimans and Ho 2022, section 4.

        Arguments, dtype and errors are those of `add_noise`.
        """
        self._check_images(sample)
        return self._velocity(sample, noise, timesteps).to(sample.dtype)

    def _velocity(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        signal, noise_std = self._at(t, x_0, "signal", "noise_std")
        return _add_scaled(signal * eps, _widened(x_0), -noise_std)

    def snr(self, t: Tensor) -> Tensor:
        """alpha_bar_t / (1 - alpha_bar_t), the signal-to-noise ratio at t, integers in [0, T): float64, shape of t."""
        return take_float64(self._tables["snr"], self._checked(t))

    def convert_prediction(self, prediction: Tensor, t: Tensor, x_t: Tensor, source: str, target: str) -> Tensor:
        """A prediction of type `source` as one of type `target`: "epsilon", "sample" (x_0) or "v_prediction".

        Everything follows from Eq. (4), DDPM, and v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0.

        Args:
            prediction: (B, C, H, W).
            t: (B,) int64 in [0, T).
            x_t: noisy images at index t, (B, C, H, W).
        Returns:
            (B, C, H, W), dtype of prediction.
        Raises:
            ValueError: unknown source or target, or some t is out of range.
        """
        check_choice("source", source, PREDICTION_TYPES)
        check_choice("target", target, PREDICTION_TYPES)
        if source == target:
            return prediction
        if target == "v_prediction":
            x_0, eps = (self._converted(prediction, t, x_t, source, quantity) for quantity in ("sample", "epsilon"))
            return self._velocity(x_0, eps, t).to(prediction.dtype)
        return self._converted(prediction, t, x_t, source, target).to(prediction.dtype)

    def _converted(self, prediction: Tensor, t: Tensor, x_t: Tensor, source: str, target: str) -> Tensor:
        """a x_t + b prediction: x_0 (`target` "sample") or eps ("epsilon"), in float32 or float64."""
        coefficients = self.x_0_coefficients if target == "sample" else self.eps_coefficients
        alpha_bar_t, _ = self.alpha_bars(t)
        a, b = (self._broadcast(table, x_t) for table in coefficients(alpha_bar_t, source))
        return a * x_t + b * prediction

    # ---- Reverse process: p ------------------------------------------------------------------------------------------

    def p_mean_variance(
        self,
        model_output: Tensor,
        t: Tensor,
        x_t: Tensor,
        prev_t: Tensor | None = None,
        fallback_variance: float = TINY_VARIANCE,
    ) -> ReverseMeanVariance:
        """Eq. (11), DDPM: mean and variance of p(x_prev | x_t) for the network's output, each sample at its own t.

        Args:
            model_output: (B, C, H, W), or (B, 2 C, H, W) with learned variance.
            t: (B,) int64 in [0, T), any t per sample, whatever schedule is set.
            x_t: noisy images, (B, C, H, W).
            prev_t: (B,) int64 in [-1, t), the index that the step ends at; t - 1 by default.
            fallback_variance: replaces beta_tilde where that is 0, in the step that ends at the clean image, so that
                its logarithm is finite.
        Returns:
            mean, variance, log_variance, x_0_pred, in the dtype of x_t.
        Raises:
            ValueError: shapes or channels do not fit, or some t or prev_t is out of range.
        """
        output, predicted_variance = self.split_output(model_output, x_t)
        alpha_bars = self.alpha_bars(t, prev_t)
        coef_x_0, coef_x_t, centre, slope = (
            self._broadcast(table, x_t)
            for table in (
                *self.posterior_coefficients(*alpha_bars)[:2],
                *self.log_variance(*alpha_bars, fallback_variance=fallback_variance),
            )
        )
        x_0_pred = self.bounded(self._converted(output, t, x_t, self.prediction_type, "sample"))
        log_variance = centre if predicted_variance is None else centre + slope * predicted_variance
        moments = (coef_x_0 * x_0_pred + coef_x_t * x_t, log_variance.exp(), log_variance, x_0_pred)
        return ReverseMeanVariance(*(value.to(x_t.dtype) for value in moments))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | np.ndarray | Tensor | None = None,
    ) -> None:
        """Choose the timesteps of the sampling steps.

        Args:
            num_inference_steps: number of sampling steps, 1 to T, spaced by `timestep_spacing`.
            device: device of `self.timesteps`.
            timesteps: instead, the timesteps themselves: descending integers in [0, T).
        Raises:
            ValueError: both or neither are given, a number is out of range, or the timesteps do not descend.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"num_inference_steps is {num_inference_steps!r} and timesteps is {timesteps!r}: give one of the two"
            )
        if timesteps is not None:
            chosen = check_timesteps(timesteps, self.num_steps)
        else:
            chosen = self._spaced(check_int("num_inference_steps", num_inference_steps, 1, self.num_steps))
        if chosen[0] >= self.num_steps:
            raise ValueError(
                f"timesteps are {_short(chosen)} with steps_offset={self.config['steps_offset']}: all must be in "
                f"[0, {self.num_steps})"
            )
        # Sampling starts from pure noise, but at this timestep the network expects an image, scaled by `signal`, in it.
        signal, spacing = self._tables["signal"][chosen[0]].item(), self.config["timestep_spacing"]
        if timesteps is None and chosen[0] < self.num_steps - 1 and signal > 0.01:
            warnings.warn(
                f'timestep_spacing="{spacing}" with {len(chosen)} steps starts at t = {chosen[0]}, where {signal:.1%} '
                "of the image is left, but sampling starts from pure noise: "
                f'set timestep_spacing="trailing", which starts at t = {self.num_steps - 1}',
                stacklevel=2,
            )
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(chosen)
        self._set_schedule(chosen, torch.tensor(chosen).to(device))

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        ddim_eta: float = 1.0,
        variance_noise: Tensor | None = None,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """One sampling step: DDPM (ddim_eta 1; Algorithm 2), DDIM (0; arXiv 2010.02502, Eqs. 12 and 16), or between.

        DDIM's "direction pointing to x_t" is computed from the clipped x_0_pred (`use_clipped_model_output` of
        diffusers' DDIM), so that eta = 1 gives DDPM's Eq. 7. eta^2 scales beta_tilde in the mean, eta the standard
        deviation of the noise that is added.

        Args:
            model_output: the network's output, (B, C, H, W), or (B, 2 C, H, W) with learned variance.
            timestep: one of `self.timesteps`. On an accelerator this is not checked: any other gives NaN.
            sample: x_t, (B, C, H, W).
            generator: for the noise; a list has one per image.
            variance_noise: instead, the noise itself, (B, C, H, W).
        Returns:
            prev_sample and pred_original_sample, (B, C, H, W), dtype of sample.
        Raises:
            ValueError: the timestep is not in the schedule, ddim_eta is not in [0, 1], or shapes or channels differ.
        """
        output, predicted_variance = self.split_output(model_output, sample)
        c = self._coefficients(timestep, ddim_eta, sample)
        x_t = _widened(sample)
        if self.prediction_type == "sample":
            x_0_pred = self.bounded(_widened(output))
        else:
            x_0_pred = self.bounded(_add_scaled(x_t * c.a, output, c.b), in_place=True)
        x_prev = _add_scaled(x_0_pred * c.coef_x_0, x_t, c.coef_x_t)
        if isinstance(c.std, Tensor) or c.std > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
                )
            if predicted_variance is None:
                x_prev = _add_scaled(x_prev, variance_noise, c.std)
            else:
                noise = (_widened(predicted_variance) * c.slope).exp_() * variance_noise
                x_prev = _add_scaled(x_prev, noise, c.std)
        x_prev, x_0_pred = x_prev.to(sample.dtype), x_0_pred.to(sample.dtype)
        if not return_dict:
            return x_prev, x_0_pred
        return DDPMSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_0_pred)

    def predict_x_0(self, output: Tensor, t: int, x_t: Tensor) -> Tensor:
        """x_0_pred, thresholded or clipped as configured, from the network's output, (B, C, H, W), at index t."""
        a, b = (value.item() for value in self.x_0_coefficients(self._alpha_bar[t + 1], self.prediction_type))
        return self.bounded(_add_scaled(_widened(x_t) * a, _widened(output), b), in_place=True)

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """The next timestep of the schedule, which the step from `timestep` ends at; -1 after the last one."""
        following = [*self._schedule[1:], -1][self._index(timestep)]
        return torch.tensor(following) if isinstance(timestep, Tensor) else following

    @property
    def num_steps(self) -> int:
        """T, the number of diffusion timesteps."""
        return len(self._alpha_bar) - 1

    def __len__(self) -> int:
        return self.num_steps

    # ---- Coefficients ------------------------------------------------------------------------------------------------

    @staticmethod
    def posterior_coefficients(
        alpha_bar_t: Tensor, alpha_bar_prev: Tensor, eta: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients of x_0 and x_t in the mean, and the variance eta^2 beta_tilde: Eq. (7), DDPM; Eq. (7), DDIM.

        mean = sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev - variance) eps, with eps written in terms of x_0 and
        x_t. With eta = 1 this is Eq. (7) of DDPM: coef_x_0 = sqrt(alpha_bar_prev) beta / (1 - alpha_bar_t).
        """
        beta = 1 - alpha_bar_t / alpha_bar_prev
        variance = eta**2 * beta * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
        coef_x_t = ((1 - alpha_bar_prev - variance).clamp(min=0) / (1 - alpha_bar_t)).sqrt()
        return alpha_bar_prev.sqrt() - coef_x_t * alpha_bar_t.sqrt(), coef_x_t, variance

    def log_variance(
        self,
        alpha_bar_t: Tensor,
        alpha_bar_prev: Tensor,
        variance_type: str | None = None,
        fallback_variance: float = TINY_VARIANCE,
    ) -> tuple[Tensor, Tensor]:
        """(centre, slope): the log of p's variance is centre + slope v, where v is the network's output for it.

        Args:
            alpha_bar_t, alpha_bar_prev: float64, any shape.
            variance_type: by default the scheduler's.
            fallback_variance: replaces beta_tilde where that is 0.
        Returns:
            Two tensors of the same shape. slope is 0 where the variance is fixed.
        """
        variance_type = variance_type or self.variance_type
        beta = 1 - alpha_bar_t / alpha_bar_prev
        beta_tilde = self.posterior_coefficients(alpha_bar_t, alpha_bar_prev)[2]
        log_beta_tilde = torch.where(beta_tilde > 0, beta_tilde, fallback_variance).clamp(min=TINY_VARIANCE).log()
        zero = torch.zeros_like(beta)
        if variance_type.startswith("fixed_small"):
            return log_beta_tilde, zero
        if variance_type.startswith("fixed_large"):
            return beta.log(), zero
        if variance_type == "learned":
            return zero, zero + 1
        return (beta.log() + log_beta_tilde) / 2, (beta.log() - log_beta_tilde) / 2

    @staticmethod
    def x_0_coefficients(alpha_bar_t: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
        """(a, b): x_0_pred = a x_t + b output. Eq. (15), DDPM, for epsilon; Salimans and Ho 2022 for v."""
        signal, noise_std = alpha_bar_t.sqrt(), (1 - alpha_bar_t).sqrt()
        if prediction_type == "epsilon":
            return 1 / signal, -noise_std / signal
        if prediction_type == "sample":
            return torch.zeros_like(signal), torch.ones_like(signal)
        return signal, -noise_std

    @staticmethod
    def eps_coefficients(alpha_bar_t: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
        """(a, b): eps_pred = a x_t + b output. `x_0_coefficients` put into Eq. (4), DDPM, and solved for eps."""
        signal, noise_std = alpha_bar_t.sqrt(), (1 - alpha_bar_t).sqrt()
        if prediction_type == "epsilon":
            return torch.zeros_like(signal), torch.ones_like(signal)
        if prediction_type == "sample":
            return 1 / noise_std, -signal / noise_std
        # (x_t - signal (signal x_t - noise_std v)) / noise_std, and 1 - signal^2 = noise_std^2
        return noise_std, signal

    def _spaced(self, number: int) -> list[int]:
        """`number` descending timesteps: Lin et al. 2023 (arXiv 2305.08891), Table 2."""
        num_steps, spacing = self.num_steps, self.config["timestep_spacing"]
        if spacing == "linspace":
            steps = np.linspace(0, num_steps - 1, number).round()[::-1]
        elif spacing == "leading":
            steps = np.arange(number)[::-1] * (num_steps // number) + self.config["steps_offset"]
        else:  # rounding can make arange one too long
            steps = np.arange(num_steps, 0, -num_steps / number)[:number].round() - 1
        return steps.astype(np.int64).tolist()

    def bounded(self, x_0_pred: Tensor, in_place: bool = False) -> Tensor:
        """x_0_pred, (B, C, H, W), after the configured thresholding or clipping."""
        if self._thresholding:
            return self._threshold_sample(x_0_pred)
        bound = self._clip_bound
        if bound is None:
            return x_0_pred
        return x_0_pred.clamp_(-bound, bound) if in_place else x_0_pred.clamp(-bound, bound)

    def _threshold_sample(self, sample: Tensor) -> Tensor:
        """Dynamic thresholding (Saharia et al. 2022, section 2.3): clip to [-s, s] and divide by s.

        s is the configured quantile of |x_0_pred| over one image, but at least 1 and at most `sample_max_value`.
        """
        magnitude = _widened(sample).abs().flatten(1)
        # torch.quantile accepts at most 16 million values; two order statistics accept any number.
        position = self.config["dynamic_thresholding_ratio"] * (magnitude.shape[1] - 1)
        low = math.floor(position)
        below, above = (magnitude.kthvalue(k + 1, dim=1).values for k in (low, math.ceil(position)))
        s = (below + (position - low) * (above - below)).clamp(min=1, max=self.config["sample_max_value"])
        s = s.view(-1, *[1] * (sample.ndim - 1))
        return (_widened(sample).clamp(-s, s) / s).to(sample.dtype)

    def _get_variance(
        self, t: Any, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor:
        """diffusers' method, for its pipelines that call it: what it returns of p's variance depends on the type.

        The variance for "fixed_small" and "fixed_large", the standard deviation for "fixed_small_log", and the log of
        the variance for the others. predicted_variance is the network's output for it, if the variance is learned.
        """
        variance_type = variance_type or self.variance_type
        alpha_bar_t, alpha_bar_prev = self._alpha_bar[[int(t) + 1, int(self.previous_timestep(int(t))) + 1]]
        centre, slope = self.log_variance(alpha_bar_t, alpha_bar_prev, variance_type)
        log_variance = centre + slope * (0 if predicted_variance is None else predicted_variance)
        if variance_type == "fixed_small_log":
            return (log_variance / 2).exp()
        return log_variance.exp() if variance_type in ("fixed_small", "fixed_large") else log_variance

    # ---- Tables ------------------------------------------------------------------------------------------------------

    def _plan(self, eta: float) -> Tensor:
        """StepCoefficients of the whole schedule, a float64 table (T, 6) indexed by t, NaN between the timesteps."""
        if eta not in self._plans:
            schedule = torch.tensor(self._schedule)
            alpha_bar_t = self._alpha_bar[schedule + 1]
            alpha_bar_prev = torch.cat([alpha_bar_t[1:], self._alpha_bar[:1]])
            centre, slope = self.log_variance(alpha_bar_t, alpha_bar_prev)
            std = eta * (centre / 2).exp()
            std[-1] = 0.0  # the last step of every schedule ends at the clean image and adds no noise
            columns = (
                *self.x_0_coefficients(alpha_bar_t, self.prediction_type),
                *self.posterior_coefficients(alpha_bar_t, alpha_bar_prev, eta)[:2],
                std,
                slope / 2,
            )
            table = torch.full((self.num_steps, len(columns)), math.nan, dtype=torch.float64)
            table[schedule] = torch.stack(columns, dim=1)
            self._plans[eta] = table
        return self._plans[eta]

    def _coefficients(self, timestep: int | Tensor, eta: float, sample: Tensor) -> StepCoefficients:
        if not (isinstance(eta, (int, float, np.floating)) and 0 <= eta <= 1):
            raise ValueError(f"ddim_eta is {eta!r}: give a number from 0 (deterministic) to 1 (ancestral)")
        on_host = not isinstance(timestep, Tensor) or timestep.device.type == "cpu"
        if on_host and not torch.compiler.is_compiling():
            if eta not in self._rows:
                self._rows[eta] = self._plan(eta)[self._schedule].tolist()
            return StepCoefficients(*self._rows[eta][self._index(timestep)])
        # A compiled step reads the numbers from a table, so that one graph serves every t; a timestep on an accelerator
        # is looked up there, so that the host does not wait for it.
        table = self._table(eta, sample.device, compute_dtype(sample.dtype))
        if isinstance(timestep, Tensor):  # (1,), not (): for a scalar index the host waits
            return StepCoefficients(*table[timestep.reshape(1).to(table.device)][0].unbind())
        return StepCoefficients(*table[timestep].unbind())

    def _index(self, timestep: int | Tensor) -> int:
        """Index of a timestep in the schedule."""
        if isinstance(timestep, Tensor):
            values = timestep.cpu().numpy()  # faster than a dispatched operation if it is on the CPU
            if values.size != 1:
                raise ValueError(
                    f"timestep has {values.size} elements: give one of the schedule, {_short(self._schedule)}, "
                    "or call p_mean_variance with one per image"
                )
            timestep = int(values.item())
        if timestep not in self._index_of:
            raise ValueError(f"timestep is {timestep!r}: give one of the schedule, {_short(self._schedule)}")
        return self._index_of[timestep]

    def _table(self, name: str | float, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A float64 table, or the plan of an eta, cast once for each device and dtype."""
        key = (name, device, dtype)
        if key not in self._cast:
            table = self._tables[name] if isinstance(name, str) else self._plan(name)
            self._cast[key] = table.to(dtype).to(device)  # in this order for a device without float64
        return self._cast[key]

    def _at(self, t: Tensor, images: Tensor, *names: str) -> list[Tensor]:
        """Entries of tables at t, (B,) or one for all, shaped (B, 1, 1, 1), in the dtype to compute in."""
        index, dtype = self._checked(t).to(images.device).flatten(), compute_dtype(images.dtype)
        tables = (self._table(name, images.device, dtype) for name in names)
        return [self._broadcast(table.index_select(0, index), images) for table in tables]

    def alpha_bars(self, t: Tensor, prev_t: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """alpha_bar at t and at prev_t (t - 1 by default), both (B,), float64: see `take_float64` for their device."""
        index = self._checked(t)
        if prev_t is None:
            prev_t = t - 1
        else:
            if not isinstance(prev_t, Tensor) or prev_t.dtype not in INDEX_DTYPES:
                raise ValueError(f"prev_t is {prev_t!r}: give an int64 or int32 tensor, each in [-1, t)")
            if prev_t.numel() != t.numel() and 1 not in (prev_t.numel(), t.numel()):
                raise ValueError(f"prev_t has {prev_t.numel()} entries and t has {t.numel()}: give one for each t")
            if t.device.type == "cpu" and not ((prev_t >= -1) & (prev_t < t)).all():
                raise ValueError(f"prev_t is {_short(prev_t.tolist())}: each must be at least -1 and less than its t")
        return take_float64(self._alpha_bar, index + 1), take_float64(self._alpha_bar, prev_t + 1)

    @staticmethod
    def _broadcast(table: Tensor, images: Tensor) -> Tensor:
        if table.numel() not in (1, images.shape[0]) and images.shape[0] != 1:
            raise ValueError(
                f"t has {table.numel()} entries and images have shape {tuple(images.shape)}: give one for each image"
            )
        return table.to(compute_dtype(images.dtype)).to(images.device).view(-1, *[1] * (images.ndim - 1))

    def _checked(self, t: Tensor) -> Tensor:
        """t, after a check of its dtype and, where this does not make the host wait, of its range."""
        if not isinstance(t, Tensor) or t.dtype not in INDEX_DTYPES:
            raise ValueError(f"t is {t!r}: give an int64 or int32 tensor, all in [0, {self.num_steps})")
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            values = t.numpy()  # faster than dispatched operations
            if values.size and not 0 <= values.min() <= values.max() < len(self._alpha_bar) - 1:
                raise ValueError(f"t is {_short(values.ravel().tolist())}: all must be in [0, {self.num_steps})")
        return t

    def _check_images(self, images: Tensor) -> None:
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}: give floats in [-1, 1]")
        # Only the first images are checked, since a check of every batch would cost as much as adding the noise.
        if not self._range_checked and images.device.type == "cpu" and not torch.compiler.is_compiling():
            self._range_checked = True
            largest = images.detach().abs().max().item() if images.numel() else 0.0
            if largest > 20:  # images in [-1, 1] with any noise stay far below, pixels of 0..255 do not
                warnings.warn(
                    f"images go up to {largest:g}: give values in [-1, 1], x / 127.5 - 1 for pixels of 0..255",
                    stacklevel=3,
                )

    def split_output(self, model_output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's prediction, and its output for the variance if that is learned, else None."""
        channels = x_t.shape[1]
        learned = self.variance_type.startswith("learned")
        expected = (x_t.shape[0], channels * (2 if learned else 1), *x_t.shape[2:])
        if tuple(model_output.shape) != expected:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)}, the images {tuple(x_t.shape)}: with "
                f'variance_type="{self.variance_type}" it must have {expected[1]} channels, shape {expected}'
            )
        if not learned:
            return model_output, None
        return model_output[:, :channels], model_output[:, channels:]


# ---- Helpers ---------------------------------------------------------------------------------------------------------


def _widened(images: Tensor) -> Tensor:
    return images.to(compute_dtype(images.dtype))


def _add_scaled(total: Tensor, images: Tensor, scale: Any) -> Tensor:
    """total + scale * images, into total if it has room for the result."""
    if images.shape != total.shape and torch.broadcast_shapes(total.shape, images.shape) != total.shape:
        return total + scale * images
    return total.addcmul_(images, scale) if isinstance(scale, Tensor) else total.add_(images, alpha=scale)


def _short(numbers: Sequence[int]) -> str:
    """A list, shortened for an error message."""
    if len(numbers) <= 8:
        return str(list(numbers))
    return f"[{', '.join(map(str, numbers[:4]))}, ..., {', '.join(map(str, numbers[-2:]))}] ({len(numbers)} of them)"


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    try:
        is_allowed = value in allowed
    except (ValueError, RuntimeError):  # an array or a tensor of several
        is_allowed = False
    if not is_allowed:
        raise ValueError(f"{name} is {value!r}: give one of {', '.join(map(repr, allowed))}")


def check_int(name: str, value: Any, least: int, most: int) -> int:
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        raise ValueError(f"{name} is {value!r}: give an integer from {least} to {most}")
    return number


def check_timesteps(timesteps: Sequence[int] | np.ndarray | Tensor, num_steps: int) -> list[int]:
    """The timesteps as a list; ValueError unless they are descending integers in [0, num_steps)."""
    checked = [check_int("timesteps", t, 0, num_steps - 1) for t in timesteps]
    if not checked or any(after >= before for before, after in zip(checked, checked[1:])):
        raise ValueError(f"timesteps are {_short(checked)}: give integers in descending order")
    return checked


def known_fields(kind: Any) -> set[str]:
    """Names of the options of a class, and of a scheduler's compatible ones, whose fields it keeps."""
    compatible = kind._get_compatibles() if issubclass(kind, SchedulerMixin) else []
    return {name for each in (kind, *compatible) for name in inspect.signature(each.__init__).parameters}


def fields_without_effect(config: Mapping[str, Any], known: Collection[str]) -> set[str]:
    """Fields that diffusers does not know and that change nothing: without a value, or of 2022."""
    return {name for name, value in config.items() if name not in known and (value is None or name == "tensor_format")}


def _without_old_fields(config: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """A configuration with the current fields instead of those of 2022, and without unknown ones that have no value."""
    if config.get("timestep_values") is not None:
        raise ValueError(f"timestep_values is {config['timestep_values']!r}: give null, and use set_timesteps")
    dropped = OLD_FIELDS | fields_without_effect(config, known)
    kept = {name: value for name, value in config.items() if name not in dropped or name.startswith("_")}
    predict_epsilon = config.get("predict_epsilon")
    if predict_epsilon is not None:
        if not isinstance(predict_epsilon, bool):
            raise ValueError(f"predict_epsilon is {predict_epsilon!r}: give true or false")
        meant, defaulted = "epsilon" if predict_epsilon else "sample", config.get("_use_default_values", [])
        current = config.get("prediction_type", meant)
        if current != meant and "prediction_type" not in defaulted:
            raise ValueError(
                f"predict_epsilon is {predict_epsilon}, but prediction_type is {current!r}: give one of them"
            )
        kept |= {
            "prediction_type": meant,
            "_use_default_values": [name for name in defaulted if name != "prediction_type"],
        }
    return kept


def _check_shapes(**tensors: Tensor) -> None:
    """Raise ValueError unless two tensors have equal shapes; the keywords are their names in the message."""
    (name_a, a), (name_b, b) = tensors.items()
    if a.shape != b.shape:
        raise ValueError(f"{name_a} has shape {tuple(a.shape)} and {name_b} {tuple(b.shape)}: they must be equal")
