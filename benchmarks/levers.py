"""What helps training: one change at a time, at equal images or minutes. `python benchmarks/levers.py DATA...`

    python benchmarks/levers.py mnist=FOLDER cifar10=FOLDER --max_train_images 32000 --levers "base,adamw,hold"

For each data set, lever and seed a run of train.py with the network `tiny`, at 32 pixels, in --output_dir. Of its EMA
weights: Frechet and kernel distance of samples from the training images, with 25 calls of DPM-Solver++ 2M, the same
seeds for all; and, of data with a test split, the error of x_0_pred on 512 of its images with the weight of v, whatever
the network predicts, and their bits per dimension.
What is measured is kept in benchmarks/results/levers-NAME.json, so the same command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks.common import CACHE_DIR, FEATURES_DIR, RESULTS, ROOT, data_option, machine, minutes_since, write_json
from ddpm_pipeline import DDPMScheduler
from ddpm_pipeline.features import make_extractor
from ddpm_pipeline.pixels import to_pixels
from training.calibration.compare import Samples, draw
from training.calibration.settings import KARRAS, TRAILING, Setting, make_plan
from training.denoiser import make_denoiser, network_of
from training.evaluation.config import EvalConfig
from training.evaluation.measures import compare_features
from training.evaluation.reference import choose_real_images, load_split
from training.evaluation.samples import load_models
from training.run.runtime import Runtime
from training.run.validation import Validation

LEVERS: dict[str, list[str]] = {
    "base": [],
    "uniform": ["--timestep_sampling", "uniform"],
    "stratified": ["--timestep_sampling", "stratified"],
    "logit-normal": ["--timestep_sampling", "logit_normal"],
    "importance": ["--timestep_sampling", "importance"],
    "nearest of 8 noises": ["--noise_candidates", "8"],
    "input perturbation 0.1": ["--input_perturbation", "0.1"],
    "x_0": ["--prediction_type", "sample"],
    "x_0 with the weight of v": ["--prediction_type", "sample", "--loss_weighting", "v_prediction"],
    **{
        name: ["--loss_weighting", name]
        for name in ("sample", "epsilon", "min_snr", "soft_min_snr", "edm", "sigmoid", "bound")
    },
    "batch 8": ["--train_batch_size", "8"],
    "batch 16": ["--train_batch_size", "16"],
    "batch 32": ["--train_batch_size", "32"],
    "batch 64": ["--train_batch_size", "64"],
    "lr 5e-4": ["--learning_rate", "5e-4"],
    "lr 1e-3": ["--learning_rate", "1e-3"],
    "lr 2e-3": ["--learning_rate", "2e-3"],
    "lr 4e-3": ["--learning_rate", "4e-3"],
    "constant lr": ["--lr_scheduler", "constant"],
    "hold": ["--lr_scheduler", "hold"],
    "adamw": ["--optimizer", "adamw"],
    "dropout 0.1": ["--dropout", "0.1"],
    "learned variance": ["--variance_type", "learned_range"],
    "EMA 0.99": ["--ema_max_decay", "0.99"],
    "EMA 0.999": ["--ema_max_decay", "0.999"],
}
# What UNet2DModel offers at as many operations.
NETWORKS: dict[str, dict[str, Any]] = {
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "heads of 16": {"attention_head_dim": 16},
    "skip scaling": {"mid_block_scale_factor": 2**0.5},
}
SIDE, CALLS = 32, 25
SOLVER = Setting("DPM-Solver++ 2M, Karras", "DPMSolverMultistepScheduler", {**TRAILING, **KARRAS})
SEED = 2**26  # of the samples
NUM_REFERENCE, NUM_VALIDATION = 10_000, 512
MEASURES = ("frechet_distance", "kernel_distance", "held_out_error", "bits_per_dim")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="+", help="NAME=FOLDER of a data set laid out as on the Hub, or of images")
    known = ", ".join([*LEVERS, *NETWORKS])
    parser.add_argument(
        "--levers", default="base", help=f"separated by commas, several at once joined by +, of: {known}"
    )
    parser.add_argument("--seeds", default="0,1,2", help="of the runs; default: %(default)s")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--max_train_images", type=int)
    length.add_argument("--max_train_minutes", type=float)
    parser.add_argument("--num_samples", type=int, default=1024)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "levers")
    parser.add_argument("--cpu_threads", type=int, help="of each run")
    parser.add_argument("--name", required=True, help="of the result")
    args = parser.parse_args()
    data = dict(each.split("=", 1) for each in args.data)
    levers = [" + ".join(parts_of(lever)) for lever in args.levers.split(",")]
    seeds = [int(seed) for seed in args.seeds.split(",")]
    if unknown := [part for lever in levers for part in parts_of(lever) if part not in LEVERS | NETWORKS]:
        parser.error(f"levers has {unknown[0]!r}: give some of {known}")
    if args.max_train_images:
        length_options = ["--max_train_images", str(args.max_train_images)]
    else:
        length_options = ["--max_train_minutes", str(args.max_train_minutes)]
    path = RESULTS / f"levers-{args.name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    for seed in seeds:  # so that each lever has one seed before any has two
        for name, folder in data.items():
            for lever in levers:
                key = {"data": name, "lever": lever, "seed": seed, "length": length_options[1], "of": length_options[0]}
                if any(key.items() <= row.items() for row in rows):
                    continue
                run = args.output_dir / f"{name}-{lever}-{length_options[1]}-{seed}".replace(" ", "_")
                train(run, folder, [*length_options, "--seed", str(seed), *options_of(lever, run)], args.cpu_threads)
                rows.append(key | measure(run, args.num_samples, args.cpu_threads))
                write_json(path, {"machine": machine(), "rows": rows})
                print(json.dumps(rows[-1]), flush=True)
    print(*lines_of(rows), f"result: {path}", sep="\n")


def parts_of(lever: str) -> list[str]:
    return [part.strip() for part in lever.split("+")]


def options_of(lever: str, run: Path) -> list[str]:
    """Of train.py; the network is a file beside the run."""
    options, changes = list[str](), dict[str, Any]()
    for part in parts_of(lever):
        options += LEVERS.get(part, [])
        changes |= NETWORKS.get(part, {})
    if not changes:
        return ["--denoiser", "tiny", *options]
    tiny = make_denoiser("tiny", height=SIDE, width=SIDE, in_channels=1)
    folder = run.with_name(f"{run.name}-network")
    write_json(folder / "config.json", {"_class_name": "UNet2DModel", **network_of(tiny), **changes})
    return ["--denoiser", str(folder / "config.json"), *options]


def train(run: Path, folder: str, options: Sequence[str], cpu_threads: int | None) -> None:
    """A run to its end, in its folder; one that is there already is continued."""
    source = [f"--{data_option(folder)}", folder]
    command = [sys.executable, str(ROOT / "training" / "train.py"), *source, "--output_dir", str(run)]
    command += ["--resolution", str(SIDE), "--resume_from_checkpoint", "auto", "--save_images_steps", "0"]
    command += ["--validation_steps", "0", "--num_sample_images", "1", "--ddpm_num_inference_steps", "1"]
    command += ["--on_bad_image", "skip", *options]
    command += [] if cpu_threads is None else ["--cpu_threads", str(cpu_threads)]
    run.mkdir(parents=True, exist_ok=True)
    with (run / "log.txt").open("a", encoding="utf-8") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True)


def measure(run: Path, num_samples: int, cpu_threads: int | None) -> dict[str, Any]:
    """Distances with standard errors, the held-out error, and what the run took."""
    started = time.monotonic()
    runtime = Runtime("no", cpu_threads)
    (model,) = load_models(str(run), ["ema"])
    assert model.record is not None
    config = EvalConfig(model=str(run), cache_dir=str(CACHE_DIR))
    split = load_split(config, model)
    extractor = make_extractor(
        "classifier", images=split.train_images, labels=split.train_labels(), cache_dir=FEATURES_DIR
    )
    plan = make_plan(SOLVER, model.pipe.scheduler, CALLS)
    samples = draw(model.pipe, plan.scheduler, plan.call, Samples(num_samples, SEED), runtime)
    real = choose_real_images(split, NUM_REFERENCE, num_samples)
    pixels = to_pixels(samples, real.reference.dtype)
    results = compare_features(pixels, real, extractor, ("frechet", "kernel"), FEATURES_DIR)
    found: dict[str, Any] = {}
    for each in results:
        found |= {each.measure: list(each.estimate), f"{each.measure}, real images": each.real_data_baseline}
    record = model.record
    if len(split.held_out):
        found |= measure_held_out(model.pipe, split.held_out, runtime)
    return found | {
        "steps": record.step,
        "images": record.step * record.global_batch,
        "minutes": round(record.seconds / 60, 2),
        "minutes to measure": minutes_since(started),
    }


def measure_held_out(pipe: Any, held_out: Any, runtime: Runtime) -> dict[str, Any]:
    """Mean of |v - v_pred|^2 over timesteps and held-out images, of what the network's predictions are as v; bits."""
    scheduler: Any = DDPMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")

    def network(x_t: Any, t: Any) -> Any:
        prediction, *variance = pipe.unet(x_t, t, return_dict=False)[0].split(x_t.shape[1], dim=1)
        v_pred = scheduler.convert_prediction(prediction, t, x_t, pipe.scheduler.prediction_type, "v_prediction")
        return torch.cat([v_pred, *variance], dim=1)

    metrics, _ = Validation(held_out, NUM_VALIDATION, scheduler, device=runtime.device).measure(network)
    bits = [metrics["bits_per_dim"], metrics["bits_per_dim_standard_error"]]
    return {"held_out_error": metrics["validation_loss"], "bits_per_dim": bits}


