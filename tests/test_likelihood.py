"""The bound and the flow against closed forms: Gaussian data, mixtures, the decoder's bins, KL from torch."""

import math

import pytest
import torch

from ddpm_pipeline import DDPMScheduler, likelihood, rng
from ddpm_pipeline.likelihood import (
    bits_per_dim,
    bound,
    decoder_nats,
    dequantised,
    discrete_nats,
    gaussian_kl,
    probability_flow_nats,
    rate_distortion,
)

ENTROPY = 0.5 * math.log(2 * math.pi * math.e)  # of N(0, 1), 1.418938... nats


def scheduler(**options):
    return DDPMScheduler(**({"clip_sample": False, "variance_type": "fixed_large"} | options))


def standard_normal(walk):
    """The exact network of N(0, I) data, of which x_t is N(0, I) too: E[eps | x_t] = sqrt(1 - alpha_bar) x_t."""

    def network(x_t, t):
        noise_std = (1 - walk.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
        return noise_std.to(x_t) * x_t

    return network


@pytest.fixture
def exact_means(monkeypatch):
    """All terms are quadratic in (x_0, eps): over these four pixels they have the mean that they have over N(0, I)."""
    eps = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).view(1, 1, 2, 2)
    monkeypatch.setattr(likelihood, "_noise", lambda *_: eps)
    return torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).view(1, 1, 2, 2)


# ---- The bound -------------------------------------------------------------------------------------------------------


def test_exact_network_and_variance_beta_give_the_entropy_of_gaussian_data(exact_means):
    walk = scheduler()
    found = bound(standard_normal(walk), walk, exact_means, levels=None, last_variance="own")
    assert found.total.item() / 4 == pytest.approx(ENTROPY, abs=1e-9)
    assert found.step.shape == (1, 999) and (found.share == 1).all()
    assert found.step.min() > 0


@pytest.mark.parametrize("number", [1, 2, 10, 333])
def test_on_fewer_steps_too(exact_means, number):
    walk = scheduler(timestep_spacing="trailing")
    walk.set_timesteps(number)
    steps = walk.timesteps.tolist()
    found = bound(standard_normal(walk), walk, exact_means, timesteps=steps, levels=None, last_variance="own")
    assert found.total.item() / 4 == pytest.approx(ENTROPY, abs=1e-9)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_whatever_the_network_predicts(exact_means, prediction_type):
    walk = scheduler(prediction_type=prediction_type)

    def network(x_t, t):
        eps = standard_normal(walk)(x_t, t)
        return walk.convert_prediction(eps, t, x_t, "epsilon", prediction_type)

    found = bound(network, walk, exact_means, levels=None, last_variance="own")
    assert found.total.item() / 4 == pytest.approx(ENTROPY, abs=1e-9)


def test_variance_beta_tilde_gives_more(exact_means):
    small = scheduler(variance_type="fixed_small")
    found = bound(standard_normal(small), small, exact_means, levels=None)
    assert found.total.item() / 4 > ENTROPY + 0.01


def test_a_wrong_network_gives_more(exact_means):
    walk = scheduler()
    right = standard_normal(walk)
    found = bound(lambda x, t: 1.1 * right(x, t), walk, exact_means, levels=None, last_variance="own")
    assert found.total.item() / 4 > ENTROPY + 0.01


def test_learned_variances_between_the_fixed_ones(exact_means):
    """The output says the log-variance, or where between the two it is: as said, the terms are those of the fixed."""
    terms = {}
    for name in ("fixed_small", "fixed_large"):
        walk = scheduler(variance_type=name)
        terms[name] = bound(standard_normal(walk), walk, exact_means, levels=None, last_variance="own")
    ranged = scheduler(variance_type="learned_range")
    for said, name in ((-1, "fixed_small"), (1, "fixed_large")):

        def network(x_t, t, said=said):
            return torch.cat([standard_normal(ranged)(x_t, t), torch.full_like(x_t, said)], dim=1)

        found = bound(network, ranged, exact_means, levels=None)
        torch.testing.assert_close(found.step, terms[name].step)
        torch.testing.assert_close(found.decoder, terms[name].decoder)

    learned = scheduler(variance_type="learned")

    def says_beta(x_t, t):
        log_beta = learned.betas[t].log().view(-1, 1, 1, 1).expand_as(x_t)
        return torch.cat([standard_normal(learned)(x_t, t), log_beta], dim=1)

    found = bound(says_beta, learned, exact_means, levels=None)
    torch.testing.assert_close(found.total, terms["fixed_large"].total)


