"""The sentences of report.md: each measure is explained, and what is good or bad about the samples is said."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddpm_pipeline.moons import render
from training.evaluation import moons
from training.evaluation.evaluator import weak_classifier
from training.evaluation.explain import MEANINGS, in_short, meanings
from training.evaluation.measures import Measurement


def measurement(measure, value, baseline, *, error=0.01, primary=True, sampler="DDPM"):
    return Measurement(
        measure=measure, name=measure, value=value, standard_error=error, real_data_baseline=baseline, n=100,
        extractor="pixels", channel=None, reference="images", weights="EMA", primary=primary, seed=0, seconds=0.0,
        sampler=sampler, num_inference_steps=50, eta=1.0, guidance_scale=1.0, class_name=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("measured", "said", "not_said"),
    [
        ([("frechet_distance", 12.0, 3.0)], "4.0 times as far", "about as near"),
        ([("frechet_distance", 3.1, 3.0)], "about as near", "times as far"),
        ([("recall", 0.3, 0.7)], "lack some of the variety", "do not look real"),
        ([("precision", 0.3, 0.7)], "do not look real", "variety"),
        ([("memorisation", 0.9, 0.5)], "copies", "variety"),
        ([("memorisation", 0.61, 0.5)], "", "copies"),  # within two standard errors of the limit
        ([("accuracy", 0.934, 0.991)], "in 93.4% of the samples (in 99.1% of real images)", "times"),
        ([("frechet_distance", 3.0, None), ("recall", 0.3, None)], "", "times"),
        ([("kernel_distance", 0.2, -0.001)], "of the samples is 0.2, that of real images -0.001", "times"),
        ([("kernel_distance", 0.2, -0.001), ("frechet_distance", 3.1, 3.0)], "about as near", "0.2"),
        ([("kernel_distance", 0.2, None)], "", "0.2"),
        ([("frechet_distance", 3.0, 0.0)], "", "times"),
    ],
)
def test_what_the_measures_say_together(measured, said, not_said):
    text = in_short([measurement(*each) for each in measured])
    assert said in text and not_said not in text and bool(said) == bool(text)


def test_only_the_first_sampler_and_extractor_count():
    first, other = measurement("frechet_distance", 3.0, 3.0), measurement("frechet_distance", 30.0, 3.0)
    assert "about as near" in in_short([first, other])
    assert in_short([measurement("recall", 0.1, 0.9, primary=False)]) == ""


def test_every_measure_of_a_report_is_explained(first_report, run):
    measures = {m["measure"] for m in first_report["measurements"]}
    assert measures <= MEANINGS.keys() and len(meanings(sorted(measures))) == len(measures)
    text = (run / "report.md").read_text()
    assert all(MEANINGS[measure] in text for measure in measures)
    assert "**In short:** The samples are" in text  # of an untrained network, far from real images


@pytest.mark.parametrize(
    ("labels", "accuracy", "is_weak"),
    [
        (np.arange(60) % 2, 0.33, True),  # worse than a coin
        (np.arange(60) % 2, 0.9, False),
        (None, 0.3, True),  # of four rotations
        (None, 0.6, False),
        (np.arange(60) % 10, 0.5, False),
        (None, None, False),  # no classifier
    ],
)
def test_a_classifier_that_guesses_is_a_warning(labels, accuracy, is_weak):
    real = SimpleNamespace(split=SimpleNamespace(train_labels=lambda: labels))
    warning = weak_classifier(SimpleNamespace(accuracy=accuracy, name="classifier"), real)
    assert (warning is not None) == is_weak
    if is_weak:
        assert f"right for {accuracy:.0%} of new images" in warning


@pytest.mark.parametrize("is_weak", [True, False])
def test_a_middle_that_is_no_moon_is_said(tmp_path, monkeypatch, is_weak):
    """The distance ratios of a weak model are balanced too."""
    ends = render([moons.HALF, moons.FULL], 16)

    def fuse(self, a, b, weights, **options):
        mean = torch.stack([torch.lerp(ends[0], ends[1], weight) for weight in weights])
        right = render([moons.HALF + weight * math.pi / 2 for weight in weights], 16)
        return SimpleNamespace(images=mean if is_weak else right, network_calls=1)

    pipe = type("Pipe", (), {"fuse": fuse, "set_progress_bar_config": lambda self, **options: None})
    monkeypatch.setattr(moons, "DDPMPipeline", lambda unet, scheduler: pipe())
    text = moons.fuse_moons(SimpleNamespace(config={"sample_size": 16}), None, tmp_path, 5)
    assert ("nearer to the mean of the pixels than to any moon" in text) == is_weak
