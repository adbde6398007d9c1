"""The staged folder and its card. Publishing itself: tests/hub/test_round_trip.py."""

import copy
import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as BuiltInDDPMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from ddpm_pipeline import DDPMPipeline, DDPMScheduler
from ddpm_pipeline.calibrated import Guidance, save_tables
from ddpm_pipeline.labels import record_class_names
from ddpm_pipeline.solver_tables import dpm_solver_table
from tests.models import tiny_unet
from training.budget import with_defaults
from training.config import Config
from training.hub import check, files, stage
from training.hub.card import write_card
from training.publish import main
from training.run.record import RunRecord


def make_run(folder, *, unet=None, scheduler=(), **config):
    """A run as train.py leaves it."""
    scheduler = DDPMScheduler(**{"num_train_timesteps": 20, "timestep_spacing": "trailing", **dict(scheduler)})
    DDPMPipeline(unet or tiny_unet(3), scheduler).save_pretrained(folder / "pipeline")
    settings = {"dataset_name": "moons", "output_dir": str(folder), "max_train_steps": 1000}
    config = with_defaults(Config(**settings | config), 2_000_000)
    RunRecord(
        step=900,
        global_batch=32,
        num_processes=2,
        device="cpu",
        mixed_precision="no",
        num_images=4096,
        source="4096 moons",
        held_out="none",
        versions={"python": "3.11", "torch": "2.13.0"},
        commit="0123abc",
        sample_seed=7,
        config=config.as_dict(),
        seconds=1800.0,
    ).save(folder / "pipeline")
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "moons")


def staged(run, folder, **options):
    """The names of the staged files, the tag, and the lines that were logged."""
    lines = []
    tag = stage.stage(run, folder, repo_id="alice/x", log=lines.append, **options)
    return files.list_files(folder), tag, lines


def card_of(run, folder, **options):
    """The text of the card, and its metadata."""
    staged(run, folder, **options)
    text = (folder / "README.md").read_text()
    return text, yaml.safe_load(text.split("---")[1])


# ---- The folder ------------------------------------------------------------------------------------------------------


def test_only_listed_files_are_staged(run, tmp_path):
    for name in ("checkpoint-000900/optimizer.pt", "log.txt", ".lock", "pipeline/notes.txt", "pipeline/unet/old.bin",
                 "pipeline/.tmp-1", "samples/step-000900.png", "metrics.jsonl"):  # fmt: skip
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(b"private")
    Image.new("L", (4, 4)).save(run / "pipeline" / "samples.png")
    names, _, _ = staged(run, tmp_path / "out", fp16=True)
    assert set(names) <= set(files.PUBLISHED)
    expected = {*files.MODEL_FILES, files.HALF_WEIGHTS, "samples.png", "README.md", "config.yaml", "LICENSE"}
    assert set(names) == expected


def test_images_of_earlier_versions_get_their_current_name(run, tmp_path):
    Image.new("L", (4, 4)).save(run / "pipeline" / "walk.png")
    card, _ = card_of(run, tmp_path / "former")
    assert (tmp_path / "former" / "trajectory.png").is_file() and not (tmp_path / "former" / "walk.png").exists()
    assert "(trajectory.png)" in card and "walk" not in card
    Image.new("L", (8, 8)).save(run / "pipeline" / "trajectory.png")
    staged(run, tmp_path / "both")
    assert Image.open(tmp_path / "both" / "trajectory.png").size == (8, 8)


