"""The same weights sampled by diffusers' own pipeline and by ours: `python benchmarks/built_in.py RUN --output FILE`

Same seeds, same numbers of steps. The built-in pipeline walks with the scheduler's default spacing, "leading", which
is what a configuration without our choices has, and as the model was saved. Writes a JSON file and a sheet of pictures,
a row for each pipeline. Samples are kept with those of training/evaluate.py and not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project, so that `benchmarks` and `training` are found

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import DDPMPipeline as BuiltInDDPMPipeline  # noqa: E402
from diffusers import DDPMScheduler as BuiltInDDPMScheduler  # noqa: E402

from benchmarks.bench import machine  # noqa: E402
from ddpm_pipeline import visualize  # noqa: E402
from ddpm_pipeline.features import make_extractor  # noqa: E402
from ddpm_pipeline.pixels import from_pixels  # noqa: E402
from training import evaluate  # noqa: E402
from training.evaluation import measures  # noqa: E402
from training.evaluation.samples import Model, Setting, Shards, load_models, sample  # noqa: E402
from training.run.runtime import start  # noqa: E402

METRICS = ("frechet", "kernel", "precision", "shift")


class BuiltIn:
    """diffusers' own pipeline, called as ours is."""

    def __init__(self, model: Model, spacing: str) -> None:
        config = dict(model.pipe.scheduler.config) | {"timestep_spacing": spacing}
        self.pipe: Any = BuiltInDDPMPipeline(model.pipe.unet, BuiltInDDPMScheduler.from_config(config))

    def to(self, device: Any) -> BuiltIn:
        self.pipe.to(device)
        return self

    def set_progress_bar_config(self, **options: Any) -> None:
        self.pipe.set_progress_bar_config(**options)

    def __call__(self, seeds: list[int], num_inference_steps: int, **_: Any) -> tuple[torch.Tensor]:
        drawn = self.pipe(
            batch_size=len(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=num_inference_steps,
            output_type="np",
        ).images
        return (torch.from_numpy(2 * drawn - 1).permute(0, 3, 1, 2),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="folder of a run that has ended")
    parser.add_argument("--num_samples", type=int, default=1024)
    parser.add_argument("--num_inference_steps", default="10,50,100")
    parser.add_argument("--extractor", default="classifier")
    parser.add_argument("--dataset_name", help="as for training/evaluate.py")
    parser.add_argument("--num_reference", type=int, default=10_000)
    parser.add_argument("--cpu_threads", type=int)
    parser.add_argument("--output", type=Path, required=True, help="name of what is written, without .json")
    given = parser.parse_args()

    processes = start("no", given.cpu_threads)
    options = ["--dataset_name", given.dataset_name] if given.dataset_name else []
    wanted = evaluate.parser().parse_args([given.run, *options])
    (ours,) = load_models(given.run, ["ema"])
    parts = evaluate.load_pictures(wanted, ours)
    cache_dir = wanted.cache_dir.expanduser() / "features"
    warnings: list[str] = []
    real = measures.real_pictures(parts, given.num_reference, given.num_samples, warnings)
    extractor = make_extractor(given.extractor, images=parts.training, labels=parts.labels(), cache_dir=cache_dir)
    saved = ours.pipe.scheduler.config.timestep_spacing
    models = {f"ours, {saved}": ours}
    for spacing in dict.fromkeys(("leading", saved)):
        models[f"diffusers' own, {spacing}"] = ours._replace(pipe=BuiltIn(ours, spacing), weights=f"built-in-{spacing}")
    rows: list[dict[str, Any]] = []
    shown = []
    for steps in map(int, given.num_inference_steps.split(",")):
        for name, model in models.items():
            setting = Setting(steps, 1.0)
            shards = Shards(Path(given.run) / "evaluation", model, setting, 0, "float32")
            sample(model, setting, shards, given.num_samples, pixel_type=real.reference.dtype, batch_size=64,
                   processes=processes)  # fmt: skip
            pixels = shards.load(given.num_samples)
            shown.append(pixels[:16])
            found = [*measures.compare(pixels, real, extractor, METRICS, cache_dir), *measures.shifts(pixels, real)]
            for row in found:
                rows.append({"pipeline": name, "num_inference_steps": steps} | row)
            print(
                f"{steps} steps, {name}: " + ", ".join(f"{row['name']} {row['value']:.4g}" for row in found), flush=True
            )
    given.output.parent.mkdir(parents=True, exist_ok=True)
    visualize.grid(from_pixels(np.concatenate(shown)), columns=16).save(given.output.with_suffix(".png"))
    result = {"rows": rows, "warnings": warnings, "data": parts.data.source, "reference": real.reference_words,
              "floor": real.floor_words, "machine": machine()}  # fmt: skip
    given.output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
