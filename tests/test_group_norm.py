"""GroupNorm and SiLU in one pass: against torch in float64, closed forms, and torch where there is no kernel."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from ddpm_pipeline import kernels, rng
from ddpm_pipeline.group_norm import group_norm, has_kernel

needs_kernel = pytest.mark.skipif(kernels.load()[0] is None, reason=f"no kernel: {kernels.load()[1]}")


def make_norm(groups: int, channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels, eps=eps)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).to(memory_format=torch.channels_last)


def in_float64(x: torch.Tensor, norm: nn.GroupNorm, use_silu: bool, dy: torch.Tensor) -> list[torch.Tensor]:
    """y and the gradients of x, weight and bias, by torch's own operations."""
    exact = make_norm(norm.num_groups, norm.num_channels, norm.eps).double()
    exact.load_state_dict(norm.state_dict())
    x = x.detach().double().contiguous().requires_grad_()
    y = silu(exact(x)) if use_silu else exact(x)
    return [y, *torch.autograd.grad(y, (x, exact.weight, exact.bias), dy.double())]


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.detach().double() - exact.detach()).norm() / exact.detach().norm())


@needs_kernel
@pytest.mark.parametrize("use_silu", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((4, 16, 8, 8), 4),
        ((3, 64, 5, 7), 32),  # an odd number of pixels
        ((1, 8, 40, 40), 2),  # one image: its segments are shared between the threads
        ((2, 3, 17, 19), 3),  # few channels, one a group
        ((5, 96, 4, 4), 1),
        ((2, 130, 3, 3), 5),
        ((2, 32, 1, 1), 8),
    ],
)
def test_one_pass_equals_torch_in_float64(shape, groups, dtype, tolerance, use_silu):
    torch.manual_seed(0)
    norm, x, dy = make_norm(groups, shape[1]), channels_last(*shape, dtype=dtype), channels_last(*shape, dtype=dtype)
    x.requires_grad_()
    assert has_kernel(x)
    y = group_norm(x, norm, silu=use_silu)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    found = [y, *torch.autograd.grad(y, (x, norm.weight, norm.bias), dy)]
    for value, exact in zip(found, in_float64(x, norm, use_silu, dy)):
        assert relative_error(value, exact) < tolerance


@needs_kernel
@pytest.mark.parametrize("mean", [1e3, -3e4])
def test_a_mean_far_larger_than_the_deviation_costs_no_accuracy(mean):
    torch.manual_seed(0)
    norm, x, dy = make_norm(2, 8), channels_last(2, 8, 16, 16) + mean, channels_last(2, 8, 16, 16)
    x.requires_grad_()
    y = group_norm(x, norm, silu=True)
    found = [y, *torch.autograd.grad(y, (x, norm.weight, norm.bias), dy)]
    for value, exact in zip(found, in_float64(x, norm, True, dy)):
        assert relative_error(value, exact) < 1e-6 * abs(mean)  # as far as float32 holds the deviations


@needs_kernel
def test_means_that_differ_between_the_channels_of_a_group():
    torch.manual_seed(0)
    norm, x = make_norm(2, 8), channels_last(2, 8, 16, 16) + 1e3 * torch.arange(8.0)[:, None, None]
    y = group_norm(x, norm, silu=False)
    assert relative_error(y, in_float64(x, norm, False, torch.ones_like(x))[0]) < 1e-5


@needs_kernel
@pytest.mark.parametrize("value", [-1e30, -200.0, -90.0, -87.5, -1e-3, 0.0, 88.5, 200.0, 3e4, 1e30])
def test_silu_far_from_zero(value):
    """The normalised image is 0, so z is the bias, and y = z / (1 + exp(-z)); its slope is in the gradient."""
    norm = nn.GroupNorm(1, 4)
    nn.init.constant_(norm.bias, value)
    y = group_norm(channels_last(2, 4, 8, 8) * 0, norm, silu=True)
    torch.testing.assert_close(
        y, torch.full_like(y, value / (1 + math.exp(min(-value, 700)))), rtol=1e-6, atol=1e-38 * abs(value)
    )
    (slope,) = torch.autograd.grad(y.sum(), norm.bias)
    z = torch.tensor(value, dtype=torch.float64)
    expected = y[:, 0].numel() * (z.sigmoid() * (1 + z * (1 - z.sigmoid())))
    torch.testing.assert_close(slope, expected.float().expand(4), rtol=1e-5, atol=2e-36 * abs(value))


