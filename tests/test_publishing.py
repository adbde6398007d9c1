"""What is staged for the Hub and what the card says of it. The Hub itself: tests/hub/test_to_and_fro.py."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as BuiltInDDPMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from ddpm_pipeline import DDPMPipeline, DDPMScheduler
from training.config import Config
from training.hub import check, during_training, stage
from training.publish import main

BLOCKS = {
    "sample_size": 8,
    "block_out_channels": (4, 4),
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "add_attention": False,
}


def network(**options):
    torch.manual_seed(0)
    return UNet2DModel(**BLOCKS | options)


def make_run(folder, *, unet=None, walk=(), **config):
    """A run as train.py leaves it."""
    scheduler = DDPMScheduler(**{"num_train_timesteps": 20, "timestep_spacing": "trailing", **dict(walk)})
    DDPMPipeline(unet or network(), scheduler).save_pretrained(folder / "pipeline")
    settings = Config(**{"dataset_name": "moons", "output_dir": str(folder), "max_train_steps": 1000, **config})
    training = {
        "step": 900, "global_batch": 32, "num_processes": 2, "device": "cpu", "mixed_precision": "no",
        "num_images": 4096, "source": "4096 moons", "versions": {"python": "3.11", "torch": "2.13.0"},
        "commit": "0123abc", "sample_seed": 7, "config": settings.as_dict(), "seconds": 1800.0,
    }  # fmt: skip
    (folder / "pipeline" / "training.json").write_text(json.dumps(training))
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "moons")


def staged(run, folder, **options):
    """The folder that is published, its tag, and what was said."""
    said = []
    tag = stage.stage(run, folder, repo_id="alice/x", say=said.append, **options)
    return stage.files_of(folder), tag, said


def card_of(run, folder, **options):
    staged(run, folder, **options)
    text = (folder / "README.md").read_text()
    return text, yaml.safe_load(text.split("---")[1])


# ---- The folder ------------------------------------------------------------------------------------------------------


def test_only_what_is_on_the_list(run, tmp_path):
    """Whatever else lies in the run and its pipeline stays at home."""
    for name in ("checkpoint-000900/optimizer.pt", "log.txt", ".lock", "pipeline/notes.txt", "pipeline/unet/old.bin",
                 "pipeline/.tmp-1", "samples/step-000900.png", "metrics.jsonl"):  # fmt: skip
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(b"private")
    Image.new("L", (4, 4)).save(run / "pipeline" / "samples.png")
    files, _, _ = staged(run, tmp_path / "out", fp16=True)
    assert set(files) <= set(stage.PUBLISHED)
    wanted = {*stage.MODEL, stage.HALF_WEIGHTS, "samples.png", "README.md", "config.yaml", "LICENSE"}
    assert set(files) == wanted


def test_the_tag_is_made_of_what_the_files_hold(run, tmp_path):
    _, tag, _ = staged(run, tmp_path / "one")
    _, again, _ = staged(run, tmp_path / "two")
    assert tag == again and re.fullmatch("sha256-[0-9a-f]{12}", tag)
    file = run / "pipeline" / stage.WEIGHTS
    weights = load_file(file)
    weights["conv_in.bias"][0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert staged(run, tmp_path / "three")[1] != tag
    assert staged(run, tmp_path / "four", revision_tag="v1")[1] == "v1"


@pytest.mark.parametrize("tag", ["", "bad tag", "a..b", "v1.", "v1.lock", "-v", "a" * 100, "v/1", "\u00e4"])
def test_tags_that_git_might_refuse(run, tmp_path, tag):
    with pytest.raises(ValueError, match="revision_tag is"):
        staged(run, tmp_path / "out", revision_tag=tag)


def test_half_precision(run, tmp_path):
    staged(run, tmp_path / "out", fp16=True)
    pipe = DDPMPipeline.from_pretrained(str(tmp_path / "out"), variant="fp16", torch_dtype=torch.float16)
    whole = load_file(run / "pipeline" / stage.WEIGHTS)
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(tensor, whole[name].half()), name
    whole["conv_in.bias"][0] = 1e5
    save_file(whole, run / "pipeline" / stage.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"conv_in\.bias has numbers above 65504"):
        staged(run, tmp_path / "large", fp16=True)


def test_settings_of_this_machine_stay_here(tmp_path):
    (tmp_path / "data" / "mine").mkdir(parents=True)
    mine = str(tmp_path / "data" / "mine")
    for given, wanted in (
        ({"train_data_dir": mine}, {"train_data_dir": "mine"}),
        ({"dataset_name": mine}, {"dataset_name": "mine"}),
        ({"dataset_name": "user/set"}, {"dataset_name": "user/set"}),
        ({"dataset_name": "moons", "init_from": mine}, {"init_from": "mine"}),
        ({"dataset_name": "moons", "init_from": "user/model"}, {"init_from": "user/model"}),
    ):
        config = Config(output_dir=str(tmp_path / "runs"), cache_dir=str(tmp_path / "cache"), **given)
        kept = stage.shareable(config.as_dict())
        assert kept | wanted == kept and str(tmp_path) not in str(kept)
        Config(**kept)  # it is a whole configuration still


def test_secrets_stop_it(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-mine")
    for text, what in (
        ("# hf_" + "a" * 34, "a token"),
        ("# a-token-of-mine", "the token"),
        (f"# {run.resolve()}", "the folder of the run"),
        (f"# {Path.home()}/x", "your home"),
    ):
        code = (run / "pipeline" / "pipeline.py").read_text()
        (run / "pipeline" / "pipeline.py").write_text(f"{code}{text}\n")
        with pytest.raises(ValueError, match=f"pipeline.py would tell {what}"):
            staged(run, tmp_path / what)
        (run / "pipeline" / "pipeline.py").write_text(code)
    staged(run, tmp_path / "clean")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: shutil.rmtree(run / "pipeline"), "has no pipeline/"),
        (lambda run: (run / "pipeline" / "training.json").unlink(), "training.json"),
        (lambda run: (run / "pipeline" / "training.json").write_text("{"), "training.json is not JSON"),
        (lambda run: (run / "pipeline" / stage.WEIGHTS).write_bytes(b"half"), "not a whole safetensors file"),
        (lambda run: (run / "pipeline" / "pipeline.py").unlink(), "pipeline.py"),
        (lambda run: (run / "report.json").write_text("[]"), "report.json does not hold an object"),
    ],
)
def test_runs_that_are_not_whole(run, tmp_path, spoil, message, capsys):
    spoil(run)
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        staged(run, tmp_path / "out")
    assert main([str(run), "--hub_model_id", "alice/x", "--dry_run"]) == 2
    assert message in capsys.readouterr().err


# ---- The card --------------------------------------------------------------------------------------------------------


def measured(run, **more):
    """A report of these weights."""
    row = {
        "measure": "kernel_distance", "name": "Kernel distance", "value": 0.01234, "standard_error": 0.00056, "n": 5000,
        "extractor": "resnet56", "reference": "mnist, train", "floor": 0.0001, "sampler": "DDPM, eta 1",
        "num_inference_steps": 50, "seed": 0, "weights": "EMA",
    }  # fmt: skip
    report = {
        "weights_sha256": hashlib.sha256((run / "pipeline" / stage.WEIGHTS).read_bytes()).hexdigest(),
        "command": "accelerate launch training/evaluate.py runs/moons",
        "measurements": [row, {**row, "weights": "raw", "value": 9.87}, {**row, **more}],
    }
    (run / "report.json").write_text(json.dumps(report))
    return report


def test_the_card_has_the_first_sampler_and_what_the_report_warns_of(run, tmp_path):
    report = measured(run, value=77.7, num_inference_steps=10, main=False)
    report |= {"warnings": ["the floor is of 15 pictures"], "floor": {"words": "held-out pictures", "n": 15}}
    (run / "report.json").write_text(json.dumps(report))
    card, _ = card_of(run, tmp_path / "out")
    assert "0.01234" in card and "77.7" not in card
    assert "> the floor is of 15 pictures." in card
    assert "Real against real: 15 held-out pictures" in card


def test_numbers_are_those_of_the_report(run, tmp_path):
    likelihood = {"measure": "bits_per_dimension", "name": "Bits per dimension", "value": 1.5, "extractor": None,
                  "floor": None, "standard_error": None, "sampler": None}  # fmt: skip
    report = measured(run, **likelihood)
    card, front = card_of(run, tmp_path / "out")
    row = "| Kernel distance | 0.01234 &plusmn; 0.00056 | 0.0001 | 5000 | resnet56 | mnist, train | DDPM, eta 1 "
    assert row + "| 50 | 0 |" in card
    assert "| Bits per dimension | 1.5 |  | 5000 |  | mnist, train |  | 50 | 0 |" in card
    assert "9.87" not in card  # of the raw weights, which are not published
    assert report["command"] in card and "Nothing was measured" not in card
    (index,) = front["model-index"]
    results = [metric for result in index["results"] for metric in result["metrics"]]
    assert index["name"] == "x" and sorted(result["value"] for result in results) == [0.01234, 1.5]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


def test_a_report_of_other_weights_is_left_out(run, tmp_path):
    report = measured(run)
    (run / "report.json").write_text(json.dumps(report | {"weights_sha256": "0" * 64}))
    files, _, said = staged(run, tmp_path / "out")
    assert "report.json" not in files and any("of other weights" in line for line in said)
    assert "Nothing was measured" in (tmp_path / "out" / "README.md").read_text()


def test_no_report_no_number(run, tmp_path):
    card, front = card_of(run, tmp_path / "out")
    section = card.split("## Measurements")[1].split("## Training")[0]
    assert not re.search(r"\d", section) and "model-index" not in front
    assert "How good and how varied its pictures are was not measured." in card


def test_settings_and_cost(run, tmp_path):
    card, front = card_of(run, tmp_path / "out")
    for row in (
        "| images | 4,096 |",
        "| size | 8 x 8 pixels, 3 channels |",
        "| steps of the walk | 20 |",
        "| noise schedule | linear |",
        "| optimizer steps | 900 of 1,000, with 32 images each |",
        "| images seen | 28,800 |",
        "| time | 30 minutes |",
        "| hardware | 2 x cpu, float32 |",
        f"| parameters of the network | {sum(p.numel() for p in network().parameters()):,} |",
    ):
        assert row in card, row
    assert "after 900 of 1,000 steps; another one ends" in card and "give the same model" not in card
    assert "torchrun --nproc-per-node 2 training/train.py --config config.yaml\n" in card
    assert front["license"] == "apache-2.0"  # the moons are ours to give
    assert "$" not in card


def test_the_data_and_where_it_began(tmp_path):
    run = make_run(tmp_path / "set", dataset_name="user/set", init_from="user/model", random_flip=True)
    card, front = card_of(run, tmp_path / "out", license="mit")
    assert front["datasets"] == ["user/set"] and front["base_model"] == "user/model" and front["license"] == "mit"
    assert "mirrored" in card and "`user/model`" in card
    card, front = card_of(run, tmp_path / "unknown")
    assert front["license"] == "unknown" and "licence of its weights was not stated" in card


def built_in(folder, steps, **options):
    """What diffusers' own scheduler makes of noise with a network that always says 0: images, and no error."""
    scheduler = BuiltInDDPMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    x_t = torch.zeros(4, 3, 8, 8)
    for t in scheduler.timesteps:
        x_t = scheduler.step(x_t, t, torch.zeros_like(x_t), generator=torch.Generator().manual_seed(0)).prev_sample
    return x_t


