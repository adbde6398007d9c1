"""Train a DDPM: `accelerate launch training/train.py [--config FILE] [--name value ...]`. Without arguments: the moons.

Order: config, runtime, data, model, EMA, optimizer, resume, loop, save. A step is an optimizer step. Noise, loss and
EMA are float32; autocast is around the network alone. Every random number is a function of (seed, step, index in the
global batch), for dropout of (seed, step, rank), so a resumed run continues bit for bit.

Exit codes: 0 done; 1 a non-finite loss or gradient, out of memory, disk full, or a shard that cannot be read; 2 a
mistake in the command or the data; 3 the Hub failed; 143 stopped by a signal.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: imports start at the project, not at training/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor

from ddpm_pipeline.cpu import importing
from ddpm_pipeline.files import remove
from training.budget import Budget, with_defaults
from training.config import Config, parse
from training.data.stores import ShardError
from training.hub import during_training
from training.hub.client import HubError
from training.loop import Run, save_pipeline, train
from training.progress import quiet_libraries
from training.run import checkpoint, failures, gradients, resume, signals
from training.run.best import Best, check_held_out
from training.run.ema_snapshots import FOLDER as SNAPSHOTS
from training.run.ema_snapshots import EMASnapshots
from training.run.kept import GuideSnapshot
from training.run.log import Log, check_trackers
from training.run.record import BY, RunRecord, describe_best, precision_name
from training.run.runtime import Runtime, commit, device_name, leave_process_group, tell_other_machines, versions
from training.run.sampling import LAST, EMASampler, recover_pipeline
from training.run.signals import StopSignal
from training.run.state import TrainingState
from training.step import make_optimizer

if TYPE_CHECKING:
    from ddpm_pipeline import DDPMScheduler
    from training.denoiser import Denoiser
    from training.plan import Memory
    from training.run.inputs import Inputs
    from training.tune import Tuning


def main(config: Config, stop: StopSignal) -> int:
    """Train. Returns the exit code: 0; 143 after a signal; 3 if the model is complete, but publishing it failed."""
    # ---- Runtime: process group, device, precision -------------------------------------------------------------------
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    runtime = Runtime(config.mixed_precision, config.cpu_threads)
    device = runtime.device
    output_dir = Path(config.output_dir).expanduser()
    runtime.agree(**config.shared_by_all_processes(), precision=runtime.mixed_precision)
    config.check_world_size(runtime.world_size)
    lock = None
    with runtime.together():
        if runtime.is_main:
            check_trackers(config.trackers)
            lock = checkpoint.lock(output_dir)
            checkpoint.clean_up(output_dir)
            recover_pipeline(output_dir)
            if config.push_to_hub:
                during_training.check_access(config)

    # Only now: these import diffusers, which takes seconds, and the checks above need none of it.
    with importing():
        from ddpm_pipeline.images import record_background, record_center_crop
        from ddpm_pipeline.labels import record_class_names
        from ddpm_pipeline.loss_weights import loss_weights
        from ddpm_pipeline.objective import Loss
        from ddpm_pipeline.pixels import num_levels
        from ddpm_pipeline.timesteps import ImportanceSampling
        from training import plan, tune
        from training.denoiser import check_size, find_network, load_initial_weights, network_of, size_rule
        from training.ema import FlatEMA
        from training.run.inputs import load_inputs, make_batches
        from training.run.validation import Validator

    quiet_libraries()

    # ---- Data: image files to a memory-mapped array, decoded once ----------------------------------------------------
    # Before the images are decoded, check what does not need them.
    found = resume.find(runtime, output_dir, config.resume_from_checkpoint) if config.resume_from_checkpoint else None
    network = runtime.in_turn(
        lambda: find_network(
            config.denoiser, found and found[1], config.init_from, num_steps=config.ddpm_num_steps, log=runtime.print
        )
    )
    if config.height_width is not None:
        check_size(network, *config.height_width)
    inputs = load_inputs(config, runtime, size_rule(network))
    data, classes = inputs.split.data, inputs.classes
    check_held_out(config.keep_best, len(inputs.split.held_out))

    # ---- Model: diffusion process and network ------------------------------------------------------------------------
    scheduler, budget = make_scheduler(config), Budget.of(config, config.global_batch(runtime.world_size))
    image_shape = (data.channels, data.height, data.width)
    make = partial(make_network, config=config, inputs=inputs, device=device)
    network = network or plan.choose_family(make, image_shape, runtime, config, budget)
    with torch.device("meta"):
        plan.check_weights(make(network, device=torch.device("meta")), runtime, plan.averages_of(config))
    unet = make(network)
    config = with_defaults(config, unet.num_parameters(), found and found[1]["config"])
    record_background(unet, config.background)
    record_center_crop(unet, config.center_crop)
    if classes is not None:
        record_class_names(unet, classes.names)
    if config.init_from and found is None:
        model_name = config.init_from
        runtime.in_turn(lambda: load_initial_weights(model_name, unet, scheduler, runtime.print))
    tune.apply(tune.default_tuning(device.type, runtime.dtype), unet)
    memory = plan.measure_memory(unet, image_shape, runtime, plan.averages_of(config))
    manifest = found and found[1]
    plan.plan_passes(config, runtime, memory, manifest)  # before the trial, for which it may not fit
    tuning = tune.choose(config, runtime, unet, image_shape, found)
    tune.apply(tuning, unet)
    rate = runtime.world_size * (tuning.images_per_second or 0)
    default_batch = runtime.broadcast(plan.default_batch(config, budget, rate, manifest))
    passes = plan.plan_passes(config, runtime, memory, manifest, default_batch)
    global_batch = config.global_batch(runtime.world_size, default_batch)
    budget = Budget.of(config, global_batch)
    batches = make_batches(inputs, config, runtime, global_batch)

    # ---- EMA, the weights of it that are kept, averages, moments of the loss, optimizer ------------------------------
    ema = FlatEMA(unet, config.ema_max_decay, config.ema_inv_gamma, config.ema_power)
    best = Best(config.keep_best, ema, runtime.print)
    guide = GuideSnapshot(config.guide_snapshot, ema, runtime.print)
    averages = EMASnapshots(config.post_hoc_ema, ema, output_dir if runtime.is_main else None, runtime.print)
    importance = None
    if config.timestep_sampling == "importance":
        importance = ImportanceSampling(scheduler.num_steps, device, runtime.sum)
    optimizer = make_optimizer(config, unet, runtime.matmul_dtype())
    # Everything is on its device. accelerate's placement on "cpu:0" would copy the weights out of the EMA's memory.
    model = runtime.accelerator.prepare(unet, device_placement=[False])
    if config.gradient_compression == "bf16" and runtime.world_size > 1:
        gradients.compress(model)
    if config.compile:
        model = torch.compile(model)

    # ---- Resume ------------------------------------------------------------------------------------------------------
    state = TrainingState()
    if found is not None:
        with runtime.together():
            if runtime.is_main:
                digests = data.digest, None if classes is None else classes.digest
                failures.check_same_run(*found, config, global_batch, inputs.num_images, data.source, *digests)
        state = resume.restore(
            *found, config, budget, runtime, unet=unet, ema=ema, optimizer=optimizer, best=best, guide=guide,
            averages=averages, importance=importance,
        )  # fmt: skip
        config = replace(config, post_hoc_ema=averages.enabled)
    is_new = not config.resume_from_checkpoint  # "auto" has found that no earlier one is valid
    has_earlier = is_new and runtime.is_main and any(output_dir.glob("checkpoint-*"))
    (replaces_earlier,) = runtime.any(has_earlier)
    if replaces_earlier:
        runtime.print(f"{output_dir} has checkpoints of an earlier run: the first one of this run replaces them. To "
                      "continue the earlier run: --resume_from_checkpoint latest")  # fmt: skip
    with runtime.together():
        if runtime.is_main:  # fail now, not at the first checkpoint
            weights = ema.state_dict()
            kept = [weights for setting in (config.keep_best, config.guide_snapshot) if setting is not None]
            kept += averages.state_dicts().values()
            needed, purpose = checkpoint.estimate_bytes(unet.state_dict(), weights, None, *kept), "a checkpoint needs"
            if snapshots := averages.bytes_to_come():
                runtime.print(f"post_hoc_ema: snapshots of up to {snapshots / 1e6:,.0f} MB in {output_dir / SNAPSHOTS}")
                needed, purpose = needed + snapshots, "a checkpoint and the snapshots of post_hoc_ema need"
            checkpoint.check_free_space(output_dir, needed, purpose)

    # ---- Loop --------------------------------------------------------------------------------------------------------
    log = Log(output_dir, config, after_step=state.step, enabled=runtime.is_main)
    sampler = EMASampler(config, runtime, unet, scheduler, ema, guide, log, stop, inputs, batches)
    validator = Validator(config, runtime, inputs, sampler, log, best)
    publisher = during_training.BackgroundPublisher(config) if runtime.is_main and config.push_to_hub else None
    record = make_record(config, runtime, inputs, tuning, global_batch, passes.batch_size, network_of(unet))
    of_timesteps = loss_weights(scheduler, config.loss_weighting)
    of_timesteps = None if of_timesteps is None else of_timesteps.to(runtime.device)
    loss = Loss(scheduler, of_timesteps, num_levels(data.images.dtype))
    run = Run(config, budget, passes, runtime, output_dir, data, batches, scheduler, unet, model, ema, optimizer,
              record, log, sampler, validator, best, guide, averages, loss, importance, publisher,
              stop, replaces_earlier)  # fmt: skip
    if rate and found is None:
        budget.expect(global_batch / rate)
    steps = plan.expected_steps(budget, rate / global_batch if rate and found is None else None)
    runtime.print(describe(run, memory, steps))
    if rate:
        for warning in plan.length_warnings(steps * global_batch, len(inputs.split.train_indices), rate, config):
            runtime.print(warning)
    first_step = state.step
    try:
        interrupted = train(run, state)
    finally:
        batches.close()
    if interrupted:
        if state.saved_step == state.step:
            runtime.print(f"stopped by a signal: checkpoint after step {state.step} written. To continue: "
                          "--resume_from_checkpoint latest")  # fmt: skip
        else:
            runtime.print(f"stopped by a signal after step {state.step}, before the first checkpoint of this run: the "
                          "earlier ones are untouched")  # fmt: skip
        if publisher is not None:
            publisher.cancel()
        log.close()
        return signals.EXIT_CODE
    if state.step > first_step:
        skipped = f", {state.skipped} skipped" if state.skipped else ""
        runtime.print(f"trained {state.step - first_step} steps in {duration(state.clock.seconds)}{skipped}")
        if batches.stream is not None:
            runtime.print(f"waited {duration(batches.stream.seconds_waited)} for shards")

    # ---- Save --------------------------------------------------------------------------------------------------------
    if best.weights_before(state.step) is not None:
        sampler.save_pipeline(replace(run.record_at(state), best=None), LAST)
    elif runtime.is_main:
        remove(output_dir / LAST)  # of an earlier run
    samples = save_pipeline(run, state)
    if runtime.is_main:
        finish(run, run.record_at(state), samples)
    if lock is not None:
        lock.release()
    leave_process_group()  # the other ranks need not wait for the Hub
    return publisher.publish_final() if publisher is not None else 0


def duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.1f} minutes"


def make_scheduler(config: Config) -> DDPMScheduler:
    from ddpm_pipeline.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
        timestep_spacing="trailing",
    )


def make_network(denoiser: Denoiser, config: Config, inputs: Inputs, device: torch.device) -> Any:
    """An untrained network for these inputs; the same seed gives the same weights."""
    from ddpm_pipeline import rng
    from training.denoiser import make_denoiser

    data = inputs.split.data
    torch.manual_seed(rng.key(config.seed, rng.Stream.INITIAL_WEIGHTS))
    unet: Any = make_denoiser(  # Any: diffusers annotates .to() without its argument
        denoiser,
        height=data.height,
        width=data.width,
        in_channels=data.channels,
        out_channels=data.channels * (2 if config.variance_type.startswith("learned") else 1),
        num_class_embeds=inputs.num_class_embeds,
        dropout=config.dropout,
    )
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.to(device)


def make_record(
    config: Config,
    runtime: Runtime,
    inputs: Inputs,
    tuning: Tuning,
    global_batch: int,
    batch_size: int,
    network: dict[str, Any],
) -> RunRecord:
    split, classes = inputs.split, inputs.classes
    return RunRecord(
        global_batch=global_batch,
        batch_size=batch_size,
        num_processes=runtime.world_size,
        device=device_name(runtime.device),
        mixed_precision=runtime.mixed_precision,
        num_images=len(split.train_indices),
        source=split.data.source,
        data_digest=split.data.digest,
        labels_digest=None if classes is None else classes.digest,
        class_names=None if classes is None else list(classes.names),
        class_counts=None if classes is None else classes.counts,
        sample_labels=None if classes is None else classes.of_grid(config.num_sample_images),
        held_out=split.held_out_source,
        versions=versions(),
        commit=commit(),
        config=config.as_dict(),
        tuning=asdict(tuning),
        network=network,
    )


def describe(run: Run, memory: Memory, expected_steps: float) -> str:
    """The plan of the run: network, hardware, batch, memory, length."""
    runtime, passes, budget = run.runtime, run.passes, run.budget
    millions = sum(parameter.numel() for parameter in run.unet.parameters()) / 1e6
    batch = f"{run.record.global_batch} images a step"
    if passes.number > 1:
        batch += f" in {passes.number} passes"
    length = f"{budget}"
    if math.isfinite(expected_steps):
        images = expected_steps * run.record.global_batch
        passes_over_data = images / run.record.num_images
        steps = "" if expected_steps == budget.steps else f" = about {expected_steps:,.0f} steps"
        length += (
            f"{steps} = {images:,.0f} images, {passes_over_data:,.{0 if passes_over_data >= 10 else 1}f} passes over "
        )
        length += "the data"
    every = run.config.save_images_steps
    if every is None:
        samples = "after each tenth, if they and validation take at most a fifth of the time"
    else:
        samples = f"after each {every:,} steps" if every else "at the end"
    return (
        f"training: {millions:.1f} M parameters, {precision_name(runtime.mixed_precision)}, on {runtime.world_size} x "
        f"{runtime.device.type}, about {memory.of(passes.batch_size) / 1e9:.1f} GB; {batch}; {length}; "
        f"samples {samples}"
    )


def finish(run: Run, record: RunRecord, samples: Tensor | None) -> None:
    """On the main process, after pipeline/ is written: measure the moons, close the log, say how to load the model."""
    if run.config.dataset_name == "moons" and samples is not None:
        from training.evaluation import moons

        print(moons.measure_samples(run.log, record.weights_step, samples))
        with run.best.applied(), run.sampler.ema_weights():
            steps = run.config.ddpm_num_inference_steps
            print(moons.fuse_moons(run.sampler.unet, run.scheduler, run.output_dir, steps))
    run.log.close()
    folder, names = run.output_dir / "pipeline", run.record.class_names
    label = f"class_labels={names[0]!r}, " if names else ""
    if record.best is not None:
        last = f"; {LAST}/ has those of step {record.step:,}" if record.weights_step != record.step else ""
        print(f"\npipeline/ has the EMA weights of {describe_best(record.best)}{last}.")
    elif run.config.keep_best:
        print(f"\nWARNING: no validation had a {BY[run.config.keep_best]}: pipeline/ has the weights of the last step")
    if (share := run.config.guide_snapshot) is not None and not run.guide.is_before(record.weights_step):
        print(f"\nWARNING: guide_snapshot is {share:g}, but pipeline/ has no guide: none is of before its own step")
    if run.config.post_hoc_ema:
        print(f"\nTo choose how long its weights are averaged: training/choose_ema.py {run.output_dir}")
    print(
        f"\nThe model is in {folder}, its samples are in {run.output_dir / 'samples'}. To load it:\n"
        f"    from ddpm_pipeline import DDPMPipeline\n"
        f'    image = DDPMPipeline.from_pretrained("{folder}")({label}num_inference_steps='
        f"{run.config.ddpm_num_inference_steps}).images[0]"
    )


if __name__ == "__main__":
    try:
        config = parse()
    except SystemExit as error:
        if error.code:
            tell_other_machines("its settings are refused, see what it prints")
        raise
    try:
        with StopSignal() as stop:
            code = main(config, stop)
    except ShardError as error:
        print(f"train.py: {error}", file=sys.stderr)
        code = 1
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        code = 2
    except (FloatingPointError, failures.OutOfMemoryError, checkpoint.DiskFullError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        code = 1
    except HubError as error:
        advice = "To publish later, train without --push_to_hub, then run publish.py"
        print(f"train.py: {error}. Nothing was trained. {advice}", file=sys.stderr)
        code = during_training.EXIT_CODE
    leave_process_group()
    sys.exit(code)
