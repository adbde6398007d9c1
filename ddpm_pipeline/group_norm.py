"""GROUP NORM: with the SiLU and the dropout after it, in one pass over channels-last images on a CPU.

Convolutions on a CPU are fastest on channels-last images, but there torch's GroupNorm is slow, its backward pass five
times as slow as on contiguous ones. So this one operation has loops of its own: group_norm.c, see kernels.py. Where
they cannot be had, and for all other tensors, torch computes the same, up to rounding and to the random numbers of
dropout. Those of torch take longer than all the rest of this layer; these are made where they are used, and once more
in the backward pass.
"""

import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

MOST_CHANNELS = 4096  # the kernel's rows are on the stack of a thread, which may be small


class Options(NamedTuple):
    """Of one pass; the same options give the same result."""

    groups: int
    eps: float
    silu: bool
    dropout: float  # probability in [0, 1)
    key: int  # of the random numbers of dropout, see rng.py


def group_norm(x: Tensor, norm: nn.GroupNorm, *, silu: bool, dropout: float = 0) -> Tensor:
    """GroupNorm (Wu and He 2018), then SiLU if `silu`: mean and variance are float32, whatever the dtype of x.

    Args:
        x: (B, C, H, W).
        norm: the layer with weight and bias.
        dropout: probability in [0, 1) that a value is dropped after that; the others are divided by 1 - dropout. What
            is dropped depends on torch's global generator.
    Returns:
        (B, C, H, W) in the dtype of x.
    """
    weight, bias = norm.weight, norm.bias
    if not has_kernel(x) or not _fit(x, norm):
        y = _by_torch(x, weight, bias, Options(norm.num_groups, norm.eps, silu, 0, 0))
        return functional.dropout(y, dropout) if dropout else y
    key = int(torch.randint(2**63 - 1, (), device="cpu")) if dropout else 0
    arguments = (x, weight.float().contiguous(), bias.float().contiguous())
    options = Options(norm.num_groups, norm.eps, silu, dropout, key)
    y = _GroupNorm.apply(*arguments, options) if torch.is_grad_enabled() else _in_one_pass(*arguments, options)[0]
    return y


def has_kernel(x: Tensor) -> bool:
    """Whether GroupNorm of these images is a single pass here."""
    return (
        x.device.type == "cpu"
        and is_computed_now(x)
        and x.dtype in (torch.bfloat16, torch.float32)
        and x.ndim == 4
        and 0 < x.shape[1] <= MOST_CHANNELS
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and kernel() is not None
    )


def _fit(x: Tensor, norm: nn.GroupNorm) -> bool:
    """Whether the layer is one for such images, with weights on the CPU; the kernel would read beside wrong ones."""
    channels, weight, bias = x.shape[1], norm.weight, norm.bias
    return (
        weight is not None
        and bias is not None
        and weight.device.type == bias.device.type == "cpu"
        and weight.shape == bias.shape == (channels,)
        and channels % norm.num_groups == 0
        and holds_numbers(weight)
        and holds_numbers(bias)
    )


def is_computed_now(x: Tensor) -> bool:
    """Whether x holds numbers and nobody records the operations: not in torch.compile, torch.jit.trace, torch.func."""
    return (
        holds_numbers(x)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def holds_numbers(x: Tensor) -> bool:
    """Whether x is a plain tensor, with its numbers in its memory as they are."""
    return type(x) in (Tensor, nn.Parameter) and not x.is_neg() and not x._is_zerotensor()


@functools.cache  # it is asked for in each layer of each step
def kernel() -> Any:
    """The functions of group_norm.c and their `Shape`, or None where there are none: see kernels.py."""
    if not __name__.endswith(".group_norm"):  # remote code, which is one file
        return None
    return importlib.import_module(".kernels", __package__).group_norm_kernel()


def _by_torch(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Options) -> Tensor:
    """With the random numbers of the kernel if there is dropout."""
    # Of channels-last images torch.func refuses GroupNorm, and its backward pass fails if they need no gradient.
    if not is_computed_now(x) or (torch.is_grad_enabled() and not x.requires_grad):
        x = x.contiguous()
    if x.device.type == "cuda" and torch.is_autocast_enabled("cuda") and x.dtype != torch.float32:
        # Autocast would read and write the images as float32; inside, torch sums in float32 anyway.
        with torch.autocast("cuda", enabled=False):
            weight, bias = (None if parameter is None else parameter.to(x.dtype) for parameter in (weight, bias))
            y = functional.group_norm(x, options.groups, weight, bias, options.eps)
    else:
        y = functional.group_norm(x, options.groups, weight, bias, options.eps)
    if options.silu:
        y = functional.silu(y)
    return y * _factors(x, options).to(y.dtype) if options.dropout else y


def _factors(x: Tensor, options: Options) -> Tensor:
    """What dropout multiplies with: what the kernel makes of a constant 1."""
    zero = torch.zeros_like(x, dtype=torch.float32, memory_format=torch.channels_last)
    one = zero.new_ones(x.shape[1])
    return _in_one_pass(zero, 0 * one, one, options._replace(silu=False))[0]


def _in_one_pass(x: Tensor, weight: Tensor, bias: Tensor, options: Options) -> tuple[Tensor, Tensor, Any]:
    """y; mean and reciprocal standard deviation of each group, (2, B, groups); the kernel's `Shape`."""
    images, channels, height, width = x.shape
    library = kernel()
    groups, eps, silu, dropout, key = options
    kept = 1 / (1 - dropout) if dropout else 0
    shape = library.Shape(
        images, height * width, channels, groups, eps, silu, x.dtype == torch.bfloat16, kept, int(dropout * 2**32), key
    )
    y, moments = torch.empty_like(x), x.new_empty(2, images, groups, dtype=torch.float32)
    sums = moments.new_empty(images, library.group_norm_segments(height * width), 2, channels)
    library.group_norm_forward(shape, *map(Tensor.data_ptr, (x, y, weight, bias, *moments, sums)))
    return y, moments, shape


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, options: Options) -> Tensor:
        y, moments, ctx.shape = _in_one_pass(x, weight, bias, options)
        ctx.save_for_backward(x, weight, bias, moments)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, moments = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the gradients is wanted, which the kernel has not
            # Views, for x may depend on the same weights, and that way through the graph is not this layer's.
            x, weight, bias = (tensor.view_as(tensor) for tensor in (x, weight, bias))
            y = _by_torch(x, weight, bias, ctx.options)
            return *gradients_with_graph(y, (x, weight, bias), dy), None
        shape, library = ctx.shape, kernel()
        if dy._is_zerotensor():
            dy = torch.zeros_like(x)
        dy = dy.to(x.dtype).resolve_neg().contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        dweight, dbias = moments.new_empty(2, shape.images, shape.channels)
        slope, offset = torch.empty_like(moments)
        sums = moments.new_empty(shape.images, library.group_norm_segments(shape.pixels), 2, shape.channels)
        tensors = (dy, x, dx, weight, bias, *moments, dweight, dbias, slope, offset, sums)
        library.group_norm_backward(shape, *map(Tensor.data_ptr, tensors))
        return dx, dweight.sum(0), dbias.sum(0), None


def gradients_with_graph(y: Tensor, inputs: Sequence[Tensor], dy: Tensor) -> list[Tensor | None]:
    """The gradients of those inputs that need one, which can be differentiated in turn."""
    needed = [tensor for tensor in inputs if tensor.requires_grad]
    gradients = iter(torch.autograd.grad(y, needed, dy, create_graph=True))
    return [next(gradients) if tensor.requires_grad else None for tensor in inputs]
