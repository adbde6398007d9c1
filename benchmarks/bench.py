"""The project against its peers: `make bench`, or `python benchmarks/bench.py [--only step,ema] [--quick]`.

The peers are diffusers' own classes and, with --diffusers_repo, its training script. Each time is the median over
rounds in which the peer and ours run in alternation. The ratio is how many times as fast ours is, with its 10 % and
90 % quantiles over the rounds. Writes benchmarks/results/NAME.json, with processor and versions.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project, so that `benchmarks` and `training` are found

from benchmarks import arithmetic, scripts  # noqa: E402
from benchmarks.common import RESULTS, ROOT, machine, minutes_since, write_json  # noqa: E402
from benchmarks.compare import Comparison  # noqa: E402

PARTS = ("step", "ema", "training", "launch")


def main() -> None:
    args = parse_args()
    started, hardware = time.monotonic(), machine()
    print(f"{hardware['processor']}, {hardware['cores']} cores, {hardware['threads']} threads, "
          + ", ".join([*hardware["flags"], *filter(None, [hardware["gpu"]])]))  # fmt: skip
    seconds = 0.2 if args.quick else 3.0
    results: list[dict[str, Any]] = []
    notes: list[str] = []

    def add(part: str, comparisons: list[Comparison]) -> None:
        for comparison in comparisons:
            results.append({"part": part} | comparison.as_dict())
            print(describe(results[-1]), flush=True)

    if "step" in args.only:
        add("step", arithmetic.step(seconds))
    if "ema" in args.only:
        add("ema", arithmetic.ema(seconds))
    launched = [part for part in args.only if part in ("training", "launch")]
    if launched and args.diffusers_repo is None:
        notes.append(f"skipped: {' and '.join(launched)}: give --diffusers_repo PATH, or set DIFFUSERS_REPO")
    elif launched:
        if scripts.needs_stand_in():
            notes.append("torchvision is not installed: the peer's script uses the stand-in in benchmarks/stand_in")
        if not hardware["bf16"]:
            notes.append(
                "the processor has no bf16 instructions: our script trains in float32, where convolutions take nearly "
                "all the time of both scripts"
            )
        with tempfile.TemporaryDirectory() as folder:
            both = scripts.Scripts(Path(args.diffusers_repo).resolve(), Path(folder))
            if "training" in launched:
                rounds = 1 if args.quick else 3
                rounds_bf16 = rounds if hardware["bf16"] else 1
                duration = 3 if args.quick else 12
                add("training", scripts.training(both, seconds=duration, rounds=rounds, rounds_bf16=rounds_bf16))
            if "launch" in launched:
                add("launch", scripts.launch(both, rounds=1 if args.quick else 4))
    for note in notes:
        print(note)

    processor = f"{hardware['processor']} {hardware['cores']} cores"
    name = args.name or re.sub(r"[^a-z0-9]+", "-", processor.lower()).strip("-")
    path = RESULTS / f"{name}{'-quick' if args.quick else ''}.json"
    minutes = minutes_since(started)
    write_json(path, {"machine": hardware, "minutes": minutes, "notes": notes, "results": results})
    print(f"{minutes} minutes; results: {path.relative_to(ROOT)}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the speed of the project against its peers.")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a short run of each part, with rough results")
    parser.add_argument(
        "--diffusers_repo",
        default=os.environ.get("DIFFUSERS_REPO"),
        help="checkout of diffusers' repository, for training and launch; default: the variable DIFFUSERS_REPO",
    )
    parser.add_argument("--name", help="name of the file in benchmarks/results; default: the processor's name")
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := [part for part in args.only if part not in PARTS]:
        parser.error(f"--only has {unknown[0]!r}: give some of {', '.join(PARTS)}")
    return args


def describe(result: dict[str, Any]) -> str:
    low, high = result["ratio_quantiles_10_90"]
    target = ""
    if result["target"] is not None:
        target = f", target {result['target']:g}: {'met' if result['target_met'] else 'MISSED'}"
    return (
        f"{result['name']:50} peer {result['peer']:>6g} {result['unit']}, ours {result['ours']:>6g}: "
        f"{result['ratio']:.3g} times as fast ({low:.3g} to {high:.3g}){target}"
    )


if __name__ == "__main__":
    main()
