"""TO THE HUB: a clean folder, its card, a look whether it loads, and one commit.

    run -> stage: what is on the list, and README.md -> check_loading: the same pictures in three ways -> push

What is published is on a list; all else stays at home. No number is typed by hand: pipeline/training.json says how the
model was trained, report.json what was measured, and what nobody measured is not said. The Hub's client waits for an
answer for ever and never sends a commit twice; here everything has one deadline, and is tried again where that is safe.
"""

import hashlib
import json
import math
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, TypeVar

import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .loading import check_folder

ROOT = Path(__file__).resolve().parent.parent  # of the checkout: the card's template and the licence lie there
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
HALF_WEIGHTS = "unet/diffusion_pytorch_model.fp16.safetensors"
MODEL = ("model_index.json", "pipeline.py", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS)
PICTURES = ("samples.png", "walk.png")
CARD = "README.md"
PUBLISHED = (*MODEL, HALF_WEIGHTS, *PICTURES, CARD, "config.yaml", "report.json", "LICENSE")  # and nothing else
HUBS_OWN = {".gitattributes", CARD, "LICENSE"}  # what the Hub, or its page for a new model, puts into one
# settings that say where the run was and not what it was
LOCAL_SETTINGS = ("output_dir", "cache_dir", "cpu_threads", "dataloader_num_workers", "resume_from_checkpoint",
                  "push_to_hub", "push_to_hub_steps", "hub_model_id", "hub_private_repo", "license")  # fmt: skip
TAG = re.compile(r"[A-Za-z0-9][\w.-]{0,98}(?<!\.)(?<!\.lock)", re.ASCII)  # git takes more, and less is safe
TOLERANCE = 1e-5  # between the ways to load, of pictures in [0, 1]
WAITS = (1, 2, 4, 8)  # seconds before what failed is tried again
MAY_PASS = {408, 425, 429, 500, 502, 503, 504}  # answers that may be others a little later
Result = TypeVar("Result")


class HubError(RuntimeError):
    """The Hub, or the way to it, failed. What is on this machine is as it was."""


class LoadingError(RuntimeError):
    """The staged folder does not load, or not to the same pictures in every way."""


def publish(
    run: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision_tag: str | None = None,
    license: str | None = None,
    fp16: bool = False,
    seconds: float = 600,
    say: Callable[[str], object] = print,
) -> str:
    """Publish a run: stage it, look whether it loads, push it as one commit with a tag.

    Args:
        run, revision_tag, license, fp16, say: see `stage`.
        repo_id: "user/name", or "name" of the user whose token it is; made if it is missing.
        private: make it private; an error if it is there and public.
        seconds: that the Hub may take for everything.
    Returns:
        The hash of the commit.
    Raises:
        HubError: the Hub failed or refused.
        LoadingError: it does not load, or not to the same pictures in the three ways. Nothing was sent then.
        ValueError, OSError: the run is not complete, or a name is none.
    """
    hub = Hub(seconds)
    repo_id = check_access(hub, repo_id, private=private, license=license)
    seen = look(hub, repo_id)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tag = stage(run, folder, repo_id=repo_id, revision_tag=revision_tag, license=license, fp16=fp16, say=say)
        title = f"{Path(run).resolve().name}, step {_read(Path(run) / 'pipeline' / 'training.json')['step']}"
        title += f" ({digest(folder)[:12]})"  # by which a commit is known again
        if revision_tag is not None:
            check_tag(seen, revision_tag, title)
        say("It loads in three ways: " + told(check_loading(folder)))
        commit = push(hub, folder, seen, tag=tag, title=title)
    news = "Published" if commit != seen.commit else "Nothing has changed since it was published"
    say(
        f"{news}: {hub.api.endpoint}/{repo_id}, commit {commit[:8]}, tag {tag}. To load it:\n"
        f"    from diffusers import DiffusionPipeline\n"
        f'    pipe = DiffusionPipeline.from_pretrained("{repo_id}", revision="{tag}")'
    )
    return commit


# ---- The folder ------------------------------------------------------------------------------------------------------


