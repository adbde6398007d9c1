"""ATTENTION: softmax(q k^T / sqrt(d)) v on a CPU, in chunks that stay in the processor's cache.

In bfloat16 torch's fused kernel for CPUs is 2 to 10 times as slow, forward and backward, as matrix products and a
softmax. Those would keep a score for each pair of pixels, which soon fills the memory. So they are computed for a few
heads at a time, and once more in the backward pass (Rabe and Staats 2021): memory grows with the pixels, not with their
pairs. In float32 the fused kernel is as fast, and on other devices faster.
"""

from typing import Any, Literal

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from .group_norm import gradients_with_graph, is_computed_now

CHUNK = 2**20  # scores in a chunk: 2 MiB in bfloat16
WORTHWHILE = 2**16  # of fewer scores the fused kernel is as fast, since it is a single operation

Implementation = Literal["auto", "chunks", "fused"]


class ChunkedAttnProcessor:
    """Self-attention of diffusers' `Attention` layers; what those of a U-net do not use is left to diffusers.

    Args:
        implementation: "chunks"; "fused", torch's scaled_dot_product_attention; or "auto": chunks of many scores in
            bfloat16 on a CPU.
    """

    def __init__(self, implementation: Implementation = "auto") -> None:
        self.implementation = implementation
        self._by_diffusers = AttnProcessor2_0()

    def __call__(
        self,
        attn: Any,  # an Attention, some of whose attributes are annotated as never None
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        is_plain = (
            hidden_states.ndim == 4
            and encoder_hidden_states is None
            and attention_mask is None
            and attn.spatial_norm is None
            and attn.group_norm is not None
            and attn.norm_q is None
            and attn.norm_k is None
        )
        if not is_plain:
            output: Tensor = self._by_diffusers(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs
            )
            return output
        height, width = hidden_states.shape[2:]
        pixels = attn.group_norm(hidden_states).permute(0, 2, 3, 1).flatten(1, 2)
        q, k, v = (
            layer(pixels).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, H W, d)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        mixed = self._attention(q, k, v).transpose(1, 2).flatten(2)
        for layer in attn.to_out:  # projection and dropout
            mixed = layer(mixed)
        mixed = mixed.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        if attn.residual_connection:
            mixed = mixed + hidden_states
        return mixed if attn.rescale_output_factor == 1 else mixed / attn.rescale_output_factor

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q.shape[0] * q.shape[1] * q.shape[2] ** 2
        fast_in_chunks = q.device.type == "cpu" and q.dtype == torch.bfloat16 and scores >= WORTHWHILE
        wants_chunks = self.implementation == "chunks" or (self.implementation == "auto" and fast_in_chunks)
        if wants_chunks and is_computed_now(q):
            return chunked_attention(q, k, v)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def chunked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, Eq. (1), Vaswani et al. 2017; (B, heads, tokens, d), in the dtype of q."""
    batch, heads = q.shape[:2]
    scaled = q * q.shape[-1] ** -0.5
    flat = (tensor.reshape(batch * heads, *tensor.shape[2:]) for tensor in (scaled, k, v))
    mixed: Tensor = _ChunkedAttention.apply(*flat)
    return mixed.unflatten(0, (batch, heads))


class _ChunkedAttention(torch.autograd.Function):
    """softmax(q k^T) v for tensors (B heads, tokens, d)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = torch.empty_like(q)
        with torch.autocast(q.device.type, enabled=False):  # it would not write to `out`
            for part in _chunks(q, k):
                torch.bmm(_weights(q[part], k[part]), v[part], out=mixed[part])
        ctx.save_for_backward(q, k, v)
        return mixed

    @staticmethod
    def backward(ctx: Any, dmixed: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the gradients is wanted
            q, k, v = (tensor.view_as(tensor) for tensor in (q, k, v))  # as in group_norm.py
            return tuple(gradients_with_graph(torch.bmm(_weights(q, k), v), (q, k, v), dmixed))
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part in _chunks(q, k):
            weights = _weights(q[part], k[part])
            torch.bmm(weights.mT, dmixed[part], out=dv[part])
            dweights = torch.bmm(dmixed[part], v[part].mT)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            torch.bmm(dscores, k[part], out=dq[part])
            torch.bmm(dscores.mT, q[part], out=dk[part])
        return dq, dk, dv


def _weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(torch.bmm(q, k.mT), dim=-1)  # sums in float32, also in bfloat16


def _chunks(q: Tensor, k: Tensor) -> list[slice]:
    step = max(1, CHUNK // max(1, q.shape[1] * k.shape[1]))
    return [slice(start, start + step) for start in range(0, len(q), step)]
