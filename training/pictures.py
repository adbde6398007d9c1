"""Pictures that a run leaves behind: a grid of samples, and the walk out and home."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from ddpm_pipeline import DDPMPipeline


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] to (B, H, W, 1 or 3) uint8: 2 channels show the first, more than 3 the first three."""
    shown = images[:, :3] if images.shape[1] >= 3 else images[:, :1]
    pixels = (shown.float().clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def grid(images: Tensor, columns: int | None = None, margin: int = 2) -> Image.Image:
    """Images (B, C, H, W) in [-1, 1], row by row, as nearly square as can be unless told, small ones enlarged."""
    pixels = to_uint8(images)
    number, height, width, channels = pixels.shape
    columns = columns or math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    canvas = np.full((rows * (height + margin) + margin, columns * (width + margin) + margin, channels), 128, np.uint8)
    for i, image in enumerate(pixels):
        top, left = margin + i // columns * (height + margin), margin + i % columns * (width + margin)
        canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
    scale = max(1, 768 // max(picture.size))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def walk_picture(
    pipe: DDPMPipeline, x_0: Tensor, *, num_inference_steps: int, seed: int, columns: int = 10
) -> Image.Image:
    """The walk out of a real picture x_0 (1, C, H, W), and below it a walk home to a new one.

    The upper row goes from the picture to noise. The lower two go from noise to a picture: x_t, and what it is taken
    for on the way, x_0_pred.
    """
    num_steps = pipe.scheduler.config.num_train_timesteps
    along = np.linspace(0, 1, columns)  # squared below: near the picture there is more to see
    t = torch.from_numpy((along**2 * (num_steps - 1)).round().astype(np.int64))
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed)).to(x_0)
    out = pipe.scheduler.add_noise(x_0.expand(columns, -1, -1, -1), noise, t.to(x_0.device))
    out[0] = x_0[0]
    home = list(pipe.walk(seeds=[seed], num_inference_steps=num_inference_steps))
    shown = [home[i] for i in ((1 - (1 - along) ** 2) * (len(home) - 1)).round().astype(int)]
    guesses = [step.x_0_pred for step in shown if step.x_0_pred is not None]
    x_t = torch.cat([*(step.x_t for step in shown[:-1]), guesses[-1]])  # the last guess is where the walk ends
    return grid(torch.cat([out, x_t, *guesses]).to(x_0), columns=columns)
