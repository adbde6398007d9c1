"""Calibrated sampling: calibrated.py. The outside truth is diffusers' DPM-Solver++, and the formula by hand."""

import copy
import json
import math
import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as BuiltInDDPMScheduler

from ddpm_pipeline import DDPMPipeline, DDPMScheduler, calibrated
from ddpm_pipeline.calibrated import CALIBRATION, CalibratedScheduler, Guidance, Table, load_tables, save_tables
from ddpm_pipeline.schedulers import COMPATIBLE
from ddpm_pipeline.solver_tables import dpm_solver_table, trailing_times, with_noise
from tests.gaussian import gaussian_images, gaussian_pipe
from tests.models import quiet, tiny_pipe, tiny_unet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
T = 20
FOUR = Table(
    [19, 12, 8, 2], [18, 12, 9, 0],
    [[0.5, 0.4], [0.6, 0.5, -0.1], [0.3, 0.9, -0.3, 0.1], [0.1, 1.0, -0.2, 0.1]],
)  # fmt: skip
THREE = Table([19, 10, 3], [19, 10, 3], [[0.4, 0.5], [0.5, 0.6, -0.2], [0.0, 1.2, -0.2]])


def calibrated_pipe(*tables, **options):
    """A tiny pipeline with these tables, by default FOUR and THREE; each step of its network is noted in `seen`."""
    pipe = tiny_pipe(num_train_timesteps=T, **options)
    save_tables(pipe.scheduler, pipe.unet, tables or (FOUR, THREE))
    return pipe


@pytest.fixture
def pipe():
    return calibrated_pipe()


def sample(pipe, **options):
    return pipe(**{"seeds": [3, 4], "num_inference_steps": 4, "output_type": "latent", **options}).images


