"""Everything worth knowing about a GPU in one go: `python benchmarks/gpu.py [--minutes 8] [--diffusers_repo PATH]`.

Runs the tests that need a GPU, measures its rates, profiles training steps, and times training and sampling, beside
diffusers' script and pipeline. Each part is a process with a time budget of its own: one that fails or takes too long
is recorded and costs the others nothing, and time that a part leaves goes to the later ones. Writes JSON after each
part. Without a GPU it does the same with the smallest network and batches, as a test of itself.

Exit code: 0 if all parts ended well, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project, so that `benchmarks` and `training` are found

import torch  # noqa: E402

from benchmarks import gpu_parts, scripts  # noqa: E402
from benchmarks.common import RESULTS, file_name, machine, minutes_since, write_json  # noqa: E402
from benchmarks.compare import three_digits  # noqa: E402

# Share of the time of each part, if all need theirs.
PARTS = {"roofline": 0.08, "tests": 0.17, "profile": 0.16, "training": 0.31, "peer_training": 0.13, "sampling": 0.15}


def main() -> int:
    args = parse_args()
    if args.job is not None:
        job = gpu_parts.Job(**json.loads(args.job))
        with open(job.rows, "a", encoding="utf-8") as file:
            for row in gpu_parts.PARTS[args.part](job):
                file.write(json.dumps(row) + "\n")
                file.flush()
        sys.stdout.flush()
        os._exit(0)  # threads of a script that was stopped after its last timed step might not end

    started, hardware = time.monotonic(), machine()
    deadline = started + 60 * args.minutes
    print(f"{hardware['gpu'] or hardware['processor']}, torch {hardware['versions']['torch']}", flush=True)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        gpu_parts.prepare(Path(folder))
        parts = [part for part in PARTS if part in args.only]
        for i, part in enumerate(parts):
            remaining = deadline - time.monotonic()
            seconds = remaining * PARTS[part] / sum(PARTS[later] for later in parts[i:])
            if part == "peer_training" and args.diffusers_repo is None:
                results[part] = {"seconds": 0.0, "error": None, "rows": [], "note": "give --diffusers_repo PATH"}
            elif seconds <= 0:
                results[part] = {"seconds": 0.0, "error": "no time left", "rows": []}
            else:
                results[part] = run_part(part, Path(folder), seconds, args.diffusers_repo)
            add_shares(results)
            for line in describe(part, results[part]):
                print(line, flush=True)
            minutes = minutes_since(started)
            write_json(args.output or RESULTS / f"{default_name(hardware)}.json",
                       {"machine": hardware, "minutes": minutes, "parts": results})  # fmt: skip
    print(f"{minutes_since(started)} minutes")
    return 1 if any(result["error"] for result in results.values()) else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Test, profile and time the project on a GPU.")
    parser.add_argument("--minutes", type=float, default=8, help="time for all parts together; default: %(default)s")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas; default: %(default)s")
    parser.add_argument(
        "--diffusers_repo",
        default=os.environ.get("DIFFUSERS_REPO"),
        help="checkout of diffusers' repository, for peer_training; default: the variable DIFFUSERS_REPO",
    )
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/gpu-NAME.json")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # with --job: do this part, in this process
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := [part for part in args.only if part not in PARTS]:
        parser.error(f"--only has {unknown[0]!r}: give some of {', '.join(PARTS)}")
    if not 0 < args.minutes <= 600:
        parser.error(f"--minutes is {args.minutes:g}: give a positive number, at most 600")
    if args.diffusers_repo is not None and args.job is None:
        try:
            scripts.peer_script(Path(args.diffusers_repo))
        except ValueError as error:
            parser.error(str(error))
    return args


def run_part(part: str, folder: Path, seconds: float, diffusers_repo: str | None) -> dict[str, Any]:
    """The rows of a part that runs in another process, those before its error included."""
    started = time.monotonic()
    rows = folder / f"{part}.jsonl"
    rows.touch()
    repo = None if diffusers_repo is None else str(Path(diffusers_repo).resolve())
    # It may end by itself in time: the last row could be a long one.
    job = gpu_parts.Job(folder=str(folder), rows=str(rows), seconds=0.85 * seconds, diffusers_repo=repo)
    environment = dict(os.environ, HF_HOME=str(folder / "hub"), HF_HUB_OFFLINE="1")
    if scripts.needs_stand_in():
        stand_in = str(Path(__file__).parent / "stand_in")
        environment["PYTHONPATH"] = os.pathsep.join([stand_in, os.environ.get("PYTHONPATH", "")])
    log = folder / f"{part}.log"
    error = None
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, __file__, "--part", part, "--job", json.dumps(asdict(job))]
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=file, stderr=file, start_new_session=True
        )
        try:
            if process.wait(seconds):
                error = f"ended with code {process.returncode}"
        except subprocess.TimeoutExpired:
            error = f"stopped after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
    if error:
        error += "\n" + "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    lines = rows.read_text(encoding="utf-8").splitlines()
    return {
        "seconds": round(time.monotonic() - started, 1),
        "error": error,
        "rows": [json.loads(line) for line in lines],
    }


def add_shares(results: dict[str, Any]) -> None:
    """Beside each rate in GFLOP/s its share of the measured rates, if they were measured."""
    rates = next(iter(results.get("roofline", {}).get("rows", [])), None)
    if rates is None:
        return
    for result in results.values():
        for row in result["rows"]:
            if "gflops" in row:
                for what in ("matrix_product", "convolution"):
                    row[f"share_of_{what}"] = three_digits(row["gflops"] / rates[what])


def describe(part: str, result: dict[str, Any]) -> list[str]:
    """Lines to print for a part: each row, with numbers and texts only, and the error."""
    lines = [f"-- {part}, {result['seconds']:g} s" + (f": {result['note']}" if "note" in result else "")]
    for row in result["rows"]:
        values = (
            f"{key} {value}" for key, value in row.items() if key != "name" and not isinstance(value, list | dict)
        )
        lines.append(f"{row['name']:40} " + ", ".join(values))
    return lines + ([f"ERROR: {result['error']}"] if result["error"] else [])


def default_name(hardware: dict[str, Any]) -> str:
    return "gpu-" + file_name(hardware["gpu"] if torch.cuda.is_available() else f"without-{hardware['processor']}")


if __name__ == "__main__":
    sys.exit(main())
