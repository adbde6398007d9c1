"""KEPT: EMA weights of an earlier step of a run, in memory and in its checkpoints; the guide is one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

    from training.ema import FlatEMA


class KeptWeights:
    """The EMA weights of one step of a run, the same on all ranks, in main memory.

    Attributes:
        step: of these weights; None: there are none.
    """

    def __init__(self, ema: FlatEMA) -> None:
        self._ema = ema
        self.step: int | None = None
        self._weights: dict[str, Tensor] = {}

    def keep(self, step: int, weights: Mapping[str, Tensor] | None = None) -> None:
        """Keep the EMA weights as they are now, after this step, or the given ones of that step."""
        weights = self._ema.state_dict() if weights is None else weights
        self.step, self._weights = step, {name: tensor.cpu() for name, tensor in weights.items()}

    def weights_before(self, step: int) -> dict[str, Tensor] | None:
        """The kept weights; None if there are none, or they are the EMA weights of this step."""
        return None if self.step in (None, step) else self._weights

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the EMA has the kept weights, if there are any."""
        if self.step is None:
            yield
            return
        now = self._ema.state_dict()
        self._ema.load_state_dict(self._weights)
        try:
            yield
        finally:
            self._ema.load_state_dict(now)


class GuideSnapshot(KeptWeights):
    """The EMA weights at an early share of a run: the guide of autoguidance.

    Args:
        share: of the budget of the run after which they are kept; None: none are.
        tell: prints a line.
    """

    def __init__(self, share: float | None, ema: FlatEMA, tell: Callable[[str], object]) -> None:
        super().__init__(ema)
        self._share, self._tell = share, tell

    def see(self, step: int, share: float) -> None:
        """Take note of a step, after which this share of the budget is used, in [0, 1]."""
        if self._share is not None and self.step is None and share >= self._share:
            self.keep(step)

    def is_before(self, step: int) -> bool:
        """Whether there is a guide for a model with the weights of a step."""
        return self.step is not None and self.step < step

    def network(self, unet: UNet2DModel, step: int) -> UNet2DModel | None:
        """The guide of a model with the weights of a step; None if no earlier ones are kept.

        Args:
            unet: the network of the run.
        """
        import torch

        if not self.is_before(step):
            return None
        with torch.device("meta"):  # without initial weights
            guide: Any = type(unet).from_config(unet.config)  # Any: diffusers may return a tuple
        guide.load_state_dict({**unet.state_dict(), **self._weights}, assign=True)
        network: UNet2DModel = guide.eval()
        return network

    def load_state(self, manifest: Mapping[str, Any], weights: dict[str, Tensor] | None, share: float) -> None:
        """Continue from a checkpoint, after its EMA weights are loaded.

        Args:
            weights: what `weights_before` was.
            share: of the budget that is used at its step.
        """
        step, before = manifest.get("guide_step"), manifest["config"].get("guide_snapshot")
        if self._share is None or step is None:
            if self._share is not None and share >= self._share:
                self._tell(f"WARNING: guide_snapshot is {self._share:g}, but {share:.0%} of the run are over, and its "
                           "checkpoint has no guide: none is kept")  # fmt: skip
                self._share = None
            return
        self.keep(step, weights)
        if before != self._share:
            self._tell(f"WARNING: guide_snapshot {before} -> {self._share:g}: the guide of step {step} stays")
