"""Streaming beside the memory-mapped array, and a million images. `python benchmarks/streaming.py PART DATA`

    speed     images/s of `tiny` at 32 px from shards and from the memory-mapped array, and the time waited
    resume    whether runs on 1, 2 and 4 processes that are killed in an epoch end with the same weights
    million   1,000,000 images packed and trained on for some steps: time, memory, disk

DATA is CIFAR-10 as the Hub lays it out. The results go to benchmarks/results/streaming-PART.json.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project, so that `benchmarks` and `training` are found

import torch  # noqa: E402

from benchmarks.common import RESULTS, ROOT, machine, write_json  # noqa: E402
from benchmarks.compare import Comparison  # noqa: E402
from ddpm_pipeline import DDPMScheduler, objective  # noqa: E402
from training.data.batches import Batches  # noqa: E402
from training.data.shard_order import ShardOrder  # noqa: E402
from training.data.shard_stream import ShardStream  # noqa: E402
from training.data.split import load_data_split  # noqa: E402
from training.data.streaming import load_streamed_split  # noqa: E402
from training.denoiser import find_network, make_denoiser  # noqa: E402

BATCH = 64
WINDOW = 2048  # images of a group in `speed`: so small that each round fetches one
COPIES = 20  # of the 50,000 images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("speed", "resume", "million"))
    parser.add_argument("data", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--work", type=Path, default=Path("runs/streaming"), help="folder for what is made")
    parser.add_argument("--rounds", type=int, default=6, help="of speed; default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="processes that pack; default: %(default)s")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    result = {"speed": speed, "resume": resume, "million": million}[args.part](args)
    write_json(RESULTS / f"streaming-{args.part}.json", result | {"machine": machine()})
    print(result)


# ---- Speed -----------------------------------------------------------------------------------------------------------


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of one group each, which fetch the next one meanwhile; neither kind is always the first."""
    packed = args.work / "packed"
    if not (packed / "manifest.json").exists():
        shutil.rmtree(packed, ignore_errors=True)
        run_script("-m", "training.data.pack", args.data, packed, "--images_per_shard=1024")
    tables = args.work / "tables"
    if not tables.is_dir():
        split_table(args.data, tables, rows=1024)
    cache_dir = args.work / "cache"
    mapped = load_data_split("none", dataset_name=str(args.data), cache_dir=cache_dir)
    step = make_step(Batches(mapped.data.images, batch_size=BATCH, seed=0, device=torch.device("cpu")))
    results = []
    with serving(tables) as url:
        for name, place in (
            ("packed shards on disk", str(packed)),
            ("parquet over HTTP", f"{url}/{{000..048}}.parquet"),
        ):
            shutil.rmtree(cache_dir / "streamed", ignore_errors=True)
            streamed = load_streamed_split("none", dataset_name=place, cache_gb=1, cache_dir=cache_dir / "streamed")
            images: Any = streamed.data.images
            stream = ShardStream(images, ShardOrder(images.counts, streamed.train_indices, 0, WINDOW), BATCH)
            batches = Batches(images, batch_size=BATCH, seed=0, stream=stream, device=torch.device("cpu"))
            results.append(compare(name, step, make_step(batches), stream, args.rounds))
            stream.close()
    return {"speed": results, "batch": BATCH, "images_per_round": WINDOW}


