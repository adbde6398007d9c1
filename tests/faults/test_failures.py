"""Another world size, full disks, wrong folders, non-finite losses, too little memory, too few processes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.arrays import save_images
from tests.faults.child import TRAIN, killed_at_end
from training.config import Config
from training.data.batches import Batches
from training.data.cache import load_images
from training.run import checkpoint, failures


def metrics(workspace, name):
    return [json.loads(line) for line in (workspace.folder / name / "metrics.jsonl").read_text().splitlines()]


def weights(workspace, name, file="model.safetensors"):
    path, _ = checkpoint.find(workspace.folder / name, "latest")
    return load_file(path / file)


# ---- Another world size ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_run_resumes_with_another_world_size(workspace, undisturbed, world_size):
    workspace.finish("uninterrupted", world_size=2)
    workspace.finish("run", world_size=2, max_train_steps=6, checkpointing_steps=3, checkpoints_total_limit=2)
    start = workspace.folder / "run" / "checkpoint-000003"
    workspace.finish("run", world_size=world_size, resume_from_checkpoint=start)
    for expected, line in zip(metrics(workspace, "uninterrupted"), metrics(workspace, "run"), strict=True):
        assert [line[name] for name in ("step", "learning_rate", "images")] == [
            expected[name] for name in ("step", "learning_rate", "images")
        ]
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for file in ("model.safetensors", "ema.safetensors"):
        expected, resumed = weights(workspace, "uninterrupted", file), weights(workspace, "run", file)
        assert max((expected[name] - resumed[name]).abs().max().item() for name in expected) < 1e-5


# ---- Full disks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many bytes and returns its folder."""
    mounted = []

    def mount(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        result = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if result.returncode:
            pytest.skip("mounting a tmpfs is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def checkpoint_bytes(workspace):
    workspace.finish("measured", max_train_steps=2)
    (path,) = (workspace.folder / "measured").glob("checkpoint-??????")
    return sum(file.stat().st_size for file in path.iterdir())


def test_a_disk_that_is_too_small_is_detected_before_the_first_step(workspace, small_disk):
    disk = small_disk(checkpoint_bytes(workspace) // 2)
    run = workspace.start("run", output_dir=disk / "run")
    assert run.wait() == [1]
    assert "a checkpoint needs" in run.text() and "are free" in run.text() and str(disk / "run") in run.text()
    assert not list(disk.glob("run/checkpoint*"))
    assert not (disk / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "manifest.json"])
def test_a_disk_that_fills_up_while_saving_keeps_the_older_checkpoint(workspace, undisturbed, small_disk, file):
    """There is space when the save begins, but none when it reaches this file: another program has filled the disk."""
    disk = small_disk(8 * checkpoint_bytes(workspace) + 4 * 2**20)
    run = workspace.start("run", output_dir=disk / "run", fault=f"disk_full_at_{file.split('.')[0]}")
    assert run.wait() == [1], run.text()
    for text in (str(disk / "run" / "checkpoint-000004"), "No space left on device", "It needs ", "bytes, "):
        assert text in run.text()
    assert sorted(path.name for path in disk.glob("run/checkpoint*")) == ["checkpoint-000002"]
    (disk / "filler").unlink()
    again = workspace.start("run", output_dir=disk / "run", resume_from_checkpoint="latest")
    assert again.wait() == [0], again.text()
    _, manifest = checkpoint.find(disk / "run", "latest")
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == undisturbed()


def test_logs_and_images_that_cannot_be_written_cause_one_warning_each(workspace, undisturbed):
    run = workspace.start("run", fault="disk_full_for_logs", save_images_steps=2)
    assert run.wait() == [0], run.text()
    assert workspace.sha256("run") == undisturbed()
    for name in ("metrics", "sample images"):
        assert run.text().count(f"WARNING: cannot write {name} of {workspace.folder / 'run'}: No space left") == 1
    assert [line["step"] for line in metrics(workspace, "run")] == [1, 2]


# ---- Wrong folders and checkpoints -----------------------------------------------------------------------------------


def test_latest_skips_a_damaged_checkpoint_with_a_message(workspace, undisturbed):
    workspace.finish("run", checkpoints_total_limit=3)
    newest = workspace.folder / "run" / "checkpoint-000006"
    with open(newest / "ema.safetensors", "r+b") as file:
        file.seek(2000)
        file.write(b"damage")
    named = workspace.start("run", resume_from_checkpoint=newest)
    assert named.wait() == [2]
    assert f"{newest / 'ema.safetensors'} is damaged" in named.text()
    latest = workspace.start("run", checkpoints_total_limit=3, resume_from_checkpoint="latest")
    assert latest.wait() == [0]
    assert "checkpoint-000006 is skipped" in latest.text()
    assert "after step 4" in latest.text()
    assert workspace.sha256("run") == undisturbed()


def test_a_folder_that_is_not_a_checkpoint_of_the_run_is_refused(workspace):
    workspace.finish("run")
    workspace.finish("other", seed=1)
    good, other = workspace.folder / "run" / "checkpoint-000006", workspace.folder / "other" / "checkpoint-000006"
    (workspace.folder / "run" / "checkpoint-500-bak").mkdir()
    (workspace.folder / "link").symlink_to(good)
    for which in ("nowhere", workspace.folder / "run", other, workspace.folder / "run" / "checkpoint-500-bak", ""):
        run = workspace.start("run", resume_from_checkpoint=which)
        assert run.wait() == [2], (which, run.text())
    for which in (f"{good}/", workspace.folder / "link", "latest"):
        run = workspace.start("run", resume_from_checkpoint=which)
        assert run.wait() == [0], run.text()
        assert "after step 6" in run.text()


def test_another_seed_prediction_type_or_data_set_is_refused(workspace):
    workspace.finish("run")
    before = workspace.sha256("run")
    for options, message in (
        ({"seed": 1}, "seed 0, but now it is 1"),
        ({"prediction_type": "sample"}, "prediction_type 'epsilon', but now it is 'sample'"),
        ({"dataset_name": "moons", "resolution": 16}, "number of images 10, but now it is 8192"),
    ):
        run = workspace.start("run", resume_from_checkpoint="latest", **options)
        assert run.wait() == [2], run.text()
        assert message in run.text()
    assert workspace.sha256("run") == before


def test_notes_on_the_data_set_are_not_compared():
    """After the first ";" of a source: their wording differs between versions of this project."""
    config = Config(dataset_name="moons")
    manifest = {"config": config.as_dict(), "global_batch": 4, "num_images": 10, "source": "10 images of a; 2 resized"}
    failures.check_same_run(Path("run"), manifest, config, 4, 10, "10 images of a; 2 of them resized")
    with pytest.raises(checkpoint.CheckpointError, match="data set '10 images of a', but now it is '10 images of b'"):
        failures.check_same_run(Path("run"), manifest, config, 4, 10, "10 images of b; 2 resized")


def test_a_checkpoint_of_before_a_setting_was_trained_with_its_default():
    """One of before quarter turns saw none, so a run with them is another run."""
    config = Config(dataset_name="moons", random_rotate90=True)
    settings = {name: value for name, value in config.as_dict().items() if name != "random_rotate90"}
    manifest = {"config": settings, "global_batch": 4, "num_images": 10, "source": "a"}
    with pytest.raises(checkpoint.CheckpointError, match="random_rotate90 False, but now it is True"):
        failures.check_same_run(Path("run"), manifest, config, 4, 10, "a")
    failures.check_same_run(Path("run"), manifest, replace(config, random_rotate90=False), 4, 10, "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": "16x16", "background": "#ffffff"}, None),
        ({"resolution": 32}, "resolution 16, but now it is 32"),
        ({"resolution": None}, "resolution 16, but now it is None"),
        ({"background": "#fffffe"}, "background 'white', but now it is '#fffffe'"),
    ],
)
def test_without_a_digest_the_settings_of_the_images_are_compared(options, message):
    """Checkpoints of earlier versions have none. What means the same is the same, however it is written."""
    common = {"dataset_name": "moons", "resolution": 16}
    manifest = {"config": Config(**common).as_dict(), "global_batch": 4, "num_images": 10, "source": "10 images of a"}
    expected = pytest.raises(checkpoint.CheckpointError, match=message) if message else contextlib.nullcontext()
    with expected:
        failures.check_same_run(
            Path("run"), manifest, Config(**common | options), 4, 10, "10 images of a", data_digest="0123456789ab"
        )


