"""Train a DDPM: `accelerate launch training/train.py [--config FILE] [--name value ...]`. Without arguments: the moons.

Order: config, runtime, data, model, EMA, optimizer, resume, loop, save. A step is an optimizer step. Noise, loss and
EMA are float32; autocast is around the network alone. Every random number is a function of (seed, step, index in the
global batch), for dropout of (seed, step, rank), so a resumed run continues bit for bit.

Exit codes: 0 done; 1 a non-finite loss or gradient, out of memory or disk full; 2 a mistake in the command or the data;
3 the Hub failed; 143 stopped by a signal.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: imports start at the project, not at training/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor

from ddpm_pipeline.cpu import importing
from training.config import Config, parse
from training.hub import during_training
from training.hub.client import HubError
from training.progress import progress, quiet_libraries
from training.run import checkpoint, failures, resume, signals
from training.run.failures import ForwardPass
from training.run.log import Log, check_trackers
from training.run.record import RunRecord, precision_name
from training.run.runtime import Runtime, commit, device_name, leave_process_group, tell_other_machines, versions
from training.run.sampling import EMASampler, recover_pipeline
from training.run.signals import StopSignal
from training.run.state import TrainingState
from training.step import Outcome, PendingStep, Updater, make_optimizer

if TYPE_CHECKING:
    from ddpm_pipeline import DDPMScheduler
    from training.data.batches import Batches
    from training.data.cache import ImageSet
    from training.ema import FlatEMA
    from training.run.inputs import Inputs
    from training.run.validation import Validator
    from training.tune import Tuning


@dataclass(frozen=True)
class Run:
    """What the training loop works with."""

    config: Config
    runtime: Runtime
    output_dir: Path
    data: ImageSet
    batches: Batches
    scheduler: DDPMScheduler
    unet: torch.nn.Module
    model: torch.nn.Module  # `unet`, wrapped for several processes and compiled
    ema: FlatEMA
    optimizer: torch.optim.Optimizer
    record: RunRecord
    log: Log
    sampler: EMASampler
    validator: Validator
    publisher: during_training.BackgroundPublisher | None  # on the main process, with push_to_hub
    stop: StopSignal
    replaces_earlier: bool  # a new run in a folder with checkpoints of an earlier one

    def record_at(self, state: TrainingState) -> RunRecord:
        seconds = round(state.clock.total_seconds, 1)
        return replace(self.record, step=state.step, seconds=seconds, threads=self.runtime.threads)


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
        from ddpm_pipeline import rng
        from ddpm_pipeline.images import record_background
        from ddpm_pipeline.labels import record_class_names
        from training import tune
        from training.denoiser import check_size, load_initial_weights, make_denoiser
        from training.ema import FlatEMA
        from training.run.inputs import load_inputs
        from training.run.validation import Validator

    quiet_libraries()

    # ---- Data: image files to a memory-mapped array, decoded once ----------------------------------------------------
    # Before the images are decoded, check what does not need them.
    if config.height_width is not None:
        check_size(config.denoiser, *config.height_width)
    found = None
    if config.resume_from_checkpoint:
        found = resume.find(runtime, output_dir, config.resume_from_checkpoint)
    inputs = load_inputs(config, runtime)
    data, classes = inputs.split.data, inputs.classes

    # ---- Model: diffusion process and network ------------------------------------------------------------------------
    scheduler = make_scheduler(config)
    torch.manual_seed(rng.key(config.seed, rng.Stream.INITIAL_WEIGHTS))
    # Any: diffusers annotates .to() without its argument.
    unet: Any = make_denoiser(
        config.denoiser,
        height=data.height,
        width=data.width,
        in_channels=data.channels,
        num_class_embeds=inputs.num_class_embeds,
    )
    record_background(unet, config.background)
    if classes is not None:
        record_class_names(unet, classes.names)
    unet.to(device)
    if config.init_from and found is None:
        model_name = config.init_from
        runtime.in_turn(lambda: load_initial_weights(model_name, unet, scheduler, runtime.print))
    tuning = tune.choose(config, runtime, unet, (data.channels, data.height, data.width), found)
    tune.apply(tuning, unet)

    # ---- EMA, optimizer ----------------------------------------------------------------------------------------------
    ema = FlatEMA(unet, config.ema_max_decay, config.ema_inv_gamma, config.ema_power)
    optimizer = make_optimizer(config, unet)
    # Everything is on its device. accelerate's placement on "cpu:0" would copy the weights out of the EMA's memory.
    model = runtime.accelerator.prepare(unet, device_placement=[False])
    if config.compile:
        model = torch.compile(model)

    # ---- Resume ------------------------------------------------------------------------------------------------------
    state = TrainingState()
    if found is not None:
        with runtime.together():
            if runtime.is_main:
                digests = data.digest, None if classes is None else classes.digest
                failures.check_same_run(*found, config, inputs.global_batch, inputs.num_images, data.source, *digests)
        state = resume.restore(*found, config, runtime, unet=unet, ema=ema, optimizer=optimizer)
    is_new = not config.resume_from_checkpoint  # "auto" has found that no earlier one is valid
    has_earlier = is_new and runtime.is_main and any(output_dir.glob("checkpoint-*"))
    (replaces_earlier,) = runtime.any(has_earlier)
    if replaces_earlier:
        runtime.print(f"{output_dir} has checkpoints of an earlier run: the first one of this run replaces them. To "
                      "continue the earlier run: --resume_from_checkpoint latest")  # fmt: skip
    with runtime.together():
        if runtime.is_main:  # fail now, not at the first checkpoint
            checkpoint.check_free_space(output_dir, checkpoint.estimate_bytes(unet.state_dict(), ema.state_dict()))

    # ---- Loop --------------------------------------------------------------------------------------------------------
    log = Log(output_dir, config, after_step=state.step, enabled=runtime.is_main)
    sampler = EMASampler(config, runtime, unet, scheduler, ema, log, stop, inputs)
    validator = Validator(config, runtime, inputs, sampler, log)
    publisher = during_training.BackgroundPublisher(config) if runtime.is_main and config.push_to_hub else None
    record = make_record(config, runtime, inputs, tuning)
    run = Run(config, runtime, output_dir, data, inputs.batches, scheduler, unet, model, ema, optimizer, record, log,
              sampler, validator, publisher, stop, replaces_earlier)  # fmt: skip
    runtime.print(describe(run))
    first_step = state.step
    interrupted = train(run, state)
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
        runtime.print(f"trained {state.step - first_step} steps in {state.clock.seconds / 60:.1f} minutes{skipped}")

    # ---- Save --------------------------------------------------------------------------------------------------------
    samples = sampler.save_pipeline(run.record_at(state))
    if runtime.is_main:
        finish(run, state, samples)
    if lock is not None:
        lock.release()
    leave_process_group()  # the other ranks need not wait for the Hub
    return publisher.publish_final() if publisher is not None else 0


def make_scheduler(config: Config) -> DDPMScheduler:
    from ddpm_pipeline.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
        timestep_spacing="trailing",
    )


def make_record(config: Config, runtime: Runtime, inputs: Inputs, tuning: Tuning) -> RunRecord:
    split, classes = inputs.split, inputs.classes
    return RunRecord(
        global_batch=inputs.global_batch,
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
    )


def train(run: Run, state: TrainingState) -> bool:
    """The training loop. Returns True if a signal ended it; either way its last step has a checkpoint.

    The host is one step ahead of what it knows: it reads the outcome of a step after it has handed the next one to the
    device. Before it logs, writes, validates or ends it reads what is outstanding.
    """
    config, runtime, clock = run.config, run.runtime, state.clock
    updater = Updater(run.optimizer, config.max_grad_norm, runtime)
    time_limit = 60 * config.max_train_minutes if config.max_train_minutes else math.inf  # seconds
    bar = progress(desc="training", total=config.max_train_steps, initial=state.step, disable=not runtime.is_main)
    sums = torch.zeros(2, device=runtime.device)  # of the losses, and their number
    pending: deque[PendingStep] = deque()
    stopping = out_of_time = False
    run.unet.train()
    clock.restart()
    logged_at = clock.seconds
    run.stop.in_loop = True
    while state.step < config.max_train_steps and not (stopping or out_of_time):
        runtime.adapt_threads()

        # ---- Loss, gradients, optimizer, EMA
        learning_rate = config.learning_rate_at(state.step + 1)
        loss, passes = accumulate_gradients(run, state)
        asked = run.stop.requested(), clock.seconds > time_limit
        step = updater.step(state.step + 1, learning_rate, loss, passes, asked)
        run.ema.update(step.step, step.skip)
        sums += torch.stack([loss.masked_fill(step.skip > 0, 0), 1 - step.skip])
        state.step += 1
        bar.update()

        # ---- Read the outcome of the step before; of this one only if that is needed now
        if runtime.world_size == 1:
            stopping, out_of_time = asked
        pending.append(step)
        del step, passes  # `pending` alone keeps the predictions of a step
        while len(pending) > 1 or (pending and (stopping or out_of_time or needs_outcome(config, state.step))):
            outcome = check_outcome(run, state, pending.popleft())
            stopping, out_of_time = stopping or outcome.stop, out_of_time or outcome.time_is_up
        images_seen = state.step * run.record.global_batch
        is_last = stopping or out_of_time or state.step == config.max_train_steps

        # ---- Log
        if is_logged(config, state.step):
            loss_sum, num_losses = runtime.mean(sums).tolist()
            mean_loss = loss_sum / num_losses if num_losses else math.nan
            now = clock.seconds
            images_per_second = max(1, num_losses) * run.record.global_batch / (now - logged_at)
            if num_losses:
                run.log.metrics(
                    state.step,
                    loss=mean_loss,
                    learning_rate=learning_rate,
                    images=images_seen,
                    images_per_second=images_per_second,
                    ema_decay=run.ema.decay_at(state.step),
                    skipped=state.skipped,
                )
            bar.set_postfix(loss=f"{mean_loss:.4f}", img_s=f"{images_per_second:.0f}")
            sums.zero_()
            logged_at = now

        # ---- Checkpoint
        if is_due(state.step, config.checkpointing_steps):
            save_checkpoint(run, state)

        # ---- Validate
        if config.validation_steps and not stopping and (is_last or is_due(state.step, config.validation_steps)):
            with clock.paused():
                summary = run.validator.validate(state.step, images_seen)
            bar.set_description(f"training ({summary})" if summary else "training")

        # ---- Sample, publish (after the last step, main() does both)
        publish = is_due(state.step, config.push_to_hub_steps)
        if not is_last and (publish or is_due(state.step, config.save_images_steps)):
            with clock.paused():
                if publish:
                    if run.replaces_earlier and not state.saved_step:  # its model is replaced with its checkpoints
                        save_checkpoint(run, state)
                    run.sampler.save_pipeline(run.record_at(state))
                else:
                    run.sampler.save_grid(state.step)
                if publish and run.publisher is not None and not run.stop.requested():
                    run.publisher.start()
            (stopping,) = runtime.any(run.stop.requested())  # sampling ends early on a signal
    # Stopped before its first checkpoint, a run that was perhaps begun by mistake leaves those of an earlier one.
    spares_earlier = stopping and run.replaces_earlier and not state.saved_step
    if state.saved_step != state.step and not spares_earlier:
        save_checkpoint(run, state)
    run.stop.in_loop = False
    bar.close()
    return stopping


def accumulate_gradients(run: Run, state: TrainingState) -> tuple[Tensor, list[ForwardPass]]:
    """Algorithm 1, DDPM, for this rank's slice of the global batch: gradients of L_simple, accumulated over passes.

    Returns:
        The loss of this rank, a scalar, and its forward passes.
    """
    from ddpm_pipeline import objective, rng

    config, runtime = run.config, run.runtime
    batch_size, num_passes = config.train_batch_size, config.gradient_accumulation_steps
    torch.manual_seed(rng.key(config.seed, rng.Stream.DROPOUT, state.step, runtime.rank))
    loss_sum = torch.zeros((), device=runtime.device)
    passes: list[ForwardPass] = []
    for i in range(num_passes):
        first = (i * runtime.world_size + runtime.rank) * batch_size
        index = torch.arange(first, first + batch_size)
        is_last = i == num_passes - 1  # the ranks exchange gradients in the last pass only
        with failures.explain_out_of_memory(config, state.step + 1, state.saved_step):
            x_0, labels = run.batches.images(state.step, index), run.batches.labels(state.step, index)
            batch = objective.draw_noised_batch(run.scheduler, x_0, seed=config.seed, step=state.step, index=index)
            with contextlib.nullcontext() if is_last else runtime.accelerator.no_sync(run.model):
                prediction = run.model(batch.x_t, batch.t, class_labels=labels, return_dict=False)[0]
                loss = objective.simple_loss(prediction, batch.target) / num_passes
                runtime.accelerator.backward(loss)
        loss_sum += loss.detach()
        passes.append(ForwardPass(index, prediction.detach(), batch.target))
    return loss_sum, passes


def check_outcome(run: Run, state: TrainingState, step: PendingStep) -> Outcome:
    """Read the outcome of a step; with a fault name its images.

    Raises:
        FloatingPointError: a non-finite loss or gradient; with on_nonfinite=skip it is a warning.
    """
    outcome = step.outcome()
    state.skipped += outcome.is_skipped
    if outcome.is_fault:
        suspects = run.runtime.gather_objects(failures.suspect_images(step.passes, run.batches, step.step - 1))
        images = failures.describe_images(suspects, run.data)
        message = failures.describe_nonfinite(step.step, step.loss.item(), step.norm.item(), step.learning_rate, images)
        if run.config.on_nonfinite == "stop":
            raise FloatingPointError(
                f"{message}. This step did not change the weights. {failures.describe_saved(state.saved_step)} Lower "
                "learning_rate, check these images, or skip such steps with --on_nonfinite skip"
            )
        run.runtime.print(f"WARNING: {message}. Step skipped.")
    return outcome


def save_checkpoint(run: Run, state: TrainingState) -> None:
    """Write a checkpoint after this step, on the main process; the others wait."""
    with run.runtime.together():
        if run.runtime.is_main:
            scaler = run.runtime.accelerator.scaler
            checkpoint.save(
                run.output_dir,
                state.step,
                model=run.unet.state_dict(),
                ema=run.ema.state_dict(),
                optimizer=run.optimizer.state_dict(),
                record=run.record_at(state).as_dict() | {"scaler": None if scaler is None else scaler.state_dict()},
                total_limit=run.config.checkpoints_total_limit,
            )
            run.log.replace_earlier_files()
    state.saved_step = state.step


def is_logged(config: Config, step: int) -> bool:
    return step in (1, config.max_train_steps) or is_due(step, config.logging_steps)


def needs_outcome(config: Config, step: int) -> bool:
    """Whether what follows this step must not follow a fault: what is logged, saved, measured, published or drawn."""
    others = config.checkpointing_steps, config.validation_steps, config.push_to_hub_steps, config.save_images_steps
    return is_logged(config, step) or any(is_due(step, every) for every in others)


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one; 0: never."""
    return every > 0 and step % every == 0


def describe(run: Run) -> str:
    """One line about the network, the hardware and the length of the run."""
    config, runtime = run.config, run.runtime
    millions = sum(parameter.numel() for parameter in run.unet.parameters()) / 1e6
    limit = f" or {config.max_train_minutes:g} minutes" if config.max_train_minutes else ""
    return (
        f"training: {config.denoiser}, {millions:.1f} M parameters, {precision_name(runtime.mixed_precision)}, on "
        f"{runtime.world_size} x {runtime.device.type}; global batch {run.record.global_batch}, "
        f"{config.max_train_steps} steps{limit}"
    )


def finish(run: Run, state: TrainingState, samples: Tensor | None) -> None:
    """On the main process, after pipeline/ is written: measure the moons, close the log, say how to load the model."""
    if run.config.dataset_name == "moons" and samples is not None:
        from training.evaluation import moons

        print(moons.measure_samples(run.log, state.step, samples))
        with run.sampler.ema_weights():
            steps = run.config.ddpm_num_inference_steps
            print(moons.fuse_moons(run.sampler.unet, run.scheduler, run.output_dir, steps))
    run.log.close()
    folder, names = run.output_dir / "pipeline", run.record.class_names
    label = f"class_labels={names[0]!r}, " if names else ""
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
