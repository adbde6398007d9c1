"""What lies between: against closed forms of Gaussian data, where the way home is known, and promises."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image

from ddpm_pipeline import DDPMPipeline, DDPMScheduler, fusion
from ddpm_pipeline.images import to_mask, to_tensor

MEAN, STD = 0.2, 0.3  # of every pixel of the Gaussian pictures


class GaussianNetwork(UNet2DModel):
    """Says the exact prediction for pixels that are N(MEAN, STD^2), each on its own."""

    def __init__(self, scheduler, prediction_type="epsilon", size=8, channels=1, dtype=torch.float64, classes=None):
        super().__init__(
            sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=1, norm_num_groups=2,
            add_attention=False,
            block_out_channels=(4,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
            num_class_embeds=classes,
        )  # fmt: skip
        self.to(dtype)
        self.alpha_bar, self.says, self.calls = scheduler.alphas_cumprod, prediction_type, 0

    def forward(self, x_t, t, class_labels=None, return_dict=False):
        self.calls += 1
        a = self.alpha_bar[int(t)].item()
        mean = MEAN if class_labels is None else (MEAN + 0.1 * class_labels.to(x_t)).view(-1, 1, 1, 1)
        eps = math.sqrt(1 - a) * (x_t - math.sqrt(a) * mean) / (a * STD**2 + 1 - a)
        x_0 = (x_t - math.sqrt(1 - a) * eps) / math.sqrt(a)
        said = {"epsilon": eps, "sample": x_0, "v_prediction": math.sqrt(a) * eps - math.sqrt(1 - a) * x_0}
        return (said[self.says],)


def gaussian_pipe(prediction_type="epsilon", spacing="trailing", steps=1000, **options):
    scheduler = DDPMScheduler(
        num_train_timesteps=steps, prediction_type=prediction_type, timestep_spacing=spacing, clip_sample=False
    )
    return quiet(DDPMPipeline(GaussianNetwork(scheduler, prediction_type, **options), scheduler))


def small_pipe(channels=1, **options):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, layers_per_block=1, norm_num_groups=2,
            add_attention=False,
        block_out_channels=(4, 4), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **options,
    )  # fmt: skip
    return quiet(DDPMPipeline(unet.eval(), DDPMScheduler(num_train_timesteps=20, timestep_spacing="trailing")))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(number=2, channels=1, seed=0, dtype=torch.float64, size=8):
    noise = torch.randn(number, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return (MEAN + STD * noise).clamp(-1, 1)


def home(pipe, latents, steps):
    return pipe(latents=latents, eta=0.0, num_inference_steps=steps, output_type="latent").images


# ---- Inversion -------------------------------------------------------------------------------------------------------


WALKS = [("trailing", 50, 1000), ("leading", 7, 100), ("linspace", 20, 30)]


@pytest.mark.filterwarnings("ignore:timestep_spacing")  # a walk of 100 of these steps does not end in pure noise
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("spacing", "steps", "of"), WALKS)
def test_out_and_home_is_the_identity(prediction_type, spacing, steps, of):
    pipe, x_0 = gaussian_pipe(prediction_type, spacing, of), pictures()
    latents = pipe.invert(x_0, steps, refinements=200, tolerance=1e-12)
    assert (home(pipe, latents, steps) - x_0).abs().max() < 1e-9
    assert pipe.inversion_error.shape == (2,) and pipe.inversion_error.max() < 1e-15


def test_the_place_in_the_noise_is_that_of_the_closed_form():
    """On the way of the ODE (x_t - sqrt(a) m) / sqrt(a s^2 + 1 - a) stays what it is: steps make it so at order 1."""
    x_0, errors = pictures(), []
    for steps in (125, 250, 500, 1000):
        pipe = gaussian_pipe()
        a = pipe.scheduler.alphas_cumprod[-1].item()
        exact = math.sqrt(a) * MEAN + math.sqrt(a * STD**2 + 1 - a) * (x_0 - MEAN) / STD
        errors.append((pipe.invert(x_0, steps, refinements=100, tolerance=1e-12) - exact).abs().max().item())
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert errors[-1] < 0.05 and all(0.7 < order < 1.5 for order in orders), (errors, orders)


def test_without_refinement_the_error_falls_faster_than_the_steps_grow():
    """The guess takes the step before, so one call a step leaves an error of a higher order than the step's own."""
    x_0, errors = pictures(), []
    for steps in (50, 100, 200, 400):
        pipe = gaussian_pipe()
        back = home(pipe, pipe.invert(x_0, steps, measure_error=False), steps)
        errors.append((back - x_0).abs().max().item())
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert errors[-1] < 1e-3 and min(orders) > 1.0, (errors, orders)


