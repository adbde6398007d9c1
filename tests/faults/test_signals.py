"""After a signal a run finishes its step, writes a checkpoint and exits with 143; no process survives."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.faults.child import TRAIN, killed_at_end
from training.run import checkpoint

GRACE = 20  # seconds within which a run must end


def send(run, number, to):
    for child in run.processes if to == "all" else run.processes[-1:]:
        os.kill(child.pid, number)


def assert_stopped(workspace, run, step=None):
    """All processes have exited with 143 in time, with a checkpoint of the step they were in. Returns that step."""
    assert set(run.wait(GRACE)) == {143}, run.text()
    _, manifest = checkpoint.find(workspace.folder / "run", "latest")
    assert f"checkpoint after step {manifest['step']} written" in run.text()
    assert step in (None, manifest["step"])
    assert [name for name in workspace.checkpoints("run") if "." in name] == []
    return manifest["step"]


@pytest.mark.parametrize(
    ("number", "logging_steps"), [(signal.SIGTERM, 1), (signal.SIGTERM, 100), (signal.SIGUSR1, 1), (signal.SIGINT, 1)]
)
def test_after_a_signal_the_step_is_finished_and_the_run_resumes_bit_for_bit(
    workspace, undisturbed, number, logging_steps
):
    options = {"checkpointing_steps": 100, "logging_steps": logging_steps}
    with killed_at_end(workspace.start("run", fault="slow_steps", **options)) as run:
        run.wait_for("[step 3 on rank 0]")
        send(run, number, "all")
        assert_stopped(workspace, run, step=3)
    assert workspace.finish("run", resume_from_checkpoint="latest") == undisturbed()


def test_a_new_run_stopped_before_its_first_checkpoint_leaves_those_of_the_earlier_run(workspace):
    before = workspace.finish("run")
    with killed_at_end(workspace.start("run", fault="slow_steps", seed=1)) as run:
        run.wait_for("[step 1 on rank 0]")
        send(run, signal.SIGTERM, "all")
        assert run.wait(GRACE) == [143], run.text()
    assert "before the first checkpoint of this run: the earlier ones are untouched" in run.text()
    assert workspace.sha256("run") == before
    assert "seed: 0" in (workspace.folder / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(("to", "logging_steps"), [("all", 1), ("one", 1), ("one", 100)])
def test_two_processes_stop_after_the_same_step(workspace, undisturbed, to, logging_steps):
    """Between two entries of the log they learn one step later what the other has been asked."""
    options = {"checkpointing_steps": 100, "validation_steps": 100, "save_images_steps": 100}
    options["logging_steps"] = logging_steps
    with killed_at_end(workspace.start("run", world_size=2, fault="slow_steps", **options)) as run:
        run.wait_for("[step 3 on rank 1]")
        send(run, signal.SIGTERM, to)
        assert assert_stopped(workspace, run) in ((3, 4) if logging_steps == 1 else (4, 5))
    assert workspace.finish("run", world_size=2, resume_from_checkpoint="latest") == undisturbed(2)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_while_sampling_abandons_the_samples(workspace, undisturbed, world_size):
    options = {"save_images_steps": 3, "ddpm_num_inference_steps": 20, "checkpointing_steps": 100}
    with killed_at_end(workspace.start("run", world_size=world_size, fault="slow_samples", **options)) as run:
        run.wait_for("[sampling on rank")
        sent_at = time.monotonic()
        send(run, signal.SIGTERM, "all")
        assert_stopped(workspace, run, step=3)
        assert time.monotonic() - sent_at < 3  # all 20 steps would take at least 4
    assert not any((workspace.folder / "run" / "samples").iterdir())
    assert workspace.finish("run", world_size=world_size, resume_from_checkpoint="latest") == undisturbed(world_size)


@pytest.mark.parametrize(("world_size", "to"), [(1, "all"), (2, "all"), (2, "one")])
def test_a_signal_while_saving_lets_the_checkpoint_finish(workspace, undisturbed, world_size, to):
    with killed_at_end(workspace.start("run", world_size=world_size, fault="slow_checkpoints")) as run:
        run.wait_for("[writing checkpoint-000002")
        send(run, signal.SIGTERM, to)
        step = assert_stopped(workspace, run)
        assert step == 3 if world_size == 1 else step in (2, 3)
    assert workspace.finish("run", world_size=world_size, resume_from_checkpoint="latest") == undisturbed(world_size)


def test_a_second_signal_ends_the_run_at_once(workspace):
    with killed_at_end(workspace.start("run", fault="slow_checkpoints", checkpointing_steps=3)) as run:
        run.wait_for("[writing checkpoint-000003")
        send(run, signal.SIGTERM, "all")
        time.sleep(1.1)
        send(run, signal.SIGTERM, "all")
        assert run.wait(2) == [-signal.SIGTERM]
    assert not any((workspace.folder / "run").glob("checkpoint-??????"))
    workspace.finish("run")
    assert workspace.checkpoints("run") == ["checkpoint-000006"]  # and no leftovers


def test_the_same_signal_twice_at_once_counts_as_one(workspace):
    """This happens when a process group receives it and torchrun forwards its own."""
    with killed_at_end(workspace.start("run", fault="slow_steps")) as run:
        run.wait_for("[step 3 on rank 0]")
        send(run, signal.SIGTERM, "all")
        time.sleep(0.1)
        send(run, signal.SIGTERM, "all")
        assert_stopped(workspace, run, step=3)


def test_a_signal_while_exiting_does_not_change_the_exit_code(workspace):
    """torchrun sends SIGTERM to all processes as soon as one has ended."""
    with killed_at_end(workspace.start("run", fault="slow_end")) as run:
        run.wait_for("[step 3 on rank 0]")
        send(run, signal.SIGUSR1, "all")
        run.wait_for("[leaving]")
        time.sleep(1.1)
        send(run, signal.SIGTERM, "all")
        assert_stopped(workspace, run, step=3)


def test_a_signal_after_the_last_step_loses_nothing(workspace, undisturbed):
    options = {"ddpm_num_inference_steps": 20}
    with killed_at_end(workspace.start("run", fault="slow_samples", **options)) as run:
        run.wait_for("[sampling on rank")
        send(run, signal.SIGTERM, "all")
        assert run.wait(GRACE) == [143]
    assert workspace.sha256("run") == undisturbed()
    assert workspace.finish("run", resume_from_checkpoint="latest") == undisturbed()
    assert (workspace.folder / "run" / "pipeline" / "model_index.json").is_file()


def launch(launcher, arguments, log):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", *launcher, str(TRAIN), *arguments]
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def descendants(pid):
    """Ids of all processes that this one has started, directly or through others."""
    pids = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rsplit(")", 1)[1].split()[1])
            except (OSError, ValueError):
                continue
            if parent == pid:
                pids += [int(entry), *descendants(int(entry))]
    return pids


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for orphans in /proc")
@pytest.mark.parametrize(
    "launcher",
    [
        ["accelerate.commands.launch", "--cpu", "--num_processes=1"],
        ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    ],
    ids=["accelerate launch", "torchrun"],
)
def test_a_signal_to_the_launcher_leaves_a_checkpoint_and_no_orphan(workspace, launcher):
    log = workspace.folder / "launched.log"
    steps = {"max_train_steps": 100_000, "checkpointing_steps": 100_000, "logging_steps": 5}
    arguments = workspace.arguments("run", train_batch_size=2 if "torch" in launcher[0] else 4, **steps)
    process = launch(launcher, arguments, log)
    metrics = workspace.folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n") > 1):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    workers = descendants(process.pid)
    assert workers
    alive = list(workers)
    try:
        process.send_signal(signal.SIGTERM)
        process.wait(GRACE)
        deadline = time.monotonic() + GRACE
        while alive := [pid for pid in workers if os.path.isdir(f"/proc/{pid}")]:
            assert time.monotonic() < deadline, (alive, log.read_text())
            time.sleep(0.05)
    finally:
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
    _, manifest = checkpoint.find(workspace.folder / "run", "latest")
    assert f"checkpoint after step {manifest['step']} written" in log.read_text()
