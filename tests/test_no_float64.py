"""On a device without float64, as Apple's GPUs are, everything works and gives what the CPU gives."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from ddpm_pipeline import (
    DDPMPipeline,
    DDPMScheduler,
    classifier,
    fidelity,
    likelihood,
    objective,
    rng,
    timesteps,
    visualize,
)
from ddpm_pipeline.pixels import from_pixels, to_pixels
from ddpm_pipeline.scheduling_ddpm import PREDICTION_TYPES, VARIANCE_TYPES
from tests.arrays import normal, random_images, save_images
from tests.models import quiet, tiny_unet
from tests.no_float64 import DEVICE, PretendDevice
from tests.short_run import NETWORK, SHORT_RUN, flags, run_here
from training.denoiser import PRESETS

T = torch.tensor([0, 3, 19])
PREV_T = torch.tensor([-1, 1, 18])
X = normal(3, 1, 8, 8, dtype=torch.float32).clamp(-1, 1)
EPS = normal(3, 1, 8, 8, seed=1, dtype=torch.float32)
OUTPUT = normal(3, 1, 8, 8, seed=2, dtype=torch.float32)
FEATURES, REFERENCE = normal(40, 6, dtype=torch.float32), normal(30, 6, seed=1, dtype=torch.float32)


@pytest.fixture(autouse=True)
def parameters_keep_their_class():
    """Otherwise `Module.to` puts the values of the pretend device's tensors into parameters of the CPU."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(before)


