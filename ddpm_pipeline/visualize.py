"""SEEING IT: pictures in a grid, a walk as a film strip, a walk as an animation."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from .pipeline_ddpm import DDPMPipeline, TrajectoryStep


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] to (B, H, W, 1 or 3) uint8: 2 channels show the first, more than 3 the first three."""
    shown = images[:, :3] if images.shape[1] >= 3 else images[:, :1]
    pixels = (shown.float().clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def grid(images: Tensor, columns: int | None = None, margin: int = 2, side: int = 768) -> Image.Image:
    """Images (B, C, H, W) in [-1, 1], row by row, as nearly square as can be unless told, small ones enlarged.

    Args:
        side: pixels that the longer side of the picture may have after enlarging by a whole number.
    """
    pixels = to_uint8(images)
    number, height, width, channels = pixels.shape
    columns = columns or math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    canvas = np.full((rows * (height + margin) + margin, columns * (width + margin) + margin, channels), 128, np.uint8)
    for i, image in enumerate(pixels):
        top, left = margin + i // columns * (height + margin), margin + i % columns * (width + margin)
        canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
    scale = max(1, side // max(picture.size))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def strip(steps: Iterable["TrajectoryStep"], columns: int = 10) -> Image.Image:
    """A walk as a film strip: for each picture a row of x_t, and below it one of x_0_pred, what it is taken for.

    Args:
        steps: what `pipe.trajectory` yields.
        columns: so many moments of it, evenly spaced, the first and the last among them.
    """
    walk = list(steps)
    if not walk or columns < 2:
        raise ValueError(f"steps has {len(walk)} entries and columns is {columns}: give at least 1 and 2")
    shown = [walk[i] for i in np.linspace(0, len(walk) - 1, min(columns, len(walk))).round().astype(int)]
    rows = []
    for i in range(len(shown[0].x_t)):
        rows += [step.x_t[i] for step in shown]
        rows += [step.x_0_pred[i] for step in shown if step.x_0_pred is not None]
    return grid(torch.stack(rows), columns=len(shown))


def animate(steps: Iterable["TrajectoryStep"], path: str | Path, *, seconds: float = 4.0, hold: float = 1.5) -> None:
    """A walk as an animation, GIF or WebP by the name of the file: x_t on the left, x_0_pred on the right.

    Args:
        steps: what `pipe.trajectory` yields.
        seconds: from the first step to the last.
        hold: seconds for which the last picture stays.
    """
    path = Path(path)
    if path.suffix not in (".gif", ".webp"):
        raise ValueError(f"path is {path}: give a name that ends in .gif or .webp")
    walk = list(steps)
    if not walk:
        raise ValueError("steps is empty: give what pipe.trajectory yields")
    frames = [grid(_side_by_side(step), columns=1 if step.x_0_pred is None else 2, side=512) for step in walk]
    last = walk[-1].x_0_pred if walk[-1].x_0_pred is not None else walk[-1].x_t
    frames.append(grid(_side_by_side(walk[-1]._replace(x_t=last)), columns=2, side=512))
    times = [max(20, round(1000 * seconds / len(walk)))] * len(walk) + [round(1000 * hold)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)


def _side_by_side(step: "TrajectoryStep") -> Tensor:
    """x_t and x_0_pred of each picture, by turns."""
    if step.x_0_pred is None:
        return step.x_t
    return torch.stack([step.x_t, step.x_0_pred.to(step.x_t)], dim=1).flatten(0, 1)


def trajectory_grid(
    pipe: "DDPMPipeline", x_0: Tensor, *, num_inference_steps: int, seed: int, columns: int = 10
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
    home = list(pipe.trajectory(seeds=[seed], num_inference_steps=num_inference_steps))
    shown = [home[i] for i in ((1 - (1 - along) ** 2) * (len(home) - 1)).round().astype(int)]
    guesses = [step.x_0_pred for step in shown if step.x_0_pred is not None]
    x_t = torch.cat([*(step.x_t for step in shown[:-1]), guesses[-1]])  # the last guess is where the walk ends
    return grid(torch.cat([out, x_t, *guesses]).to(x_0), columns=columns)
