"""Checkpoints: complete ones are found, damaged ones are skipped, and no pickled code runs."""

import errno
import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.run import checkpoint
from training.run.checkpoint import CheckpointError

ROOT = Path(__file__).parents[1]
KEPT = (checkpoint.BEST, checkpoint.GUIDE)
FILES = (checkpoint.WEIGHTS, checkpoint.EMA, checkpoint.OPTIMIZER, *KEPT, checkpoint.MANIFEST)


def state(step):
    """Weights, EMA weights and optimizer state of a small network after two steps; they depend on `step`."""
    torch.manual_seed(step)
    model = torch.nn.Conv2d(2, 3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        model(torch.randn(1, 2, 4, 4)).square().sum().backward()
        optimizer.step()
    ema = {name: 2 * tensor.detach() for name, tensor in model.named_parameters()}
    return {"model": model.state_dict(), "ema": ema, "optimizer": optimizer.state_dict()}


def save(folder, step, total_limit=2):
    record, earlier = {"global_batch": 4, "x": [1]}, {name: state(step - 1 - i)["ema"] for i, name in enumerate(KEPT)}
    return checkpoint.save(folder, step, **state(step), others=earlier, record=record, total_limit=total_limit)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_saved_checkpoint_loads_back_equal(tmp_path):
    path = save(tmp_path / "new" / "run", 500)
    assert path.name == "checkpoint-000500"
    assert names(path) == sorted(FILES)
    newest, manifest = checkpoint.find(tmp_path / "new" / "run", "latest")
    assert newest == path
    assert {name: manifest[name] for name in ("step", "global_batch", "x")} == {
        "step": 500,
        "global_batch": 4,
        "x": [1],
    }
    expected = state(500)
    model, ema, optimizer = checkpoint.load(path)
    earlier = checkpoint.load_others(path)
    assert list(earlier) == list(KEPT)
    pairs = [(earlier[name], state(499 - i)["ema"]) for i, name in enumerate(KEPT)]
    for loaded, saved in ((model, expected["model"]), (ema, expected["ema"]), *pairs):
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], saved[name]) and loaded[name].dtype == torch.float32 for name in saved)
    assert optimizer["param_groups"] == expected["optimizer"]["param_groups"]
    for number, moments in expected["optimizer"]["state"].items():
        assert all(torch.equal(optimizer["state"][number][name], moment) for name, moment in moments.items())


def test_tensors_that_share_memory_or_are_not_contiguous_are_saved(tmp_path):
    flat = torch.arange(24.0)
    views = {"a": flat[:12].view(3, 4), "b": flat[12:].view(3, 4).t()}
    checkpoint.save(tmp_path, 1, model=views, ema={"a": flat[:2].clone()}, optimizer={}, record={}, total_limit=1)
    model, _, _ = checkpoint.load(tmp_path / "checkpoint-000001")
    assert checkpoint.load_others(tmp_path / "checkpoint-000001") == {}
    assert all(torch.equal(model[name], views[name]) for name in views)


# ---- Damage ----------------------------------------------------------------------------------------------------------


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def empty(file):
    file.write_bytes(b"")


def zeros(file):
    file.write_bytes(bytes(file.stat().st_size))


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(file):
    file.unlink()


def make_folder(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in FILES for damage in (empty, zeros, remove, make_folder)]
    + [(name, damage) for name in FILES[:4] for damage in (cut, flip_a_bit)],  # of the manifest: see the next test
)
def test_a_damaged_file_is_detected_and_latest_falls_back_to_the_previous_checkpoint(tmp_path, name, damage):
    previous, newest = save(tmp_path, 1), save(tmp_path, 2)
    damage(newest / name)
    with pytest.raises(CheckpointError, match=str(newest)):
        checkpoint.find(tmp_path, str(newest))
    lines = []
    assert checkpoint.find(tmp_path, "latest", lines.append)[0] == previous
    assert len(lines) == 1 and "checkpoint-000002 is skipped" in lines[0] and str(newest / name) in lines[0]
    damage(previous / name)
    with pytest.raises(CheckpointError, match=f"{newest}.*; .*{previous}"):  # a reason for each
        checkpoint.find(tmp_path, "latest")


