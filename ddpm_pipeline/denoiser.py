"""THE DENOISER: the trained network as a function of x_t and t, with class labels and guidance applied.

Inversion, interpolation and inpainting are functions over the protocol `Denoiser`. `UNetDenoiser` is diffusers' U-net
as one.
"""

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from .fast_unet import in_best_format, speed_up
from .guide import check_guide, place_guide
from .labels import check_class_labels, check_guidance_interval, null_class
from .packed_weights import PackedWeights
from .precision import compute_dtype
from .schedulers import check_number

MAX_GUIDANCE = 1e6  # far above any that is of use
GUIDANCE_RANGE = f"a number from {-MAX_GUIDANCE:g} to {MAX_GUIDANCE:g}"


class Denoiser(Protocol):
    """Any callable that gives the network's output; the scheduler's `prediction_type` says what that output means."""

    def __call__(self, x_t: Tensor, t: int, /) -> Tensor:
        """The output for noisy images x_t, (B, C, H, W), at timestep index t.

        (B, C, H, W), or (B, 2 C, H, W) with learned variance, in the dtype of x_t. Nothing is clipped.
        """


_EVALUATIONS: dict[torch.nn.Module, tuple[int, list[torch.nn.Module]]] = {}  # calls that run, parts in training mode
_EVALUATIONS_LOCK = threading.Lock()


@contextlib.contextmanager
def evaluating(network: torch.nn.Module) -> Iterator[None]:
    """The network without dropout; its mode is put back when the last call of any thread ends."""
    with _EVALUATIONS_LOCK:
        number, training = _EVALUATIONS.get(network, (0, []))
        if number == 0:
            training = [module for module in network.modules() if module.training]
            for module in training:
                module.training = False
        _EVALUATIONS[network] = number + 1, training
    try:
        yield
    finally:
        with _EVALUATIONS_LOCK:
            number, training = _EVALUATIONS.pop(network)
            if number > 1:
                _EVALUATIONS[network] = number - 1, training
            else:
                for module in training:
                    module.training = True


class UNetDenoiser:
    """A UNet2DModel as a `Denoiser`, for one sampling run: in the network's dtype, without dropout. Counts its calls.

    Args:
        unet: the network, with or without classes.
        class_labels: (B,), or (1,) for all images; None for a network without classes.
        guidance_scale: w in eps_null + w (eps_class - eps_null): Eq. (6), Ho and Salimans 2022, whose w is one less.
            It needs a null class.
        guidance_interval: (lo, hi): guidance of either kind at the timesteps t with lo <= t < hi alone, elsewhere w is
            1 (Kynkaanniemi et al. 2024, arXiv 2404.07724); None: at all timesteps.
        autoguidance_scale: w in weak + w (strong - weak) (Karras et al. 2024, arXiv 2406.02507), where strong is the
            output of the network and weak that of the guide. Unless it is 1, guidance_scale is.
        guide: the weaker network, on the device and in the dtype of the other.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        class_labels: Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        autoguidance_scale: float = 1.0,
        guide: UNet2DModel | None = None,
    ) -> None:
        self.unet, self.class_labels, self.guidance_scale = unet, class_labels, guidance_scale
        self.guidance_interval, self.autoguidance_scale = guidance_interval, autoguidance_scale
        self.guide = unet if guide is None else guide
        for network in (self.unet, self.guide):
            speed_up(network)
        self._dtype = unet.dtype  # looked up once: diffusers searches all layers for it
        self._weights = PackedWeights()
        self.num_calls = 0
        self.progress_bar: Any = None  # a tqdm bar, advanced by one for each call

    def __call__(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        with evaluating(self.unet), evaluating(self.guide), self._weights.in_use():
            x = in_best_format(x_t.to(self._dtype))
            output = self._guided(x, torch.as_tensor(t, device=x.device)).to(x_t.dtype).contiguous()
        self.num_calls += 1
        if self.progress_bar is not None:
            self.progress_bar.update()
        return output

    def forget_weights(self) -> None:
        """After code of the user, which may have changed them: they are read again."""
        self._weights.forget()

    def _guided(self, x_t: Tensor, t: Tensor) -> Tensor:
        labels = self.class_labels
        if labels is not None and len(labels) != len(x_t):
            labels = labels.expand(len(x_t), *labels.shape[1:])
        is_guided = self.autoguidance_scale != 1 or (labels is not None and self.guidance_scale != 1)
        if is_guided and self.guidance_interval is not None:
            lo, hi = self.guidance_interval
            is_guided = lo <= t.item() < hi  # only here the host waits for the device
        if not is_guided:
            return self.unet(x_t, t, class_labels=labels, return_dict=False)[0]
        if self.autoguidance_scale != 1:
            scale = self.autoguidance_scale
            both = [network(x_t, t, class_labels=labels, return_dict=False)[0] for network in (self.unet, self.guide)]
            strong, weak = (output.to(compute_dtype(x_t.dtype)) for output in both)
        else:
            scale, number = self.guidance_scale, null_class(self.unet)
            assert labels is not None and number is not None  # check_class_labels
            both_labels = torch.cat([labels, torch.full_like(labels, number)])
            output = self.unet(torch.cat([x_t, x_t]), t, class_labels=both_labels, return_dict=False)[0]
            strong, weak = output.to(compute_dtype(x_t.dtype)).chunk(2)
        channels = x_t.shape[1]  # the channels after these are a learned variance, which is not guided
        guided = torch.lerp(weak[:, :channels], strong[:, :channels], scale)
        return torch.cat([guided, strong[:, channels:]], dim=1)


def prepare_denoiser(
    unet: UNet2DModel,
    scheduler: Any,
    device: torch.device,
    batch_size: int,
    class_labels: Any,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    autoguidance_scale: float = 1.0,
    guide: UNet2DModel | None = None,
) -> UNetDenoiser:
    """The network with labels for `batch_size` images and guidance, which are checked as arguments of a call."""
    scale = check_number("guidance_scale", guidance_scale, -MAX_GUIDANCE, MAX_GUIDANCE, GUIDANCE_RANGE)
    auto_scale = check_number("autoguidance_scale", autoguidance_scale, -MAX_GUIDANCE, MAX_GUIDANCE, GUIDANCE_RANGE)
    interval = check_guidance_interval(guidance_interval, scheduler.config.num_train_timesteps)
    if scale != 1 and auto_scale != 1:
        raise ValueError(
            f"guidance_scale is {guidance_scale} and autoguidance_scale is {autoguidance_scale}: one of them must be 1"
        )
    if auto_scale != 1 and guide is None:
        raise ValueError(
            f"autoguidance_scale is {autoguidance_scale}, but the pipeline has no guide: give 1, train with "
            "--guide_snapshot 0.125, or set pipe.guide to a weaker network"
        )
    labels = check_class_labels(unet, class_labels, scale, batch_size, device)
    if auto_scale != 1:
        assert guide is not None
        check_guide(guide, unet)
        place_guide(guide, unet, device)  # if it was set later, or the networks are offloaded
        return UNetDenoiser(unet, labels, 1.0, interval, auto_scale, guide)
    if interval is not None and (labels is None or scale == 1):
        scales = "guidance_scale is 1" if guide is None else "guidance_scale and autoguidance_scale are 1"
        has_no_classes = labels is None and (scale != 1 or guide is None)
        reason = "this network has no classes" if has_no_classes else f"{scales}, no guidance"
        warnings.warn(f"guidance_interval={guidance_interval} has no effect: {reason}", stacklevel=4)
    return UNetDenoiser(unet, labels, scale, interval)
