"""The moving average of the weights, which is what samples are drawn with (Ho et al. 2020, section 4).

    average_n = decay_n average_(n-1) + (1 - decay_n) weights_n        after optimizer step n = 1, 2, ...
    decay_n   = min(max_decay, 1 - (1 + (n - 1) / inv_gamma)^-power)   Crowson's warm-up, as in diffusers' EMAModel

decay_1 is 0: the average begins at the weights after the first step, and what was there before does not count.

Weights and average lie each in one piece of memory, so that an update is one call instead of one per tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # floats: every tensor begins at a multiple of 256 bytes, as GPU kernels and vector code like it


class FlatEMA:
    """float32 moving average of all parameters of a model; moves these into one piece of memory.

    Each parameter stays the object it is, with the same values, so optimizers and wrappers made before or after see no
    difference. Do it after the model has got its device, and before DistributedDataParallel wraps it. Buffers are left
    alone: they are not learned, and trained and averaged weights share them. A frozen parameter is its own average.

    Args:
        model: all its parameters float32 and on one device.
        max_decay: in [0, 1); 0.9999 averages over about the last 10,000 steps.
        inv_gamma, power: of the warm-up, positive; power 3/4 reaches a decay of 0.999 after 10,000 steps.
    Raises:
        ValueError: a number out of range; or a parameter of another dtype, on another device, or none at all.
    """

    def __init__(
        self, model: nn.Module, max_decay: float = 0.9999, inv_gamma: float = 1.0, power: float = 0.75
    ) -> None:
        if not 0 <= max_decay < 1:
            raise ValueError(f"max_decay is {max_decay!r}: give at least 0 and less than 1")
        for what, value in (("inv_gamma", inv_gamma), ("power", power)):
            if not 0 < value < math.inf:
                raise ValueError(f"{what} is {value!r}: give a positive number")
        self.max_decay, self.inv_gamma, self.power = max_decay, inv_gamma, power

        named = dict(model.named_parameters())
        if not named:
            raise ValueError(f"{type(model).__name__} has no parameters: there is nothing to average")
        device = next(iter(named.values())).device
        for name, parameter in named.items():
            if parameter.dtype != torch.float32 or parameter.device != device or device.type == "meta":
                found = f"{parameter.dtype} on {parameter.device}"
                raise ValueError(f"{name} is {found}: give a model in torch.float32 on one device, such as {device}")

        sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in named.values()]
        self._weights = torch.zeros(sum(sizes), device=device)
        views = _views(self._weights, named, sizes)
        with torch.no_grad():
            for name, parameter in named.items():
                views[name].copy_(parameter)
                parameter.data = views[name]
        self._average = self._weights.clone()
        self._named_average = _views(self._average, named, sizes)
        self._swapped = False
        # In which dict each parameter hangs, under which key, and where in memory it has to be. Looked up at each
        # update, since `assign=True` hangs up another object; in the dict, since a diffusers model's getattr is slow.
        self._places = [
            (model.get_submodule(path)._parameters, key, views[name].data_ptr())
            for name in named
            for path, _, key in [name.rpartition(".")]
        ]

    def decay_at(self, step: int) -> float:
        """min(max_decay, 1 - (1 + (step - 1) / inv_gamma)^-power), for the update after optimizer step 1, 2, ...

        Source: diffusers.training_utils.EMAModel.get_decay with use_ema_warmup=True, after K. Crowson's notes there.
        """
        if step < 1:
            raise ValueError(f"step is {step!r}: optimizer steps are counted from 1")
        return min(self.max_decay, 1 - (1 + (step - 1) / self.inv_gamma) ** -self.power)

    def update(self, step: int) -> None:
        """average = decay average + (1 - decay) weights, after optimizer step `step` = 1, 2, ...

        Raises:
            ValueError: step is less than 1.
            RuntimeError: the model has left the memory it was given (moved to another device or dtype, or loaded with
                `assign=True`), or the average is in the model just now.
        """
        self._check_in_place()
        self._average.lerp_(self._weights, 1 - self.decay_at(step))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the model has the averaged weights; afterwards the trained ones, bit for bit.

        Enter it between training steps and outside of autocast, which keeps cast copies of the weights.

        Raises:
            RuntimeError: as in `update`.
        """
        self._check_in_place()
        trained = self._weights.clone()
        try:
            self._swapped = True
            self._weights.copy_(self._average)
            yield
        finally:
            self._weights.copy_(trained)
            self._swapped = False

    def state_dict(self) -> dict[str, Tensor]:
        """The average as contiguous copies under the parameters' names: for safetensors, or for the model to load."""
        return {
            name: average.clone(memory_format=torch.contiguous_format) for name, average in self._named_average.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the average. All is checked before anything changes.

        Raises:
            ValueError: a name is missing or unknown, or a tensor has another shape or is not float32; it is named.
        """
        missing, unknown = self._named_average.keys() - state.keys(), state.keys() - self._named_average.keys()
        if missing or unknown:
            wrong = f"{min(missing)} is missing" if missing else f"{min(unknown)} is not a parameter of the model"
            raise ValueError(f"{wrong}: give one tensor for each of its {len(self._named_average)} parameters")
        for name, average in self._named_average.items():
            if state[name].shape != average.shape or state[name].dtype != torch.float32:
                found = f"{state[name].dtype} {tuple(state[name].shape)}"
                raise ValueError(f"{name} is {found}: it must be torch.float32 {tuple(average.shape)}")
        for name, average in self._named_average.items():
            average.copy_(state[name])

    def _check_in_place(self) -> None:
        if self._swapped:
            raise RuntimeError("the averaged weights are in the model: leave `applied()` first")
        if any((p := owner.get(key)) is None or p.data_ptr() != address for owner, key, address in self._places):
            raise RuntimeError(
                "the model's parameters are no longer where FlatEMA put them: move the model to its device and dtype "
                "first, and load weights without assign=True"
            )


def _views(flat: Tensor, named: Mapping[str, Tensor], sizes: list[int]) -> dict[str, Tensor]:
    """One tensor for each of `named`, with its shape and strides, one after the other in the memory of `flat`.

    Each has a storage of its own, though all of these lie in the same memory: tensors that share a storage count as
    copies of one another in accelerate's `save_model` and `save_state`, which then write the first and drop the rest.
    """
    storage, begin, views = flat.untyped_storage(), 0, {}
    for (name, like), size in zip(named.items(), sizes):
        own = storage[begin * flat.itemsize : (begin + like.numel()) * flat.itemsize]
        # empty_like has the strides of `like` (channels_last, say), without gaps or overlaps
        views[name] = torch.empty(0, device=flat.device).set_(own, 0, like.shape, torch.empty_like(like).stride())
        begin += size
    return views
