"""PRECISION: the dtype to compute in, and float64 on the host where a device has none, as Apple's GPUs."""

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_float64(x: Tensor) -> Tensor:
    """x in float64, on its device, or on the host if the device has no float64."""
    try:
        return x.double()
    except TypeError:  # what PyTorch raises for Apple's GPUs
        return x.cpu().double()


def take_float64(table: Tensor, index: Tensor) -> Tensor:
    """table[index] of a float64 table on the host: on the device of index, or on the host as in `as_float64`."""
    try:
        return table.to(index.device)[index]
    except TypeError:
        return table[index.cpu()]
