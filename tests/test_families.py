"""Each family trains at each size, by optimizer steps as a run takes them, on the smallest batch; its benchmark."""

import json
import math
import re
import sys

import pytest
import torch

from benchmarks import families
from benchmarks.common import ROOT
from benchmarks.networks import make_network
from tests.short_run import fresh_accelerate
from training import plan, tune
from training.denoiser import FAMILIES
from training.run.runtime import Runtime

# The largest first: the process keeps the memory that it has used, and the others find room in it.
PAIRS = [(name, side) for name in reversed(FAMILIES) for side in reversed(families.SIZES)]


@pytest.mark.parametrize(("name", "side"), PAIRS)
def test_each_family_trains_at_each_size(name, side):
    """A step moves every tensor of the network. At the full learning rate the loss of small ones is finite after it."""
    torch.manual_seed(0)
    with fresh_accelerate():
        runtime = Runtime("auto", cpu_threads=1)
        unet = make_network(name, side)
        tune.apply(tune.default_tuning(runtime.device.type, runtime.dtype), unet)
        before = {key: parameter.flatten()[:64].detach().clone() for key, parameter in unet.named_parameters()}
        steps = families.Steps(unet, side, runtime)
        is_small = name in ("tiny", "small")  # one image of large at 256 pixels takes 10 to 40 seconds, and up to 3 GB
        for _ in range(2 if is_small else 1):
            loss, outcome = steps.take(2 if is_small else 1)
            assert 0 < loss < math.inf and outcome == (False, False, False)
    unmoved = [key for key, first in before.items() if torch.equal(unet.get_parameter(key).flatten()[:64], first)]
    # softmax does not see what all keys have in common: the gradient of their bias is rounding errors, or nothing
    assert [key for key in unmoved if not key.endswith("to_k.bias")] == []
    assert all(parameter.isfinite().all() for parameter in unet.parameters())


def test_a_row_of_the_benchmark(monkeypatch):
    monkeypatch.setattr(families, "SECONDS", 0)
    monkeypatch.setattr(families, "GLOBAL_BATCH", 4)
    with fresh_accelerate():
        row = families.measure("tiny", 32)
    assert set(row) | {"family", "size"} >= set(families.COLUMNS)
    assert row["batch"] == 4 and 1 < row["training"] < row["sampling"] < 1e6
    for what, gflop in (("training", 0.711), ("sampling", 0.237)):  # see test_benchmarks.py
        assert row[f"{what}_gflops"] == pytest.approx(gflop * row[what], rel=0.01)
    assert 0.2 < row["peak_gb"] < 100 and row["predicted_gb"] == pytest.approx(plan.LIBRARIES / 1e9, abs=0.2)


def test_the_table_of_predictions_for_a_gpu_in_the_documentation():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (cells,) = re.findall(r"^\| `tiny` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    for cell, side in zip(cells, families.SIZES):
        assert float(cell) == pytest.approx(families.predict_for_gpu("tiny", side).of(64) / 1e9, rel=0.03)


def test_pairs_that_fail_cost_the_others_nothing(monkeypatch, tmp_path, capsys):
    rows = {"tiny": dict.fromkeys(families.COLUMNS, 0.25), "large": {"error": "stopped"}}
    monkeypatch.setattr(families, "in_own_process", lambda family, side: rows[family])
    output = tmp_path / "rows.json"
    argv = ["families.py", "--families", "large", "tiny", "--sizes", "32", "64", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", argv)
    families.main()
    results = json.loads(output.read_text())["results"]
    assert [row.get("error") for row in results] == ["stopped", "stopped", None, None]
    printed = capsys.readouterr().out.splitlines()
    assert printed[3] == "stopped" and printed[5].count("0.25") == len(families.COLUMNS)
