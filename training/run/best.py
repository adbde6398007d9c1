"""BEST: the EMA weights of the best validation of a run, and a warning when the held-out loss rises.

Noise and timesteps of a validation are fixed, so the losses of one held-out image at two validations are a pair: of
their difference, which image it is and how much noise it had cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from training.data.split import HELD_OUT_EVERY
from training.run.kept import KeptWeights

if TYPE_CHECKING:
    from training.config import Config
    from training.ema import FlatEMA

# The measures that weights can be kept by, and the settings with which two of their values are comparable.
MEASURED_WITH = {
    "validation_loss": ("validation_split", "num_validation_images"),
    "kernel_distance": ("validation_split", "validation_samples", "extractor", "ddpm_num_inference_steps"),
}
RISES = 3  # validations in a row, before it is said that the loss rises


@dataclass
class LossRise:
    """Whether the loss of the held-out images has risen since its lowest mean.

    Args:
        step, losses: of the validation with the lowest mean; one loss for each image.
        rises: for how many validations in a row the loss has been higher than that, by 2 standard errors of the mean
            difference over the images.
        warned: whether that was said. It is said once, also in a run that is resumed.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    rises: int = 0
    warned: bool = False

    def see(self, step: int, losses: Sequence[float]) -> str | None:
        """Take note of a validation. Returns a sentence if the loss has risen long enough, the first time."""
        mean = float(np.mean(losses))
        if not math.isfinite(mean):
            return None
        if len(losses) != len(self.losses) or mean < np.mean(self.losses):
            self.step, self.losses, self.rises = step, list(losses), 0
            return None
        rise = np.subtract(losses, self.losses)
        is_rise = len(rise) > 1 and rise.mean() > 2 * rise.std(ddof=1) / math.sqrt(len(rise))
        self.rises = self.rises + 1 if is_rise else 0
        if self.warned or self.rises < RISES:
            return None
        self.warned = True
        return (
            f"the held-out loss has risen since step {self.step} ({np.mean(self.losses):.4f} -> {mean:.4f}): the "
            "network learns the training images by heart"
        )


class Best(KeptWeights):
    """The EMA weights with the lowest measure of all validations so far, the same on all ranks.

    Args:
        keep_best: validation_loss or kernel_distance; None: no weights are kept.
        tell: prints a line.
    Attributes:
        found: measure, step and value of these weights, for the run record; None: there are none.
    """

    def __init__(self, keep_best: str | None, ema: FlatEMA, tell: Callable[[str], object]) -> None:
        super().__init__(ema)
        self._keep_best, self._tell = keep_best, tell
        self.found: dict[str, Any] | None = None
        self._rise = LossRise()

    def see(self, step: int, metrics: Mapping[str, float], losses: Sequence[float]) -> None:
        """Take note of a validation of the EMA weights: keep them if they are the best, warn if the loss rises.

        Args:
            metrics: a kernel distance that is not defined is missing.
            losses: of each held-out image.
        """
        if self._keep_best is not None:
            value = metrics.get(self._keep_best, math.nan)
            if value < (math.inf if self.found is None else self.found["value"]):
                self.found = {"measure": self._keep_best, "step": step, "value": value}
                self.keep(step)
        if risen := self._rise.see(step, losses):
            advice = "Give it more images or flips, --dropout 0.1, less time, or keep the model of step "
            advice += f"{self._rise.step} with --keep_best validation_loss"
            if self.found is not None:
                advice = f"The model of step {self.found['step']} is kept. A better one needs more images, flips or "
                advice += "--dropout 0.1"
            self._tell(f"WARNING: {risen}. {advice}")

    def state_dict(self) -> dict[str, Any]:
        """Of the warning, as JSON values; `found` is in the run record, and the weights are in a file of their own."""
        return asdict(self._rise)

    def load_state(self, manifest: Mapping[str, Any], weights: dict[str, Tensor] | None, config: Config) -> None:
        """Continue from a checkpoint, after its EMA weights are loaded.

        What was measured with other settings cannot be compared: it is forgotten, and said.

        Args:
            weights: what `weights_before` was.
        """

        now = config.as_dict()
        before = now | manifest["config"]  # older checkpoints lack some settings

        def changed(*names: str) -> str:
            return ", ".join(f"{name} {before[name]} -> {now[name]}" for name in names if before[name] != now[name])

        found = manifest.get("best")
        if found is not None:
            if changes := changed("keep_best", *MEASURED_WITH[found["measure"]]):
                self._tell(f"WARNING: {changes}: the best model so far, of step {found['step']}, is not kept")
            else:
                self.found = found
                self.keep(found["step"], weights)
        if "held_out_loss" in manifest:
            rise = LossRise(**manifest["held_out_loss"])
            self._rise = LossRise(warned=rise.warned) if changed(*MEASURED_WITH["validation_loss"]) else rise


def check_held_out(keep_best: str | None, number: int) -> None:
    """Raise ValueError if there are too few held-out images for a measure."""
    least = {None: 0, "validation_loss": 1, "kernel_distance": 2}[keep_best]
    if number < least:
        raise ValueError(
            f"keep_best is {keep_best!r}, but {number} images are held out, and it needs at least {least}: give more "
            f"images (one in {HELD_OUT_EVERY} is held out), a data set with a validation split, or leave keep_best out"
        )