def stage(
    run: str | Path,
    folder: Path,
    *,
    repo_id: str,
    revision_tag: str | None = None,
    license: str | None = None,
    fp16: bool = False,
    say: Callable[[str], object] = print,
) -> str:
    """Build the folder that is published.

    Args:
        run: folder of a run, with pipeline/, and report.json if it was measured.
        folder: empty or missing; it gets files whose names are in PUBLISHED.
        repo_id: "user/name", for the card.
        revision_tag: the tag of the commit; by default it is made of what the files hold.
        license: of the weights, by the Hub's name for it; "apache-2.0" for the moons, else "unknown" by default.
        fp16: write the weights in half precision too, which `variant="fp16"` loads.
    Returns:
        The tag, which the card's lines for loading name: a card cannot hold the hash of its own commit.
    Raises:
        ValueError: the run is not complete, or a file would tell something of this machine.
        OSError: a file cannot be read or written.
    """
    if revision_tag is not None and not (TAG.fullmatch(revision_tag) and ".." not in revision_tag):
        raise ValueError(f"revision_tag is {revision_tag!r}: give letters, digits, '.', '_' and '-', such as v1")
    run = Path(run)
    pipeline = run / "pipeline"
    if not pipeline.is_dir():
        raise FileNotFoundError(f"{run} has no pipeline/: give the folder of a run that has ended")
    check_folder(pipeline)
    training = _read(pipeline / "training.json")
    for name in [*MODEL, *(picture for picture in PICTURES if (pipeline / picture).is_file())]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(pipeline / name, folder / name)
    if fp16:
        weights = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
        if large := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
            raise ValueError(f"fp16 is asked for, but {large[0]} has numbers above 65504: leave it out")
        save_file(weights, folder / HALF_WEIGHTS, metadata={"format": "pt"})
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")

    report = _report_of(run / "report.json", folder / WEIGHTS, say)
    if report is not None:
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    config = shareable(training["config"]) | {"mixed_precision": training["mixed_precision"]}
    if training["step"] == config["max_train_steps"]:
        config["max_train_minutes"] = None  # a slower machine shall come as far
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")

    if license is None:
        license = "apache-2.0" if config["dataset_name"] == "moons" else "unknown"
        if license == "unknown":
            say("The card will say license: unknown. Only you know what the owner of the pictures allows: --license")
    tag = revision_tag or f"sha256-{digest(folder)[:12]}"
    card = write_card(folder, repo_id=repo_id, revision=tag, license=license, training=training | {"config": config},
                      report=report)  # fmt: skip
    (folder / CARD).write_text(card, encoding="utf-8")
    _check_secrets(folder, run)
    return tag


def files_of(folder: Path) -> list[str]:
    """The files of a staged folder, by name."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def digest(folder: Path) -> str:
    """sha256 of the names and contents of a staged folder's files, hexadecimal."""
    total = hashlib.sha256()
    for name in files_of(folder):
        total.update(name.encode() + b"\0" + hashlib.sha256((folder / name).read_bytes()).digest())
    return total.hexdigest()


