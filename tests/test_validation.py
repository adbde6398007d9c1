"""Validation on held-out images: against a plain loop in float64, and in whole runs, which it must not change."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddpm_pipeline import DDPMPipeline, DDPMScheduler, fidelity, likelihood, rng
from ddpm_pipeline.features import make_extractor
from tests.arrays import random_images, save_images
from tests.schedules import alpha_bar_table
from tests.short_run import SHORT_RUN, flags, run_here
from training.data.split import load_data_split
from training.run import checkpoint, validation
from training.run.validation import (
    BAND_EDGES,
    STRATA,
    TIMESTEPS_PER_IMAGE,
    Validation,
    band_names,
    kernel_distance,
)

SHAPE = (2, 3, 5)
CPU = torch.device("cpu")


def make_scheduler(num_steps=1000, **options):
    return DDPMScheduler(num_train_timesteps=num_steps, **options)


def random_pixels(count, dtype=np.uint8, seed=0):
    return random_images(count, *SHAPE, seed=seed, dtype=dtype)


def scale(pixels):
    """Pixels to [-1, 1], float64."""
    return torch.from_numpy(pixels.astype(np.float64)) * 2 / np.iinfo(pixels.dtype).max - 1


def network(x_t, t):
    """An arbitrary function of each image and its timestep."""
    return torch.tanh(2 * x_t) * (1 + t.view(-1, 1, 1, 1) / 1000)


def validate(pixels, scheduler, network=network, *, batch_size=64, rank=0, world_size=1, **options):
    held_out = Validation(
        pixels, len(pixels), scheduler, device=CPU, batch_size=batch_size, rank=rank, world_size=world_size
    )
    return held_out.measure(network, **options)[0]


def timesteps_of_loss(pixels, scheduler):
    """The timesteps that the loss is measured at: (N, TIMESTEPS_PER_IMAGE)."""
    calls = []

    def record(x_t, t):
        calls.append(t)
        return network(x_t, t)

    validate(pixels, scheduler, record)
    return torch.stack(calls[:TIMESTEPS_PER_IMAGE], dim=1)  # in one batch, and before the calls for the bound


def slow_losses(pixels, scheduler, t):
    """Mean squared error of each image at each of its timesteps, in a plain loop and float64: like t in shape."""
    losses = torch.zeros(t.shape, dtype=torch.float64)
    for i, x_0 in enumerate(scale(pixels)):
        for k in range(TIMESTEPS_PER_IMAGE):
            key = rng.key(validation.SEED, rng.Stream.VALIDATION_NOISE, k)
            eps = rng.normal(key, torch.tensor([i]), SHAPE)[0].double()
            alpha_bar = alpha_bar_table(scheduler)[t[i, k]]
            signal, noise_std = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
            x_t = signal * x_0 + noise_std * eps
            target = {"epsilon": eps, "sample": x_0, "v_prediction": signal * eps - noise_std * x_0}
            prediction = network(x_t[None], t[i, k : k + 1])[0]
            losses[i, k] = (prediction - target[scheduler.prediction_type]).square().mean()
    return losses


# ---- The loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_loss_equals_a_plain_loop(prediction_type, dtype):
    scheduler, pixels = make_scheduler(prediction_type=prediction_type), random_pixels(16, dtype)
    t = timesteps_of_loss(pixels, scheduler)
    losses = slow_losses(pixels, scheduler, t)
    metrics = validate(pixels, scheduler)
    assert metrics["validation_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    log_snr = alpha_bar_table(scheduler)[t].logit()
    for name, low, high in zip(band_names(), (-math.inf, *BAND_EDGES), (*BAND_EDGES, math.inf)):
        losses_in_band = losses[(low < log_snr) & (log_snr <= high)]
        assert len(losses_in_band) > 1
        assert metrics[f"validation_loss/{name}"] == pytest.approx(losses_in_band.mean().item(), rel=1e-5)


def test_the_loss_of_perfect_and_of_zero_predictions():
    """0, and the mean square of the target."""
    scheduler, pixels = make_scheduler(prediction_type="sample"), random_pixels(8)
    x_0 = scale(pixels)
    metrics = validate(pixels, scheduler, lambda x_t, t: x_0.float())
    assert metrics["validation_loss"] < 1e-13
    metrics = validate(pixels, scheduler, lambda x_t, t: torch.zeros_like(x_t))
    assert metrics["validation_loss"] == pytest.approx(x_0.square().mean().item(), rel=1e-6)


@pytest.mark.parametrize(("count", "num_steps"), [(5, 1000), (25, 100), (25, 50), (3, 7), (2, 1)])
def test_timesteps_are_spread_evenly(count, num_steps):
    """N images with 4 timesteps each: one in each of 4 N equal intervals of [0, T)."""
    pairs = count * TIMESTEPS_PER_IMAGE
    t = timesteps_of_loss(random_pixels(count), make_scheduler(num_steps)).flatten().sort().values
    if num_steps >= pairs:
        assert (t * pairs // num_steps).tolist() == list(range(pairs))
    assert t.tolist() == [int((k + 0.5) * num_steps / pairs) for k in range(pairs)]


def test_timesteps_of_an_image_are_independent_of_its_index():
    """No image has only early or only late timesteps, as it would if they were assigned in order."""
    t = timesteps_of_loss(random_pixels(64), make_scheduler()).double()
    assert ((t.mean(1) - 500).abs() < 480).all() and t.mean(1).std() > 50
    assert abs(np.corrcoef(t[:, 0], np.arange(64))[0, 1]) < 0.4  # 3 standard errors of 64 independent ones


@pytest.mark.parametrize("band", range(5))
def test_errors_at_one_noise_level_are_in_its_band_only(band):
    assert band_names() == [
        "log_snr_below_-4", "log_snr_-4_to_-1", "log_snr_-1_to_1", "log_snr_1_to_4", "log_snr_above_4",
    ]  # fmt: skip
    scheduler, pixels = make_scheduler(prediction_type="sample"), random_pixels(16)
    low, high = (-math.inf, *BAND_EDGES)[band], (*BAND_EDGES, math.inf)[band]
    x_0 = scale(pixels).float()

    def wrong_in_one_band(x_t, t):
        log_snr = alpha_bar_table(scheduler)[t].logit()
        return x_0 + ((low < log_snr) & (log_snr < high)).float().view(-1, 1, 1, 1)

    metrics = validate(pixels, scheduler, wrong_in_one_band)
    losses = [metrics[f"validation_loss/{name}"] for name in band_names()]
    assert losses == pytest.approx([float(i == band) for i in range(5)], abs=1e-6)
    log_snr = alpha_bar_table(scheduler)[timesteps_of_loss(pixels, scheduler)].logit()
    fraction = ((low < log_snr) & (log_snr < high)).double().mean().item()
    assert metrics["validation_loss"] == pytest.approx(fraction, abs=1e-6) and fraction > 0


def test_a_band_without_timesteps_is_left_out():
    metrics = validate(random_pixels(4), make_scheduler(10, beta_end=1e-3))
    assert [name for name in metrics if "/" in name] == ["validation_loss/log_snr_above_4"]
    assert metrics["validation_loss"] == metrics["validation_loss/log_snr_above_4"]


# ---- Bits per dimension ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "levels"), [(np.uint8, 256), (np.uint16, 65536)])
@pytest.mark.parametrize("num_steps", [1000, 4, 1])
def test_bits_per_dim_are_the_variational_bound(dtype, levels, num_steps):
    scheduler, pixels = make_scheduler(num_steps), random_pixels(7, dtype)
    strata = min(STRATA, max(1, num_steps - 1))
    bound = likelihood.variational_bound(network, scheduler, scale(pixels).float(), strata=strata, levels=levels)
    bits_per_dim = bound.total / (math.prod(SHAPE) * math.log(2))
    metrics = validate(pixels, scheduler, batch_size=3)
    assert metrics["bits_per_dim"] == pytest.approx(bits_per_dim.mean().item(), rel=1e-5)
    standard_error = np.std(bits_per_dim.numpy(), ddof=1) / math.sqrt(7)
    assert metrics["bits_per_dim_standard_error"] == pytest.approx(standard_error, rel=1e-5)


# ---- Images, batches, ranks ------------------------------------------------------------------------------------------


def test_images_are_chosen_evenly():
    pixels = random_pixels(10)
    four = Validation(pixels, 4, make_scheduler(), device=CPU)
    assert four.num_images == 4 and np.array_equal(four.pixels, pixels[[0, 2, 5, 7]])
    assert four.measure(network)[0] == validate(pixels[[0, 2, 5, 7]], make_scheduler())
    all_images = Validation(pixels, 99, make_scheduler(), device=CPU)
    assert all_images.num_images == 10 and np.array_equal(all_images.pixels, pixels)
    assert Validation(pixels[:0], 99, make_scheduler(), device=CPU).num_images == 0


def test_a_single_image_has_no_standard_error():
    metrics = validate(random_pixels(1), make_scheduler())
    assert math.isfinite(metrics["bits_per_dim"]) and "bits_per_dim_standard_error" not in metrics


def test_the_result_does_not_depend_on_batch_size_or_the_random_state_of_torch():
    pixels, scheduler = random_pixels(9), make_scheduler()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    metrics = validate(pixels, scheduler)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert validate(pixels, scheduler) == metrics
    for batch_size in (1, 4):
        assert validate(pixels, scheduler, batch_size=batch_size) == pytest.approx(metrics, rel=1e-6)
    assert validate(random_pixels(9, seed=1), scheduler)["validation_loss"] != metrics["validation_loss"]


@pytest.mark.parametrize(("count", "world_size"), [(9, 2), (9, 4), (2, 3)])
def test_several_ranks_give_the_result_of_one(count, world_size):
    """Each rank contributes its values and gets those of all; one may have no image."""
    pixels, scheduler = random_pixels(count), make_scheduler()
    of_one_rank = []  # its losses, then its bits
    expected = validate(pixels, scheduler, gather=lambda values: of_one_rank.append(values) or values)
    contributions = []  # the same for each rank

    def collect(values):
        contributions.append(values)
        return of_one_rank[(len(contributions) - 1) % 2]

    for rank in range(world_size):
        validate(pixels, scheduler, rank=rank, world_size=world_size, gather=collect)
    gathered = [[part for values in contributions[kind::2] for part in values] for kind in (0, 1)]
    for rank in range(world_size):
        answers = iter(gathered)
        metrics = validate(
            pixels, scheduler, rank=rank, world_size=world_size, gather=lambda _, answers=answers: next(answers)
        )
        assert metrics == pytest.approx(expected, rel=1e-5)


def test_standard_error_keeps_its_digits_beside_a_large_mean():
    """1e6 bits with a standard deviation of 1: in float32 sums of squares nothing of it would be left."""
    pixels, scheduler = random_pixels(9), make_scheduler()
    values = [1e6 + i for i in range(9)]
    answers = iter([[(list(range(9)), [[1.0] * TIMESTEPS_PER_IMAGE] * 9)], [(list(range(9)), values)]])
    metrics = validate(pixels, scheduler, gather=lambda _: next(answers))
    assert metrics["bits_per_dim"] == pytest.approx(np.mean(values), rel=1e-15)
    assert metrics["bits_per_dim_standard_error"] == pytest.approx(np.std(values, ddof=1) / 3, rel=1e-12)


# ---- Kernel distance -------------------------------------------------------------------------------------------------


def test_kernel_distance_is_that_of_the_features(tmp_path):
    extractor, held_out = make_extractor("pixels", images=random_pixels(1)), random_pixels(12, seed=2)
    samples = scale(random_pixels(8)) * 1.5  # some outside [-1, 1]
    metrics = kernel_distance(samples, held_out, extractor, tmp_path)
    clipped = ((samples.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    expected = fidelity.kernel_distance(extractor(clipped), extractor(torch.from_numpy(held_out)))
    assert metrics == {
        "kernel_distance": pytest.approx(expected.value),
        "kernel_distance_standard_error": pytest.approx(expected.standard_error),
    }


@pytest.mark.parametrize(("num_distinct", "held_out"), [(8, random_pixels(1)), (1, random_pixels(8))])
def test_undefined_kernel_distance_is_left_out_with_a_warning(tmp_path, capsys, num_distinct, held_out):
    extractor = make_extractor("pixels", images=held_out)
    samples = scale(random_pixels(num_distinct)).expand(8, -1, -1, -1)
    assert kernel_distance(samples, held_out, extractor, tmp_path) == {}
    assert "WARNING: kernel distance skipped" in capsys.readouterr().err


# ---- Whole runs ------------------------------------------------------------------------------------------------------

OPTIONS = SHORT_RUN | {
    "train_batch_size": 4,
    "max_train_steps": 5,
    "validation_steps": 2,
    "num_validation_images": 8,
    "save_images_steps": 0,
    "num_sample_images": 2,
    "ddpm_num_inference_steps": 3,
    "checkpointing_steps": 3,
    "checkpoints_total_limit": 1,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("validation")


def train(work, name, **options):
    """Run train.py in this process, on the moons by default: its exit code."""
    options = {"output_dir": work / name, "cache_dir": work / "cache", **OPTIONS, **options}
    if "train_data_dir" not in options:
        options |= {"dataset_name": "moons", "resolution": 16}
    return run_here("train.py", flags(options))


def read_validations(folder):
    """The entries of metrics.jsonl that a validation wrote."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "validation_loss" in entry]


