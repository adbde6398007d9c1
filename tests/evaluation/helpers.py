"""Short evaluations: how the tests start them and read their results."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from tests.short_run import SHORT_RUN, flags, fresh_accelerate, run_here
from training.data.split import DataSplit
from training.evaluate import evaluate
from training.evaluation.config import EvalConfig
from training.run.record import RunRecord

TRAIN_SETTINGS = SHORT_RUN | {
    "train_batch_size": 4,
    "save_images_steps": 0,
    "num_sample_images": 2,
    "ddpm_num_inference_steps": 2,
    "checkpointing_steps": 6,
    "validation_steps": 6,
    "num_validation_images": 2,
}
NUM_SAMPLES, NUM_REFERENCE, NUM_BOUND_IMAGES, STRATA = 80, 200, 10, 8  # 80 samples are two shards
SETTINGS = {
    "num_samples": NUM_SAMPLES,
    "num_inference_steps": (4,),
    "num_reference": NUM_REFERENCE,
    "num_bound_images": NUM_BOUND_IMAGES,
    "strata": STRATA,
    "extractor": ("pixels",),
    "cpu_threads": 1,
}


def train(work, name, **options):
    options = {"output_dir": work / name, "cache_dir": work / "cache", **TRAIN_SETTINGS, **options}
    assert run_here("train.py", flags(options)) == 0
    return work / name


def eval_config(work, model, output_dir=None, **settings):
    """SETTINGS and these; output_dir is a name in `work`."""
    paths = {"cache_dir": str(work / "cache")} | ({"output_dir": str(work / output_dir)} if output_dir else {})
    return EvalConfig(**{"model": str(model), **paths, **SETTINGS, **settings})


def evaluate_here(work, model, output_dir=None, **settings):
    """Evaluate in this process. Returns the content of report.json."""
    with fresh_accelerate():
        evaluate(eval_config(work, model, output_dir, **settings))
    return json.loads(((work / output_dir if output_dir else Path(model)) / "report.json").read_text())


def arguments(work, model, output_dir=None, **settings):
    """The same settings as a command line, for a child process."""
    settings = {"cache_dir": work / "cache", **SETTINGS, **settings}
    if output_dir is not None:
        settings["output_dir"] = work / output_dir
    texts = {name: ",".join(map(str, v)) if isinstance(v, tuple) else v for name, v in settings.items()}
    return [str(model), *flags(texts)]


def find_measurement(report, measure, **wanted):
    """The one measurement with these values."""
    (measurement,) = [m for m in report["measurements"] if m | {"measure": measure, **wanted} == m]
    return measurement


def shard_files(output_dir, weights="ema", steps=4, eta=1, seed=0, precision="float32"):
    """The files of one sampler."""
    return sorted(output_dir.glob(f"evaluation/samples/{weights}-*-steps{steps}-eta{eta}-seed{seed}-{precision}/*.npy"))


def saved_samples(output_dir, **sampler):
    return np.concatenate([np.load(file) for file in shard_files(output_dir, **sampler)])


def fake_runtime(world_size=1, rank=0):
    """Stands for a Runtime: one rank of this world size, without communication."""
    return SimpleNamespace(
        rank=rank, world_size=world_size, is_main=rank == 0, device=torch.device("cpu"), autocast=nullcontext,
        barrier=lambda: None, gather_objects=lambda items: items,
    )  # fmt: skip


def data_split(images, held_out, train_indices=None):
    """A split of arrays; all images are trained on by default."""
    indices = np.arange(len(images)) if train_indices is None else train_indices
    return DataSplit(SimpleNamespace(images=images), indices, held_out, "", None, None)


def numbered_images(first, count, dtype=np.uint8):
    """(count, 1, 2, 2): image i is filled with first + i."""
    return np.arange(first, first + count, dtype=dtype)[:, None, None, None].repeat(2, 2).repeat(2, 3)


def numbers_of(images):
    return images[:, 0, 0, 0].tolist()


def run_record(**values):
    defaults = {
        "step": 6, "global_batch": 4, "num_processes": 1, "device": "cpu", "mixed_precision": "no", "num_images": 8192,
        "source": "moons", "held_out": "nothing", "versions": {}, "commit": None, "config": {},
    }  # fmt: skip
    return RunRecord(**defaults | values)