def network_timesteps(pipe, **options):
    """What the network is conditioned on in a call."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(int(args[1])))
    sample(pipe, **options)
    hook.remove()
    return seen


# ---- The steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_numbers_of_dpm_solver_give_its_images(order, prediction_type):
    pipe = gaussian_pipe(prediction_type)
    solver = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, solver_order=order, final_sigmas_type="zero", lower_order_final=False
    )
    expected = sample(quiet(DDPMPipeline(pipe.unet, solver)), num_inference_steps=12)
    assert len(solver.timesteps) == 12
    save_tables(pipe.scheduler, pipe.unet, [dpm_solver_table(pipe.scheduler, solver.timesteps.tolist(), order)])
    actual = sample(pipe, num_inference_steps=12)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert (sample(pipe, num_inference_steps=12, eta=0) - expected).abs().max() > (0 if order == 1 else 1e-3)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_step_is_a_sum_of_x_t_and_the_last_predictions(dtype, atol):
    """By hand: clipped predictions of x_0 at the timesteps of the network. Sampling is in float32."""
    pipe = calibrated_pipe()
    pipe.unet.to(dtype)
    assert network_timesteps(pipe) == FOUR.network_timesteps
    alpha_bar, x_t, predictions = BuiltInDDPMScheduler(T).alphas_cumprod, torch.randn(2, 1, 8, 8), []
    latents = x_t
    trajectory = list(pipe.trajectory(latents=latents, num_inference_steps=4))
    for t, row, step in zip(FOUR.network_timesteps, FOUR.coefficients, trajectory):
        torch.testing.assert_close(step.x_t, x_t, rtol=0, atol=atol)
        with torch.no_grad():
            eps = pipe.unet(x_t.to(dtype), t).sample.float()
        x_0_pred = (x_t - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()
        predictions.insert(0, x_0_pred.clamp(-1, 1))
        torch.testing.assert_close(step.x_0_pred, predictions[0], rtol=0, atol=atol)
        x_t = row[0] * x_t + sum(c * prediction for c, prediction in zip(row[1:], predictions))
    assert [step.t for step in trajectory] == FOUR.timesteps
    result = sample(pipe, latents=latents, seeds=None)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, x_t.clamp(-1, 1), rtol=0, atol=atol)  # clipped, as its predictions are


@pytest.mark.parametrize("seeds", [[3, 4], [4]])
def test_a_table_with_the_noise_of_ddpm_gives_its_images(seeds):
    """The same seeds draw the same noise in each step, and none after the last."""
    pipe = gaussian_pipe("epsilon")
    pipe.scheduler.register_to_config(timestep_spacing="trailing")
    expected = sample(pipe, num_inference_steps=12, eta=1, seeds=seeds)
    table = dpm_solver_table(pipe.scheduler, trailing_times(pipe.scheduler, 12), order=1)
    save_tables(pipe.scheduler, pipe.unet, [with_noise(table, pipe.scheduler, [1.0] * 12)])
    torch.testing.assert_close(sample(pipe, num_inference_steps=12, seeds=seeds), expected, rtol=0, atol=1e-5)
    save_tables(pipe.scheduler, pipe.unet, [table])
    assert (sample(pipe, num_inference_steps=12, seeds=seeds) - expected).abs().max() > 0.1


def test_a_learned_variance_is_not_used():
    options = {"variance_type": "learned_range", "timestep_spacing": "trailing"}
    pipe = calibrated_pipe(scheduler=DDPMScheduler(T, **options), out_channels=2)
    plain = calibrated_pipe(scheduler=DDPMScheduler(T), unet=copy.deepcopy(pipe.unet))
    with torch.no_grad():  # of the variance
        for parameter in (pipe.unet.conv_out.weight, pipe.unet.conv_out.bias):
            parameter[1] += 1
    save_tables(pipe.scheduler, pipe.unet, [FOUR])
    with pytest.raises(ValueError, match="predicts a variance"):
        sample(plain)
    result = sample(pipe)
    with torch.no_grad():
        for parameter in (pipe.unet.conv_out.weight, pipe.unet.conv_out.bias):
            parameter[1] -= 1
    save_tables(pipe.scheduler, pipe.unet, [FOUR])
    assert torch.equal(sample(pipe), result)


def test_steps_are_taken_in_order(pipe):
    x_t = torch.randn(1, 1, 8, 8)
    scheduler = CalibratedScheduler(pipe.scheduler, FOUR)
    with pytest.raises(ValueError, match=r"timestep is 8 after 0 steps: .* in the order \[19, 12, 8, 2\]"):
        scheduler.step(x_t, 8, x_t)
    scheduler.step(x_t, torch.tensor(19), x_t)
    for wrong in (19, 8, 11):
        with pytest.raises(ValueError, match=rf"timestep is {wrong} after 1 steps"):
            scheduler.step(x_t, wrong, x_t)
    scheduler.step(x_t, 12, x_t)


def test_an_image_depends_on_its_own_seed_alone(pipe):
    seeds = [7, 8, 0, 123, 2**32 - 1]
    batch = sample(pipe, seeds=seeds)
    for i, seed in enumerate(seeds):
        torch.testing.assert_close(sample(pipe, seeds=seed)[0], batch[i], rtol=0, atol=1e-6)
    assert torch.equal(sample(pipe, seeds=seeds), batch)
    difference = (batch[:, None] - batch[None]).abs().amax(dim=(2, 3, 4)) + torch.eye(5)
    assert difference.min() > 0.1


def test_calls_with_different_tables_at_once(pipe):
    alone = [sample(pipe, num_inference_steps=steps) for steps in (4, 3, 5)]
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(sample, pipe, num_inference_steps=steps) for _ in range(5) for steps in (4, 3, 5)]
    for call, expected in zip(calls, alone * 5):
        assert torch.equal(call.result(), expected)


def test_callbacks_interrupts_and_sizes(pipe, capsys):
    seen = []

    def halve(pipe, i, t, tensors):
        seen.append((i, t))
        pipe.interrupt = i == 2
        return {"latents": tensors["latents"] / 2}

    pipe.set_progress_bar_config(disable=False)
    sample(pipe, callback_on_step_end=halve)
    assert seen == [(0, 19), (1, 12), (2, 8)] and pipe.num_timesteps == 4
    assert "3/4" in capsys.readouterr().err
    assert pipe.scheduler.timesteps.tolist() == FOUR.timesteps
    pipe.set_progress_bar_config(disable=True)
    assert sample(pipe, height=16, width=4).shape == (2, 1, 16, 4)


def test_a_trajectory_from_an_image_and_predictions_that_are_changed(pipe):
    image = gaussian_images(1, dtype=torch.float32)
    steps = list(pipe.trajectory(image=image, seeds=[1], num_inference_steps=4))
    assert [step.t for step in steps] == FOUR.timesteps[::-1] + FOUR.timesteps
    last = None
    for step in pipe.trajectory(seeds=[3, 4], num_inference_steps=4):
        step.x_0_pred.zero_()
        last = step
    assert torch.equal(last.images, sample(pipe))


def test_methods_that_start_from_images_take_no_table(pipe):
    images, plain = gaussian_images(2, dtype=torch.float32), tiny_pipe(num_train_timesteps=T)
    options = {"seeds": [1, 2], "num_inference_steps": 4, "output_type": "latent"}
    for call in (
        lambda pipe: pipe.vary(images, 0.5, **options).images,
        lambda pipe: pipe.vary(images, 1, **options).images,
        lambda pipe: pipe.inpaint(images, torch.ones(8, 8), jump_length=1, resamples=2, **options).images,
        lambda pipe: pipe.invert(images, 4),
        lambda pipe: pipe.fuse(*images[:, None], num_inference_steps=4, output_type="latent").images,
    ):
        assert torch.equal(call(pipe), call(plain))
    assert torch.equal(pipe.vary(images, 1, **options).images, pipe(**options, calibrated=False).images)


# ---- Which calls use a table -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, FOUR.network_timesteps),
        ({"calibrated": True}, FOUR.network_timesteps),
        ({"calibrated": np.True_}, FOUR.network_timesteps),
        ({"num_inference_steps": 3}, THREE.network_timesteps),
        ({"num_inference_steps": 5}, [19, 15, 11, 7, 3]),
        ({"calibrated": False}, [19, 14, 9, 4]),
        ({"calibrated": 0}, [19, 14, 9, 4]),
        ({"eta": 0}, [19, 14, 9, 4]),
        ({"timesteps": [19, 5], "num_inference_steps": None}, [19, 5]),
        ({"num_inference_steps": None}, list(range(T))[::-1]),
    ],
)
def test_calls_with_and_without_a_table(pipe, options, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert network_timesteps(pipe, **options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.0}, "calibrated=True, but eta is given"),
        ({"timesteps": [19, 5], "num_inference_steps": None}, "calibrated=True, but timesteps is given"),
        ({"num_inference_steps": 5}, "no table for 5 steps: this model has tables for 4 steps, 3 steps"),
        ({"height": 16}, "calibrated=True, but the tables are for 8 x 8 pixels, and these images have 16 x 8"),
        ({"num_inference_steps": None}, "no table for 20 steps: this model has tables for 4 steps, 3 steps"),
        ({"calibrated": "yes"}, "calibrated is 'yes': give one of None, True, False"),
        ({"calibrated": np.array([1, 2])}, "calibrated is array([1, 2]): give one of None, True, False"),
        ({"calibrated": torch.tensor([1, 2])}, "calibrated is tensor([1, 2]): give one of None, True, False"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
    ],
)
def test_what_a_table_does_not_go_with(pipe, options, message):
    for call in (sample, lambda pipe, **options: pipe.trajectory(**options)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(pipe, **{"calibrated": True, "num_inference_steps": 4, **options})


def test_models_without_tables():
    pipe = tiny_pipe(num_train_timesteps=T)
    assert network_timesteps(pipe) == [19, 14, 9, 4]
    with pytest.raises(
        ValueError, match="calibrated=True, but there is no table for 4 steps: this model has no tables"
    ):
        sample(pipe, calibrated=True)
    pipe = calibrated_pipe()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert network_timesteps(pipe) == [19, 14, 9, 4]
    with pytest.raises(ValueError, match="the scheduler is a DDIMScheduler: tables are for our DDPMScheduler"):
        sample(pipe, calibrated=True)


@pytest.mark.parametrize("interval", [None, (5, 15)])
def test_a_table_is_for_its_guidance(interval):
    guided = FOUR._replace(guidance=Guidance(2.0, guidance_interval=interval))
    pipe = calibrated_pipe(guided, THREE, num_class_embeds=3)
    same = {"guidance_scale": 2, "guidance_interval": interval, "class_labels": 1}
    assert network_timesteps(pipe, **same) == FOUR.network_timesteps
    for other in (
        {"guidance_scale": 1.0, "guidance_interval": None},
        {"guidance_scale": 3.0},
        {"guidance_interval": (4, 15)},
    ):
        assert network_timesteps(pipe, **{**same, **other}) == [19, 14, 9, 4]
    name = "4 steps with guidance_scale=2" + (f", guidance_interval={interval}" if interval else "")
    message = f"no table for 4 steps with guidance_scale=3: this model has tables for {name}, 3 steps"
    with pytest.raises(ValueError, match=re.escape(message)):
        sample(pipe, class_labels=1, guidance_scale=3, calibrated=True)
    with pytest.warns(UserWarning, match="guidance_interval=.* has no effect"):
        steps = network_timesteps(pipe, class_labels=1, num_inference_steps=3, guidance_interval=(5, 15))
    assert steps == THREE.network_timesteps


# ---- Which model a table is for --------------------------------------------------------------------------------------


def other_scheduler(pipe, **options):
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, **options)


def change_in_place(pipe):
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] += 1e-3


def change_below_half_precision(pipe):
    with torch.no_grad():
        pipe.unet.conv_in.weight *= 1 + 1e-6


def change_behind_torch(pipe):
    pipe.unet.conv_in.weight.data.add_(1e-3)


def change_and_hide_a_hash(pipe):
    change_in_place(pipe)
    pipe.scheduler.config[CALIBRATION]["weights"]["float16"] = None


def replace(pipe):
    pipe.unet = tiny_unet(seed=1)


def load_others(pipe):
    pipe.unet.load_state_dict(tiny_unet(seed=1).state_dict(), assign=True)


@pytest.mark.parametrize("before", [True, False], ids=["sampled before", "new"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_in_place, "they were fitted to other weights"),
        (change_below_half_precision, "they were fitted to other weights"),
        (change_and_hide_a_hash, "they were fitted to other weights"),
        (change_behind_torch, "they were fitted to other weights"),
        (replace, "they were fitted to other weights"),
        (load_others, "they were fitted to other weights"),
        (lambda pipe: other_scheduler(pipe, prediction_type="v_prediction"), "with prediction_type='epsilon'"),
        (lambda pipe: other_scheduler(pipe, clip_sample=False), "fitted with clip_sample=True, and it has False"),
        (lambda pipe: other_scheduler(pipe, beta_end=0.021), "they were fitted with another noise schedule"),
        (lambda pipe: other_scheduler(pipe, num_train_timesteps=21), "num_train_timesteps=20, and it has 21"),
        (lambda pipe: other_scheduler(pipe, num_train_timesteps=10), "num_train_timesteps=20, and it has 10"),
        (lambda pipe: pipe.unet.to("meta"), "on the meta device"),
    ],
)  # fmt: skip
def test_a_table_of_another_model_is_refused(pipe, change, reason, before):
    if before:
        sample(pipe)
    change(pipe)
    with pytest.raises(ValueError, match="calibrated=True, but the tables are not for this model") as caught:
        sample(pipe, calibrated=True)
    assert reason in str(caught.value)
    if "meta" in reason:
        return
    with pytest.warns(UserWarning, match="sampling without calibration: the tables are not for this model") as warned:
        images = sample(pipe)
    assert len(warned) == 1 and reason in str(warned[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(images, sample(pipe, calibrated=False))
        sample(pipe, num_inference_steps=5)
    with pytest.warns(UserWarning, match="sampling without calibration") as warned:
        pipe(num_inference_steps=4, seeds=1)
    assert warned[0].filename == __file__


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_same_weights_in_another_dtype(pipe, dtype, tmp_path):
    pipe.unet.to(dtype)
    assert network_timesteps(pipe, calibrated=True) == FOUR.network_timesteps
    if dtype != torch.float64:  # back in float32 they are rounded, and still these
        pipe.unet.float()
        assert network_timesteps(pipe, calibrated=True) == FOUR.network_timesteps
        change_in_place(pipe)
        with pytest.raises(ValueError, match="other weights"):
            sample(pipe, calibrated=True)


def test_weights_are_hashed_once(pipe, monkeypatch):
    hashed = []
    plain = calibrated.hash_weights
    monkeypatch.setattr(calibrated, "hash_weights", lambda *args: hashed.append(args) or plain(*args))
    for _ in range(2):
        sample(pipe)
        sample(pipe, num_inference_steps=3, calibrated=True)
    assert len(hashed) == 1
    pipe.unet.to(memory_format=torch.channels_last)  # the same weights, elsewhere
    sample(pipe, calibrated=True)
    compiled = torch.compile(pipe.unet)
    assert calibrated.why_not(pipe.scheduler, compiled, None, FOUR) is None
    assert len(hashed) == 3


# ---- Saved tables ----------------------------------------------------------------------------------------------------


def test_saved_tables_are_plain_numbers_and_the_same_again(tmp_path):
    numbers = Table(
        np.array(FOUR.timesteps).tolist(), [np.int64(t) for t in FOUR.network_timesteps],
        [list(np.array(row)) for row in FOUR.coefficients], Guidance(np.float32(2), guidance_interval=(1, 5)),
    )  # fmt: skip
    pipe = calibrated_pipe(numbers, THREE)
    expected = [FOUR._replace(guidance=Guidance(2.0, 1.0, (1.0, 5.0))), THREE]
    assert load_tables(pipe.scheduler) == expected
    for name in ("first", "second"):
        pipe.save_pretrained(tmp_path / name)
        pipe = quiet(DDPMPipeline.from_pretrained(tmp_path / name))
        assert load_tables(pipe.scheduler) == expected
    first, second = (tmp_path / name / "scheduler" / "scheduler_config.json" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    pipe.unet.half()
    pipe.save_pretrained(tmp_path / "half")
    assert network_timesteps(DDPMPipeline.from_pretrained(tmp_path / "half"), num_inference_steps=3) == THREE.timesteps


@pytest.mark.parametrize("name", COMPATIBLE)
def test_built_in_classes_keep_the_field_without_a_warning(pipe, name, tmp_path, diffusers_log):
    """So does their from_config: the way back to our scheduler has the tables again."""
    pipe.save_pretrained(tmp_path / "ours")
    built_in = getattr(diffusers, name)
    config = json.loads((tmp_path / "ours" / "scheduler" / "scheduler_config.json").read_text())
    for scheduler in (
        built_in.from_config(pipe.scheduler.config),
        built_in.from_config(config),
        built_in.from_pretrained(tmp_path / "ours", subfolder="scheduler"),
    ):
        scheduler.save_pretrained(tmp_path / "built-in")
        config = built_in.from_pretrained(tmp_path / "built-in").config
        ours = DDPMScheduler.from_config(config, variance_type="fixed_small", timestep_spacing="trailing")
        assert load_tables(ours) == [FOUR, THREE]
    assert not any(CALIBRATION in record.getMessage() for record in diffusers_log.records)
    again = quiet(DDPMPipeline(pipe.unet, ours))
    assert network_timesteps(again, calibrated=True) == FOUR.network_timesteps


def first(saved):
    return saved["tables"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["tables"][1]["coefficients"][2].__setitem__(1, math.nan), "coefficients is nan"),
        (lambda saved: first(saved)["coefficients"][0].__setitem__(0, 1e9), "coefficients is 1000000000.0"),
        (lambda saved: first(saved)["coefficients"][0].__setitem__(0, "0.5"), "coefficients is '0.5'"),
        (lambda saved: first(saved)["coefficients"][0].append(0.1), "step 0 has 3 entries: give 2"),
        (lambda saved: first(saved)["coefficients"][3].append(0.1), "step 3 has 5 entries: give 2 to 4"),
        (lambda saved: first(saved)["coefficients"][3].clear(), "step 3 has 0 entries"),
        (lambda saved: first(saved)["coefficients"].pop(), "coefficients has 3 entries: give 4"),
        (lambda saved: first(saved)["coefficients"].__setitem__(0, 0.5), "coefficients of step 0 is 0.5: give a list"),
        (lambda saved: first(saved)["network_timesteps"].append(0), "network_timesteps has 5 entries: give 4"),
        (lambda saved: first(saved)["network_timesteps"].__setitem__(0, 20), "network_timesteps is 20"),
        (lambda saved: first(saved)["timesteps"].__setitem__(0, 20), "timesteps is 20: give an integer from 0 to 19"),
        (lambda saved: first(saved)["timesteps"].__setitem__(0, 12), "timesteps are [12, 12, 8, 2]: give"),
        (lambda saved: first(saved)["timesteps"].__setitem__(0, 19.5), "timesteps is 19.5"),
        (lambda saved: first(saved).__setitem__("timesteps", "1000"), "timesteps is '1000': give a list"),
        (lambda saved: first(saved).__setitem__("timesteps", list(range(999))), "timesteps has 999 entries"),
        (lambda saved: first(saved).pop("guidance"), "a table has ['coefficients', 'network_timesteps', 'noise'"),
        (lambda saved: first(saved).update(noise=[0.1]), "noise has 1 entries: give 4"),
        (lambda saved: first(saved).update(noise=[0.1, 0.1, -0.1, 0]), "noise is -0.1: give numbers from 0 to 10"),
        (lambda saved: first(saved).update(noise=[0.1, 0.1, math.nan, 0]), "noise is nan"),
        (lambda saved: first(saved).update(noise="0000"), "noise is '0000': give a list"),
        (lambda saved: saved.update(guide="0" * 64), "guide has '000"),
        (lambda saved: first(saved)["guidance"].pop("guidance_scale"), "guidance has ['autoguidance_scale', 'gu"),
        (lambda saved: first(saved)["guidance"].update(guidance_scale="2"), "guidance_scale is '2'"),
        (lambda saved: first(saved)["guidance"].update(guidance_interval=[1]), "guidance_interval has 1 entries"),
        (lambda saved: saved["tables"].append(first(saved)), "tables has two for 4 steps"),
        (lambda saved: saved.update(tables=saved["tables"] * 600), "tables has 1200 entries: give 1 to 1000"),
        (lambda saved: saved.update(tables={}), "tables is {}: give a list"),
        (lambda saved: saved.update(weights="0" * 64), "weights has '000"),
        (lambda saved: saved["scheduler"].pop("alpha_bar"), "scheduler has ["),
        (lambda saved: saved["scheduler"].update(alpha_bar=[0.5]), "alpha_bar has 1 entries: give 9"),
        (lambda saved: saved["scheduler"].update(num_train_timesteps="20"), "num_train_timesteps is '20': give an int"),
        (lambda saved: saved["scheduler"].update(num_train_timesteps=0), "num_train_timesteps is 0: give an integer"),
        (lambda saved: saved["scheduler"].update(num_train_timesteps=19), "timesteps is 19: give an integer from 0 to"),
        (lambda saved: saved.clear(), "the field has []: give weights, guide, scheduler, tables"),
    ],
)  # fmt: skip
def test_damaged_tables_are_named(pipe, change, message, tmp_path):
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    change(config[CALIBRATION])
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(f"{file}: {CALIBRATION}: ")) as caught:
        DDPMPipeline.from_pretrained(tmp_path)
    assert message in str(caught.value) and len(str(caught.value)) < 500
    assert "remove this field, then calibrate again" in str(caught.value)


@pytest.mark.parametrize("alpha_bar", [[1] * 9, [0] * 9])
def test_integers_are_an_alpha_bar(pipe, alpha_bar):
    """As json.dumps writes what was edited by hand."""
    pipe.scheduler.config[CALIBRATION]["scheduler"]["alpha_bar"] = alpha_bar
    with pytest.warns(UserWarning, match="they were fitted with another noise schedule"):
        assert network_timesteps(pipe) == [19, 14, 9, 4]


def test_tables_of_a_process_of_another_length_stay(pipe):
    """They are this model's again with its own scheduler."""
    shorter = DDPMScheduler.from_config(pipe.scheduler.config, num_train_timesteps=10)
    assert load_tables(shorter) == [FOUR, THREE]
    pipe.scheduler = DDPMScheduler.from_config(shorter.config, num_train_timesteps=T)
    assert network_timesteps(pipe, calibrated=True) == FOUR.network_timesteps


def test_a_bad_table_is_not_saved(pipe):
    for bad in (FOUR._replace(timesteps=[1, 2, 3, 4]), FOUR._replace(coefficients=[[math.inf, 1]] * 4)):
        with pytest.raises(ValueError, match=r"timesteps are|coefficients is inf"):
            save_tables(pipe.scheduler, pipe.unet, [bad])
    assert load_tables(pipe.scheduler) == [FOUR, THREE]
