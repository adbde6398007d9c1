"""The project against its peers: `make bench`, or `python benchmarks/bench.py [--only step,ema] [--quick]`.

The peers are diffusers' own classes and, with --diffusers_repo, its training script, with the same network, batch,
threads and precision: bf16 where the processor has instructions for it, else float32. Each time is the median over
rounds in which the peer and ours run in alternation. The ratio is how many times as fast ours is, with its 10 % and
90 % quantiles over the rounds. GFLOP/s are those of the network; beside them is what share that is of the rates that
the machine reaches in a matrix product and in a 3x3 convolution. Writes benchmarks/results/NAME.json, with processor
and versions. On an idle machine: another process changes some ratios by a factor of two.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project, so that `benchmarks` and `training` are found

from benchmarks import arithmetic, sampling, scripts  # noqa: E402
from benchmarks.common import RESULTS, ROOT, file_name, machine, minutes_since, write_json  # noqa: E402
from benchmarks.compare import Comparison, Measurement, three_digits  # noqa: E402
from benchmarks.peaks import measure_peaks  # noqa: E402

PARTS = ("step", "ema", "training", "sampling", "launch", "neighbour")
NEED_PEAKS = ("training", "sampling", "neighbour")
NEED_PEER = ("training", "launch")


def main() -> None:
    args = parse_args()
    started, hardware = time.monotonic(), machine()
    print(f"{hardware['processor']}, {hardware['cores']} cores, {hardware['threads']} threads, "
          + ", ".join([*hardware["flags"], *filter(None, [hardware["gpu"]])]))  # fmt: skip
    report = Report()
    precision = "bf16" if hardware["bf16"] else "no"
    if set(args.only) & set(NEED_PEAKS):
        report.peaks = measure_peaks(precision, hardware["threads"])
        print("{dtype}: matrix product {matrix_product:.0f} GFLOP/s, 3x3 convolution {convolution:.0f} GFLOP/s, memory "
              "{memory_gb_per_second:.1f} GB/s".format(**report.peaks), flush=True)  # fmt: skip
    if not hardware["bf16"]:
        report.notes.append("the processor has no bf16 instructions: both sides compute in float32")
    skipped = [part for part in args.only if part in NEED_PEER and args.diffusers_repo is None]
    if skipped:
        report.notes.append(f"skipped: {' and '.join(skipped)}: give --diffusers_repo PATH, or set DIFFUSERS_REPO")
    elif set(args.only) & set(NEED_PEER) and scripts.needs_stand_in():
        report.notes.append("torchvision is not installed: the peer's script uses the stand-in in benchmarks/stand_in")
    with tempfile.TemporaryDirectory() as folder:
        measure([part for part in PARTS if part in args.only and part not in skipped], args, precision, report, folder)
    for note in report.notes:
        print(note)

    name = args.name or file_name(f"{hardware['processor']} {hardware['cores']} cores")
    path = RESULTS / f"{name}{'-quick' if args.quick else ''}.json"
    minutes = minutes_since(started)
    write_json(path, {"machine": hardware, "minutes": minutes, "peaks": report.peaks, "notes": report.notes,
                      "results": report.results})  # fmt: skip
    print(f"{minutes} minutes; results: {path.relative_to(ROOT)}")


@dataclass
class Report:
    """What was measured so far. `peaks` are those of benchmarks/peaks.py; empty: not measured."""

    peaks: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, part: str, comparisons: Sequence[Comparison | Measurement]) -> None:
        for comparison in comparisons:
            result = with_shares({"part": part} | comparison.as_dict(), self.peaks)
            self.results.append(result)
            print(describe(result), flush=True)


def measure(parts: list[str], args: argparse.Namespace, precision: str, report: Report, folder: str) -> None:
    """Measure these parts, in this order. `folder` is empty, for everything that they write."""
    quick = args.quick
    both = None
    if {"training", "launch", "neighbour"} & set(parts):
        repo = None if args.diffusers_repo is None else Path(args.diffusers_repo).resolve()
        both = scripts.Scripts(repo, Path(folder) / "scripts")
    for part in parts:
        comparisons: Sequence[Comparison | Measurement]
        if part == "step":
            comparisons = arithmetic.step(0.2 if quick else 3.0)
        elif part == "ema":
            comparisons = arithmetic.ema(0.2 if quick else 3.0)
        elif part == "sampling":
            comparisons = sampling.sampling(
                Path(folder) / "pipelines", precision=precision, rounds=1 if quick else 5, quick=quick
            )
        else:
            assert both is not None
            if part == "training":
                comparisons = scripts.training(both, precision=precision, rounds=1 if quick else 5, quick=quick)
            elif part == "launch":
                comparisons = scripts.launch(both, precision=precision, rounds=1 if quick else 5)
            else:
                comparisons = scripts.neighbour(both, precision=precision, rounds=1 if quick else 3, quick=quick)
        report.add(part, comparisons)


def with_shares(result: dict[str, Any], peaks: dict[str, Any]) -> dict[str, Any]:
    """The result, with the share that each of its rates has of the measured ones, where operations were counted."""
    for who in ("peer", "ours"):
        gflops = result.get(f"{who}_gflops")
        if gflops is not None and peaks:
            result[f"{who}_share_of_matrix_product"] = three_digits(gflops / peaks["matrix_product"])
            result[f"{who}_share_of_convolution"] = three_digits(gflops / peaks["convolution"])
    wanted = result.get("target_share_of_convolution")
    if wanted is not None and "ours_share_of_convolution" in result:
        result["target_met"] = result["ours_share_of_convolution"] >= wanted
    return result


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
    """One line for a result."""
    line = f"{result['name']:55} "
    if "ratio" in result:
        low, high = result["ratio_quantiles_10_90"]
        line += (
            f"{result['peer_is']} {result['peer']:g} {result['unit']}, ours {result['ours']:g}: "
            f"{result['ratio']:.3g} times as fast ({low:.3g} to {high:.3g})"
        )
    else:
        line += f"ours {result['ours']:g} {result['unit']}"
    if "ours_gflops" in result:
        line += f", {result['ours_gflops']:g} GFLOP/s"
    if "ours_share_of_convolution" in result:
        line += (
            f" ({result['ours_share_of_matrix_product']:.0%} of the matrix product's, "
            f"{result['ours_share_of_convolution']:.0%} of the convolution's)"
        )
    target = result.get("target", result.get("target_share_of_convolution"))
    if target is not None and "target_met" in result:
        line += f", target {target:g}: {'met' if result['target_met'] else 'MISSED'}"
    return line


if __name__ == "__main__":
    main()
