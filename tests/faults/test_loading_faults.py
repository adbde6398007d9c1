"""Damaged, incomplete or malicious folders are rejected by an error that names the fault; no code runs."""

import contextlib
import json
import math
import os
import pickle
import shutil
import struct
import tracemalloc
from collections import Counter

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers import DDPMPipeline as BuiltInDDPMPipeline
from safetensors.torch import load_file, save_file

from ddpm_pipeline import DDPMPipeline, DDPMScheduler
from tests.models import tiny_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A saved pipeline of a network with attention."""
    unet = tiny_unet(
        size=16,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        add_attention=True,
    )
    folder = tmp_path_factory.mktemp("intact") / "pipeline"
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(intact, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(intact, tmp_path / "pipeline")


def edit(file, **changes):
    content = json.loads(file.read_text())
    for name, value in changes.items():
        content[name] = value
    file.write_text(json.dumps(content))


def assert_rejected(folder, *fragments, error=ValueError, **options):
    with pytest.raises(error) as caught:
        DDPMPipeline.from_pretrained(str(folder), **options)
    for fragment in fragments:
        assert fragment in str(caught.value), caught.value
    assert len(str(caught.value)) < 1000, "too long to read"


def test_an_intact_folder_loads(folder):
    assert DDPMPipeline.from_pretrained(folder).unet.config.in_channels == 1
    assert DDPMPipeline.from_pretrained(str(folder), dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_a_missing_folder_and_the_folder_of_a_run_are_named(folder, tmp_path):
    assert_rejected(tmp_path / "nothing", "is not a local folder", error=FileNotFoundError)
    assert_rejected("./nothing", "is not a local folder", error=FileNotFoundError)
    assert_rejected(tmp_path, "is the folder of a run, load", str(folder), error=FileNotFoundError)


def test_other_schedulers_variants_and_shards_load(folder):
    pipe = DDPMPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(folder.parent / "ddim", variant="fp16")
    loaded = DDPMPipeline.from_pretrained(folder.parent / "ddim", variant="fp16")
    assert isinstance(loaded.scheduler, DDIMScheduler)
    pipe.unet.save_pretrained(folder / "unet", max_shard_size="30KB")
    (folder / "unet" / WEIGHTS).unlink(missing_ok=True)
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    again = DDPMPipeline.from_pretrained(folder).unet.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in pipe.unet.state_dict().items())


def test_attention_with_old_tensor_names_loads(folder):
    tensors = load_file(folder / "unet" / WEIGHTS)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    assert any(".proj_attn." in name for name in tensors)
    expected = DDPMPipeline.from_pretrained(folder).unet.state_dict()
    save_file(tensors, folder / "unet" / WEIGHTS)
    loaded = DDPMPipeline.from_pretrained(folder).unet.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_components_passed_as_arguments_are_not_checked(folder):
    pipe = DDPMPipeline.from_pretrained(folder)
    (folder / "unet" / WEIGHTS).write_bytes(b"damaged")
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="v_predict")
    assert DDPMPipeline.from_pretrained(folder, unet=pipe.unet, scheduler=pipe.scheduler).unet is pipe.unet


# ---- Pickles ---------------------------------------------------------------------------------------------------------


class Canary:
    """Unpickling it creates a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("options", [{}, {"use_safetensors": False}, {"use_safetensors": True}])
@pytest.mark.parametrize("write", ["pickle", "zip", "legacy", "among tensors", "in a subclass of dict"])
def test_code_in_pickled_weights_does_not_run(folder, tmp_path, write, options):
    tensors = load_file(folder / "unet" / WEIGHTS)
    (folder / "unet" / WEIGHTS).unlink()
    file, canary = folder / "unet" / "diffusion_pytorch_model.bin", Canary(tmp_path / "ran")
    if write == "pickle":
        file.write_bytes(pickle.dumps(canary))
    elif write == "among tensors":
        torch.save(tensors | {"conv_in.bias": canary}, file)
    elif write == "in a subclass of dict":
        torch.save(Counter(canary=canary), file)
    else:
        torch.save(canary, file, _use_new_zipfile_serialization=write == "zip")
    if options.get("use_safetensors"):
        assert_rejected(folder, WEIGHTS, "only diffusion_pytorch_model.bin", **options)
    else:
        assert_rejected(folder, str(file), "is refused", "no code in it ran", **options)
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(pickle.UnpicklingError, RuntimeError):
        torch.load(file, weights_only=False)
    if write != "pickle":
        assert (tmp_path / "ran").exists(), "the canary does not work"


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ([1, 2], ["list"]),
        (torch.zeros(3), ["Tensor", "names to tensors"]),
        ({"state_dict": {"conv_in.weight": torch.zeros(1)}}, ["dict", "state_dict"]),
        ({"conv_in.weight": [0.0, 1.0]}, ["list", "conv_in.weight"]),
        ({"conv_in.weight": "text"}, ["str", "conv_in.weight"]),
        ({3: torch.zeros(1)}, ["3"]),
        ({"conv_in.weight": torch.zeros(2)}, ["lacks"]),
        ({"conv_in.weight": torch.zeros(2, 2).to_sparse()}, ["conv_in.weight is sparse"]),
        ({"conv_in.weight": torch.zeros(2, device="meta")}, ["has no data"]),
    ],
)
def test_pickled_weights_map_names_to_tensors(folder, content, fragments):
    (folder / "unet" / WEIGHTS).unlink()
    file = folder / "unet" / "diffusion_pytorch_model.bin"
    torch.save(content, file)
    assert_rejected(folder, str(file), *fragments)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-500], lambda data: data[:100], lambda data: b"", lambda data: b"x" * 9]
)
@pytest.mark.parametrize("new_format", [True, False])
def test_damaged_pickled_weights_are_named(folder, damage, new_format):
    file = folder / "unet" / "diffusion_pytorch_model.bin"
    torch.save(load_file(folder / "unet" / WEIGHTS), file, _use_new_zipfile_serialization=new_format)
    (folder / "unet" / WEIGHTS).unlink()
    file.write_bytes(damage(file.read_bytes()))
    assert_rejected(folder, str(file), "is refused")