def test_refinements_are_network_calls_and_make_the_error_smaller():
    x_0, found = pictures(), {}
    for refinements in (0, 1, 3):
        pipe = gaussian_pipe()
        pipe.invert(x_0, 20, refinements=refinements, tolerance=1e-15)
        found[refinements] = pipe.inversion_error.max().item()
        assert pipe.unet.calls == 20 * (1 + refinements) + 20
    assert found[0] > 10 * found[1] > 100 * found[3]


def test_inversion_knows_classes():
    pipe, x_0 = gaussian_pipe(classes=3), pictures(3)
    latents = pipe.invert(x_0, 20, class_labels=[0, 1, 2], refinements=50, tolerance=1e-12)
    back = pipe(latents=latents, eta=0.0, num_inference_steps=20, class_labels=[0, 1, 2], output_type="latent").images
    assert (back - x_0).abs().max() < 1e-9
    other = pipe.invert(x_0, 20, class_labels=[0, 0, 0], refinements=50, tolerance=1e-12)
    same = (other - latents).abs().flatten(1).amax(1)
    assert same[0] == 0 and same[1:].min() > 0.01


def test_an_image_does_not_depend_on_the_others():
    """A batch of 8 is 8 singles: inverted (they are done after different numbers of refinements), varied, painted."""
    pipe = small_pipe()
    x_0 = pictures(8, dtype=torch.float32)
    seeds, mask = list(range(8)), torch.zeros(8, 8)
    mask[2:5, 3:] = 1
    five = {"num_inference_steps": 5, "output_type": "latent"}
    together = {
        "invert": pipe.invert(x_0, 5, refinements=4, tolerance=1e-2),
        "vary": pipe.vary(x_0, 0.6, 5, seeds=seeds, output_type="latent").images,
        "inpaint": pipe.inpaint(x_0, mask, 5, seeds=seeds, output_type="latent", jump_length=2, resamples=2).images,
        "fuse": pipe.fuse(x_0, x_0.flip(0), path="noise", seeds=seeds, **five).images,
        "balance": pipe.fuse(x_0, x_0.flip(0), 0.3, balance=True, **five).images,
        "walk": list(pipe.trajectory(image=x_0, seeds=seeds, num_inference_steps=5))[-1].x_0_pred,
    }
    for i in range(8):
        one, other, seed = x_0[i : i + 1], x_0.flip(0)[i : i + 1], [i]
        alone = {
            "invert": pipe.invert(one, 5, refinements=4, tolerance=1e-2),
            "vary": pipe.vary(one, 0.6, 5, seeds=seed, output_type="latent").images,
            "inpaint": pipe.inpaint(one, mask, 5, seeds=seed, output_type="latent", jump_length=2, resamples=2).images,
            "fuse": pipe.fuse(one, other, path="noise", seeds=seed, **five).images,
            "balance": pipe.fuse(one, other, 0.3, balance=True, **five).images,
            "walk": list(pipe.trajectory(image=one, seeds=seed, num_inference_steps=5))[-1].x_0_pred,
        }
        for name, image in alone.items():
            assert (image[0] - together[name][i]).abs().max() <= 1e-5, (name, i)


# ---- Fusion ----------------------------------------------------------------------------------------------------------


def slerp(a, b, w):
    """Shoemake 1985, with the lengths mixed."""
    angle = math.acos(torch.dot(a, b) / a.norm() / b.norm())
    direction = (math.sin((1 - w) * angle) * a / a.norm() + math.sin(w * angle) * b / b.norm()) / math.sin(angle)
    return direction * ((1 - w) * a.norm() + w * b.norm())


