"""What the scheduler accepts: dtypes, devices, generators, compilation; what it refuses; what it does not modify."""

import math

import pytest
import torch

from ddpm_pipeline.scheduling_ddpm import PREDICTION_TYPES, DDPMScheduler
from tests.arrays import normal
from tests.schedules import ALL_T, SCHEDULES, close, images_at_all_t, network_output, values_of

# ---- Dtypes, batches, and what is not modified -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=values_of)
def test_half_precision_is_exact_to_its_rounding(dtype, schedule):
    scheduler = DDPMScheduler(**schedule)
    x_0, eps = (values.to(dtype) for values in images_at_all_t()[:2])
    info = torch.finfo(dtype)

    def q_step(x_prev, noise, t):
        return scheduler.q_step(x_prev, t, t.div(2, rounding_mode="floor") - 1, noise)

    for call in (scheduler.add_noise, scheduler.get_velocity, q_step):
        exact, rounded = call(x_0.double(), eps.double(), ALL_T), call(x_0, eps, ALL_T)
        assert rounded.dtype == dtype
        # half a unit in the last place, which is eps / 2 of the power of two below, and 1e-6 for float32
        half_a_unit = (2.0 ** exact.abs().log2().floor() * info.eps).clamp(min=info.smallest_normal * info.eps) / 2
        assert ((rounded.double() - exact).abs() <= half_a_unit + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_step_in_other_dtypes(dtype, variance_type, prediction_type):
    scheduler = DDPMScheduler(variance_type=variance_type, prediction_type=prediction_type)
    for t in (0, 500, 999):
        x_t, noise = normal(2, 3, 4, 4).to(dtype), normal(2, 3, 4, 4, seed=1).to(dtype)
        output = network_output(variance_type, x_t).to(dtype)
        exact = scheduler.step(output.double(), t, x_t.double(), variance_noise=noise.double())
        rounded = scheduler.step(output, t, x_t, variance_noise=noise)
        for name in ("prev_sample", "pred_original_sample"):
            assert rounded[name].dtype == dtype
            error = (rounded[name].double() - exact[name]).abs().max()
            assert error < 1e-4 + 4 * torch.finfo(dtype).eps  # 1e-4: x_0_pred at t = 999 is 158 times what is rounded
        assert rounded.prev_sample.data_ptr() not in (x_t.data_ptr(), output.data_ptr())
        moments = scheduler.p_mean_variance(output, torch.tensor([t, t]), x_t)
        assert {value.dtype for value in moments} == {dtype}


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("options", [{}, {"clip_sample": False}, {"thresholding": True}], ids=values_of)
def test_arguments_are_not_modified(variance_type, prediction_type, options):
    scheduler = DDPMScheduler(variance_type=variance_type, prediction_type=prediction_type, **options)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x_t, noise = 2 * normal(2, 3, 4, 4).to(dtype), normal(2, 3, 4, 4, seed=1).to(dtype)
        output, t = 2 * network_output(variance_type, x_t).to(dtype), torch.tensor([5, 700])
        arguments = (x_t, noise, output, t)
        before = [value.clone() for value in arguments]
        for eta in (0.0, 0.5, 1.0):
            for t_i in (0, 500, torch.tensor(999)):
                scheduler.step(output, t_i, x_t, ddim_eta=eta, variance_noise=noise)
        scheduler.p_mean_variance(output, t, x_t)
        scheduler.q_posterior_mean_variance(x_t, noise, t)
        scheduler.q_mean_variance(x_t, t)
        scheduler.add_noise(x_t, noise, t)
        scheduler.q_step(x_t, t, t - 3, noise)
        scheduler.get_velocity(x_t, noise, t)
        for source in PREDICTION_TYPES:
            scheduler.convert_prediction(noise, t, x_t, prediction_type, source)
        assert all(torch.equal(value, kept) for value, kept in zip(arguments, before))


def test_batches_and_generators():
    scheduler, x_t, output = DDPMScheduler(), normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (7, 8)]

    both = scheduler.step(output, 500, x_t, generator=generators()).prev_sample
    assert torch.equal(both, scheduler.step(output, torch.tensor(500), x_t, generator=generators()).prev_sample)
    for i, generator in enumerate(generators()):
        single = scheduler.step(output[i : i + 1], 500, x_t[i : i + 1], generator=generator).prev_sample
        assert torch.equal(single[0], both[i])
    noise = torch.cat([torch.randn(1, 3, 4, 4, generator=g, dtype=torch.float64) for g in generators()])
    assert torch.equal(both, scheduler.step(output, 500, x_t, variance_noise=noise).prev_sample)
    unused = torch.Generator().manual_seed(0)
    state = unused.get_state()
    scheduler.step(output, 500, x_t, generator=unused, ddim_eta=0.0)
    scheduler.step(output, 0, x_t, generator=unused)
    assert torch.equal(unused.get_state(), state)  # no noise is drawn where none is added
    assert isinstance(scheduler.step(output, 500, x_t, return_dict=False), tuple)


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned", "learned_range"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_step_is_differentiable(variance_type, prediction_type):
    """As classifier guidance needs: against finite differences."""
    scheduler = DDPMScheduler(variance_type=variance_type, prediction_type=prediction_type, clip_sample_range=0.7)
    x_t, noise = normal(1, 1, 2, 2).requires_grad_(), normal(1, 1, 2, 2, seed=1)
    output = network_output(variance_type, x_t, seed=2).requires_grad_()

    def step(output, x_t):
        return scheduler.step(output, 100, x_t, variance_noise=noise, return_dict=False)

    assert torch.autograd.gradcheck(step, (output, x_t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_step_on_another_device_reads_nothing_back(dtype, variance_type):
    """Tensors on "meta" have no values: whatever would make the host wait is an error there."""
    scheduler = DDPMScheduler(variance_type=variance_type)
    scheduler.set_timesteps(50, device="meta")
    x_t, t = normal(2, 3, 4, 4).to("meta", dtype), torch.tensor([5, 700], device="meta")
    output = network_output(variance_type, normal(2, 3, 4, 4)).to("meta", dtype)
    for timestep in (scheduler.timesteps[3], torch.tensor(500), 500):
        stepped = scheduler.step(output, timestep, x_t)
        assert (stepped.prev_sample.shape, stepped.prev_sample.dtype) == (x_t.shape, dtype)
    scheduler.p_mean_variance(output, t, x_t)
    scheduler.add_noise(x_t, x_t, t)
    scheduler.q_step(x_t, t, t - 3, x_t)
    scheduler.get_velocity(x_t, x_t, t)
    assert scheduler.alphas_cumprod.device.type == scheduler.betas.device.type == "cpu"


@pytest.mark.parametrize("compiling", [False, True])
def test_set_timesteps_drops_the_cached_coefficients(compiling, monkeypatch):
    """Both kinds of coefficients that step may read: floats, and the table for compiled steps and accelerators."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    used, x_t = DDPMScheduler(timestep_spacing="trailing"), normal(2, 3, 4, 4)
    for number in (1000, 50, 10):
        fresh = DDPMScheduler(timestep_spacing="trailing")
        for scheduler in (used, fresh):
            scheduler.set_timesteps(number)
        for eta in (0.0, 1.0):
            t = used.timesteps[1]
            arguments = {"timestep": t, "sample": x_t, "ddim_eta": eta, "variance_noise": x_t.flip(0)}
            assert torch.equal(used.step(x_t, **arguments).prev_sample, fresh.step(x_t, **arguments).prev_sample)
    if compiling:  # a timestep that is not in the schedule, where it cannot be checked
        assert used.step(x_t, torch.tensor(901), x_t).prev_sample.isnan().all()


def test_compiled_methods_give_the_same():
    """Compiled methods read coefficients from a table, as on an accelerator: with learned variance and eta as well."""
    torch.compiler.reset()
    scheduler = DDPMScheduler(variance_type="learned_range", timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    x_t, noise = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    output, t = network_output("learned_range", x_t), torch.tensor([5, 700])
    step = torch.compile(scheduler.step, fullgraph=True, backend="eager")
    for t_i in (torch.tensor(999), torch.tensor(49), 499):
        expected = scheduler.step(output, t_i, x_t, ddim_eta=0.5, variance_noise=noise)
        actual = step(output, t_i, x_t, ddim_eta=0.5, variance_noise=noise)
        close(actual.prev_sample, expected.prev_sample)
        close(actual.pred_original_sample, expected.pred_original_sample)
    moments = torch.compile(scheduler.p_mean_variance, fullgraph=True, backend="eager")(output, t, x_t)
    close(moments.mean, scheduler.p_mean_variance(output, t, x_t).mean)
    noisy = torch.compile(scheduler.add_noise, fullgraph=True, backend="eager")(x_t, noise, t)
    close(noisy, scheduler.add_noise(x_t, noise, t))


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_schedule": "cosine"}, "'cosine'.*'squaredcos_cap_v2'"),
        ({"variance_type": "fixed_smal"}, "'fixed_smal'.*'fixed_small'"),
        ({"prediction_type": "v"}, "'v'.*'v_prediction'"),
        ({"timestep_spacing": "even"}, "'even'.*'trailing'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0: .* 1 to 100000"),
        ({"num_train_timesteps": 10**10}, "10000000000"),
        ({"num_train_timesteps": 10.5}, "10.5"),
        ({"steps_offset": -1}, "steps_offset is -1"),
        ({"dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio is 1.5"),
        ({"dynamic_thresholding_ratio": 0}, "dynamic_thresholding_ratio is 0"),
        ({"clip_sample_range": 0}, "clip_sample_range is 0"),
        ({"clip_sample": "false"}, "clip_sample is 'false'"),
        ({"thresholding": "no"}, "thresholding is 'no'"),
        ({"sample_max_value": math.nan}, "sample_max_value is nan"),
        ({"beta_end": 2.0}, r"beta is 1\.\d+ at t = \d+"),
        ({"beta_start": -0.1}, r"beta is -0\.1 at t = 0"),
        ({"beta_start": math.nan}, "beta is nan at t = 0"),
        ({"trained_betas": [0.1, 0.0]}, "beta is 0 at t = 1"),
        ({"trained_betas": [0.1, 1.0, 0.1], "prediction_type": "sample"}, "alpha_bar is 0 from t = 1"),
        ({"trained_betas": []}, r"shape \(0,\)"),
        ({"trained_betas": [[0.1, 0.2]]}, r"shape \(1, 2\)"),
        ({"rescale_betas_zero_snr": True}, '"epsilon".*"v_prediction" or "sample"'),
        ({"trained_betas": [0.1, 1.0]}, '"epsilon".*"v_prediction" or "sample"'),
        ({"num_train_timesteps": 20_000}, '"epsilon".*"v_prediction" or "sample"'),  # alpha_bar is 1e-88
        ({"num_train_timesteps": 100_000, "prediction_type": "v_prediction"}, r"alpha_bar is 0 from t = \d+"),
    ],
)
def test_bad_options_are_named_in_the_error(options, message):
    with pytest.raises(ValueError, match=message):
        DDPMScheduler(**options)


X = torch.zeros(2, 3, 4, 4)
T = torch.tensor([5, 700])


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("set_timesteps", {"num_inference_steps": 0}, "num_inference_steps is 0: .* 1 to 1000"),
        ("set_timesteps", {"num_inference_steps": 1001}, "1001"),
        ("set_timesteps", {"num_inference_steps": 10.0}, "10.0"),
        ("set_timesteps", {}, "None and timesteps is None"),
        ("set_timesteps", {"num_inference_steps": 2, "timesteps": [5, 3]}, r"2 and timesteps is \[5, 3\]"),
        ("set_timesteps", {"timesteps": []}, r"\[\]"),
        ("set_timesteps", {"timesteps": [5, 5]}, r"\[5, 5\].*descending"),
        ("set_timesteps", {"timesteps": [3, 5]}, r"\[3, 5\].*descending"),
        ("set_timesteps", {"timesteps": [1000, 5]}, "1000.*0 to 999"),
        ("set_timesteps", {"timesteps": [5, -3]}, "-3.*0 to 999"),
        ("set_timesteps", {"timesteps": [5.5, 3]}, "5.5.*0 to 999"),
        ("set_timesteps", {"timesteps": torch.tensor([5.0, 3.0])}, r"tensor\(5.\)"),
        ("step", {"model_output": X, "timestep": 1000, "sample": X}, r"1000.*\[999, 998, .*\(1000 of them\)"),
        ("step", {"model_output": X, "timestep": -1, "sample": X}, "-1"),
        ("step", {"model_output": X, "timestep": 0.5, "sample": X}, "0.5"),
        ("step", {"model_output": X, "timestep": T, "sample": X}, "2 elements.*p_mean_variance"),
        ("step", {"model_output": X, "timestep": 5, "sample": X, "ddim_eta": 1.5}, "ddim_eta is 1.5"),
        ("step", {"model_output": X, "timestep": 5, "sample": X, "ddim_eta": -0.1}, "ddim_eta is -0.1"),
        ("step", {"model_output": X, "timestep": 5, "sample": X, "ddim_eta": math.nan}, "ddim_eta is nan"),
        ("step", {"model_output": X, "timestep": 5, "sample": X, "ddim_eta": None}, "ddim_eta is None"),
        ("step", {"model_output": X, "timestep": 5, "sample": X, "ddim_eta": torch.tensor(0.5)}, "ddim_eta is tensor"),
        ("step", {"model_output": X[:, :1], "timestep": 5, "sample": X}, r"\(2, 1, 4, 4\).*3 channels"),
        ("step", {"model_output": torch.cat([X, X], 1), "timestep": 5, "sample": X}, r"\(2, 6, 4, 4\).*fixed_small"),
        ("step", {"model_output": X[:1], "timestep": 5, "sample": X}, r"\(1, 3, 4, 4\)"),
        ("previous_timestep", {"timestep": 1000}, "1000"),
        ("add_noise", {"original_samples": X, "noise": X, "timesteps": T + 300}, r"\[305, 1000\].*\[0, 1000\)"),
        ("add_noise", {"original_samples": X, "noise": X, "timesteps": -T}, r"\[-5, -700\]"),
        ("add_noise", {"original_samples": X, "noise": X, "timesteps": T.float()}, r"700\.\]\).*int64"),
        ("add_noise", {"original_samples": X, "noise": X, "timesteps": T > 9}, "True.*int64"),
        ("add_noise", {"original_samples": X, "noise": X, "timesteps": 5}, "t is 5"),
        ("add_noise", {"original_samples": X, "noise": X, "timesteps": torch.arange(3)}, r"3 entries.*\(2, 3, 4, 4\)"),
        ("add_noise", {"original_samples": X.byte(), "noise": X, "timesteps": T}, "uint8"),
        ("q_step", {"x_prev": X, "t": T + 300, "prev_t": T, "noise": X}, r"\[305, 1000\].*\[0, 1000\)"),
        ("q_step", {"x_prev": X, "t": T, "prev_t": T, "noise": X}, r"prev_t is \[5, 700\]"),
        ("q_step", {"x_prev": X, "t": T, "prev_t": -T, "noise": X}, r"prev_t is \[-5, -700\]"),
        ("q_step", {"x_prev": X, "t": 5, "prev_t": T, "noise": X}, "t is 5"),
        ("q_step", {"x_prev": X, "t": T, "prev_t": T - 1, "noise": X[:1]}, r"\(2, 3, 4, 4\) and noise \(1, 3, 4, 4\)"),
        ("q_step", {"x_prev": X, "t": torch.arange(3), "prev_t": torch.arange(3) - 1, "noise": X}, "3 entries"),
        ("q_step", {"x_prev": X, "t": T, "prev_t": (T - 1).float(), "noise": X}, "prev_t is tensor.*int64"),
        ("q_step", {"x_prev": X, "t": T, "prev_t": (T - 1).char(), "noise": X}, "prev_t is tensor.*int64"),
        ("q_step", {"x_prev": X, "t": T, "prev_t": [4, 699], "noise": X}, r"prev_t is \[4, 699\].*int64"),
        ("q_step", {"x_prev": X, "t": T, "prev_t": None, "noise": X}, "prev_t is None"),
        ("q_step", {"x_prev": X, "t": T, "prev_t": torch.arange(3), "noise": X}, "prev_t has 3 entries and t has 2"),
        ("q_step", {"x_prev": X.byte(), "t": T, "prev_t": T - 1, "noise": X}, "uint8"),
        ("get_velocity", {"sample": X, "noise": X, "timesteps": T + 300}, "1000"),
        ("snr", {"t": torch.tensor([1000])}, "1000"),
        ("q_mean_variance", {"x_0": X, "t": T + 300}, "1000"),
        ("q_posterior_mean_variance", {"x_0": X, "x_t": X[:, :1], "t": T}, r"\(2, 3, 4, 4\).*\(2, 1, 4, 4\)"),
        ("q_posterior_mean_variance", {"x_0": X, "x_t": X, "t": T + 300}, "1000"),
        ("q_posterior_mean_variance", {"x_0": X, "x_t": X, "t": torch.arange(3)}, "3 entries"),
        ("q_posterior_mean_variance", {"x_0": X, "x_t": X, "t": T, "prev_t": T}, r"prev_t is \[5, 700\]"),
        ("q_posterior_mean_variance", {"x_0": X, "x_t": X, "t": T, "prev_t": T - 100}, r"prev_t is \[-95, 600\]"),
        ("p_mean_variance", {"model_output": X, "t": -T, "x_t": X}, r"\[-5, -700\]"),
        ("p_mean_variance", {"model_output": X, "t": 5, "x_t": X}, "t is 5"),
        ("p_mean_variance", {"model_output": X[:, :1], "t": T, "x_t": X}, r"\(2, 1, 4, 4\)"),
        ("convert_prediction", {"prediction": X, "t": T, "x_t": X, "source": "x", "target": "sample"}, "source is 'x'"),
        ("convert_prediction", {"prediction": X, "t": T, "x_t": X, "source": "sample", "target": "v"}, "target is 'v'"),
        ("convert_prediction", {"prediction": X, "t": -T, "x_t": X, "source": "sample", "target": "epsilon"}, "-700"),
    ],
)
def test_bad_arguments_are_named_in_the_error(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(DDPMScheduler(), method)(**arguments)


def test_bad_calls():
    with pytest.raises(TypeError, match="15 arguments, got 16"):
        DDPMScheduler(*range(16))
    with pytest.raises(TypeError, match="num_train_timesteps"):
        DDPMScheduler(1000, num_train_timesteps=1000)
    scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="steps_offset"):
        DDPMScheduler(steps_offset=1).set_timesteps(1000)
    scheduler.set_timesteps(50)
    with pytest.raises(ValueError, match=r"timestep is 501: .*980, 960"):
        scheduler.step(X, 501, X)
    with pytest.raises(ValueError, match="descending"):
        scheduler.set_timesteps(timesteps=[3, 5])
    assert scheduler.num_inference_steps == 50  # the rejected call changed nothing
