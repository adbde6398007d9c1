"""Packed weights of convolutions: against torch's own convolution, and whenever they must not be used."""

import copy
import threading

import pytest
import torch
from torch import nn

from ddpm_pipeline.denoiser import UNetDenoiser
from ddpm_pipeline.packed_weights import FastConv2d, PackedWeights, _dtypes
from tests.models import tiny_pipe, tiny_unet

DTYPES = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float64: 1e-14}


def make_layer(*channels, dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer = FastConv2d(*channels, **{"kernel_size": 3, "padding": 1} | options).to(dtype)
    return layer.requires_grad_(False)


@pytest.fixture
def packings(monkeypatch):
    """The layers whose weights were packed, one entry each time."""
    from ddpm_pipeline import packed_weights

    packed, pack = [], packed_weights._pack

    def count(layer, *args):
        weights = pack(layer, *args)
        packed.extend([layer] if weights is not None else [])
        return weights

    monkeypatch.setattr(packed_weights, "_pack", count)
    return packed


@torch.no_grad()
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 0},
        {"kernel_size": 1, "padding": 0},
        {"groups": 2, "bias": False},
        {"dilation": 2, "padding": 2},
        {"padding": "same"},
        {"padding_mode": "circular"},
    ],
    ids=str,
)
def test_the_same_as_a_convolution_in_float64(options, dtype, memory_format, packings):
    layer = make_layer(6, 10, dtype=dtype, **options)
    exact, weights = copy.deepcopy(layer).double(), PackedWeights()
    for shape in ((2, 6, 9, 7), (5, 6, 4, 4)):  # packed for the first, used for the second as well
        x = torch.randn(shape).to(dtype).to(memory_format=memory_format)
        with weights.in_use():
            y = layer(x)
        expected = exact(x.double())
        assert y.dtype == dtype and y.shape == expected.shape
        assert (y.double() - expected).norm() < DTYPES[dtype] * expected.norm()
    can_pack = dtype in _dtypes() and options not in ({"padding": "same"}, {"padding_mode": "circular"})
    assert packings == [layer] * can_pack


@torch.no_grad()
def test_only_in_its_context_and_thread(packings):
    layer, x, weights = make_layer(2, 3), torch.randn(1, 2, 4, 4), PackedWeights()
    layer(x)
    with weights.in_use():
        thread = threading.Thread(target=layer, args=(x,))
        thread.start()
        thread.join()
        assert packings == []
        layer(x)
        assert packings == [layer] * bool(_dtypes())
    layer(x.double().float())
    assert len(packings) == bool(_dtypes())


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "another parameter", "other memory", "dtype"])
def test_weights_that_change_are_packed_anew(change):
    layer, x, weights = make_layer(2, 3), torch.randn(1, 2, 4, 4), PackedWeights()
    with weights.in_use():
        before = layer(x)
        if change == "in place":
            layer.weight.mul_(2)
        elif change == "another parameter":
            layer.weight = nn.Parameter(2 * layer.weight)
        elif change == "other memory":
            layer.weight.data = 2 * layer.weight
        else:
            layer.double()
            x, before = x.double(), before.double()
        after = layer(x)
    factor = 1 if change == "dtype" else 2
    bias = layer.bias[:, None, None]
    torch.testing.assert_close(after - bias, factor * (before.to(after.dtype) - bias), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_torch():
    layer, x = make_layer(2, 3).requires_grad_(), torch.randn(1, 2, 4, 4, requires_grad=True)
    with PackedWeights().in_use():
        found = torch.autograd.grad(layer(x).sum(), (x, layer.weight, layer.bias))
    expected = torch.autograd.grad(nn.Conv2d.forward(layer, x).sum(), (x, layer.weight, layer.bias))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@torch.no_grad()
@pytest.mark.parametrize("case", ["inference", "replaced forward", "mkldnn off", "double weights"])
def test_what_cannot_be_packed_is_left_to_torch(case, packings, monkeypatch):
    layer, x = make_layer(2, 3), torch.randn(1, 2, 4, 4)
    if case == "inference":
        with torch.inference_mode():
            layer = make_layer(2, 3)
    elif case == "replaced forward":
        layer.forward = layer.forward
    elif case == "mkldnn off":
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    else:
        layer, x = layer.double(), x.double()
    expected = layer(x)
    with PackedWeights().in_use():
        torch.testing.assert_close(layer(x), expected)
    assert packings == []


@torch.no_grad()
def test_images_that_do_not_fit_raise_torchs_error():
    layer = make_layer(2, 3)
    for x in (torch.randn(1, 3, 4, 4), torch.randn(1, 2, 4, 4).double(), torch.randn(4, 4)):
        with PackedWeights().in_use(), pytest.raises(RuntimeError) as found:
            layer(x)
        with pytest.raises(RuntimeError) as expected:
            nn.Conv2d.forward(layer, x)
        assert str(found.value) == str(expected.value)
    with PackedWeights().in_use():
        assert layer(torch.randn(0, 2, 4, 4)).shape == (0, 3, 4, 4)
        assert layer(torch.randn(2, 4, 4)).shape == (3, 4, 4)


@torch.no_grad()
def test_within_autocast(packings):
    layer, x = make_layer(4, 6), torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = nn.Conv2d.forward(layer, x)
        with PackedWeights().in_use():
            found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert packings == [layer] * (torch.bfloat16 in _dtypes())


@torch.no_grad()
def test_a_sampling_run_packs_each_convolution_once(packings):
    unet, x = tiny_unet().eval(), torch.randn(2, 1, 8, 8)
    expected = unet(x, 3, return_dict=False)[0]
    denoiser = UNetDenoiser(unet)
    for _ in range(3):
        torch.testing.assert_close(denoiser(x, 3), expected, rtol=1e-4, atol=1e-5)
    convolutions = [module for module in unet.modules() if isinstance(module, nn.Conv2d)]
    assert all(type(layer) is FastConv2d for layer in convolutions)
    assert len(packings) == len(convolutions) * bool(_dtypes())
    unet(x, 3)
    assert len(packings) == len(convolutions) * bool(_dtypes())


@pytest.mark.parametrize("how", ["callback", "trajectory"])
def test_weights_that_a_user_changes_between_two_steps_count(how):
    """Also behind torch's back, as adapters are merged."""

    def change(*_):
        for parameter in pipe.unet.parameters():
            parameter.data.mul_(1.5)
        return {}

    results = []
    for packs in (True, False):
        pipe = tiny_pipe()
        with pytest.MonkeyPatch.context() as patch:
            if not packs:
                patch.setattr("ddpm_pipeline.packed_weights._pack", lambda *_: None)
            if how == "callback":
                options = {"callback_on_step_end": change, "output_type": "latent"}
                results.append(pipe(seeds=0, num_inference_steps=3, **options).images)
            else:
                steps = pipe.trajectory(seeds=0, num_inference_steps=3)
                results.append([(step.x_t, change())[0] for step in steps][-1])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
