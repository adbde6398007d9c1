"""THE MODEL CARD: model_card.md, filled in from the files of a staged folder.

No number is typed by hand: the run record holds how the model was trained, report.json holds what was measured, and
what was not measured is not on the card.
"""

from __future__ import annotations

import configparser
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from training.config import FIRST_OPTIMIZER, FIRST_TIMESTEP_SAMPLING
from training.evaluation.guidance import AUTOGUIDANCE, CLASSIFIER_FREE, best_scale_text, guidance_table
from training.hub.files import (
    GUIDE_WEIGHTS,
    IMAGES,
    ROOT,
    WEIGHTS,
    built_in_limits,
    class_names,
    count_parameters,
    has_class_labels,
    has_current_code,
    is_hub_id,
    scheduler_config,
    unet_config,
)
from training.run.record import RunRecord, bits_caveat, describe_best, precision_name

if TYPE_CHECKING:
    from ddpm_pipeline.calibrated import Table

TASK = "unconditional-image-generation"
WARNING = "> **The built-in classes do not fully support this model.** "
MAX_NAMED = 50  # classes that the card lists
BALANCE = {
    "none": "In training a class was drawn as often as it is in the data.",
    "sqrt": "In training a class was drawn by the square root of its number of images: rare ones more often.",
    "equal": "In training all classes were drawn equally often, whatever their numbers of images.",
}
AUGMENTATIONS = {
    "random_flip": "flipped horizontally with probability 1/2",
    "random_vertical_flip": "flipped vertically with probability 1/2",
    "random_rotate90": "turned by 0, 90, 180 or 270 degrees",
}
Measured = Mapping[str, Any]  # a Measurement as report.json holds it


def write_card(
    folder: Path,
    *,
    repo_id: str,
    revision: str,
    license: str,
    record: RunRecord,
    report: Mapping[str, Any] | None,
    tables: Sequence[Table],
) -> str:
    """The text of README.md.

    Args:
        folder: a staged folder, complete but for the card.
        record: with a config from which the fields of this machine are removed.
        report: the content of report.json; None: the card has no measurements.
        tables: of calibrated steps, those that are for the weights in the folder.
    """
    scheduler = scheduler_config(folder)
    measured = primary_measurements(report)
    if bits_caveat(scheduler["prediction_type"], scheduler["variance_type"]):  # a warning of the report says why
        measured = [entry for entry in measured if entry["measure"] != "bits_per_dim"]
    model_name = repo_id.split("/")[-1]
    fields = {
        "metadata": _metadata(record.config, measured, license, model_name, has_class_labels(unet_config(folder))),
        "model_name": model_name,
        "repo_id": repo_id,
        "revision": revision,
        "project": _project(),
        "images": _images(folder, record),
        "remote_code": _remote_code(folder),
        "built_in_warning": "\n>\n".join(WARNING + limit for limit in built_in_limits(folder)),
        "built_in_way": "" if has_class_labels(unet_config(folder)) else _built_in_way(repo_id, revision, record),
        "class_labels": _class_labels(folder) + _guidance_arguments(report),
        "classes": _classes(folder, record, report),
        "guide": _guide(folder, record, report),
        "few_steps": _few_steps(tables),
        "measurements": _measurements(measured, report),
        "limits": "\n".join(f"- {limit}" for limit in _limits(folder, measured, license)),
        **_model_fields(folder),
        **_training_fields(record),
        **_reproduction_fields(record),
    }
    template = (ROOT / "model_card.md").read_text(encoding="utf-8")
    text = Template(re.sub(r"<!--.*?-->\n*", "", template, flags=re.DOTALL)).substitute(fields)
    return re.sub(r"\n{3,}", "\n\n", text)


def primary_measurements(report: Mapping[str, Any] | None) -> list[Measured]:
    """The measurements of the EMA weights with the first sampler, but for those of a single class.

    The others are only in report.json.
    """
    entries = [] if report is None else report["measurements"]
    entries = [entry for entry in entries if entry["weights"] == "EMA" and entry.get("class_name") is None]
    return [entry for entry in entries if entry.get("primary", True)]


def dataset_of(config: Mapping[str, Any]) -> str:
    return config["dataset_name"] or config["train_data_dir"]


# ---- Fields of the template ------------------------------------------------------------------------------------------


