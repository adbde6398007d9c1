"""TO THE HUB: a clean folder, its card, a look whether it loads, and one commit.

    run -> stage: what is on the list, and README.md -> check_loading: the same pictures in three ways -> push

What is published is on a list; all else stays at home. No number is typed by hand: pipeline/training.json says how the
model was trained, report.json what was measured, and what nobody measured is not said. The Hub's client waits for an
answer for ever and never sends a commit twice; here everything has one deadline, and is tried again where that is safe.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

from ddpm_pipeline.loading import check_folder

ROOT = Path(__file__).resolve().parents[2]  # of the checkout: the card's template and the licence lie there
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
HALF_WEIGHTS = "unet/diffusion_pytorch_model.fp16.safetensors"
MODEL = ("model_index.json", "pipeline.py", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS)
PICTURES = ("samples.png", "walk.png")
CARD = "README.md"
PUBLISHED = (*MODEL, HALF_WEIGHTS, *PICTURES, CARD, "config.yaml", "report.json", "LICENSE")  # and nothing else
# settings that say where the run was and not what it was
LOCAL_SETTINGS = ("output_dir", "cache_dir", "cpu_threads", "dataloader_num_workers", "resume_from_checkpoint",
                  "push_to_hub", "push_to_hub_steps", "hub_model_id", "hub_private_repo", "license")  # fmt: skip
TAG = re.compile(r"[A-Za-z0-9][\w.-]{0,98}(?<!\.)(?<!\.lock)", re.ASCII)  # git takes more, and less is safe


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
    from training.hub.card import write_card

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