def shareable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run without what is of its machine: folders of data keep their last name."""
    kept = {name: value for name, value in config.items() if name not in LOCAL_SETTINGS}
    for name in ("dataset_name", "train_data_dir", "init_from", "extractor"):
        if kept.get(name) and (name in ("train_data_dir", "extractor") or not is_hub_name(kept[name])):
            kept[name] = Path(kept[name]).expanduser().resolve().name
    return kept


def is_hub_name(name: str) -> bool:
    """Is that a name on the Hub, "user/name", and not a folder here?"""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name)) and not Path(name).is_dir()


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold an object")
    return content


def _report_of(file: Path, weights: Path, say: Callable[[str], object]) -> dict[str, Any] | None:
    """What was measured of these weights, if anything was."""
    if not file.is_file():
        return None
    report = _read(file)
    if report.get("weights_sha256") != hashlib.sha256(weights.read_bytes()).hexdigest():
        say(f"{file} is of other weights than those in pipeline/: it is left out, and the card has no measurements")
        return None
    return report


def _check_secrets(folder: Path, run: Path) -> None:
    """Raise ValueError if a text tells a token, or where on this machine something lies."""
    from huggingface_hub import get_token

    private = {"a token": re.compile(r"hf_[A-Za-z0-9]{30,}")}
    for what, text in (("the token", get_token()), ("the folder of the run", str(run.resolve())),
                       ("your home", f"{Path.home()}/")):  # fmt: skip
        if text and len(text) > 5:
            private[what] = re.compile(re.escape(text))
    for name in files_of(folder):
        if name.endswith((".md", ".json", ".yaml", ".py")):
            text = (folder / name).read_text(encoding="utf-8")
            for what, pattern in private.items():
                if found := pattern.search(text):
                    raise ValueError(f"{name} would tell {what}, {found[0]!r}: take it out of {run}")


# ---- The card --------------------------------------------------------------------------------------------------------


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


# ---- Does it load? ---------------------------------------------------------------------------------------------------

# Each way in a process of its own: without the package, it cannot be imported there.
LOAD = """
import sys
way, folder, package, out, steps, labels = sys.argv[1:]
if way == "package":
    sys.path.insert(0, package)
else:
    sys.modules["ddpm_pipeline"] = None
import diffusers, torch
from safetensors.torch import save_file
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
if way == "package":
    from ddpm_pipeline import DDPMPipeline
    pipe = DDPMPipeline.from_pretrained(folder)
else:
    more = {"custom_pipeline": "pipeline", "trust_remote_code": True} if way == "remote code" else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **more)
