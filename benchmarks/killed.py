"""Does a run that is killed end with the same weights? `python benchmarks/killed.py runs/mnist`

Repeats a finished run in a folder beside it, from its config.yaml, kills it without warning after random steps, lets it
go on from its latest checkpoint each time, and compares the last checkpoints of the two. Same machine: same result.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # the project, so that `training` is found

from training.run import checkpoint  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the steps after which it is killed")
    parser.add_argument("--output", type=Path, help="JSON file; by default killed.json in the folder of the new run")
    given = parser.parse_args()

    alone, manifest = checkpoint.find(given.run, "latest")
    folder = given.run.with_name(given.run.name + "-killed")
    folder.mkdir()
    command = [sys.executable, str(ROOT / "training" / "train.py"), "--config", str(given.run / "config.yaml")]
    command += ["--output_dir", str(folder)]
    when = random.Random(given.seed)
    steps_at_kill, started = [], time.monotonic()
    for wanted in sorted(when.sample(range(1, manifest["step"]), given.kills)):
        with (folder / "log.txt").open("a") as log:
            run = subprocess.Popen([*command, *resume(folder)], stdout=log, stderr=log)
        while run.poll() is None and last_step(folder) < wanted:
            time.sleep(0.2)
        time.sleep(when.uniform(0, 5))  # a line of metrics is of every so many steps: anywhere between two
        if run.poll() is not None:
            sys.exit(f"it ended by itself, with {run.returncode}: see {folder / 'log.txt'}")
        run.kill()
        run.wait()
        steps_at_kill.append(last_step(folder))
        print(f"killed after step {steps_at_kill[-1]} or later", flush=True)
    with (folder / "log.txt").open("a") as log:
        subprocess.run([*command, *resume(folder)], stdout=log, stderr=log, check=True)

    killed, other = checkpoint.find(folder, "latest")
    weights = Path("pipeline", "unet", "diffusion_pytorch_model.safetensors")
    result = {
        "step": manifest["step"],
        "killed_after_steps": steps_at_kill,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "equal": {name: manifest["files"][name] == other["files"][name] for name in manifest["files"]}
        | {"pipeline": (given.run / weights).read_bytes() == (folder / weights).read_bytes()},
        "sha256": manifest["files"][checkpoint.WEIGHTS]["sha256"],
        "versions": manifest["versions"],
    }
    (given.output or folder / "killed.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    if alone.name != killed.name or not all(result["equal"].values()):
        sys.exit("the two runs differ")


def last_step(folder: Path) -> int:
    """The step of the last line of metrics.jsonl that is whole."""
    metrics = folder / "metrics.jsonl"
    told = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    return max((json.loads(line)["step"] for line in told if line.endswith("\n")), default=0)


def resume(folder: Path) -> list[str]:
    try:
        checkpoint.find(folder, "latest")
    except checkpoint.CheckpointError:
        return []
    return ["--resume_from_checkpoint", "latest"]


if __name__ == "__main__":
    main()