def test_the_last_variance_of_ho_is_that_of_the_step_before(exact_means):
    """beta_tilde_2 in the paper's count, which gives a better bound of values that are whole."""
    walk = scheduler()
    found = bound(standard_normal(walk), walk, exact_means, levels=None)
    beta, alpha_bar = walk.betas, walk.alphas_cumprod
    variance = beta[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1])  # Eq. (7), DDPM
    x_1 = walk.add_noise(exact_means, torch.tensor([1.0, -1, 1, -1]).double().view(1, 1, 2, 2), torch.tensor([0]))
    density = torch.distributions.Normal(alpha_bar[0].sqrt() * x_1, variance.sqrt())  # E[x_0 | x_1] of N(0, I) data
    assert found.decoder.item() == pytest.approx(-density.log_prob(exact_means).sum().item(), rel=1e-9)


def test_where_beta_tilde_is_0_the_last_variance_is_that_of_the_step_before(exact_means):
    """Whatever was asked for; a learned range begins there."""
    small, ranged = scheduler(variance_type="fixed_small"), scheduler(variance_type="learned_range")
    wanted = bound(standard_normal(small), small, exact_means, levels=None).decoder
    own = bound(standard_normal(small), small, exact_means, levels=None, last_variance="own").decoder

    def lowest(x_t, t):
        return torch.cat([standard_normal(ranged)(x_t, t), torch.full_like(x_t, -1)], dim=1)

    torch.testing.assert_close(own, wanted)
    torch.testing.assert_close(bound(lowest, ranged, exact_means, levels=None).decoder, wanted)


def test_some_steps_of_each_picture_estimate_the_sum_without_bias():
    walk = scheduler(num_train_timesteps=60, beta_end=0.3)
    x_0 = torch.randn(4000, 1, 1, 2, generator=torch.Generator().manual_seed(0)).double()
    network = standard_normal(walk)
    options = {"levels": None, "last_variance": "own"}
    exact = bound(network, walk, x_0, **options)
    few = bound(network, walk, x_0, strata=5, **options)
    assert few.step.shape == (4000, 5) and few.share.sum() == 59
    assert (few.t.diff(dim=1) > 0).all()
    assert (few.t.amin(0) < few.t.amax(0)).any()
    torch.testing.assert_close(few.decoder, exact.decoder)
    difference = few.total - exact.total  # each with the same noise at the same step
    error = difference.std() / math.sqrt(4000)
    assert difference.std() > 0 and abs(difference.mean()) < 4 * error


def test_strata_cover_every_step_once():
    for number in (1, 2, 19, 20, 21, 999):
        for strata in (1, 2, 7, 19):
            edges = likelihood._strata(number, strata)
            assert edges[0] == 0 and edges[-1] == number
            assert all(low < high for low, high in zip(edges, edges[1:]))
            assert len(edges) == min(number, strata) + 1


def test_a_picture_depends_on_its_number_alone():
    walk = scheduler()
    x_0 = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(1)).double()
    options = {"strata": 3, "levels": None, "seed": 5}
    all_four = bound(standard_normal(walk), walk, x_0, **options)
    last_two = bound(standard_normal(walk), walk, x_0[2:], index=torch.tensor([2, 3]), **options)
    torch.testing.assert_close(last_two.total, all_four.total[2:])
    assert torch.equal(last_two.t, all_four.t[2:])
    other = bound(standard_normal(walk), walk, x_0, **(options | {"seed": 6}))
    assert not torch.equal(other.total, all_four.total)


def test_noise_differs_from_step_to_step_and_from_picture_to_picture():
    x_0 = torch.zeros(3, 1, 8, 8)
    drawn = torch.cat([likelihood._noise(0, place, torch.arange(3), x_0) for place in (0, 1, 999)]).flatten(1)
    correlation = torch.corrcoef(drawn)
    assert (correlation - torch.eye(9)).abs().max() < 0.5


def test_each_step_of_a_picture_has_noise_of_its_own():
    walk = scheduler(num_train_timesteps=30)
    seen = []

    def network(x_t, t):
        seen.append((x_t / (1 - walk.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)).flatten())
        return x_t

    bound(network, walk, torch.zeros(1, 1, 8, 8).double(), strata=6)
    drawn = torch.stack(seen)
    assert drawn.shape == (7, 64)
    assert (torch.corrcoef(drawn) - torch.eye(7)).abs().max() < 0.6
    assert drawn.std().item() == pytest.approx(1, abs=0.15)