def test_the_mean_of_two_is_on_their_great_circle():
    places = torch.randn(1, 2, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    places[0, 1] *= 1.5
    for w in (0.0, 0.1, 0.5, 0.9, 1.0):
        mean = fusion.spherical_mean(places, torch.tensor([[1 - w, w]], dtype=torch.float64))
        wanted = slerp(places[0, 0].flatten(), places[0, 1].flatten(), w).view(1, 1, 8, 8)
        torch.testing.assert_close(mean, wanted, rtol=0, atol=1e-10)
        if w in (0, 1):
            assert torch.equal(mean[0], places[0, int(w)])


def test_the_mean_of_many_is_where_the_weighted_angles_balance():
    """Of three axes with one weight it is the diagonal; moved a little, the sum of squared angles only grows."""
    axes = torch.eye(3, dtype=torch.float64).view(1, 3, 3, 1, 1)
    mean = fusion.spherical_mean(axes, torch.full((1, 3), 1 / 3, dtype=torch.float64)).flatten()
    torch.testing.assert_close(mean, torch.full((3,), 3**-0.5, dtype=torch.float64))
    generator = torch.Generator().manual_seed(2)
    places = torch.randn(1, 4, 12, 1, 1, generator=generator, dtype=torch.float64)
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    mean = fusion.spherical_mean(places, weights).flatten()
    assert mean.norm() == pytest.approx((weights[0] * places.flatten(2).norm(dim=2)[0]).sum().item())

    def spread(point):
        cosines = torch.nn.functional.cosine_similarity(places.flatten(2)[0], point[None])
        return (weights[0] * cosines.acos().square()).sum().item()

    least = spread(mean)
    for _ in range(50):
        assert spread(mean + 1e-3 * torch.randn(12, generator=generator, dtype=torch.float64)) >= least - 1e-9


@pytest.mark.parametrize("balance", [False, True])
def test_ends_are_the_pictures(balance):
    pipe, x_0 = gaussian_pipe(), pictures(4)
    made = pipe.fuse(
        x_0[:2], x_0[2:], [0, 0.5, 1], balance=balance, num_inference_steps=20, output_type="latent", refinements=50
    )
    images = made.images.unflatten(0, (2, 3))
    assert (images[:, 0] - x_0[:2]).abs().max() < 1e-4 and (images[:, 2] - x_0[2:]).abs().max() < 1e-4
    assert made.weights[0] == 0 and made.weights[2] == 1 and len(made.shares) == 6
    assert made.shares[0] < 1e-6 and made.shares[2] > 1 - 1e-6


def test_fusion_of_gaussian_pictures_is_the_closed_form():
    """Their way home is linear: what is fused is the point of the great circle, standardised and put back."""
    pipe, x_0 = gaussian_pipe(), pictures(2)
    image = pipe.fuse(x_0[0], x_0[1], 0.3, num_inference_steps=1000, output_type="latent", refinements=20).images[0]
    a = pipe.scheduler.alphas_cumprod[-1].item()
    scale, shift = math.sqrt(a * STD**2 + 1 - a) / STD, math.sqrt(a) * MEAN
    places = [(shift + scale * (x - MEAN)).flatten() for x in x_0]
    wanted = (slerp(*places, 0.3) - shift) / scale + MEAN
    assert (image.flatten() - wanted.clamp(-1, 1)).abs().max() < 0.01


def test_noise_is_shared_and_keeps_its_variance():
    """At weight 0.5 what walks home has the noise of one picture, not 0.71 of it as two noises mixed would have."""
    pipe, t = gaussian_pipe(size=64), 600
    seen = []
    pipe._walked = lambda x_t, labels, options: seen.append(x_t) or x_t
    a, b = torch.full((1, 64, 64), 0.5), torch.full((1, 64, 64), -0.1)
    pipe.fuse(a, b, [0, 0.5, 1], path="noise", timestep=t, seeds=3)
    alpha_bar = pipe.scheduler.alphas_cumprod[t].item()
    for x_t, mean in zip(seen[0], (0.5, 0.2, -0.1)):
        noise = (x_t - math.sqrt(alpha_bar) * mean) / math.sqrt(1 - alpha_bar)
        assert abs(noise.std().item() - 1) < 4 / math.sqrt(2 * 64 * 64) and abs(noise.mean().item()) < 4 / 64
        torch.testing.assert_close(noise, (seen[0][0] - math.sqrt(alpha_bar) * 0.5) / math.sqrt(1 - alpha_bar))
    assert pipe.scheduler.timesteps[0] == t  # and not one step late


def test_balance_finds_the_share_that_is_wanted():
    pipe, x_0 = gaussian_pipe(), pictures(6)
    wanted = [0.1, 0.25, 0.5, 0.8]
    made = pipe.fuse(x_0[:3], x_0[3:], wanted, balance=True, num_inference_steps=20, output_type="latent")
    np.testing.assert_allclose(made.shares, wanted * 3, atol=0.005)
    pairs = torch.arange(3).repeat_interleave(4)
    to_a, to_b = ((made.images - ends[pairs]).square().flatten(1).mean(1) for ends in (x_0[:3], x_0[3:]))
    np.testing.assert_allclose((to_a / (to_a + to_b)).numpy(), made.shares, atol=1e-12)
    assert made.network_calls == pipe.unet.calls <= 20 * 4 + 20 * fusion.MAX_ROUNDS


def test_balance_takes_a_distance_of_ones_own():
    pipe, x_0 = gaussian_pipe(), pictures(2)
    root = lambda x, y: fusion.squared_pixel_distance(x, y).sqrt()  # noqa: E731
    made = pipe.fuse(x_0[0], x_0[1], 0.2, balance=True, distance=root, num_inference_steps=20, output_type="latent")
    to_a, to_b = ((made.images[0] - x).square().mean().sqrt().item() for x in x_0)
    assert to_a / (to_a + to_b) == pytest.approx(0.2, abs=0.005)


def test_bisection_on_ways_that_are_steep_and_that_are_not_there():
    """A share that jumps over what is wanted gives the nearer side; all are bisected at once, none too long."""
    ways = [lambda w: w, lambda w: w**8, lambda w: 0.9 * (w > 0.3) + 0.05, lambda w: 1 - (1 - w) ** 20]
    ways += [ways[2], lambda w: w + 0.1]  # the jump once more, and a way whose beginning is not quite the first picture
    asked = []

    def draw(which, places):
        asked.append(len(which))
        return torch.stack([ways[i](w) for i, w in zip(which.tolist(), places)]).view(-1, 1, 1, 1).double()

    wanted = torch.tensor([0.5, 0.5, 0.4, 0.25, 0.6, 0.0], dtype=torch.float64)
    places, found = fusion.balanced(draw, lambda which, x: x.flatten(), wanted, tolerance=0.005)
    for i, way, exact in ((0, ways[0], 0.5), (1, ways[1], 0.5 ** (1 / 8)), (3, ways[3], 1 - 0.75 ** (1 / 20))):
        assert abs(found[i].item() - wanted[i].item()) <= 0.005 and abs(places[i].item() - exact) < 0.01, i
        assert found[i].item() == pytest.approx(float(way(places[i])))
    assert found[2].item() == pytest.approx(0.05) and found[4].item() == pytest.approx(0.95)  # and not the last seen
    assert places[5] == 0 and asked[0] == 6 and asked[1] == 4 and asked[-1] == 2 and len(asked) == fusion.MAX_ROUNDS


def test_three_pictures():
    pipe, x_0 = gaussian_pipe(), pictures(3)
    options = {"num_inference_steps": 20, "output_type": "latent", "refinements": 50}
    made = pipe.fuse(list(x_0), weight=[[1, 0, 0], [0.2, 0.3, 0.5]], **options)
    assert (made.images[0] - x_0[0]).abs().max() < 1e-4 and made.shares is None
    distances = [(made.images[1] - x).square().mean().item() for x in x_0]
    assert distances[2] < distances[1] < distances[0]
    two = pipe.fuse(x_0[0], x_0[1], 0.3, **options).images
    same = pipe.fuse(list(x_0), weight=[0.7, 0.3, 0], **options).images
    torch.testing.assert_close(two, same, rtol=0, atol=1e-6)


# ---- Repair and variation --------------------------------------------------------------------------------------------


def levels_by_the_paper(steps, jump_length, resamples):
    """The listing in the appendix of Lugmayr et al. 2022, in our words: t counts what is left of the walk."""
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


JUMPS = [(250, 10, 10), (50, 5, 5), (7, 3, 2), (5, 5, 4), (4, 1, 1)]


@pytest.mark.parametrize(("steps", "jump_length", "resamples"), JUMPS)
def test_the_jumps_of_repaint(steps, jump_length, resamples):
    levels = fusion.repaint_levels(steps, jump_length, resamples)
    assert levels == levels_by_the_paper(steps, jump_length, resamples)
    assert levels[0] == steps and levels[-1] == 0
    assert all(abs(a - b) == 1 for a, b in itertools.pairwise(levels))
    down = sum(b < a for a, b in itertools.pairwise(levels))
    assert down == steps + (resamples - 1) * len(range(0, steps - jump_length, jump_length)) * jump_length


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_known_pixels_come_back_bit_by_bit(channels):
    pipe = small_pipe(channels)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, channels), dtype=np.uint8)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, 4:] = 255
    made = pipe.inpaint(image, Image.fromarray(mask), 5, seeds=[0], jump_length=2, resamples=2).images[0]
    assert made.mode == image.mode
    painted = np.asarray(made).reshape(8, 8, channels)
    assert np.array_equal(painted[:, :4], pixels[:, :4]) and not np.array_equal(painted[:, 4:], pixels[:, 4:])
    floats = pictures(2, channels, dtype=torch.float32)
    made = pipe.inpaint(floats, mask > 0, 5, seeds=[0, 1], output_type="latent", jump_length=2).images
    assert torch.equal(made[..., :4], floats[..., :4])


