"""The scheduler against diffusers' schedulers, where those are right, and as one of them: configuration and loading."""

import copy
import pickle
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as BuiltInDDPMScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

from ddpm_pipeline.scheduling_ddpm import PREDICTION_TYPES, TIMESTEP_SPACINGS, DDPMScheduler
from tests.arrays import normal
from tests.schedules import FINITE_SNR, ZERO_SNR, alpha_bar_table, beta_table, close, network_output, values_of

# The other variance types: rows 4 and 5 of test_stock.py.
BUILT_IN_IS_RIGHT = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")


# ---- Betas -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [*FINITE_SNR[:-1], {"rescale_betas_zero_snr": True}], ids=values_of)
@pytest.mark.parametrize("num_steps", [10, 1000])
def test_beta_schedules_match_the_built_in_ones(schedule, num_steps):
    """Up to the rounding of their float32 tables on any processor: a beta is 1 minus a quotient of two rounded numbers,
    each of a few operations, and alpha_bar is a product of num_steps of these."""
    theirs = BuiltInDDPMScheduler(num_steps, **schedule)
    ours = DDPMScheduler(num_steps, **schedule, prediction_type="v_prediction")
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours.betas.float(), theirs.betas, rtol=1e-5, atol=16 * eps)
    torch.testing.assert_close(alpha_bar_table(ours).float(), theirs.alphas_cumprod, rtol=4000 * eps, atol=16 * eps)


