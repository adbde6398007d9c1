"""Extractors and their cache, on images and files created here; the ResNet-56 against the labels of CIFAR-10."""

import io
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ddpm_pipeline import image_arrays
from ddpm_pipeline.features import Extractor, extract_features, make_extractor
from tests.arrays import assert_same_in_8_and_16_bits, random_images

# ---- Cache -----------------------------------------------------------------------------------------------------------


class CountingExtractor(Extractor):
    """The sum and the first pixel of an image as features; counts the images."""

    def __init__(self, key="a"):
        super().__init__("counting", key, lambda x: torch.stack([x.sum(dim=(1, 2, 3)), x[:, 0, 0, 0]], dim=1))
        self.count = 0

    def __call__(self, images):
        self.count += len(images)
        return super().__call__(images)


def test_features_are_read_from_the_cache(tmp_path, monkeypatch):
    images, cache = random_images(7, 1, 3, 3), tmp_path / "new" / "folder"
    extractor = CountingExtractor()
    first = extract_features(extractor, images, cache_dir=cache, batch_size=3)
    assert first.shape == (7, 2) and first.dtype == torch.float32 and extractor.count == 7
    np.testing.assert_allclose(first[:, 0], images.sum(axis=(1, 2, 3)) / 255, rtol=1e-6)
    assert torch.equal(extract_features(extractor, images, cache_dir=cache), first) and extractor.count == 7
    (file,) = cache.iterdir()  # no temporary file is left

    memory_mapped = np.lib.format.open_memmap(tmp_path / "images.npy", "w+", images.dtype, images.shape)
    memory_mapped[:] = images
    monkeypatch.setattr(image_arrays, "CHUNK_PIXELS", 20)  # hashed in several chunks
    assert torch.equal(extract_features(extractor, memory_mapped, cache_dir=cache), first) and extractor.count == 7

    intact = file.read_bytes()
    bit_flipped = intact[:-3] + bytes([intact[-3] ^ 1]) + intact[-2:]
    for number, damaged in enumerate((intact[:-1], b"", b"not safetensors", bit_flipped), start=2):
        file.write_bytes(damaged)
        assert torch.equal(extract_features(extractor, images, cache_dir=cache), first)
        assert extractor.count == 7 * number
        assert file.read_bytes() == intact


def test_the_cache_key_depends_on_extractor_and_images(tmp_path):
    images = random_images(6, 1, 4, 4)
    other = images.copy()
    other[-1, -1, -1, -1] ^= 1
    for extractor, array in (
        (CountingExtractor("a"), images),
        (CountingExtractor("b"), images),
        (CountingExtractor("a"), other),
        (CountingExtractor("a"), images.reshape(6, 1, 2, 8)),
        (CountingExtractor("a"), images.view(np.uint16)),  # the same bytes
        (CountingExtractor("a"), images[::-1]),
    ):
        extract_features(extractor, array, cache_dir=tmp_path)
        assert extractor.count == 6
    assert len(list(tmp_path.iterdir())) == 6


def test_names_of_cached_files_are_unchanged_so_that_old_caches_are_found(tmp_path):
    extract_features(make_extractor("pixels"), np.arange(24, dtype=np.uint8).reshape(2, 1, 3, 4), cache_dir=tmp_path)
    name = "features-bd7d00f5b1126dce7ddbf326d832a6d659b67c17c6387eba17af01f0b288c6ac.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(UserWarning, match=r"cannot be written \(disk full\).*--cache_dir"):
        features = extract_features(CountingExtractor(), random_images(2, 1, 2, 2), cache_dir=tmp_path)
    assert features.shape == (2, 2)  # what was computed is not lost
    assert list(tmp_path.iterdir()) == []


# ---- Extractors ------------------------------------------------------------------------------------------------------


def test_pixels_extractor_averages_a_grid():
    extractor = make_extractor("pixels")
    assert extractor.name == "pixels-16x16" and extractor.accuracy is None and extractor.commit is None
    images = random_images(5, 3, 32, 48)
    features = extract_features(extractor, images)
    means = images.reshape(5, 3, 16, 2, 16, 3).mean(axis=(3, 5)) / 127.5 - 1
    np.testing.assert_allclose(features, means.reshape(5, -1), rtol=0, atol=1e-6)
    assert torch.equal(extract_features(extractor, images, batch_size=2), features)
    assert torch.equal(extract_features(extractor, images[::-1]), features.flip(0))
    assert_same_in_8_and_16_bits(extractor, images)

    small = random_images(4, 1, 9, 20)
    assert make_extractor("pixels", images=small).name == "pixels-9x16"
    assert extract_features(extractor, small).shape == (4, 9 * 16)
    extremes = np.array([0, 255], dtype=np.uint8).reshape(1, 2, 1, 1)
    assert extract_features(extractor, extremes).tolist() == [[-1, 1]]


def names(extractor):
    return extractor.frechet_name, extractor.kernel_name


def cifar10_test(folder):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(next(folder.glob("test*.parquet"))).to_pydict()
    images = [np.asarray(Image.open(io.BytesIO(image["bytes"]))).transpose(2, 0, 1) for image in table["img"]]
    return np.stack(images), np.array(table["label"])


