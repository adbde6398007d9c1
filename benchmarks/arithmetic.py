"""`step`, `add_noise` and the EMA update, against those of diffusers, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from diffusers.schedulers import scheduling_ddpm as built_in
from diffusers.training_utils import EMAModel

from benchmarks.compare import Comparison, alternate
from benchmarks.networks import HEADS_OF_8, make_network
from ddpm_pipeline.scheduling_ddpm import DDPMScheduler
from training.ema import FlatEMA

SHAPES = ((1, 3, 32, 32), (64, 3, 32, 32), (64, 3, 256, 256))


def step(seconds: float, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Comparison]:
    return [comparison for shape in shapes for comparison in step_with_shape(shape, seconds)]


def step_with_shape(shape: tuple[int, ...], seconds: float) -> list[Comparison]:
    size = "x".join(map(str, shape))
    generator = torch.Generator().manual_seed(0)
    x, output, noise = (torch.randn(shape, generator=generator) for _ in range(3))
    timesteps = torch.randint(0, 1000, shape[:1], generator=generator)
    # Any: by its annotation, `step` may return a tuple; here it returns an object with fields.
    peer: Any = built_in.DDPMScheduler()
    ours: Any = DDPMScheduler()
    for scheduler in (peer, ours):
        scheduler.set_timesteps(50)
    t = peer.timesteps[25]
    with patch.object(built_in, "randn_tensor", lambda *_args, **_kwargs: noise):
        assert_close(peer.step(output, t, x).prev_sample, ours.step(output, t, x, variance_noise=noise).prev_sample)
        without_rng = alternate(
            f"step {size}, without random numbers",
            lambda: peer.step(output, t, x),
            lambda: ours.step(output, t, x, variance_noise=noise),
            seconds=seconds,
            target=5.0 if shape == SHAPES[1] else None,
        )
    with_rng = alternate(
        f"step {size}, with random numbers",
        lambda: peer.step(output, t, x, generator=generator),
        lambda: ours.step(output, t, x, generator=generator),
        seconds=seconds,
    )
    assert_close(peer.add_noise(x, noise, timesteps), ours.add_noise(x, noise, timesteps))
    add_noise = alternate(
        f"add_noise {size}",
        lambda: peer.add_noise(x, noise, timesteps),
        lambda: ours.add_noise(x, noise, timesteps),
        seconds=seconds,
    )
    return [without_rng, with_rng, add_noise]


def ema(seconds: float) -> list[Comparison]:
    return [ema_update(foreach, seconds) for foreach in (False, True)]


def ema_update(foreach: bool, seconds: float) -> Comparison:
    peer_network, our_network = (make_network(HEADS_OF_8) for _ in range(2))
    peer = EMAModel(peer_network.parameters(), use_ema_warmup=True, foreach=foreach)
    ours = FlatEMA(our_network)
    return alternate(
        f"EMA update, EMAModel with foreach={foreach}",
        lambda: peer.step(peer_network.parameters()),
        lambda: ours.update(1000),
        seconds=seconds,
        target=None if foreach else 3.0,  # False is the default, and what diffusers' training script uses
    )


def assert_close(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """Times are comparable only if the results are equal, up to rounding: their tables are float32, ours float64."""
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