def test_the_rescaled_schedule_matches_the_built_in_one_in_float64():
    """Without the rounding of its float32 tables, the built-in formula gives ours to 1e-12."""
    theirs = rescale_zero_terminal_snr(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    close(beta_table(DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")), theirs)


# ---- Steps -----------------------------------------------------------------------------------------------------------


def assert_steps_match(theirs, ours, variance_type, rtol, atol, table_error=0.0, dtype=torch.float64):
    for t in (0, 1, 2, 50, 500, 998, 999):
        x_t = normal(2, 3, 4, 4, seed=t, dtype=dtype)
        output = network_output(variance_type, x_t, seed=t + 1).to(dtype)
        # x_0_pred is compared as well: previews show it
        expected, actual = (
            scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(t)) for scheduler in (theirs, ours)
        )
        allowed = atol + table_error / (1 - alpha_bar_table(ours)[max(t - 1, 0)].item())
        close(actual.pred_original_sample, expected.pred_original_sample, rtol, allowed)
        close(actual.prev_sample, expected.prev_sample, rtol, allowed)


@pytest.mark.parametrize(
    "options", [{}, {"clip_sample": False}, {"thresholding": True, "sample_max_value": 1.5}], ids=values_of
)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance_type", BUILT_IN_IS_RIGHT)
def test_step_matches_the_built_in_formula(variance_type, prediction_type, options):
    """With our tables in the built-in scheduler, so that only the formulas differ."""
    options = {**options, "variance_type": variance_type, "prediction_type": prediction_type}
    theirs, ours = BuiltInDDPMScheduler(**options), DDPMScheduler(**options)
    theirs.alphas_cumprod, theirs.one = alpha_bar_table(ours), ours.one.double()
    assert_steps_match(theirs, ours, variance_type, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variance_type", BUILT_IN_IS_RIGHT)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", FINITE_SNR[:-1], ids=values_of)
def test_step_matches_the_built_in_step(schedule, prediction_type, variance_type):
    """In float32, with its own tables, whose alpha_bar is rounded by 6e-8 and divided by 1 - alpha_bar (row 17)."""
    options = {**schedule, "variance_type": variance_type, "prediction_type": prediction_type}
    theirs, ours = BuiltInDDPMScheduler(**options), DDPMScheduler(**options)
    assert_steps_match(theirs, ours, variance_type, rtol=1e-5, atol=1e-4, table_error=1e-7, dtype=torch.float32)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("number", [1000, 50])
def test_step_with_eta_matches_ddim(prediction_type, clip_sample, eta, number):
    options = {"prediction_type": prediction_type, "clip_sample": clip_sample}
    theirs, ours = DDIMScheduler(**options), DDPMScheduler(**options)
    theirs.alphas_cumprod = alpha_bar_table(ours)
    theirs.set_timesteps(number)
    ours.set_timesteps(number)
    assert torch.equal(theirs.timesteps, ours.timesteps)
    for t in (*ours.timesteps[:-1].tolist()[:: number // 10], ours.timesteps[-2].item(), ours.timesteps[-1].item()):
        x_t, output, noise = (normal(2, 3, 4, 4, seed=seed) for seed in (t, t + 1, t + 2))
        expected = theirs.step(output, t, x_t, eta=eta, use_clipped_model_output=True, variance_noise=noise)
        actual = ours.step(output, t, x_t, ddim_eta=eta, variance_noise=noise)
        close(actual.pred_original_sample, expected.pred_original_sample, rtol=1e-9, atol=1e-10)
        close(actual.prev_sample, expected.prev_sample, rtol=1e-9, atol=1e-9)


# ---- Timesteps -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:timestep_spacing")
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("num_steps", [1000, 37, 1])
def test_timestep_spacings_match_the_built_in_ones_where_those_are_right(spacing, num_steps):
    theirs = BuiltInDDPMScheduler(num_steps, timestep_spacing=spacing)
    ours = DDPMScheduler(num_steps, timestep_spacing=spacing)
    for number in range(1, num_steps + 1):
        ours.set_timesteps(number)
        theirs.set_timesteps(number)
        steps = ours.timesteps
        assert len(steps) == number == ours.num_inference_steps
        assert (steps.diff() < 0).all() and steps[-1] >= 0 and steps[0] < num_steps
        assert torch.equal(steps, theirs.timesteps[:number])
        assert len(theirs.timesteps) == number or spacing == "trailing"  # which is sometimes one too long: row 1
        assert ours.previous_timestep(steps[0]) == (steps[1] if number > 1 else -1)
        assert ours.previous_timestep(steps[-1].item()) == -1


@pytest.mark.parametrize("num_steps", [2, 3, 10, 99, 128, 999])
def test_trailing_spacing_is_right_for_every_number_of_steps(num_steps):
    scheduler = DDPMScheduler(num_steps, timestep_spacing="trailing")
    for number in range(1, num_steps + 1):
        steps = scheduler._spaced(number)
        assert len(steps) == number and steps[0] == num_steps - 1 and steps[-1] >= 0
        assert all(later < earlier for earlier, later in zip(steps, steps[1:]))


def test_starting_in_the_middle_of_the_schedule_warns():
    with pytest.warns(UserWarning, match=r"501 steps starts at t = 500, where 27\.\d% of the image is left.*trailing"):
        DDPMScheduler().set_timesteps(501)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DDPMScheduler().set_timesteps(1000)
        DDPMScheduler().set_timesteps(50)
        DDPMScheduler(timestep_spacing="trailing").set_timesteps(501)
        # a short schedule with much of the image left at its end: trailing would start there too
        DDPMScheduler(20).set_timesteps(20)
        DDPMScheduler(20, timestep_spacing="linspace").set_timesteps(7)
        DDPMScheduler().set_timesteps(timesteps=[500, 100])


# ---- Configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [BuiltInDDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_every_diffusers_scheduler_loads_the_su_schedule(other, tmp_path, diffusers_log):
    ours = DDPMScheduler(200, beta_schedule="su", timestep_spacing="trailing")
    close(beta_table(ours), 0.02 * torch.arange(1, 201, dtype=torch.float64) / 200)
    ours.save_pretrained(tmp_path)
    for loaded in (other.from_config(ours.config), other.from_pretrained(tmp_path)):
        assert type(loaded) is other
        torch.testing.assert_close(loaded.betas, ours.betas.float(), rtol=1e-6, atol=0)
        assert loaded.config.num_train_timesteps == 200 and loaded.config.timestep_spacing == "trailing"
        back = DDPMScheduler.from_config(loaded.config)
        assert torch.equal(back.betas, ours.betas)
    assert not diffusers_log.records


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range", "prediction_type": "v_prediction"},
        {"beta_schedule": "su", "num_train_timesteps": 50, "clip_sample": False},
        {"trained_betas": [0.1, 0.2, 0.3]},
        {"trained_betas": np.linspace(1e-4, 0.03, 30)},
        ZERO_SNR,
        {"timestep_spacing": "trailing", "steps_offset": 1, "thresholding": True, "sample_max_value": 2.0},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_save_and_load_round_trip(options, tmp_path, diffusers_log):
    scheduler = DDPMScheduler(**options)
    scheduler.save_pretrained(tmp_path)
    copies = [
        DDPMScheduler.from_pretrained(tmp_path),
        DDPMScheduler.from_config(scheduler.config),
        DDPMScheduler.from_config(BuiltInDDPMScheduler.from_pretrained(tmp_path).config),
        copy.deepcopy(scheduler),
        pickle.loads(pickle.dumps(scheduler)),
    ]
    x_t = normal(1, 3, 4, 4)
    output, t = network_output(scheduler.variance_type, x_t), len(scheduler) // 2
    expected = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(0)).prev_sample
    for loaded in copies:
        assert torch.equal(loaded.betas, scheduler.betas)
        assert torch.equal(loaded.timesteps, scheduler.timesteps)
        assert len(loaded) == len(scheduler.betas) == loaded.config.num_train_timesteps
        stepped = loaded.step(output, t, x_t, generator=torch.Generator().manual_seed(0)).prev_sample
        assert torch.equal(stepped, expected)
    assert not diffusers_log.records


def test_it_is_a_diffusers_scheduler():
    scheduler = DDPMScheduler()
    assert isinstance(scheduler, BuiltInDDPMScheduler)
    assert isinstance(scheduler, diffusers.SchedulerMixin)
    assert dict(scheduler.config) == dict(BuiltInDDPMScheduler().config)
    x = normal(1, 3, 4, 4)
    assert scheduler.scale_model_input(x, 5) is x
    assert scheduler.init_noise_sigma == 1
