"""Resuming: what must be the same, what may change and is said, "auto"; a new run in the folder of an earlier one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from ddpm_pipeline import DDPMPipeline
from ddpm_pipeline.calibrated import Guidance, load_tables, save_tables
from ddpm_pipeline.solver_tables import dpm_solver_table
from tests.arrays import random_images, save_images
from tests.short_run import SHORT_RUN, flags, fresh_accelerate, run_here
from training.budget import Budget
from training.config import Config
from training.denoiser import FORMER
from training.ema import FlatEMA
from training.hub import during_training
from training.run import checkpoint, resume
from training.run.best import Best
from training.run.ema_snapshots import EMASnapshots
from training.run.kept import GuideSnapshot
from training.run.log import Log
from training.run.runtime import Runtime

OPTIONS = SHORT_RUN | {
    "max_train_steps": 2,
    "train_batch_size": 2,
    "num_sample_images": 1,
    "ddpm_num_inference_steps": 1,
    "save_images_steps": 0,
    "validation_steps": 0,
}


def save_transparent_images(folder):
    """Six images of 20 x 16 pixels, so that crop and stretch differ, with transparent areas, so that backgrounds do."""
    folder.mkdir()
    for i in range(6):
        Image.fromarray(random_images(20, 16, 4, seed=i)).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two steps, `run`, beside its images."""
    work = tmp_path_factory.mktemp("resume")
    save_transparent_images(work / "images")
    assert train(work) == 0
    return work


@pytest.fixture
def work(finished, tmp_path):
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "work")
    return tmp_path / "work"


def train(work, **options):
    options = {
        "output_dir": work / "run", "cache_dir": work / "cache", "train_data_dir": work / "images", "resolution": 16,
        **OPTIONS, **options,
    }  # fmt: skip
    return run_here("train.py", flags(options))


def contents(folder, *names):
    return {name: (folder / name).read_bytes() for name in names}


# ---- What must be the same -------------------------------------------------------------------------------------------


def change_a_pixel(work):
    pixels = np.array(Image.open(work / "images" / "3.png"))
    pixels[10, 8] = [200, 10, 10, 255]
    Image.fromarray(pixels).save(work / "images" / "3.png")


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"background": "black"}, None, "background 'white', but now it is 'black'"),
        ({"center_crop": "false"}, None, "center_crop True, but now it is False"),
        ({"resolution": 8}, None, "images with sha256"),
        ({}, change_a_pixel, "images with sha256"),
    ],
)
def test_other_pixels_are_refused(work, capsys, options, change, message):
    if change:
        change(work)
    before = contents(work / "run", "config.yaml", "metrics.jsonl", "checkpoint-000002/manifest.json")
    assert train(work, resume_from_checkpoint="latest", max_train_steps=3, **options) == 2
    assert message in capsys.readouterr().err
    assert contents(work / "run", *before) == before


def test_the_same_pixels_in_a_folder_of_another_name_are_the_same(work):
    (work / "images").rename(work / "renamed")
    assert train(work, resume_from_checkpoint="latest", max_train_steps=3, train_data_dir=work / "renamed") == 0


def test_the_digest_of_the_images_is_in_the_records(work):
    manifest = checkpoint.verify(work / "run" / "checkpoint-000002")
    record = json.loads((work / "run" / "pipeline" / "training.json").read_text())
    assert len(manifest["data_digest"]) == 64 and record["data_digest"] == manifest["data_digest"]


