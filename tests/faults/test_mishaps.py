"""F4, F8 to F15, F29, F30: full disks, wrong folders, numbers that are none, too little memory, too few processes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from child import TRAIN, ended
from safetensors.torch import load_file

from training.run import checkpoint


def metrics(place, name):
    return [json.loads(line) for line in (place.folder / name / "metrics.jsonl").read_text().splitlines()]


def weights(place, name, file="model.safetensors"):
    path, _ = checkpoint.find(place.folder / name, "latest")
    return load_file(path / file)


# ---- F4: another number of processes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 4])
def test_a_run_of_two_processes_goes_on_with_another_number(place, undisturbed, processes):
    place.finish("whole", processes=2)
    place.finish("run", processes=2, max_train_steps=6, checkpointing_steps=3, checkpoints_total_limit=2)
    start = place.folder / "run" / "checkpoint-000003"
    place.finish("run", processes=processes, resume_from_checkpoint=start)
    for one, other in zip(metrics(place, "whole"), metrics(place, "run"), strict=True):
        assert (other["step"], other["learning_rate"], other["images"]) == (
            one["step"],
            one["learning_rate"],
            one["images"],
        )
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for file in ("model.safetensors", "ema.safetensors"):
        one, other = weights(place, "whole", file), weights(place, "run", file)
        assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-5


# ---- F8, F9: no room -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a disk of so many bytes, and gives its folder."""
    mounted = []

    def mount(size):
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a small disk is not allowed here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def checkpoint_bytes(place):
    place.finish("measured", max_train_steps=2)
    (path,) = (place.folder / "measured").glob("checkpoint-??????")
    return sum(file.stat().st_size for file in path.iterdir())


def test_too_little_room_is_found_before_the_first_step(place, small_disk):
    disk = small_disk(checkpoint_bytes(place) // 2)
    run = place.run("run", output_dir=disk / "run")
    assert run.wait() == [1]
    assert "a checkpoint needs" in run.text() and "are free" in run.text() and str(disk / "run") in run.text()
    assert not list(disk.glob("run/checkpoint*"))
    assert not (disk / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "manifest.json"])
def test_a_disk_that_gets_full_in_a_checkpoint_costs_no_older_one(place, undisturbed, small_disk, file):
    """The room is there when a save begins, and is gone when it gets to this file: others write, too."""
    disk = small_disk(8 * checkpoint_bytes(place) + 4 * 2**20)
    run = place.run("run", output_dir=disk / "run", prepare=f"disk_full_at_{file.split('.')[0]}")
    assert run.wait() == [1], run.text()
    for words in (str(disk / "run" / "checkpoint-000004"), "No space left on device", "It needs ", "bytes, "):
        assert words in run.text()
    assert sorted(path.name for path in disk.glob("run/checkpoint*")) == ["checkpoint-000002"]
    (disk / "filler").unlink()
    again = place.run("run", output_dir=disk / "run", resume_from_checkpoint="latest")
    assert again.wait() == [0], again.text()
    _, manifest = checkpoint.find(disk / "run", "latest")
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == undisturbed()


def test_logs_and_pictures_that_cannot_be_written_are_warned_of_once(place, undisturbed):
    run = place.run("run", prepare="no_room_for_logs", save_images_steps=2)
    assert run.wait() == [0], run.text()
    assert place.sums("run") == undisturbed()
    for what in ("metrics", "pictures"):
        assert run.text().count(f"WARNING: {what} in {place.folder / 'run'} cannot be written: No space left") == 1
    assert [line["step"] for line in metrics(place, "run")] == [1, 2]


# ---- F10, F11, F12: folders and checkpoints that are not what they should be -----------------------------------------


