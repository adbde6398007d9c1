"""What is measured of a model: its samples against training pictures, and the bound of held-out ones.

The mathematics is in ddpm_pipeline/fidelity.py and likelihood.py; here is which sets are compared, and the rows of the
report. Each distance has a floor beside it: the same distance of as many real pictures.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_pipeline import DDPMScheduler, fidelity, likelihood
from ddpm_pipeline.features import extract_features
from ddpm_pipeline.pixels import from_pixels, num_levels
from training.config import OF_FEATURES
from training.data.split import DataSplit, evenly
from training.evaluation.samples import Model
from training.run.runtime import dtype

FEWEST = 6  # pictures in a floor: density and coverage look at the five nearest neighbours of one

Row = dict[str, Any]


# ---- Which pictures --------------------------------------------------------------------------------------------------


class Real(NamedTuple):
    """Real pictures: what samples are compared with, and as many as there are samples, for the floor."""

    reference: np.ndarray
    reference_words: str
    floor: np.ndarray
    floor_words: str
    apart: np.ndarray  # (len(reference),) bool: what the floor is compared with, all but the floor's own pictures
    held_out: np.ndarray


def real_pictures(
    parts: DataSplit, num_reference: int, number: int, warnings: list[str], kind: str = "training pictures"
) -> Real:
    """The reference, num_reference of the training pictures (0: all), and `number` others for the floor.

    These are held out from training, or, if too few are, training pictures, at most half of them; the floor is then
    measured against those of the reference that are not in it.

    Args:
        kind: what the pictures are called in the report.
    """
    rows, held_out = parts.train_indices, parts.held_out
    chosen = rows if not num_reference or num_reference >= len(rows) else rows[evenly(len(rows), num_reference)]
    if len(held_out) >= number:
        floor, words, apart = held_out[evenly(len(held_out), number)], "held-out pictures", np.ones(len(chosen), bool)
    else:
        left = np.setdiff1d(rows, chosen)
        source = left if len(left) >= number else rows
        taken = source[evenly(len(source), min(number, len(rows) // 2))]
        floor, words, apart = parts.data.images[taken], kind, ~np.isin(chosen, taken)
    if min(len(floor), int(apart.sum())) < FEWEST:
        floor = floor[:0]
        warnings.append(f"there is no floor: {len(rows)} pictures are too few to take {FEWEST} out")
    elif len(floor) < number:
        warnings.append(
            f"the floor is of {len(floor)} pictures, as there are no more, and distances and manifolds depend on their "
            f"number: it does not quite compare with {number} samples"
        )
    which = f"{len(chosen)} {kind}" if len(chosen) < len(rows) else f"all {len(rows)} {kind}"
    return Real(np.asarray(parts.data.images[chosen]), which, np.asarray(floor), words, apart, held_out)


def digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


# ---- Samples ---------------------------------------------------------------------------------------------------------


def compare(pixels: np.ndarray, real: Real, extractor: Any, metrics: Sequence[str], cache_dir: Path) -> Iterator[Row]:
    """Rows of measures between samples and the reference."""
    if not set(metrics) & set(OF_FEATURES):
        return
    features = extract_features(extractor, pixels)
    reference = extract_features(extractor, real.reference, cache_dir=cache_dir)
    apart = reference[torch.from_numpy(real.apart)]
    floor = extract_features(extractor, real.floor, cache_dir=cache_dir) if len(real.floor) else None

    def row(measure: str, name: str, found: fidelity.Estimate, floor: float | None) -> Row:
        return _row(measure, name, found, floor, len(pixels)) | {"extractor": extractor.name}

    if "frechet" in metrics:
        found = fidelity.jackknife(fidelity.frechet_distance, features, reference)
        best = None if floor is None else fidelity.frechet_distance(floor, apart)
        yield row("frechet_distance", "FID" if extractor.is_inception else "Frechet distance", found, best)
    if "kernel" in metrics:
        found = fidelity.kernel_distance(features, reference)
        best = None if floor is None else fidelity.kernel_distance(floor, apart).value
        yield row("kernel_distance", "KID" if extractor.is_inception else "kernel distance", found, best)
    # Of equally many pictures: the balls around them shrink with their number.
    equal = reference[evenly(len(reference), len(pixels))]
    for metric, measures, statistic in (
        ("precision", ("precision", "recall"), fidelity.precision_recall),
        ("density", ("density", "coverage"), fidelity.density_coverage),
    ):
        if metric in metrics:
            best_of = (None, None) if floor is None else statistic(floor, apart[evenly(len(apart), len(floor))])
            for measure, found, best in zip(measures, fidelity.jackknives(statistic, features, equal), best_of):
                yield row(measure, measure, found, best)
    if "memorisation" in metrics and len(real.held_out) > 1:
        held_out = extract_features(extractor, real.held_out, cache_dir=cache_dir)
        found = fidelity.memorisation(features, reference, held_out)
        yield row("memorisation", "nearer to a training picture than held-out ones are", found, 0.5)


def shifts(pixels: np.ndarray, real: Real) -> Iterator[Row]:
    """Rows of how much brighter each channel is, and how much wider its values spread."""
    of_samples = fidelity.channel_shift(pixels, real.reference)
    of_real = fidelity.channel_shift(real.floor, real.reference[real.apart]) if len(real.floor) else None
    for channel, shift in enumerate(of_samples):
        which = f", channel {channel}" if len(of_samples) > 1 else ""
        best = None if of_real is None else of_real[channel]
        for measure, name, found, floor in (
            ("mean_shift", f"brighter by{which} (of 1)", shift.mean, best and best.mean.value),
            ("std_ratio", f"spread over that of real ones{which}", shift.std_ratio, best and best.std_ratio.value),
        ):
            yield _row(measure, name, found, floor, len(pixels)) | {"channel": channel}


def _row(measure: str, name: str, found: fidelity.Estimate, floor: float | None, n: int) -> Row:
    return {"measure": measure, "name": name, "value": found.value, "standard_error": found.standard_error,
            "floor": floor, "n": n, "extractor": None}  # fmt: skip


# ---- Held-out pictures -----------------------------------------------------------------------------------------------


class HeldOut:
    """The held-out pictures that this process measures the bits of.

    Args:
        images: (M, C, H, W) uint8 or uint16.
        processes: an Accelerator.
    """

    def __init__(self, images: np.ndarray, *, batch_size: int, seed: int, processes: Any) -> None:
        self._images, self._batch_size, self._seed, self._processes = images, batch_size, seed, processes
        self.shape = images.shape[1:]
        self.levels = num_levels(images.dtype)

    def _batches(self, number: int, title: str) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Of `number` pictures those of this process: their places in the row, and they."""
        chosen = evenly(len(self._images), number)
        mine = torch.arange(len(chosen))[self._processes.process_index :: self._processes.num_processes]
        quiet = not self._processes.is_main_process
        for index in tqdm(mine.split(self._batch_size), title, disable=quiet, leave=False):
            if not len(index):  # more processes than pictures
                continue
            yield index, np.asarray(self._images[chosen[index.numpy()]])

    def _gathered(self, parts: list[Any]) -> list[Any]:
        from accelerate.utils import gather_object

        return gather_object(parts) if self._processes.num_processes > 1 else parts

    def bound(self, model: Model, variance_type: str, number: int, strata: int) -> tuple[Row, Row]:
        """A row of the bound with this variance, and its curves over t; strata 0: from all steps."""
        began = time.monotonic()
        device, computes_in = self._processes.device, dtype(self._processes)
        unet = model.pipe.unet.to(device)
        walk: Any = DDPMScheduler.from_config(model.pipe.scheduler.config, variance_type=variance_type)
        few = min(strata, walk.num_steps - 1) or None

        def network(x_t: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(device.type, computes_in, enabled=computes_in != torch.float32):
                output: Tensor = unet(x_t, t, return_dict=False)[0]
            return output.to(x_t.dtype)

        found = []
        for index, pixels in self._batches(number, f"bound, {model.weights}, {variance_type}"):
            x_0 = from_pixels(pixels, device)
            part = likelihood.variational_bound(
                network, walk, x_0, index=index, seed=self._seed, strata=few, levels=self.levels
            )
            found.append({name: value.cpu() for name, value in part._asdict().items()})
        found = self._gathered(found)
        whole = {name: torch.cat([part[name] for part in found]) for name in found[0] if name != "share"}
        bound = likelihood.VariationalBound(**whole, share=found[0]["share"])
        steps = f"{few} steps of each picture" if few else "all steps"
        name = f"bits per dimension, bound, {variance_type}, {steps}"
        return self._row("bits_per_dim", name, bound.total, model, began), self._curves(bound, model, variance_type)

    def flow(self, model: Model, number: int) -> Row:
        """A row of the exact likelihood of the walk without noise, always in float32."""
        began = time.monotonic()
        unet = model.pipe.unet.to(self._processes.device)
        found = []
        for index, pixels in self._batches(number, f"flow, {model.weights}"):
            x_0 = likelihood.dequantised(torch.from_numpy(pixels), index=index, seed=self._seed)
            nats = likelihood.probability_flow_nats(
                unet,
                model.pipe.scheduler,
                x_0.to(self._processes.device),
                index=index,
                seed=self._seed,
                rtol=1e-3,
                atol=1e-3,
            )
            found.append(nats.cpu())
        nats = likelihood.discrete_nats(torch.cat(self._gathered(found)), self.shape, self.levels)
        return self._row("bits_per_dim_flow", "bits per dimension, flow without noise", nats, model, began)

    def _row(self, measure: str, name: str, nats: Tensor, model: Model, began: float) -> Row:
        each = likelihood.bits_per_dim(nats, self.shape)
        found = fidelity.Estimate(each.mean().item(), each.std().item() / len(each) ** 0.5)
        about = {"sampler": None, "num_inference_steps": None, "eta": None, "reference": "held-out pictures",
                 "weights": model.weights, "seed": self._seed,
                 "seconds": round(time.monotonic() - began, 1)}  # fmt: skip
        return _row(measure, name, found, None, len(each)) | about

    def _curves(self, bound: likelihood.VariationalBound, model: Model, variance_type: str) -> Row:
        """The bound step by step and the rate-distortion curve, as lists of numbers."""
        in_bits = {
            "prior": likelihood.bits_per_dim(bound.prior.mean(), self.shape),
            "step": likelihood.bits_per_dim(bound.step.mean(0), self.shape),
            "decoder": likelihood.bits_per_dim(bound.decoder.mean(), self.shape),
        }
        progressive = likelihood.rate_distortion(bound, self.shape)
        return {
            "weights": model.weights,
            "variance_type": variance_type,
            "t": _rounded(bound.t.double().mean(0)),
            "share": bound.share.tolist(),
            **{name: _rounded(value) for name, value in in_bits.items()},
            "rate_distortion": {name: _rounded(value) for name, value in progressive._asdict().items()},
        }


def variance_types(model: Model) -> list[str]:
    """With which variances of the walk home the network has a bound."""
    walk = model.pipe.scheduler
    if not isinstance(walk, DDPMScheduler):
        raise ValueError(
            f"the scheduler is a {type(walk).__name__}, and the bound is of a DDPM's: leave out bound, flow"
        )
    learned = walk.variance_type.startswith("learned")
    return [walk.variance_type] if learned else ["fixed_small", "fixed_large"]


def _rounded(values: Tensor) -> Any:
    """To six digits, which is more than is known."""
    return [float(f"{value:.6g}") for value in values.tolist()] if values.ndim else float(f"{values.item():.6g}")
