"""Muon against the singular value decomposition, a NumPy implementation and torch's; which weights it is for."""

import math
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from tests.arrays import save_images
from tests.short_run import SHORT_RUN, flags, run_here, run_on_two
from training import tune
from training.config import Config
from training.denoiser import FORMER, make_denoiser
from training.muon import ITERATIONS, LEAST_NORM, Muon, matrix_names, orthogonalise
from training.step import make_optimizer

SHAPES = [(6, 6), (5, 27), (27, 5), (1, 9), (9, 1)]


def random_matrices(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def after_iterations(s):
    """What becomes of a singular value, by the polynomial of Jordan et al. 2024."""
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


# ---- Orthogonalisation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e5])
def test_it_changes_the_singular_values_alone(shape, scale):
    g = scale * random_matrices(3, *shape)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    expected = after_iterations(s / s.square().sum(1, keepdim=True).sqrt())
    result = orthogonalise(g)
    torch.testing.assert_close(u.mT @ result @ vh.mT, torch.diag_embed(expected), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.linalg.matrix_norm(result).square(), expected.square().sum(1))  # nothing else


def test_it_takes_singular_values_near_1_unless_they_are_tiny():
    s = torch.logspace(math.log10(1 / 600), 0, 100_000, dtype=torch.float64)
    assert after_iterations(s).min() > 0.68 and after_iterations(s).max() < 1.21
    s = torch.logspace(0, -2.5, 40, dtype=torch.float64)
    u, v = (torch.linalg.qr(random_matrices(n, 40, seed=n))[0] for n in (40, 360))
    values = torch.linalg.svdvals(orthogonalise((u * s @ v.mT)[None]))
    assert values.min() > 0.68 and values.max() < 1.21
    assert ITERATIONS == 5


def test_no_gradient_moves_nothing_and_rounding_errors_move_little():
    assert not orthogonalise(torch.zeros(2, 3, 4)).any()
    noise = 1e-4 * LEAST_NORM * random_matrices(1, 3, 4)
    assert torch.linalg.matrix_norm(orthogonalise(noise)) < 0.2


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_is_its_matrices_one_by_one(shape):
    g = random_matrices(7, *shape, dtype=torch.float32)
    one_by_one = torch.cat([orthogonalise(matrix[None]) for matrix in g])
    torch.testing.assert_close(orthogonalise(g), one_by_one, rtol=1e-4, atol=1e-5)


def test_float32_does_for_long_matrices_with_singular_values_of_all_sizes():
    s = torch.logspace(0, -4, 112, dtype=torch.float64)
    u, v = (torch.linalg.qr(random_matrices(n, 112, seed=n))[0] for n in (112, 1008))
    g = (u * s @ v.mT)[None]
    error = orthogonalise(g.float()).double() - orthogonalise(g)
    assert error.norm() < 1e-3 * orthogonalise(g).norm()


def test_bfloat16_is_as_good_as_its_digits():
    g = random_matrices(2, 32, 288)
    result = orthogonalise(g.bfloat16())
    assert result.dtype == torch.bfloat16
    assert (result.double() - orthogonalise(g)).norm() < 0.03 * orthogonalise(g).norm()


# ---- One step --------------------------------------------------------------------------------------------------------


def network():
    """Matrices of (4, 18), twice, (18, 4) and (9, 4); a first convolution and an embedding, which are none."""
    torch.manual_seed(0)
    layers = {
        "conv_in": nn.Conv2d(2, 2, 3),
        "first": nn.Conv2d(2, 4, 3),
        "second": nn.Conv2d(2, 4, 3),
        "narrow": nn.Conv2d(4, 18, 1),
        "linear": nn.Linear(4, 9),
        "norm": nn.GroupNorm(1, 3),
        "embedding": nn.Embedding(3, 4),
    }
    return nn.ModuleDict(layers)


SETTINGS = {"lr": 0.01, "weight_decay": 0.3, "betas": (0.9, 0.99), "eps": 1e-8}


def set_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))


def numpy_muon(w, g, state):
    """One step of Muon from the formulas, in float64."""
    state["m"] = 0.95 * state.get("m", 0) + g
    x = (g + 0.95 * state["m"]).reshape(len(g), -1)
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    o = (u * after_iterations(s / np.linalg.norm(x))) @ vh
    scale = 0.2 * max(x.shape) ** 0.5
    return w - SETTINGS["lr"] * (scale * o.reshape(w.shape) + SETTINGS["weight_decay"] * w)


