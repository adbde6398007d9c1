"""The pipeline's methods on the command line: `python -m ddpm_pipeline COMMAND MODEL ...`, image files in and out.
One command, `demo`, serves a web page instead.

Exit codes: 0 success; 2 an error in the arguments, the model or the images.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    import torch


NUM_INFERENCE_STEPS = 50  # by default, also where the pipeline's own default is all timesteps
MODEL = 'folder of a saved pipeline, or name of a model on the Hub, "user/model"'
REVISION = "tag, branch or commit of a model on the Hub"
DEVICE = "cpu, cuda, ...; by default an accelerator if there is one"
DEMO = "serve a web page for a model: generate, interpolate, repair, trajectory (needs the extra demo)"
SCALES = ("guidance_scale", "autoguidance_scale")


def make_parser() -> argparse.ArgumentParser:
    description = "Sample images from a trained DDPM, interpolate between images, inpaint and vary them."
    parser = argparse.ArgumentParser(prog="python -m ddpm_pipeline", description=description, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add_command(
        name: str, summary: str, images: str | int | None = None, seeds: bool = True
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.add_argument("model", help=MODEL)
        if images is not None:
            command.add_argument("images", type=Path, nargs=images, metavar="IMAGE", help="image of the model's size")
        command.add_argument(
            "--output",
            "-o",
            type=Path,
            default=Path(f"{name}.png"),
            help="file to write (%(default)s): a single image at its own size, several as an enlarged grid",
        )
        command.add_argument(
            "--num_inference_steps",
            type=int,
            help=f"sampling steps ({NUM_INFERENCE_STEPS}, or all diffusion timesteps if there are fewer; in Python, a "
            "call takes all of them)",
        )
        command.add_argument("--revision", help=REVISION)
        command.add_argument("--class_label", help="name or number of a class, for a class-conditional model")
        command.add_argument("--device", help=DEVICE)
        if seeds:
            command.add_argument("--seeds", type=int, nargs="+", help="one for each image to generate (0)")
            command.add_argument(
                "--eta", type=float, help="0: sampling without noise (DDIM); 1, the default: ancestral sampling (DDPM)"
            )
        return command

    iterations_help = "fixed-point iterations for each timestep of the inversion (%(default)s)"
    generate = add_command("generate", "generate images, one for each seed")

    invert = add_command(
        "invert", "DDIM inversion: images to latents, and the images reconstructed from them", "+", seeds=False
    )
    invert.add_argument("--fixed_point_iterations", type=int, default=0, help=iterations_help)
    invert.add_argument("--latents", type=Path, help="also write the latents to this .npy file, (B, C, H, W)")

    fuse = add_command("fuse", "interpolate between two images", images=2)
    weights = fuse.add_mutually_exclusive_group()
    weights.add_argument("--weight", type=float, nargs="+", default=[0.5], help="0: first image, 1: second image (0.5)")
    weights.add_argument("--strip", type=int, metavar="N", help="N images with weights from 0 to 1")
    fuse.add_argument(
        "--balance",
        action="store_true",
        help="read each weight as a distance ratio d(first) / (d(first) + d(second)); without it, several images in "
        "the middle may all look like one of the two",
    )
    fuse.add_argument(
        "--distance",
        metavar="EXTRACTOR",
        help="d compares features instead of pixels: those of a model of transformers, its name on the Hub such as "
        "facebook/dinov2-small or its folder, or of a .pt or .th file",
    )
    fuse.add_argument("--fixed_point_iterations", type=int, default=3, help=iterations_help)
    fuse.add_argument(
        "--path",
        choices=("latent", "noise"),
        default="latent",
        help="interpolate between the latents of the images, or mix the images and noise the mix (%(default)s)",
    )
    fuse.add_argument(
        "--timestep", type=int, help="with --path noise: index to add noise up to (half of the timesteps)"
    )

    inpaint = add_command("inpaint", "RePaint: generate what a mask covers", images=1)
    inpaint.add_argument(
        "mask",
        type=Path,
        metavar="MASK",
        help="image of the same size, white where to paint; what is transparent counts as black",
    )
    inpaint.add_argument("--jump_length", type=int, default=5, help="timesteps of a jump to more noise (%(default)s)")
    inpaint.add_argument(
        "--resamples",
        type=int,
        default=5,
        help="how often each part is sampled (%(default)s): more match the surroundings better and take longer",
    )

    vary = add_command("vary", "image-to-image (SDEdit): variations of an image, one for each seed", images=1)
    vary.add_argument("--strength", type=float, default=0.5, help="0: the same image, 1: a fresh sample (%(default)s)")

    trajectory = add_command("trajectory", "sampling trajectory as a strip, or animated if the output is .gif or .webp")
    trajectory.add_argument("--image", type=Path, help="start with the forward process from this image")
    for command in (generate, inpaint, vary, trajectory):
        command.add_argument(
            "--guidance_scale", type=float, help="classifier-free guidance: above 1 more typical of the class (1)"
        )
        command.add_argument(
            "--autoguidance_scale", type=float, help="guidance by the guide of the model: above 1 fewer errors (1)"
        )
        command.add_argument(
            "--guidance_interval",
            type=float,
            nargs=2,
            metavar=("LO", "HI"),
            help="guide at timesteps LO <= t < HI alone",
        )
    for command in (generate, trajectory):
        command.add_argument(
            "--calibrated",
            action=argparse.BooleanOptionalAction,
            help="take the steps from a calibrated table of the model (by default where there is one for this number)",
        )
    trajectory.add_argument("--columns", type=int, default=10, help="steps shown in a row of the strip (%(default)s)")
    add_export(commands)
    add_demo(commands)
    return parser


def add_export(commands: Any) -> None:
    """The command that takes no images and writes a folder."""
    summary = "export the model as a static web page, which samples in the visitor's browser"
    export = commands.add_parser("export", help=summary, description=summary, allow_abbrev=False)
    export.add_argument("model", help=MODEL)
    export.add_argument("output", type=Path, metavar="OUT", help="folder to write; an earlier page there is replaced")
    export.add_argument("--web", action="store_true", required=True, help="as a web page, so far the only kind")
    export.add_argument(
        "--num_inference_steps",
        type=int,
        help="steps of DDIM (20, or all diffusion timesteps if there are fewer); calibrated steps of the model come "
        "with it",
    )
    export.add_argument("--title", help="of the page (the name of the model)")
    export.add_argument("--revision", help=REVISION)
    export.add_argument(
        "--onnxruntime_web", type=Path, metavar="FOLDER", help="the unpacked npm package; by default npm fetches it"
    )
    export.set_defaults(device="cpu")


def add_demo(commands: Any) -> None:
    """The command that serves a page until it is stopped."""
    demo = commands.add_parser("demo", help=DEMO, description=DEMO, allow_abbrev=False)
    demo.add_argument("model", help=MODEL)
    demo.add_argument("--host", default="127.0.0.1", help="address to serve at (%(default)s: this machine alone)")
    demo.add_argument("--port", type=int, default=7860, help="(%(default)s)")
    demo.add_argument("--share", action="store_true", help="make a public address through the servers of gradio")
    demo.add_argument("--revision", help=REVISION)
    demo.add_argument("--device", help=DEVICE)


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        if args.command == "demo":
            serve_demo(args)
            return 0
        if args.command == "export":
            export(args)
        else:
            check(args)
            run(load_pipeline(args), args)
    except (ValueError, OSError) as error:
        message = str(error).replace("class_labels", "--class_label")  # the one flag with another name than in Python
        print(f"ddpm_pipeline {args.command}: {message}", file=sys.stderr)
        return 2
    print(f"wrote {args.output}")
    return 0


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for errors that would only show after sampling."""
    for name in ("output", "latents"):
        path = getattr(args, name, None)
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"--{name} is {path}: the folder {path.parent} does not exist")
    if args.output.is_dir() or not _can_be_written(args.output.suffix.lower(), "L", "RGB"):
        raise ValueError(f"--output is {args.output}: give a name with the suffix of an image format, such as out.png")
    latents = getattr(args, "latents", None)
    if latents is not None and latents.suffix.lower() != ".npy":
        raise ValueError(f"--latents is {latents}: give a name that ends in .npy")
    is_guided = any(getattr(args, name, None) is not None for name in SCALES)
    if getattr(args, "guidance_interval", None) is not None and not is_guided:
        raise ValueError(
            f"--guidance_interval is {args.guidance_interval}, without guidance: give --guidance_scale or "
            "--autoguidance_scale too"
        )
    if getattr(args, "columns", 2) < 2:
        raise ValueError(f"--columns is {args.columns}: give at least 2")
    if getattr(args, "strip", None) is not None and args.strip < 2:
        raise ValueError(f"--strip is {args.strip}: give at least 2")
    from .cpu import importing

    with importing():
        from .images import check_readable

    for path in (*getattr(args, "images", []), getattr(args, "mask", None), getattr(args, "image", None)):
        if path is not None:
            check_readable(path, "image")


