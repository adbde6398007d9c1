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
from .packed_weights import PackedWeights
from .precision import compute_dtype


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
            The last class is the one for "no label".
    """

    def __init__(self, unet: UNet2DModel, class_labels: Tensor | None = None, guidance_scale: float = 1.0) -> None:
        speed_up(unet)
        self.unet, self.class_labels, self.guidance_scale = unet, class_labels, guidance_scale
        self._dtype = unet.dtype  # looked up once: diffusers searches all layers for it
        self._weights = PackedWeights()
        self.num_calls = 0
        self.progress_bar: Any = None  # a tqdm bar, advanced by one for each call

    def __call__(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        with evaluating(self.unet), self._weights.in_use():
            x = in_best_format(x_t.to(self._dtype))
            output = self._guided(x, torch.as_tensor(t, device=x.device)).to(x_t.dtype).contiguous()
        self.num_calls += 1
        if self.progress_bar is not None:
            self.progress_bar.update()
        return output

    def _guided(self, x_t: Tensor, t: Tensor) -> Tensor:
        labels = self.class_labels
        if labels is not None and len(labels) != len(x_t):
            labels = labels.expand(len(x_t), *labels.shape[1:])
        if labels is None or self.guidance_scale == 1:
            return self.unet(x_t, t, class_labels=labels, return_dict=False)[0]
        null = torch.full_like(labels, self.unet.config["num_class_embeds"] - 1)
        both_labels = torch.cat([labels, null])
        both = self.unet(torch.cat([x_t, x_t]), t, class_labels=both_labels, return_dict=False)[0]
        with_class, without_class = both.to(compute_dtype(x_t.dtype)).chunk(2)
        channels = x_t.shape[1]  # the channels after these are a learned variance, which is not guided
        guided = torch.lerp(without_class[:, :channels], with_class[:, :channels], self.guidance_scale)
        return torch.cat([guided, with_class[:, channels:]], dim=1)


def check_class_labels(
    unet: UNet2DModel, class_labels: Any, guidance_scale: float, batch_size: int, device: torch.device
) -> Tensor | None:
    """Labels for the network, (B,), or None for a network without classes.

    Raises:
        ValueError: a network with classes has no labels, or one without has some; or a label is not a class.
    """
    number = unet.config["num_class_embeds"]
    has_classes = number is not None or unet.config["class_embed_type"] is not None
    if class_labels is None:
        if has_classes:
            allowed = "class_labels" if number is None else f"class_labels in [0, {number})"
            raise ValueError(f"class_labels is None, but this network has classes: give {allowed}")
        if guidance_scale != 1:
            warnings.warn(f"guidance_scale={guidance_scale} has no effect: this network has no classes", stacklevel=4)
        return None
    if not has_classes:
        raise ValueError(f"class_labels is {class_labels!r}, but this network has no classes: leave it out")
    try:
        labels = torch.as_tensor(class_labels, device=device)
    except (TypeError, ValueError, RuntimeError):  # text, None, lists of different lengths
        allowed = "numbers" if number is None else f"integers in [0, {number})"
        raise ValueError(f"class_labels is {class_labels!r}: give {allowed}") from None
    if labels.ndim == 0:
        labels = labels.expand(batch_size)
    if len(labels) not in (1, batch_size):
        raise ValueError(
            f"class_labels has {len(labels)} entries, but there are {batch_size} images: give one for each"
        )
    if number is None:  # class_embed_type defines what the labels are
        if guidance_scale != 1:
            raise ValueError(f'guidance_scale is {guidance_scale}, but this network has no class for "no label"')
        return labels
    integers = not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
    labels = labels.long() if integers else labels  # torch does not compare uint16
    if not integers or labels.ndim != 1 or not ((labels >= 0) & (labels < number)).all():
        raise ValueError(f"class_labels is {class_labels!r}: give integers in [0, {number})")
    return labels