def test_a_manifest_with_any_byte_changed_raises_checkpoint_error(tmp_path):
    path = save(tmp_path, 3)
    content = (path / checkpoint.MANIFEST).read_bytes()
    for position in range(content.index(b'"files"'), len(content) - 1):
        changed = bytearray(content)
        changed[position] ^= 1
        (path / checkpoint.MANIFEST).write_bytes(changed)
        try:
            assert checkpoint.verify(path)["step"] == 3  # only white space was hit
            assert content[position : position + 1].isspace()
        except CheckpointError:
            pass
    for other in ("[]", "3", "null", '"files"', '{"files": 1}', '{"files": {"model.safetensors": [1]}}', "{"):
        (path / checkpoint.MANIFEST).write_text(other)
        with pytest.raises(CheckpointError, match="checkpoint-000003"):
            checkpoint.verify(path)


# ---- Names -----------------------------------------------------------------------------------------------------------


def test_folders_with_other_names_are_neither_found_nor_deleted(tmp_path):
    complete = save(tmp_path, 7, total_limit=1)
    strays = ["checkpoint-000900.tmp", "checkpoint-500-bak", "checkpoint-000800-bak", "checkpoint-900", "checkpoint-"]
    for stray in (*strays, "checkpoint-0009x0", "my-checkpoint-000900"):
        shutil.copytree(complete, tmp_path / stray)
    (tmp_path / "checkpoint-000950").write_text("a file")
    everything = names(tmp_path)
    assert checkpoint.find(tmp_path, "latest")[0] == complete
    assert save(tmp_path, 8, total_limit=1).name == "checkpoint-000008"
    assert set(everything) - set(names(tmp_path)) == {"checkpoint-000007"}


def test_leftovers_of_an_interrupted_save_are_removed(tmp_path):
    for name in ("checkpoint-000005.tmp", "checkpoint-000005.tmp-123", f"checkpoint-000005.tmp-{os.getpid()}"):
        leftover = tmp_path / name
        leftover.mkdir()
        (leftover / "model.safetensors").write_text("half")
        (leftover / "more").write_text("more")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.find(tmp_path, "latest")
    path = save(tmp_path, 5)  # one leftover is of an earlier process with this process id
    checkpoint.clean_up(tmp_path)
    assert names(tmp_path) == ["checkpoint-000005"]
    assert names(path) == sorted(FILES)
    checkpoint.verify(path)


def test_a_complete_checkpoint_whose_replacement_is_missing_is_restored(tmp_path):
    path = save(tmp_path, 5)
    path.rename(tmp_path / "checkpoint-000005.old")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.find(tmp_path, "latest")
    checkpoint.clean_up(tmp_path)
    assert checkpoint.find(tmp_path, "latest")[0] == path
    shutil.copytree(path, tmp_path / "checkpoint-000005.old")
    checkpoint.clean_up(tmp_path)
    assert names(tmp_path) == ["checkpoint-000005"]


