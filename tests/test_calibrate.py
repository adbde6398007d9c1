"""training/calibrate.py on a run of six steps: what it saves, and that it continues, on one process and on two."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline as BuiltInDDPMPipeline
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from ddpm_pipeline import DDPMPipeline, calibration, classifier
from ddpm_pipeline.calibrated import load_tables
from tests.evaluation.helpers import train
from tests.models import tiny_unet
from tests.short_run import flags, run_here, run_on_two
from training.calibration import calibrator, results
from training.calibration.config import CalibrationConfig
from training.calibration.settings import DDIM, DDPM

SETTINGS = {"num_inference_steps": "2,3", "num_images": 16, "compare": "false", "cpu_threads": 1}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("calibrate")


@pytest.fixture(scope="module")
def trained(work):
    """A run on 48 smooth images of 16 x 16 pixels."""
    folder = work / "images"
    folder.mkdir()
    field = torch.randn(48, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(field, size=16, mode="bicubic")
    for i, image in enumerate(((smooth[:, 0] + 2) * 64).clamp(0, 255).byte().numpy()):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    run = train(work, "run", train_data_dir=folder, resolution=16)
    # untrained, but fast; with large predictions, so that solvers differ
    networks = [tiny_unet(size=16, seed=seed) for seed in (0, 1)]
    with torch.no_grad():
        for network in networks:
            network.conv_out.weight *= 3
    pipe = DDPMPipeline(networks[0], DDPMPipeline.from_pretrained(run / "pipeline").scheduler)
    pipe.guide = networks[1]
    pipe.save_pretrained(run / "pipeline")
    return run


@pytest.fixture
def model(trained, tmp_path):
    """A copy of the run."""
    return shutil.copytree(trained, tmp_path / "run")


def arguments(work, model, **settings):
    return [str(model), *flags({"cache_dir": work / "cache", **SETTINGS, **settings})]


def calibrate(work, model, expected=0, **settings):
    assert run_here("calibrate.py", arguments(work, model, **settings)) == expected


def tables(model):
    scheduler = DDPMPipeline.from_pretrained(model / "pipeline").scheduler
    return {len(table.timesteps): table for table in load_tables(scheduler)}


def sample(model, **options):
    pipe = DDPMPipeline.from_pretrained(model / "pipeline")
    return pipe(seeds=range(1000, 1032), output_type="pt", **options).images


def test_the_pipeline_has_tables_and_a_second_command_keeps_them(work, model, capsys):
    calibrate(work, model, num_inference_steps="2")
    first = tables(model)
    assert list(first) == [2]
    assert not torch.equal(sample(model, num_inference_steps=2), sample(model, num_inference_steps=2, calibrated=False))
    capsys.readouterr()
    calibrate(work, model)
    assert "3 steps: calibrated" in (output := capsys.readouterr().out) and "2 steps: calibrated" not in output
    both = tables(model)
    assert list(both) == [2, 3] and both[2] == first[2]
    calibrate(work, model)
    assert "calibrated in" not in capsys.readouterr().out
    calibrate(work, model, num_inference_steps="4")
    assert list(tables(model)) == [2, 3, 4]  # other numbers stay
    BuiltInDDPMPipeline.from_pretrained(model / "pipeline")(num_inference_steps=2)
    size = (model / "pipeline" / "scheduler" / "scheduler_config.json").stat().st_size
    assert size < 5000


def test_a_finished_table_is_used_before_the_next_one_is_fitted(work, model, monkeypatch, capsys):
    def interrupted(run, scheduler, number, total):
        if number == 3:
            raise KeyboardInterrupt
        return calibration.best_times(run, scheduler, number, total)

    monkeypatch.setattr("training.calibration.calibrator.best_times", interrupted)
    calibrate(work, model, expected=130, num_inference_steps="2,3")
    assert list(tables(model)) == [2]
    monkeypatch.undo()
    capsys.readouterr()
    calibrate(work, model, num_inference_steps="2,3")
    assert "2 steps: fitted before" in capsys.readouterr().out and list(tables(model)) == [2, 3]


def test_another_seed_or_number_of_images_is_fitted_anew(work, model, capsys):
    calibrate(work, model, num_inference_steps="2")
    before = tables(model)
    for settings in ({"seed": 1}, {"num_images": 17}):
        calibrate(work, model, num_inference_steps="2", **settings)
        assert "2 steps: calibrated" in capsys.readouterr().out
        assert tables(model) != before


class MeanAndContrast(torch.nn.Module):
    """Features for TorchScript."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.mean(dim=(1, 2, 3)), x.std(dim=(1, 2, 3)), x.amax(dim=(1, 2, 3))], dim=1)


