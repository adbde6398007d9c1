"""Models of transformers as extractors: small random ones, against transformers and Pillow called by hand."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from ddpm_pipeline import hub_features
from ddpm_pipeline.features import extract_features, make_extractor
from ddpm_pipeline.fidelity import cmmd_kernel, cubic_kernel, kernel_distance
from tests.arrays import assert_same_in_8_and_16_bits, random_images
from tests.evaluation.helpers import data_split
from tests.gaussian import gaussian_images, gaussian_pipe
from tests.hub_models import CROPPED, save_clip, save_convnext, save_dinov2, save_vit, settings
from training.evaluation.measures import compare_features
from training.evaluation.reference import choose_real_images

transformers = pytest.importorskip("transformers", reason="transformers is not installed: extra `eval`")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of each family; DINOv2 and CLIP take the middle 28 x 28 of 32, ViT resizes to 24 x 32."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "dinov2": save_dinov2(folder / "dinov2"),
        "clip": save_clip(folder / "clip"),
        "vit": save_vit(folder / "vit"),
        "convnext": save_convnext(folder / "convnext"),
    }


def resized(images, height, width, resample):
    """By Pillow, channel by channel in floats, (N, 3, height, width) in [0, 1]; rows, then columns, clipped after each,
    as it resizes integers."""

    def channel(pixels):
        for size in ((width, pixels.shape[0]), (width, height)):
            pixels = np.asarray(Image.fromarray(pixels.astype(np.float32)).resize(size, resample)).clip(0, 255)
        return pixels

    return torch.from_numpy(np.stack([[channel(c) for c in image] for image in images])) / 255


def normalised(x, config):
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("image_mean", "image_std"))
    return (x - mean) / std


# What each model is given for images of 40 x 60, by hand.
def by_hand(family, images):
    config = settings(family)
    if family in ("dinov2", "clip"):
        x = resized(images, 32, 48, Image.Resampling.BICUBIC)[:, :, 2:30, 10:38]
    elif family == "vit":
        x = resized(images, 24, 32, Image.Resampling.BILINEAR)
    else:  # ConvNeXt: the shorter side to 32 / 0.8, then the middle 32 x 32
        x = resized(images, 40, 60, Image.Resampling.BICUBIC)[:, :, 4:36, 14:46]
    return normalised(x, config)


def features_by_hand(folder, family, pixels):
    model = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        if family == "clip":
            return F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=1)
        output = model(pixel_values=pixels)
    if family == "dinov2":
        return output.last_hidden_state[:, 0]
    return output.pooler_output.flatten(1)


@pytest.mark.parametrize("family", ["dinov2", "clip", "vit", "convnext"])
def test_features_are_those_of_transformers_for_images_that_pillow_resizes(folders, family):
    extractor = make_extractor(str(folders[family]))
    assert extractor.name == family and extractor.commit is None and extractor.accuracy is None
    images = random_images(5, 3, 40, 60)
    features = extract_features(extractor, images)
    expected = features_by_hand(folders[family], family, by_hand(family, images))
    assert features.std(dim=0).max() > 1e-3  # they are not all equal
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)

    torch.testing.assert_close(extract_features(extractor, images, batch_size=2), features, rtol=0, atol=1e-5)
    assert_same_in_8_and_16_bits(extractor, images[:2])
    gray = images[:, :1]
    assert torch.equal(extract_features(extractor, gray), extract_features(extractor, gray.repeat(3, axis=1)))
    with pytest.raises(ValueError, match="4 channels"):
        extract_features(extractor, random_images(1, 4, 32, 32))


@pytest.mark.parametrize("family", ["dinov2", "clip", "vit", "convnext"])
def test_preprocessing_is_that_of_the_image_processor(folders, family):
    """Up to what it loses by rounding to integers, at most 1/2 of 255 after each of two passes, of which the second may
    enlarge the first one's by the sum of its absolute weights. Where nothing is resized, nothing is lost."""
    processor = transformers.AutoImageProcessor.from_pretrained(folders[family])
    preprocessing = hub_features._load_preprocessing("it", folders[family])
    level = 1 / 255 / min(processor.image_std)
    for height, width, allowed in ((40, 60, 2), (60, 40, 2), (16, 16, 2), (100, 70, 2), (32, 32, 1e-3)):
        if family in ("vit", "convnext") and allowed < 1:
            continue  # they always resize
        image = random_images(height, width, 3)
        expected = processor(images=image, return_tensors="pt")["pixel_values"]
        actual = preprocessing(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() < allowed * level


def test_distances_have_the_names_of_their_papers(folders):
    named = {
        "dinov2": ("FD-DINOv2", "kernel distance", cubic_kernel),
        "clip": ("Frechet distance", "CMMD", cmmd_kernel),
        "vit": ("Frechet distance", "kernel distance", cubic_kernel),
    }
    for family, names in named.items():
        extractor = make_extractor(str(folders[family]))
        assert (extractor.frechet_name, extractor.kernel_name, extractor.kernel) == names
    features = [
        extract_features(make_extractor(str(folders["clip"])), random_images(9, 3, 30, 30, seed=i)) for i in (1, 2)
    ]
    torch.testing.assert_close(features[0].norm(dim=1), torch.ones(9))
    x, y = (each.double() for each in features)

    def mean_k(a, b):
        k = 1000 * torch.exp(-(a[:, None] - b).square().sum(dim=2) / 200)
        return k.mean() if a is not b else (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    expected = mean_k(x, x) + mean_k(y, y) - 2 * mean_k(x, y)
    assert kernel_distance(x, y, cmmd_kernel).value == pytest.approx(expected.item(), rel=1e-9)


def test_the_cache_knows_a_model_by_its_content(folders, tmp_path):
    """A copy elsewhere has the same key; other weights, or another size of images, have another."""
    key = make_extractor(str(folders["dinov2"])).key
    same = save_dinov2(tmp_path / "elsewhere")
    assert make_extractor(str(same)).key == key
    (same / "README.md").write_text("changes nothing")
    assert make_extractor(str(same)).key == key
    other = save_dinov2(tmp_path / "other", seed=1)
    assert make_extractor(str(other)).key != key
    file = same / "preprocessor_config.json"
    file.write_text(file.read_text().replace('"shortest_edge": 32', '"shortest_edge": 30'))
    assert make_extractor(str(same)).key != key


def test_measures_and_fusion_take_such_features(folders, tmp_path):
    """Balanced in them, an image is halfway in what the model sees. Copies of training images are memorised."""
    extractor = make_extractor(str(folders["dinov2"]))
    pipe, (a, b) = gaussian_pipe(), gaussian_images(2)
    fused = pipe.fuse(
        a, b, 0.5, balance=True, distance=folders["dinov2"], num_inference_steps=5, output_type="latent"
    )  # fmt: skip
    to_a, to_b = (
        (extractor.of_floats((fused.images.float() + 1) / 2) - extractor.of_floats((x[None].float() + 1) / 2)).square()
        for x in (a, b)
    )
    assert (to_a.sum() / (to_a + to_b).sum()).item() == pytest.approx(0.5, abs=0.006)

    train, held_out = (random_images(20, 1, 8, 8, seed=seed) for seed in (0, 1))
    real = choose_real_images(data_split(train, held_out), 0, 20)
    clip = make_extractor(str(folders["clip"]))
    for each, names in ((extractor, ["FD-DINOv2", "kernel distance"]), (clip, ["Frechet distance", "CMMD"])):
        *distances, copies = compare_features(train, real, each, ("frechet", "kernel", "memorisation"), tmp_path)
        assert [result.name for result in distances] == names
        assert {result.extractor for result in distances} == {each.name}
        assert copies.estimate.value == pytest.approx(1)
    samples, reference = (extract_features(clip, images) for images in (held_out, real.reference))
    _, cmmd, _ = compare_features(held_out, real, clip, ("frechet", "kernel", "memorisation"), tmp_path)
    assert cmmd.estimate == kernel_distance(samples, reference, cmmd_kernel)


def test_a_vit_without_pooling_layer_gives_its_cls_token(tmp_path):
    """As it is saved after training as a classifier: the layer would be random numbers."""
    folder = save_vit(tmp_path / "vit", kind="ViTForImageClassification")
    images = random_images(3, 3, 40, 60)
    before = torch.get_rng_state()
    features = extract_features(make_extractor(str(folder)), images)
    assert torch.equal(torch.get_rng_state(), before)
    model = transformers.ViTForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        expected = model.vit(pixel_values=by_hand("vit", images)).last_hidden_state[:, 0]
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_dinov3_needs_no_torchvision(tmp_path):
    config = transformers.DINOv3ViTConfig(
        image_size=32, patch_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.DINOv3ViTModel(config).eval()
    model.save_pretrained(tmp_path)
    processor = settings("vit") | {"image_processor_type": "DINOv3ViTImageProcessorFast"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor | {"size": {"height": 32, "width": 32}}))
    images = random_images(3, 3, 40, 60)
    pixels = normalised(resized(images, 32, 32, Image.Resampling.BILINEAR), processor)
    with torch.no_grad():
        expected = model(pixel_values=pixels).last_hidden_state[:, 0]
    extractor = make_extractor(str(tmp_path))
    torch.testing.assert_close(extract_features(extractor, images), expected, rtol=0, atol=1e-5)
    assert extractor.frechet_name == "Frechet distance"


def test_a_model_that_cannot_be_used_is_one_clear_line(folders, tmp_path, monkeypatch):
    def error(which):
        with pytest.raises(ValueError, match=r"^extractor is '") as caught:
            make_extractor(str(which))
        message = str(caught.value)
        assert message.startswith(f"extractor is '{which}'") and "\n" not in message
        return message

    def broken(name):
        return save_dinov2(tmp_path / name)

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in error(empty)

    folder = broken("without weights")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "has no model.safetensors: weights are read from safetensors alone" in error(folder)

    folder = broken("cut")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    assert "cannot be loaded: Safetensor" in error(folder)

    folder = broken("lacking")
    tensors = load_file(folder / "model.safetensors")
    del tensors["embeddings.cls_token"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lack 1 tensors, such as embeddings.cls_token" in error(folder)

    folder = broken("unknown")
    config = json.loads((folder / "config.json").read_text())
    code = {"auto_map": {"AutoModel": "code.Network", "AutoConfig": "code.Config"}, "model_type": "mine"}
    (folder / "config.json").write_text(json.dumps(config | code))
    (folder / "code.py").write_text("raise SystemExit('the code ran')")
    assert "cannot be" in error(folder)

    for i, content in enumerate(["{", "[1]", ""]):
        folder = broken(f"damaged {i}")
        (folder / "config.json").write_text(content)
        assert "whose config.json is damaged" in error(folder)

    assert "give a tag, branch or commit after the @" in error("user/model@")

    folder = broken("no processor")
    (folder / "preprocessor_config.json").unlink()
    assert "image processor cannot be used: OSError" in error(folder)

    folder = broken("lanczos")
    (folder / "preprocessor_config.json").write_text(json.dumps(CROPPED | {"resample": 1}))
    assert "resample 1: they must be True and one of 0, 2, 3" in error(folder)

    folder = broken("padding")
    padding = {"do_pad": True, "pad_size": {"height": 42, "width": 42}}
    (folder / "preprocessor_config.json").write_text(json.dumps(CROPPED | padding))
    assert "does not only resize, crop and normalise" in error(folder)

    text = tmp_path / "text"
    config = transformers.BertConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(text)
    (text / "preprocessor_config.json").write_text(json.dumps(CROPPED))
    assert "gives no features of images" in error(text)

    masked = tmp_path / "masked"
    config = transformers.ViTMAEConfig(
        image_size=28, patch_size=14, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    transformers.ViTMAEModel(config).save_pretrained(masked)
    (masked / "preprocessor_config.json").write_text(json.dumps(CROPPED))
    assert "ValueError: the output of ViTMAEModel is not pooled" in error(masked)

    folder = broken("not finite")
    save_file(
        tensors | {"embeddings.cls_token": torch.full((1, 1, 16), torch.nan)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert "features are non-finite" in error(folder)

    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(hub_features, "find_spec", lambda name: None)
    message = error(folders["dinov2"])
    assert 'transformers is not installed: pip install -c constraints.txt -e ".[train,eval]"' in message
