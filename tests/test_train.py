"""Whole runs of training/train.py: what they leave behind, and that interrupted and shared ones leave the same.

Most runs happen in this process, which has imported everything; a run that has to begin anew or to be two is a child.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from ddpm_pipeline import DDPMPipeline, objective, visualize
from tests.short_run import SHORT_RUN, run_here, run_in_child
from training.run import checkpoint

ROOT = Path(__file__).parents[1]
SAMPLE_SEED = 1_000_000

# Global batch 4 of 10 pictures: passes end within step 3 and with step 5, and the checkpoint of step 3 is between.
OPTIONS = SHORT_RUN | {
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_images_steps": 3,
    "num_sample_images": 3,
    "ddpm_num_inference_steps": 3,
    "checkpointing_steps": 3,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Where the runs of this file are, with a folder of pictures."""
    work = tmp_path_factory.mktemp("runs")
    (work / "pictures" / "class").mkdir(parents=True)
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(work / "pictures" / ("class" if i % 2 else "") / f"{i}.png")
    return work


def arguments(work, name, **options):
    """The command line of run `name` with OPTIONS and these."""
    options = {"output_dir": work / name, "cache_dir": work / "cache", **OPTIONS, **options}
    if not {"dataset_name", "config"} & options.keys():
        options.setdefault("train_data_dir", work / "pictures")
    first = [f"--config={options.pop('config')}"] if "config" in options else []
    return first + [f"--{option}={value}" for option, value in options.items()]


def metrics(folder):
    """Lines of metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def sums(path):
    """sha256 of a checkpoint's three files."""
    return {name: file["sha256"] for name, file in checkpoint.verified(path)["files"].items()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class Interruption(Exception):
    pass


@pytest.fixture(scope="module")
def whole(work):
    """A run of 6 steps from beginning to end."""
    assert run_here("train.py", arguments(work, "whole")) == 0
    return work / "whole"


@pytest.fixture(scope="module")
def resumed(work):
    """The same run, which dies after the checkpoint of step 3 and goes on in another process."""
    save = checkpoint.save

    def save_and_die(*args, **options):
        save(*args, **options)
        raise Interruption

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(Interruption):
            run_here("train.py", arguments(work, "resumed"))
    folder = work / "resumed"
    assert "checkpoint-000003" in names(folder)
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]
    # As if it had been killed a little later: a line more in the log, and half a checkpoint.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 99.0}) + "\n")
    (folder / "checkpoint-000004.tmp").mkdir()
    again = [f"--config={folder / 'config.yaml'}", "--resume_from_checkpoint=latest"]
    output = run_in_child(["-m", "accelerate.commands.launch"], "train.py", again)
    assert f"resumed from {folder / 'checkpoint-000003'}, after step 3" in output
    return folder


@pytest.fixture(scope="module")
def shared(work):
    """The same run by two processes, which have half of the global batch each."""
    command_line = arguments(work, "shared", train_batch_size=1)
    run_in_child(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], "train.py", command_line)
    return work / "shared"


# ---- What a run leaves behind ----------------------------------------------------------------------------------------


def test_the_folder_has_what_is_promised_and_no_more(whole):
    assert names(whole) == [
        ".lock",
        "checkpoint-000003",
        "checkpoint-000006",
        "config.yaml",
        "metrics.jsonl",
        "pipeline",
        "samples",
        "tensorboard",
    ]
    assert names(whole / "samples") == ["step-000003.png", "step-000006.png", "walk.png"]
    assert {"model_index.json", "scheduler", "unet"} <= set(names(whole / "pipeline"))
    assert all(name.startswith("events") for name in names(whole / "tensorboard"))
    for step in (3, 6):
        manifest = checkpoint.verified(whole / f"checkpoint-{step:06d}")
        assert (manifest["step"], manifest["global_batch"], manifest["num_processes"]) == (step, 4, 1)
        assert manifest["num_images"] == 10
        assert manifest["versions"]["torch"] == torch.__version__
        assert manifest["config"] == yaml.safe_load((whole / "config.yaml").read_text())


