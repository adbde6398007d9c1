"""The variational bound and the probability-flow ODE against closed forms: Gaussian data, mixtures, torch's KL."""

import math
from importlib.util import find_spec

import pytest
import torch

from ddpm_pipeline import DDPMScheduler, likelihood, rng
from ddpm_pipeline.likelihood import (
    bits_per_dim,
    decoder_nats,
    dequantise,
    discrete_nats,
    gaussian_kl,
    probability_flow_nats,
    rate_distortion,
    variational_bound,
)
from tests.models import tiny_unet
from tests.oracles import Mixture, alpha_bar_at
from tests.schedules import alpha_bar_table, beta_table

ENTROPY = 0.5 * math.log(2 * math.pi * math.e)  # of N(0, 1), 1.418938... nats


def make_scheduler(**options):
    return DDPMScheduler(**({"clip_sample": False, "variance_type": "fixed_large"} | options))


def standard_normal(scheduler):
    """The exact network of N(0, I) data, of which x_t is N(0, I) too: E[eps | x_t] = sqrt(1 - alpha_bar) x_t."""

    def network(x_t, t):
        noise_std = (1 - alpha_bar_table(scheduler)[t]).sqrt().view(-1, 1, 1, 1)
        return noise_std.to(x_t) * x_t

    return network


@pytest.fixture
def exact_means(monkeypatch):
    """All terms are quadratic in (x_0, eps): their mean over these four pixels is their expectation over N(0, I)."""
    eps = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).view(1, 1, 2, 2)
    monkeypatch.setattr(likelihood, "_noise", lambda *_: eps)
    return torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).view(1, 1, 2, 2)


# ---- The variational bound -------------------------------------------------------------------------------------------


def test_exact_network_and_variance_beta_give_the_entropy_of_gaussian_data(exact_means):
    scheduler = make_scheduler()
    bound = variational_bound(standard_normal(scheduler), scheduler, exact_means, levels=None, last_variance="own")
    assert bound.total.item() / 4 == pytest.approx(ENTROPY, abs=1e-9)
    assert bound.kl.shape == (1, 999) and (bound.stratum_size == 1).all()
    assert bound.kl.min() > 0


@pytest.mark.parametrize("number", [1, 2, 10, 333])
def test_fewer_timesteps_give_the_entropy_too(exact_means, number):
    scheduler = make_scheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(number)
    steps = scheduler.timesteps.tolist()
    bound = variational_bound(
        standard_normal(scheduler), scheduler, exact_means, timesteps=steps, levels=None, last_variance="own"
    )
    assert bound.total.item() / 4 == pytest.approx(ENTROPY, abs=1e-9)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_every_prediction_type_gives_the_entropy(exact_means, prediction_type):
    scheduler = make_scheduler(prediction_type=prediction_type)

    def network(x_t, t):
        eps = standard_normal(scheduler)(x_t, t)
        return scheduler.convert_prediction(eps, t, x_t, "epsilon", prediction_type)

    bound = variational_bound(network, scheduler, exact_means, levels=None, last_variance="own")
    assert bound.total.item() / 4 == pytest.approx(ENTROPY, abs=1e-9)


def test_variance_beta_tilde_gives_a_larger_bound(exact_means):
    small = make_scheduler(variance_type="fixed_small")
    bound = variational_bound(standard_normal(small), small, exact_means, levels=None)
    assert bound.total.item() / 4 > ENTROPY + 0.01


def test_a_wrong_network_gives_a_larger_bound(exact_means):
    scheduler = make_scheduler()
    right = standard_normal(scheduler)
    bound = variational_bound(lambda x, t: 1.1 * right(x, t), scheduler, exact_means, levels=None, last_variance="own")
    assert bound.total.item() / 4 > ENTROPY + 0.01


