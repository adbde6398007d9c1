"""How processes average their gradients. That more than two resume bit for bit is tested in tests/faults/."""

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from training.run import gradients


@pytest.fixture
def group():
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_compressed_gradients_are_those_of_bf16(group):
    torch.manual_seed(0)
    plain, x = torch.nn.Linear(64, 64), torch.randn(8, 64)
    model = DistributedDataParallel(plain, gradient_as_bucket_view=True)
    gradients.compress(model)
    model(x).square().sum().backward()
    y = plain(x)
    expected = (2 * y.T @ x, 2 * y.sum(0))  # of the sum of squares
    for parameter, gradient in zip(plain.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, parameter.grad.bfloat16().float())
        torch.testing.assert_close(parameter.grad, gradient.detach(), rtol=2**-8, atol=1e-5)
