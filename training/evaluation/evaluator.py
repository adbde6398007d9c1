"""EVALUATOR: the steps of an evaluation: models, images, samples, held-out images, report. See training/evaluate.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_pipeline.classifier import Classifier, train_classifier
from ddpm_pipeline.features import Extractor, make_extractor
from ddpm_pipeline.labels import check_guidance_interval, null_class
from training.data.classes import find_classes
from training.evaluation import measures, report
from training.evaluation.config import EvalConfig
from training.evaluation.guidance import AUTOGUIDANCE, CLASSIFIER_FREE, guidance_effect
from training.evaluation.measures import Curve, HeldOutBits, Measurement, Result, make_measurement
from training.evaluation.reference import RealImages, choose_real_images, load_split, was_trained_on
from training.evaluation.samples import Model, SamplerConfig, Shards, load_models, sample
from training.messages import some
from training.progress import quiet_libraries
from training.run.record import bits_caveat, precision_name
from training.run.runtime import Runtime, commit, device_name, versions


class Evaluator:
    """One evaluation: its config, runtime and models, and the warnings so far.

    Args:
        runtime: of this process, if there is one already.
    Raises:
        ValueError: there is no such model, or the config does not fit it.
    """

    def __init__(self, config: EvalConfig, runtime: Runtime | None = None) -> None:
        self.config = config
        self.started = time.monotonic()
        self.runtime = Runtime(config.mixed_precision, config.cpu_threads) if runtime is None else runtime
        quiet_libraries()
        self.precision = precision_name(self.runtime.mixed_precision)
        # rank 0 downloads for all
        self.models = self.runtime.in_turn(lambda: load_models(config.model, config.weights, config.revision))
        check_fits_model(config, self.models[0])
        self.output_dir = Path(config.output_dir or config.model)
        if config.output_dir is None and not (self.output_dir / "pipeline").is_dir():
            raise ValueError(f"{config.model} is not the folder of a run: give --output_dir for the report")
        self.folder = self.output_dir / "evaluation"
        self.cache_dir = Path(config.cache_dir).expanduser() / "features"
        self.warnings: list[str] = []
        self.classifier: Classifier | None = None  # for the accuracy
        self.class_accuracies: dict[str, float | None] = {}  # its own, on real images, once they are needed

    def remove_plots(self) -> None:
        """Those of an earlier evaluation, maybe of other weights."""
        if self.runtime.is_main:
            for plot in self.folder.glob("*.png"):
                plot.unlink()

    def load_images(self) -> RealImages:
        """Load the data, and choose the reference set and the real-data baseline."""
        self.folder.mkdir(parents=True, exist_ok=True)
        split = self.runtime.in_turn(lambda: load_split(self.config, self.models[0]))  # rank 0 decodes for all
        is_training_data = was_trained_on(self.models[0], split)
        kind = "training images" if is_training_data else f"images of {split.data.source}"
        names = getattr(self.models[0].pipe, "class_names", None)
        classes = None if names is None else find_classes(split).numbered_as(names)
        real = choose_real_images(split, self.config.num_reference, self.config.num_samples, kind, classes)
        self.runtime.print(
            f"reference set: {real.reference_description} of {split.data.source}; real-data baseline: "
            f"{len(real.baseline)} {real.baseline_description}"
        )
        self._warn_about_data(real, is_training_data)
        return real

    def _warn_about_data(self, real: RealImages, is_training_data: bool) -> None:
        """Warnings about the data that limit what the measurements mean."""
        config, record = self.config, self.models[0].record
        if config.sample_metrics and real.warning:
            self.warnings.append(real.warning)
        if len(real.held_out) < 2:
            self.warnings.append("fewer than 2 images are held out: no bits per dimension and no memorisation measure")
        elif record is None:
            self.warnings.append(
                "it is not known how this model was trained: it may have seen the images that are held out here"
            )
        elif not is_training_data:
            self.warnings.append(
                f"the model was trained on other images, {record.num_images} of {record.source}: it may have seen the "
                "images that are held out here"
            )
        if "frechet" in config.metrics and config.num_samples < measures.ENOUGH_FOR_FRECHET:
            self.warnings.append(
                f"Frechet distances of {config.num_samples} samples are too large, by an error that shrinks as 1 / n: "
                f"use {measures.ENOUGH_FOR_FRECHET} samples or more"
            )
        if real.classes is not None and {"frechet", "kernel"} & set(config.metrics):
            labels = np.array(real.classes.of_samples(np.arange(config.num_samples)))
            large = measures.large_classes(labels, real)
            if small := [name for number, name in enumerate(real.classes.names) if number not in large]:
                self.warnings.append(
                    f"classes with fewer than {measures.CLASS_IMAGES} images in the samples or in the reference set "
                    f"have no distances of their own: {some(small)}"
                )

    def make_extractors(self, real: RealImages) -> list[Extractor]:
        """The feature extractors of the config, and the classifier for the accuracy, trained on the training images."""
        labels = real.split.train_labels() if real.classes is None else real.classes.train
        options: dict[str, Any] = {"labels": labels, "cache_dir": self.cache_dir, "device": self.runtime.device}

        def make_all() -> list[Extractor]:
            images = real.split.train_images
            if real.classes is not None and "accuracy" in self.config.metrics:
                self.classifier = train_classifier(images, **options)
            extractors = self.config.extractor if self.config.feature_metrics else ()
            return [make_extractor(which, images=images, **options) for which in extractors]

        extractors = self.runtime.in_turn(make_all)  # rank 0 trains the classifier for all
        self.warnings += [weak for extractor in extractors if (weak := weak_classifier(extractor, real))]
        return extractors

    def measure_samples(self, real: RealImages, extractors: list[Extractor]) -> list[Measurement]:
        """Draw the missing samples and compare them with the real images. Ranks above 0 return [].

        The first weights are measured with all samplers, the others with the first sampler only.
        """
        if not self.config.sample_metrics:
            return []
        measurements = []
        for model in self.models:
            samplers = self._samplers(model)
            for sampler in samplers if model is self.models[0] else samplers[:1]:
                primary = model is self.models[0] and sampler == samplers[0]
                measurements += self.measure_sampler(model, sampler, real, extractors, primary)
        return measurements

    def _samplers(self, model: Model) -> list[SamplerConfig]:
        """By default calibrated where this model has a table for each guidance scale, so that scales are comparable."""
        config = self.config
        guidance = config.guidance_interval, config.autoguidance

        def default_eta(steps: int) -> float | None:
            scales = [SamplerConfig(steps, None, scale, *guidance) for scale in config.guidance_scales]
            return None if all(sampler.table(model) is not None for sampler in scales) else 1.0

        return [
            SamplerConfig(steps, default_eta(steps) if eta is None else eta, scale, *guidance)
            for scale in config.guidance_scales
            for eta in config.eta or (None,)
            for steps in config.num_inference_steps
        ]

    def measure_sampler(
        self, model: Model, sampler: SamplerConfig, real: RealImages, extractors: list[Extractor], primary: bool
    ) -> list[Measurement]:
        """Draw the missing samples of a model and compare them with the real images. Ranks above 0 return [].

        Args:
            primary: whether to draw the grid of nearest images, too.
        """
        config = self.config
        shards = Shards(
            self.folder, model, sampler, seed=config.seed, precision=self.precision, shape=real.reference.shape[1:],
            pixel_dtype=real.reference.dtype, classes=real.classes,
        )  # fmt: skip
        seconds = sample(model, sampler, shards, config.num_samples, batch_size=config.batch_size, runtime=self.runtime)
        if not self.runtime.is_main:
            return []
        samples = shards.load(config.num_samples)
        labels = None if real.classes is None else np.array(real.classes.of_samples(np.arange(config.num_samples)))
        results: list[Result] = []
        if labels is not None and self.classifier is not None:
            self.class_accuracies = self.class_accuracies or measures.class_accuracies(self.classifier, real)
            results += measures.measure_accuracy(samples, labels, self.classifier, self.class_accuracies)
        try:
            for extractor in extractors:
                results += measures.compare_features(samples, real, extractor, config.metrics, self.cache_dir, labels)
            if "shift" in config.metrics:
                results += measures.compare_channels(samples, real)
        except ValueError as error:  # all samples are equal, or all pixels of a channel, as of alpha
            self.warnings.append(f"not everything is measured with {model.weights} weights, {sampler}: {error}")
        if primary and "memorisation" in config.metrics:
            grid = report.nearest_grid(samples, real.reference, extractors[0], self.cache_dir)
            grid.save(self.folder / "nearest.png")
        measurements = [
            make_measurement(
                result, model, sampler, reference=real.reference_description, primary=primary, seed=config.seed,
                seconds=seconds,
            )
            for result in results
        ]  # fmt: skip
        self.runtime.print(report.samples_line(model.weights, sampler, measurements))
        return measurements

    def measure_held_out(self, real: RealImages) -> tuple[list[Measurement], list[Curve]]:
        """Bits per dimension of held-out images with all weights, and the curves of the variational bound over t."""
        measurements: list[Measurement] = []
        curves: list[Curve] = []
        if len(real.held_out) < 2:
            return measurements, curves
        config = self.config
        scheduler = self.models[0].pipe.scheduler
        if "bound" in config.metrics and (caveat := bits_caveat(scheduler.prediction_type, scheduler.variance_type)):
            self.warnings.append(caveat)
        labels = None if real.classes is None else real.classes.held_out
        bits = HeldOutBits(
            real.held_out, batch_size=config.batch_size, seed=config.seed, runtime=self.runtime, labels=labels
        )

        def add(model: Model, result: Result, started: float) -> None:
            measurement = make_measurement(
                result, model, None, reference="held-out images", primary=model is self.models[0], seed=config.seed,
                seconds=time.monotonic() - started,
            )  # fmt: skip
            measurements.append(measurement)
            self.runtime.print(report.held_out_line(measurement))

        for model in self.models:
            for variance_type in measures.variance_types(model) if "bound" in config.metrics else []:
                started = time.monotonic()
                result, curve = bits.variational_bound(model, variance_type, config.num_bound_images, config.strata)
                add(model, result, started)
                curves.append(curve)
            if "flow" in config.metrics:
                started = time.monotonic()
                add(model, bits.ode_likelihood(model, config.num_flow_images), started)
        return measurements, curves

    def write_report(
        self, real: RealImages, extractors: list[Extractor], measurements: list[Measurement], curves: list[Curve]
    ) -> None:
        """Write report.json, report.md and the plots, on rank 0."""
        if not self.runtime.is_main:
            return
        first = self.models[0]
        report.write(
            self.output_dir,
            self.folder,
            report.Report(
                weights_sha256=first.sha256,
                command=report.command_line(self.config),
                measurements=measurements,
                warnings=self.warnings,
                curves=curves,
                data=real.split.data.source,
                reference={
                    "description": real.reference_description,
                    "n": len(real.reference),
                    "sha256": real.reference_sha256,
                },
                real_data_baseline={"description": real.baseline_description, "n": len(real.baseline)},
                held_out={"description": real.split.held_out_source, "n": len(real.held_out)},
                extractors=[
                    {name: getattr(extractor, name) for name in ("name", "key", "commit", "accuracy")}
                    for extractor in extractors
                ],
                guidance=guidance_effect(
                    measurements,
                    self.config.guidance_interval,
                    AUTOGUIDANCE if self.config.autoguidance else CLASSIFIER_FREE,
                ),
                step=None if first.record is None else first.record.weights_step,
                precision=self.precision,
                seconds=round(time.monotonic() - self.started, 1),
                num_processes=self.runtime.world_size,
                device=device_name(self.runtime.device),
                date=time.strftime("%Y-%m-%d"),
                commit=commit(),
                versions=versions(),
            ),
        )
        for warning in self.warnings:
            self.runtime.print(f"WARNING: {warning}.")
        names = f"{self.output_dir / 'report.json'} and {self.output_dir / 'report.md'}"
        self.runtime.print(f"\nThe report: {names}; its plots: {self.folder}.")


def weak_classifier(extractor: Extractor, real: RealImages) -> str | None:
    """A warning about a classifier that tells its classes apart hardly better than chance; None if it does."""
    if extractor.accuracy is None:
        return None
    labels = real.split.train_labels()
    chance = 1 / (4 if labels is None else len(np.unique(labels)))  # without labels: four rotations
    if extractor.accuracy > chance + 0.25 * (1 - chance):
        return None
    return (
        f"the {extractor.name} is right for {extractor.accuracy:.0%} of new images, where chance gives {chance:.0%}: "
        "its features, and distances in them, mean little. Use --extractor pixels or a network of your own"
    )


def check_fits_model(config: EvalConfig, model: Model) -> None:
    """Raise ValueError if the model cannot be sampled or measured with this config."""
    unet = model.pipe.unet.config
    has_classes = unet.get("num_class_embeds") is not None or unet.get("class_embed_type") is not None
    if has_classes and model.pipe.class_names is None:
        raise ValueError(
            f"{config.model} has classes without names, so it is not known which labels of the data they are: name "
            "them with ddpm_pipeline.labels.record_class_names, and save the model"
        )
    num_timesteps = model.pipe.scheduler.config.num_train_timesteps
    if guided := [scale for scale in config.guidance_scales if scale != 1]:
        if config.autoguidance and model.pipe.guide is None:
            raise ValueError(
                f"autoguidance is true, but {config.model} has no guide: leave it out (to have one, train with "
                "--guide_snapshot 0.125)"
            )
        if not config.autoguidance and null_class(model.pipe.unet) is None:
            raise ValueError(
                f'guidance_scales has {guided[0]:g}, but {config.model} has no class for "no label": give 1 (for '
                "guidance, train with --class_conditional and --label_dropout 0.1)"
            )
        check_guidance_interval(config.guidance_interval, num_timesteps)
    if config.sample_metrics and (wrong := [steps for steps in config.num_inference_steps if steps > num_timesteps]):
        raise ValueError(
            f"num_inference_steps has {wrong[0]}: give at most {num_timesteps}, the model's number of diffusion "
            "timesteps"
        )
    if config.held_out_metrics:
        measures.variance_types(model)
        if config.strata >= num_timesteps:
            raise ValueError(
                f"strata is {config.strata}: give less than {num_timesteps}, the model's number of diffusion timesteps"
            )
