"""Folders as earlier versions of diffusers, and other people, saved them: weights in .bin files, shards, fields of
2022, and a network without a size."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers import DDPMPipeline as BuiltInDDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as BuiltInDDPMScheduler

from ddpm_pipeline import DDPMPipeline, DDPMScheduler
from tests.models import quiet, tiny_pipe, tiny_unet

WEIGHTS = "diffusion_pytorch_model"


def images_of(pipe):
    return quiet(pipe)(2, torch.Generator().manual_seed(0), 20, "np").images


# ---- Weights ---------------------------------------------------------------------------------------------------------

SAVES = {
    "bin": {"safe_serialization": False},
    "bin, variant": {"safe_serialization": False, "variant": "fp16"},
    "bin, shards": {"safe_serialization": False, "max_shard_size": "2KB"},
    "bin, shards, variant": {"safe_serialization": False, "max_shard_size": "2KB", "variant": "fp16"},
    "safetensors, shards, variant": {"max_shard_size": "2KB", "variant": "fp16"},
}


@pytest.mark.parametrize(("name", "flat"), [*((name, False) for name in SAVES), ("bin", True), ("bin, shards", True)])
def test_all_formats_load(name, flat, tmp_path):
    """With one warning that names safetensors for .bin files. Flat: all files are beside model_index.json."""
    pipe, options = tiny_pipe(3), SAVES[name]
    pipe.save_pretrained(tmp_path, **options)
    if flat:
        for component in ("unet", "scheduler"):
            for file in (tmp_path / component).iterdir():
                file.rename(tmp_path / file.name)
            (tmp_path / component).rmdir()
    load = {"variant": options.get("variant")}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = DDPMPipeline.from_pretrained(tmp_path, **load)
    messages = [str(warning.message) for warning in caught if "safetensors" in str(warning.message)]
    assert len(messages) == ("bin" in name)
    np.testing.assert_array_equal(images_of(loaded), images_of(pipe))


def test_bin_with_tensors_of_a_module_and_of_the_old_format_load(tmp_path):
    """What `torch.save(unet.state_dict())` writes has parameters or metadata, and before PyTorch 1.6 it was no zip."""
    pipe = tiny_pipe()
    pipe.save_pretrained(tmp_path)
    (tmp_path / "unet" / f"{WEIGHTS}.safetensors").unlink()
    for content in (pipe.unet.state_dict(), dict(pipe.unet.named_parameters())):
        for new_format in (True, False):
            torch.save(content, tmp_path / "unet" / f"{WEIGHTS}.bin", _use_new_zipfile_serialization=new_format)
            with pytest.warns(UserWarning, match="safetensors"):
                loaded = DDPMPipeline.from_pretrained(tmp_path)
            np.testing.assert_array_equal(images_of(loaded), images_of(pipe))


def test_safetensors_are_preferred_and_can_be_asked_for(tmp_path):
    first, second = tiny_pipe(seed=1), tiny_pipe(seed=2)
    first.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="is loaded instead"):
        second.save_pretrained(tmp_path, safe_serialization=False)
    np.testing.assert_array_equal(images_of(DDPMPipeline.from_pretrained(tmp_path)), images_of(first))
    with pytest.warns(UserWarning, match="safetensors"):
        loaded = DDPMPipeline.from_pretrained(tmp_path, use_safetensors=False)
    np.testing.assert_array_equal(images_of(loaded), images_of(second))
    (tmp_path / "unet" / f"{WEIGHTS}.safetensors").unlink()
    with pytest.raises(ValueError, match=r"use_safetensors=None to read \.bin"):
        DDPMPipeline.from_pretrained(tmp_path, use_safetensors=True)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("sharded_first", [True, False])
def test_the_last_save_is_loaded(sharded_first, safe, variant, tmp_path):
    """Shards over a single file, and a single file over shards, also by the built-in pipeline."""
    kind = {"safe_serialization": safe, "variant": variant}
    shards = {"max_shard_size": "2KB"}
    before, after = tiny_pipe(seed=1), tiny_pipe(seed=2)
    before.save_pretrained(tmp_path, **kind, **(shards if sharded_first else {}))
    after.save_pretrained(tmp_path, **kind, **({} if sharded_first else shards))
    names = sorted(path.name for path in (tmp_path / "unet").iterdir())
    assert any("index" in name for name in names) != sharded_first
    load = {"variant": variant, "use_safetensors": safe}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for pipeline in (DDPMPipeline, BuiltInDDPMPipeline):
            np.testing.assert_allclose(
                images_of(pipeline.from_pretrained(tmp_path, **load)), images_of(after), atol=1e-5
            )


@pytest.mark.parametrize("safe", [True, False])
def test_a_save_in_the_other_format_over_shards_is_loaded(safe, tmp_path):
    """diffusers removes the shards of the other format, and leaves their index."""
    before, after = tiny_pipe(seed=1), tiny_pipe(seed=2)
    before.save_pretrained(tmp_path, safe_serialization=not safe, max_shard_size="2KB")
    after.save_pretrained(tmp_path, safe_serialization=safe)
    assert not list(tmp_path.glob("unet/*.index.*"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(images_of(DDPMPipeline.from_pretrained(tmp_path)), images_of(after))


def test_an_index_of_missing_shards_is_named(tmp_path):
    pipe = tiny_pipe()
    pipe.save_pretrained(tmp_path, max_shard_size="2KB")
    index = tmp_path / "unet" / f"{WEIGHTS}.safetensors.index.json"
    text = index.read_text()
    pipe.save_pretrained(tmp_path)
    index.write_text(text)
    with pytest.raises(ValueError, match=r"index\.json names .* more files, not in this folder: remove the index"):
        DDPMPipeline.from_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../evil.safetensors"}}))
    with pytest.raises(ValueError, match=r"names \.\./evil\.safetensors"):
        DDPMPipeline.from_pretrained(tmp_path)
    for wrong in ([], {"conv_in.weight": 3}):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ValueError, match="weight_map is"):
            DDPMPipeline.from_pretrained(tmp_path)


# ---- Fields of 2022 --------------------------------------------------------------------------------------------------

OLD = {
    "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02, "beta_schedule": "linear",
    "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 20, "timestep_values": None,
    "trained_betas": None, "tensor_format": "pt", "variance_type": "fixed_large",
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "prediction_type"),
    [
        ({}, "epsilon"),
        ({"predict_epsilon": True}, "epsilon"),
        ({"predict_epsilon": False}, "sample"),
        ({"predict_epsilon": None}, "epsilon"),
        ({"predict_epsilon": False, "prediction_type": "sample"}, "sample"),
        (
            {"predict_epsilon": False, "prediction_type": "epsilon", "_use_default_values": ["prediction_type"]},
            "sample",
        ),
        ({"predict_epsilon": None, "prediction_type": "v_prediction"}, "v_prediction"),
        ({"clip_predicted_image": None}, "epsilon"),
    ],
)
def test_old_configurations(fields, prediction_type, tmp_path, diffusers_log):
    """Read by each way to get our scheduler; saved, they are configurations of today."""
    pipe = tiny_pipe(scheduler=DDPMScheduler(20, prediction_type=prediction_type, variance_type="fixed_large"))
    pipe.save_pretrained(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(OLD | fields))
    unet = json.loads((tmp_path / "unet" / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(json.dumps(unet | {"tensor_format": "pt", "removed": None}))
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    built_in = BuiltInDDPMPipeline.from_pretrained(tmp_path)  # ignores the old fields, but keeps them
    ways = [
        loaded,
        DDPMPipeline(built_in.unet, built_in.scheduler),
        DDPMPipeline(built_in.unet, DDPMScheduler.from_config(built_in.scheduler.config)),
        DDPMPipeline(built_in.unet, DDPMScheduler.from_config(OLD | fields)),
        DDPMPipeline(built_in.unet, DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")),
    ]
    for way in ways:
        assert type(way.scheduler) is DDPMScheduler
        assert way.scheduler.prediction_type == way.scheduler.config.prediction_type == prediction_type
        assert not {"predict_epsilon", "timestep_values", "tensor_format"} & way.scheduler.config.keys()
        np.testing.assert_array_equal(images_of(way), images_of(pipe))
    loaded.save_pretrained(tmp_path / "again")
    diffusers_log.clear()
    again = BuiltInDDPMPipeline.from_pretrained(tmp_path / "again")
    assert again.scheduler.config.prediction_type == prediction_type
    assert [record.getMessage() for record in diffusers_log.records] == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"predict_epsilon": False, "prediction_type": "epsilon"}, "predict_epsilon is False, but prediction_type is"),
        ({"predict_epsilon": True, "prediction_type": "v_prediction"}, "predict_epsilon is True, but prediction_type"),
        ({"predict_epsilon": "no"}, "predict_epsilon is 'no'"),
        ({"predict_epsilon": 1}, "predict_epsilon is 1"),
        ({"timestep_values": [5, 3, 1]}, r"timestep_values is \[5, 3, 1\]"),
        ({"clip_predicted_image": True}, "clip_predicted_image"),
    ],
)
def test_old_fields_that_cannot_be_followed_are_named(fields, message, tmp_path):
    tiny_pipe().save_pretrained(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(OLD | fields))
    with pytest.raises(ValueError, match=message):
        DDPMPipeline.from_pretrained(tmp_path)


def test_old_fields_of_other_schedulers(tmp_path):
    """One without a value changes nothing; one with a value is refused."""
    tiny_pipe(scheduler=DDIMScheduler(20)).save_pretrained(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"timestep_values": None, "tensor_format": "np"}))
    assert isinstance(DDPMPipeline.from_pretrained(tmp_path).scheduler, DDIMScheduler)
    file.write_text(json.dumps(config | {"predict_epsilon": False}))
    with pytest.raises(ValueError, match="predict_epsilon"):
        DDPMPipeline.from_pretrained(tmp_path)


def test_predict_epsilon_as_an_argument_of_from_config():
    """As code of 2022 writes it."""
    config = BuiltInDDPMScheduler().config
    assert DDPMScheduler.from_config(config, predict_epsilon=False).prediction_type == "sample"
    assert DDPMScheduler.from_config(config, predict_epsilon=True).prediction_type == "epsilon"


# ---- A network without a size ----------------------------------------------------------------------------------------


def test_a_network_without_a_sample_size(tmp_path):
    tiny_pipe(3).save_pretrained(tmp_path)
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": None}))
    pipe = quiet(DDPMPipeline.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="height"):
        pipe(num_inference_steps=2)
    assert pipe(num_inference_steps=2, height=8, width=16, output_type="np").images.shape == (1, 8, 16, 3)
    assert pipe(num_inference_steps=2, latents=torch.zeros(1, 3, 16, 8), output_type="np").images.shape == (1, 16, 8, 3)
    image = np.zeros((8, 16, 3), dtype=np.uint8)
    assert pipe.vary(image, 0.5, 2, output_type="np").images.shape == (1, 8, 16, 3)
    assert pipe.invert(image, 2).shape == (1, 3, 8, 16)
    pipe.save_pretrained(tmp_path / "again")
    shutil.rmtree(tmp_path / "unet")
    assert DDPMPipeline.from_pretrained(tmp_path / "again").unet.config.sample_size is None
    assert tiny_unet(3, size=None).config.sample_size is None
