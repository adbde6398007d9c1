"""BUDGET: how long a run trains, and which share of that it has used. Schedules depend on the share, so a run of any
length ends with its learning rate decayed.

    share after step n = share_m + (1 - share_m) (n - m) / (N - m)

N is the number of steps that the run will have in all, and m the step at which that was said last. For a budget in
steps m is 0, and the share n / N. For one in minutes N is estimated from the speed, again and again. In between the
share is a function of the step, so it is the same on all ranks and needs no clock; it never falls, and grows to 1
whatever the speed does. All this is in the checkpoint, so a resumed run has the learning rates that it would have had.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from training.config import FIRST_OPTIMIZER, FIRST_TIMESTEP_SAMPLING

if TYPE_CHECKING:
    from training.config import Config

DEFAULT_MINUTES = 60.0  # if no limit is given
WARMUP_STEPS, WARMUP_SHARE = 500, 0.05  # the shorter one, if no warm-up is given
HOLD_DECAY = 0.2  # the last share of the run, in which "hold" decays
PARTS = 10  # of a run: what happens "now and then" does so at the end of each
TRUSTED = 64  # steps; what the first ones take says little,
TRUSTED_SHARE = 0.25  # unless they have taken this share of the time
SMALL = 20e6  # parameters of a network, which then has Muon and the higher learning rate


@dataclass
class Budget:
    """A limit in steps, in training time or both; the run ends with the first that is used up.

    Args:
        steps: limit, at least 1, or infinity.
        seconds: limit of the training time, positive, or infinity.
        since, share_then, total: m, share_m and N. N is infinite as long as no speed is known.
        read_at, seconds_then: the step at which the clock was read last, and the training time then.
    """

    steps: float = math.inf
    seconds: float = math.inf
    since: int = 0
    share_then: float = 0.0
    total: float = math.inf
    read_at: int = 0
    seconds_then: float = 0.0

    def __post_init__(self) -> None:
        self.total = min(self.total, self.steps)

    @classmethod
    def of(cls, config: Config, global_batch: int) -> Budget:
        """The budget that these settings give; DEFAULT_MINUTES if they give none.

        Args:
            global_batch: images of a step.
        """
        steps = math.inf if config.max_train_steps is None else config.max_train_steps
        if config.max_train_images is not None:
            steps = min(steps, max(1, round(config.max_train_images / global_batch)))
        minutes = config.max_train_minutes
        if minutes is None:
            minutes = DEFAULT_MINUTES if math.isinf(steps) else math.inf
        return cls(steps, 60 * minutes)

    def __str__(self) -> str:
        limits = [] if math.isinf(self.steps) else [f"{self.steps:,.0f} steps"]
        limits += [] if math.isinf(self.seconds) else [f"{self.seconds / 60:g} minutes"]
        return " or ".join(limits)

    # ---- The share ---------------------------------------------------------------------------------------------------

    def share(self, step: int) -> float:
        """Of the budget that is used after step 0, 1, ...: in [0, 1]."""
        if step <= self.since or math.isinf(self.total):
            return self.share_then
        return self.share_then + (1 - self.share_then) * min(1.0, (step - self.since) / (self.total - self.since))

    def ends_part(self, step: int) -> bool:
        """Whether one of PARTS equal parts of the run ends with this step."""
        before, now = (math.floor(PARTS * self.share(n) + 1e-9) for n in (step - 1, step))  # up to rounding
        return now > before

    # ---- The clock ---------------------------------------------------------------------------------------------------

    def reads_clock(self, step: int) -> bool:
        """Whether `read_clock` is due after this step: while the speed is hardly known after 1, 2, 4, ... steps, then
        whenever a twentieth of the steps that were left is done, so that the run ends in time."""
        if math.isinf(self.seconds):
            return False
        return step & (step - 1) == 0 or step - self.read_at >= (self.total - self.read_at) / 20

    def read_clock(self, step: int, seconds: float) -> None:
        """Estimate N anew. As long as time will do for a limit in steps, the share depends on no clock.

        Args:
            step: the steps done.
            seconds: training time up to now, the same on all ranks.
        """
        seconds_per_step = max(1e-9, seconds - self.seconds_then) / max(1, step - self.read_at)
        self.read_at, self.seconds_then = step, seconds
        total = min(self.steps, step + round(max(0.0, self.seconds - seconds) / seconds_per_step))
        is_too_early = step < TRUSTED and seconds < TRUSTED_SHARE * self.seconds
        if total == self.total or (is_too_early and self.total == self.steps < math.inf):
            return
        used = seconds / self.seconds if math.isinf(self.total) else self.share(step)
        self.since, self.share_then, self.total = step, used if step < total else 1.0, total

    def expect(self, seconds_per_step: float) -> None:
        """Before the first step: the speed, if a trial has measured it."""
        if math.isinf(self.steps):
            self.total = max(1, round(self.seconds / seconds_per_step))

    # ---- Checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {name: None if math.isinf(value) else value for name, value in asdict(self).items()}

    def load_state_dict(self, state: dict[str, Any] | None, step: int, seconds: float) -> None:
        """Go on from a checkpoint. If that had other limits, the share is what the run has used of the new ones.

        Args:
            state: of `state_dict`; None for a checkpoint of an earlier version.
            step, seconds: the steps done, and the training time.
        """
        values: dict[str, Any] = {name: math.inf if value is None else value for name, value in (state or {}).items()}
        saved = Budget(**values)
        if state is not None and (saved.steps, saved.seconds) == (self.steps, self.seconds):
            self.__dict__.update(asdict(saved))
            return
        self.read_at, self.seconds_then = step, seconds
        used = seconds / self.seconds
        if used > step / self.steps:
            self.since, self.share_then, self.total = step, min(1.0, used), max(step + 1, round(step / used))


def with_defaults(config: Config, num_parameters: int, trained: Mapping[str, Any] | None = None) -> Config:
    """The settings with the defaults that depend on others: optimizer, learning rate, which timesteps are drawn.

    Args:
        trained: the settings of the checkpoint that the run continues from, which keeps its own, and its `init_from`.
    """
    if trained is not None:
        own = {"optimizer": FIRST_OPTIMIZER, "timestep_sampling": FIRST_TIMESTEP_SAMPLING} | dict(trained)
        names = ("optimizer", "learning_rate", "timestep_sampling", "init_from")
        kept: dict[str, Any] = {name: own.get(name) for name in names if getattr(config, name) is None}
        config = replace(config, **kept)
    is_small = num_parameters <= SMALL
    if (optimizer := config.optimizer) is None:
        optimizer = "muon" if is_small and config.init_from is None else "adamw"
    if (rate := config.learning_rate) is None:
        rate = 1e-4 if config.init_from else 2e-4 if not is_small else 2e-3 if optimizer == "muon" else 1e-3
    if (sampling := config.timestep_sampling) is None:
        # Weights say for uniform timesteps how much each counts, and the bound of learned variances is for these.
        is_plain = config.loss_weighting == "simple" and config.variance_type != "learned_range"
        sampling = "logit_normal" if config.prediction_type == "v_prediction" and is_plain else "uniform"
    return replace(config, optimizer=optimizer, learning_rate=rate, timestep_sampling=sampling)


def learning_rate(config: Config, budget: Budget, step: int) -> float:
    """The learning rate of optimizer step 1, 2, ...: linear warm-up, times the decay of `lr_scheduler`.

    The warm-up ends after `lr_warmup_steps`, or where that is None after WARMUP_STEPS or WARMUP_SHARE of the budget.

    References:
        "hold", elsewhere called warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395; with a linear decay Haegele
        et al. 2024, arXiv 2405.18392.
    """
    assert config.learning_rate is not None  # `with_defaults`
    used = budget.share(step - 1)
    if config.lr_warmup_steps is None:
        factor = min(1.0, max(step / WARMUP_STEPS, budget.share(step) / WARMUP_SHARE))
    else:
        factor = min(1.0, step / max(1, config.lr_warmup_steps))
    if config.lr_scheduler == "linear":
        factor *= 1 - used
    elif config.lr_scheduler == "cosine":
        factor *= (1 + math.cos(math.pi * used)) / 2
    elif config.lr_scheduler == "hold":
        factor *= min(1.0, (1 - used) / HOLD_DECAY)
    return config.learning_rate * factor
