"""The faster layers of the U-net: the same function, gradients and saved folder as diffusers' own."""

import copy
import pickle
import warnings

import accelerate
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm_pipeline import fast_unet, kernels
from ddpm_pipeline.attention import CHUNK, ChunkedAttnProcessor, chunked_attention
from ddpm_pipeline.fast_unet import (
    FastGroupNorm,
    FastResnetBlock2D,
    FastUpsample2D,
    as_channels_last,
    in_best_format,
    speed_up,
)
from training.denoiser import FAMILIES, PRESETS, make_denoiser

UNUSUAL = {
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "resnet_downsampling": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "skip_blocks": {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    },
    "relu": {"act_fn": "relu"},
    "classes": {"num_class_embeds": 4},
    "output_scale_factor": {"mid_block_scale_factor": 2**0.5},
}


def unusual(name: str) -> UNet2DModel:
    usual = {
        "sample_size": 8, "block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return UNet2DModel(**usual | UNUSUAL[name])


def predictions_and_gradients(model, x, t, **options):
    prediction = model(x, t, return_dict=False, **options)[0]
    model.zero_grad()
    prediction.float().square().mean().backward()
    return prediction.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ["tiny", "small", *PRESETS, *UNUSUAL])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_the_same_function_and_gradients(name, memory_format):
    torch.manual_seed(0)
    model = make_denoiser(name, height=16, width=16, in_channels=3, dropout=0) if name not in UNUSUAL else unusual(name)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([10, 700])
    options = {"class_labels": torch.tensor([0, 3])} if name == "classes" else {}
    expected, expected_gradient = predictions_and_gradients(model, x, t, **options)
    speed_up(model)
    x = x.contiguous(memory_format=memory_format)
    found, gradient = predictions_and_gradients(model, x, t, **options)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (gradient - expected_gradient).norm() < 1e-4 * expected_gradient.norm()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [*FAMILIES, *PRESETS])
def test_every_layer_of_a_preset_is_fast_and_stays_channels_last(name, channels):
    """A layer that falls back would only cost time, so nothing else would notice it."""
    model = make_denoiser(name, height=16, width=16, in_channels=channels)
    speed_up(model)
    types = {type(module).__name__ for module in model.modules()}
    assert {"FastResnetBlock2D", "FastGroupNorm"} <= types and not {"ResnetBlock2D", "GroupNorm"} & types
    formats = []
    for module in model.modules():
        if isinstance(module, (FastResnetBlock2D, FastGroupNorm, Attention)):
            module.register_forward_hook(
                lambda module, inputs, output: formats.append(
                    output.is_contiguous(memory_format=torch.channels_last)
                    and inputs[0].is_contiguous(memory_format=torch.channels_last)
                )
            )
    with torch.no_grad():
        model(as_channels_last(torch.randn(2, channels, 16, 16)), 5)
    assert len(formats) > 20 and all(formats)


@pytest.mark.skipif(kernels.load()[0] is None, reason=f"no kernel: {kernels.load()[1]}")
@pytest.mark.parametrize("output_size", [None, (6, 9)])
def test_upsampled_images_stay_channels_last_however_many_they_are(output_size):
    """diffusers makes 64 images contiguous; then all layers behind are slow."""
    layer = Upsample2D(4, use_conv=True)
    x = as_channels_last(torch.randn(64, 4, 3, 5, requires_grad=True))
    expected = layer(x, output_size)
    speed_up(layer)
    assert type(layer) is FastUpsample2D
    found = layer(x, output_size)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    contiguous = x.detach().contiguous()
    torch.testing.assert_close(layer(contiguous, output_size), expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"use_conv": False}, {"use_conv_transpose": True}, {"interpolate": False}])
def test_other_ways_of_upsampling_stay(options):
    layer = Upsample2D(4, **{"use_conv": True} | options)
    speed_up(layer)
    assert type(layer) is Upsample2D