def test_what_is_painted_fits_what_is_shown():
    """Pictures of one grey each: the shown half says which. With its jumps RePaint comes nearer to it than without."""

    class OneGrey(GaussianNetwork):
        """Exact for pictures whose pixels are all the same, N(0, 0.25): the mean of all pixels says which."""

        def forward(self, x_t, t, class_labels=None, return_dict=False):
            a, n = self.alpha_bar[int(t)].item(), x_t[0].numel()
            mean = x_t.mean((1, 2, 3), keepdim=True)
            x_0 = (math.sqrt(a) * 0.25 / (a * 0.25 + (1 - a) / n) * mean).expand_as(x_t)
            return ((x_t - math.sqrt(a) * x_0) / math.sqrt(1 - a),)

    scheduler = DDPMScheduler(timestep_spacing="trailing", clip_sample=False)
    pipe = quiet(DDPMPipeline(OneGrey(scheduler), scheduler))
    greys = torch.linspace(-0.8, 0.8, 16, dtype=torch.float64)
    image = greys.view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    errors = {}
    for resamples in (1, 5):
        made = pipe.inpaint(image, mask, 50, seeds=range(16), output_type="latent", resamples=resamples).images
        errors[resamples] = (made[..., 4:].mean((1, 2, 3)) - greys).abs().mean().item()
    assert errors[5] < 0.05 and errors[5] < errors[1] / 2, errors