def test_the_default_tag_depends_on_the_contents(run, tmp_path):
    _, tag, _ = staged(run, tmp_path / "first")
    _, again, _ = staged(run, tmp_path / "second")
    assert tag == again and re.fullmatch("sha256-[0-9a-f]{12}", tag)
    file = run / "pipeline" / files.WEIGHTS
    weights = load_file(file)
    weights["conv_in.bias"][0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert staged(run, tmp_path / "third")[1] != tag
    assert staged(run, tmp_path / "fourth", revision_tag="v1")[1] == "v1"


@pytest.mark.parametrize("tag", ["", "bad tag", "a..b", "v1.", "v1.lock", "-v", "a" * 100, "v/1", "\u00e4"])
def test_invalid_tags_are_refused(run, tmp_path, tag):
    with pytest.raises(ValueError, match="revision_tag is"):
        staged(run, tmp_path / "out", revision_tag=tag)


def test_half_precision(run, tmp_path):
    staged(run, tmp_path / "out", fp16=True)
    pipe = DDPMPipeline.from_pretrained(str(tmp_path / "out"), variant="fp16", torch_dtype=torch.float16)
    weights = load_file(run / "pipeline" / files.WEIGHTS)
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(tensor, weights[name].half()), name
    weights["conv_in.bias"][0] = 1e5
    save_file(weights, run / "pipeline" / files.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"conv_in\.bias has values above 65504"):
        staged(run, tmp_path / "large", fp16=True)


def test_a_guide_is_published_with_the_model(run, tmp_path):
    pipeline = run / "pipeline"
    pipe = DDPMPipeline.from_pretrained(pipeline)
    pipe.guide = tiny_unet(3, seed=5)
    pipe.save_pretrained(pipeline)
    dataclasses.replace(RunRecord.load(pipeline), guide_step=2).save(pipeline)
    measure = {"name": "kernel distance", "values": [2, 1], "standard_errors": [0.1, 0.1], "real_data_baseline": 0.5}
    guidance = {"argument": "autoguidance_scale", "interval": [100, 700], "scales": [1, 2], "best_scale": 2}
    report = write_report(run) | {"guidance": {**guidance, "extractor": "resnet56", "measures": [measure]}}
    (run / "report.json").write_text(json.dumps(report))
    (card, _), names = card_of(run, tmp_path / "out", fp16=True), files.list_files(tmp_path / "out")
    assert {name for name in names if name.startswith("guide/")} == {*files.GUIDE_FILES, files.HALF_GUIDE_WEIGHTS}
    for name in files.GUIDE_FILES:
        assert (tmp_path / "out" / name).read_bytes() == (pipeline / name).read_bytes()
    assert "guide in `guide/`, the EMA weights of step 2:" in card and "`pipe(autoguidance_scale=2.0)`" in card
    assert " autoguidance_scale=2, guidance_interval=(100, 700), num_inference" in card  # in the example
    assert "| autoguidance scale | kernel distance |" in card
    half = DDPMPipeline.from_pretrained(tmp_path / "out", variant="fp16", dtype=torch.float16)
    assert half.guide.dtype == torch.float16
    (pipeline / files.GUIDE_WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="guide"):
        staged(run, tmp_path / "incomplete")


def test_the_loading_check_compares_the_guided_images(run, tmp_path, monkeypatch):
    guided = {"images": np.zeros(2), "guided images": np.ones(2)}
    ways = {"package": guided, "remote-code": dict(guided), "built-in": {"images": np.zeros(2)}}
    monkeypatch.setattr(check, "_sample", lambda folder: ways)
    monkeypatch.setattr(check, "built_in_limits", lambda folder: [])
    assert check.check_loading(tmp_path) == {"remote-code": 0, "built-in": 0}
    ways["remote-code"]["guided images"] = np.zeros(2)
    with pytest.raises(check.LoadingError, match="other images with remote code"):
        check.check_loading(tmp_path)
    del ways["remote-code"]["guided images"]
    with pytest.raises(check.LoadingError, match="there are no guided images with remote code"):
        check.check_loading(tmp_path)


@pytest.mark.parametrize(("platform", "ways"), [("linux", ("built-in", "remote-code")), ("win32", ("remote-code",))])
def test_a_folder_that_does_not_load_is_refused_with_the_reason(run, tmp_path, monkeypatch, platform, ways):
    """With what the way says last, in a process that is forked for each way, or started for it."""
    monkeypatch.setattr(check.sys, "platform", platform)
    monkeypatch.setattr(check, "WAYS", ways)
    staged(run, tmp_path / "out")
    code = tmp_path / "out" / "pipeline.py"
    code.write_text("raise RuntimeError('broken on purpose')\n" + code.read_text())
    with pytest.raises(check.LoadingError, match=r"load with remote code: RuntimeError: broken on purpose\. Nothing"):
        check.check_loading(tmp_path / "out")
    monkeypatch.setattr(check.sys, "executable", "false")
    with pytest.raises(check.LoadingError, match=r"does not load with .*: no message\. Nothing"):
        check.check_loading(tmp_path / "out")


def test_local_fields_are_left_out(tmp_path):
    (tmp_path / "data" / "mine").mkdir(parents=True)
    local = str(tmp_path / "data" / "mine")
    for fields, expected in (
        ({"train_data_dir": local}, {"train_data_dir": "mine"}),
        ({"dataset_name": local}, {"dataset_name": "mine"}),
        ({"dataset_name": "user/set"}, {"dataset_name": "user/set"}),
        ({"dataset_name": "moons", "init_from": local}, {"init_from": "mine"}),
        ({"dataset_name": "moons", "denoiser": local}, {"denoiser": "mine"}),
        ({"dataset_name": "moons", "denoiser": "tiny"}, {"denoiser": "tiny"}),
        ({"dataset_name": "moons", "init_from": "user/model"}, {"init_from": "user/model"}),
        ({"dataset_name": "moons", "extractor": "user/model@v1"}, {"extractor": "user/model@v1"}),
        ({"dataset_name": "moons", "extractor": "features/mine.pt"}, {"extractor": "mine.pt"}),
        ({"dataset_name": "moons", "extractor": local}, {"extractor": "mine"}),
    ):
        config = Config(output_dir=str(tmp_path / "runs"), cache_dir=str(tmp_path / "cache"), **fields)
        shared = stage.shareable_config(config.as_dict())
        assert shared | expected == shared and str(tmp_path) not in str(shared)
        Config(**shared)  # still a valid configuration


def set_source(run, text):
    """Change what the run record says of its images, which goes on the card."""
    file = run / "pipeline" / "training.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"source": text}))


def test_tokens_and_local_paths_are_not_published(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-mine")
    for text, what in (
        ("hf_" + "a" * 34, "an access token"),
        ("a-token-of-mine", "the access token in use"),
        (f"9 images of {run.resolve()}", "the path of the run"),
        (f"file://{run.resolve()}/data", "the path of the run"),
        (f'9 images of "{Path.home()}/x"', "the path of the home folder"),
    ):
        set_source(run, text)
        with pytest.raises(ValueError, match=f"README.md would publish {what}"):
            staged(run, tmp_path / what / str(len(text)))
    set_source(run, "9 images of folder x")
    staged(run, tmp_path / "clean")


def test_signatures_and_passwords_in_the_address_of_the_data_are_not_published(run, tmp_path):
    record = RunRecord.load(run / "pipeline")
    address = "https://me:pass1234@host/x/train-{000..003}.tar?signature=s3cr3t"
    dataclasses.replace(record, config=record.config | {"dataset_name": address}).save(run / "pipeline")
    set_source(run, "9 images of data set train-{000..003}.tar")
    staged(run, tmp_path / "clean")
    published = files.list_files(tmp_path / "clean")
    text = "".join((tmp_path / "clean" / name).read_text() for name in published if name.endswith((".md", ".json")))
    assert "train-{000..003}.tar" in text and "s3cr3t" not in text and "pass1234" not in text
    for secret in ("signature=s3cr3t", "me:pass1234"):
        set_source(run, f"9 images of {secret}")
        with pytest.raises(ValueError, match=r"README.md would publish secret . of the address of the data"):
            staged(run, tmp_path / secret.partition("=")[0])


@pytest.mark.parametrize("text", ["user/model", "/models", "/model.py", "/data/model", "https://x.org/model"])
def test_only_whole_paths_count_as_paths_of_this_machine(text):
    """A run may lie at /model, as in a container, and the documentation speaks of user/model."""
    pattern = stage._path_pattern(Path("/model"))
    assert not pattern.search(f"see {text} there")
    for found in ("/model", "/model/pipeline", '"/model"', "file:///model/x", "in /model."):
        assert pattern.search(f"see {found} there")


def test_the_card_names_the_step_that_the_weights_are_of_and_pipeline_last_is_not_published(run, tmp_path):
    assert "Its weights are" not in card_of(run, tmp_path / "last")[0]
    shutil.copytree(run / "pipeline", run / "pipeline-last")
    best = {"measure": "validation_loss", "step": 400, "value": 0.0123}
    dataclasses.replace(RunRecord.load(run / "pipeline"), best=best).save(run / "pipeline")
    card, _ = card_of(run, tmp_path / "best")
    assert "EMA weights of step 400, where the held-out loss was lowest, 0.0123" in card
    assert files.list_files(tmp_path / "best") == files.list_files(tmp_path / "last")


def test_the_card_says_that_the_published_code_is_another(run, tmp_path):
    """A run of an earlier version has the pipeline.py of that version, and the card describes this one."""
    card, _ = card_of(run, tmp_path / "current")
    assert "the same classes, from `pipeline.py`" in card
    file = run / "pipeline" / "pipeline.py"
    file.write_text(file.read_text().replace("def trajectory", "def former_name"))
    _, _, lines = staged(run, tmp_path / "out")
    assert any("of another version" in line for line in lines)
    assert (tmp_path / "out" / "pipeline.py").read_text() == file.read_text()
    assert "of another version of the package or edited" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("prediction_type", "shown"), [("sample", False), ("v_prediction", True)])
def test_bits_that_say_little_are_left_to_the_report(tmp_path, prediction_type, shown):
    """With x_0-prediction and a fixed variance: neither in the table nor in the metadata."""
    run = make_run(tmp_path / "moons", scheduler={"prediction_type": prediction_type})
    write_report(run, measure="bits_per_dim", name="Bits of the test", value=114.25, primary=True)
    card, metadata = card_of(run, tmp_path / "out")
    assert ("Bits of the test" in card) == ("114.2" in card) == shown
    assert "0.01234" in card and ("bits_per_dim" in str(metadata)) == shown


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run / "pipeline"), "pipeline is missing"),
        (lambda run: (run / "pipeline" / "training.json").unlink(), "training.json is missing"),
        (lambda run: (run / "pipeline" / "training.json").write_text("{"), "training.json is not valid JSON"),
        (lambda run: (run / "pipeline" / files.WEIGHTS).write_bytes(b"half"), "not a complete safetensors file"),
        (lambda run: (run / "pipeline" / "pipeline.py").unlink(), "pipeline.py"),
        (lambda run: (run / "report.json").write_text("[]"), "report.json does not contain a JSON object"),
    ],
)
def test_incomplete_runs_are_refused(run, tmp_path, damage, message, capsys):
    damage(run)
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        staged(run, tmp_path / "out")
    assert main([str(run), "--hub_model_id", "alice/x", "--dry_run"]) == 2
    assert message in capsys.readouterr().err


