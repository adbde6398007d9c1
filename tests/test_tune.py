"""The trial at the start of a run: what it chooses, what it leaves as it was, and what it keeps for the next run."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention

from ddpm_pipeline.fast_unet import FastResnetBlock2D
from tests.arrays import save_images
from tests.short_run import SHORT_RUN, flags, fresh_accelerate, run_here
from training import tune
from training.config import Config
from training.denoiser import make_denoiser
from training.run.runtime import Runtime
from training.tune import Trial, Tuning

SHAPE = (1, 8, 8)


@pytest.fixture
def runtime():
    with fresh_accelerate():
        yield Runtime("no", 1)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return make_denoiser("tiny", height=8, width=8, in_channels=1, dropout=0.1)


def trial_with_speeds(unet, runtime, speed, monkeypatch, batch_size=16, deadline=1e9, clock=lambda: 0.0):
    """A trial in which a step with a candidate takes 1 / speed(candidate) seconds for each image."""
    trial = Trial(unet, SHAPE, batch_size, runtime, deadline, clock)
    monkeypatch.setattr(trial, "_seconds", lambda tuning: trial._batch_size / speed(tuning))
    return trial


@pytest.mark.parametrize(
    "fastest", [Tuning(f, a) for f in ("channels_last", "contiguous") for a in ("chunks", "fused")]
)
@pytest.mark.parametrize("default", [Tuning("channels_last", "chunks"), Tuning("contiguous", "fused")])
def test_the_fastest_is_chosen(unet, runtime, monkeypatch, fastest, default):
    def speed(tuning):
        same = (tuning.attention == fastest.attention) + (tuning.memory_format == fastest.memory_format)
        return 100 * 1.2**same

    assert trial_with_speeds(unet, runtime, speed, monkeypatch).run(default) == fastest


def test_the_default_stays_where_nothing_is_clearly_faster(unet, runtime, monkeypatch):
    default = Tuning("contiguous", "fused")
    trial = trial_with_speeds(unet, runtime, lambda tuning: 100 if tuning == default else 102, monkeypatch)
    assert trial.run(default) == default
    assert len(trial.rates) == 3


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_load_that_comes_or_goes_does_not_choose(unet, runtime, monkeypatch, before, after):
    """After some steps of the trial, everything takes three times as long, or a third."""
    default = Tuning("channels_last", "chunks")
    trial = trial_with_speeds(unet, runtime, lambda tuning: 110 if tuning == default else 100, monkeypatch)
    alone, taken = trial._seconds, []
    for change in range(20):

        def seconds(tuning, change=change):
            taken.append(tuning)
            return alone(tuning) * (before if len(taken) <= change else after)

        monkeypatch.setattr(trial, "_seconds", seconds)
        taken.clear()
        trial.rates.clear()
        assert trial.run(default) == default
    assert len(taken) == 18  # two to cut the batch, eight for each other candidate


def test_no_candidate_begins_after_the_deadline(unet, runtime, monkeypatch):
    default = Tuning("contiguous", "fused")
    trial = trial_with_speeds(unet, runtime, lambda tuning: 100, monkeypatch, deadline=5, clock=lambda: 6.0)
    assert trial.run(default) == default and not trial.rates


@pytest.mark.parametrize("adapts", [True, False])
@pytest.mark.parametrize(("fastest", "expected"), [(16, None), (8, 8), (4, 4), (1, 2)])
def test_threads_are_halved_while_that_is_faster(unet, runtime, monkeypatch, fastest, expected, adapts):
    """From 16 threads; 2 are enough for any machine."""
    speeds = {16: 100, 8: 130, 4: 170, 2: 220} | {n: 50 for n in (8, 4, 2) if n < fastest}
    monkeypatch.setattr(Runtime, "adapts_threads", adapts)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    trial = trial_with_speeds(unet, runtime, lambda tuning: speeds[tuning.threads or 16], monkeypatch)
    assert trial.run(Tuning("contiguous", "fused")).threads == (expected if adapts else None)
    assert set_to[-1] == 16


def test_a_trial_leaves_weights_gradients_mode_and_random_numbers_alone(unet, runtime):
    unet.eval()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    trial = Trial(unet, SHAPE, 4, runtime, deadline=float("inf"))
    best = trial.run(tune.default_tuning("cpu", torch.float32))
    assert best in trial.rates and len(trial.rates) == 3 and all(rate > 0 for rate in trial.rates.values())
    assert torch.equal(torch.randn(3), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert not unet.training


def test_a_long_step_is_tried_with_fewer_images(unet, runtime, monkeypatch):
    trial = trial_with_speeds(unet, runtime, lambda tuning: 8, monkeypatch, batch_size=64)  # 64 images: 8 seconds
    trial.run(Tuning("contiguous", "fused"))
    assert trial._batch_size == round(8 * tune.STEP_SECONDS)


def test_the_next_run_takes_what_was_found(unet, runtime, monkeypatch, tmp_path, capsys):
    found = tune.tune(unet, SHAPE, 2, runtime, tmp_path / "cache")
    assert "tuned in " in capsys.readouterr().out
    monkeypatch.setattr(Trial, "run", None)
    assert tune.tune(unet, SHAPE, 2, runtime, tmp_path / "cache") == found
    assert "tuned before" in capsys.readouterr().out
    other = make_denoiser("tiny", height=16, width=16, in_channels=1)
    for arguments in ((unet, SHAPE, 3, runtime), (unet, (1, 16, 8), 2, runtime), (other, SHAPE, 2, runtime)):
        with pytest.raises(TypeError):  # another batch, size or network: a trial begins
            tune.tune(*arguments, tmp_path / "cache")


@pytest.mark.parametrize("disturbance", ["nothing was compared", "threads"])
def test_what_a_busy_machine_found_is_not_kept(unet, runtime, monkeypatch, tmp_path, capsys, disturbance):
    if disturbance == "threads":
        seen = iter([2, 1])
        monkeypatch.setattr(Runtime, "threads", property(lambda self: next(seen)))
    else:
        monkeypatch.setattr(tune, "SECONDS", -1.0)
    tune.tune(unet, SHAPE, 2, runtime, tmp_path)
    assert "the next run tries again" in capsys.readouterr().out
    assert not (tmp_path / tune.FILE).exists()


def test_another_process_finds_it(tmp_path):
    """Sets have another order in each process, and diffusers keeps one in the configuration."""
    code = (
        "from pathlib import Path; from training import tune; from training.denoiser import make_denoiser\n"
        "from training.run.runtime import Runtime; unet = make_denoiser('tiny', height=8, width=8, in_channels=1)\n"
        "print(tune._key(unet, (1, 8, 8), 2, Runtime('no', 1)))\n"
    )
    keys = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed, "ACCELERATE_USE_CPU": "true"},
            cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True,
        ).stdout
        for seed in "123"
    }  # fmt: skip
    assert len(keys) == 1


WRONG = [
    '{"memory": 1}',
    '{"threads": 0}',
    '{"threads": "two"}',
    '{"attention": "flash"}',
    '{"memory_format": 7}',
    '"fused"',
]


@pytest.mark.parametrize("values", WRONG)
def test_a_tuning_of_another_version_in_a_checkpoint_is_said(unet, runtime, tmp_path, capsys, values):
    config = Config(dataset_name="moons", tune="off", cache_dir=str(tmp_path))
    found = (tmp_path, {"tuning": json.loads(values)})
    assert tune.choose(config, runtime, unet, SHAPE, found) == tune.default_tuning("cpu", torch.float32)
    assert "WARNING: this version cannot compute as the checkpoint says" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', *(f'{{"a": {values}}}' for values in WRONG)])
def test_damaged_results_are_replaced(unet, runtime, tmp_path, content):
    (tmp_path / tune.FILE).write_text(content)
    tune.tune(unet, SHAPE, 2, runtime, tmp_path)
    assert len(json.loads((tmp_path / tune.FILE).read_text())) == 1


def test_results_that_cannot_be_kept_cost_nothing_else(unet, runtime, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    tune.tune(unet, SHAPE, 2, runtime, tmp_path / "cache")


def test_a_choice_is_applied_and_replaced_by_another(unet):
    formats = []
    block = next(module for module in unet.modules() if type(module).__name__ == "ResnetBlock2D")
    for tuning in (Tuning("channels_last", "chunks"), Tuning("contiguous", "fused"), Tuning("channels_last", "fused")):
        tune.apply(tuning, unet)
        assert type(block) is FastResnetBlock2D
        assert len(unet._forward_pre_hooks) == 1
        processors = [module.processor for module in unet.modules() if isinstance(module, Attention)]
        assert processors and {processor.implementation for processor in processors} == {tuning.attention}
        handle = block.register_forward_hook(
            lambda module, inputs, output: formats.append(output.is_contiguous(memory_format=torch.channels_last))
        )
        unet(torch.randn(2, *SHAPE), torch.tensor([1, 2]))
        handle.remove()
    assert formats == [True, False, True]


@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_have_the_strides_of_their_weights(runtime, channels):
    """Else DistributedDataParallel copies them, and warns."""
    unet = make_denoiser("small", height=8, width=8, in_channels=channels)
    config = Config(dataset_name="moons", tune="off")
    tune.apply(tune.choose(config, runtime, unet, (channels, 8, 8), None), unet)
    strides = {}
    for name, parameter in unet.named_parameters():
        parameter.register_hook(lambda gradient, name=name: strides.update({name: gradient.stride()}))
    unet(torch.randn(2, channels, 8, 8), torch.tensor([3, 5]), return_dict=False)[0].square().mean().backward()
    ambiguous = [name for name, parameter in unet.named_parameters() if 1 in parameter.shape]
    assert len(ambiguous) > 4
    assert all(strides[name] == unet.get_parameter(name).stride() for name in ambiguous)


@pytest.mark.parametrize("setting", ["auto", "off"])
def test_a_resumed_run_computes_as_before(unet, runtime, tmp_path, setting):
    config = Config(dataset_name="moons", tune=setting, cache_dir=str(tmp_path))
    default = tune.default_tuning("cpu", torch.float32)
    before = Tuning("contiguous", "fused" if default.attention == "chunks" else "chunks")
    manifest = json.loads(json.dumps({"tuning": asdict(before)}))
    assert tune.choose(config, runtime, unet, SHAPE, (tmp_path, manifest)) == before
    if setting == "off":  # also for a checkpoint of an earlier version
        assert tune.choose(config, runtime, unet, SHAPE, (tmp_path, {})) == default
        assert not (tmp_path / tune.FILE).exists()


def test_the_choice_is_in_the_checkpoint_and_the_model(tmp_path):
    options = SHORT_RUN | {"tune": "auto", "max_train_steps": 1, "ddpm_num_inference_steps": 2, "num_sample_images": 2}
    paths = {"train_data_dir": save_images(tmp_path / "images", 8, 8, 8), "output_dir": tmp_path / "run"}
    options |= paths | {"cache_dir": tmp_path / "cache", "train_batch_size": 4, "validation_steps": 0}
    assert run_here("train.py", flags(options)) == 0
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    (chosen,) = json.loads((tmp_path / "cache" / tune.FILE).read_text()).values()
    for file in (checkpoint / "manifest.json", tmp_path / "run" / "pipeline" / "training.json"):
        assert json.loads(file.read_text())["tuning"] == chosen
    assert "Fast" not in (tmp_path / "run" / "pipeline" / "unet" / "config.json").read_text()
