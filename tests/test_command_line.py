"""`python -m ddpm_pipeline`: each command on files, compared with the methods that it calls."""

import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_pipeline import DDPMPipeline, DDPMScheduler, visualize
from ddpm_pipeline.__main__ import main
from ddpm_pipeline.calibrated import Table, save_tables
from ddpm_pipeline.pixels import from_pixels
from tests.models import quiet, tiny_pipe

STEPS = ["--num_inference_steps", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model, two images and a mask."""
    folder = tmp_path_factory.mktemp("command line")
    tiny_pipe().save_pretrained(folder / "model")
    for name in ("a", "b"):
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.new("L", (9, 8)).save(folder / "wide.png")
    (folder / "text.png").write_text("not an image")
    return folder


def run(work, command, *args, output="out.png"):
    """The image that a command writes."""
    assert main([command, str(work / "model"), *map(str, args), "-o", str(work / output), *STEPS]) == 0
    return np.asarray(Image.open(work / output))


@pytest.fixture
def pipe(work):
    return quiet(DDPMPipeline.from_pretrained(str(work / "model")))


def grid(images, **options):
    return np.asarray(visualize.grid(images, **options))


def test_calibrated_steps(work, pipe, capsys):
    timesteps = [19, 10, 5, 1]
    table = Table(timesteps, timesteps, [[0.5, 0.5], [0.5, 0.6], [0.3, 0.8], [0.0, 1.0]])
    save_tables(pipe.scheduler, pipe.unet, [table])
    (work / "other").mkdir()
    pipe.save_pretrained(work / "other" / "model")
    options = {"seeds": [3, 4], "num_inference_steps": 4, "output_type": "latent"}
    expected, plain = (grid(pipe(**options, calibrated=value).images) for value in (True, False))
    assert not np.array_equal(expected, plain)
    for flags, images in (((), expected), (("--calibrated",), expected), (("--no-calibrated",), plain)):
        assert np.array_equal(run(work / "other", "generate", "--seeds", 3, 4, *flags), images)
    trajectories = [run(work / "other", "trajectory", *flags) for flags in ((), ("--no-calibrated",))]
    assert not np.array_equal(*trajectories)
    output = ["-o", str(work / "out.png"), *STEPS]
    assert main(["generate", str(work / "model"), "--calibrated", *output]) == 2
    assert "calibrated=True, but there is no table for 4 steps: this model has no tables" in capsys.readouterr().err


def test_each_command_is_its_method(work, pipe, capsys):
    a, b = (Image.open(work / f"{name}.png") for name in "ab")
    options = {"num_inference_steps": 4, "output_type": "latent"}
    output = run(work, "generate", "--seeds", 3, 4, "--eta", 0.5)
    assert np.array_equal(output, grid(pipe(seeds=[3, 4], eta=0.5, **options).images))
    output = run(work, "vary", work / "a.png", "--strength", 0.7, "--seeds", 1, 2)
    assert np.array_equal(output, grid(pipe.vary([a, a], 0.7, seeds=[1, 2], **options).images))
    output = run(work, "inpaint", work / "a.png", work / "mask.png", "--jump_length", 2, "--resamples", 2)
    expected = pipe.inpaint(
        a, Image.open(work / "mask.png"), 4, seeds=[0], jump_length=2, resamples=2, output_type="np"
    ).images
    assert output.shape == (8, 8)  # a single image keeps its size, so that it can be read again
    np.testing.assert_allclose(output, 255 * expected[0, ..., 0], atol=0.51)
    output = run(work, "fuse", work / "a.png", work / "b.png", "--strip", 3, "--balance")
    fused = pipe.fuse(a, b, [0, 0.5, 1], balance=True, **options)
    assert np.array_equal(output, grid(fused.images, columns=3))
    printed = capsys.readouterr().out
    for weight, used, ratio in zip((0, 0.5, 1), fused.weights, fused.distance_ratios):
        assert f"weight {weight:g}: interpolation weight {used:.4f}, distance ratio {ratio:.3f}" in printed
    assert f"{fused.network_calls} network calls" in printed and f"wrote {work / 'out.png'}" in printed
    noise = ["--path", "noise", "--timestep", 9, "--seeds", 5, "--weight", 0.1, 0.6]
    output = run(work, "fuse", work / "a.png", work / "b.png", *noise)
    expected = pipe.fuse(a, b, [0.1, 0.6], path="noise", timestep=9, seeds=5, **options).images
    assert np.array_equal(output, grid(expected, columns=2))
    capsys.readouterr()
    run(
        work, "invert", work / "a.png", work / "b.png", "--fixed_point_iterations", 2, "--latents", work / "latents.npy"
    )
    latents = pipe.invert([a, b], 4, fixed_point_iterations=2)
    np.testing.assert_allclose(np.load(work / "latents.npy"), latents.numpy(), atol=1e-6)
    printed = capsys.readouterr().out
    for name, error in zip("ab", pipe.inversion_error.tolist()):
        assert f"{name}.png: inversion error {error:.5f}" in printed
    output = run(work, "trajectory", "--image", work / "a.png", "--columns", 5)
    expected = visualize.strip(pipe.trajectory(image=a, seeds=[0], num_inference_steps=4), columns=5)
    assert np.array_equal(output, np.asarray(expected))


def test_fuse_balances_in_the_features_of_a_file(work, pipe, capsys):
    a, b = (Image.open(work / f"{name}.png") for name in "ab")
    pool = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(pool).save(str(work / "pool.pt"))
    output = run(
        work, "fuse", work / "a.png", work / "b.png", "--strip", 3, "--balance", "--distance", work / "pool.pt"
    )
    options = {"balance": True, "num_inference_steps": 4, "output_type": "latent"}
    of_features = pipe.fuse(a, b, [0, 0.5, 1], distance=lambda x, y: (pool(x) - pool(y)).square().mean(1), **options)
    assert np.array_equal(output, grid(of_features.images, columns=3))
    assert f"interpolation weight {of_features.weights[1]:.4f}" in capsys.readouterr().out
    of_pixels = pipe.fuse(a, b, [0, 0.5, 1], **options)
    assert abs(of_features.weights[1] - of_pixels.weights[1]) > 0.01
    command = ["fuse", str(work / "model"), str(work / "a.png"), str(work / "b.png"), "--distance", "none.pt"]
    assert main([*command, "-o", str(work / "out.png"), *STEPS]) == 2
    assert "distance is 'none.pt', but this file does not exist" in capsys.readouterr().err


def test_freed_memory_is_kept_on_a_cpu(work, monkeypatch):
    calls = []
    monkeypatch.setattr("ddpm_pipeline.cpu.keep_memory", lambda: calls.append("keep"))
    run(work, "generate", "--device", "cpu")
    assert calls == ["keep"]


def test_zero_steps_are_refused(work, capsys):
    assert main(["generate", str(work / "model"), "--num_inference_steps", "0", "-o", str(work / "never.png")]) == 2
    assert "num_inference_steps is 0" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["gif", "webp", "GIF", "WebP"])
def test_a_trajectory_as_an_animation(work, kind):
    run(work, "trajectory", "--seeds", 1, 2, output=f"trajectory.{kind}")
    with Image.open(work / f"trajectory.{kind}") as animation:
        assert animation.n_frames == 5  # 4 steps and the generated image
        assert animation.width == animation.height


def test_invert_writes_the_image_whose_error_it_prints(work, pipe, capsys):
    """Inversion does not clip x_0; sampling that clips, as that of a trained model, leads elsewhere."""
    clipping = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=True, clip_sample_range=0.2)
    DDPMPipeline(pipe.unet, clipping).save_pretrained(work / "clips")
    argv = ["invert", work / "clips", work / "a.png", "--fixed_point_iterations", "3", "-o", work / "back.png", *STEPS]
    assert main([*map(str, argv)]) == 0
    error = float(re.search(r"inversion error ([\d.]+)", capsys.readouterr().out)[1])
    images = [from_pixels(np.asarray(Image.open(work / name)).copy()) for name in ("a.png", "back.png")]
    assert error < 0.01 and abs((images[0] - images[1]).square().mean().item() - error) < 1e-3


def test_latents_are_written_to_the_file_that_is_named(work, pipe):
    run(work, "invert", work / "a.png", "--latents", work / "LATENTS.NPY")
    expected = pipe.invert(work / "a.png", 4)
    np.testing.assert_allclose(np.load(work / "LATENTS.NPY"), expected.numpy(), atol=1e-6)
    assert not list(work.glob("LATENTS.NPY.*"))


@pytest.mark.parametrize(("suffix", "mode"), [("png", "RGBA"), ("TIFF", "RGBA"), ("jpg", "RGB")])
def test_a_single_image_keeps_its_alpha(work, suffix, mode):
    tiny_pipe(4).save_pretrained(work / "with alpha")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(work / "with alpha.png")
    output = work / f"varied.{suffix}"
    argv = ["vary", work / "with alpha", work / "with alpha.png", "--strength", "0", "-o", output, *STEPS]
    assert main([*map(str, argv)]) == 0
    image = Image.open(output)
    assert image.mode == mode and (mode == "RGB" or np.array_equal(np.asarray(image), pixels))


@pytest.mark.parametrize("command", [["vary", "{file}"], ["inpaint", "{work}/a.png", "{file}"], ["fuse", "{work}/a.png",
    "{file}"], ["invert", "{work}/a.png", "{file}"], ["trajectory", "--image", "{file}"]])  # fmt: skip
@pytest.mark.parametrize(("file", "reason"), [("text.png", "is not an image"), ("none.png", "No such file"),
    ("float.tif", "floating point")])  # fmt: skip
def test_unreadable_images_are_named_before_the_model_is_loaded(work, capsys, command, file, reason):
    Image.fromarray(np.zeros((8, 8), np.float32)).save(work / "float.tif")
    command = [arg.format(work=work, file=work / file) for arg in command]
    assert main([command[0], "no/such/model", *command[1:], "-o", str(work / "never.png")]) == 2
    error = capsys.readouterr().err
    assert file in error and reason in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "nowhere/at/all"], "nowhere/at/all is not a local folder"),
        (["generate", "{work}/model", "-o", "{work}/missing/out.png"], "--output is"),
        (["generate", "{work}/model", "--seeds", "-1"], "seeds"),
        (["vary", "{work}/model", "{work}/text.png"], "text.png is not an image"),
        (["vary", "{work}/model", "{work}/none.png"], "none.png"),
        (["vary", "{work}/model", "{work}/wide.png"], "8 x 9 pixels: this network generates 8 x 8"),
        (["fuse", "{work}/model", "{work}/a.png", "{work}/b.png", "--strip", "1"], "--strip is 1"),
        (["fuse", "{work}/model", "{work}/a.png", "{work}/b.png", "--weight", "2"], "weight is [2.0]"),
        (["trajectory", "{work}/model", "--columns", "1"], "--columns is 1"),
        (["generate", "{work}/model", "-o", "{work}/out.xyz"], "--output is"),
        (["generate", "{work}/model", "-o", "{work}/out.psd"], "--output is"),  # which Pillow only reads
        (["generate", "{work}/model", "-o", "{work}/out.xbm"], "--output is"),  # which has no colours
        (["generate", "{work}/model", "-o", "{work}/out.qoi"], "--output is"),  # which has no gray
        (["generate", "{work}/model", "-o", "{work}"], "--output is"),
        (["invert", "{work}/model", "{work}/a.png", "--latents", "{work}/l.txt"], "give a name that ends in .npy"),
        (["generate", "{work}/model", "--device", "moon"], "--device is moon"),
        (["invert", "{work}/model", "{work}/a.png", "--latents", "{work}/no/l.npy"], "--latents is"),
        (["fuse", "{work}/model", "{work}/a.png", "{work}/b.png", "--seeds", "3"], "seeds is given"),
        (["fuse", "{work}/model", "{work}/a.png", "{work}/b.png", "--eta", "1"], "eta is given"),
    ],
)
def test_errors_exit_with_2(work, capsys, args, message):
    argv = [arg.format(work=work) for arg in args]
    if "-o" not in argv:
        argv += ["-o", str(work / "never.png")]
    if "--device" not in argv:
        argv += STEPS
    assert main(argv) == 2
    assert message in capsys.readouterr().err and not (work / "never.png").exists()


@pytest.mark.parametrize("argv", [[], ["fuse", "model", "one.png"], ["paint", "model"], ["generate", "m", "--x"]])
def test_unknown_commands_and_flags_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2 and "usage" in capsys.readouterr().err
