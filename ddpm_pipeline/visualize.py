"""VISUALIZATION: images in a grid, a trajectory as a strip or as an animation."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .pixels import to_pixels

if TYPE_CHECKING:
    from .pipeline_ddpm import DDPMPipeline
    from .sampling import TrajectoryStep

ANIMATED = (".gif", ".webp")


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] to (B, H, W, 1 or 3) uint8: of 2 channels the first, of more than 3 the first three.

    NaN is black.
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        what = f"of shape {tuple(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise ValueError(f'images are {what}: give a tensor (B, C, H, W), as pipe(..., output_type="latent") has')
    visible = images[:, :3] if images.shape[1] >= 3 else images[:, :1]
    return to_pixels(visible.nan_to_num(nan=-1.0).permute(0, 2, 3, 1))


def grid(images: Tensor, columns: int | None = None, margin: int = 2, side: int = 768) -> Image.Image:
    """An image grid, row by row, as square as possible by default; small grids are enlarged.

    Args:
        images: (B, C, H, W) in [-1, 1].
        side: the grid is enlarged by a whole number, up to this many pixels for its longer side.
    """
    pixels = to_uint8(images)
    number, height, width, channels = pixels.shape
    columns = columns or math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    canvas = np.full((rows * (height + margin) + margin, columns * (width + margin) + margin, channels), 128, np.uint8)
    for i, image in enumerate(pixels):
        top, left = margin + i // columns * (height + margin), margin + i % columns * (width + margin)
        canvas[top : top + height, left : left + width] = image
    unscaled = Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
    scale = max(1, side // max(unscaled.size))
    return unscaled.resize((unscaled.width * scale, unscaled.height * scale), Image.Resampling.NEAREST)


def strip(steps: Iterable["TrajectoryStep"], columns: int = 10) -> Image.Image:
    """A trajectory strip: for each image of the batch a row of x_t, and below it a row of x_0_pred.

    If the scheduler does not predict x_0, there is one row, and the generated image is last in it.

    Args:
        steps: from `pipe.trajectory`.
        columns: number of steps shown, evenly spaced, with the first and the last.
    """
    trajectory = list(steps)
    if not trajectory or columns < 2:
        raise ValueError(f"steps has {len(trajectory)} entries and columns is {columns}: give at least 1 and 2")
    indices = np.linspace(0, len(trajectory) - 1, min(columns, len(trajectory))).round().astype(int)
    shown = [trajectory[i] for i in indices]
    images: list[Tensor] = []
    for i in range(len(shown[0].x_t)):
        if _predicts_x_0(shown):
            images += [step.x_t[i] for step in shown]
            images += [step.x_0_pred[i] for step in shown if step.x_0_pred is not None]
        else:
            images += [*(step.x_t[i] for step in shown[:-1]), _generated(trajectory)[i]]
    return grid(torch.stack(images), columns=len(shown))


def _predicts_x_0(trajectory: Sequence["TrajectoryStep"]) -> bool:
    return all(step.x_0_pred is not None for step in trajectory)


def _generated(trajectory: Sequence["TrajectoryStep"]) -> Tensor:
    """The generated images, (B, C, H, W); where they are unknown, the last x_0_pred or x_t."""
    last = trajectory[-1]
    predicted = last.x_t if last.x_0_pred is None else last.x_0_pred
    return getattr(last, "images", predicted).to(last.x_t)


def animate(steps: Iterable["TrajectoryStep"], path: str | Path, *, seconds: float = 4.0, hold: float = 1.5) -> None:
    """A trajectory as an animation: x_t on the left, x_0_pred on the right if there is one; at last the image.

    Args:
        steps: from `pipe.trajectory`.
        path: file to write; the suffix .gif or .webp selects the format.
        seconds: duration from the first step to the last.
        hold: seconds for which the final image stays.
    """
    path = Path(path)
    if path.suffix.lower() not in ANIMATED:
        raise ValueError(f"path is {path}: give a name that ends in .gif or .webp")
    trajectory = list(steps)
    if not trajectory:
        raise ValueError("steps is empty: give the steps of pipe.trajectory")
    pairs = _predicts_x_0(trajectory)
    images = [(step.x_t, step.x_0_pred if pairs else None) for step in trajectory]
    final = _generated(trajectory)
    images.append((final, final if pairs else None))
    frames = [grid(_side_by_side(x_t, x_0_pred), columns=1 + pairs, side=512) for x_t, x_0_pred in images]
    durations = [max(20, round(1000 * seconds / len(trajectory)))] * len(trajectory) + [round(1000 * hold)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _side_by_side(x_t: Tensor, x_0_pred: Tensor | None) -> Tensor:
    """x_t and x_0_pred of each image, alternating."""
    return x_t if x_0_pred is None else torch.stack([x_t, x_0_pred.to(x_t)], dim=1).flatten(0, 1)


def trajectory_grid(
    pipe: "DDPMPipeline",
    x_0: Tensor,
    *,
    num_inference_steps: int,
    seed: int,
    class_labels: Sequence[int] | None = None,
    columns: int = 10,
) -> Image.Image:
    """The forward process from a real image x_0, (1, C, H, W), above a sampling trajectory.

    The first row goes from the image to noise. The two rows below go from noise to a generated image: x_t and x_0_pred.
    """
    num_steps = pipe.scheduler.config.num_train_timesteps
    position = np.linspace(0, 1, columns)  # squared below: close to the image more changes can be seen
    t = torch.from_numpy((position**2 * (num_steps - 1)).round().astype(np.int64))
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed)).to(x_0)
    noised = pipe.scheduler.add_noise(x_0.expand(columns, -1, -1, -1), noise, t.to(x_0.device))
    noised[0] = x_0[0]
    trajectory = list(pipe.trajectory(seeds=[seed], num_inference_steps=num_inference_steps, class_labels=class_labels))
    indices = ((1 - (1 - position) ** 2) * (len(trajectory) - 1)).round().astype(int)
    shown = [trajectory[i] for i in indices]
    predicted = [step.x_0_pred for step in shown if step.x_0_pred is not None] if _predicts_x_0(shown) else []
    x_t = torch.cat([*(step.x_t for step in shown[:-1]), _generated(trajectory)])
    return grid(torch.cat([noised, x_t, *predicted]).to(x_0), columns=columns)
