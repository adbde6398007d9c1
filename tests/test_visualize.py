"""Image grids and trajectories: every image at its position, pixel for pixel."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from PIL import Image

from ddpm_pipeline import DDPMScheduler
from ddpm_pipeline.visualize import animate, grid, strip, to_uint8, trajectory_grid
from tests.models import tiny_pipe

MARGIN = 2


def tiles(image, rows, columns, size):
    """The images of a grid, (rows, columns, size, size[, 3]), at their own size."""
    array = np.asarray(image)
    scale = array.shape[0] // (rows * (size + MARGIN) + MARGIN)
    assert array.shape[:2] == tuple(scale * (n * (size + MARGIN) + MARGIN) for n in (rows, columns))
    assert (array == array[::scale, ::scale].repeat(scale, 0).repeat(scale, 1)).all()  # enlarged without smoothing
    starts = [[MARGIN + k * (size + MARGIN) for k in range(n)] for n in (rows, columns)]
    small = array[::scale, ::scale]
    return np.array([[small[y : y + size, x : x + size] for x in starts[1]] for y in starts[0]])


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_uint8_of_any_number_of_channels(channels):
    images = torch.linspace(-1.2, 1.2, 2 * channels * 16).reshape(2, channels, 4, 4)
    pixels = to_uint8(images)
    assert pixels.shape == (2, 4, 4, 3 if channels >= 3 else 1)
    expected = ((images[:, : pixels.shape[-1]].double().clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
    assert (pixels == expected.numpy()).all()


def test_non_finite_values_have_a_colour():
    values = torch.tensor([np.nan, np.inf, -np.inf, 0.0]).view(1, 1, 2, 2)
    assert to_uint8(values).ravel().tolist() == [0, 255, 0, 128]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_goes_row_by_row(channels):
    images = torch.rand(7, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = tiles(grid(images), 3, 3, 8).reshape(9, 8, 8, channels)
    assert (pixels[:7] == to_uint8(images)).all()
    assert (pixels[7:] == 128).all()


def test_the_trajectory_grid_shows_noising_above_sampling():
    pipe = tiny_pipe(scheduler=DDPMScheduler(timestep_spacing="trailing"))
    x_0 = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    noised, x_t, predicted = tiles(trajectory_grid(pipe, x_0, num_inference_steps=20, seed=5), 3, 10, 8)
    assert (noised[0] == to_uint8(x_0)[0, ..., 0]).all()
    correlation = [np.corrcoef(image.ravel(), noised[0].ravel())[0, 1] for image in noised]
    assert correlation[1] > 0.9  # still the image
    assert abs(correlation[-1]) < 0.4  # 64 pixels of noise: 3 standard errors
    generated = pipe(seeds=[5], num_inference_steps=20, output_type="latent").images
    assert (x_t[-1] == to_uint8(generated)[0, ..., 0]).all()
    assert (predicted[-1] == x_t[-1]).all()
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    assert (x_t[0] == to_uint8(noise)[0, ..., 0]).all()


def test_a_strip_has_two_rows_per_image():
    steps = list(tiny_pipe().trajectory(seeds=[1, 2], num_inference_steps=9))
    rows = tiles(strip(steps, columns=3), 4, 3, 8)
    for i in range(2):
        for column, step in enumerate((steps[0], steps[4], steps[8])):
            assert (rows[2 * i, column] == to_uint8(step.x_t)[i, ..., 0]).all()
            assert (rows[2 * i + 1, column] == to_uint8(step.x_0_pred)[i, ..., 0]).all()


@pytest.mark.parametrize("kind", ["gif", "webp", "GIF", "WebP"])
@pytest.mark.parametrize("scheduler", [DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_an_animation_ends_with_the_generated_image(tmp_path, kind, scheduler):
    """DPM-Solver++ and UniPC do not predict x_0: frames have x_t alone. WebP refuses frames of different sizes."""
    pipe = tiny_pipe(scheduler=scheduler(20, beta_end=0.1, timestep_spacing="trailing"))
    options = {"seeds": [1, 2], "num_inference_steps": 3}
    steps = list(pipe.trajectory(**options))
    path = tmp_path / f"trajectory.{kind}"
    animate(steps, path)
    columns = 1 if steps[0].x_0_pred is None else 2
    images = pipe(output_type="latent", **options).images
    grids = (grid(x.repeat_interleave(columns, 0), columns, side=512) for x in (images, steps[-1].x_t))
    expected, before = (np.asarray(image, float) for image in grids)
    with Image.open(path) as animation:
        assert animation.format == kind.upper()
        assert animation.n_frames == 4
        animation.seek(3)
        last = np.asarray(animation.convert("L"), float)
    error, far = np.abs(last - expected).mean(), np.abs(before - expected).mean()
    assert error < far / 2  # WebP is lossy


def test_a_strip_without_x_0_predictions_ends_with_the_generated_image():
    pipe = tiny_pipe(scheduler=DPMSolverMultistepScheduler(20, timestep_spacing="trailing"))
    steps = list(pipe.trajectory(seeds=[1, 2], num_inference_steps=5))
    rows = tiles(strip(steps, columns=3), 2, 3, 8)
    generated = to_uint8(pipe(seeds=[1, 2], num_inference_steps=5, output_type="latent").images)
    for i in range(2):
        for column, x in enumerate((steps[0].x_t, steps[2].x_t)):
            assert (rows[i, column] == to_uint8(x)[i, ..., 0]).all()
        assert (rows[i, 2] == generated[i, ..., 0]).all()


def test_invalid_trajectories_and_files(tmp_path):
    steps = list(tiny_pipe().trajectory(seeds=1, num_inference_steps=2))
    for arguments, message in (((steps, 1), "columns is 1"), (([], 10), "steps has 0 entries")):
        with pytest.raises(ValueError, match=message):
            strip(*arguments)
    with pytest.raises(ValueError, match=r"give a name that ends in .gif or .webp"):
        animate(steps, tmp_path / "trajectory.png")
    with pytest.raises(ValueError, match="steps is empty"):
        animate([], tmp_path / "trajectory.gif")


@pytest.mark.parametrize("images", [[Image.new("L", (4, 4))], torch.zeros(1, 4, 4), np.zeros((2, 1, 4, 4))])
def test_images_of_another_kind_are_named(images):
    """Such as what pipe(...).images is by default."""
    with pytest.raises(ValueError, match=r"give a tensor \(B, C, H, W\)"):
        grid(images)
