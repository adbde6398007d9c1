"""Several machines without a shared disk: each process has folders of its own, as the only process of its machine.

All continue from the checkpoint of rank 0, and a difference that would change the run ends all of them, in seconds.
"""

import shutil
import time

import pytest
from PIL import Image

from tests.arrays import random_images
from training.run import checkpoint

SECONDS = 20  # within which all processes must have ended


@pytest.fixture
def machines(workspace):
    """The options of two machines: their own folders of runs, caches and copies of the images."""
    folders = [workspace.folder / name for name in ("a", "b")]
    for folder in folders:
        shutil.copytree(workspace.data / "images", folder / "images")
    return [
        {"output_dir": folder / "run", "cache_dir": folder / "cache", "train_data_dir": folder / "images"}
        for folder in folders
    ]


def sha256(folder):
    _, manifest = checkpoint.find(folder, "latest")
    return {file: entry["sha256"] for file, entry in manifest["files"].items()}


def assert_all_end(run, *messages):
    """All processes exit with 2 in seconds, and each names machine 1 and the difference in one line."""
    started = time.monotonic()
    assert run.wait(SECONDS) == [2, 2], run.text()
    assert time.monotonic() - started < SECONDS
    lines = run.text().split("train.py: ")[1:]  # two processes may write on one line
    assert len(lines) == 2 and "Traceback" not in run.text(), run.text()
    for line in lines:
        assert all(message in line for message in ("rank 1 on node 1 (", *messages)), line


def test_machines_without_a_shared_disk_are_one_run(workspace, undisturbed, machines):
    run = workspace.start("run", nodes=machines)
    assert run.wait() == [0, 0], run.text()
    assert sha256(machines[0]["output_dir"]) == undisturbed(2)
    assert not machines[1]["output_dir"].exists()


@pytest.mark.parametrize("other_has", [(), (2, 6)])
def test_all_continue_from_the_checkpoint_of_rank_0(workspace, undisturbed, machines, other_has):
    """Whatever is in the folder of the other machine: nothing, or checkpoints of other steps."""
    first, second = (options["output_dir"] for options in machines)
    run = workspace.start("run", nodes=machines, checkpoints_total_limit=9)
    assert run.wait() == [0, 0], run.text()
    for step in other_has:
        name = f"checkpoint-{step:06d}"
        shutil.copytree(first / name, second / name)
    shutil.rmtree(first / "checkpoint-000006")
    again = workspace.start(
        "again", nodes=machines, fault="checkpoints_on_rank_0_only", resume_from_checkpoint="latest"
    )
    assert again.wait() == [0, 0], again.text()
    assert "after step 4" in again.text() and "node 1" not in again.text()
    assert sha256(first) == undisturbed(2)


@pytest.mark.parametrize("which", ["latest", "checkpoint-000004"])
def test_a_checkpoint_that_rank_0_does_not_have_ends_all(workspace, machines, which):
    machines[1]["output_dir"].mkdir()
    run = workspace.start("run", nodes=machines, resume_from_checkpoint=which)
    assert run.wait(SECONDS) == [2, 2], run.text()
    assert run.text().count("train.py: rank 0 on node 0 (") == 2 and "checkpoint" in run.text()


def test_auto_begins_no_new_run_where_another_machine_has_the_checkpoint(workspace, machines):
    """A launcher may give rank 0 to another machine than before."""
    run = workspace.start("run", nodes=machines, resume_from_checkpoint="auto", max_train_steps=2)
    assert run.wait() == [0, 0] and "no valid checkpoint: a new run begins" in run.text(), run.text()
    assert_all_end(
        workspace.start("run", nodes=machines[::-1], resume_from_checkpoint="auto"), "checkpoint-000002 is valid"
    )
    again = workspace.start("run", nodes=machines, resume_from_checkpoint="auto")
    assert again.wait() == [0, 0] and "after step 2" in again.text(), again.text()


def change_an_image(folder):
    Image.fromarray(random_images(16, 16, seed=99)).save(folder / "3.png")


def remove_an_image(folder):
    sorted(folder.iterdir())[-1].unlink()


def remove_all(folder):
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_an_image, "sha256 of the images: "),
        (remove_an_image, "number of images: 9 on"),
        (remove_all, "images"),
    ],
)
def test_other_images_on_one_machine_end_all(workspace, machines, change, message):
    change(machines[1]["train_data_dir"])
    assert_all_end(workspace.start("run", nodes=machines), message)


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [
        ("seed", 1, "1"),
        ("learning_rate", 0.1, "0.1"),
        ("mixed_precision", "bf16", "'bf16'"),
        ("background", "black", "'black'"),
        ("resume_from_checkpoint", "latest", "'latest'"),
        ("resume_from_checkpoint", "auto", "'auto'"),
        ("resume_from_checkpoint", "runs/checkpoint-000002", "'a folder'"),
        ("init_from", "runs/model", "'a model'"),
    ],
)
def test_other_settings_on_one_machine_end_all(workspace, machines, option, value, shown):
    machines[1][option] = value
    assert_all_end(workspace.start("run", nodes=machines), option.replace("_", " "), f": {shown} on rank 1")


def test_a_mistake_in_the_environment_of_one_machine_ends_all(workspace, machines):
    """The others have begun to wait for it by then."""
    run = workspace.start("run", nodes=machines, fault="fsdp_on_the_last_rank")
    assert_all_end(run, "ACCELERATE_USE_FSDP is 'true' in the environment")


@pytest.mark.parametrize("node", [0, 1])
def test_settings_that_are_refused_on_one_machine_end_all(workspace, machines, node):
    machines[node]["seed"] = "x"
    run = workspace.start("run", nodes=machines)
    assert run.wait(SECONDS) == [2, 2], run.text()
    assert f"train.py: rank {node} on node {node} (" in run.text() and "seed is 'x'" in run.text(), run.text()
    assert run.text().count("train.py: ") == 2 and "Traceback" not in run.text(), run.text()
