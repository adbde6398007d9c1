"""Training and launching: `training/train.py` against diffusers' `train_unconditional.py`, same network and data."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.clock import Timing
from benchmarks.common import ROOT
from benchmarks.compare import Comparison, Measurement
from benchmarks.networks import HEADS_OF_8, NETWORKS, SIDE, Network, count_flop, make_network

HERE = ROOT / "benchmarks"
PEER = Path("examples", "unconditional_image_generation", "train_unconditional.py")
OURS = ROOT / "training" / "train.py"
NUM_FILES = 2048
NUM_ROWS = 16384  # no measurement reaches the end of an epoch, where the peer draws samples
LIMIT = 600  # seconds that a launch may take
FIRST_STEP = Timing(warm_up=1, steps=0, seconds=0)


@dataclass(frozen=True)
class Times:
    """Times of one launch.

    Args:
        first_step: seconds from the launch to the end of the first optimizer step.
        images_per_second: after the warm-up.
    """

    first_step: float
    images_per_second: float


def smooth_images(number: int) -> list[Image.Image]:
    """Random images that are smooth, like real ones."""
    pixels = np.random.default_rng(0).integers(0, 256, (number, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(tile).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for tile in pixels]


def write_files(folder: Path) -> Path:
    """A folder of image files."""
    folder.mkdir(parents=True)
    for i, image in enumerate(smooth_images(NUM_FILES)):
        image.save(folder / f"{i:04d}.png")
    return folder


def write_table(folder: Path, num_rows: int = NUM_ROWS) -> Path:
    """A data set in one parquet file, laid out as on the Hub; its images repeat."""
    import datasets

    datasets.disable_progress_bars()
    rows = []
    for image in smooth_images(min(num_rows, NUM_FILES)):
        file = io.BytesIO()
        image.save(file, format="png")
        rows.append({"bytes": file.getvalue(), "path": None})
    rows = (rows * (num_rows // len(rows) + 1))[:num_rows]
    features = datasets.Features({"image": datasets.Image()})
    (folder / "data").mkdir(parents=True)
    table = datasets.Dataset.from_dict({"image": rows}, features=features)
    table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


def peer_arguments(data: list[object], network: Path, batch_size: int, precision: str, folder: Path) -> list[object]:
    """The command line of the peer, with the optimizer and the EMA of ours, and without checkpoints as ours."""
    return [
        "--use_ema", *data, "--resolution", SIDE, "--train_batch_size", batch_size, "--model_config_name_or_path",
        network, "--mixed_precision", precision, "--cache_dir", folder / "peer_cache", "--output_dir", folder / "peer",
        "--adam_beta1", 0.9, "--adam_beta2", 0.999, "--adam_weight_decay", 0.0,
        "--checkpointing_steps", 1_000_000,
    ]  # fmt: skip


def our_arguments(data: list[object], network: Path, batch_size: int, precision: str, folder: Path) -> list[object]:
    return [
        *data, "--resolution", SIDE, "--denoiser", network, "--train_batch_size", batch_size, "--mixed_precision",
        precision, "--cache_dir", folder / "our_cache", "--output_dir", folder / "ours", "--max_train_steps", 1_000_000,
        "--validation_steps", 0, "--save_images_steps", 0, "--checkpointing_steps", 1_000_000,
    ]  # fmt: skip


class Scripts:
    """Both scripts, to launch on the same images. Everything that they write is in `folder`."""

    def __init__(self, diffusers_repo: Path | None, folder: Path) -> None:
        self.folder, self.times = folder, folder / "times.json"
        self.peer = None if diffusers_repo is None else peer_script(diffusers_repo)
        self.files: list[object] = ["--train_data_dir", write_files(folder / "files")]
        self.table: list[object] = ["--dataset_name", write_table(folder / "table")]
        for network in NETWORKS:
            make_network(network.name).save_config(str(folder / network.name))

    def launch_peer(
        self, network: Network, precision: str, timing: Timing, *, threads: int | None = None, files: bool = False
    ) -> Times:
        """A launch of the peer, with as many threads as ours or with `threads`."""
        assert self.peer is not None
        data = self.files if files else self.table
        arguments = peer_arguments(data, self.folder / network.name, network.batch_size, precision, self.folder)
        return self._launch([self.peer, *arguments], network.batch_size, timing, threads or torch.get_num_threads())

    def launch_ours(
        self,
        network: Network,
        precision: str,
        timing: Timing,
        *,
        adapt: bool = False,
        files: bool = False,
        accelerate: bool = True,
    ) -> Times:
        """A launch of ours, with as many threads as torch uses here, or as many as it thinks best (`adapt`)."""
        data = self.files if files else self.table
        arguments = our_arguments(data, self.folder / network.name, network.batch_size, precision, self.folder)
        if not adapt:
            arguments += ["--cpu_threads", torch.get_num_threads()]
        return self._launch([OURS, *arguments], network.batch_size, timing, torch.get_num_threads(), accelerate)

    def _launch(
        self, script: list[object], batch_size: int, timing: Timing, threads: int, accelerate: bool = True
    ) -> Times:
        launch = ["accelerate.commands.launch", "--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no",
                  "--dynamo_backend", "no", "--num_cpu_threads_per_process", threads]  # fmt: skip
        timed_script = [HERE / "clock.py", self.times, json.dumps(asdict(timing)), *script]
        command = [sys.executable, *(["-m", *launch] if accelerate else []), *timed_script]
        environment = dict(os.environ, HF_HOME=str(self.folder / "hub"), HF_HUB_OFFLINE="1")
        if needs_stand_in():
            environment["PYTHONPATH"] = os.pathsep.join([str(HERE / "stand_in"), os.environ.get("PYTHONPATH", "")])
        self.times.unlink(missing_ok=True)
        launched = time.time()
        process = subprocess.run(
            [str(argument) for argument in command],
            cwd=self.folder, env=environment, capture_output=True, text=True, timeout=LIMIT,
        )  # fmt: skip
        if not self.times.exists():
            last_lines = "\n".join((process.stdout + process.stderr).splitlines()[-20:])
            raise RuntimeError(f"{Path(str(script[0])).name} ended before its last step:\n{last_lines}")
        times = json.loads(self.times.read_text(encoding="utf-8"))
        rate = times["steps"] * batch_size / (times["end"] - times["begin"]) if times["steps"] else 0.0
        return Times(times["first"] - launched, rate)


def peer_script(diffusers_repo: Path) -> Path:
    """The peer in a checkout. Raises ValueError if it is not there."""
    path = diffusers_repo / PEER
    if not path.is_file():
        raise ValueError(f"diffusers_repo is {str(diffusers_repo)!r}: give a checkout of diffusers, with {PEER}")
    return path


def needs_stand_in() -> bool:
    return importlib.util.find_spec("torchvision") is None


def training(scripts: Scripts, *, precision: str, rounds: int, quick: bool = False) -> list[Comparison | Measurement]:
    """Images per second after the warm-up, at equal network, batch, threads and precision.

    For `heads-of-8` also against the peer as it comes: float32, and on a CPU the one thread that `accelerate launch`
    gives a process by default. And that network at batch 64, ours alone, for its share of what the machine can do.
    """
    results: list[Comparison | Measurement] = []
    threads = torch.get_num_threads()
    settings = f"{'bf16' if precision == 'bf16' else 'float32'}, {threads} threads"
    for network in NETWORKS[:2] if quick else NETWORKS:
        timing = Timing(warm_up=3, steps=400, seconds=2 if quick else network.seconds)
        flop = count_flop(network.name, backward=True)
        peer, ours, as_it_comes = [], [], []
        for i in range(rounds):
            for who in ("peer", "ours") if i % 2 else ("ours", "peer"):  # neither is always the first
                if who == "peer":
                    peer.append(scripts.launch_peer(network, precision, timing).images_per_second)
                else:
                    ours.append(scripts.launch_ours(network, precision, timing).images_per_second)
            if network.name == HEADS_OF_8 and i < 3:
                one_on_cpu = None if torch.cuda.is_available() else 1
                launched = scripts.launch_peer(network, "no", timing, threads=one_on_cpu)
                as_it_comes.append(launched.images_per_second)
        name = f"training {network.name}, batch {network.batch_size}"
        results.append(Comparison(f"{name}, {settings}", "images/s", peer, ours, network.target, flop))
        if as_it_comes:
            results.append(Comparison(f"{name}, peer as it comes", "images/s", as_it_comes, ours[:3], None, flop))
            large = Network(HEADS_OF_8, 64, 0.0, 0.0, (), 0)
            timing = Timing(warm_up=2, steps=400, seconds=2 if quick else 15)
            rates = [scripts.launch_ours(large, precision, timing).images_per_second for _ in range(1 if quick else 3)]
            results.append(Measurement(f"training {HEADS_OF_8}, batch 64, {settings}", "images/s", rates, flop, 0.35))
    return results


def launch(scripts: Scripts, *, precision: str, rounds: int) -> list[Comparison]:
    """Seconds from the launch to the end of the first step, after one launch of each that fills the caches.

    `accelerate launch` imports torch before it starts the script, which imports it again. Ours also runs without it.
    """
    peer, ours, plain = [], [], []
    network = NETWORKS[1]
    for _ in range(rounds + 1):
        peer.append(scripts.launch_peer(network, precision, FIRST_STEP, files=True).first_step)
        ours.append(scripts.launch_ours(network, precision, FIRST_STEP, files=True).first_step)
        plain.append(scripts.launch_ours(network, precision, FIRST_STEP, files=True, accelerate=False).first_step)
    return [
        Comparison("launch to the end of the first step", "s", peer[1:], ours[1:], 1.5),
        Comparison("the same, ours as `python training/train.py`", "s", peer[1:], plain[1:]),
    ]


def neighbour(scripts: Scripts, *, precision: str, rounds: int, quick: bool = False) -> list[Comparison]:
    """Ours beside a process that keeps one core busy, and alone, with the number of threads that it chooses itself.

    Alone `tiny` also has a fixed number of threads: adapting must cost next to nothing where nobody else is.
    """
    timing = Timing(warm_up=3, steps=10**6, seconds=2 if quick else 15, warm_up_seconds=0 if quick else 6)
    results = []
    for network in NETWORKS[:2]:
        alone, fixed, busy = [], [], []
        for _ in range(rounds):
            alone.append(scripts.launch_ours(network, precision, timing, adapt=True, accelerate=False))
            if network.name == "tiny":
                fixed.append(scripts.launch_ours(network, precision, timing, accelerate=False))
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            try:
                busy.append(scripts.launch_ours(network, precision, timing, adapt=True, accelerate=False))
            finally:
                other.kill()
                other.wait()
        rates = [[times.images_per_second for times in column] for column in (alone, fixed, busy)]
        flop = count_flop(network.name, backward=True)
        name = f"ours, {network.name}, batch {network.batch_size}"
        results.append(Comparison(f"{name}, one core busy", "images/s", rates[0], rates[2], 0.6, flop, "alone"))
        if fixed:
            results.append(Comparison(f"{name}, alone", "images/s", rates[1], rates[0], 0.97, flop, "fixed threads"))
    return results
