"""Quality of images between two images: `python benchmarks/interpolation.py runs/moons/pipeline --output out/moons`

For moons the truth is known: it measures the distance of an interpolated image to the nearest true moon, and its lit
fraction. With --data it interpolates between images of any data set and measures the distance to the nearest image of
the set. With --data and --extractor it compares strips balanced in pixels and in features. Writes OUTPUT.json and
OUTPUT-*.png.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project, so that `benchmarks` and `training` are found

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.common import CACHE_DIR, FEATURES_DIR, machine, minutes_since, write_json  # noqa: E402
from ddpm_pipeline import DDPMPipeline, visualize  # noqa: E402
from ddpm_pipeline.features import extract_features, make_extractor  # noqa: E402
from ddpm_pipeline.interpolation import squared_pixel_distance  # noqa: E402
from ddpm_pipeline.moons import lit_fraction, phase_of, render  # noqa: E402
from ddpm_pipeline.pixels import from_pixels, to_pixels  # noqa: E402
from training.data.cache import load_images  # noqa: E402

SEEDS = list(range(16))
# Pairs of phases in degrees; 0 is the new moon, 180 the full moon. If both are waxing or both waning (one side), the
# moon halfway between them is obvious.
ONE_SIDE = [(90, 180), (45, 135), (45, 180), (60, 120), (30, 150), (90, 150), (180, 270), (225, 315), (210, 330)]
BOTH_SIDES = [(135, 225), (90, 270), (45, 315), (150, 300)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pipeline", help="folder of a saved pipeline, or a name on the Hub")
    parser.add_argument("--output", type=Path, required=True, help="path of the results, without .json")
    parser.add_argument("--data", help="local data set (parquet) or folder of images, instead of moons")
    parser.add_argument("--extractor", help="with --data: a .pt file or a model of transformers, for colour images")
    parser.add_argument("--background", default="white", help="behind transparent pixels of the data (%(default)s)")
    args = parser.parse_args()
    if args.extractor and not args.data:
        parser.error("--extractor needs --data")

    pipe: Any = DDPMPipeline.from_pretrained(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    started = time.monotonic()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.extractor:
        result = compare_balances(pipe, load_data(pipe, args.data, args.background), args.extractor, args.output)
    elif args.data:
        result = measure_data(pipe, load_data(pipe, args.data, args.background), args.output)
    else:
        result = measure_moons(pipe, args.output)
    result |= {"data": Path(args.data).name} if args.data else {}
    result |= {"minutes": minutes_since(started), "machine": machine()}
    write_json(args.output.with_suffix(".json"), result)
    print(json.dumps(result, indent=2))


# ---- Moons -----------------------------------------------------------------------------------------------------------


def measure_moons(pipe: Any, output: Path) -> dict[str, Any]:
    half, full = moon(90), moon(180)
    return {
        "inversion_error": inversion_error(pipe),
        "half_and_full_moon": compare_methods(pipe, half, full, output),
        "pairs": interpolate_pairs(pipe, output),
        "inpainting": inpaint(pipe, output),
    }


def moon(degrees: float) -> Tensor:
    return render(math.radians(degrees))[None]


def describe(images: Tensor) -> dict[str, float]:
    """Mean and standard deviation of the lit fraction, and mean squared distance to the nearest true moon."""
    match = phase_of(images.clamp(-1, 1))
    lit = lit_fraction(match.phase)
    return {
        "lit_fraction": round(lit.mean().item(), 4),
        "lit_fraction_std": round(lit.std(correction=0).item(), 4),
        "distance_to_nearest_moon": round(match.distance.mean().item(), 4),
    }


def inversion_error(pipe: Any) -> list[dict[str, Any]]:
    """Mean squared error after inversion and sampling in 50 steps each, of 32 moons with random phases."""
    x_0 = render(torch.rand(32, generator=torch.Generator().manual_seed(1)) * 2 * math.pi)
    results = []
    for iterations in (0, 1, 3):
        pipe.invert(x_0, 50, fixed_point_iterations=iterations)
        error = pipe.inversion_error
        mean, maximum = round(error.mean().item(), 6), round(error.max().item(), 6)
        results.append({"fixed_point_iterations": iterations, "mean": mean, "max": maximum})
    return results


def compare_methods(pipe: Any, a: Tensor, b: Tensor, output: Path) -> dict[str, Any]:
    """The image halfway between two moons by every method, with 16 seeds for methods that draw noise."""
    repeated = [x.expand(len(SEEDS), -1, -1, -1) for x in (a, b)]
    images = {"mean of the pixels": (a + b) / 2}
    for t in (200, 400, 600):
        options = {"timestep": t, "seeds": SEEDS, "output_type": "latent"}
        images[f"mean of two noised images at t = {t}"] = mix_noised_images(pipe, a, b, t, first_t=t)
        images[f"mean of two noised images at t = {t}, sampled from t - 1"] = mix_noised_images(
            pipe, a, b, t, first_t=t - 1
        )
        images[f'path="noise", t = {t}'] = pipe.fuse(*repeated, path="noise", **options).images
        images[f'path="noise", t = {t}, balance'] = pipe.fuse(*repeated, path="noise", balance=True, **options).images
    images['path="latent"'] = pipe.fuse(a, b, output_type="latent").images
    balanced = pipe.fuse(a, b, balance=True, output_type="latent")
    images['path="latent", balance'] = balanced.images
    visualize.grid(torch.cat([a, *(x[:1] for x in images.values()), b])).save(png(output, "methods"))
    methods = {name: describe(x) for name, x in images.items()}
    return {"methods": methods, "network_calls_with_balance": balanced.network_calls}


@torch.no_grad()
def mix_noised_images(pipe: Any, a: Tensor, b: Tensor, t: int, first_t: int) -> Tensor:
    """What other implementations do: noise both images independently, take the mean, and sample from first_t.

    The mean of two independent noises has a standard deviation of 0.71, where the network expects 1. Some
    implementations also start sampling one timestep late.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (len(SEEDS), *a.shape[1:])
    timestep = torch.tensor([t])
    noised = [
        pipe.scheduler.add_noise(x.expand(shape), torch.randn(shape, generator=generator), timestep) for x in (a, b)
    ]
    x_t = (noised[0] + noised[1]) / 2
    timesteps = list(range(first_t, -1, -10))
    pipe.scheduler.set_timesteps(timesteps=timesteps)
    for step_t in timesteps:
        x_t = pipe.scheduler.step(pipe.unet(x_t, step_t).sample, step_t, x_t, generator=generator).prev_sample
    return x_t


