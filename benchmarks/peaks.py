"""What this machine can reach: rates of matrix product and 3x3 convolution, and memory bandwidth.

    python benchmarks/peaks.py PRECISION THREADS

prints JSON. A process of its own: it keeps freed memory, or page faults would be part of the rates, and the peers that
bench.py times in its process must not have that.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor

from ddpm_pipeline.cpu import keep_memory

DTYPES = {"bf16": torch.bfloat16, "no": torch.float32}
# (batch, channels, side): 3x3 convolutions as the networks have them.
CONVOLUTIONS = {
    "cpu": ((32, 32, 32), (32, 64, 32), (32, 128, 16), (32, 256, 16)),
    "cuda": ((512, 64, 32), (512, 128, 32), (512, 128, 16), (512, 256, 16), (512, 256, 8)),
}
MATRIX = {"cpu": 2048, "cuda": 8192}  # side of the matrices
COPIED = {"cpu": 64 * 2**20, "cuda": 2**30}  # bytes, more than the caches hold


def measure_peaks(precision: str, threads: int) -> dict[str, Any]:
    """The rates of the CPU, measured in another process."""
    command = [sys.executable, __file__, precision, str(threads)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"peaks.py failed:\n{process.stderr[-2000:]}")
    peaks: dict[str, Any] = json.loads(process.stdout)
    return peaks


def measure_rates(device: str, dtype: torch.dtype, seconds: float = 1.0, largest: int | None = None) -> dict[str, Any]:
    """Rates in GFLOP/s and GB/s. Each is the median of calls for about this many seconds.

    Args:
        device: "cpu" or "cuda".
        largest: side of the matrices, and largest batch of the convolutions, for a rough result in no time.
    Returns:
        In GFLOP/s, except for the bandwidth. `convolution` is the median of the convolutions' own rates, those of
        forward and backward pass together.
    """
    side = largest or MATRIX[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = 2 * side**3 / median_seconds(lambda: torch.mm(a, b, out=out), device, seconds) / 1e9
    shapes = [(min(batch, largest or batch), channels, s) for batch, channels, s in CONVOLUTIONS[device]]
    rows = [measure_convolution(*shape, device, dtype, seconds / 2) for shape in shapes]
    source = torch.zeros(COPIED[device] // (16 if largest else 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device, seconds / 2)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "matrix_product": round(product, 1),
        "matrix_side": side,
        "convolution": median(row["both"] for row in rows),
        "convolutions": rows,
        "memory_gb_per_second": round(2 * source.numel() / copy / 1e9, 1),  # read once and written once
    }


def measure_convolution(
    batch: int, channels: int, side: int, device: str, dtype: torch.dtype, seconds: float
) -> dict[str, Any]:
    """A 3x3 convolution in the faster of both memory formats, forward and backward pass separately."""
    flop = 2 * 9 * channels**2 * side**2 * batch
    best: dict[str, Any] = {"batch": batch, "channels": channels, "side": side, "both": 0.0}
    for layout in (torch.contiguous_format, torch.channels_last):
        layer = torch.nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype)
        layer.to(memory_format=layout)  # type: ignore[call-overload]  # torch annotates it without this argument
        x = torch.randn(batch, channels, side, side, device=device).to(dtype).contiguous(memory_format=layout)
        x.requires_grad_()
        forward, backward = (flop / t / 1e9 for t in _forward_and_backward(layer, x, device, seconds / 2))
        both = 3 / (1 / forward + 2 / backward)  # the backward pass has twice the operations
        if both > best["both"]:
            rates = {"forward": forward, "backward": backward, "both": both}
            best |= {"layout": str(layout)[6:]} | {name: round(rate, 1) for name, rate in rates.items()}
    return best


def _forward_and_backward(layer: torch.nn.Module, x: Tensor, device: str, seconds: float) -> tuple[float, float]:
    """Seconds of the forward pass, and half the seconds of the backward pass, which has twice the operations."""
    output = layer(x)
    gradient = torch.randn_like(output)
    inputs = (x, *layer.parameters())
    backward = median_seconds(lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True), device, seconds)
    with torch.no_grad():
        forward = median_seconds(lambda: layer(x), device, seconds / 2)
    return forward, backward / 2


def median_seconds(call: Callable[[], object], device: str, seconds: float) -> float:
    """The median time of a call, over at least five."""

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):  # warm up
        call()
    synchronize()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return median(times)


if __name__ == "__main__":
    keep_memory()
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(measure_rates("cpu", DTYPES[sys.argv[1]])))
