"""LOAD ONCE: load a published folder in one of the three ways; sample two images, and two with its guide; save them.

    python load_once.py FOLDER OUTPUT package remote-code built-in --steps N [--class_labels JSON]

check.py runs it. Each way has its own process: in all but the first, ddpm_pipeline cannot be imported. On Linux several
are forked from one that has imported diffusers, which takes most of the time. A way leaves OUTPUT/WAY.safetensors, and
what it prints in OUTPUT/WAY.txt.
"""

import argparse
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

WAYS = ("package", "remote-code", "built-in")


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("folder")
    parser.add_argument("output", type=Path)
    parser.add_argument("ways", nargs="+", choices=WAYS)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--class_labels", type=json.loads)  # a list of two
    args = parser.parse_args()
    del sys.path[0]  # this folder
    if len(args.ways) == 1:
        load(args.ways[0], args)
        return
    import diffusers

    # what all ways import
    assert all((diffusers.DiffusionPipeline, diffusers.DDPMPipeline, diffusers.UNet2DModel, diffusers.DDPMScheduler))
    for child in [_fork(way, args) for way in args.ways]:
        os.waitpid(child, 0)


def _fork(way: str, args: argparse.Namespace) -> int:
    if (child := os.fork()) != 0:
        return child
    failed = True
    try:
        load(way, args)
        failed = False
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(failed)


def load(way: str, args: argparse.Namespace) -> None:
    with open(args.output / f"{way}.txt", "w") as log:
        os.dup2(log.fileno(), 2)
    if way == "package":
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    else:
        sys.modules["ddpm_pipeline"] = None  # type: ignore[assignment]  # makes its import fail

    import diffusers
    import torch
    from safetensors.torch import save_file

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if way == "package":
        from ddpm_pipeline import DDPMPipeline

        pipe: Any = DDPMPipeline.from_pretrained(args.folder)
    elif way == "remote-code":
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            args.folder, custom_pipeline="pipeline", trust_remote_code=True
        )
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(args.folder)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"class_labels": args.class_labels} if args.class_labels else {}
    generator = torch.Generator().manual_seed(0)
    options |= {"num_inference_steps": args.steps, "output_type": "np"}
    images = {"images": pipe(2, generator, **options).images}
    if getattr(pipe, "guide", None) is not None:
        images["guided images"] = pipe(2, generator, autoguidance_scale=2.0, **options).images
    tensors = {name: torch.from_numpy(each).contiguous() for name, each in images.items()}
    save_file(tensors, args.output / f"{way}.safetensors")


if __name__ == "__main__":
    main()