@pytest.mark.parametrize(
    ("walk", "words"),
    [
        ({}, None),
        ({"variance_type": "fixed_large"}, "leave noise"),
        ({"variance_type": "fixed_large", "timestep_spacing": "leading"}, None),
        ({"variance_type": "fixed_large_log"}, "is not a number"),
    ],
)
def test_the_card_warns_of_built_in_classes_that_are_wrong(tmp_path, walk, words):
    """And they are wrong just then: with the end of the walk at 0, what they leave is noise."""
    run = make_run(tmp_path / "run", walk=walk)
    card, _ = card_of(run, tmp_path / "out")
    left = built_in(tmp_path / "out", 5).std()
    if words is None:
        assert "not enough for this model" not in card and left < 0.05
    else:
        assert words in card and "not enough for this model" in card and not left < 0.05


@pytest.mark.parametrize(
    ("options", "words"),
    [({"num_class_embeds": 5}, "class labels"), ({"in_channels": 4, "out_channels": 4}, "pictures of 4 channels")],
)
def test_the_card_warns_of_networks_that_built_in_classes_cannot_sample(tmp_path, options, words):
    run = make_run(tmp_path / "run", unet=network(**options))
    card, _ = card_of(run, tmp_path / "out")
    assert words in card
    differences = check.check_loading(tmp_path / "out")
    assert differences["package, remote code"] == 0


