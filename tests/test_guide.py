"""Autoguidance: sampling away from a weaker network, the guide, which is saved and loaded with the pipeline."""

import copy
import hashlib
import json
import logging
import pickle
import shutil
import warnings

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm_pipeline import DDPMPipeline, DDPMScheduler, __main__, denoiser, guide
from tests.arrays import normal
from tests.gaussian import MEAN, gaussian_images, gaussian_pipe
from tests.models import quiet, tiny_pipe, tiny_unet

T = 6
WEIGHTS = "guide/diffusion_pytorch_model.safetensors"
W = 2.5


def guided_pipe(dtype=torch.float32, channels=1, scheduler=None, **options):
    scheduler = scheduler or DDPMScheduler(T, timestep_spacing="trailing", clip_sample=False)
    pipe = tiny_pipe(channels, scheduler=scheduler, dtype=dtype, **options)
    pipe.guide = tiny_unet(channels, seed=7, **options).to(dtype)
    return pipe


def sample(pipe, **options):
    return pipe(**{"seeds": [3, 4], "output_type": "latent", **options}).images


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- The formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [None, (1, 4)])
@pytest.mark.parametrize("labels", [None, torch.tensor([2, 0])])
@pytest.mark.parametrize("learned", [False, True])
def test_autoguidance_is_the_formula_with_two_networks(learned, labels, interval):
    """weak + w (strong - weak), both with the labels, and the learned variance of the strong one. In float64."""
    scheduler = DDPMScheduler(
        T, beta_end=0.5, clip_sample=False, variance_type="learned_range" if learned else "fixed_small"
    )
    options = {"num_class_embeds": None if labels is None else 4, "out_channels": 6 if learned else 3}
    pipe = guided_pipe(torch.float64, 3, scheduler, **options)
    strong_unet, weak_unet = (copy.deepcopy(each) for each in (pipe.unet, pipe.guide))  # as diffusers computes them
    x_t = noise = normal(2, 3, 8, 8)
    generator, differences = torch.Generator().manual_seed(1), []
    for t in scheduler.timesteps:
        with torch.no_grad():
            strong, weak = (unet(x_t, t, class_labels=labels).sample for unet in (strong_unet, weak_unet))
        differences.append((strong - weak).abs().amax(dim=(0, 2, 3)))
        if interval is None or interval[0] <= t < interval[1]:
            strong[:, :3] = weak[:, :3] + W * (strong[:, :3] - weak[:, :3])
        x_t = scheduler.step(strong, t, x_t, generator=generator).prev_sample
    assert torch.stack(differences).min() > 0.01
    guidance = {"autoguidance_scale": W, "guidance_interval": interval}
    start = {"latents": noise, "generator": torch.Generator().manual_seed(1), "seeds": None, "class_labels": labels}
    torch.testing.assert_close(sample(pipe, **start, **guidance), x_t, rtol=0, atol=1e-10)


METHODS = {
    "call": lambda pipe, images, **options: sample(pipe, **options),
    "trajectory": lambda pipe, images, **options: (
        list(pipe.trajectory(**{name: value for name, value in options.items() if name != "output_type"}))[-1].x_0_pred
    ),
    "vary": lambda pipe, images, **options: pipe.vary(images, 0.8, **options).images,
    "inpaint": lambda pipe, images, **options: pipe.inpaint(images, torch.eye(8), jump_length=2, **options).images,
}


@pytest.mark.parametrize("interval", [None, (200, 700)])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_guides_as_the_closed_form(method, interval):
    """With networks exact for N(m, s^2), whose prediction is linear in m, autoguidance is a step in the model of
    N(m_weak + w (m_strong - m_weak), s^2). In float64."""
    pipe, truth = gaussian_pipe(), gaussian_pipe()
    pipe.guide = gaussian_pipe().unet
    weak_mean = pipe.guide.data.mean = MEAN - 0.3
    guided = []

    def set_mean(unet, arguments):
        guided.append(interval is None or interval[0] <= int(arguments[1]) < interval[1])
        unet.data.mean = weak_mean + W * (MEAN - weak_mean) if guided[-1] else MEAN

    truth.unet.register_forward_pre_hook(set_mean)
    options = {"seeds": [3, 4], "num_inference_steps": 10, "output_type": "latent"}
    expected = METHODS[method](truth, gaussian_images(), **options)
    actual = METHODS[method](pipe, gaussian_images(), **options, autoguidance_scale=W, guidance_interval=interval)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert any(guided) and all(guided) == (interval is None)
    assert pipe.unet.calls == truth.unet.calls and pipe.guide.calls == sum(guided)  # the guide only where it is used


