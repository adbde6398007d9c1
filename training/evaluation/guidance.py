"""GUIDANCE: distances and accuracy over the scale of guidance, and which scale is best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it imports torch, which the model card does not need
    from training.evaluation.measures import Measurement

DISTANCES = ("mean_class_kernel_distance", "kernel_distance")  # the first that was measured says which scale is best
MEASURES = (*DISTANCES, "accuracy")
CLASSIFIER_FREE, AUTOGUIDANCE = "guidance_scale", "autoguidance_scale"  # the arguments of a call


def guidance_effect(
    measurements: Sequence[Measurement], interval: tuple[float, float] | None, argument: str = CLASSIFIER_FREE
) -> dict[str, Any] | None:
    """The "guidance" of report.json: each measure at each scale, with the first weights, steps, eta and extractor.

    The best scale has the smallest mean distance within a class, which grows with samples of a wrong class too; if
    classes are too small for it, the smallest distance of all samples. If scale 1 was measured and is not worse by more
    than two standard errors of the difference (taken as that of independent samples), 1 is best.

    Args:
        interval: timesteps that were guided; None: all.
        argument: of a call of the pipeline, that the scales are of.
    Returns:
        argument, interval, scales, best_scale and the extractor of the distances (None without distances), and a list
        of measures: name, values, standard_errors, real_data_baseline. None if there is only one scale.
    """
    columns: dict[str, list[Measurement]] = {}
    for measure in MEASURES:
        of_measure = [m for m in measurements if m.measure == measure]
        first = [_settings(m) for m in of_measure[:1]]
        columns[measure] = [m for m in of_measure if _settings(m) in first]
    columns = {measure: column for measure, column in columns.items() if len(column) > 1}
    if not columns:
        return None
    scales = [m.guidance_scale for m in next(iter(columns.values()))]
    best = next((_best(columns[measure]) for measure in DISTANCES if measure in columns), None)
    return {
        "argument": argument,
        "interval": interval,
        "scales": scales,
        "best_scale": None if best is None else best.guidance_scale,
        "extractor": None if best is None else best.extractor,
        "measures": [
            {
                "name": column[0].name,
                "values": [m.value for m in column],
                "standard_errors": [m.standard_error for m in column],
                "real_data_baseline": column[0].real_data_baseline,
            }
            for column in columns.values()
        ],
    }


def _best(column: Sequence[Measurement]) -> Measurement:
    smallest = min(column, key=lambda m: m.value)
    without = next((m for m in column if m.guidance_scale == 1), smallest)
    error = math.hypot(smallest.standard_error or 0, without.standard_error or 0)
    return smallest if without.value - smallest.value > 2 * error else without


def _settings(m: Measurement) -> tuple[Any, ...]:
    return m.weights, m.num_inference_steps, m.eta, m.extractor


def best_scale_text(guidance: Mapping[str, Any]) -> str:
    """What the best scale, which is not None, says of the scales that were measured."""
    best = guidance["best_scale"]
    return (
        "none is better than 1 by more than two standard errors" if best == 1 else f"{best:g} has the smallest distance"
    )


def guidance_table(guidance: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown: a line for each scale, and one for the real-data baseline."""
    measures = guidance["measures"]
    kind = guidance.get("argument", CLASSIFIER_FREE).replace("_", " ")  # older reports lack it
    lines = [
        f"| {kind} | " + " | ".join(each["name"] for each in measures) + " |",
        "|---" * (1 + len(measures)) + "|",
    ]
    for i, scale in enumerate(guidance["scales"]):
        cells = [f"{each['values'][i]:.4g} &plusmn; {each['standard_errors'][i]:.2g}" for each in measures]
        lines.append(f"| {scale:g} | " + " | ".join(cells) + " |")
    real = ["" if (value := each["real_data_baseline"]) is None else f"{value:.4g}" for each in measures]
    return [*lines, "| real-data baseline | " + " | ".join(real) + " |"]
