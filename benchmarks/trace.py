"""What a trace of torch.profiler says about a training step: kernels by time, idle GPU time, waits of the host."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

# Calls in which the host waits for the GPU. A copy to pageable memory waits too.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
ITEM = "aten::_local_scalar_dense"  # what .item() calls, also on a CPU
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
TOP = 15  # kernels to name


def analyse(file: Path, name: str, num_steps: int) -> dict[str, Any]:
    """Times and counts per step.

    Args:
        file: the trace in Chrome's format.
        name: of the record_function around the steps.
        num_steps: how many steps that were.
    """
    events = [event for event in json.loads(file.read_text(encoding="utf-8"))["traceEvents"] if event.get("ph") == "X"]
    (begin, end) = next(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["name"] == name and event.get("cat") == "user_annotation"
    )
    # The GPU was idle at the beginning, so all of its work in the trace is of these steps; the last ends after `end`.
    on_gpu = [event for event in events if event.get("cat") in ON_GPU and event["ts"] >= begin]
    in_steps = [event for event in events if begin <= event["ts"] <= end]
    counts = Counter(event["name"] for event in in_steps)
    to_host = Counter(event["name"] for event in on_gpu if event["cat"] == "gpu_memcpy" and "DtoH" in event["name"])
    result: dict[str, Any] = {
        "milliseconds": round((end - begin) / 1e3 / num_steps, 3),
        "waits_of_the_host": sum(counts[wait] for wait in WAITS) / num_steps,
        "items": counts[ITEM] / num_steps,
        "copies_to_host": sum(to_host.values()) / num_steps,
        "launches": sum(count for call, count in counts.items() if call.startswith(("cudaLaunch", "cuLaunch")))
        / num_steps,
        "waits_by_name": {wait: counts[wait] for wait in WAITS if counts[wait]} | dict(to_host),
    }
    if on_gpu:
        first, last = (f(event["ts"] + event["dur"] * late for event in on_gpu) for f, late in ((min, 0), (max, 1)))
        busy = union([(event["ts"], event["ts"] + event["dur"]) for event in on_gpu])
        result |= {
            "milliseconds_on_gpu": round((last - first) / 1e3 / num_steps, 3),
            "share_in_gaps": round(1 - busy / (last - first), 4),
        }
    shown = on_gpu or own_times([event for event in in_steps if event.get("cat") == "cpu_op"])
    times, calls = Counter[str](), Counter[str]()
    for event in shown:
        times[event["name"]] += event["dur"]
        calls[event["name"]] += 1
    total = sum(times.values())
    result["kernels"] = [
        {
            "name": kernel[:120],
            "milliseconds": round(dur / 1e3 / num_steps, 4),
            "share": round(dur / total, 4),
            "calls": calls[kernel] / num_steps,
        }
        for kernel, dur in times.most_common(TOP)
    ]
    return result


def union(intervals: list[tuple[float, float]]) -> float:
    """The time that these intervals cover together."""
    covered, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered


def own_times(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same events, each with the time that none of those inside it has, on its thread."""
    result = []
    stacks: dict[Any, list[dict[str, Any]]] = {}
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        stack = stacks.setdefault(event.get("tid"), [])
        while stack and stack[-1]["end"] <= event["ts"]:
            stack.pop()
        if stack:
            stack[-1]["dur"] -= event["dur"]
        own = {"name": event["name"], "dur": event["dur"], "end": event["ts"] + event["dur"]}
        stack.append(own)
        result.append(own)
    return result
