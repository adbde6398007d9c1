"""A run that is killed at any time resumes from its last complete checkpoint and ends with the same result: the sha256
of weights, EMA and optimizer state."""

import os
import random
import shutil
import time

import pytest

from tests.faults.child import killed_at_end
from training.run import checkpoint

# `make test-faults` sets this for all repeats; otherwise tests that repeat do so a few times only.
FULL = os.environ.get("DDPM_FAULTS") == "full"

# Where the run is killed while it saves the checkpoint of step 4 (step 6 for the last), and the step it resumes from.
CRASH_POINTS = [
    ("begin:2", 2),
    ("model.safetensors:2", 2),
    ("ema.safetensors:2", 2),
    ("optimizer.pt:2", 2),
    ("manifest.json:2", 2),
    ("flushed:2", 2),
    ("verified:2", 4),
    ("hidden", 4),
    ("deleted", 4),
    ("end:2", 4),
    ("end:3", 6),
]


@pytest.mark.parametrize(("crash_at", "step"), CRASH_POINTS)
def test_a_run_killed_while_saving_ends_with_the_same_result(workspace, undisturbed, crash_at, step):
    run = workspace.start("run", crash_at=crash_at)
    assert run.wait() == [-9], run.text()
    path, manifest = checkpoint.find(workspace.folder / "run", "latest")
    assert manifest["step"] == step
    again = workspace.start("run", resume_from_checkpoint="latest")
    assert again.wait() == [0], again.text()
    assert f"resumed from {path}, after step {step}" in again.text()
    assert workspace.sha256("run") == undisturbed()
    assert workspace.checkpoints("run") == ["checkpoint-000006"]


def test_a_run_killed_while_saving_its_best_weights_ends_with_the_same_result(workspace):
    """Those of step 3, while it saves the checkpoint of step 4."""
    options = {"dataset_name": "moons", "resolution": 16, "num_validation_images": 4}
    options |= {"keep_best": "validation_loss", "validation_steps": 3}
    expected = workspace.finish("undisturbed", **options)
    run = workspace.start("run", crash_at="best.safetensors", **options)
    assert run.wait() == [-9], run.text()
    assert checkpoint.find(workspace.folder / "run", "latest")[1]["step"] == 2
    assert workspace.finish("run", resume_from_checkpoint="latest", **options) == expected
    assert workspace.checkpoints("run") == ["checkpoint-000006"]


@pytest.mark.parametrize("crash_at", ["flushed", "replaced", "verified"])
def test_a_run_killed_while_replacing_a_checkpoint_ends_with_the_same_result(workspace, undisturbed, crash_at):
    workspace.finish("run", checkpoints_total_limit=3)
    start = workspace.folder / "run" / "checkpoint-000002"
    run = workspace.start("run", checkpoints_total_limit=3, resume_from_checkpoint=start, crash_at=crash_at)
    assert run.wait() == [-9], run.text()
    assert workspace.finish("run", resume_from_checkpoint="latest") == undisturbed()
    assert set(workspace.checkpoints("run")) <= {f"checkpoint-00000{step}" for step in (2, 4, 6)}  # no leftovers


def test_the_only_checkpoint_survives_its_replacement(workspace, undisturbed):
    workspace.finish("run")
    again = workspace.start("run", checkpointing_steps=6, crash_at="replaced")  # a new run in the folder of the old one
    assert again.wait() == [-9], again.text()
    assert workspace.finish("run", resume_from_checkpoint="latest") == undisturbed()
    assert workspace.checkpoints("run") == ["checkpoint-000006"]


def test_deterministic_changes_nothing_on_a_cpu(workspace, undisturbed):
    assert workspace.finish("run", deterministic=True) == undisturbed()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("repeat", range(20 if FULL else 2))
def test_a_run_killed_at_random_times_ends_with_the_same_result(workspace, undisturbed, world_size, repeat):
    random_time = random.Random(f"{world_size} {repeat}")
    expected = undisturbed(world_size)
    kills = 0
    for _ in range(20):
        run = workspace.start("run", world_size=world_size, fault="slow_checkpoints", **resume_options(workspace))
        with killed_at_end(run):
            run.wait_for("training:")
            time.sleep(random_time.uniform(0, 2))
            alive = [child for child in run.processes if child.is_alive()]
            for child in alive:
                child.kill()
            run.wait(1)
        kills += bool(alive)
        if not alive:
            break
        if kills == 3:
            assert set(workspace.start("run", world_size=world_size, **resume_options(workspace)).wait()) == {0}
            break
    assert kills
    assert workspace.sha256("run") == expected
    assert workspace.checkpoints("run") == ["checkpoint-000006"]


def resume_options(workspace):
    has_checkpoints = any(workspace.folder.glob("run/checkpoint-??????"))
    return {"resume_from_checkpoint": "latest"} if has_checkpoints else {}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"mixed_precision": "bf16"},
        {"dataloader_num_workers": 2},
    ],
    ids=["plain", "accumulation", "bf16", "workers"],
)
def test_a_run_resumes_from_any_step_bit_for_bit(workspace, options):
    """Steps 1 and 6 are the first and last; epochs end within step 3 and with step 5; 4 is in mid-epoch."""
    every_step = {"checkpointing_steps": 1, "checkpoints_total_limit": 10}
    workspace.finish("run", **every_step, **options)
    for step in range(1, 7):
        if step > 1 and step < 6 and not FULL and options:
            continue
        expected = {later: workspace.sha256("run", later) for later in range(step, 7)}
        start = workspace.folder / "run" / f"checkpoint-{step:06d}"
        workers = {"dataloader_num_workers": 0} if "dataloader_num_workers" in options else {}
        workspace.finish("run", **every_step, **(options | workers), resume_from_checkpoint=start)
        assert {later: workspace.sha256("run", later) for later in range(step, 7)} == expected


@pytest.mark.parametrize("compression", ["none", "bf16"])
def test_more_than_two_processes_add_up_gradients_in_the_same_order_when_resumed(workspace, compression):
    options = {"world_size": 3, "train_batch_size": 1, "max_train_steps": 2, "checkpointing_steps": 1}
    options |= {"checkpoints_total_limit": 2, "lr_warmup_steps": 0, "gradient_compression": compression}
    expected = workspace.finish("run", **options)
    shutil.rmtree(workspace.folder / "run" / "checkpoint-000002")
    assert workspace.finish("run", **options, resume_from_checkpoint="latest") == expected
