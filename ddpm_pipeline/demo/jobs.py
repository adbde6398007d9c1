"""What the tabs of the page compute: checked arguments in, pictures out. Nothing here knows of gradio or of HTML.

A picture is the bytes of a PNG file that holds, as text, the model and the arguments of the call that made it.
"""

import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..arguments import MAX_SEED
from ..calibrated import Table, load_tables, why_not
from ..decode import IMAGE_CHANNELS, decode_for, failure_reason, parse_colour, read_header
from ..files import model_name
from ..images import background_of, size_of, to_output
from ..labels import listed_class_names, null_class
from ..pipeline_ddpm import DDPMPipeline
from ..pixels import from_pixels, height_width
from ..scheduling_ddpm import DDPMScheduler, check_int
from ..visualize import grid

MAX_IMAGES = 16  # of one job
MAX_STEPS = 250  # sampling steps of one job
MAX_SIDE = 512  # pixels of an image of the model
MAX_UPLOAD_BYTES = 10 * 2**20
MAX_UPLOAD_PIXELS = 2**24
TIME_LIMIT = 120.0  # seconds of one job
STRIP_LENGTH = 9  # images of an interpolation
BALANCE_TOLERANCE = 0.02  # of the distance ratio: a smaller error cannot be seen
MAX_FRAMES = 40  # of a trajectory that are kept


class Picture(NamedTuple):
    """A PNG file with the settings in its metadata."""

    name: str  # of the file
    png: bytes


class Progress(NamedTuple):
    """A job that is not done: x_t and x_0_pred as grids, PNG files; None where there is none."""

    t: int
    x_t: bytes
    x_0_pred: bytes | None


class Moment(NamedTuple):
    """One moment of a trajectory: its pictures are x_t and x_0_pred, if the scheduler predicts it."""

    is_forward: bool
    t: int
    pictures: list[Picture]


class Strip(NamedTuple):
    """Images between two images, their interpolation weights, and all of them as an animated GIF file."""

    pictures: list[Picture]
    weights: list[float]
    gif: Picture


class TimeUpError(Exception):
    """A job took longer than its limit."""


@dataclass(frozen=True)
class Sampling:
    """The settings that all jobs share; those that a model has no use for are left as they are."""

    seed: int = 0  # all are checked by the job
    steps: int = 50
    class_label: int | None = None
    guidance_scale: float = 1.0
    autoguidance_scale: float = 1.0


