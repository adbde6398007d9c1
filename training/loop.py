"""LOOP: the training loop: one step after the other, and what happens in between.

Algorithm 1, DDPM: the mean squared error of the network's prediction at random timesteps, and a gradient step on it.
Around it are the EMA, the schedules (see budget.py), the log, checkpoints, validation, samples and publishing.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.budget import PARTS, Budget, learning_rate
from training.config import Config
from training.data.stores import ShardError
from training.hub import during_training
from training.progress import progress
from training.run import checkpoint, failures, gradients
from training.run.failures import ForwardPass
from training.run.log import Log
from training.run.record import RunRecord
from training.run.runtime import Runtime
from training.run.sampling import EMASampler
from training.run.signals import StopSignal
from training.run.state import TrainingState
from training.step import Outcome, PendingStep, Updater

if TYPE_CHECKING:
    from ddpm_pipeline import DDPMScheduler
    from ddpm_pipeline.objective import Loss
    from ddpm_pipeline.timesteps import ImportanceSampling
    from training.data.batches import Batches
    from training.data.image_set import ImageSet
    from training.data.shard_stream import ShardStream
    from training.ema import FlatEMA
    from training.plan import Passes
    from training.run.best import Best
    from training.run.ema_snapshots import EMASnapshots
    from training.run.kept import GuideSnapshot
    from training.run.validation import Validator

CHECKPOINTING_STEPS = 1000  # or sooner, if the settings do not say
MOST_PAUSED = 0.2  # of the training time, for validation and samples, if the settings do not say when
FORWARD = 1 / 3  # of the time for a training image, roughly


@dataclass(frozen=True)
class Run:
    """What the training loop works with."""

    config: Config
    budget: Budget
    passes: Passes
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
    best: Best
    guide: GuideSnapshot
    averages: EMASnapshots
    loss: Loss
    importance: ImportanceSampling | None  # with timestep_sampling "importance"
    publisher: during_training.BackgroundPublisher | None  # on the main process, with push_to_hub
    stop: StopSignal
    replaces_earlier: bool  # a new run in a folder with checkpoints of an earlier one

    def record_at(self, state: TrainingState) -> RunRecord:
        seconds = round(state.clock.total_seconds, 1)
        share, budget = self.budget.share(state.step), self.budget.state_dict()
        return replace(
            self.record,
            step=state.step,
            seconds=seconds,
            threads=self.runtime.threads,
            share=share,
            budget=budget,
            best=self.best.found,
        )


def train(run: Run, state: TrainingState) -> bool:
    """The training loop. Returns True if a signal ended it; either way its last step has a checkpoint.

    The host is one step ahead of what it knows: it reads the outcome of a step after it has handed the next one to the
    device. Before it logs, writes, validates or ends it reads what is outstanding.
    """
    config, budget, runtime, clock = run.config, run.budget, run.runtime, state.clock
    updater = Updater(run.optimizer, config.max_grad_norm, runtime)
    bar = progress(desc="training", total=known(budget.total), initial=state.step, disable=not runtime.is_main)
    sums = torch.zeros(2, device=runtime.device)  # of the losses, and their number
    pending: deque[PendingStep] = deque()
    run.unet.train()
    with failures.explain_out_of_memory(config, run.passes, state.step + 1, state.saved_step):
        shape = run.data.channels, run.data.height, run.data.width
        gradients.settle_buckets(run.model, run.unet, shape, run.passes.batch_size, runtime)
    clock.restart()
    logged_at = clock.seconds
    run.stop.in_loop = True
    if state.owes_validation:
        validate(run, state, bar)
    stopping = state.owes_validation
    while budget.share(state.step) < 1 and not stopping:
        runtime.adapt_threads()

        # ---- Images of a data set in shards, once for each group of shards
        if run.batches.stream is not None and run.batches.stream.begins_group(state.step):
            try:
                stopping = not wait_for_shards(run, run.batches.stream, state.step)
            except ShardError as error:
                read_outcomes(run, state, pending)
                save_checkpoint(run, state)
                raise ShardError(f"{error}. {failures.describe_saved(state.saved_step)}") from error
            if stopping:
                read_outcomes(run, state, pending)
                break

        # ---- Loss, gradients, optimizer, EMA
        rate = learning_rate(config, budget, state.step + 1)
        loss, passes = accumulate_gradients(run, state)
        step = updater.step(state.step + 1, rate, loss, passes, run.stop.requested())
        run.ema.update(step.step, step.skip)
        run.averages.update(step.step, step.skip)
        if run.importance is not None:
            run.importance.update(step.skip)
        sums += torch.stack([loss.masked_fill(step.skip > 0, 0), 1 - step.skip])
        state.step += 1
        if budget.reads_clock(state.step):
            budget.read_clock(state.step, runtime.broadcast(clock.total_seconds))
            bar.total = known(budget.total)
        run.guide.see(state.step, budget.share(state.step))
        bar.update()

        # ---- Read the outcome of the step before; of this one only if that is needed now
        is_last = budget.share(state.step) >= 1
        if runtime.world_size == 1:
            stopping = step.asked_to_stop
        pending.append(step)
        del step, passes  # `pending` alone keeps the predictions of a step
        while len(pending) > 1 or (pending and (stopping or is_last or needs_outcome(run, state.step))):
            stopping |= check_outcome(run, state, pending.popleft()).stop

        # ---- Log
        if is_logged(run, state.step):
            loss_sum, num_losses = runtime.mean(sums).tolist()
            mean_loss = loss_sum / num_losses if num_losses else math.nan
            now = clock.seconds
            images_per_second = max(1, num_losses) * run.record.global_batch / (now - logged_at)
            if num_losses:
                run.log.metrics(
                    state.step,
                    loss=mean_loss,
                    learning_rate=rate,
                    images=state.step * run.record.global_batch,
                    images_per_second=images_per_second,
                    ema_decay=run.ema.decay_at(state.step),
                    skipped=state.skipped,
                    **({} if run.batches.stream is None else {"data_wait": run.batches.stream.seconds_waited}),
                )
            bar.set_postfix(loss=f"{mean_loss:.4f}", img_s=f"{images_per_second:.0f}")
            bar.seconds_left = seconds_left(run, state, run.record.global_batch / images_per_second)
            sums.zero_()
            logged_at = now

        # ---- Validate, unless a signal came: then the resumed run does
        is_time = is_time_to_look(run, state)
        validates = is_time or (config.keep_best is not None and budget.ends_part(state.step))  # by no clock
        if config.validation_steps != 0 and (is_last or is_due(state.step, config.validation_steps, validates)):
            state.owes_validation = True
            if not stopping:
                validate(run, state, bar)
            stopping |= state.owes_validation

        # ---- Snapshots of averages, checkpoint
        if not spares_earlier(run, state, stopping):
            save_averages(run, state)
        if checkpoint_is_due(run, state.step):
            save_checkpoint(run, state)

        # ---- Sample, publish (after the last step, main() does both)
        is_last |= stopping
        publish = is_due(state.step, config.push_to_hub_steps)
        if not is_last and (publish or is_due(state.step, config.save_images_steps, is_time)):
            with clock.paused():
                if publish:
                    if run.replaces_earlier and not state.saved_step:  # its model is replaced with its checkpoints
                        save_checkpoint(run, state)
                    save_pipeline(run, state)
                else:
                    run.sampler.save_grid(state.step)
                if publish and run.publisher is not None and not run.stop.requested():
                    run.publisher.start()
            (stopping,) = runtime.any(run.stop.requested())  # sampling ends early on a signal
    if not stopping:
        save_averages(run, state)  # of a run that had nothing left to train
    if state.saved_step != state.step and not spares_earlier(run, state, stopping):
        save_checkpoint(run, state)
    run.stop.in_loop = False
    bar.close()
    return stopping


def wait_for_shards(run: Run, stream: ShardStream, step: int) -> bool:
    """Wait for the shards of a step, on all ranks. Returns False on all if a signal came on one.

    Raises:
        ShardError: on all ranks, if one cannot have a shard.
    """
    with run.runtime.together():
        is_ready = stream.wait(step, run.stop.requested)
    (stopping,) = run.runtime.any(not is_ready)
    return not stopping


def read_outcomes(run: Run, state: TrainingState, pending: deque[PendingStep]) -> None:
    """Read the outcomes of the steps that are outstanding."""
    while pending:
        check_outcome(run, state, pending.popleft())


def validate(run: Run, state: TrainingState, bar: Any) -> None:
    """Measure the EMA weights on held-out images; the run still owes it if a signal comes before the end."""
    with state.clock.paused():
        summary = run.validator.validate(state.step, state.step * run.record.global_batch)
    state.owes_validation = summary is None
    bar.set_description(f"training ({summary})" if summary else "training")


def save_pipeline(run: Run, state: TrainingState) -> Tensor | None:
    """Write pipeline/ with the best EMA weights so far, or with those of this step. Returns what `draw` returns."""
    with run.best.applied():
        return run.sampler.save_pipeline(run.record_at(state))


def accumulate_gradients(run: Run, state: TrainingState) -> tuple[Tensor, list[ForwardPass]]:
    """Algorithm 1, DDPM, for this rank's slice of the global batch: gradients of the loss, accumulated over passes.

    Returns:
        The loss of this rank, a scalar, and its forward passes.
    """
    from ddpm_pipeline import objective, rng

    config, runtime = run.config, run.runtime
    assert config.timestep_sampling is not None  # `with_defaults`
    batch_size, num_passes = run.passes.batch_size, run.passes.number
    torch.manual_seed(rng.key(config.seed, rng.Stream.DROPOUT, state.step, runtime.rank))
    loss_sum = torch.zeros((), device=runtime.device)
    passes: list[ForwardPass] = []
    for i in range(num_passes):
        first = (i * runtime.world_size + runtime.rank) * batch_size
        index = torch.arange(first, first + batch_size)
        is_last = i == num_passes - 1  # the ranks exchange gradients in the last pass only
        with failures.explain_out_of_memory(config, run.passes, state.step + 1, state.saved_step):
            x_0, labels = run.batches.batch(state.step, index)
            batch = objective.draw_noised_batch(
                run.scheduler,
                x_0,
                seed=config.seed,
                step=state.step,
                index=index,
                timestep_sampling=config.timestep_sampling,
                importance=run.importance,
                noise_candidates=config.noise_candidates,
                input_perturbation=config.input_perturbation,
            )
            with contextlib.nullcontext() if is_last else runtime.accelerator.no_sync(run.model):
                output = run.model(batch.x_t, batch.t, class_labels=labels, return_dict=False)[0]
                if run.importance is None:
                    loss = run.loss(output, batch, x_0) / num_passes
                else:
                    loss = run.importance.mean(run.loss.of_images(output, batch, x_0), batch.t) / num_passes
                runtime.accelerator.backward(loss)
        loss_sum += loss.detach()
        passes.append(ForwardPass(index, output[:, : x_0.shape[1]].detach(), batch.target))
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
                others={
                    name: weights
                    for name, kept in ((checkpoint.BEST, run.best), (checkpoint.GUIDE, run.guide))
                    if (weights := kept.weights_before(state.step)) is not None
                }
                | run.averages.state_dicts()
                | ({} if run.importance is None else {checkpoint.MOMENTS: run.importance.state_dict()}),
                record=run.record_at(state).as_dict()
                | {
                    "scaler": None if scaler is None else scaler.state_dict(),
                    "held_out_loss": run.best.state_dict(),
                    "guide_step": run.guide.step,
                    "owes_validation": state.owes_validation,
                },
                total_limit=run.config.checkpoints_total_limit,
            )
            run.averages.remove_earlier()
            run.log.replace_earlier_files()
    state.saved_step = state.step


def spares_earlier(run: Run, state: TrainingState, stopping: bool) -> bool:
    """Stopped before its first checkpoint, a run that was perhaps begun by mistake leaves those of an earlier one."""
    return stopping and run.replaces_earlier and not state.saved_step


def save_averages(run: Run, state: TrainingState) -> None:
    """Write the snapshots of post_hoc_ema, on the main process, if a part of the run is over."""
    share = run.budget.share(state.step)
    if not run.averages.is_due(share):
        return
    if run.replaces_earlier and not state.saved_step:  # its snapshots are replaced with its checkpoints
        save_checkpoint(run, state)
    with run.runtime.together():
        run.averages.write(state.step, share)


def is_logged(run: Run, step: int) -> bool:
    return step == 1 or run.budget.share(step) >= 1 or step % run.config.logging_steps == 0


def needs_outcome(run: Run, step: int) -> bool:
    """Whether what follows this step must not follow a fault: what is logged, saved, measured, published or drawn."""
    config = run.config
    others = config.validation_steps, config.push_to_hub_steps, config.save_images_steps
    is_checked = is_logged(run, step) or checkpoint_is_due(run, step) or run.averages.is_due(run.budget.share(step))
    return is_checked or any(is_due(step, every, run.budget.ends_part(step)) for every in others)


def is_due(step: int, every: int | None, is_time: bool = False) -> bool:
    """Whether something happens after this step that does so every so many steps; 0: never; None: if it is time."""
    return is_time if every is None else every > 0 and step % every == 0


def is_time_to_look(run: Run, state: TrainingState) -> bool:
    """Whether a part of the run is over, and validation and samples took at most MOST_PAUSED of its time so far."""
    if not run.budget.ends_part(state.step):
        return False
    clock = state.clock
    return bool(run.runtime.broadcast(clock.paused_seconds <= MOST_PAUSED * clock.seconds))


def checkpoint_is_due(run: Run, step: int) -> bool:
    every = run.config.checkpointing_steps
    return is_due(step, every, run.budget.ends_part(step) or step % CHECKPOINTING_STEPS == 0)


def seconds_left(run: Run, state: TrainingState, seconds_per_step: float) -> float | None:
    """Until the end of the run, with the validations and samples to come; None as long as its length is not known.

    A pause for them is expected to take as long as those before, or, before the first, as the images that go through
    the network for it.
    """
    config, budget, clock = run.config, run.budget, state.clock
    if math.isinf(budget.total):
        return None
    steps = budget.total - state.step
    training, now_and_then, others, at_the_end = steps * seconds_per_step, 0.0, 0.0, 0.0
    for every, images in (
        (config.validation_steps, run.validator.network_images),
        (config.save_images_steps, config.num_sample_images * config.ddpm_num_inference_steps),
    ):
        seconds = FORWARD * images * seconds_per_step / run.record.global_batch
        if clock.pauses:
            seconds = clock.paused_seconds / clock.pauses
        at_the_end += seconds
        if every is None:
            now_and_then += seconds * PARTS * (1 - budget.share(state.step))
        elif every:
            others += seconds * (steps // every)
    return training + min(now_and_then, MOST_PAUSED * training) + others + at_the_end


def known(number: float) -> int | None:
    return None if math.isinf(number) else int(number)
