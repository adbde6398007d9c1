"""A DDPM for diffusers, from a folder of images to a model that others load in one line.

A picture is a point in a space of very many dimensions; almost every point is noise, a few are pictures. A walk of a
thousand small random steps leads from any picture to pure noise. Because the steps are Gaussian, where the walk is
after t steps has a closed form. A network that is told where it is and how long the walk has been learns the way
home, and the way home leads not only to the pictures it saw but to the meaningful ones between them: a full moon and
a half moon give the three-quarter moon.

The chapters, one file each:
    scheduling_ddpm.py   the walk: tables, one step out, one step home
    pipeline_ddpm.py     the way home, for users
    fusion.py            what lies between: invert, fuse, inpaint, vary
    images.py            pictures in and out, of any kind
    film.py              grids, a walk as a film strip or an animation
    loading.py           before loading: a whole model and nothing else
    objective.py         learning: draw t and eps, give x_t and the target; the loss
    likelihood.py        how much it knows: bits per dimension, a bound term by term, and a second opinion
    fidelity.py          how good: distances between sets of images, precision and recall, copies
    chance.py            random numbers that are functions of where they are used
    publishing.py        to the Hub: a clean folder, its card, one commit
    moons.py             the built-in data set: moons with a phase that can be read back
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline_ddpm import DDPMPipeline
    from .scheduling_ddpm import DDPMScheduler

__version__ = "0.1.0"
__all__ = ["DDPMPipeline", "DDPMScheduler", "register", "unregister"]

_HOMES = {"DDPMPipeline": "pipeline_ddpm", "DDPMScheduler": "scheduling_ddpm"}


def __getattr__(name: str) -> Any:
    """Import a chapter when its class is asked for: diffusers' pipelines alone take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def register() -> None:
    """Put our two classes in the place of diffusers' own for this process: plain `from_pretrained` lines give ours.

    What others imported from diffusers before stays the built-in class. `unregister` takes it back.
    """
    import diffusers

    for name in _HOMES:
        setattr(diffusers, name, __getattr__(name))


def unregister() -> None:
    """Give diffusers its own two classes back."""
    import diffusers

    for ours in (__getattr__(name) for name in _HOMES):
        setattr(diffusers, ours.__name__, ours.__bases__[-1])  # the built-in class
