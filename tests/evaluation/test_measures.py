"""Distances and bits per dimension: which sets are compared, the real-data baseline, and the division among ranks."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from ddpm_pipeline import fidelity
from ddpm_pipeline.features import extract_features, make_extractor
from tests.arrays import random_images
from tests.evaluation.helpers import data_split, fake_runtime, numbered_images, numbers_of
from tests.models import tiny_pipe
from training.data.classes import Classes
from training.data.split import evenly_spaced
from training.evaluation.config import METRICS
from training.evaluation.measures import (
    HeldOutBits,
    Result,
    class_accuracies,
    compare_channels,
    compare_features,
    make_measurement,
    measure_accuracy,
    variance_types,
)
from training.evaluation.reference import choose_real_images
from training.evaluation.samples import Model, SamplerConfig


def compare(samples, real, cache_dir, metrics=METRICS):
    extractor = make_extractor("pixels", images=real.reference)
    return list(compare_features(samples, real, extractor, metrics, cache_dir))


# ---- Samples ---------------------------------------------------------------------------------------------------------


def test_a_baseline_of_six_images_is_enough_for_every_measure(tmp_path):
    samples, train, held_out = (random_images(n, 1, 8, 8, seed=n) for n in (16, 12, 6))
    real = choose_real_images(data_split(train, held_out), 0, 16)
    results = [*compare(samples, real, tmp_path), *compare_channels(samples, real)]
    assert len(results) == 9 and all(result.real_data_baseline is not None for result in results)


def test_memorisation_detects_copies_of_training_images_only(tmp_path):
    train, held_out = (random_images(20, 1, 8, 8, seed=seed) for seed in (0, 1))
    real = choose_real_images(data_split(train, held_out), 0, 20)
    for samples, value in ((train, 1), (held_out, 0.5)):
        (result,) = compare(samples, real, tmp_path, ["memorisation"])
        assert result.estimate.value == pytest.approx(value) and result.real_data_baseline == 0.5


def test_the_baseline_is_not_compared_with_itself(tmp_path):
    """Of 24 training images 12 are the baseline; compared with all 24 it would be too low."""
    samples, train = (random_images(n, 1, 2, 2, seed=n) for n in (16, 24))
    real = choose_real_images(data_split(train, train[:0]), 0, 16)
    extractor = make_extractor("pixels", images=train)
    others = np.delete(train, np.s_[::2], 0)
    baseline, reference = (extract_features(extractor, pixels) for pixels in (train[::2], others))
    wanted = {
        "frechet_distance": fidelity.frechet_distance(baseline, reference),
        "kernel_distance": fidelity.kernel_distance(baseline, reference).value,
        "precision": fidelity.precision_recall(baseline, reference)[0],
        "recall": fidelity.precision_recall(baseline, reference)[1],
        "density": fidelity.density_coverage(baseline, reference)[0],
        "coverage": fidelity.density_coverage(baseline, reference)[1],
    }
    results = compare(samples, real, tmp_path)
    assert {result.measure: result.real_data_baseline for result in results} == pytest.approx(wanted)
    shifts = {result.measure: result.real_data_baseline for result in compare_channels(samples, real)}
    (shift,) = fidelity.channel_shift(train[::2], others)
    assert shifts == pytest.approx({"mean_shift": shift.mean.value, "std_ratio": shift.std_ratio.value})


def test_each_colour_channel_is_a_separate_measurement():
    samples, train = (random_images(n, 3, 4, 4, seed=n) for n in (16, 40))
    results = list(compare_channels(samples, choose_real_images(data_split(train, train[:0]), 0, 16)))
    assert [(result.measure, result.channel) for result in results] == [
        (measure, channel) for channel in range(3) for measure in ("mean_shift", "std_ratio")
    ]
    assert results[2].name == "brightness difference, channel 1"


def test_a_measurement_has_the_keys_of_the_report():
    scheduler = tiny_pipe().scheduler
    model = Model(SimpleNamespace(scheduler=scheduler), "EMA", "", "", None)
    result = Result("recall", "recall", fidelity.Estimate(0.5, 0.1), 16, 0.9, "pixels-16x16")
    options = {"reference": "40 training images", "primary": True, "seed": 3, "seconds": 1.26}
    measurement = dataclasses.asdict(make_measurement(result, model, SamplerConfig(5, 0.5), **options))
    assert measurement == {
        "measure": "recall", "name": "recall", "value": 0.5, "standard_error": 0.1, "real_data_baseline": 0.9, "n": 16,
        "extractor": "pixels-16x16", "channel": None, "reference": "40 training images", "weights": "EMA",
        "primary": True, "seed": 3, "seconds": 1.3, "sampler": "DDPMScheduler, eta 0.5, trailing",
        "num_inference_steps": 5, "eta": 0.5, "guidance_scale": 1.0, "class_name": None,
    }  # fmt: skip
    of_held_out = make_measurement(result, model, None, **options)
    assert (of_held_out.sampler, of_held_out.num_inference_steps, of_held_out.eta) == (None, None, None)


def test_accuracy_of_each_class_stands_beside_that_of_its_real_images():
    """A stub that sees a class in the value of the pixels. Real images count where it was not trained on them, which
    is one in 20; the others are all misread here. Class 2 has too few samples, and class 1 too few real images."""
    asked = np.repeat([0, 1, 2], [40, 10, 9])
    seen = asked.copy()
    seen[:10] = 1  # of 40
    real_labels = np.repeat([0, 1, 2], [300, 180, 120])
    real_seen = (real_labels + 1) % 3
    real_seen[::20] = real_labels[::20]
    real_seen[:60:20] = 2  # of 15
    held_out = numbered_images(0, 2)
    all_images = np.concatenate([real_seen, [7]]).astype(np.uint8)[:, None, None, None]  # one is not trained on
    split = data_split(all_images, held_out, np.arange(600))
    classes = Classes(("ant", "bee", "cow"), np.append(real_labels, 0), real_labels, np.zeros(2, np.int64))
    classifier = SimpleNamespace(
        predict=lambda images: (np.array(numbers_of(images)), None), accuracy=0.875, name="stub"
    )
    real = SimpleNamespace(split=split, classes=classes)
    accuracies, samples = class_accuracies(classifier, real), seen.astype(np.uint8)[:, None, None, None]
    overall, *of_classes = measure_accuracy(samples, asked, classifier, accuracies)
    assert (overall.measure, overall.class_name, overall.n, overall.real_data_baseline) == ("accuracy", None, 59, 0.875)
    assert overall.estimate.value == pytest.approx(49 / 59)
    assert [(r.class_name, r.n, r.estimate.value, r.real_data_baseline) for r in of_classes] == [
        ("ant", 40, 0.75, 12 / 15), ("bee", 10, 1.0, None)
    ]  # fmt: skip
    assert of_classes[0].estimate.standard_error == pytest.approx(np.sqrt(32 * 12 / 44**3))
    assert {r.measure for r in of_classes} == {"class_accuracy"} and {r.extractor for r in of_classes} == {"stub"}


# ---- Held-out images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_images", "world_size"), [(7, 1), (7, 2), (2, 3), (20, 3)])
def test_ranks_divide_the_held_out_images(num_images, world_size):
    """Each image is measured once; a rank may have none."""
    measured = {}
    for rank in range(world_size):
        options = {"batch_size": 2, "seed": 0, "runtime": fake_runtime(world_size, rank)}
        for index, pixels in HeldOutBits(numbered_images(100, 10), **options)._own_batches(num_images, ""):
            assert 0 < len(index) <= 2
            measured |= dict(zip(index.tolist(), numbers_of(pixels), strict=True))
    wanted = 100 + evenly_spaced(10, num_images)
    assert [measured[i] for i in range(len(wanted))] == wanted.tolist() and len(measured) == len(wanted)


def test_the_order_in_which_ranks_are_gathered_does_not_matter():
    """Results are equal bit for bit, because values are summed in the order of the images."""
    images = random_images(9, 1, 8, 8)
    model = Model(tiny_pipe(), "EMA", "", "", None)
    outcomes = []
    for gather_objects in (lambda parts: parts, lambda parts: parts[::-1]):
        runtime = fake_runtime()
        runtime.gather_objects = gather_objects
        bits = HeldOutBits(images, batch_size=2, seed=0, runtime=runtime)
        outcomes.append((*bits.variational_bound(model, "fixed_small", 9, 8), bits.ode_likelihood(model, 5)))
    assert outcomes[0] == outcomes[1]


def test_the_standard_error_keeps_its_digits_beside_a_large_mean():
    """Nats with a standard deviation of 1e-9 of their mean: in sums of squares nothing of it would be left."""
    bits = HeldOutBits(random_images(4, 1, 2, 2), batch_size=2, seed=0, runtime=fake_runtime())
    deviations = torch.tensor([-3.0, -1.0, 1.0, 3.0], dtype=torch.float64)
    nats = (1e9 + deviations) * 4 * np.log(2)
    result = bits._result("bits_per_dim", "", nats)
    assert result.estimate.standard_error == pytest.approx(deviations.std().item() / 2, rel=1e-6)


def test_variances_with_a_bound():
    assert variance_types(Model(tiny_pipe(), "EMA", "", "", None)) == ["fixed_small", "fixed_large"]
    pipe = SimpleNamespace(scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="the scheduler is DDIMScheduler, not DDPMScheduler: leave out bound and flow"):
        variance_types(Model(pipe, "EMA", "", "", None))
