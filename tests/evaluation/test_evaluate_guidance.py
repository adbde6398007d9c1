"""Does a model draw the class that was asked for, and what does guidance change? A stub pipeline with known answers.

Images of class c are noise in a band of gray levels. The stub draws the class that was asked for with a known
probability for each guidance scale, and at a high scale images with little noise.
"""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_pipeline import DDPMPipeline, fidelity
from ddpm_pipeline.features import extract_features, make_extractor
from tests.arrays import random_images
from tests.evaluation.helpers import evaluate_here, find_measurement, train
from training.data.split import load_data_split
from training.evaluation.config import EvalConfig
from training.evaluation.guidance import best_scale_text, guidance_effect
from training.evaluation.report import command_line
from training.hub import stage

COUNTS = {"ant": 160, "bee": 240, "cow": 40}
P_ASKED = {1.0: 0.7, 2.0: 0.95, 4.0: 1.0}  # by guidance scale
NUM_SAMPLES = 640


def draw(class_index, seed, noise=60):
    """(1, 16, 16) uint8: `noise` gray levels in the middle of the 60 of a class."""
    return (random_images(1, 16, 16, seed=seed, high=noise) + 90 * class_index + 30 - noise // 2).astype(np.uint8)


def stub_call(self, *, seeds, class_labels, guidance_scale=1.0, guidance_interval=None, **options):
    images = []
    for seed, label in zip(seeds, class_labels):
        chance = np.random.default_rng(seed).random()
        drawn = label if chance < P_ASKED[guidance_scale] else (label + 1) % 3
        images.append(draw(drawn, 10_000 + seed, noise=60 if guidance_scale < 4 else 2))
    return (torch.from_numpy(np.stack(images)).float() / 127.5 - 1,)


@pytest.fixture(scope="module")
def band_run(work):
    seed = 0
    for index, (name, count) in enumerate(COUNTS.items()):
        (work / "bands" / name).mkdir(parents=True)
        for i in range(count):
            seed += 1
            Image.fromarray(draw(index, seed)[0]).save(work / "bands" / name / f"{i}.png")
    return train(work, "bands run", train_data_dir=work / "bands", class_conditional=True)


@pytest.fixture(scope="module")
def report(work, band_run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DDPMPipeline, "__call__", stub_call)
        return evaluate_here(
            work, band_run, weights=("ema",), num_samples=NUM_SAMPLES, guidance_scales=tuple(P_ASKED), num_reference=0,
            extractor=("classifier", "pixels"), metrics=("frechet", "kernel", "accuracy", "shift"),
        )  # fmt: skip


def test_accuracy_is_how_often_the_class_that_was_asked_for_is_drawn(report):
    for scale, p in P_ASKED.items():
        m = find_measurement(report, "accuracy", guidance_scale=scale)
        error = math.sqrt(p * (1 - p) / NUM_SAMPLES)
        k = m["value"] * NUM_SAMPLES + 2
        assert m["n"] == NUM_SAMPLES and abs(m["value"] - p) <= 4 * error  # 4 standard errors
        assert m["standard_error"] == pytest.approx(math.sqrt(k * (NUM_SAMPLES + 4 - k) / (NUM_SAMPLES + 4) ** 3))
        assert m["real_data_baseline"] == 1  # the classes do not overlap
        assert m["extractor"].startswith("classifier (3 labels")
        assert m["primary"] == (scale == 1)
        assert m["sampler"].endswith("labels as in the data" + ("" if scale == 1 else f", guidance {scale:g}"))


def test_accuracy_within_each_class(report):
    """Classes with as many samples as the data has images; together they are the accuracy of all."""
    for scale, p in P_ASKED.items():
        each = [m for m in report["measurements"] if (m["measure"], m["guidance_scale"]) == ("class_accuracy", scale)]
        assert [m["class_name"] for m in each] == list(COUNTS) and sum(m["n"] for m in each) == NUM_SAMPLES
        for m in each:
            assert abs(m["n"] / NUM_SAMPLES - COUNTS[m["class_name"]] / sum(COUNTS.values())) < 0.01
            assert abs(m["value"] - p) <= 4 * math.sqrt(p * (1 - p) / m["n"])  # 4 standard errors
        overall = find_measurement(report, "accuracy", guidance_scale=scale)
        assert sum(m["n"] * m["value"] for m in each) / NUM_SAMPLES == pytest.approx(overall["value"])
        assert [m["real_data_baseline"] for m in each] == [None, 1, None]  # of 21 test images 11 are bees


def test_distances_within_a_class_are_those_of_its_samples_and_images(report, work):
    split = load_data_split(train_data_dir=work / "bands", cache_dir=work / "cache")
    names = np.array([split.data.name(int(i)).split("/")[0] for i in split.train_indices])
    (folder,) = [p for p in (work / "bands run" / "evaluation" / "samples").iterdir() if "guidance" not in p.name]
    samples = np.concatenate([np.load(file) for file in sorted(folder.glob("*.npy"))])
    asked = np.searchsorted(np.cumsum([np.sum(names == name) for name in COUNTS]), quantiles(len(names)), side="right")
    extractor = make_extractor("pixels", images=samples)
    values = []
    for number, name in enumerate(["ant", "bee"]):
        own, real = (extract_features(extractor, images) for images in (
            samples[asked == number], split.train_images[names == name]
        ))  # fmt: skip
        truth = fidelity.kernel_distance(own, real)
        wanted = {"class_name": name, "guidance_scale": 1, "extractor": "pixels-16x16"}
        m = find_measurement(report, "class_kernel_distance", **wanted)
        assert (m["n"], m["value"]) == (len(own), pytest.approx(truth.value, rel=1e-6))
        assert m["standard_error"] == pytest.approx(truth.standard_error, rel=1e-6)
        assert abs(m["real_data_baseline"]) < 0.01 * m["value"]
        values.append(truth)
    mean = find_measurement(report, "mean_class_kernel_distance", guidance_scale=1, extractor="pixels-16x16")
    assert mean["value"] == pytest.approx(sum(v.value for v in values) / 2, rel=1e-6)
    errors = [v.standard_error for v in values]
    assert mean["standard_error"] == pytest.approx(math.hypot(*errors) / 2, rel=1e-6)
    of_distance = [m for m in report["measurements"] if "kernel" in m["measure"]]
    assert {m["class_name"] for m in of_distance} == {None, "ant", "bee"}
    assert any("have no distances of their own: cow" in warning for warning in report["warnings"])
    assert not [m for m in report["measurements"] if m["measure"] == "class_frechet_distance"]  # fewer than 2048


def quantiles(num_train):
    """Where sample i is in the classes of the training images one after the other: see Classes.of_samples."""
    return (np.arange(NUM_SAMPLES) + 0.5) * (math.sqrt(5) - 1) / 2 % 1 * num_train


def test_the_best_scale_draws_the_right_classes_and_keeps_their_variety(report):
    """At scale 1 many samples are of another class, at 4 all of a class are alike: 2 is between."""
    guidance = report["guidance"]
    assert (guidance["scales"], guidance["interval"], guidance["best_scale"]) == ([1, 2, 4], None, 2)
    assert guidance["extractor"].startswith("classifier (3 labels")
    assert [measure["name"] for measure in guidance["measures"]] == [
        "kernel distance within a class, mean of 2",
        "kernel distance",
        "accuracy",
    ]
    accuracies = [find_measurement(report, "accuracy", guidance_scale=scale)["value"] for scale in P_ASKED]
    assert guidance["measures"][2]["values"] == accuracies


@pytest.mark.parametrize(
    ("values", "scales", "best"),
    [
        ((0.30, 0.26, 0.28), (1.0, 2.0, 4.0), 1),  # 0.04 is less than 2 sqrt(2) 0.015 = 0.042
        ((0.30, 0.27, 0.25), (1.0, 2.0, 4.0), 4),
        ((0.30, 0.28, 0.29), (1.0, 2.0, 4.0), 1),
        ((0.30, 0.31), (1.0, 2.0), 1),
        ((0.30, 0.29), (1.5, 2.0), 2),  # 1 was not measured
    ],
)
def test_the_best_scale_beats_1_by_two_standard_errors(values, scales, best):
    measurements = [
        SimpleNamespace(
            measure="kernel_distance", name="kernel distance", value=value, standard_error=0.015, guidance_scale=scale,
            real_data_baseline=0.0, weights="EMA", num_inference_steps=50, eta=1.0, extractor="pixels",
        )
        for value, scale in zip(values, scales)
    ]  # fmt: skip
    guidance = guidance_effect(measurements, None)
    assert guidance["best_scale"] == best
    assert best_scale_text(guidance).startswith("none is better than 1" if best == 1 else f"{best} has the smallest")


def test_the_report_and_the_card_show_it(report, band_run, tmp_path):
    text = (band_run / "report.md").read_text()
    first, best = (find_measurement(report, "accuracy", guidance_scale=scale) for scale in (1, 2))
    assert (
        f"A classifier recognises the class that was asked for in {first['value']:.1%} of the samples (in 100.0%"
        in text
    )
    assert "Of the guidance scales, 2 has the smallest distance." in text
    assert "(evaluation/guidance.png)" in text and "| ant | pixels-16x16 |" in text
    cow = find_measurement(report, "class_accuracy", class_name="cow", guidance_scale=1)
    row = (
        f"| cow | {cow['extractor']} | {cow['n']} | {cow['value']:.4g} &plusmn; {cow['standard_error']:.2g} |  |  |  |"
    )
    assert row in text.splitlines()
    with Image.open(band_run / "evaluation" / "guidance.png") as plot:
        assert plot.width > 2 * plot.height  # three panels
    stage.stage(band_run, tmp_path / "staged", repo_id="alice/bands")
    card = (tmp_path / "staged" / "README.md").read_text()
    assert card.count("guidance_scale=2, num_inference_steps=") == 2  # both calls of the pipeline
    assert "2 has the smallest distance" in card
    row = f"{best['value']:.4g} &plusmn; {best['standard_error']:.2g} |"
    assert [line for line in card.splitlines() if line.startswith("| 2 |") and line.endswith(row)]
    assert f"| accuracy | {first['value']:.4g} &plusmn; {first['standard_error']:.2g} | 1 |" in card
    assert (
        "type: mean_class_kernel_distance" in card and "type: class_kernel_distance" not in card
    )  # single classes are in the report alone
    assert json.loads((tmp_path / "staged" / "report.json").read_text()) == report


def test_the_interval_reaches_the_pipeline_and_the_report(work, band_run, monkeypatch):
    calls = []

    def call(self, *, seeds, **options):
        calls.append((options.get("guidance_scale", 1), options.get("guidance_interval")))
        return stub_call(self, seeds=seeds, **options)

    monkeypatch.setattr(DDPMPipeline, "__call__", call)
    report = evaluate_here(
        work, band_run, "interval", weights=("ema",), num_samples=64, guidance_scales=(1.0, 2.0),
        guidance_interval=(5, 15), metrics=("kernel",), extractor=("pixels",),
    )  # fmt: skip
    assert set(calls) == {(1, None), (2, (5, 15))}
    assert report["guidance"]["interval"] == [5, 15]
    assert {m["sampler"].rpartition(", ")[2] for m in report["measurements"]} == {
        "labels as in the data", "guidance 2 at 5 <= t < 15"
    }  # fmt: skip
    assert [line["name"] for line in report["guidance"]["measures"]] == ["kernel distance"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_interval": (15, 5)}, r"guidance_interval is \(15, 5\): give \(lo, hi\) with 0 <= lo < hi <= 20"),
        ({"guidance_interval": (0, 21)}, r"guidance_interval is 21: give \(lo, hi\) with 0 <= lo < hi <= 20"),
    ],
)
def test_a_bad_interval_is_refused_before_sampling(work, band_run, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate_here(work, band_run, "mistake", guidance_scales=(1.0, 2.0), **settings)


def test_guidance_without_a_null_class_is_refused(work, run):
    with pytest.raises(ValueError, match=r'guidance_scales has 2, but .* has no class for "no label": give 1'):
        evaluate_here(work, run, "mistake", guidance_scales=(1.0, 2.0))


def test_autoguidance_is_measured_over_its_scale(work, run, monkeypatch):
    """With a stub whose samples are training images at scale 2, and noise at 1. A guide with other weights has samples
    of its own."""
    with pytest.raises(ValueError, match=r"autoguidance is true, but .* has no guide: leave it out"):
        evaluate_here(work, run, "mistake", guidance_scales=(1.0, 2.0), autoguidance=True)
    model = work / "guided" / "pipeline"
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")
    real = load_data_split(dataset_name="moons", resolution=16, cache_dir=work / "cache").train_images
    calls = []

    def call(self, *, seeds, autoguidance_scale=1.0, guidance_interval=None, **options):
        calls.append((autoguidance_scale, guidance_interval))
        images = [real[seed] if autoguidance_scale == 2 else random_images(1, 16, 16, seed=seed) for seed in seeds]
        return (torch.from_numpy(np.stack(images)).float() / 127.5 - 1,)

    monkeypatch.setattr(DDPMPipeline, "__call__", call)
    for scale in (0.5, 0.6):
        pipe.guide = copy.deepcopy(pipe.unet)
        with torch.no_grad():
            pipe.guide.conv_out.weight.mul_(scale)
        pipe.save_pretrained(model)
        report = evaluate_here(
            work, work / "guided", weights=("ema",), num_samples=64, guidance_scales=(1.0, 2.0), autoguidance=True,
            guidance_interval=(5, 15), metrics=("kernel",), dataset_name="moons",
        )  # fmt: skip
    assert calls == [(1, None), (2, (5, 15)), (2, (5, 15))]  # those without guidance are the same
    assert (report["guidance"]["argument"], report["guidance"]["best_scale"]) == ("autoguidance_scale", 2)
    samplers = [m["sampler"] for m in report["measurements"]]
    assert samplers[0].endswith("trailing") and samplers[1].endswith(", autoguidance 2 at 5 <= t < 15")
    assert "| autoguidance scale | kernel distance |" in (work / "guided" / "report.md").read_text()


def test_the_command_line_has_the_guidance():
    config = EvalConfig("runs/x", guidance_scales=(1.0, 1.5), guidance_interval=(100.0, 600.0))
    assert command_line(config).endswith("runs/x --guidance_scales 1,1.5 --guidance_interval 100,600")