def test_built_in_classes_that_are_known_to_be_wrong_stop_nothing(tmp_path):
    run = make_run(tmp_path / "run", walk={"variance_type": "fixed_large"})
    staged(run, tmp_path / "out")
    differences = check.check_loading(tmp_path / "out")
    assert differences["package, remote code"] == 0 and differences["package, built-in"] > 1e-3


# ---- Weights to begin from -------------------------------------------------------------------------------------------


def test_begin_from(run, tmp_path):
    said = []
    ours, scheduler = network(), DDPMScheduler(num_train_timesteps=20)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    during_training.begin_from(str(run / "pipeline"), ours, scheduler, said.append)
    wanted = network().state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in ours.state_dict().items())
    assert said == [f"first weights: those of {run / 'pipeline'}"]
    during_training.begin_from(
        str(run / "pipeline"), ours, DDPMScheduler(20, beta_schedule="squaredcos_cap_v2"), said.append
    )
    assert "another noise schedule" in said[1]


@pytest.mark.parametrize(
    ("unet", "walk", "message"),
    [
        ({"block_out_channels": (4, 8)}, {}, "has shape (4, 4, 3, 3) there and (8, 4, 3, 3) here"),
        ({"in_channels": 1, "out_channels": 1}, {}, "has shape (4, 3, 3, 3) there and (4, 1, 3, 3) here"),
        ({"layers_per_block": 2}, {}, "has shape none there"),
        ({}, {"prediction_type": "v_prediction"}, "prediction_type 'epsilon', and here it is 'v_prediction'"),
        ({}, {"num_train_timesteps": 30}, "ddpm_num_steps 20, and here it is 30: give --ddpm_num_steps 20"),
    ],
)
def test_weights_that_do_not_fit(run, unet, walk, message):
    ours = network(**unet)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        during_training.begin_from(
            str(run / "pipeline"), ours, DDPMScheduler(**{"num_train_timesteps": 20, **walk}), lambda line: None
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_no_model_to_begin_from(tmp_path):
    with pytest.raises(ValueError, match=r"init_from is '\./nowhere'"):
        during_training.begin_from("./nowhere", network(), DDPMScheduler(), lambda line: None)


def test_settings_that_do_not_go_together():
    for options, message in (
        ({"push_to_hub": True}, "hub_model_id is None"),
        ({"hub_model_id": "a/b"}, "push_to_hub is false"),
        ({"push_to_hub_steps": 5}, "push_to_hub is false"),
        ({"push_to_hub": True, "hub_model_id": "a/b", "push_to_hub_steps": -1}, "push_to_hub_steps is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(dataset_name="moons", **options)
