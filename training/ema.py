"""EMA: the exponential moving average of the weights, with which samples are drawn (Ho et al. 2020, section 4).

    ema_n   = decay_n ema_(n-1) + (1 - decay_n) weights_n            after optimizer step n = 1, 2, ...
    decay_n = min(max_decay, 1 - (1 + (n - 1) / inv_gamma)^-power)   Crowson's warm-up, as in diffusers' EMAModel

decay_1 is 0: the EMA starts from the weights after the first step, and the initial weights do not count.

The online (non-EMA) weights and the EMA weights each occupy one block of memory, so an update is one call instead of
one per tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # floats: every tensor starts at a multiple of 256 bytes, which GPU kernels and vector code prefer


class FlatAverage:
    """A float32 average of weights that occupy one block of memory; it begins with them, in a block of its own.

    Args:
        weights: the block.
        parameters: of the model, which are in it one after the other.
        sizes: floats from the beginning of each to that of the next.
    """

    def __init__(self, weights: Tensor, parameters: Mapping[str, Tensor], sizes: list[int]) -> None:
        self._weights, self._average = weights, weights.clone()
        self._views = _views(self._average, parameters, sizes)

    @property
    def numel(self) -> int:
        return sum(view.numel() for view in self._views.values())

    def move(self, weight: float, skip: Tensor | None = None) -> None:
        """average += weight (weights - average).

        Args:
            skip: float scalar on the device, 0 or 1; with 1 the average stays as it is. The host does not wait for it.
        """
        self._average.lerp_(self._weights, weight if skip is None else weight * (1 - skip))

    def state_dict(self) -> dict[str, Tensor]:
        """The average by parameter name, as contiguous copies: for safetensors, or for the model to load."""
        return {name: view.clone(memory_format=torch.contiguous_format) for name, view in self._views.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the average. Everything is checked before anything changes.

        Raises:
            ValueError: a name is missing or unknown, or a tensor has another shape or dtype; the message names it.
        """
        missing, unknown = self._views.keys() - state.keys(), state.keys() - self._views.keys()
        if missing or unknown:
            problem = f"{min(missing)} is missing" if missing else f"{min(unknown)} is not a parameter of the model"
            raise ValueError(f"{problem}: give one tensor for each of the {len(self._views)} parameters")
        for name, view in self._views.items():
            tensor = state[name]
            if tensor.shape != view.shape or tensor.dtype != torch.float32:
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}: it must be torch.float32 {tuple(view.shape)}"
                )
        for name, view in self._views.items():
            view.copy_(state[name])


