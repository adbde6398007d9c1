"""`step`, `add_noise` and the moving average beside diffusers' own, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from diffusers.schedulers import scheduling_ddpm as built_in
from diffusers.training_utils import EMAModel

from benchmarks.compare import Comparison, in_turn
from ddpm_pipeline.scheduling_ddpm import DDPMScheduler
from training.denoiser import make_denoiser
from training.ema import FlatEMA

SHAPES = ((1, 3, 32, 32), (64, 3, 32, 32), (64, 3, 256, 256))


def step(seconds: float, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Comparison]:
    return [comparison for shape in shapes for comparison in step_at(shape, seconds)]


def step_at(shape: tuple[int, ...], seconds: float) -> list[Comparison]:
    size = "x".join(map(str, shape))
    generator = torch.Generator().manual_seed(0)
    x, output, noise = (torch.randn(shape, generator=generator) for _ in range(3))
    steps = torch.randint(0, 1000, shape[:1], generator=generator)
    # Any: `step` gives a tuple or an object with fields, says its annotation, and here it is the object.
    peer: Any = built_in.DDPMScheduler()
    ours: Any = DDPMScheduler()
    for scheduler in (peer, ours):
        scheduler.set_timesteps(50)
    t = peer.timesteps[25]
    with patch.object(built_in, "randn_tensor", lambda *_args, **_kwargs: noise):
        same(peer.step(output, t, x).prev_sample, ours.step(output, t, x, variance_noise=noise).prev_sample)
        without = in_turn(
            f"step {size}, without random numbers",
            lambda: peer.step(output, t, x),
            lambda: ours.step(output, t, x, variance_noise=noise),
            seconds=seconds,
            target=5.0 if shape == SHAPES[1] else None,
        )
    with_them = in_turn(
        f"step {size}, with them",
        lambda: peer.step(output, t, x, generator=generator),
        lambda: ours.step(output, t, x, generator=generator),
        seconds=seconds,
    )
    same(peer.add_noise(x, noise, steps), ours.add_noise(x, noise, steps))
    out = in_turn(
        f"add_noise {size}",
        lambda: peer.add_noise(x, noise, steps),
        lambda: ours.add_noise(x, noise, steps),
        seconds=seconds,
    )
    return [without, with_them, out]


def ema(seconds: float) -> list[Comparison]:
    return [ema_beside(foreach, seconds) for foreach in (False, True)]


def ema_beside(foreach: bool, seconds: float) -> Comparison:
    for_peer, for_ours = (make_denoiser("small", height=32, width=32, in_channels=3) for _ in range(2))
    peer = EMAModel(for_peer.parameters(), use_ema_warmup=True, foreach=foreach)
    ours = FlatEMA(for_ours)
    return in_turn(
        f"moving average, EMAModel with foreach={foreach}",
        lambda: peer.step(for_peer.parameters()),
        lambda: ours.update(1000),
        seconds=seconds,
        target=None if foreach else 3.0,  # False is the default, and what the peer's script has
    )


def same(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """Times are worth comparing only if both do the same. Their tables are float32, ours are float64."""
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
