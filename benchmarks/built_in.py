"""The same weights, sampled by diffusers' own pipeline and by ours: `python benchmarks/built_in.py RUN --output FILE`

Both use the same seeds and the same numbers of steps. The built-in pipeline is measured with timestep_spacing
"leading", the default of its scheduler, and with the spacing that the model was saved with. Writes FILE.json, and
FILE.png with one row of samples per pipeline and number of steps. Samples are kept with those of training/evaluate.py
and reused.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project, so that `benchmarks` and `training` are found

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import DDPMPipeline as BuiltInDDPMPipeline  # noqa: E402
from diffusers import DDPMScheduler as BuiltInDDPMScheduler  # noqa: E402

from benchmarks.common import FEATURES_DIR, machine, write_json  # noqa: E402
from ddpm_pipeline import visualize  # noqa: E402
from ddpm_pipeline.features import make_extractor  # noqa: E402
from ddpm_pipeline.pixels import from_pixels  # noqa: E402
from training.evaluation import measures  # noqa: E402
from training.evaluation.config import EvalConfig  # noqa: E402
from training.evaluation.reference import choose_real_images, load_split  # noqa: E402
from training.evaluation.samples import Model, SamplerConfig, Shards, load_models, sample  # noqa: E402
from training.run.runtime import Runtime  # noqa: E402

METRICS = ("frechet", "kernel", "precision", "shift")
GRID_COLUMNS = 16


class BuiltIn:
    """diffusers' own pipeline, called like ours."""

    def __init__(self, model: Model, spacing: str) -> None:
        config = dict(model.pipe.scheduler.config) | {"timestep_spacing": spacing}
        self.pipe: Any = BuiltInDDPMPipeline(model.pipe.unet, BuiltInDDPMScheduler.from_config(config))

    def to(self, device: torch.device) -> BuiltIn:
        self.pipe.to(device)
        return self

    def set_progress_bar_config(self, **options: Any) -> None:
        self.pipe.set_progress_bar_config(**options)

    def __call__(self, seeds: list[int], num_inference_steps: int, **_: Any) -> tuple[torch.Tensor]:
        images = self.pipe(
            batch_size=len(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=num_inference_steps,
            output_type="np",
        ).images
        return (torch.from_numpy(2 * images - 1).permute(0, 3, 1, 2),)


def main() -> None:
    args = parse_args()
    runtime = Runtime("no", args.cpu_threads)
    config = EvalConfig(args.run, dataset_name=args.dataset_name)
    (ours,) = load_models(config.model, ["ema"])
    split = load_split(config, ours)
    real = choose_real_images(split, args.num_reference, args.num_samples)
    extractor = make_extractor(
        args.extractor, images=split.train_images, labels=split.train_labels(), cache_dir=FEATURES_DIR
    )
    saved_spacing = ours.pipe.scheduler.config.timestep_spacing
    models = {f"ours, {saved_spacing}": ours}
    for spacing in dict.fromkeys(("leading", saved_spacing)):
        built_in = ours._replace(pipe=BuiltIn(ours, spacing), weights=f"built-in-{spacing}")
        models[f"diffusers, {spacing}"] = built_in
    measurements: list[dict[str, Any]] = []
    grid_images = []
    for steps in map(int, args.num_inference_steps.split(",")):
        for name, model in models.items():
            sampler = SamplerConfig(steps, 1.0)
            shards = Shards(
                Path(args.run) / "evaluation", model, sampler, seed=0, precision="float32",
                shape=real.reference.shape[1:], pixel_dtype=real.reference.dtype,
            )  # fmt: skip
            sample(model, sampler, shards, args.num_samples, batch_size=64, runtime=runtime)
            samples = shards.load(args.num_samples)
            grid_images.append(samples[:GRID_COLUMNS])
            results = [
                *measures.compare_features(samples, real, extractor, METRICS, FEATURES_DIR),
                *measures.compare_channels(samples, real),
            ]
            measurements += [{"pipeline": name, "num_inference_steps": steps} | as_dict(result) for result in results]
            values = ", ".join(f"{result.name} {result.estimate.value:.4g}" for result in results)
            print(f"{steps} steps, {name}: {values}", flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    grid = visualize.grid(from_pixels(np.concatenate(grid_images)), columns=GRID_COLUMNS)
    grid.save(args.output.with_suffix(".png"))
    write_json(
        args.output.with_suffix(".json"),
        {
            "measurements": measurements,
            "warnings": [real.warning] if real.warning else [],
            "data": split.data.source,
            "reference": real.reference_description,
            "real_data_baseline": real.baseline_description,
            "machine": machine(),
        },
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument(
        "--num_samples", type=int, default=1024, help="for each pipeline and number of steps; default: %(default)s"
    )
    parser.add_argument("--num_inference_steps", default="10,50,100", help="separated by commas; default: %(default)s")
    parser.add_argument("--extractor", default="classifier", help="as for training/evaluate.py; default: %(default)s")
    parser.add_argument("--dataset_name", help="as for training/evaluate.py")
    parser.add_argument(
        "--num_reference",
        type=int,
        default=10_000,
        help="training images to compare with; 0: all; default: %(default)s",
    )
    parser.add_argument("--cpu_threads", type=int, help="default: all cores")
    parser.add_argument("--output", type=Path, required=True, help="path of the results, without .json")
    return parser.parse_args()


def as_dict(result: measures.Result) -> dict[str, Any]:
    """The fields of a result, with value and standard error on the top level, as in report.json."""
    fields = dataclasses.asdict(result)
    del fields["estimate"]
    return fields | result.estimate._asdict()


if __name__ == "__main__":
    main()
