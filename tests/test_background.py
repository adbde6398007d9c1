"""The colour behind transparent pixels belongs to the model: saved, loaded and published with it, and used."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ddpm_pipeline import DDPMPipeline
from ddpm_pipeline.images import background_of, record_background
from tests.models import quiet, tiny_pipe, tiny_unet

WAYS = {
    "with this package": lambda folder: DDPMPipeline.from_pretrained(folder),
    "built-in classes": lambda folder: DiffusionPipeline.from_pretrained(folder),
    "remote code": lambda folder: DiffusionPipeline.from_pretrained(
        folder, custom_pipeline="pipeline", trust_remote_code=True
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_background_survives_saving_and_loading(way, tmp_path, diffusers_log):
    pipe = tiny_pipe(3)
    record_background(pipe.unet, "#ff8000")
    pipe.save_pretrained(tmp_path / "first")
    diffusers_log.clear()
    loaded = quiet(WAYS[way](str(tmp_path / "first")))
    loaded.save_pretrained(tmp_path / "second")
    assert not [record for record in diffusers_log.records if "_background" in record.getMessage()]
    for folder in ("first", "second"):
        assert json.loads((tmp_path / folder / "unet" / "config.json").read_text())["_background"] == "#ff8000"
    again = quiet(WAYS[way](str(tmp_path / "second")))
    for each in (loaded, again, quiet(type(again).from_pipe(again))):
        if way == "built-in classes":
            each = quiet(DDPMPipeline(each.unet, each.scheduler))
        varied = each.vary(Image.new("RGBA", (8, 8)), 0.0, output_type="np").images
        assert (varied * 255).round()[0, 0, 0].tolist() == [255, 128, 0]


@pytest.mark.parametrize("colour", ["white", "#fff", "#FFFFFF"])
def test_white_is_not_written(colour, tmp_path):
    pipe = tiny_pipe()
    record_background(pipe.unet, colour)
    pipe.save_pretrained(tmp_path / "model")
    assert "_background" not in (tmp_path / "model" / "unet" / "config.json").read_text()
    erased = Image.new("LA", (8, 8))  # as in folders saved before there was a background
    assert torch.equal(pipe.vary(erased, 0.0, output_type="latent").images, torch.ones(1, 1, 8, 8))


def test_another_run_on_white_overrides_a_recorded_background():
    unet = tiny_unet()
    for colour in ("black", "white"):
        record_background(unet, colour)
        assert background_of(unet) == colour


@pytest.mark.parametrize("colour", ["whitish", "#ffffff80", 3, None, ["black"]])
def test_other_backgrounds_are_refused(colour, tmp_path):
    with pytest.raises(ValueError, match="background is "):
        record_background(tiny_unet(), colour)
    pipe = tiny_pipe()
    pipe.unet.register_to_config(_background=colour)
    with pytest.raises(ValueError, match="background is "):
        pipe.vary(Image.new("LA", (8, 8)))
