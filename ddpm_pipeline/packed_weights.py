"""PACKED WEIGHTS: those of convolutions in the order in which oneDNN reads them, for one sampling run on a CPU.

torch's convolution brings its weights into that order each time, which for one image and the network of Ho et al. is a
quarter of the time, and for four images a tenth. While sampling the weights stay, so they are packed once. In training
they change with each step.
"""

import contextlib
import functools
import platform
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .group_norm import holds_numbers, is_computed_now


class FastConv2d(nn.Conv2d):
    """A convolution that takes packed weights where a sampling run has some."""

    def forward(self, x: Tensor) -> Tensor:
        packed = None if torch.compiler.is_compiling() else _IN_USE.get()
        return super().forward(x) if packed is None else packed.conv2d(x, self)


class PackedWeights:
    """Those of one sampling run. A layer's are packed when it is first called, and anew if it has others since.

    That is seen by the tensor, its version and its address. What changes numbers behind torch's back, such as
    `weight.data.mul_(2)`, changes none of them: call `forget` after code that may do so.
    """

    def __init__(self) -> None:
        self._of: dict[nn.Module, _Packed] = {}

    def forget(self) -> None:
        """Pack all weights anew when they are next needed."""
        self._of.clear()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """A context in which the layers that this thread calls compute with them."""
        token = _IN_USE.set(self)
        try:
            yield
        finally:
            _IN_USE.reset(token)

    def conv2d(self, x: Tensor, layer: FastConv2d) -> Tensor:
        """The output of the layer for x, (B, C, H, W), with packed weights if there can be some."""
        weight, bias, found = layer.weight, layer.bias, self._of.get(layer)
        is_plain = x.device.type == "cpu" and x.ndim == 4 and x.shape[1] == layer.in_channels and x.numel() > 0
        if torch.is_grad_enabled() or not is_plain or not is_computed_now(x) or not holds_numbers(weight):
            return nn.Conv2d.forward(layer, x)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if found is None or found.weight is not weight or found.state != _state(weight, dtype):
            found = self._of[layer] = _Packed(weight, _state(weight, dtype), _pack(layer, dtype, x.shape))
        if found.packed is None:
            return nn.Conv2d.forward(layer, x)
        if bias is not None:
            bias = bias.to(dtype)
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x.to(dtype), found.packed, bias, layer.padding, layer.stride, layer.dilation, layer.groups, "none", [], ""
        )
        return y


class _Packed(NamedTuple):
    weight: Tensor  # what was packed
    state: Any  # of it then
    packed: Tensor | None  # None: it cannot be


def _state(weight: Tensor, dtype: torch.dtype) -> Any:
    """What differs after a change of the weight, in place or of its memory, or of the dtype to compute in."""
    return weight.is_inference() or weight._version, weight.data_ptr(), dtype


_IN_USE: ContextVar[PackedWeights | None] = ContextVar("packed weights", default=None)


def _pack(layer: FastConv2d, dtype: torch.dtype, shape: Sequence[int]) -> Tensor | None:
    """The weights of a plain convolution on the CPU for images of this dtype and shape, (B, C, H, W); else None."""
    parameters = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    can_pack = (
        layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and not has_own_forward(layer)
        and all(tensor.device.type == "cpu" and holds_numbers(tensor) for tensor in parameters)
        and not layer.weight.is_inference()  # whose changes are not counted
        and (torch.is_autocast_enabled("cpu") or all(tensor.dtype == dtype for tensor in parameters))
        and torch.backends.mkldnn.enabled
        and dtype in _dtypes()
    )
    if not can_pack:
        return None
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # Any: its annotation lacks the last argument
    packed: Tensor = reorder(
        layer.weight.to(dtype).to_mkldnn(),
        list(layer.padding),
        list(layer.stride),
        list(layer.dilation),
        layer.groups,
        list(shape),
    )
    return packed


def has_own_forward(layer: nn.Module) -> bool:
    """Whether accelerate has replaced its `forward`, as where weights are elsewhere between the calls."""
    return "forward" in vars(layer)


@functools.cache
def _dtypes() -> tuple[torch.dtype, ...]:
    """In which packed weights have been measured to be faster, and to give the same."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return ()
    has_bf16: Any = torch.ops.mkldnn._is_mkldnn_bf16_supported
    return (torch.float32, torch.bfloat16) if has_bf16() else (torch.float32,)
