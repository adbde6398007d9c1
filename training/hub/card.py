"""TO THE HUB: a clean folder, its card, a look whether it loads, and one commit.

    run -> stage: what is on the list, and README.md -> check_loading: the same pictures in three ways -> push

What is published is on a list; all else stays at home. No number is typed by hand: pipeline/training.json says how the
model was trained, report.json what was measured, and what nobody measured is not said. The Hub's client waits for an
answer for ever and never sends a commit twice; here everything has one deadline, and is tried again where that is safe.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from safetensors import safe_open

from training.hub.stage import ROOT, WEIGHTS, _read, is_hub_name


def write_card(
    folder: Path,
    *,
    repo_id: str,
    revision: str,
    license: str,
    training: Mapping[str, Any],
    report: Mapping[str, Any] | None,
) -> str:
    """The text of README.md: model_card.md, filled from the files of a staged folder.

    Args:
        training: what pipeline/training.json holds.
        report: what report.json holds, or None: then the card has no measurement.
    """
    from huggingface_hub import EvalResult, ModelCardData

    config = training["config"]
    walk, unet = _read(folder / "scheduler" / "scheduler_config.json"), _read(folder / "unet" / "config.json")
    name = repo_id.split("/")[-1]
    data = config["dataset_name"] or config["train_data_dir"]
    on_hub = [data] if config["dataset_name"] and is_hub_name(data) else []
    # Of the averaged weights, and of several samplers the first that was asked for: the rest is in the file.
    rows = [row for row in (report or {}).get("measurements", []) if row["weights"] == "EMA" and row.get("main", True)]
    front = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers", "ddpm", "ddpm-pipeline", "unconditional-image-generation"],
        datasets=on_hub or None,
        base_model=config["init_from"] if config.get("init_from") and is_hub_name(config["init_from"]) else None,
        model_name=name if rows else None,
        eval_results=[
            EvalResult(
                task_type="unconditional-image-generation",
                task_name="Unconditional image generation",
                dataset_name=data,
                dataset_type=data,
                metric_type=row["measure"],
                metric_name=_measure(row),
                metric_value=row["value"],
            )
            for row in rows
        ]
        or None,
    )
    wrong = "> **The built-in classes are not enough for this model.** "
    fields = {
        "metadata": front.to_yaml(),
        "model_name": name,
        "repo_id": repo_id,
        "revision": revision,
        "data_name": data,
        "image_size": _size(unet),
        "pictures": _pictures(folder, training),
        "built_in_warning": "\n>\n".join(wrong + limit for limit in built_in_limits(folder)),
        "sampling_steps": config["ddpm_num_inference_steps"],
        "data_description": _data_description(training),
        "num_images": f"{training['num_images']:,}",
        "num_steps": f"{walk['num_train_timesteps']:,}",
        "beta_schedule": config["ddpm_beta_schedule"],
        "prediction_type": walk["prediction_type"],
        "variance_type": walk["variance_type"],
        "timestep_spacing": walk["timestep_spacing"],
        "parameters": f"{parameters_in(folder / WEIGHTS):,}",
        "train_steps": f"{training['step']:,}"
        + (f" of {config['max_train_steps']:,}" if training["step"] < config["max_train_steps"] else ""),
        "global_batch": training["global_batch"],
        "images_seen": f"{training['step'] * training['global_batch']:,}",
        "learning_rate": f"{config['learning_rate']:g}, {config['lr_scheduler']}",
        "ema_max_decay": config["ema_max_decay"],
        "train_time": f"{training['seconds'] / 60:.0f} minutes"
        if training["seconds"] < 7200
        else f"{training['seconds'] / 3600:.1f} hours",
        "hardware": f"{training['num_processes']} x {training['device']}, "
        + {"no": "float32"}.get(training["mixed_precision"], training["mixed_precision"]),
        "measurements": _measurements(rows, report),
        "limits": "\n".join(f"- {limit}" for limit in _limits(unet, rows, license)),
        "commit": training["commit"] or "unknown",
        "versions": ", ".join(f"{library} {number}" for library, number in training["versions"].items()),
        "train_command": _train_command(training),
        "same_again": _same_again(training),
    }
    template = (ROOT / "model_card.md").read_text(encoding="utf-8")
    text = Template(re.sub(r"<!--.*?-->\n*", "", template, flags=re.DOTALL)).substitute(fields)
    return re.sub(r"\n{3,}", "\n\n", text)


def built_in_limits(folder: Path) -> list[str]:
    """What diffusers' own classes get wrong with the model of this folder, a sentence each: see tests/test_stock.py."""
    walk, unet = _read(folder / "scheduler" / "scheduler_config.json"), _read(folder / "unet" / "config.json")
    found = []
    if unet.get("num_class_embeds") is not None or unet.get("class_embed_type") is not None:
        found.append("They know no class labels and cannot sample it: take one of the other two ways.")
    if unet["in_channels"] > 3:
        found.append(f'They make no pictures of {unet["in_channels"]} channels: give `output_type="np"`.')
    variance, spacing = walk["variance_type"], walk["timestep_spacing"]
    if variance == "fixed_large" and spacing != "leading":
        found.append(
            "With fewer steps than it was trained with, they leave noise on the finished picture "
            f"(variance_type {variance}, timestep_spacing {spacing}): take one of the other two ways."
        )
    if variance in ("fixed_large_log", "learned"):
        found.append(
            f"They take the logarithm of the variance for the variance (variance_type {variance}), and what they draw "
            "is not a number: take one of the other two ways."
        )
    return found


