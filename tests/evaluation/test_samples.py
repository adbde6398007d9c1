"""The models of a run, and the shards in which samples are stored."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddpm_pipeline import DDPMPipeline, DDPMScheduler
from tests.evaluation.helpers import fake_runtime, numbered_images
from training.evaluation.samples import SHARD_SIZE, WEIGHTS_FILE, Model, SamplerConfig, Shards, load_models, sample

MODEL = Model(None, "EMA", "0" * 64, "1" * 64, None)
SHAPE = (1, 2, 2)  # of a sample, as numbered_images has it

# ---- Models ----------------------------------------------------------------------------------------------------------


def test_ema_and_online_weights(run, work, saved_pipeline):
    ema, online = load_models(str(run), ["ema", "online"])
    assert (ema.weights, online.weights) == ("EMA", "online")
    online_file = run / "checkpoint-000006" / "model.safetensors"
    assert online.sha256 == hashlib.sha256(online_file.read_bytes()).hexdigest() != ema.sha256
    for model, file in ((ema, run / "pipeline" / WEIGHTS_FILE), (online, online_file)):
        tensors = load_file(file)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.pipe.unet.state_dict().items())
        assert not model.pipe.unet.training
        assert model.record.step == 6
    assert [model.weights for model in load_models(str(run), ["online"])] == ["online"]
    assert [model.weights for model in load_models(str(saved_pipeline), ["ema", "online"])] == ["EMA"]
    with pytest.raises(ValueError, match=r"saved has no checkpoints: give --weights ema"):
        load_models(str(saved_pipeline), ["online"])
    with pytest.raises(ValueError, match=r"is neither a saved pipeline nor a finished run with pipeline/"):
        load_models(str(work), ["ema"])


def test_online_weights_of_another_step_or_none_are_refused(run, tmp_path):
    shutil.copytree(run / "pipeline", tmp_path / "pipeline")
    with pytest.raises(ValueError, match=r"there are no online weights: .* give --weights ema"):
        load_models(str(tmp_path), ["ema", "online"])
    (tmp_path / "checkpoint-000006").symlink_to(run / "checkpoint-000006")
    assert len(load_models(str(tmp_path), ["ema", "online"])) == 2
    record = tmp_path / "pipeline" / "training.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"step": 3}))
    with pytest.raises(ValueError, match=r"is of step 6, pipeline/ of step 3: give --weights ema"):
        load_models(str(tmp_path), ["ema", "online"])
    assert [model.weights for model in load_models(str(tmp_path), ["ema"])] == ["EMA"]


def test_samples_of_another_scheduler_have_another_folder(run, work):
    model = load_models(str(run), ["ema"])[0]
    assert model.scheduler_hash == load_models(str(work / "run"), ["online"])[0].scheduler_hash
    scheduler = DDPMScheduler.from_config(model.pipe.scheduler.config, variance_type="fixed_large")
    DDPMPipeline(model.pipe.unet, scheduler).save_pretrained(work / "other scheduler")
    changed = load_models(str(work / "other scheduler"), ["ema"])[0]
    folders = [make_shards(work, one, SamplerConfig(4, 1.0), 0, "float32").folder for one in (model, changed)]
    assert changed.sha256 == model.sha256 and folders[0] != folders[1]
    assert f"-scheduler-{model.scheduler_hash[:8]}-" in folders[0].name


def test_a_model_that_is_replaced_while_it_is_read_is_refused(work, monkeypatch):
    """The hash in the report must be that of the weights that were measured."""
    from_pretrained = DDPMPipeline.from_pretrained

    def replace(folder, **options):
        pipe = from_pretrained(folder, **options)
        pipe.unet.conv_in.weight.data += 1
        pipe.save_pretrained(folder)
        return pipe

    folder = work / "replaced"
    shutil.copytree(work / "run" / "pipeline", folder)
    monkeypatch.setattr(DDPMPipeline, "from_pretrained", replace)
    with pytest.raises(ValueError, match="was replaced while it was read"):
        load_models(str(folder), ["ema"])


# ---- Shards ----------------------------------------------------------------------------------------------------------


def make_shards(folder, model, sampler, seed, precision, shape=SHAPE, pixel_dtype=np.uint8):
    return Shards(
        folder, model, sampler, seed=seed, precision=precision, shape=shape, pixel_dtype=np.dtype(pixel_dtype)
    )


def test_samples_of_another_shape_or_depth_are_drawn_again(tmp_path):
    """The images at hand may have become 16-bit, or a run may have been begun again in its folder."""
    settings = (tmp_path, MODEL, SamplerConfig(5, 1.0), 0, "float32")
    make_shards(*settings).save(0, np.zeros((SHARD_SIZE, *SHAPE), np.uint8))
    assert make_shards(*settings).missing(SHARD_SIZE) == []
    assert make_shards(*settings, pixel_dtype=np.uint16).missing(SHARD_SIZE) == [0]
    assert make_shards(*settings, shape=(1, 4, 4)).missing(SHARD_SIZE) == [0]


def test_a_half_written_shard_is_missing(tmp_path, monkeypatch):
    shards = make_shards(tmp_path, MODEL, SamplerConfig(5, 0.5), 7, "bf16")
    assert shards.missing(2 * SHARD_SIZE + 1) == [0, 1, 2]
    first, last = numbered_images(0, SHARD_SIZE), numbered_images(100, SHARD_SIZE)
    shards.save(1, last)
    assert shards.missing(2 * SHARD_SIZE) == [0] and shards.missing(SHARD_SIZE) == [0]

    def write_half(file, pixels):
        file.write(pixels.tobytes()[:100])
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", write_half)
        with pytest.raises(OSError, match="no space left"):
            shards.save(0, first)
    assert shards.missing(2 * SHARD_SIZE) == [0]
    shards.save(0, first)
    assert shards.missing(2 * SHARD_SIZE) == [] and shards.missing(2 * SHARD_SIZE + 1) == [2]
    assert np.array_equal(shards.load(SHARD_SIZE + 2), np.concatenate([first, last[:2]]))


def test_a_damaged_shard_is_drawn_again(tmp_path):
    shards = make_shards(tmp_path, MODEL, SamplerConfig(5, 1.0), 0, "float32")
    pixels = np.zeros((64, 1, 2, 2), np.uint8)
    shards.save(0, pixels)
    shards.save(1, pixels)
    assert shards.missing(128) == []
    file = next(shards.folder.glob("00001.npy"))
    file.write_bytes(file.read_bytes()[:90])
    assert shards.missing(128) == [1]


def test_whatever_changes_the_samples_changes_the_folder(tmp_path):
    sampler = SamplerConfig(5, 0.5)
    folders = [
        make_shards(tmp_path, *arguments).folder
        for arguments in (
            (MODEL, sampler, 7, "bf16"),
            (MODEL._replace(weights="online"), sampler, 7, "bf16"),
            (MODEL._replace(sha256="2" * 64), sampler, 7, "bf16"),
            (MODEL._replace(scheduler_hash="2" * 64), sampler, 7, "bf16"),
            (MODEL, SamplerConfig(6, 0.5), 7, "bf16"),
            (MODEL, SamplerConfig(5, 0.25), 7, "bf16"),
            (MODEL, sampler, 8, "bf16"),
            (MODEL, sampler, 7, "float32"),
        )
    ]
    assert len(set(folders)) == len(folders)


# ---- Sampling --------------------------------------------------------------------------------------------------------


class SeedPipeline:
    """A pipeline whose images have the brightness of their seeds; it records its calls."""

    def __init__(self):
        self.calls = []

    def to(self, device):
        return self

    def set_progress_bar_config(self, **options):
        pass

    def __call__(self, *, seeds, **options):
        self.calls.append((len(seeds), options))
        return (torch.tensor(seeds).view(-1, 1, 1, 1) / 500 - 1,)


@pytest.mark.parametrize("pixel_dtype", [np.uint8, np.uint16])
def test_each_rank_draws_missing_shards(tmp_path, pixel_dtype):
    pipe = SeedPipeline()
    model = MODEL._replace(pipe=pipe)
    sampler = SamplerConfig(7, 0.5)
    shards = make_shards(tmp_path, model, sampler, 100, "float32", shape=(1, 1, 1), pixel_dtype=pixel_dtype)
    options = {"batch_size": 25}
    seconds = sample(model, sampler, shards, 4 * SHARD_SIZE - 5, runtime=fake_runtime(2, rank=1), **options)
    assert seconds > 0
    assert shards.missing(4 * SHARD_SIZE) == [0, 2]
    assert [count for count, _ in pipe.calls] == [25, 25, 14] * 2
    assert callable(pipe.calls[0][1].pop("callback_on_step_end"))
    assert pipe.calls[0][1] == {"num_inference_steps": 7, "eta": 0.5, "output_type": "latent", "return_dict": False}
    sample(model, sampler, shards, 4 * SHARD_SIZE, runtime=fake_runtime(), **options)
    assert len(pipe.calls) == 12
    assert sample(model, sampler, shards, 4 * SHARD_SIZE, runtime=fake_runtime(), **options) == 0
    assert len(pipe.calls) == 12
    pixels = shards.load(4 * SHARD_SIZE)
    white = np.iinfo(pixel_dtype).max
    assert pixels.dtype == pixel_dtype and pixels.shape == (256, 1, 1, 1)
    assert np.abs(pixels[:, 0, 0, 0] - np.arange(100, 356) / 1000 * white).max() <= 0.51