# ---- The card --------------------------------------------------------------------------------------------------------


def write_report(run, **last_measurement):
    """A report about the weights of this run."""
    measurement = {
        "measure": "kernel_distance", "name": "Kernel distance", "value": 0.01234, "standard_error": 0.00056, "n": 5000,
        "extractor": "resnet56", "reference": "mnist, train", "real_data_baseline": 0.0001, "sampler": "DDPM, eta 1",
        "num_inference_steps": 50, "seed": 0, "weights": "EMA", "primary": True,
    }  # fmt: skip
    report = {
        "format": 2,
        "weights_sha256": hashlib.sha256((run / "pipeline" / files.WEIGHTS).read_bytes()).hexdigest(),
        "command": "accelerate launch training/evaluate.py runs/moons",
        "measurements": [
            measurement,
            {**measurement, "weights": "online", "value": 9.87},
            {**measurement, **last_measurement},
        ],
    }
    (run / "report.json").write_text(json.dumps(report))
    return report


def test_the_card_has_the_primary_sampler_config_and_the_warnings_of_the_report(run, tmp_path):
    report = write_report(run, value=77.7, num_inference_steps=10, primary=False)
    report |= {"warnings": ["the baseline has 15 images"], "real_data_baseline": {"description": "images", "n": 15}}
    (run / "report.json").write_text(json.dumps(report))
    card, _ = card_of(run, tmp_path / "out")
    assert "0.01234" in card and "77.7" not in card
    assert "> The baseline has 15 images." in card
    assert "Real-data baseline: the same measures with 15 images" in card


