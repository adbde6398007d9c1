"""Shared by the benchmark scripts: folders, processor and versions, writing results."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from training.run.runtime import commit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CACHE_DIR = Path("~/.cache/ddpm_pipeline").expanduser()  # the default of training/evaluate.py
FEATURES_DIR = CACHE_DIR / "features"  # features and trained classifiers


def machine() -> dict[str, Any]:
    """Processor, GPU, threads, library versions, date and commit."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    entries = dict(re.findall(r"^(model name|flags)\s*: (.*)$", text, re.MULTILINE))
    flags = entries.get("flags", "").split()
    return {
        "processor": entries.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "bf16": torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "diffusers", "accelerate", "datasets", "numpy")},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
    }


def data_option(folder: str) -> str:
    """The setting that a folder is given as: of a data set laid out as on the Hub, or of image files."""
    return "dataset_name" if any(Path(folder).rglob("*.parquet")) else "train_data_dir"


def file_name(text: str) -> str:
    """The name of a processor or GPU as it stands in the name of a file: lower case, with hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def minutes_since(started: float) -> float:
    """Minutes since `started`, a time.monotonic(), to one decimal."""
    return round((time.monotonic() - started) / 60, 1)


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
