"""The EMA against its closed form and diffusers' EMAModel; a model in flat memory works as before."""

import math

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from training.denoiser import make_denoiser
from training.ema import FlatEMA


def small_model():
    """Sizes that are no multiples of anything, a buffer, and a frozen parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 3, 3), nn.Flatten(), nn.Linear(48, 7))
    model[1].bias.requires_grad_(False)
    return model


def change(model, seed):
    """What an optimizer step does: new values in the same tensors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))


def copies(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_flat(model, ema):
    """The parameters are still views of the flat memory: what is written there shows in them."""
    before = copies(model)
    ema._weights.add_(1)
    after = copies(model)
    ema._weights.sub_(1)
    for name in before:
        torch.testing.assert_close(after[name], before[name] + 1)


# ---- Closed form -----------------------------------------------------------------------------------------------------


def test_the_ema_is_the_weighted_sum_of_all_weights():
    model = small_model()
    ema = FlatEMA(model, max_decay=0.8, inv_gamma=2.0, power=0.7)
    history = []
    for step in range(1, 31):
        change(model, step)
        history.append(copies(model))
        ema.update(step)
    assert ema.decay_at(30) == 0.8 > ema.decay_at(10)  # both sides of the minimum take part
    # ema_N = sum_n (1 - d_n) d_(n+1) ... d_N weights_n, and these factors sum to 1, as d_1 = 0
    factors = [(1 - ema.decay_at(n)) * math.prod(ema.decay_at(m) for m in range(n + 1, 31)) for n in range(1, 31)]
    assert sum(factors) == pytest.approx(1)
    for name, tensor in ema.state_dict().items():
        expected = sum(factor * weights[name].double() for factor, weights in zip(factors, history))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"max_decay": 0.6}, {"inv_gamma": 3.0, "power": 2 / 3}])
def test_the_ema_equals_that_of_diffusers(options):
    model = small_model()
    ema = FlatEMA(model, **options)
    reference = EMAModel(
        model.parameters(),
        decay=ema.max_decay,
        use_ema_warmup=True,
        inv_gamma=ema.inv_gamma,
        power=ema.power,
    )
    for step in range(1, 21):
        change(model, step)
        ema.update(step)
        reference.step(model.parameters())
        assert ema.decay_at(step) == reference.cur_decay_value
    for tensor, shadow in zip(ema.state_dict().values(), reference.shadow_params):
        torch.testing.assert_close(tensor, shadow, rtol=1e-5, atol=1e-6)
    for step in (100, 10_000, 10**6, 10**9):
        assert ema.decay_at(step) == reference.get_decay(step)


def test_the_first_update_forgets_the_initial_weights():
    model = small_model()
    ema = FlatEMA(model)
    change(model, 1)
    ema.update(1)
    assert_equal(ema.state_dict(), copies(model))


# ---- Applying the EMA weights ----------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    model = small_model()
    ema = FlatEMA(model)
    for step in (1, 2, 3):
        change(model, step)
        ema.update(step)
    return model, ema


def test_applied_has_the_ema_weights_and_restores_the_online_weights(pair):
    model, ema = pair
    online, expected = copies(model), ema.state_dict()
    assert not torch.equal(online["0.weight"], expected["0.weight"])
    with ema.applied():
        assert_equal(copies(model), expected)
        assert_equal(ema.state_dict(), expected)
        for forbidden in (lambda: ema.update(4), lambda: ema.applied().__enter__()):
            with pytest.raises(RuntimeError, match="leave `applied"):
                forbidden()
    assert_equal(copies(model), online)
    assert_equal(ema.state_dict(), expected)
    with pytest.raises(KeyError, match="sampling failed"), ema.applied():
        raise KeyError("sampling failed")
    assert_equal(copies(model), online)
    ema.update(4)


def test_buffers_are_shared_and_frozen_parameters_equal_their_ema(pair):
    model, ema = pair
    model(torch.randn(4, 1, 8, 8))
    running_mean = model[1].running_mean.clone()
    assert running_mean.any()
    with ema.applied():
        assert torch.equal(model[1].running_mean, running_mean)
        assert torch.equal(model[1].bias, torch.zeros(5))
    assert not model[1].bias.requires_grad
    assert ema.state_dict().keys() == dict(model.named_parameters()).keys()


# ---- State -----------------------------------------------------------------------------------------------------------


def test_the_state_survives_safetensors(pair, tmp_path):
    _, ema = pair
    state = ema.state_dict()
    ema.update(4)
    assert not torch.equal(state["0.weight"], ema.state_dict()["0.weight"])  # a copy
    save_file(state, tmp_path / "ema.safetensors")
    other = FlatEMA(small_model())
    other.load_state_dict(load_file(tmp_path / "ema.safetensors"))
    assert_equal(other.state_dict(), state)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("2.bias"), "2.bias is missing"),
        (lambda s: s.update({"2.bais": s["2.bias"]}), "2.bais is not a parameter"),
        (lambda s: s.update({"2.bias": s["2.bias"][:2]}), r"2.bias is torch.float32 \(2,\)"),
        (lambda s: s.update({"2.bias": s["2.bias"].bfloat16()}), "2.bias is torch.bfloat16"),
        (lambda s: s.update({"4.weight": s["4.weight"].T.contiguous()}), r"4.weight is .* \(48, 7\)"),
    ],
)
def test_a_wrong_state_raises_and_changes_nothing(pair, edit, message):
    _, ema = pair
    before = ema.state_dict()
    state = {name: tensor + 1 for name, tensor in before.items()}
    edit(state)
    with pytest.raises(ValueError, match=message):
        ema.load_state_dict(state)
    assert_equal(ema.state_dict(), before)


