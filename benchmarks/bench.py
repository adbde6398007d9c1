"""The project beside its peers: `make bench`, or `python benchmarks/bench.py [--only step,ema] [--quick]`.

Peers are diffusers' own classes and, where a checkout of its repository is given, its training script. Each number is
the median over rounds in which the peer and ours took turns; the ratio says how many times as fast ours was, with the
range that 8 of 10 rounds were in. All goes to benchmarks/results/NAME.json, with the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project, so that `benchmarks` and `training` are found

import torch  # noqa: E402

from benchmarks import arithmetic, scripts  # noqa: E402
from benchmarks.compare import Comparison  # noqa: E402
from training.run.runtime import commit  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("step", "ema", "training", "launch")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the project beside its peers.")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}, with commas between")
    parser.add_argument("--quick", action="store_true", help="a look at each part; the numbers are rough")
    parser.add_argument(
        "--diffusers_repo",
        default=os.environ.get("DIFFUSERS_REPO"),
        help="checkout of diffusers' repository, for training and launch; or set DIFFUSERS_REPO",
    )
    parser.add_argument("--name", help="of the file in benchmarks/results; by default from the processor")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := [part for part in wanted if part not in PARTS]:
        parser.error(f"--only has {unknown[0]!r}: give some of {', '.join(PARTS)}")

    began, about = time.monotonic(), machine()
    print(f"{about['processor']}, {about['cores']} cores, {about['threads']} threads, {', '.join(about['flags'])}"
          + (f", {about['gpu']}" if about["gpu"] else ""))  # fmt: skip
    seconds = 0.2 if options.quick else 3.0
    results: list[dict[str, Any]] = []
    notes: list[str] = []

    def report(part: str, comparisons: list[Comparison]) -> None:
        for comparison in comparisons:
            row = {"part": part} | comparison.as_dict()
            results.append(row)
            print(line(row), flush=True)

    if "step" in wanted:
        report("step", arithmetic.step(seconds))
    if "ema" in wanted:
        report("ema", arithmetic.ema(seconds))
    if launched := [part for part in wanted if part in ("training", "launch")]:
        if options.diffusers_repo is None:
            notes.append(f"skipped: {' and '.join(launched)}, which need --diffusers_repo PATH or DIFFUSERS_REPO")
        else:
            if scripts.needs_stand_in():
                notes.append(
                    "torchvision is not installed: the peer's script ran with the stand-in in benchmarks/stand_in"
                )
            if not about["bf16"]:
                notes.append(
                    "this machine does not multiply bf16 in hardware, so ours trained in float32, where nearly all the "
                    "time of both goes into convolutions"
                )
            with tempfile.TemporaryDirectory() as folder:
                both = scripts.Scripts(Path(options.diffusers_repo).resolve(), Path(folder))
                if "training" in launched:
                    rounds = 1 if options.quick else 3
                    seconds, rounds_bf16 = 3 if options.quick else 12, rounds if about["bf16"] else 1
                    report("training", scripts.training(both, seconds=seconds, rounds=rounds, rounds_bf16=rounds_bf16))
                if "launch" in launched:
                    report("launch", scripts.launch(both, rounds=1 if options.quick else 4))
    for note in notes:
        print(note)

    name = options.name or re.sub(r"[^a-z0-9]+", "-", f"{about['processor']} {about['cores']} cores".lower()).strip("-")
    path = ROOT / "benchmarks" / "results" / f"{name}{'-quick' if options.quick else ''}.json"
    path.parent.mkdir(exist_ok=True)
    content = {
        "machine": about,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "notes": notes,
        "results": results,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{content['minutes']} minutes; written to {path.relative_to(ROOT)}")


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    found = dict(re.findall(r"^(model name|flags)\s*: (.*)$", text, re.MULTILINE))
    flags = found.get("flags", "").split()
    return {
        "processor": found.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "bf16": torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "diffusers", "accelerate", "datasets", "numpy")},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
    }


def line(row: dict[str, Any]) -> str:
    low, high = row["spread"]
    target = "" if row["target"] is None else f", target {row['target']:g}: {'met' if row['met'] else 'MISSED'}"
    return (
        f"{row['what']:50} peer {row['peer']:>6g} {row['unit']}, ours {row['ours']:>6g}: "
        f"{row['ratio']:.3g} times ({low:.3g} to {high:.3g}){target}"
    )


if __name__ == "__main__":
    main()
