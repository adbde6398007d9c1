"""What lies between two pictures, measured. `python benchmarks/fusion.py runs/moons/pipeline --output out/moons`

With moons it can be said how good a picture between two is: how far it is from the nearest true moon, and which part
of it is lit. `--data` fuses pictures of any data set instead, and compares the distance to the nearest picture of it.
Writes NAME.json and NAME-*.png.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # the project, so that `ddpm_pipeline` is found

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.bench import machine  # noqa: E402
from ddpm_pipeline import DDPMPipeline, visualize  # noqa: E402
from ddpm_pipeline.fusion import squared_pixel_distance  # noqa: E402
from ddpm_pipeline.moons import lit_fraction, phase_of, render  # noqa: E402

SEEDS = list(range(16))
# Phases in degrees; 0 is the new moon, 180 the full one. On one side of both a pair has a middle that is plain to see.
ONE_SIDE = [(90, 180), (45, 135), (45, 180), (60, 120), (30, 150), (90, 150), (180, 270), (225, 315), (210, 330)]
BOTH_SIDES = [(135, 225), (90, 270), (45, 315), (150, 300)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pipeline", help="folder of a saved pipeline, or a name on the Hub")
    parser.add_argument("--output", type=Path, required=True, help="name of what is written, without .json")
    parser.add_argument("--data", help="a local data set (parquet) or folder of images, instead of moons")
    given = parser.parse_args()

    pipe = DDPMPipeline.from_pretrained(given.pipeline)
    pipe.set_progress_bar_config(disable=True)
    began = time.monotonic()
    result = of_data(pipe, given.data, given.output) if given.data else of_moons(pipe, given.output)
    result |= {"minutes": round((time.monotonic() - began) / 60, 1), "machine": machine()}
    given.output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


# ---- Moons -----------------------------------------------------------------------------------------------------------


def of_moons(pipe: Any, output: Path) -> dict[str, Any]:
    half, full = moon(90), moon(180)
    return {
        "round trip": round_trip(pipe),
        "half and full": recipes(pipe, half, full, output),
        "pairs": pairs(pipe, output),
        "inpaint": inpaint(pipe, output),
    }


def moon(degrees: float) -> Tensor:
    return render(math.radians(degrees))[None]


def read(images: Tensor) -> dict[str, float]:
    """Of moons: the lit part, its scatter, and the mean squared distance to the nearest true moon."""
    match = phase_of(images.clamp(-1, 1))
    lit = lit_fraction(match.phase)
    return {
        "lit": round(lit.mean().item(), 4),
        "std of lit": round(lit.std(correction=0).item(), 4),
        "distance": round(match.distance.mean().item(), 4),
    }


def round_trip(pipe: Any) -> dict[str, Any]:
    """Mean squared error of out and home at 50 steps, of 32 phases that are drawn at random."""
    x_0 = render(torch.rand(32, generator=torch.Generator().manual_seed(1)) * 2 * math.pi)
    found = {}
    for refinements in (0, 1, 3):
        pipe.invert(x_0, 50, refinements=refinements)
        error = pipe.inversion_error
        found[f"{refinements} refinements"] = {
            "mean": round(error.mean().item(), 6),
            "max": round(error.max().item(), 6),
        }
    return found


def recipes(pipe: Any, a: Tensor, b: Tensor, output: Path) -> dict[str, Any]:
    """Every way to the middle of two moons. Those with noise: the mean of 16 seeds."""
    many = [part.expand(len(SEEDS), -1, -1, -1) for part in (a, b)]
    drawn = {"mean of the pixels": (a + b) / 2}
    for t in (200, 400, 600):
        options = {"timestep": t, "seeds": SEEDS, "output_type": "latent"}
        drawn[f"two noises mixed at t = {t}"] = peers(pipe, a, b, t, late=0)
        drawn[f"two noises mixed at t = {t}, home from t - 1"] = peers(pipe, a, b, t, late=1)
        drawn[f'path="noise", t = {t}'] = pipe.fuse(*many, path="noise", **options).images
        balanced = pipe.fuse(*many, path="noise", balance=True, **options)
        drawn[f'path="noise", t = {t}, balance'] = balanced.images
    drawn['path="latent"'] = pipe.fuse(a, b, output_type="latent").images
    made = pipe.fuse(a, b, balance=True, output_type="latent")
    drawn['path="latent", balance'] = made.images
    visualize.grid(torch.cat([a, *(images[:1] for images in drawn.values()), b])).save(named(output, "recipes"))
    return {name: read(images) for name, images in drawn.items()} | {"network calls with balance": made.network_calls}


@torch.no_grad()
def peers(pipe: Any, a: Tensor, b: Tensor, t: int, late: int) -> Tensor:
    """What others do: both pictures get noises of their own, are mixed, and walk home from t, or one step late."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(SEEDS), *a.shape[1:])
    at = torch.tensor([t])
    noised = [pipe.scheduler.add_noise(x.expand(shape), torch.randn(shape, generator=generator), at) for x in (a, b)]
    steps = list(range(t - late, -1, -10))
    x_t = (noised[0] + noised[1]) / 2
    pipe.scheduler.set_timesteps(timesteps=steps)
    for step in steps:
        x_t = pipe.scheduler.step(pipe.unet(x_t, step).sample, step, x_t, generator=generator).prev_sample
    return x_t


