"""Runs of training/train.py in child processes, with a network of two blocks, and the faults injected into them.

The processes are forked from one that has imported everything, so a run takes a second instead of ten.
"""

import contextlib
import faulthandler
import itertools
import math
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAINING = ROOT / "training"
TRAIN = TRAINING / "train.py"
PRELOAD = [
    "accelerate", "datasets", "ddpm_pipeline.pipeline_ddpm", "jsonargparse", "psutil", "torch._dynamo",
    "torch.distributed.run", "torch.utils.tensorboard", "tqdm", "training.config", "training.denoiser",
    "training.run.checkpoint", "yaml",
]  # fmt: skip

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOAD)


class Node:
    """A machine's agent of torchrun, with its processes; `kill` kills them all at once, as a power failure.

    It is torchrun's own agent and rendezvous, but the processes are forked.

    Args:
        launcher: command line of torchrun, before the script.
        arguments: command line of train.py.
        log: file for what all print.
        machine: a network namespace to run in; None: this one.
        fault: see `Run`.
    """

    def __init__(self, launcher, arguments, log, *, machine=None, fault=None):
        self.log = log
        log.touch()
        arguments = [*map(str, launcher)], [*map(str, arguments)], str(log), machine, fault
        self.agent = context.Process(target=_launch, args=arguments)
        self.agent.start()

    def wait(self, seconds=120):
        """The exit code of the agent; None after so many seconds, and then it is killed."""
        self.agent.join(seconds)
        code = self.agent.exitcode
        self.kill()
        return code

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.agent.pid, signal.SIGKILL)
        self.agent.join()


def _launch(launcher, arguments, log, machine, fault):
    os.setsid()
    if machine:
        from benchmarks import network

        network.enter(machine)
        os.environ["GLOO_SOCKET_IFNAME"] = network.CABLE
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch

    config, _, _ = run.config_from_args(run.parse_args([*launcher, str(TRAIN)]))
    config.start_method = "fork"
    elastic_launch(config, _work)(arguments, log, fault)


def _work(arguments, log, fault):
    try:
        _train(arguments, {}, log, int(os.environ["RANK"]), fault=fault, crash_at=None)
    except SystemExit as end:
        if end.code:
            raise


class Run:
    """A started run of train.py or another script of training/, in one process or several.

    Args:
        arguments: its command line.
        log: file for what it prints.
        world_size: number of processes; several of them form a process group as under torchrun.
        fault: name of a function below that each process calls first, with its rank.
        crash_at: where rank 0 kills itself, see `install_crash_point`.
        detect_device: do not tell accelerate to use the CPU.
        nodes: for each rank more arguments; then each rank is the only one of a machine of its own.
        script: of training/.
    """

    def __init__(
        self, arguments, log, *, world_size=1, fault=None, crash_at=None, detect_device=False, nodes=None,
        script="train.py",
    ):  # fmt: skip
        self.log = log
        log.write_text("")
        common = {} if detect_device else {"ACCELERATE_USE_CPU": "true"}
        if world_size > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            common |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(1 if nodes else world_size)}
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.processes = []
        for rank in range(world_size):
            environment = common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {})
            if nodes:
                environment |= {"LOCAL_RANK": "0", "GROUP_RANK": str(rank)}
            options = {"fault": fault, "crash_at": crash_at if rank == 0 else None, "script": script}
            child = context.Process(
                target=_train,
                args=([*map(str, arguments), *(nodes[rank] if nodes else [])], environment, str(log), rank),
                kwargs=options,
            )
            child.start()
            self.processes.append(child)

    def wait(self, seconds=60):
        """The exit codes. A process that lives longer than this is killed; its code is None."""
        deadline = time.monotonic() + seconds
        for child in self.processes:
            child.join(max(0.0, deadline - time.monotonic()))
        codes = [child.exitcode for child in self.processes]
        for child in self.processes:
            if child.exitcode is None:  # on this signal it logs where it hangs
                os.kill(child.pid, signal.SIGUSR2)
                time.sleep(0.5)
        self.kill()
        return codes

    def kill(self):
        for child in self.processes:
            child.kill()
        for child in self.processes:
            child.join()

    def text(self):
        return self.log.read_text(errors="replace").replace("\r", "\n")

    def wait_for(self, text, seconds=60):
        """Wait until this text has been printed."""
        deadline = time.monotonic() + seconds
        while text not in self.text():
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.text()}"
            assert any(child.is_alive() for child in self.processes) or text in self.text(), self.text()
            time.sleep(0.01)