# ---- What may change -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {}, ""),
        ({}, {"max_train_steps": 20}, ""),
        ({}, {"logging_steps": 7, "checkpointing_steps": 9}, ""),
        (
            {"lr_scheduler": "linear"},
            {"lr_scheduler": "linear", "max_train_steps": 20},
            "max_train_steps 10 -> 20: the learning rate of step 6 is 0.75 instead of 0.5",
        ),
        (
            {"lr_scheduler": "cosine"},
            {"lr_scheduler": "constant"},
            "lr_scheduler cosine -> constant: the learning rate of step 6 is 1 instead of 0.5",
        ),
        ({}, {"learning_rate": 0.5}, "learning_rate 1.0 -> 0.5: the learning rate of step 6 is 0.5 instead of 1"),
        (
            {},
            {"ema_power": 1.0, "variance_type": "fixed_large"},
            "ema_power 0.75 -> 1.0, variance_type fixed_small -> ",
        ),
        (
            {},
            {
                "adam_beta1": 0.1,
                "adam_beta2": 0.1,
                "adam_epsilon": 1,
                "max_grad_norm": 2,
                "ema_power": 1,
                "ema_inv_gamma": 2,
            },
            ", and 1 more",
        ),
    ],
)
def test_a_change_that_matters_is_said(before, now, message):
    common = {"dataset_name": "moons", "learning_rate": 1.0, "lr_warmup_steps": 0, "max_train_steps": 10}
    common["lr_scheduler"] = "constant"
    manifest = {"step": 5, "global_batch": 4, "config": Config(**common | before).as_dict(), "mixed_precision": "no"}
    config = Config(**common | now)
    line = resume.describe_changes(manifest, config, Budget.of(config, 4), "no")
    assert message in line and bool(line) == bool(message)


def test_another_precision_is_said():
    config = Config(dataset_name="moons", learning_rate=1e-3)
    manifest = {"step": 5, "global_batch": 4, "config": config.as_dict(), "mixed_precision": "fp16"}
    assert "mixed_precision fp16 -> bf16" in resume.describe_changes(manifest, config, Budget(10), "bf16")