def test_learned_variances_equal_the_fixed_ones_at_both_ends(exact_means):
    """A network that predicts a fixed variance, as its log or as the end of the range, gives that variance's terms."""
    terms = {}
    for name in ("fixed_small", "fixed_large"):
        scheduler = make_scheduler(variance_type=name)
        terms[name] = variational_bound(
            standard_normal(scheduler), scheduler, exact_means, levels=None, last_variance="own"
        )
    ranged = make_scheduler(variance_type="learned_range")
    for v, name in ((-1, "fixed_small"), (1, "fixed_large")):

        def network(x_t, t, v=v):
            return torch.cat([standard_normal(ranged)(x_t, t), torch.full_like(x_t, v)], dim=1)

        bound = variational_bound(network, ranged, exact_means, levels=None)
        torch.testing.assert_close(bound.kl, terms[name].kl)
        torch.testing.assert_close(bound.decoder, terms[name].decoder)

    learned = make_scheduler(variance_type="learned")

    def predicts_beta(x_t, t):
        log_beta = learned.betas[t].log().view(-1, 1, 1, 1).expand_as(x_t)
        return torch.cat([standard_normal(learned)(x_t, t), log_beta], dim=1)

    bound = variational_bound(predicts_beta, learned, exact_means, levels=None)
    torch.testing.assert_close(bound.total, terms["fixed_large"].total)


def test_last_variance_next_is_beta_tilde_of_the_next_step(exact_means):
    """beta_tilde_2, with t as in the paper."""
    scheduler = make_scheduler()
    bound = variational_bound(standard_normal(scheduler), scheduler, exact_means, levels=None)
    beta, alpha_bar = beta_table(scheduler), alpha_bar_table(scheduler)
    variance = beta[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1])  # Eq. (7), DDPM
    x_1 = scheduler.add_noise(exact_means, torch.tensor([1.0, -1, 1, -1]).double().view(1, 1, 2, 2), torch.tensor([0]))
    density = torch.distributions.Normal(alpha_bar[0].sqrt() * x_1, variance.sqrt())  # E[x_0 | x_1] of N(0, I) data
    assert bound.decoder.item() == pytest.approx(-density.log_prob(exact_means).sum().item(), rel=1e-9)


def test_last_variance_own_equals_next_where_beta_tilde_is_0(exact_means):
    small, ranged = make_scheduler(variance_type="fixed_small"), make_scheduler(variance_type="learned_range")
    expected = variational_bound(standard_normal(small), small, exact_means, levels=None).decoder
    own = variational_bound(standard_normal(small), small, exact_means, levels=None, last_variance="own").decoder

    def lowest(x_t, t):
        return torch.cat([standard_normal(ranged)(x_t, t), torch.full_like(x_t, -1)], dim=1)

    torch.testing.assert_close(own, expected)
    torch.testing.assert_close(variational_bound(lowest, ranged, exact_means, levels=None).decoder, expected)


def test_strata_estimate_the_bound_without_bias():
    scheduler = make_scheduler(num_train_timesteps=60, beta_end=0.3)
    x_0 = torch.randn(4000, 1, 1, 2, generator=torch.Generator().manual_seed(0)).double()
    network = standard_normal(scheduler)
    options = {"levels": None, "last_variance": "own"}
    exact = variational_bound(network, scheduler, x_0, **options)
    few = variational_bound(network, scheduler, x_0, strata=5, **options)
    assert few.kl.shape == (4000, 5) and few.stratum_size.sum() == 59
    assert (few.t.diff(dim=1) > 0).all()
    assert (few.t.amin(0) < few.t.amax(0)).any()
    torch.testing.assert_close(few.decoder, exact.decoder)
    difference = few.total - exact.total  # both with the same noise at the same timestep
    error = difference.std() / math.sqrt(4000)
    assert difference.std() > 0 and abs(difference.mean()) < 4 * error


def test_strata_cover_every_timestep_once():
    for number in (1, 2, 19, 20, 21, 999):
        for strata in (1, 2, 7, 19):
            edges = likelihood._strata(number, strata)
            assert edges[0] == 0 and edges[-1] == number
            assert all(low < high for low, high in zip(edges, edges[1:]))
            assert len(edges) == min(number, strata) + 1


def test_the_bound_of_an_image_depends_on_its_index_alone():
    scheduler = make_scheduler()
    x_0 = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(1)).double()
    options = {"strata": 3, "levels": None, "seed": 5}
    all_four = variational_bound(standard_normal(scheduler), scheduler, x_0, **options)
    last_two = variational_bound(standard_normal(scheduler), scheduler, x_0[2:], index=torch.tensor([2, 3]), **options)
    torch.testing.assert_close(last_two.total, all_four.total[2:])
    assert torch.equal(last_two.t, all_four.t[2:])
    other = variational_bound(standard_normal(scheduler), scheduler, x_0, **(options | {"seed": 6}))
    assert not torch.equal(other.total, all_four.total)


