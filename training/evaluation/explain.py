"""EXPLANATIONS: what each measure means, and what all of them together say, in plain sentences for report.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.evaluation.guidance import best_scale_text
from training.evaluation.measures import Measurement

MEANINGS = {
    "frechet_distance": "how far the mean and the covariance of the samples' features are from those of the reference "
    "set. 0 is best; a perfect model gets about the real-data baseline.",
    "kernel_distance": "how different the distribution of the samples' features is from that of the reference set. It "
    "is unbiased: a perfect model gets values around 0, also negative ones.",
    "precision": "the share of samples that lie among real images. Low: many samples do not look real.",
    "recall": "the share of real images that lie among samples. Low: the samples lack some of the variety of the "
    "data, even if each of them looks right.",
    "density": "how closely real images surround the samples. Far below the baseline: many samples do not look real; "
    "above it: they crowd where real images are most alike.",
    "coverage": "the share of real images that have a sample near them. Low: kinds of images are missing.",
    "memorisation": "how often a sample is nearer to a training image than a new image is. 0.5: no more than new "
    "images; near 1: copies of training images; below 0.5: farther away, as blurred images are.",
    "mean_shift": "mean brightness of the samples minus that of the data. 0 is best.",
    "std_ratio": "contrast of the samples over that of the data. 1 is best; below 1 the samples are flat.",
    "class_kernel_distance": "the kernel distance between the samples of a class and its images in the reference set.",
    "class_frechet_distance": "the Frechet distance between these.",
    "mean_class_kernel_distance": "the mean of the kernel distances within a class. It also grows when samples are of "
    "another class than the one asked for.",
    "accuracy": "how often a classifier recognises the class that was asked for. Its accuracy on real images that it "
    "was not trained on stands beside it: a perfect model gets about that, typical images with guidance may get more.",
    "class_accuracy": "the same for the samples of a class. Low beside that of real images: the model draws something "
    "else; low in both: the classifier confuses the class with another.",
    "bits_per_dim": "an upper bound on the bits that an ideal code based on the model needs for one value of one pixel "
    "of a new image. Lower is better.",
    "bits_per_dim_ode": "the same under the deterministic sampler, as an estimate instead of a bound.",
}
CLEARLY_LESS = 0.8  # of the real-data baseline
CLOSE = 1.2  # times the real-data baseline
COPIES = 0.6  # of memorisation


def meanings(measures: Sequence[str]) -> list[str]:
    """A line for each of these measures."""
    return [f"- **{measure.replace('_', ' ')}**: {MEANINGS[measure]}" for measure in measures if measure in MEANINGS]


def in_short(measurements: Sequence[Measurement], guidance: Mapping[str, Any] | None = None) -> str:
    """The samples of the first weights and the first sampler in a few sentences; "" if there are none."""
    primary: dict[str, Measurement] = {}
    for m in measurements:
        if m.primary and m.sampler is not None:
            primary.setdefault(m.measure, m)  # of several extractors the first
    distance = _frechet(primary.get("frechet_distance")) or _kernel(primary.get("kernel_distance"))
    sentences = [*distance, *_shares(primary)]
    if (accuracy := primary.get("accuracy")) is not None:
        sentences.append(
            f"A classifier recognises the class that was asked for in {accuracy.value:.1%} of the samples "
            f"(in {accuracy.real_data_baseline:.1%} of real images)."
        )
    if guidance is not None and guidance["best_scale"] is not None:
        sentences.append(f"Of the guidance scales, {best_scale_text(guidance)}.")
    memorisation = primary.get("memorisation")
    if memorisation is not None and memorisation.value - 2 * (memorisation.standard_error or 0) > COPIES:
        sentences.append(
            f"Samples are often nearer to training images than new images are (memorisation {memorisation.value:.2f}): "
            "look at nearest.png for copies."
        )
    return " ".join(sentences)


def _frechet(m: Measurement | None) -> list[str]:
    if m is None or not m.real_data_baseline or m.real_data_baseline < 0:
        return []
    ratio = m.value / m.real_data_baseline
    numbers = f"{m.name} {m.value:.3g}, real images {m.real_data_baseline:.3g}"
    if ratio < CLOSE:
        return [f"The samples are about as near to the reference set as real images are ({numbers})."]
    return [f"The samples are {ratio:.1f} times as far from the reference set as real images are ({numbers})."]


def _kernel(m: Measurement | None) -> list[str]:
    """Both values: their ratio says nothing, since that of real images is around 0."""
    if m is None or m.real_data_baseline is None:
        return []
    return [f"The {m.name} of the samples is {m.value:.3g}, that of real images {m.real_data_baseline:.3g}."]


def _shares(primary: dict[str, Measurement]) -> list[str]:
    sentences = []
    for measure, low in (
        ("precision", "Many samples do not look real"),
        ("recall", "The samples lack some of the variety of the data"),
    ):
        m = primary.get(measure)
        if m is not None and m.real_data_baseline is not None and m.value < CLEARLY_LESS * m.real_data_baseline:
            sentences.append(f"{low} ({measure} {m.value:.2f}, real images {m.real_data_baseline:.2f}).")
    return sentences