@needs_kernel
def test_bfloat16_is_rounded_to_the_nearest_and_non_finite_values_stay_visible():
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 16)
    x = channels_last(4, 16, 8, 8, dtype=torch.bfloat16)
    exact = in_float64(x, norm, False, torch.ones_like(x))[0]
    y = group_norm(x, norm, silu=False)
    wrong = y != exact.to(torch.bfloat16)
    assert wrong.float().mean() < 1e-3  # float32 may fall on the other side of a tie
    for bad in (math.nan, math.inf):
        broken = x.clone()
        broken[1, 2, 3, 4] = bad
        y = group_norm(broken, norm, silu=True)
        assert not y[1, :4].isfinite().any() and y[0].isfinite().all() and y[1, 4:].isfinite().all()


@needs_kernel
@pytest.mark.parametrize("shape", [(1, 16, 40, 40), (3, 16, 40, 40), (8, 64, 16, 16)])
def test_the_number_of_threads_changes_no_bit(shape):
    torch.manual_seed(0)
    norm, x, dy = make_norm(4, shape[1]), channels_last(*shape).requires_grad_(), channels_last(*shape)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            torch.manual_seed(1)
            y = group_norm(x, norm, silu=True, dropout=0.2)
            results.append([y, *torch.autograd.grad(y, (x, norm.weight, norm.bias), dy)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@needs_kernel
def test_a_gradient_of_the_gradient_is_torchs():
    torch.manual_seed(0)
    norm, x = make_norm(2, 4), channels_last(2, 4, 4, 4).requires_grad_()
    seconds = []
    for y in (group_norm(x, norm, silu=True), silu(norm(x))):
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), (x, norm.weight)))
    torch.testing.assert_close(seconds[0], seconds[1], rtol=1e-4, atol=1e-4)


def kept(seed: int, shape: tuple[int, ...], p: float) -> torch.Tensor:
    """Which values dropout keeps, by the numbers of rng.py: a number for two channels of a pixel."""
    torch.manual_seed(seed)
    key = int(torch.randint(2**63 - 1, ()))
    images, channels, height, width = shape
    bits = rng.bits(key, torch.arange(images * height * width * channels // 2))
    halves = torch.stack([bits & 0xFFFFFFFF, (bits >> 32) & 0xFFFFFFFF], dim=-1)
    return (halves.view(images, height, width, channels) >= int(p * 2**32)).permute(0, 3, 1, 2)


@needs_kernel
@pytest.mark.parametrize("p", [1e-4, 0.1, 0.5, 0.99])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("shape", [(3, 64, 5, 7), (1, 8, 40, 40), (2, 130, 3, 3), (4, 16, 8, 8)])
def test_dropout_is_that_of_our_random_numbers_forward_and_backward(shape, dtype, tolerance, p):
    torch.manual_seed(0)
    norm, x, dy = make_norm(2, shape[1]), channels_last(*shape, dtype=dtype), channels_last(*shape, dtype=dtype)
    x.requires_grad_()
    factors = kept(1, shape, p) / (1 - p)
    torch.manual_seed(1)
    y = group_norm(x, norm, silu=True, dropout=p)
    found = [y, *torch.autograd.grad(y, (x, norm.weight, norm.bias), dy)]
    without, *gradients = in_float64(x, norm, True, dy * factors)
    assert torch.equal(y != 0, (factors != 0) & (without != 0))
    for value, exact in zip(found, [without * factors, *gradients]):
        assert relative_error(value, exact) < tolerance


@needs_kernel
def test_dropout_of_channels_that_come_in_no_pairs_and_its_gradient_of_the_gradient():
    torch.manual_seed(0)
    norm, x = make_norm(3, 3), channels_last(2, 3, 17, 19).requires_grad_()
    y = group_norm(x, norm, silu=True, dropout=0.5)
    dropped = y == 0
    assert 0.4 < dropped.float().mean() < 0.6
    assert all(not torch.equal(dropped[:, i], dropped[:, j]) for i, j in ((0, 1), (1, 2), (0, 2)))
    exact = silu(torch.nn.functional.group_norm(x, 3, norm.weight, norm.bias, norm.eps)) * ~dropped * 2
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)
    seconds = []
    for output in (y, exact):
        (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        seconds += torch.autograd.grad(gradient.square().sum(), x)
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-3)


@needs_kernel
@pytest.mark.parametrize("needs_gradient", [True, False])
def test_dropout_in_a_graph_of_gradients_drops_the_same(needs_gradient):
    torch.manual_seed(0)
    norm, x = make_norm(2, 4), channels_last(2, 4, 5, 3).requires_grad_(needs_gradient)
    found = []
    for create_graph in (False, True):
        torch.manual_seed(1)
        y = group_norm(x, norm, silu=True, dropout=0.5)
        found += torch.autograd.grad(y.square().sum(), norm.weight, create_graph=create_graph)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["kernel", "torch"])