@pytest.mark.parametrize("method", METHODS)
def test_scale_1_is_no_guidance_bit_for_bit(method):
    pipe = guided_pipe()
    options = {"seeds": [3, 4], "num_inference_steps": T, "output_type": "latent"}
    images = gaussian_images(dtype=torch.float32)
    guided = [{}, {"autoguidance_scale": 1.0}, {"autoguidance_scale": W}]
    plain, once, twice = (METHODS[method](pipe, images, **options, **each) for each in guided)
    assert torch.equal(plain, once) and not torch.equal(plain, twice)
    pipe.guide = None
    assert torch.equal(METHODS[method](pipe, images, **options), plain)


def test_the_guide_has_its_mode_back_and_no_dropout():
    pipe = guided_pipe(dropout=0.5)
    expected = sample(pipe, autoguidance_scale=W)
    pipe.guide.train()
    assert torch.equal(sample(pipe, autoguidance_scale=W), expected)
    assert all(module.training for module in pipe.guide.modules())


# ---- Bad arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"autoguidance_scale": "2"}, "autoguidance_scale is '2'"),
        ({"autoguidance_scale": float("nan")}, "autoguidance_scale is nan"),
        (
            {"autoguidance_scale": 2.0, "guidance_scale": 3.0},
            "guidance_scale is 3.0 and autoguidance_scale is 2.0: one",
        ),
        ({"autoguidance_scale": 2.0, "guidance_interval": (4, 4)}, r"guidance_interval is \(4, 4\)"),
    ],
)
def test_bad_scales_are_errors(options, message):
    for method in (guided_pipe(), lambda **given: guided_pipe().vary(torch.zeros(1, 8, 8), **given)):
        with pytest.raises(ValueError, match=message):
            method(seeds=1, **options)


def test_autoguidance_without_a_guide_is_an_error_that_says_where_one_is_from():
    with pytest.raises(ValueError, match=r"no guide: give 1, train with --guide_snapshot 0.125, or set pipe.guide"):
        tiny_pipe()(seeds=1, autoguidance_scale=2.0)


def test_an_interval_without_guidance_is_a_warning_and_one_with_autoguidance_is_none():
    pipe = guided_pipe()
    with pytest.warns(UserWarning, match=r"guidance_interval=\(0, 2\) has no effect"):
        pipe(seeds=1, guidance_interval=(0, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(seeds=1, guidance_interval=(0, 2), autoguidance_scale=2.0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("guide", "guide is a str: give a UNet2DModel, or None"),
        (torch.nn.Conv2d(1, 1, 1), "guide is a Conv2d"),
        (lambda: tiny_unet(3), "guide has in_channels 3, but the network has 1"),
        (lambda: tiny_unet(1, out_channels=2), "guide has out_channels 2, but the network has 1"),
        (lambda: tiny_unet(1, num_class_embeds=3), "guide has num_class_embeds 3, but the network has None"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused(other, message):
    pipe = guided_pipe()
    before, other = pipe.guide, other() if type(other) is type(lambda: 0) else other
    with pytest.raises(ValueError, match=message):
        pipe.guide = other
    assert pipe.guide is before
    pipe.unet = tiny_unet(1, num_class_embeds=3)  # another network, which the guide does not fit
    with pytest.raises(ValueError, match="guide has num_class_embeds None, but the network has 3"):
        pipe(seeds=1, class_labels=0, autoguidance_scale=2.0)


def test_a_smaller_guide_of_another_dtype_is_used():
    pipe = guided_pipe()
    pipe.guide = small = tiny_unet(1, seed=5, block_out_channels=(2, 4)).double()
    assert sample(pipe, autoguidance_scale=W).isfinite().all() and small.dtype == torch.float32


# ---- Saving and loading ----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    pipe = guided_pipe()
    pipe.save_pretrained(tmp_path / "saved")
    return pipe, tmp_path / "saved"


def test_saved_and_loaded_it_is_the_same(saved, tmp_path):
    pipe, folder = saved
    assert json.loads((folder / "model_index.json").read_text()).keys() == {
        "_class_name", "_diffusers_version", "scheduler", "unet"
    }  # fmt: skip
    expected = sample(pipe, autoguidance_scale=W)
    remote = diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)
    for i, loaded in enumerate((DDPMPipeline.from_pretrained(folder), remote)):
        assert not any(module.training for module in loaded.guide.modules())
        actual = sample(quiet(loaded), autoguidance_scale=W)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)  # only the package has compiled loops
        loaded.save_pretrained(tmp_path / f"again {i}")
        assert contents(tmp_path / f"again {i}") == contents(folder)


def test_built_in_classes_load_the_folder_without_a_warning(saved):
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe = diffusers.DiffusionPipeline.from_pretrained(saved[1])
            scheduler = diffusers.DDIMScheduler.from_pretrained(saved[1], subfolder="scheduler")
    finally:
        logger.removeHandler(handler)
    assert lines == [] and type(pipe) is diffusers.DDPMPipeline and not hasattr(pipe, "guide")
    assert scheduler.config.num_train_timesteps == T


def test_without_a_guide_a_save_removes_that_of_an_earlier_one(saved):
    pipe, folder = saved
    pipe.guide = None
    pipe.save_pretrained(folder)
    assert not (folder / "guide").exists() and DDPMPipeline.from_pretrained(folder).guide is None


@pytest.mark.parametrize("make", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe)), DDPMPipeline.from_pipe])
def test_copies_have_it_too(saved, make):
    for pipe in (saved[0], quiet(DDPMPipeline.from_pretrained(saved[1]))):
        other = quiet(make(pipe))
        assert torch.equal(sample(other, autoguidance_scale=W), sample(pipe, autoguidance_scale=W))
        assert (other.guide is pipe.guide) == (make == DDPMPipeline.from_pipe)
    dropped = DDPMPipeline.from_pretrained(saved[1])
    dropped.guide = None
    assert make(dropped).guide is None