class Model:
    """A pipeline behind the page, for one job at a time on its device.

    Args:
        name: as shown. Of a folder only its name is, since its path is nobody's business.
        time_limit: seconds of one job.
    """

    def __init__(self, pipe: DDPMPipeline, name: str, time_limit: float = TIME_LIMIT) -> None:
        unet, scheduler = pipe.unet, pipe.scheduler
        if not isinstance(scheduler, DDPMScheduler):
            raise ValueError(f"the scheduler is a {type(scheduler).__name__}: the demo needs our DDPMScheduler")
        if unet.config["sample_size"] is None:
            raise ValueError("the network has sample_size None: the demo needs a model with a size")
        if unet.config["in_channels"] not in IMAGE_CHANNELS:
            raise ValueError(f"the images have {unet.config['in_channels']} channels: the demo shows 1, 3 or 4")
        if unet.config["class_embed_type"] is not None:
            raise ValueError(
                f"class_embed_type is {unet.config['class_embed_type']!r}: the demo has numbered classes alone"
            )
        self.pipe, self.name, self.time_limit = pipe, model_name(name), time_limit
        self.height, self.width = height_width(unet.config["sample_size"])
        if max(self.height, self.width) > MAX_SIDE:
            raise ValueError(f"the images are {self.height} x {self.width} pixels: the demo takes up to {MAX_SIDE}")
        self.channels: int = unet.config["in_channels"]
        self.max_steps = min(MAX_STEPS, scheduler.num_steps)
        self.class_names = listed_class_names(unet)
        self.takes_guidance = null_class(unet) is not None
        self.takes_autoguidance = pipe.guide is not None
        self.tables: list[Table] = [
            table for table in load_tables(scheduler) if why_not(scheduler, unet, pipe.guide, table) is None
        ]
        self._deadline = float("inf")
        pipe.progress_bar = lambda total=None: _Watch(self)  # advanced with each call of the network

    # ---- The jobs ----------------------------------------------------------------------------------------------------

    def generate(
        self, sampling: Sampling, number: int, eta: float, table: Table | None = None
    ) -> Iterator[Progress | list[Picture]]:
        """Images with the seeds from sampling.seed on: progress at each step, at last the pictures."""
        seeds = self._seeds(sampling, number)
        arguments = self._arguments(sampling)
        if table is None:
            arguments |= {"eta": _number("eta", eta, 0, 1), "calibrated": False}
        else:
            arguments |= {**table.guidance._asdict(), "num_inference_steps": len(table.timesteps), "calibrated": True}
        self._start()
        steps: Any = self.pipe.trajectory(seeds=seeds, **arguments)
        for step in steps:
            if not hasattr(step, "images"):
                predicted = None if step.x_0_pred is None else _grid_png(step.x_0_pred)
                yield Progress(step.t, _grid_png(step.x_t), predicted)
        yield self._pictures(step.images, "generate", seeds, arguments)

    def interpolate(self, a: Tensor, b: Tensor, sampling: Sampling, balance: bool) -> Strip:
        """Images between two images, (1, C, H, W), with equal steps of the weight or, balanced, of the distances."""
        arguments = self._arguments(sampling, guided=False) | {
            "balance": bool(balance), "tolerance": BALANCE_TOLERANCE
        }  # fmt: skip
        weights = np.linspace(0, 1, STRIP_LENGTH).round(4).tolist()
        self._start()
        fused: Any = self.pipe.fuse(a, b, weights, output_type="latent", **arguments)
        pictures = [
            self._picture(image, f"interpolation-{i:02d}.png", {"method": "fuse", "weight": weight} | arguments)
            for i, (image, weight) in enumerate(zip(fused.images, weights))
        ]
        settings = {"model": self.name, "method": "fuse", "weight": weights} | arguments
        return Strip(pictures, fused.weights, Picture("interpolation.gif", _gif(fused.images, settings)))

    def repair(self, image: Tensor, mask: Tensor, sampling: Sampling, number: int) -> list[Picture]:
        """An image, (1, C, H, W), with what the mask covers, (H, W) bool, filled in, once for each seed."""
        if not mask.any():
            raise ValueError("the mask is empty: paint over what is to be filled in")
        seeds = self._seeds(sampling, number)
        arguments = self._arguments(sampling)
        self._start()
        repaired: Any = self.pipe.inpaint(image, mask, seeds=seeds, output_type="latent", **arguments)
        return self._pictures(repaired.images, "inpaint", seeds, arguments)

    def trajectory(self, image: Tensor | None, sampling: Sampling) -> Iterator[Progress | list[Moment]]:
        """The reverse process, after the forward process of an image, (1, C, H, W), if there is one."""
        arguments = self._arguments(sampling) | {"calibrated": False}
        seeds = self._seeds(sampling, 1)
        self._start()
        num_forward = 0 if image is None else arguments["num_inference_steps"]
        keep = set(np.linspace(0, num_forward + arguments["num_inference_steps"] - 1, MAX_FRAMES).round().tolist())
        moments = []
        for i, step in enumerate(self.pipe.trajectory(image=image, seeds=seeds, **arguments)):
            if i not in keep:
                continue
            is_forward = i < num_forward
            shown = {"x_t": step.x_t, "x_0_pred": None if is_forward else step.x_0_pred}
            settings = {"method": "trajectory", "t": step.t, "seed": seeds[0]} | arguments
            pictures = [
                self._picture(images[0], f"trajectory-{i:03d}-{name}.png", settings | {"shows": name})
                for name, images in shown.items()
                if images is not None
            ]
            moments.append(Moment(is_forward, step.t, pictures))
            yield Progress(step.t, pictures[0].png, pictures[1].png if len(pictures) > 1 else None)
        yield moments

    def draw(self, sampling: Sampling) -> Picture:
        """One image, to start from in the tabs that need one."""
        *_, pictures = self.generate(sampling, 1, eta=1.0)
        assert isinstance(pictures, list)
        return pictures[0]

    # ---- Images in ---------------------------------------------------------------------------------------------------

    def read(self, payload: bytes) -> Tensor:
        """An uploaded file as an image of the model's size, (1, C, H, W) in [-1, 1], read as in training.

        Raises:
            ValueError: too large, or no image that can be read. The message names no file.
        """
        if len(payload) > MAX_UPLOAD_BYTES:
            raise ValueError(f"the file has {len(payload)} bytes: give at most {MAX_UPLOAD_BYTES}")
        unet = self.pipe.unet
        size = size_of(unet)
        try:
            header = read_header(payload)
            if header.height * header.width > MAX_UPLOAD_PIXELS:
                raise ValueError(f"{header.height} x {header.width} pixels: give at most {MAX_UPLOAD_PIXELS} in all")
            pixels = decode_for(payload, self.channels, parse_colour(background_of(unet)), size)
        except Image.DecompressionBombError:
            raise ValueError(f"the image cannot be read: give at most {MAX_UPLOAD_PIXELS} pixels") from None
        except Exception as error:  # whatever Pillow raises for a broken file
            raise ValueError(f"the image cannot be read: {failure_reason(error)}") from None
        if pixels.shape[1:] != (self.height, self.width):  # a model that does not say how its images were resized
            height, width = pixels.shape[1:]
            given, wanted = f"{width} wide and {height} high", f"{self.width} wide and {self.height} high"
            raise ValueError(f"the image is {given}: give one of {wanted}")
        return from_pixels(pixels)[None]

    def read_mask(self, bits: str) -> Tensor:
        """A mask painted on the page, one character 0 or 1 for each pixel, row by row, as (H, W) bool."""
        if not isinstance(bits, str) or len(bits) != self.height * self.width or set(bits) - {"0", "1"}:
            raise ValueError(f"the mask is no text of {self.height} x {self.width} characters 0 or 1")
        return torch.tensor([bit == "1" for bit in bits]).view(self.height, self.width)

    def preview(self, image: Tensor) -> bytes:
        """An image that was read, (1, C, H, W), as a PNG file."""
        return _encode(_to_pil(image[0]))

    # ---- Parts -------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._deadline = time.monotonic() + self.time_limit

    def check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise TimeUpError

    def _seeds(self, sampling: Sampling, number: int) -> list[int]:
        number = check_int("number", number, 1, MAX_IMAGES)
        seed = check_int("seed", sampling.seed, 0, MAX_SEED - MAX_IMAGES)
        return list(range(seed, seed + number))

    def _arguments(self, sampling: Sampling, guided: bool = True) -> dict[str, Any]:
        """Arguments of a method of the pipeline; `guided` if it takes guidance."""
        arguments: dict[str, Any] = {"num_inference_steps": check_int("steps", sampling.steps, 1, self.max_steps)}
        if self.class_names:
            label = 0 if sampling.class_label is None else sampling.class_label
            arguments["class_labels"] = check_int("class", label, 0, len(self.class_names) - 1)
        if guided and self.takes_guidance:
            arguments["guidance_scale"] = _number("guidance", sampling.guidance_scale, 0, 20)
        if guided and self.takes_autoguidance:
            arguments["autoguidance_scale"] = _number("autoguidance", sampling.autoguidance_scale, 0, 20)
        return arguments

    def _pictures(self, x_0: Tensor, method: str, seeds: Sequence[int], arguments: dict[str, Any]) -> list[Picture]:
        return [
            self._picture(image, f"{method}-{seed}.png", {"method": method, "seed": seed} | arguments)
            for image, seed in zip(x_0, seeds)
        ]

    def _picture(self, image: Tensor, name: str, settings: dict[str, Any]) -> Picture:
        return Picture(name, _encode(_to_pil(image), {"model": self.name} | settings))


