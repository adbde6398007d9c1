"""The pipeline's methods on the command line: `python -m ddpm_pipeline COMMAND MODEL ...`, pictures in and out.

Exit codes: 0 done; 2 a mistake in the command, the model or the pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    import torch


ANIMATED = (".gif", ".webp")


def parser() -> argparse.ArgumentParser:
    description = "Pictures from a trained DDPM, and what lies between pictures."
    made = argparse.ArgumentParser(prog="python -m ddpm_pipeline", description=description, allow_abbrev=False)
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, does: str, pictures: str | int | None = None, seeds: bool = True) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=does, description=does, allow_abbrev=False)
        one.add_argument("model", help='folder of a saved pipeline, or a name on the Hub, "user/model"')
        if pictures is not None:
            one.add_argument("images", type=Path, nargs=pictures, metavar="IMAGE", help="file, of the model's size")
        one.add_argument(
            "--output",
            "-o",
            type=Path,
            default=Path(f"{name}.png"),
            help="file to write (%(default)s): one picture as it is, several as an enlarged sheet",
        )
        one.add_argument("--num_inference_steps", type=int, default=None, help="steps of a walk home; 50 by default")
        one.add_argument("--revision", help="of a model on the Hub: a tag, branch or commit")
        one.add_argument("--class_label", type=int, help="for a model with classes")
        one.add_argument("--device", help="cpu, cuda, ...; by default an accelerator if there is one")
        if seeds:
            one.add_argument("--seeds", type=int, nargs="+", help="one for each picture that is drawn; 0 by default")
            one.add_argument("--eta", type=float, help="0 walks without noise, 1 (the default) as DDPM does")
        return one

    command("generate", "new pictures, one for each seed")
    one = command("invert", "out into the noise and home: what becomes of the pictures", pictures="+", seeds=False)
    one.add_argument("--refinements", type=int, default=0, help="of each step out (%(default)s)")
    one.add_argument("--latents", type=Path, help="write their places in the noise too, a .npy file (B, C, H, W)")
    one = command("fuse", "the pictures between two pictures", pictures=2)
    which = one.add_mutually_exclusive_group()
    which.add_argument("--weight", type=float, nargs="+", default=[0.5], help="0: the first, 1: the second (0.5)")
    which.add_argument("--strip", type=int, metavar="N", help="N pictures with weights from 0 to 1")
    one.add_argument(
        "--balance",
        action="store_true",
        help="the weight is what share the distance to the first is of the distances to both; without it pictures near "
        "the middle may all be like one of the two",
    )
    one.add_argument("--refinements", type=int, default=3, help="of each step of the inversion (%(default)s)")
    one.add_argument("--path", choices=("latent", "noise"), default="latent", help="(%(default)s)")
    one.add_argument("--timestep", type=int, help="for --path noise: the step from which it walks home")
    one = command("inpaint", "paint what a mask hides", pictures=1)
    one.add_argument("mask", type=Path, metavar="MASK", help="file of the same size, white where to paint")
    one.add_argument("--jump_length", type=int, default=5, help="steps that a jump goes back out (%(default)s)")
    one.add_argument(
        "--resamples",
        type=int,
        default=5,
        help="walks of each part: more fit better, and take longer (5)",
    )
    one = command("vary", "pictures like a picture, one for each seed", pictures=1)
    one.add_argument("--strength", type=float, default=0.5, help="0 the same picture, 1 any (%(default)s)")
    one = command("walk", "a walk home as a film strip, or animated if the output is .gif or .webp")
    one.add_argument("--image", type=Path, help="walk out of this picture first")
    one.add_argument("--columns", type=int, default=10, help="pictures in a row of the strip (%(default)s)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        check(given)
        pictures = [opened(path) for path in getattr(given, "images", [])]
        pipe = loaded(given)
        run(pipe, given, pictures)
    except (ValueError, OSError) as error:
        print(f"ddpm_pipeline {given.command}: {error}", file=sys.stderr)
        return 2
    print(f"written: {given.output}")
    return 0


def check(given: argparse.Namespace) -> None:
    """Raise ValueError for what would only be found when all is drawn."""
    for name in ("output", "latents"):
        path = getattr(given, name, None)
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"--{name} is {path}: there is no folder {path.parent}")
    if given.output.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--output is {given.output}: give a name that ends as pictures do, such as out.png")
    if getattr(given, "columns", 2) < 2:
        raise ValueError(f"--columns is {given.columns}: give at least 2")
    if getattr(given, "strip", None) is not None and given.strip < 2:
        raise ValueError(f"--strip is {given.strip}: give at least 2")


def run(pipe: Any, given: argparse.Namespace, pictures: list[Image.Image]) -> None:
    """Do what the command says, and write it."""
    from . import visualize

    steps = given.num_inference_steps
    common: dict[str, Any] = {"num_inference_steps": steps_of(pipe) if steps is None else steps}
    if given.class_label is not None:
        common["class_labels"] = given.class_label
    seeds = getattr(given, "seeds", None) or [0]
    drawing = {"seeds": seeds, "eta": getattr(given, "eta", None), "output_type": "latent"}
    drawn: torch.Tensor
    if given.command == "generate":
        drawn = pipe(**common, **drawing).images
    elif given.command == "invert":
        latents = pipe.invert(pictures, refinements=given.refinements, **common)
        for path, error in zip(given.images, pipe.inversion_error.tolist()):
            print(f"{path}: mean squared error of the way out and home {error:.5f}")
        if given.latents is not None:
            import numpy as np

            np.save(given.latents, latents.cpu().numpy())
        drawn = pipe(latents=latents, eta=0.0, output_type="latent", **common).images
    elif given.command == "fuse":
        strip = given.strip
        weights = [i / (strip - 1) for i in range(strip)] if strip else given.weight
        if given.path == "noise":
            drawing["timestep"] = given.timestep
        else:  # which has no noise: what was given of it is refused
            drawing |= {"seeds": given.seeds, "timestep": given.timestep, "refinements": given.refinements}
        made = pipe.fuse(*pictures, weight=weights, path=given.path, balance=given.balance, **common, **drawing)
        for weight, place, part in zip(weights, made.weights, made.shares):
            print(f"weight {weight:g}: place on the path {place:.4f}, share of the distances {part:.3f}")
        print(f"{made.network_calls} calls of the network")
        drawn = made.images
    elif given.command == "inpaint":
        drawn = pipe.inpaint(
            pictures * len(seeds), opened(given.mask), jump_length=given.jump_length, resamples=given.resamples,
            **common, **drawing,
        ).images  # fmt: skip
    elif given.command == "vary":
        drawn = pipe.vary(pictures * len(seeds), given.strength, **common, **drawing).images
    else:
        drawing.pop("output_type")
        image = None if given.image is None else [opened(given.image)] * len(seeds)
        steps = list(pipe.trajectory(image=image, **common, **drawing))
        if given.output.suffix in ANIMATED:
            visualize.animate(steps, given.output)
        else:
            visualize.strip(steps, columns=given.columns).save(given.output)
        return
    if len(drawn) == 1:  # so that it can be given to the next command
        pixels = visualize.to_uint8(drawn)[0]
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(given.output)
    else:
        visualize.grid(drawn, columns=len(drawn) if given.command == "fuse" else None).save(given.output)


def steps_of(pipe: Any) -> int:
    return min(50, pipe.scheduler.config.num_train_timesteps)


def loaded(given: argparse.Namespace) -> Any:
    import torch

    from . import DDPMPipeline

    pipe = DDPMPipeline.from_pretrained(given.model, **({"revision": given.revision} if given.revision else {}))
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        return pipe.to(given.device or here)
    except (RuntimeError, AssertionError) as error:  # torch's own words for a device that is none, or not here
        raise ValueError(f"--device is {given.device}: {str(error).splitlines()[0]}") from None


def opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no image that can be read") from None


if __name__ == "__main__":
    sys.exit(main())