@pytest.fixture(scope="module")
def uninterrupted(work):
    assert train(work, "uninterrupted", validation_samples=16, extractor="pixels") == 0
    return work / "uninterrupted"


def test_a_run_validates_at_intervals_and_at_its_end(uninterrupted):
    entries = read_validations(uninterrupted)
    assert [(entry["step"], entry["images"]) for entry in entries] == [(2, 8), (4, 16), (5, 20)]
    for entry in entries:
        assert {"validation_loss", "bits_per_dim", "bits_per_dim_standard_error"} < entry.keys()
        assert {"kernel_distance", "kernel_distance_standard_error"} < entry.keys()
        assert {name.partition("/")[2] for name in entry if "/" in name} <= set(band_names())
        assert all(math.isfinite(value) for value in entry.values())
    assert entries[0]["validation_loss"] > entries[2]["validation_loss"] > 0


def test_a_run_validates_its_ema_weights_on_the_test_split(uninterrupted, work):
    split = load_data_split(dataset_name="moons", resolution=16, cache_dir=work / "cache")
    assert len(split.train_indices) == 8192 and len(split.held_out) == 1024
    pipe = DDPMPipeline.from_pretrained(uninterrupted / "pipeline")
    pipe.set_progress_bar_config(disable=True)

    def measure():
        held_out = Validation(split.held_out, 8, pipe.scheduler, device=CPU, batch_size=4)
        metrics, _ = held_out.measure(lambda x_t, t: pipe.unet(x_t, t, return_dict=False)[0])
        samples = pipe(seeds=list(range(1_000_000, 1_000_016)), num_inference_steps=3, output_type="latent").images
        extractor = make_extractor("pixels", images=split.train_images)
        return metrics | kernel_distance(samples, split.held_out, extractor, work / "cache" / "features")

    logged = {
        name: value for name, value in read_validations(uninterrupted)[-1].items() if name not in ("step", "images")
    }
    assert measure() == pytest.approx(logged, rel=1e-4)
    pipe.unet.load_state_dict(load_file(uninterrupted / "checkpoint-000005" / "model.safetensors"))
    assert abs(measure()["validation_loss"] / logged["validation_loss"] - 1) > 1e-3


