"""The learning curve of a run, beside a published one."""

import json
from pathlib import Path

import pytest
from PIL import Image

from training import curve
from training.config import Config

CONFIGS = Path(__file__).resolve().parents[1] / "training" / "configs"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    config = Config(dataset_name=str(tmp_path / "data" / "mnist"), resolution=32)
    import yaml

    (folder / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
    lines = [{"step": 1, "loss": 1.0}]
    lines += [
        {"step": step, "images": 10 * step, "validation_loss": 1 / step, "bits_per_dim": 5.0 + 1 / step,
         "bits_per_dim_standard_error": 0.1}
        for step in (2, 4, 8)
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 16, "validat')  # killed while it wrote
    return folder


def test_points_of_a_run(run):
    found = curve.of_run(run)
    assert [point["step"] for point in found["points"]] == [2, 4, 8]
    assert found["about"]["dataset_name"] == "mnist" and found["about"]["resolution"] == 32
    assert "/" not in json.dumps(found)  # nothing of this machine


def test_a_curve_comes_back_from_its_file(run, tmp_path):
    found = curve.of_run(run)
    file = tmp_path / "mine.curve.json"
    assert curve.main([str(run), "--output", str(file)]) == 0
    again = json.loads(file.read_text())
    assert again["about"] == found["about"]
    assert again["points"] == [
        {name: pytest.approx(value, rel=1e-5) for name, value in point.items()} for point in found["points"]
    ]


def test_between_two_points_it_is_the_line(run):
    found = curve.of_run(run)
    assert curve.at(found, "validation_loss", 30) == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert curve.at(found, "validation_loss", 80) == pytest.approx(1 / 8)
    assert curve.at(found, "validation_loss", 19) is None and curve.at(found, "validation_loss", 81) is None
    assert curve.at(found, "kernel_distance", 30) is None


def test_it_is_shown_beside_a_published_one(run, tmp_path, capsys):
    other = curve.of_run(run)
    for point in other["points"]:
        point["validation_loss"] += 1
        point["images"] *= 2
    (tmp_path / "other.curve.json").write_text(curve.as_json(other))
    assert curve.main([str(run), "--beside", str(tmp_path / "other.curve.json")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["images", "seen", "held-out", "loss", "bits", "per", "dimension"]
    assert printed[1].split() == ["20", "0.5000", "5.5000"]  # before the other one's first point
    assert printed[2].split() == ["40", "0.2500", "(1.5000)", "5.2500", "(5.5000)"]
    with Image.open(run / "curve.png") as image:
        assert image.width > 300


@pytest.mark.parametrize("damage", ["no run", "no metrics", "no validation", "no such curve"])
def test_nothing_to_show_is_said(run, tmp_path, capsys, damage):
    arguments = [str(run)]
    if damage == "no run":
        arguments = [str(tmp_path / "nothing")]
    elif damage == "no metrics":
        (run / "metrics.jsonl").unlink()
    elif damage == "no validation":
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    else:
        arguments += ["--beside", str(tmp_path / "nothing.json")]
    assert curve.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("curve.py: ")
    assert ("--validation_steps" if damage == "no validation" else "No such file") in message


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.curve.json")), ids=lambda file: file.name)
def test_published_curves_belong_to_a_preset_and_go_down(file):
    published = json.loads(file.read_text())
    import yaml

    preset = yaml.safe_load((CONFIGS / file.name.replace(".curve.json", ".yaml")).read_text())
    for name in ("denoiser", "prediction_type", "train_batch_size", "max_train_steps"):
        assert published["about"][name] == preset[name]
    points = published["points"]
    for name in ("validation_loss", "bits_per_dim"):
        assert points[-1][name] < points[0][name]
    assert all(point["images"] == point["step"] * preset["train_batch_size"] for point in points)
