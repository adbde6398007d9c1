"""Is a run on track? `python training/curve.py runs/mine --beside training/configs/mnist.curve.json`

Prints what a run has measured of its held-out pictures (`metrics.jsonl`), beside a published run of the same preset at
the same number of images seen, and draws both. `--output FILE` writes the curve, as those in training/configs are.

Curves compare if the data, its size and the network are the same; bits per dimension and the distance also if only the
data are. Exit codes: 0 done; 2 there is nothing to show.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: imports start at the project, not at training/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

MEASURES = {"validation_loss": "held-out loss", "bits_per_dim": "bits per dimension", "kernel_distance": "distance"}
ABOUT = ("dataset_name", "train_data_dir", "resolution", "denoiser", "prediction_type", "train_batch_size",
         "max_train_steps", "num_validation_images", "validation_samples", "extractor")  # fmt: skip

Curve = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(description="Is a run on track?", allow_abbrev=False)
    made.add_argument("run", type=Path, help="folder of a run")
    made.add_argument("--beside", type=Path, help="a published curve, such as training/configs/mnist.curve.json")
    made.add_argument("--plot", type=Path, help="PNG file to draw; by default curve.png in the run's folder")
    made.add_argument("--output", type=Path, help="JSON file to write the curve to")
    given = made.parse_args(arguments)
    try:
        if find_spec("matplotlib") is None:
            raise ValueError('matplotlib is not installed: pip install -c constraints.txt -e ".[train,eval]"')
        curve = of_run(given.run)
        beside = json.loads(given.beside.read_text(encoding="utf-8")) if given.beside else None
        if beside is not None and "points" not in beside:
            raise ValueError(f"{given.beside} is no curve: give a file that --output has written")
    except (OSError, ValueError) as error:
        print(f"curve.py: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(curve, beside)))
    plot = given.plot or given.run / "curve.png"
    draw({given.run.name: curve} | ({given.beside.stem: beside} if beside else {}), plot)
    print(f"\ndrawn: {plot}")
    if given.output:
        given.output.write_text(as_json(curve), encoding="utf-8")
        print(f"written: {given.output}")
    return 0


def of_run(run: Path) -> Curve:
    """What a run has measured, point by point.

    Raises:
        ValueError: it has measured nothing.
        OSError: it has no metrics.jsonl or config.yaml.
    """
    import yaml

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    points = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # half a line, of a run that was killed
            continue
        if "validation_loss" in values:
            points.append(values)
    if not points:
        raise ValueError(
            f"{run / 'metrics.jsonl'} has no validation_loss: there is one every --validation_steps, in this run "
            f"{config['validation_steps']}"
        )
    kept = {name: config[name] for name in ABOUT}
    for name in ("dataset_name", "train_data_dir"):
        kept[name] = Path(kept[name]).name if kept[name] else None  # not where it lies on this machine
    return {"about": kept, "points": points}


def table(curve: Curve, beside: Curve | None) -> list[str]:
    """A line for each point; in brackets what the other run had at so many images."""
    names = [name for name in MEASURES if any(name in point for point in curve["points"])]
    lines = ["".join(f"{word:>24}" for word in ["images seen", *(MEASURES[name] for name in names)])]
    for point in curve["points"]:
        cells = [f"{point['images']:,}"]
        for name in names:
            value, other = point.get(name), beside and at(beside, name, point["images"])
            here, there = ("" if one is None else f"{one:.4f}" for one in (value, other))
            cells.append(f"{here} ({there})" if there else here)
        lines.append("".join(f"{cell:>24}" for cell in cells))
    return lines


def at(curve: Curve, name: str, images: float) -> float | None:
    """A measure after so many images, on the line between two points; None before the first and after the last."""
    import numpy as np

    points = [(point["images"], point[name]) for point in curve["points"] if name in point]
    if not points or not points[0][0] <= images <= points[-1][0]:
        return None
    seen, values = zip(*points)
    return float(np.interp(images, seen, values))


def draw(curves: dict[str, Curve], path: Path) -> None:
    """A plot for each measure, all curves in each."""
    from matplotlib.figure import Figure

    names = [n for n in MEASURES if any(n in point for curve in curves.values() for point in curve["points"])]
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for label, curve in curves.items():
            points = [point for point in curve["points"] if name in point]
            error = [point.get(f"{name}_standard_error", 0) for point in points]
            seen = [point["images"] / 1000 for point in points]
            axes.errorbar(seen, [point[name] for point in points], error, marker=".", label=label)
        axes.set(xlabel="images seen, thousands", ylabel=MEASURES[name])
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def as_json(curve: Curve) -> str:
    """One line for each point, numbers to six digits."""
    points = [
        json.dumps(
            {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in point.items()}
        )
        for point in curve["points"]
    ]
    about = json.dumps(curve["about"])
    return f'{{"about": {about},\n "points": [\n  ' + ",\n  ".join(points) + "\n]}\n"


if __name__ == "__main__":
    sys.exit(main())