def test_noise_differs_between_timesteps_and_between_images():
    x_0 = torch.zeros(3, 1, 8, 8)
    drawn = torch.cat([likelihood._noise(0, i, torch.arange(3), x_0) for i in (0, 1, 999)]).flatten(1)
    correlation = torch.corrcoef(drawn)
    assert (correlation - torch.eye(9)).abs().max() < 0.5


def test_every_timestep_of_an_image_has_its_own_noise():
    scheduler = make_scheduler(num_train_timesteps=30)
    seen = []

    def network(x_t, t):
        seen.append((x_t / (1 - alpha_bar_table(scheduler)[t]).sqrt().view(-1, 1, 1, 1)).flatten())
        return x_t

    variational_bound(network, scheduler, torch.zeros(1, 1, 8, 8).double(), strata=6)
    drawn = torch.stack(seen)
    assert drawn.shape == (7, 64)
    assert (torch.corrcoef(drawn) - torch.eye(7)).abs().max() < 0.6
    assert drawn.std().item() == pytest.approx(1, abs=0.15)


def test_clip_sample_lowers_the_bound_of_a_bad_network():
    x_0 = torch.full((2, 1, 2, 2), 1.0)
    free, clipped = make_scheduler(), make_scheduler(clip_sample=True)
    totals = [
        variational_bound(lambda x, t: torch.zeros_like(x), scheduler, x_0, strata=10).total.mean()
        for scheduler in (free, clipped)
    ]
    assert totals[1] < totals[0]


def test_rate_and_distortion_of_gaussian_data(exact_means):
    """Given x_t, x_0 of N(0, 1) data has variance 1 - alpha_bar, the squared distortion."""
    scheduler = make_scheduler()
    bound = variational_bound(standard_normal(scheduler), scheduler, exact_means, levels=None, last_variance="own")
    curve = rate_distortion(bound, (1, 2, 2))
    assert curve.t.tolist() == list(range(1000))[::-1]
    expected = (1 - alpha_bar_table(scheduler).flip(0)).sqrt() * 127.5
    torch.testing.assert_close(curve.distortion, expected)
    assert (curve.rate.diff() >= 0).all()
    prior = bound.prior.mean()
    assert curve.rate[0].item() == pytest.approx(bits_per_dim(prior, (1, 2, 2)).item())
    sent = bits_per_dim(prior + bound.kl.sum(), (1, 2, 2))  # all terms but L_0
    assert curve.rate[-1].item() == pytest.approx(sent.item())


def test_distortion_is_the_root_of_the_mean_over_images():
    scheduler = make_scheduler(num_train_timesteps=3)
    x_0 = torch.tensor([0.1, 0.7], dtype=torch.float64).view(2, 1, 1, 1)
    bound = variational_bound(
        lambda x, t: x / (1 - alpha_bar_table(scheduler)[t]).sqrt().view(-1, 1, 1, 1), scheduler, x_0
    )
    # this network takes all of x_t for noise, so x_0_pred is 0
    expected = math.sqrt((0.1**2 + 0.7**2) / 2) * 127.5
    assert rate_distortion(bound, (1, 1, 1)).distortion.tolist() == pytest.approx([expected] * 3, rel=1e-6)


def test_the_rate_of_few_strata_is_close_to_the_rate_of_all_timesteps():
    scheduler = make_scheduler()
    x_0 = torch.randn(500, 1, 1, 2, generator=torch.Generator().manual_seed(0)).double()
    curves = [
        rate_distortion(
            variational_bound(standard_normal(scheduler), scheduler, x_0, levels=None, strata=strata), (1, 1, 2)
        )
        for strata in (None, 30)
    ]
    at = torch.tensor([100, 300, 600])
    rates = []
    for curve in curves:
        order = curve.t.argsort()
        rates.append(curve.rate[order][torch.searchsorted(curve.t[order], at.double())])
    torch.testing.assert_close(rates[1], rates[0], rtol=0.1, atol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strata": 0}, "strata is 0: give an integer from 1 to 999"),
        ({"strata": 1000}, "strata is 1000"),
        ({"levels": 1}, "levels is 1"),
        ({"last_variance": "first"}, "last_variance is 'first'"),
        ({"timesteps": []}, "descending"),
        ({"timesteps": [1, 2]}, "descending"),
        ({"timesteps": [1000, 2]}, "timesteps is 1000: give an integer from 0 to 999"),
        ({"timesteps": [5, -1]}, "timesteps is -1"),
    ],
)
def test_bad_arguments_are_named_in_the_error(options, message):
    scheduler = make_scheduler()
    with pytest.raises(ValueError, match=message):
        variational_bound(standard_normal(scheduler), scheduler, torch.zeros(1, 1, 2, 2), **options)