def test_a_damaged_checkpoint_is_passed_over_and_said_so(place, undisturbed):
    place.finish("run", checkpoints_total_limit=3)
    newest = place.folder / "run" / "checkpoint-000006"
    with open(newest / "ema.safetensors", "r+b") as file:
        file.seek(2000)
        file.write(b"damage")
    named = place.run("run", resume_from_checkpoint=newest)
    assert named.wait() == [2]
    assert f"{newest / 'ema.safetensors'} is damaged" in named.text()
    latest = place.run("run", checkpoints_total_limit=3, resume_from_checkpoint="latest")
    assert latest.wait() == [0]
    assert "checkpoint-000006 is passed over" in latest.text()
    assert "after step 4" in latest.text()
    assert place.sums("run") == undisturbed()


def test_what_is_no_checkpoint_of_the_run_is_refused(place):
    place.finish("run")
    place.finish("other", seed=1)
    good, other = place.folder / "run" / "checkpoint-000006", place.folder / "other" / "checkpoint-000006"
    (place.folder / "run" / "checkpoint-500-bak").mkdir()
    (place.folder / "link").symlink_to(good)
    for which in ("nowhere", place.folder / "run", other, place.folder / "run" / "checkpoint-500-bak", ""):
        run = place.run("run", resume_from_checkpoint=which)
        assert run.wait() == [2], (which, run.text())
    for which in (f"{good}/", place.folder / "link", "latest"):
        run = place.run("run", resume_from_checkpoint=which)
        assert run.wait() == [0], run.text()
        assert "after step 6" in run.text()


def test_another_seed_or_other_pictures_are_another_run(place):
    place.finish("run")
    before = place.sums("run")
    for options, words in (
        ({"seed": 1}, "seed 0, now it is 1"),
        ({"prediction_type": "sample"}, "prediction_type 'epsilon', now it is 'sample'"),
        ({"dataset_name": "moons", "resolution": 16}, "number of pictures 10, now it is 8192"),
    ):
        run = place.run("run", resume_from_checkpoint="latest", **options)
        assert run.wait() == [2], run.text()
        assert words in run.text()
    assert place.sums("run") == before


def test_two_runs_in_one_folder(place, undisturbed):
    with ended(place.run("run", prepare="slow_steps")) as first:
        first.wait_for("[step 1 of 0 begins]")
        second = place.run("run", output_dir=place.folder / "run")
        assert second.wait() == [2]
    assert "another run is writing into it (process " in second.text()
    assert place.finish("run") == undisturbed()


def test_a_folder_that_cannot_be_written_into(place, small_disk):
    disk = small_disk(2**20)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    (place.folder / "file").write_text("mine")
    for folder in (disk / "run", disk, place.folder / "file", place.folder / "file" / "run"):
        run = place.run("run", output_dir=folder)
        assert run.wait() == [2], run.text()
        assert f"output_dir is '{folder}'" in run.text()


# ---- F14: numbers that are none --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("processes", "precision"), [(1, "no"), (2, "no"), (1, "bf16")])
def test_one_loss_that_is_no_number_stops_all_before_anything_moves(place, processes, precision):
    options = {"mixed_precision": precision, "checkpointing_steps": 1, "checkpoints_total_limit": 9}
    run = place.run("run", processes=processes, prepare="nan_on_the_last_process", **options)
    assert set(run.wait()) == {1}, run.text()
    text = run.text()
    assert "loss or gradient of step 4 is not a number" in text
    for words in (
        "norm of the gradient nan",
        "learning rate 0.0008",
        "The checkpoint after step 3 is whole",
        "images ",
    ):
        assert words in text
    assert text.count(".png") >= (4 if processes == 1 else 2)
    assert place.checkpoints("run") == [f"checkpoint-00000{step}" for step in (1, 2, 3)]
    for file in ("model.safetensors", "ema.safetensors"):
        assert all(tensor.isfinite().all() for tensor in weights(place, "run", file).values())
    assert "Traceback" not in text


