"""Training and launching: `training/train.py` against diffusers' `train_unconditional.py`, same network and data."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.common import ROOT
from benchmarks.compare import Comparison
from training.denoiser import make_denoiser

HERE = ROOT / "benchmarks"
PEER = Path("examples", "unconditional_image_generation", "train_unconditional.py")
BATCH_SIZE = 16  # the default of the peer
WARM_UP, STEPS = 2, 100
NUM_IMAGES = 2048  # 128 steps: no measurement reaches the end of an epoch, where the peer draws samples


@dataclass
class Times:
    """Times of one launch.

    Args:
        first_step: seconds from the launch to the end of the first optimizer step.
        images_per_second: after the warm-up.
    """

    first_step: float
    images_per_second: float


class Scripts:
    """Both scripts, to launch on the same images. Everything that they write is in `folder`."""

    def __init__(self, diffusers_repo: Path, folder: Path) -> None:
        self.peer = diffusers_repo / PEER
        if not self.peer.is_file():
            raise ValueError(f"diffusers_repo is {str(diffusers_repo)!r}: give a checkout of diffusers, with {PEER}")
        self.folder = folder
        self.images, self.network, self.times = folder / "images", folder / "network", folder / "times.json"
        self.images.mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 4, 4, 3), dtype=np.uint8)
        for i, tile in enumerate(pixels):  # smooth, like real images
            Image.fromarray(tile).resize((32, 32), Image.Resampling.BICUBIC).save(self.images / f"{i:04d}.png")
        make_denoiser("small", height=32, width=32, in_channels=3).save_config(str(self.network))

    def launch_peer(
        self, precision: str, warm_up: int, steps: int, seconds: float, threads: int | None = None
    ) -> Times:
        return self._launch(
            [self.peer, "--use_ema", "--train_data_dir", self.images, "--resolution", 32, "--train_batch_size",
             BATCH_SIZE, "--model_config_name_or_path", self.network, "--mixed_precision", precision, "--cache_dir",
             self.folder / "peer_cache", "--output_dir", self.folder / "peer"],
            warm_up, steps, seconds, threads or torch.get_num_threads(),
        )  # fmt: skip

    def launch_ours(self, warm_up: int, steps: int, seconds: float, accelerate: bool = True) -> Times:
        return self._launch(
            [ROOT / "training" / "train.py", "--train_data_dir", self.images, "--resolution", 32, "--denoiser",
             "small", "--train_batch_size", BATCH_SIZE, "--cache_dir", self.folder / "our_cache", "--output_dir",
             self.folder / "ours", "--cpu_threads", torch.get_num_threads()],
            warm_up, steps, seconds, torch.get_num_threads(), accelerate,
        )  # fmt: skip

    def _launch(
        self, script: list[object], warm_up: int, steps: int, seconds: float, threads: int, accelerate: bool = True
    ) -> Times:
        launch = ["accelerate.commands.launch", "--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no",
                  "--dynamo_backend", "no", "--num_cpu_threads_per_process", threads]  # fmt: skip
        timed_script = [HERE / "clock.py", self.times, warm_up, steps, seconds, *script]
        command = [sys.executable, *(["-m", *launch] if accelerate else []), *timed_script]
        environment = dict(os.environ, HF_HOME=str(self.folder / "hub"), HF_HUB_OFFLINE="1")
        if needs_stand_in():
            environment["PYTHONPATH"] = os.pathsep.join([str(HERE / "stand_in"), os.environ.get("PYTHONPATH", "")])
        self.times.unlink(missing_ok=True)
        launched = time.time()
        process = subprocess.run(
            [str(argument) for argument in command], cwd=self.folder, env=environment, capture_output=True, text=True
        )
        if not self.times.exists():
            last_lines = "\n".join((process.stdout + process.stderr).splitlines()[-20:])
            raise RuntimeError(f"{Path(str(script[0])).name} ended before its last step:\n{last_lines}")
        times = json.loads(self.times.read_text(encoding="utf-8"))
        rate = times["steps"] * BATCH_SIZE / (times["end"] - times["begin"]) if steps else 0.0
        return Times(times["first"] - launched, rate)


def needs_stand_in() -> bool:
    return importlib.util.find_spec("torchvision") is None


def training(scripts: Scripts, *, seconds: float, rounds: int, rounds_bf16: int) -> list[Comparison]:
    """Images per second after the warm-up.

    On a CPU `accelerate launch` gives a process one thread by default. The peer uses one, ours uses all cores. So the
    peer runs with its defaults, and also with as many threads as ours.
    """
    default, equal_threads, bf16, ours = [], [], [], []
    one_on_cpu = None if torch.cuda.is_available() else 1
    for i in range(rounds):
        default.append(scripts.launch_peer("no", WARM_UP, STEPS, seconds, threads=one_on_cpu).images_per_second)
        equal_threads.append(scripts.launch_peer("no", WARM_UP, STEPS, seconds).images_per_second)
        ours.append(scripts.launch_ours(WARM_UP, STEPS, seconds).images_per_second)
        if i < rounds_bf16:
            bf16.append(scripts.launch_peer("bf16", WARM_UP, STEPS, seconds).images_per_second)
    return [
        Comparison("training, peer with its defaults (float32)", "images/s", default, ours, 1.7),
        Comparison("training, peer with as many threads (float32)", "images/s", equal_threads, ours),
        Comparison("training, peer with as many threads, bf16", "images/s", bf16, ours[:rounds_bf16], 1.1),
    ]


def launch(scripts: Scripts, *, rounds: int) -> list[Comparison]:
    """Seconds from the launch to the end of the first step, after one launch of each that fills the caches.

    `accelerate launch` imports torch before it starts the script, which imports it again. Ours also runs without it.
    """
    peer, ours, plain = [], [], []
    for _ in range(rounds + 1):
        peer.append(scripts.launch_peer("no", 1, 0, 0).first_step)
        ours.append(scripts.launch_ours(1, 0, 0).first_step)
        plain.append(scripts.launch_ours(1, 0, 0, accelerate=False).first_step)
    return [
        Comparison("launch to the end of the first step", "s", peer[1:], ours[1:], 2.0),
        Comparison("the same, ours as `python training/train.py`", "s", peer[1:], plain[1:]),
    ]
