"""The folders and options of the runs in the fault tests, and the result of an undisturbed run."""

import pytest

from tests.arrays import save_images
from tests.faults.child import Run
from tests.short_run import SHORT_RUN, flags
from training.run import checkpoint

# Global batch 4 of 10 images: epochs end within step 3 and with step 5.
OPTIONS = SHORT_RUN | {
    "train_batch_size": 4,
    "save_images_steps": 0,
    "num_sample_images": 2,
    "ddpm_num_inference_steps": 2,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 1,
}


class Workspace:
    """A folder of runs: `start` starts one, `arguments` is its command line, `sha256` identifies its result.

    Attributes:
        data: folder with images/ and the cache of the decoded images.
    """

    def __init__(self, folder, data):
        self.folder, self.data = folder, data

    def arguments(self, name, **options):
        options = {"output_dir": self.folder / name, "cache_dir": self.data / "cache", **OPTIONS, **options}
        if "dataset_name" not in options:
            options.setdefault("train_data_dir", self.data / "images")
        return flags(options)

    def start(self, name, *, world_size=1, fault=None, crash_at=None, detect_device=False, nodes=None, **options):
        """A `Run` with the global batch 4, whatever the world size.

        Args:
            nodes: for each rank the options of its own machine.
        """
        world_size = len(nodes) if nodes else world_size
        if world_size > 1:
            options = {"train_batch_size": 4 // world_size, **options}
        log, arguments = self.folder / f"{name}.log", self.arguments(name, **options)
        return Run(
            arguments,
            log,
            world_size=world_size,
            fault=fault,
            crash_at=crash_at,
            detect_device=detect_device,
            nodes=nodes and [flags(own) for own in nodes],
        )

    def finish(self, name, **options):
        """Run to the end; the exit code must be 0. Returns `sha256(name)`."""
        run = self.start(name, **options)
        assert set(run.wait(120)) == {0}, run.text()
        return self.sha256(name)

    def sha256(self, name, step=None):
        """sha256 of the three files of the run's newest checkpoint, or of the one after `step`."""
        which = "latest" if step is None else str(self.folder / name / f"checkpoint-{step:06d}")
        _, manifest = checkpoint.find(self.folder / name, which)
        return {file: entry["sha256"] for file, entry in manifest["files"].items()}

    def checkpoints(self, name):
        """Names of everything that looks like a checkpoint."""
        return sorted(path.name for path in (self.folder / name).glob("checkpoint-*"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    save_images(folder / "images", 10, 16, 16)
    return folder


@pytest.fixture
def workspace(tmp_path, data):
    return Workspace(tmp_path, data)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, data):
    """A function of the world size: `Workspace.sha256` of an undisturbed run."""
    workspace = Workspace(tmp_path_factory.mktemp("undisturbed"), data)
    results = {}

    def sha256(world_size=1):
        if world_size not in results:
            results[world_size] = workspace.finish(f"world size {world_size}", world_size=world_size)
        return results[world_size]

    return sha256
