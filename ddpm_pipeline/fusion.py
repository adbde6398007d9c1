"""WHAT LIES BETWEEN: out from a picture into the noise, and home again to it, to one between two, or to one repaired.

The walk home without noise (DDIM, Song et al. 2021) leads from every place x_T to one picture. It also goes
backwards:

    home  x_prev = coef_x_0 x_0_pred + coef_x_t x_t    DDIM, Eq. 12, with sigma 0
    out   x_t = r x_prev + k eps(x_t, t)               the same equation, solved for x_t

So every picture has a place in the noise, and between two places there is a way. On it lie places that walk home to
pictures between the two: not the grey mean of a full and a half moon, but the three-quarter moon.

`PictureMethods` are methods of the pipeline; what they compute stands above it, one short function for each idea.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .images import check_output_type, to_mask, to_output, to_tensor
from .scheduling_ddpm import DDPMScheduler, check_int, compute_dtype

Predict = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # (x_t, t) to (x_0_pred, eps_pred), nothing clipped
Distance = Callable[[Tensor, Tensor], Tensor]  # two batches of pictures in [-1, 1] to (B,), each at least 0

FUSION_PATHS = ("latent", "noise")
MAX_ROUNDS = 16  # of bisection: the weight is known to 2^-16 then


@dataclass
class FusionOutput(BaseOutput):
    """What `fuse` gives.

    Args:
        images: as output_type says, pair by pair, and for each pair weight by weight.
        weights: places on the way, one for each image; with balance they are those that were found.
        shares: for two images d(a, x) / (d(a, x) + d(b, x)): 0 is the first image, 1 the second; else None.
        network_calls: how often the network was called, with however many images at once.
    """

    images: Any
    weights: list[Any]
    shares: list[float] | None
    network_calls: int


# ---- The deterministic walk, both ways -------------------------------------------------------------------------------


def walk_out(
    predict: Predict,
    scheduler: DDPMScheduler,
    x_0: Tensor,
    timesteps: Sequence[int],
    *,
    refinements: int = 0,
    tolerance: float = 1e-5,
) -> Tensor:
    """From pictures to the places that `walk_home` leads home from: x_t = r x_prev + k eps(x_t, t), step by step.

    x_t stands on both sides. The first guess takes eps of the step before; putting it in gives a better one (Pan et al.
    2023, arXiv 2309.04907, and Meiri et al. 2023, arXiv 2312.12540: fixed-point iteration), and so on.

    Args:
        x_0: (B, C, H, W), in [-1, 1].
        timesteps: falling, as for the walk home.
        refinements: how often at most a guess is put in again after the first time, one network call each.
        tolerance: an image is done with a step when its largest change is no more than this.
    """
    x_prev, eps = x_0, torch.zeros_like(x_0)
    prev_t = -1
    for t in reversed(timesteps):
        r, k = _outward_coefficients(scheduler, t, prev_t)
        guess = best = r * x_prev + k * eps
        smallest = torch.full((len(x_0),), math.inf, device=x_0.device)
        for _ in range(1 + refinements):
            _, eps_pred = predict(guess, t)
            following = r * x_prev + k * eps_pred
            change = (following - guess).abs().flatten(1).amax(1)
            better = (change < smallest) & (smallest > tolerance)  # who is done stays: it must not depend on the others
            best = torch.where(better.view(-1, 1, 1, 1), following, best)
            eps = torch.where(better.view(-1, 1, 1, 1), eps_pred, eps)
            smallest = torch.where(better, change, smallest)
            if not (smallest > tolerance).any():
                break
            guess = following
        x_prev, prev_t = best, t
    return x_prev


def walk_home(predict: Predict, scheduler: DDPMScheduler, x_t: Tensor, timesteps: Sequence[int]) -> Tensor:
    """The walk home without noise and without clipping: DDIM, Eq. 12, with sigma 0. `walk_out` backwards."""
    for t, prev_t in zip(timesteps, [*timesteps[1:], -1]):
        alpha_bars = scheduler.alpha_bars(torch.tensor([t]), torch.tensor([prev_t]))
        coef_x_0, coef_x_t, _ = (number.item() for number in scheduler.posterior_coefficients(*alpha_bars, eta=0.0))
        x_0_pred, _ = predict(x_t, t)
        x_t = coef_x_0 * x_0_pred + coef_x_t * x_t
    return x_t


def _outward_coefficients(scheduler: DDPMScheduler, t: int, prev_t: int) -> tuple[float, float]:
    """(r, k) of x_t = r x_prev + k eps: x_prev = sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev) eps, solved with
    x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)."""
    alpha_bars = scheduler.alpha_bars(torch.tensor([t]), torch.tensor([prev_t]))
    alpha_bar_t, alpha_bar_prev = (number.item() for number in alpha_bars)
    r = math.sqrt(alpha_bar_t / alpha_bar_prev)
    return r, math.sqrt(1 - alpha_bar_t) - r * math.sqrt(1 - alpha_bar_prev)


# ---- The way between places ------------------------------------------------------------------------------------------


def spherical_mean(places: Tensor, weights: Tensor, rounds: int = 100) -> Tensor:
    """Weighted means on the sphere; of two places it is the point of their great circle (slerp).

    The direction is that of the smallest weighted sum of squared angles (Buss and Fillmore 2001, algorithm A1), the
    length the weighted mean of the lengths: so the mean is as far out as the network has seen noise, where a straight
    mean would be nearer to the middle.

    Args:
        places: (M, N, C, H, W), N for each mean.
        weights: (M, N), not negative, each row with sum 1.
    Returns:
        (M, C, H, W), dtype of places. A row that names one place alone gives that place.
    """
    points, w = places.double().flatten(2), weights.to(places.device).double()[..., None]  # (M, N, D), (M, N, 1)
    lengths = points.norm(dim=2, keepdim=True)
    units = points / lengths.clamp(min=1e-30)
    mean = _unit((w * units).sum(1, keepdim=True))  # (M, 1, D)
    for _ in range(rounds):
        cosine = (mean * units).sum(2, keepdim=True)
        across = units - cosine * mean  # from the mean to each point, at right angles to the mean
        size = across.norm(dim=2, keepdim=True)
        move = (w * torch.atan2(size, cosine) * across / size.clamp(min=1e-30)).sum(1, keepdim=True)
        far = move.norm(dim=2, keepdim=True)
        mean = _unit(far.cos() * mean + far.sin() * move / far.clamp(min=1e-30))
        if far.max() < 1e-12:
            break
    found = mean[:, 0] * (w * lengths).sum(1)
    alone, which = (weights == 1).any(1), weights.argmax(1)  # exactly that place, whatever rounding did
    found[alone] = points[alone, which[alone]]
    return found.unflatten(1, places.shape[2:]).to(places.dtype)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-30)


def squared_pixel_distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of the pixels: (B, C, H, W) twice to (B,)."""
    return (x - y).square().flatten(1).mean(1)