def test_known_pixels_have_the_noise_of_their_step():
    """On the way home, and after each jump out, they follow Eq. 4 of DDPM: the network sees noise as in training."""
    pipe, seen = gaussian_pipe(size=64), []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda output, t, x_t, **options: seen.append((t, x_t)) or step(output, t, x_t, **options)
    known, mask = torch.full((1, 64, 64), 0.5, dtype=torch.float64), torch.zeros(64, 64)
    mask[:, 32:] = 1
    pipe.inpaint(known, mask, 10, seeds=[0], jump_length=3, resamples=2)
    assert len(seen) > 10
    for t, x_t in seen[1:]:
        a = pipe.scheduler.alphas_cumprod[t].item()
        noise = (x_t[..., :32] - math.sqrt(a) * 0.5) / math.sqrt(1 - a)
        assert abs(noise.std().item() - 1) < 5 / math.sqrt(2 * 2048) and abs(noise.mean().item()) < 5 / 45, t


def test_variation_goes_from_the_picture_to_any():
    pipe, x_0 = small_pipe(), pictures(3, dtype=torch.float32)
    seeds = [4, 5, 6]
    same = pipe.vary(x_0, 0, 10, seeds=seeds, output_type="latent").images
    fresh = pipe.vary(x_0, 1, 10, seeds=seeds, output_type="latent").images
    assert torch.equal(same, x_0)
    assert torch.equal(fresh, pipe(seeds=seeds, num_inference_steps=10, output_type="latent").images)
    gaussian = gaussian_pipe()
    x_0 = pictures(64, dtype=torch.float64)
    distances = [
        (gaussian.vary(x_0, s, 50, seeds=range(64), eta=0.0, output_type="latent").images - x_0).square().mean().item()
        for s in (0.1, 0.3, 0.6, 1.0)
    ]
    assert distances == sorted(distances) and distances[-1] == pytest.approx(2 * STD**2, rel=0.1)