def _metadata(
    config: Mapping[str, Any], measured: Sequence[Measured], license: str, model_name: str, has_classes: bool
) -> str:
    """The YAML block at the beginning of the card, which the Hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    dataset = dataset_of(config)
    base_model = config.get("init_from")
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["diffusers", "ddpm", "ddpm-pipeline", *(["class-conditional"] if has_classes else []), TASK],
        datasets=[dataset] if config["dataset_name"] and is_hub_id(dataset) else None,
        base_model=base_model if base_model and is_hub_id(base_model) else None,
        model_name=model_name if measured else None,
        eval_results=[
            EvalResult(
                task_type=TASK,
                task_name="Unconditional image generation",
                dataset_name=dataset,
                dataset_type=dataset,
                metric_type=entry["measure"],
                metric_name=f"{entry['name']} ({entry['extractor']})" if entry.get("extractor") else entry["name"],
                metric_value=entry["value"],
            )
            for entry in measured
        ]
        or None,
    )
    return data.to_yaml()


def _project() -> str:
    """The plugin's name, linked to the project page if setup.cfg has one."""
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    url = setup.get("metadata", "url", fallback="").strip()
    return f"[`ddpm_pipeline`]({url})" if url else "`ddpm_pipeline`"


def _remote_code(folder: Path) -> str:
    if has_current_code(folder):
        return "the same classes, from `pipeline.py` in this repository"
    return "`pipeline.py` in this repository, which is of another version of the package or edited"


def _images(folder: Path, record: RunRecord) -> str:
    samples, trajectory = IMAGES
    steps = record.config["ddpm_num_inference_steps"]
    sections = []
    if (folder / samples).is_file():
        sections.append(
            f"![Grid of samples]({samples})\n\n"
            f"Samples with consecutive seeds from {record.sample_seed:,}, {steps} sampling steps each. They are not "
            "curated."
        )
        names = record.class_names
        if names and record.sample_labels:
            rows = ", ".join(f"`{names[label]}`" for label in dict.fromkeys(record.sample_labels))
            sections[-1] += f" A row for each class, from top to bottom: {rows}. Without guidance."
    if (folder / trajectory).is_file():
        sections.append(
            f"## Sampling trajectory\n\n![Forward process and sampling trajectory]({trajectory})\n\n"
            f"Top row: the forward process turns a training image into noise in {record.config['ddpm_num_steps']:,} "
            "steps. Middle row: the reverse process turns noise into a new image. Bottom row: the clean image that the "
            "network predicts at each of these steps."
        )
    return "\n\n".join(sections)


def _built_in_way(repo_id: str, revision: str, record: RunRecord) -> str:
    return (
        "**With diffusers alone**: the built-in classes; no code from this repository runs.\n\n"
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{repo_id}", revision="{revision}")\n'
        f"images = pipe(batch_size=4, num_inference_steps={record.config['ddpm_num_inference_steps']}).images\n```"
    )


def _class_labels(folder: Path) -> str:
    """Labels of four images as an argument of a call, or nothing."""
    unet = unet_config(folder)
    if not has_class_labels(unet):
        return ""
    labels = class_names(unet) or [*range(max(1, (unet.get("num_class_embeds") or 2) - 1))]
    four = [labels[i % len(labels)] for i in range(4)]
    return f" class_labels={json.dumps(four, ensure_ascii=False)},"


def _guidance_arguments(report: Mapping[str, Any] | None) -> str:
    """The best measured guidance as arguments of a call, or nothing."""
    guidance = (report or {}).get("guidance")
    if guidance is None or guidance["best_scale"] in (None, 1):
        return ""
    interval = f" guidance_interval={tuple(guidance['interval'])}," if guidance["interval"] else ""
    return f" {guidance.get('argument', CLASSIFIER_FREE)}={guidance['best_scale']:g},{interval}"


def _guidance(report: Mapping[str, Any] | None, argument: str) -> list[str]:
    """What was measured of guidance by this argument of a call: which scale is best, and a table."""
    guidance = (report or {}).get("guidance")
    if guidance is None or guidance["best_scale"] is None or guidance.get("argument", CLASSIFIER_FREE) != argument:
        return ["Its best scale was not measured."]
    at = " (at timesteps {:g} <= t < {:g})".format(*guidance["interval"]) if guidance["interval"] else ""
    best = (
        f"Of the scales that were measured{at}, {best_scale_text(guidance)}, in features of the "
        f"{guidance['extractor']}:"
    )
    return [best, "\n".join(guidance_table(guidance))]