def share(distance: Distance, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """d(a, x) / (d(a, x) + d(b, x)): how far x has come from a to b, 0 to 1."""
    to_a, to_b = distance(a, x), distance(b, x)
    return to_a / (to_a + to_b).clamp(min=1e-30)


def balanced(
    draw: Callable[[Tensor, Tensor], Tensor],
    share_of: Callable[[Tensor, Tensor], Tensor],
    wanted: Tensor,
    *,
    tolerance: float = 0.005,
    rounds: int = MAX_ROUNDS,
) -> tuple[Tensor, Tensor]:
    """Places on ways whose pictures have the wanted shares, by bisection of all at once.

    The walk home without noise is continuous, and a way begins at share 0 and ends at 1: so each share between is
    somewhere on it. Near it the way may be steep.

    Args:
        draw: (which of them, (M,) indices; their places on the way, (M,)) to pictures (M, C, H, W).
        share_of: (which; pictures) to shares (M,).
        wanted: shares, (N,), float64, in [0, 1]; 0 and 1 are the ends themselves.
    Returns:
        places (N,) in [0, 1] and pictures (N, C, H, W): the nearest to what was wanted of all that were drawn.
    """
    low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
    low, high = torch.where(wanted == 1, high, low), torch.where(wanted == 0, low, high)
    place, error = (low + high) / 2, torch.full_like(wanted, math.inf)
    pictures: Tensor | None = None
    for _ in range(rounds):
        which = (error > tolerance).nonzero().flatten()
        if pictures is not None:
            which = which[(low < high)[which]]  # the ends need no second look
        if not len(which):
            break
        middle = (low[which] + high[which]) / 2
        drawn = draw(which, middle)
        shares = share_of(which, drawn).to(wanted)
        if pictures is None:
            pictures = drawn.clone()
        off = (shares - wanted[which]).abs()
        better = off < error[which]
        chosen = which[better]
        pictures[chosen], place[chosen], error[chosen] = drawn[better], middle[better], off[better]
        below = shares < wanted[which]
        low[which[below]], high[which[~below]] = middle[below], middle[~below]
    assert pictures is not None
    return place, pictures


# ---- Repair ----------------------------------------------------------------------------------------------------------


def repaint_levels(steps: int, jump_length: int, resamples: int) -> list[int]:
    """The levels of noise that RePaint visits, from `steps` (noise) down to 0 (the picture), one up or down each time.

    At every `jump_length`-th level it jumps up again by so many levels, until it has come down there `resamples` times:
    what was painted gets to fit what was there (Lugmayr et al. 2022, arXiv 2201.09865, section 4.2 and appendix).
    """
    left = dict.fromkeys(range(0, steps - jump_length, jump_length), resamples - 1)
    levels, level = [steps], steps
    while level > 0:
        level -= 1
        levels.append(level)
        if left.get(level, 0) > 0:
            left[level] -= 1
            for _ in range(jump_length):
                level += 1
                levels.append(level)
    return levels


# ---- The methods -----------------------------------------------------------------------------------------------------


class PictureMethods:
    """Methods of the pipeline that begin with pictures: invert, fuse, inpaint, vary.

    Pictures are PIL images, arrays (uint8, or floats in [-1, 1], channels last), tensors (the same, channels first), or
    lists of them, of the size that the network draws. Picture i of the result depends on seeds[i] alone.
    """

    _inversion_error: Tensor | None = None

    @torch.no_grad()
    def invert(
        self: Any,
        images: Any,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[int] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        refinements: int = 0,
        tolerance: float = 1e-5,
        measure_error: bool = True,
    ) -> Tensor:
        """Where in the noise these pictures are: latents from which the walk without noise leads home to them.

        Nothing is clipped on the way. `pipe(latents=..., eta=0, num_inference_steps=...)` with the same number of steps
        walks home (with a scheduler that has clip_sample off it is the exact counterpart).

        Args:
            images: B pictures: PIL images, arrays (uint8, or floats in [-1, 1], channels last), tensors (the same,
                channels first), or a list of them.
            num_inference_steps: of the walk home that shall lead to them; 50, or all of a shorter walk, by default.
            timesteps: or the steps themselves, falling.
            class_labels: for a network with classes, one for all or one for each.
            refinements: a step out is the solution of an equation; so often at most is its guess improved (fixed-point
                iteration, Pan et al. 2023, arXiv 2309.04907), at the price of a network call each. With few steps take
                3 or more: one alone may make the error larger.
            tolerance: enough, for the largest change of a pixel by a refinement.
            measure_error: walk home again, for `inversion_error`.
        Returns:
            (B, C, H, W), about N(0, I). `inversion_error` has the mean squared difference of each picture and what the
            way home makes of it, (B,), pixels in [-1, 1].
        Raises:
            ValueError: pictures, labels or steps that cannot be, or a scheduler that is no DDPMScheduler.
        """
        x_0, labels = self._pictures(images, "images", class_labels)
        steps = self._steps(num_inference_steps, timesteps)
        refinements = check_int("refinements", refinements, 0, 1000)
        if not tolerance > 0:
            raise ValueError(f"tolerance is {tolerance!r}: give a positive number")
        with self.progress_bar(total=len(steps) * (1 + refinements)) as bar:
            predict = _Predictor(self, labels, bar)
            latents = walk_out(predict, self.scheduler, x_0, steps, refinements=refinements, tolerance=tolerance)
        self._inversion_error = None
        if measure_error:
            with self.progress_bar(total=len(steps)) as bar:
                back = walk_home(_Predictor(self, labels, bar), self.scheduler, latents, steps)
            self._inversion_error = squared_pixel_distance(back.clamp(-1, 1), x_0)
        self.maybe_free_model_hooks()
        return latents

    @property
    def inversion_error(self) -> Tensor | None:
        """Of each picture of the last `invert`: mean squared difference to what the walk home makes of it, (B,)."""
        return self._inversion_error

    @torch.no_grad()
    def fuse(
        self: Any,
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
        distance: Distance = squared_pixel_distance,
        class_labels: int | None = None,
        refinements: int = 3,
        tolerance: float = 0.005,
    ) -> FusionOutput | tuple[Any, ...]:
        """The meaningful picture between two pictures, or among several.

        Args:
            image_a, image_b: B pairs of pictures; or image_a alone, a list of N pictures that are fused into one.
            weight: 0 is the first picture, 1 the second; a list gives a strip, one picture for each weight. For N
                pictures a list of N weights with sum 1, or a list of such lists.
            path: "latent": both are inverted, and the great circle between their places in the noise is gone; the walk
                home adds no noise, and the ends are the pictures themselves, up to the error of their inversion.
                "noise": both get the same noise up to `timestep`, are mixed, and walk home from there; quicker and
                softer, and the ends are approximate.
            balance: the weight is a share of distances instead of a place on the path: the picture x is wanted with
                d(a, x) / (d(a, x) + d(b, x)) = weight. Bisection, in at most 16 walks home for all pictures together.
            num_inference_steps: of a whole walk home; 50, or all of a shorter walk, by default.
            timestep: for path="noise", the t to which noise is added, [0, T); T / 2 by default.
            generator, seeds: for path="noise", the noise of pair i; seeds as in a call.
            output_type, return_dict: as in a call.
            eta: for path="noise", as in a call; 1 by default.
            distance: d, of two batches (B, C, H, W) in [-1, 1]: (B,); the mean squared difference by default.
            class_labels: for a network with classes, one for all.
            refinements: of the inversion, see `invert`.
            tolerance: of the share, with balance.
        Returns:
            images pair by pair, and for each pair weight by weight; weights, shares and network_calls: FusionOutput.
        Raises:
            ValueError: an argument, or two together, cannot be.
        """
        check_output_type(output_type, self.unet.config.in_channels)
        if path not in FUSION_PATHS:
            raise ValueError(f"path is {path!r}: give one of {', '.join(map(repr, FUSION_PATHS))}")
        if path == "latent":
            for name, value in (("timestep", timestep), ("generator", generator), ("seeds", seeds), ("eta", eta)):
                if value is not None:
                    raise ValueError(f'{name} is given, but path="latent" has no noise: give it with path="noise"')
        several = image_b is None
        a, labels = self._pictures(image_a, "image_a", class_labels, one_label=True)
        if several:
            ends = a[None]  # (1, N, C, H, W)
        else:
            b, _ = self._pictures(image_b, "image_b", class_labels, one_label=True)
            if a.shape != b.shape:
                raise ValueError(f"image_a is {len(a)} pictures and image_b {len(b)}: give as many of both")
            ends = torch.stack([a, b], dim=1)  # (B, 2, C, H, W)
        if several and balance:
            raise ValueError("balance is for two pictures: give image_a and image_b, or leave balance out")
        rows = _weight_rows(weight, ends.shape[1], several).to(ends.device)  # (K, N)
        pairs, strip = len(ends), len(rows)
        of_pair = torch.arange(pairs, device=ends.device).repeat_interleave(strip)

        steps = self._steps(num_inference_steps, None)
        calls = 0
        if path == "latent":
            flat = ends.flatten(0, 1)
            with self.progress_bar(total=len(steps) * (1 + refinements)) as bar:
                predict = _Predictor(self, labels, bar)
                places = walk_out(predict, self.scheduler, flat, steps, refinements=refinements).view_as(ends)
            calls += predict.calls

            def draw(which: Tensor, weights: Tensor) -> Tensor:
                nonlocal calls
                start = spherical_mean(places[of_pair[which]], weights)
                with self.progress_bar(total=len(steps)) as bar:
                    drawn = walk_home(_Predictor(self, labels, bar), self.scheduler, start, steps)
                calls += len(steps)
                return drawn.clamp(-1, 1)

        else:
            t = self.scheduler.num_steps // 2 if timestep is None else timestep
            steps = self._steps_from(check_int("timestep", t, 0, self.scheduler.num_steps - 1), len(steps))
            each = self._seeds(generator, seeds, pairs)

            def draw(which: Tensor, weights: Tensor) -> Tensor:
                nonlocal calls
                mixed = torch.einsum("mn,mnchw->mchw", weights.to(ends.dtype), ends[of_pair[which]])
                of = [each[pair] for pair in of_pair[which].tolist()]  # the whole strip of a pair has one noise
                calls += len(steps)
                return self._noised_and_home(mixed, steps, of, labels, eta).clamp(-1, 1)

        everything = torch.arange(pairs * strip, device=ends.device)
        if balance:

            def share_of(which: Tensor, drawn: Tensor) -> Tensor:
                pair = ends[of_pair[which]]
                return share(distance, drawn, pair[:, 0], pair[:, 1])

            def draw_at(which: Tensor, place: Tensor) -> Tensor:
                return draw(which, torch.stack([1 - place, place], dim=1))

            wanted = rows[:, 1].repeat(pairs)
            place, pictures = balanced(draw_at, share_of, wanted, tolerance=tolerance)
        else:
            pictures = draw(everything, rows.repeat(pairs, 1))
            place = rows[:, 1].repeat(pairs)
        shares = None
        if not several:
            shares = share(distance, pictures, *ends[of_pair].unbind(1)).tolist()
        self.maybe_free_model_hooks()
        images = to_output(pictures, output_type)
        weights = rows.tolist() if several else place.tolist()
        if not return_dict:
            return (images, weights, shares, calls)
        return FusionOutput(images=images, weights=weights, shares=shares, network_calls=calls)

    @torch.no_grad()
    def vary(
        self: Any,
        images: Any,
        strength: float = 0.5,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: int | Sequence[int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        eta: float | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Pictures like these: out into the noise for a part of the walk, and home again (SDEdit, Meng et al. 2022).

        Args:
            images: B pictures.
            strength: the part, in [0, 1]: 0 gives the pictures themselves, 1 fresh samples, those of
                `pipe(seeds=..., num_inference_steps=...)`.
            num_inference_steps: of a whole walk home; 50, or all of a shorter walk, by default.
            generator, seeds, output_type, return_dict, eta, class_labels: as in a call.
        Raises:
            ValueError: an argument, or two together, cannot be.
        """
        check_output_type(output_type, self.unet.config.in_channels)
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength!r}: give a number from 0 (the same picture) to 1 (a fresh one)")
        x_0, labels = self._pictures(images, "images", class_labels)
        steps = self._steps(num_inference_steps, None)
        each = self._seeds(generator, seeds, len(x_0))
        t = round(strength * self.scheduler.num_steps) - 1
        if strength == 1:
            x_0 = self._noised_and_home(x_0, steps, each, labels, eta, noise_alone=True)
        elif t >= 0:
            x_0 = self._noised_and_home(x_0, self._steps_from(t, len(steps)), each, labels, eta)
        self.maybe_free_model_hooks()
        drawn = to_output(x_0, output_type)
        return ImagePipelineOutput(images=drawn) if return_dict else (drawn,)

    @torch.no_grad()
    def inpaint(
        self: Any,
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
        class_labels: int | Sequence[int] | Tensor | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Paint what the mask hides, so that it fits what it shows: RePaint (Lugmayr et al. 2022, arXiv 2201.09865).

        On the walk home the known pixels are those of a walk out of the picture. To make both fit, the walk jumps back
        out again and again. The known pixels come back as they were, bit by bit.

        Args:
            image: B pictures.
            mask: white, above the middle of its range, where to paint; a PIL image, or an array or tensor, bool, uint8
                or float in [0, 1], of any shape that can be broadcast.
            num_inference_steps: of a walk home without jumps; 50, or all of a shorter walk, by default.
            jump_length: steps that a jump goes back out; in a walk that is no longer there are none. The paper has 10
                of 250.
            resamples: how often each part of the walk is gone, which takes so many times as long; 1 makes no jumps. If
                what is painted does not fit, take more, or more steps. The paper has 10.
            generator, seeds, output_type, return_dict, eta, class_labels: as in a call.
        Raises:
            ValueError: an argument, or two together, cannot be.
        """
        check_output_type(output_type, self.unet.config.in_channels)
        known, labels = self._pictures(image, "image", class_labels)
        hidden = to_mask(mask, tuple(known.shape)).to(known.device)
        steps = self._steps(num_inference_steps, None)
        jump_length = check_int("jump_length", jump_length, 1, self.scheduler.num_steps)
        levels = repaint_levels(len(steps), jump_length, check_int("resamples", resamples, 1, 1000))
        options = _step_options(self._seeds(generator, seeds, len(known)), eta)

        def noise() -> Tensor:
            return randn_tensor(known.shape, options["generator"], device=known.device, dtype=known.dtype)

        # steps[-level] is where level has its noise; level 0 is the picture.
        alpha_bar = [1.0, *(self.scheduler.alphas_cumprod[t].item() for t in reversed(steps))]
        x, level = noise(), levels[0]
        with self.progress_bar(total=len(levels) - 1) as bar:
            for following in levels[1:]:
                if following < level:
                    t = steps[-level]
                    output = self._output(x, t, labels)
                    x = self.scheduler.step(output, t, x, **options).prev_sample
                    a = alpha_bar[following]
                    x = torch.where(hidden, x, known if following == 0 else a**0.5 * known + (1 - a) ** 0.5 * noise())
                else:  # one step out: Eq. (2), DDPM, for steps of this length
                    a = alpha_bar[following] / alpha_bar[level]
                    x = a**0.5 * x + (1 - a) ** 0.5 * noise()
                level = following
                bar.update()
        self.maybe_free_model_hooks()
        drawn = to_output(x, output_type)
        return ImagePipelineOutput(images=drawn) if return_dict else (drawn,)

    # -- what they share -----------------------------------------------------------------------------------------------

    def _pictures(
        self: Any, images: Any, name: str, class_labels: Any, one_label: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Pictures as the network sees them, and labels for them."""
        x_0 = self._checked_pictures(images, name)
        labels = self._checked_labels(class_labels, 1.0, 1 if one_label else len(x_0))
        self._guidance_scale = 1.0
        return x_0, labels

    def _checked_pictures(self: Any, images: Any, name: str) -> Tensor:
        """(B, C, H, W) on the network's device."""
        if not isinstance(self.scheduler, DDPMScheduler):
            raise ValueError(
                f"the scheduler is a {type(self.scheduler).__name__}: this needs a DDPMScheduler; "
                "pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)"
            )
        x_0 = to_tensor(images, name, self.unet.config.in_channels)
        size = self.unet.config.sample_size
        wanted = (size, size) if isinstance(size, int) else size
        if wanted is not None and tuple(x_0.shape[2:]) != tuple(wanted):
            there, here = (" x ".join(map(str, sides)) for sides in (x_0.shape[2:], wanted))
            raise ValueError(f"{name} is {there} pixels: this network draws {here} (height x width)")
        self._height_width(x_0.shape[2], x_0.shape[3], None)
        return x_0.to(self._execution_device, compute_dtype(self.unet.dtype))

    def _steps(self: Any, num_inference_steps: int | None, timesteps: Sequence[int] | None) -> list[int]:
        """Set the scheduler's steps, 50 by default, and give them."""
        if timesteps is not None:
            if num_inference_steps is not None:
                raise ValueError(f"timesteps and num_inference_steps={num_inference_steps} are both given: give one")
            self.scheduler.set_timesteps(timesteps=timesteps)
        else:
            longest = self.scheduler.num_steps
            number = min(50, longest) if num_inference_steps is None else num_inference_steps
            self.scheduler.set_timesteps(check_int("num_inference_steps", number, 1, longest))
        return [int(t) for t in self.scheduler.timesteps]

    def _steps_from(self: Any, t: int, of_whole_walk: int) -> list[int]:
        """Steps home from exactly t, as dense as those of a whole walk."""
        number = max(1, round(of_whole_walk * (t + 1) / self.scheduler.num_steps))
        return [round(i * (t + 1) / number) - 1 for i in range(number, 0, -1)]

    def _seeds(self: Any, generator: Any, seeds: Any, number: int) -> list[int]:
        """A seed for each picture: those given, or drawn from the generator, or from torch's own."""
        if seeds is not None:
            if generator is not None:
                raise ValueError(f"generator and seeds={seeds} are both given: give one of the two")
            given = [seeds] if isinstance(seeds, (int, np.integer)) else list(seeds)
            if len(given) != number:
                raise ValueError(
                    f"seeds has {len(given)} entries, but there are {number} pictures: give one for each "
                    "(for several of one picture, give it several times)"
                )
            return [check_int("seeds", seed, 0, 2**32 - 1) for seed in given]
        generators = list(generator) if isinstance(generator, (list, tuple)) else [generator] * number
        if len(generators) != number:
            raise ValueError(f"generator is a list of {len(generators)}, but there are {number} pictures")
        devices = ["cpu" if each is None else each.device for each in generators]
        return [int(torch.randint(2**32, (), generator=g, device=device)) for g, device in zip(generators, devices)]

    def _output(self: Any, x_t: Tensor, t: int, labels: Tensor | None) -> Tensor:
        """What the network says, in the dtype of x_t."""
        return self._denoise(x_t.to(self.unet.dtype), torch.tensor(t, device=x_t.device), labels).to(x_t.dtype)

    def _noised_and_home(
        self: Any,
        x_0: Tensor,
        steps: list[int],
        seeds: list[int],
        labels: Tensor | None,
        eta: float | None,
        noise_alone: bool = False,
    ) -> Tensor:
        """Noise at steps[0] on x_0, or noise alone, and the walk home from there: Algorithm 2, DDPM."""
        options = _step_options(seeds, eta)
        x_t = randn_tensor(x_0.shape, options["generator"], device=x_0.device, dtype=x_0.dtype)
        if not noise_alone:
            x_t = self.scheduler.add_noise(x_0, x_t, torch.tensor([steps[0]], device=x_0.device))
        self.scheduler.set_timesteps(timesteps=steps)
        return self._walked(x_t, labels, options)


def _step_options(seeds: list[int], eta: float | None) -> dict[str, Any]:
    """What the scheduler's step is given: a generator for each picture, and eta unless it is left to default."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return {"generator": generators} | ({} if eta is None else {"eta": eta})


class _Predictor:
    """The network as `Predict`: (x_0_pred, eps_pred) of x_t at t, with nothing clipped. Counts its calls."""

    def __init__(self, pipe: Any, labels: Tensor | None, bar: Any) -> None:
        self.pipe, self.labels, self.bar, self.calls = pipe, labels, bar, 0

    def __call__(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        scheduler = self.pipe.scheduler
        output, _ = scheduler.split_output(self.pipe._output(x_t, t, self.labels), x_t)
        self.calls += 1
        self.bar.update()
        at = torch.tensor([t])
        x_0_pred, eps_pred = (
            scheduler.convert_prediction(output, at, x_t, scheduler.prediction_type, target)
            for target in ("sample", "epsilon")
        )
        return x_0_pred, eps_pred


def _weight_rows(weight: Any, number: int, several: bool) -> Tensor:
    """(K, N) float64: what share each of N pictures has in each of K results."""
    allowed = f"{number} numbers of at least 0 with sum 1, or lists of them" if several else "numbers from 0 to 1"
    try:
        given = torch.as_tensor(np.array(weight, dtype=np.float64))
    except (TypeError, ValueError):
        raise ValueError(f"weight is {weight!r}: give {allowed}") from None
    if several:
        rows = given[None] if given.ndim == 1 else given
        fits = rows.ndim == 2 and rows.shape[1] == number and len(rows) > 0
        fits = fits and bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 1e-6).all())
    else:
        second = given.reshape(-1)
        rows = torch.stack([1 - second, second], dim=1)
        fits = given.ndim <= 1 and len(second) > 0 and bool(((second >= 0) & (second <= 1)).all())
    if not fits:
        raise ValueError(f"weight is {weight!r}: give {allowed}")
    return rows
