"""Measure a model: `accelerate launch training/evaluate.py runs/mnist [--num_samples 5000 ...]`.

It samples, with all processes, sample i from a seed of its own; compares the samples with the training pictures; bounds
the bits per dimension of held-out pictures; and writes report.json, the only source of numbers in a published card,
with report.md and plots beside it. Every distance stands beside its floor, that of as many real pictures.

Samples are kept in evaluation/: one that was made is not made again, by whatever command. The report is written anew by
each: ask for all that shall be in it.

Exit codes: 0 done; 2 a mistake in the command, or the model or its data cannot be read; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project, so that `training` is found

from training.config import METRICS, OF_FEATURES, OF_HELD_OUT, OF_SAMPLES, Config  # noqa: E402

if TYPE_CHECKING:
    from training.data.split import DataSplit
    from training.evaluation.samples import Model

WEIGHTS = ("ema", "raw")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Measure a model.", allow_abbrev=False)

    def option(name: str, words: str, **settings: Any) -> None:
        made.add_argument(f"--{name}", help=words, **settings)

    made.add_argument("model", help="folder of a run that has ended, or of a saved pipeline, or a name on the Hub")
    option("output_dir", "for report.json and the samples; by default the run's folder", type=Path)
    option(
        "metrics", f"of {','.join(METRICS)}; all but flow, which needs the extra ode", type=words, default=METRICS[:-1]
    )
    option("num_samples", "of each sampler (%(default)s)", type=int, default=2048)
    option("num_inference_steps", "with commas between; the first is the card's (50)", type=integers, default=[50])
    option("eta", "with commas between: 1 as DDPM walks home, 0 as DDIM (1)", type=numbers, default=[1.0])
    option("weights", "ema,raw: of raw the first sampler only (both)", type=words, default=list(WEIGHTS))
    option("extractor", "pixels, classifier, or a .th or .pt file (see ddpm_pipeline/fidelity.py); several: give it "
           "again (classifier)", action="append")  # fmt: skip
    option("seed", "sample i is drawn from seed + i (%(default)s)", type=int, default=0)
    option("num_reference", "training pictures to compare with, 0: all (%(default)s)", type=int, default=10_000)
    option("num_bound_images", "held-out pictures for the bound (%(default)s)", type=int, default=1000)
    option("strata", "steps of the bound for each picture, 0: all (%(default)s)", type=int, default=20)
    option("num_flow_images", "held-out pictures for the flow (%(default)s)", type=int, default=64)
    option("dataset_name", "as for train.py; by default what the run was trained on")
    option("train_data_dir", "as for train.py")
    option("revision", "of a model on the Hub: a tag, branch or commit")
    option("batch_size", "pictures at once (%(default)s)", type=int, default=64)
    option("mixed_precision", "of the network; no: float32 (%(default)s)", choices=("no", "fp16", "bf16", "auto"),
           default="no")  # fmt: skip
    option("cpu_threads", "of a process; by default the processes share out all cores", type=int)
    option("cache_dir", "where decoded pictures and features are kept (%(default)s)", type=Path,
           default=Path("~/.cache/ddpm_pipeline"))  # fmt: skip
    return made


def integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def check(given: argparse.Namespace) -> None:
    """Raise ValueError for what would only be found when all is sampled."""
    least = {"num_samples": 16, "num_reference": 0, "num_bound_images": 2, "num_flow_images": 2, "strata": 0,
             "batch_size": 1, "seed": 0, "cpu_threads": 1}  # fmt: skip
    for name, bound in least.items():
        value = getattr(given, name)
        if value is not None and value < bound:
            raise ValueError(f"--{name} is {value}: give at least {bound}")
    for name, allowed in (("metrics", METRICS), ("weights", WEIGHTS)):
        if unknown := [word for word in getattr(given, name) if word not in allowed]:
            raise ValueError(f"--{name} has {unknown[0]!r}: give some of {','.join(allowed)}")
    if wrong := [eta for eta in given.eta if not 0 <= eta <= 1]:
        raise ValueError(f"--eta has {wrong[0]}: give numbers from 0 to 1")
    if wrong := [steps for steps in given.num_inference_steps if steps < 1]:
        raise ValueError(f"--num_inference_steps has {wrong[0]}: give at least 1")
    for name in ("num_inference_steps", "eta", "metrics", "weights"):
        if len(set(getattr(given, name))) < len(getattr(given, name)):
            raise ValueError(f"--{name} names something twice")
    if 0 < given.strata < 8:
        raise ValueError(
            f"--strata is {given.strata}: the error of fewer than 8 cannot be told from them; or give 0 for all steps"
        )
    if 0 < given.num_reference < 16:
        raise ValueError(f"--num_reference is {given.num_reference}: give at least 16, or 0 for all")
    needed = {"matplotlib": "eval"} | ({"torchdiffeq": "ode"} if "flow" in given.metrics else {})
    for module, extra in needed.items():
        if find_spec(module) is None:
            raise ValueError(f'{module} is not installed: pip install -c constraints.txt -e ".[train,{extra}]"')
    if given.dataset_name and given.train_data_dir:
        raise ValueError("--dataset_name and --train_data_dir are both given: give one of them")
    if given.seed + given.num_samples > 2**32 - 64:
        raise ValueError(f"--seed is {given.seed}: that of the last sample would be above 2^32")


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        check(given)
        evaluate(given)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nevaluate.py: interrupted. Samples that were made are kept: the same command goes on", file=sys.stderr)
        return 130
    return 0


def evaluate(given: argparse.Namespace) -> None:
    # ---- What there is: processes, model, pictures -------------------------------------------------------------------
    from ddpm_pipeline.features import make_extractor
    from training.evaluation import measures, report
    from training.evaluation.samples import Setting, Shards, load_models, sample
    from training.run import checkpoint, failures, runtime

    began = time.monotonic()
    processes = runtime.start(given.mixed_precision, given.cpu_threads)
    runtime.check_world_size(processes.num_processes)
    say, main_process = processes.print, processes.is_main_process
    with processes.main_process_first():  # which downloads for all
        models = load_models(given.model, given.weights, given.revision)
    of_samples = [name for name in given.metrics if name in OF_SAMPLES]
    of_held_out = [name for name in given.metrics if name in OF_HELD_OUT]
    num_steps = models[0].pipe.scheduler.config.num_train_timesteps
    if of_samples and (wrong := [steps for steps in given.num_inference_steps if steps > num_steps]):
        raise ValueError(f"--num_inference_steps has {wrong[0]}: the walk of this model has {num_steps} steps")
    if of_held_out:  # before all is sampled
        measures.variance_types(models[0])
        if given.strata >= num_steps:
            raise ValueError(f"--strata is {given.strata}: the walk of this model has {num_steps} steps")
    output_dir = given.output_dir or Path(given.model)
    if given.output_dir is None and not (output_dir / "pipeline").is_dir():
        raise ValueError(f"{given.model} is not the folder of a run: give --output_dir for the report")
    folder = output_dir / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    if main_process:
        for old in folder.glob("*.png"):  # they may be of other weights
            old.unlink()
    cache_dir = given.cache_dir.expanduser() / "features"
    with processes.main_process_first():
        parts = load_pictures(given, models[0])
    warnings: list[str] = []
    about_floor = warnings if of_samples else []
    same = trained_on(models[0], parts)
    kind = "training pictures" if same else f"pictures of {parts.data.source}"
    real = measures.real_pictures(parts, given.num_reference, given.num_samples, about_floor, kind)
    say(f"reference: {real.reference_words} of {parts.data.source}; floor: {len(real.floor)} {real.floor_words}")
    if len(real.held_out) < 2:
        warnings.append("fewer than 2 pictures are held out, so there is no bound and no test for copies")
        of_held_out = []
    elif not models[0].trained:
        warnings.append("nothing is known of how this model was trained, so it may have seen what is held out here")
    elif not same:
        warnings.append(
            f"the model was trained on other pictures, {models[0].trained['num_images']} of "
            f"{models[0].trained['source']}: it may have seen what is held out here"
        )
    if "frechet" in of_samples and given.num_samples < 2048:
        warnings.append(f"Frechet distances of {given.num_samples} samples are too large, by about 1 / n: give 2048")
    extractors = []
    if set(of_samples) & set(OF_FEATURES):
        with processes.main_process_first():  # which trains the classifier, and keeps it
            learned_from = {"images": parts.training, "labels": parts.labels(), "cache_dir": cache_dir}
            extractors = [
                make_extractor(which, device=processes.device, **learned_from)
                for which in given.extractor or ["classifier"]
            ]

    # ---- Samples -----------------------------------------------------------------------------------------------------
    measured: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    settings = [Setting(steps, eta) for eta in given.eta for steps in given.num_inference_steps] if of_samples else []
    precision = {"no": "float32"}.get(processes.mixed_precision, processes.mixed_precision)
    for model in models:
        for setting in settings if model is models[0] else settings[:1]:
            shards = Shards(folder, model, setting, given.seed, precision)
            seconds = sample(model, setting, shards, given.num_samples, pixel_type=real.reference.dtype,
                             batch_size=given.batch_size, processes=processes)  # fmt: skip
            if not main_process:
                continue
            pixels = shards.load(given.num_samples)
            found: list[dict[str, Any]] = []
            try:
                for extractor in extractors:
                    found += measures.compare(pixels, real, extractor, of_samples, cache_dir)
                if "shift" in of_samples:
                    found += measures.shifts(pixels, real)
            except ValueError as error:  # samples that are all alike, or a channel that is, as alpha may be
                warnings.append(f"not measured, {model.weights}, {setting.num_inference_steps} steps: {error}")
            walk = model.pipe.scheduler
            about = {
                "sampler": f"{type(walk).__name__}, eta {setting.eta:g}, {walk.config.timestep_spacing}",
                "num_inference_steps": setting.num_inference_steps,
                "eta": setting.eta,
                "reference": real.reference_words,
                "weights": model.weights,
                "main": model is models[0] and setting == settings[0],
                "seed": given.seed,
                "seconds": round(seconds, 1),
            }
            measured += [row | about for row in found]
            say(report.line(found, about))
            if about["main"] and "memorisation" in of_samples:
                picture = report.nearest_picture(pixels, real.reference, extractors[0], cache_dir)
                picture.save(folder / "nearest.png")

    # ---- Held-out pictures -------------------------------------------------------------------------------------------
    pictures = measures.HeldOut(real.held_out, batch_size=given.batch_size, seed=given.seed, processes=processes)
    for model in models if of_held_out else []:
        found = []
        for variance_type in measures.variance_types(model) if "bound" in of_held_out else []:
            row, curve = pictures.bound(model, variance_type, given.num_bound_images, given.strata)
            found.append(row)
            curves.append(curve)
        if "flow" in of_held_out:
            found.append(pictures.flow(model, given.num_flow_images))
        for row in found:
            say(
                f"{row['weights']}, {row['name']}: {row['value']:.3f} +- {row['standard_error']:.3f}, {row['n']} images"
            )
        measured += [row | {"main": model is models[0]} for row in found]

    # ---- The report --------------------------------------------------------------------------------------------------
    if main_process:
        whole = {
            "weights_sha256": models[0].sha256,
            "command": command(given),
            "measurements": measured,
            "warnings": warnings,
            "curves": curves,
            "data": parts.data.source,
            "reference": {
                "words": real.reference_words,
                "n": len(real.reference),
                "sha256": measures.digest(real.reference),
            },
            "floor": {"words": real.floor_words, "n": len(real.floor)},
            "held_out": {"words": parts.source, "n": len(real.held_out)},
            "extractors": [{"name": one.name, "key": one.key, "accuracy": one.accuracy} for one in extractors],
            "step": models[0].trained.get("step"),
            "precision": precision,
            "seconds": round(time.monotonic() - began, 1),
            "num_processes": processes.num_processes,
            "device": runtime.name(processes.device),
            "date": time.strftime("%Y-%m-%d"),
            "commit": checkpoint.commit(),
            "versions": runtime.versions(),
        }
        report.write(output_dir, folder, whole)
        for warning in warnings:
            say(f"WARNING: {warning}.")
        say(f"\nThe report: {output_dir / 'report.json'} and {output_dir / 'report.md'}; its plots: {folder}.")
    processes.wait_for_everyone()
    failures.part()


def load_pictures(given: argparse.Namespace, model: Model) -> DataSplit:
    """What the model was trained on and what was held out, made as for training; the test split if there is one.

    Raises:
        ValueError: it is not known what the model was trained on, or that is of another kind.
    """
    from training.data.split import load_data_split

    settings = {field.name: field.default for field in dataclasses.fields(Config)} | model.trained.get("config", {})
    if given.dataset_name or given.train_data_dir:
        settings |= {"dataset_name": given.dataset_name, "train_data_dir": given.train_data_dir}
        if given.dataset_name in (None, "moons"):  # which have no configs, and no splits to choose from
            settings["dataset_config_name"] = None
            if settings["validation_split"] != "none":
                settings["validation_split"] = None
    elif not (settings["dataset_name"] or settings["train_data_dir"]):
        raise ValueError("this model does not say what it was trained on: give --dataset_name or --train_data_dir")
    names = "dataset_name dataset_config_name train_data_dir center_crop background on_bad_image min_side"
    size = model.pipe.unet.config.sample_size
    options = {name: settings[name] for name in names.split()}
    options |= {"resolution": size if isinstance(size, int) else tuple(size), "cache_dir": given.cache_dir.expanduser()}
    # Of a run that held nothing out no picture of a folder is new to the model.
    parts = load_data_split(settings["validation_split"] if settings["validation_steps"] else "none", **options)
    if "test" in parts.data.splits:  # others may have been looked at while training
        parts = load_data_split("test", **options)
    channels = model.pipe.unet.config.in_channels
    if parts.data.channels != channels:
        raise ValueError(f"the pictures have {parts.data.channels} channels, the model {channels}: give its own data")
    return parts


def trained_on(model: Model, parts: DataSplit) -> bool:
    """Are these the pictures that the model was trained on, as far as its record tells?"""
    return (model.trained.get("source"), model.trained.get("num_images")) == (
        parts.data.source,
        len(parts.train_indices),
    )


def command(given: argparse.Namespace) -> str:
    """This command without what is of this machine: of folders outside of this one only the last name."""
    shown = ["accelerate", "launch", "training/evaluate.py"]
    for word in sys.argv[1:]:
        flag, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        folder = Path(value).expanduser()
        if folder.is_absolute() or ".." in folder.parts:
            value = f"runs/{folder.name}" if value == given.model else folder.name
        shown.append(flag + equals + value)
    return shlex.join(shown)


if __name__ == "__main__":
    sys.exit(main())