def numpy_adamw(w, g, state):
    """One step of AdamW from the formulas, in float64."""
    (beta1, beta2), t = SETTINGS["betas"], state.get("t", 0) + 1
    m, v = beta1 * state.get("m", 0) + (1 - beta1) * g, beta2 * state.get("v", 0) + (1 - beta2) * g**2
    state |= {"t": t, "m": m, "v": v}
    update = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + SETTINGS["eps"])
    return w - SETTINGS["lr"] * (update + SETTINGS["weight_decay"] * w)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_steps_are_those_of_the_formulas(fused, channels_last):
    model = network()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = Muon(model, fused=fused, **SETTINGS)
    expected = {name: parameter.detach().numpy().astype(np.float64) for name, parameter in model.named_parameters()}
    matrices, states = matrix_names(model), {name: {} for name in expected}
    assert matrices == {f"{layer}.weight" for layer in ("first", "second", "narrow", "linear")}
    for step in range(1, 5):
        set_gradients(model, step)
        divisor = (1.0, 7.0, 1.0, 3.0)[step - 1] if fused else 1.0
        for name, parameter in model.named_parameters():
            if step == 3 and name == "second.weight":
                parameter.grad = None  # one that is not used in a step stays as it is
                continue
            g = parameter.grad.numpy().astype(np.float64) / divisor
            expected[name] = (numpy_muon if name in matrices else numpy_adamw)(expected[name], g, states[name])
        if fused:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(divisor), torch.tensor(0.0)
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            np.testing.assert_allclose(parameter.detach(), expected[name], rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")
def test_steps_are_those_of_torch_up_to_the_digits_of_bfloat16():
    """torch's computes in bfloat16, for linear layers alone."""
    ours, theirs = (nn.Sequential(nn.Linear(40, 20, bias=False), nn.Linear(20, 60, bias=False)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 0.01, "weight_decay": 0.3}
    optimizers = [
        Muon(ours, torch.bfloat16, **options),
        torch.optim.Muon(theirs.parameters(), adjust_lr_fn="match_rms_adamw", **options),
    ]
    before = [parameter.detach().clone() for parameter in ours.parameters()]
    for step in range(1, 4):
        for model, optimizer in zip((ours, theirs), optimizers):
            set_gradients(model, step)
            optimizer.step()
    for a, b, start in zip(ours.parameters(), theirs.parameters(), before):
        assert (a - b).norm() < 0.03 * (b - start).norm()


# ---- Which weights ---------------------------------------------------------------------------------------------------


LEARNED_TIME = FORMER["tiny"] | {"time_embedding_type": "learned", "num_train_timesteps": 9}


@pytest.mark.parametrize("denoiser", ["tiny", "ddpm-cifar10", LEARNED_TIME], ids=["tiny", "ddpm-cifar10", "learned"])
def test_the_matrices_of_a_network_are_all_weights_but_embeddings_and_the_first_and_last_convolution(denoiser):
    with torch.device("meta"):
        unet = make_denoiser(denoiser, height=32, width=32, in_channels=3, num_class_embeds=11)
    names = matrix_names(unet)
    several_dimensions = {name for name, parameter in unet.named_parameters() if parameter.ndim > 1}
    others = {"conv_in.weight", "conv_out.weight", "class_embedding.weight"}
    assert several_dimensions - names == others | ({"time_proj.weight"} if denoiser is LEARNED_TIME else set())
    assert names < several_dimensions
    assert {"time_embedding.linear_1.weight", "mid_block.attentions.0.to_q.weight",
            "mid_block.resnets.0.conv1.weight"} < names  # fmt: skip
    tune.apply(tune.default_tuning("cpu", torch.float32), unet)  # gives layers other classes
    assert matrix_names(unet) == names


def test_the_settings_are_those_of_adamw():
    model = network()
    config = Config(dataset_name="moons", optimizer="muon", adam_beta1=0.5, adam_weight_decay=0.1, adam_epsilon=1e-5)
    optimizer = make_optimizer(config, model)
    other = make_optimizer(Config(dataset_name="moons", optimizer="adamw"), model)
    assert isinstance(optimizer, Muon) and not isinstance(other, Muon)
    matrices, others = optimizer.param_groups
    assert [len(group["params"]) for group in (matrices, others)] == [4, 9]
    for group in (matrices, others):
        assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.5, 0.99), 0.1, 1e-5)


# ---- Runs ------------------------------------------------------------------------------------------------------------

RUN = SHORT_RUN | {
    "optimizer": "muon", "max_train_steps": 4, "checkpointing_steps": 2, "num_sample_images": 1,
    "ddpm_num_inference_steps": 1, "save_images_steps": 0, "validation_steps": 0,
}  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_has_the_same_bits_and_the_same_optimizer(tmp_path, capsys, ranks):
    data = save_images(tmp_path / "images", 6, 8, 8)
    options = {"train_data_dir": data, "cache_dir": tmp_path / "cache", "train_batch_size": 4 // ranks}

    def train(name, **more):
        arguments = flags(RUN | options | {"output_dir": tmp_path / name} | more)
        if ranks == 1:
            return run_here("train.py", arguments)
        run_on_two("train.py", arguments)
        return 0

    assert train("straight") == 0
    straight, resumed = (tmp_path / name / "checkpoint-000004" for name in ("straight", "resumed"))
    shutil.copytree(straight.parent, resumed.parent)
    shutil.rmtree(resumed)
    assert train("resumed", resume_from_checkpoint="latest") == 0
    for file in ("model.safetensors", "ema.safetensors", "optimizer.pt"):
        assert (resumed / file).read_bytes() == (straight / file).read_bytes(), file
    if ranks == 1:
        assert train("resumed", resume_from_checkpoint="latest", optimizer="adamw") == 2
        assert "optimizer 'muon', but now it is 'adamw'" in capsys.readouterr().err