def serve_demo(args: argparse.Namespace) -> None:
    """Serve the page until it is interrupted."""
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port is {args.port}: give a number from 0 to 65535, 0 for a free one from 7860 on")
    try:
        from .demo.page import serve
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is not installed: pip install "ddpm-pipeline[demo]"') from None
    from .demo.jobs import Model

    pipe = load_pipeline(args)
    serve(Model(pipe, args.model), args.host, args.port, args.share)


def _can_be_written(suffix: str, *modes: str) -> bool:
    """Whether Pillow writes these modes in this format: some it only reads, some have no colours, gray or alpha."""
    try:
        for mode in modes:
            Image.new(mode, (1, 1)).save(io.BytesIO(), Image.registered_extensions()[suffix])
    except (KeyError, OSError, ValueError):
        return False
    return True


def run(pipe: Any, args: argparse.Namespace) -> None:
    """Run the command and write its output."""
    from . import visualize
    from .images import to_output

    images = getattr(args, "images", [])
    steps = args.num_inference_steps
    if steps is None:
        steps = min(NUM_INFERENCE_STEPS, pipe.scheduler.config.num_train_timesteps)
    common: dict[str, Any] = {"num_inference_steps": steps}
    if args.class_label is not None:
        is_number = args.class_label.isdecimal() and args.class_label not in (pipe.class_names or ())
        common["class_labels"] = int(args.class_label) if is_number else args.class_label
    if scales := {name: scale for name in SCALES if (scale := getattr(args, name, None)) is not None}:
        common |= {**scales, "guidance_interval": args.guidance_interval}
    seeds = getattr(args, "seeds", None) or [0]
    sampling = {"seeds": seeds, "eta": getattr(args, "eta", None), "output_type": "latent"}
    x_0: torch.Tensor
    if args.command == "generate":
        x_0 = pipe(calibrated=args.calibrated, **common, **sampling).images
    elif args.command == "invert":
        latents = pipe.invert(images, fixed_point_iterations=args.fixed_point_iterations, **common)
        for path, error in zip(args.images, pipe.inversion_error.tolist()):
            print(f"{path}: inversion error {error:.5f} (mean squared, pixels in [-1, 1])")
        if args.latents is not None:
            import numpy as np

            with open(args.latents, "wb") as file:  # np.save appends .npy to the name l.NPY
                np.save(file, latents.cpu().numpy())
        # inversion does not clip: only sampling without clipping returns to the images
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=False, thresholding=False)
        x_0 = pipe(latents=latents, eta=0.0, output_type="latent", **common).images.clamp(-1, 1)
    elif args.command == "fuse":
        strip = args.strip
        weights = [i / (strip - 1) for i in range(strip)] if strip else args.weight
        if args.path == "noise":
            sampling["timestep"] = args.timestep
        else:  # fuse rejects these two if they are set, since this path adds no noise
            sampling |= {"seeds": args.seeds, "timestep": args.timestep}
            sampling["fixed_point_iterations"] = args.fixed_point_iterations
        if args.distance is not None:
            sampling["distance"] = args.distance
        fused = pipe.fuse(*images, weight=weights, path=args.path, balance=args.balance, **common, **sampling)
        for weight, used, ratio in zip(weights * len(seeds), fused.weights, fused.distance_ratios):
            print(f"weight {weight:g}: interpolation weight {used:.4f}, distance ratio {ratio:.3f}")
        print(f"{fused.network_calls} network calls")
        if any(fused.double_exposures):
            print(
                f"{sum(fused.double_exposures)} of {len(fused.weights)} images look like the two laid over each other "
                "(nearer to the mean of the pixels than to an image with each pixel of one of the two): the model may "
                "be trained too little"
            )
        x_0 = fused.images
    elif args.command == "inpaint":
        x_0 = pipe.inpaint(
            images, args.mask, jump_length=args.jump_length, resamples=args.resamples,
            **common, **sampling,
        ).images  # fmt: skip
    elif args.command == "vary":
        x_0 = pipe.vary(images, args.strength, **common, **sampling).images
    else:
        del sampling["output_type"]
        trajectory = list(pipe.trajectory(image=args.image, calibrated=args.calibrated, **common, **sampling))
        if args.output.suffix.lower() in visualize.ANIMATED:
            visualize.animate(trajectory, args.output)
        else:
            visualize.strip(trajectory, columns=args.columns).save(args.output)
        return
    if len(x_0) == 1 and x_0.shape[1] == 4 and _can_be_written(args.output.suffix.lower(), "RGBA"):
        to_output(x_0, "pil")[0].save(args.output)
    elif len(x_0) == 1:  # not enlarged, so that the next command can read it
        pixels = visualize.to_uint8(x_0)[0]
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(args.output)
    else:
        visualize.grid(x_0, columns=len(x_0) if args.command == "fuse" else None).save(args.output)


