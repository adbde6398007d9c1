"""THE PIPELINE: sampling, inversion, interpolation, inpainting and image-to-image with a trained DDPM.

    x_T ~ N(0, I);  for t in the timesteps: x_t -> network -> one reverse step (Algorithm 2, DDPM);  the image is x_0

`DDPMPipeline` is a drop-in for diffusers' pipeline of that name. Its methods check their arguments and call functions
of the other modules.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline as BuiltInDDPMPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as BuiltInDDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  diffusers looks for it in this module
from torch import Tensor

from .arguments import check_fusion, image_seeds, make_generators, prepare_sampling, prepare_sdedit, repeat_for_seeds
from .calls import Calls, OfThread, WithCalls, checked_callback
from .denoiser import prepare_denoiser
from .guide import WithGuide
from .images import check_output_type, prepare_images, size_of, squared_pixel_distance, to_distance, to_mask, to_output
from .inpainting import repaint, repaint_levels
from .interpolation import FusionOutput, check_weights, interpolate, latent_path, noise_path, stack_endpoints
from .inversion import ddim_invert, ddim_sample
from .labels import class_names_of
from .loading import check_finite, check_folder
from .sampling import TrajectoryStep
from .saving import PUSH_OPTIONS, complete_folder, isolate_remote_code, local_folder
from .schedulers import check_number, count_steps, match_betas, sdedit_schedule, set_schedule, step_options, to_ours
from .scheduling_ddpm import check_int

ClassLabels = int | str | Sequence[int | str] | Tensor | None  # one for all images or one for each, numbers or names
DEFAULT_STEPS = 50  # sampling steps of the methods that start from images


class DDPMPipeline(WithCalls, WithGuide, BuiltInDDPMPipeline):
    """Images from a trained DDPM, a drop-in for diffusers' DDPMPipeline.

    `invert`, `fuse`, `vary` and `inpaint` start from images: files, PIL images, arrays (uint8, uint16, or floats in
    [-1, 1], channels last), tensors (the same, channels first), or lists of them, of the size that the network
    generates; files and PIL images are read, and resized, as in training. They need our scheduler. An invalid argument
    is a ValueError that names it, its value and what is allowed.

    Args:
        unet: the network, a UNet2DModel, with or without classes.
        scheduler: a built-in DDPMScheduler becomes ours with the same configuration; any other scheduler of diffusers
            (DDIM, DPM-Solver++, UniPC, Euler, ...) is used as it is.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(self, unet: UNet2DModel, scheduler: BuiltInDDPMScheduler) -> None:
        if type(scheduler) is BuiltInDDPMScheduler:
            scheduler = to_ours(scheduler)
        super().__init__(unet=unet, scheduler=scheduler)  # type: ignore[arg-type]  # diffusers types it as its dummy
        self._calls, self._inversion_errors = Calls(), OfThread(None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler" and self.__dict__.get("scheduler") is not None:
            match_betas(value, self.scheduler)
        super().__setattr__(name, value)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes 0, 1, ... that `class_labels` takes; None for a network without them."""
        return class_names_of(self.unet)

    # ---- Sampling ----------------------------------------------------------------------------------------------------

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
        calibrated: bool | None = None,
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        autoguidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        callback_on_step_end: Callable[["DDPMPipeline", int, int, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images. The positional arguments are those of diffusers' pipeline; ours are keyword-only.

        Args:
            batch_size: number of images, B. The length of seeds, class_labels or latents may give it instead.
            generator: for all random numbers, or a list with one for each image.
            seeds: one for each image, in [0, 2^32), instead of a generator. Image i depends on seeds[i] alone, not on
                the rest of the batch.
            num_inference_steps: sampling steps; by default the number of diffusion timesteps.
            timesteps: the timesteps themselves instead, descending.
            eta: 1 is ancestral sampling (DDPM), 0 is deterministic (DDIM). By default 1 with our scheduler, and the
                default of its own with another one.
            calibrated: take the steps from a calibrated table of the model. By default where there is
                one for this number of steps and this guidance, and neither eta nor timesteps is given; True: else it is
                an error; False: never.
            class_labels: for a network with classes, one for all images or one for each: numbers or `class_names`.
            guidance_scale: classifier-free guidance, w in eps_null + w (eps_class - eps_null) (Ho and Salimans 2022,
                whose w is one less). Above 1, images are more typical of their class, and alike.
            autoguidance_scale: autoguidance, w in weak + w (strong - weak), where weak is the output of `pipe.guide`
                (Karras et al. 2024, arXiv 2406.02507). Above 1, images have fewer of the errors of the network.
            guidance_interval: (lo, hi): guidance at the timesteps t with lo <= t < hi alone (Kynkaanniemi et al. 2024,
                arXiv 2404.07724, whose sigma is sqrt(1 / alpha_bar_t - 1)): without the noisiest ones images stay
                diverse. By default at all timesteps.
            latents: x_T, (B, C, H, W), N(0, I), instead of noise drawn here.
            height, width: in pixels; by default the size that the network was trained at.
            output_type: "pil" (list of images with 1, 3 or 4 channels), "np" (B, H, W, C) or "pt" (B, C, H, W), floats
                in [0, 1], or "latent": x_0 as sampled, (B, C, H, W), about [-1, 1].
            return_dict: return an ImagePipelineOutput; else a tuple of one.
            callback_on_step_end: called after each step with (pipe, step, t, {"latents": x_t}); may return a dict with
                other "latents". `pipe.interrupt = True`, set in it or from another thread, stops after that step.
        """
        check_output_type(output_type, self.unet.config.in_channels)
        callback = checked_callback(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        run = prepare_sampling(
            self.unet, self.scheduler, self._execution_device, batch_size=batch_size, generator=generator, seeds=seeds,
            num_inference_steps=num_inference_steps, timesteps=timesteps, eta=eta, calibrated=calibrated,
            class_labels=class_labels, guidance_scale=guidance_scale, autoguidance_scale=autoguidance_scale,
            guidance_interval=guidance_interval, guide=self.guide, latents=latents, height=height, width=width,
        )  # fmt: skip
        all_steps = num_inference_steps is None and timesteps is None and len(run.scheduler.timesteps) > DEFAULT_STEPS
        x_0 = self._sample(run, callback, "all steps; num_inference_steps=50 is faster" if all_steps else None)
        return self._output(x_0, output_type, return_dict)

    def trajectory(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        *,
        seeds: int | Sequence[int] | None = None,
        timesteps: Sequence[int] | None = None,
        eta: float | None = None,
        calibrated: bool | None = None,
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        autoguidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        image: Any = None,
    ) -> Iterator[TrajectoryStep]:
        """The sampling trajectory: yields (t, x_t, x_0_pred) for each step, in [-1, 1] and not clipped.

        The first x_t is noise. The last x_0_pred is the image, since the last step adds no noise. The arguments are
        those of a call. With `image`, B images, the trajectory starts with the forward process from them, by steps of
        Eq. (2), DDPM, over the same timesteps, ascending, with the images as x_0_pred; sampling from there leads to
        other images. Schedulers that do not predict x_0 (DPM-Solver++, UniPC) give None for it.
        """
        if image is not None and latents is not None:
            raise ValueError("image and latents are both given: give one of the two")
        x_0 = None if image is None else repeat_for_seeds(self._prepare_images(image, "image"), generator, seeds)
        run = prepare_sampling(
            self.unet, self.scheduler, self._execution_device, batch_size=batch_size, generator=generator, seeds=seeds,
            num_inference_steps=num_inference_steps, timesteps=timesteps, eta=eta, calibrated=calibrated,
            class_labels=class_labels, guidance_scale=guidance_scale, autoguidance_scale=autoguidance_scale,
            guidance_interval=guidance_interval, guide=self.guide, latents=latents, height=height, width=width,
            image=x_0,
        )  # fmt: skip
        return self._trajectory(run, x_0)

    # ---- From images -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def invert(
        self,
        images: Any,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | None = None,
        class_labels: ClassLabels = None,
        fixed_point_iterations: int = 0,
        tolerance: float = 1e-5,
        measure_error: bool = True,
    ) -> Tensor:
        """DDIM inversion: latents that lead to these images when they are sampled without noise.

        To sample from them, call `pipe(latents=..., eta=0, num_inference_steps=...)` with the same number of steps.
        Inversion does not clip, so it is exact for a scheduler with clip_sample off.

        Args:
            images: B images.
            num_inference_steps: sampling steps from the latents; 50 by default, or all timesteps if there are fewer.
            timesteps: the timesteps themselves instead, descending.
            class_labels: as in a call.
            fixed_point_iterations: each timestep solves an implicit equation; at most this many iterations improve the
                solution, one network call each (Pan et al. 2023, arXiv 2309.04907). With few steps take 3 or more: a
                single one may increase the error.
            tolerance: iterations stop when no pixel changes by more than this.
            measure_error: sample from the latents, for `inversion_error`.
        Returns:
            (B, C, H, W), about N(0, I).
        """
        x_0 = self._prepare_images(images, "images")
        denoiser = prepare_denoiser(self.unet, self.scheduler, x_0.device, len(x_0), class_labels)
        iterations = check_int("fixed_point_iterations", fixed_point_iterations, 0, 1000)
        check_number("tolerance", tolerance, 1e-300, 1e300, "a positive number")
        scheduler = set_schedule(self.scheduler, num_inference_steps, timesteps, DEFAULT_STEPS)
        steps = scheduler.timesteps.tolist()
        self._calls.begin(len(steps))
        with self._progress(denoiser, len(steps) * (1 + iterations)):
            latents = ddim_invert(denoiser, scheduler, x_0, steps, iterations, tolerance)
        error = None
        if measure_error:
            with self._progress(denoiser, len(steps)):
                reconstruction = ddim_sample(denoiser, scheduler, latents, steps).clamp(-1, 1)
            error = squared_pixel_distance(reconstruction, x_0)
        self._inversion_errors.set(error)
        self.maybe_free_model_hooks()
        return latents

    @torch.no_grad()
    def fuse(
        self,
        image_a: Any,
        image_b: Any = None,
        weight: float | Sequence[Any] = 0.5,
        path: str = "latent",
        balance: bool = False,
        num_inference_steps: int | None = None,
        timestep: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: int | Sequence[int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        eta: float | None = None,
        distance: Any = squared_pixel_distance,
        class_labels: int | str | None = None,
        fixed_point_iterations: int = 3,
        tolerance: float = 0.005,
    ) -> FusionOutput | tuple[Any, ...]:
        """Interpolation between two images, or among several.

        Args:
            image_a, image_b: B pairs of images; or image_a alone, a list of N images that are fused into one.
            weight: 0 is the first image, 1 the second; a list gives one image for each weight. For N images a list of N
                weights with sum 1, or a list of such lists.
            path: "latent" interpolates spherically between the latents of the images (see `invert`) and samples without
                noise; weights 0 and 1 give the images themselves, up to the inversion error. "noise" mixes the images,
                adds noise up to `timestep` and samples from there: faster and smoother, with approximate endpoints.
            balance: read the weight as a distance ratio: find the image x with d(a, x) / (d(a, x) + d(b, x)) = weight.
                Bisection, at most 16 sampling runs for all images together.
            num_inference_steps: sampling steps from pure noise; 50 by default, or all timesteps if there are fewer.
            timestep: for path="noise", the index t that noise is added up to, in [0, T); T / 2 by default.
            generator, seeds: for path="noise", the noise of pair i; as in a call.
            output_type, return_dict: as in a call.
            eta: for path="noise", as in a call; 1 by default.
            distance: d, a function from two batches (B, C, H, W) in [-1, 1] to (B,); by default the mean squared
                difference of the pixels. Or an extractor, or (not in remote code) its name or file as for
                `make_extractor`, such as "facebook/dinov2-small": the mean squared difference of its features.
            class_labels: for a network with classes, one for all: a number or a name.
            fixed_point_iterations: of the inversion, see `invert`.
            tolerance: of the distance ratio, with balance.
        Returns:
            FusionOutput: images, weights, distance_ratios, network_calls, double_exposures; pair by pair, and weight by
            weight in a pair. A tuple has the first four.
        """
        check_output_type(output_type, self.unet.config.in_channels)
        several = image_b is None
        check_fusion(path, balance and several, timestep=timestep, generator=generator, seeds=seeds, eta=eta)
        distance_of = to_distance(distance, self._execution_device)
        a = self._prepare_images(image_a, "image_a")
        denoiser = prepare_denoiser(self.unet, self.scheduler, a.device, 1, class_labels)
        b = None if several else self._prepare_images(image_b, "image_b")
        endpoints = stack_endpoints(a, b)
        if several and len(a) == 1:
            raise ValueError("image_b is None: give two images, or image_a as a list of at least two")
        weights = check_weights(weight, endpoints.shape[1], several)
        iterations = check_int("fixed_point_iterations", fixed_point_iterations, 0, 1000)
        check_number("tolerance", tolerance, 1e-300, 1e300, "a positive number")
        number = count_steps(self.scheduler, num_inference_steps, DEFAULT_STEPS)

        if path == "latent":
            scheduler = set_schedule(self.scheduler, number, None)
            steps = scheduler.timesteps.tolist()
            self._calls.begin(number)
            with self._progress(denoiser, number * (1 + iterations)):
                latents = ddim_invert(denoiser, scheduler, endpoints.flatten(0, 1), steps, iterations)
            image_at = latent_path(denoiser, scheduler, latents.view_as(endpoints), steps)
            image_at = self._progress(denoiser, number)(image_at)  # a progress bar for each sampling run
        else:
            t = self.scheduler.num_steps // 2 if timestep is None else timestep
            t = check_int("timestep", t, 0, self.scheduler.num_steps - 1)
            scheduler = sdedit_schedule(self.scheduler, t, number)
            endpoints = repeat_for_seeds(endpoints, generator, seeds)

            def image_to_image(images: Tensor, seeds: list[int]) -> Tensor:
                return self._sample(prepare_sdedit(scheduler, denoiser, images, t, seeds=seeds, eta=eta))

            image_at = noise_path(image_to_image, endpoints, image_seeds(generator, seeds, len(endpoints)))
        result = interpolate(
            image_at, endpoints, weights, balance=balance, distance=distance_of, tolerance=tolerance,
            deterministic=path == "latent",
        )  # fmt: skip
        self.maybe_free_model_hooks()
        images, ratios = to_output(result.images, output_type), result.distance_ratios
        used_weights = (result.weights if several else result.weights[:, 1]).tolist()
        fused = images, used_weights, None if ratios is None else ratios.tolist(), denoiser.num_calls
        return FusionOutput(*fused, result.double_exposures) if return_dict else fused

    @torch.no_grad()
    def vary(
        self,
        images: Any,
        strength: float = 0.5,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: int | Sequence[int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        eta: float | None = None,
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        autoguidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Image-to-image (SDEdit, Meng et al. 2022): adds noise to images and samples from there.

        Args:
            images: B images.
            strength: fraction of the diffusion timesteps, in [0, 1]. 0 returns the images themselves, 1 fresh samples,
                those of `pipe(seeds=..., num_inference_steps=..., calibrated=False)`.
            num_inference_steps: sampling steps from pure noise; 50 by default, or all timesteps if there are fewer.
            generator, seeds, output_type, return_dict, eta, class_labels, guidance_scale, autoguidance_scale,
                guidance_interval: as in a call.
        """
        check_output_type(output_type, self.unet.config.in_channels)
        strength = check_number("strength", strength, 0, 1, "a number from 0 (the same image) to 1 (a fresh sample)")
        x_0 = repeat_for_seeds(self._prepare_images(images, "images"), generator, seeds)
        denoiser = prepare_denoiser(
            self.unet, self.scheduler, x_0.device, len(x_0), class_labels, guidance_scale, guidance_interval,
            autoguidance_scale, self.guide,
        )  # fmt: skip
        number = count_steps(self.scheduler, num_inference_steps, DEFAULT_STEPS)
        seeds = image_seeds(generator, seeds, len(x_0))
        t = round(strength * self.scheduler.num_steps) - 1 if strength < 1 else None
        if t is None or t >= 0:
            scheduler = sdedit_schedule(self.scheduler, t, number)
            x_0 = self._sample(prepare_sdedit(scheduler, denoiser, x_0, t, seeds=seeds, eta=eta))
        else:
            step_options(self.scheduler, None, eta)  # an invalid eta is an error at strength 0, too
        return self._output(x_0, output_type, return_dict)

    @torch.no_grad()
    def inpaint(
        self,
        image: Any,
        mask: Any,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: int | Sequence[int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        jump_length: int = 5,
        resamples: int = 5,
        eta: float | None = None,
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        autoguidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Inpainting with RePaint (Lugmayr et al. 2022, arXiv 2201.09865): generates what the mask covers.

        Known pixels follow the forward process from the image, the others the reverse process; resampling makes the two
        agree. The known pixels of the result are those of the image, bit for bit.

        Args:
            image: B images.
            mask: white, above the middle of its range, where to paint: a file or PIL image (luminance times alpha) of
                the image's own size or the network's, or an array or tensor, bool, uint8, uint16 or in [0, 1], of any
                shape that broadcasts.
            num_inference_steps: sampling steps without jumps; 50 by default, or all timesteps if there are fewer.
            jump_length: timesteps of one jump back to more noise; the paper has 10 of 250. There is no jump if
                num_inference_steps is not larger.
            resamples: how often each part of the schedule is sampled, which takes that many times as long; 1 makes no
                jumps. If the result does not match its surroundings, take more, or more steps. The paper has 10.
            generator, seeds, output_type, return_dict, eta, class_labels, guidance_scale, autoguidance_scale,
                guidance_interval: as in a call.
        """
        check_output_type(output_type, self.unet.config.in_channels)
        known = repeat_for_seeds(self._prepare_images(image, "image"), generator, seeds)
        denoiser = prepare_denoiser(
            self.unet, self.scheduler, known.device, len(known), class_labels, guidance_scale, guidance_interval,
            autoguidance_scale, self.guide,
        )  # fmt: skip
        to_paint = to_mask(mask, tuple(known.shape), size_of(self.unet), image).to(known.device)
        jump_length = check_int("jump_length", jump_length, 1, self.scheduler.num_steps)
        number = count_steps(self.scheduler, num_inference_steps, DEFAULT_STEPS)
        levels = repaint_levels(number, jump_length, check_int("resamples", resamples, 1, 1000))
        options = step_options(self.scheduler, make_generators(image_seeds(generator, seeds, len(known))), eta)
        scheduler = set_schedule(self.scheduler, number, None)
        self._calls.begin(number, denoiser.guidance_scale)
        with self._progress(denoiser, sum(after < before for before, after in zip(levels, levels[1:]))):
            x_0 = repaint(denoiser, scheduler, known, to_paint, levels, **options)
        return self._output(x_0, output_type, return_dict)

    def _prepare_images(self, images: Any, name: str) -> Tensor:
        return prepare_images(images, name, self.unet, self.scheduler).to(self._execution_device)

    def _output(self, x_0: Tensor, output_type: str | None, return_dict: bool) -> ImagePipelineOutput | tuple[Any]:
        self.maybe_free_model_hooks()
        images = to_output(x_0, output_type, stacklevel=4)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def __repr__(self) -> str:
        """The classes as they are: the configuration has the names that diffusers loads, which are its own."""
        parts = (f"{name}={type(part).__module__}.{type(part).__name__}" for name, part in self.components.items())
        return f"{type(self).__module__}.{type(self).__name__}({', '.join(parts)})"

    # ---- Saving and loading ------------------------------------------------------------------------------------------

    def register_to_config(self, **kwargs: Any) -> None:
        """Register our scheduler under the built-in class's name, so that the folder loads with diffusers alone."""
        if "scheduler" in kwargs and kwargs["scheduler"][1] == "DDPMScheduler":
            kwargs["scheduler"] = ("diffusers", "DDPMScheduler")
        super().register_to_config(**kwargs)

    def save_pretrained(  # type: ignore[override]  # the options between are passed on as they are
        self, save_directory: str | Path, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """diffusers' `save_pretrained`, which also writes `pipeline.py`, this pipeline as one file of remote code.

        The folder does not depend on where the model was loaded from: saved, loaded and saved again it is the same.
        """
        hub = {name: kwargs.pop(name) for name in PUSH_OPTIONS if name in kwargs}
        super().save_pretrained(str(save_directory), *args, **kwargs)
        folder = Path(save_directory)
        options = dict(zip(("safe_serialization", "variant"), args)) | kwargs
        kept = {name: options[name] for name in ("safe_serialization", "variant") if name in options}
        self.save_guide(folder, kept.get("variant"))
        complete_folder(folder, **kept)
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", folder.name), **hub, **kept)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[Any], **kwargs: Any) -> Any:
        """diffusers' `from_pretrained`, for complete models only.

        diffusers loads weights with a missing tensor or non-finite values, and samples from them. Here the folder is
        checked before anything is loaded: see loading.py. Of weights in .bin files only tensors are read, and no code.

        Raises:
            ValueError: the folder is not a complete DDPM; the message names the file and the field or tensor.
            OSError: a file is missing or cannot be read.
        """
        name = str(pretrained_model_name_or_path)
        folder = local_folder(name, kwargs, cls.download)
        passed = {component for component in ("unet", "scheduler") if kwargs.get(component) is not None}
        options = {name: kwargs.get(name) for name in ("variant", "use_safetensors")}
        kwargs["use_safetensors"] = check_folder(folder, skip=passed, **options)
        pipe = super().from_pretrained(str(folder), **kwargs)
        if "unet" not in passed:
            check_finite(pipe.unet, f"the weights of {name}")
        return pipe


isolate_remote_code()