def test_further_features_of_the_fit(work, model, tmp_path, capsys):
    """They come nearer to those of the images, and the tables are others."""
    file = tmp_path / "features.pt"
    torch.jit.script(MeanAndContrast()).save(file)
    calibrate(work, model, num_inference_steps="2")
    before = tables(model)
    calibrate(work, model, num_inference_steps="2", fit_extractor=file)
    assert "2 steps: calibrated" in capsys.readouterr().out and tables(model) != before
    calibrate(work, model, expected=2, fit_extractor=file, use_images="false")
    assert "use_images is false: leave out one of them" in capsys.readouterr().err
    calibrate(work, model, expected=2, fit_extractor=file, extractor=file, compare="true")
    assert "extractor and fit_extractor are both" in capsys.readouterr().err


def test_many_steps_start_from_a_solver_not_from_the_teachers_steps(work, model, monkeypatch):
    found = []

    def best_solver(*args):
        found.append(calibration.best_solver(*args))
        return found[-1]

    monkeypatch.setattr(calibrator, "best_solver", best_solver)
    monkeypatch.delattr(calibrator, "fit_steps")
    monkeypatch.setattr(calibrator, "ALL_FREE", 2)
    calibrate(work, model, num_inference_steps=3)
    assert tables(model)[3].timesteps == found[0].run.table.timesteps


def test_a_damaged_file_of_tables_does_not_count(work, model, capsys):
    calibrate(work, model, num_inference_steps="2")
    file = model / "calibration" / "tables.json"
    content = json.loads(file.read_text())
    (tables_of_key,) = content.values()
    tables_of_key[0]["coefficients"][0][0] = "much"
    file.write_text(json.dumps(content))
    capsys.readouterr()
    calibrate(work, model, num_inference_steps="2")
    assert "2 steps: calibrated" in capsys.readouterr().out


def test_two_processes_find_the_table_of_one(work, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    calibrate(work, model, num_inference_steps="3")
    run_on_two("calibrate.py", arguments(work, other, num_inference_steps="3"))
    one, two = tables(model)[3], tables(other)[3]
    assert one.timesteps == two.timesteps
    assert np.abs(np.array(one.network_timesteps) - two.network_timesteps).max() <= 1
    for row, expected in zip(two.coefficients, one.coefficients):
        assert row == pytest.approx(expected, abs=0.01)


def test_without_images_few_steps_lead_where_all_of_them_do(work, model):
    """The outside truth is DPM-Solver++ of diffusers with all 20 steps."""
    calibrate(work, model, num_inference_steps="3", use_images="false")
    pipe = BuiltInDDPMPipeline.from_pretrained(model / "pipeline")
    ours = DDPMPipeline(pipe.unet, pipe.scheduler)
    clipping = {"thresholding": True, "sample_max_value": 1.0}  # as clip_sample, which this class does not have
    ours.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", **clipping
    )
    options = {"seeds": range(1000, 1032), "output_type": "pt"}
    target, plain = (ours(num_inference_steps=steps, **options).images for steps in (20, 3))
    errors = [(images - target).square().mean().item() for images in (sample(model, num_inference_steps=3), plain)]
    assert errors[0] < 0.5 * errors[1]


