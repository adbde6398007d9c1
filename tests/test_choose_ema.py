"""training/choose_ema.py on a run whose EMA is bad: what it measures, what it writes, and what it refuses."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddpm_pipeline import DDPMPipeline, visualize
from ddpm_pipeline.calibrated import load_tables, save_tables
from ddpm_pipeline.solver_tables import dpm_solver_table
from tests.arrays import save_images
from tests.models import quiet, tiny_unet
from tests.short_run import SHORT_RUN, flags, run_here, run_on_two
from training.evaluation.config import ChoiceConfig
from training.post_hoc_ema import reconstruct
from training.run import checkpoint
from training.run.ema_snapshots import list_snapshots
from training.run.record import RunRecord
from training.run.sampling import save_pipeline

OPTIONS = SHORT_RUN | {
    "dataset_name": "moons",
    "resolution": 16,
    "train_batch_size": 8,
    "max_train_steps": 96,
    "learning_rate": 3e-3,
    "validation_steps": 0,
    "save_images_steps": 0,
    "num_sample_images": 4,
    "ddpm_num_inference_steps": 4,
    "checkpointing_steps": 96,
    "guide_snapshot": 0.25,
    "post_hoc_ema": "true",
    "report_to": "none",
    # a decay of 1 - 1e-6 from the second step on: the EMA stays where it was after the first
    "ema_max_decay": 0.999999,
    "ema_inv_gamma": 1e-6,
    "ema_power": 1,
}
SETTINGS = {"num_samples": 64, "num_inference_steps": 4, "num_reference": 200, "extractor": "pixels", "cpu_threads": 1}
LENGTHS = (0.02, 0.05, 0.2)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("choice")


@pytest.fixture(scope="module")
def trained(work):
    """A run of 96 steps on moons, with a table of calibrated steps for its EMA and a report about it."""
    tiny_unet(1, size=16).save_config(work)
    paths = {"output_dir": work / "run", "cache_dir": work / "cache", "denoiser": work / "config.json"}
    assert run_here("train.py", flags(OPTIONS | paths)) == 0
    folder = work / "run" / "pipeline"
    pipe = DDPMPipeline.from_pretrained(folder)
    save_tables(pipe.scheduler, pipe.unet, [dpm_solver_table(pipe.scheduler, [19, 10, 3])], pipe.guide)
    images = {name: Image.open(folder / name) for name in ("samples.png", "trajectory.png")}
    save_pipeline(pipe, folder, RunRecord.load(folder), images)
    (work / "run" / "report.json").write_text("{}")
    return work / "run"


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def arguments(work, run, **settings):
    return [str(run), *flags({"cache_dir": work / "cache", "ema": "0.02,0.05,0.2", **SETTINGS, **settings})]


def choose(work, run, expected=0, **settings):
    assert run_here("choose_ema.py", arguments(work, run, **settings)) == expected


def distances(output):
    """The table that is printed: distance by length, and the best one."""
    rows = re.findall(r"^(as it is|[0-9.]+)(?:, ([0-9.]+))? +(-?[0-9.e-]+)(?: \+- \S+)?(  <- best)?$", output, re.M)
    return {name: float(number) for name, _, number, _ in rows}, next(name for name, _, _, mark in rows if mark)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def averages_of(run, length):
    shapes = {name: tensor.shape for name, tensor in load_file(run / "pipeline" / WEIGHTS).items()}
    return reconstruct(list_snapshots(run, shapes), length)


def test_the_best_average_becomes_the_model(work, run, capsys):
    before = contents(run / "pipeline")
    choose(work, run)
    output = capsys.readouterr()
    measured, best = distances(output.out)
    assert list(measured) == ["as it is", "0.02", "0.05", "0.2"]
    assert best == min(measured, key=measured.get) != "as it is"

    # the former model, as it was
    assert contents(run / "pipeline-last") == before

    # the new one: its weights, guide, record, tables and images
    saved, averaged = load_file(run / "pipeline" / WEIGHTS), averages_of(run, float(best))
    assert saved.keys() == averaged.keys() and all(torch.equal(saved[name], averaged[name]) for name in saved)
    after = contents(run / "pipeline")
    assert after.keys() == before.keys()
    changed = {path.as_posix() for path in after if after[path] != before[path]}
    images = {"samples.png", "trajectory.png"}
    assert changed == {WEIGHTS, "training.json", "scheduler/scheduler_config.json", *images}
    record = json.loads((run / "pipeline" / "training.json").read_text())
    assert record.pop("ema_length") == float(best)
    was = json.loads(before[next(path for path in before if path.name == "training.json")])
    assert was.pop("ema_length") is None and record == was and record["guide_step"] == 24
    pipe = quiet(DDPMPipeline.from_pretrained(run / "pipeline"))
    assert load_tables(pipe.scheduler) == []
    assert "run calibrate.py again" in output.err and "run evaluate.py again" in output.out
    samples = pipe(seeds=range(1_000_000, 1_000_004), num_inference_steps=4, output_type="latent").images
    drawn = np.asarray(visualize.grid(samples)).astype(int)
    assert np.abs(drawn - np.asarray(Image.open(run / "pipeline" / "samples.png"))).max() <= 1


def test_a_second_choice_keeps_what_is_best_and_the_weights_of_training(work, run, capsys):
    choose(work, run)
    first, former = contents(run / "pipeline"), contents(run / "pipeline-last")
    _, best = distances(capsys.readouterr().out)
    choose(work, run)
    output = capsys.readouterr().out
    measured, again = distances(output)
    assert again == "as it is" and measured["as it is"] == measured[best] and f"as it is, {best}" in output
    assert "pipeline stays as it is" in output and contents(run / "pipeline") == first
    # put back by hand, and chosen again
    shutil.rmtree(run / "pipeline")
    shutil.copytree(run / "pipeline-last", run / "pipeline")
    choose(work, run)
    assert contents(run / "pipeline") == first and contents(run / "pipeline-last") == former


def test_tables_for_the_chosen_weights_stay(work, run, capsys):
    """As if calibrated before: the table in pipeline/ is bound to the weights of the average."""
    choose(work, run, ema="0.05")
    folder = run / "pipeline"
    pipe = DDPMPipeline.from_pretrained(folder)
    table = dpm_solver_table(pipe.scheduler, [19, 3])
    save_tables(pipe.scheduler, pipe.unet, [table], pipe.guide)
    tables = pipe.scheduler
    pipe = DDPMPipeline.from_pretrained(run / "pipeline-last")
    pipe.scheduler = tables
    pipe.save_pretrained(folder)  # other weights again, but that scheduler
    capsys.readouterr()
    choose(work, run, ema="0.05")
    assert "calibrate" not in "".join(capsys.readouterr())
    assert load_tables(DDPMPipeline.from_pretrained(folder).scheduler) == [table]


def test_a_model_that_is_better_stays(work, run, capsys, monkeypatch):
    before = contents(run)
    monkeypatch.setattr("training.evaluation.ema_choice.value", lambda each: -each.value)
    choose(work, run, ema="0.05")
    assert "stays as it is" in capsys.readouterr().out
    assert contents(run / "pipeline") == {
        path.relative_to("pipeline"): content for path, content in before.items() if path.parts[0] == "pipeline"
    }
    assert not (run / "pipeline-last").exists()


def test_two_processes_measure_and_write_the_same(work, run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    choose(work, run, ema="0.05")
    one = distances(capsys.readouterr().out)
    two = distances(run_on_two("choose_ema.py", arguments(work, other, ema="0.05")))
    assert two == (pytest.approx(one[0], rel=1e-3), one[1])
    assert (run / "pipeline" / WEIGHTS).read_bytes() == (other / "pipeline" / WEIGHTS).read_bytes()


def test_the_last_weights_of_a_run_that_kept_the_best_ones(work, run):
    """Record and guide come from pipeline-last/, which is of the last step."""
    folder = run / "pipeline"
    shutil.copytree(folder, run / "pipeline-last")
    record = json.loads((folder / "training.json").read_text())
    best = {"measure": "validation_loss", "step": 10, "value": 0.1}
    (folder / "training.json").write_text(json.dumps(record | {"best": best, "guide_step": None}))
    shutil.rmtree(folder / "guide")
    index = json.loads((folder / "model_index.json").read_text())
    index.pop("guide", None)
    (folder / "model_index.json").write_text(json.dumps(index))
    former = contents(run / "pipeline-last")
    choose(work, run, ema="0.05")
    assert json.loads((folder / "training.json").read_text()) == record | {"ema_length": 0.05}
    assert (folder / "guide" / "config.json").exists()
    assert contents(run / "pipeline-last") == former


# ---- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", ["0", "-0.1", "0.3", "0.05,0.26"])
def test_other_lengths_are_refused(work, run, capsys, length):
    with pytest.raises(ValueError, match=r"give a number from 0.02 to 0.25"):
        ChoiceConfig(str(run), ema=tuple(map(float, length.split(","))))
    choose(work, run, expected=2, ema=length)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"length of an average is {length.split(',')[-1]}: give a number from 0.02 to 0.25" in line


def test_a_run_on_a_single_image_is_refused(work, tmp_path, run, capsys):
    images = save_images(tmp_path / "images", 1, 16, 16)
    choose(work, run, expected=2, ema="0.05", train_data_dir=images)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("choose_ema.py: ")]
    assert "no distance could be measured" in line and "give (N, D) with N at least 2" in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema": "0.05,0.05"}, "give at least one length, and each once"),
        ({"num_samples": 1}, "num_samples is 1: give at least 16"),
        ({"num_inference_steps": 0}, "num_inference_steps has 0"),
    ],
)
def test_settings_out_of_range_are_refused(work, run, capsys, settings, message):
    choose(work, run, expected=2, **settings)
    assert message in capsys.readouterr().err


def test_what_is_no_run_with_averages_is_refused(work, run, capsys):
    def error(folder=run):
        choose(work, folder, expected=2)
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "there is no such folder" in error(run / "nowhere")
    file, snapshot = run / "pipeline" / "training.json", run / "ema" / "step-000096-0.05.safetensors"
    lock = checkpoint.lock(run)
    assert "another run is writing to it" in error()
    lock.release()
    for path in run.glob("ema/step-000096-*"):
        path.rename(run / path.name)
    assert "has snapshots up to step 95" in error() and "finish the run" in error()
    for path in run.glob("step-000096-*"):
        path.rename(run / "ema" / path.name)
    for step in range(1, 96):  # all but those of the last step, which are too few for the lengths of `arguments`
        for path in run.glob(f"ema/step-{step:06d}-*"):
            path.rename(run / path.name)
    assert "the average of length 0.02 cannot be put together from the 2 snapshots" in error()
    for path in run.glob("step-*"):
        path.rename(run / "ema" / path.name)
    snapshot.write_bytes(b"damaged")
    assert f"{snapshot} cannot be read" in error()
    text = file.read_text()
    file.write_text(text.replace('"post_hoc_ema": true', '"post_hoc_ema": false'))
    assert "was not trained with --post_hoc_ema from its first step to its last" in error()
    file.write_text(text)
    shutil.rmtree(run / "ema")
    assert "has no snapshots of averages" in error()
    shutil.rmtree(run / "pipeline")
    assert "has no pipeline/: finish the run" in error()