def lines_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table in Markdown: means over the seeds, with the standard error of each mean of several.

    The ratio is that of the kernel distances above the real-data baseline.
    """
    lines = [
        "| data | length | lever | seeds | images | Frechet | kernel | held-out error | bits | above real, ratio |"
    ]
    lines.append("|---" * 10 + "|")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["length"], row["lever"]), []).append(row)
    for (data, length, lever), group in groups.items():
        cells = [_mean([_value(row[name]) for row in group if row.get(name) is not None]) for name in MEASURES]
        base = groups.get((data, length, "base"))
        ratio = f"{_above_real(group) / _above_real(base):.2f}" if base else ""
        images = f"{statistics.mean(row['images'] for row in group):,.0f}"
        lines.append(f"| {data} | {length} | {lever} | {len(group)} | {images} | {' | '.join(cells)} | {ratio} |")
    return lines


def _value(of: Any) -> float:
    return float(of[0] if isinstance(of, list) else of)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.4g}"
    return mean if len(values) < 2 else f"{mean} &plusmn; {statistics.stdev(values) / math.sqrt(len(values)):.2g}"


def _above_real(group: Sequence[dict[str, Any]]) -> float:
    """Kernel distance above that of real images."""
    return statistics.mean(_value(row["kernel_distance"]) - row["kernel_distance, real images"] for row in group)


if __name__ == "__main__":
    main()