def test_guided_tables_are_for_the_guide_they_were_fitted_with(work, model, capsys):
    settings = {"num_inference_steps": "2", "autoguidance_scale": 1.5, "guidance_interval": "2,15"}
    calibrate(work, model, **settings)
    pipe = DDPMPipeline.from_pretrained(model / "pipeline")
    guided = {"seeds": [0], "num_inference_steps": 2, "autoguidance_scale": 1.5, "guidance_interval": (2, 15)}
    pipe(**guided, calibrated=True)
    with pytest.raises(ValueError, match=r"there is no table for 2 steps: .* 2 steps with autoguidance_scale=1\.5"):
        pipe(seeds=[0], num_inference_steps=2, calibrated=True)
    with torch.no_grad():
        pipe.guide.conv_in.weight += 1
    with pytest.raises(ValueError, match="fitted with another guide"):
        pipe(**guided, calibrated=True)
    calibrate(work, model, num_inference_steps="2")  # a table without guidance stands beside it
    both = load_tables(DDPMPipeline.from_pretrained(model / "pipeline").scheduler)
    assert len(both) == 2
    capsys.readouterr()
    calibrate(work, model, **settings)  # what was fitted with other settings is kept, too
    assert "calibrated in" not in capsys.readouterr().out
    pipe.save_pretrained(model / "pipeline")  # with the other guide
    calibrate(work, model, **settings)
    assert "2 steps: calibrated" in capsys.readouterr().out
    assert DDPMPipeline.from_pretrained(model / "pipeline")(**guided, calibrated=True)


def test_tables_of_a_model_with_classes_are_for_their_guidance(work, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "LEAST_STEPS", 10)  # any features will do
    folder = tmp_path / "images"
    for i in range(24):
        path = folder / ("dark", "light")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16), dtype=np.uint8)).save(path)
    tiny_unet(1, size=16).save_config(tmp_path)
    network = {"denoiser": tmp_path / "config.json"}
    run = train(tmp_path, "run", train_data_dir=folder, resolution=16, class_conditional=True, **network)
    calibrate(work, run, num_inference_steps="2", guidance_scale=2, extractor="pixels")
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")
    options = {"seeds": [0, 1], "num_inference_steps": 2, "class_labels": ["dark", "light"]}
    pipe(**options, guidance_scale=2, calibrated=True)
    with pytest.raises(ValueError, match=r"this model has tables for 2 steps with guidance_scale=2"):
        pipe(**options, calibrated=True)


def test_an_output_folder_gets_a_complete_copy(work, model, tmp_path):
    before = (model / "pipeline" / "scheduler" / "scheduler_config.json").read_bytes()
    calibrate(work, model / "pipeline", num_inference_steps="2", output_dir=tmp_path / "copy")
    assert list(tables(tmp_path / "copy")) == [2]
    assert (model / "pipeline" / "scheduler" / "scheduler_config.json").read_bytes() == before
    names = [path.relative_to(model / "pipeline") for path in (model / "pipeline").rglob("*.[js][sa][of]*")]
    assert names and all((tmp_path / "copy" / "pipeline" / name).is_file() for name in names)


def test_an_output_folder_with_another_model_is_not_touched(work, model, tmp_path, capsys):
    other = shutil.copytree(model, tmp_path / "other")
    pipe = DDPMPipeline.from_pretrained(other / "pipeline")
    with torch.no_grad():
        pipe.unet.conv_in.weight += 1
    pipe.save_pretrained(other / "pipeline")
    before = (other / "pipeline" / "scheduler" / "scheduler_config.json").read_bytes()
    calibrate(work, model, expected=2, num_inference_steps="2", output_dir=other)
    assert "has another model than" in capsys.readouterr().err
    assert (other / "pipeline" / "scheduler" / "scheduler_config.json").read_bytes() == before
    calibrate(work, model, num_inference_steps="2", output_dir=tmp_path / "copy")
    calibrate(work, model, num_inference_steps="3", output_dir=tmp_path / "copy")
    assert list(tables(tmp_path / "copy")) == [2, 3]
    file = tmp_path / "copy" / "pipeline" / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"clip_sample": not config["clip_sample"]}))
    calibrate(work, model, expected=2, num_inference_steps="2", output_dir=tmp_path / "copy")
    assert "has another scheduler than" in capsys.readouterr().err
    file.write_text(json.dumps(config | {"_calibration": [1]}))
    calibrate(work, model, expected=2, num_inference_steps="4", output_dir=tmp_path / "copy")
    assert "calibrated in" not in (seen := capsys.readouterr()).out
    assert "scheduler_config.json: _calibration: the field has [1]" in seen.err


