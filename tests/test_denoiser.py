"""Networks by size against their budgets and published ones, networks of other models, initial weights, bad input."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from benchmarks.networks import count_flop
from ddpm_pipeline import DDPMPipeline, DDPMScheduler
from ddpm_pipeline.fast_unet import speed_up
from ddpm_pipeline.images import record_background
from ddpm_pipeline.labels import record_class_names
from tests.models import tiny_pipe, tiny_unet
from training.data.sizes import nearest_size
from training.denoiser import (
    FAMILIES,
    FORMER,
    PRESETS,
    find_network,
    load_initial_weights,
    make_denoiser,
    network_of,
    size_rule,
)

DOCS = Path(__file__).parents[1] / "docs"
SIDES = (32, 64, 128, 256)
SQUARE = {"height": 32, "width": 32, "in_channels": 3}


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(denoiser, height, width, **options):
    with torch.device("meta"):
        return make_denoiser(denoiser, height=height, width=width, in_channels=3, **options)


def gflop(name, side):
    return count_flop(name, side) / 1e9


# ---- Families --------------------------------------------------------------------------------------------------------

BUDGETS = {"tiny": (0.25, 2), "small": (3, 10), "base": (12, 35), "large": (40, 110)}  # GFLOP at 32 px, M parameters


@pytest.mark.parametrize("name", BUDGETS)
def test_each_doubling_of_the_side_doubles_the_operations(name):
    budget, millions = BUDGETS[name]
    for i, side in enumerate(SIDES):
        assert gflop(name, side) == pytest.approx(budget * 2**i, rel=0.18)
        assert count_parameters(on_meta(name, side, side)) / 1e6 == pytest.approx(millions, rel=0.2)


@pytest.mark.parametrize("name", [*FAMILIES, *PRESETS])
def test_the_table_in_the_documentation(name):
    text = (DOCS / "training.md").read_text(encoding="utf-8")
    cells = [f"{value:.2g}" if value < 10 else f"{value:,.0f}" for value in (gflop(name, side) for side in SIDES)]
    assert f"| `{name}` | {count_parameters(on_meta(name, 64, 64)) / 1e6:.0f} million | {' | '.join(cells)} |" in text


def test_base_is_near_the_network_of_ho_et_al():
    """At 32 px it has the same widths; theirs has 35.7 million parameters and attention at 16 px alone."""
    base, theirs = on_meta("base", 32, 32), on_meta("ddpm-cifar10", 32, 32)
    assert base.config.block_out_channels == theirs.config.block_out_channels
    assert gflop("base", 32) == pytest.approx(gflop("ddpm-cifar10", 32), rel=0.03)
    assert count_parameters(base) == pytest.approx(count_parameters(theirs), rel=0.1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_of_a_family_follows_its_rules(name):
    """At any size: 4 to 6 pixels a side at the lowest resolution, at most 256 pixels where there is attention."""
    for side in (*SIDES, 4, 8, 28, (50, 70), (48, 64), (64, 48), 100, (375, 500), 512):
        height, width = nearest_size(size_rule(name), *((side, side) if isinstance(side, int) else side))
        model = on_meta(name, height, width)
        x_t, t = torch.zeros(1, 3, height, width, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
        assert model(x_t, t).sample.shape == x_t.shape
        widths, last = model.config.block_out_channels, len(model.config.block_out_channels) - 1
        assert height % 2**last == width % 2**last == 0
        assert 4 <= min(height, width) >> last <= 6
        assert list(widths) == sorted(widths)
        for i, block in enumerate(model.config.down_block_types):
            assert not ("Attn" in block and (height * width) >> (2 * i) > 256)
            assert ("Attn" in block) == ("Attn" in model.config.up_block_types[last - i])
        assert "Attn" in model.config.down_block_types[last] or min(height, width) > 16
        for module in model.modules():
            if isinstance(module, torch.nn.GroupNorm):
                assert module.num_channels % module.num_groups == 0
                assert module.num_channels // module.num_groups >= 4
            if hasattr(module, "heads"):
                assert module.to_q.out_features == 64 * module.heads > 0


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((28, 28), (32, 32)), ((50, 70), (48, 72)), ((48, 64), (48, 64)), ((100, 100), (96, 96)), ((27, 27), (24, 24)),
        ((1, 1), (4, 4)), ((7, 7), (8, 8)), ((375, 500), (384, 512)), ((500, 375), (512, 384)), ((8, 24), (8, 24)),
    ],
)  # fmt: skip
def test_the_nearest_size(size, nearest):
    assert nearest_size(size_rule("tiny"), *size) == nearest


def test_the_nearest_size_is_one_that_fits_and_none_is_nearer():
    """Of squares, by looking at all."""
    fits = [side for side in range(1, 300) if nearest_size(size_rule("small"), side, side) == (side, side)]
    for side in range(1, 280):
        near = nearest_size(size_rule("small"), side, side)[0]
        assert abs(near - side) == min(abs(each - side) for each in fits)
        make_size = nearest_size(size_rule("small"), side, 2 * side + 3)
        assert nearest_size(size_rule("small"), *make_size) == make_size


def test_the_nearest_size_of_a_configuration_is_a_multiple():
    assert nearest_size(size_rule("ddpm-cifar10"), 28, 50) == (32, 48)
    assert nearest_size(size_rule(FORMER["small"]), 28, 50) == (28, 52)
    assert nearest_size(size_rule(FORMER["small"]), 1, 5) == (4, 4)


# ---- Presets and shapes ----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["tiny", "small", *PRESETS])
@pytest.mark.parametrize(("height", "width", "in_channels", "out_channels"), [(16, 16, 1, None), (8, 24, 4, 8)])
def test_shapes_of_input_and_prediction(name, height, width, in_channels, out_channels):
    model = make_denoiser(name, height=height, width=width, in_channels=in_channels, out_channels=out_channels)
    assert model.config.sample_size == (height if height == width else (height, width))
    assert next(model.parameters()).dtype == torch.float32
    with torch.no_grad():
        sample = model(torch.randn(2, in_channels, height, width), torch.tensor([0, 999])).sample
    assert sample.shape == (2, out_channels or in_channels, height, width)
    assert sample.isfinite().all()


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
    make_denoiser("ddpm-cifar10", **SQUARE, dropout=0.5)
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
        ({"denoiser": "huge"}, "denoiser is 'huge': give one of tiny, small, base, large, ddpm-cifar10"),
        ({"height": 28, "width": 28}, "size is 28x28, which the denoiser 'tiny' .*: give --resolution 32x32"),
        ({"width": 7}, "size is 32x7, .*: give --resolution 32x8"),
        ({"denoiser": "ddpm-cifar10", "width": 28}, "size is 32x28, .*: give --resolution 32x32"),
        ({"denoiser": FORMER["small"], "width": 31}, "which the network cannot halve .*: give --resolution 32x32"),
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
        make_denoiser(**{"denoiser": "tiny", **SQUARE} | change)


# ---- Networks of other models ----------------------------------------------------------------------------------------

# config.json of google/ddpm-celebahq-256, of 2022
CELEBAHQ = {
    "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu", "attention_head_dim": None,
    "block_out_channels": [128, 128, 256, 256, 512, 512], "center_input_sample": False,
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"], "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3, "sample_size": 256,
    "time_embedding_type": "positional", "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}  # fmt: skip


def write_config(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_the_network_of_a_published_model_takes_the_size_and_channels_of_the_data(tmp_path):
    """It has 113.7 million parameters, as its file of 455 MB in float32 says."""
    network = find_network(write_config(tmp_path, CELEBAHQ))
    assert count_parameters(on_meta(network, 256, 256)) == 113_673_219
    with torch.device("meta"):
        model = make_denoiser(network, height=64, width=96, in_channels=1)
    assert (model.config.sample_size, model.config.in_channels, model.config.out_channels) == ((64, 96), 1, 1)
    assert nearest_size(size_rule(network), 28, 40) == (32, 32)
    for name in ("block_out_channels", "down_block_types", "downsample_padding", "freq_shift", "norm_eps"):
        assert model.config[name] == CELEBAHQ[name]


@pytest.mark.parametrize("where", ["", "unet", "unet/config.json"])
def test_a_network_is_found_in_the_folder_of_a_pipeline_and_of_a_network(tmp_path, where):
    unet = tiny_unet(channels=3, num_class_embeds=4)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    network = find_network(str(tmp_path / where))
    model = make_denoiser(network, height=8, width=8, in_channels=3, num_class_embeds=4)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in unet.state_dict().items()}
    assert make_denoiser(network, height=8, width=8, in_channels=1).class_embedding is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "is of a UNet2DConditionModel"),
        ({"down_block_types": ["CrossAttnDownBlock2D"] * 6}, "cross_attention_dim"),
        ({"down_block_types": ["DownBlock"] * 6}, "DownBlock does not exist"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
        ({"norm_num_groups": 48}, "num_channels"),
        ({"cross_attention_dim": 8}, 'has the field "cross_attention_dim"'),
        ({"block_out_channels": [10**9] * 6}, "block_out_channels"),
        (
            {"time_embedding_type": "learned", "num_train_timesteps": 999},
            "learned time embedding has num_train_timesteps 999, less than --ddpm_num_steps 1000",
        ),
    ],
)
def test_a_configuration_that_cannot_be_trained_is_refused_with_a_proposal(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"denoiser is .*{message}.*such as google/ddpm-celebahq-256"):
        find_network(write_config(tmp_path, CELEBAHQ | change), num_steps=1000)


def test_a_file_that_says_nothing_about_a_network_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has neither _class_name nor block_out_channels"):
        find_network(write_config(tmp_path, {}))


def test_a_network_that_does_not_exist(tmp_path):
    (tmp_path / "run" / "pipeline").mkdir(parents=True)
    for name, message in (
        ("huge", r"denoiser is 'huge' \(no such file or folder\): give auto, tiny, small, base, large, ddpm-cifar10"),
        (str(tmp_path / "nothing"), "denoiser is .*nothing.*: give auto, tiny"),
        (str(tmp_path / "run"), "a folder without config.json of a UNet2DModel: give .*pipeline"),
    ):
        with pytest.raises(ValueError, match=message):
            find_network(name)


@pytest.mark.parametrize("name", ["/nosuch", "./nosuch", "~/nosuch", "runs/nosuch/pipeline"])
@pytest.mark.parametrize("setting", ["denoiser", "init_from"])
def test_a_path_that_does_not_exist_is_not_sought_on_the_hub(monkeypatch, name, setting):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    arguments = (name,) if setting == "denoiser" else ("auto", None, name)
    message = rf"^{setting} is '{name}' \(no such file or folder\): give .*the folder of a pipeline, or user/model on"
    with pytest.raises(ValueError, match=message):
        find_network(*arguments)


def test_a_folder_without_a_network_is_refused_with_what_is_allowed(tmp_path):
    with pytest.raises(ValueError, match=r"^init_from is .*without config\.json.*: give the folder of a pipeline, or"):
        find_network("auto", None, str(tmp_path))


def test_the_network_of_a_checkpoint_is_the_one_it_was_trained_with():
    """One of before the families has none, but a name that meant another network then."""
    small = make_denoiser(find_network("small", {"config": {"denoiser": "small"}}), **SQUARE)
    assert count_parameters(small) == 6_472_195
    assert len(list(small.parameters())) == 268
    tiny = make_denoiser(find_network("tiny", {"config": {"denoiser": "tiny"}}), **SQUARE)
    assert count_parameters(tiny) == 1_818_899
    assert find_network("tiny") == find_network("tiny", {"config": {"denoiser": "small"}}) == "tiny"
    manifest = json.loads(json.dumps({"config": {"denoiser": "tiny"}, "network": network_of(small)}))
    again = make_denoiser(find_network("tiny", manifest), **SQUARE)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in small.state_dict().items()}


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
        ({"block_out_channels": (8, 8)}, {}, "another architecture: only 0% of the parameters fit"),
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


@pytest.mark.parametrize(
    ("options", "new"),
    [
        ({"size": 16}, set()),
        ({"in_channels": 1, "out_channels": 1}, {"conv_in.weight", "conv_out.weight", "conv_out.bias"}),
        ({"num_class_embeds": 3}, {"class_embedding.weight"}),
    ],
)
def test_initial_weights_that_fit_are_taken_and_the_others_named(saved, options, new):
    lines = []
    unet, expected = tiny_unet(**{"channels": 3, "seed": 1, **options}), tiny_unet(channels=3).state_dict()
    drawn = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    load_initial_weights(saved, unet, DDPMScheduler(20), lines.append)
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, drawn[name] if name in new else expected[name]), name
    (line,) = lines
    assert all(name in line for name in new)
    assert (f"; {len(new)} of {len(drawn)} tensors do not fit and begin untrained: " in line) == bool(new)


def test_a_model_gives_its_network_and_weights_to_a_run_at_another_size(saved):
    lines = []
    network = find_network("auto", None, saved, log=lines.append)
    unet = make_denoiser(network, height=16, width=24, in_channels=3)
    load_initial_weights(saved, unet, DDPMScheduler(20), lines.append)
    assert lines == [
        f"denoiser: that of {saved} ({count_parameters(unet) / 1e6:.1f} M parameters, trained at 8 x 8)",
        f"initial weights: {saved}",
    ]
    assert find_network(saved, log=lines.append) == network and len(lines) == 2
    assert find_network("tiny", None, saved, log=lines.append) == "tiny" and len(lines) == 2


@pytest.mark.parametrize(("before", "now"), [(32, 64), (64, 32)])
def test_weights_of_a_family_go_to_another_size_level_by_level(tmp_path, before, now):
    torch.manual_seed(0)
    earlier = make_denoiser("tiny", height=before, width=before, in_channels=3)
    DDPMPipeline(earlier, DDPMScheduler(20)).save_pretrained(tmp_path)
    unet, lines = make_denoiser("tiny", height=now, width=now, in_channels=3), []
    load_initial_weights(str(tmp_path), unet, DDPMScheduler(20), lines.append)
    for level in range(-4, 0):  # of 32, 16, 8 and 4 pixels
        pair = [model.down_blocks[level].resnets[0].conv2.weight for model in (earlier, unet)]
        assert torch.equal(*pair)
    for level in range(3):
        pair = [model.up_blocks[level].resnets[0].conv2.weight for model in (earlier, unet)]
        assert torch.equal(*pair)
    if now > before:
        (line,) = lines
        taken = 1 - sum(p.numel() for p in unet.down_blocks[0].parameters()) / count_parameters(unet)
        assert "tensors do not fit" in line and "down_blocks.0" in line and taken > 0.97


def test_class_embeddings_go_to_the_classes_of_the_same_name(tmp_path):
    earlier, unet = tiny_unet(num_class_embeds=4), tiny_unet(num_class_embeds=5, seed=1)
    record_class_names(earlier, ["ant", "bee", "cow"])
    record_class_names(unet, ["bee", "dog", "cow", "emu"])  # and each has the null class
    DDPMPipeline(earlier, DDPMScheduler(20)).save_pretrained(tmp_path)
    drawn, before = unet.class_embedding.weight.detach().clone(), earlier.class_embedding.weight
    load_initial_weights(str(tmp_path), unet, DDPMScheduler(20), print)
    expected = [before[1], drawn[1], before[2], drawn[3], before[3]]
    assert torch.equal(unet.class_embedding.weight, torch.stack(expected))


def test_initial_weights_that_do_not_exist():
    with pytest.raises(ValueError, match=r"init_from is '\./nowhere'"):
        load_initial_weights("./nowhere", tiny_unet(), DDPMScheduler(), print)
