"""Training and its launch: `training/train.py` beside diffusers' `train_unconditional.py`, same network and data."""

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

from benchmarks.compare import Comparison
from training.denoiser import make_denoiser

HERE = Path(__file__).resolve().parent
EXAMPLE = Path("examples", "unconditional_image_generation", "train_unconditional.py")
BATCH = 16  # the default of the peer
WARM_UP, STEPS = 2, 100
IMAGES = 2048  # 128 steps: no measurement reaches the end of an epoch, where the peer draws samples


@dataclass
class Times:
    """Of one launch: seconds to the end of the first step, and images per second after the warm-up."""

    first: float
    rate: float


class Scripts:
    """Both scripts, ready to be launched on the same pictures, with all that they write under `folder`."""

    def __init__(self, diffusers_repo: Path, folder: Path) -> None:
        self.peer = diffusers_repo / EXAMPLE
        if not self.peer.is_file():
            raise ValueError(f"diffusers_repo is {diffusers_repo}, without {EXAMPLE}: give a checkout of diffusers")
        self.folder = folder
        self.images, self.network, self.times = folder / "images", folder / "network", folder / "times.json"
        self.images.mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 4, 4, 3), dtype=np.uint8)
        for i, tile in enumerate(pixels):  # smooth pictures, as real ones are
            Image.fromarray(tile).resize((32, 32), Image.Resampling.BICUBIC).save(self.images / f"{i:04d}.png")
        make_denoiser("small", height=32, width=32, in_channels=3).save_config(str(self.network))

    def launch_peer(
        self, precision: str, warm_up: int, steps: int, seconds: float, threads: int | None = None
    ) -> Times:
        return self._launch(
            [self.peer, "--use_ema", "--train_data_dir", self.images, "--resolution", 32, "--train_batch_size", BATCH,
             "--model_config_name_or_path", self.network, "--mixed_precision", precision, "--cache_dir",
             self.folder / "peer_cache", "--output_dir", self.folder / "peer"],
            warm_up, steps, seconds, threads or torch.get_num_threads(),
        )  # fmt: skip

    def launch_ours(self, warm_up: int, steps: int, seconds: float, launcher: bool = True) -> Times:
        return self._launch(
            [HERE.parent / "training" / "train.py", "--train_data_dir", self.images, "--resolution", 32, "--denoiser",
             "small", "--train_batch_size", BATCH, "--cache_dir", self.folder / "our_cache", "--output_dir",
             self.folder / "ours", "--cpu_threads", torch.get_num_threads()],
            warm_up, steps, seconds, torch.get_num_threads(), launcher,
        )  # fmt: skip

    def _launch(
        self, script: list[object], warm_up: int, steps: int, seconds: float, threads: int, launcher: bool = True
    ) -> Times:
        launch = ["accelerate.commands.launch", "--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no",
                  "--dynamo_backend", "no", "--num_cpu_threads_per_process", threads]  # fmt: skip
        timed = [HERE / "clock.py", self.times, warm_up, steps, seconds, *script]
        command = [sys.executable, *(["-m", *launch] if launcher else []), *timed]
        environment = dict(os.environ, HF_HOME=str(self.folder / "hub"), HF_HUB_OFFLINE="1")
        if needs_stand_in():
            environment["PYTHONPATH"] = os.pathsep.join([str(HERE / "stand_in"), os.environ.get("PYTHONPATH", "")])
        self.times.unlink(missing_ok=True)
        began = time.time()
        done = subprocess.run(
            [str(part) for part in command], cwd=self.folder, env=environment, capture_output=True, text=True
        )
        if not self.times.exists():
            last = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
            raise RuntimeError(f"{Path(str(script[0])).name} ended before its last step, with this:\n{last}")
        seen = json.loads(self.times.read_text(encoding="utf-8"))
        return Times(seen["first"] - began, seen["steps"] * BATCH / (seen["end"] - seen["begin"]) if steps else 0.0)


def needs_stand_in() -> bool:
    return importlib.util.find_spec("torchvision") is None


def training(scripts: Scripts, *, seconds: float, rounds: int, rounds_bf16: int) -> list[Comparison]:
    """Images per second after the warm-up.

    On a CPU `accelerate launch` gives a process one thread unless told otherwise, and the peer computes with it; ours
    takes all cores. So the peer runs as it comes, and also with as many threads as ours.
    """
    as_it_comes, as_many, bf16, ours = [], [], [], []
    one = None if torch.cuda.is_available() else 1
    for i in range(rounds):
        as_it_comes.append(scripts.launch_peer("no", WARM_UP, STEPS, seconds, threads=one).rate)
        as_many.append(scripts.launch_peer("no", WARM_UP, STEPS, seconds).rate)
        ours.append(scripts.launch_ours(WARM_UP, STEPS, seconds).rate)
        if i < rounds_bf16:
            bf16.append(scripts.launch_peer("bf16", WARM_UP, STEPS, seconds).rate)
    return [
        Comparison("training, peer as it comes (float32)", "images/s", as_it_comes, ours, 1.7),
        Comparison("training, peer with as many threads (float32)", "images/s", as_many, ours),
        Comparison("training, peer with as many threads, bf16", "images/s", bf16, ours[:rounds_bf16], 1.1),
    ]


def launch(scripts: Scripts, *, rounds: int) -> list[Comparison]:
    """Seconds from the launch to the end of the first step, after one launch of each that fills the caches.

    The launcher alone imports torch before the script does; one process of ours needs no launcher.
    """
    peer, ours, alone = [], [], []
    for _ in range(rounds + 1):
        peer.append(scripts.launch_peer("no", 1, 0, 0).first)
        ours.append(scripts.launch_ours(1, 0, 0).first)
        alone.append(scripts.launch_ours(1, 0, 0, launcher=False).first)
    return [
        Comparison("launch to the end of the first step", "s", peer[1:], ours[1:], 2.0),
        Comparison("the same, ours as `python training/train.py`", "s", peer[1:], alone[1:]),
    ]
