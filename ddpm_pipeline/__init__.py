"""A DDPM for diffusers, from a folder of images to a model that others load in one line.

An image is a point in a space of very many dimensions; almost every point is noise, a few are images. The forward
process is a walk of a thousand small random steps from an image to noise, and a network that is given the point x_t and
the number of steps t learns to walk back: to the images it was trained on and to the meaningful ones between them, such
as the three-quarter moon between a half moon and a full moon.

The chapters, one file each:
    precision.py         the dtype to compute in, float64 on the host where a device has none
    betas.py             the noise schedules
    scheduling_ddpm.py   the scheduler: tables, forward process, one reverse step, conversions
    pipeline_ddpm.py     the pipeline for users, thin methods over the next five
    labels.py            classes by number and by name, guidance intervals
    guide.py             the weaker network of autoguidance
    denoiser.py          the network as a function of x_t and t
    fast_unet.py         the U-net's layers with fewer passes over memory
    attention.py         attention in chunks
    packed_weights.py    weights of convolutions in the order of the processor, while sampling
    group_norm.py        GroupNorm, SiLU and dropout in one pass
    kernels.py           compiles the loops of that pass, in group_norm.c
    sampling.py          the reverse process with any scheduler, and the forward process step by step
    calls.py             the calls of a pipeline, in several threads at once
    inversion.py         DDIM inversion: from an image to its latent
    interpolation.py     interpolation between images, distance-balanced
    inpainting.py        RePaint
    schedulers.py        diffusers' schedulers: which are compatible, one copy for each call
    calibrated.py        sampling in a few steps by a table of numbers that were fitted to the network
    solver_tables.py     DPM-Solver++, with noise and with corrections of a network's errors, as such tables
    calibration.py       fits such tables to a network
    arguments.py         checks of the pipeline's arguments
    images.py            images in and out, of any kind
    decode.py            one image file or PIL image to pixels, for training and the pipeline
    pixels.py            scaling between pixel values and [-1, 1], image sizes
    visualize.py         image grid, trajectory strip, animation
    saving.py            the saved folder and its one file of remote code
    loading.py           checks of a saved folder before anything in it is loaded
    objective.py         noised batches, targets and the loss
    loss_weights.py      how much each timestep counts in the loss
    timesteps.py         which timesteps the images of a batch are noised to
    rng.py               counter-based random numbers, stream ids
    likelihood.py        variational bound, bits per dimension, probability-flow ODE
    fidelity.py          distances between sets of images, precision and recall, copies
    features.py          feature extractors for these distances
    hub_features.py      models of transformers as such extractors, from the Hub or a folder
    classifier.py        a small classifier whose features measure distances
    image_arrays.py      data sets as arrays: checks and chunks
    tensor_cache.py      cached results, named by a hash of what they depend on
    moons.py             the built-in data set: moons with a phase that can be measured
    web_export.py        a model as a static web page, which samples in the browser
    onnx_network.py      a U-net as ONNX, compared with torch's
    cpu.py               memory and threads of a process on a CPU
    transfer.py          copies to a device that the host does not wait for
    files.py             atomic replacement of files and folders
    __main__.py          the pipeline's methods on the command line
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline_ddpm import DDPMPipeline
    from .scheduling_ddpm import DDPMScheduler

__version__ = "0.1.0"  # the one place: setup.cfg reads it from here
__all__ = ["DDPMPipeline", "DDPMScheduler", "register", "unregister"]

_MODULES = {"DDPMPipeline": "pipeline_ddpm", "DDPMScheduler": "scheduling_ddpm"}


def __getattr__(name: str) -> Any:
    """Import a module at the first use of its class: diffusers' pipelines take seconds to import."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def register() -> None:
    """Replace diffusers' two classes by ours in this process, so that `DiffusionPipeline.from_pretrained` returns ours.

    Classes that were already imported from diffusers stay the built-in ones. `unregister` undoes it.
    """
    import diffusers

    for name in _MODULES:
        setattr(diffusers, name, __getattr__(name))


def unregister() -> None:
    """Restore diffusers' own two classes."""
    import diffusers

    for our_class in (__getattr__(name) for name in _MODULES):
        setattr(diffusers, our_class.__name__, our_class.__bases__[-1])  # the built-in class
