"""What a run runs on: processes, device, threads, precision, versions."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator


def start(mixed_precision: str, cpu_threads: int | None = None) -> Accelerator:
    """Accelerate's view of the processes of this run, with the threads set that each may take on a CPU.

    Args:
        mixed_precision: no, fp16, bf16 or auto.
        cpu_threads: of each process; by default they share out all cores.
    Raises:
        ValueError: fp16 without a GPU.
    """
    from accelerate import Accelerator

    # Without being told so, accelerate makes of several processes on CPUs as many runs that know nothing of each other.
    only_cpus = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision=precision(mixed_precision), cpu=only_cpus)
    if accelerator.device.type == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(cpu_threads or max(1, cpu_cores() // here))
    return accelerator


def precision(asked: str) -> str:
    """mixed_precision with "auto" decided: bf16 where the hardware multiplies it, else float32."""
    if asked == "auto":
        launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        on_cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
        if launched_with != "no":
            asked = launched_with
        elif torch.cuda.is_available():
            asked = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
        else:
            asked = "bf16" if on_cpu and torch.cpu._is_avx512_bf16_supported() else "no"
    if asked == "fp16" and not torch.cuda.is_available():
        raise ValueError("mixed_precision is fp16, which is very slow without a GPU: give bf16, or no")
    return asked


def dtype(accelerator: Accelerator) -> torch.dtype:
    """What the network computes in."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)


def cpu_cores() -> int:
    """Physical cores that this process may use."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS
    return min(allowed, psutil.cpu_count(logical=False) or 1)


def name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "diffusers", "accelerate", "safetensors", "numpy")
    }