def make_step(batches: Batches) -> Callable[[int], None]:
    """A training step of `tiny`: batch, noise, loss, gradients, AdamW."""
    torch.manual_seed(0)
    network = find_network("tiny", None, None, num_steps=1000, log=print)
    assert network is not None
    unet: Any = make_denoiser(network, height=32, width=32, in_channels=3, out_channels=3, num_class_embeds=None)
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    index = torch.arange(BATCH)

    def step(number: int) -> None:
        if batches.stream is not None:
            batches.stream.wait(number)
        x_0, _ = batches.batch(number, index)
        batch = objective.draw_noised_batch(scheduler, x_0, seed=0, step=number, index=index)
        loss = (unet(batch.x_t, batch.t, return_dict=False)[0] - batch.target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(
    name: str, peer: Callable[[int], None], ours: Callable[[int], None], stream: ShardStream, rounds: int
) -> dict[str, Any]:
    steps = WINDOW // BATCH
    for call in (peer, ours):
        call(0)
    rates: dict[str, list[float]] = {"peer": [], "ours": []}
    waited = stream.seconds_waited  # for the first group, at the start of a run
    for i in range(rounds):
        for which in ("peer", "ours") if i % 2 else ("ours", "peer"):
            call = peer if which == "peer" else ours
            started = time.perf_counter()
            for number in range(steps * i + 1, steps * (i + 1) + 1):
                call(number)
            rates[which].append(steps * BATCH / (time.perf_counter() - started))
    comparison = Comparison(name, "images/s", rates["peer"], rates["ours"], target=0.95, peer_is="memory-mapped")
    seconds = sum(steps * BATCH / rate for rate in rates["ours"])
    stalls = stream.seconds_waited - waited
    return comparison.as_dict() | {
        "ratios": [round(ratio, 3) for ratio in comparison.ratios],
        "seconds_waited_at_the_start": round(waited, 2),
        "share_of_time_waited": round(stalls / seconds, 4),
    }


class serving:
    """A folder over HTTP, from a process of its own; yields its address."""

    def __init__(self, folder: Path) -> None:
        self._command = [sys.executable, __file__, "--serve", str(folder)]

    def __enter__(self) -> str:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        return f"http://127.0.0.1:{self._process.stdout.readline().strip()}"

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()


def serve(folder: str) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    print(server.server_port, flush=True)
    server.serve_forever()


def split_table(data: Path, folder: Path, rows: int) -> None:
    """The training split in parquet files of this many images: 000.parquet, 001.parquet, ..."""
    from pyarrow import parquet

    folder.mkdir()
    table = parquet.read_table(next(data.rglob("train-*.parquet")))
    for i in range(-(-len(table) // rows)):
        parquet.write_table(table.slice(i * rows, rows), folder / f"{i:03}.parquet")


# ---- Exact resume ----------------------------------------------------------------------------------------------------


def resume(args: argparse.Namespace) -> dict[str, Any]:
    """Runs on 1, 2 and 4 processes, which end in the middle of an epoch, whole and killed after a checkpoint."""
    packed = args.work / "packed-small"
    if not (packed / "manifest.json").exists():
        shutil.rmtree(packed, ignore_errors=True)
        (args.work / "small").mkdir(exist_ok=True)
        shutil.copy(next(args.data.rglob("test-*.parquet")), args.work / "small" / "train-0.parquet")
        run_script("-m", "training.data.pack", args.work / "small", packed, "--images_per_shard=100")
    equal = {}
    for processes in (1, 2, 4):
        flags = [
            f"--dataset_name={packed}", "--streaming", "--denoiser=tiny", "--max_train_steps=12",
            "--checkpointing_steps=5",
            f"--train_batch_size={8 // processes}", "--validation_steps=0", "--save_images_steps=0", "--tune=off",
            "--num_sample_images=4", "--ddpm_num_inference_steps=2", "--mixed_precision=no", "--cpu_threads=1",
            "--lr_scheduler=constant", "--report_to=none", f"--cache_dir={args.work / 'cache'}",
        ]  # fmt: skip
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=29611"]
        launcher = [] if processes == 1 else launcher
        weights = []
        for name in ("whole", "killed"):
            folder = args.work / f"{name}-{processes}"
            shutil.rmtree(folder, ignore_errors=True)
            command = [*launcher, ROOT / "training" / "train.py", *flags, f"--output_dir={folder}"]
            if name == "killed":
                kill_at_checkpoint(command, folder / "checkpoint-000005" / "manifest.json")
                command += ["--resume_from_checkpoint=latest"]
            run_script(*command)
            files = (folder / "checkpoint-000012").glob("*.safetensors")
            weights.append({file.name: file.read_bytes() for file in files})
        equal[processes] = weights[0] == weights[1]
        print(processes, equal[processes], flush=True)
    return {"images": 1000, "steps": 12, "global_batch": 8, "equal_after_a_kill": equal}


def kill_at_checkpoint(command: list[Any], manifest: Path) -> None:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    run = subprocess.Popen([sys.executable, *map(str, command)], env=environment, start_new_session=True)
    while run.poll() is None and not manifest.exists():
        time.sleep(0.01)
    if run.poll() is not None:
        sys.exit("the run ended before it was killed")
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def run_script(*command: Any) -> None:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT, env=environment)


# ---- A million images ------------------------------------------------------------------------------------------------


def million(args: argparse.Namespace) -> dict[str, Any]:
    """CIFAR-10's training images COPIES times, packed and trained on."""
    source, packed = args.work / "million", args.work / "million-packed"
    source.mkdir(exist_ok=True)
    for i in range(COPIES):
        file = source / f"train-{i:05}-of-{COPIES:05}.parquet"
        if not file.exists():
            shutil.copy(next(args.data.rglob("train-*.parquet")), file)
    cache_dir = args.work / "million-cache"
    result: dict[str, Any] = {"images": 50_000 * COPIES, "workers": args.workers, "source_gb": gigabytes(source)}
    if not (packed / "manifest.json").exists():
        result["packing"] = measured(
            "-m", "training.data.pack", source, packed, f"--num_workers={args.workers}", f"--cache_dir={cache_dir}",
            folder=packed,
        )  # fmt: skip
    result["packed_gb"] = gigabytes(packed)
    shutil.rmtree(args.work / "million-run", ignore_errors=True)
    result["training_100_steps"] = measured(
        "training/train.py", f"--dataset_name={packed}", "--streaming", "--denoiser=tiny", "--max_train_steps=100",
        "--validation_steps=0", "--save_images_steps=0", "--num_sample_images=4", "--ddpm_num_inference_steps=2",
        "--tune=off", "--report_to=none", f"--cache_dir={cache_dir}", f"--output_dir={args.work / 'million-run'}",
        folder=cache_dir,
    )  # fmt: skip
    return result


def measured(*command: Any, folder: Path) -> dict[str, float]:
    """Seconds, the largest memory of all its processes together, and the largest size of a folder while it ran.

    Memory is private memory and a share of what is shared: what the processes map from files counts if it is in memory.
    """
    import psutil

    started = time.monotonic()
    most_memory = most_private = most_disk = 0.0
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    run = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=environment)
    while run.poll() is None:
        memory, private = 0, 0
        with contextlib.suppress(psutil.Error):  # ended meanwhile
            for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
                full = process.memory_full_info()
                memory, private = memory + full.pss, private + full.uss
        most_memory, most_private = max(most_memory, memory), max(most_private, private)
        most_disk = max(most_disk, gigabytes(folder))
        time.sleep(2)
    if run.returncode:
        sys.exit(f"it ended with exit code {run.returncode}")
    return {
        "seconds": round(time.monotonic() - started),
        "peak_memory_gb": round(most_memory / 1e9, 2),
        "peak_private_memory_gb": round(most_private / 1e9, 2),
        "peak_disk_gb": round(most_disk, 2),
    }


def gigabytes(folder: Path) -> float:
    total = 0
    for path in folder.rglob("*") if folder.is_dir() else ():
        with contextlib.suppress(OSError):  # renamed meanwhile
            total += path.stat().st_size
    return round(total / 1e9, 2)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    main()
