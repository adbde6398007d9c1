"""Whole runs of training/train.py: what they write, and that resumed and distributed runs equal uninterrupted ones.

Most runs are in this process, which has imported everything; one that needs a new process is a child.
"""

import contextlib
import json
import math
import shutil
import time
from pathlib import Path

import accelerate.tracking
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from ddpm_pipeline import DDPMPipeline, objective, visualize
from ddpm_pipeline.images import background_of
from tests.arrays import random_images
from tests.models import tiny_pipe
from tests.short_run import SHORT_RUN, flags, run_here, run_in_child
from training.config import TRACKERS
from training.loop import is_due
from training.run import checkpoint, sampling
from training.run.record import SAMPLE_SEED, RunRecord
from training.run.state import Clock

ROOT = Path(__file__).parents[1]

# Global batch 4 of 10 images: epochs end within step 3 and with step 5, and the checkpoint of step 3 lies between.
OPTIONS = SHORT_RUN | {
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_images_steps": 3,
    "num_sample_images": 3,
    "ddpm_num_inference_steps": 3,
    "checkpointing_steps": 3,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder for the runs of this file, with a folder of images."""
    work = tmp_path_factory.mktemp("runs")
    (work / "images" / "class").mkdir(parents=True)
    for i in range(10):
        pixels = random_images(16, 16, 3, seed=i)
        Image.fromarray(pixels).save(work / "images" / ("class" if i % 2 else "") / f"{i}.png")
    return work


def command_line(work, name, **options):
    """Arguments of train.py for run `name`: OPTIONS, and these."""
    options = {"output_dir": work / name, "cache_dir": work / "cache", **OPTIONS, **options}
    if not {"dataset_name", "config"} & options.keys():
        options.setdefault("train_data_dir", work / "images")
    first = [f"--config={options.pop('config')}"] if "config" in options else []
    return first + flags(options)


def train(work, name, **options):
    return run_here("train.py", command_line(work, name, **options))


def read_metrics(folder):
    """Entries of metrics.jsonl without the rate, which a clock measured."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "images_per_second"} for entry in entries]


def hashes(path):
    """sha256 of the three files of a checkpoint."""
    return {name: file["sha256"] for name, file in checkpoint.verify(path)["files"].items()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def read_pixels(path):
    return np.asarray(Image.open(path)).astype(int)


class Interruption(Exception):
    pass


@pytest.fixture(scope="module")
def uninterrupted(work):
    """A run of 6 steps."""
    assert train(work, "uninterrupted") == 0
    return work / "uninterrupted"


@pytest.fixture(scope="module")
def resumed(work):
    """The same run, interrupted after the checkpoint of step 3 and resumed in another process."""
    save = checkpoint.save

    def save_and_die(*args, **options):
        save(*args, **options)
        raise Interruption

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(Interruption):
            train(work, "resumed")
    folder = work / "resumed"
    assert "checkpoint-000003" in names(folder)
    assert [entry["step"] for entry in read_metrics(folder)] == [1, 2, 3]
    # As if it had been killed a little later: one more entry of the metrics, and half a checkpoint.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 99.0}) + "\n")
    (folder / "checkpoint-000004.tmp").mkdir()
    arguments = [f"--config={folder / 'config.yaml'}", "--resume_from_checkpoint=latest"]
    output = run_in_child(["-m", "accelerate.commands.launch"], "train.py", arguments)
    assert f"resumed from {folder / 'checkpoint-000003'}, after step 3" in output
    return folder


@pytest.fixture(scope="module")
def two_ranks(work):
    """The same run with half of the global batch on each of two ranks."""
    arguments = command_line(work, "two ranks", train_batch_size=1)
    run_in_child(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], "train.py", arguments)
    return work / "two ranks"


# ---- What a run writes -----------------------------------------------------------------------------------------------


def test_the_folder_of_a_run_has_the_documented_files_only(uninterrupted):
    assert names(uninterrupted) == [
        ".lock",
        "checkpoint-000003",
        "checkpoint-000006",
        "config.yaml",
        "metrics.jsonl",
        "pipeline",
        "samples",
        "tensorboard",
    ]
    assert names(uninterrupted / "samples") == ["step-000003.png", "step-000006.png", "trajectory.png"]
    assert {"model_index.json", "scheduler", "unet", "training.json", "samples.png", "trajectory.png"} <= set(
        names(uninterrupted / "pipeline")
    )
    assert all(name.startswith("events") for name in names(uninterrupted / "tensorboard"))
    for step in (3, 6):
        manifest = checkpoint.verify(uninterrupted / f"checkpoint-{step:06d}")
        assert (manifest["step"], manifest["global_batch"], manifest["num_processes"]) == (step, 4, 1)
        assert manifest["num_images"] == 10
        assert manifest["versions"]["torch"] == torch.__version__
        assert manifest["config"] == yaml.safe_load((uninterrupted / "config.yaml").read_text())


def test_metrics_count_steps_and_images(uninterrupted):
    entries = read_metrics(uninterrupted)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert [entry["images"] for entry in entries] == [4, 8, 12, 16, 20, 24]
    shares = [n / 6 for n in range(6)]  # of the run, before each step; the warm-up takes two steps
    decayed = [0.001 * (1 + math.cos(math.pi * share)) / 2 for share in shares]
    assert [entry["learning_rate"] for entry in entries] == pytest.approx([decayed[0] / 2, *decayed[1:]])
    assert all(0.5 < entry["loss"] < 3 for entry in entries)
    assert entries[0]["ema_decay"] == 0 < entries[5]["ema_decay"]


def test_the_saved_pipeline_has_the_ema_weights_and_samples(uninterrupted):
    saved = load_file(uninterrupted / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    ema, online = (
        load_file(uninterrupted / "checkpoint-000006" / name) for name in ("ema.safetensors", "model.safetensors")
    )
    assert saved.keys() == ema.keys()
    assert all(torch.equal(saved[name], ema[name]) for name in ema)
    assert not any(torch.equal(saved[name], online[name]) for name in ("conv_in.weight", "conv_out.weight"))
    pipe = DiffusionPipeline.from_pretrained(uninterrupted / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    assert np.isfinite(images).all()


def test_sample_grids_are_sampled_with_the_ema_weights(uninterrupted):
    saved = read_pixels(uninterrupted / "samples" / "step-000006.png")
    pipe = DDPMPipeline.from_pretrained(uninterrupted / "pipeline")
    pipe.set_progress_bar_config(disable=True)

    def draw():
        seeds = [SAMPLE_SEED, SAMPLE_SEED + 1, SAMPLE_SEED + 2]
        samples = pipe(seeds=seeds, num_inference_steps=3, output_type="latent").images
        return np.asarray(visualize.grid(samples)).astype(int)

    assert abs(draw() - saved).max() <= 1
    pipe.unet.load_state_dict(load_file(uninterrupted / "checkpoint-000006" / "model.safetensors"))
    assert abs(draw() - saved).max() > 1


def test_config_yaml_repeats_the_run_bit_for_bit(uninterrupted, work):
    arguments = [f"--config={uninterrupted / 'config.yaml'}", f"--output_dir={work / 'again'}"]
    assert run_here("train.py", [*arguments, "--checkpoints_total_limit=1"]) == 0
    assert "checkpoint-000003" not in names(work / "again")
    assert hashes(work / "again" / "checkpoint-000006") == hashes(uninterrupted / "checkpoint-000006")
    assert read_metrics(work / "again") == read_metrics(uninterrupted)
    for name in names(uninterrupted / "samples"):
        assert (work / "again" / "samples" / name).read_bytes() == (uninterrupted / "samples" / name).read_bytes()


def test_the_run_record_is_in_the_pipeline_and_the_checkpoints(uninterrupted, tmp_path):
    record = RunRecord.load(uninterrupted / "pipeline")
    manifest = checkpoint.verify(uninterrupted / "checkpoint-000006")
    assert record.step == 6 and record.num_images == 10 and record.seconds > 0
    ignored = ("files", "scaler", "seconds", "held_out_loss", "owes_validation")
    assert {name: value for name, value in manifest.items() if name not in ignored} == {
        name: value for name, value in record.as_dict().items() if name not in ignored
    }
    record.save(tmp_path)
    assert (tmp_path / "training.json").read_bytes() == (uninterrupted / "pipeline" / "training.json").read_bytes()


def test_a_missing_run_record_is_none_and_a_damaged_one_is_refused(uninterrupted, tmp_path):
    assert RunRecord.load(tmp_path) is None
    values = RunRecord.load(uninterrupted / "pipeline").as_dict()
    (tmp_path / "training.json").write_text(json.dumps({**values, "of a later version": 1}))
    assert RunRecord.load(tmp_path).as_dict() == values
    del values["num_images"]
    for text, message in ((json.dumps(values), "num_images"), ("[1]", "JSON object"), ("{", "not valid JSON")):
        (tmp_path / "training.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            RunRecord.load(tmp_path)


# ---- Resumed and distributed runs ------------------------------------------------------------------------------------


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(uninterrupted, resumed):
    for name in ("checkpoint-000003", "checkpoint-000006"):
        assert hashes(resumed / name) == hashes(uninterrupted / name)
    assert read_metrics(resumed) == read_metrics(uninterrupted)
    unet = Path("pipeline", "unet", "diffusion_pytorch_model.safetensors")
    assert (resumed / unet).read_bytes() == (uninterrupted / unet).read_bytes()
    grid = Path("samples", "step-000006.png")
    assert (resumed / grid).read_bytes() == (uninterrupted / grid).read_bytes()


def test_two_ranks_equal_one(uninterrupted, two_ranks):
    assert checkpoint.verify(two_ranks / "checkpoint-000006")["num_processes"] == 2
    for file in ("checkpoint-000006/model.safetensors", "checkpoint-000006/ema.safetensors"):
        of_one, of_two = load_file(uninterrupted / file), load_file(two_ranks / file)
        assert max((of_one[name] - of_two[name]).abs().max().item() for name in of_one) < 1e-5
    for of_one, of_two in zip(read_metrics(uninterrupted), read_metrics(two_ranks), strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-5)
    assert names(two_ranks / "samples") == names(uninterrupted / "samples")
    pixels = [read_pixels(run / "samples" / "step-000006.png") for run in (uninterrupted, two_ranks)]
    assert abs(pixels[0] - pixels[1]).max() <= 2  # the same three images in the same order
    assert len(names(two_ranks / "tensorboard")) == 1


def test_a_run_resumes_with_other_accumulation_steps_and_the_same_global_batch(uninterrupted, work):
    shutil.copytree(uninterrupted, work / "other accumulation")
    options = {"train_batch_size": 4, "gradient_accumulation_steps": 1}
    options["resume_from_checkpoint"] = work / "other accumulation" / "checkpoint-000003"
    assert train(work, "other accumulation", **options) == 0
    for before, after in zip(read_metrics(uninterrupted), read_metrics(work / "other accumulation"), strict=True):
        assert after == pytest.approx(before, rel=1e-5)


def test_a_short_run_without_a_batch_size_has_16_images_a_step_and_keeps_them(work):
    left_out = ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps")
    options = {name: value for name, value in OPTIONS.items() if name not in left_out}
    options |= {"train_data_dir": work / "images", "output_dir": work / "short", "cache_dir": work / "cache"}
    for images, settings in ((32, {}), (48, {"resume_from_checkpoint": "latest"})):
        assert run_here("train.py", flags(options | settings | {"max_train_images": images})) == 0
        record = RunRecord.load(work / "short" / "pipeline")
        assert (record.step, record.global_batch) == (images // 16, 16)


def test_bf16_keeps_the_weights_in_float32(work):
    options = {"mixed_precision": "bf16", "train_batch_size": 1, "max_train_steps": 1, "num_sample_images": 1}
    assert train(work, "bf16", **options) == 0
    assert checkpoint.verify(work / "bf16" / "checkpoint-000001")["mixed_precision"] == "bf16"
    for file in ("checkpoint-000001/model.safetensors", "pipeline/unet/diffusion_pytorch_model.safetensors"):
        assert all(t.dtype == torch.float32 and t.isfinite().all() for t in load_file(work / "bf16" / file).values())


def test_at_the_time_limit_a_run_ends_as_after_its_last_step(work):
    assert train(work, "time limit", max_train_minutes=1e-9) == 0
    assert {"checkpoint-000001", "pipeline"} < set(names(work / "time limit"))
    assert names(work / "time limit" / "samples") == ["step-000001.png", "trajectory.png"]


def test_pauses_do_not_count_as_training_time(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = Clock(seconds_before=1000.0)
    now = 110.0
    clock.restart()
    now = 115.0
    with clock.paused():
        now = 195.0
    now = 197.0
    assert (clock.seconds, clock.total_seconds) == (7, 1007)
    with contextlib.suppress(Interruption), clock.paused():
        now = 297.0
        raise Interruption
    assert (clock.seconds, clock.total_seconds) == (7, 1007)
    assert (clock.pauses, clock.paused_seconds) == (2, 180)


def test_an_interval_of_zero_steps_is_never_due():
    assert [step for step in range(1, 7) if is_due(step, 3)] == [3, 6]
    assert not any(is_due(step, 0) for step in range(1, 7))


# ---- Launch ----------------------------------------------------------------------------------------------------------


def test_train_runs_as_a_module_and_imports_the_rest_after_the_first_step(work):
    """What is not needed before the first step costs seconds of the time to it."""
    code = """
import runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook

def check_imports(*_):
    lazy = {"ddpm_pipeline.pipeline_ddpm", "ddpm_pipeline.visualize", "tensorboard", "matplotlib", "datasets"}
    print(f"imported before the first step: {sorted(lazy & sys.modules.keys())}")

register_optimizer_step_post_hook(check_imports)
path = list(sys.path)
try:
    runpy.run_module("training.train", run_name="__main__", alter_sys=True)
finally:
    print(f"path changed: {sys.path != path}")
"""
    output = run_in_child(["-c", code], None, command_line(work, "module", max_train_steps=1), cwd=ROOT)
    assert "imported before the first step: []" in output
    assert "path changed: False" in output
    assert "pipeline" in names(work / "module")


# ---- Trackers --------------------------------------------------------------------------------------------------------


class FakeTracker:
    """A tracker of accelerate that keeps what it gets."""

    requires_logging_directory = False
    main_process_only = True
    fails = False

    def __init__(self, project, **options):
        self.calls = [("init", project)]
        FakeTracker.last = self

    def start(self):
        if self.fails == "start":
            raise RuntimeError("not logged in")

    def store_init_configuration(self, values):
        self.calls.append(("config", values["seed"]))

    def log(self, values, step=None):
        if self.fails == "log":
            raise ConnectionError("no network")
        self.calls.append(("log", step, "loss" in values))

    def log_images(self, values, step=None):
        self.calls.append(("images", step, values["samples"][0].size))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def fake_wandb(monkeypatch):
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", FakeTracker)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["tensorboard", "wandb"])
    return FakeTracker


def test_metrics_and_samples_go_to_the_trackers(work, fake_wandb):
    options = {"max_train_steps": 3, "save_images_steps": 2, "report_to": "wandb,tensorboard"}
    assert train(work, "trackers", **options) == 0
    init, config, *calls = fake_wandb.last.calls
    assert (init, config) == (("init", "ddpm-pipeline"), ("config", 0))
    size = Image.open(work / "trackers" / "samples" / "step-000002.png").size
    assert calls == [
        ("log", 2, True), ("images", 2, size), ("log", 3, True), ("images", 3, size), ("finish",),
    ]  # fmt: skip
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(work / "trackers" / "tensorboard")).Reload()
    entries = {entry["step"]: entry for entry in read_metrics(work / "trackers")}
    for name in ("loss", "learning_rate", "images"):
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert logged == pytest.approx({step: entries[step][name] for step in (2, 3)})
    assert [image.step for image in events.Images("samples")] == [2, 3]


@pytest.mark.parametrize("fails", ["start", "log"])
def test_a_failing_tracker_does_not_end_training(work, fake_wandb, monkeypatch, capsys, fails):
    monkeypatch.setattr(fake_wandb, "fails", fails)
    options = {"max_train_steps": 3, "save_images_steps": 0, "report_to": "wandb"}
    assert train(work, f"failing {fails}", **options) == 0
    reason = {"start": "not logged in", "log": "no network"}[fails]
    folder = work / f"failing {fails}"
    assert (
        capsys.readouterr().err.count(f"WARNING: cannot write the wandb log of {folder}: {reason}. Training continues")
        == 1
    )
    assert [entry["step"] for entry in read_metrics(folder)] == [1, 2, 3]
    assert not (folder / "tensorboard").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # that of tensorboard's writer
def test_a_full_disk_under_tensorboard_does_not_end_training(work, monkeypatch, capsys):
    from tensorboard.summary.writer import record_writer

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record_writer.RecordWriter, "write", full)
    assert train(work, "full disk", max_train_steps=3, save_images_steps=2) == 0
    folder = work / "full disk"
    warning = f"WARNING: cannot write the tensorboard log of {folder}: No space left on device. Training continues"
    assert capsys.readouterr().err.count(warning) == 1
    assert [entry["step"] for entry in read_metrics(folder)] == [1, 2, 3]


def test_report_to_none_writes_metrics_jsonl_only(work):
    assert train(work, "no trackers", max_train_steps=2, report_to="none", save_images_steps=0) == 0
    assert not (work / "no trackers" / "tensorboard").exists()
    assert [entry["step"] for entry in read_metrics(work / "no trackers")] == [1, 2]


def test_trackers_that_are_unknown_or_not_installed_are_refused(work, capsys, monkeypatch):
    assert set(TRACKERS) == set(accelerate.tracking.LOGGER_TYPE_TO_CLASS)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["tensorboard"])
    for report_to, message in (
        ("tensorbored", "report_to is 'tensorbored'"),
        ("", "report_to is ''"),
        ("tensorboard,none", "report_to is 'tensorboard,none'"),
        ("tensorboard,wandb", "wandb is not installed"),
    ):
        assert train(work, "no such tracker", report_to=report_to) == 2
        assert message in capsys.readouterr().err
    assert not (work / "no such tracker").exists()


# ---- Saving pipeline/ ------------------------------------------------------------------------------------------------


@pytest.fixture
def record(uninterrupted):
    return RunRecord.load(uninterrupted / "pipeline")


def test_a_failed_save_keeps_the_earlier_pipeline(tmp_path, record):
    pipe = tiny_pipe()
    sampling.save_pipeline(pipe, tmp_path / "pipeline", record, {})

    class Failing:
        def save_pretrained(self, folder):
            Path(folder).mkdir()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        sampling.save_pipeline(Failing(), tmp_path / "pipeline", record, {})
    assert names(tmp_path) == ["pipeline"]
    assert RunRecord.load(tmp_path / "pipeline") == record
    DDPMPipeline.from_pretrained(tmp_path / "pipeline")


def test_an_image_that_cannot_be_saved_is_left_out_of_the_pipeline(tmp_path, record, capsys):
    class Unwritable:
        def save(self, path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    sampling.save_pipeline(tiny_pipe(), tmp_path / "pipeline", record, {"samples.png": Unwritable()})
    assert "samples.png: No space left on device" in capsys.readouterr().err
    assert "samples.png" not in names(tmp_path / "pipeline")
    DDPMPipeline.from_pretrained(tmp_path / "pipeline")


def test_a_pipeline_is_recovered_after_a_kill_while_it_was_replaced(tmp_path):
    """Also if version 0.1 was killed, which called it pipeline.old; a user's copy of that name stays."""
    for old in (".pipeline.old", "pipeline.old"):
        folder = tmp_path / f"killed {old}"
        others = (
            ".pipeline.tmp-123-0a",
            "pipeline.tmp",
            "pipeline.backup",
            ".pipeline-last.old",
            ".pipeline-last.tmp-1-0",
        )
        for name in (old, *others):
            (folder / name).mkdir(parents=True)
            (folder / name / "file").write_text(name)
        sampling.recover_pipeline(folder)
        assert names(folder) == ["pipeline", "pipeline-last", "pipeline.backup"]
        assert (folder / "pipeline" / "file").read_text() == old
        assert (folder / "pipeline-last" / "file").read_text() == ".pipeline-last.old"
        (folder / "pipeline.old").mkdir()
        (folder / ".pipeline.old").mkdir()
        sampling.recover_pipeline(folder)
        assert names(folder) == ["pipeline", "pipeline-last", "pipeline.backup", "pipeline.old"]
        assert (folder / "pipeline" / "file").read_text() == old


def test_the_background_is_saved_with_the_model(work):
    """Unless it is white, as everywhere without it."""
    for background, saved in (("black", "black"), ("#fff", "white")):
        assert train(work, f"on {background}", background=background, max_train_steps=1, validation_steps=0) == 0
        pipe = DDPMPipeline.from_pretrained(work / f"on {background}" / "pipeline")
        assert background_of(pipe.unet) == saved
        assert ("_background" in pipe.unet.config) == (saved != "white")


# ---- Learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_loss_decreases(work, prediction_type):
    steps = 60
    options = {"dataset_name": "moons", "resolution": 16, "prediction_type": prediction_type, "max_train_steps": steps}
    options |= {"train_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 2e-3, "ddpm_num_steps": 1000}
    options |= {"checkpointing_steps": steps, "save_images_steps": 0, "num_validation_images": 8}
    options["validation_steps"] = 0
    assert train(work, prediction_type, **options) == 0
    entries = read_metrics(work / prediction_type)
    losses = [entry["loss"] for entry in entries[:steps]]
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])
    assert entries[-1]["step"] == steps
    assert 0 < entries[-1]["moon_distance"] < 2
    pipe = DDPMPipeline.from_pretrained(work / prediction_type / "pipeline")
    assert pipe.scheduler.prediction_type == prediction_type


# ---- Mistakes and failures -------------------------------------------------------------------------------------------


def test_unreadable_images_are_named(work, capsys):
    shutil.copytree(work / "images", work / "some unreadable")
    (work / "some unreadable" / "class" / "broken.png").write_text("not an image")
    assert train(work, "unreadable", train_data_dir=work / "some unreadable") == 2
    assert "broken.png" in capsys.readouterr().err
    assert train(work, "unreadable", train_data_dir=work / "missing") == 2
    assert "missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resume_from_checkpoint": "latest"}, "no checkpoint to resume from"),
        ({"resume_from_checkpoint": "runs/nothing"}, "runs/nothing"),
        pytest.param(
            {"mixed_precision": "fp16"},
            "fp16",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is for GPUs, and there is one"),
        ),
        ({"resolution": 18, "denoiser": "tiny"}, "18x18"),  # cannot be halved twice
        ({"denoiser": "huge"}, "denoiser is 'huge'"),
    ],
)
def test_a_mistake_exits_with_code_2_and_names_the_value(work, capsys, options, message):
    assert train(work, "mistake", **options) == 2
    assert message in capsys.readouterr().err
    assert not (work / "mistake" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "seed 0, but now it is 1"),
        ({"train_batch_size": 3}, "global batch 4, but now it is 6"),
        ({"denoiser": "small"}, "smallest_network.json', but now it is 'small'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_nothing_changes(uninterrupted, work, capsys, options, message):
    def content():
        return [(uninterrupted / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")], names(uninterrupted)

    before = content()
    assert train(work, "uninterrupted", resume_from_checkpoint="latest", **options) == 2
    assert message in capsys.readouterr().err
    assert content() == before


def test_an_output_folder_that_is_a_file_is_refused(work, capsys):
    (work / "file").write_text("mine")
    for name in ("file", "file/run"):
        assert train(work, name) == 2
        assert str(work / name) in capsys.readouterr().err
    assert (work / "file").read_text() == "mine"


def test_a_nan_loss_stops_the_run_before_it_reaches_the_weights(work, monkeypatch, capsys):
    simple_loss, calls = objective.simple_loss, []

    def nan_in_step_4(prediction, target):
        calls.append(None)
        return simple_loss(prediction, target) * (math.nan if len(calls) == 7 else 1)

    monkeypatch.setattr(objective, "simple_loss", nan_in_step_4)
    assert train(work, "nan", logging_steps=100, checkpointing_steps=1, save_images_steps=0) == 1
    assert "step 4" in capsys.readouterr().err
    assert [name for name in names(work / "nan") if "checkpoint" in name] == ["checkpoint-000002", "checkpoint-000003"]
    _, manifest = checkpoint.find(work / "nan", "latest")
    assert manifest["step"] == 3
    assert not (work / "nan" / "pipeline").exists()


def test_a_learning_rate_far_too_high_stops_the_run(work, capsys):
    options = {"learning_rate": 1e30, "lr_scheduler": "constant", "lr_warmup_steps": 0}
    assert train(work, "high", **options, logging_steps=4, checkpointing_steps=1) == 1
    assert "1e+30" in capsys.readouterr().err
    for path in (work / "high").glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(path / "ema.safetensors").values())
    assert "checkpoint-000003" not in names(work / "high")
    assert not (work / "high" / "pipeline").exists()


# ---- Real data sets --------------------------------------------------------------------------------------------------


def first_rows(source, target, count=40):
    """The first rows of a data set of parquet files, in the same layout: decoding all takes longer than the test."""
    for file in source.rglob("*train*.parquet"):
        (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        rows = next(pq.ParquetFile(file).iter_batches(batch_size=count))
        table = pq.ParquetFile(file).schema_arrow.empty_table()
        pq.write_table(table.from_batches([rows], schema=table.schema), target / file.relative_to(source))
    return target


@pytest.mark.parametrize(
    ("name", "config", "shape", "options"),
    [
        ("mnist", "mnist.yaml", (1, 32, 32), {}),
        ("crawl-tiles/item", "tiles.yaml", (3, 32, 32), {"denoiser": "tiny"}),
        ("emoji-128", "emoji-64.yaml", (3, 64, 64), {}),
        ("cifar10", "cifar10.yaml", (3, 32, 32), {"denoiser": "tiny"}),
        ("cifar10", "cifar10-fast.yaml", (3, 32, 32), {"denoiser": "tiny"}),
    ],
)
def test_presets_train_on_their_data(work, shared_data, name, config, shape, options):
    source = shared_data / name
    if name.startswith(("crawl", "emoji")):
        options = {"train_data_dir": source, **options}
    else:
        options = {"dataset_name": first_rows(source, work / "data" / config), **options}
    options = {
        "output_dir": work / config,
        "cache_dir": work / "cache",
        "train_batch_size": 2,
        "max_train_steps": 2,
        "mixed_precision": "no",
        "cpu_threads": 1,
        "num_sample_images": 2,
        "num_validation_images": 16,
        "ddpm_num_inference_steps": 2,
        **options,
    }
    assert run_here("train.py", [f"--config={ROOT / 'training' / 'configs' / config}", *flags(options)]) == 0
    pipe = DDPMPipeline.from_pretrained(work / config / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(seeds=[1], num_inference_steps=2, output_type="latent").images
    assert images.shape == (1, *shape)
    assert images.isfinite().all()
    assert all(tensor.dtype == torch.float32 for tensor in pipe.unet.state_dict().values())