@pytest.mark.parametrize("use_images", ["true", "false"])
def test_the_comparison_names_the_schedulers_of_diffusers(work, model, monkeypatch, capsys, use_images):
    monkeypatch.setattr(results, "SETTINGS", [DDIM, DDPM])
    monkeypatch.setattr(results, "SCREENINGS", ((16, 2), (32, 1)))
    settings = {"num_samples": 64, "compare": "true", "extractor": "pixels", "use_images": use_images}
    calibrate(work, model, num_inference_steps="2,3", **settings)
    assert "2 calls, " in capsys.readouterr().out
    folder = model / "calibration"
    text = (folder / "comparison.md").read_text()
    assert "Calibrated: 2, 3 steps. Best built-in: of 2 settings" in text and DDIM.name in text and DDPM.name in text
    assert Image.open(folder / "comparison.png").width > 100
    records = json.loads((folder / "comparison.json").read_text())["records"]
    numbers = [record["inputs"]["num_samples"] for record in records]
    assert numbers == [16, 16, 32, 32, 64, 64, 64] * 2  # those that go on, DDIM and DDPM always, have more samples
    own = [record["inputs"]["table"]["timesteps"] for record in records if record["is_calibrated"]]
    assert [len(timesteps) for timesteps in own] == [2, 3]
    values = [record["results"][0]["estimate"][0] for record in records]
    assert all(math.isfinite(value) and value > 0 for value in values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": "1"}, "num_inference_steps is '1': give different numbers from 2 to 100"),
        ({"num_inference_steps": "5,5"}, "num_inference_steps is '5,5'"),
        ({"num_inference_steps": "20"}, "num_inference_steps has 20, but the process of .* has 20 timesteps"),
        ({"num_inference_steps": ""}, "num_inference_steps"),
        ({"num_images": 3}, "num_images is 3: give at least 16"),
        ({"seed": -1}, "seed is -1: give at least 0"),
        ({"guidance_scale": 2}, "no classes"),
        ({"guidance_interval": "2,8"}, "guidance_interval is 2,8, but there is no guidance"),
        ({"dataset_name": "a", "train_data_dir": "b"}, "give one of them"),
        ({"train_data_dir": "/nowhere"}, "/nowhere"),
        ({"extractor": "dino", "compare": "true"}, "extractor is 'dino': give \"pixels\""),
        ({"fit_extractor": "classifier"}, "fit_extractor is 'classifier': give a .th or .pt file"),
        ({"fit_extractor": "nowhere.pt"}, "fit_extractor is 'nowhere.pt': give a .th or .pt file"),
        (
            {"fit_extractor": "user/model", "extractor": "user/model", "compare": "true"},
            "extractor and fit_extractor are both 'user/model'",
        ),
    ],
)
def test_bad_settings_end_with_code_2_before_anything_is_fitted(work, trained, capsys, settings, message):
    calibrate(work, trained, expected=2, **settings)
    assert re.search(message, capsys.readouterr().err)
    assert not (trained / "calibration" / "tables.json").exists()


@pytest.mark.parametrize(
    ("number", "value", "message"),
    [(3, None, "there are 3 training images: give at least 16"), (24, 77, "all training images are equal")],
)
def test_images_that_nothing_can_be_fitted_to(work, model, tmp_path, capsys, number, value, message):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(number):
        Image.fromarray(np.full((16, 16), i if value is None else value, dtype=np.uint8)).save(folder / f"{i}.png")
    calibrate(work, model, expected=2, train_data_dir=folder)
    assert message in capsys.readouterr().err


def test_what_a_calibration_cannot_work_with_is_named_before_the_fit(work, model, capsys):
    (model / "calibration").mkdir()
    (model / "calibration" / "comparison.json").write_text("{")
    calibrate(work, model, expected=2)
    assert "comparison.json has no records" in capsys.readouterr().err
    shutil.rmtree(model / "calibration")
    file = model / "pipeline" / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": None}))
    calibrate(work, model, expected=2, use_images="false")
    assert "has no sample_size" in capsys.readouterr().err


def test_a_model_on_the_hub_needs_an_output_folder():
    with pytest.raises(ValueError, match="num_samples is 1: give at least 64"):
        CalibrationConfig("user/model", num_samples=1)
