"""MOONS: measured at the end of a run on the moons: are the samples moons, and what is between two moons?"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from ddpm_pipeline import DDPMPipeline, DDPMScheduler, visualize
from ddpm_pipeline.images import squared_pixel_distance
from ddpm_pipeline.moons import lit_fraction, phase_of, render
from training.progress import is_terminal
from training.run.log import Log

HALF, FULL = math.pi / 2, math.pi  # phases
NUM_WEIGHTS = 9  # interpolation weights from the half moon to the full moon


def measure_samples(log: Log, step: int, samples: Tensor) -> str:
    """Log the distance of the samples to true moons and the range of their phases. Returns a summary.

    Args:
        samples: (B, 1, H, W), in [-1, 1].
    """
    match = phase_of(samples.float().clamp(-1, 1).cpu())
    distance, num_eighths = match.distance.mean().item(), len((match.phase / (2 * math.pi) * 8).long().unique())
    log.metrics(step, moon_distance=distance, moon_eighths=num_eighths)
    return (
        f"{len(samples)} sampled moons: mean squared distance to the nearest true moon {distance:.4f}, "
        f"phases in {num_eighths} of 8 eighths of the circle"
    )


def fuse_moons(unet: UNet2DModel, scheduler: DDPMScheduler, folder: Path, num_inference_steps: int) -> str:
    """Interpolate between a half moon and a full moon, and write fusion.png and fusion.json. Returns a summary.

    Rows of the image: distance-balanced interpolation; latent interpolation without balance; mean of the pixels.
    """
    pipe: Any = DDPMPipeline(unet, scheduler)
    pipe.set_progress_bar_config(desc="interpolating moons", leave=False, disable=not is_terminal())
    size = unet.config["sample_size"]
    half, full = (render(phase, size if isinstance(size, int) else tuple(size))[None] for phase in (HALF, FULL))
    weights = [i / (NUM_WEIGHTS - 1) for i in range(NUM_WEIGHTS)]
    options = {"num_inference_steps": num_inference_steps, "output_type": "latent"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of images that are not between the two: their distances are reported below
        balanced = pipe.fuse(half, full, weights, balance=True, **options)
        unbalanced = pipe.fuse(half, full, weights, **options)
    methods: dict[str, Tensor] = {
        "balanced": balanced.images,
        "without balance": unbalanced.images,
        "mean of the pixels": torch.cat([torch.lerp(half, full, weight) for weight in weights]),
    }
    summary: dict[str, Any] = {
        "of": "a half moon, lit 0.5, and a full moon, lit 1",
        "num_inference_steps": num_inference_steps,
        "network_calls": balanced.network_calls,
        "weights": weights,
    }
    for name, images in methods.items():
        match = phase_of(images.float().cpu())
        summary[name] = {
            "lit": [round(lit, 4) for lit in lit_fraction(match.phase).tolist()],
            "distance": [round(distance, 5) for distance in match.distance.tolist()],
        }
        to_mean = squared_pixel_distance(images.cpu(), methods["mean of the pixels"])
        summary[name]["nearer_to_mean_of_pixels"] = (to_mean < match.distance.to(to_mean)).tolist()
    grid = visualize.grid(torch.cat([images.cpu() for images in methods.values()]), columns=NUM_WEIGHTS)
    grid.save(folder / "fusion.png")
    (folder / "fusion.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    middle = NUM_WEIGHTS // 2
    lit, distance = summary["balanced"]["lit"][middle], summary["balanced"]["distance"][middle]
    mean_distance = summary["mean of the pixels"]["distance"][middle]
    text = (
        f"halfway between a half and a full moon: lit {lit:.2f} (0.75 is halfway), distance to the nearest true moon "
        f"{distance:.4f}; mean of the pixels: {mean_distance:.4f}"
    )
    if summary["balanced"]["nearer_to_mean_of_pixels"][middle]:
        text += ". It is nearer to the mean of the pixels than to any moon: train longer, or take more sampling steps"
    return text
