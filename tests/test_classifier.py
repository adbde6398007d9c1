"""The small classifier on images created here: what it learns, its cache, its accuracy."""

import math

import numpy as np
import pytest
import torch

from ddpm_pipeline import classifier
from ddpm_pipeline.classifier import train_classifier
from ddpm_pipeline.features import extract_features, make_extractor
from ddpm_pipeline.tensor_cache import load_tensors
from tests.arrays import assert_same_in_8_and_16_bits, random_images


def blobs(n, seed=0):
    """A bright square on the left (0) or on the right (1), in noise: (N, 1, 8, 8) and (N,)."""
    images, labels = random_images(n, 1, 8, 8, seed=seed) // 3, np.random.default_rng(seed).integers(2, size=n)
    for image, label in zip(images, labels):
        image[0, 2:6, 4 * label : 4 * label + 3] += 120
    return images, labels


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    cache = tmp_path_factory.mktemp("classifier")
    images, labels = blobs(300)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.no_grad():
        extractor = make_extractor("classifier", images=images, labels=labels, cache_dir=cache)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    return cache, extractor


def test_classifier_features_separate_the_classes(trained):
    _, extractor = trained
    assert extractor.accuracy == 1 and extractor.frechet_name == "Frechet distance"
    assert extractor.name == f"classifier (2 labels, {extractor.key[:8]})"
    images, labels = blobs(100, seed=1)
    features = extract_features(extractor, images)
    assert features.shape == (100, 128) and not features.requires_grad
    distances = torch.cdist(features, features)
    distances.fill_diagonal_(math.inf)
    assert (labels[distances.argmin(dim=1)] == labels).all()
    torch.testing.assert_close(extract_features(extractor, images[::-1], batch_size=7).flip(0), features)
    assert_same_in_8_and_16_bits(extractor, images)
    assert extractor(torch.zeros(2, 1, 5, 131, dtype=torch.uint8)).shape == (2, 128)
    with pytest.raises(ValueError, match="3 channels: the classifier was trained on 1"):
        extract_features(extractor, random_images(1, 3, 8, 8))


def test_probabilities_belong_to_the_labels_of_the_images(trained):
    cache, extractor = trained
    images, labels = blobs(300)
    again = train_classifier(images, labels, cache_dir=cache)
    assert (again.name, again.key, again.accuracy) == (extractor.name, extractor.key, extractor.accuracy)
    images, labels = blobs(100, seed=1)
    probabilities = again.probabilities(torch.from_numpy(images).float() / 255)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(100))
    assert (again.classes[probabilities.argmax(dim=1)] == labels).all()
    many = np.concatenate([images] * 3)  # more than a batch
    for pixels in (many, many * np.uint16(257)):
        predicted, confidence = again.predict(pixels)
        assert np.array_equal(predicted, np.tile(labels, 3))
        np.testing.assert_allclose(confidence, probabilities.amax(dim=1).repeat(3).numpy(), rtol=1e-5)


def test_a_trained_classifier_is_read_from_the_cache(trained, monkeypatch):
    cache, extractor = trained
    images, labels = blobs(300)
    (file,) = cache.iterdir()
    weights, calls = load_tensors(file), []

    def train(*arguments):
        calls.append(arguments)
        return dict(weights)

    monkeypatch.setattr(classifier, "_train", train)
    before = torch.get_rng_state()
    again = make_extractor("classifier", images=images, labels=labels, cache_dir=cache)
    assert torch.equal(torch.get_rng_state(), before)
    assert calls == []
    assert (again.key, again.name, again.accuracy) == (extractor.key, extractor.name, 1)
    assert torch.equal(extract_features(again, images), extract_features(extractor, images))

    file.write_bytes(file.read_bytes()[:-1])
    make_extractor("classifier", images=images, labels=labels, cache_dir=cache)
    for other in ({"images": images, "labels": 1 - labels}, {"images": 255 - images, "labels": labels}):
        make_extractor("classifier", cache_dir=cache, **other)
    assert len(calls) == 3 and len(list(cache.iterdir())) == 3


def test_training_does_not_depend_on_the_global_random_state_or_label_names(trained):
    _, extractor = trained
    images, labels = blobs(300)
    torch.manual_seed(99)
    assert make_extractor("classifier", images=images, labels=np.array(["left", "right"])[labels]).key == extractor.key


@pytest.mark.parametrize(("shape", "turns"), [((8, 8), 4), ((8, 6), 2)])
def test_without_labels_the_classifier_learns_rotations(shape, turns):
    images = random_images(400, 3, *shape) // 3
    images[:, :, 0] += 120  # a bright sky
    extractor = make_extractor("classifier", images=images)
    assert extractor.name == f"classifier ({turns} rotations, {extractor.key[:8]})"
    assert extractor.accuracy > 0.9


def test_accuracy_is_measured_on_images_it_was_not_trained_on():
    """Random labels can be memorised, not predicted: accuracy on 20 new images is about 1/4."""
    labels = np.random.default_rng(5).integers(4, size=400)
    extractor = make_extractor("classifier", images=random_images(400, 1, 6, 6), labels=labels)
    assert extractor.accuracy < 0.25 + 4 * math.sqrt(0.25 * 0.75 / 20)


def test_images_and_labels_that_cannot_be_trained_on_are_an_error():
    images = random_images(4, 1, 5, 5)
    for options, message in (
        ({}, "images is None"),
        ({"images": images[:1]}, "the number of images is 1"),
        ({"images": images.astype(float)}, "float64"),
        ({"images": images, "labels": np.zeros(3)}, r"labels have shape \(3,\)"),
        ({"images": images, "labels": np.full(4, 7)}, "all labels are .*7"),
    ):
        with pytest.raises(ValueError, match=message):
            make_extractor("classifier", **options)
