"""Distance against minutes: train.py beside other trainers, on the same images. `python benchmarks/peers.py DATA ...`

    python benchmarks/peers.py FOLDER --images 8000,24000,80000 --diffusers CHECKOUT --name cifar10

- train.py with `--denoiser tiny` and its defaults,
- diffusers' train_unconditional.py with that network, and the flags of its README: EMA, warm-up, random flip,
- the Trainer of denoising-diffusion-pytorch, if it is installed, with its defaults and a Unet of as many weights.

Each trains once for each number of images, so that every schedule of the learning rate comes to its end, and a time is
what the whole command took. Then each model draws with the same solver from the same noise, and its samples are
compared with training images. What is measured is kept in benchmarks/results/peers-NAME.json, so the same command
continues where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor

from benchmarks.common import CACHE_DIR, FEATURES_DIR, RESULTS, ROOT, data_option, machine, write_json
from benchmarks.scripts import HERE, needs_stand_in, peer_script
from ddpm_pipeline import DDPMPipeline
from ddpm_pipeline.features import extract_features, make_extractor
from ddpm_pipeline.fidelity import frechet_distance, kernel_distance
from ddpm_pipeline.pixels import to_pixels
from training.data.cache import ImageSet, load_images
from training.data.split import evenly_spaced
from training.denoiser import make_denoiser
from training.evaluation.report import make_figure, save_figure
from training.progress import progress

OURS, DIFFUSERS, LUCIDRAINS = "train.py", "train_unconditional.py", "denoising-diffusion-pytorch"
BATCH_SIZE = 16  # of the others: that of the README of diffusers, and the default of the Trainer
WARM_UP = 500  # steps, of the README of diffusers; in short runs a tenth of them
NEEDS_STAND_IN = needs_stand_in()
CALLS, SEED, NUM_REFERENCE = 25, 2**26, 10_000
LUCIDRAINS_UNET: dict[str, Any] = {"dim": 16, "dim_mults": [1, 2, 4, 8]}  # 2.4 million weights; `tiny` has 2.2 million

Network = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Trained:
    """A trained model, as what a solver needs of it."""

    network: Network
    betas: np.ndarray
    prediction_type: str


class Peers:
    """The trainers, on one set of images in `folder`, where everything is written.

    Args:
        data: its images become RGB files.
        diffusers: a checkout of diffusers.
    """

    def __init__(self, data: ImageSet, folder: Path, diffusers: Path | None, cpu_threads: int) -> None:
        self.data, self.folder, self.cpu_threads = data, folder, cpu_threads
        self.diffusers = None if diffusers is None else peer_script(diffusers)
        self.order = np.random.default_rng(0).permutation(len(data))
        self.unet = make_denoiser("tiny", height=data.height, width=data.width, in_channels=3)

    def files(self, number: int) -> Path:
        """A folder of so many of the images, those of a shorter one among them."""
        folder = self.folder / f"images-{number}"
        if not folder.is_dir():
            temporary = folder.with_suffix(".part")
            temporary.mkdir(parents=True, exist_ok=True)
            for i in self.order[:number].tolist():
                pixels = np.broadcast_to(self.data.images[i], (3, self.data.height, self.data.width))
                Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(temporary / f"{i:06}.png")
            temporary.rename(folder)
        return folder

    def command(self, trainer: str, images: int, output: Path) -> list[object]:
        """Trains on so many images; more than there are: in several passes over all."""
        number, size = min(images, len(self.data)), self.data.height
        passes, files = max(1, round(images / len(self.data))), self.files(number)
        if trainer == OURS:
            return [
                ROOT / "training" / "train.py", "--train_data_dir", files, "--output_dir", output, "--denoiser", "tiny",
                "--resolution", size, "--random_flip", "true", "--max_train_images", images, "--save_images_steps", 0,
                "--validation_steps", 0, "--num_sample_images", 1, "--ddpm_num_inference_steps", 1, "--cpu_threads",
                self.cpu_threads,
            ]  # fmt: skip
        if trainer == DIFFUSERS:
            assert self.diffusers is not None
            steps = passes * math.ceil(number / BATCH_SIZE)
            self.unet.save_config(str(self.folder / "tiny"))
            return [
                self.diffusers, "--train_data_dir", files, "--output_dir", output, "--resolution", size,
                "--center_crop", "--random_flip", "--train_batch_size", BATCH_SIZE, "--num_epochs", passes, "--use_ema",
                "--learning_rate", 1e-4, "--lr_warmup_steps", min(WARM_UP, steps // 10), "--mixed_precision", "no",
                "--model_config_name_or_path", self.folder / "tiny", "--save_images_epochs", 10**6,
                "--eval_batch_size", 1, "--ddpm_num_inference_steps", 1, "--checkpointing_steps", 10**6,
                "--cache_dir", self.folder / "cache",
            ]  # fmt: skip
        return ["-c", LUCIDRAINS_SCRIPT, json.dumps(LUCIDRAINS_UNET), size, files, output, images // BATCH_SIZE]

    def train(self, trainer: str, images: int) -> tuple[Path, float]:
        """The folder of the model, and the minutes that the command took."""
        output = self.folder / f"{trainer}-{images}"
        shutil.rmtree(output, ignore_errors=True)  # of a run that was interrupted
        log = self.folder / f"{output.name}.log"
        command = [sys.executable, *map(str, self.command(trainer, images, output))]
        threads = str(self.cpu_threads)
        environment = dict(os.environ, HF_HOME=str(self.folder / "hub"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS=threads)
        if trainer != OURS and NEEDS_STAND_IN:
            paths = [str(HERE / "stand_in"), os.environ.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(paths)
        started = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            subprocess.run(command, stdout=file, stderr=file, check=True, env=environment)
        return output, (time.monotonic() - started) / 60


# The Trainer has no command line.
LUCIDRAINS_SCRIPT = """
import json, sys
from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet
unet, size, files, output, steps = sys.argv[1:]
diffusion = GaussianDiffusion(Unet(**json.loads(unet)), image_size=int(size))
trainer = Trainer(diffusion, files, train_num_steps=int(steps), save_and_sample_every=10**9, calculate_fid=False,
                  results_folder=output)
