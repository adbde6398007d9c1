"""RUNTIME: process group, device, threads, precision and versions of a run."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ddpm_pipeline.cpu import SharedCores, keep_memory
from training.run.environment import check_environment, launched_precision
from training.run.gradients import ddp_settings

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # how long a rank waits for another that is alive
PATIENCE_WITH_MISTAKE = timedelta(minutes=1)  # for the others to join it, to be told


class Runtime:
    """One process of the run, and how it works with the others: a typed layer over accelerate's Accelerator.

    On a CPU this also sets the number of threads: `accelerate launch` sets one, which wastes the other cores. And freed
    memory is kept for the next step.

    Args:
        mixed_precision: no, fp16, bf16 or auto, see `resolve_mixed_precision`.
        cpu_threads: threads per process on a CPU; None: the processes of this machine share its cores, and a single one
            leaves other programs theirs, see `adapt_threads`.
        mistake: of this process. It joins the others only to tell them, and all raise it: else they would wait for it.
    Attributes:
        rank, world_size: index of this process and number of processes. `is_main` is true on rank 0.
        num_nodes, processes_per_node: number of machines, and of processes on each; `name` says which rank this is, and
            on which machine, for messages.
        mixed_precision: no, fp16 or bf16.
        dtype: what the network computes in, inside `autocast()`.
    Raises:
        ValueError: fp16 without a CUDA device, fewer processes than the launcher should have started, or a variable of
            the environment that asks for what does not exist here.
    """

    def __init__(self, mixed_precision: str, cpu_threads: int | None = None, mistake: ValueError | None = None) -> None:
        from accelerate import Accelerator, InitProcessGroupKwargs

        notes = []
        try:
            notes = check_environment()
            mixed_precision = resolve_mixed_precision(mixed_precision)
        except ValueError as error:
            if "WORLD_SIZE" not in os.environ:
                raise
            mistake, mixed_precision = mistake or error, "no"
        # Without cpu=True, accelerate makes several processes without an accelerator runs of one process each.
        cpu_only = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()
        wait = InitProcessGroupKwargs(timeout=None if mistake is None else PATIENCE_WITH_MISTAKE)
        self.accelerator: Accelerator = Accelerator(
            mixed_precision=mixed_precision, cpu=cpu_only, kwargs_handlers=[wait, ddp_settings()]
        )
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        self.processes_per_node = processes_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.num_nodes = max(1, self.world_size // processes_per_node)
        # For objects, and for waiting: NCCL gives up after ten minutes, in which one rank may still decode images. Not
        # between machines, where gloo may find no way if NCCL does.
        self._group = None
        if self.world_size > self.num_nodes == 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        node = os.environ.get("GROUP_RANK", self.rank // processes_per_node)  # set by torchrun
        self.name = f"rank {self.rank} on node {node} ({socket.gethostname()})"
        self.mixed_precision: str = self.accelerator.mixed_precision
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.mixed_precision, torch.float32)
        self._shared_cores: SharedCores | None = None
        if self.device.type == "cpu":
            keep_memory()
            cores = cpu_cores()
            torch.set_num_threads(cpu_threads or max(1, cores // processes_per_node))
            if cpu_threads is None and processes_per_node == 1:
                self._shared_cores = SharedCores(cores, cores)
        with self.together():
            check_world_size(self.world_size)
            if mistake is not None:
                raise mistake
        for note in notes:
            self.print(note)

    def autocast(self) -> AbstractContextManager[None]:
        """A context in which the network computes in `dtype`. Models from `accelerator.prepare` do so by themselves."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def matmul_dtype(self) -> torch.dtype:
        """What the optimizer multiplies matrices in, the same on all ranks: bf16 if the network computes in it and the
        hardware of all has it, else float32."""
        (lacks_bf16,) = self.any(not has_bf16())
        return torch.float32 if lacks_bf16 or self.mixed_precision != "bf16" else torch.bfloat16

    @property
    def threads(self) -> int | None:
        """Threads that this process computes with on a CPU; None on another device."""
        return torch.get_num_threads() if self.device.type == "cpu" else None

    def begin_threads(self, threads: int | None) -> None:
        """Begin with the number of threads of an earlier part of the run: results depend on it. cpu_threads wins."""
        if self._shared_cores is not None and threads is not None:
            self._shared_cores.begin(threads)

    @property
    def adapts_threads(self) -> bool:
        """Whether the number of threads is free: on a CPU, for a single process without cpu_threads."""
        return self._shared_cores is not None

    def limit_threads(self, most: int) -> None:
        """Compute with no more threads than this, and with as many unless other programs need the cores."""
        if self._shared_cores is not None:  # a checkpoint may be of a machine with more cores
            self._shared_cores.most = min(most, self._shared_cores.most)
            self._shared_cores.begin(self._shared_cores.most)

    def adapt_threads(self, at_once: bool = False) -> None:
        """Once a step: compute with the cores that other programs leave. Prints a line when the number changes.

        Args:
            at_once: leave them now, not after they have been busy for a while.
        """
        if self._shared_cores is None or (threads := self._shared_cores.update(at_once)) is None:
            return
        plural = "thread" if threads == 1 else "threads"
        if threads == self._shared_cores.most:
            self.print(f"computing with {threads} {plural} again")
        else:
            others, cores = self._shared_cores.others, self._shared_cores.cores
            self.print(f"other programs keep {others:.1f} of {cores} cores busy: computing with {threads} {plural}")

    def any(self, *flags: bool) -> list[bool]:
        """For each flag whether it is set on any rank; all ranks get the same answer."""
        if self.world_size == 1:
            return list(flags)
        total: Tensor = self.accelerator.reduce(torch.tensor(flags, dtype=torch.float32, device=self.device), "sum")
        return (total > 0).tolist()

    def mean(self, tensor: Tensor) -> Tensor:
        result: Tensor = self.accelerator.reduce(tensor, "mean")
        return result

    def sum(self, tensor: Tensor) -> Tensor:
        result: Tensor = self.accelerator.reduce(tensor, "sum")
        return result

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, concatenated along the first dimension by rank; their shapes must be equal."""
        result: Tensor = self.accelerator.gather(tensor)
        return result

    def gather_objects(self, items: list[T]) -> list[T]:
        """The lists of all ranks as one list, in the order of the ranks."""
        if self.world_size == 1:
            return items
        gathered: list[list[T]] = [[] for _ in range(self.world_size)]
        torch.distributed.all_gather_object(gathered, items, group=self._group)
        return [item for items in gathered for item in items]

    def broadcast(self, value: T) -> T:
        """The value of rank 0, on all ranks."""
        if self.world_size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def agree(self, **values: object) -> None:
        """Compare values between all ranks.

        Raises:
            ValueError: some rank has another value than rank 0. All ranks raise it, and it names the node.
        """
        (first, expected), *others = self.gather_objects([(self.name, values)])
        for name, other in others:
            for what, value in expected.items():
                if other[what] != value:
                    raise ValueError(
                        f"{what.replace('_', ' ')}: {other[what]!r} on {name}, but {value!r} on {first}; start all "
                        "processes with the same settings and the same images"
                    )

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context that all ranks leave together: if it raises on some rank, it raises on all, and no rank waits for
        one that has ended."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            if self.world_size == 1:
                raise
            error = raised
        failures = self.gather_objects([] if error is None else [(self.name, type(error), str(error))])
        if failures:
            name, kind, message = failures[0]
            raise _make_error(kind, message if self.num_nodes == 1 else f"{name}: {message}") from error

    def in_turn(self, work: Callable[[], T]) -> T:
        """The result of `work`, which rank 0 does first, then one rank of each other node, then the others.

        The later ones find what the first has written to the disk that they share. If it fails on some rank, all ranks
        raise its error.
        """
        own_turn = 0 if self.is_main else 1 if self.accelerator.is_local_main_process else 2
        for turn in range(1 if self.world_size == 1 else 3):
            with self.together():
                if turn == own_turn:
                    result = work()
        return result

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier(group=self._group)

    def print(self, line: str) -> None:
        """Print on the main process only; accelerate would print on that of each machine."""
        if self.is_main:
            print(line, flush=True)  # now, also to a file or a pipe


def _make_error(kind: type[Exception], message: str) -> Exception:
    try:
        return kind(message)
    except TypeError:  # a class with more arguments
        return RuntimeError(f"{kind.__name__}: {message}")


def resolve_mixed_precision(requested: str) -> str:
    """no, fp16 or bf16. auto: what `accelerate launch` was configured with, else bf16 if the hardware supports it.

    Raises:
        ValueError: fp16 without a CUDA device.
    """
    resolved = requested
    if requested == "auto":
        launched_with = launched_precision()
        resolved = "bf16" if launched_with == "no" and has_bf16() else launched_with
    if resolved == "fp16" and not torch.cuda.is_available():
        raise ValueError("mixed_precision is 'fp16', but there is no CUDA device: give bf16 or no")
    return resolved


def has_bf16() -> bool:
    """Whether the hardware computes in bf16: on a CPU without, PyTorch multiplies matrices 20 times slower in it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return not torch.backends.mps.is_available() and torch.cpu._is_avx512_bf16_supported()


