"""Pictures of a run: every image where it should be, pixel for pixel."""

import numpy as np
import pytest
import torch

from ddpm_pipeline import DDPMPipeline, DDPMScheduler
from ddpm_pipeline.visualize import grid, to_uint8, trajectory_grid
from training.denoiser import make_denoiser

MARGIN = 2


def tiles(picture, rows, columns, size):
    """The images of a grid, (rows, columns, size, size[, 3]), at their own size."""
    array = np.asarray(picture)
    scale = array.shape[0] // (rows * (size + MARGIN) + MARGIN)
    assert array.shape[:2] == tuple(scale * (n * (size + MARGIN) + MARGIN) for n in (rows, columns))
    assert (array == array[::scale, ::scale].repeat(scale, 0).repeat(scale, 1)).all()  # enlarged without smoothing
    starts = [[MARGIN + k * (size + MARGIN) for k in range(n)] for n in (rows, columns)]
    small = array[::scale, ::scale]
    return np.array([[small[y : y + size, x : x + size] for x in starts[1]] for y in starts[0]])


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_bytes_of_any_number_of_channels(channels):
    images = torch.linspace(-1.2, 1.2, 2 * channels * 16).reshape(2, channels, 4, 4)
    pixels = to_uint8(images)
    assert pixels.shape == (2, 4, 4, 3 if channels >= 3 else 1)
    expected = ((images[:, : pixels.shape[-1]].clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
    assert (pixels == expected.numpy()).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_goes_row_by_row(channels):
    images = torch.rand(7, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = tiles(grid(images), 3, 3, 8).reshape(9, 8, 8, channels)
    assert (found[:7] == to_uint8(images)).all()
    assert (found[7:] == 128).all()


def test_the_walk_goes_out_from_the_picture_and_home_to_another():
    torch.manual_seed(0)
    unet = make_denoiser("tiny", height=8, width=8, in_channels=1).eval()
    pipe = DDPMPipeline(unet, DDPMScheduler(timestep_spacing="trailing"))
    pipe.set_progress_bar_config(disable=True)
    x_0 = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    out, x_t, guesses = tiles(trajectory_grid(pipe, x_0, num_inference_steps=20, seed=5), 3, 10, 8)
    assert (out[0] == to_uint8(x_0)[0, ..., 0]).all()
    away = [np.corrcoef(image.ravel(), out[0].ravel())[0, 1] for image in out]
    assert away[1] > 0.9  # still the picture
    assert abs(away[-1]) < 0.4  # 64 pixels of noise: 3 standard errors
    picture = pipe(seeds=[5], num_inference_steps=20, output_type="latent").images
    assert (x_t[-1] == to_uint8(picture)[0, ..., 0]).all()
    assert (guesses[-1] == x_t[-1]).all()
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    assert (x_t[0] == to_uint8(noise)[0, ..., 0]).all()