def pairs(pipe: Any, output: Path) -> list[dict[str, Any]]:
    """The balanced middle of 13 pairs, and strips of 9."""
    both = ONE_SIDE + BOTH_SIDES
    a, b = (torch.cat([moon(pair[i]) for pair in both]) for i in (0, 1))
    weights = [i / 8 for i in range(9)]
    made = pipe.fuse(a, b, weights, balance=True, output_type="latent")
    strips = made.images.unflatten(0, (len(both), 9))
    visualize.grid(made.images, columns=9).save(named(output, "strips"))
    found = []
    for pair, strip in zip(both, strips):
        phases = phase_of(strip).phase.rad2deg()
        steps = (phases[1:] - phases[:-1] + 180) % 360 - 180  # the short way round
        ends = [lit_fraction(math.radians(degrees)) for degrees in pair]
        middle = read(strip[4:5])
        found.append(
            {
                "degrees": pair,
                "one side": pair in ONE_SIDE,
                "lit of the ends": [round(end, 3) for end in ends],
                "middle": {"lit": middle["lit"], "wanted": round(sum(ends) / 2, 3), "distance": middle["distance"]},
                "mean of the pixels": read((strip[:1] + strip[8:]) / 2)["distance"],
                "phases of the strip": [round(phase) for phase in phases.tolist()],
                "monotone": bool((steps >= 0).all() or (steps <= 0).all()),
                "largest distance": round(phase_of(strip).distance.max().item(), 4),
            }
        )
    return [*found, {"network calls": made.network_calls, "pictures": len(made.images)}]


def inpaint(pipe: Any, output: Path) -> dict[str, Any]:
    """Half of a moon hidden. Of the lower half the upper one says the phase; of a left or right half the other one may
    say little: it is the one with the terminator, but that may lie at the edge of the mask, or of the moon.
    """
    phases = torch.rand(32, generator=torch.Generator().manual_seed(2)) * 2 * math.pi
    x_0 = render(phases)
    lower = torch.zeros(32, 1, 32, 32, dtype=torch.bool)
    lower[..., 16:, :] = True
    beside = torch.zeros_like(lower)
    for i, phase in enumerate(phases.tolist()):
        # Waxing moons are lit on the right: their terminator is right of the middle before the half moon.
        right = math.cos(phase) > 0 if phase < math.pi else math.cos(phase) < 0
        beside[i, ..., :16] = right
        beside[i, ..., 16:] = not right
    found = {}
    for name, file, mask in (
        ("lower half", "inpainted", lower),
        ("the half without the terminator", "inpainted-beside", beside),
    ):
        made = pipe.inpaint(x_0, mask, seeds=range(32), output_type="latent").images
        off = (phase_of(made).phase - phases.double()) / (2 * math.pi)
        off = ((off + 0.5) % 1 - 0.5).abs()
        shown = torch.where(mask, torch.zeros(()), x_0)
        sheet = torch.stack([x_0, shown, made], dim=1).flatten(0, 1)
        visualize.grid(sheet, columns=12).save(named(output, file))
        found[f"{name} hidden"] = {
            "known pixels equal": torch.equal(torch.where(mask, x_0, made), x_0),
            "phase within 0.05 of a turn": f"{int((off <= 0.05).sum())} of 32",
            "median of the error in turns": round(off.median().item(), 4),
            "distance": read(made)["distance"],
        }
    return found


# ---- Any data --------------------------------------------------------------------------------------------------------


def of_data(pipe: Any, data: str, output: Path, number: int = 16) -> dict[str, Any]:
    """The middle of pairs of pictures of a data set, and how near it is to a picture of the set.

    In pixels a blurred picture is nearer to all others than a sharp one. So it is also measured in what a classifier,
    which is trained on the data, sees in a picture.
    """
    from ddpm_pipeline.features import extract_features, make_extractor
    from ddpm_pipeline.pixels import to_pixels
    from training.data.cache import load_images

    size = pipe.unet.config.sample_size
    folder = Path(data)
    name = "dataset_name" if any(folder.rglob("*.parquet")) else "train_data_dir"
    cache = Path("~/.cache/ddpm_pipeline").expanduser()
    images = load_images(**{name: data}, resolution=size, on_bad_image="skip", cache_dir=cache)  # type: ignore[arg-type]
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(3))[: 2 * number]
    every = torch.from_numpy(np.array(images.images)).float() / 127.5 - 1
    a, b = every[chosen].chunk(2)
    weights = [0.0, 0.25, 0.5, 0.75, 1.0]
    made = pipe.fuse(a, b, weights, balance=True, output_type="latent")
    visualize.grid(made.images, columns=len(weights)).save(named(output, "strips"))
    extractor = make_extractor("classifier", images=images.images, labels=images.labels(), cache_dir=cache)
    seen = extract_features(extractor, np.asarray(images.images), cache_dir=cache)

    def nearest(x: Tensor, rank: int = 1) -> dict[str, float]:
        features = extract_features(extractor, to_pixels(x, images.images.dtype))
        in_pixels, in_features = distance_to(x, every, rank), distance_to(features, seen, rank)
        return {"pixels": round(in_pixels.mean().item(), 4), extractor.name: round(in_features.mean().item(), 4)}

    return {
        "data": folder.name,
        "pairs": number,
        "distance to the nearest picture": {
            "fused": nearest(made.images[2::5]),
            "mean of the pixels": nearest((a + b) / 2),
            "true pictures (to another)": nearest(a, rank=2),
        },
        "shares of the middle": [round(share, 3) for share in (made.shares or [])[2::5]],
        "error of the ends": round(squared_pixel_distance(made.images[::5], a).mean().item(), 4),
        "network calls": made.network_calls,
    }


def distance_to(x: Tensor, every: Tensor, rank: int = 1) -> Tensor:
    """Mean squared difference to the nearest of all, or to the second: (B,)."""
    return torch.cdist(x.flatten(1), every.flatten(1)).square().kthvalue(rank, dim=1).values / x[0].numel()


def named(output: Path, what: str) -> Path:
    return output.with_name(f"{output.name}-{what}.png")


if __name__ == "__main__":
    main()