def parameters_in(file: Path) -> int:
    """How many numbers a safetensors file holds, read from its header."""
    with safe_open(file, "pt") as tensors:
        shapes = (tensors.get_slice(name).get_shape() for name in tensors.keys())  # noqa: SIM118  it is not a dict
        return sum(math.prod(shape) for shape in shapes)


def _size(unet: Mapping[str, Any]) -> str:
    size = unet["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    channels = unet["in_channels"]
    return f"{height} x {width} pixels, {channels} channel{'s' if channels > 1 else ''}"


def _pictures(folder: Path, training: Mapping[str, Any]) -> str:
    parts, config = [], training["config"]
    if (folder / "samples.png").is_file():
        parts.append(
            "![A grid of samples](samples.png)\n\n"
            f"Their seeds count up from {training['sample_seed']:,}, with {config['ddpm_num_inference_steps']} steps "
            "each; none was left out and none chosen."
        )
    if (folder / "walk.png").is_file():
        parts.append(
            "## The walk\n\n![The walk out of a picture, and home to a new one](walk.png)\n\n"
            f"Upper row: a walk from a training picture into noise, in {config['ddpm_num_steps']:,} random steps. "
            "The network has learned the way home. Middle row: a walk home from noise. Lower row: the picture that the "
            "network expects at its end, at each of these places."
        )
    return "\n\n".join(parts)


def _data_description(training: Mapping[str, Any]) -> str:
    config = training["config"]
    words = [training["source"] + "."]
    if config["random_flip"]:
        words.append("Half of them are mirrored, left to right, when they are seen.")
    if config.get("init_from"):
        words.append(f"The first weights were those of `{config['init_from']}`.")
    return " ".join(words)


def _measure(row: Mapping[str, Any]) -> str:
    return f"{row['name']} ({row['extractor']})" if row.get("extractor") else row["name"]


def _measurements(rows: list[Mapping[str, Any]], report: Mapping[str, Any] | None) -> str:
    if not rows:
        return "Nothing was measured, so this page has no number for how good the pictures are."
    head = "| measure | value | real against real | images | extractor | reference | sampler | steps | seed |"
    lines = ["Of the weights in this repository (EMA), by the sampler named in each row.", "", head,
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        value = f"{row['value']:.4g}"
        if row.get("standard_error") is not None:
            value += f" &plusmn; {row['standard_error']:.2g}"
        floor = "" if row.get("floor") is None else f"{row['floor']:.4g}"
        rest = [row.get(name) for name in ("n", "extractor", "reference", "sampler", "num_inference_steps", "seed")]
        cells = [row["name"], value, floor, *("" if cell is None else f"{cell}" for cell in rest)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Distances between sets of images compare only when the extractor, the reference and the number of "
              "images are the same. Only a distance made with the Inception network is an FID.", "",
              f"They are from `report.json` in this repository, written by `{report['command']}`."]  # type: ignore[index]  # fmt: skip
    if real := (report or {}).get("floor"):
        lines += ["", f"Real against real: {real['n']} {real['words']}, measured as if they were samples."]
    lines += [f"\n> {warning}." for warning in (report or {}).get("warnings", [])]
    return "\n".join(lines)


def _limits(unet: Mapping[str, Any], rows: list[Mapping[str, Any]], license: str) -> list[str]:
    limits = [f"It draws pictures of one size, {_size(unet)}."]
    measured = {row["measure"] for row in rows}
    if not measured:
        limits.append("How good and how varied its pictures are was not measured.")
    if "memorisation" not in measured:
        limits.append("Whether it repeats pictures that it was trained on was not measured.")
    if license == "unknown":
        limits.append("The licence of its weights was not stated.")
    return limits


def _train_command(training: Mapping[str, Any]) -> str:
    number, config = training["num_processes"], training["config"]
    launch = "python" if number == 1 else f"torchrun --nproc-per-node {number}"
    data = ""
    if config["train_data_dir"]:
        data = f" --train_data_dir path/to/{config['train_data_dir']}"
    elif config["dataset_name"] != "moons" and not is_hub_name(config["dataset_name"]):
        data = f" --dataset_name path/to/{config['dataset_name']}"
    return f"{launch} training/train.py --config config.yaml{data}"


def _same_again(training: Mapping[str, Any]) -> str:
    config = training["config"]
    if training["step"] < config["max_train_steps"]:
        why = f" at its limit of {config['max_train_minutes']:g} minutes" if config["max_train_minutes"] else ""
        return (
            f"This run ended after {training['step']:,} of {config['max_train_steps']:,} steps{why}; another one ends "
            "at another step, and gives another model."
        )
    return (
        "The same settings on the same hardware and the same number of processes give the same model; other hardware "
        "rounds in another way and gives another model, as good as this one."
    )
