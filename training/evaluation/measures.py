"""MEASURES: distances between samples and real images, and bits per dimension of held-out images.

The mathematics is in ddpm_pipeline/fidelity.py and likelihood.py. This file chooses which images are compared, and how
the report names the results.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_pipeline import DDPMScheduler, fidelity, likelihood
from ddpm_pipeline.classifier import HELD_OUT_EVERY, Classifier
from ddpm_pipeline.denoiser import UNetDenoiser
from ddpm_pipeline.features import Extractor, extract_features
from ddpm_pipeline.fidelity import Estimate
from ddpm_pipeline.pixels import from_pixels, num_levels
from training.data.split import evenly_spaced
from training.evaluation.config import FEATURE_METRICS
from training.evaluation.reference import RealImages
from training.evaluation.samples import Model, SamplerConfig
from training.progress import progress
from training.run.runtime import Runtime

CLASS_IMAGES = 100  # a class with fewer samples or reference images has no distances of its own
CLASS_ACCURACY = 10  # with fewer images of a class, the standard error of its accuracy may be above 0.16: left out
ENOUGH_FOR_FRECHET = 2048  # images in both sets; with fewer its bias, which shrinks as 1 / n, is too large
ODE_TOLERANCE = 1e-3  # relative and absolute, of the ODE solver

Curve = dict[str, Any]  # an entry of "curves" in report.json, see HeldOutBits._curve


@dataclass(frozen=True)
class Result:
    """One measured value, without the model and the sampler it belongs to.

    Args:
        measure: its id, such as kernel_distance.
        name: its name in tables and plots.
        n: number of samples or of held-out images.
        real_data_baseline: the same measure with real images instead of samples; None if there is none.
        extractor: name of the feature extractor; None for measures of pixels and for bits.
        channel: index of the colour channel, for measures of a single channel.
        class_name: for measures of a single class.
    """

    measure: str
    name: str
    estimate: Estimate
    n: int
    real_data_baseline: float | None = None
    extractor: str | None = None
    channel: int | None = None
    class_name: str | None = None


@dataclass(frozen=True)
class Measurement:
    """An entry of "measurements" in report.json: a Result with the model and the sampler it belongs to.

    Args:
        reference: the real images that the samples were compared with, or the held-out images.
        weights: EMA or online.
        primary: whether it is of the first weights and the first sampler, which a model card shows.
        seed: of the first sample, or of the random numbers for held-out images.
        seconds: time for sampling, or for measuring held-out images.
        sampler, num_inference_steps, eta, guidance_scale: how the samples were drawn; None for held-out images. eta is
            None for a calibrated table, too.
    """

    measure: str
    name: str
    value: float
    standard_error: float | None
    real_data_baseline: float | None
    n: int
    extractor: str | None
    channel: int | None
    class_name: str | None
    reference: str
    weights: str
    primary: bool
    seed: int
    seconds: float
    sampler: str | None
    num_inference_steps: int | None
    eta: float | None
    guidance_scale: float | None


def make_measurement(
    result: Result,
    model: Model,
    sampler: SamplerConfig | None,
    *,
    reference: str,
    primary: bool,
    seed: int,
    seconds: float,
) -> Measurement:
    """The Measurement of a result. sampler: None for held-out images."""
    scheduler = model.pipe.scheduler
    description = None
    if sampler is not None:
        labels = ", labels as in the data" if getattr(model.pipe, "class_names", None) else ""
        spacing = "" if sampler.eta is None else f", {scheduler.config.timestep_spacing}"  # a table has its timesteps
        description = f"{type(scheduler).__name__}, {sampler.eta_text}{spacing}{labels}{sampler.guidance_text}"
    return Measurement(
        measure=result.measure,
        name=result.name,
        value=result.estimate.value,
        standard_error=result.estimate.standard_error,
        real_data_baseline=result.real_data_baseline,
        n=result.n,
        extractor=result.extractor,
        channel=result.channel,
        class_name=result.class_name,
        reference=reference,
        weights=model.weights,
        primary=primary,
        seed=seed,
        seconds=round(seconds, 1),
        sampler=description,
        num_inference_steps=None if sampler is None else sampler.num_inference_steps,
        eta=None if sampler is None else sampler.eta,
        guidance_scale=None if sampler is None else sampler.guidance_scale,
    )


# ---- Samples ---------------------------------------------------------------------------------------------------------


class _Features(NamedTuple):
    """Feature vectors of the images that are compared, (N, D) each."""

    samples: Tensor
    reference: Tensor
    baseline: Tensor | None  # is compared with baseline_reference
    baseline_reference: Tensor
    kernel: fidelity.Kernel  # of the kernel distance

    def frechet_distance(self) -> tuple[Estimate, float | None]:
        """Of the samples, and of the baseline."""
        real = None if self.baseline is None else fidelity.frechet_distance(self.baseline, self.baseline_reference)
        return fidelity.jackknife(fidelity.frechet_distance, self.samples, self.reference), real

    def kernel_distance(self) -> tuple[Estimate, float | None]:
        """Of the samples, and of the baseline."""
        real = None
        if self.baseline is not None:
            real = fidelity.kernel_distance(self.baseline, self.baseline_reference, self.kernel).value
        return fidelity.kernel_distance(self.samples, self.reference, self.kernel), real

    def of_class(self, number: int, labels: np.ndarray, real: RealImages) -> _Features:
        """Those of one class. The baseline of a small class, which may be half of its images, is left out."""
        assert real.reference_labels is not None and real.baseline_labels is not None
        of_reference = torch.from_numpy(real.reference_labels == number)
        samples, reference = self.samples[torch.from_numpy(labels == number)], self.reference[of_reference]
        baseline_reference = self.baseline_reference[of_reference[torch.from_numpy(real.not_in_baseline)]]
        baseline = None if self.baseline is None else self.baseline[torch.from_numpy(real.baseline_labels == number)]
        if baseline is not None and min(len(baseline), len(baseline_reference)) < CLASS_IMAGES // 2:
            baseline = None
        return _Features(samples, reference, baseline, baseline_reference, self.kernel)


def compare_features(
    samples: np.ndarray,
    real: RealImages,
    extractor: Extractor,
    metrics: Sequence[str],
    cache_dir: Path,
    labels: np.ndarray | None = None,
) -> Iterator[Result]:
    """Distances between samples and the reference set in the features of an extractor.

    Args:
        samples: (N, C, H, W), uint8 or uint16.
        labels: (N,) int64, the classes that were asked for; None: the model has none.
        metrics: others than FEATURE_METRICS are ignored.
        cache_dir: for the features of real images.
    Raises:
        ValueError: a distance is not defined, for example because all samples are equal.
    """
    if not set(metrics) & set(FEATURE_METRICS):
        return
    features = extract_features(extractor, samples)
    reference = extract_features(extractor, real.reference, cache_dir=cache_dir)
    baseline_reference = reference[torch.from_numpy(real.not_in_baseline)]
    baseline = extract_features(extractor, real.baseline, cache_dir=cache_dir) if len(real.baseline) else None
    compared = _Features(features, reference, baseline, baseline_reference, extractor.kernel)

    def result(measure: str, name: str, estimate: Estimate, real_value: float | None) -> Result:
        return Result(measure, name, estimate, len(samples), real_value, extractor.name)

    if "frechet" in metrics:
        yield result("frechet_distance", extractor.frechet_name, *compared.frechet_distance())
    if "kernel" in metrics:
        yield result("kernel_distance", extractor.kernel_name, *compared.kernel_distance())
    # Between sets of equal size, because the balls around the images shrink as their number grows.
    equal = reference[evenly_spaced(len(reference), len(samples))]
    for metric, measures, statistic in (
        ("precision", ("precision", "recall"), fidelity.precision_recall),
        ("density", ("density", "coverage"), fidelity.density_coverage),
    ):
        if metric in metrics:
            real_values: tuple[float | None, float | None] = (None, None)
            if baseline is not None:
                index = evenly_spaced(len(baseline_reference), len(baseline))
                real_values = statistic(baseline, baseline_reference[index])
            estimates = fidelity.jackknives(statistic, features, equal)
            for measure, estimate, real_value in zip(measures, estimates, real_values):
                yield result(measure, measure, estimate, real_value)
    if "memorisation" in metrics and len(real.held_out) > 1:
        held_out = extract_features(extractor, real.held_out, cache_dir=cache_dir)
        estimate = fidelity.memorisation(features, reference, held_out)
        yield result("memorisation", "memorisation (0.5: none, 1: copies)", estimate, 0.5)
    if labels is not None:
        yield from _compare_classes(compared, labels, real, extractor, metrics)


def large_classes(labels: np.ndarray, real: RealImages) -> list[int]:
    """The classes with at least CLASS_IMAGES samples, whose labels these are, and reference images."""
    assert real.classes is not None and real.reference_labels is not None
    num_classes = len(real.classes.names)
    counts = [np.bincount(each, minlength=num_classes) for each in (labels, real.reference_labels)]
    return np.flatnonzero(np.minimum(*counts) >= CLASS_IMAGES).tolist()


def _compare_classes(
    compared: _Features,
    labels: np.ndarray,
    real: RealImages,
    extractor: Extractor,
    metrics: Sequence[str],
) -> Iterator[Result]:
    """Distances within each large class, and the mean of its kernel distances.

    That mean also grows with samples of a wrong class, which the distance of all samples does not see. A Frechet
    distance of fewer than ENOUGH_FOR_FRECHET images is mostly bias, which differs between classes: left out.
    """
    assert real.classes is not None
    kernel_distances = []
    for number in large_classes(labels, real):
        own = compared.of_class(number, labels, real)
        fields: dict[str, Any] = {"extractor": extractor.name, "class_name": real.classes.names[number]}
        n = len(own.samples)
        if "frechet" in metrics and min(n, len(own.reference)) >= ENOUGH_FOR_FRECHET:
            estimate, real_value = own.frechet_distance()
            yield Result("class_frechet_distance", extractor.frechet_name, estimate, n, real_value, **fields)
        if "kernel" in metrics:
            estimate, real_value = own.kernel_distance()
            kernel_distances.append((estimate, real_value))
            yield Result("class_kernel_distance", extractor.kernel_name, estimate, n, real_value, **fields)
    if kernel_distances:
        values, errors = zip(*(estimate for estimate, _ in kernel_distances))
        real_values = [value for _, value in kernel_distances if value is not None]
        mean = Estimate(np.mean(values).item(), np.linalg.norm(errors).item() / len(errors))
        real_mean = np.mean(real_values).item() if len(real_values) == len(values) else None
        name = f"{extractor.kernel_name} within a class, mean of {len(values)}"
        yield Result("mean_class_kernel_distance", name, mean, len(labels), real_mean, extractor.name)


def class_accuracies(classifier: Classifier, real: RealImages) -> dict[str, float | None]:
    """By class the accuracy on the training images that the classifier was not trained on; None for too few of them."""
    assert real.classes is not None
    tested = slice(None, None, HELD_OUT_EVERY)
    labels = real.classes.train[tested]
    predicted = classifier.predict(real.split.data.images[real.split.train_indices[tested]])[0]
    accuracies: dict[str, float | None] = {}
    for number, name in enumerate(real.classes.names):
        of_class = labels == number
        enough = of_class.sum() >= CLASS_ACCURACY
        accuracies[name] = fidelity.accuracy(predicted[of_class], labels[of_class]).value if enough else None
    return accuracies


def measure_accuracy(
    samples: np.ndarray, labels: np.ndarray, classifier: Classifier, real: Mapping[str, float | None]
) -> Iterator[Result]:
    """How often the classifier recognises the class that was asked for, of all samples and of each class.

    Args:
        real: what `class_accuracies` gives.
    """
    predicted = classifier.predict(samples)[0]
    estimate = fidelity.accuracy(predicted, labels)
    yield Result("accuracy", "accuracy", estimate, len(samples), classifier.accuracy, classifier.name)
    for number, (class_name, real_value) in enumerate(real.items()):
        of_class = labels == number
        if (n := int(of_class.sum())) >= CLASS_ACCURACY:
            estimate = fidelity.accuracy(predicted[of_class], labels[of_class])
            yield Result("class_accuracy", "accuracy", estimate, n, real_value, classifier.name, class_name=class_name)


def compare_channels(samples: np.ndarray, real: RealImages) -> Iterator[Result]:
    """Mean and standard deviation of each colour channel, compared with the reference set.

    Raises:
        ValueError: all pixels of a channel are equal.
    """
    shifts = fidelity.channel_shift(samples, real.reference)
    baseline = None
    if len(real.baseline):
        baseline = fidelity.channel_shift(real.baseline, real.reference[real.not_in_baseline])
    for channel, shift in enumerate(shifts):
        suffix = f", channel {channel}" if len(shifts) > 1 else ""
        real_mean = None if baseline is None else baseline[channel].mean.value
        real_ratio = None if baseline is None else baseline[channel].std_ratio.value
        for measure, name, estimate, real_value in (
            ("mean_shift", "brightness difference", shift.mean, real_mean),
            ("std_ratio", "standard deviation ratio", shift.std_ratio, real_ratio),
        ):
            yield Result(measure, name + suffix, estimate, len(samples), real_value, channel=channel)


# ---- Held-out images -------------------------------------------------------------------------------------------------


class HeldOutBits:
    """Bits per dimension of held-out images, divided among the ranks.

    Args:
        images: (M, C, H, W), uint8 or uint16.
        batch_size: images per forward pass.
        seed: of the noise, the timesteps, the dequantisation and the divergence probes.
        labels: (M,) int64, of the images; None: the model has no classes.
    """

    def __init__(
        self, images: np.ndarray, *, batch_size: int, seed: int, runtime: Runtime, labels: np.ndarray | None = None
    ) -> None:
        self._images, self._batch_size, self._seed, self._runtime = images, batch_size, seed, runtime
        self._shape, self._labels = images.shape[1:], labels
        self._levels = num_levels(images.dtype)

    def variational_bound(self, model: Model, variance_type: str, num_images: int, strata: int) -> tuple[Result, Curve]:
        """The variational bound with this variance of the reverse process, and its curves over t; strata=0: all t."""
        denoiser = UNetDenoiser(model.pipe.unet.to(self._runtime.device))
        scheduler: Any = DDPMScheduler.from_config(model.pipe.scheduler.config, variance_type=variance_type)
        strata = min(strata, scheduler.num_steps - 1)

        def network(x_t: Tensor, t: Tensor) -> Tensor:
            with self._runtime.autocast():
                return denoiser(x_t, t)

        parts = []
        for index, pixels in self._own_batches(num_images, f"variational bound, {model.weights}, {variance_type}"):
            denoiser.class_labels = self._labels_of(index, num_images)
            x_0 = from_pixels(pixels, self._runtime.device)
            bound = likelihood.variational_bound(
                network, scheduler, x_0, index=index, seed=self._seed, strata=strata or None, levels=self._levels
            )
            parts.append((index, {name: value.cpu() for name, value in bound._asdict().items()}))
        parts = self._runtime.gather_objects(parts)
        stratum_size = parts[0][1]["stratum_size"]
        per_image = {
            name: _in_order([(index, values[name]) for index, values in parts])
            for name in parts[0][1]
            if name != "stratum_size"
        }
        bound = likelihood.VariationalBound(**per_image, stratum_size=stratum_size)
        timesteps = f"{strata} timesteps per image" if strata else "all timesteps"
        name = f"bits per dimension, variational bound, {variance_type}, {timesteps}"
        return self._result("bits_per_dim", name, bound.total), self._curve(bound, model, variance_type)

    def ode_likelihood(self, model: Model, num_images: int) -> Result:
        """The likelihood by the probability-flow ODE, in float32."""
        device = self._runtime.device
        denoiser = UNetDenoiser(model.pipe.unet.to(device))
        parts = []
        for index, pixels in self._own_batches(num_images, f"probability-flow ODE, {model.weights}"):
            denoiser.class_labels = self._labels_of(index, num_images)
            x_0 = likelihood.dequantise(torch.from_numpy(pixels), index=index, seed=self._seed).to(device)
            nats = likelihood.probability_flow_nats(
                denoiser,
                model.pipe.scheduler,
                x_0,
                index=index,
                seed=self._seed,
                rtol=ODE_TOLERANCE,
                atol=ODE_TOLERANCE,
            )
            parts.append((index, nats.cpu()))
        nats = _in_order(self._runtime.gather_objects(parts))
        nats = likelihood.discrete_nats(nats, self._shape, self._levels)
        return self._result("bits_per_dim_ode", "bits per dimension, probability-flow ODE", nats)

    def _own_batches(self, num_images: int, title: str) -> Iterator[tuple[Tensor, np.ndarray]]:
        """The images that this rank measures, in batches: their indices and their pixels."""
        chosen = evenly_spaced(len(self._images), num_images)
        own = torch.arange(len(chosen))[self._runtime.rank :: self._runtime.world_size]
        for index in progress(own.split(self._batch_size), title, disable=not self._runtime.is_main, leave=False):
            if len(index):  # with more ranks than images, some ranks have none
                yield index, np.asarray(self._images[chosen[index.numpy()]])

    def _labels_of(self, index: Tensor, num_images: int) -> Tensor | None:
        """The labels of a batch of `_own_batches`, on the device."""
        if self._labels is None:
            return None
        chosen = evenly_spaced(len(self._images), num_images)
        return torch.from_numpy(self._labels[chosen[index.numpy()]]).to(self._runtime.device)

    def _result(self, measure: str, name: str, nats: Tensor) -> Result:
        bits = likelihood.bits_per_dim(nats, self._shape)
        estimate = Estimate(bits.mean().item(), bits.std().item() / math.sqrt(len(bits)))
        return Result(measure, name, estimate, len(bits))

    def _curve(self, bound: likelihood.VariationalBound, model: Model, variance_type: str) -> Curve:
        """The terms of the bound over t, and the rate-distortion curve, as means over the images."""
        terms = {
            name: likelihood.bits_per_dim(value.mean(0), self._shape)
            for name, value in (("prior", bound.prior), ("kl", bound.kl), ("decoder", bound.decoder))
        }
        progressive = likelihood.rate_distortion(bound, self._shape)
        return {
            "weights": model.weights,
            "variance_type": variance_type,
            "t": _rounded(bound.t.cpu().double().mean(0)),
            "stratum_size": bound.stratum_size.tolist(),
            **{name: _rounded(value) for name, value in terms.items()},
            "rate_distortion": {name: _rounded(value) for name, value in progressive._asdict().items()},
        }


def variance_types(model: Model) -> list[str]:
    """The variances of the reverse process for which the model has a variational bound.

    Raises:
        ValueError: its scheduler is not a DDPMScheduler.
    """
    scheduler = model.pipe.scheduler
    if not isinstance(scheduler, DDPMScheduler):
        raise ValueError(f"the scheduler is {type(scheduler).__name__}, not DDPMScheduler: leave out bound and flow")
    learned = scheduler.variance_type.startswith("learned")
    return [scheduler.variance_type] if learned else ["fixed_small", "fixed_large"]


def _in_order(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The values of all images, ordered by index, so that sums do not depend on the world size."""
    index = torch.cat([index for index, _ in parts])
    return torch.cat([values for _, values in parts])[index.argsort()]


def _rounded(values: Tensor) -> Any:
    """To six significant digits: more than are accurate."""
    return [float(f"{value:.6g}") for value in values.tolist()] if values.ndim else float(f"{values.item():.6g}")
