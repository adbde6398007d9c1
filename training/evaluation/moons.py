"""What a run on moons can say at its end that others cannot: are its pictures moons, and what lies between two?"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor

from ddpm_pipeline import DDPMPipeline, DDPMScheduler, visualize
from ddpm_pipeline.moons import lit_fraction, phase_of, render
from training.run.log import Log

HALF, FULL = math.pi / 2, math.pi  # phases
STRIP = 9  # pictures from the half moon to the full one


def measure_samples(log: Log, step: int, samples: Tensor) -> str:
    """How near the samples are to true moons, and whether they are of all phases."""
    match = phase_of(samples.float().clamp(-1, 1).cpu())
    distance, eighths = match.distance.mean().item(), len((match.phase / (2 * math.pi) * 8).long().unique())
    log.metrics(step, moon_distance=distance, moon_eighths=eighths)
    return (
        f"{len(samples)} sampled moons: mean squared distance to the nearest true moon {distance:.4f}, "
        f"phases in {eighths} of 8 eighths of the circle"
    )


def fuse_moons(unet: UNet2DModel, scheduler: DDPMScheduler, folder: Path, num_inference_steps: int) -> str:
    """Write fusion.png and fusion.json: what the model finds between a half and a full moon.

    The picture's rows: balanced fusion; the same without balance; the mean of the pixels.
    """
    pipe: Any = DDPMPipeline(unet, scheduler)
    pipe.set_progress_bar_config(desc="what lies between", leave=False)
    size = unet.config["sample_size"]
    half, full = (render(phase, size if isinstance(size, int) else tuple(size))[None] for phase in (HALF, FULL))
    weights = [i / (STRIP - 1) for i in range(STRIP)]
    options = {"num_inference_steps": num_inference_steps, "output_type": "latent"}
    rows: dict[str, Tensor] = {}
    balanced = pipe.fuse(half, full, weights, balance=True, **options)
    rows["balanced"] = balanced.images
    rows["without balance"] = pipe.fuse(half, full, weights, **options).images
    rows["mean of the pixels"] = torch.cat([torch.lerp(half, full, weight) for weight in weights])
    found: dict[str, Any] = {
        "of": "a half moon, lit 0.5, and a full moon, lit 1",
        "num_inference_steps": num_inference_steps,
        "network_calls": balanced.network_calls,
        "weights": weights,
    }
    for name, images in rows.items():
        match = phase_of(images.float().cpu())
        found[name] = {
            "lit": [round(lit, 4) for lit in lit_fraction(match.phase).tolist()],
            "distance": [round(distance, 5) for distance in match.distance.tolist()],
        }
    visualize.grid(torch.cat([images.cpu() for images in rows.values()]), columns=STRIP).save(folder / "fusion.png")
    (folder / "fusion.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    middle = {name: [found[name][what][STRIP // 2] for what in ("lit", "distance")] for name in rows}
    lit, distance = middle["balanced"]
    return (
        f"half and full moon fused: lit {lit:.2f} (0.75 is between), distance to the nearest moon {distance:.4f}; of "
        f"the mean of their pixels {middle['mean of the pixels'][1]:.4f}"
    )
