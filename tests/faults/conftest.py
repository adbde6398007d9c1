"""Where the runs of the fault tests are, what they are asked for, and the run that nothing disturbs."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # child.py, which the processes import by its name

from child import Run

from tests.short_run import SHORT_RUN
from training.run import checkpoint

# All repeats, as `make test-faults` wants it; without it the tests that repeat do it a few times.
FULL = os.environ.get("DDPM_FAULTS") == "full"

# Global batch 4 of 10 pictures: passes end within step 3 and with step 5.
OPTIONS = SHORT_RUN | {
    "train_batch_size": 4,
    "save_images_steps": 0,
    "num_sample_images": 2,
    "ddpm_num_inference_steps": 2,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 1,
}


class Place:
    """A folder for runs: `run` begins one, `arguments` are its command line, `sums` what it has learned."""

    def __init__(self, folder, pictures):
        self.folder, self.pictures = folder, pictures

    def arguments(self, name, **options):
        options = {"output_dir": self.folder / name, "cache_dir": self.pictures / "cache", **OPTIONS, **options}
        if "dataset_name" not in options:
            options.setdefault("train_data_dir", self.pictures / "pictures")
        return [f"--{option}={value}" for option, value in options.items()]

    def run(self, name, *, processes=1, prepare=None, crash_at=None, bare=False, **options):
        if processes > 1:
            options = {"train_batch_size": 4 // processes, **options}
        log = self.folder / f"{name}.log"
        arguments = self.arguments(name, **options)
        return Run(arguments, log, processes=processes, prepare=prepare, crash_at=crash_at, bare=bare)

    def finish(self, name, **options):
        """Run to the end, which must be a good one, and give what was learned."""
        run = self.run(name, **options)
        assert set(run.wait(120)) == {0}, run.text()
        return self.sums(name)

    def sums(self, name, step=None):
        """sha256 of the three files of its newest checkpoint, or that after `step`."""
        which = "latest" if step is None else str(self.folder / name / f"checkpoint-{step:06d}")
        _, manifest = checkpoint.find(self.folder / name, which)
        return {file: entry["sha256"] for file, entry in manifest["files"].items()}

    def checkpoints(self, name):
        return sorted(path.name for path in (self.folder / name).glob("checkpoint-*"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "pictures").mkdir()
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 1), dtype=np.uint8)
        Image.fromarray(pixels[..., 0]).save(folder / "pictures" / f"{i}.png")
    return folder


@pytest.fixture
def place(tmp_path, pictures):
    return Place(tmp_path, pictures)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, pictures):
    """What runs have learned that nothing disturbed, by the number of their processes."""
    place = Place(tmp_path_factory.mktemp("undisturbed"), pictures)
    found = {}

    def sums(processes=1):
        if processes not in found:
            found[processes] = place.finish(f"of {processes}", processes=processes)
        return found[processes]

    return sums