def test_clipping_as_configured_makes_the_bound_of_a_bad_network_better():
    x_0 = torch.full((2, 1, 2, 2), 1.0)
    free, clipped = scheduler(), scheduler(clip_sample=True)
    bounds = [bound(lambda x, t: torch.zeros_like(x), walk, x_0, strata=10).total.mean() for walk in (free, clipped)]
    assert bounds[1] < bounds[0]


def test_rate_and_distortion_of_gaussian_data(exact_means):
    """x_t of N(0, 1) data leaves x_0 the variance 1 - alpha_bar: the error to expect, and the end of what is sent."""
    walk = scheduler()
    found = bound(standard_normal(walk), walk, exact_means, levels=None, last_variance="own")
    curve = rate_distortion(found, (1, 2, 2))
    assert curve.t.tolist() == list(range(1000))[::-1]
    wanted = (1 - walk.alphas_cumprod.flip(0)).sqrt() * 127.5
    torch.testing.assert_close(curve.distortion, wanted)
    assert (curve.rate.diff() >= 0).all()
    prior = found.prior.mean()
    assert curve.rate[0].item() == pytest.approx(bits_per_dim(prior, (1, 2, 2)).item())
    sent = bits_per_dim(prior + found.step.sum(), (1, 2, 2))  # all but the decoder's
    assert curve.rate[-1].item() == pytest.approx(sent.item())


def test_distortion_is_the_root_of_the_mean_over_pictures():
    walk = scheduler(num_train_timesteps=3)
    x_0 = torch.tensor([0.1, 0.7], dtype=torch.float64).view(2, 1, 1, 1)
    found = bound(lambda x, t: x / (1 - walk.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1), walk, x_0)
    # that network takes all of x_t for noise, so it expects 0
    wanted = math.sqrt((0.1**2 + 0.7**2) / 2) * 127.5
    assert rate_distortion(found, (1, 1, 1)).distortion.tolist() == pytest.approx([wanted] * 3, rel=1e-6)


def test_rate_of_few_steps_is_about_that_of_all():
    walk = scheduler()
    x_0 = torch.randn(500, 1, 1, 2, generator=torch.Generator().manual_seed(0)).double()
    curves = [
        rate_distortion(bound(standard_normal(walk), walk, x_0, levels=None, strata=strata), (1, 1, 2))
        for strata in (None, 30)
    ]
    at = torch.tensor([100, 300, 600])
    rates = []
    for curve in curves:
        order = curve.t.argsort()
        place = torch.searchsorted(curve.t[order], at.double())
        rates.append(curve.rate[order][place])
    torch.testing.assert_close(rates[1], rates[0], rtol=0.1, atol=0.02)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strata": 0}, "strata is 0: give an integer from 1 to 999"),
        ({"strata": 1000}, "strata is 1000"),
        ({"levels": 1}, "levels is 1"),
        ({"last_variance": "first"}, "last_variance is 'first'"),
        ({"timesteps": []}, "descending"),
        ({"timesteps": [1, 2]}, "descending"),
        ({"timesteps": [1000, 2]}, r"\[0, 1000\)"),
        ({"timesteps": [5, -1]}, r"\[0, 1000\)"),
    ],
)
def test_bad_values_are_named(options, words):
    walk = scheduler()
    with pytest.raises(ValueError, match=words):
        bound(standard_normal(walk), walk, torch.zeros(1, 1, 2, 2), **options)


@pytest.mark.parametrize(
    "x_0", [torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.full((1, 1, 2, 2), 255.0), torch.zeros(4)]
)
def test_pictures_of_another_kind_are_refused(x_0):
    walk = scheduler()
    with pytest.raises(ValueError, match=r"give floats \(B, C, H, W\) in \[-1, 1\]"):
        bound(standard_normal(walk), walk, x_0)


# ---- Its parts -------------------------------------------------------------------------------------------------------