def _classes(folder: Path, record: RunRecord, report: Mapping[str, Any] | None) -> str:
    """The section on classes, or nothing."""
    unet = unet_config(folder)
    names = class_names(unet)
    if names is None:
        return ""
    counts = dict(zip(record.class_names or (), record.class_counts or ()))
    listed = [f"`{name}` ({counts[name]:,})" if name in counts else f"`{name}`" for name in names[:MAX_NAMED]]
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    images = ", with their numbers of training images" if counts else ""
    lines = [
        "## Classes",
        f"It has {len(names)} classes{images}: {', '.join(listed)}{more}. `pipe.class_names` lists them. Every call "
        "needs `class_labels`: names or numbers, one for all images or one for each.",
    ]
    if balance := BALANCE.get(record.config.get("balance_classes", "")):
        lines.append(balance)
    if unet["num_class_embeds"] > len(names):
        lines.append(
            f"In training an image had no label with probability {record.config.get('label_dropout', 0):g}, so it has "
            "classifier-free guidance: `pipe(class_labels=..., guidance_scale=2.0)`."
        )
        lines += _guidance(report, CLASSIFIER_FREE)
    else:
        lines.append("In training every image had its label, so it has no guidance: `guidance_scale` must be 1.")
    return "\n\n".join(lines)


def _guide(folder: Path, record: RunRecord, report: Mapping[str, Any] | None) -> str:
    """The section on autoguidance, or nothing."""
    if not (folder / GUIDE_WEIGHTS).is_file():
        return ""
    label = "class_labels=..., " if has_class_labels(unet_config(folder)) else ""
    snapshot = "" if record.guide_step is None else f", the EMA weights of step {record.guide_step:,}"
    return "\n\n".join(
        [
            "## Autoguidance",
            f"It has a guide in `guide/`{snapshot}: a weaker version of the network, away from which sampling can be "
            "guided ([Karras et al. 2024](https://arxiv.org/abs/2406.02507)), with the package or remote code: "
            f"`pipe({label}autoguidance_scale=2.0)`. Each step then takes two calls of a network.",
            *_guidance(report, AUTOGUIDANCE),
        ]
    )


def _few_steps(tables: Sequence[Table]) -> str:
    """The section on calibrated steps, or nothing."""
    texts = []
    for table in tables:
        guidance = {name: value for name, value in table.guidance._asdict().items() if value not in (1, None)}
        arguments = {"num_inference_steps": len(table.timesteps), **guidance}
        texts.append("`" + ", ".join(f"{name}={value}" for name, value in arguments.items()) + "`")
    if not texts:
        return ""
    return (
        f"## Few steps\n\nIts sampler is calibrated for {', '.join(texts)}: a call with these arguments, with the "
        "package or remote code, takes steps that were fitted to these weights; with `calibrated=False` it does not. "
        "The built-in classes do not know them."
    )


def _model_fields(folder: Path) -> dict[str, Any]:
    scheduler = scheduler_config(folder)
    return {
        "image_size": _image_size(folder),
        "num_steps": f"{scheduler['num_train_timesteps']:,}",
        "prediction_type": scheduler["prediction_type"],
        "variance_type": scheduler["variance_type"],
        "timestep_spacing": scheduler["timestep_spacing"],
        "parameters": f"{count_parameters(folder / WEIGHTS):,}",
    }


def _image_size(folder: Path) -> str:
    unet = unet_config(folder)
    size, channels = unet["sample_size"], unet["in_channels"]
    height, width = (size, size) if isinstance(size, int) else size
    return f"{height} x {width} pixels, {channels} channel{'s' if channels > 1 else ''}"


