"""RePaint: its schedule against the paper's listing, its noise against Eq. 4 of DDPM, and exact networks."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_pipeline import DDPMPipeline, DDPMScheduler
from ddpm_pipeline.inpainting import repaint_levels
from tests.gaussian import gaussian_images, gaussian_pipe
from tests.models import quiet, tiny_pipe
from tests.oracles import GaussianUNet
from tests.schedules import alpha_bar_table


def levels_of_the_paper(steps, jump_length, resamples):
    """The listing in the appendix of Lugmayr et al. 2022, rewritten."""
    jumps = dict.fromkeys(range(0, steps - jump_length, jump_length), resamples - 1)
    t, visited = steps, []
    while t >= 1:
        t = t - 1
        visited.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] = jumps[t] - 1
            for _ in range(jump_length):
                t = t + 1
                visited.append(t)
    return [steps, *visited]


@pytest.mark.parametrize(
    ("steps", "jump_length", "resamples"), [(250, 10, 10), (50, 5, 5), (7, 3, 2), (5, 5, 4), (4, 1, 1)]
)
def test_levels_are_those_of_the_paper(steps, jump_length, resamples):
    levels = repaint_levels(steps, jump_length, resamples)
    assert levels == levels_of_the_paper(steps, jump_length, resamples)
    assert levels[0] == steps and levels[-1] == 0
    assert all(abs(a - b) == 1 for a, b in itertools.pairwise(levels))
    down = sum(b < a for a, b in itertools.pairwise(levels))
    assert down == steps + (resamples - 1) * len(range(0, steps - jump_length, jump_length)) * jump_length


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_known_pixels_are_kept_bit_for_bit(channels):
    pipe = tiny_pipe(channels)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, channels), dtype=np.uint8)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, 4:] = 255
    inpainted = pipe.inpaint(image, Image.fromarray(mask), 5, seeds=[0], jump_length=2, resamples=2).images[0]
    assert inpainted.mode == image.mode
    result = np.asarray(inpainted).reshape(8, 8, channels)
    assert np.array_equal(result[:, :4], pixels[:, :4]) and not np.array_equal(result[:, 4:], pixels[:, 4:])
    floats = gaussian_images(2, channels, dtype=torch.float32)
    x_0 = pipe.inpaint(floats, mask > 0, 5, seeds=[0, 1], output_type="latent", jump_length=2).images
    assert torch.equal(x_0[..., :4], floats[..., :4])


def test_resampling_makes_the_result_match_the_known_pixels():
    """Images of one grey level: the known half determines it. With resampling RePaint comes closer than without."""

    class OneGreyLevel(GaussianUNet):
        """Exact for images with equal pixels, N(0, 0.25): the mean of all pixels determines x_0."""

        def forward(self, x_t, t, class_labels=None, return_dict=False):
            a, n = self.data.alpha_bar[int(t)], x_t[0].numel()
            mean = x_t.mean((1, 2, 3), keepdim=True)
            x_0 = (math.sqrt(a) * 0.25 / (a * 0.25 + (1 - a) / n) * mean).expand_as(x_t)
            return ((x_t - math.sqrt(a) * x_0) / math.sqrt(1 - a),)

    scheduler = DDPMScheduler(timestep_spacing="trailing", clip_sample=False)
    pipe = quiet(DDPMPipeline(OneGreyLevel(scheduler), scheduler))
    levels = torch.linspace(-0.8, 0.8, 16, dtype=torch.float64)
    image = levels.view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    errors = {}
    for resamples in (1, 5):
        x_0 = pipe.inpaint(image, mask, 50, seeds=range(16), output_type="latent", resamples=resamples).images
        errors[resamples] = (x_0[..., 4:].mean((1, 2, 3)) - levels).abs().mean().item()
    assert errors[5] < 0.05 and errors[5] < errors[1] / 2, errors


def test_known_pixels_have_the_noise_level_of_their_timestep():
    """Before every step, also after a jump, they follow Eq. 4 of DDPM: the network gets the noise it was trained on."""
    pipe, inputs = gaussian_pipe(size=64), []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda output, t, x_t, **options: inputs.append((t, x_t)) or step(output, t, x_t, **options)
    known, mask = torch.full((1, 64, 64), 0.5, dtype=torch.float64), torch.zeros(64, 64)
    mask[:, 32:] = 1
    pipe.inpaint(known, mask, 10, seeds=[0], jump_length=3, resamples=2)
    assert len(inputs) > 10
    for t, x_t in inputs[1:]:
        a = alpha_bar_table(pipe.scheduler)[t].item()
        noise = (x_t[..., :32] - math.sqrt(a) * 0.5) / math.sqrt(1 - a)
        assert abs(noise.std().item() - 1) < 5 / math.sqrt(2 * 2048) and abs(noise.mean().item()) < 5 / 45, t
