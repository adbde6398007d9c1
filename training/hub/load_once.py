"""LOAD ONCE: load a published folder in one of the three ways; sample two images, and two with its guide; save them.

    python load_once.py {package,remote-code,built-in} FOLDER OUTPUT.safetensors --steps N [--class_labels JSON]

check.py runs it. Each way has its own process: in all but the first, ddpm_pipeline cannot be imported.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

WAYS = ("package", "remote-code", "built-in")


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("folder")
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--class_labels", type=json.loads)  # a list of two
    args = parser.parse_args()

    if args.way == "package":
        sys.path[0] = str(Path(__file__).resolve().parents[2])
    else:
        del sys.path[0]  # this folder
        sys.modules["ddpm_pipeline"] = None  # type: ignore[assignment]  # makes its import fail

    import diffusers
    import torch
    from safetensors.torch import save_file

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if args.way == "package":
        from ddpm_pipeline import DDPMPipeline

        pipe: Any = DDPMPipeline.from_pretrained(args.folder)
    elif args.way == "remote-code":
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
    save_file({name: torch.from_numpy(each).contiguous() for name, each in images.items()}, args.output)


if __name__ == "__main__":
    main()