# ---- A model in flat memory works as before --------------------------------------------------------------------------


def train(model, parameters, steps=3):
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True)
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = torch.randn(4, 1, 8, 8, generator=generator)
        F.mse_loss(model(x), torch.ones(4, 7)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_is_unchanged_and_parameters_are_the_same_objects():
    plain, flat = small_model(), small_model()
    objects, expected_strides = list(flat.parameters()), [p.stride() for p in flat.parameters()]
    ema = FlatEMA(flat)
    assert all(a is b for a, b in zip(flat.parameters(), objects))
    assert [p.stride() for p in flat.parameters()] == expected_strides
    assert_equal(copies(flat), copies(plain))
    train(plain, plain.parameters())
    train(flat, flat.parameters())
    for name, weights in copies(plain).items():
        torch.testing.assert_close(dict(flat.named_parameters())[name], nn.Parameter(weights))
    assert_flat(flat, ema)


def test_memory_format_is_kept():
    model = small_model().to(memory_format=torch.channels_last)
    expected = copies(model)
    ema = FlatEMA(model)
    assert not model[2].weight.is_contiguous()
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert_equal(copies(model), expected)
    assert_equal(ema.state_dict(), expected)
    assert all(tensor.is_contiguous() for tensor in ema.state_dict().values())


def test_load_state_dict_of_the_model_writes_to_the_flat_memory(pair):
    model, ema = pair
    other = small_model()
    change(other, 9)
    model.load_state_dict(other.state_dict())
    assert_equal(copies(model), copies(other))
    assert_flat(model, ema)


@pytest.mark.parametrize(
    "leave",
    [
        lambda model: model.double(),
        lambda model: model.to("meta"),
        lambda model: model.load_state_dict(small_model().state_dict(), assign=True),
    ],
)
def test_a_model_that_left_the_flat_memory_raises(pair, leave):
    model, ema = pair
    leave(model)
    with pytest.raises(RuntimeError, match="no longer where FlatEMA put them"):
        ema.update(4)
    with pytest.raises(RuntimeError, match="no longer where FlatEMA put them"), ema.applied():
        pass


def test_every_library_saves_all_tensors_of_a_unet(tmp_path):
    unet = make_denoiser("tiny", height=16, width=16, in_channels=1)
    FlatEMA(unet)
    expected = copies(unet)
    save_file(unet.state_dict(), tmp_path / "safetensors")
    assert_equal(load_file(tmp_path / "safetensors"), expected)
    torch.save(unet.state_dict(), tmp_path / "torch")
    assert_equal(torch.load(tmp_path / "torch", weights_only=True), expected)
    unet.save_pretrained(str(tmp_path / "diffusers"))
    assert_equal(copies(UNet2DModel.from_pretrained(str(tmp_path / "diffusers"))), expected)


def test_accelerate_prepares_and_saves_all_tensors(tmp_path):
    model = small_model()
    ema = FlatEMA(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    try:
        prepared = accelerator.prepare(model)
        train(prepared, prepared.parameters())
        ema.update(1)
        accelerator.save_state(str(tmp_path))
        expected = copies(model)
        assert_equal({k: v for k, v in load_file(tmp_path / "model.safetensors").items() if k in expected}, expected)
        change(model, 8)
        accelerator.load_state(str(tmp_path))
        assert_equal(copies(model), expected)
        assert_flat(model, ema)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_ddp_wraps_a_flat_model():
    model = small_model()
    model[1].requires_grad_(False)
    ema = FlatEMA(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        before = copies(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        train(wrapped, wrapped.parameters())
        assert not torch.equal(model[0].weight, before["0.weight"])
        ema.update(1)
        assert_equal(ema.state_dict(), copies(model))
        assert_flat(model, ema)
    finally:
        dist.destroy_process_group()


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"max_decay": 1.0}, "1.0"),
        ({"max_decay": -0.1}, "-0.1"),
        ({"max_decay": math.nan}, "nan"),
        ({"inv_gamma": 0}, "0"),
        ({"power": -1.5}, "-1.5"),
        ({"power": math.inf}, "inf"),
    ],
)
def test_bad_options_are_named(options, value):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is {value}"):
        FlatEMA(small_model(), **options)


def test_bad_models_and_steps_are_named():
    with pytest.raises(ValueError, match="no parameters"):
        FlatEMA(nn.ReLU())
    half = small_model()
    half[2].half()
    with pytest.raises(ValueError, match=r"2.weight is torch.float16 on cpu"):
        FlatEMA(half)
    with pytest.raises(ValueError, match="meta"):
        FlatEMA(small_model().to("meta"))
    with pytest.raises(ValueError, match="step is 0"):
        FlatEMA(small_model()).update(0)