def leaves(value):
    """Plain numbers and arrays of a result, whatever it is made of."""
    if isinstance(value, torch.Tensor):
        return [value.cpu().double().numpy()]
    if isinstance(value, np.ndarray):
        return [value.astype(np.float64)]
    if isinstance(value, (int, float)):
        return [np.float64(value)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [] if value is None else [leaf for item in value for leaf in leaves(item)]


def same_on_the_device(function, *tensors, rtol=2e-5, atol=2e-6):
    """function(device, *tensors) on the CPU and on the pretend device."""
    expected = leaves(function("cpu", *(tensor.clone() for tensor in tensors)))
    with PretendDevice():
        actual = leaves(function(DEVICE, *(tensor.to(DEVICE) for tensor in tensors)))
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def scheduler(**options):
    return DDPMScheduler(**{"num_train_timesteps": 20, "timestep_spacing": "trailing", **options})


def network(x_t, t):
    return torch.tanh(x_t * (0.5 + t.to(x_t.dtype).view(-1, *[1] * (x_t.ndim - 1)) / 40))


def importance(losses, t):
    sampler = timesteps.ImportanceSampling(30, t.device)
    mean = [sampler.mean(losses, t) for _ in range(10)]
    sampler.update(torch.zeros((), device=t.device))
    return mean, sampler.probabilities(), sampler.draw(seed=0, step=1, index=torch.arange(50))


def steps(s, output, x):
    s.set_timesteps(5)
    for t in s.timesteps:
        x = s.step(output, t, x, variance_noise=x).prev_sample
    return x


CALLS = {
    "snr": (lambda d, t: scheduler().snr(t), T),
    "alpha_bars": (lambda d, t, prev_t: scheduler().alpha_bars(t, prev_t), T, PREV_T),
    "add_noise": (lambda d, x, eps, t: scheduler().add_noise(x, eps, t), X, EPS, T),
    "get_velocity": (lambda d, x, eps, t: scheduler().get_velocity(x, eps, t), X, EPS, T),
    "q_mean_variance": (lambda d, x, t: scheduler().q_mean_variance(x, t), X, T),
    "q_step": (lambda d, x, t, prev_t, eps: scheduler().q_step(x, t, prev_t, eps), X, T, PREV_T, EPS),
    "q_posterior_mean_variance": (lambda d, x, y, t: scheduler().q_posterior_mean_variance(x, y, t), X, EPS, T),
    "step": (lambda d, output, x: steps(scheduler(), output, x), OUTPUT, X),
    "threshold": (lambda d, output, x: steps(scheduler(thresholding=True, sample_max_value=2.0), output, x), OUTPUT, X),
    "noised_batch": (lambda d, x, t, eps: objective.noised_batch(scheduler(), x, t, eps), X, T, EPS),
    "draw_noised_batch": (
        lambda d, x: objective.draw_noised_batch(scheduler(), x, seed=1, step=2, index=torch.arange(3)), X,
    ),
    "draw_noised_batch, options": (
        lambda d, x: objective.draw_noised_batch(
            scheduler(), x, seed=1, step=2, index=torch.arange(3), timestep_sampling="logit_normal",
            noise_candidates=3, input_perturbation=0.1,
        ), X,
    ),
    "importance": (lambda d, losses, t: importance(losses, t), torch.linspace(0.5, 1, 30), torch.arange(30)),
    "simple_loss": (lambda d, a, b: objective.simple_loss(a, b), X, EPS),
    "bound_weight": (lambda d, t: objective.bound_weight(scheduler(), t), T[1:]),
    "uniform": (lambda d, index: rng.uniform(3, index), T),
    "integers": (lambda d, index: rng.integers(3, index, 100), T),
    "normal": (lambda d, index: rng.normal(3, index, (2, 3)), T),
    "bound": (
        lambda d, x: likelihood.rate_distortion(likelihood.variational_bound(network, scheduler(), x), (1, 8, 8)), X,
    ),
    "bound, own": (
        lambda d, x: likelihood.variational_bound(network, scheduler(), x, strata=3, last_variance="own", levels=None),
        X,
    ),
    "flow": (lambda d, x: likelihood.probability_flow_nats(network, scheduler(), x, rtol=1e-6, atol=1e-6), X),
    "flow, exact": (
        lambda d, x: likelihood.probability_flow_nats(network, scheduler(), x, probes=None), X[..., :2, :2],
    ),
    "dequantise": (lambda d, pixels: likelihood.dequantise(pixels), torch.from_numpy(random_images(2, 1, 8, 8))),
    "frechet_distance": (lambda d, a, b: fidelity.frechet_distance(a, b), FEATURES, REFERENCE),
    "kernel_distance": (lambda d, a, b: fidelity.kernel_distance(a, b), FEATURES, REFERENCE),
    "precision_recall": (lambda d, a, b: fidelity.precision_recall(a, b), FEATURES, REFERENCE),
    "density_coverage": (lambda d, a, b: fidelity.density_coverage(a, b), FEATURES, REFERENCE),
    "nearest": (lambda d, a, b: fidelity.nearest(a, b), FEATURES, REFERENCE),
    "memorisation": (lambda d, a, b: fidelity.memorisation(a[:10], b, a[10:]), FEATURES, REFERENCE),
    "jackknife": (lambda d, a, b: fidelity.jackknife(fidelity.frechet_distance, a, b, 4), FEATURES, REFERENCE),
    "to_pixels": (lambda d, x: to_pixels(x), X),
    "to_pixels, 16 bits": (lambda d, x: to_pixels(x, np.uint16), X),
    "from_pixels": (lambda d: from_pixels(random_images(2, 1, 8, 8), d),),
    "from_pixels, 16 bits": (lambda d: from_pixels(random_images(2, 1, 8, 8, dtype=np.uint16), d),),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_functions(name):
    function, *tensors = CALLS[name]
    same_on_the_device(function, *tensors)


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predictions(prediction_type, variance_type):
    def moments(device, output, t, x_t, prev_t):
        s = scheduler(prediction_type=prediction_type, variance_type=variance_type)
        both = torch.cat([output, output], dim=1) if variance_type.startswith("learned") else output
        converted = [s.convert_prediction(output, t, x_t, prediction_type, target) for target in PREDICTION_TYPES]
        return s.p_mean_variance(both, t, x_t, prev_t), converted, steps(s, both, x_t)

    same_on_the_device(moments, OUTPUT, T, X, PREV_T, rtol=1e-4, atol=1e-5)


IMAGES = random_images(2, 8, 8, 1)
PIPELINE_CALLS = {
    "call": lambda pipe: pipe(seeds=[1, 2]).images,
    "latent": lambda pipe: pipe(seeds=[1, 2], output_type="latent", eta=0.5).images,
    "trajectory": lambda pipe: [step.x_t for step in pipe.trajectory(seeds=[1, 2])],
    "noising": lambda pipe: [step.x_t for step in pipe.trajectory(image=IMAGES, seeds=[1, 2])],
    "invert": lambda pipe: pipe.invert(IMAGES, fixed_point_iterations=2),
    "fuse": lambda pipe: pipe.fuse(IMAGES[:1], IMAGES[1:], [0.2, 0.5], output_type="np"),
    "fuse several": lambda pipe: pipe.fuse(IMAGES, weight=[0.3, 0.7], output_type="np"),
    "fuse, balance": lambda pipe: pipe.fuse(IMAGES[:1], IMAGES[1:], balance=True, output_type="np"),
    "fuse, noise": lambda pipe: pipe.fuse(IMAGES[:1], IMAGES[1:], path="noise", seeds=[1], output_type="np"),
    "vary": lambda pipe: pipe.vary(IMAGES, 0.5, seeds=[1, 2], output_type="np").images,
    "inpaint": lambda pipe: pipe.inpaint(IMAGES, np.eye(8) > 0, seeds=[1, 2], output_type="np").images,
    "images on the device": lambda pipe: pipe.vary(X[:2].to(pipe.device), 0.5, seeds=[1, 2], output_type="pt").images,
    "a mask on the device": lambda pipe: (
        pipe.inpaint(X[:2].to(pipe.device), torch.eye(8).to(pipe.device), seeds=[1, 2], output_type="pt").images
    ),
    "latents on the device": lambda pipe: pipe(latents=X.to(pipe.device), eta=0.0).images,
    "strip": lambda pipe: [visualize.strip(list(pipe.trajectory(seeds=[1, 2])))],
}


@pytest.mark.parametrize("name", PIPELINE_CALLS)
def test_pipeline(name):
    def run(device):
        pipe = quiet(DDPMPipeline(tiny_unet(), scheduler(num_train_timesteps=8)))
        return [
            np.asarray(value) if not isinstance(value, torch.Tensor) else value for value in results(pipe.to(device))
        ]

    def results(pipe):
        output = PIPELINE_CALLS[name](pipe)
        return output.values() if isinstance(output, dict) else output

    same_on_the_device(run, rtol=1e-3, atol=1e-4)


RUN = {
    **SHORT_RUN, "max_train_steps": 3, "train_batch_size": 4, "ddpm_num_inference_steps": 4, "validation_steps": 2,
    "num_validation_images": 2, "validation_samples": 4, "extractor": "classifier",
}  # fmt: skip
EVALUATION = {
    "num_samples": 16, "num_inference_steps": 3, "weights": "ema", "extractor": "pixels", "num_reference": 16,
    "metrics": "bound,kernel,frechet,precision,density,memorisation", "num_bound_images": 2, "strata": 8,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_training_and_evaluation(tmp_path, monkeypatch):
    """A run and its evaluation give the numbers that they give on the CPU."""
    monkeypatch.setitem(PRESETS, "tiny", NETWORK)  # a file of a network is tried on another device
    monkeypatch.setattr(classifier, "BATCH_SIZE", 4)
    monkeypatch.setattr(classifier, "LEAST_STEPS", 20)
    paths = {"train_data_dir": save_images(tmp_path / "data", 60, 8, 8), "cache_dir": tmp_path / "cache"}
    paths |= {"denoiser": "tiny"}

    def numbers(name):
        run = tmp_path / name
        assert run_here("train.py", flags(RUN | paths | {"output_dir": run})) == 0
        assert run_here("evaluate.py", [str(run), *flags(EVALUATION | {"cache_dir": paths["cache_dir"]})]) == 0
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        logged = [value for line in lines for key, value in line.items() if "second" not in key]
        return logged + [m["value"] for m in json.loads((run / "report.json").read_text())["measurements"]]

    expected = numbers("cpu")
    monkeypatch.setattr(Accelerator, "device", property(lambda self: DEVICE))
    with PretendDevice():
        actual = numbers("device")
    assert len(expected) > 40
    np.testing.assert_allclose(actual, expected, rtol=1e-2)
