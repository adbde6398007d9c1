"""Threads of a run on a CPU: they follow what other programs leave, are recorded, and a resumed run keeps them."""

import json

import pytest
import torch

from ddpm_pipeline.cpu import SharedCores
from tests.short_run import SHORT_RUN, flags, fresh_accelerate, run_here
from training.run import runtime as runtime_module
from training.run.runtime import Runtime

STEPS = 8


class Neighbour(SharedCores):
    """On a machine of two cores another program takes one in the third step and gives it back in the sixth."""

    made = ()

    def __init__(self, most, cores):
        super().__init__(most, cores, set())
        self.step, self.begun = 0, []
        self.made.append(self)

    def begin(self, threads):
        self.begun.append(threads)
        super().begin(threads)

    def update(self, at_once=False):
        self.step += 1
        if self.step not in (3, 6):
            return None
        self.threads, self.others = (1, 0.97) if self.step == 3 else (2, 0.02)
        torch.set_num_threads(self.threads)
        return self.threads


@pytest.fixture
def two_cores(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(Neighbour, "made", [])
    monkeypatch.setattr(runtime_module, "SharedCores", Neighbour)
    monkeypatch.setattr(runtime_module, "cpu_cores", lambda: 2)
    yield
    torch.set_num_threads(before)


def train(folder, **options):
    options = SHORT_RUN | {
        "dataset_name": "moons", "output_dir": folder / "run", "cache_dir": folder / "cache", "train_batch_size": 2,
        "max_train_steps": STEPS, "ddpm_num_inference_steps": 1, "num_sample_images": 1, "validation_steps": 0,
        "save_images_steps": 0, "checkpointing_steps": 4, "report_to": "none",
    } | options  # fmt: skip
    return run_here("train.py", flags({name: value for name, value in options.items() if value is not None}))


def recorded_threads(file):
    return json.loads(file.read_text(encoding="utf-8"))["threads"]


def test_a_run_follows_what_others_leave_and_a_resumed_one_begins_with_its_threads(two_cores, tmp_path, capsys):
    assert train(tmp_path, cpu_threads=None) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " thread" in line]
    assert lines == [
        "other programs keep 1.0 of 2 cores busy: computing with 1 thread",
        "computing with 2 threads again",
    ]
    assert Neighbour.made[0].step == STEPS + 1  # once a step, of training and of sampling
    run = tmp_path / "run"
    assert recorded_threads(run / "checkpoint-000004" / "manifest.json") == 1
    assert recorded_threads(run / "checkpoint-000008" / "manifest.json") == 2
    assert recorded_threads(run / "pipeline" / "training.json") == 2

    assert train(tmp_path, cpu_threads=None, resume_from_checkpoint=run / "checkpoint-000004", max_train_steps=5) == 0
    assert Neighbour.made[1].begun == [1]
    assert recorded_threads(run / "checkpoint-000005" / "manifest.json") == 1


def test_with_cpu_threads_nothing_adapts(two_cores, tmp_path, capsys):
    assert train(tmp_path, cpu_threads=2) == 0
    assert train(tmp_path, cpu_threads=1, resume_from_checkpoint="latest", max_train_steps=STEPS + 1) == 0
    assert Neighbour.made == []
    assert "with 1 thread" not in capsys.readouterr().out
    run = tmp_path / "run"
    assert recorded_threads(run / "checkpoint-000008" / "manifest.json") == 2
    assert recorded_threads(run / "checkpoint-000009" / "manifest.json") == 1


def test_several_processes_on_a_machine_share_its_cores_and_nothing_adapts(two_cores, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with fresh_accelerate():
        runtime = Runtime("no")
    assert Neighbour.made == []
    assert runtime.threads == 1
    runtime.begin_threads(2)
    runtime.adapt_threads()
    assert runtime.threads == 1


@pytest.mark.parametrize(("before", "now"), [(1, 1), (2, 2), (16, 2), (None, 2)])
def test_threads_of_an_earlier_part_of_the_run_or_of_a_larger_machine(two_cores, before, now):
    with fresh_accelerate():
        runtime = Runtime("no")
    runtime.begin_threads(before)
    assert runtime.threads == now


@pytest.mark.parametrize(("most", "now"), [(1, 1), (2, 2), (4096, 2)])
def test_the_most_threads_of_a_run_that_was_tuned_on_another_machine(two_cores, most, now):
    with fresh_accelerate():
        runtime = Runtime("no")
    runtime.limit_threads(most)
    assert runtime.threads == now


def test_freed_memory_is_kept_by_commands_on_a_cpu(two_cores, monkeypatch):
    calls = []
    monkeypatch.setattr(runtime_module, "keep_memory", lambda: calls.append("keep"))
    with fresh_accelerate():
        Runtime("no", 1)
    assert calls == ["keep"]