def interpolate_pairs(pipe: Any, output: Path) -> dict[str, Any]:
    """Distance-balanced interpolation between 13 pairs of moons, 9 images each."""
    all_pairs = ONE_SIDE + BOTH_SIDES
    a, b = (torch.cat([moon(pair[i]) for pair in all_pairs]) for i in (0, 1))
    weights = [i / 8 for i in range(9)]
    fused = pipe.fuse(a, b, weights, balance=True, output_type="latent")
    strips = fused.images.unflatten(0, (len(all_pairs), 9))
    visualize.grid(fused.images, columns=9).save(png(output, "strips"))
    results = []
    for pair, strip in zip(all_pairs, strips):
        match = phase_of(strip)
        phases = match.phase.rad2deg()
        steps = (phases[1:] - phases[:-1] + 180) % 360 - 180  # in the shorter direction
        lit = [lit_fraction(math.radians(degrees)) for degrees in pair]
        middle = describe(strip[4:5])
        results.append(
            {
                "phases_in_degrees": pair,
                "one_side": pair in ONE_SIDE,
                "endpoint_lit_fractions": [round(fraction, 3) for fraction in lit],
                "middle": {
                    "lit_fraction": middle["lit_fraction"],
                    "target_lit_fraction": round(sum(lit) / 2, 3),
                    "distance_to_nearest_moon": middle["distance_to_nearest_moon"],
                },
                "distance_of_pixel_mean": describe((strip[:1] + strip[8:]) / 2)["distance_to_nearest_moon"],
                "strip_phases_in_degrees": [round(phase) for phase in phases.tolist()],
                "monotone": bool((steps >= 0).all() or (steps <= 0).all()),
                "largest_distance": round(match.distance.max().item(), 4),
            }
        )
    return {"results": results, "network_calls": fused.network_calls, "num_images": len(fused.images)}


