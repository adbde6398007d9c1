"""--guide_snapshot: the EMA weights of an early step are kept in training, and saved as the guide of the pipeline."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ddpm_pipeline import DDPMPipeline
from tests.arrays import save_images
from tests.models import quiet, tiny_unet
from tests.short_run import SHORT_RUN, dying_after, flags, run_here, run_on_two
from training.config import Config
from training.run import checkpoint
from training.run.best import Best

OPTIONS = SHORT_RUN | {
    "train_batch_size": 4,
    "validation_steps": 0,
    "save_images_steps": 0,
    "num_sample_images": 2,
    "ddpm_num_inference_steps": 2,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 8,
    "max_train_steps": 8,
    "guide_snapshot": 0.25,  # step 2
    "report_to": "none",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guide")
    save_images(folder / "images", 60, 16, 16)
    tiny_unet(1, size=16).save_config(folder)
    return folder


def command_line(work, name, **options):
    folders = {"output_dir": work / name, "cache_dir": work / "cache", "train_data_dir": work / "images"}
    return flags(OPTIONS | folders | {"denoiser": work / "config.json"} | options)


def train(work, name, **options):
    return run_here("train.py", command_line(work, name, **options))


def train_until(work, name, step, **options):
    """The process dies after the checkpoint of this step."""
    with dying_after(step):
        train(work, name, **options)


def ema_of(run, step):
    return load_file(run / f"checkpoint-{step:06d}" / "ema.safetensors")


def guide_of(run):
    return load_file(run / "pipeline" / "guide" / "diffusion_pytorch_model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files(run, step):
    return checkpoint.verify(run / f"checkpoint-{step:06d}")["files"]


def record_of(run):
    return json.loads((run / "pipeline" / "training.json").read_text())


@pytest.fixture(scope="module")
def uninterrupted(work):
    assert train(work, "uninterrupted") == 0
    return work / "uninterrupted"


def test_the_guide_has_the_ema_weights_of_its_step(uninterrupted):
    assert equal(guide_of(uninterrupted), ema_of(uninterrupted, 2))
    assert not equal(ema_of(uninterrupted, 2), ema_of(uninterrupted, 3))
    assert record_of(uninterrupted)["guide_step"] == 2 and record_of(uninterrupted)["step"] == 8
    pipeline = uninterrupted / "pipeline"
    assert (pipeline / "guide" / "config.json").read_bytes() == (pipeline / "unet" / "config.json").read_bytes()
    pipe = quiet(DDPMPipeline.from_pretrained(pipeline))
    assert equal(dict(pipe.guide.state_dict()), ema_of(uninterrupted, 2))
    plain, guided = (
        pipe(seeds=1, num_inference_steps=2, output_type="latent", autoguidance_scale=w).images for w in (1, 2)
    )
    assert not torch.equal(plain, guided)


def test_checkpoints_have_it_from_the_step_after_it_on(uninterrupted):
    for step in range(1, 9):
        path = uninterrupted / f"checkpoint-{step:06d}" / "guide.safetensors"
        assert path.exists() == ("guide.safetensors" in files(uninterrupted, step)) == (step > 2)
        assert step <= 2 or equal(load_file(path), ema_of(uninterrupted, 2))


def test_it_changes_nothing_else(uninterrupted, work):
    assert train(work, "plain", guide_snapshot="null", checkpointing_steps=8) == 0
    expected = files(uninterrupted, 8)
    del expected["guide.safetensors"]
    assert files(work / "plain", 8) == expected
    assert not (work / "plain" / "pipeline" / "guide").exists() and record_of(work / "plain")["guide_step"] is None


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_run_has_the_guide_of_an_uninterrupted_one(uninterrupted, work, step):
    """Interrupted before, at and after the step of the guide."""
    run = work / f"resumed {step}"
    train_until(work, run.name, step)
    assert train(work, run.name, resume_from_checkpoint="latest") == 0
    assert files(run, 8) == files(uninterrupted, 8)
    assert equal(guide_of(run), guide_of(uninterrupted)) and record_of(run)["guide_step"] == 2


def test_it_survives_a_resume_on_two_processes(uninterrupted, work):
    train_until(work, "two", 3)
    arguments = command_line(work, "two", train_batch_size=2, resume_from_checkpoint="latest")
    run_on_two("train.py", arguments)
    assert checkpoint.verify(work / "two" / "checkpoint-000008")["num_processes"] == 2
    assert equal(guide_of(work / "two"), guide_of(uninterrupted))


def test_settings_that_change_when_a_run_is_resumed(uninterrupted, work, capsys):
    for name, options in (("late", {"guide_snapshot": "null"}), ("other", {}), ("dropped", {})):
        train_until(work, name, 4, **options)
    capsys.readouterr()
    assert train(work, "late", resume_from_checkpoint="latest") == 0
    assert "guide_snapshot is 0.25, but 50% of the run are over" in capsys.readouterr().out
    assert not (work / "late" / "pipeline" / "guide").exists()
    assert train(work, "other", resume_from_checkpoint="latest", guide_snapshot=0.5) == 0
    assert "guide_snapshot 0.25 -> 0.5: the guide of step 2 stays" in capsys.readouterr().out
    assert equal(guide_of(work / "other"), guide_of(uninterrupted))
    assert train(work, "dropped", resume_from_checkpoint="latest", guide_snapshot="null") == 0
    assert not (work / "dropped" / "pipeline" / "guide").exists()


def test_a_run_by_the_clock_keeps_one_too(work):
    minutes = 0.05
    assert train(work, "minutes", max_train_steps="null", max_train_minutes=minutes, checkpointing_steps=1000) == 0
    record = record_of(work / "minutes")
    assert 0 < record["guide_step"] < record["step"]


def test_best_weights_of_an_earlier_step_have_no_guide(work, monkeypatch):
    """A guide that was trained for as long as the network, or longer, is not weaker."""
    see = Best.see
    monkeypatch.setattr(Best, "see", lambda self, step, *_: see(self, step, {"validation_loss": float(step)}, [1.0]))
    assert train(work, "best", guide_snapshot=0.5, keep_best="validation_loss", validation_steps=4) == 0
    record = record_of(work / "best")
    assert record["best"]["step"] == 4 and record["guide_step"] is None
    assert not (work / "best" / "pipeline" / "guide").exists()
    assert (work / "best" / "pipeline-last" / "guide").exists()


@pytest.mark.parametrize("share", [0.0, 1 / 65, 0.51, 1.0, float("nan")])
def test_other_shares_are_refused(share):
    with pytest.raises(
        ValueError, match=r"guide_snapshot is .*: give a share of the run from 1/64 to 1/2, such as 0.125"
    ):
        Config(dataset_name="moons", guide_snapshot=share)
