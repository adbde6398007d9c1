"""Runs on shards: the same weights as in one go, whatever happens to the store; classes, validation, evaluation."""

import json

import pytest

from tests.data.shard_files import serving, write_packed, write_tables
from tests.short_run import SHORT_RUN, dying_after, flags, run_here
from training.data import stores
from training.data.shard_order import ShardOrder
from training.run import checkpoint

OPTIONS = SHORT_RUN | {
    "streaming": True,
    "train_batch_size": 4,
    "max_train_steps": 10,
    "num_sample_images": 1,
    "ddpm_num_inference_steps": 1,
    "save_images_steps": 0,
    "validation_steps": 0,
}


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Groups of two or three shards, so that a short run sees several."""
    monkeypatch.setattr(ShardOrder.__init__, "__defaults__", (12,))
    monkeypatch.setattr(stores, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(stores, "PATIENCE", 0.5)


def train(work, place, name="run", **options):
    options = {"output_dir": work / name, "cache_dir": work / "cache", "dataset_name": place, **OPTIONS, **options}
    return run_here("train.py", flags(options))


def weights(work, name, step=10):
    folder = work / name / f"checkpoint-{step:06}"
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Shards of 26 images, and a run of 10 steps on them: one and a half epochs."""
    work = tmp_path_factory.mktemp("streaming")
    write_packed(work / "set", [5, 6, 4, 7, 4], side=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardOrder.__init__, "__defaults__", (12,))
        assert train(work, work / "set") == 0
    return work


def test_a_run_that_dies_in_an_epoch_ends_with_the_same_weights(work, capsys):
    with dying_after(4):
        train(work, work / "set", "resumed", checkpointing_steps=4)
    assert train(work, work / "set", "resumed", resume_from_checkpoint="latest") == 0
    assert weights(work, "resumed") == weights(work, "run")
    assert "waited" in capsys.readouterr().out


def test_other_counts_in_the_shards_are_other_data(work, capsys):
    write_packed(work / "other" / "set", [6, 5, 4, 7, 4], side=16)
    assert train(work, work / "other" / "set", resume_from_checkpoint="latest", max_train_steps=11) == 2
    assert "images with sha256" in capsys.readouterr().err


def test_a_store_that_fails_for_long_loses_nothing(work, capsys, monkeypatch):
    """The run ends with a checkpoint of its last step, and continues from another place as if nothing had happened."""
    with serving(work / "set") as server:
        save, dead_at = checkpoint.save, []

        def save_and_die(output_dir, at_step, **parts):
            path = save(output_dir, at_step, **parts)
            if not dead_at:
                server.dead.set()
            dead_at.append(at_step)
            return path

        monkeypatch.setattr(checkpoint, "save", save_and_die)
        assert train(work, server.url, "failed", checkpointing_steps=2) == 1
    error = capsys.readouterr().err
    assert "cannot be read, tried for" in error and f"The checkpoint after step {dead_at[-1]} is intact" in error
    assert 2 <= dead_at[-1] < 10
    monkeypatch.setattr(checkpoint, "save", save)
    assert train(work, work / "set", "failed", resume_from_checkpoint="latest") == 0
    assert weights(work, "failed") == weights(work, "run")


def test_a_run_with_classes_validates_and_is_evaluated(tmp_path, capsys):
    write_tables(tmp_path / "set", [40, 40, 40, 40], side=16)
    write_tables(tmp_path / "set", [20], split="test", side=16)
    options = {"validation_steps": 5, "num_validation_images": 8, "validation_samples": 4, "extractor": "pixels"}
    options |= {"class_conditional": True, "max_train_steps": 5}
    assert train(tmp_path, tmp_path / "set", **options) == 0
    printed = capsys.readouterr().out
    assert "160 images, 3 x 16 x 16, uint8, from 160 images of data set set, split train; 4 shards" in printed
    assert "held out: 20 images, 20 images of data set set, split test" in printed
    assert "3 classes: 0 (" in printed
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("validation_loss" in entry and "kernel_distance" in entry for entry in metrics)
    assert any("data_wait" in entry for entry in metrics)
    options = {"cache_dir": tmp_path / "cache", "num_samples": 16, "num_inference_steps": 1, "extractor": "pixels"}
    options |= {"metrics": "kernel,bound", "num_bound_images": 4, "strata": 8, "cpu_threads": 1, "weights": "ema"}
    assert run_here("evaluate.py", [str(tmp_path / "run"), *flags(options)]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["reference"]["description"] == "all 160 training images"
    assert report["held_out"]["n"] == 20
    assert not any("trained on other images" in warning for warning in report["warnings"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": "moons"}, "the moons are drawn and have no shards"),
        ({"streaming": False, "dataset_name": "https://host/x"}, "a URL needs --streaming"),
        ({"class_conditional": True, "balance_classes": "equal"}, "balance_classes is 'equal', but streaming is true"),
        ({"streaming_cache_gb": 0}, "streaming_cache_gb is 0"),
        ({"streaming": False}, "--streaming"),
    ],
)
def test_mistakes_are_refused(work, capsys, options, message):
    assert train(work, work / "set", "refused", **options) == 2
    assert message in capsys.readouterr().err
    assert not (work / "refused" / "config.yaml").exists()
