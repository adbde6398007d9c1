"""Does a run that is killed and resumed end with the same weights? `python benchmarks/killed.py runs/mnist`

Repeats a finished run in a folder beside it, from its config.yaml: kills it (SIGKILL) at random steps, resumes it from
its newest checkpoint each time, and compares the last checkpoints of both runs. On the same hardware they are equal bit
for bit.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project, so that `benchmarks` and `training` are found

from benchmarks.common import ROOT, minutes_since, write_json  # noqa: E402
from training.run import checkpoint  # noqa: E402

PIPELINE_WEIGHTS = Path("pipeline", "unet", "diffusion_pytorch_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--kills", type=int, default=5, help="number of kills; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the random steps; default: %(default)s")
    parser.add_argument("--output", type=Path, help="JSON file; default: killed.json in the folder of the new run")
    args = parser.parse_args()

    finished, manifest = checkpoint.find(args.run, "latest")
    folder = args.run.with_name(args.run.name + "-killed")
    folder.mkdir()
    command = [sys.executable, str(ROOT / "training" / "train.py"), "--config", str(args.run / "config.yaml")]
    command += ["--output_dir", str(folder)]
    rng = random.Random(args.seed)
    killed_after, started = [], time.monotonic()
    for kill_step in sorted(rng.sample(range(1, manifest["step"]), args.kills)):
        with (folder / "log.txt").open("a") as log:
            run = subprocess.Popen([*command, *resume_flags(folder)], stdout=log, stderr=log)
        while run.poll() is None and last_logged_step(folder) < kill_step:
            time.sleep(0.2)
        time.sleep(rng.uniform(0, 5))  # metrics are logged every few steps: kill anywhere between two lines
        if run.poll() is not None:
            sys.exit(f"the run ended by itself with exit code {run.returncode}: see {folder / 'log.txt'}")
        run.kill()
        run.wait()
        killed_after.append(last_logged_step(folder))
        print(f"killed at or after step {killed_after[-1]}", flush=True)
    with (folder / "log.txt").open("a") as log:
        subprocess.run([*command, *resume_flags(folder)], stdout=log, stderr=log, check=True)

    killed, killed_manifest = checkpoint.find(folder, "latest")
    files, killed_files = manifest["files"], killed_manifest["files"]
    equal = {name: files[name] == killed_files[name] for name in files}
    equal["pipeline"] = (args.run / PIPELINE_WEIGHTS).read_bytes() == (folder / PIPELINE_WEIGHTS).read_bytes()
    result = {
        "step": manifest["step"],
        "killed_after_steps": killed_after,
        "minutes": minutes_since(started),
        "equal": equal,
        "sha256": files[checkpoint.WEIGHTS]["sha256"],
        "versions": manifest["versions"],
    }
    write_json(args.output or folder / "killed.json", result)
    print(json.dumps(result, indent=2))
    if finished.name != killed.name or not all(equal.values()):
        sys.exit("the two runs differ")


def last_logged_step(folder: Path) -> int:
    """The step of the last complete line of metrics.jsonl; 0 if there is none."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def resume_flags(folder: Path) -> list[str]:
    try:
        checkpoint.find(folder, "latest")
    except checkpoint.CheckpointError:
        return []
    return ["--resume_from_checkpoint", "latest"]


if __name__ == "__main__":
    main()
