"""Which timesteps are drawn: closed forms of their distributions, the expected gradient, and runs of train.py."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from ddpm_pipeline import DDPMScheduler
from ddpm_pipeline.timesteps import ImportanceSampling, draw_timesteps
from tests.arrays import save_images
from tests.short_run import SHORT_RUN, flags, run_here, run_on_two

T = 1000
SCHEDULER = DDPMScheduler()
CPU = torch.device("cpu")
NOT_SKIPPED, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


# ---- Stratified and logit-normal -------------------------------------------------------------------------------------


def test_stratified_t_is_uniform_and_spread_evenly_in_any_part_of_the_batch():
    steps = [draw_timesteps(SCHEDULER, "stratified", seed=0, step=step, index=torch.arange(64)) for step in range(2000)]
    t = torch.stack(steps)
    for of_image in (t[:, 0], t[:, 37]):  # over the steps each image has any t
        assert stats.kstest(of_image.numpy() / T, "uniform").pvalue > 1e-3
    assert stats.chisquare(torch.bincount(t.flatten(), minlength=T).numpy()).pvalue > 1e-3
    for part in (t, t[:, :16], t[:, 48:]):  # the largest gap of the golden ratio's points is at most 2.62 / n
        gaps = part.sort(dim=1).values.diff(dim=1)
        assert gaps.max() <= 2.62 * T / part.shape[1] + 1
        # the mean of n of them varies far less than that of n independent ones
        assert part.double().mean(1).std() < 0.4 * T / math.sqrt(12 * part.shape[1])
    again = draw_timesteps(SCHEDULER, "stratified", seed=0, step=7, index=torch.arange(16, 32))
    assert torch.equal(again, steps[7][16:32])
    assert not torch.equal(steps[0], draw_timesteps(SCHEDULER, "stratified", seed=1, step=0, index=torch.arange(64)))


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_logit_normal_timesteps_have_the_noise_levels_of_rectified_flow(beta_schedule):
    """Its t is logistic(N(0, 1)), and SNR is ((1 - t) / t)^2, so the t that has the SNR of ours is so, too; but for a
    tenth, which is uniform."""
    scheduler = DDPMScheduler(beta_schedule=beta_schedule)
    drawn = draw_timesteps(scheduler, "logit_normal", seed=0, step=0, index=torch.arange(40_000))
    again = draw_timesteps(scheduler, "logit_normal", seed=0, step=0, index=torch.arange(100, 300))
    assert torch.equal(again, drawn[100:300])
    of_flow = 1 / (1 + (scheduler.alphas_cumprod.double() / (1 - scheduler.alphas_cumprod.double())).sqrt())
    counts = torch.bincount(drawn, minlength=T)
    edges = [0, 100, 200, 300, 400, 500, 600, 700, 800, 900, T]
    logit = (of_flow / (1 - of_flow)).log()  # rises with t
    upper = [stats.norm.cdf((logit[e - 1] + logit[e]) / 2) for e in edges[1:-1]]  # halfway between two timesteps
    expected = (0.9 * torch.tensor([0.0, *upper, 1.0]).diff() + 0.01) * len(drawn)
    found = torch.stack([counts[a:b].sum() for a, b in zip(edges, edges[1:])]).double()
    assert stats.chisquare(found, expected).pvalue > 1e-3


def test_a_terminal_snr_of_0_is_drawn_as_often_as_the_uniform_tenth_says():
    scheduler = DDPMScheduler(num_train_timesteps=20, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    drawn = draw_timesteps(scheduler, "logit_normal", seed=0, step=0, index=torch.arange(100_000))
    assert (drawn == 19).sum() == pytest.approx(0.1 / 20 * 100_000, abs=4 * 500**0.5)


def test_a_sampling_that_does_not_exist_is_named():
    for sampling in ("importance", "random"):
        with pytest.raises(ValueError, match=f"timestep_sampling is '{sampling}': give one of 'uniform', 'stratified'"):
            draw_timesteps(SCHEDULER, sampling, seed=0, step=0, index=torch.arange(2))


# ---- Importance ------------------------------------------------------------------------------------------------------


def sampler_of(loss_of_t, num_steps, rounds=40):
    """A sampler that has seen each timestep with its loss."""
    sampler, t = ImportanceSampling(num_steps, CPU), torch.arange(num_steps)
    for _ in range(rounds):
        sampler.mean(loss_of_t[t], t)
        sampler.update(NOT_SKIPPED)
    return sampler


@pytest.mark.parametrize("num_steps", [1, 7, 100, 250, 1000])
def test_timesteps_are_uniform_until_each_bin_has_ten_losses(num_steps):
    sampler, t, size = ImportanceSampling(num_steps, CPU), torch.arange(num_steps), max(1, num_steps // 100)
    for _ in range(-(-10 // size) - 1):
        sampler.mean(torch.rand(num_steps), t)
        sampler.update(NOT_SKIPPED)
        torch.testing.assert_close(sampler.probabilities(), torch.full((num_steps,), 1 / num_steps))
    for _ in range(2):  # bins of 250 timesteps have 2 or 3
        sampler.mean(1 + t.float(), t)
        sampler.update(NOT_SKIPPED)
    assert num_steps == 1 or sampler.probabilities()[-1] > 1.3 * sampler.probabilities()[0]


def test_probabilities_are_those_of_equation_18_and_a_little_of_uniform_ones():
    num_steps = 50  # a bin each
    loss = torch.linspace(0.1, 2, num_steps)
    expected = 0.9 * loss / loss.sum() + 0.1 / num_steps
    torch.testing.assert_close(sampler_of(loss, num_steps).probabilities(), expected)
    # Of losses that vary it is the root of the mean of their squares: 1 and 3 have that of 5
    sampler, t = ImportanceSampling(2, CPU), torch.tensor([0, 0, 1, 1])
    for _ in range(20):
        sampler.mean(torch.tensor([1.0, 3.0, 1.0, 1.0]), t)
        sampler.update(NOT_SKIPPED)
    root = torch.tensor([math.sqrt(5), 1])
    torch.testing.assert_close(sampler.probabilities(), 0.9 * root / root.sum() + 0.05)


def test_neighbouring_timesteps_have_one_moment():
    sampler = sampler_of(torch.linspace(0.1, 2, 250).sqrt(), 250)
    probabilities = sampler.probabilities()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    _, sizes = probabilities.unique_consecutive(return_counts=True)
    assert len(sizes) == 100 and set(sizes.tolist()) == {2, 3}


@pytest.mark.parametrize("num_steps", [20, 250])
def test_draws_have_these_probabilities(num_steps):
    sampler = sampler_of(torch.linspace(0.01, 2, num_steps), num_steps)
    index = torch.arange(50_000)
    drawn = sampler.draw(seed=0, step=3, index=index)
    expected = sampler.probabilities().double() / sampler.probabilities().double().sum() * len(index)
    assert stats.chisquare(torch.bincount(drawn, minlength=num_steps).numpy(), expected.numpy()).pvalue > 1e-3
    part = index[77:200]  # another rank
    assert torch.equal(sampler.draw(seed=0, step=3, index=part), drawn[part])
    for other in ({"seed": 1, "step": 3}, {"seed": 0, "step": 4}):
        assert not torch.equal(sampler.draw(index=index, **other), drawn)


def test_the_largest_and_the_least_random_number_draw_timesteps(monkeypatch):
    for num_steps in (1, 3, 1000):
        for sampler in (ImportanceSampling(num_steps, CPU), sampler_of(torch.rand(num_steps), num_steps)):
            for u, expected in ((0.0, 0), (1 - 2.0**-53, num_steps - 1)):
                monkeypatch.setattr("ddpm_pipeline.rng.uniform", lambda key, index, u=u: torch.full((1,), u).double())
                assert sampler.draw(seed=0, step=0, index=torch.arange(1)).tolist() == [expected]


def test_the_expected_gradient_is_that_of_uniform_timesteps_with_less_noise():
    """L_t = c_t w: the gradient is mean(c), and the variance of its estimate sum(c^2 / p) / T^2 - mean(c)^2."""
    num_steps = 10
    c = torch.linspace(0.02, 3, num_steps) ** 2
    sampler = sampler_of(c, num_steps)
    p = sampler.probabilities().double()
    w = torch.ones((), requires_grad=True)

    def gradient(t):
        return torch.autograd.grad(sampler.mean(c[t] * w, t), w)[0].item()

    of_timesteps = torch.tensor([gradient(torch.tensor([t])) for t in range(num_steps)]).double()
    assert (p * of_timesteps).sum().item() == pytest.approx(c.mean().item(), rel=1e-5)
    variance = (p * of_timesteps**2).sum() - c.mean() ** 2
    assert variance < 0.05 * c.var(correction=0)  # 0.9 of the draws have no variance at all
    # And so is the mean over draws, within four standard errors
    t = sampler.draw(seed=0, step=0, index=torch.arange(20_000))
    assert abs(gradient(t) - c.mean()) < 4 * (variance / len(t)).sqrt()


def test_a_skipped_step_changes_nothing():
    sampler, t = sampler_of(torch.linspace(0.1, 2, 30), 30), torch.arange(30)
    before = {name: tensor.clone() for name, tensor in sampler.state_dict().items()}
    assert sampler.mean(torch.full((30,), math.nan), t).isnan()
    sampler.update(SKIPPED)
    for name, tensor in sampler.state_dict().items():
        assert torch.equal(tensor, before[name])
    sampler.mean(torch.ones(30), t)
    sampler.update(NOT_SKIPPED)
    assert sampler.probabilities().isfinite().all()


def test_losses_far_out_of_range_leave_probabilities():
    for loss in (0.0, 1e-30, 1e30):
        losses = torch.ones(30)
        losses[3] = loss
        sampler = sampler_of(losses, 30)
        assert sampler.probabilities().sum().item() == pytest.approx(1, abs=1e-5)
        assert sampler.probabilities().min() >= 0.1 / 30 * 0.999


def test_ranks_agree_and_have_the_moments_of_one_process():
    """Two ranks with half of the images each, in one or two passes."""
    alone, ranks = ImportanceSampling(150, CPU), [ImportanceSampling(150, CPU, lambda _: total) for _ in range(2)]
    for step in range(60):
        t = alone.draw(seed=0, step=step, index=torch.arange(64))
        losses = torch.rand(64, generator=torch.Generator().manual_seed(step)) * (1 + t / 50)
        alone.mean(losses, t)
        alone.update(NOT_SKIPPED)
        for first, rank in zip((0, 32), ranks):
            for part in (torch.arange(first, first + 20), torch.arange(first + 20, first + 32)):
                assert torch.equal(rank.draw(seed=0, step=step, index=part), t[part])
                rank.mean(losses[part], t[part])
        total = ranks[0]._seen + ranks[1]._seen
        for rank in ranks:
            rank.update(NOT_SKIPPED)
    assert not torch.allclose(alone.probabilities(), torch.full((150,), 1 / 150))
    assert torch.equal(ranks[0].probabilities(), ranks[1].probabilities())
    torch.testing.assert_close(ranks[0].probabilities(), alone.probabilities())


# ---- Runs ------------------------------------------------------------------------------------------------------------

RUN = SHORT_RUN | {
    "timestep_sampling": "importance", "ddpm_num_steps": 2, "max_train_steps": 14, "checkpointing_steps": 12,
    "num_sample_images": 1, "ddpm_num_inference_steps": 1, "save_images_steps": 0, "validation_steps": 0,
    "report_to": "none",
}  # fmt: skip


def test_a_resumed_run_draws_the_same_timesteps(tmp_path, capsys):
    """After 12 steps with 4 images, each of the two timesteps has had more than ten losses."""
    data = save_images(tmp_path / "images", 6, 8, 8)

    def arguments(name, **more):
        options = {"train_data_dir": data, "cache_dir": tmp_path / "cache", "output_dir": tmp_path / name}
        return flags(RUN | options | {"train_batch_size": 4} | more)

    assert run_here("train.py", arguments("straight")) == 0
    straight, resumed, shared = (tmp_path / name / "checkpoint-000014" for name in ("straight", "resumed", "shared"))
    assert (load_file(straight.with_name("checkpoint-000012") / "moments.safetensors")["weight"] > 0.16).all()
    for copy in (resumed, shared):
        shutil.copytree(straight.parent, copy.parent)
        shutil.rmtree(copy)
    assert run_here("train.py", arguments("resumed", resume_from_checkpoint="latest")) == 0
    for file in ("model.safetensors", "ema.safetensors", "optimizer.pt", "moments.safetensors"):
        assert (resumed / file).read_bytes() == (straight / file).read_bytes(), file

    # Two processes have the same timesteps as one, and both add to the moments
    run_on_two("train.py", arguments("shared", resume_from_checkpoint="latest", train_batch_size=2))
    moments, expected = (load_file(folder / "moments.safetensors") for folder in (shared, straight))
    for name in expected:
        torch.testing.assert_close(moments[name], expected[name], rtol=1e-3, atol=0)

    # Without importance there are no moments, and with it again they begin anew
    shutil.rmtree(resumed)
    capsys.readouterr()
    options = {"resume_from_checkpoint": "latest", "timestep_sampling": "uniform"}
    assert run_here("train.py", arguments("resumed", **options)) == 0
    assert "timestep_sampling importance -> uniform" in capsys.readouterr().out
    assert not (resumed / "moments.safetensors").exists()
    assert run_here("train.py", arguments("resumed", resume_from_checkpoint="latest", max_train_steps=15)) == 0
    assert (load_file(resumed.with_name("checkpoint-000015") / "moments.safetensors")["weight"] < 0.1).all()
