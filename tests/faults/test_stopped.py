"""F6, F7: a signal ends a run after its step, with a checkpoint, exit code 143 and nothing left running."""

import os
import signal
import subprocess
import sys
import time

import pytest
from child import TRAIN, ended

from training.run import checkpoint

IN_TIME = 20  # seconds


def stop(run, number, whom):
    for child in run.processes if whom == "all" else run.processes[-1:]:
        os.kill(child.pid, number)


def ended_well(place, run, step=None):
    """All ended with 143 in time, with a checkpoint of the step where they were. The step."""
    assert set(run.wait(IN_TIME)) == {143}, run.text()
    _, manifest = checkpoint.find(place.folder / "run", "latest")
    assert f"checkpoint after step {manifest['step']} written" in run.text()
    assert step in (None, manifest["step"])
    assert [name for name in place.checkpoints("run") if "." in name] == []
    return manifest["step"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_in_a_step_it_is_finished_and_the_run_goes_on_bit_for_bit(place, undisturbed, number):
    with ended(place.run("run", prepare="slow_steps", checkpointing_steps=100)) as run:
        run.wait_for("[step 3 of 0 begins]")
        stop(run, number, "all")
        ended_well(place, run, step=3)
    assert place.finish("run", resume_from_checkpoint="latest") == undisturbed()


@pytest.mark.parametrize("whom", ["all", "one"])
def test_of_two_processes_both_end_after_one_step(place, undisturbed, whom):
    with ended(place.run("run", processes=2, prepare="slow_steps", checkpointing_steps=100)) as run:
        run.wait_for("[step 3 of 1 begins]")
        stop(run, signal.SIGTERM, whom)
        assert ended_well(place, run) in (3, 4)
    assert place.finish("run", processes=2, resume_from_checkpoint="latest") == undisturbed(2)


@pytest.mark.parametrize("processes", [1, 2])
def test_while_it_draws_samples_they_are_given_up(place, undisturbed, processes):
    options = {"save_images_steps": 3, "ddpm_num_inference_steps": 20, "checkpointing_steps": 100}
    with ended(place.run("run", processes=processes, prepare="slow_samples", **options)) as run:
        run.wait_for("[sampling on")
        begun = time.monotonic()
        stop(run, signal.SIGTERM, "all")
        ended_well(place, run, step=3)
        assert time.monotonic() - begun < 3  # all 20 would take 4 and more
    assert not any((place.folder / "run" / "samples").iterdir())
    assert place.finish("run", processes=processes, resume_from_checkpoint="latest") == undisturbed(processes)


@pytest.mark.parametrize(("processes", "whom"), [(1, "all"), (2, "all"), (2, "one")])
def test_while_it_writes_a_checkpoint_that_is_the_one(place, undisturbed, processes, whom):
    with ended(place.run("run", processes=processes, prepare="slow_checkpoints")) as run:
        run.wait_for("[writing checkpoint-000002")
        stop(run, signal.SIGTERM, whom)
        step = ended_well(place, run)
        assert step == 3 if processes == 1 else step in (2, 3)
    assert place.finish("run", processes=processes, resume_from_checkpoint="latest") == undisturbed(processes)


def test_a_second_signal_ends_it_at_once(place):
    with ended(place.run("run", prepare="slow_checkpoints", checkpointing_steps=3)) as run:
        run.wait_for("[writing checkpoint-000003")
        stop(run, signal.SIGTERM, "all")
        time.sleep(1.1)
        stop(run, signal.SIGTERM, "all")
        assert run.wait(2) == [-signal.SIGTERM]
    assert not any((place.folder / "run").glob("checkpoint-??????"))
    place.finish("run")
    assert place.checkpoints("run") == ["checkpoint-000006"]  # and nothing half


def test_the_same_signal_twice_at_once_is_one(place):
    """As when a group of processes gets it, and torchrun passes its own on."""
    with ended(place.run("run", prepare="slow_steps")) as run:
        run.wait_for("[step 3 of 0 begins]")
        stop(run, signal.SIGTERM, "all")
        time.sleep(0.1)
        stop(run, signal.SIGTERM, "all")
        ended_well(place, run, step=3)


def test_what_comes_while_it_leaves_changes_nothing(place):
    """torchrun sends SIGTERM to all as soon as one process has ended."""
    with ended(place.run("run", prepare="slow_end")) as run:
        run.wait_for("[step 3 of 0 begins]")
        stop(run, signal.SIGUSR1, "all")
        run.wait_for("[parting]")
        time.sleep(1.1)
        stop(run, signal.SIGTERM, "all")
        ended_well(place, run, step=3)


def test_after_the_last_step_everything_is_saved_already(place, undisturbed):
    options = {"ddpm_num_inference_steps": 20}
    with ended(place.run("run", prepare="slow_samples", **options)) as run:
        run.wait_for("[sampling on")
        stop(run, signal.SIGTERM, "all")
        assert run.wait(IN_TIME) == [143]
    assert place.sums("run") == undisturbed()
    assert place.finish("run", resume_from_checkpoint="latest") == undisturbed()
    assert (place.folder / "run" / "pipeline" / "model_index.json").is_file()


def launched(launcher, arguments, log):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", *launcher, str(TRAIN), *arguments]
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def children(pid):
    """Processes that work on this log's run: all that this one has started."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rsplit(")", 1)[1].split()[1])
            except (OSError, ValueError):
                continue
            if parent == pid:
                found += [int(entry), *children(int(entry))]
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for orphans in /proc")
@pytest.mark.parametrize(
    "launcher",
    [
        ["accelerate.commands.launch", "--cpu", "--num_processes=1"],
        ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    ],
    ids=["accelerate launch", "torchrun"],
)
def test_a_launcher_that_is_told_to_end_leaves_a_checkpoint_and_no_orphan(place, launcher):
    log = place.folder / "launched.log"
    steps = {"max_train_steps": 100_000, "checkpointing_steps": 100_000, "logging_steps": 5}
    arguments = place.arguments("run", train_batch_size=2 if "torch" in launcher[0] else 4, **steps)
    process = launched(launcher, arguments, log)
    metrics = place.folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") > 1):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    workers = children(process.pid)
    assert workers
    alive = list(workers)
    try:
        process.send_signal(signal.SIGTERM)
        process.wait(IN_TIME)
        deadline = time.monotonic() + IN_TIME
        while alive := [pid for pid in workers if os.path.isdir(f"/proc/{pid}")]:
            assert time.monotonic() < deadline, (alive, log.read_text())
            time.sleep(0.05)
    finally:
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
    _, manifest = checkpoint.find(place.folder / "run", "latest")
    assert f"checkpoint after step {manifest['step']} written" in log.read_text()