def test_a_walk_out_has_the_law_of_eq_4_and_goes_home_from_there():
    pipe = gaussian_pipe(size=32)
    x_0 = torch.full((2, 1, 32, 32), 0.7, dtype=torch.float64)
    steps = list(pipe.trajectory(image=x_0, seeds=[1, 2], num_inference_steps=200, eta=0.0))
    out, back = steps[:200], steps[200:]
    assert [step.t for step in out] == [step.t for step in back][::-1]
    for step in out:
        a = pipe.scheduler.alphas_cumprod[step.t].item()
        noise = (step.x_t - math.sqrt(a) * x_0) / math.sqrt(1 - a)
        assert abs(noise.std().item() - 1) < 4 / math.sqrt(2 * 2048) and abs(noise.mean().item()) < 4 / math.sqrt(2048)
        assert torch.equal(step.x_0_pred, x_0)
    assert torch.equal(back[0].x_t, out[-1].x_t)
    assert back[-1].x_0_pred.std() == pytest.approx(STD, rel=0.1)


# ---- Pictures in, and mistakes ---------------------------------------------------------------------------------------


def test_pictures_of_every_kind_are_the_same():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    floats = pixels / np.float32(127.5) - 1
    wanted = torch.from_numpy(floats).permute(0, 3, 1, 2)
    for given in (
        [Image.fromarray(image) for image in pixels],
        pixels,
        floats,
        list(pixels),
        torch.from_numpy(pixels).permute(0, 3, 1, 2),
        wanted,
        list(wanted),
    ):
        found = to_tensor(given, "images", 3)
        assert torch.allclose(found, wanted, atol=1e-6) and found.dtype == torch.float32
    grey = pixels[0, ..., 0]
    for given in (Image.fromarray(grey), grey, grey[..., None], torch.from_numpy(grey)[None]):
        assert torch.equal(to_tensor(given, "images", 1)[0, 0], torch.from_numpy(grey / np.float32(127.5) - 1))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))  # red that nobody sees
    assert torch.equal(to_tensor(clear, "images", 3), torch.ones(1, 3, 8, 8))
    assert to_tensor(torch.zeros(1, 1, 8, 8, dtype=torch.float16), "images", 1).dtype == torch.float32


