"""The names of the classes belong to the model: saved, loaded and published with it, and taken as labels."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ddpm_pipeline import DDPMPipeline, DDPMScheduler
from ddpm_pipeline.__main__ import main
from ddpm_pipeline.denoiser import UNetDenoiser
from ddpm_pipeline.labels import record_class_names
from tests.models import quiet, tiny_pipe, tiny_unet

T = 8
NAMES = ("cat", "dog", "owl")
WAYS = {
    "with this package": lambda folder: DDPMPipeline.from_pretrained(folder),
    "built-in classes": lambda folder: DiffusionPipeline.from_pretrained(folder),
    "remote code": lambda folder: DiffusionPipeline.from_pretrained(
        folder, custom_pipeline="pipeline", trust_remote_code=True
    ),
}


def named_pipe(names=NAMES, null=True):
    """A network whose output depends mostly on the class; the last class is the null class, if there is one."""
    pipe = tiny_pipe(num_train_timesteps=T, num_class_embeds=len(names) + null)
    with torch.no_grad():
        pipe.unet.class_embedding.weight.mul_(10)
    record_class_names(pipe.unet, names)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return named_pipe()


def sample(pipe, **options):
    return pipe(output_type="latent", **options).images


def test_names_are_numbers(pipe):
    assert pipe.class_names == NAMES
    expected = sample(pipe, class_labels=[1, 0, 2], seeds=[1, 2, 3])
    assert (expected[0] - expected[1]).abs().max() > 0.1
    for labels in (["dog", "cat", "owl"], ("dog", 0, "owl"), np.array(["dog", "cat", "owl"]), [np.str_("dog"), 0, 2]):
        assert torch.equal(sample(pipe, class_labels=labels, seeds=[1, 2, 3]), expected)
    one = sample(pipe, class_labels="dog", seeds=[1, 2], guidance_scale=2.0)
    assert torch.equal(one, sample(pipe, class_labels=[1, 1], seeds=[1, 2], guidance_scale=2.0))
    assert len(sample(pipe, class_labels="owl")) == 1  # a name of three letters is one label


def test_the_methods_that_start_from_images_take_names(pipe):
    images = list(torch.rand(2, 1, 8, 8) * 2 - 1)
    for method, arguments in (
        (pipe.invert, (images, 4)),
        (pipe.vary, (images, 0.5, 4)),
        (pipe.inpaint, (images, np.eye(8, dtype=bool), 4)),
        (pipe.fuse, (*images, 0.5, "noise", False, 4)),
    ):
        options = {} if method == pipe.invert else {"seeds": [1, 2][: 2 - (method == pipe.fuse)]}
        options |= {} if method == pipe.invert else {"output_type": "latent"}
        named, numbered, other = (method(*arguments, class_labels=label, **options) for label in ("owl", 2, "cat"))
        named, numbered, other = (getattr(each, "images", each) for each in (named, numbered, other))
        assert torch.equal(named, numbered)
        assert not torch.equal(named, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"class_labels is None.*give class_labels, 'cat', 'dog', 'owl', or integers in \[0, 4\)"),
        ({"class_labels": "dgo"}, r"class_labels has 'dgo', which is no class \(similar: 'dog'\): give 'cat', 'dog'"),
        ({"class_labels": [0, "DOG"]}, "similar: 'dog'"),
        ({"class_labels": "zebra"}, "'zebra', which is no class: give"),
        ({"class_labels": "1"}, "class_labels has '1'"),
        ({"class_labels": ["cat", 4]}, r"class_labels is \['cat', 4\]: give 'cat'"),
        ({"class_labels": ["cat", None]}, "class_labels is"),
        ({"class_labels": ["cat", 0.5]}, "class_labels is"),
        ({"class_labels": ["cat", "dog"], "batch_size": 3}, "class_labels has 2 entries"),
        ({"class_labels": "cat", "guidance_interval": (3, 3)}, r"guidance_interval is \(3, 3\).*0 <= lo < hi <= 8"),
        ({"class_labels": "cat", "guidance_interval": (0.1, 0.7)}, r"is \(0.1, 0.7\): .*, in timesteps"),
        ({"class_labels": "cat", "guidance_interval": (7.5, 8)}, "guidance_interval is"),  # the last timestep is 7
        ({"class_labels": "cat", "guidance_scale": 1e7}, r"guidance_scale is 10000000.0: .* from -1e\+06 to 1e\+06"),
        ({"class_labels": "cat", "guidance_interval": (0, 9)}, "guidance_interval is 9"),
        ({"class_labels": "cat", "guidance_interval": 3}, "guidance_interval is 3"),
        ({"class_labels": "cat", "guidance_interval": ("a", 3)}, "guidance_interval is 'a'"),
    ],
)
def test_invalid_labels_and_intervals(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(**options)
    with pytest.raises(ValueError, match=message):
        pipe.trajectory(**options)
    if "guidance_interval" in options:
        for method in (pipe.vary, partial(pipe.inpaint, mask=torch.ones(8, 8))):
            with pytest.raises(ValueError, match=message):
                method(torch.zeros(1, 8, 8), **options)


def test_of_many_classes_a_message_names_ten():
    with pytest.raises(ValueError, match=r"'class 9' and 20 more \(pipe.class_names\), or integers in \[0, 31\)"):
        named_pipe([f"class {i}" for i in range(30)])()


def test_without_a_null_class_guidance_is_refused():
    pipe = named_pipe(null=False)
    assert sample(pipe, class_labels=list(NAMES)).shape == (3, 1, 8, 8)
    x = torch.zeros(1, 8, 8)
    for method in (pipe, partial(pipe.vary, x), partial(pipe.vary, x, 0), partial(pipe.inpaint, x, x + 1)):
        with pytest.raises(ValueError, match=r"guidance_scale is 2.0.*no class for \"no label\": give 1"):
            method(class_labels="cat", guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"integers in \[0, 3\)"):
        pipe(class_labels=3)


def test_guidance_acts_in_its_interval_alone():
    """Beside it, each step is that of scale 1, in one pass; in it, that of guidance. In float64."""
    scheduler = DDPMScheduler(T, clip_sample=False)
    pipe = tiny_pipe(scheduler=scheduler, num_class_embeds=3, dtype=torch.float64)
    with torch.no_grad():
        pipe.unet.class_embedding.weight.mul_(10)
    passes = []
    pipe.unet.register_forward_pre_hook(lambda module, args: passes.append((len(args[0]), int(args[1]))))
    options = {"class_labels": 0, "guidance_scale": 3.0}
    x_t = noise = torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(1)
    for t in reversed(range(T)):
        with torch.no_grad():
            eps, null = (pipe.unet(x_t, t, class_labels=torch.tensor([label])).sample for label in (0, 2))
        output = null + 3 * (eps - null) if 2 <= t < 5 else eps
        x_t = scheduler.step(output, t, x_t, generator=generator).prev_sample
    passes.clear()
    options |= {"latents": noise}
    limited, everywhere, all_of_them = (
        sample(pipe, guidance_interval=interval, generator=torch.Generator().manual_seed(1), **options)
        for interval in ((2, 5), None, (0, T))
    )
    assert passes[:T] == [(1, 7), (1, 6), (1, 5), (2, 4), (2, 3), (2, 2), (1, 1), (1, 0)]
    torch.testing.assert_close(limited, x_t, rtol=0, atol=1e-10)
    assert torch.equal(everywhere, all_of_them)
    assert (everywhere - limited).abs().max() > 0.01


@pytest.mark.parametrize("way", WAYS)
def test_the_names_survive_saving_and_loading(way, tmp_path, diffusers_log):
    pipe = named_pipe(["Katze", "\u72ac", "3"])
    pipe.save_pretrained(tmp_path / "first")
    diffusers_log.clear()
    loaded = quiet(WAYS[way](str(tmp_path / "first")))
    loaded.save_pretrained(tmp_path / "second")
    assert not [record for record in diffusers_log.records if "_class_names" in record.getMessage()]
    for folder in ("first", "second"):
        config = json.loads((tmp_path / folder / "unet" / "config.json").read_text())
        assert config["_class_names"] == ["Katze", "\u72ac", "3"]
    again = quiet(WAYS[way](str(tmp_path / "second")))
    for each in (loaded, again, quiet(type(again).from_pipe(again))):
        if way == "built-in classes":  # they ignore the names
            each = quiet(DDPMPipeline(each.unet, each.scheduler))
        assert each.class_names == ("Katze", "\u72ac", "3")
        expected = sample(pipe, class_labels=1, seeds=[1], guidance_scale=2.0)
        named = sample(each, class_labels="\u72ac", seeds=[1], guidance_scale=2.0)
        torch.testing.assert_close(named, expected, rtol=0, atol=1e-3)  # remote code has no compiled kernel


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a", "b"], "have 'a' twice"),
        (["a", ""], "are "),
        (["a", 3], "are "),
        ("abc", "are 'abc'"),
        (["a"], "there are 1 class names, but the network has num_class_embeds 3"),
        (["a", "b", "c", "d"], "there are 4"),
    ],
)
def test_other_names_are_refused(names, message, tmp_path):
    unet = tiny_unet(num_class_embeds=3)
    with pytest.raises(ValueError, match=message):
        record_class_names(unet, names)
    pipe = tiny_pipe(unet=unet)
    assert pipe.class_names is None
    unet.register_to_config(_class_names=names)  # a folder that someone has edited
    with pytest.raises(ValueError, match=message):
        pipe(class_labels=0)


def test_the_command_line_takes_names_and_numbers(tmp_path, capsys):
    named_pipe(["cat", "dog", "0"]).save_pretrained(tmp_path / "model")
    images = {}
    for label in ("dog", "1", "0", "2"):
        output = tmp_path / f"{label}.png"
        assert main(["generate", str(tmp_path / "model"), "--class_label", label, "-o", str(output)]) == 0
        images[label] = np.asarray(Image.open(output)).tolist()
    assert images["dog"] == images["1"] != images["2"] == images["0"]  # the name "0" is that of class 2
    assert main(["generate", str(tmp_path / "model"), "--class_label", "fox"]) == 2
    assert "--class_label has 'fox'" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "num_images"), [("generate", 0), ("trajectory", 0), ("vary", 1), ("inpaint", 2)])
def test_the_command_line_guides(tmp_path, monkeypatch, capsys, command, num_images):
    named_pipe(["cat", "dog"]).save_pretrained(tmp_path / "model")
    output, image = tmp_path / "out.png", tmp_path / "white.png"
    Image.new("L", (8, 8), "white").save(image)
    start = [command, str(tmp_path / "model"), *[str(image)] * num_images, "--class_label=dog", "-o", str(output)]
    start += ["--num_inference_steps=2"]
    guided = [*start, "--guidance_scale=3"]
    seen = []
    init = UNetDenoiser.__init__

    def record(self, unet, *arguments):
        init(self, unet, *arguments)
        seen.append((self.guidance_scale, self.guidance_interval))

    monkeypatch.setattr(UNetDenoiser, "__init__", record)
    images = []
    for arguments in (start, guided, [*guided, "--guidance_interval", "0", "2"]):
        assert main(arguments) == 0
        images.append(output.read_bytes())
    assert seen == [(1, None), (3, None), (3, (0, 2))] and images[0] != images[1]
    capsys.readouterr()
    for wrong, message in (
        ([*start, "--guidance_interval", "0", "2"], "--guidance_interval is [0.0, 2.0], without guidance: give"),
        ([*guided, "--guidance_interval", "3", "2"], "guidance_interval is [3.0, 2.0]: give (lo, hi)"),
        ([*start, "--guidance_scale=nan"], "guidance_scale is nan: give a number from"),
        (
            [each for each in start if "class_label" not in each],
            "--class_label is None, but this network has classes: give --class_label, 'cat', 'dog'",
        ),
    ):
        assert main(wrong) == 2 and message in capsys.readouterr().err