def export(args: argparse.Namespace) -> None:
    """Write the web page of a model, and say what is in it."""
    from .files import folder_size, model_name
    from .onnx_network import MAX_ERROR
    from .web_export import LARGE_PAGE, check_folder_of_page, export_web

    check_folder_of_page(args.output)
    errors = export_web(
        load_pipeline(args),
        args.output,
        title=args.title or Path(model_name(args.model)).name,  # of user/model on the Hub, model
        num_inference_steps=args.num_inference_steps,
        onnxruntime_web=args.onnxruntime_web,
    )
    for dtype, error in errors.items():
        print(f"network.{dtype}.onnx differs from torch by {error:.1e} of its output")
    if "float16" not in errors:
        print(f"left out: network.float16.onnx, which differs by more than {MAX_ERROR:g}; float32 is used instead")
    size = folder_size(args.output)
    if size > LARGE_PAGE:
        print(f"a visitor loads {size / 1e6:.0f} MB before the first image: consider a smaller network")
    print(f"{size / 1e6:.1f} MB; look at it: python -m http.server -d {args.output}")


def load_pipeline(args: argparse.Namespace) -> Any:
    import torch

    from .cpu import SharedCores, importing, keep_memory

    cores = torch.get_num_threads()
    shared = SharedCores(cores, cores)  # counts what other programs use while the model is loaded
    with importing():
        from diffusers.utils.logging import disable_progress_bar

        from . import DDPMPipeline

    has_terminal = sys.stderr.isatty()
    if not has_terminal:  # a bar would fill a log file
        disable_progress_bar()
    pipe = DDPMPipeline.from_pretrained(args.model, **({"revision": args.revision} if args.revision else {}))
    pipe.set_progress_bar_config(disable=not has_terminal)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        pipe.to(args.device or accelerator)
    except (RuntimeError, AssertionError) as error:  # torch's message for an unknown or missing device
        raise ValueError(f"--device is {args.device}: {str(error).splitlines()[0]}") from None
    if pipe.device.type == "cpu":
        keep_memory()
        shared.update()
    return pipe


if __name__ == "__main__":
    sys.exit(main())
