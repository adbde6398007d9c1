"""`python -m ddpm_pipeline`: each command on files, against the methods that it calls."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from ddpm_pipeline import DDPMPipeline, DDPMScheduler, visualize
from ddpm_pipeline.__main__ import main

STEPS = ["--num_inference_steps", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model, two pictures and a mask."""
    folder = tmp_path_factory.mktemp("command line")
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=2, add_attention=False,
        block_out_channels=(4, 4), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20, timestep_spacing="trailing")).save_pretrained(
        folder / "model"
    )
    for name in ("a", "b"):
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.new("L", (9, 8)).save(folder / "wide.png")
    (folder / "text.png").write_text("no picture")
    return folder


def ran(work, command, *arguments, output="out.png"):
    """The picture that a command writes."""
    assert main([command, str(work / "model"), *map(str, arguments), "-o", str(work / output), *STEPS]) == 0
    return np.asarray(Image.open(work / output))


@pytest.fixture(scope="module")
def pipe(work):
    pipe = DDPMPipeline.from_pretrained(str(work / "model"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seen(images, **options):
    return np.asarray(visualize.grid(images, **options))


def test_each_command_is_its_method(work, pipe, capsys):
    a, b = (Image.open(work / f"{name}.png") for name in "ab")
    options = {"num_inference_steps": 4, "output_type": "latent"}
    made = ran(work, "generate", "--seeds", 3, 4, "--eta", 0.5)
    assert np.array_equal(made, seen(pipe(seeds=[3, 4], eta=0.5, **options).images))
    made = ran(work, "vary", work / "a.png", "--strength", 0.7, "--seeds", 1, 2)
    assert np.array_equal(made, seen(pipe.vary([a, a], 0.7, seeds=[1, 2], **options).images))
    made = ran(work, "inpaint", work / "a.png", work / "mask.png", "--jump_length", 2, "--resamples", 2)
    wanted = pipe.inpaint(
        a, Image.open(work / "mask.png"), 4, seeds=[0], jump_length=2, resamples=2, output_type="np"
    ).images
    assert made.shape == (8, 8)  # one picture is written as it is, and can be read again
    np.testing.assert_allclose(made, 255 * wanted[0, ..., 0], atol=0.51)
    made = ran(work, "fuse", work / "a.png", work / "b.png", "--strip", 3, "--balance")
    assert np.array_equal(made, seen(pipe.fuse(a, b, [0, 0.5, 1], balance=True, **options).images, columns=3))
    noise = ["--path", "noise", "--timestep", 9, "--seeds", 5, "--weight", 0.1, 0.6]
    made = ran(work, "fuse", work / "a.png", work / "b.png", *noise)
    wanted = pipe.fuse(a, b, [0.1, 0.6], path="noise", timestep=9, seeds=5, **options).images
    assert np.array_equal(made, seen(wanted, columns=2))
    capsys.readouterr()
    ran(work, "invert", work / "a.png", work / "b.png", "--refinements", 2, "--latents", work / "latents.npy")
    latents = pipe.invert([a, b], 4, refinements=2)
    np.testing.assert_allclose(np.load(work / "latents.npy"), latents.numpy(), atol=1e-6)
    said = capsys.readouterr().out
    for name, error in zip("ab", pipe.inversion_error.tolist()):
        assert f"{name}.png: mean squared error of the way out and home {error:.5f}" in said
    made = ran(work, "walk", "--image", work / "a.png", "--columns", 5)
    wanted = visualize.strip(pipe.trajectory(image=a, seeds=[0], num_inference_steps=4), columns=5)
    assert np.array_equal(made, np.asarray(wanted))


def test_no_steps_are_none(work, capsys):
    assert main(["generate", str(work / "model"), "--num_inference_steps", "0", "-o", str(work / "never.png")]) == 2
    assert "num_inference_steps is 0" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_a_walk_as_an_animation(work, kind):
    ran(work, "walk", "--seeds", 1, 2, output=f"walk.{kind}")
    with Image.open(work / f"walk.{kind}") as animation:
        assert animation.n_frames == 5  # 4 steps, and the picture that they lead to
        assert animation.width == animation.height


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "nowhere/at/all"], "nowhere/at/all is no folder here"),
        (["generate", "{work}/model", "-o", "{work}/missing/out.png"], "--output is"),
        (["generate", "{work}/model", "--seeds", "-1"], "seeds"),
        (["vary", "{work}/model", "{work}/text.png"], "text.png is no image"),
        (["vary", "{work}/model", "{work}/none.png"], "none.png"),
        (["vary", "{work}/model", "{work}/wide.png"], "8 x 9 pixels: this network draws 8 x 8"),
        (["fuse", "{work}/model", "{work}/a.png", "{work}/b.png", "--strip", "1"], "--strip is 1"),
        (["fuse", "{work}/model", "{work}/a.png", "{work}/b.png", "--weight", "2"], "weight is [2.0]"),
        (["walk", "{work}/model", "--columns", "1"], "--columns is 1"),
        (["generate", "{work}/model", "-o", "{work}/out.xyz"], "--output is"),
        (["generate", "{work}/model", "--device", "moon"], "--device is moon"),
        (["invert", "{work}/model", "{work}/a.png", "--latents", "{work}/no/l.npy"], "--latents is"),
        (["fuse", "{work}/model", "{work}/a.png", "{work}/b.png", "--seeds", "3"], "seeds is given"),
        (["fuse", "{work}/model", "{work}/a.png", "{work}/b.png", "--eta", "1"], "eta is given"),
    ],
)
def test_mistakes_end_with_2(work, capsys, arguments, words):
    given = [argument.format(work=work) for argument in arguments]
    if "-o" not in given:
        given += ["-o", str(work / "never.png")]
    if "--device" not in given:
        given += STEPS
    assert main(given) == 2
    said = capsys.readouterr().err
    assert words in said and not (work / "never.png").exists()


@pytest.mark.parametrize("arguments", [[], ["fuse", "model", "one.png"], ["paint", "model"], ["generate", "m", "--x"]])
def test_unknown_commands_and_flags_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "usage" in capsys.readouterr().err