def _training_fields(record: RunRecord) -> dict[str, Any]:
    config = record.config
    minutes = record.seconds / 60
    description = [f"Training data: {record.source}."]
    if augmentations := [text for name, text in AUGMENTATIONS.items() if config.get(name)]:  # older records lack two
        description.append(f"In training, images were {' and '.join(augmentations)}, at random.")
    if config.get("init_from"):
        description.append(f"It started from the weights of `{config['init_from']}`.")
    if record.best is not None:
        description.append(f"Its weights are the EMA weights of {describe_best(record.best)}.")
    if record.ema_length is not None:
        description.append(f"Its weights are an average whose length, {record.ema_length:g} of the run, was chosen "
                           "after training by the distance of its samples (Karras et al. 2024).")  # fmt: skip
    return {
        "data_name": dataset_of(config),
        "data_description": " ".join(description),
        "num_images": f"{record.num_images:,}",
        "beta_schedule": config["ddpm_beta_schedule"],
        "sampling_steps": config["ddpm_num_inference_steps"],
        "train_steps": f"{record.step:,}" + (f", {record.used:.0%} of the planned run" if record.used < 1 else ""),
        "global_batch": record.global_batch,
        "images_seen": f"{record.step * record.global_batch:,}",
        "loss": f"{config.get('loss_weighting', 'simple')}, "
        f"{config.get('timestep_sampling', FIRST_TIMESTEP_SAMPLING)} timesteps",
        "optimizer": {"adamw": "AdamW", "muon": "Muon"}[config.get("optimizer", FIRST_OPTIMIZER)],
        "learning_rate": f"{config['learning_rate']:g}, {config['lr_scheduler']}",
        "ema_max_decay": config["ema_max_decay"],
        "train_time": f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours",
        "hardware": f"{record.num_processes} x {record.device}, {precision_name(record.mixed_precision)}",
    }


def _measurements(measured: Sequence[Measured], report: Mapping[str, Any] | None) -> str:
    if report is None or not measured:
        lines = ["Nothing was measured: this page has no number for the quality of the samples."]
        return "\n".join([*lines, *_warnings(report)])
    lines = [
        "Of the weights in this repository (EMA), with the sampler in each row.",
        "",
        "| measure | value | real-data baseline | images | extractor | reference | sampler | steps | seed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in measured:
        value = f"{entry['value']:.4g}"
        if entry.get("standard_error") is not None:
            value += f" &plusmn; {entry['standard_error']:.2g}"
        baseline = "" if entry.get("real_data_baseline") is None else f"{entry['real_data_baseline']:.4g}"
        rest = [entry.get(key) for key in ("n", "extractor", "reference", "sampler", "num_inference_steps", "seed")]
        cells = [entry["name"], value, baseline, *("" if cell is None else f"{cell}" for cell in rest)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Distances between sets of images are comparable only with the same extractor, reference and number of images. "
        "Only a distance in Inception features is an FID.",
        "",
        f"Source: `report.json` in this repository, written by `{report['command']}`.",
    ]
    if real_data := report.get("real_data_baseline"):
        images = f"{real_data['n']} {real_data['description']}"
        lines += ["", f"Real-data baseline: the same measures with {images} instead of samples."]
    return "\n".join([*lines, *_warnings(report)])


def _warnings(report: Mapping[str, Any] | None) -> list[str]:
    return [f"\n> {warning[:1].upper()}{warning[1:]}." for warning in (report or {}).get("warnings", [])]


def _limits(folder: Path, measured: Sequence[Measured], license: str) -> list[str]:
    limits = [f"It generates images of one size: {_image_size(folder)}."]
    measures = {entry["measure"] for entry in measured}
    if not measures:
        limits.append("The quality and diversity of its samples were not measured.")
    if "memorisation" not in measures:
        limits.append("Memorisation of training images was not measured.")
    if license == "unknown":
        limits.append("The licence of its weights was not stated.")
    return limits


def _reproduction_fields(record: RunRecord) -> dict[str, Any]:
    config, world_size = record.config, record.num_processes
    launcher = "python" if world_size == 1 else f"torchrun --nproc-per-node {world_size}"
    data = ""
    if config["train_data_dir"]:
        data = f" --train_data_dir path/to/{config['train_data_dir']}"
    elif config["dataset_name"] != "moons" and not is_hub_id(config["dataset_name"]):
        data = f" --dataset_name path/to/{config['dataset_name']}"
    if record.used < 1 or record.followed_the_clock:
        reproducibility = (
            f"This run ended after {record.step:,} steps"
            + (f", {record.used:.0%} of the planned ones" if record.used < 1 else ", as many as its time allowed")
            + ". Another run ends at another step and gives a different model."
        )
    else:
        reproducibility = (
            "The same settings on the same hardware with the same number of processes give the same model. Other "
            "hardware rounds differently and gives a different model of the same quality."
        )
    return {
        "commit": record.commit or "unknown",
        "versions": ", ".join(f"{library} {version}" for library, version in record.versions.items()),
        "train_command": f"{launcher} training/train.py --config config.yaml{data}",
        "reproducibility": reproducibility,
    }
