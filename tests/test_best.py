"""The best EMA weights by validation, in whole runs whose validations are scripted; the warning when the loss rises."""

import json
import math
import os
import signal

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file

from tests.arrays import save_images
from tests.models import tiny_unet
from tests.short_run import SHORT_RUN, dying_after, flags, run_here, run_on_two
from training.ema import FlatEMA
from training.hub import during_training
from training.run import checkpoint
from training.run.best import Best, LossRise, check_held_out
from training.run.sampling import EMASampler

UNET = "unet/diffusion_pytorch_model.safetensors"
OPTIONS = SHORT_RUN | {
    "train_batch_size": 4,
    "validation_steps": 1,
    "num_validation_images": 4,
    "save_images_steps": 0,
    "num_sample_images": 2,
    "ddpm_num_inference_steps": 2,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 6,
    "keep_best": "validation_loss",
    "report_to": "none",
}
DISTANCE = {"keep_best": "kernel_distance", "validation_samples": 4, "extractor": "pixels"}
# The losses of steps 1 to 6; a resumed run continues after step 3.
SCRIPTS = {
    "before": [0.3, 0.1, 0.5, 0.4, 0.2, 0.3],
    "at": [0.3, 0.2, 0.1, 0.4, 0.2, 0.3],
    "after": [0.3, 0.2, 0.4, 0.5, 0.1, 0.3],
    "last": [0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
    "ties": [0.3, 0.1, 0.1, 0.1, 0.1, math.nan],
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("best")
    save_images(folder / "images", 60, 16, 16)
    save_images(folder / "few", 5, 16, 16)
    tiny_unet(1, size=16).save_config(folder)
    return folder


def command_line(work, name, **options):
    folders = {"output_dir": work / name, "cache_dir": work / "cache", "train_data_dir": work / "images"}
    folders["denoiser"] = work / "config.json"
    return flags(OPTIONS | folders | options)


def train(work, name, script=None, measure="validation_loss", **options):
    """Run train.py in this process: its exit code. A validation of step n finds script[n - 1]."""
    see = Best.see

    def scripted(self, step, metrics, losses):
        see(self, step, {**metrics, measure: script[step - 1]}, losses)

    with pytest.MonkeyPatch.context() as patch:
        if script:
            patch.setattr(Best, "see", scripted)
        return run_here("train.py", command_line(work, name, **options))


def train_until(work, name, step, script, **options):
    """The same, but the process dies after the checkpoint of this step."""
    with dying_after(step):
        train(work, name, script, **options)


def ema_of(run, step):
    return load_file(run / f"checkpoint-{step:06d}" / "ema.safetensors")


def weights(run, name="pipeline"):
    return load_file(run / name / UNET)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def record_of(run, name="pipeline"):
    return json.loads((run / name / "training.json").read_text())


def files(run, step):
    return checkpoint.verify(run / f"checkpoint-{step:06d}")["files"]


@pytest.fixture(scope="module")
def uninterrupted(work):
    """For each script a run of six steps, with a checkpoint of each step."""
    for name, script in SCRIPTS.items():
        assert train(work, name, script) == 0
    return work


# ---- What is kept ----------------------------------------------------------------------------------------------------


def test_by_default_each_tenth_is_compared_whatever_the_clock_says(work, monkeypatch):
    """Two runs of ten steps whose validations take too long: without keep_best only the last one is made."""
    monkeypatch.setattr("training.loop.MOST_PAUSED", -1.0)
    for keep_best, validated in (("validation_loss", list(range(1, 11))), ("null", [10])):
        name = f"tenths-{keep_best}"
        assert train(work, name, keep_best=keep_best, validation_steps="null", max_train_steps=10) == 0
        lines = map(json.loads, (work / name / "metrics.jsonl").read_text().splitlines())
        assert [line["step"] for line in lines if "validation_loss" in line] == validated


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_pipeline_has_the_ema_weights_of_the_lowest_loss(uninterrupted, name):
    run, script = uninterrupted / name, SCRIPTS[name]
    best = int(np.nanargmin(script)) + 1
    assert equal(weights(run), ema_of(run, best)) and not equal(weights(run), ema_of(run, 7 - best))
    record = record_of(run)
    assert record["step"] == 6
    assert record["best"] == {"measure": "validation_loss", "step": best, "value": min(script)}
    assert (run / "pipeline-last").exists() == (best != 6)
    if best != 6:
        assert equal(weights(run, "pipeline-last"), ema_of(run, 6))
        assert record_of(run, "pipeline-last") == record | {"best": None, "seconds": pytest.approx(0, abs=60)}
    # The samples in pipeline/ and the grid of its step are of its weights, those of the last step of the last.
    for folder, step in {"pipeline": best, "pipeline-last": 6}.items():
        if (run / folder).exists():
            grid = (run / "samples" / f"step-{step:06d}.png").read_bytes()
            assert grid == (run / folder / "samples.png").read_bytes()
    assert sorted(path.name for path in (run / "samples").glob("step-*")) == [
        f"step-{step:06d}.png" for step in sorted({best, 6})
    ]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_checkpoint_holds_the_best_weights_unless_they_are_its_own(uninterrupted, name):
    run, script = uninterrupted / name, SCRIPTS[name]
    for step in range(1, 7):
        best = int(np.nanargmin(script[:step])) + 1
        path = run / f"checkpoint-{step:06d}"
        assert (path / "best.safetensors").exists() == ("best.safetensors" in files(run, step)) == (best != step)
        if best != step:
            assert equal(load_file(path / "best.safetensors"), ema_of(run, best))
        assert checkpoint.verify(path)["best"]["step"] == best


def test_without_it_nothing_is_kept(uninterrupted, work):
    """Nor does it change what is trained; and a folder pipeline-last of an earlier run would be of other weights."""
    (work / "plain" / "pipeline-last").mkdir(parents=True)
    assert train(work, "plain", SCRIPTS["at"], keep_best="null", checkpointing_steps=3) == 0
    run = work / "plain"
    assert equal(weights(run), ema_of(uninterrupted / "at", 6)) and record_of(run)["best"] is None
    assert not (run / "pipeline-last").exists()
    kept = {name: entry["sha256"] for name, entry in files(uninterrupted / "at", 6).items()}
    assert kept.pop("best.safetensors")
    assert kept == {name: entry["sha256"] for name, entry in files(run, 6).items()}


def test_a_kernel_distance_that_is_not_defined_is_not_the_best(work, capsys):
    script = [math.nan, 0.5, math.nan, 0.4, 0.6, math.nan]
    assert train(work, "distance", script, "kernel_distance", **DISTANCE) == 0
    assert record_of(work / "distance")["best"]["step"] == 4
    assert equal(weights(work / "distance"), ema_of(work / "distance", 4))
    assert (
        "pipeline/ has the EMA weights of step 4, where the kernel distance was lowest, 0.4" in capsys.readouterr().out
    )
    assert train(work, "undefined", [math.nan] * 6, "kernel_distance", **DISTANCE) == 0
    assert equal(weights(work / "undefined"), ema_of(work / "undefined", 6))
    assert "WARNING: no validation had a kernel distance" in capsys.readouterr().out


def test_the_best_model_so_far_is_published(uninterrupted, work, monkeypatch):
    published = []

    class Publisher:
        def __init__(self, config):
            pass

        def start(self):
            published.append((record_of(work / "hub")["best"]["step"], weights(work / "hub")))

        def publish_final(self):
            self.start()
            return 0

    monkeypatch.setattr(during_training, "check_access", lambda config: None)
    monkeypatch.setattr(during_training, "BackgroundPublisher", Publisher)
    options = {"push_to_hub": "true", "hub_model_id": "user/model", "push_to_hub_steps": 2}
    assert train(work, "hub", SCRIPTS["after"], **options) == 0
    assert [step for step, _ in published] == [2, 2, 5]
    assert all(equal(tensors, ema_of(work / "hub", step)) for step, tensors in published)
    assert equal(ema_of(work / "hub", 6), ema_of(work / "after", 6))  # publishing does not change the EMA


# ---- Resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["before", "at", "after"])
def test_a_resumed_run_keeps_the_weights_of_an_uninterrupted_one(uninterrupted, work, name):
    run = f"{name} resumed"
    train_until(work, run, 3, SCRIPTS[name], checkpointing_steps=3)
    assert train(work, run, SCRIPTS[name], checkpointing_steps=3, resume_from_checkpoint="latest") == 0
    assert files(work / run, 6) == files(uninterrupted / name, 6)
    for folder in ("pipeline", "pipeline-last"):
        assert equal(weights(work / run, folder), weights(uninterrupted / name, folder))
        assert record_of(work / run, folder)["best"] == record_of(uninterrupted / name, folder)["best"]


def test_a_checkpoint_without_best_weights_is_resumed(work):
    """As one of an earlier version: the best is then that of the validations to come."""
    train_until(work, "former", 3, SCRIPTS["before"], keep_best="null", checkpointing_steps=3)
    path = work / "former" / "checkpoint-000003" / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("best", "held_out_loss", "owes_validation"):
        del manifest[name]
    del manifest["config"]["keep_best"]
    path.write_text(json.dumps(manifest))
    assert train(work, "former", SCRIPTS["before"], resume_from_checkpoint="latest") == 0
    assert record_of(work / "former")["best"]["step"] == 5


@pytest.mark.parametrize(
    ("before", "now", "message", "step"),
    [
        ({}, {"num_validation_images": 3}, "num_validation_images 4 -> 3", 5),
        ({}, DISTANCE, "keep_best validation_loss -> kernel_distance", 5),
        (DISTANCE, {"keep_best": "null"}, "keep_best kernel_distance -> None", None),
    ],
)
def test_weights_that_were_measured_otherwise_are_not_kept(work, capsys, before, now, message, step):
    script, name = SCRIPTS["before"], f"otherwise {message}"
    train_until(work, name, 3, script, measure=before.get("keep_best", "validation_loss"), **before)
    measure = now.get("keep_best", "validation_loss")
    assert train(work, name, script, measure, resume_from_checkpoint="latest", **now) == 0
    printed = capsys.readouterr().out
    assert f"WARNING: {message}" in printed and ": the best model so far, of step 2, is not kept" in printed
    best = record_of(work / name)["best"]
    assert (best and best["step"]) == step


def test_a_longer_run_whose_last_step_is_the_best_has_no_pipeline_last(work):
    assert train(work, "longer", SCRIPTS["before"], max_train_steps=3) == 0
    assert (work / "longer" / "pipeline-last").exists()
    options = {"resume_from_checkpoint": "latest", "max_train_steps": 4}
    assert train(work, "longer", [0.3, 0.1, 0.5, 0.05], **options) == 0
    assert record_of(work / "longer")["best"]["step"] == 4 and not (work / "longer" / "pipeline-last").exists()


def test_the_best_weights_survive_a_resume_on_two_processes(uninterrupted, work):
    unbeatable = [0.3, 0.0, 0.5]  # by the losses of the other process, which are not scripted
    train_until(work, "two", 3, unbeatable)
    arguments = command_line(work, "two", train_batch_size=2, resume_from_checkpoint="latest")
    run_on_two("train.py", arguments)
    assert checkpoint.verify(work / "two" / "checkpoint-000006")["num_processes"] == 2
    assert equal(weights(work / "two"), ema_of(uninterrupted / "before", 2))
    assert record_of(work / "two")["best"] == {"measure": "validation_loss", "step": 2, "value": 0.0}
    last, expected = weights(work / "two", "pipeline-last"), ema_of(uninterrupted / "before", 6)
    assert max((last[name] - expected[name]).abs().max().item() for name in last) < 1e-5


@pytest.fixture
def handlers():
    """A run that a signal ended leaves it ignored; afterwards this process has its own handlers again."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("when", ["step", "validation"])
@pytest.mark.parametrize("step", [3, 6])
def test_a_validation_that_a_signal_prevents_is_made_when_the_run_is_resumed(work, handlers, when, step):
    expected, run = work / "with distances", work / f"signal {when} {step}"
    if not expected.exists():
        assert train(work, expected.name, **DISTANCE) == 0
    draw, see = EMASampler.draw, Best.see

    def kill_while_sampling(self, at_step, *args):
        if at_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self, at_step, *args)

    def kill_before_the_step(self, at_step, *args):
        see(self, at_step, *args)
        if at_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            *((Best, "see", kill_before_the_step) if when == "step" else (EMASampler, "draw", kill_while_sampling))
        )
        assert train(work, run.name, **DISTANCE) == 143
    newest = checkpoint.find(run, "latest")[1]
    assert newest["step"] == step and newest["owes_validation"]
    assert train(work, run.name, resume_from_checkpoint="latest", **DISTANCE) == 0
    assert record_of(run)["best"] == record_of(expected)["best"]
    assert equal(weights(run), weights(expected))

    def validations(folder):
        entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [entry for entry in entries if "validation_loss" in entry]

    assert validations(run) == validations(expected)


# ---- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_steps": 0}, "keep_best is 'validation_loss', but validation_steps is 0"),
        (
            {"validation_split": "none"},
            "keep_best is 'validation_loss', but validation_split is \"none\"",
        ),
        ({"keep_best": "kernel_distance"}, "keep_best is 'kernel_distance', but validation_samples is 0"),
        ({"keep_best": "loss"}, "keep_best"),
        (
            {"train_data_dir": "few"},
            "keep_best is 'validation_loss', but 0 images are held out, and it needs at least 1",
        ),
    ],
)
def test_what_it_needs_is_named(work, capsys, options, message):
    options = {name: work / value if name == "train_data_dir" else value for name, value in options.items()}
    assert train(work, "mistake", **options) == 2
    assert message in capsys.readouterr().err
    assert not (work / "mistake" / "metrics.jsonl").exists()


def test_a_kernel_distance_needs_two_held_out_images():
    for keep_best, number in ((None, 0), ("validation_loss", 1), ("kernel_distance", 2)):
        check_held_out(keep_best, number)
    with pytest.raises(ValueError, match="keep_best is 'kernel_distance', but 1 images are held out"):
        check_held_out("kernel_distance", 1)


# ---- The loss rises --------------------------------------------------------------------------------------------------


def sequence(rises, noise=0.01, images=50, seed=0):
    """Losses of each image, which differ much more between the images than between validations: a list of lists."""
    random = np.random.default_rng(seed)
    of_image = random.uniform(0.1, 1, images)
    return [(of_image + rise + noise * random.standard_normal(images)).tolist() for rise in rises]


def said(losses, rise=None):
    """The steps at which it is said that the loss rises: 1, 2, ..."""
    rise = rise or LossRise()
    return [step for step, of_images in enumerate(losses, 1) if rise.see(step, of_images)]


def test_a_loss_that_rises_at_three_validations_in_a_row_is_said_once():
    assert said(sequence([0.2, 0.1, 0, 0.01, 0.02, 0.03, 0.04, 0.05])) == [6]
    assert said(sequence([0.2, 0, 0.01, 0.01, 0, 0.01, 0.01, 0.01, 0])) == [8]  # in a row
    assert said(sequence([0, 0.1, 0.1, -0.1, 0.1, 0.1, -0.2, 0.1, 0.1])) == []  # it falls in between


def test_a_loss_that_falls_is_not_said_and_one_that_only_varies_is_rarely():
    """Which validation is the lowest is chance then, and the others are above it more often than two sets would be."""
    assert [seed for seed in range(200) if said(sequence(np.linspace(1, 0, 20), seed=seed))] == []
    assert len([seed for seed in range(200) if said(sequence(np.zeros(10), seed=seed))]) <= 10


def test_the_rise_is_a_paired_t_test():
    """Of the difference for each image: far smaller than between images, and judged as scipy judges it."""
    for seed in range(40):
        first, *others = sequence([0, 0.003, 0.003, 0.003], seed=seed)
        t = [scipy.stats.ttest_rel(losses, first).statistic for losses in others]
        is_first_lowest = all(np.mean(losses) >= np.mean(first) for losses in others)
        assert bool(said([first, *others])) == (min(t) > 2 and is_first_lowest)


@pytest.mark.parametrize("losses", [[[1.0], [2.0]] * 5, [[math.nan, 1.0]] * 5, [[1.0, 2.0], [3.0, 3.0, 3.0]] * 5])
def test_losses_that_cannot_be_compared_are_not_said(losses):
    """Of a single image, non-finite ones, and those of another number of images."""
    with np.errstate(all="raise"):
        assert said(losses) == []


def test_the_warning_names_the_step_and_what_helps(capsys):
    for keep_best, advice in ((None, "keep the model of step 2 with --keep_best validation_loss"),
                              ("validation_loss", "The model of step 2 is kept")):  # fmt: skip
        lines = []
        best = Best(keep_best, FlatEMA(torch.nn.Conv2d(1, 1, 1)), lines.append)
        for step, losses in enumerate([[0.5, 0.7], [0.3, 0.5], [0.35, 0.55], [0.35, 0.56], [0.36, 0.57]], 1):
            best.see(step, {"validation_loss": np.mean(losses)}, losses)
        (line,) = lines
        assert line.startswith("WARNING: the held-out loss has risen since step 2 (0.4000 -> 0.4650)")
        assert advice in line and "--dropout 0.1" in line


@pytest.mark.parametrize("until", [3, 5])
def test_a_resumed_run_neither_repeats_nor_misses_the_warning(work, capsys, monkeypatch, until):
    """Three validations in a row higher than that of step 1: it is said at step 4, before or after the resume."""
    see = Best.see

    def rising(self, step, metrics, losses):
        see(self, step, metrics, [step + 0.01 * i for i in range(5)])

    monkeypatch.setattr(Best, "see", rising)
    name = f"rising {until}"
    train_until(work, name, until, None)
    first = capsys.readouterr().out
    assert train(work, name, resume_from_checkpoint="latest") == 0
    counts = [text.count("the held-out loss has risen since step 1 (") for text in (first, capsys.readouterr().out)]
    assert counts == ([0, 1] if until == 3 else [1, 0])
