"""Are sampled digits digits? `python benchmarks/digits.py runs/mnist --mnist FOLDER`

Trains a small classifier on MNIST, tests it, and asks it about digits sampled from a trained model: of how many of them
is it at least 90% sure, and does the model draw all ten? Prints the figures and writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project, so that `training` is found

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from ddpm_pipeline import DDPMPipeline  # noqa: E402
from training.data.cache import load_images  # noqa: E402


def classifier() -> nn.Module:
    """About 0.2 M parameters, for 32 x 32 pixels in [-1, 1]."""
    blocks = []
    for channels_in, channels_out in ((1, 32), (32, 64), (64, 64)):
        blocks += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU()]
        blocks += [nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 10))


def labels(folder: Path, split: str) -> Tensor:
    from datasets import load_dataset

    return torch.tensor(load_dataset(str(folder), split=split)["label"])


def pixels(folder: Path, split: str, cache_dir: str) -> Tensor:
    data = load_images(
        dataset_name=str(folder), split=split, resolution=32, cache_dir=Path(cache_dir).expanduser(), num_workers=0
    )
    return torch.from_numpy(np.array(data.images))


def scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--mnist", type=Path, required=True, help="folder of MNIST's parquet files")
    parser.add_argument("--num_samples", type=int, default=256)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first sample; sample i has seed + i")
    parser.add_argument("--cache_dir", default="~/.cache/ddpm_pipeline")
    parser.add_argument("--output", type=Path, help="JSON file; by default digits.json in the run's folder")
    given = parser.parse_args()

    torch.manual_seed(given.seed)
    images, answers = pixels(given.mnist, "train", given.cache_dir), labels(given.mnist, "train")
    network = classifier()
    steps = given.epochs * len(images) // 128
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(images), (128,))
        loss = nn.functional.cross_entropy(network(scaled(images[chosen])), answers[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"classifier, step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    network.eval()
    test_images, test_answers = pixels(given.mnist, "test", given.cache_dir), labels(given.mnist, "test")
    with torch.no_grad():
        sure = torch.cat([network(scaled(part)).softmax(1) for part in test_images.split(500)])
    accuracy = (sure.argmax(1) == test_answers).float().mean().item()

    pipe = DDPMPipeline.from_pretrained(str(given.run / "pipeline"))
    started = time.monotonic()
    samples: list[Tensor] = []
    for start in range(0, given.num_samples, 64):
        seeds = list(range(given.seed + start, given.seed + min(start + 64, given.num_samples)))
        steps = given.num_inference_steps
        samples += pipe(seeds=seeds, num_inference_steps=steps, output_type="latent", return_dict=False)
    drawn = torch.cat(samples).clamp(-1, 1)
    with torch.no_grad():
        sure_of_samples = network(drawn).softmax(1)
    counts = sure_of_samples.argmax(1).bincount(minlength=10).tolist()
    figures = {
        "classifier_accuracy_on_test": accuracy,
        "test_images_at_least_90_percent_sure": (sure.max(1).values >= 0.9).float().mean().item(),
        "samples": given.num_samples,
        "samples_at_least_90_percent_sure": (sure_of_samples.max(1).values >= 0.9).float().mean().item(),
        "samples_of_each_digit": counts,
        "num_inference_steps": given.num_inference_steps,
        "seconds_of_sampling": time.monotonic() - started,
    }
    print(json.dumps(figures, indent=2))
    (given.output or given.run / "digits.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
