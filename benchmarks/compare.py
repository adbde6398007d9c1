"""Time two things in turn, so that whatever else the machine does befalls both alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np


@dataclass
class Comparison:
    """What was measured, round by round: peer[i] and ours[i] were measured one after the other.

    Args:
        what: the thing measured, in words.
        unit: "us", "ms" and "s" are times; "images/s" is a rate.
        target: what the ratio shall be at least; None: it is only reported.
    """

    what: str
    unit: str
    peer: list[float]
    ours: list[float]
    target: float | None = None

    @property
    def ratios(self) -> list[float]:
        """How many times as fast ours was, in each round."""
        pairs = zip(self.peer, self.ours)
        return [ours / peer if self.unit == "images/s" else peer / ours for peer, ours in pairs]

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    def as_dict(self) -> dict[str, Any]:
        low, high = np.quantile(self.ratios, [0.1, 0.9])  # between these were 8 of 10 rounds
        return {
            "what": self.what,
            "unit": self.unit,
            "peer": round_off(median(self.peer)),
            "ours": round_off(median(self.ours)),
            "ratio": round_off(self.ratio),
            "spread": [round_off(low), round_off(high)],
            "rounds": len(self.peer),
            "target": self.target,
            "met": None if self.target is None else self.ratio >= self.target,
        }


def in_turn(
    what: str, peer: Callable[[], object], ours: Callable[[], object], *, seconds: float, target: float | None = None
) -> Comparison:
    """Call the peer and ours in turn for about so many seconds; short calls many times in each round."""
    gc.collect()
    gc.disable()
    pair = (peer, ours)
    for call in pair:
        duration(call, 3)
    once = [duration(call, 1) for call in pair]
    calls = [max(1, round(0.01 / max(took, 1e-7))) for took in once]  # a round of each is at least 10 ms
    times: tuple[list[float], list[float]] = ([], [])
    ends = time.perf_counter() + seconds
    while len(times[0]) < 4 or time.perf_counter() < ends:
        for i in (0, 1) if len(times[0]) % 2 else (1, 0):  # neither is always the first
            times[i].append(duration(pair[i], calls[i]))
    gc.enable()
    typical = median(times[0])
    unit, scale = ("us", 1e6) if typical < 1e-3 else ("ms", 1e3)
    return Comparison(what, unit, [t * scale for t in times[0]], [t * scale for t in times[1]], target)


def duration(call: Callable[[], object], calls: int) -> float:
    """Seconds for one call, on average over so many."""
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def round_off(value: float) -> float:
    return float(f"{value:.3g}")
