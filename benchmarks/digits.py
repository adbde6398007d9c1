"""Are sampled digits digits? `python benchmarks/digits.py [RUN] --mnist FOLDER --output FILE`

Trains ddpm_pipeline's classifier on MNIST and measures its accuracy on the test images. With a RUN it also classifies
samples of that model: for which fraction is the classifier at least 90 % confident, and does the model draw all digits?
Judge by both: the classifier can be confident about noise too, but then it mostly predicts the same digit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project, so that `benchmarks` and `training` are found

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.common import CACHE_DIR, FEATURES_DIR, machine, write_json  # noqa: E402
from ddpm_pipeline import DDPMPipeline  # noqa: E402
from ddpm_pipeline.classifier import Classifier, train_classifier  # noqa: E402
from ddpm_pipeline.pixels import to_pixels  # noqa: E402
from training.data.cache import load_images  # noqa: E402

CONFIDENT = 0.9  # probability of the predicted class
BATCH_SIZE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, nargs="?", help="folder of a finished run; default: the classifier alone")
    parser.add_argument("--mnist", type=Path, required=True, help="folder of MNIST's parquet files")
    parser.add_argument("--num_samples", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="sample i has seed + i; default: %(default)s")
    parser.add_argument("--output", type=Path, help="JSON file; default: digits.json in the folder of the run")
    args = parser.parse_args()
    if args.output is None and args.run is None:
        parser.error("--output is missing: give it, or the folder of a run")

    train, test = (
        load_images(dataset_name=str(args.mnist), split=split, resolution=32, cache_dir=CACHE_DIR)
        for split in ("train", "test")
    )
    classifier = train_classifier(train.images, train.labels(), cache_dir=FEATURES_DIR)
    result: dict[str, Any] = {"classifier": measure_classifier(classifier, np.asarray(test.images), test.labels())}
    if args.run is not None:
        result["samples"] = classify_samples(classifier, args)
    result |= {"confident_from": CONFIDENT, "machine": machine()}
    write_json(args.output or args.run / "digits.json", result)
    print(json.dumps(result, indent=2))


def measure_classifier(classifier: Classifier, images: np.ndarray, labels: np.ndarray | None) -> dict[str, Any]:
    digits, confidence = classifier.predict(images)
    return {
        "name": classifier.name,
        "num_test_images": len(images),
        "test_accuracy": (digits == labels).mean().item(),
        "confident_test_fraction": (confidence >= CONFIDENT).mean().item(),
    }


def classify_samples(classifier: Classifier, args: argparse.Namespace) -> dict[str, Any]:
    pipe: Any = DDPMPipeline.from_pretrained(str(args.run / "pipeline"))
    pipe.set_progress_bar_config(leave=False)
    started = time.monotonic()
    samples: list[Tensor] = []
    end = args.seed + args.num_samples
    for first in range(args.seed, end, BATCH_SIZE):
        seeds = list(range(first, min(first + BATCH_SIZE, end)))
        steps = args.num_inference_steps
        samples += pipe(seeds=seeds, num_inference_steps=steps, output_type="latent", return_dict=False)
    seconds = time.monotonic() - started
    digits, confidence = classifier.predict(to_pixels(torch.cat(samples)))
    return {
        "num_samples": args.num_samples,
        "confident_fraction": (confidence >= CONFIDENT).mean().item(),
        "num_of_each_digit": np.bincount(digits, minlength=10).tolist(),
        "num_inference_steps": args.num_inference_steps,
        "seed": args.seed,
        "sampling_seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