@pytest.mark.parametrize(
    "x_0", [torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.full((1, 1, 2, 2), 255.0), torch.zeros(4)]
)
def test_other_images_are_rejected(x_0):
    scheduler = make_scheduler()
    with pytest.raises(ValueError, match=r"give floats \(B, C, H, W\) in \[-1, 1\]"):
        variational_bound(standard_normal(scheduler), scheduler, x_0)


# ---- Terms -----------------------------------------------------------------------------------------------------------


def test_kl_matches_torch():
    generator = torch.Generator().manual_seed(0)
    mean_a, log_a, mean_b, log_b = torch.randn(4, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    a, b = (torch.distributions.Normal(m, (v / 2).exp()) for m, v in ((mean_a, log_a), (mean_b, log_b)))
    expected = torch.distributions.kl_divergence(a, b).flatten(1).sum(1)
    torch.testing.assert_close(gaussian_kl(mean_a, log_a, mean_b, log_b), expected)


def test_kl_of_nearly_equal_variances_keeps_its_digits():
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    assert gaussian_kl(zero, zero + 1e-6, zero, zero).item() == pytest.approx(1e-12 / 4, rel=1e-5)


@pytest.mark.parametrize("levels", [2, 256, 65536])
@pytest.mark.parametrize("log_variance", [-12.0, -4.0, 2.0])
@pytest.mark.parametrize("mean", [-1.2, 0.1234, 0.999])
def test_decoder_probabilities_sum_to_one(levels, log_variance, mean):
    values = (2 * torch.arange(levels).double() / (levels - 1) - 1).view(-1, 1, 1, 1)
    nats = decoder_nats(values, torch.full_like(values, mean), torch.full_like(values, log_variance), levels)
    assert (-nats).exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_the_decoder_is_a_difference_of_normal_cdfs():
    normal = torch.distributions.Normal(torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.05, dtype=torch.float64))
    values = (2 * torch.arange(256).double() / 255 - 1).view(-1, 1, 1, 1)
    nats = decoder_nats(values, torch.full_like(values, 0.3), torch.full_like(values, 2 * math.log(0.05)), 256).exp()
    expected = normal.cdf(values + 1 / 255) - normal.cdf(values - 1 / 255)
    near = expected.flatten() > 1e-9  # further out this difference loses its digits, ours does not
    assert 50 < near.sum() < 200
    torch.testing.assert_close(1 / nats[near], expected.flatten()[near], rtol=1e-6, atol=0)
    assert nats.isfinite().all()


def test_far_from_the_mean_the_decoder_stays_finite():
    far = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    nats = decoder_nats(0 * far, -far, torch.full_like(far, 2 * math.log(0.005)), 256)
    assert nats.item() == pytest.approx((0.5 * ((1 - 1 / 255) / 0.005) ** 2), rel=0.01)  # by the nearer edge of the bin


def test_bits_per_dim():
    assert bits_per_dim(torch.tensor(4 * math.log(2)), (1, 2, 2)) == pytest.approx(1)