class _Watch:
    """What a method of the pipeline takes for its progress bar: it ends a job whose time is up."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __enter__(self) -> "_Watch":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self) -> None:
        self._model.check_time()

    def set_postfix_str(self, *args: Any, **kwargs: Any) -> None:
        pass


def _number(name: str, value: Any, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}: give a number from {least:g} to {most:g}")
    return float(value)


# ---- Files -----------------------------------------------------------------------------------------------------------


def _to_pil(image: Tensor) -> Image.Image:
    """(C, H, W) in [-1, 1] to a PIL image."""
    return to_output(image[None].clamp(-1, 1).nan_to_num(), "pil")[0]


def _encode(image: Image.Image, settings: dict[str, Any] | None = None) -> bytes:
    """A PNG file with the seed and all settings as text."""
    info = PngInfo()
    if settings is not None:
        info.add_text("Software", "ddpm_pipeline")
        info.add_text("settings", json.dumps(settings))
        if "seed" in settings:
            info.add_text("seed", str(settings["seed"]))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def _grid_png(images: Tensor) -> bytes:
    return _encode(grid(images, side=256))


def _gif(images: Tensor, settings: dict[str, Any]) -> bytes:
    """There and back, in four seconds, enlarged; the settings are its comment."""
    frames = [grid(image[None], margin=0, side=256) for image in images]
    frames += frames[-2:0:-1]
    file = io.BytesIO()
    frames[0].save(
        file, "GIF", save_all=True, append_images=frames[1:], duration=4000 // len(frames), loop=0,
        comment=json.dumps(settings).encode(),
    )  # fmt: skip
    return file.getvalue()
