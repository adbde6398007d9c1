"""MUON: an optimizer that takes a step of the same length in all directions of a weight matrix.

For a matrix W of (rows, columns) with gradient G, at the learning rate eta with weight decay lambda:

    M_t = mu M_(t-1) + G_t                                                      momentum
    O_t = orthogonalise(G_t + mu M_t)                                           Nesterov's
    W_t = W_(t-1) - eta (0.2 sqrt(max(rows, columns)) O_t + lambda W_(t-1))

All singular values of O_t are about 1, while a few directions dominate a gradient. The root mean square of the entries
of such a matrix is 1 / sqrt(max(rows, columns)), so that of an update is 0.2 eta: as AdamW's usually is, whose learning
rate and weight decay therefore do for both.

References:
    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", kellerjordan.github.io/posts/muon.
    Liu et al. 2025, "Muon is scalable for LLM training", arXiv 2502.16982, section 2.2: weight decay and scale.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95  # mu, Jordan et al. 2024
A, B, C = 3.4445, -4.7750, 2.0315  # of the polynomial, from the same source: steep at 0, and near 1 from 0.7 to 1.2
ITERATIONS = 5
UPDATE_RMS = 0.2  # of an update at a learning rate of 1, Liu et al. 2025
LONG = 2  # times as many columns as rows
LEAST_NORM = 1e-7  # of a gradient; a smaller one is rounding errors
FIRST_AND_LAST = ("conv_in", "conv_out")  # of a UNet2DModel: they are where pixels come in and go out


class Muon(torch.optim.AdamW):
    """Muon for the weight matrices of a network; AdamW for biases, norms, embeddings, the first and last convolution.

    Matrices of the same shape are computed together: a small network has many small ones. As the fused AdamW, it takes
    `grad_scale`, the divisor of all gradients, and `found_inf`, with which nothing changes if it is 1, as tensors on
    the device.

    Args:
        network: its parameters are float32 and on one device.
        dtype: of the orthogonalisation: float32, or bfloat16 on a processor that multiplies matrices in it faster.
        settings: of AdamW; learning rate and weight decay are for all parameters.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype = torch.float32, **settings: Any) -> None:
        names = matrix_names(network)
        groups: list[dict[str, Any]] = [{"params": []}, {"params": []}]
        for name, parameter in network.named_parameters():
            groups[name not in names]["params"].append(parameter)
        super().__init__(groups, **settings)
        self._dtype = dtype

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's expects its own state of each parameter

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # it computes no gradients
        group = self.param_groups[0]  # of the matrices
        by_shape: defaultdict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is not None:
                by_shape[weight.shape[0], weight.shape[1:].numel()].append(weight)
        if by_shape:
            self._move(list(by_shape.values()), group["lr"], group["weight_decay"])
        super().step()

    def _move(self, groups: list[list[Tensor]], learning_rate: float, weight_decay: float) -> None:
        """One step of weights, those in a group matrices of one shape. Their gradients are dropped."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        weights = [weight for group in groups for weight in group]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum"] for weight in weights]
        of_groups = [as_matrices([weight.grad for weight in group if weight.grad is not None]) for group in groups]
        for weight in weights:
            weight.grad = None  # AdamW leaves alone what has no gradient
        decay: Any = MOMENTUM  # Any: this and the learning rate are numbers or tensors
        rate: Any = learning_rate
        if grad_scale is not None:
            torch._foreach_div_(of_groups, grad_scale)
        if found_inf is not None:
            skip = found_inf > 0
            for g in of_groups:
                g.masked_fill_(skip, 0)  # gradients and a rate of 0 change nothing below
            decay, rate = torch.where(skip, 1, MOMENTUM), torch.where(skip, 0, learning_rate)

        gradients = _like_weights(of_groups, groups)
        torch._foreach_mul_(momenta, decay)
        torch._foreach_add_(momenta, gradients)
        torch._foreach_add_(gradients, momenta, alpha=MOMENTUM)  # and so to the matrices: their memory is the same
        updates = []
        for g in of_groups:
            scale = UPDATE_RMS * math.sqrt(max(g.shape[1:]))
            updates.append(orthogonalise(g.to(self._dtype)).float() * (rate * scale))
        torch._foreach_mul_(weights, 1 - rate * weight_decay)
        torch._foreach_sub_(weights, _like_weights(updates, groups))


def matrix_names(network: nn.Module) -> set[str]:
    """Names of the weights that Muon is for: those of linear layers and convolutions, but FIRST_AND_LAST."""
    return {
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name not in FIRST_AND_LAST
    }


def as_matrices(tensors: list[Tensor]) -> Tensor:
    """A copy of tensors (rows, ...) with equally many numbers, (N, rows, columns). A convolution is (out, in k k)."""
    return torch.stack([tensor.flatten(1) for tensor in tensors])


def _like_weights(of_groups: list[Tensor], groups: list[list[Tensor]]) -> list[Tensor]:
    """Each matrix in the shape of its weight, without a copy."""
    pairs = [pair for matrices, weights in zip(of_groups, groups) for pair in zip(matrices, weights)]
    return [matrix.view(weight.shape) for matrix, weight in pairs]


def orthogonalise(matrices: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T, roughly: the singular values become 0.68 to 1.21.

    The Newton-Schulz iteration

        X <- a X + b (X X^T) X + c (X X^T)^2 X

    takes each singular value s to a s + b s^3 + c s^5 and leaves U and V as they are. ITERATIONS of it multiply small
    ones by up to a^5 = 485, so those below about 1/600 of the Frobenius norm stay below 0.68.

    Each step multiplies X by a polynomial P of X X^T from the left, so X X^T becomes P X X^T P. Of matrices that are
    much longer than wide only these small products are computed, and X is multiplied once, by all P. That squares
    singular values, for which bfloat16 has too few digits.

    Args:
        matrices: (N, rows, columns), in the dtype to compute in.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices  # X X^T is then the smaller product
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=LEAST_NORM)  # no singular value exceeds this norm
    rows, columns = x.shape[1:]
    if x.dtype == torch.bfloat16 or columns < LONG * rows:
        for _ in range(ITERATIONS):
            x = torch.baddbmm(x, _polynomial(torch.bmm(x, x.mT)), x, beta=A)
    else:
        gram = torch.bmm(x, x.mT)
        product = step = _with_identity(gram)
        for _ in range(ITERATIONS - 1):
            gram = torch.bmm(torch.bmm(step, gram), step)
            step = _with_identity(gram)
            product = torch.bmm(step, product)
        x = torch.bmm(product, x)
    return x.mT if is_tall else x


def _polynomial(gram: Tensor) -> Tensor:
    """b G + c G^2 of each matrix G."""
    return torch.baddbmm(gram, gram, gram, beta=B, alpha=C)


def _with_identity(gram: Tensor) -> Tensor:
    """a + b G + c G^2."""
    polynomial = _polynomial(gram)
    polynomial.diagonal(dim1=1, dim2=2).add_(A)
    return polynomial
