"""STAGING: a clean folder with what is published and nothing else.

The run's own folder also has checkpoints, logs and paths of this machine. Staging copies the files whose names are in
files.PUBLISHED, leaves out settings that describe this machine, and refuses text with a token or a local path.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from training.data.stores import path_of, user_of
from training.hub.card import write_card
from training.hub.files import (
    CARD,
    FORMER_NAMES,
    GUIDE_FILES,
    GUIDE_WEIGHTS,
    HALF_GUIDE_WEIGHTS,
    HALF_WEIGHTS,
    IMAGES,
    MODEL_FILES,
    REMOTE_CODE,
    ROOT,
    WEIGHTS,
    digest,
    has_current_code,
    is_hub_id,
    list_files,
    tables_for_the_weights,
)
from training.run.record import SCHEDULER_CONFIG, RunRecord, read_json

LOCAL_FIELDS = ("output_dir", "cache_dir", "cpu_threads", "dataloader_num_workers", "resume_from_checkpoint",
                "push_to_hub", "push_to_hub_steps", "hub_model_id", "hub_private_repo", "license",
                "report_to")  # fmt: skip
TAG = re.compile(r"[A-Za-z0-9][\w.-]{0,98}(?<!\.)(?<!\.lock)", re.ASCII)  # stricter than git's own rules


def stage(
    run: str | Path,
    folder: Path,
    *,
    repo_id: str,
    revision_tag: str | None = None,
    license: str | None = None,
    fp16: bool = False,
    log: Callable[[str], object] = print,
) -> str:
    """Write the folder that is published.

    Args:
        run: folder of a run with pipeline/, and with report.json if it was evaluated.
        folder: empty or missing.
        repo_id: "user/name", for the card.
        revision_tag: tag of the commit; None: derived from the contents of the files.
        license: of the weights, as the Hub names it; None: "apache-2.0" for the moons, otherwise "unknown".
        fp16: also write half-precision weights, which `variant="fp16"` loads.
    Returns:
        The tag. The card's examples load it, because a card cannot contain the hash of its own commit.
    Raises:
        ValueError: the run is incomplete, or a file contains a token or a path of this machine.
        OSError: a file cannot be read or written.
    """
    if revision_tag is not None and not (TAG.fullmatch(revision_tag) and ".." not in revision_tag):
        raise ValueError(f"revision_tag is {revision_tag!r}: give letters, digits, '.', '_' and '-', such as v1")
    run = Path(run)
    record = _copy_model(run / "pipeline", folder)
    if fp16:
        _write_half_precision(folder)
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    report = _read_report(run / "report.json", folder / WEIGHTS, log)
    if report is not None:
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    config = shareable_config(record.config) | {"mixed_precision": record.mixed_precision}
    if record.used >= 1:  # slower hardware needs more time for the same steps
        config |= {"max_train_steps": record.step, "max_train_minutes": None, "max_train_images": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")

    if license is None:
        license = "apache-2.0" if config["dataset_name"] == "moons" else "unknown"
        if license == "unknown":
            log("The card says `license: unknown`: give --license if the owner of the training images permits one")
    if not has_current_code(folder):
        log(
            f"{run / 'pipeline' / REMOTE_CODE} is of another version of ddpm_pipeline, or edited: it is published as "
            "it is, and the card says so"
        )
    tables, reason = tables_for_the_weights(folder)
    if reason is not None:
        log(
            f"{run / 'pipeline' / SCHEDULER_CONFIG} has calibrated steps that are not for this model ({reason}): the "
            "card leaves them out. Run calibrate.py again to include them"
        )
    tag = revision_tag or f"sha256-{digest(folder)[:12]}"
    card = write_card(
        folder,
        repo_id=repo_id,
        revision=tag,
        license=license,
        record=replace(record, config=config),
        report=report,
        tables=tables,
    )
    (folder / CARD).write_text(card, encoding="utf-8")
    check_private_text(folder, run, secrets_of(record.config))
    return tag


def shareable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Config that do not depend on this machine. Of a local path only the last component is kept."""
    shared = {name: value for name, value in config.items() if name not in LOCAL_FIELDS}
    for name in ("dataset_name", "train_data_dir", "denoiser", "init_from", "extractor"):
        if shared.get(name) and not _is_on_the_hub(name, shared[name]):
            shared[name] = Path(path_of(shared[name])).expanduser().resolve().name
    return shared