@pytest.mark.parametrize("saved", ["none", "missing", "state"])
@pytest.mark.parametrize("has_scaler", [True, False])
def test_fp16_resumes_from_other_precisions_and_back(tmp_path, saved, has_scaler):
    """The loss scaler of fp16 begins anew where the checkpoint has none."""
    with fresh_accelerate():
        runtime = Runtime("no", 1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        runtime.accelerator.scaler = scaler if has_scaler else None
        unet = torch.nn.Conv2d(1, 1, 1)
        ema, optimizer = FlatEMA(unet), torch.optim.AdamW(unet.parameters())
        states = {"model": unet.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
        config = Config(dataset_name="moons", learning_rate=1e-3)
        record = {"config": config.as_dict(), "global_batch": 4, "mixed_precision": "no"}
        if saved != "missing":
            state = torch.amp.GradScaler("cpu", init_scale=2.0).state_dict()
            record["scaler"] = state if saved == "state" else None
        path = checkpoint.save(tmp_path, 4, **states, record=record, total_limit=1)
        manifest = checkpoint.verify(path)
        kept = {"best": Best(None, ema, print), "guide": GuideSnapshot(None, ema, print)}
        kept |= {"averages": EMASnapshots(False, ema, None, print), "importance": None}
        parts = {"unet": unet, "ema": ema, "optimizer": optimizer, **kept}
        state = resume.restore(path, manifest, config, Budget(10), runtime, **parts)
        assert state.step == state.saved_step == 4
        assert scaler.get_scale() == (2.0 if saved == "state" and has_scaler else 8.0)


def test_changed_settings_of_the_optimizer_take_effect(tmp_path):
    with fresh_accelerate():
        runtime, unet = Runtime("no", 1), torch.nn.Conv2d(1, 1, 1)
        ema, before = FlatEMA(unet), torch.optim.AdamW(unet.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
        unet(torch.ones(1, 1, 1, 1)).sum().backward()
        before.step()
        config = Config(dataset_name="moons", learning_rate=1e-3)
        states = {"model": unet.state_dict(), "ema": ema.state_dict(), "optimizer": before.state_dict()}
        record = {"config": config.as_dict(), "global_batch": 4}
        path = checkpoint.save(tmp_path, 4, **states, record=record, total_limit=1)
        kept = {"best": Best(None, ema, print), "guide": GuideSnapshot(None, ema, print)}
        now = torch.optim.AdamW(unet.parameters(), betas=(0.5, 0.6), weight_decay=0.2, eps=1e-3, fused=True)
        kept |= {"averages": EMASnapshots(False, ema, None, print), "importance": None}
        parts = {"unet": unet, "ema": ema, "optimizer": now, **kept}
        resume.restore(path, checkpoint.verify(path), config, Budget(10), runtime, **parts)
    (group,) = now.param_groups
    assert (group["betas"], group["weight_decay"], group["eps"], group["fused"]) == ((0.5, 0.6), 0.2, 1e-3, True)
    assert torch.equal(now.state[unet.weight]["exp_avg"], before.state[unet.weight]["exp_avg"])  # the moments stay


# ---- auto, and paths -------------------------------------------------------------------------------------------------


def test_auto_resumes_where_there_is_a_valid_checkpoint_and_begins_where_there_is_none(work, capsys):
    assert train(work, resume_from_checkpoint="auto", max_train_steps=3) == 0
    assert "after step 2" in capsys.readouterr().out
    for weights in (work / "run").glob(f"checkpoint-*/{checkpoint.WEIGHTS}"):
        weights.write_bytes(b"")
    assert train(work, resume_from_checkpoint="latest") == 2
    capsys.readouterr()
    assert train(work, resume_from_checkpoint="auto") == 0
    printed = capsys.readouterr().out
    assert (
        "is skipped" in printed and "no valid checkpoint: a new run begins" in printed and "trained 2 steps" in printed
    )
    new = work / "new"
    assert train(work, output_dir=new, resume_from_checkpoint="auto") == 0
    assert (new / "checkpoint-000002").is_dir()
    assert train(work, resume_from_checkpoint="auto", seed=1) == 2  # another run is no reason to begin a new one


def test_a_finished_run_says_that_nothing_is_left(work, capsys):
    (work / "run" / "pipeline" / "training.json").unlink()
    assert train(work, resume_from_checkpoint="latest") == 0
    printed = capsys.readouterr().out
    assert "Nothing is left to train: this run is to have 2 steps, and has had 2 steps in" in printed
    assert "trained 0 steps" not in printed
    assert (work / "run" / "pipeline" / "training.json").exists()  # written again, in case it was not complete


def calibrate(run):
    """Put a table into pipeline/, as calibrate.py does. Returns the file that it is in."""
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")
    tables = [dpm_solver_table(pipe.scheduler, [19, 10, 3])]
    save_tables(pipe.scheduler, pipe.unet, tables, pipe.guide)
    pipe.save_pretrained(run / "pipeline")
    return run / "pipeline" / "scheduler" / "scheduler_config.json"


def test_a_finished_run_keeps_its_calibrated_steps(work, capsys):
    file = calibrate(work / "run")
    before = file.read_bytes()
    assert train(work, resume_from_checkpoint="latest") == 0
    assert file.read_bytes() == before
    assert "calibrat" not in "".join(capsys.readouterr())
    DDPMPipeline.from_pretrained(work / "run" / "pipeline")(num_inference_steps=3, calibrated=True)


def test_other_weights_have_to_be_calibrated_again(work, capsys):
    """Its samples during training are not by a table either, of which it would warn."""
    file = calibrate(work / "run")
    assert train(work, resume_from_checkpoint="latest", max_train_steps=3, ddpm_num_inference_steps=3) == 0
    assert "_calibration" not in json.loads(file.read_text())
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "calibrat" in line]
    assert "they were fitted to other weights" in line and "run calibrate.py again" in line


def test_tables_with_another_guide_are_left_out(work, capsys):
    """Those without guidance stay."""
    pipe = DDPMPipeline.from_pretrained(work / "run" / "pipeline")
    pipe.guide = DDPMPipeline.from_pretrained(work / "run" / "pipeline").unet
    plain, guided = dpm_solver_table(pipe.scheduler, [19, 3]), dpm_solver_table(pipe.scheduler, [19, 10, 3])
    tables = [plain, guided._replace(guidance=Guidance(autoguidance_scale=2.0))]
    save_tables(pipe.scheduler, pipe.unet, tables, pipe.guide)
    pipe.save_pretrained(work / "run" / "pipeline")
    assert train(work, resume_from_checkpoint="latest") == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "calibrat" in line]
    assert "they were fitted with a guide" in line
    assert load_tables(DDPMPipeline.from_pretrained(work / "run" / "pipeline").scheduler) == [plain]


@pytest.mark.parametrize("damage", ["", "[]", '{"_calibration": 1}', '{"_calibration": null}', None])
def test_a_damaged_earlier_scheduler_does_not_stop_training(work, damage, capsys):
    file = work / "run" / "pipeline" / "scheduler" / "scheduler_config.json"
    file.unlink()
    if damage is None:
        file.mkdir()  # where a file should be
    else:
        file.write_text(damage)
    assert train(work, resume_from_checkpoint="latest") == 0
    assert "_calibration" not in json.loads(file.read_text())
    lines = [line for line in capsys.readouterr().err.splitlines() if "calibrat" in line]
    assert len(lines) == (damage is not None and "null" not in damage)
    assert all(line.startswith(f"WARNING: {file}") for line in lines)


def test_a_home_folder_is_expanded(work, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(work))
    assert train(work, resume_from_checkpoint="~/run/checkpoint-000002", max_train_steps=3) == 0
    assert train(work, output_dir="~/new", init_from="~/run/pipeline") == 0
    assert f"resumed from {work}" in capsys.readouterr().out and (work / "new" / "pipeline").is_dir()


@pytest.mark.parametrize("before", ["0", "null", "2"])
def test_another_number_of_held_out_images_says_with_what_it_came(work, capsys, before):
    options = {"output_dir": work / "held out", "train_data_dir": save_images(work / "more", 40, 8, 8)}
    options |= {"resolution": 8, "num_validation_images": 2, "max_train_steps": 2}
    assert train(work, **options, validation_steps=before) == 0
    now = "null" if before == "0" else "0"
    assert train(work, **options, resume_from_checkpoint="latest", validation_steps=now) == 2
    assert f"change it back (--validation_steps {before})" in capsys.readouterr().err


def test_a_resumed_run_has_begun_from_what_it_has_begun_from(work, capsys):
    def begun_from():
        return json.loads((work / "tuned" / "pipeline" / "training.json").read_text())["config"]["init_from"]

    model = str(work / "run" / "pipeline")
    assert train(work, output_dir=work / "tuned", init_from=model) == 0
    assert train(work, output_dir=work / "tuned", resume_from_checkpoint="latest", max_train_steps=3) == 0
    assert begun_from() == model
    for other in ("user/model", f"{model}/"):
        assert train(work, output_dir=work / "tuned", resume_from_checkpoint="latest", init_from=other) == 2
        assert f"was trained with init_from {model!r}, but now it is {other!r}" in capsys.readouterr().err
    assert train(work, resume_from_checkpoint="latest", init_from="user/model") == 2
    assert "was trained with init_from None, but now it is 'user/model'" in capsys.readouterr().err


def test_a_checkpoint_of_before_the_families_resumes_with_the_network_that_it_names(work):
    """Its manifest has no network, and `tiny` meant another one; it continues as a run with the fields of that one."""
    file = work / "config.json"
    file.write_text(json.dumps(FORMER["tiny"]))
    constant = {"lr_scheduler": "constant"}
    assert train(work, output_dir=work / "straight", denoiser=file, max_train_steps=3, **constant) == 0
    assert train(work, output_dir=work / "former", denoiser=file, **constant) == 0
    path = work / "former" / "checkpoint-000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("network")["block_out_channels"] == [16, 32, 64, 96]
    manifest["config"]["denoiser"] = "tiny"
    path.write_text(json.dumps(manifest))
    options = {"output_dir": work / "former", "denoiser": "tiny", "max_train_steps": 3, **constant}
    assert train(work, resume_from_checkpoint="latest", **options) == 0
    straight, resumed = (work / name / "checkpoint-000003" for name in ("straight", "former"))
    assert contents(straight, "model.safetensors", "ema.safetensors") == contents(
        resumed, "model.safetensors", "ema.safetensors"
    )
    assert json.loads((resumed / "manifest.json").read_text())["network"]["block_out_channels"] == [16, 32, 64, 96]


def test_a_run_continues_with_its_network_when_the_file_of_it_is_gone(work):
    file = work / "config.json"
    file.write_text(json.dumps(FORMER["tiny"]))
    options = {"output_dir": work / "own", "denoiser": file}
    assert train(work, **options) == 0
    file.unlink()
    assert train(work, resume_from_checkpoint="latest", max_train_steps=3, **options) == 0


# ---- A new run in the folder of an earlier one -----------------------------------------------------------------------


class Mistake(Exception):
    pass


def test_a_run_begun_again_keeps_the_files_of_the_earlier_one(work, monkeypatch, capsys):
    run, names = work / "run", ("config.yaml", "metrics.jsonl")
    before = contents(run, *names)

    def stop(*args, **options):
        raise Mistake

    with monkeypatch.context() as patch:  # it ends before its first checkpoint is complete
        patch.setattr(checkpoint, "save", stop)
        with pytest.raises(Mistake):
            train(work, seed=1)
    assert contents(run, *names) == before
    assert "the first one of this run replaces them" in capsys.readouterr().out

    assert train(work, seed=1) == 0
    kept = ("config.1.yaml", "metrics.1.jsonl")
    assert list(contents(run, *kept).values()) == list(before.values())
    after = contents(run, *names)
    assert b"seed: 1" in after["config.yaml"] and after["metrics.jsonl"].count(b"\n") == 2
    assert train(work, seed=2) == 0
    assert list(contents(run, *kept).values()) == list(before.values())
    assert list(contents(run, "config.2.yaml", "metrics.2.jsonl").values()) == list(after.values())
    assert not [path.name for path in run.iterdir() if path.name.startswith(".metrics")]


def test_a_model_published_before_the_first_checkpoint_comes_with_one(work, monkeypatch):
    """The first checkpoint replaces the earlier run as a whole: its model is not overwritten before."""
    run, saved = work / "run", []

    class Publisher:
        def __init__(self, config):
            pass

        def start(self):
            saved.append([path.name for path in run.glob("checkpoint-*")])

        def publish_final(self):
            return 0

    monkeypatch.setattr(during_training, "check_access", lambda config: None)
    monkeypatch.setattr(during_training, "BackgroundPublisher", Publisher)
    options = {"push_to_hub": "true", "hub_model_id": "user/model", "push_to_hub_steps": 1, "max_train_steps": 3}
    options["checkpointing_steps"] = 9
    assert train(work, seed=1, **options) == 0
    assert saved == [["checkpoint-000001"]] * 2


def test_config_yaml_and_metrics_are_replaced_not_rewritten(work, monkeypatch, capsys):
    """A disk that is full while they are written leaves those that were there."""
    config, run = Config(dataset_name="moons", report_to="none"), work / "run"
    before = contents(run, "config.yaml", "metrics.jsonl")

    def full(path, text, **options):
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        log = Log(run, config, after_step=1)
        log.metrics(2, loss=1.0)
        log.close()
    assert contents(run, *before) == before
    assert capsys.readouterr().err.count("WARNING: cannot write") == 2  # config.yaml, metrics


@pytest.mark.parametrize(
    "error",
    [SafetensorError("I/O error: No space left on device (os error 28)"), OSError(28, "No space left on device")],
)
def test_a_full_disk_for_the_pipeline_is_one_line(work, monkeypatch, capsys, error):
    def full(self, folder):
        Path(folder).mkdir()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(DDPMPipeline, "save_pretrained", full)
        assert train(work, resume_from_checkpoint="latest") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{work / 'run' / 'pipeline'} cannot be written" in line and "No space left" in line
    assert "bytes" in line and "latest" in line
    DDPMPipeline.from_pretrained(str(work / "run" / "pipeline"))  # the earlier one is untouched
