"""What the fault tests run: training/train.py in a process of its own, with a network of two blocks.

The processes are forked from one that has imported everything, so a run takes a second instead of ten.
"""

import contextlib
import faulthandler
import math
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "training" / "train.py"
TINY = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
PRELOAD = [
    "accelerate", "datasets", "ddpm_pipeline.pipeline_ddpm", "jsonargparse", "psutil", "torch._dynamo",
    "torch.utils.tensorboard", "tqdm", "training.checkpoint", "training.config", "training.denoiser", "yaml",
]  # fmt: skip

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOAD)


class Run:
    """A run of train.py, of one process or several, that has begun.

    Args:
        arguments: its command line.
        log: file that takes what it prints.
        processes: how many; with more than one they meet as those of torchrun do.
        prepare: name of a function below that is called in each first, with the rank.
        crash_at: DDPM_CRASH_AT, in the first process.
        bare: accelerate is not told that it is to use CPUs.
    """

    def __init__(self, arguments, log, *, processes=1, prepare=None, crash_at=None, bare=False):
        self.log = log
        log.write_text("")
        common = {} if bare else {"ACCELERATE_USE_CPU": "true"}
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.processes = []
        for rank in range(processes):
            environment = common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
            if crash_at and rank == 0:
                environment["DDPM_CRASH_AT"] = crash_at
            child = context.Process(
                target=_train, args=(list(map(str, arguments)), environment, str(log), prepare, rank)
            )
            child.start()
            self.processes.append(child)

    def wait(self, seconds=60):
        """Exit codes; a process that lives longer than this is killed, and has None."""
        deadline = time.monotonic() + seconds
        for child in self.processes:
            child.join(max(0.0, deadline - time.monotonic()))
        codes = [child.exitcode for child in self.processes]
        for child in self.processes:
            if child.exitcode is None:  # where it hangs goes into the log
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

    def wait_for(self, words, seconds=60):
        """Until these words were printed."""
        deadline = time.monotonic() + seconds
        while words not in self.text():
            assert time.monotonic() < deadline, f"no {words!r} in:\n{self.text()}"
            assert any(child.is_alive() for child in self.processes) or words in self.text(), self.text()
            time.sleep(0.01)


def _train(arguments, environment, log, prepare, rank):
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ.update(environment)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    faulthandler.register(signal.SIGUSR2)
    from training import denoiser

    denoiser.PRESETS["tiny"] = TINY
    if prepare:
        globals()[prepare](rank)
    sys.argv = [str(TRAIN), *arguments]
    runpy.run_path(str(TRAIN), run_name="__main__")


# ---- What may be done to a run before it begins ----------------------------------------------------------------------


def _each_loss(change):
    """Let change(step, loss) have each loss; steps are 0, 1, ... of this process, of one forward pass each."""
    from ddpm_pipeline import objective

    simple_loss, calls = objective.simple_loss, []

    def changed(prediction, target):
        calls.append(None)
        return change(len(calls) - 1, simple_loss(prediction, target))

    objective.simple_loss = changed


def nan_on_the_last_process(rank):
    last = int(os.environ.get("WORLD_SIZE", 1)) - 1
    _each_loss(lambda step, loss: loss * math.nan if step == 3 and rank == last else loss)


def one_nan_picture(rank):
    """The prediction for the first picture of this process is no number in its fourth step."""
    from ddpm_pipeline import objective

    simple_loss, calls = objective.simple_loss, []

    def changed(prediction, target):
        calls.append(None)
        if len(calls) == 4:
            with __import__("torch").no_grad():
                prediction[0] *= math.nan
        return simple_loss(prediction, target)

    objective.simple_loss = changed


def slow_steps(rank):
    """A step takes a third of a second more and says so, so that a test can be quicker than it."""

    def slow(step, loss):
        print(f"[step {step + 1} of {rank} begins]", flush=True)
        time.sleep(0.3)
        return loss

    _each_loss(slow)


def slow_end(rank):
    """A step takes longer, and so does parting from the other processes, at the very end."""
    slow_steps(rank)
    from training.run import failures

    def part():
        print("[parting]", flush=True)
        time.sleep(1.5)

    failures.part = part


def slow_samples(rank):
    """A step of the walk home takes a fifth of a second more."""
    from ddpm_pipeline import scheduling_ddpm

    step = scheduling_ddpm.DDPMScheduler.step

    def slow(self, *args, **options):
        print(f"[sampling on {rank}]", flush=True)
        time.sleep(0.2)
        return step(self, *args, **options)

    scheduling_ddpm.DDPMScheduler.step = slow


def slow_checkpoints(rank):
    """Each file of a checkpoint takes a third of a second more."""
    from training.run import checkpoint

    write = checkpoint._write

    def slow(path, content):
        print(f"[writing {path.parent.name}]", flush=True)
        time.sleep(0.3)
        return write(path, content)

    checkpoint._write = slow


def no_memory_to_train(rank):
    import torch

    def fail(step, loss):
        if step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss

    _each_loss(fail)


def no_memory_to_sample(rank):
    from ddpm_pipeline import scheduling_ddpm

    def fail(self, *args, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory")

    if rank == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        scheduling_ddpm.DDPMScheduler.step = fail


def no_room_for_logs(rank):
    """Whatever is written into metrics.jsonl or as a picture meets a full disk."""
    from PIL import Image

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    Image.Image.save = full
    dumps = __import__("json").dumps

    def dumps_or_full(content, **options):
        if isinstance(content, dict) and "learning_rate" in content and content["step"] > 2:
            full()
        return dumps(content, **options)

    __import__("json").dumps = dumps_or_full


def _disk_full_at(name):
    """In the second checkpoint the disk is filled by another when this file is to be written."""
    from training.run import checkpoint

    write, calls = checkpoint._write, []

    def full(path, content):
        calls.append(path.name)
        if calls.count(name) == 2:
            with contextlib.suppress(OSError), open(path.parents[2] / "filler", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        return write(path, content)

    checkpoint._write = full


def disk_full_at_model(rank):
    _disk_full_at("model.safetensors")


def disk_full_at_optimizer(rank):
    _disk_full_at("optimizer.pt")


def disk_full_at_manifest(rank):
    _disk_full_at("manifest.json")


@contextlib.contextmanager
def ended(run):
    """So that no process outlives its test."""
    try:
        yield run
    finally:
        run.kill()
