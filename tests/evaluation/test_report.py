"""report.json, report.md, the plots and the command line in them."""

import hashlib
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_pipeline.features import make_extractor
from tests.arrays import random_images
from tests.evaluation.helpers import NUM_BOUND_IMAGES, NUM_REFERENCE, NUM_SAMPLES, find_measurement
from training.evaluation.config import EvalConfig, parse
from training.evaluation.report import command_line, nearest_grid
from training.evaluation.samples import WEIGHTS_FILE
from training.hub import stage


def test_the_report_has_all_its_keys(first_report, run):
    assert next(iter(first_report)) == "format" and first_report["format"] == 2
    assert first_report.keys() == {
        "format", "weights_sha256", "command", "measurements", "warnings", "guidance", "curves", "data", "reference",
        "real_data_baseline", "held_out", "extractors", "step", "precision", "seconds", "num_processes", "device",
        "date", "commit", "versions",
    }  # fmt: skip
    weights = (run / "pipeline" / WEIGHTS_FILE).read_bytes()
    assert first_report["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert (first_report["step"], first_report["precision"], first_report["num_processes"]) == (6, "float32", 1)
    assert first_report["guidance"] is None
    assert first_report["reference"]["n"] == NUM_REFERENCE
    assert first_report["real_data_baseline"] == {"description": "held-out images", "n": NUM_SAMPLES}
    assert first_report["held_out"]["n"] == 1024 and "1024 moons" in first_report["held_out"]["description"]
    assert [extractor["name"] for extractor in first_report["extractors"]] == ["pixels-16x16"]
    assert any("Frechet distances of 80 samples are too large" in warning for warning in first_report["warnings"])
    for m in first_report["measurements"]:
        assert m.keys() == {
            "measure", "name", "value", "standard_error", "n", "extractor", "channel", "reference", "weights",
            "real_data_baseline", "sampler", "num_inference_steps", "eta", "guidance_scale", "class_name", "seed",
            "seconds", "primary",
        }  # fmt: skip
        assert math.isfinite(m["value"]) and m["standard_error"] >= 0
        assert m["n"] == (NUM_SAMPLES if m["sampler"] else NUM_BOUND_IMAGES)


def test_all_samplers_are_measured_and_the_first_also_with_online_weights(first_report):
    of_samples = {"frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage", "memorisation"}
    of_samples |= {"mean_shift", "std_ratio"}
    groups = {}
    for m in first_report["measurements"]:
        groups.setdefault((m["weights"], m["num_inference_steps"], m["eta"], m["primary"]), []).append(m)
    assert groups.keys() == {
        ("EMA", 4, 1.0, True), ("EMA", 8, 1.0, False), ("EMA", 4, 0.0, False), ("EMA", 8, 0.0, False),
        ("online", 4, 1.0, False), ("EMA", None, None, True), ("online", None, None, False),
    }  # fmt: skip
    for (_, steps, eta, _), group in groups.items():
        if steps is None:
            assert [m["measure"] for m in group] == ["bits_per_dim", "bits_per_dim"]
            assert all(m["real_data_baseline"] is None for m in group)
        else:
            assert {m["measure"] for m in group} == of_samples and len(group) == len(of_samples)
            assert all(m["real_data_baseline"] is not None for m in group)
            assert {m["sampler"] for m in group} == {f"DDPMScheduler, eta {eta:g}, trailing"}
            assert {m["reference"] for m in group} == {f"{NUM_REFERENCE} training images"}
    assert not any("FID" in m["name"] or "KID" in m["name"] for m in first_report["measurements"])
    values = {m["value"] for m in first_report["measurements"] if m["measure"] == "kernel_distance"}
    assert len(values) == 5


def test_the_tables_are_complete_and_the_plots_open(first_report, run):
    text = (run / "report.md").read_text()
    plots = re.findall(r"!\[\w+\]\((evaluation/\w+\.png)\)", text)
    wanted = ["frechet_distance", "kernel_distance", "bound", "rate_distortion", "nearest"]
    assert plots == [f"evaluation/{name}.png" for name in wanted]
    for name in plots:
        with Image.open(run / name) as plot:
            plot.load()
            assert min(plot.size) > 30
    m = find_measurement(first_report, "kernel_distance", weights="online")
    assert f"| {m['value']:.4g} &plusmn; {m['standard_error']:.2g} |" in text
    assert "| online | DDPMScheduler, eta 1, trailing | 4 | 80 |" in text
    assert text.count("| real-data baseline |") == 2  # features, and the pixels themselves
    assert "Frechet distances of 80 samples are too large" in text


def test_the_report_has_no_local_paths(first_report, run, work):
    for file in ("report.json", "report.md"):
        text = (run / file).read_text()
        assert work.name not in text and Path.home().name not in text
        assert not re.search(r"""(^|[\s"'(=`])[/~]\w""", text, re.MULTILINE)
    assert first_report["command"].startswith("accelerate launch training/evaluate.py runs/run --num_samples 80 ")


def test_the_card_shows_the_primary_measurements(first_report, run, tmp_path):
    log = []
    stage.stage(run, tmp_path / "staged", repo_id="alice/moons", log=log.append)
    assert not [line for line in log if "report" in line]
    card = (tmp_path / "staged" / "README.md").read_text()
    m = find_measurement(first_report, "kernel_distance", weights="EMA", primary=True)
    value = f"{m['value']:.4g} &plusmn; {m['standard_error']:.2g}"
    assert " | ".join([m["name"], value, f"{m['real_data_baseline']:.4g}", "80"]) in card
    online = find_measurement(first_report, "kernel_distance", weights="online")
    assert f"{online['value']:.4g} &plusmn;" not in card
    for m in first_report["measurements"]:
        if m["measure"] == "bits_per_dim" and m["weights"] == "EMA":
            assert f"| {m['name']} | {m['value']:.4g}" in card
    assert first_report["command"] in card and "was not measured" not in card
    assert json.loads((tmp_path / "staged" / "report.json").read_text()) == first_report


def test_nearest_grid_shows_samples_above_the_images_they_are_nearest_to(tmp_path):
    reference = random_images(20, 1, 8, 8) // 2
    samples = reference[[5, 11, 2]] + np.array([9, 1, 4], dtype=np.uint8)[:, None, None, None]
    extractor = make_extractor("pixels", images=reference)
    grid = nearest_grid(samples, reference, extractor, tmp_path, count=2)
    scale = grid.width // (2 * 8 + 3 * 2)
    pixels = np.asarray(grid)[::scale, ::scale]
    for column, (sample, nearest) in enumerate([(1, 11), (2, 2)]):
        left = 2 + column * 10
        assert np.array_equal(pixels[2:10, left : left + 8], samples[sample, 0])
        assert np.array_equal(pixels[12:20, left : left + 8], reference[nearest, 0])


@pytest.mark.parametrize(
    ("model", "settings", "shown"),
    [
        ("runs/moons", {}, "runs/moons"),
        ("user/moons", {"revision": "v1"}, "user/moons --revision v1"),
        ("/data/alice/runs/moons", {}, "runs/moons"),
        ("/data/alice/lr=0.1/moons", {}, "runs/moons"),
        ("../moons", {"seed": 3}, "runs/moons --seed 3"),
        ("runs/moons", {"cache_dir": "/data/alice/cache"}, "runs/moons --cache_dir cache"),
        ("runs/moons", {"cache_dir": "/data/a=b/cache"}, "runs/moons --cache_dir cache"),
        ("runs/moons", {"train_data_dir": "/data/my images"}, "runs/moons --train_data_dir 'my images'"),
        (
            "runs/moons",
            {"extractor": ("~/inception.pt", "pixels")},
            "runs/moons --extractor inception.pt --extractor pixels",
        ),
        ("runs/moons", {"metrics": ("frechet", "bound")}, "runs/moons --metrics frechet,bound"),
        ("runs/moons", {"eta": (1.0, 0.25), "num_samples": 2048}, "runs/moons --eta 1,0.25"),
    ],
)
def test_the_command_has_no_local_paths(model, settings, shown):
    config = EvalConfig(model, **settings)
    assert command_line(config) == f"accelerate launch training/evaluate.py {shown}"


def test_the_command_gives_the_same_settings_again():
    config = EvalConfig(
        "runs/x", num_inference_steps=(50, 10), eta=(1.0, 0.125), weights=("online",), extractor=("pixels", "a, b.pt"),
        metrics=("kernel", "bound"), seed=7, strata=0, mixed_precision="bf16", train_data_dir="my images",
    )  # fmt: skip
    assert parse(shlex.split(command_line(config))[3:]) == config