def test_validation_does_not_change_training(uninterrupted, work):
    assert train(work, "without", validation_steps=0) == 0
    assert read_validations(work / "without") == []
    files, files_without = (
        checkpoint.verify(folder / "checkpoint-000005")["files"] for folder in (uninterrupted, work / "without")
    )
    assert files == files_without


def test_a_resumed_run_validates_the_same(uninterrupted, work):
    save = checkpoint.save

    def save_and_die(*args, **options):
        save(*args, **options)
        raise KeyboardInterrupt

    options = {"validation_samples": 16, "extractor": "pixels"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(work, "resumed", **options)
    assert [entry["step"] for entry in read_validations(work / "resumed")] == [2]
    assert train(work, "resumed", resume_from_checkpoint="latest", **options) == 0
    assert read_validations(work / "resumed") == read_validations(uninterrupted)


def test_every_20th_image_of_a_folder_is_held_out(work, capsys):
    folder = save_images(work / "45", 45, 16, 16, name="{:03}.png")
    assert train(work, "43 of 45", train_data_dir=folder, max_train_steps=2) == 0
    manifest = checkpoint.verify(work / "43 of 45" / "checkpoint-000002")
    assert manifest["num_images"] == 43
    assert manifest["held_out"] == "one in 20 of 45 images, not trained on"
    output = capsys.readouterr().out
    assert (
        "43 images, 1 x 16 x 16" in output and "held out: 2 images, one in 20 of 45 images, not trained on\n" in output
    )
    assert [entry["step"] for entry in read_validations(work / "43 of 45")] == [2]
    options = {"validation_split": "none", "max_train_steps": 2}
    assert train(work, "all 45", train_data_dir=folder, **options) == 0
    assert checkpoint.verify(work / "all 45" / "checkpoint-000002")["num_images"] == 45
    assert read_validations(work / "all 45") == [] and "held out" not in capsys.readouterr().out


def test_a_single_held_out_image_does_not_end_the_run(work, capsys):
    folder = save_images(work / "25", 25, 16, 16, name="{:03}.png")
    options = {"max_train_steps": 2, "validation_samples": 4, "extractor": "pixels"}
    assert train(work, "24 of 25", train_data_dir=folder, **options) == 0
    (entry,) = read_validations(work / "24 of 25")
    assert entry["validation_loss"] > 0 and "kernel_distance" not in entry
    assert "WARNING: kernel distance skipped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_validation_images": 1}, "num_validation_images is 1"),
        ({"validation_steps": -1}, "validation_steps is -1"),
        ({"validation_samples": 1}, "validation_samples is 1"),
        ({"validation_samples": -2}, "validation_samples is -2"),
        ({"validation_samples": 16, "validation_steps": 0}, "validation_steps is 0"),
        ({"validation_split": "valid"}, "validation_split is 'valid'"),
        ({"validation_split": "train"}, "validation_split is 'train'"),
        ({"validation_samples": 16, "extractor": "eyes"}, "extractor is 'eyes'"),
    ],
)
def test_invalid_options_are_named(work, capsys, options, message):
    assert train(work, "mistake", **options) == 2
    assert message in capsys.readouterr().err
    assert not list((work / "mistake").glob("checkpoint-*"))