def test_numbers_are_those_of_the_report(run, tmp_path):
    likelihood = {"measure": "bits_per_dim", "name": "Bits per dimension", "value": 1.5, "extractor": None,
                  "real_data_baseline": None, "standard_error": None, "sampler": None}  # fmt: skip
    report = write_report(run, **likelihood)
    card, metadata = card_of(run, tmp_path / "out")
    row = "| Kernel distance | 0.01234 &plusmn; 0.00056 | 0.0001 | 5000 | resnet56 | mnist, train | DDPM, eta 1 "
    assert row + "| 50 | 0 |" in card
    assert "| Bits per dimension | 1.5 |  | 5000 |  | mnist, train |  | 50 | 0 |" in card
    assert "9.87" not in card  # of the online weights, which are not published
    assert report["command"] in card and "Nothing was measured" not in card
    (index,) = metadata["model-index"]
    results = [metric for result in index["results"] for metric in result["metrics"]]
    assert index["name"] == "x" and sorted(result["value"] for result in results) == [0.01234, 1.5]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weights_sha256": "0" * 64}, "is about other weights"),
        ({"format": 1}, "has format 1, not 2"),
        ({"format": None}, "has format 1, not 2"),
    ],
)
def test_a_report_that_does_not_fit_is_left_out(run, tmp_path, changes, reason):
    report = {key: value for key, value in (write_report(run) | changes).items() if value is not None}
    (run / "report.json").write_text(json.dumps(report))
    names, _, lines = staged(run, tmp_path / "out")
    assert "report.json" not in names
    assert [line for line in lines if reason in line and "Run evaluate.py again" in line]
    assert "Nothing was measured" in (tmp_path / "out" / "README.md").read_text()


