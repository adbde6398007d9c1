"""Train a DDPM: `accelerate launch training/train.py [--config FILE] [--name value ...]`. No arguments: the moons.

Order: settings, accelerator, data, network, average, optimizer, resume, loop, save. Steps are optimizer steps. The
walk, its noise, the loss and the average are float32; autocast is around the network alone. Every random number is a
function of (seed, step, place in the global batch), dropout's of the process too, so a run that was interrupted goes on
bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project, so that `training` is found

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from training.config import Config, parse  # noqa: E402
from training.hub import during_training  # noqa: E402
from training.run import checkpoint, failures, runtime  # noqa: E402
from training.run.log import Log  # noqa: E402
from training.run.signals import EXIT_CODE, Stop  # noqa: E402

SAMPLE_SEED = 1_000_000  # sample picture i is drawn from seed SAMPLE_SEED + i, so one sees the same pictures get better


def main(config: Config, stop: Stop) -> int:
    """Train, and return the exit code: 0; 143 after a signal; 3 if the model is whole, but the Hub failed."""
    # ---- Accelerator: processes, device, precision -------------------------------------------------------------------
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    accelerator = runtime.start(config.mixed_precision, config.cpu_threads)
    runtime.check_world_size(accelerator.num_processes)
    device, main_process = accelerator.device, accelerator.is_main_process
    per_process, accumulation = config.train_batch_size, config.gradient_accumulation_steps
    global_batch = per_process * accelerator.num_processes * accumulation
    output_dir = Path(config.output_dir).expanduser()
    say = accelerator.print

    locked = checkpoint.lock(output_dir) if main_process else None
    if main_process:
        checkpoint.clear(output_dir)
        if config.push_to_hub:
            during_training.check(config)
    accelerator.wait_for_everyone()

    # ---- Data: files to a memory-mapped array, decoded once ----------------------------------------------------------
    from training.data.batches import Batches
    from training.data.split import load_data_split
    from training.denoiser import check_size, choose_attention, make_denoiser

    if config.height_width is not None:  # before all is decoded for nothing
        size = config.height_width
        check_size(config.denoiser, *((size, size) if isinstance(size, int) else size))
    if config.resume_from_checkpoint:
        path, manifest = checkpoint.find(output_dir, config.resume_from_checkpoint, say)
    cache_dir = Path(config.cache_dir).expanduser()
    with accelerator.main_process_first():
        parts = load_data_split(
            config.validation_split if config.validation_steps else "none",
            dataset_name=config.dataset_name,
            dataset_config_name=config.dataset_config_name,
            train_data_dir=config.train_data_dir,
            resolution=config.height_width,
            center_crop=config.center_crop,
            background=config.background,
            on_bad_image=config.on_bad_image,
            min_side=config.min_side,
            cache_dir=cache_dir,
            num_workers=config.dataloader_num_workers,
        )
    data = parts.data
    batches = Batches(
        data.images,
        train_indices=parts.train_indices,
        batch_size=global_batch,
        seed=config.seed,
        random_flip=config.random_flip,
        device=device,
    )
    say(
        f"{len(parts.train_indices)} images, {data.channels} x {data.height} x {data.width}, {data.images.dtype}, from "
        f"{data.source}"
    )
    if len(parts.held_out):
        say(f"held out: {len(parts.held_out)} images, {parts.source}")

    # ---- Walk, network, average, optimizer ---------------------------------------------------------------------------
    from ddpm_pipeline import objective, rng
    from ddpm_pipeline.scheduling_ddpm import DDPMScheduler
    from training.ema import FlatEMA

    scheduler = DDPMScheduler(
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
        timestep_spacing="trailing",
    )
    torch.manual_seed(rng.key(config.seed, rng.Stream.INITIAL_WEIGHTS))
    unet = make_denoiser(config.denoiser, height=data.height, width=data.width, in_channels=data.channels).to(device)
    computes_in = runtime.dtype(accelerator)
    if config.init_from and not config.resume_from_checkpoint:
        with accelerator.main_process_first():  # which downloads it for all
            during_training.begin_from(config.init_from, unet, scheduler, say)
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
    done, seconds_before = 0, 0.0
    if config.resume_from_checkpoint:
        failures.check_same_run(path, manifest, config, global_batch, len(parts.train_indices), data.source)
        weights, average, optimizer_state = checkpoint.load(path)
        ema.load_state_dict(average)  # first, since it names what is of another network
        unet.load_state_dict(weights)
        optimizer.load_state_dict(optimizer_state)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(manifest["scaler"])
        done, seconds_before = manifest["step"], manifest.get("seconds", 0.0)
        say(f"resumed from {path}, after step {done}")
    elif main_process and any(output_dir.glob("checkpoint-*")):
        say(f"{output_dir} has checkpoints of an earlier run, which this run begins to replace; "
            "to go on with it, --resume_from_checkpoint latest")  # fmt: skip

    if main_process:  # now, not after the first hour
        checkpoint.check_room(output_dir, checkpoint.bytes_of(unet.state_dict(), ema.state_dict()))

    # ---- The run's folder --------------------------------------------------------------------------------------------
    log = Log(output_dir, config, after_step=done) if main_process else None
    facts = {
        "global_batch": global_batch,
        "num_processes": accelerator.num_processes,
        "device": runtime.name(device),
        "mixed_precision": accelerator.mixed_precision,
        "num_images": len(parts.train_indices),
        "source": data.source,
        "held_out": parts.source,
        "sample_seed": SAMPLE_SEED,
        "versions": runtime.versions(),
        "commit": checkpoint.commit(),
        "config": config.as_dict(),
    }
    millions = sum(parameter.numel() for parameter in parameters) / 1e6
    say(
        f"{config.denoiser}, {millions:.1f} million parameters, {str(computes_in).removeprefix('torch.')}, on "
        f"{accelerator.num_processes} x {device.type}; global batch {global_batch}, {config.max_train_steps} steps"
        + (f" or {config.max_train_minutes:g} minutes" if config.max_train_minutes else "")
    )

    saved = done  # the step of the newest checkpoint

    def facts_now() -> dict[str, Any]:
        """What is known of the run, with the seconds that it has trained."""
        return facts | {"seconds": round(seconds_before + time.monotonic() - started, 1)}

    def save_checkpoint(step: int) -> None:
        nonlocal saved
        if main_process:
            checkpoint.save(
                output_dir,
                step,
                model=unet.state_dict(),
                ema=ema.state_dict(),
                optimizer=optimizer.state_dict(),
                facts=facts_now()
                | {"scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None},
                total_limit=config.checkpoints_total_limit,
            )
        accelerator.wait_for_everyone()
        saved = step

    def on_any(*flags: bool) -> list[bool]:
        """Each flag, if it is set on some process: the same answer on all."""
        if accelerator.num_processes == 1:
            return list(flags)
        total: Tensor = accelerator.reduce(torch.tensor(flags, dtype=torch.float32, device=device), "sum")
        return (total > 0).tolist()

    def draw_samples(step: int, number: int) -> Tensor | None:
        """Sample pictures by all processes, image i from a seed of its own, with the averaged weights.

        None if the run shall end, or if the memory is not enough.
        """
        from ddpm_pipeline import DDPMPipeline

        mine = list(range(accelerator.process_index, number, accelerator.num_processes))
        share = -(-number // accelerator.num_processes)
        mine += [0] * (share - len(mine))  # all processes draw as many
        unet.eval()
        images: list[Any] = []
        no_memory = None
        with ema.applied(), torch.autocast(device.type, computes_in, enabled=computes_in != torch.float32):
            pipe = DDPMPipeline(unet, scheduler)
            pipe.set_progress_bar_config(desc=f"samples of step {step}", leave=False, disable=not main_process)

            def end_early(pipe: DDPMPipeline, i: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
                pipe.interrupt = stop.asked()
                return {}

            try:
                for start in range(0, share, 64):
                    images += pipe(
                        seeds=[SAMPLE_SEED + i for i in mine[start : start + 64]],
                        num_inference_steps=config.ddpm_num_inference_steps,
                        output_type="latent",
                        return_dict=False,
                        callback_on_step_end=end_early,
                    )
            except (RuntimeError, MemoryError) as error:
                if not failures.is_out_of_memory(error):
                    raise
                no_memory = error
        unet.train()
        stopping, without = on_any(stop.asked(), no_memory is not None)
        if without:
            say(f"WARNING: no samples of step {step}, for there is not enough memory for {number}: lower "
                "num_sample_images, or validation_samples. Training is not touched by it.")  # fmt: skip
        if stopping or without:
            return None
        gathered = accelerator.gather(torch.cat(images))
        # Process p drew images p, p + P, p + 2 P, ...: put them back in order.
        return gathered.unflatten(0, (-1, share)).transpose(0, 1).flatten(0, 1)[:number]

    def save_samples(step: int) -> Tensor | None:
        from ddpm_pipeline import visualize

        samples = draw_samples(step, config.num_sample_images)
        if log is not None and samples is not None:
            log.picture(step, visualize.grid(samples))
        return samples

    def validate(step: int) -> str:
        """Measure the held-out pictures with the averaged weights and log it; in words, for the progress bar."""
        from accelerate.utils import gather_object

        if not validation.number:
            return ""
        unet.eval()
        with ema.applied(), torch.autocast(device.type, computes_in, enabled=computes_in != torch.float32):
            found = validation.measure(
                lambda x_t, t: unet(x_t, t, return_dict=False)[0],
                gather=lambda values: gather_object(values) if accelerator.num_processes > 1 else values,
            )
        unet.train()
        samples = draw_samples(step, config.validation_samples) if config.validation_samples else None
        if log is None:
            return ""
        if samples is not None and extractor is not None:
            found |= kernel_distance(samples, parts.held_out, extractor, cache_dir / "features")
        log.metrics(step, images=step * global_batch, **found)
        words = f"held out: loss {found['validation_loss']:.4f}, {found['bits_per_dim']:.2f} bits"
        if "kernel_distance" in found:
            words += f", distance {found['kernel_distance']:.4f}"
        return words

    def save_model(step: int) -> Tensor | None:
        """Write pipeline/: the averaged weights, how they were trained, samples of them and the walk."""
        trained = {"step": step, **facts_now()}
        samples = save_samples(step)
        if log is None:
            return samples
        from ddpm_pipeline import DDPMPipeline, visualize

        drawn = {"samples.png": visualize.grid(samples)} if samples is not None else {}
        with ema.applied():
            pipe = DDPMPipeline(unet.eval(), scheduler)
            pipe.set_progress_bar_config(disable=True)
            x_0 = batches.images(0, torch.zeros(1, dtype=torch.int64))
            steps = config.ddpm_num_inference_steps
            try:
                drawn["walk.png"] = visualize.trajectory_grid(pipe, x_0, num_inference_steps=steps, seed=SAMPLE_SEED)
                log.save(drawn["walk.png"], "walk.png")
            except (RuntimeError, MemoryError) as error:
                if not failures.is_out_of_memory(error):
                    raise
                say("WARNING: no picture of the walk, for there is not enough memory. The model is not touched by it.")
            save_pipeline(pipe, output_dir / "pipeline", trained, drawn)
        unet.train()
        return samples

    # ---- Validation --------------------------------------------------------------------------------------------------
    from training.run.validation import Validation, kernel_distance

    validation = Validation(
        parts.held_out,
        config.num_validation_images,
        scheduler,
        device=device,
        batch_size=per_process,
        share=(accelerator.process_index, accelerator.num_processes),
    )
    extractor = None
    if config.validation_samples and main_process and validation.number:
        from ddpm_pipeline.features import make_extractor

        extractor = make_extractor(
            config.extractor,
            images=parts.training,
            labels=parts.labels(),
            cache_dir=cache_dir / "features",
            device=device,
        )

    # ---- Loop --------------------------------------------------------------------------------------------------------
    from tqdm import tqdm

    unet.train()
    progress = tqdm(total=config.max_train_steps, initial=done, desc="training", disable=not main_process)
    losses = torch.zeros((), device=device)
    started = logged_at = time.monotonic()
    step, counted, skipped = done, 0, 0
    stopping = out_of_time = False
    pushes = during_training.Pushes(config) if main_process and config.push_to_hub else None
    stop.in_loop = True
    while step < config.max_train_steps and not out_of_time and not stopping:
        learning_rate = config.learning_rate_at(step + 1)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        torch.manual_seed(rng.key(config.seed, rng.Stream.DROPOUT, step, accelerator.process_index))

        step_loss = torch.zeros((), device=device)
        shown: list[tuple[Tensor, Tensor, Tensor]] = []  # places, predictions and targets of this process
        for part in range(accumulation):
            first = (part * accelerator.num_processes + accelerator.process_index) * per_process
            place = torch.arange(first, first + per_process)
            last = part == accumulation - 1
            with failures.memory_explained(config, step + 1, saved):
                x_0 = batches.images(step, place)
                lesson = objective.draw_noised_batch(scheduler, x_0, seed=config.seed, step=step, index=place)
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    prediction = model(lesson.x_t, lesson.t, return_dict=False)[0]
                    loss = objective.simple_loss(prediction, lesson.target) / accumulation
                    accelerator.backward(loss)
            step_loss += loss.detach()
            shown.append((place, prediction.detach(), lesson.target))

        norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        # fp16's scaler has steps with such a norm now and then, and leaves them out itself.
        finite = step_loss.isfinite() & (norm.isfinite() if accelerator.scaler is None else True)
        late = bool(config.max_train_minutes) and time.monotonic() - started > 60 * (config.max_train_minutes or 0)
        broken, stopping, out_of_time = on_any(not finite.item(), stop.asked(), late)
        if broken:  # before optimizer and average move
            message = (
                f"loss or gradient of step {step + 1} is not a number: loss {step_loss.item():g} in this process, norm "
                f"of the gradient {float(norm):g}, learning rate {learning_rate:g}; images "
                + failures.named(accelerator, failures.suspects(shown, batches, step), data)
            )
            if config.on_nonfinite == "stop":
                raise FloatingPointError(
                    f"{message}. The step is not done. {failures.last(saved)} Lower learning_rate, or look at the "
                    "images; --on_nonfinite skip leaves such steps out"
                )
            say(f"WARNING: {message}. The step is left out")
            skipped += 1
            if accelerator.scaler is not None:
                accelerator.scaler.update()  # clipping has unscaled this step's gradients
        else:
            optimizer.step()
            skipped += accelerator.optimizer_step_was_skipped  # by fp16's scaler
            losses += step_loss
            counted += 1
        optimizer.zero_grad()
        step += 1
        if not broken:
            ema.update(step)
        progress.update()

        if step == 1 or step % config.logging_steps == 0 or step == config.max_train_steps:
            mean_loss = (accelerator.reduce(losses, "mean") / counted).item() if counted else math.nan
            now = time.monotonic()
            per_second = max(1, counted) * global_batch / (now - logged_at)
            if log is not None and counted:
                log.metrics(step, loss=mean_loss, learning_rate=learning_rate, images=step * global_batch,
                            images_per_second=per_second, ema_decay=ema.decay_at(step), skipped=skipped)  # fmt: skip
            progress.set_postfix(loss=f"{mean_loss:.4f}", img_s=f"{per_second:.0f}")
            losses.zero_()
            logged_at, counted = now, 0
        if step % config.checkpointing_steps == 0:
            save_checkpoint(step)
        ended = stopping or out_of_time or step == config.max_train_steps
        if config.validation_steps and not stopping and (ended or step % config.validation_steps == 0):
            paused = time.monotonic()
            held_out = validate(step)
            progress.set_description(f"training ({held_out})" if held_out else "training")
            pause = time.monotonic() - paused
            started, logged_at = started + pause, logged_at + pause  # measuring is not training
        push = bool(config.push_to_hub_steps) and step % config.push_to_hub_steps == 0
        if not ended and (push or (config.save_images_steps and step % config.save_images_steps == 0)):
            paused = time.monotonic()
            save_model(step) if push else save_samples(step)
            if push and pushes is not None and not stop.asked():
                pushes.start()
            pause = time.monotonic() - paused
            started, logged_at = started + pause, logged_at + pause  # drawing is not training
            (stopping,) = on_any(stop.asked())
    if saved != step:
        save_checkpoint(step)
    stop.in_loop = False
    progress.close()
    if stopping:
        say(f"asked to end: checkpoint after step {step} written; go on with --resume_from_checkpoint latest")
        if pushes is not None:
            pushes.end()
        if log is not None:
            log.close()
        return EXIT_CODE
    minutes = (time.monotonic() - started) / 60
    say(f"trained {step - done} steps in {minutes:.1f} minutes" + (f", {skipped} left out" if skipped else ""))

    # ---- Save: the pipeline, its samples, the walk -------------------------------------------------------------------
    samples = save_model(step)
    if log is not None:
        if config.dataset_name == "moons" and samples is not None:
            from training.evaluation import moons

            say(moons.measure_samples(log, step, samples))
            with ema.applied():
                say(moons.fuse_moons(unet.eval(), scheduler, output_dir, config.ddpm_num_inference_steps))
        log.close()
        say(
            f"\nThe model is in {output_dir / 'pipeline'}, its pictures in {output_dir / 'samples'}. To load it:\n"
            f"    from ddpm_pipeline import DDPMPipeline\n"
            f'    image = DDPMPipeline.from_pretrained("{output_dir / "pipeline"}")(num_inference_steps=50).images[0]'
        )
    if locked is not None:
        locked.close()
    failures.part()  # the other processes need not wait for the Hub
    return pushes.last() if pushes is not None else 0


def save_pipeline(pipe: Any, folder: Path, facts: dict[str, Any], drawn: dict[str, Any]) -> None:
    """Write the pipeline, how it was trained and what it drew beside its place; put it there when it is whole."""
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipe.save_pretrained(str(temporary))
    (temporary / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for name, picture in drawn.items():
        try:
            picture.save(temporary / name)
        except OSError as error:  # the model is worth more than its pictures
            (temporary / name).unlink(missing_ok=True)
            print(f"WARNING: {folder / name} cannot be written: {error.strerror or error}", file=sys.stderr)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    settings = parse()
    try:
        with Stop() as stop:
            code = main(settings, stop)
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        code = 2
    except (FloatingPointError, failures.OutOfMemoryError, checkpoint.NoRoomError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        code = 1
    except during_training.HubError as error:
        print(f"train.py: {error}. Nothing was trained. Without --push_to_hub one can publish later", file=sys.stderr)
        code = 3
    failures.part()
    sys.exit(code)