def test_dropout_drops_others_each_time_as_often_as_it_should(where):
    norm, p, n = nn.GroupNorm(1, 32), 0.1, 4 * 32 * 32 * 32
    nn.init.constant_(norm.bias, 9)
    nn.init.zeros_(norm.weight)
    x = channels_last(4, 32, 32, 32)
    x = x if where == "kernel" else x.contiguous()
    torch.manual_seed(0)
    first, second = (group_norm(x, norm, silu=True, dropout=p) == 0 for _ in range(2))
    deviation = math.sqrt(n * p * (1 - p))
    assert abs(first.sum() - n * p) < 5 * deviation
    assert abs((first & second).sum() - n * p**2) < 5 * math.sqrt(n * p**2)
    for dim in (1, 2, 3):  # nor does a channel, or a pixel, tell what is dropped beside it
        beside = first.narrow(dim, 0, 31) & first.narrow(dim, 1, 31)
        assert abs(beside.sum() - beside.numel() * p**2) < 5 * math.sqrt(beside.numel() * p**2)
    torch.manual_seed(0)
    assert torch.equal(group_norm(x, norm, silu=True, dropout=p) == 0, first)


@needs_kernel
def test_a_pixel_far_out_costs_little_accuracy():
    torch.manual_seed(0)
    norm, x = make_norm(1, 4), channels_last(1, 4, 256, 256)
    x[..., 0, 0] = 100
    assert relative_error(group_norm(x, norm, silu=False), in_float64(x, norm, False, torch.ones_like(x))[0]) < 1e-5


@needs_kernel
def test_a_layer_that_is_applied_twice_has_the_gradients_of_both_in_a_graph_of_them():
    torch.manual_seed(0)
    norm, x, r = make_norm(2, 8), channels_last(2, 8, 4, 4), channels_last(2, 8, 4, 4)
    weights = (norm.weight, norm.bias)
    found = [
        torch.autograd.grad((once * r).sum(), weights, create_graph=create_graph)
        for create_graph in (True, False)
        for once in [group_norm(group_norm(x, norm, silu=True), norm, silu=True)]
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@needs_kernel
@pytest.mark.parametrize("strided", ["weight", "bias"])
def test_weights_in_another_memory_order(strided):
    norm, x = make_norm(4, 32), channels_last(2, 32, 6, 6)
    expected = norm.double()(x.double()).float()
    norm = norm.float()
    values = getattr(norm, strided)
    values.data = torch.stack([values.data, torch.randn(32)], dim=1)[:, 0]
    assert not values.is_contiguous()
    torch.testing.assert_close(group_norm(x, norm, silu=False), expected, rtol=1e-5, atol=1e-5)
    values.data = torch.tensor([2.0]).expand(32)
    torch.testing.assert_close(group_norm(x, norm, silu=False), norm(x.contiguous()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 32, 0, 8), (0, 32, 8, 8)])
def test_no_pixels_and_no_images(shape):
    norm = make_norm(4, 32)
    y = group_norm(torch.empty(shape).to(memory_format=torch.channels_last).requires_grad_(), norm, silu=True)
    assert y.shape == shape
    y.sum().backward()