def test_a_second_run_in_the_same_folder_is_refused(workspace, undisturbed):
    with killed_at_end(workspace.start("run", fault="slow_steps")) as first:
        first.wait_for("[step 1 on rank 0]")
        second = workspace.start("run", output_dir=workspace.folder / "run")
        assert second.wait() == [2]
    assert "another run is writing to it (process " in second.text()
    assert workspace.finish("run") == undisturbed()


def test_a_folder_that_is_not_writable_is_refused(workspace, small_disk):
    disk = small_disk(2**20)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    (workspace.folder / "file").write_text("mine")
    for folder in (disk / "run", disk, workspace.folder / "file", workspace.folder / "file" / "run"):
        run = workspace.start("run", output_dir=folder)
        assert run.wait() == [2], run.text()
        assert f"output_dir is '{folder}'" in run.text()


# ---- Non-finite losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "precision"), [(1, "no"), (2, "no"), (1, "bf16")])
def test_a_nan_loss_on_one_rank_stops_all_before_anything_is_updated(workspace, world_size, precision):
    options = {"mixed_precision": precision, "checkpointing_steps": 1, "checkpoints_total_limit": 9}
    run = workspace.start("run", world_size=world_size, fault="nan_on_the_last_rank", **options)
    assert set(run.wait()) == {1}, run.text()
    text = run.text()
    assert "loss is non-finite at step 4 (loss nan, " in text
    assert ("gradient is non-finite at step 4 (loss " in text) == (world_size == 2)  # on rank 0
    for part in ("gradient norm nan", "learning rate 0.0005", "The checkpoint after step 3 is intact", "images "):
        assert part in text
    assert text.count(".png") >= (4 if world_size == 1 else 2)
    assert workspace.checkpoints("run") == [f"checkpoint-00000{step}" for step in (1, 2, 3)]
    for file in ("model.safetensors", "ema.safetensors"):
        assert all(tensor.isfinite().all() for tensor in weights(workspace, "run", file).values())
    assert "Traceback" not in text