def check_world_size(world_size: int) -> None:
    """Raise ValueError if the launcher should have started another number of processes, as far as we can tell."""
    requested = os.environ.get("WORLD_SIZE") or (_world_size_of_accelerate() if launched_alone() else None)
    if requested not in (None, str(world_size)):
        raise ValueError(
            f"the launcher was told to start {requested} processes, but {world_size} started: use "
            f"torchrun --nproc-per-node N training/{Path(sys.argv[0]).name}"
        )


def tell_other_machines(mistake: str) -> None:
    """Before this process ends without a Runtime: end those of other machines too, which would wait for it."""
    with suppress(Exception):
        if int(os.environ.get("WORLD_SIZE", 1)) > int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
            Runtime("no", mistake=ValueError(mistake))
    leave_process_group()


def launched_alone() -> bool:
    """Whether `accelerate launch` started this process and no other one."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ


def _world_size_of_accelerate() -> str | None:
    """The number of processes on the launcher's command line; "several" if it comes from accelerate's config file.

    On a CPU `accelerate launch --num_processes 2` starts one process and does not tell it that two were requested.
    """
    launcher = Path(f"/proc/{os.getppid()}")
    try:
        arguments = (launcher / "cmdline").read_text(errors="replace").replace("=", "\0").split("\0")
        environment = (launcher / "environ").read_text(errors="replace").split("\0")
    except OSError:  # not Linux
        return None
    for flag in ("--num_processes", "--num-processes"):
        if flag in arguments[:-1]:
            return arguments[arguments.index(flag) + 1]
    if "MASTER_ADDR" in os.environ and not any(line.startswith("MASTER_ADDR=") for line in environment):
        return "several"  # accelerate sets MASTER_ADDR for more than one process
    return None


def cpu_cores() -> int:
    """Physical cores that this process may use."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS
    return min(allowed, psutil.cpu_count(logical=False) or 1)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    from importlib.metadata import version

    return {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "diffusers", "accelerate", "safetensors", "numpy")
    }


def commit() -> str | None:
    """The commit of the project's code, with "-dirty" if it was edited; None outside of a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def leave_process_group() -> None:
    """Leave the process group, so that this process can continue alone or end without the others."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # gloo's threads need the GIL to release their last tensors, and this thread holds it while it waits for them:
        # without a pause one run in twenty hangs here forever.
        time.sleep(0.2)
        torch.distributed.destroy_process_group()
