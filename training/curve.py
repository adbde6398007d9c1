"""Is a run on track? `python training/curve.py runs/mine --beside training/configs/mnist.curve.json`

Prints and plots the validation metrics of a run (`metrics.jsonl`), beside those of a published run of the same preset
at the same number of images seen. `--output FILE` writes the curve in the format of training/configs/*.curve.json.

Losses are comparable if data, resolution and prediction type are the same; bits per dimension and the kernel distance
if data and resolution are. Exit codes: 0 done; 2 a file is missing, damaged or cannot be written, or the run has not
validated yet.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict

if not __package__:  # run as a script: imports start at the project, not at training/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from training.run.record import read_json

# Shown metrics, by their names in metrics.jsonl.
METRICS = {"validation_loss": "held-out loss", "bits_per_dim": "bits per dimension", "kernel_distance": "distance"}
# Settings that are saved with a curve, since they decide which curves are comparable.
ABOUT = ("dataset_name", "train_data_dir", "resolution", "denoiser", "prediction_type", "train_batch_size",
         "max_train_steps", "num_validation_images", "validation_samples", "extractor")  # fmt: skip


class Curve(TypedDict):
    """The content of a *.curve.json: settings, and the metrics at each validation with "step" and "images"."""

    about: dict[str, Any]
    points: list[dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compare the validation metrics of a run with those of a published one.", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--beside", type=Path, help="published curve, such as training/configs/mnist.curve.json")
    parser.add_argument("--plot", type=Path, help="PNG file to write; default: curve.png in the folder of the run")
    parser.add_argument("--output", type=Path, help="JSON file to write the curve to")
    args = parser.parse_args(arguments)
    try:
        if find_spec("matplotlib") is None:
            raise ValueError('matplotlib is not installed: pip install -c constraints.txt -e ".[train,eval]"')
        curve = read_curve(args.run)
        published = read_published(args.beside) if args.beside else None
    except (OSError, ValueError) as error:
        print(f"curve.py: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(curve, published)))
    path = args.plot or args.run / "curve.png"
    try:
        plot({args.run.name: curve} | ({args.beside.stem: published} if published else {}), path)
        print(f"\nplot: {path}")
        if args.output:
            path = args.output
            path.write_text(to_json(curve), encoding="utf-8")
            print(f"curve: {path}")
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib cannot write
        print(f"curve.py: {path} cannot be written: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 2
    return 0


def read_curve(run: Path) -> Curve:
    """The validation metrics of a run, one point per validation.

    Raises:
        ValueError: it has not validated yet, or config.yaml is damaged.
        OSError: it has no metrics.jsonl or config.yaml.
    """
    import yaml

    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{run / 'config.yaml'} is damaged: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{run / 'config.yaml'} has no settings: it is not the folder of a run")
    points = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # an incomplete line, left by a run that was killed
            continue
        if isinstance(values, dict) and "validation_loss" in values:
            points.append(values)
    if not points:
        raise ValueError(
            f"{run / 'metrics.jsonl'} has no validation_loss: this run validates every "
            f"{config.get('validation_steps')} steps (--validation_steps)"
        )
    about = {name: config.get(name) for name in ABOUT}  # runs of earlier versions lack some
    for name in ("dataset_name", "train_data_dir"):
        about[name] = Path(str(about[name])).name if about[name] else None  # without the path on this machine
    return {"about": about, "points": points}


def read_published(file: Path) -> Curve:
    """A curve that `--output` has written.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    content = read_json(file)
    points = content.get("points")
    if "about" not in content or not isinstance(points, list) or not all(isinstance(p, dict) for p in points):
        raise ValueError(f"{file} is not a curve: give a file written with --output")
    return Curve(about=content["about"], points=points)


def table(curve: Curve, published: Curve | None) -> list[str]:
    """A line for each point, with the published value at the same number of images in brackets."""
    names = [name for name in METRICS if any(name in point for point in curve["points"])]
    lines = ["".join(f"{header:>24}" for header in ["images seen", *(METRICS[name] for name in names)])]
    for point in curve["points"]:
        cells = [f"{point['images']:,}"]
        for name in names:
            value = f"{point[name]:.4f}" if name in point else ""
            reference = interpolate(published, name, point["images"]) if published else None
            cells.append(value if reference is None else f"{value} ({reference:.4f})")
        lines.append("".join(f"{cell:>24}" for cell in cells))
    return lines


def interpolate(curve: Curve, name: str, images: float) -> float | None:
    """A metric at this number of images, linear between two points; None before the first and after the last."""
    import numpy as np

    points = [(point["images"], point[name]) for point in curve["points"] if name in point]
    if not points or not points[0][0] <= images <= points[-1][0]:
        return None
    images_seen, values = zip(*points)
    return float(np.interp(images, images_seen, values))


def plot(curves: dict[str, Curve], path: Path) -> None:
    """A panel for each metric, with all curves."""
    from matplotlib.figure import Figure

    names = [n for n in METRICS if any(n in point for curve in curves.values() for point in curve["points"])]
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for label, curve in curves.items():
            points = [point for point in curve["points"] if name in point]
            error = [point.get(f"{name}_standard_error", 0) for point in points]
            thousands = [point["images"] / 1000 for point in points]
            axes.errorbar(thousands, [point[name] for point in points], error, marker=".", label=label)
        axes.set(xlabel="images seen, thousands", ylabel=METRICS[name])
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def to_json(curve: Curve) -> str:
    """JSON with a line for each point and numbers to six significant digits."""
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