def test_the_picture_is_named(place):
    run = place.run("run", prepare="one_nan_picture")
    assert run.wait() == [1], run.text()
    from pathlib import Path

    from training.data.batches import Batches
    from training.data.cache import load_images

    data = load_images(train_data_dir=place.pictures / "pictures", cache_dir=place.pictures / "cache")
    batches = Batches(data.images, batch_size=4, seed=0, random_flip=True, device=torch.device("cpu"))
    (index,) = batches.indices(3, torch.tensor([0]))
    assert f"images {index} ({data.name(index)})" in run.text()
    assert Path(data.name(index)).suffix == ".png" and run.text().count(".png") == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_such_steps_are_left_out_on_request(place, processes):
    options = {"on_nonfinite": "skip", "checkpointing_steps": 1, "checkpoints_total_limit": 9}
    run = place.run("run", processes=processes, prepare="nan_on_the_last_process", **options)
    assert set(run.wait()) == {0}, run.text()
    assert "step 4 is not a number" in run.text() and "The step is left out" in run.text()
    lines = metrics(place, "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 5, 6]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1]
    assert all(tensor.isfinite().all() for tensor in weights(place, "run").values())
    before, after, later = (place.sums("run", step) for step in (3, 4, 5))
    for file in (checkpoint.WEIGHTS, checkpoint.AVERAGE):
        assert before[file] == after[file] != later[file]
    path, _ = checkpoint.find(place.folder / "run", "latest")
    state = torch.load(path / checkpoint.OPTIMIZER, weights_only=True)["state"]
    assert {int(entry["step"]) for entry in state.values()} == {5}


# ---- F15: the learning rate counts optimizer steps -------------------------------------------------------------------


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 4), (2, 1), (2, 2)])
def test_the_learning_rate_counts_optimizer_steps(place, undisturbed, processes, accumulation):
    place.finish("plain")
    options = {"train_batch_size": 4 // processes // accumulation, "gradient_accumulation_steps": accumulation}
    place.finish("run", processes=processes, **options)
    plain, shared = metrics(place, "plain"), metrics(place, "run")
    assert [line["learning_rate"] for line in shared] == [line["learning_rate"] for line in plain]
    assert plain[1]["learning_rate"] == 1e-3 > plain[5]["learning_rate"]


# ---- F29, F30: too little of it --------------------------------------------------------------------------------------


def test_too_little_memory_for_a_step_says_what_to_lower(place, undisturbed):
    run = place.run("run", prepare="no_memory_to_train")
    assert run.wait() == [1]
    text = run.text()
    assert "not enough memory for step 4" in text and "Traceback" not in text
    assert "--train_batch_size 2 --gradient_accumulation_steps 2 needs less and keeps the global batch" in text
    assert "The checkpoint after step 2 is whole" in text
    assert place.checkpoints("run") == ["checkpoint-000002"]
    options = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    place.finish("run", **options, resume_from_checkpoint="latest")
    place.finish("whole")
    for one, other in zip(metrics(place, "whole"), metrics(place, "run"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_too_little_memory_for_samples_does_not_touch_training(place, undisturbed, processes):
    run = place.run("run", processes=processes, prepare="no_memory_to_sample", save_images_steps=3)
    codes = run.wait()
    assert "WARNING: no samples of step 3" in run.text() and "lower num_sample_images" in run.text()
    assert place.sums("run") == undisturbed(processes)
    assert not (place.folder / "run" / "samples" / "step-000003.png").exists()
    assert set(codes) <= {0, 1}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the processes would share one accelerator")
def test_several_processes_on_cpus_are_one_run_without_being_told_that_these_are_cpus(place, undisturbed):
    assert place.finish("run", processes=2, bare=True) == undisturbed(2)
    assert checkpoint.find(place.folder / "run", "latest")[1]["num_processes"] == 2


def test_fewer_processes_than_asked_for_is_refused(place):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", str(TRAIN)]
    done = subprocess.run([*command, *place.arguments("run")], capture_output=True, text=True, timeout=120)
    assert done.returncode
    assert "told to start 2 processes, but 1 started" in done.stderr and "torchrun --nproc-per-node" in done.stderr
    assert not (place.folder / "run").exists()
    assert os.environ.get("WORLD_SIZE") is None