def test_metrics_count_steps_and_pictures(whole):
    lines = metrics(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["images"] for line in lines] == [4, 8, 12, 16, 20, 24]
    assert [line["learning_rate"] for line in lines[:3]] == [0.0005, 0.001, 0.001]
    assert lines[5]["learning_rate"] == pytest.approx(0.001 * (1 + math.cos(0.75 * math.pi)) / 2)
    assert all(0.5 < line["loss"] < 3 for line in lines)
    assert lines[0]["ema_decay"] == 0 < lines[5]["ema_decay"]


def test_the_pipeline_has_the_averaged_weights_and_loads_and_samples(whole):
    ours = load_file(whole / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    ema, trained = (load_file(whole / "checkpoint-000006" / name) for name in ("ema.safetensors", "model.safetensors"))
    assert ours.keys() == ema.keys()
    assert all(torch.equal(ours[name], ema[name]) for name in ema)
    assert not any(torch.equal(ours[name], trained[name]) for name in ("conv_in.weight", "conv_out.weight"))
    pipe = DiffusionPipeline.from_pretrained(whole / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=3, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    assert np.isfinite(images).all()


def test_the_sample_picture_is_drawn_with_the_averaged_weights(whole):
    def drawn():
        seeds = [SAMPLE_SEED, SAMPLE_SEED + 1, SAMPLE_SEED + 2]
        return np.asarray(visualize.grid(pipe(seeds=seeds, num_inference_steps=3, output_type="latent").images)).astype(
            int
        )

    saved = np.asarray(Image.open(whole / "samples" / "step-000006.png")).astype(int)
    pipe = DDPMPipeline.from_pretrained(whole / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert abs(drawn() - saved).max() <= 1
    pipe.unet.load_state_dict(load_file(whole / "checkpoint-000006" / "model.safetensors"))
    assert abs(drawn() - saved).max() > 1


def test_the_configuration_of_a_run_given_back_repeats_it_bit_for_bit(whole, work):
    config = whole / "config.yaml"
    assert (
        run_here("train.py", [f"--config={config}", f"--output_dir={work / 'again'}", "--checkpoints_total_limit=1"])
        == 0
    )
    assert "checkpoint-000003" not in names(work / "again")
    assert sums(work / "again" / "checkpoint-000006") == sums(whole / "checkpoint-000006")
    assert metrics(work / "again") == metrics(whole)
    for name in names(whole / "samples"):
        assert (work / "again" / "samples" / name).read_bytes() == (whole / "samples" / name).read_bytes()


# ---- Interrupted and shared runs -------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(whole, resumed):
    for name in ("checkpoint-000003", "checkpoint-000006"):
        assert sums(resumed / name) == sums(whole / name)
    assert metrics(resumed) == metrics(whole)
    unet = Path("pipeline", "unet", "diffusion_pytorch_model.safetensors")
    assert (resumed / unet).read_bytes() == (whole / unet).read_bytes()
    last = Path("samples", "step-000006.png")
    assert (resumed / last).read_bytes() == (whole / last).read_bytes()


def test_two_processes_do_what_one_does(whole, shared):
    assert checkpoint.verified(shared / "checkpoint-000006")["num_processes"] == 2
    for file in ("checkpoint-000006/model.safetensors", "checkpoint-000006/ema.safetensors"):
        one, two = load_file(whole / file), load_file(shared / file)
        assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    for one, two in zip(metrics(whole), metrics(shared), strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    assert names(shared / "samples") == names(whole / "samples")
    pixels = [np.asarray(Image.open(run / "samples" / "step-000006.png")).astype(int) for run in (whole, shared)]
    assert abs(pixels[0] - pixels[1]).max() <= 2  # the same three pictures in the same order
    assert len(names(shared / "tensorboard")) == 1


def test_a_run_may_go_on_with_another_number_of_forward_passes_but_the_same_global_batch(whole, work):
    shutil.copytree(whole, work / "other passes")
    options = {"train_batch_size": 4, "gradient_accumulation_steps": 1}
    start = work / "other passes" / "checkpoint-000003"
    assert run_here("train.py", arguments(work, "other passes", resume_from_checkpoint=start, **options)) == 0
    for one, two in zip(metrics(whole), metrics(work / "other passes"), strict=True):
        assert two == pytest.approx(one, rel=1e-5)


def test_in_bfloat16_the_weights_are_float32(work):
    options = {"mixed_precision": "bf16", "train_batch_size": 1, "max_train_steps": 1, "num_sample_images": 1}
    assert run_here("train.py", arguments(work, "bf16", **options)) == 0
    assert checkpoint.verified(work / "bf16" / "checkpoint-000001")["mixed_precision"] == "bf16"
    for file in ("checkpoint-000001/model.safetensors", "pipeline/unet/diffusion_pytorch_model.safetensors"):
        assert all(t.dtype == torch.float32 and t.isfinite().all() for t in load_file(work / "bf16" / file).values())


def test_time_that_is_up_ends_a_run_as_its_last_step_does(work):
    assert run_here("train.py", arguments(work, "short", max_train_minutes=1e-9)) == 0
    assert {"checkpoint-000001", "pipeline"} < set(names(work / "short"))
    assert names(work / "short" / "samples") == ["step-000001.png", "walk.png"]


# ---- Learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_loss_falls(work, prediction_type):
    steps = 60
    options = {"dataset_name": "moons", "resolution": 16, "prediction_type": prediction_type, "max_train_steps": steps}
    options |= {"train_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 2e-3, "ddpm_num_steps": 1000}
    options |= {"checkpointing_steps": steps, "save_images_steps": 0}
    assert run_here("train.py", arguments(work, prediction_type, **options)) == 0
    lines = metrics(work / prediction_type)
    losses = [line["loss"] for line in lines[:steps]]
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])
    assert lines[-1]["step"] == steps
    assert 0 < lines[-1]["moon_distance"] < 2
    assert (
        DDPMPipeline.from_pretrained(work / prediction_type / "pipeline").scheduler.prediction_type == prediction_type
    )


# ---- Mistakes and mishaps --------------------------------------------------------------------------------------------


def test_unreadable_pictures_are_named(work, capsys):
    shutil.copytree(work / "pictures", work / "some bad")
    (work / "some bad" / "class" / "broken.png").write_text("no picture")
    assert run_here("train.py", arguments(work, "bad", train_data_dir=work / "some bad")) == 2
    assert "broken.png" in capsys.readouterr().err
    assert run_here("train.py", arguments(work, "bad", train_data_dir=work / "nowhere")) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"resume_from_checkpoint": "latest"}, "no checkpoint to resume from"),
        ({"resume_from_checkpoint": "runs/nothing"}, "runs/nothing"),
        pytest.param(
            {"mixed_precision": "fp16"},
            "fp16",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is for GPUs, and there is one"),
        ),
        ({"resolution": 18}, "18"),  # cannot be halved twice
    ],
)
def test_what_cannot_be_done_ends_with_2_and_its_value(work, capsys, options, words):
    assert run_here("train.py", arguments(work, "mistake", **options)) == 2
    assert words in capsys.readouterr().err
    assert not (work / "mistake" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 1}, "seed 0, now it is 1"),
        ({"train_batch_size": 3}, "global batch of 4, now it is 6"),
        ({"denoiser": "small"}, "denoiser 'tiny', now it is 'small'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_nothing_changed(whole, work, capsys, options, words):
    before = (whole / "config.yaml").read_bytes(), (whole / "metrics.jsonl").read_bytes(), names(whole)
    assert run_here("train.py", arguments(work, "whole", resume_from_checkpoint="latest", **options)) == 2
    assert words in capsys.readouterr().err
    assert ((whole / "config.yaml").read_bytes(), (whole / "metrics.jsonl").read_bytes(), names(whole)) == before


def test_an_output_folder_that_is_a_file(work, capsys):
    (work / "file").write_text("mine")
    for name in ("file", "file/run"):
        assert run_here("train.py", arguments(work, name)) == 2
        assert str(work / name) in capsys.readouterr().err
    assert (work / "file").read_text() == "mine"


def test_one_nan_stops_the_run_before_weights_and_checkpoints_are_spoiled(work, monkeypatch, capsys):
    simple_loss, calls = objective.simple_loss, []

    def nan_in_step_4(prediction, target):
        calls.append(None)
        return simple_loss(prediction, target) * (math.nan if len(calls) == 7 else 1)

    monkeypatch.setattr(objective, "simple_loss", nan_in_step_4)
    assert (
        run_here("train.py", arguments(work, "nan", logging_steps=100, checkpointing_steps=1, save_images_steps=0)) == 1
    )
    assert "step 4" in capsys.readouterr().err
    assert [name for name in names(work / "nan") if "checkpoint" in name] == ["checkpoint-000002", "checkpoint-000003"]
    _, manifest = checkpoint.find(work / "nan", "latest")
    assert manifest["step"] == 3
    assert not (work / "nan" / "pipeline").exists()


def test_a_learning_rate_much_too_high_stops_the_run(work, capsys):
    options = {"learning_rate": 1e30, "lr_scheduler": "constant", "lr_warmup_steps": 0}
    assert run_here("train.py", arguments(work, "high", **options, logging_steps=4, checkpointing_steps=1)) == 1
    assert "1e+30" in capsys.readouterr().err
    for path in (work / "high").glob("checkpoint-*"):
        assert all(tensor.isfinite().all() for tensor in load_file(path / "ema.safetensors").values())
    assert "checkpoint-000003" not in names(work / "high")
    assert not (work / "high" / "pipeline").exists()


# ---- Real pictures ---------------------------------------------------------------------------------------------------


def first_rows(source, target, number=40):
    """The first rows of a data set of parquet files, laid out as it is; decoding all takes longer than the test."""
    for file in source.rglob("*train*.parquet"):
        (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        rows = next(pq.ParquetFile(file).iter_batches(batch_size=number))
        table = pq.ParquetFile(file).schema_arrow.empty_table()
        pq.write_table(table.from_batches([rows], schema=table.schema), target / file.relative_to(source))
    return target


@pytest.mark.parametrize(
    ("name", "config", "shape", "options"),
    [
        ("mnist", "mnist.yaml", (1, 32, 32), {}),
        ("crawl-tiles/item", "tiles.yaml", (3, 32, 32), {"denoiser": "tiny"}),
        ("cifar10", "cifar10.yaml", (3, 32, 32), {"denoiser": "tiny"}),
    ],
)
def test_the_presets_train_on_the_real_pictures(work, shared_data, name, config, shape, options):
    source = shared_data / name
    if name.startswith("crawl"):
        options = {"train_data_dir": source, **options}
    else:
        options = {"dataset_name": first_rows(source, work / "data" / name), **options}
    options = {
        "config": ROOT / "training" / "configs" / config,
        "output_dir": work / config,
        "cache_dir": work / "cache",
        "train_batch_size": 2,
        "max_train_steps": 2,
        "mixed_precision": "no",
        "cpu_threads": 1,
        "num_sample_images": 2,
        "ddpm_num_inference_steps": 2,
        **options,
    }
    config_first = [f"--config={options.pop('config')}"]
    assert run_here("train.py", config_first + [f"--{option}={value}" for option, value in options.items()]) == 0
    pipe = DDPMPipeline.from_pretrained(work / config / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(seeds=[1], num_inference_steps=2, output_type="latent").images
    assert images.shape == (1, *shape)
    assert images.isfinite().all()
    assert all(tensor.dtype == torch.float32 for tensor in pipe.unet.state_dict().values())