def test_layers_of_other_classes_and_processors_of_the_user_stay():
    class OwnProcessor(AttnProcessor2_0):
        pass

    model, own = make_denoiser("tiny", height=8, width=8, in_channels=1), OwnProcessor()
    first = next(module for module in model.modules() if isinstance(module, Attention))
    first.set_processor(own)
    speed_up(model)
    speed_up(model)
    assert first.processor is own
    others = [module.processor for module in model.modules() if isinstance(module, Attention) and module is not first]
    assert others and all(type(processor) is ChunkedAttnProcessor for processor in others)


class Doubled(nn.SiLU):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnNorm(nn.GroupNorm):
    def forward(self, x):
        return 3 * super().forward(x)


@pytest.mark.parametrize("change", ["norm", "no norm", "nonlinearity", "hook", "dropout hook", "processor", "scale_qk"])
def test_what_a_user_has_changed_in_a_layer_counts(change):
    torch.manual_seed(0)
    model = make_denoiser("tiny", height=8, width=8, in_channels=1).eval()
    block = next(module for module in model.modules() if type(module) is ResnetBlock2D)
    attention = next(module for module in model.modules() if isinstance(module, Attention))
    called = []
    if change == "norm":
        block.norm1 = OwnNorm(block.norm1.num_groups, block.norm1.num_channels)
    elif change == "no norm":
        block.norm1 = nn.Identity()
    elif change == "nonlinearity":
        block.nonlinearity = Doubled()
    elif change in ("hook", "dropout hook"):
        layer = block.norm1 if change == "hook" else block.dropout
        layer.register_forward_hook(lambda *_: called.append(1))
    elif change == "processor":
        attention.set_processor(AttnProcessor())
    else:
        attention.scale = 1.0  # as Attention(scale_qk=False), whose processor is AttnProcessor
        attention.set_processor(AttnProcessor())
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = model(x, 3, return_dict=False)[0]
        del called[:]
        speed_up(model)
        torch.testing.assert_close(model(as_channels_last(x), 3, return_dict=False)[0], expected, rtol=1e-3, atol=1e-4)
    assert bool(called) == (change in ("hook", "dropout hook"))


def test_weights_that_accelerate_keeps_on_the_disk(tmp_path):
    torch.manual_seed(0)
    model = make_denoiser("tiny", height=8, width=8, in_channels=1).eval()
    x = as_channels_last(torch.randn(2, 1, 8, 8))
    with torch.no_grad():
        expected = model(x, 3, return_dict=False)[0]
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
        speed_up(model)
        torch.testing.assert_close(model(x, 3, return_dict=False)[0], expected, rtol=1e-3, atol=1e-4)


