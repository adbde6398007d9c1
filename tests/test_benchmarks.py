"""The benchmarks' own tools: ratios, timing with a fake clock, recorded steps of a script, stand-in transforms."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import compare
from benchmarks.compare import Comparison, alternate
from benchmarks.stand_in.torchvision import transforms


def test_the_ratio_is_the_median_of_the_ratios_of_each_round():
    # The ratio of the medians, 2 and 2, would be 1.
    times = Comparison("", "ms", peer=[1.0, 2.0, 30.0], ours=[0.25, 2.0, 3.0], target=4.0)
    assert times.ratios == [4.0, 1.0, 10.0]
    result = times.as_dict()
    assert result["ratio"] == 4.0 and result["target_met"] and result["rounds"] == 3
    assert result["peer"] == result["ours"] == 2.0
    assert result["ratio_quantiles_10_90"] == [1.6, 8.8]
    rates = Comparison("", "images/s", peer=[10.0], ours=[15.0], target=1.7)
    assert rates.ratio == 1.5 and not rates.as_dict()["target_met"]


@pytest.mark.parametrize(("peer", "ours", "unit"), [(0.03, 0.01, "ms"), (6e-5, 2e-5, "us")])
def test_peer_and_ours_are_timed_in_alternation(monkeypatch, peer, ours, unit):
    clock, calls = [0.0], []

    def takes(seconds, who):
        def call():
            clock[0] += seconds
            calls.append(who)

        return call

    monkeypatch.setattr(compare.time, "perf_counter", lambda: clock[0])
    result = alternate("", takes(peer, "peer"), takes(ours, "ours"), seconds=1)
    assert result.ratio == pytest.approx(3) and result.unit == unit
    assert result.peer == pytest.approx([peer * {"ms": 1e3, "us": 1e6}[unit]] * len(result.peer))
    assert len(result.peer) == len(result.ours) > 20 and clock[0] < 1.2
    blocks = [who for who, previous in zip(calls, ["", *calls]) if who != previous]
    assert blocks.count("peer") > 10 and blocks.count("ours") > 10


def test_clock_ends_a_script_after_the_last_timed_step(tmp_path):
    script, file = tmp_path / "script.py", tmp_path / "times.json"
    script.write_text(
        "import sys, time, torch\n"
        "optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])\n"
        "for step in range(1, 9):\n"
        "    time.sleep(0.05)\n"
        "    print(step, __name__, *sys.argv[1:], flush=True)\n"
        "    optimizer.step()\n"
    )
    clock = Path(compare.__file__).with_name("clock.py")
    for steps, seconds, last in ((3, 60, 5), (100, 0.07, 4)):  # 3 steps, or the steps that begin within 0.07 s
        command = [sys.executable, clock, file, 2, steps, seconds, script, "--a", "b"]
        process = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
        lines = process.stdout.splitlines()
        assert lines[0] == "1 __main__ --a b"
        times = json.loads(file.read_text())
        if steps == 3:  # when the other one ends depends on the load of the machine
            assert len(lines) == last
        assert len(lines) == 2 + times["steps"] < 8
        assert times["begin"] >= times["first"] + 0.05 and times["end"] >= times["begin"] + 0.05 * times["steps"]


def test_stand_in_transforms_equal_their_definitions():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
    image = Image.fromarray(pixels)
    torch.testing.assert_close(to_tensor(image), expected)
    torch.testing.assert_close(to_tensor(transforms.CenterCrop(32)(image)), expected[:, 4:36, 9:41])
    cropped = to_tensor(transforms.RandomCrop(32)(image))
    windows = expected.unfold(1, 32, 1).unfold(2, 32, 1)
    assert ((windows - cropped[:, None, None]).abs().amax((0, 3, 4)) < 1e-6).sum() == 1
    assert transforms.Resize(20)(image).size == (25, 20)
    torch.testing.assert_close(
        transforms.ConvertImageDtype(torch.float32)(transforms.PILToTensor()(image)), transforms.ToTensor()(image)
    )


@pytest.mark.parametrize("script", ["bench", "built_in", "digits", "interpolation", "killed"])
def test_scripts_run_by_their_path_from_any_folder(script, tmp_path, monkeypatch, capsys):
    path = Path(compare.__file__).with_name(f"{script}.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])  # as Python sets it for a script
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(path), run_name="__main__")
    assert exit_.value.code == 0
    assert f"usage: {path.name}" in capsys.readouterr().out
