"""F1, F2, F3, F5: a run that is killed at any moment goes on from its last whole checkpoint, and learns the same."""

import random
import time

import pytest
from child import ended
from conftest import FULL

from training.run import checkpoint

# Where it is killed, in the checkpoint of step 4 (step 6 for the last), and the step it then goes on from.
PHASES = [
    ("begin:2", 2),
    ("model.safetensors:2", 2),
    ("ema.safetensors:2", 2),
    ("optimizer.pt:2", 2),
    ("manifest.json:2", 2),
    ("named:2", 2),
    ("rotate:2", 4),
    ("deleting", 4),
    ("rotating", 4),
    ("end:2", 4),
    ("end:3", 6),
]


@pytest.mark.parametrize(("crash_at", "step"), PHASES)
def test_a_run_killed_in_a_checkpoint_learns_the_same(place, undisturbed, crash_at, step):
    run = place.run("run", crash_at=crash_at)
    assert run.wait() == [-9], run.text()
    path, manifest = checkpoint.find(place.folder / "run", "latest")
    assert manifest["step"] == step
    again = place.run("run", resume_from_checkpoint="latest")
    assert again.wait() == [0], again.text()
    assert f"resumed from {path}, after step {step}" in again.text()
    assert place.sums("run") == undisturbed()
    assert place.checkpoints("run") == ["checkpoint-000006"]


@pytest.mark.parametrize("crash_at", ["named", "replaced", "rotate"])
def test_a_run_killed_while_it_replaces_a_checkpoint_of_the_same_step(place, undisturbed, crash_at):
    place.finish("run", checkpoints_total_limit=3)
    start = place.folder / "run" / "checkpoint-000002"
    run = place.run("run", checkpoints_total_limit=3, resume_from_checkpoint=start, crash_at=crash_at)
    assert run.wait() == [-9], run.text()
    assert place.finish("run", resume_from_checkpoint="latest") == undisturbed()
    assert set(place.checkpoints("run")) <= {f"checkpoint-00000{step}" for step in (2, 4, 6)}  # nothing half


def test_the_only_checkpoint_is_not_lost_while_another_takes_its_place(place, undisturbed):
    place.finish("run")
    again = place.run("run", checkpointing_steps=6, crash_at="replaced")  # a new run in the folder of the old one
    assert again.wait() == [-9], again.text()
    assert place.finish("run", resume_from_checkpoint="latest") == undisturbed()
    assert place.checkpoints("run") == ["checkpoint-000006"]


def test_deterministic_operations_change_nothing_on_a_cpu(place, undisturbed):
    assert place.finish("run", deterministic=True) == undisturbed()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("repeat", range(20 if FULL else 2))
def test_a_run_killed_at_any_time_learns_the_same(place, undisturbed, processes, repeat):
    when = random.Random(f"{processes} {repeat}")
    expected = undisturbed(processes)
    kills = 0
    for _ in range(20):
        begun = any(place.folder.glob("run/checkpoint-??????"))
        options = {"resume_from_checkpoint": "latest"} if begun else {}
        with ended(place.run("run", processes=processes, prepare="slow_checkpoints", **options)) as run:
            run.wait_for("training:")
            time.sleep(when.uniform(0, 2))
            alive = [child for child in run.processes if child.is_alive()]
            for child in alive:
                child.kill()
            run.wait(1)
        kills += bool(alive)
        if not alive:
            break
        if kills == 3:
            assert set(place.run("run", processes=processes, **_options(place)).wait()) == {0}
            break
    assert kills
    assert place.sums("run") == expected
    assert place.checkpoints("run") == ["checkpoint-000006"]


def _options(place):
    return {"resume_from_checkpoint": "latest"} if any(place.folder.glob("run/checkpoint-??????")) else {}


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
def test_a_run_goes_on_from_any_step_bit_for_bit(place, options):
    """Steps 1 and 6 are first and last, a pass ends within step 3 and with step 5, and 4 is between."""
    every = {"checkpointing_steps": 1, "checkpoints_total_limit": 10}
    place.finish("run", **every, **options)
    for step in range(1, 7):
        if step > 1 and step < 6 and not FULL and options:
            continue
        expected = {later: place.sums("run", later) for later in range(step, 7)}
        start = place.folder / "run" / f"checkpoint-{step:06d}"
        workers = {"dataloader_num_workers": 0} if "dataloader_num_workers" in options else {}
        place.finish("run", **every, **(options | workers), resume_from_checkpoint=start)
        assert {later: place.sums("run", later) for later in range(step, 7)} == expected
