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
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project, so that `benchmarks` and `training` are found

import numpy as np  # noqa: E402
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
PER_SHARD, NUM_SHARDS, WINDOW = 256, 16, 512  # of `speed`: groups of two shards, so that each round fetches one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("speed", "resume", "million"))
    parser.add_argument("data", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--work", type=Path, default=Path("runs/streaming"), help="folder for what is made")
    parser.add_argument("--rounds", type=int, default=6, help="of speed; default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="processes that pack; default: %(default)s")
    parser.add_argument("--copies", type=int, default=20, help="of 50,000 images to pack; default: %(default)s")
    parser.add_argument("--steps", type=int, default=100, help="of training on a million; default: %(default)s")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    result = {"speed": speed, "resume": resume, "million": million}[args.part](args)
    write_json(RESULTS / f"streaming-{args.part}.json", result | {"machine": machine()})
    print(result)


# ---- Speed -----------------------------------------------------------------------------------------------------------


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of one group each, which fetch the next one meanwhile; neither kind is always the first.

    The cache holds two groups, so that each shard is fetched anew in every epoch.
    """
    tables, packed, cache_dir = args.work / "tables", args.work / "packed", args.work / "cache"
    if not tables.is_dir():
        split_table(args.data, tables)
    if not (packed / "manifest.json").exists():
        shutil.rmtree(packed, ignore_errors=True)
        run_script("-m", "training.data.pack", tables, packed, f"--images_per_shard={PER_SHARD}")
    mapped = load_data_split("none", dataset_name=str(tables), cache_dir=cache_dir)
    step = make_step(Batches(mapped.data.images, batch_size=BATCH, seed=0, device=torch.device("cpu")))
    results = []
    with serving(tables) as url:
        pattern = f"{url}/{{000..{NUM_SHARDS - 1:03}}}.parquet"
        for name, place in (("packed shards on disk", str(packed)), ("parquet over HTTP", pattern)):
            shutil.rmtree(args.work / "streamed", ignore_errors=True)
            streamed = load_streamed_split("none", dataset_name=place, cache_dir=args.work / "streamed")
            images: Any = streamed.data.images
            images.cache = replace(images.cache, limit=2 * WINDOW * (3 * 32 * 32 + 1))
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
    cpu_seconds: dict[str, list[float]] = {"peer": [], "ours": []}  # of all threads: the same on a busy machine
    waited = stream.seconds_waited  # for the first group, at the start of a run
    for i in range(rounds):
        for which in ("peer", "ours") if i % 2 else ("ours", "peer"):
            call = peer if which == "peer" else ours
            started, cpu_started = time.perf_counter(), time.process_time()
            for number in range(steps * i + 1, steps * (i + 1) + 1):
                call(number)
            rates[which].append(steps * BATCH / (time.perf_counter() - started))
            cpu_seconds[which].append(time.process_time() - cpu_started)
    comparison = Comparison(name, "images/s", rates["peer"], rates["ours"], target=0.95, peer_is="memory-mapped")
    seconds = sum(steps * BATCH / rate for rate in rates["ours"])
    stalls = stream.seconds_waited - waited
    return comparison.as_dict() | {
        "ratio_of_processor_time": round(median(cpu_seconds["peer"]) / median(cpu_seconds["ours"]), 3),
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


def split_table(data: Path, folder: Path) -> None:
    """The first training images in small parquet files: 000.parquet, 001.parquet, ..."""
    from pyarrow import parquet

    folder.mkdir()
    table = parquet.read_table(next(data.rglob("train-*.parquet")))
    for i in range(NUM_SHARDS):
        parquet.write_table(table.slice(i * PER_SHARD, PER_SHARD), folder / f"{i:03}.parquet")


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
    """CIFAR-10's training images, `copies` times, packed; then a million packed images trained on.

    With fewer than 20 copies the packed shards are repeated up to a million images: what training takes is the same.
    """
    source, packed, cache_dir = args.work / "million", args.work / "million-packed", args.work / "million-cache"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    for i in range(args.copies):
        shutil.copy(next(args.data.rglob("train-*.parquet")), source / f"train-{i:05}-of-{args.copies:05}.parquet")
    result: dict[str, Any] = {"packed_images": 50_000 * args.copies, "workers": args.workers}
    result["source_gb"] = gigabytes(source)
    shutil.rmtree(packed, ignore_errors=True)
    result["packing"] = measured(
        "-m", "training.data.pack", source, packed, f"--num_workers={args.workers}", f"--cache_dir={cache_dir}",
        folder=packed,
    )  # fmt: skip
    result["packed_gb"] = gigabytes(packed)
    images = repeat_shards(packed, 1_000_000)
    shutil.rmtree(args.work / "million-run", ignore_errors=True)
    result["training"] = {"images": images, "steps": args.steps, "batch": BATCH, "packed_gb": gigabytes(packed)}
    result["training"] |= measured(
        "training/train.py", f"--dataset_name={packed}", "--streaming", "--denoiser=tiny",
        f"--max_train_steps={args.steps}", "--validation_steps=0", "--save_images_steps=0", "--num_sample_images=1",
        "--ddpm_num_inference_steps=1", "--tune=off", "--report_to=none", f"--cache_dir={cache_dir}",
        f"--output_dir={args.work / 'million-run'}", folder=cache_dir,
    )  # fmt: skip
    return result


def repeat_shards(packed: Path, least: int) -> int:
    """Copy the training shards of a packed data set until there are at least so many images; returns their number."""
    file = packed / "manifest.json"
    manifest = json.loads(file.read_text())
    train = manifest["splits"]["train"]
    own, number = list(train["shards"]), train["images"]
    times = -(-least // number)
    for copy in range(1, times):
        for shard in own:
            name = f"copy-{copy:02}-{shard['name']}"
            shutil.copy(packed / shard["name"], packed / name)
            train["shards"].append(shard | {"name": name})
    if times > 1:
        np.save(packed / train["labels"], np.tile(np.load(packed / train["labels"]), times))
        train["images"] = times * number
        file.write_text(json.dumps(manifest))
    return int(train["images"])


def measured(*command: Any, folder: Path) -> dict[str, float]:
    """Seconds, the largest memory of all its processes together, and the largest size of a folder while it ran.

    Memory is private memory and a share of what is shared: what the processes map from files counts if it is in memory.
    """
    import psutil

    started = time.monotonic()
    most_memory = most_private = most_disk = 0.0
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    processor_before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
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
        "processor_seconds": round(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - processor_before),
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