def test_resnet_reaches_its_published_accuracy_on_cifar10(shared_data):
    file, folder = shared_data / "features" / "resnet56-4bfd9763.th", shared_data / "cifar10" / "plain_text"
    if not file.is_file() or not folder.is_dir():
        pytest.skip("ResNet-56 or CIFAR-10 is missing: ../shared/data/features, ../shared/data/cifar10")
    before = torch.get_rng_state()
    extractor = make_extractor(str(file))
    assert torch.equal(torch.get_rng_state(), before)
    assert extractor.name == "cifar10-resnet56" and names(extractor) == ("Frechet distance", "kernel distance")
    images, labels = cifar10_test(folder)
    features = extract_features(extractor, images)
    assert features.shape == (1000, 64)
    weights = torch.load(file, weights_only=True, map_location="cpu")["state_dict"]
    predictions = (features @ weights["module.linear.weight"].T + weights["module.linear.bias"]).argmax(dim=1)
    assert (predictions.numpy() == labels).mean() == pytest.approx(0.926, abs=0.0015)
    torch.testing.assert_close(extract_features(extractor, images[::-1][-90:], batch_size=7).flip(0), features[:90])
    assert_same_in_8_and_16_bits(extractor, images[:4])

    gray = images[:3, :1]
    assert torch.equal(extract_features(extractor, gray), extract_features(extractor, gray.repeat(3, axis=1)))
    # Larger images are resized, not cropped: at double size the features are nearly the same.
    similarity = torch.cosine_similarity(
        extract_features(extractor, images[:50].repeat(2, axis=2).repeat(2, axis=3)), features[:50]
    )
    assert similarity.mean() > 0.9
    with pytest.raises(ValueError, match="4 channels"):
        extract_features(extractor, random_images(1, 4, 32, 32))


class InceptionV3(nn.Module):
    def __init__(self, num_features: int = 2048) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert x.dtype == torch.uint8 and x.shape[1] == 3 and return_features
        return x.double().flatten(1).repeat(1, self.num_features)[:, : self.num_features]


class HalfNetwork(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x / 2).flatten(1)


def script(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return str(path)


def test_torchscript_extractors(tmp_path):
    inception = make_extractor(script(InceptionV3(), tmp_path / "any.pt"))
    assert inception.name == "inception" and names(inception) == ("FID", "KID")
    images = random_images(3, 3, 20, 31)
    features = extract_features(inception, images)
    assert features.dtype == torch.float32
    np.testing.assert_array_equal(features[:, :1860], images.reshape(3, -1))  # not resized, integers 0..255
    assert_same_in_8_and_16_bits(inception, np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16))
    between = np.array([7 * 257 - 100, 7 * 257 + 100], dtype=np.uint16).reshape(1, 1, 1, 2)  # rounded to the nearest
    assert extract_features(inception, between)[0, :2].tolist() == [7, 7]
    np.testing.assert_array_equal(
        extract_features(inception, images[:, :1])[:, :1860], images[:, :1].repeat(3, axis=1).reshape(3, -1)
    )
    with pytest.raises(ValueError, match="2 channels"):
        extract_features(inception, images[:, :2])

    other = make_extractor(script(HalfNetwork(), tmp_path / "half.pt"))
    assert other.name == "half.pt" and names(other)[0] == "Frechet distance" and other.key != inception.key
    images = random_images(2, 5, 3, 4)
    np.testing.assert_allclose(extract_features(other, images), (images.reshape(2, -1) / 127.5 - 1) / 2, atol=1e-6)
    assert_same_in_8_and_16_bits(other, images)

    class ReturnsImages(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(
        ValueError, match=r"images.pt returns \(2, 5, 3, 4\) for 2 images: an extractor must return \(B, D\)"
    ):
        extract_features(make_extractor(script(ReturnsImages(), tmp_path / "images.pt")), images)
    with pytest.raises(ValueError, match="looks channels-last"):
        extract_features(other, np.zeros((2, 20, 20, 3), np.uint8))

    class Inception(nn.Module):  # only the name
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Other(InceptionV3):  # everything but the name
        pass

    assert make_extractor(script(Inception(), tmp_path / "named.pt")).name == "named.pt"
    assert names(make_extractor(script(Other(), tmp_path / "other.pt")))[0] == "Frechet distance"
    assert names(make_extractor(script(InceptionV3(1000), tmp_path / "1000.pt")))[0] == "Frechet distance"


def test_unknown_extractors_and_wrong_files_are_an_error(tmp_path):
    for which in ("inception", "", "network.pth", "pixels-16x16"):
        with pytest.raises(ValueError, match=f"extractor is '{which}': give \"pixels\""):
            make_extractor(which)
    for which in (str(tmp_path / "none.th"), str(tmp_path / "none.pt")):
        with pytest.raises(ValueError, match=r"none\.\w+', but this file does not exist"):
            make_extractor(which)
    weights = {"state_dict": {"module.conv1.weight": torch.zeros(16, 3, 3, 3)}}
    torch.save(weights, tmp_path / "other.th")
    torch.save(weights, tmp_path / "other.pt")
    (tmp_path / "text.th").write_text("hello")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("other.th", "text.th"):
        with pytest.raises(ValueError, match=f"{name} does not contain the ResNet-56"):
            make_extractor(str(tmp_path / name))
    for name in ("other.pt", "text.pt"):
        with pytest.raises(ValueError, match=f"{name} is not a TorchScript file"):
            make_extractor(str(tmp_path / name))


def test_images_that_no_extractor_can_use_are_an_error():
    good = random_images(5, 2, 4, 4)
    with pytest.raises(ValueError, match="float32"):
        extract_features(make_extractor("pixels"), good.astype(np.float32))
    with pytest.raises(ValueError, match="at least 1"):
        extract_features(make_extractor("pixels"), good[:0])
    with pytest.raises(ValueError, match="batch_size is 0"):
        extract_features(make_extractor("pixels"), good, batch_size=0)
    with pytest.raises(ValueError, match="uint8 or uint16"):
        make_extractor("pixels")(torch.zeros(1, 1, 4, 4))