def test_a_fast_network_is_saved_copied_and_pickled_as_before(tmp_path):
    torch.manual_seed(0)
    plain = make_denoiser("tiny", height=8, width=8, in_channels=1).eval()
    fast = copy.deepcopy(plain)
    speed_up(fast)
    plain.save_pretrained(str(tmp_path / "plain"))
    fast.save_pretrained(str(tmp_path / "fast"))
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "fast" / file.name).read_bytes()
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = fast(x, 3, return_dict=False)[0]
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert torch.equal(other(x, 3, return_dict=False)[0], expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize(("heads", "tokens", "d"), [(3, 40, 8), (1, 9, 16), (5, 64, 1)])
@pytest.mark.parametrize("chunk", [CHUNK, 5000, 1])
def test_attention_in_chunks_equals_its_definition(monkeypatch, chunk, heads, tokens, d, dtype, tolerance):
    monkeypatch.setattr("ddpm_pipeline.attention.CHUNK", chunk)
    torch.manual_seed(0)
    q, k, v, dmixed = (torch.randn(2, heads, tokens, d, dtype=dtype) for _ in range(4))
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    mixed = chunked_attention(*inputs)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = torch.softmax(exact[0] @ exact[1].mT / d**0.5, dim=-1) @ exact[2]
    pairs = [(mixed, expected)]
    pairs += zip(torch.autograd.grad(mixed, inputs, dmixed), torch.autograd.grad(expected, exact, dmixed.double()))
    for value, truth in pairs:
        assert value.dtype == dtype and value.shape == truth.shape
        error = (value.detach().double() - truth.detach()).norm()
        assert error <= tolerance * max(1.0, float(truth.detach().norm()))


def test_attention_in_chunks_can_be_differentiated_twice():
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradgradcheck(chunked_attention, inputs)
    q, k, v = inputs
    frozen = chunked_attention(q, k.detach(), v)
    assert torch.autograd.grad(frozen.sum(), (q, v), create_graph=True)[0].requires_grad


def test_attention_in_chunks_within_autocast_and_of_nothing():
    q = torch.randn(1, 2, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chunked_attention(q, q, q), chunked_attention(q, q, q))
    assert chunked_attention(q[:, :, :0], q[:, :, :0], q[:, :, :0]).shape == (1, 2, 0, 3)


def test_attention_in_chunks_keeps_no_scores():
    """Memory grows with the pixels: what is saved for the backward pass are q, k and v alone."""
    saved: list[int] = []
    q, k, v = (torch.randn(2, 4, 512, 8, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        chunked_attention(q, k, v)
    assert max(saved) == q.numel()


def fast_network():
    torch.manual_seed(0)
    model = make_denoiser("tiny", height=8, width=8, in_channels=1).eval()
    speed_up(model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(ChunkedAttnProcessor("chunks"))
    return model, as_channels_last(torch.randn(2, 1, 8, 8))


def test_a_traced_network_holds_its_operations():
    """What is computed behind the back of a trace would be a constant in it."""
    model, x = fast_network()
    model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' Python code is traced as it is
        traced = torch.jit.trace(lambda x: model(x, torch.tensor(3), return_dict=False)[0], x, check_trace=False)
    other = as_channels_last(torch.randn(2, 1, 8, 8))
    with torch.no_grad():
        torch.testing.assert_close(traced(other), model(other, 3, return_dict=False)[0], rtol=1e-4, atol=1e-5)


def test_derivatives_by_torch_func_and_shapes_without_numbers():
    model, x = fast_network()

    def predict(x):
        return model(x, 3, return_dict=False)[0]

    by_func = torch.func.grad(lambda x: predict(x).square().sum())(x)
    images = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(predict(images).square().sum(), images)
    torch.testing.assert_close(by_func, gradient, rtol=1e-4, atol=1e-4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert predict(mode.from_tensor(x)).shape == x.shape


@pytest.mark.parametrize(
    ("implementation", "dtype", "in_chunks"),
    [("auto", torch.bfloat16, True), ("auto", torch.float32, False), ("chunks", torch.float32, True),
     ("fused", torch.bfloat16, False)],
)  # fmt: skip
def test_which_implementation_of_attention_runs(monkeypatch, implementation, dtype, in_chunks):
    called = []
    monkeypatch.setattr("ddpm_pipeline.attention.WORTHWHILE", 2 * 2 * 16**2)
    monkeypatch.setattr(
        "ddpm_pipeline.attention.chunked_attention", lambda *qkv: called.append(1) or chunked_attention(*qkv)
    )
    layer = Attention(16, heads=2, dim_head=8, norm_num_groups=4, residual_connection=True, bias=True).to(dtype)
    layer.set_processor(ChunkedAttnProcessor(implementation))
    x = torch.randn(2, 16, 4, 4, dtype=dtype)
    found = layer(x)
    layer.set_processor(AttnProcessor())
    torch.testing.assert_close(found, layer(x), rtol=2e-2, atol=2e-2)
    assert bool(called) == in_chunks
    layer.set_processor(ChunkedAttnProcessor())
    del called[:]
    layer(x[:1])
    assert not called  # too few scores


@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_channels_last_memory(channels):
    x = torch.randn(2, channels, 8, 6)
    for images in (x, x.transpose(2, 3).contiguous().transpose(2, 3), as_channels_last(x)):
        found = as_channels_last(images)
        assert torch.equal(found, x)
        assert found.stride() == (8 * 6 * channels, 1, 6 * channels, channels)


def test_best_format_where_there_is_no_kernel(monkeypatch):
    x = torch.randn(2, 3, 8, 8)
    monkeypatch.setattr(fast_unet, "kernel", lambda: None)
    assert in_best_format(x) is x
    monkeypatch.setattr(fast_unet, "kernel", lambda: object())
    assert in_best_format(x).stride() == as_channels_last(x).stride()
    assert in_best_format(x.double()).is_contiguous()
