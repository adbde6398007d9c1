"""The validation curve of a run, compared with a published one."""

import json
import subprocess
import sys

import pytest
import yaml
from PIL import Image

from training import curve
from training.config import CONFIGS, Config


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    config = Config(dataset_name=str(tmp_path / "data" / "mnist"), resolution=32)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
    lines = [{"step": 1, "loss": 1.0}]
    lines += [
        {"step": step, "images": 10 * step, "validation_loss": 1 / step, "bits_per_dim": 5.0 + 1 / step,
         "bits_per_dim_standard_error": 0.1}
        for step in (2, 4, 8)
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 16, "validat')  # killed while writing
    return folder


def test_points_of_a_run(run):
    read = curve.read_curve(run)
    assert [point["step"] for point in read["points"]] == [2, 4, 8]
    assert read["about"]["dataset_name"] == "mnist" and read["about"]["resolution"] == 32
    assert "/" not in json.dumps(read)  # no paths of this machine


def test_a_written_curve_is_the_curve_that_was_read(run, tmp_path):
    read = curve.read_curve(run)
    file = tmp_path / "mine.curve.json"
    assert curve.main([str(run), "--output", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["about"] == read["about"]
    assert written["points"] == [
        {name: pytest.approx(value, rel=1e-5) for name, value in point.items()} for point in read["points"]
    ]


def test_between_two_points_the_curve_is_linear(run):
    read = curve.read_curve(run)
    assert curve.interpolate(read, "validation_loss", 30) == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert curve.interpolate(read, "validation_loss", 80) == pytest.approx(1 / 8)
    assert curve.interpolate(read, "validation_loss", 19) is None
    assert curve.interpolate(read, "validation_loss", 81) is None
    assert curve.interpolate(read, "kernel_distance", 30) is None


def test_a_run_is_compared_with_a_published_one(run, tmp_path, capsys):
    published = curve.read_curve(run)
    for point in published["points"]:
        point["validation_loss"] += 1
        point["images"] *= 2
    (tmp_path / "other.curve.json").write_text(curve.to_json(published))
    assert curve.main([str(run), "--beside", str(tmp_path / "other.curve.json")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["images", "seen", "held-out", "loss", "bits", "per", "dimension"]
    assert printed[1].split() == ["20", "0.5000", "5.5000"]  # before the first published point
    assert printed[2].split() == ["40", "0.2500", "(1.5000)", "5.2500", "(5.5000)"]
    with Image.open(run / "curve.png") as image:
        assert image.width > 300


@pytest.mark.parametrize("damage", ["no run", "no metrics", "no validation", "no such curve", "no settings", "no YAML"])
def test_nothing_to_show_exits_with_2(run, tmp_path, capsys, damage):
    arguments = [str(run)]
    if damage == "no run":
        arguments = [str(tmp_path / "nothing")]
    elif damage == "no metrics":
        (run / "metrics.jsonl").unlink()
    elif damage == "no validation":
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    elif damage == "no such curve":
        arguments += ["--beside", str(tmp_path / "nothing.json")]
    else:
        (run / "config.yaml").write_text("" if damage == "no settings" else "a: [")
    assert curve.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("curve.py: ") and message.count("\n") == 1
    reasons = {"no validation": "--validation_steps", "no settings": "has no settings", "no YAML": "is damaged"}
    assert reasons.get(damage, "No such file") in message


def test_a_plot_that_cannot_be_written_exits_with_2(run, tmp_path, capsys):
    for arguments in (["--plot", tmp_path / "no" / "curve.png"], ["--plot", run / "x.xyz"], ["--output", run]):
        assert curve.main([str(run), *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert f"{arguments[1]} cannot be written" in error and error.count("\n") == 1


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.curve.json")), ids=lambda file: file.name)
def test_published_curves_belong_to_a_preset_and_decrease(file):
    published = json.loads(file.read_text())
    preset = yaml.safe_load((CONFIGS / file.name.replace(".curve.json", ".yaml")).read_text())
    for name in ("denoiser", "prediction_type", "train_batch_size", "max_train_steps"):
        assert published["about"][name] == preset[name]
    points = published["points"]
    for name in ("validation_loss", "bits_per_dim"):
        assert points[-1][name] < points[0][name]
    assert all(point["images"] == point["step"] * preset["train_batch_size"] for point in points)


def test_the_script_runs_by_its_path_and_as_a_module():
    root = CONFIGS.parents[1]
    for command in (["training/curve.py"], ["-m", "training.curve"]):
        child = subprocess.run([sys.executable, *command, "--help"], cwd=root, capture_output=True, text=True)
        assert child.returncode == 0 and "--beside" in child.stdout