def test_a_non_finite_image_is_named(workspace):
    run = workspace.start("run", fault="one_nan_image")
    assert run.wait() == [1], run.text()
    data = load_images(train_data_dir=workspace.data / "images", cache_dir=workspace.data / "cache")
    batches = Batches(data.images, batch_size=4, seed=0, random_flip=True, device=torch.device("cpu"))
    (index,) = batches.indices(3, torch.tensor([0]))
    assert f"images {index} ({data.name(index)})" in run.text()
    assert data.name(index).endswith(".png") and run.text().count(".png") == 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_nonfinite_steps_are_skipped_on_request(workspace, world_size):
    options = {"on_nonfinite": "skip", "checkpointing_steps": 1, "checkpoints_total_limit": 9}
    run = workspace.start("run", world_size=world_size, fault="nan_on_the_last_rank", **options)
    assert set(run.wait()) == {0}, run.text()
    assert "is non-finite at step 4" in run.text() and "Step skipped" in run.text()
    lines = metrics(workspace, "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 5, 6]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1]
    assert all(tensor.isfinite().all() for tensor in weights(workspace, "run").values())
    before, after, later = (workspace.sha256("run", step) for step in (3, 4, 5))
    for file in (checkpoint.WEIGHTS, checkpoint.EMA):
        assert before[file] == after[file] != later[file]
    files = [workspace.folder / "run" / f"checkpoint-{step:06}" / checkpoint.OPTIMIZER for step in (3, 4, 6)]
    states = [torch.load(file, weights_only=True)["state"] for file in files]
    for number, entry in states[0].items():
        assert all(torch.equal(states[1][number][name], value) for name, value in entry.items())
        assert not all(torch.equal(states[2][number][name], value) for name, value in entry.items())
    assert {int(entry["step"]) for entry in states[2].values() if "step" in entry} == {5}  # Muon counts none


# So that most outcomes are read one step late.
RARELY = dict.fromkeys(("logging_steps", "checkpointing_steps", "validation_steps", "save_images_steps"), 100)


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, {}),
        (2, {}),
        (1, {"checkpointing_steps": 4}),
        (2, {"checkpointing_steps": 4}),
        (1, {"save_images_steps": 4}),
        (1, {"validation_steps": 4}),
        (1, {"max_train_steps": 4}),
        (1, {"checkpointing_steps": 5}),
    ],
)
def test_a_fault_that_is_read_late_names_its_step_and_nothing_is_written_after_it(workspace, world_size, options):
    images = save_images(workspace.folder / "images", 60, 16, 16)  # three of them are held out
    options = {"fault": "nan_on_the_last_rank", "train_data_dir": images, **RARELY, **options}
    options |= {"world_size": world_size, "num_validation_images": 2}
    early, late = workspace.start("early", **options | {"logging_steps": 1}), workspace.start("late", **options)
    assert set(early.wait()) == set(late.wait()) == {1}, late.text()
    # Two processes may print on one line.
    errors = [sorted(re.findall(r"train\.py: .*?--on_nonfinite skip", run.text())) for run in (early, late)]
    assert errors[0] == errors[1] and len(errors[0]) == world_size
    assert "non-finite at step 4" in errors[0][0] and "There is no checkpoint yet" in errors[0][0]
    assert workspace.checkpoints("late") == []
    assert [line["step"] for line in metrics(workspace, "late")] == [1]
    assert not list((workspace.folder / "late" / "samples").iterdir())


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_in_a_nonfinite_step_saves_nothing(workspace, world_size):
    options = {"world_size": world_size, "fault": "slow_steps_with_a_nan", **RARELY}
    with killed_at_end(workspace.start("run", **options)) as run:
        run.wait_for("[step 4 on rank 0]")
        for child in run.processes:
            os.kill(child.pid, signal.SIGTERM)
        assert set(run.wait()) == {1}, run.text()
    assert "is non-finite at step 4" in run.text() and workspace.checkpoints("run") == []


