"""STEP: clipping, finite check and the optimizer's step. The device decides; the host reads it later.

    norm = |gradients|, of all parameters together
    skip = the loss or the norm is non-finite, on any rank
    AdamW or Muon with gradients / max(1, (norm + 1e-6) / max_grad_norm), unless skip

No host waits for this. torch's fused AdamW takes the divisor and `skip` as tensors, as it does from GradScaler: with
`found_inf` = 1 it leaves weights, moments and step counters alone. So does our Muon. The host reads `PendingStep.flags`
one step later, while the device computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ddpm_pipeline.transfer import HostCopy, to_device
from training.muon import Muon

if TYPE_CHECKING:
    from training.config import Config
    from training.run.failures import ForwardPass
    from training.run.runtime import Runtime

FUSED = ("cpu", "cuda")  # devices whose fused AdamW is known to honour grad_scale and found_inf


def make_optimizer(
    config: Config, unet: torch.nn.Module, matmul_dtype: torch.dtype = torch.float32
) -> torch.optim.AdamW:
    """AdamW, or Muon, which is AdamW for all but the weight matrices.

    Args:
        matmul_dtype: that Muon multiplies matrices in.
    """
    settings: dict[str, Any] = {
        "lr": config.learning_rate or 0.0,  # each step sets its own
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
        "fused": next(unet.parameters()).device.type in FUSED,
    }
    if config.optimizer == "muon":
        return Muon(unet, matmul_dtype, **settings)
    return torch.optim.AdamW(unet.parameters(), **settings)


class Outcome(NamedTuple):
    """What the host learns about a step, the same on all ranks."""

    is_fault: bool  # non-finite, and not because of the loss scale of fp16
    is_skipped: bool  # weights and EMA did not move
    stop: bool  # some rank was asked to stop


@dataclass(frozen=True)
class PendingStep:
    """A step that the host has handed to the device. Its tensors are scalars on the device."""

    step: int  # counted from 1
    learning_rate: float
    passes: list[ForwardPass]  # of this rank
    loss: Tensor  # of this rank
    norm: Tensor  # of the gradients before clipping
    skip: Tensor  # 0 or 1
    asked_to_stop: bool  # this rank
    flags: HostCopy

    def outcome(self) -> Outcome:
        """Wait for the device to finish this step, but not for what was handed to it since."""
        is_fault, is_skipped, *asked = map(bool, self.flags.read())
        return Outcome(is_fault, is_skipped, *(asked or [self.asked_to_stop]))


class Updater:
    """Takes optimizer steps with clipped gradients.

    Args:
        optimizer: of `make_optimizer`, without the wrapper of accelerate, whose `step` waits for the device in fp16.
        max_grad_norm: largest L2 norm of the gradient of all parameters together; positive.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_grad_norm: float, runtime: Runtime) -> None:
        self._optimizer: Any = optimizer  # Any: its class has no `grad_scale` and `found_inf`
        self._max_grad_norm, self._runtime = max_grad_norm, runtime
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step(
        self, step: int, learning_rate: float, loss: Tensor, passes: list[ForwardPass], asked_to_stop: bool
    ) -> PendingStep:
        """Move the weights by their gradients, and drop the gradients.

        Args:
            step: of this update, 1, 2, ...
            loss, passes, asked_to_stop: see `PendingStep`.
        """
        optimizer, scaler = self._optimizer, self._runtime.accelerator.scaler
        for group in optimizer.param_groups:
            group["lr"] = learning_rate  # the fused kernel takes a number as its argument: nothing is copied
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])

        # ---- Check on all ranks, before the weights change
        # With fp16 a non-finite norm is no fault: the loss scaler lowers its scale.
        bad_loss, bad_norm = ~loss.isfinite(), ~norm.isfinite()
        flags = torch.stack([bad_loss | bad_norm if scaler is None else bad_loss, bad_loss | bad_norm]).float()
        if self._runtime.world_size > 1:
            of_rank = to_device(torch.tensor([asked_to_stop], dtype=torch.float32), flags.device)
            flags = self._runtime.mean(torch.cat([flags, of_rank])).sign()
        skip = flags[1]

        # ---- Update
        if optimizer.defaults["fused"]:
            optimizer.grad_scale = ((norm + 1e-6) / self._max_grad_norm).clamp(min=1)
            optimizer.found_inf = skip
            optimizer.step()
        elif not skip.item():  # on other devices the host waits
            clip_grads_with_norm_(self._parameters, self._max_grad_norm, norm)
            optimizer.step()
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad()
        return PendingStep(step, learning_rate, passes, loss, norm, skip, asked_to_stop, HostCopy(flags))
