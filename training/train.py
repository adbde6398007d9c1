"""Train a DDPM: `accelerate launch training/train.py [--config FILE] [--name value ...]`. No arguments: the moons.

Order: settings, accelerator, data, network, average, optimizer, resume, loop, save. Steps are optimizer steps. The
walk, its noise, the loss and the average are float32; autocast is around the network alone. Every random number is a
function of (seed, step, place in the global batch), dropout's of the process too, so a run that was interrupted goes on
bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project, so that `training` is found

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from training.config import Config, parse  # noqa: E402

DROPOUT, NEW_WEIGHTS = 5, 6  # purposes of random numbers, besides those of objective.py and batches.py
SAMPLE_SEED = 1_000_000  # sample picture i is drawn from seed SAMPLE_SEED + i, so one sees the same pictures get better


def main(config: Config) -> None:
    # ---- Accelerator: processes, device, precision -------------------------------------------------------------------
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=precision(config))
    device, main_process = accelerator.device, accelerator.is_main_process
    if device.type == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(config.cpu_threads or max(1, cpu_cores() // here))
    per_process, accumulation = config.train_batch_size, config.gradient_accumulation_steps
    global_batch = per_process * accelerator.num_processes * accumulation
    output_dir = Path(config.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir is {config.output_dir!r}: {error.strerror}; give a folder") from None
    say = accelerator.print

    # ---- Data: files to a memory-mapped array, decoded once ----------------------------------------------------------
    from training.batches import Batches
    from training.data import load_images

    with accelerator.main_process_first():
        data = load_images(
            dataset_name=config.dataset_name,
            dataset_config_name=config.dataset_config_name,
            train_data_dir=config.train_data_dir,
            resolution=config.height_width,
            center_crop=config.center_crop,
            background=config.background,
            on_bad_image=config.on_bad_image,
            cache_dir=Path(config.cache_dir).expanduser(),
            num_workers=config.dataloader_num_workers,
        )
    batches = Batches(
        data.images, batch_size=global_batch, seed=config.seed, random_flip=config.random_flip, device=device
    )
    say(
        f"{len(data)} images, {data.channels} x {data.height} x {data.width}, {data.images.dtype}, from {data.source}"
        + (f", {len(data.skipped)} skipped" if data.skipped else "")
    )

    # ---- Walk, network, average, optimizer ---------------------------------------------------------------------------
    from ddpm_pipeline import chance, objective
    from ddpm_pipeline.scheduling_ddpm import DDPMScheduler
    from training import checkpoint
    from training.denoiser import choose_attention, make_denoiser
    from training.ema import FlatEMA

    scheduler = DDPMScheduler(
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
        timestep_spacing="trailing",
    )
    torch.manual_seed(chance.key(config.seed, NEW_WEIGHTS))
    unet = make_denoiser(config.denoiser, height=data.height, width=data.width, in_channels=data.channels).to(device)
    computes_in = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    choose_attention(unet, device.type, computes_in)
    ema = FlatEMA(unet, config.ema_max_decay, config.ema_inv_gamma, config.ema_power)
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=device.type in ("cpu", "cuda"),
    )
    # All is in its place; moving it to "cpu:0", the device of several CPU processes, would copy it off the average.
    model, optimizer = accelerator.prepare(unet, optimizer, device_placement=[False, False])
    if config.compile:
        model = torch.compile(model)

    # ---- Resume ------------------------------------------------------------------------------------------------------
    done = 0
    if config.resume_from_checkpoint:
        path, manifest = checkpoint.find(output_dir, config.resume_from_checkpoint)
        if manifest["global_batch"] != global_batch:
            raise checkpoint.CheckpointError(
                f"{path} was trained with a global batch of {manifest['global_batch']}, now it is {global_batch}: "
                "change train_batch_size or gradient_accumulation_steps"
            )
        weights, average, optimizer_state = checkpoint.load(path)
        ema.load_state_dict(average)  # first, since it names what is of another network
        unet.load_state_dict(weights)
        optimizer.load_state_dict(optimizer_state)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(manifest["scaler"])
        done = manifest["step"]
        say(f"resumed from {path}, after step {done}")
    elif main_process and any(output_dir.glob("checkpoint-*")):
        say(f"{output_dir} has checkpoints of an earlier run, which this run begins to replace; "
            "to go on with it, --resume_from_checkpoint latest")  # fmt: skip

    # ---- The run's folder --------------------------------------------------------------------------------------------
    log = Log(output_dir, config, after_step=done) if main_process else None
    facts = {
        "global_batch": global_batch,
        "num_processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type,
        "mixed_precision": accelerator.mixed_precision,
        "num_images": len(data),
        "source": data.source,
        "versions": versions(),
        "commit": checkpoint.commit(),
        "config": config.as_dict(),
    }
    millions = sum(parameter.numel() for parameter in parameters) / 1e6
    say(
        f"{config.denoiser}, {millions:.1f} million parameters, {str(computes_in).removeprefix('torch.')}, on "
        f"{accelerator.num_processes} x {device.type}; global batch {global_batch}, {config.max_train_steps} steps"
        + (f" or {config.max_train_minutes:g} minutes" if config.max_train_minutes else "")
    )

    def save_checkpoint(step: int) -> None:
        if main_process:
            checkpoint.save(
                output_dir,
                step,
                model=unet.state_dict(),
                ema=ema.state_dict(),
                optimizer=optimizer.state_dict(),
                facts=facts | {"scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None},
                total_limit=config.checkpoints_total_limit,
            )
        accelerator.wait_for_everyone()

    def draw_samples(step: int) -> Tensor:
        """Sample pictures by all processes, image i from a seed of its own, with the averaged weights."""
        from ddpm_pipeline import DDPMPipeline

        number = config.num_sample_images
        mine = list(range(accelerator.process_index, number, accelerator.num_processes))
        share = -(-number // accelerator.num_processes)
        mine += [0] * (share - len(mine))  # all processes draw as many
        unet.eval()
        with ema.applied(), torch.autocast(device.type, computes_in, enabled=computes_in != torch.float32):
            pipe = DDPMPipeline(unet, scheduler)
            pipe.set_progress_bar_config(desc=f"samples of step {step}", leave=False, disable=not main_process)
            images: list[Any] = []
            for start in range(0, share, 64):
                seeds = [SAMPLE_SEED + i for i in mine[start : start + 64]]
                steps = config.ddpm_num_inference_steps
                images += pipe(seeds=seeds, num_inference_steps=steps, output_type="latent", return_dict=False)
        unet.train()
        gathered = accelerator.gather(torch.cat(images))
        # Process p drew images p, p + P, p + 2 P, ...: put them back in order.
        return gathered.unflatten(0, (-1, share)).transpose(0, 1).flatten(0, 1)[:number]

    def save_samples(step: int) -> Tensor:
        from training import pictures

        samples = draw_samples(step)
        if log is not None:
            log.picture(step, pictures.grid(samples))
        return samples

    # ---- Loop --------------------------------------------------------------------------------------------------------
    from tqdm import tqdm

    unet.train()
    progress = tqdm(total=config.max_train_steps, initial=done, desc="training", disable=not main_process)
    losses = torch.zeros((), device=device)
    started = logged_at = time.monotonic()
    logged_step = step = done
    out_of_time = False
    while step < config.max_train_steps and not out_of_time:
        learning_rate = config.learning_rate_at(step + 1)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        torch.manual_seed(chance.key(config.seed, DROPOUT, step, accelerator.process_index))

        for part in range(accumulation):
            first = (part * accelerator.num_processes + accelerator.process_index) * per_process
            place = torch.arange(first, first + per_process)
            x_0 = batches.images(step, place)
            lesson = objective.draw_lesson(scheduler, x_0, seed=config.seed, step=step, index=place)
            last = part == accumulation - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                prediction = model(lesson.x_t, lesson.t, return_dict=False)[0]
                loss = objective.simple_loss(prediction, lesson.target) / accumulation
                accelerator.backward(loss)
            losses += loss.detach()

        norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        # The same on all processes. fp16's scaler has steps with such a norm now and then, and leaves them out itself.
        if accelerator.scaler is None and not norm.isfinite():
            raise FloatingPointError(
                f"the norm of the gradient is {norm.item()} in step {step + 1}, at learning rate {learning_rate:g}, so "
                "the step is not done: lower learning_rate, and go on with --resume_from_checkpoint latest"
            )
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        ema.update(step)
        progress.update()

        if step == 1 or step % config.logging_steps == 0 or step == config.max_train_steps:
            mean_loss = (accelerator.reduce(losses, "mean") / (step - logged_step)).item()
            if mean_loss != mean_loss or mean_loss == float("inf"):
                raise FloatingPointError(
                    f"the loss is {mean_loss} between steps {logged_step + 1} and {step}, at learning rate "
                    f"{learning_rate:g}: lower learning_rate, and go on with --resume_from_checkpoint latest"
                )
            now = time.monotonic()
            per_second = (step - logged_step) * global_batch / (now - logged_at)
            if log is not None:
                log.metrics(step, loss=mean_loss, learning_rate=learning_rate, images=step * global_batch,
                            images_per_second=per_second, ema_decay=ema.decay_at(step))  # fmt: skip
            progress.set_postfix(loss=f"{mean_loss:.4f}", img_s=f"{per_second:.0f}")
            losses.zero_()
            logged_at, logged_step = now, step
        if config.max_train_minutes:
            out_of_time = time.monotonic() - started > 60 * config.max_train_minutes
            if accelerator.num_processes > 1:  # it is late for all when it is for one
                late = torch.tensor(float(out_of_time), device=device)
                out_of_time = accelerator.reduce(late, "sum").item() > 0
        ended = out_of_time or step == config.max_train_steps
        if step % config.checkpointing_steps == 0 or ended:
            save_checkpoint(step)
        if config.save_images_steps and step % config.save_images_steps == 0 and not ended:
            paused = time.monotonic()
            save_samples(step)
            pause = time.monotonic() - paused
            started, logged_at = started + pause, logged_at + pause  # drawing is not training
    progress.close()
    minutes = (time.monotonic() - started) / 60
    say(f"trained {step - done} steps in {minutes:.1f} minutes")

    # ---- Save: the pipeline, its samples, the walk -------------------------------------------------------------------
    samples = save_samples(step)
    if log is not None:
        from ddpm_pipeline import DDPMPipeline
        from training import pictures

        with ema.applied():
            pipe = DDPMPipeline(unet.eval(), scheduler)
            pipe.set_progress_bar_config(disable=True)
            save_pipeline(pipe, output_dir / "pipeline")
            x_0 = batches.images(0, torch.zeros(1, dtype=torch.int64))
            steps = config.ddpm_num_inference_steps
            walk = pictures.walk_picture(pipe, x_0, num_inference_steps=steps, seed=SAMPLE_SEED)
        walk.save(log.folder / "samples" / "walk.png")
        if config.dataset_name == "moons":
            say(measure_moons(log, step, samples))
        log.close()
        say(
            f"\nThe model is in {output_dir / 'pipeline'}, its pictures in {output_dir / 'samples'}. To load it:\n"
            f"    from ddpm_pipeline import DDPMPipeline\n"
            f'    image = DDPMPipeline.from_pretrained("{output_dir / "pipeline"}")(num_inference_steps=50).images[0]'
        )
    accelerator.end_training()


def precision(config: Config) -> str:
    """mixed_precision with "auto" decided: bf16 where the hardware multiplies it, else float32."""
    asked: str = config.mixed_precision
    if asked == "auto":
        launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        on_cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
        if launched_with != "no":
            asked = launched_with
        elif torch.cuda.is_available():
            asked = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
        else:
            asked = "bf16" if on_cpu and torch.cpu._is_avx512_bf16_supported() else "no"
    if asked == "fp16" and not torch.cuda.is_available():
        raise ValueError("mixed_precision is fp16, which is very slow without a GPU: give bf16, or no")
    return asked


def cpu_cores() -> int:
    """Physical cores that this process may use."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS
    return min(allowed, psutil.cpu_count(logical=False) or 1)


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Write the pipeline beside its place and put it there when it is whole."""
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipe.save_pretrained(str(temporary))
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def measure_moons(log: Log, step: int, samples: Tensor) -> str:
    """How near the samples are to true moons, and whether they are of all phases."""
    import math

    from ddpm_pipeline.moons import phase_of

    match = phase_of(samples.float().clamp(-1, 1).cpu())
    distance, eighths = match.distance.mean().item(), len((match.phase / (2 * math.pi) * 8).long().unique())
    log.metrics(step, moon_distance=distance, moon_eighths=eighths)
    return (
        f"{len(samples)} sampled moons: mean squared distance to the nearest true moon {distance:.4f}, "
        f"phases in {eighths} of 8 eighths of the circle"
    )


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "diffusers", "accelerate", "safetensors", "numpy")
    }


class Log:
    """config.yaml, metrics.jsonl, tensorboard/ and samples/ of a run, written by the main process.

    Lines of steps after `after_step`, where the run resumes, are taken out again.
    """

    def __init__(self, folder: Path, config: Config, after_step: int) -> None:
        import yaml

        self.folder = folder
        self._writer: Any = None
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        settings = config.as_dict() | {"resume_from_checkpoint": None}  # so that the file starts a run of its own
        (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        path = folder / "metrics.jsonl"
        kept = path.read_text(encoding="utf-8").splitlines(keepends=True) if after_step and path.exists() else []
        path.write_text("".join(line for line in kept if json.loads(line)["step"] <= after_step), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._purge_step = after_step + 1

    def metrics(self, step: int, **values: float) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if step > 1:  # not before the first step is done: tensorboard takes a second to import
            for name, value in values.items():
                self._tensorboard().add_scalar(name, value, step)

    def picture(self, step: int, image: Any) -> None:
        import numpy as np

        image.save(self.folder / "samples" / f"step-{step:06d}.png")
        array = np.asarray(image)
        self._tensorboard().add_image("samples", array, step, dataformats="HW" if array.ndim == 2 else "HWC")

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _tensorboard(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._purge_step)
        return self._writer


if __name__ == "__main__":
    settings = parse()
    try:
        main(settings)
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