class FlatEMA(FlatAverage):
    """float32 EMA of all parameters of a model. It moves the parameters into one block of memory.

    Each parameter remains the same object with the same values, so optimizers and wrappers work as before. Create the
    EMA when the model is on its device, and before DistributedDataParallel wraps it. Buffers have no EMA: online and
    EMA weights share them. The EMA of a frozen parameter equals it.

    Args:
        model: its parameters are all float32 and on one device.
        max_decay: in [0, 1); 0.9999 averages over about the last 10,000 steps.
        inv_gamma, power: parameters of the warm-up, positive; power 3/4 reaches a decay of 0.999 after 10,000 steps.
    Raises:
        ValueError: a number out of range; a parameter of another dtype or on another device; or no parameters.
    """

    def __init__(
        self, model: nn.Module, max_decay: float = 0.9999, inv_gamma: float = 1.0, power: float = 0.75
    ) -> None:
        if not 0 <= max_decay < 1:
            raise ValueError(f"max_decay is {max_decay!r}: give a number in [0, 1)")
        for name, value in (("inv_gamma", inv_gamma), ("power", power)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}: give a positive number")
        self.max_decay, self.inv_gamma, self.power = max_decay, inv_gamma, power

        parameters = dict(model.named_parameters())
        if not parameters:
            raise ValueError(f"{type(model).__name__} has no parameters: there is nothing to average")
        device = next(iter(parameters.values())).device
        for name, parameter in parameters.items():
            if parameter.dtype != torch.float32 or parameter.device != device or device.type == "meta":
                raise ValueError(
                    f"{name} is {parameter.dtype} on {parameter.device}: give a model in torch.float32 on one device, "
                    f"such as {device}"
                )

        sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in parameters.values()]
        weights = torch.zeros(sum(sizes), device=device)
        views = _views(weights, parameters, sizes)
        with torch.no_grad():
            for name, parameter in parameters.items():
                views[name].copy_(parameter)
                parameter.data = views[name]
        super().__init__(weights, parameters, sizes)
        self._parameters, self._sizes = parameters, sizes
        self._swapped = False
        # The dict that holds each parameter, its key there, and its address. The dict is read at each update, because
        # `assign=True` puts another object into it, and directly, because getattr of a diffusers model is slow.
        self._addresses = [
            (model.get_submodule(path)._parameters, key, views[name].data_ptr())
            for name in parameters
            for path, _, key in [name.rpartition(".")]
        ]

    def decay_at(self, step: int) -> float:
        """min(max_decay, 1 - (1 + (step - 1) / inv_gamma)^-power), for the update after optimizer step 1, 2, ...

        Source: diffusers.training_utils.EMAModel.get_decay with use_ema_warmup=True, after K. Crowson's notes there.
        """
        if step < 1:
            raise ValueError(f"step is {step!r}: optimizer steps are counted from 1")
        return min(self.max_decay, 1 - (1 + (step - 1) / self.inv_gamma) ** -self.power)

    def update(self, step: int, skip: Tensor | None = None) -> None:
        """ema = decay ema + (1 - decay) weights, after optimizer step `step` = 1, 2, ...

        Args:
            skip: as for `move`.
        Raises:
            ValueError: step is less than 1.
            RuntimeError: the parameters are no longer in their block of memory (the model was moved to another device
                or dtype, or loaded with `assign=True`), or the EMA weights are applied.
        """
        self._check_in_place()
        self.move(1 - self.decay_at(step), skip)

    def another_average(self) -> FlatAverage:
        """One more average of the same weights. `update` checks for it, too, that they are still in their block."""
        return FlatAverage(self._weights, self._parameters, self._sizes)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the model has the EMA weights; afterwards it has the online weights again, bit for bit.

        Enter it between optimizer steps and outside of autocast, which caches cast copies of the weights.

        Raises:
            RuntimeError: as in `update`.
        """
        self._check_in_place()
        online = self._weights.clone()
        try:
            self._swapped = True
            self._weights.copy_(self._average)
            yield
        finally:
            self._weights.copy_(online)
            self._swapped = False

    def _check_in_place(self) -> None:
        if self._swapped:
            raise RuntimeError("the EMA weights are applied to the model: leave `applied()` first")
        if any((p := owner.get(key)) is None or p.data_ptr() != address for owner, key, address in self._addresses):
            raise RuntimeError(
                "the model's parameters are no longer where FlatEMA put them: move the model to its device and dtype "
                "before creating FlatEMA, and load weights without assign=True"
            )


def _views(flat: Tensor, parameters: Mapping[str, Tensor], sizes: list[int]) -> dict[str, Tensor]:
    """For each parameter a tensor of its shape and strides, one after the other in the memory of `flat`.

    Each has its own storage object over a part of that memory: accelerate's `save_model` and `save_state` treat tensors
    that share a storage object as copies, and write only the first.
    """
    storage, start, views = flat.untyped_storage(), 0, {}
    for (name, like), size in zip(parameters.items(), sizes):
        own = storage[start * flat.itemsize : (start + like.numel()) * flat.itemsize]
        # The strides of empty_like are those of `like` (channels_last too), without gaps or overlaps.
        views[name] = torch.empty(0, device=flat.device).set_(own, 0, like.shape, torch.empty_like(like).stride())
        start += size
    return views
