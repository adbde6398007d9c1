"""TRANSFER: copies between the host and an accelerator for which the host does not wait."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x of the host on `device`. CUDA copies from pinned memory only while the host goes on."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


class HostCopy:
    """The values of a small tensor, for the host to read later.

    CUDA copies them at once, to pinned memory, behind the work that computes them; `read` waits for that work only, not
    for what was started since. Elsewhere the tensor is read when it is asked for, so leave it as it is until then.
    """

    def __init__(self, x: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._x = x
        if x.device.type == "cuda":
            self._x = x.to("cpu", non_blocking=True)  # PyTorch pins the memory of such a copy
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(x.device))

    def read(self) -> list[float]:
        """The values, as soon as they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._x.tolist()
        return values
