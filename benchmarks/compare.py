"""Timing two implementations in alternation, so that other load on the processor affects both alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass
class Comparison:
    """Measurements of a peer and of ours, round by round: peer[i] and ours[i] were taken one after the other.

    Args:
        name: what was measured.
        unit: of a time, "us", "ms" or "s"; or of a rate, "images/s".
        target: smallest ratio that is good enough; None: no target.
        flop: floating-point operations of one image, for a rate, or of one call, for a time; None: not counted.
        peer_is: what ours is compared with.
    """

    name: str
    unit: str
    peer: list[float]
    ours: list[float]
    target: float | None = None
    flop: float | None = None
    peer_is: str = "peer"

    @property
    def ratios(self) -> list[float]:
        """How many times as fast ours is, in each round."""
        pairs = zip(self.peer, self.ours)
        return [ours / peer if self.unit == "images/s" else peer / ours for peer, ours in pairs]

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    def as_dict(self) -> dict[str, Any]:
        low, high = np.quantile(self.ratios, [0.1, 0.9])
        gflops = {}
        if self.flop is not None:
            gflops = {f"{who}_gflops": three_digits(self.gflops(getattr(self, who))) for who in ("peer", "ours")}
        return {
            "name": self.name,
            "unit": self.unit,
            "peer_is": self.peer_is,
            "peer": three_digits(median(self.peer)),
            "ours": three_digits(median(self.ours)),
            "ratio": three_digits(self.ratio),
            "ratio_quantiles_10_90": [three_digits(low), three_digits(high)],
            "rounds": len(self.peer),
            "target": self.target,
            "target_met": None if self.target is None else self.ratio >= self.target,
            **gflops,
        }

    def gflops(self, values: list[float]) -> float:
        """GFLOP/s at the median of these values."""
        assert self.flop is not None
        per_second = median(values) if self.unit == "images/s" else 1 / (median(values) * SECONDS[self.unit])
        return per_second * self.flop / 1e9


@dataclass
class Measurement:
    """Rates of ours alone, beside what the machine can do.

    Args:
        target: smallest share of the convolution rate that is good enough.
    """

    name: str
    unit: str
    ours: list[float]
    flop: float
    target: float

    def as_dict(self) -> dict[str, Any]:
        gflops = median(self.ours) * self.flop / 1e9
        return {
            "name": self.name,
            "unit": self.unit,
            "ours": three_digits(median(self.ours)),
            "rounds": len(self.ours),
            "target_share_of_convolution": self.target,
            "ours_gflops": three_digits(gflops),
        }


def alternate(
    name: str, peer: Callable[[], object], ours: Callable[[], object], *, seconds: float, target: float | None = None
) -> Comparison:
    """Call the peer and ours in alternation for about this many seconds. A round has many calls if they are short."""
    gc.collect()
    gc.disable()
    pair = (peer, ours)
    for call in pair:  # warm up
        seconds_per_call(call, 3)
    single = [seconds_per_call(call, 1) for call in pair]
    calls = [max(1, round(0.01 / max(duration, 1e-7))) for duration in single]  # at least 10 ms per round
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < 4 or time.perf_counter() < end:
        for i in (0, 1) if len(times[0]) % 2 else (1, 0):  # neither is always the first
            times[i].append(seconds_per_call(pair[i], calls[i]))
    gc.enable()
    unit, scale = ("us", 1e6) if median(times[0]) < 1e-3 else ("ms", 1e3)
    return Comparison(name, unit, [t * scale for t in times[0]], [t * scale for t in times[1]], target)


def seconds_per_call(call: Callable[[], object], calls: int) -> float:
    """The mean time of this many calls."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def three_digits(value: float) -> float:
    return float(f"{value:.3g}")