def test_masks_of_every_kind_are_the_same():
    white = np.zeros((8, 8), dtype=bool)
    white[1:3, 5:] = True
    wanted = torch.from_numpy(white).expand(2, 3, 8, 8)
    for given in (
        Image.fromarray(np.uint8(white) * 255),
        Image.fromarray(white),
        white,
        white.astype(np.float32),
        np.uint8(white) * 255,
        torch.from_numpy(white),
        torch.from_numpy(white)[None],
        torch.from_numpy(white)[None, None],
        torch.from_numpy(white).expand(2, 8, 8),
        np.broadcast_to(white[None, ..., None], (2, 8, 8, 3)),
    ):
        assert torch.equal(to_mask(given, (2, 3, 8, 8)), wanted)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, x: p.invert(x * 255), "give floats in [-1, 1]"),
        (lambda p, x: p.invert(x.int()), "images is torch.int32"),
        (lambda p, x: p.invert([]), "images is an empty list"),
        (lambda p, x: p.invert("moon.png"), "images is a str"),
        (lambda p, x: p.invert(x[:, :, :4]), "images is 4 x 8 pixels: this network draws 8 x 8"),
        (lambda p, x: p.invert(x.expand(-1, 3, -1, -1)), "images has shape (2, 3, 8, 8)"),
        (lambda p, x: p.invert(x * math.nan), "give floats in [-1, 1]"),
        (lambda p, x: p.invert(x, 21), "num_inference_steps"),
        (lambda p, x: p.invert(x, 0), "num_inference_steps"),
        (lambda p, x: p.invert(x, timesteps=[3, 9]), "descending"),
        (lambda p, x: p.invert(x, 5, timesteps=[9, 3]), "both given"),
        (lambda p, x: p.invert(x, refinements=-1), "refinements"),
        (lambda p, x: p.invert(x, tolerance=0), "tolerance is 0"),
        (lambda p, x: p.invert(x, class_labels=1), "no classes"),
        (lambda p, x: p.fuse(x[0], x[1], 1.5), "weight is 1.5: give numbers from 0 to 1"),
        (lambda p, x: p.fuse(x[0], x[1], [0.5, -1]), "weight is [0.5, -1]"),
        (lambda p, x: p.fuse(x[0], x[1], "half"), "weight is 'half'"),
        (lambda p, x: p.fuse(x[0], x[1], path="pixel"), "path is 'pixel': give one of 'latent', 'noise'"),
        (lambda p, x: p.fuse(x, x[1]), "image_a is 2 pictures and image_b 1"),
        (lambda p, x: p.fuse(x[0], x[1], seeds=[1]), 'seeds is given, but path="latent" has no noise'),
        (lambda p, x: p.fuse(x[0], x[1], timestep=5), "timestep is given"),
        (lambda p, x: p.fuse(x[0], x[1], path="noise", timestep=20), "timestep"),
        (lambda p, x: p.fuse(x[0], x[1], path="noise", eta=2), "eta is 2"),
        (lambda p, x: p.fuse(x[0], x[1], path="noise", seeds=[1, 2]), "seeds has 2 entries, but there are 1 pictures"),
        (lambda p, x: p.fuse(list(x), weight=[0.5, 0.6]), "2 numbers of at least 0 with sum 1"),
        (lambda p, x: p.fuse(list(x), weight=[0.5, 0.5], balance=True), "balance is for two pictures"),
        (lambda p, x: p.fuse(x[0], x[1], output_type="tensor"), "output_type is 'tensor'"),
        (lambda p, x: p.vary(x, 1.5), "strength is 1.5"),
        (lambda p, x: p.vary(x, 0.5, seeds=[1]), "seeds has 1 entries, but there are 2 pictures"),
        (lambda p, x: p.vary(x, 0.5, seeds=[1, -2]), "seeds"),
        (lambda p, x: p.vary(x, 0.5, seeds=[1, 2], generator=torch.Generator()), "both given"),
        (lambda p, x: p.inpaint(x, torch.zeros(8, 8)), "mask is black"),
        (lambda p, x: p.inpaint(x, torch.ones(7, 8)), "mask has shape (7, 8)"),
        (lambda p, x: p.inpaint(x, "mask.png"), "mask is a str"),
        (lambda p, x: p.inpaint(x, torch.ones(8, 8), jump_length=0), "jump_length"),
        (lambda p, x: p.inpaint(x, torch.ones(8, 8), resamples=0), "resamples"),
        (lambda p, x: p.walk(image=x, latents=x), "both given"),
        (lambda p, x: p.walk(3, image=x), "image has 2 entries, but the batch has 3"),
    ],
)
def test_mistakes_are_named(call, words):
    pipe = small_pipe()
    with pytest.raises(ValueError, match=re.escape(words)):
        call(pipe, pictures(2, dtype=torch.float32))


def test_other_schedulers_are_refused_with_the_way_out():
    pipe = small_pipe()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    for call in (pipe.invert, pipe.vary, lambda x: pipe.fuse(x, x), lambda x: pipe.inpaint(x, x > 0)):
        with pytest.raises(ValueError, match=r"DDPMScheduler\.from_config"):
            call(pictures(1, dtype=torch.float32))


def test_output_types_and_tuples():
    pipe, x_0 = small_pipe(), pictures(2, dtype=torch.float32)
    for output_type, kind in (("pil", list), ("np", np.ndarray), ("pt", torch.Tensor), ("latent", torch.Tensor)):
        for made in (
            pipe.fuse(x_0[0], x_0[1], [0.2, 0.8], num_inference_steps=3, output_type=output_type, return_dict=False),
            pipe.vary(x_0, 0.5, 3, output_type=output_type, return_dict=False),
            pipe.inpaint(x_0, torch.ones(8, 8), 3, output_type=output_type, return_dict=False),
        ):
            assert isinstance(made, tuple) and isinstance(made[0], kind) and len(made[0]) == 2


def test_floats_that_look_like_zero_to_one_are_warned_of():
    bright = np.linspace(0, 1, 64).reshape(8, 8)
    with pytest.warns(UserWarning, match=r"image goes from 0 to 1 and is taken for \[-1, 1\].*give 2 \* x - 1"):
        to_tensor(bright, "image", 1)
    for quiet_one in (2 * bright - 1, np.ones((8, 8)), (255 * bright).astype(np.uint8)):
        to_tensor(quiet_one, "image", 1)  # a warning of ours would be an error here