def test_it_has_the_dtype_and_the_device_of_the_network(saved):
    pipe = quiet(DDPMPipeline.from_pretrained(saved[1], dtype=torch.bfloat16))
    assert pipe.guide.dtype == torch.bfloat16
    assert sample(pipe, autoguidance_scale=W).dtype == torch.float32
    assert pipe.to(torch.float64).guide.dtype == torch.float64
    assert pipe.to("meta").guide.device.type == "cpu"  # its weights are not thrown away
    pipe = DDPMPipeline.from_pretrained(saved[1])
    pipe.save_pretrained(saved[1], variant="fp16")
    assert (saved[1] / WEIGHTS.replace(".safetensors", ".fp16.safetensors")).is_file()
    assert DDPMPipeline.from_pretrained(saved[1], variant="fp16").guide is not None


def test_with_offloading_it_is_on_the_device_during_a_call(monkeypatch):
    pipe, devices = guided_pipe(), []
    expected = sample(pipe, autoguidance_scale=W)
    place = guide.place_guide

    def place_and_note(network, unet, device):
        devices.append(str(device))
        place(network, unet, device)

    monkeypatch.setattr(guide, "place_guide", place_and_note)
    monkeypatch.setattr(denoiser, "place_guide", place_and_note)
    pipe.enable_model_cpu_offload(device="cpu")  # from the CPU to the CPU, the only device that is always there
    devices.clear()
    assert torch.equal(sample(pipe, autoguidance_scale=W), expected)
    assert devices == ["cpu:0", "cpu"]  # where it computes, and where it is kept


def test_a_guide_in_half_precision_alone_is_found_as_diffusers_downloads_it(saved):
    pipe, folder = saved
    shutil.move(folder / WEIGHTS, folder / WEIGHTS.replace(".safetensors", ".fp16.safetensors"))
    (folder / "guide" / "config.json").unlink()  # of a guide from training it is that of the network
    loaded = quiet(DDPMPipeline.from_pretrained(folder))
    assert torch.equal(sample(loaded, autoguidance_scale=W), sample(pipe, autoguidance_scale=W))


def damage(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def wrong_class_count(folder):
    tiny_unet(1, num_class_embeds=3).save_pretrained(folder / "guide")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: damage(folder, lambda weights: weights.pop("conv_in.bias")), "lacks conv_in.bias"),
        (lambda folder: damage(folder, lambda weights: weights["conv_in.bias"].fill_(float("nan"))), "non-finite"),
        (lambda folder: damage(folder, lambda weights: weights.update(x=torch.zeros(1))), "has x, but the network"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x"), "is not a complete safetensors file"),
        (lambda folder: (folder / WEIGHTS).unlink(), "has no diffusion_pytorch_model.safetensors"),
        (lambda folder: (folder / "guide" / "config.json").write_text("{"), "is not JSON"),
        (wrong_class_count, "guide has num_class_embeds 3, but the network has None"),
    ],
)
def test_a_damaged_guide_is_named(saved, spoil, message):
    spoil(saved[1])
    with pytest.raises(ValueError, match=message) as caught:
        DDPMPipeline.from_pretrained(saved[1])
    assert str(saved[1] / "guide") in str(caught.value)
    pipe = DDPMPipeline.from_pretrained(saved[1], unet=tiny_unet(1))  # the guide is that of the saved network
    assert pipe.guide is None


# ---- The command line ------------------------------------------------------------------------------------------------


def test_the_command_line_guides(saved, tmp_path, capsys):
    folder, options = str(saved[1]), ["--num_inference_steps", "3", "--device", "cpu"]
    outputs = [tmp_path / f"{i}.png" for i in range(2)]
    for output, guidance in zip(outputs, ([], ["--autoguidance_scale", "9", "--guidance_interval", "1", "6"])):
        assert __main__.main(["generate", folder, "--output", str(output), *options, *guidance]) == 0
    assert outputs[0].read_bytes() != outputs[1].read_bytes()
    assert __main__.main(["generate", folder, "--guidance_interval", "1", "6", *options]) == 2
    assert "give --guidance_scale or --autoguidance_scale too" in capsys.readouterr().err
