"""The instruments of the benchmark: a clock that is made up, a script that counts its steps, arrays of known values."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import compare
from benchmarks.compare import Comparison, in_turn
from benchmarks.stand_in.torchvision import transforms


def test_the_ratio_says_how_many_times_as_fast_ours_was_in_the_same_round():
    # The medians alone, 2 and 2, would say that both are as fast.
    times = Comparison("", "ms", peer=[1.0, 2.0, 30.0], ours=[0.25, 2.0, 3.0], target=4.0)
    assert times.ratios == [4.0, 1.0, 10.0]
    row = times.as_dict()
    assert row["ratio"] == 4.0 and row["met"] and row["peer"] == row["ours"] == 2.0 and row["rounds"] == 3
    assert row["spread"] == [1.6, 8.8]
    rates = Comparison("", "images/s", peer=[10.0], ours=[15.0], target=1.7)
    assert rates.ratio == 1.5 and not rates.as_dict()["met"]


@pytest.mark.parametrize(("peer", "ours", "unit"), [(0.03, 0.01, "ms"), (6e-5, 2e-5, "us")])
def test_both_are_timed_in_turn(monkeypatch, peer, ours, unit):
    clock, called = [0.0], []

    def takes(seconds, who):
        def call():
            clock[0] += seconds
            called.append(who)

        return call

    monkeypatch.setattr(compare.time, "perf_counter", lambda: clock[0])
    result = in_turn("", takes(peer, "peer"), takes(ours, "ours"), seconds=1)
    assert result.ratio == pytest.approx(3) and result.unit == unit
    assert result.peer == pytest.approx([peer * {"ms": 1e3, "us": 1e6}[unit]] * len(result.peer))
    assert len(result.peer) == len(result.ours) > 20 and clock[0] < 1.2
    blocks = [who for who, before in zip(called, ["", *called]) if who != before]
    assert blocks.count("peer") > 10 and blocks.count("ours") > 10


def test_the_clock_ends_a_script_at_the_last_step_wanted(tmp_path):
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
    for steps, seconds, last in ((3, 60, 5), (100, 0.07, 4)):  # as many steps, or as many as 0.07 s have begun
        command = [sys.executable, clock, file, 2, steps, seconds, script, "--a", "b"]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
        said = done.stdout.splitlines()
        assert said[0] == "1 __main__ --a b"
        seen = json.loads(file.read_text())
        if steps == 3:  # how late the other one is depends on the machine
            assert len(said) == last
        assert len(said) == 2 + seen["steps"] < 8
        assert seen["begin"] >= seen["first"] + 0.05 and seen["end"] >= seen["begin"] + 0.05 * seen["steps"]


def test_the_stand_in_makes_of_a_picture_what_the_script_expects():
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