pipe.set_progress_bar_config(disable=True)
more = {"class_labels": [int(label) for label in labels.split()]} if labels else {}
generator = torch.Generator().manual_seed(0)
images = pipe(2, generator, num_inference_steps=int(steps), output_type="np", **more).images
save_file({"images": torch.from_numpy(images).contiguous()}, out)
"""


def check_loading(folder: Path) -> dict[str, float]:
    """Load a staged folder in the three ways, each in a fresh process, and draw two pictures from one seed.

    Returns:
        For each pair of ways, the largest difference of their pictures, in [0, 1].
    Raises:
        LoadingError: one does not load, or they differ by more than TOLERANCE. That the built-in classes differ is no
            error where they are known to be wrong (built_in_limits).
    """
    unet = _read(folder / "unet" / "config.json")
    labels = ""
    if unet.get("num_class_embeds") is not None:
        labels = f"0 {unet['num_class_embeds'] - 1}"
    steps = min(10, _read(folder / "scheduler" / "scheduler_config.json")["num_train_timesteps"])
    ways = ["package", "remote code"] + (["built-in"] if not labels else [])
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch, "CUDA_VISIBLE_DEVICES": ""}
        children = {}
        for way in ways:
            out = Path(scratch) / f"{way}.safetensors"
            command = [sys.executable, "-c", LOAD, way, str(folder), str(ROOT), str(out), str(steps), labels]
            children[way] = (
                out,
                subprocess.Popen(command, env=environment, cwd=scratch, text=True, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE),
            )  # fmt: skip
        images = {}
        try:
            for way, (out, child) in children.items():
                _, errors = child.communicate()
                if child.returncode:
                    last = (errors.strip().splitlines() or ["no message"])[-1]
                    raise LoadingError(f"the folder does not load with the {way}: {last}")
                images[way] = load_file(out)["images"]
        finally:
            for _, child in children.values():
                child.kill()
    faithful = not built_in_limits(folder)
    differences = {}
    for one, other in (("package", "remote code"), ("package", "built-in")):
        if other in images:
            differences[f"{one}, {other}"] = (images[one] - images[other]).abs().max().item()
            required = faithful or other != "built-in"
            if required and not differences[f"{one}, {other}"] <= TOLERANCE:  # a NaN is no agreement either
                raise LoadingError(
                    f"loaded with the {one} and with the {other} it draws other pictures from one seed: they differ by "
                    f"{differences[f'{one}, {other}']:g}, where {TOLERANCE:g} is allowed. Nothing was sent"
                )
    return differences


def told(differences: Mapping[str, float]) -> str:
    """The differences of check_loading in words, in steps of 8-bit pixels."""
    return "; ".join(f"{pair}: pictures differ by {255 * number:.2g} of 255" for pair, number in differences.items())


# ---- The Hub ---------------------------------------------------------------------------------------------------------


@dataclass
class Hub:
    """The Hub's client with what it lacks: one deadline for everything, and another try where that is safe."""

    seconds: float  # from now on, for all that is asked of it

    def __post_init__(self) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        self.api = HfApi()
        # All that goes wrong between here and the Hub: its answers, and no answer at all.
        http_error: Any = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
        self._errors: tuple[type[Exception], ...] = (
            http_error,
            ConnectionError,
            TimeoutError,
            json.JSONDecodeError,
        )
        self._until = time.monotonic() + self.seconds

    def ask(self, what: str, function: Callable[..., Result], *args: Any, **options: Any) -> Result:
        """Call a function of the client that may be called twice.

        Raises:
            HubError: the Hub said no, or nothing, or that it is busy, five times.
        """
        for wait in (*WAITS, None):
            try:
                return self._in_time(what, function, *args, **options)
            except self._errors as error:
                self._pause_or_fail(what, error, wait)
        raise AssertionError("the last wait is None")

    def commit(self, repo_id: str, parent: str, title: str, operations: list[Any]) -> str:
        """Make one commit on top of `parent`, and no second one if an answer gets lost: its hash.

        Raises:
            HubError: as `ask`, or somebody else has pushed since.
        """
        for wait in (*WAITS, None):
            try:
                made = self._in_time(
                    "the commit", self.api.create_commit, repo_id, operations, commit_message=title,
                    parent_commit=parent,
                )  # fmt: skip
                return made.oid
            except self._errors as error:
                if _status(error) != 412:  # 412: the parent is not the newest commit any more
                    self._pause_or_fail("the commit", error, wait)
                newest = self.ask("the newest commit", self.api.list_repo_commits, repo_id)[0]
                if newest.commit_id != parent:
                    if newest.title == title:  # it was made, and the answer got lost
                        return newest.commit_id
                    raise HubError(
                        f"somebody else has pushed to {repo_id} in these seconds ({newest.title!r}): look at it, and "
                        "publish again"
                    ) from error
                if _status(error) == 412:
                    raise self._failed("the commit", error) from error
        raise AssertionError("the last wait is None")

    def _in_time(self, what: str, function: Callable[..., Result], *args: Any, **options: Any) -> Result:
        """Call it in a thread of its own, which may be left behind: the client itself waits for ever."""
        outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def call() -> None:
            try:
                outcome.put((function(*args, **options), None))
            except BaseException as error:
                outcome.put((None, error))

        threading.Thread(target=call, daemon=True).start()
        try:
            value, error = outcome.get(timeout=max(0.0, self._until - time.monotonic()))
        except queue.Empty:
            raise HubError(f"{what}: the Hub has not answered, and its {self.seconds:g} seconds are over") from None
        if error is not None:
            raise error
        return value

    def _pause_or_fail(self, what: str, error: Exception, wait: float | None) -> None:
        status = _status(error)
        if wait is None or (status is not None and status not in MAY_PASS):
            raise self._failed(what, error) from error
        asked = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
        wait = max(wait, float(asked)) if asked.isdecimal() else wait
        if time.monotonic() + wait > self._until:
            raise self._failed(what, error) from error
        time.sleep(wait)

    def _failed(self, what: str, error: Exception) -> HubError:
        status = _status(error)
        hint = {
            401: "; log in with `hf auth login`, or set HF_TOKEN to a token of yours",
            403: "; take a token that may write there",
        }.get(status or 0, "")
        said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return HubError(f"{what}: {status or type(error).__name__}: {said}{hint}")


