"""THE WAY HOME: from noise to pictures, step by step. What a user of a trained DDPM calls.

    x_T = noise;  for t in the schedule: x_t -> network -> one step home (Algorithm 2, DDPM);  picture = x_0

`DDPMPipeline` is diffusers' pipeline of that name with more that it can do. A saved folder is one that anybody can
load: its labels are diffusers' own, and it holds this file and those it imports as one, `pipeline.py`, for those who
want ours as remote code.
"""

import contextlib
import hashlib
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline as BuiltInDDPMPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as BuiltInDDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  diffusers looks for it in this module
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .fusion import PictureMethods
from .images import check_output_type, to_output
from .loading import check_finite, check_folder
from .scheduling_ddpm import DDPMScheduler, check_int, compute_dtype


class TrajectoryStep(NamedTuple):
    """A step of the walk home: index t; where it is, x_t, and what it takes for the picture, x_0_pred, (B, C, H, W)."""

    t: int
    x_t: Tensor
    x_0_pred: Tensor | None


class _Run(NamedTuple):
    """The arguments of one walk home, checked."""

    x_t: Tensor
    class_labels: Tensor | None
    step_options: dict[str, Any]


class DDPMPipeline(PictureMethods, BuiltInDDPMPipeline):
    """Pictures from a trained DDPM, a drop-in for diffusers' DDPMPipeline.

    Args:
        unet: the network, a UNet2DModel, with or without classes.
        scheduler: the walk. A built-in DDPMScheduler becomes ours with the same configuration; any other scheduler of
            diffusers (DDIM, DPM-Solver++, UniPC, Euler, ...) stays what it is.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(self, unet: UNet2DModel, scheduler: BuiltInDDPMScheduler) -> None:
        if type(scheduler) is BuiltInDDPMScheduler:
            scheduler = DDPMScheduler.from_config(_config_as_given(scheduler))  # type: ignore[assignment]
        super().__init__(unet=unet, scheduler=scheduler)  # type: ignore[arg-type]
        self._interrupt = False
        self._guidance_scale = 1.0

    # ---- Generating --------------------------------------------------------------------------------------------------

    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        seeds: int | Sequence[int] | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        callback_on_step_end: Callable[["DDPMPipeline", int, int, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Walk home from noise. The arguments that diffusers' pipeline has are in its order, ours have names only.

        Args:
            batch_size: how many pictures, B. A list of seeds or labels, or latents, may say it instead.
            generator: of all random numbers, or a list with one for each picture.
            seeds: one for each picture, in [0, 2^32), instead of a generator: picture i depends on seeds[i] alone, not
                on the others.
            num_inference_steps: steps of the walk home; the length of the walk that the model learned by default.
            timesteps: or the steps themselves, falling.
            eta: 1 walks as DDPM does, 0 without noise as DDIM does. By default 1 with our scheduler, and whatever is
                its own default with another one.
            class_labels: for a network with classes, one for all pictures or one for each.
            guidance_scale: w in eps_null + w (eps_class - eps_null), Ho and Salimans 2022 (their w is one less); above
                1 pictures are more typical of their class. The last class must be the one for "no label".
            latents: noise to start from, (B, C, H, W), N(0, I), instead of noise drawn here.
            height, width: pixels; the size that the network was trained at by default.
            output_type: "pil" (list of images with 1, 3 or 4 channels), "np" (B, H, W, C) or "pt" (B, C, H, W), floats
                in [0, 1], or "latent": x_0 as the walk left it, (B, C, H, W), about [-1, 1].
            return_dict: an ImagePipelineOutput, or a tuple of one.
            callback_on_step_end: called after each step with (pipe, step, t, {"latents": x_t}); may return another
                "latents". Setting `pipe.interrupt = True` in it, or from another thread, ends the walk with that step.
        Raises:
            ValueError: an argument, or two together, cannot be.
        """
        check_output_type(output_type, self.unet.config.in_channels)
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {unknown}: give a list out of {self._callback_tensor_inputs}"
            )

        run = self._prepare(
            batch_size, generator, seeds, num_inference_steps, timesteps, eta, class_labels, guidance_scale, latents,
            height, width,
        )  # fmt: skip
        x_t = run.x_t
        for _, x_t in self._home(run, callback_on_step_end, callback_on_step_end_tensor_inputs):  # noqa: B007
            pass
        self.maybe_free_model_hooks()
        images = to_output(x_t, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def trajectory(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        *,
        seeds: int | Sequence[int] | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        image: Any = None,
    ) -> Iterator[TrajectoryStep]:
        """The walk home itself: yields (t, x_t, x_0_pred) for each step, in [-1, 1] and not yet clipped to pictures.

        The first x_t is noise; the last x_0_pred is the picture, since the last step adds no noise. Arguments are those
        of a call. With `image`, B pictures, it first walks out from them into the noise, by random steps (Eq. 2, DDPM)
        over the same t, rising, with x_0_pred the pictures themselves; then home from there, to other pictures.
        A scheduler that does not say what it takes for the picture (DPM-Solver++, UniPC) gives None for it.
        Walk to the end before the next call: both use the one scheduler.
        """
        x_0 = None
        if image is not None:
            if latents is not None:
                raise ValueError("image and latents are both given: give one of the two")
            x_0 = self._checked_pictures(image, "image")
            batch_size, height, width = _batch_size(batch_size, image=x_0), *x_0.shape[2:]
        run = self._prepare(
            batch_size, generator, seeds, num_inference_steps, timesteps, eta, class_labels, guidance_scale, latents,
            height, width,
        )  # fmt: skip
        return (step for step, _ in self._home(run)) if x_0 is None else self._out_and_home(x_0, run)

    def _out_and_home(self, x_0: Tensor, run: _Run) -> Iterator[TrajectoryStep]:
        x_t, alpha_bar = x_0, 1.0
        for t in reversed(self.scheduler.timesteps.tolist()):
            kept = self.scheduler.alphas_cumprod[t].item() / alpha_bar  # alpha of a step of this length, Eq. (2), DDPM
            noise = randn_tensor(
                x_0.shape, generator=run.step_options.get("generator"), device=x_0.device, dtype=x_0.dtype
            )
            x_t, alpha_bar = kept**0.5 * x_t + (1 - kept) ** 0.5 * noise, alpha_bar * kept
            yield TrajectoryStep(t, x_t, x_0)
        yield from (step for step, _ in self._home(run._replace(x_t=x_t)))

    @torch.no_grad()
    def _home(
        self, run: _Run, callback: Callable[..., Any] | None = None, callback_tensors: Sequence[str] = ()
    ) -> Iterator[tuple[TrajectoryStep, Tensor]]:
        """The loop of Algorithm 2, DDPM: for each step, where it began and where it ended, x_prev."""
        x_t = run.x_t
        self._interrupt = False
        timesteps = self.scheduler.timesteps
        there = timesteps.to(x_t.device)  # moved once: the network wants them there, the scheduler here
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    break
                model_input = self.scheduler.scale_model_input(x_t, t).to(self.unet.dtype)
                model_output = self._denoise(model_input, there[i], run.class_labels).to(x_t.dtype)
                output = self.scheduler.step(model_output, t, x_t, **run.step_options)
                step = TrajectoryStep(int(t), x_t, output.get("pred_original_sample"))
                x_t = output.prev_sample
                if callback is not None:
                    tensors = dict.fromkeys(callback_tensors, x_t)
                    x_t = (callback(self, i, step.t, tensors) or {}).pop("latents", x_t)
                progress_bar.update()
                yield step, x_t

    def _walked(self, x_t: Tensor, labels: Tensor | None, step_options: dict[str, Any]) -> Tensor:
        """Where the walk home from x_t ends, on the steps that the scheduler is set to."""
        arrived = x_t
        for _, arrived in self._home(_Run(x_t, labels, step_options)):  # noqa: B007
            pass
        return arrived

    def _denoise(self, model_input: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The network's output, with guidance if asked: Ho and Salimans 2022, Eq. 6."""
        scale = self._guidance_scale
        if labels is not None and len(labels) != len(model_input):  # one for all
            labels = labels.expand(len(model_input), *labels.shape[1:])
        if labels is None or scale == 1:
            return self.unet(model_input, t, class_labels=labels, return_dict=False)[0]
        null = torch.full_like(labels, self.unet.config.num_class_embeds - 1)
        both = self.unet(
            torch.cat([model_input, model_input]), t, class_labels=torch.cat([labels, null]), return_dict=False
        )[0].to(compute_dtype(model_input.dtype))
        with_class, without = both.chunk(2)
        channels = model_input.shape[1]  # what follows them is a learned variance, which is not guided
        guided = torch.lerp(without[:, :channels], with_class[:, :channels], scale)
        return torch.cat([guided, with_class[:, channels:]], dim=1)

    @property
    def guidance_scale(self) -> float:
        """That of the walk that runs, or ran last."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """How many steps the walk has that runs, or ran last."""
        return len(self.scheduler.timesteps)

    @property
    def interrupt(self) -> bool:
        """Set it to True while the pipeline runs: the walk ends with the current step, where it is."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    # ---- Checking ----------------------------------------------------------------------------------------------------

    def _prepare(
        self,
        batch_size: int,
        generator: Any,
        seeds: int | Sequence[int] | None,
        num_inference_steps: int | None,
        timesteps: Sequence[int] | None,
        eta: float | None,
        class_labels: Any,
        guidance_scale: float,
        latents: Tensor | None,
        height: int | None,
        width: int | None,
    ) -> _Run:
        """Check everything, set the schedule and draw x_T."""
        seeds = [seeds] if isinstance(seeds, (int, np.integer)) else seeds
        batch_size = _batch_size(batch_size, seeds=seeds, class_labels=class_labels, latents=latents)
        if seeds is not None:
            if generator is not None:
                raise ValueError(f"generator and seeds={list(seeds)} are both given: give one of the two")
            # of a larger seed torch's generator on the CPU takes the last 32 bits only
            generator = [torch.Generator().manual_seed(check_int("seeds", seed, 0, 2**32 - 1)) for seed in seeds]
        if isinstance(generator, (list, tuple)):
            generator = list(generator)  # diffusers takes a tuple for a single one
            if len(generator) != batch_size:
                raise ValueError(f"generator is a list of {len(generator)}, but batch_size is {batch_size}")
        labels = self._checked_labels(class_labels, guidance_scale, batch_size)

        device, dtype = self._execution_device, compute_dtype(self.unet.dtype)  # the walk is float32 whatever the network is
        shape = (batch_size, self.unet.config.in_channels, *self._height_width(height, width, latents))
        if latents is not None and (tuple(latents.shape) != shape or not latents.is_floating_point()):
            raise ValueError(
                f"latents are {latents.dtype} of shape {tuple(latents.shape)}: give floats of shape {shape}"
            )

        takes = inspect.signature(self.scheduler.set_timesteps).parameters
        if timesteps is not None:
            if "timesteps" not in takes:
                raise ValueError(
                    f"timesteps are given, but {type(self.scheduler).__name__} takes num_inference_steps only"
                )
            if num_inference_steps is not None:
                raise ValueError(f"timesteps and num_inference_steps={num_inference_steps} are both given: give one")
            self.scheduler.set_timesteps(timesteps=timesteps)
        else:
            num_train_timesteps = self.scheduler.config.num_train_timesteps
            steps = num_train_timesteps if num_inference_steps is None else num_inference_steps
            self.scheduler.set_timesteps(check_int("num_inference_steps", steps, 1, num_train_timesteps))

        takes = inspect.signature(self.scheduler.step).parameters
        step_options: dict[str, Any] = {"generator": generator} if "generator" in takes else {}
        if eta is not None:
            if "eta" not in takes:
                raise ValueError(f"eta is {eta}, but {type(self.scheduler).__name__} has no eta: leave it out")
            if not 0 <= eta <= 1:
                raise ValueError(f"eta is {eta}: give a number from 0 (deterministic) to 1 (ancestral)")
            step_options["eta"] = eta

        if latents is None:
            drawn_on = torch.device("cpu") if device.type == "mps" else device  # mps does not repeat its numbers
            latents = randn_tensor(shape, generator=generator, device=drawn_on, dtype=dtype)
        x_t = latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma  # 1 but for Euler and its kin
        self._guidance_scale = guidance_scale
        return _Run(x_t, labels, step_options)

    def _height_width(self, height: int | None, width: int | None, latents: Tensor | None) -> tuple[int, int]:
        size = self.unet.config.sample_size
        if latents is not None and height is None and width is None and latents.ndim == 4:
            size = tuple(latents.shape[-2:])
        if size is None and (height is None or width is None):
            raise ValueError(f"the network has sample_size None, height is {height} and width {width}: give both")
        default = (size, size) if isinstance(size, int) or size is None else tuple(size)
        height, width = (side if side is not None else usual for side, usual in zip((height, width), default))
        multiple = 2 ** (len(self.unet.config.block_out_channels) - 1)
        for name, side in (("height", height), ("width", width)):
            if not isinstance(side, int) or side < 1 or side % multiple:
                raise ValueError(f"{name} is {side!r}: this network takes positive multiples of {multiple}")
        return height, width

    def _checked_labels(self, class_labels: Any, guidance_scale: float, batch_size: int) -> Tensor | None:
        config = self.unet.config
        number = config.num_class_embeds
        has_classes = number is not None or config.class_embed_type is not None
        if class_labels is None:
            if has_classes:
                allowed = "class_labels" if number is None else f"class_labels in [0, {number})"
                raise ValueError(f"class_labels is None, but this network has classes: give {allowed}")
            if guidance_scale != 1:
                warnings.warn(
                    f"guidance_scale={guidance_scale} has no effect: this network has no classes", stacklevel=4
                )
            return None
        if not has_classes:
            raise ValueError(f"class_labels is {class_labels!r}, but this network has no classes: leave it out")
        labels = torch.as_tensor(class_labels, device=self._execution_device)
        if labels.ndim == 0:
            labels = labels.expand(batch_size)
        if number is None:  # class_embed_type says what its labels are
            if guidance_scale != 1:
                raise ValueError(f"guidance_scale is {guidance_scale}, but no class of this network is for 'no label'")
            return labels
        if labels.is_floating_point() or labels.ndim != 1 or not ((labels >= 0) & (labels < number)).all():
            raise ValueError(f"class_labels is {class_labels!r}: give integers in [0, {number})")
        return labels.long()

    # ---- Saving and loading ------------------------------------------------------------------------------------------

    def register_to_config(self, **kwargs: Any) -> None:
        """Our scheduler is written down as the built-in one, so that the folder loads where only diffusers is."""
        if "scheduler" in kwargs and kwargs["scheduler"][1] == "DDPMScheduler":
            kwargs["scheduler"] = ("diffusers", "DDPMScheduler")
        super().register_to_config(**kwargs)

    def save_pretrained(  # type: ignore[override]  # the options between are passed on as they are
        self, save_directory: str | Path, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As diffusers' `save_pretrained`, and `pipeline.py`, this pipeline as one file of remote code.

        The folder does not depend on where the model was loaded from: saved, loaded and saved again it is the same.
        """
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        super().save_pretrained(str(save_directory), *args, **kwargs)
        folder = Path(save_directory)
        (folder / "pipeline.py").write_text(_source(), encoding="utf-8")
        for config_file in (folder / "model_index.json", folder / "unet" / "config.json"):
            config = json.loads(config_file.read_text(encoding="utf-8"))
            config.pop("_name_or_path", None)
            config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if push_to_hub:
            kept = {name: kwargs[name] for name in ("safe_serialization", "variant") if name in kwargs}
            self.push_to_hub(hub.pop("repo_id", folder.name), **hub, **kept)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[Any], **kwargs: Any) -> Any:
        """As diffusers' `from_pretrained`, of whole models only.

        diffusers loads weights that lack a tensor, or that are not numbers, and then samples from them. Here the folder
        is checked before anything of it is loaded: see loading.py. Weights are read from safetensors alone, unless
        `use_safetensors=False` is given.

        Raises:
            ValueError: the folder is not that of a whole DDPM; the message names the file and the field or tensor.
            OSError: a file is missing or cannot be read.
        """
        name = str(pretrained_model_name_or_path)
        folder = Path(name)
        pickled = kwargs.get("use_safetensors", True) is False
        if not pickled:
            kwargs["use_safetensors"] = True
        if not folder.is_dir():
            if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
                raise FileNotFoundError(
                    f"{name} is no folder here, and not the name of a model on the Hub (user/model)"
                )
            hub = {option: kwargs[option] for option in DOWNLOAD_OPTIONS if option in kwargs}
            folder = Path(cls.download(name, **hub))
        given = {component for component in ("unet", "scheduler") if kwargs.get(component) is not None}
        check_folder(folder, variant=kwargs.get("variant"), given=given | ({"unet"} if pickled else set()))
        pipe = super().from_pretrained(str(folder), **kwargs)
        if "unet" not in given:
            check_finite(pipe.unet, f"the weights of {name}")
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As diffusers' `from_pipe`, but the dtype of the shared network stays what it is unless `dtype` is given."""
        if "torch_dtype" not in kwargs:  # the old name of dtype, until diffusers 0.40
            kwargs.setdefault("dtype", pipeline.dtype)
        return super().from_pipe(pipeline, **kwargs)


HUB_OPTIONS = ("repo_id", "commit_message", "private", "create_pr", "token")
DOWNLOAD_OPTIONS = (
    "cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "variant", "use_safetensors",
    "custom_pipeline", "custom_revision", "trust_remote_code",
)  # fmt: skip


# As remote code all of this is one file. It is read now: another model's may take its place while this process runs.
_WHOLE = Path(__file__).read_text(encoding="utf-8") if DDPMScheduler.__module__ == __name__ else None


def _source() -> str:
    """The text of `pipeline.py`: the files of its parts and this one without relative imports, or, there, itself."""
    if _WHOLE is not None:
        return _WHOLE
    parts = (DDPMScheduler, check_folder, to_output, PictureMethods, DDPMPipeline)
    files = [Path(inspect.getfile(part)) for part in parts]
    lines = [line for file in files for line in [*file.read_text(encoding="utf-8").splitlines(), "", ""]]
    return "\n".join(line for line in lines if not line.startswith("from .")).rstrip("\n") + "\n"


def _config_as_given(scheduler: BuiltInDDPMScheduler) -> dict[str, Any]:
    """Its configuration, in which the built-in class lists positional arguments as left to default: those are lost."""
    config, parameters = dict(scheduler.config), inspect.signature(BuiltInDDPMScheduler).parameters
    listed = config.pop("_use_default_values", [])
    return {**config, "_use_default_values": [name for name in listed if config[name] is parameters[name].default]}


def _batch_size(batch_size: int, **per_image: Any) -> int:
    """B, which a list with one entry for each image may say as well."""
    size = check_int("batch_size", batch_size, 1, 2**31)
    lengths = {}
    for name, values in per_image.items():
        with contextlib.suppress(TypeError):  # None, or one label for all
            lengths[name] = len(values)
    if size == 1:
        size = max([1, *lengths.values()])
    for name, length in lengths.items():
        if length != size:
            raise ValueError(f"{name} has {length} entries, but the batch has {size}: give one for each image")
    return size


def _move_apart(text: str) -> None:
    """Give this version of the remote code a module of its own.

    diffusers runs the `pipeline.py` of every model in one module of one name, the next over the one before, whose
    classes would then find the helpers of the other version.
    """
    apart = f"{__name__}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    for thing in list(globals().values()):
        if inspect.isclass(thing) and thing.__module__ == __name__:
            thing.__module__ = apart
    sys.modules[apart] = sys.modules.pop(__name__)


if _WHOLE is not None and __name__ in sys.modules:
    _move_apart(_WHOLE)