trainer.train()
trainer.save("last")
"""


def load(trainer: str, folder: Path, size: int) -> Trained:
    """What a trainer has left, with the averaged weights."""
    if trainer == LUCIDRAINS:
        if NEEDS_STAND_IN:
            sys.path.append(str(HERE / "stand_in"))
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet

        diffusion = GaussianDiffusion(Unet(**LUCIDRAINS_UNET), image_size=size)
        state = torch.load(folder / "model-last.pt", map_location="cpu", weights_only=True)["ema"]
        prefix = "ema_model."
        weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        diffusion.load_state_dict(weights)
        unet = diffusion.model.eval()
        return Trained(lambda x, t: unet(x, torch.full((len(x),), t)), diffusion.betas.numpy(), diffusion.objective[5:])
    pipe = DDPMPipeline.from_pretrained(folder / "pipeline" if trainer == OURS else folder)
    scheduler = pipe.scheduler
    return Trained(
        lambda x, t: pipe.unet(x, t, return_dict=False)[0], scheduler.betas.numpy(), scheduler.config.prediction_type
    )


@torch.no_grad()
def sample(model: Trained, number: int, size: int, batch_size: int = 64) -> Tensor:
    """(N, 3, H, W), with DPM-Solver++ 2M; image i starts from the noise of SEED + i."""
    kinds = {"v": "v_prediction", "noise": "epsilon", "x0": "sample"}
    scheduler: Any = DPMSolverMultistepScheduler(
        trained_betas=model.betas,
        prediction_type=kinds.get(model.prediction_type, model.prediction_type),
        timestep_spacing="trailing",
        use_karras_sigmas=True,
    )
    parts = []
    for start in progress(range(0, number, batch_size), "samples", leave=False):
        seeds = range(SEED + start, SEED + min(start + batch_size, number))
        x = torch.stack([torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        scheduler.set_timesteps(CALLS)
        scheduler.set_begin_index(0)  # it cannot be found by a timestep that rounding made equal to another
        for t in scheduler.timesteps:
            x = scheduler.step(model.network(x, int(t)), t, x).prev_sample
        parts.append(x.clamp(-1, 1))
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="folder of a data set laid out as on the Hub, or of images")
    parser.add_argument("--images", default="8000,24000,80000", help="of the runs; default: %(default)s")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--diffusers", type=Path, help="a checkout of diffusers")
    parser.add_argument("--extractor", default="classifier", help="features, as for evaluate.py")
    parser.add_argument("--num_samples", type=int, default=1024)
    parser.add_argument("--cpu_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "peers")
    parser.add_argument("--name", required=True, help="of the result")
    args = parser.parse_args()
    torch.set_num_threads(args.cpu_threads)
    options: dict[str, Any] = {data_option(args.data): args.data, "resolution": args.resolution, "on_bad_image": "skip"}
    data = load_images(**options, background="black", cache_dir=CACHE_DIR)
    peers = Peers(data, args.output_dir / args.name, args.diffusers, args.cpu_threads)
    trainers = [OURS, *([DIFFUSERS] if args.diffusers else [])]
    trainers += [LUCIDRAINS] if importlib.util.find_spec("denoising_diffusion_pytorch") else []

    images = np.broadcast_to(data.images, (len(data), 3, data.height, data.width))
    extractor = make_extractor(args.extractor, images=images, labels=data.labels(), cache_dir=FEATURES_DIR)
    chosen = evenly_spaced(len(data), NUM_REFERENCE)
    reference = extract_features(extractor, np.ascontiguousarray(images[chosen]), cache_dir=FEATURES_DIR)

    path = RESULTS / f"peers-{args.name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    for number in map(int, args.images.split(",")):
        for trainer in trainers:
            key = {"trainer": trainer, "images": number}
            if any(key.items() <= row.items() for row in rows):
                continue
            folder, minutes = peers.train(trainer, number)
            samples = sample(load(trainer, folder, data.height), args.num_samples, data.height)
            features = extract_features(extractor, to_pixels(samples, data.images.dtype))
            kernel = kernel_distance(features, reference)
            rows.append(
                key | {
                    "minutes": round(minutes, 2),
                    "frechet_distance": frechet_distance(features, reference),
                    "kernel_distance": [kernel.value, kernel.standard_error],
                }
            )  # fmt: skip
            write_json(path, {"machine": machine(), "data": Path(args.data).name, "rows": rows})
            print(json.dumps(rows[-1]), flush=True)
    print(*lines_of(rows), f"result: {path}, and a plot beside it", sep="\n")
    plot(rows, path.with_suffix(".png"))


def lines_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table in Markdown. The last column: how many times as long as ours a trainer took to its distance."""
    lines = ["| trainer | images | minutes | Frechet | kernel | minutes of train.py to this distance | times as long |"]
    lines.append("|---" * 7 + "|")
    ours = [row for row in rows if row["trainer"] == OURS]
    for row in rows:
        kernel = "{:.3g} &plusmn; {:.1g}".format(*row["kernel_distance"])
        cells = [row["trainer"], f"{row['images']:,}", f"{row['minutes']:.1f}", f"{row['frechet_distance']:.3g}"]
        reached = None if row["trainer"] == OURS else minutes_to(row["frechet_distance"], ours)
        cells += [kernel, *(["", ""] if reached is None else [f"{reached:.1f}", f"{row['minutes'] / reached:.1f}"])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def minutes_to(distance: float, rows: Sequence[dict[str, Any]]) -> float | None:
    """When these runs come to a distance, between two of them on straight lines in a plot with logarithmic axes.

    None if they do not come so far; if already the shortest is nearer, its time, which is too long.
    """
    points = sorted((row["minutes"], row["frechet_distance"]) for row in rows)
    if not points or min(d for _, d in points) > distance:
        return None
    if points[0][1] <= distance:
        return float(points[0][0])
    for (m_0, d_0), (m_1, d_1) in zip(points, points[1:]):
        if d_1 <= distance < d_0:
            share = math.log(d_0 / distance) / math.log(d_0 / d_1)
            return float(m_0 * (m_1 / m_0) ** share)
    return None


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    figure, axes = make_figure()
    for trainer in dict.fromkeys(row["trainer"] for row in rows):
        points = sorted((row["minutes"], row["frechet_distance"]) for row in rows if row["trainer"] == trainer)
        axes.plot(*zip(*points), marker="o", label=trainer)
    axes.set(xscale="log", yscale="log", xlabel="minutes", ylabel="Frechet distance")
    save_figure(figure, [axes], path)


if __name__ == "__main__":
    main()