def _status(error: Exception) -> int | None:
    """The number of the Hub's answer; None if there was none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def check_access(hub: Hub, repo_id: str, *, private: bool = False, license: str | None = None) -> str:
    """Make the repository if it is missing, private from its first moment if wanted; make sure it may be written to.

    Returns:
        Its whole name, "user/name".
    Raises:
        HubError: no token, or none that may write there; the Hub cannot be reached; or it is public and shall not be.
        ValueError: that is no name for a repository, or for a licence.
    """
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    try:
        user = hub.ask("who you are", hub.api.whoami)
    except LocalTokenNotFoundError:
        raise HubError("there is no token: log in with `hf auth login`, or set HF_TOKEN") from None
    owner = repo_id.split("/")[0] if "/" in repo_id else user["name"]
    if owner not in [user["name"], *(org["name"] for org in user.get("orgs", []))]:
        raise HubError(f"{repo_id} is not yours to write: the token is of {user['name']}")
    if license is not None:
        try:
            hub.ask("the licence", ModelCard(f"---\nlicense: {license}\n---\n").validate)
        except ValueError as error:
            raise ValueError(f"license is {license!r}, which the Hub does not know: {str(error)[:200]} ...") from None
    # False would make a new one public where an organisation wants private ones: None leaves it to its settings.
    made = hub.ask("making the repository", hub.api.create_repo, repo_id, private=private or None, exist_ok=True)
    repo_id = made.repo_id
    hub.ask("the right to write", hub.api.auth_check, repo_id, write=True)
    if private and not hub.ask("the repository", hub.api.model_info, repo_id).private:
        raise HubError(
            f"{repo_id} is there already and is public: make it private in its settings, or leave hub_private_repo out"
        )
    return repo_id


@dataclass(frozen=True)
class Seen:
    """What a repository holds before it is pushed to."""

    repo_id: str
    commit: str  # hash of the newest
    title: str  # of the newest
    files: list[str]
    tags: dict[str, str]  # name: hash of its commit


def look(hub: Hub, repo_id: str) -> Seen:
    """Look at a repository.

    Raises:
        HubError: it holds something that is no published model; or see Hub.
    """
    newest = hub.ask("the newest commit", hub.api.list_repo_commits, repo_id)[0]
    files = hub.ask("its files", hub.api.list_repo_files, repo_id, revision=newest.commit_id)
    if not {"model_index.json", "pipeline.py"} <= set(files) and (foreign := sorted(set(files) - HUBS_OWN)):
        raise HubError(f"{repo_id} holds other things ({', '.join(foreign[:5])}): give another hub_model_id")
    refs = hub.ask("its tags", hub.api.list_repo_refs, repo_id)
    return Seen(repo_id, newest.commit_id, newest.title, files, {ref.name: ref.target_commit for ref in refs.tags})


def check_tag(seen: Seen, tag: str, title: str) -> None:
    """Raise HubError if a tag is on another commit than the one that this push makes, or has made before."""
    there = seen.tags.get(tag)
    if there is not None and not (seen.title == title and there == seen.commit):
        raise HubError(f"{seen.repo_id} has a tag {tag} already, on commit {there[:8]}: give another revision_tag")


def push(hub: Hub, folder: Path, seen: Seen, *, tag: str, title: str) -> str:
    """Push a staged folder as one commit on top of the one that was seen, with a tag.

    Files on the list that an earlier publication left, and this one has not, go in the same commit. Done twice, the
    second changes nothing.

    Returns:
        The hash of the commit.
    Raises:
        HubError: see Hub.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    commit = seen.commit
    if seen.title != title:
        operations: list[Any] = [CommitOperationAdd(name, str(folder / name)) for name in files_of(folder)]
        gone = [name for name in seen.files if name in PUBLISHED and not (folder / name).exists()]
        operations += [CommitOperationDelete(name) for name in gone]
        commit = hub.commit(seen.repo_id, seen.commit, title, operations)
    if tag not in seen.tags:
        hub.ask("the tag", hub.api.create_tag, seen.repo_id, tag=tag, revision=commit, exist_ok=True)
    return commit
