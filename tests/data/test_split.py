"""The held-out set: a split of the data set, or one image in 20."""

import numpy as np
import pytest
from PIL import Image

from ddpm_pipeline.moons import MoonDataset
from tests.arrays import random_images
from tests.data.image_files import cell, write_parquet
from training.data import sources
from training.data.cache import load_images
from training.data.classes import find_classes
from training.data.split import load_data_split


def test_a_validation_or_test_split_is_held_out(folder, cache_dir):
    first, second = ([cell(random_images(5, 6, 3, seed=10 * i + j)) for j in range(4)] for i in range(2))
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", photo=first)
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", photo=second[:3])
    options = {"dataset_name": str(folder), "cache_dir": cache_dir}
    for _ in range(2):  # decoded, then from the cache
        split = load_data_split(**options)
        assert split.train_indices.tolist() == [0, 1, 2, 3] and split.held_out.shape == (3, 3, 5, 6)
        assert split.held_out_source.endswith("split test")
        np.testing.assert_array_equal(split.held_out, load_images(split="test", **options).images)
        np.testing.assert_array_equal(split.train_images, load_images(**options).images)
    assert load_data_split("none", **options).held_out.shape == (0, 3, 5, 6)
    assert len(load_data_split("test", **options).held_out) == 3
    for name in ("validation", "train"):
        with pytest.raises(ValueError, match=f"validation_split is '{name}': give test or none"):
            load_data_split(name, **options)

    write_parquet(folder / "data" / "validation-00000-of-00001.parquet", photo=second)
    assert len(load_data_split(**options).held_out) == 4  # validation comes before test


def test_a_split_of_another_size_is_resized(folder, cache_dir):
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", photo=[cell(random_images(8, 8, 3))])
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", photo=[cell(random_images(16, 16, 3))])
    assert load_data_split(dataset_name=str(folder), cache_dir=cache_dir).held_out.shape == (1, 3, 8, 8)


def test_a_split_with_other_channels_is_refused(folder, cache_dir):
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", photo=[cell(random_images(8, 8, 3))])
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", photo=[cell(random_images(8, 8))])
    with pytest.raises(ValueError, match=r"split 'test' has images \(1, 8, 8\)"):
        load_data_split(dataset_name=str(folder), cache_dir=cache_dir)


def test_without_a_test_split_every_20th_image_is_held_out(folder, cache_dir):
    for i in range(45):
        Image.fromarray(np.full((8, 8), i + 9, np.uint8)).save(folder / f"{i:02}.png")
    split = load_data_split(train_data_dir=folder, cache_dir=cache_dir)
    assert split.held_out[:, 0, 0, 0].tolist() == [28, 48]
    assert split.train_indices.tolist() == [i for i in range(45) if i not in (19, 39)]
    assert split.train_images[:, 0, 0, 0].tolist() == (split.train_indices + 9).tolist()
    assert split.held_out_source.startswith("one in 20 of 45 images")
    assert len(load_data_split("none", train_data_dir=folder, cache_dir=cache_dir).train_indices) == 45
    with pytest.raises(ValueError, match="validation_split is 'test': give none"):
        load_data_split("test", train_data_dir=folder, cache_dir=cache_dir)


def test_labels_are_those_of_the_images_trained_on(folder, cache_dir):
    for i in range(20):
        path = folder / ("even", "odd")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), i + 50, np.uint8)).save(path)
    split = load_data_split(train_data_dir=folder, cache_dir=cache_dir)
    assert split.held_out[:, 0, 0, 0].tolist() == [69]
    assert split.train_labels().tolist() == [i % 2 for i in split.train_images[:, 0, 0, 0].tolist()]
    classes = find_classes(split)
    assert classes.names == ("even", "odd") and classes.held_out.tolist() == [1]
    assert classes.data.tolist() == [i % 2 for i in split.data.images[:, 0, 0, 0].tolist()]


def test_the_held_out_moons_have_another_seed(cache_dir, monkeypatch):
    monkeypatch.setitem(sources.NUM_MOONS, "train", 30)
    monkeypatch.setitem(sources.NUM_MOONS, "test", 20)
    split = load_data_split(dataset_name="moons", cache_dir=cache_dir)
    np.testing.assert_array_equal(split.held_out, MoonDataset(20, 32, seed=1).images().numpy())
    assert len(split.train_indices) == 30
