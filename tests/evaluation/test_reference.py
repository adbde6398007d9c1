"""Which real images are the reference set, the real-data baseline and the held-out set."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.evaluation.helpers import data_split, numbered_images, numbers_of, run_record
from training.data.split import evenly_spaced
from training.evaluation.config import EvalConfig
from training.evaluation.reference import choose_real_images, load_split, was_trained_on
from training.evaluation.samples import Model


def numbered_split(num_train, num_held_out):
    """Training images 0, 1, ... and held-out images 100, 101, ..."""
    return data_split(numbered_images(0, num_train), numbered_images(100, num_held_out))


def test_with_enough_held_out_images_the_baseline_is_held_out_images():
    real = choose_real_images(numbered_split(40, 20), 10, 10)
    assert numbers_of(real.reference) == list(range(0, 40, 4)) and real.reference_description == "10 training images"
    assert numbers_of(real.baseline) == list(range(100, 120, 2)) and real.baseline_description == "held-out images"
    assert len(real.held_out) == 20 and real.warning is None


def test_with_few_held_out_images_the_baseline_is_other_training_images():
    real = choose_real_images(numbered_split(40, 9), 20, 10)
    assert numbers_of(real.reference) == list(range(0, 40, 2))
    assert numbers_of(real.baseline) == list(range(1, 40, 4)) and real.baseline_description == "training images"
    assert real.not_in_baseline.all() and real.warning is None


@pytest.mark.parametrize("num_held_out", [0, 9])
@pytest.mark.parametrize("num_reference", [0, 35, 99])
def test_a_baseline_of_reference_images_is_not_compared_with_itself(num_reference, num_held_out):
    real = choose_real_images(numbered_split(40, num_held_out), num_reference, 10)
    assert numbers_of(real.baseline) == list(range(0, 40, 4))
    compared = numbers_of(real.reference[real.not_in_baseline])
    assert set(compared) == set(numbers_of(real.reference)) - set(numbers_of(real.baseline))
    assert len(real.held_out) == num_held_out and real.warning is None


def test_a_baseline_smaller_than_the_samples_is_at_most_half_of_the_images_and_warns():
    real = choose_real_images(numbered_split(40, 9), 0, 30)
    assert len(real.baseline) == 20 and real.not_in_baseline.sum() == 20
    assert "the real-data baseline has only 20 images" in real.warning


def test_too_few_images_give_no_baseline_and_a_warning():
    real = choose_real_images(numbered_split(10, 3), 0, 16)
    assert len(real.baseline) == 0
    assert real.warning == "there is no real-data baseline: 10 images are too few to set 6 aside"


def test_images_held_out_of_the_data_are_not_in_the_reference_set():
    train_indices = np.setdiff1d(np.arange(40), [19, 39])
    split = data_split(numbered_images(0, 40), numbered_images(100, 2), train_indices)
    assert set(numbers_of(choose_real_images(split, 0, 10).reference)) == set(range(40)) - {19, 39}
    some = choose_real_images(split, 19, 19)
    assert set(numbers_of(some.reference)) | set(numbers_of(some.baseline)) == set(range(40)) - {19, 39}


@pytest.mark.parametrize(
    ("count", "wanted", "indices"), [(10, 4, [0, 2, 5, 7]), (4, 4, [0, 1, 2, 3]), (3, 9, [0, 1, 2]), (5, 0, [])]
)
def test_evenly_spaced(count, wanted, indices):
    assert evenly_spaced(count, wanted).tolist() == indices


@pytest.mark.parametrize(
    ("trained", "num_held_out"),
    [
        ({}, 2),
        ({"validation_split": "valid", "dataset_config_name": "x"}, 2),  # of the data set, which is not this folder
        ({"validation_split": "none", "dataset_config_name": "x"}, 0),
        ({"validation_steps": 0}, 0),
    ],
)
def test_held_out_is_what_was_held_out_during_training(work, image_folder, trained, num_held_out):
    unet = SimpleNamespace(config=SimpleNamespace(sample_size=16, in_channels=1))
    record = run_record(config={"dataset_name": "user/set", **trained})
    model = Model(SimpleNamespace(unet=unet), "EMA", "", "", record)
    paths = {"cache_dir": str(work / "cache")}
    split = load_split(EvalConfig("x", train_data_dir=str(image_folder), **paths), model)
    assert (len(split.train_indices), len(split.held_out)) == (40 - num_held_out, num_held_out)
    split = load_split(EvalConfig("x", dataset_name="moons", **paths), model)
    # the test split, whatever was held out during training
    assert (len(split.train_indices), len(split.held_out)) == (8192, 1024)


def test_notes_in_the_description_of_the_data_are_not_compared():
    split = numbered_split(40, 9)
    split.data.source = "40 images of folder wall; 3 unreadable"
    model = Model(None, "EMA", "", "", run_record(source="40 images of folder wall; an old note", num_images=40))
    assert was_trained_on(model, split)
    split.data.source = "40 images of folder wall (12 other files ignored); 3 unreadable"  # no part of the data
    assert was_trained_on(model, split)
    assert not was_trained_on(model._replace(record=run_record(source=split.data.source, num_images=38)), split)
    assert not was_trained_on(model._replace(record=run_record(source="40 images of folder w", num_images=40)), split)
    assert not was_trained_on(model._replace(record=None), split)