@pytest.mark.parametrize(("shape", "channels", "groups"), [((2, 64, 8, 8), 32, 4), ((2, 16, 8, 8), 32, 4)])
def test_layers_for_other_images_raise_torchs_error(shape, channels, groups):
    with pytest.raises(RuntimeError, match="weight"):
        group_norm(channels_last(*shape), make_norm(groups, channels), silu=True)


def test_weights_that_are_not_on_the_cpu_are_left_to_torch():
    norm = make_norm(4, 32).to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        norm(torch.randn(2, 32, 8, 8))
    with pytest.raises((RuntimeError, NotImplementedError)):
        group_norm(channels_last(2, 32, 8, 8), norm, silu=True)


@needs_kernel
def test_tensors_that_stand_for_others():
    torch.manual_seed(0)
    norm, x, dy = make_norm(4, 16), channels_last(2, 16, 4, 4), channels_last(2, 16, 4, 4)
    torch.testing.assert_close(group_norm(torch._neg_view(x), norm, silu=True), group_norm(-x, norm, silu=True))
    x.requires_grad_()
    y = group_norm(x, norm, silu=True)
    found = torch.autograd.grad(y, x, torch._neg_view(dy), retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(y, x, -dy, retain_graph=True))
    (zero,) = torch.autograd.grad(y, x, torch._efficientzerotensor(tuple(dy.shape)))
    assert not zero.any()


def test_very_many_channels():
    """More than the stack of a thread holds."""
    norm, x = nn.GroupNorm(1, 200_000), channels_last(1, 200_000, 1, 2).requires_grad_()
    y = group_norm(x, norm, silu=True)
    y.sum().backward()
    torch.testing.assert_close(y, silu(norm(x.contiguous())), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 4, 6, 6),  # contiguous
        channels_last(2, 4, 6, 6).double(),
        channels_last(2, 4, 6, 6).half(),
        torch.randn(2, 4, 6),
    ],
)
def test_other_tensors_are_left_to_torch(x):
    norm = make_norm(2, 4).to(x.dtype)
    assert not has_kernel(x)
    assert torch.equal(group_norm(x, norm, silu=True), silu(norm(x.contiguous())))


def test_without_a_compiler_torch_computes(tmp_path):
    """In a process of its own, for the library is loaded once."""
    code = (
        "import torch; from ddpm_pipeline import kernels; from ddpm_pipeline.group_norm import group_norm, has_kernel\n"
        "x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last); norm = torch.nn.GroupNorm(2, 4)\n"
        "print(has_kernel(x), torch.equal(group_norm(x, norm, silu=False), norm(x.contiguous())), kernels.load()[1])\n"
    )
    for variables, reason in (
        ({"CC": "no-such-compiler"}, "there is no C compiler"),
        ({"CC": "false"}, "false failed"),
        ({kernels.VARIABLE: "0"}, f"{kernels.VARIABLE} is 0"),
    ):
        environment = os.environ | variables | {"HOME": str(tmp_path)}
        output = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        ).stdout
        assert output.startswith("False True ") and reason in output


@needs_kernel
def test_a_library_is_compiled_once_and_a_damaged_one_anew(tmp_path, monkeypatch):
    """Two compilations write to different files: one that read what another had half written would keep that."""
    compiler, made = tmp_path / "cc", tmp_path / "made"
    compiler.write_text(f'#!/bin/sh\nfor last; do :; done\necho "$last" >> {made}\nexec cc "$@" -O0\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(kernels, "CACHE", tmp_path / "whole")
    for _ in range(2):
        assert kernels.load.__wrapped__()[0] is not None
    assert len(made.read_text().split()) == 2  # an object and a library
    (whole,) = kernels.CACHE.iterdir()

    monkeypatch.setattr(kernels, "CACHE", tmp_path / "damaged")
    damaged = kernels.CACHE / whole.name
    damaged.parent.mkdir()
    subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-o", str(damaged)], check=True)  # without functions
    library, reason = kernels.load.__wrapped__()
    assert reason is None and library.group_norm_segments(1) == 1
    assert damaged.stat().st_size == whole.stat().st_size
    names = [name.replace("/damaged/", "/whole/") for name in made.read_text().split()]
    assert len(names) == len(set(names)) == 4