def test_kl_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    mean_a, log_a, mean_b, log_b = torch.randn(4, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    a, b = (torch.distributions.Normal(m, (v / 2).exp()) for m, v in ((mean_a, log_a), (mean_b, log_b)))
    wanted = torch.distributions.kl_divergence(a, b).flatten(1).sum(1)
    torch.testing.assert_close(gaussian_kl(mean_a, log_a, mean_b, log_b), wanted)


def test_kl_of_nearly_equal_variances_keeps_its_digits():
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    assert gaussian_kl(zero, zero + 1e-6, zero, zero).item() == pytest.approx(1e-12 / 4, rel=1e-5)


@pytest.mark.parametrize("levels", [2, 256, 65536])
@pytest.mark.parametrize("log_variance", [-12.0, -4.0, 2.0])
@pytest.mark.parametrize("mean", [-1.2, 0.1234, 0.999])
def test_the_decoder_sums_to_one_over_all_values(levels, log_variance, mean):
    values = (2 * torch.arange(levels).double() / (levels - 1) - 1).view(-1, 1, 1, 1)
    nats = decoder_nats(values, torch.full_like(values, mean), torch.full_like(values, log_variance), levels)
    assert (-nats).exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_the_decoder_is_the_difference_of_distribution_functions():
    normal = torch.distributions.Normal(torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.05, dtype=torch.float64))
    values = (2 * torch.arange(256).double() / 255 - 1).view(-1, 1, 1, 1)
    nats = decoder_nats(values, torch.full_like(values, 0.3), torch.full_like(values, 2 * math.log(0.05)), 256).exp()
    wanted = normal.cdf(values + 1 / 255) - normal.cdf(values - 1 / 255)
    near = wanted.flatten() > 1e-9  # further out the difference loses its digits, ours does not
    assert 50 < near.sum() < 200
    torch.testing.assert_close(1 / nats[near], wanted.flatten()[near], rtol=1e-6, atol=0)
    assert nats.isfinite().all()


def test_far_from_the_mean_the_decoder_stays_finite():
    far = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    nats = decoder_nats(0 * far, -far, torch.full_like(far, 2 * math.log(0.005)), 256)
    assert nats.item() == pytest.approx((0.5 * ((1 - 1 / 255) / 0.005) ** 2), rel=0.01)  # of the nearer edge


def test_bits():
    assert bits_per_dim(torch.tensor(4 * math.log(2)), (1, 2, 2)) == pytest.approx(1)


