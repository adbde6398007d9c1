"""RESUME: the checkpoint that a run continues from. Rank 0 reads it for all, so other machines need no copy of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.budget import Budget, learning_rate
from training.messages import some
from training.run import checkpoint
from training.run.checkpoint import CheckpointError
from training.run.state import Clock, TrainingState

if TYPE_CHECKING:
    import torch

    from ddpm_pipeline.timesteps import ImportanceSampling
    from training.config import Config
    from training.ema import FlatEMA
    from training.run.best import Best
    from training.run.ema_snapshots import EMASnapshots
    from training.run.kept import GuideSnapshot
    from training.run.runtime import Runtime

# What may change when a run is resumed, but changes how it is trained; `describe_changes` says so.
LIMITS = ("max_train_minutes", "max_train_steps", "max_train_images")
MAY_CHANGE = (
    *LIMITS, "learning_rate", "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay",
    "adam_epsilon", "max_grad_norm", "ema_max_decay", "ema_inv_gamma", "ema_power", "variance_type", "loss_weighting",
    "timestep_sampling", "noise_candidates", "input_perturbation", "deterministic", "gradient_compression",
)  # fmt: skip


def find(runtime: Runtime, output_dir: Path, which: str) -> tuple[Path, dict[str, Any]] | None:
    """What `checkpoint.find` finds on rank 0, on all ranks; "auto": as "latest", or None if there is none.

    Raises:
        CheckpointError: on all ranks: as `checkpoint.find`; or with "auto", if another machine has a valid checkpoint.
    """
    found = None
    with runtime.together():
        if runtime.is_main:
            try:
                found = checkpoint.find(output_dir, "latest" if which == "auto" else which, runtime.print)
            except CheckpointError:
                if which != "auto":
                    raise
    found = runtime.broadcast(found)
    if found is None:
        with runtime.together():  # a launcher may have given rank 0 to another machine than before
            if not runtime.is_main and runtime.accelerator.is_local_main_process and (path := _newest(output_dir)):
                raise CheckpointError(
                    f"{path} is valid, but rank 0 has no checkpoint: start the run with this machine as node 0 "
                    "(torchrun --node-rank 0), or copy the checkpoint to that of rank 0"
                )
        runtime.print(f"{output_dir} has no valid checkpoint: a new run begins")
    return found


def _newest(output_dir: Path) -> Path | None:
    try:
        return checkpoint.find(output_dir, "latest")[0]
    except CheckpointError:
        return None


def restore(
    path: Path,
    manifest: dict[str, Any],
    config: Config,
    budget: Budget,
    runtime: Runtime,
    *,
    unet: torch.nn.Module,
    ema: FlatEMA,
    optimizer: torch.optim.Optimizer,
    best: Best,
    guide: GuideSnapshot,
    averages: EMASnapshots,
    importance: ImportanceSampling | None,
) -> TrainingState:
    """Load a checkpoint on all ranks, and print what has changed since it was written.

    Raises:
        ValueError: the network has other parameters; the message names one. Nothing has changed.
        CheckpointError: the optimizer state holds anything but tensors and plain containers.
    """
    loaded = None
    with runtime.together():
        if runtime.is_main:
            loaded = *checkpoint.load(path), checkpoint.load_others(path)
    loaded = runtime.broadcast(loaded)
    assert loaded is not None
    weights, ema_weights, optimizer_state, others = loaded
    ema.load_state_dict(ema_weights)  # first: its error names what differs in another network
    unet.load_state_dict(weights)
    optimizer.load_state_dict(optimizer_state)
    for group in optimizer.param_groups:  # settings may have changed, and the device may have no fused optimizer
        group.update(optimizer.defaults)
    scaler = runtime.accelerator.scaler
    scaler_state = manifest.get("scaler")  # None if the checkpoint is of a run without fp16
    if scaler is not None and scaler_state:
        scaler.load_state_dict(scaler_state)
    config_of_rank_0 = runtime.broadcast(config)  # settings of paths differ between machines
    best.load_state(manifest, others.get(checkpoint.BEST), config_of_rank_0)
    runtime.begin_threads(manifest.get("threads"))
    step = int(manifest["step"])
    runtime.print(f"resumed from {path}, after step {step}")
    seconds = manifest.get("seconds", 0.0)
    budget.load_state_dict(manifest.get("budget"), step, seconds)
    guide.load_state(manifest, others.get(checkpoint.GUIDE), budget.share(step))
    averages.load_state(others, step, budget.share(step))
    if importance is not None and checkpoint.MOMENTS in others:  # else the timesteps were drawn in another way before
        importance.load_state_dict(others[checkpoint.MOMENTS])
    if changes := describe_changes(manifest, config, budget, runtime.mixed_precision):
        runtime.print(changes)
    if budget.share(step) >= 1:
        limits = [f"--{name}" for name in LIMITS if getattr(config, name) is not None] or ["--max_train_minutes"]
        runtime.print(
            f"Nothing is left to train: this run is to have {budget}, and has had {step:,} steps in "
            f"{seconds / 60:.1f} minutes. To train on, give a larger {' or '.join(limits)}"
        )
    return TrainingState(step, step, owes_validation=manifest.get("owes_validation", False), clock=Clock(seconds))


def describe_changes(manifest: dict[str, Any], config: Config, budget: Budget, mixed_precision: str) -> str:
    """A line about settings that change how a resumed run is trained; empty if there are none.

    The length of the run counts only if the learning rate depends on it.

    Args:
        budget: of the resumed run, with what it has used.
    """
    step, seconds = int(manifest["step"]), manifest.get("seconds", 0.0)
    before = {name: manifest["config"].get(name, getattr(config, name)) for name in MAY_CHANGE}
    now = {name: getattr(config, name) for name in MAY_CHANGE}
    earlier_config = replace(config, **before)
    earlier_budget = Budget.of(earlier_config, manifest["global_batch"])
    earlier_budget.load_state_dict(manifest.get("budget"), step, seconds)
    was, is_now = learning_rate(earlier_config, earlier_budget, step + 1), learning_rate(config, budget, step + 1)
    if before["lr_scheduler"] == now["lr_scheduler"] == "constant":
        before |= {name: now[name] for name in LIMITS}
    before["mixed_precision"] = manifest.get("mixed_precision", mixed_precision)
    now["mixed_precision"] = mixed_precision
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now if before[name] != now[name]]
    if not changed:
        return ""
    effect = f": the learning rate of step {step + 1} is {is_now:g} instead of {was:g}" if was != is_now else ""
    return f"WARNING: changed since the checkpoint: {some(changed)}{effect}"
