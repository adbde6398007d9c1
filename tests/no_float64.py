"""A pretend device without float64, as Apple's GPUs are: its tensors are computed on the CPU, and refuse that dtype.

What is an error on the real device is one here: a result in float64, a conversion to numpy, and an operation that mixes
its tensors with those of the CPU, other than numbers and indices.
"""

from typing import ClassVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("mps")
MIXING = ("copy_", "__getitem__", "__setitem__", "__set__", "to", "type_as", "_has_compatible_shallow_copy_type")


class OnDevice(torch.Tensor):
    """A tensor of the pretend device."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})


class PretendDevice(TorchFunctionMode):
    """Within this context, tensors can be created on DEVICE and moved there. `names` are the functions called there."""

    names: ClassVar[set[str]] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})


def call(function, args, kwargs):
    name = getattr(function, "__name__", str(function))
    if function is torch.device or name == "_parse_to":  # of Module.to
        return function(*args, **kwargs)
    if name == "__deepcopy__" and isinstance(args[0], OnDevice):
        copy = args[0].detach().clone().requires_grad_(args[0].requires_grad)
        return torch.nn.Parameter(copy, copy.requires_grad) if isinstance(args[0], torch.nn.Parameter) else copy
    with torch._C.DisableTorchFunctionSubclass():
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        here = [isinstance(tensor, OnDevice) for tensor in tensors]
        if name == "__get__" and function.__self__ is torch.Tensor.device and here == [True]:
            return DEVICE
        if name in ("numpy", "__array__") and any(here):
            raise TypeError("can't convert mps tensor to numpy: use Tensor.cpu() first")
        target = target_device(name, args, kwargs)
        result_here = any(here) if target is None else target == DEVICE
        if any(here) and name not in MIXING:
            PretendDevice.names.add(name)
            for tensor, is_here in zip(tensors, here):
                if not is_here and tensor.ndim:
                    raise RuntimeError(f"{name}: tensors on mps and on the CPU, of shape {tuple(tensor.shape)}")
        args, kwargs = tree_map(lambda leaf: torch.device("cpu") if is_device(leaf) else leaf, (args, kwargs))
        result = function(*args, **kwargs)
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
            return result  # a torch.Size has to stay one
        moved = target is not None and bool(tensors)
        return tree_map(lambda leaf: placed(leaf, result_here, moved), result)


def is_device(value):
    return (
        isinstance(value, torch.device) or value in ("mps", "cpu") if isinstance(value, (str, torch.device)) else False
    )


def target_device(name, args, kwargs):
    """The device that a call asks for, or None."""
    if name == "cpu":
        return torch.device("cpu")
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    if name in ("to", "type_as"):
        for value in args[1:]:
            if is_device(value):
                return torch.device(value)
            if isinstance(value, torch.Tensor):
                return DEVICE if isinstance(value, OnDevice) else torch.device("cpu")
    return None


def placed(leaf, on_device, moved):
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if not on_device:
        return leaf.as_subclass(torch.Tensor).clone() if isinstance(leaf, OnDevice) else leaf
    if leaf.dtype in (torch.float64, torch.complex128):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    if isinstance(leaf, OnDevice):
        return leaf
    return (leaf.clone() if moved else leaf).as_subclass(OnDevice)