@contextlib.contextmanager
def killed_at_end(run):
    """Kill all processes of the run at the end, whatever happens inside."""
    try:
        yield run
    finally:
        run.kill()


def _train(arguments, environment, log, rank, *, fault, crash_at, script="train.py"):
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ.update(environment)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    faulthandler.register(signal.SIGUSR2)
    if fault:
        globals()[fault](rank)
    if crash_at:
        install_crash_point(crash_at)
    sys.argv = [str(TRAINING / script), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


# ---- Crash points ----------------------------------------------------------------------------------------------------


def install_crash_point(crash_at):
    """Let this process kill itself while it saves a checkpoint, as if the power had failed.

    Args:
        crash_at: one of these points, or "point:N" for the N-th time it is reached:
            begin: nothing is written yet.
            <name of a file>: half of this file is written.
            flushed: all files are written and flushed, nothing is renamed.
            replaced: the earlier checkpoint of the same step is moved aside, the new one not in place yet.
            verified: the new checkpoint is complete.
            hidden: an old checkpoint has lost its name, its files are still there.
            deleted: an old checkpoint is deleted.
            end: all is done.
    """
    from training.run import checkpoint

    point, _, times = crash_at.partition(":")
    counter = itertools.count(1)

    def is_due(name):
        return name == point and next(counter) == int(times or 1)

    def reached(name):
        if is_due(name):
            os.kill(os.getpid(), signal.SIGKILL)

    saving = []
    save, write, flush_folder, verify, delete, replace = (
        checkpoint.save, checkpoint._write, checkpoint._flush_folder, checkpoint.verify, checkpoint._delete,
        Path.replace,
    )  # fmt: skip

    def crashing_save(*args, **options):
        reached("begin")
        saving.append(True)
        path = save(*args, **options)
        saving.clear()
        reached("end")
        return path

    def crashing_write(path, content):
        if is_due(path.name):
            with open(path, "xb") as file:
                file.write(content[: len(content) // 2])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        return write(path, content)

    def crashing_flush_folder(path):
        flush_folder(path)
        if ".tmp-" in path.name:
            reached("flushed")

    def crashing_verify(path):
        manifest = verify(path)
        if saving:
            reached("verified")
        return manifest

    def crashing_delete(folder):
        delete(folder)
        if checkpoint.NAME.fullmatch(folder.name):
            reached("deleted")

    def crashing_replace(path, target):
        result = replace(path, target)
        if match := re.fullmatch(checkpoint.NAME.pattern + r"\.(old|tmp)(-\d+)?", Path(target).name):
            reached("replaced" if match[2] == "old" else "hidden")
        return result

    checkpoint.save, checkpoint._write, checkpoint._flush_folder = crashing_save, crashing_write, crashing_flush_folder
    checkpoint.verify, checkpoint._delete, Path.replace = crashing_verify, crashing_delete, crashing_replace


# ---- Faults ----------------------------------------------------------------------------------------------------------


def _change_loss(change):
    """Replace each loss of this process by change(step, loss), with one forward pass per step: step = 0, 1, ..."""
    from ddpm_pipeline import objective

    simple_loss, calls = objective.simple_loss, itertools.count()
    objective.simple_loss = lambda prediction, target: change(next(calls), simple_loss(prediction, target))


def nan_on_the_last_rank(rank):
    last = int(os.environ.get("WORLD_SIZE", 1)) - 1
    _change_loss(lambda step, loss: loss * math.nan if step == 3 and rank == last else loss)


def fsdp_on_the_last_rank(rank):
    """Its environment asks for what does not exist, in a variable that accelerate cannot even read."""
    if rank == int(os.environ["WORLD_SIZE"]) - 1:
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "perhaps"}


def one_nan_image(rank):
    """The prediction for the first image of this rank is NaN in the fourth step."""
    import torch

    from ddpm_pipeline import objective

    simple_loss, calls = objective.simple_loss, itertools.count(1)

    def changed(prediction, target):
        if next(calls) == 4:
            with torch.no_grad():
                prediction[0] *= math.nan
        return simple_loss(prediction, target)

    objective.simple_loss = changed


def slow_steps(rank):
    """A step takes 0.3 seconds longer and prints its number, so that a test can act during it."""

    def slow(step, loss):
        print(f"[step {step + 1} on rank {rank}]", flush=True)
        time.sleep(0.3)
        return loss

    _change_loss(slow)


def slow_steps_with_a_nan(rank):
    nan_on_the_last_rank(rank)
    slow_steps(rank)


def slow_end(rank):
    """A step takes longer, and so does leaving the process group at the very end."""
    slow_steps(rank)
    from training.run import runtime

    def leave_process_group():
        print("[leaving]", flush=True)
        time.sleep(1.5)

    runtime.leave_process_group = leave_process_group


def slow_samples(rank):
    """A sampling step takes 0.2 seconds longer."""
    from ddpm_pipeline import scheduling_ddpm

    step = scheduling_ddpm.DDPMScheduler.step

    def slow(self, *args, **options):
        print(f"[sampling on rank {rank}]", flush=True)
        time.sleep(0.2)
        return step(self, *args, **options)

    scheduling_ddpm.DDPMScheduler.step = slow


def slow_checkpoints(rank):
    """Each file of a checkpoint takes 0.3 seconds longer."""
    from training.run import checkpoint

    write = checkpoint._write

    def slow(path, content):
        print(f"[writing {path.parent.name}]", flush=True)
        time.sleep(0.3)
        return write(path, content)

    checkpoint._write = slow


def out_of_memory_training(rank):
    import torch

    def fail(step, loss):
        if step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss

    _change_loss(fail)


def out_of_memory_sampling(rank):
    from ddpm_pipeline import scheduling_ddpm

    def fail(self, *args, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory")

    if rank == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        scheduling_ddpm.DDPMScheduler.step = fail


def disk_full_for_logs(rank):
    """Writing an image, or a line of metrics.jsonl after step 2, finds the disk full."""
    import json

    from PIL import Image

    def disk_full(*args, **options):
        raise OSError(28, "No space left on device")

    Image.Image.save = disk_full
    dumps = json.dumps

    def dumps_or_disk_full(content, **options):
        if isinstance(content, dict) and "learning_rate" in content and content["step"] > 2:
            disk_full()
        return dumps(content, **options)

    json.dumps = dumps_or_disk_full


def checkpoints_on_rank_0_only(rank):
    """Any other rank finds and reads no checkpoint, as on a machine without a shared disk."""
    from training.run import checkpoint

    def missing(*args, **options):
        raise FileNotFoundError("no checkpoint on this machine")

    if rank:
        checkpoint.find = checkpoint.verify = checkpoint.load = missing


def _disk_full_at(name):
    """Another program fills the disk just before this file of the second checkpoint is written."""
    from training.run import checkpoint

    write, calls = checkpoint._write, itertools.count(1)

    def fill_and_write(path, content):
        if path.name == name and next(calls) == 2:
            with contextlib.suppress(OSError), open(path.parents[2] / "filler", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        return write(path, content)

    checkpoint._write = fill_and_write


def disk_full_at_model(rank):
    _disk_full_at("model.safetensors")


def disk_full_at_optimizer(rank):
    _disk_full_at("optimizer.pt")


def disk_full_at_manifest(rank):
    _disk_full_at("manifest.json")