@pytest.mark.parametrize("world_size", [1, 2])
def test_when_the_outcome_is_read_changes_nothing(workspace, undisturbed, world_size):
    assert workspace.finish("run", world_size=world_size, **RARELY) == undisturbed(world_size)
    options = {"world_size": world_size, "fault": "nan_on_the_last_rank", "on_nonfinite": "skip"}
    assert workspace.finish("late", **options, **RARELY) == workspace.finish("early", **options)
    early, late = metrics(workspace, "early"), metrics(workspace, "late")
    assert [(line["step"], line["skipped"]) for line in late] == [(1, 0), (6, 1)]
    assert late[-1]["loss"] == pytest.approx(sum(line["loss"] for line in early[1:]) / 4)  # without that of step 4


# ---- The learning rate counts optimizer steps ------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 1), (2, 2)])
def test_the_learning_rate_counts_optimizer_steps(workspace, world_size, accumulation):
    workspace.finish("plain")
    options = {"train_batch_size": 4 // world_size // accumulation, "gradient_accumulation_steps": accumulation}
    workspace.finish("run", world_size=world_size, **options)
    plain, accumulated = metrics(workspace, "plain"), metrics(workspace, "run")
    assert [line["learning_rate"] for line in accumulated] == [line["learning_rate"] for line in plain]
    assert 1e-3 > plain[1]["learning_rate"] > plain[5]["learning_rate"] > 0


# ---- Too little memory, too few processes ----------------------------------------------------------------------------


def test_out_of_memory_in_a_step_names_smaller_settings(workspace):
    run = workspace.start("run", fault="out_of_memory_training")
    assert run.wait() == [1]
    text = run.text()
    assert "Out of memory at step 4: " in text and "Traceback" not in text
    assert "--train_batch_size 2 --gradient_accumulation_steps 2, which needs less and keeps the global batch" in text
    assert "The checkpoint after step 2 is intact" in text
    assert workspace.checkpoints("run") == ["checkpoint-000002"]
    options = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    workspace.finish("run", **options, resume_from_checkpoint="latest")
    workspace.finish("uninterrupted")
    for expected, line in zip(metrics(workspace, "uninterrupted"), metrics(workspace, "run"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
def test_out_of_memory_while_sampling_does_not_affect_training(workspace, undisturbed, world_size):
    run = workspace.start("run", world_size=world_size, fault="out_of_memory_sampling", save_images_steps=3)
    codes = run.wait()
    assert "WARNING: out of memory sampling 2 images at step 3" in run.text()
    assert "Lower num_sample_images" in run.text()
    assert workspace.sha256("run") == undisturbed(world_size)
    assert not (workspace.folder / "run" / "samples" / "step-000003.png").exists()
    assert set(codes) <= {0, 1}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the processes would share one accelerator")
def test_several_processes_on_cpus_form_one_run_without_use_cpu(workspace, undisturbed):
    assert workspace.finish("run", world_size=2, detect_device=True) == undisturbed(2)
    assert checkpoint.find(workspace.folder / "run", "latest")[1]["num_processes"] == 2


def test_fewer_processes_than_requested_is_refused(workspace):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", str(TRAIN)]
    result = subprocess.run([*command, *workspace.arguments("run")], capture_output=True, text=True, timeout=600)
    assert result.returncode
    assert "told to start 2 processes, but 1 started" in result.stderr and "torchrun --nproc-per-node" in result.stderr
    assert not (workspace.folder / "run").exists()