def test_cleaning_up_leaves_other_names_alone(tmp_path):
    kept = ["checkpoint-5.tmp", "checkpoint-000005.tmp-x", "checkpoint-000005.bak", "my-checkpoint-000005.tmp"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-000005.tmp").write_text("a file")
    checkpoint.clean_up(tmp_path)
    assert names(tmp_path) == sorted([*kept, "checkpoint-000005.tmp"])


def test_latest_is_the_highest_step_not_the_last_name(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert checkpoint.find(tmp_path, "latest")[1]["step"] == 1_000_000


def test_a_folder_may_be_a_link_or_end_in_a_slash(tmp_path):
    first, _ = save(tmp_path, 1), save(tmp_path, 2)
    (tmp_path / "best").symlink_to(first)
    for which in (str(first) + "/", str(tmp_path / "best"), first.name):
        assert checkpoint.find(tmp_path, which)[1]["step"] == 1
    other = save(tmp_path / "other run", 3)
    backup = shutil.copytree(first, tmp_path / "checkpoint-000001-bak")
    for which in (tmp_path, tmp_path / "nothing", other, backup):
        with pytest.raises(CheckpointError, match=str(which)):
            checkpoint.find(tmp_path, str(which))


# ---- Rotation: the new one is verified before an old one is deleted --------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_the_newest_checkpoints_are_kept(tmp_path, limit):
    for step in range(1, 6):
        new = save(tmp_path, step, limit)
        assert new.is_dir()
        assert names(tmp_path) == [f"checkpoint-{n:06d}" for n in range(max(1, step - limit + 1), step + 1)]
        for path in tmp_path.iterdir():
            checkpoint.verify(path)


@pytest.mark.parametrize("limit", [1, 2])
def test_later_checkpoints_of_a_replaced_run_are_deleted(tmp_path, limit):
    for step in (10, 20):
        save(tmp_path, step, 2)
    new = save(tmp_path, 15, limit)
    assert checkpoint.find(tmp_path, "latest")[0] == new
    assert names(tmp_path) == ["checkpoint-000010", "checkpoint-000015"][-limit:]
    again = save(tmp_path, 15, limit)
    assert again == new
    checkpoint.verify(again)


@pytest.mark.parametrize("fails", ["safetensors_bytes", "torch.save", "_flush_folder", "json.dumps", "os.fsync"])
def test_a_failed_save_keeps_the_old_checkpoint_and_leaves_nothing(tmp_path, monkeypatch, fails):
    old = save(tmp_path, 1, total_limit=1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    owner = {"torch.save": torch, "json.dumps": json, "os.fsync": os}.get(fails, checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(owner, fails.split(".")[-1], full)
        with pytest.raises(checkpoint.DiskFullError, match=f"{tmp_path}/checkpoint-000002.*No space.* bytes, .* free"):
            save(tmp_path, 2, total_limit=1)
    assert checkpoint.find(tmp_path, "latest")[0] == old
    assert names(tmp_path) == ["checkpoint-000001"]
    save(tmp_path, 2, total_limit=1)
    assert names(tmp_path) == ["checkpoint-000002"]


@pytest.mark.parametrize("code", ["EACCES", "EINVAL", "ENOTSUP", "EBADF", "EPERM"])
@pytest.mark.parametrize("refuses", ["open", "fsync"])
def test_a_system_that_cannot_flush_folders_still_has_checkpoints(tmp_path, monkeypatch, refuses, code):
    """Windows does not open them; some network drives do not flush them."""
    real = getattr(os, refuses)

    def refuse(path, *args):
        if os.path.isdir(path if refuses == "open" else f"/proc/self/fd/{path}"):
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        return real(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(os, refuses, refuse)
        path = save(tmp_path, 3)
    assert checkpoint.find(tmp_path, "latest")[0] == path


def test_everything_is_flushed_before_the_rename_and_verified_before_the_old_one_is_deleted(tmp_path, monkeypatch):
    save(tmp_path, 1, total_limit=1)
    events = []
    fsync, replace, rmtree = os.fsync, os.rename, shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(checkpoint.Path, "replace", lambda a, b: (events.append(f"renamed to {b.name}"), replace(a, b)))
    verify = checkpoint.verify
    monkeypatch.setattr(checkpoint, "verify", lambda path: (events.append("verified"), verify(path)))
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **options: (events.append(f"deleted {path.name}"), rmtree(path, **options))
    )
    save(tmp_path, 2, total_limit=1)
    temporary, hidden = tmp_path / f"checkpoint-000002.tmp-{os.getpid()}", f"checkpoint-000001.tmp-{os.getpid()}"
    assert events[0] == f"deleted {temporary.name}"
    renamed = 2 + len(FILES)
    assert sorted(events[1:renamed]) == sorted(map(str, [temporary, *(temporary / name for name in FILES)]))
    assert events[renamed:] == [
        "renamed to checkpoint-000002", str(tmp_path), "verified", f"renamed to {hidden}", f"deleted {hidden}"
    ]  # fmt: skip


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch):
    save(tmp_path, 1, total_limit=1)

    def denied(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(13, "Denied")

    monkeypatch.setattr(shutil, "rmtree", denied)
    with pytest.warns(UserWarning, match="checkpoint-000001.* cannot be deleted: Denied"):
        new = save(tmp_path, 2, total_limit=1)
    assert checkpoint.find(tmp_path, "latest")[0] == new


def test_a_checkpoint_that_reads_back_differently_deletes_no_older_one(tmp_path, monkeypatch):
    old, write = save(tmp_path, 1, total_limit=1), checkpoint._write

    def bad_disk(path, content):
        entry = write(path, content)
        flip_a_bit(path)
        return entry

    monkeypatch.setattr(checkpoint, "_write", bad_disk)
    with pytest.raises(CheckpointError, match="checkpoint-000002"):
        save(tmp_path, 2, total_limit=1)
    assert checkpoint.find(tmp_path, "latest")[0] == old


# ---- The lock, and free space ----------------------------------------------------------------------------------------


LOCK_AND_WAIT = """
import multiprocessing, pathlib, sys, time
from training.run import checkpoint
lock = checkpoint.lock(pathlib.Path(sys.argv[1]))
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
child.start()  # as a process that decodes images: it survives if its parent is killed
print(child.pid, flush=True)
input()
"""


def test_a_folder_is_locked_against_other_processes_until_its_holder_dies(tmp_path):
    command = [sys.executable, "-c", LOCK_AND_WAIT, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        forked = int(holder.stdout.readline())
        try:
            with pytest.raises(CheckpointError, match=f"another run is writing.*process {holder.pid} on"):
                checkpoint.lock(tmp_path / "run")
            holder.kill()
            holder.wait()
            os.kill(forked, 0)  # still alive
            lock = checkpoint.lock(tmp_path / "run")
        finally:
            os.kill(forked, signal.SIGKILL)
    assert f"process {os.getpid()}" in (tmp_path / "run" / ".lock").read_text()
    with pytest.raises(CheckpointError, match=f"another run is writing.*process {os.getpid()} on"):
        checkpoint.lock(tmp_path / "run")
    lock.release()
    checkpoint.lock(tmp_path / "run").release()


def test_a_lock_without_a_holder_is_released(tmp_path):
    checkpoint.lock(tmp_path)  # as when an exception ends a run and the process lives on
    checkpoint.lock(tmp_path).release()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, code):
    def no_locks(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match=f"{tmp_path}/.lock cannot be locked: {os.strerror(code)}"):
        lock = checkpoint.lock(tmp_path)
    assert not lock.is_locked
    lock.release()


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/run"):
        with pytest.raises(CheckpointError, match=f"output_dir is '{tmp_path / name}'"):
            checkpoint.lock(tmp_path / name)


def test_free_space_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    old = save(tmp_path, 1, total_limit=1)
    free = 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
    monkeypatch.setattr(checkpoint, "_write", lambda *_: pytest.fail("written"))
    with pytest.raises(checkpoint.DiskFullError, match=r"needs [\d,]+ bytes, (but )?1,000 are free"):
        save(tmp_path, 2, total_limit=1)
    assert checkpoint.find(tmp_path, "latest")[0] == old


def test_the_estimated_bytes_are_about_those_written(tmp_path):
    model = torch.nn.Linear(1000, 1000)
    optimizer = torch.optim.AdamW(model.parameters())
    before_training = checkpoint.estimate_bytes(model.state_dict(), model.state_dict())
    model(torch.ones(1, 1000)).sum().backward()
    optimizer.step()
    states = {"model": model.state_dict(), "ema": model.state_dict(), "optimizer": optimizer.state_dict()}
    path = checkpoint.save(tmp_path, 1, **states, record={}, total_limit=1)
    written = sum(file.stat().st_size for file in path.iterdir())
    for estimate in (before_training, checkpoint.estimate_bytes(**states)):
        assert written <= estimate <= 1.1 * written
    assert checkpoint.estimate_bytes(*states.values(), states["ema"]) == estimate + 4 * 1001 * 1000


# ---- Pickles ---------------------------------------------------------------------------------------------------------


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    optimizer = {"state": {}, "param_groups": [Canary(canary)]}
    path = checkpoint.save(tmp_path, 1, model={}, ema={}, optimizer=optimizer, record={}, total_limit=1)
    checkpoint.find(tmp_path, "latest")  # sizes and sha256 are right
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        checkpoint.load(path)
    (path / checkpoint.OPTIMIZER).write_bytes(pickle.dumps(Canary(canary), protocol=2))
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        checkpoint.load(path)
    assert not canary.exists()