def test_a_uniform_model_of_8_bit_values_has_8_bits_per_dim():
    """256 bins, of which half a bin on either side lies outside [-1, 1]: the density is 255 / 512."""
    nats = torch.tensor([3 * math.log(2 * 256 / 255)])
    assert bits_per_dim(discrete_nats(nats, (3, 1, 1), 256), (3, 1, 1)).item() == pytest.approx(8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_dequantised_values_fill_their_bin(dtype):
    levels = likelihood.num_levels(dtype)
    values = torch.tensor([0, 1, levels // 2, levels - 1]).to(dtype).view(1, 1, 2, 2).expand(2000, -1, -1, -1)
    x = (dequantise(values).double() + 1) / 2 * (levels - 1) - torch.tensor([0, 1, levels // 2, levels - 1]).view(2, 2)
    assert x.abs().max() <= 0.5 + 0.004  # float32 near 1, for 16 bits
    assert x.std().item() == pytest.approx(math.sqrt(1 / 12), rel=0.02)
    again = dequantise(values[1000:], index=torch.arange(1000, 2000))
    assert torch.equal(again, dequantise(values)[1000:])
    with pytest.raises(ValueError, match="float32"):
        dequantise(torch.zeros(1, 1, 2, 2))


# ---- The probability-flow ODE ----------------------------------------------------------------------------------------

needs_ode_solver = pytest.mark.skipif(not find_spec("torchdiffeq"), reason="torchdiffeq is not installed: extra `ode`")


@needs_ode_solver
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_ode_gives_the_density_of_a_mixture(prediction_type):
    scheduler = make_scheduler(prediction_type=prediction_type, beta_end=0.04)  # so that alpha_bar at T is about 0
    eps_of = Mixture().network(scheduler)

    def network(x, t):
        eps, alpha_bar = eps_of(x, t), alpha_bar_at(scheduler, t)
        x_0 = (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        return {"epsilon": eps, "sample": x_0, "v_prediction": alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0}[
            prediction_type
        ]

    x_0 = torch.linspace(-1.2, 1.2, 14, dtype=torch.float64).view(7, 1, 1, 2)
    nats = probability_flow_nats(network, scheduler, x_0, probes=None, rtol=1e-7, atol=1e-7)
    alpha_bar = alpha_bar_table(scheduler)[0]
    scaled = x_0 * alpha_bar.sqrt()
    expected = -Mixture().log_density(scaled, alpha_bar) - 2 * alpha_bar.sqrt().log()  # as a density of x_0
    torch.testing.assert_close(nats, expected, rtol=0, atol=5e-5)
    assert expected.std() > 0.5  # the images differ, so the divergence was not constant


@needs_ode_solver
def test_random_probes_estimate_the_divergence_without_bias():
    scheduler = make_scheduler()
    x_0 = torch.tensor([0.3, -0.5], dtype=torch.float64).view(1, 1, 1, 2)

    def coupled(x, t):  # the Jacobian of the exact network is diagonal: one probe would be exact
        return Mixture().network(scheduler)(x, t) + 0.3 * x.flip(-1) * x

    exact = probability_flow_nats(coupled, scheduler, x_0, probes=None, rtol=1e-5, atol=1e-5)
    single = probability_flow_nats(coupled, scheduler, x_0.expand(200, -1, -1, -1), probes=1, rtol=1e-5, atol=1e-5)
    error = single.std() / math.sqrt(200)
    assert error > 0 and abs(single.mean() - exact) < 4 * error
    eight = probability_flow_nats(coupled, scheduler, x_0.expand(200, -1, -1, -1), probes=8, rtol=1e-5, atol=1e-5)
    assert eight.std() < 0.6 * single.std()


@needs_ode_solver
def test_the_ode_of_standard_normal_data_is_stationary():
    scheduler = make_scheduler()

    def network(x, t):
        return (1 - alpha_bar_at(scheduler, t)).sqrt() * x

    x_0 = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nats = probability_flow_nats(network, scheduler, x_0, probes=1)
    expected = ((x_0 * alpha_bar_table(scheduler)[0].sqrt()).square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2
    expected = expected - 2 * alpha_bar_table(scheduler)[0].log()
    torch.testing.assert_close(nats, expected, rtol=1e-6, atol=1e-6)


@needs_ode_solver
@pytest.mark.parametrize("probes", [0, -1])
def test_bad_probes_are_named_in_the_error(probes):
    with pytest.raises(ValueError, match=f"probes is {probes}"):
        probability_flow_nats(lambda x, t: x, make_scheduler(), torch.zeros(1, 1, 2, 2), probes=probes)


@needs_ode_solver
def test_a_network_of_diffusers_in_float32():
    """Bound and ODE of an untrained network: finite, and an image alone has the bound that it has in a batch."""
    unet = tiny_unet(size=8)
    scheduler = DDPMScheduler()
    pixels = (rng.uniform(3, torch.arange(128)) * 256).to(torch.uint8).view(2, 1, 8, 8)

    def network(x, t):
        return unet(x, t, return_dict=False)[0]

    bound = variational_bound(
        unet, scheduler, pixels.float() / 127.5 - 1, strata=4
    )  # a UNet2DModel returns a UNet2DOutput
    alone = variational_bound(network, scheduler, pixels[1:].float() / 127.5 - 1, strata=4, index=torch.tensor([1]))
    torch.testing.assert_close(alone.total, bound.total[1:], rtol=1e-5, atol=0)
    nats = discrete_nats(
        probability_flow_nats(unet, scheduler, dequantise(pixels), rtol=1e-3, atol=1e-3), (1, 8, 8), 256
    )
    assert nats.isfinite().all() and (bits_per_dim(nats, (1, 8, 8)) > 6).all()