def inpaint(pipe: Any, output: Path) -> dict[str, Any]:
    """Inpaint half of each of 32 moons, and compare its phase with that of the known half.

    The masked half is the lower one, whose phase follows from the upper one; or the left or right one without the
    terminator, whose phase follows from the other one unless the terminator is at the edge of the mask or of the moon.
    """
    phases = torch.rand(32, generator=torch.Generator().manual_seed(2)) * 2 * math.pi
    x_0 = render(phases)
    lower = torch.zeros(32, 1, 32, 32, dtype=torch.bool)
    lower[..., 16:, :] = True
    no_terminator = torch.zeros_like(lower)
    for i, phase in enumerate(phases.tolist()):
        # Waxing moons are lit on the right: before the half moon their terminator is right of the centre.
        terminator_right = math.cos(phase) > 0 if phase < math.pi else math.cos(phase) < 0
        no_terminator[i, ..., :16] = terminator_right
        no_terminator[i, ..., 16:] = not terminator_right
    results = {}
    for name, file, mask in (
        ("lower half masked", "inpainted", lower),
        ("half without the terminator masked", "inpainted-no-terminator", no_terminator),
    ):
        images = pipe.inpaint(x_0, mask, seeds=range(32), output_type="latent").images
        error = (phase_of(images).phase - phases.double()) / (2 * math.pi)
        error = ((error + 0.5) % 1 - 0.5).abs()
        masked = torch.where(mask, torch.zeros(()), x_0)
        visualize.grid(torch.stack([x_0, masked, images], dim=1).flatten(0, 1), columns=12).save(png(output, file))
        results[name] = {
            "known_pixels_equal": torch.equal(torch.where(mask, x_0, images), x_0),
            "phase_within_0.05_turns": f"{int((error <= 0.05).sum())} of 32",
            "median_phase_error_in_turns": round(error.median().item(), 4),
            "distance_to_nearest_moon": describe(images)["distance_to_nearest_moon"],
        }
    return results


# ---- Any data --------------------------------------------------------------------------------------------------------


def measure_data(pipe: Any, images: Any, output: Path, num_pairs: int = 16) -> dict[str, Any]:
    """Distances from images halfway between two images of a data set to the nearest image of the set.

    In pixels a blurred image is closer to all others than a sharp one. Therefore distances are also measured in the
    features of a classifier that is trained on the data.
    """
    data_set = from_pixels(np.array(images.images))
    a, b = random_pairs(data_set, num_pairs)
    weights = [0.0, 0.25, 0.5, 0.75, 1.0]
    fused = pipe.fuse(a, b, weights, balance=True, output_type="latent")
    visualize.grid(fused.images, columns=len(weights)).save(png(output, "strips"))
    extractor = make_extractor("classifier", images=images.images, labels=images.labels(), cache_dir=FEATURES_DIR)
    data_features = extract_features(extractor, np.asarray(images.images), cache_dir=FEATURES_DIR)

    def nearest(x: Tensor, rank: int = 1) -> dict[str, float]:
        features = extract_features(extractor, to_pixels(x, images.images.dtype))
        pixel_distance = squared_distance(x, data_set, rank)
        feature_distance = squared_distance(features, data_features, rank)
        return {
            "pixels": round(pixel_distance.mean().item(), 4),
            extractor.name: round(feature_distance.mean().item(), 4),
        }

    return {
        "num_pairs": num_pairs,
        "distance_to_nearest_image": {
            "interpolated": nearest(fused.images[2::5]),
            "mean of the pixels": nearest((a + b) / 2),
            "real images, to another one": nearest(a, rank=2),
        },
        "distance_ratios_of_the_middle": [round(ratio, 3) for ratio in (fused.distance_ratios or [])[2::5]],
        "endpoint_error": round(squared_pixel_distance(fused.images[::5], a).mean().item(), 4),
        "network_calls": fused.network_calls,
    }