def test_without_a_report_the_card_has_no_measurements(run, tmp_path):
    card, metadata = card_of(run, tmp_path / "out")
    section = card.split("## Measurements")[1].split("## Training")[0]
    assert not re.search(r"\d", section) and "model-index" not in metadata
    assert "The quality and diversity of its samples were not measured." in card


def test_the_training_section(run, tmp_path):
    card, metadata = card_of(run, tmp_path / "out")
    for row in (
        "| training images | 4,096 |",
        "| image size | 8 x 8 pixels, 3 channels |",
        "| diffusion timesteps | 20 |",
        "| noise schedule | linear |",
        "| optimizer steps | 900, 90% of the planned run, with 32 images each |",
        "| images seen | 28,800 |",
        "| loss | simple, logit_normal timesteps |",
        "| training time | 30 minutes |",
        "| hardware | 2 x cpu, float32 |",
        f"| parameters | {sum(parameter.numel() for parameter in tiny_unet(3).parameters()):,} |",
    ):
        assert row in card, row
    assert "after 900 steps, 90% of the planned ones. Another run ends at another step" in card
    assert "give the same model" not in card
    assert "torchrun --nproc-per-node 2 training/train.py --config config.yaml\n" in card
    assert metadata["license"] == "apache-2.0"  # the moons are generated by this project
    assert "$" not in card


def test_data_set_and_base_model(tmp_path):
    run = make_run(tmp_path / "set", dataset_name="user/set", init_from="user/model", random_flip=True,
                   random_rotate90=True)  # fmt: skip
    card, metadata = card_of(run, tmp_path / "out", license="mit")
    assert metadata["datasets"] == ["user/set"] and metadata["base_model"] == "user/model"
    assert metadata["license"] == "mit"
    assert "flipped horizontally with probability 1/2 and turned by 0, 90, 180 or 270 degrees, at random." in card
    assert "vertically" not in card and "`user/model`" in card
    card, metadata = card_of(run, tmp_path / "unknown")
    assert metadata["license"] == "unknown" and "licence of its weights was not stated" in card


def test_the_card_links_to_the_project_page_if_there_is_one(run, tmp_path, monkeypatch):
    staged(run, tmp_path / "out")
    options = {"repo_id": "alice/x", "revision": "v1", "license": "mit", "record": RunRecord.load(run / "pipeline")}
    for name in ("model_card.md", "setup.cfg"):
        shutil.copyfile(files.ROOT / name, tmp_path / name)
    monkeypatch.setattr("training.hub.card.ROOT", tmp_path)
    for url, text in (
        ("", "with `ddpm_pipeline`, a"),
        ("url = https://x.org", "with [`ddpm_pipeline`](https://x.org)"),
    ):
        (tmp_path / "setup.cfg").write_text(f"[metadata]\nname = ddpm-pipeline\n{url}\n")
        assert text in write_card(tmp_path / "out", report=None, tables=[], **options)