def test_pickled_weights_are_checked_like_others(folder):
    """Names, shapes, dtypes and finite values; also where use_safetensors=False asks for them."""
    file = folder / "unet" / "diffusion_pytorch_model.bin"
    tensors, name = load_file(folder / "unet" / WEIGHTS), "conv_in.weight"
    for changed, fragment in (
        ({"another": torch.zeros(2)}, "another"),
        ({name: tensors[name][:1]}, name),
        ({name: tensors[name].long()}, "torch.int64"),
        ({name: tensors[name] * math.nan}, "non-finite"),
    ):
        torch.save(tensors | changed, file)
        assert_rejected(folder, fragment, use_safetensors=False)


# ---- model_index.json ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "fragments"),
    [
        ({"unet": ["os", "system"]}, ["unet", "os"]),
        ({"unet": ["../../evil", "X"]}, ["unet", "../../evil"]),
        ({"unet": ["/evil", "X"]}, ["unet", "/evil"]),
        ({"unet": ["diffusers", "AutoencoderKL"]}, ["unet", "AutoencoderKL"]),
        ({"scheduler": ["os", "system"]}, ["scheduler", "os"]),
        ({"scheduler": ["diffusers", "DiffusionPipeline"]}, ["scheduler", "DiffusionPipeline"]),
        ({"scheduler": ["diffusers", "NoSuchScheduler"]}, ["scheduler", "NoSuchScheduler"]),
        ({"scheduler": ["ddpm_pipeline", "DDPMScheduler"]}, ["scheduler", "ddpm_pipeline"]),
        ({"vae": ["diffusers", "AutoencoderKL"]}, ["vae"]),
        ({"unet": [1, 2]}, ["unet", "[1, 2]"]),
        ({"unet": ["diffusers", "UNet2DModel", "x"]}, ["unet"]),
        ({"scheduler": None}, ["scheduler", "null"]),
        ({"_class_name": ["pipeline", "Evil"]}, ["_class_name", "Evil"]),
        ({"_class_name": None}, ["_class_name"]),
    ],
)
def test_the_index_must_list_a_unet_and_a_scheduler_of_diffusers(folder, entry, fragments, tmp_path):
    (folder / "pipeline.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    edit(folder / "model_index.json", **entry)
    assert_rejected(folder, "model_index.json", *fragments)
    assert not (tmp_path / "ran").exists()


def test_an_index_that_is_not_a_json_object_is_rejected(folder):
    file = folder / "model_index.json"
    text = file.read_text()
    for content, fragment in ((text[:-5], "not JSON"), ("", "not JSON"), ("[]", "object"), ("[" * 100_000, "not JSON")):
        file.write_text(content)
        assert_rejected(folder, "model_index.json", fragment)
    file.write_bytes(b"\xff\xfe")
    assert_rejected(folder, "model_index.json", "not JSON")
    file.unlink()
    assert_rejected(folder, "model_index.json", "missing", error=OSError)


def test_a_huge_index_is_not_read(folder):
    with open(folder / "model_index.json", "r+b") as file:
        file.truncate(100 * 2**20)
    tracemalloc.start()
    assert_rejected(folder, "model_index.json", str(100 * 2**20))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


# ---- Weights ---------------------------------------------------------------------------------------------------------


def test_missing_tensors_are_named_where_the_built_in_loader_accepts_them(folder):
    file = folder / "unet" / WEIGHTS
    tensors = load_file(file)
    del tensors["conv_in.weight"], tensors["mid_block.resnets.0.conv1.bias"]
    save_file(tensors, file)
    built_in = BuiltInDDPMPipeline.from_pretrained(folder, low_cpu_mem_usage=False)  # the path without accelerate
    assert built_in(num_inference_steps=1, output_type="np").images.size
    assert_rejected(folder, str(file), "conv_in.weight", "mid_block.resnets.0.conv1.bias")


def test_extra_tensors_and_other_shapes_and_dtypes_are_named(folder):
    file = folder / "unet" / WEIGHTS
    tensors = load_file(file)
    name = "conv_in.weight"
    for changed, fragments in (
        ({"another.weight": torch.zeros(2)}, ["another.weight"]),
        ({name: torch.zeros(8, 3, 3, 3)}, [name, "(8, 3, 3, 3)", "(8, 1, 3, 3)"]),
        ({name: tensors[name].to(torch.int32)}, [name, "I32"]),
    ):
        save_file(tensors | changed, file)
        assert_rejected(folder, str(file), *fragments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_named(folder, value):
    file = folder / "unet" / WEIGHTS
    tensors = load_file(file)
    tensors["conv_out.bias"][0] = value
    save_file(tensors, file)
    assert_rejected(folder, "conv_out.bias", "finite")


def test_a_damaged_safetensors_file_is_named(folder):
    file = folder / "unet" / WEIGHTS
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    first, second = [name for name in header if name != "__metadata__"][:2]
    overlapping = json.loads(json.dumps(header))
    overlapping[second]["data_offsets"][0] = overlapping[first]["data_offsets"][0]
    text = json.dumps(overlapping).encode()
    for damaged in (
        struct.pack("<Q", 2**63) + content[8:],
        struct.pack("<Q", len(text)) + text + content[8 + length :],
        content[:-1],
        content[:4],
        b"",
    ):
        file.write_bytes(damaged)
        assert_rejected(folder, str(file), "safetensors")


# ---- Configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"in_channels": 3}, ["conv_in.weight", "(8, 1, 3, 3)", "(8, 3, 3, 3)"]),
        ({"in_channels": 10**12}, ["in_channels", str(10**12)]),
        ({"in_channels": 0}, ["in_channels", "0"]),
        ({"in_channels": "1"}, ["in_channels", "'1'"]),
        ({"out_channels": 4}, ["conv_out"]),
        ({"sample_size": 0}, ["sample_size", "0"]),
        ({"sample_size": [16, -1]}, ["sample_size", "-1"]),
        ({"layers_per_block": 10**9}, ["layers_per_block", str(10**9)]),
        ({"block_out_channels": [2**40, 2**40]}, ["block_out_channels", str(2**40)]),
        ({"block_out_channels": [8] * 10**5}, ["block_out_channels", str(10**5)]),
        ({"block_out_channels": [2**16, 2**16]}, ["shape"]),
        ({"down_block_types": ["DownBlock2D", "../evil"]}, ["../evil"]),
        ({"num_class_embeds": 10**18}, ["num_class_embeds", str(10**18)]),
        ({"chanels": 3}, ["chanels", "does not know"]),
    ],
)
def test_an_impossible_network_is_refused_before_memory_is_allocated(folder, changes, fragments):
    edit(folder / "unet" / "config.json", **changes)
    tracemalloc.start()
    assert_rejected(folder, *fragments)
    assert tracemalloc.get_traced_memory()[1] < 30 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"num_train_timesteps": 0}, ["num_train_timesteps", "0"]),
        ({"num_train_timesteps": 10**10}, ["num_train_timesteps", str(10**10)]),
        ({"num_train_timesteps": 1e10}, ["num_train_timesteps"]),
        ({"prediction_type": "v_predict"}, ["prediction_type", "v_predict"]),
        ({"variance_type": "small"}, ["variance_type", "small"]),
        ({"beta_schedule": "square"}, ["beta_schedule", "square"]),
        ({"beta_end": 20.0}, ["bet"]),
        ({"trained_betas": "evil"}, ["trained_betas", "evil"]),
        ({"trained_betas": [0.1] * 200_000}, ["trained_betas"]),
        ({"predicton_type": "epsilon"}, ["predicton_type", "does not know"]),
    ],
)
@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
def test_an_impossible_scheduler_is_refused_before_memory_is_allocated(folder, changes, fragments, scheduler):
    ddpm_only = {"variance_type", "prediction_type", "beta_schedule", "beta_end"}
    if scheduler != "DDPMScheduler" and changes.keys() & ddpm_only:
        pytest.skip("diffusers checks the values of other schedulers' fields")
    edit(folder / "model_index.json", scheduler=["diffusers", scheduler])
    file = folder / "scheduler" / "scheduler_config.json"
    edit(file, _class_name=scheduler, **changes)
    tracemalloc.start()
    assert_rejected(folder, "scheduler_config.json", *fragments)
    assert tracemalloc.get_traced_memory()[1] < 60 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5])
def test_impossible_numbers_of_steps_are_refused(folder, steps):
    with pytest.raises(ValueError, match=f"num_inference_steps is {steps}"):
        DDPMPipeline.from_pretrained(folder)(num_inference_steps=steps)


def test_an_obsolete_field_is_ignored(folder):
    edit(folder / "scheduler" / "scheduler_config.json", tensor_format="pt")
    assert DDPMPipeline.from_pretrained(folder)
