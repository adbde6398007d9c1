"""FAST U-NET: the blocks of diffusers' UNet2DModel computed with fewer passes over memory.

`speed_up` gives the layers of a network other classes, with the same weights and the same results up to rounding. What
is saved is the plain UNet2DModel: neither weights nor configuration know of it.
"""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from .attention import ChunkedAttnProcessor
from .group_norm import group_norm, has_kernel, kernel
from .packed_weights import FastConv2d, has_own_forward


class FastGroupNorm(nn.GroupNorm):
    """GroupNorm in one pass, see group_norm.py."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self, silu=False)


class FastResnetBlock2D(ResnetBlock2D):
    """The residual block of DDPM's U-net (appendix B), with GroupNorm, SiLU and dropout in one pass.

    For blocks without up- or downsampling of their own, and with a time embedding that is added.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: object, **kwargs: object) -> Tensor:
        hidden_states = self.conv1(norm_and_silu(input_tensor, self.norm1))
        if self.time_emb_proj is not None:
            embedding = temb if self.skip_time_act else nn.functional.silu(temb)
            hidden_states = hidden_states + self.time_emb_proj(embedding)[:, :, None, None]
        hidden_states = self.conv2(norm_and_silu(hidden_states, self.norm2, self.dropout))
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        output = shortcut + hidden_states
        return output if self.output_scale_factor == 1 else output / self.output_scale_factor


class FastUpsample2D(Upsample2D):
    """Each pixel four times, then a convolution: channels-last images stay so.

    diffusers makes 64 images or more contiguous here, because of an error of torch on GPUs
    (https://github.com/huggingface/diffusers/issues/984), and all layers behind would compute more slowly.
    """

    def forward(self, hidden_states: Tensor, output_size: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if not has_kernel(hidden_states) or args or kwargs:
            return super().forward(hidden_states, output_size, *args, **kwargs)
        scale = 2.0 if output_size is None else None
        x = nn.functional.interpolate(hidden_states, size=output_size, scale_factor=scale, mode="nearest")
        layer: Any = self  # `conv` is annotated as None
        y: Tensor = layer.conv(x)
        return y


def norm_and_silu(x: Tensor, norm: nn.Module, dropout: nn.Module | None = None) -> Tensor:
    """SiLU after a layer, and dropout after that, in one pass if they are a GroupNorm and torch's dropout."""
    if type(norm) is not FastGroupNorm or not _is_called_alone(norm):
        y = nn.functional.silu(norm(x))
    elif type(dropout) is nn.Dropout and _is_called_alone(dropout) and not dropout.inplace and dropout.p < 1:
        return group_norm(x, norm, silu=True, dropout=dropout.p if dropout.training else 0)
    else:
        y = group_norm(x, norm, silu=True)
    return y if dropout is None else dropout(y)


def _is_called_alone(layer: nn.Module) -> bool:
    """Whether nothing else wants to see it called: neither hooks nor accelerate."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    return not hooks and not has_own_forward(layer)


def speed_up(network: nn.Module) -> None:
    """Replace what the layers of a network compute with; a second call changes nothing.

    Layers of other kinds, classes derived from diffusers', and attention processors that a user has set stay.
    """
    for module in network.modules():
        if type(module) is ResnetBlock2D and _is_plain(module):
            module.__class__ = FastResnetBlock2D
        elif type(module) is nn.GroupNorm:
            module.__class__ = FastGroupNorm
        elif type(module) is Upsample2D and _only_repeats_pixels(module):
            module.__class__ = FastUpsample2D
        elif type(module) is nn.Conv2d:
            module.__class__ = FastConv2d
        elif isinstance(module, Attention):
            layer: Any = module  # its processors are annotated as one of diffusers' classes
            if type(layer.processor) is AttnProcessor2_0:
                layer.set_processor(ChunkedAttnProcessor())


def in_best_format(x: Tensor) -> Tensor:
    """Images (B, C, H, W) in the memory format in which they go through a fast network fastest."""
    is_fast = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and kernel() is not None
    return as_channels_last(x) if is_fast else x


def as_channels_last(x: Tensor) -> Tensor:
    """Images (B, C, H, W) in memory with the channels of a pixel side by side."""
    if x.shape[1] == 1:  # every such image is: torch needs the strides that say so
        return x.contiguous().squeeze(1).unsqueeze(-1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def _is_plain(block: ResnetBlock2D) -> bool:
    return (
        block.time_embedding_norm == "default"
        and block.upsample is None
        and block.downsample is None
        and type(block.nonlinearity) is nn.SiLU
    )


def _only_repeats_pixels(layer: Any) -> bool:
    """Before a convolution."""
    return (
        layer.use_conv
        and layer.name == "conv"
        and layer.norm is None
        and layer.interpolate
        and not layer.use_conv_transpose
    )