def compare_balances(pipe: Any, images: Any, which: str, output: Path, num_pairs: int = 4) -> dict[str, Any]:
    """Strips balanced in pixels, and in the features of an extractor, between the same pairs of images.

    The steps of a strip are the distances between neighbours. It is even in a space if its largest step there is
    hardly larger than the mean of its steps.
    """
    extractor = make_extractor(which)

    def feature_distance(x: Tensor, y: Tensor) -> Tensor:
        x, y = (image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image for image in (x, y))
        return extractor.squared_distance(x, y)

    a, b = random_pairs(from_pixels(np.array(images.images)), num_pairs)
    weights = [i / 6 for i in range(7)]
    distances = {"pixels": squared_pixel_distance, extractor.name: feature_distance}
    strips, results = [], {}
    for name, distance in distances.items():
        options = {"distance": distance, "num_inference_steps": 25, "output_type": "latent"}
        fused = pipe.fuse(a, b, weights, balance=True, **options)
        strip = fused.images.unflatten(0, (num_pairs, len(weights)))
        strips.append(strip)
        steps = {}
        for space, measure in distances.items():
            each = measure(strip[:, :-1].flatten(0, 1), strip[:, 1:].flatten(0, 1)).view(num_pairs, -1).sqrt()
            steps[space] = {
                "mean": [round(step, 4) for step in each.mean(dim=1).tolist()],
                "largest_over_mean": [round(ratio, 2) for ratio in (each.amax(dim=1) / each.mean(dim=1)).tolist()],
            }
        results[f"balanced in {name}"] = {
            "interpolation_weights": np.round(np.reshape(fused.weights, (num_pairs, -1)), 3).tolist(),
            "steps": steps,
            "double_exposures": sum(fused.double_exposures),
        }
    rows = torch.stack(strips, dim=1).flatten(0, 2)  # the two strips of a pair below each other
    visualize.grid(rows, columns=len(weights)).save(png(output, "balances"))
    return {"extractor": extractor.name, "results": results}


def load_data(pipe: Any, folder: str, background: str) -> Any:
    """The images of a parquet data set or a folder, at the size of the network."""
    options: dict[str, Any] = {"dataset_name" if any(Path(folder).rglob("*.parquet")) else "train_data_dir": folder}
    return load_images(
        **options, resolution=pipe.unet.config.sample_size, background=background, on_bad_image="skip",
        cache_dir=CACHE_DIR,
    )  # fmt: skip


def random_pairs(data_set: Tensor, num_pairs: int) -> tuple[Tensor, Tensor]:
    """Two batches of images."""
    chosen = torch.randperm(len(data_set), generator=torch.Generator().manual_seed(3))[: 2 * num_pairs]
    a, b = data_set[chosen].chunk(2)
    return a, b


def squared_distance(x: Tensor, data_set: Tensor, rank: int = 1) -> Tensor:
    """Mean squared difference to the nearest image of the data set, or to the rank-th nearest: (B,)."""
    return torch.cdist(x.flatten(1), data_set.flatten(1)).square().kthvalue(rank, dim=1).values / x[0].numel()


def png(output: Path, name: str) -> Path:
    return output.with_name(f"{output.name}-{name}.png")


if __name__ == "__main__":
    main()
