"""How long 64 images take by optimizer and images of a step: `python benchmarks/optimizers.py --name NAME`.

Whole steps of `tiny` at 32 px, in turn, so that other load on the processor affects all alike. Prints the medians of
the ratios to one step of AdamW with 64 images, and writes benchmarks/results/optimizers-NAME.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.common import RESULTS, machine, write_json
from benchmarks.compare import seconds_per_call, three_digits
from benchmarks.families import Steps
from benchmarks.networks import make_network
from training import tune
from training.config import GLOBAL_BATCH
from training.run.runtime import Runtime

FAMILY, SIDE = "tiny", 32
OPTIMIZERS = ("adamw", "muon")
BATCHES = (16, 32, 64)
ONE = ("adamw", GLOBAL_BATCH)  # what the others are compared with


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of 64 images by optimizer and images of a step.")
    parser.add_argument("--rounds", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--cpu_threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--name", required=True, help="of the result")
    args = parser.parse_args()
    seconds = measure(args.rounds, Runtime("auto", args.cpu_threads))
    rows = []
    for (optimizer, batch), values in seconds.items():
        ratio = median(of / one for of, one in zip(values, seconds[ONE]))
        rows.append({"optimizer": optimizer, "batch": batch, "seconds": three_digits(median(values))})
        rows[-1]["ratio"] = three_digits(ratio)
        print("{optimizer}, {batch} images a step: {seconds} s, {ratio} times as long".format(**rows[-1]))
    path = RESULTS / f"optimizers-{args.name}.json"
    write_json(path, {"machine": machine(), "rounds": args.rounds, "rows": rows})
    print(f"result: {path}")


def measure(rounds: int, runtime: Runtime) -> dict[tuple[str, int], list[float]]:
    """Seconds of GLOBAL_BATCH images in each round, by optimizer and images of a step."""
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    for optimizer in OPTIMIZERS:
        unet = make_network(FAMILY, SIDE)
        tune.apply(tune.default_tuning(runtime.device.type, runtime.dtype), unet)
        steps = Steps(unet, SIDE, runtime, optimizer)
        calls |= {(optimizer, batch): partial(steps.take, batch) for batch in BATCHES}
    seconds: dict[tuple[str, int], list[float]] = {case: [] for case in calls}
    for i in range(rounds + 1):  # the first round warms up
        for case in calls if i % 2 else reversed(calls):
            number = GLOBAL_BATCH // case[1]
            seconds[case].append(number * seconds_per_call(calls[case], number))
    return {case: values[1:] for case, values in seconds.items()}


if __name__ == "__main__":
    main()
