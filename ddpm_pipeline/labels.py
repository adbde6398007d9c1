"""LABELS: the classes of a network, by number and by name, and the arguments about them.

A network with K named classes knows them as 0 to K - 1. If it was trained for classifier-free guidance it has one more,
the last: the null class, "no label".
"""

import difflib
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from .schedulers import check_number

CLASS_NAMES = "_class_names"  # the field of the network's configuration; diffusers keeps a "_" field and ignores it
MAX_NAMED = 10  # classes that a message names


def class_names_of(unet: UNet2DModel) -> tuple[str, ...] | None:
    """The names of classes 0, 1, ... of the network, without the null class; None if they are not saved.

    Raises:
        ValueError: the configuration has something else in their place.
    """
    names = unet.config.get(CLASS_NAMES)
    return None if names is None else _checked_names(names, unet.config["num_class_embeds"])


def listed_class_names(unet: UNet2DModel) -> list[str]:
    """Classes to choose from: their names, or their numbers where none are saved; none if the model has no classes."""
    number = unet.config["num_class_embeds"]
    return [] if number is None else list(class_names_of(unet) or map(str, range(number)))


def record_class_names(unet: UNet2DModel, names: Sequence[str]) -> None:
    """Save the names of classes 0, 1, ... with the network, in its configuration.

    Args:
        names: one for each class but the null class; as many as classes if there is no null class.
    Raises:
        ValueError: names that are equal or empty, or another number of them.
    """
    unet.register_to_config(**{CLASS_NAMES: list(_checked_names(names, unet.config["num_class_embeds"]))})


def _checked_names(names: Any, number: int | None) -> tuple[str, ...]:
    if not (isinstance(names, (list, tuple)) and all(isinstance(name, str) and name for name in names)):
        raise ValueError(f"the class names are {names!r}: give a list of texts")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"the class names have {twice[0]!r} twice: give names that differ")
    if number is None or len(names) not in (number, number - 1):
        raise ValueError(f"there are {len(names)} class names, but the network has num_class_embeds {number}")
    return tuple(names)


def null_class(unet: UNet2DModel) -> int | None:
    """The class for "no label": the last one, unless every class has a name. None if there is none."""
    number, names = unet.config["num_class_embeds"], class_names_of(unet)
    return None if number is None or (names is not None and len(names) == number) else number - 1


def check_class_labels(
    unet: UNet2DModel, class_labels: Any, guidance_scale: float, batch_size: int, device: torch.device
) -> Tensor | None:
    """Labels for the network, (B,), or None for a network without classes.

    Args:
        class_labels: one for all images or one for each: numbers or names.
    Raises:
        ValueError: a network with classes has no labels, or one without has some; a label is not a class; or guidance
            without a null class.
    """
    number, names = unet.config["num_class_embeds"], class_names_of(unet)
    has_classes = number is not None or unet.config["class_embed_type"] is not None
    allowed = "numbers" if number is None else f"integers in [0, {number})"
    if names is not None:
        shown = ", ".join(map(repr, names[:MAX_NAMED]))
        more = f" and {len(names) - MAX_NAMED} more (pipe.class_names)" if len(names) > MAX_NAMED else ""
        allowed = f"{shown}{more}, or {allowed}"
    if class_labels is None:
        if has_classes:
            raise ValueError(f"class_labels is None, but this network has classes: give class_labels, {allowed}")
        if guidance_scale != 1:
            warnings.warn(f"guidance_scale={guidance_scale} has no effect: this network has no classes", stacklevel=5)
        return None
    if not has_classes:
        raise ValueError(f"class_labels is {class_labels!r}, but this network has no classes: leave it out")
    try:
        labels = torch.as_tensor(_numbers(class_labels, names), device=device)
    except KeyError as error:
        (unknown,) = error.args
        close = difflib.get_close_matches(unknown.lower(), [name.lower() for name in names or ()])
        similar = ", ".join(repr(name) for name in names or () if name.lower() in close)
        hint = f" (similar: {similar})" if similar else ""
        raise ValueError(f"class_labels has {unknown!r}, which is no class{hint}: give {allowed}") from None
    except (TypeError, ValueError, RuntimeError):  # text, None, lists of different lengths
        raise ValueError(f"class_labels is {class_labels!r}: give {allowed}") from None
    if labels.ndim == 0:
        labels = labels.expand(batch_size)
    if len(labels) not in (1, batch_size):
        raise ValueError(
            f"class_labels has {len(labels)} entries, but there are {batch_size} images: give one for each"
        )
    if guidance_scale != 1 and null_class(unet) is None:
        raise ValueError(
            f'guidance_scale is {guidance_scale}, but this network has no class for "no label": give 1 (for guidance, '
            "train with --label_dropout 0.1)"
        )
    if number is None:  # class_embed_type defines what the labels are
        return labels
    integers = not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
    labels = labels.long() if integers else labels  # torch does not compare uint16
    if not integers or labels.ndim != 1 or not ((labels >= 0) & (labels < number)).all():
        raise ValueError(f"class_labels is {class_labels!r}: give {allowed}")
    return labels


def _numbers(labels: Any, names: Sequence[str] | None) -> Any:
    """The labels with the number of each class instead of its name. KeyError: there is no class of this name."""
    if isinstance(labels, str):
        if labels not in (names or ()):
            raise KeyError(labels)
        return (names or ()).index(labels)
    if isinstance(labels, np.ndarray) and labels.dtype.kind == "U":  # text, which torch does not take
        labels = labels.tolist()
    return [_numbers(label, names) for label in labels] if isinstance(labels, (list, tuple)) else labels


def check_guidance_interval(interval: Any, num_train_timesteps: int) -> tuple[float, float] | None:
    """(lo, hi) with 0 <= lo <= t < hi <= T for at least one timestep t, or None for guidance at all timesteps."""
    if interval is None:
        return None
    allowed = f"(lo, hi) with 0 <= lo < hi <= {num_train_timesteps}, in timesteps, at least one of which is in it"
    if not isinstance(interval, (list, tuple)) or len(interval) != 2:
        raise ValueError(f"guidance_interval is {interval!r}: give {allowed}")
    lo, hi = (check_number("guidance_interval", each, 0, num_train_timesteps, allowed) for each in interval)
    if math.ceil(lo) >= hi:
        raise ValueError(f"guidance_interval is {interval!r}: give {allowed}")
    return lo, hi
