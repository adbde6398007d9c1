"""--post_hoc_ema: averages in training and in checkpoints, and their snapshots in RUN/ema/."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.arrays import save_images
from tests.models import tiny_unet
from tests.short_run import SHORT_RUN, Interruption, dying_after, flags, run_here, run_on_two
from training.ema import FlatEMA
from training.post_hoc_ema import TRACKED, Profile, gamma_of
from training.run import checkpoint
from training.run.ema_snapshots import EMASnapshots, list_snapshots
from training.run.signals import StopSignal

OPTIONS = SHORT_RUN | {
    "train_batch_size": 4,
    "validation_steps": 0,
    "save_images_steps": 0,
    "num_sample_images": 2,
    "ddpm_num_inference_steps": 2,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 8,
    "max_train_steps": 8,
    "post_hoc_ema": "true",
    "report_to": "none",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averages")
    save_images(folder / "images", 60, 16, 16)
    tiny_unet(1, size=16).save_config(folder)
    return folder


def command_line(work, name, **options):
    folders = {"output_dir": work / name, "cache_dir": work / "cache", "train_data_dir": work / "images"}
    return flags(OPTIONS | folders | {"denoiser": work / "config.json"} | options)


def train(work, name, **options):
    return run_here("train.py", command_line(work, name, **options))


def train_until(work, name, step, **options):
    """The process dies after the checkpoint of this step."""
    with dying_after(step):
        train(work, name, **options)


def snapshots(run):
    return {path.name: path.read_bytes() for path in (run / "ema").iterdir()}


def names(steps):
    return {f"step-{step:06d}-{length:.2f}.safetensors" for step in steps for length in TRACKED}


def files(run, step):
    return checkpoint.verify(run / f"checkpoint-{step:06d}")["files"]


@pytest.fixture(scope="module")
def uninterrupted(work):
    assert train(work, "uninterrupted") == 0
    return work / "uninterrupted"


@pytest.mark.parametrize("length", TRACKED)
def test_they_are_the_averages_of_the_online_weights(uninterrupted, length):
    """The weights after step n, of its checkpoint, have the integral of the profile from n - 1 to n as their share."""
    assert snapshots(uninterrupted).keys() == names(range(1, 9))
    online = [load_file(uninterrupted / f"checkpoint-{step:06d}" / checkpoint.WEIGHTS) for step in range(1, 9)]
    for step in (1, 5, 8):
        shares = (torch.arange(step + 1, dtype=torch.float64) / step).pow(gamma_of(length) + 1).diff()
        snapshot = load_file(uninterrupted / "ema" / f"step-{step:06d}-{length:.2f}.safetensors")
        average = load_file(uninterrupted / f"checkpoint-{step:06d}" / checkpoint.AVERAGES[length])
        assert snapshot.keys() == average.keys() == online[0].keys()
        for name in snapshot:
            expected = sum(share * weights[name].double() for share, weights in zip(shares, online))
            torch.testing.assert_close(average[name].double(), expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(snapshot[name], average[name].half())


def test_they_change_nothing_else(uninterrupted, work):
    assert train(work, "plain", post_hoc_ema="false", checkpointing_steps=8) == 0
    expected = files(uninterrupted, 8)
    for name in checkpoint.AVERAGES.values():
        del expected[name]
    assert files(work / "plain", 8) == expected
    assert not (work / "plain" / "ema").exists()


@pytest.mark.parametrize("step", [1, 5])
def test_a_resumed_run_has_the_averages_of_an_uninterrupted_one(uninterrupted, work, step):
    run = work / f"resumed {step}"
    train_until(work, run.name, step)
    assert snapshots(run).keys() == names(range(1, step + 1))
    assert train(work, run.name, resume_from_checkpoint="latest") == 0
    assert files(run, 8) == files(uninterrupted, 8)
    assert snapshots(run) == snapshots(uninterrupted)


def test_snapshots_of_later_steps_are_replaced_by_the_same_on_two_processes(work):
    arguments = command_line(work, "two", train_batch_size=2)
    run_on_two("train.py", arguments)
    run = work / "two"
    expected, files_of_last = snapshots(run), files(run, 8)
    assert expected.keys() == names(range(1, 9))
    for step in (4, 8):
        (run / "ema" / f"step-{step:06d}-0.05.safetensors").write_bytes(b"of weights that were thrown away")
    (run / "ema" / "step-000007-0.10.safetensors").unlink()
    run_on_two("train.py", [*arguments, "--resume_from_checkpoint=checkpoint-000003"])
    assert checkpoint.verify(run / "checkpoint-000008")["num_processes"] == 2
    assert files(run, 8) == files_of_last
    assert snapshots(run) == expected


def test_snapshots_of_another_course_are_deleted(uninterrupted, work):
    """Resumed with another limit, whose snapshots are at other steps."""
    run = shutil.copytree(uninterrupted, work / "longer")
    arguments = {"resume_from_checkpoint": "checkpoint-000003", "max_train_steps": 384}
    train_until(work, run.name, 13, checkpointing_steps=13, **arguments)
    assert snapshots(run).keys() == names([1, 2, 3, 6, 12])  # at every 6th step of 384


def test_a_new_run_leaves_those_of_an_earlier_one_until_its_first_checkpoint(uninterrupted, work, monkeypatch):
    run = shutil.copytree(uninterrupted, work / "again")
    before = snapshots(run)
    save = checkpoint.save

    def dies(*arguments, **parts):
        assert snapshots(run) == before
        raise Interruption

    monkeypatch.setattr(checkpoint, "save", dies)
    with pytest.raises(Interruption):
        train(work, run.name, seed=1, checkpointing_steps=8)
    assert snapshots(run) == before
    monkeypatch.setattr(checkpoint, "save", save)
    with monkeypatch.context() as patch:  # stopped by a signal in its first step: perhaps begun by mistake
        patch.setattr(StopSignal, "requested", lambda self: True)
        assert train(work, run.name, seed=1, checkpointing_steps=8) == 143
    assert snapshots(run) == before
    train_until(work, run.name, 2, seed=1, checkpointing_steps=2)
    assert snapshots(run).keys() == names([1, 2])
    assert all(snapshots(run)[name] != before[name] for name in names([1, 2]))


def test_a_new_run_without_averages_leaves_none_of_an_earlier_one(uninterrupted, work):
    run = shutil.copytree(uninterrupted, work / "without")
    train_until(work, run.name, 2, seed=1, post_hoc_ema="false")
    assert snapshots(run) == {}


def test_settings_that_change_when_a_run_is_resumed(work, capsys):
    for name, setting in (("late", "false"), ("dropped", "true")):
        train_until(work, name, 4, post_hoc_ema=setting)
    capsys.readouterr()
    assert train(work, "late", resume_from_checkpoint="latest") == 0
    output = capsys.readouterr().out
    assert "post_hoc_ema is true, but the checkpoint is without its averages" in output
    assert "choose_ema.py" not in output and not (work / "late" / "ema").exists()
    record = json.loads((work / "late" / "pipeline" / "training.json").read_text())
    assert record["config"]["post_hoc_ema"] is False
    assert train(work, "dropped", resume_from_checkpoint="latest", post_hoc_ema="false") == 0
    assert "post_hoc_ema True -> False: no more snapshots" in capsys.readouterr().out
    assert snapshots(work / "dropped").keys() == names(range(1, 5))


def test_a_run_says_what_they_need_and_ends_early_if_that_is_not_free(uninterrupted, work, monkeypatch, capsys):
    weights = sum(tensor.numel() for tensor in load_file(uninterrupted / "pipeline" / "unet" / NAME).values())
    written = sum(map(len, snapshots(uninterrupted).values())) - 16 * 20_000
    assert written < 16 * 2 * weights < written + 16 * 20_000  # up to the headers of the files
    usage = SimpleNamespace(free=128 * 2 * weights)  # enough for them, but not for a checkpoint
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert train(work, "full") == 1
    output = capsys.readouterr()
    assert f"post_hoc_ema: snapshots of up to {256 * weights / 1e6:,.0f} MB in {work / 'full' / 'ema'}" in output.out
    assert "a checkpoint and the snapshots of post_hoc_ema need" in output.err and "are free: make room" in output.err
    assert "trained" not in output.out


NAME = "diffusion_pytorch_model.safetensors"


def test_a_full_disk_is_one_line(work, monkeypatch, capsys):
    def full(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.run.ema_snapshots.save_file", full)
    assert train(work, "full later") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py")]
    assert f"{work / 'full later' / 'ema'} cannot be written: No space left on device" in line and "latest" in line


# ---- When they are due -----------------------------------------------------------------------------------------------


SHAPES = {"weight": (2, 3), "bias": (2,)}


def make(tmp_path, tell=print):
    model = torch.nn.Linear(3, 2)
    ema = FlatEMA(model)
    return EMASnapshots(True, ema, tmp_path, tell), EMASnapshots(True, ema, None, tell)


@pytest.mark.parametrize("steps", [10, 64, 100, 1000])
def test_a_run_has_at_most_64_of_each_length(tmp_path, steps):
    main, other = make(tmp_path)
    for step in range(1, steps + 1):
        share = step / steps
        assert main.is_due(share) == other.is_due(share)
        if main.is_due(share):
            main.write(step, share)
            other.write(step, share)
    found = list_snapshots(tmp_path, SHAPES)
    assert len(found) == 2 * min(64, steps)
    assert {profile.step for profile in found} >= {steps, -(-steps // 64)}
    assert max(profile for profile in found) == Profile(gamma_of(0.05), steps)
    assert main.bytes_to_come() == 0


def test_a_run_that_is_ended_where_it_was_stopped_gets_those_of_its_last_step(tmp_path):
    """--max_train_steps set to the step that it has reached: nothing is left to train."""
    main, _ = make(tmp_path)
    main.load_state(main.state_dicts(), 7, share=0.5)
    assert not main.is_due(0.5)
    main.load_state(main.state_dicts(), 7, share=1.0)
    assert main.is_due(1.0)
    main.write(7, 1.0)
    assert {profile.step for profile in list_snapshots(tmp_path, SHAPES)} == {7} and not main.is_due(1.0)


def test_no_snapshots_and_damaged_ones_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"ema has no snapshots of averages: they come from train.py --post_hoc_ema"):
        list_snapshots(tmp_path, SHAPES)
    main, _ = make(tmp_path)
    main.write(1, 1.0)
    path = tmp_path / "ema" / "step-000001-0.05.safetensors"
    shutil.copy(path, path.with_name("step-000000-0.05.safetensors"))  # of no step
    assert [profile.step for profile in list_snapshots(tmp_path, SHAPES)] == [1, 1]
    for shapes in (SHAPES | {"more": (1,)}, {"bias": (2,)}, SHAPES | {"bias": (3,)}):
        with pytest.raises(ValueError, match=r"-0.05.safetensors is not of this network: (more|weight|bias)"):
            list_snapshots(tmp_path, shapes)
    read = list_snapshots(tmp_path, SHAPES)[Profile(gamma_of(0.05), 1)]
    for damaged in (path.read_bytes()[:-1], b""):
        path.write_bytes(damaged)
        for attempt in (read, lambda: list_snapshots(tmp_path, SHAPES)):
            with pytest.raises(ValueError, match=r"step-000001-0.05.safetensors cannot be read"):
                attempt()
