"""Presets against published sizes, shapes, saving as a plain UNet2DModel, attention, initial weights, bad input."""

import re

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from ddpm_pipeline import DDPMPipeline, DDPMScheduler
from ddpm_pipeline.fast_unet import speed_up
from ddpm_pipeline.images import record_background
from tests.models import tiny_pipe, tiny_unet
from training.denoiser import PRESETS, find_preset, load_initial_weights, make_denoiser

SQUARE = {"height": 32, "width": 32, "in_channels": 3}


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_number_of_parameters():
    small = make_denoiser("small", **SQUARE)
    assert count_parameters(small) == 6_472_195
    assert len(list(small.parameters())) == 268
    assert 1e6 < count_parameters(make_denoiser("tiny", **SQUARE)) < 3e6


def test_ddpm_cifar10_has_the_published_size_and_configuration():
    model = make_denoiser("ddpm-cifar10", **SQUARE)
    assert count_parameters(model) == 35_746_307
    config = model.config
    published = {
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [128, 256, 256, 256],
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "downsample_padding": 0,
        "act_fn": "silu",
        "attention_head_dim": None,
        "norm_num_groups": 32,
        "norm_eps": 1e-6,
        "dropout": 0.1,  # appendix B of the paper; that file was converted for sampling and has none
    }
    assert {name: list(v) if isinstance(v := config[name], tuple) else v for name in published} == published


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("height", "width", "in_channels", "out_channels"), [(16, 16, 1, None), (8, 24, 4, 8)])
def test_shapes_of_input_and_prediction(name, height, width, in_channels, out_channels):
    model = make_denoiser(name, height=height, width=width, in_channels=in_channels, out_channels=out_channels)
    assert model.config.sample_size == (height if height == width else (height, width))
    assert next(model.parameters()).dtype == torch.float32
    with torch.no_grad():
        sample = model(torch.randn(2, in_channels, height, width), torch.tensor([0, 999])).sample
    assert sample.shape == (2, out_channels or in_channels, height, width)
    assert sample.isfinite().all()


def test_the_small_network_takes_28_pixels():
    model = make_denoiser("small", height=28, width=28, in_channels=1)
    with torch.no_grad():
        assert model(torch.randn(1, 1, 28, 28), 5).sample.shape == (1, 1, 28, 28)


def test_class_labels_and_dropout():
    model = make_denoiser("tiny", height=16, width=16, in_channels=1, num_class_embeds=11, dropout=0.25)
    assert model.config.dropout == 0.25
    assert model.down_blocks[0].resnets[0].dropout.p == 0.25
    model.eval()
    x, t = torch.randn(1, 1, 16, 16), torch.tensor([500])
    with torch.no_grad():
        a, b = (model(x, t, class_labels=torch.tensor([label])).sample for label in (3, 10))
        assert not torch.equal(a, b)
    with pytest.raises(ValueError, match="class_labels"):
        model(x, t)


def test_make_denoiser_does_not_change_the_preset():
    before = repr(PRESETS)
    make_denoiser("tiny", **SQUARE, dropout=0.5)
    assert repr(PRESETS) == before


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_a_saved_model_is_a_plain_unet_with_equal_predictions(tmp_path, size):
    model = make_denoiser("tiny", height=size[0], width=size[1], in_channels=2, num_class_embeds=3).eval()
    speed_up(model)
    model.save_pretrained(str(tmp_path))
    loaded, info = UNet2DModel.from_pretrained(str(tmp_path), output_loading_info=True)
    assert not any(info.values())
    assert loaded.config._class_name == "UNet2DModel"
    x, label = torch.randn(2, 2, *size), torch.tensor([0, 2])
    with torch.no_grad():
        saved, reloaded = (m(x, 7, class_labels=label).sample for m in (model, loaded))
    torch.testing.assert_close(saved, reloaded, rtol=1e-4, atol=1e-5)  # they differ in rounding
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "huge"}, "denoiser is 'huge': give one of tiny, small, ddpm-cifar10"),
        ({"height": 28}, "height is 28.* multiple of 8"),
        ({"width": 4}, "width is 4.* multiple of 8"),
        ({"name": "ddpm-cifar10", "width": 28}, "width is 28.* multiple of 8"),
        ({"height": 0}, "height is 0"),
        ({"height": -32}, "height is -32"),
        ({"height": 32.0}, "height is 32.0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"in_channels": "RGB"}, "in_channels is 'RGB'"),
        ({"out_channels": -1}, "out_channels is -1"),
        ({"num_class_embeds": 0}, "num_class_embeds is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"dropout": "none"}, "dropout is 'none'"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        make_denoiser(**{"name": "tiny", **SQUARE} | change)


# ---- Initial weights -------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    tiny_pipe(channels=3).save_pretrained(str(tmp_path / "pipeline"))
    return str(tmp_path / "pipeline")


def test_initial_weights_of_a_saved_model(saved):
    lines = []
    unet = tiny_unet(channels=3, seed=1)
    load_initial_weights(saved, unet, DDPMScheduler(20), lines.append)
    expected = tiny_unet(channels=3).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in unet.state_dict().items())
    assert lines == [f"initial weights: {saved}"]
    load_initial_weights(saved, unet, DDPMScheduler(20, beta_schedule="squaredcos_cap_v2"), lines.append)
    assert "another noise schedule" in lines[1]
    record_background(unet, "black")
    load_initial_weights(saved, unet, DDPMScheduler(20), lines.append)
    assert "was trained with the background white, but now it is black" in lines[3]


@pytest.mark.parametrize(
    ("network", "scheduler", "message"),
    [
        ({"block_out_channels": (4, 8)}, {}, "has shape (4, 4, 3, 3) there and (8, 4, 3, 3) here"),
        ({"in_channels": 1, "out_channels": 1}, {}, "has shape (4, 3, 3, 3) there and (4, 1, 3, 3) here"),
        ({"layers_per_block": 2}, {}, "has shape None there"),
        ({}, {"prediction_type": "v_prediction"}, "prediction_type 'epsilon', but now it is 'v_prediction'"),
        ({}, {"num_train_timesteps": 30}, "ddpm_num_steps 20, but now it is 30: give --ddpm_num_steps 20"),
    ],
)
def test_initial_weights_of_another_architecture_or_process_are_refused(saved, network, scheduler, message):
    unet = tiny_unet(**{"channels": 3, "seed": 1, **network})
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        load_initial_weights(saved, unet, DDPMScheduler(**{"num_train_timesteps": 20, **scheduler}), print)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


@pytest.mark.parametrize("name", ["tiny", "small", "ddpm-cifar10"])
def test_the_preset_of_a_model_is_found_and_named(name, tmp_path):
    with torch.device("meta"):
        unet = make_denoiser(name, height=16, width=16, in_channels=1)
    assert find_preset(unet.config) == name
    assert find_preset(tiny_unet().config) is None


def test_initial_weights_of_another_preset_are_refused_with_its_name(tmp_path):
    DDPMPipeline(make_denoiser("tiny", height=16, width=16, in_channels=1), DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Give --denoiser tiny, and images with 1 channels"):
        load_initial_weights(str(tmp_path), tiny_unet(), DDPMScheduler(), print)


def test_initial_weights_that_do_not_exist():
    with pytest.raises(ValueError, match=r"init_from is '\./nowhere'"):
        load_initial_weights("./nowhere", tiny_unet(), DDPMScheduler(), print)