def built_in_sample(folder, steps):
    """Samples of diffusers' own scheduler from x_T = 0, with a network that always predicts 0: the noise it adds."""
    scheduler = BuiltInDDPMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    x_t = torch.zeros(4, 3, 8, 8)
    for t in scheduler.timesteps:
        x_t = scheduler.step(x_t, t, torch.zeros_like(x_t), generator=torch.Generator().manual_seed(0)).prev_sample
    return x_t


@pytest.mark.parametrize(
    ("scheduler", "warning"),
    [
        ({}, None),
        ({"variance_type": "fixed_large"}, "leave noise"),
        ({"variance_type": "fixed_large", "timestep_spacing": "leading"}, None),
        ({"variance_type": "fixed_large_log"}, "are non-finite"),
    ],
)
def test_the_card_warns_where_the_built_in_classes_are_wrong(tmp_path, scheduler, warning):
    """They are wrong only for these schedulers: their last step leaves noise."""
    run = make_run(tmp_path / "run", scheduler=scheduler)
    card, _ = card_of(run, tmp_path / "out")
    noise_std = built_in_sample(tmp_path / "out", 5).std()
    if warning is None:
        assert "do not fully support" not in card and noise_std < 0.05
    else:
        assert warning in card and "do not fully support" in card and not noise_std < 0.05


@pytest.mark.parametrize(
    ("unet", "scheduler", "warnings"),
    [
        ({"channels": 3, "num_class_embeds": 5}, {}, ["class labels"]),
        ({"channels": 5}, {"variance_type": "fixed_large"}, ["PIL images with 5 channels", "leave noise"]),
    ],
)
def test_limits_of_the_built_in_classes_do_not_prevent_publishing(tmp_path, unet, scheduler, warnings):
    run = make_run(tmp_path / "run", unet=tiny_unet(**unet), scheduler=scheduler)
    card, _ = card_of(run, tmp_path / "out")
    assert all(warning in card for warning in warnings)
    differences = check.check_loading(tmp_path / "out")
    assert differences["remote-code"] == 0
    if "variance_type" in scheduler:
        assert differences["built-in"] > 1e-3
    else:
        assert "built-in" not in differences  # they cannot sample it


def test_calibrated_steps_are_published(tmp_path):
    """The loading check compares ordinary steps: the built-in classes have no others."""
    unet, scheduler = tiny_unet(3), DDPMScheduler(20, timestep_spacing="trailing")
    tables = [dpm_solver_table(scheduler, range(19, -1, -2)[:steps]) for steps in (10, 9, 5)]
    save_tables(scheduler, unet, tables)
    run = make_run(tmp_path / "run", unet=unet)
    pipe = DDPMPipeline(unet, scheduler)
    pipe.save_pretrained(run / "pipeline")
    card, _ = card_of(run, tmp_path / "out")
    assert "calibrated for `num_inference_steps=10`, `num_inference_steps=9`, `num_inference_steps=5`:" in card
    file = "scheduler/scheduler_config.json"
    assert (tmp_path / "out" / file).read_bytes() == (run / "pipeline" / file).read_bytes()
    published = DDPMPipeline.from_pretrained(tmp_path / "out")
    for steps in (10, 5):
        images = [
            each(seeds=1, num_inference_steps=steps, calibrated=True, output_type="latent").images
            for each in (pipe, published)
        ]
        torch.testing.assert_close(*images, rtol=0, atol=1e-5)
    assert max(check.check_loading(tmp_path / "out").values()) < 1e-5


def change(network):
    torch.nn.init.constant_(network.conv_out.bias, 0.25)


