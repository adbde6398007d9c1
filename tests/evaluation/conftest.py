"""A run of six steps, its first report, and its images: shared by all tests in this folder."""

import json
import shutil

import numpy as np
import pytest

from tests.arrays import save_images
from tests.evaluation.helpers import arguments, train
from tests.short_run import run_in_child
from training.data.cache import load_images


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="session")
def run(work):
    """Six steps of 16 x 16 moons."""
    return train(work, "run", dataset_name="moons", resolution=16)


@pytest.fixture(scope="session")
def first_report(work, run):
    """The report of an evaluation in a child process: two numbers of steps, two values of eta."""
    settings = {"num_inference_steps": (4, 8), "eta": (1, 0)}
    output = run_in_child([], "evaluate.py", arguments(work, run, **settings), cwd=work)
    assert "The report: " in output
    return json.loads((run / "report.json").read_text())


@pytest.fixture(scope="session")
def train_images(work):
    return np.asarray(load_images(dataset_name="moons", resolution=16, cache_dir=work / "cache").images)


@pytest.fixture(scope="session")
def test_images(work):
    """The moons' test split."""
    return np.asarray(load_images(dataset_name="moons", split="test", resolution=16, cache_dir=work / "cache").images)


@pytest.fixture(scope="session")
def image_folder(work):
    """A folder of 40 images, of which 2 are held out."""
    return save_images(work / "images", 40, 16, 16)


@pytest.fixture(scope="session")
def saved_pipeline(work, run):
    """A saved pipeline without a run record."""
    shutil.copytree(run / "pipeline", work / "saved")
    (work / "saved" / "training.json").unlink()
    return work / "saved"