def _is_on_the_hub(name: str, value: str) -> bool:
    """Whether the value of this field is a name on the Hub, which means the same on other machines."""
    if name == "extractor":
        return Path(value).suffix not in (".th", ".pt") and is_hub_id(value.partition("@")[0])
    return name != "train_data_dir" and is_hub_id(value)


def _copy_model(pipeline: Path, folder: Path) -> RunRecord:
    """Check that a saved pipeline is complete, and copy its files. Returns its record."""
    if not pipeline.is_dir():
        raise FileNotFoundError(f"{pipeline} is missing: give the folder of a finished run")
    from ddpm_pipeline.loading import check_folder  # imports torch: not before it is needed

    check_folder(pipeline, use_safetensors=True)
    record = RunRecord.load(pipeline)
    if record is None:
        raise FileNotFoundError(f"{pipeline / 'training.json'} is missing: the card needs the run's record")
    guide_files = GUIDE_FILES if (pipeline / "guide").is_dir() else ()
    sources = {name: pipeline / name for name in (*MODEL_FILES, *guide_files)}
    for name in [*FORMER_NAMES, *IMAGES]:  # if both names exist, the current one wins
        if (pipeline / name).is_file():
            sources[FORMER_NAMES.get(name, name)] = pipeline / name
    for name, source in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    return record


def _write_half_precision(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    for whole, half in ((WEIGHTS, HALF_WEIGHTS), (GUIDE_WEIGHTS, HALF_GUIDE_WEIGHTS)):
        if not (folder / whole).is_file():
            continue
        weights = {name: tensor.half() for name, tensor in load_file(folder / whole).items()}
        if too_large := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
            raise ValueError(
                f"fp16: {too_large[0]} has values above 65504, the largest in half precision: publish without --fp16"
            )
        save_file(weights, folder / half, metadata={"format": "pt"})


def _read_report(file: Path, weights: Path, log: Callable[[str], object]) -> dict[str, Any] | None:
    """The report if it is about these weights; otherwise None."""
    if not file.is_file():
        return None
    from training.evaluation.report import FORMAT  # imports torch

    report, reason = read_json(file), None
    if report.get("format") != FORMAT:
        reason = f"has format {report.get('format', 1)}, not {FORMAT}"
    elif report.get("weights_sha256") != hashlib.sha256(weights.read_bytes()).hexdigest():
        reason = "is about other weights than those in pipeline/"
    if reason is None:
        return report
    log(f"{file} {reason}: it is left out, and the card has no measurements. Run evaluate.py again to include them")
    return None


def secrets_of(config: Mapping[str, Any]) -> list[str]:
    """What an address of data has for one's own use: a signature, a password."""
    places = [str(config.get(name) or "") for name in ("dataset_name", "train_data_dir")]
    found = [part for place in places if "://" in place for part in (place.partition("?")[2], user_of(place))]
    return [secret for secret in found if len(secret) > 3]


def check_private_text(folder: Path, run: Path, secrets: Sequence[str] = ()) -> None:
    """Raise ValueError if a text file contains a token, a secret or a path of this machine."""
    from huggingface_hub import get_token

    private = {
        f"secret {i} of the address of the data": re.compile(re.escape(each)) for i, each in enumerate(secrets, 1)
    }
    private |= {"an access token": re.compile(r"hf_[A-Za-z0-9]{30,}")}
    token = get_token()
    if token and len(token) > 5:
        private["the access token in use"] = re.compile(re.escape(token))
    for what, path in (("the path of the run", run.resolve()), ("the path of the home folder", Path.home())):
        if path != Path(path.anchor):  # the home folder of a container may be the root
            private[what] = _path_pattern(path)
    for name in list_files(folder):
        if name.endswith((".md", ".json", ".yaml", ".py")):
            text = (folder / name).read_text(encoding="utf-8")
            if name == REMOTE_CODE and has_current_code(folder):  # public, whatever this machine's paths are called
                continue
            for what, pattern in private.items():
                if match := pattern.search(text):
                    raise ValueError(f"{name} would publish {what}, {match[0]!r}: remove it first")


def _path_pattern(path: Path) -> re.Pattern[str]:
    """Finds a path, or the path of something in it, but not "/model" in "user/model", "/models" or "/model.py"."""
    spellings = "|".join(map(re.escape, {str(path), json.dumps(str(path))[1:-1]}))  # as text, and in JSON
    return re.compile(rf"(?:(?<![\w./~-])|(?<=file://)|(?<=\\[nt]))(?:{spellings})(?![\w-]|\.\w)")