def test_a_uniform_model_of_eight_bits_takes_eight_bits():
    """Density 1/2 over [-1, 1] and a bit more at the edges, where half a bin is added: 256 bins in all."""
    nats = torch.tensor([3 * math.log(2 * 256 / 255)])
    assert bits_per_dim(discrete_nats(nats, (3, 1, 1), 256), (3, 1, 1)).item() == pytest.approx(8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_dequantised_values_stay_in_their_bin_and_fill_it(dtype):
    levels = likelihood.levels_of(torch.zeros(1, dtype=dtype))
    values = torch.tensor([0, 1, levels // 2, levels - 1]).to(dtype).view(1, 1, 2, 2).expand(2000, -1, -1, -1)
    x = (dequantised(values).double() + 1) / 2 * (levels - 1) - torch.tensor([0, 1, levels // 2, levels - 1]).view(2, 2)
    assert x.abs().max() <= 0.5 + 0.004  # float32 near 1 of 16 bits
    assert x.std().item() == pytest.approx(math.sqrt(1 / 12), rel=0.02)
    again = dequantised(values[1000:], index=torch.arange(1000, 2000))
    assert torch.equal(again, dequantised(values)[1000:])
    with pytest.raises(ValueError, match="float32"):
        dequantised(torch.zeros(1, 1, 2, 2))


# ---- The second opinion ----------------------------------------------------------------------------------------------

odeint = pytest.importorskip("torchdiffeq")
MIXTURE = ((0.3, -0.7, 0.05), (0.7, 0.4, 0.2))  # weight, mean, variance of each part, the same for every value


def noised_parts(alpha_bar):
    """What x_t is of the mixture: (weight, mean, variance)."""
    return [(w, alpha_bar.sqrt() * mean, alpha_bar * variance + 1 - alpha_bar) for w, mean, variance in MIXTURE]


def mixture_log_density(x, alpha_bar):
    """Of independent values, each with the law of the mixture after noise, summed over a picture."""
    parts = [
        math.log(w) - (x - mean).square() / (2 * variance) - (2 * math.pi * variance).log() / 2
        for w, mean, variance in noised_parts(alpha_bar)
    ]
    return torch.stack(parts).logsumexp(0).flatten(1).sum(1)


def mixture_network(walk):
    """eps = -sqrt(1 - alpha_bar) d log p_t / dx, at any fraction of t."""
    log_snr = walk.snr(torch.arange(walk.num_steps)).log()

    def network(x, t):
        low = t[0].floor().long().clamp(0, walk.num_steps - 2)
        alpha_bar = torch.lerp(log_snr[low], log_snr[low + 1], (t[0] - low).double()).sigmoid()
        with torch.enable_grad():
            x_in = x if x.requires_grad else x.detach().requires_grad_()
            density = mixture_log_density(x_in, alpha_bar).sum()
            (score,) = torch.autograd.grad(density, x_in, create_graph=True)
        return -(1 - alpha_bar).sqrt() * score

    return network


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_flow_gives_the_density_of_a_mixture(prediction_type):
    walk = scheduler(prediction_type=prediction_type, beta_end=0.04)  # a walk that forgets where it began
    eps_of = mixture_network(walk)
    log_snr = walk.snr(torch.arange(1000)).log()

    def network(x, t):
        eps = eps_of(x, t)
        low = t[0].floor().long().clamp(0, 998)
        alpha_bar = torch.lerp(log_snr[low], log_snr[low + 1], (t[0] - low).double()).sigmoid()
        x_0 = (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        return {"epsilon": eps, "sample": x_0, "v_prediction": alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0}[
            prediction_type
        ]

    x_0 = torch.linspace(-1.2, 1.2, 14, dtype=torch.float64).view(7, 1, 1, 2)
    nats = probability_flow_nats(network, walk, x_0, probes=None, rtol=1e-7, atol=1e-7)
    alpha_bar = walk.alphas_cumprod[0]
    scaled = x_0 * alpha_bar.sqrt()
    wanted = -mixture_log_density(scaled, alpha_bar) - 2 * alpha_bar.sqrt().log()  # as a density of x_0
    torch.testing.assert_close(nats, wanted, rtol=0, atol=5e-5)
    assert wanted.std() > 0.5  # the pictures differ, so the divergence was not constant


def test_random_probes_give_the_same_on_average():
    walk = scheduler()
    x_0 = torch.tensor([0.3, -0.5], dtype=torch.float64).view(1, 1, 1, 2)

    def coupled(x, t):  # of the exact network the Jacobian is diagonal here, and one probe would be exact
        return mixture_network(walk)(x, t) + 0.3 * x.flip(-1) * x

    exact = probability_flow_nats(coupled, walk, x_0, probes=None, rtol=1e-5, atol=1e-5)
    many = probability_flow_nats(coupled, walk, x_0.expand(200, -1, -1, -1), probes=1, rtol=1e-5, atol=1e-5)
    error = many.std() / math.sqrt(200)
    assert error > 0 and abs(many.mean() - exact) < 4 * error
    both = probability_flow_nats(coupled, walk, x_0.expand(200, -1, -1, -1), probes=8, rtol=1e-5, atol=1e-5)
    assert both.std() < 0.6 * many.std()


def test_the_flow_of_gaussian_data_stands_still():
    walk = scheduler()
    log_snr = walk.snr(torch.arange(1000)).log()

    def network(x, t):
        low = t[0].floor().long().clamp(0, 998)
        return torch.lerp(log_snr[low], log_snr[low + 1], (t[0] - low).double()).neg().sigmoid().sqrt() * x

    x_0 = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nats = probability_flow_nats(network, walk, x_0, probes=1)
    wanted = ((x_0 * walk.alphas_cumprod[0].sqrt()).square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2
    wanted = wanted - 2 * walk.alphas_cumprod[0].log()
    torch.testing.assert_close(nats, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("probes", [0, -1])
def test_probes_out_of_range_are_named(probes):
    with pytest.raises(ValueError, match=f"probes is {probes}"):
        probability_flow_nats(lambda x, t: x, scheduler(), torch.zeros(1, 1, 2, 2), probes=probes)


def test_a_network_of_diffusers_in_float32():
    """Bound and flow of one untrained network: finite, and a picture alone gives what it gives in a batch."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), layers_per_block=1,
    ).eval()  # fmt: skip
    walk = DDPMScheduler()
    pixels = (rng.uniform(3, torch.arange(128)) * 256).to(torch.uint8).view(2, 1, 8, 8)

    def network(x, t):
        return unet(x, t, return_dict=False)[0]

    found = bound(unet, walk, pixels.float() / 127.5 - 1, strata=4)  # which returns a UNet2DOutput
    alone = bound(network, walk, pixels[1:].float() / 127.5 - 1, strata=4, index=torch.tensor([1]))
    torch.testing.assert_close(alone.total, found.total[1:], rtol=1e-5, atol=0)
    nats = discrete_nats(probability_flow_nats(unet, walk, dequantised(pixels), rtol=1e-3, atol=1e-3), (1, 8, 8), 256)
    assert nats.isfinite().all() and (bits_per_dim(nats, (1, 8, 8)) > 6).all()