@pytest.mark.parametrize(
    ("change_model", "on_the_card", "reason"),
    [
        (lambda pipe: None, ["num_inference_steps=5`, `num_inference_steps=4, autoguidance_scale=2.0"], None),
        (lambda pipe: change(pipe.unet), [], "they were fitted to other weights"),
        (lambda pipe: change(pipe.guide), ["num_inference_steps=5"], "they were fitted with another guide"),
        (lambda pipe: setattr(pipe, "guide", None), ["num_inference_steps=5"], "they were fitted with a guide"),
        (lambda pipe: pipe.register_modules(scheduler=DDIMScheduler.from_config(pipe.scheduler.config)), [],
         "they are for a DDPMScheduler, and it has a DDIMScheduler"),
    ],
    ids=["the same", "network", "guide", "no guide", "scheduler"],
)  # fmt: skip
def test_the_card_has_the_calibrated_steps_that_are_for_these_weights(tmp_path, change_model, on_the_card, reason):
    run = make_run(tmp_path / "run", unet=tiny_unet(3))
    pipe = DDPMPipeline.from_pretrained(run / "pipeline")
    pipe.guide = copy.deepcopy(pipe.unet)
    plain, guided = (dpm_solver_table(pipe.scheduler, range(19, -1, -3)[:steps]) for steps in (5, 4))
    tables = [plain, guided._replace(guidance=Guidance(autoguidance_scale=2.0))]
    save_tables(pipe.scheduler, pipe.unet, tables, pipe.guide)
    change_model(pipe)
    pipe.save_pretrained(run / "pipeline")
    _, _, lines = staged(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.findall("sampler is calibrated for `(.*)`: a call", card) == on_the_card
    about = [line for line in lines if "calibrated" in line]
    assert len(about) == (reason is not None)
    assert all(reason in line and "the card leaves them out" in line for line in about)


def test_null_is_no_tables(run, tmp_path):
    file = run / "pipeline" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_calibration": None}))
    card, _ = card_of(run, tmp_path / "out")
    assert "Few steps" not in card and files.calibrated_tables(tmp_path / "out") == []


@pytest.mark.parametrize(("null", "balance"), [(True, "sqrt"), (False, "equal")])
def test_the_card_says_how_to_ask_for_a_class(tmp_path, null, balance):
    """Its code runs, as written, and the loading check asks for a class by name."""
    unet = tiny_unet(3, num_class_embeds=2 + null)
    record_class_names(unet, ["cat", 'a "dog"'])
    options = {"class_conditional": True, "balance_classes": balance, "label_dropout": 0.2 * null}
    run = make_run(tmp_path / "run", unet=unet, **options, ddpm_num_inference_steps=2)
    record = RunRecord.load(run / "pipeline")
    names = {"class_names": ["cat", 'a "dog"'], "class_counts": [1200, 30], "sample_labels": [0, 0, 1, 1]}
    dataclasses.replace(record, **names).save(run / "pipeline")
    Image.new("L", (4, 4)).save(run / "pipeline" / "samples.png")
    card, metadata = card_of(run, tmp_path / "out")
    assert "class-conditional" in metadata["tags"]
    assert '2 classes, with their numbers of training images: `cat` (1,200), `a "dog"` (30).' in card
    assert {"sqrt": "square root", "equal": "equally often"}[balance] in card
    assert ("no label with probability 0.2" in card) == null == ("has no guidance" not in card)
    assert 'A row for each class, from top to bottom: `cat`, `a "dog"`' in card
    assert "With diffusers alone" not in card and "cannot sample this model" in card
    blocks = re.findall(r"```python\n(.*?)```", card, re.S)
    assert len(blocks) == 2
    code = re.sub(r'"alice/x", revision="[^"]*"', repr(str(tmp_path / "out")), blocks[0])
    namespace = {}
    exec(code, namespace)
    assert len(namespace["images"]) == 4
    assert check.check_loading(tmp_path / "out")["remote-code"] == 0


def test_without_classes_the_card_has_no_word_of_them(run, tmp_path):
    card, metadata = card_of(run, tmp_path / "out")
    assert "class_labels" not in card and "## Classes" not in card and "class-conditional" not in metadata["tags"]
    assert "With diffusers alone" in card


def test_inconsistent_options_are_refused():
    for options, message in (
        ({"push_to_hub": True}, "hub_model_id is None"),
        ({"hub_model_id": "a/b"}, "push_to_hub is false"),
        ({"push_to_hub_steps": 5}, "push_to_hub is false"),
        ({"push_to_hub": True, "hub_model_id": "a/b", "push_to_hub_steps": -1}, "push_to_hub_steps is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(dataset_name="moons", **options)


def test_ctrl_c_ends_with_one_line(run, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.hub.push.show", interrupted)
    assert main([str(run), "--hub_model_id", "a/b", "--dry_run"]) == 130
    assert capsys.readouterr().err.strip() == "publish.py: interrupted. The run is unchanged."
