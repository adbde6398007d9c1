"""An evaluation of a model with classes: labels of samples and of held-out images."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from ddpm_pipeline import DDPMPipeline, likelihood
from ddpm_pipeline.labels import record_class_names
from ddpm_pipeline.pixels import from_pixels, to_pixels
from tests.arrays import save_images
from tests.evaluation.helpers import evaluate_here, find_measurement, train
from tests.models import quiet
from training.data.split import load_data_split

COUNTS = {"ant": 10, "bee": 30, "cow": 40}


@pytest.fixture(scope="module")
def class_run(work):
    """A model whose output depends mostly on the class, and its report."""
    for name, count in COUNTS.items():
        save_images(work / "animals" / name, count, 16, 16)
    run = train(work, "classes run", train_data_dir=work / "animals", class_conditional=True)
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")
    with torch.no_grad():
        pipe.unet.class_embedding.weight.mul_(30)
    record = (run / "pipeline" / "training.json").read_bytes()
    pipe.save_pretrained(run / "pipeline")
    (run / "pipeline" / "training.json").write_bytes(record)
    report = evaluate_here(work, run, weights=("ema",), num_bound_images=4)
    return run, report


def test_samples_have_labels_as_often_as_the_data(class_run):
    run, report = class_run
    assert find_measurement(report, "frechet_distance")["sampler"].endswith("labels as in the data")
    (folder,) = (run / "evaluation" / "samples").iterdir()
    samples = np.concatenate([np.load(file) for file in sorted(folder.glob("*.npy"))])
    pipe = quiet(DDPMPipeline.from_pretrained(run / "pipeline"))
    of_class = [
        to_pixels(pipe(seeds=list(range(128)), class_labels=name, num_inference_steps=4, output_type="latent").images)
        for name in COUNTS
    ]
    drawn = Counter()
    for i, sample in enumerate(samples):
        distances = [np.abs(each[i].astype(int) - sample).max() for each in of_class]
        assert min(distances) <= 1 < sorted(distances)[1]  # rounding, and another class
        drawn[int(np.argmin(distances))] += 1
    expected = np.array(list(COUNTS.values())) / sum(COUNTS.values()) * len(samples)
    assert abs(np.array([drawn[i] for i in range(3)]) - expected).max() < 3


def test_bits_are_those_with_the_labels_of_the_images(class_run, work):
    run, report = class_run
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")
    split = load_data_split(train_data_dir=work / "animals", cache_dir=work / "cache")
    names = [split.data.name(int(i)).split("/")[0] for i in split.held_out_indices]
    assert len(set(names)) > 1
    bits = []
    for i, name in enumerate(names):
        label = torch.tensor([list(COUNTS).index(name)])
        x_0 = from_pixels(torch.from_numpy(split.held_out[i : i + 1]))
        with torch.no_grad():
            bound = likelihood.variational_bound(
                lambda x_t, t, label=label: pipe.unet(x_t, t, class_labels=label).sample, pipe.scheduler, x_0,
                index=torch.tensor([i]), seed=0, strata=8, levels=256,
            )  # fmt: skip
        bits.append(likelihood.bits_per_dim(bound.total, x_0.shape[1:]).item())
    measured = next(m for m in report["measurements"] if m["measure"] == "bits_per_dim" and "fixed_small" in m["name"])
    assert measured["n"] == len(bits) == 4
    assert measured["value"] == pytest.approx(np.mean(bits), rel=1e-4)


def test_data_with_other_classes_is_refused(class_run, work):
    run, _ = class_run
    shutil.copytree(run / "pipeline", work / "renamed")
    pipe = DDPMPipeline.from_pretrained(work / "renamed")
    record_class_names(pipe.unet, ["ant", "bee", "owl"])
    pipe.save_pretrained(work / "renamed")
    with pytest.raises(ValueError, match="classes that the model was not trained on: cow"):
        evaluate_here(work, work / "renamed", "mistake", weights=("ema",))
